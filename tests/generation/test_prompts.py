"""Prompts from files and the command line."""

import pytest

from runner.errors import ConfigError
from runner.generation.prompts import given_prompts, prompts_of, read_prompts
from runner.generation.settings import Settings, spoken


def test_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufefffirst\r\n\r\nsecond\\nline\\\\n\\t\\q\n   \nthird\x0b still third".encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["first", "second\nline\\n\t\\q", "third\x0b still third"]


def test_an_object_a_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "one\\ntwo", "id": 7}\r\n\n{"messages": [{"role": "user", "content": "hello"}]}\n'
    )
    first, second = read_prompts(path)
    assert (first.text, first.extra) == ("one\ntwo", {"id": 7})
    assert second.messages == ({"role": "user", "content": "hello"},)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", b"\n \r\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "no UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\nnot json', "line 2: is no JSON"),
        ("p.jsonl", b'["a"]', "line 1: give an object"),
        ("p.jsonl", b'{"text": "a"}', "line 1: give an object"),
        ("p.jsonl", b'{"prompt": 3}', "give a text"),
        ("p.jsonl", b'{"messages": []}', "must be a list"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', "must be a list"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_prompts(tmp_path / name)


def test_what_is_given():
    assert given_prompts(None, None) == []
    assert [prompt.text for prompt in given_prompts(["a", "b"], None)] == ["a", "b"]
    for prompt, file in (("a", "b.txt"), ([], None), ([1], None), (None, "nowhere.txt")):
        with pytest.raises(ConfigError):
            given_prompts(prompt, file)
    assert [prompt.ids for prompt in prompts_of([[1, 2], [3]])] == [(1, 2), (3,)]
    for wrong in ([1, 2], [True], [["a"]]):
        with pytest.raises(ConfigError):
            prompts_of(wrong)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1}, {"temperature": "hot"}, {"temperature": float("nan")}, {"top_k": 0}, {"top_k": 1.5},
        {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2}, {"repetition_penalty": 0}, {"max_new_tokens": 0},
        {"seed": -1}, {"seed": None}, {"num_samples": 0}, {"batch_size": 0}, {"stop": [""]}, {"stop": 3}, {"cache": 1},
        {"ignore_eos": "no"}, {"chat": "maybe"}, {"stream": 1}, {"special_tokens": None}, {"layers": [-1]},
        {"layers": "all"}, {"system": 3}, {"max_new_tokens": True},
    ],
)  # fmt: skip
def test_values_out_of_range(values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"generate.{name}="):
        Settings(**values)


def test_settings_that_are_spoken():
    changed = Settings().changed(spoken("temperature=0 top_k=40 generate.stop=[a,b] layers=[]"))
    assert (changed.temperature, changed.top_k, changed.stop, changed.layers) == (0, 40, ("a", "b"), ())
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        Settings().changed(spoken("temprature=0"))
    for wrong in ("temperature", "=3", "a=["):
        with pytest.raises(ConfigError):
            spoken(wrong)
