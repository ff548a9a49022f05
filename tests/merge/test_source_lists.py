"""`merge.sources` as people type it reaches Hydra with every path quoted."""

from pathlib import Path

import pytest

from runner.errors import ConfigError
from runner.overrides import spell


def test_a_list_of_sources_is_spelled_item_by_item(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spelled = {
        "[a,b c]": "['a','b c']",
        "[ 'a' , \"b,c\" ]": "['a','b,c']",
        "[{path: a=1, layers: [11, 12]}, b]": "[{path:'a=1',layers:[11, 12]},'b']",
        "a b": "['a b']",
    }
    for typed, expected in spelled.items():
        assert spell("merge.sources", typed, multirun=False) == f"merge.sources={expected}"
    for name in ("a,b", "it's", "[x]", "c"):
        Path(name).mkdir()
    assert spell("merge.sources", "[a,b,it's,c]", multirun=False) == r"merge.sources=['a,b','it\'s','c']"
    assert spell("merge.sources", "[x]", multirun=False) == "merge.sources=['[x]']"


def test_many_sources_are_longer_together_than_a_name_may_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"run_of_layer_{number:02}" for number in range(30)]
    expected = f"merge.sources=[{','.join(repr(name) for name in names)}]"
    assert spell("merge.sources", f"[{','.join(names)}]", multirun=False) == expected
    for name in names:
        Path(name).mkdir()
    assert spell("merge.sources", f"[{','.join(names)}]", multirun=False) == expected
    assert spell("ckpt", "n" * 300, multirun=False) == f"ckpt='{'n' * 300}'"


def test_the_home_directory_of_nobody_is_named():
    for key, value in (("merge.output", "~nobody_here/x"), ("merge.sources", "[~nobody_here/x]")):
        with pytest.raises(ConfigError, match=r"~nobody_here/x.*: there is no such user; write the path without ~"):
            spell(key, value, multirun=False)
