"""Paths as people name them reach the task unchanged, whatever Hydra's grammar thinks of them."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config import register
from runner.errors import ConfigError
from runner.installation import config_directory
from runner.overrides import parse, quoted, spell, split_list, unquoted
from runner.run import _spelled, setup

AWKWARD = [
    "a b", "a=b", "a,b", "[a]", "a[1]b", "(a)", "~a", "#a", "a'b", 'a"b', "1e5", "true", "null ", "émile", "日本", "🙂",
    "a\\b", "a\\", "a\\'b", "${x}", "a${b}c", "\\${x}", "a:b", "{a}", "a\nb", "a\tb", "100%", "a;b", "$HOME", "-", "'",
    '"', "''", "'a'", "x'", "*", "a\\\\", "\\\\${x}", "$${x}", "1_000", "nan", "?", "a|b", "a&b",
    "a${b}c\\\\", "\\\\\\${", "@", "!", "a/./b",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def composing():
    setup()
    register()
    with initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
        yield


def composed(*overrides: str) -> str:
    return compose("config", overrides=["tracker=none", *overrides]).ckpt


@pytest.mark.parametrize("path", AWKWARD)
def test_awkward_paths_survive(path):
    assert composed(f"ckpt={quoted(path)}") == path


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=12))
def test_any_text_survives(path):
    if path != "???":  # OmegaConf's own word for a missing value
        assert composed(f"ckpt={quoted(path)}") == path


def test_an_existing_path_wins_over_commas_and_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "'a'", "[x]"):
        Path(name).mkdir()
        for multirun in (False, True):
            assert composed(spell("ckpt", name, multirun=multirun)) == name


def test_lists_are_quoted_part_by_part():
    assert spell("ckpt", "a b,c=d", multirun=True) == "ckpt='a b','c=d'"
    assert spell("ckpt", "a,b", multirun=False) == "ckpt='a,b'"
    assert spell("ckpt", "${base}", multirun=False) == "ckpt=${base}"
    assert spell("ckpt", "null", multirun=False) == "ckpt=null"
    assert spell("seed", "1", multirun=False) == "seed=1"


def test_split_list():
    assert split_list("[a, b]") == ["a", "b"]
    assert split_list("'a,b',c(d,e),[f,g]") == ["'a,b'", "c(d,e)", "[f,g]"]
    assert split_list("[a],[b]") == ["[a]", "[b]"]
    assert split_list("[it's,:-), 'x, y' ,don't]") == ["it's", ":-)", "'x, y'", "don't"]
    assert split_list("[it's (here, b]") == ["it's (here", "b"]
    assert split_list("[{path: 'a],b', layers: [1,2]},c]") == ["{path: 'a],b', layers: [1,2]}", "c"]


def test_flags_may_stand_anywhere():
    line = parse(["task=diagnose", "-m", "step=1,2", "--cfg", "job", "ckpt=x=y"])
    assert line.flags == ("-m", "--cfg", "job")
    assert line.overrides == (("task", "diagnose"), ("step", "1,2"), ("ckpt", "x=y"))
    assert line.multirun
    assert line.get("ckpt") == "x=y"
    assert unquoted("'a\\'b'") == "a'b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["foo"], "'foo' is no option"),
        (["--tier", "full"], "unknown flag --tier; options are written tier=…"),
        (["--multirum"], "did you mean '--multirun'?"),
        (["--cfg"], "--cfg needs a value"),
    ],
)
def test_words_that_are_no_options(words, message):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("1234e5", "1234e5"),
        ("1_000", "1_000"),
        ("null", None),
        ("'7e7'", "7e7"),
        ("Hello, world: 2 + 2 = ?", "Hello, world: 2 + 2 = ?"),
        ("it's (here)", "it's (here)"),
    ],
)
def test_text_is_what_was_typed(typed, means):
    """Hydra takes `1234e5`, as a run or a commit may be called, for a number, also where the field is a text."""
    assert compose("config", overrides=[spell("tracker.name", typed, multirun=False)]).tracker.name == means


def test_each_text_of_a_list_or_a_sweep_is_text():
    prompts = compose("config", overrides=[spell("data.prompts", "[2 + 2 =,1e5,'a, b']", multirun=False)]).data.prompts
    assert prompts == ["2 + 2 =", "1e5", "a, b"]
    assert spell("tracker.name", "7e7,1_0", multirun=True) == "tracker.name='7e7','1_0'"
    assert spell("data.prompts", "[a],[b, c]", multirun=True) == "data.prompts=['a'],['b','c']"
    assert spell("data.prompts", "[It's me,don't]", multirun=False) == r"data.prompts=['It\'s me','don\'t']"
    for half in ("[a", "[a],[b]"):
        with pytest.raises(ConfigError, match="is no list"):
            spell("data.prompts", half, multirun=False)


def test_values_of_python_are_spelled_for_hydra():
    given = {"data.prompts": ["a, b", "it's"], "tier.temperatures": (0.5,), "seed": 3, "tracker.name": "1e5"}
    config = compose("config", overrides=[f"{key}={_spelled(value)}" for key, value in given.items()])
    assert (config.data.prompts, config.tier.temperatures, config.seed) == (["a, b", "it's"], [0.5], 3)
    assert config.tracker.name == "1e5"
