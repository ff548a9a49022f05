"""Greedy tokens of every golden NPT checkpoint, through `runner.generate`: cached and not, alone and in batches."""

import pytest

import runner
from tests.conftest import golden_numbers

GREEDY = {name: each["greedy"] for name, each in golden_numbers("npt").items() if "greedy" in each}


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_tokens(name, cache, golden):
    ids, new = GREEDY[name]["ids"], GREEDY[name]["new"]
    options = {"temperature": 0, "ignore_eos": True, "max_new_tokens": new, "cache": cache}
    lengths = [len(ids) - new, len(ids) - 1, len(ids) - new + 3]
    made = list(runner.generate(golden(f"npt/{name}"), [ids[:length] for length in lengths], **options))
    for sample in made:
        assert [*sample["ids"], *sample["new_ids"]][: len(ids)] == ids
    (text,) = runner.generate(golden(f"npt/{name}"), [GREEDY[name]["prompt"]], **options)
    assert [*text["ids"], *text["new_ids"]] == ids
