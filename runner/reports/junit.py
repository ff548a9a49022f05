"""The checks of a result as JUnit XML, which CI systems show: one test case a check."""

import re
from pathlib import Path
from xml.etree import ElementTree

from runner.errors import ConfigError
from runner.files.atomic import write_whole
from runner.results import JsonObject

# What XML 1.0 cannot hold; a tensor's name may.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(result: JsonObject, *, strict: bool) -> ElementTree.Element:
    """`<testsuites>` with one suite: failures of integrity checks fail their case, with `strict` also warnings."""
    cases = [_case(row, result, strict) for row in result["checks"]]
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": 0,
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    attributes = {name: str(count) for name, count in counts.items()}
    attributes["time"] = f"{sum(row['seconds'] for row in result['checks']):.3f}"
    root = ElementTree.Element("testsuites", {"name": "runner", **attributes})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _suite(result), **attributes})
    suite.extend(cases)
    return root


def is_directory(given: str) -> bool:
    """Whether `junit=` means a directory, in which each job has a file of its own."""
    return given.endswith("/") or Path(given).expanduser().is_dir()


def junit_path(given: str, tested: str, tier: str, job: str | None = None) -> Path:
    """The file that `junit=` means.

    `tested`: the checkpoint's path, or what stands for it; `job`: its number in a sweep. In a directory (one that is
    there, or a name with / at its end) each has a file of its own, so that jobs do not replace each other's.
    """
    path = Path(given).expanduser()
    if not is_directory(given):
        return path
    name = Path(tested).absolute()
    harmless = re.sub(r"[^\w.@-]", "_", "-".join(filter(None, (name.parent.name, name.name, tier, job))))
    return path / f"TEST-{harmless}.xml"


def write_junit(path: Path, result: JsonObject, *, strict: bool) -> None:
    """Write the XML so that a reader sees the old file or the new one. Raises ConfigError where it cannot be."""
    text = ElementTree.tostring(junit(result, strict=strict), encoding="utf-8", xml_declaration=True)
    try:
        write_whole(path, text + b"\n")
    except OSError as error:
        raise ConfigError(f"junit={path}: cannot be written: {error.strerror}") from error


def _suite(result: JsonObject) -> str:
    return _clean(" ".join(filter(None, ["runner", result.get("tier"), result.get("family")])))


def _case(row: JsonObject, result: JsonObject, strict: bool) -> ElementTree.Element:
    named = {"classname": _suite(result).replace(" ", "."), "name": row["name"], "time": f"{row['seconds']:.3f}"}
    case = ElementTree.Element("testcase", named)
    details = _clean(row["details"])
    bad = (row["integrity"] and row["status"] == "fail") or (strict and row["status"] in ("fail", "warning"))
    if bad:
        failure = ElementTree.SubElement(case, "failure", {"message": details, "type": row["status"]})
        failure.text = _clean(row.get("recommendation", ""))
    elif row["status"] == "skipped":
        ElementTree.SubElement(case, "skipped", {"message": details})
    else:
        output = ElementTree.SubElement(case, "system-out")
        output.text = f"{row['status']}: {details}" if row["status"] != "pass" else details
    return case


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("�", text)
