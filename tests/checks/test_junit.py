"""JUnit XML as CI systems read it."""

from xml.etree import ElementTree

import pytest

from runner.errors import ConfigError
from runner.reports.junit import write_junit

ROWS = [
    {"name": "files", "integrity": True, "status": "pass", "details": "3 files", "seconds": 0.25},
    {"name": "keys", "integrity": True, "status": "fail", "details": 'lacks <a&b> "c\x1b"', "recommendation": "copy",
     "seconds": 0.5},
    {"name": "loading", "integrity": True, "status": "skipped", "details": "needs keys", "seconds": 0.0},
    {"name": "fidelity", "integrity": False, "status": "warning", "details": "mse 0.3", "seconds": 1.0},
]  # fmt: skip
RESULT = {"task": "test", "tier": "full", "family": "npt", "checks": ROWS}


@pytest.mark.parametrize(("strict", "failing"), [(False, ["keys"]), (True, ["keys", "fidelity"])])
def test_each_check_is_a_case(tmp_path, strict, failing):
    path = tmp_path / "deep" / "junit.xml"
    write_junit(path, RESULT, strict=strict)
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    (suite,) = root
    assert suite.attrib == {
        "name": "runner full npt", "tests": "4", "failures": str(len(failing)), "errors": "0", "skipped": "1",
        "time": "1.750",
    }  # fmt: skip
    assert [case.get("name") for case in suite] == ["files", "keys", "loading", "fidelity"]
    assert [case.get("name") for case in suite if case.find("failure") is not None] == failing
    assert suite[1].find("failure").get("message") == 'lacks <a&b> "c�"'
    assert suite[1].find("failure").text == "copy"
    assert suite[2].find("skipped").get("message") == "needs keys"
    assert [file.name for file in path.parent.iterdir()] == ["junit.xml"], "nothing half-written is left"


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"junit=.*: cannot be written"):
        write_junit(tmp_path / "file" / "junit.xml", RESULT, strict=True)


def test_the_command_line_writes_it(run, checkpoint, tmp_path):
    (checkpoint / "npt_weights.pt").write_text("<html>")
    outcome = run("task=test", f"ckpt={checkpoint}", f"junit={tmp_path / 'a=b.xml'}")
    assert outcome.code == 1
    root = ElementTree.parse(tmp_path / "a=b.xml").getroot()
    assert [case.get("name") for case in root.iter("testcase") if case.find("failure") is not None] == ["files"]
