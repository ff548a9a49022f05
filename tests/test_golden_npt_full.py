"""All golden npt_full checkpoints: logits, fidelity, and base weights that come from the checkpoint."""

import pytest
import torch

import runner
from runner.errors import CheckpointError
from tests.conftest import golden_numbers

EXPECTED = golden_numbers("npt_full")
PROMPTS = ["The capital of France is", "2 + 2 equals", "The largest planet in our solar system is"]


@pytest.mark.parametrize("name", EXPECTED)
def test_last_logits(name, golden):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(golden("npt/base"))
    model = runner.load(golden(f"npt_full/{name}"))
    for prompt, expected in zip(PROMPTS, EXPECTED[name]["last_logits"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        torch.testing.assert_close(model(ids).logits[0, -1], torch.tensor(expected), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", EXPECTED)
def test_figures(name, golden):
    expected = EXPECTED[name]
    result = runner.diagnose(golden(f"npt_full/{name}"), base=golden("npt/base"), tier="full")
    assert (result["format"], result["family"], result["step"]) == ("npt_full", "npt", expected["step"])
    assert [layer["np_rank"] for layer in result["layers"]] == [expected["rank"]] * expected["npt_layers"]
    assert [row["mse"] for row in result["per_prompt"]] == pytest.approx(expected["mse"], rel=1e-4)
    assert [row["cosine"] for row in result["per_prompt"]] == pytest.approx(expected["cosine"], abs=1e-5)
    assert result["metrics"]["mse"] == pytest.approx(expected["avg_mse"], rel=1e-4)
    assert result["metrics"]["cosine"] == pytest.approx(expected["avg_cosine"], abs=1e-5)
    assert result["metrics"]["control_mse"] == 0.0
    differs = any("base weights differ" in finding for finding in result.get("findings", []))
    assert differs == (name == "updated_base")


def test_a_plain_copy_is_hf_and_gets_no_verdict(golden):
    base = golden("npt/base")
    result = runner.diagnose(base, reference=base)
    assert (result["format"], result["metrics"]["mse"], result["verdict"]) == ("hf", 0.0, None)
    with pytest.raises(CheckpointError, match="No NPT layers found"):
        runner.diagnose(base, format="npt_full")
