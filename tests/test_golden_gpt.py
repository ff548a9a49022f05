"""The golden GPT checkpoints: the numbers of the programs that wrote them."""

import os
import subprocess
import sys

import pytest
import torch

from runner.checkpoints.checkpoint import Listing
from runner.families.gpt.checkpoint import FORMATS
from tests.conftest import ROOT, golden_numbers
from tests.gpt_files import built, model, opened

EXPECTED = golden_numbers("gpt")
NAMES = ["medium", "small"]


def expected_tensors(path):
    return torch.load(path / "expected.pt", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_details(name, golden):
    listing = Listing.of(golden(f"gpt/{name}"))
    theirs = EXPECTED[name]
    assert [each.name for each in FORMATS if each.matches(listing)] == [f"gpt_{name}"]
    checkpoint = opened(listing.path, name)
    details = checkpoint.details
    found = [details.num_layers, details.num_heads, details.model_dim, details.vocab_size, details.head_rows]
    assert found == [theirs[key] for key in ("layers", "heads", "dim", "vocab", "head_rows")]
    assert (details.num_scalars, len(details.keys)) == (theirs["scalars"], theirs["keys"])
    assert checkpoint.weights.stripped_prefix == "_orig_mod."
    description = FORMATS[name == "medium"].describe(checkpoint)
    assert (checkpoint.step, description["val_loss"]) == (22550, 1.2727)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_logits(name, golden):
    path = golden(f"gpt/{name}")
    theirs, expected = EXPECTED[name], expected_tensors(path)
    logits = built(opened(path, name))(expected["tokens"][None]).logits[0]
    torch.testing.assert_close(logits[expected["rows"]], expected["logits"], rtol=0, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(logits, expected["tokens"].roll(-1))
    assert float(loss) == pytest.approx(theirs["loss"], rel=1e-6)
    assert float(logits.abs().mean()) == pytest.approx(theirs["logits_abs_mean"], rel=1e-6)


# The arithmetic of each dialect in a checkpoint that is small enough for the repository: heads of 8 instead of 128.
TINY = {"small": "2025-05-24_StableTorch", "medium": "ipa_large_lite"}


@pytest.mark.parametrize("dialect", TINY)
@torch.inference_mode()
def test_logits_with_tiny_heads(dialect, golden):
    path = golden(f"gpt_records/{TINY[dialect]}")
    saved = torch.load(path / "state_step001395.pt", weights_only=True)["model"]
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved.items()}
    if dialect == "small":
        state["scalars"] = gathered_scalars(state)
    expected = expected_tensors(path)
    logits = model(dialect, state, head_dim=8)(expected["tokens"][None]).logits[0]
    found = logits[expected["rows"]][:, expected["columns"]]
    torch.testing.assert_close(found, expected["logits"], rtol=0, atol=2e-4)


def gathered_scalars(state):
    """The scalars of one entry earlier, taken out of `state`, as the small dialect holds them: skips, lambdas, values'."""
    skips, layers = state.pop("skip_weights"), 12
    lambdas = [state.pop(f"blocks.{i}.lambdas") for i in range(layers)]
    values = [state.pop(f"blocks.{i}.attn.lambdas", torch.zeros(2)) for i in range(layers)]
    return torch.cat([skips, torch.zeros(layers - len(skips)), *lambdas, *values])


@torch.inference_mode()
def stored_difference(path):
    """|ours − theirs| of the medium logits in the stored dtype: [rows, V]."""
    expected = expected_tensors(path)
    model = built(opened(path, "medium"), torch.bfloat16)
    found = model(expected["tokens"][None]).logits[0]
    return (found[expected["rows"]] - expected["logits_bf16"]).abs()


def test_logits_in_the_stored_dtype(golden):
    # CPUs that multiply bfloat16 in hardware round differently, and later rows amplify that: by less than the logits
    # in float32 differ from these, but not by nothing.
    difference, expected = stored_difference(golden("gpt/medium")), expected_tensors(golden("gpt/medium"))
    float32 = (expected["logits"] - expected["logits_bf16"]).abs()
    assert difference[0].mean() < 0.01 < float32[0].mean()
    assert difference.mean() < 1.1 * float32.mean()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the numbers come from a CPU with AVX512"
)
def test_logits_in_the_stored_dtype_without_bfloat16_instructions(golden):
    """As on the machine that the numbers come from: here every bit agrees."""
    path = golden("gpt/medium")
    code = (
        "import sys; from pathlib import Path; from tests.test_golden_gpt import stored_difference; "
        "print(float(stored_difference(Path(sys.argv[1])).mean()))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.01
