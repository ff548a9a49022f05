"""All golden npt_delta checkpoints: whatever expected.json gives is reproduced."""

import pytest
import torch

import runner
from runner.evaluation.decoding import generate
from tests.conftest import golden_numbers

EXPECTED = golden_numbers("npt")
NAMES = [name for name in EXPECTED if not name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_figures(name, golden):
    expected = EXPECTED[name]
    result = runner.diagnose(golden(f"npt/{name}"), base=golden("npt/base"), tier="full")
    assert [layer["layer"] for layer in result["layers"]] == expected["layers"]
    kinds = [[layer["modulation"], layer["np_rank"], layer["num_ranks"]] for layer in result["layers"]]
    if "kinds" in expected:
        assert kinds == [expected["kinds"][str(layer)] for layer in expected["layers"]]
    else:
        assert kinds == [[expected["modulation"], expected["np_rank"], expected["num_ranks"]]] * len(kinds)
    assert result.get("step") == expected.get("step")
    assert [row["prompt"] for row in result["per_prompt"]] == EXPECTED["_prompts"]
    assert [row["mse"] for row in result["per_prompt"]] == pytest.approx(expected["mse"], rel=1e-5)
    assert [row["cosine"] for row in result["per_prompt"]] == pytest.approx(expected["cosine"], abs=1e-5)
    assert result["metrics"]["mse"] == pytest.approx(expected["avg_mse"], rel=1e-5)
    assert result["metrics"]["cosine"] == pytest.approx(expected["avg_cosine"], abs=1e-5)
    assert result["metrics"]["control_mse"] == 0.0
    for layer in result["layers"] if "isolated" in expected else []:
        theirs = expected["isolated"][str(layer["layer"])]
        assert layer["mse"] == pytest.approx(theirs["mse"], rel=1e-5)
        assert layer["cosine"] == pytest.approx(theirs["cosine"], abs=1e-5)
        assert layer["kl"] == pytest.approx(theirs["kl"], rel=1e-4)
    for n, mse in expected.get("progressive", {}).items():
        assert result["progressive"][int(n) - 1]["mse"] == pytest.approx(mse, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "greedy" in EXPECTED[name]])
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_tokens(name, cache, golden):
    greedy = EXPECTED[name]["greedy"]
    model = runner.load(golden(f"npt/{name}"))
    prompt = torch.tensor(greedy["ids"][: -greedy["new"]])
    assert generate(model, prompt, greedy["new"], cache=cache) == greedy["ids"][-greedy["new"] :]
