"""The golden GPT checkpoints: the numbers of the programs that wrote them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from runner.checkpoints.checkpoint import Listing
from runner.families.gpt.checkpoint import FORMATS
from tests.conftest import GOLDEN, ROOT
from tests.gpt_files import built, opened

EXPECTED = json.loads((GOLDEN / "gpt" / "expected.json").read_text()) if GOLDEN.is_dir() else {}
NAMES = sorted(EXPECTED)

pytestmark = pytest.mark.skipif(not NAMES, reason="the golden checkpoints (../shared/golden) are not on this machine")


def expected_tensors(name):
    return torch.load(GOLDEN / "gpt" / name / "expected.pt", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_details(name, golden):
    theirs, listing = EXPECTED[name], Listing.of(golden / "gpt" / name)
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
    theirs, expected = EXPECTED[name], expected_tensors(name)
    logits = built(opened(golden / "gpt" / name, name))(expected["tokens"][None]).logits[0]
    torch.testing.assert_close(logits[expected["rows"]], expected["logits"], rtol=0, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(logits, expected["tokens"].roll(-1))
    assert float(loss) == pytest.approx(theirs["loss"], rel=1e-6)
    assert float(logits.abs().mean()) == pytest.approx(theirs["logits_abs_mean"], rel=1e-6)


@torch.inference_mode()
def stored_difference(golden):
    """|ours − theirs| of the medium logits in the stored dtype: [rows, V]."""
    expected = expected_tensors("medium")
    model = built(opened(golden / "gpt" / "medium", "medium"), torch.bfloat16)
    found = model(expected["tokens"][None]).logits[0]
    return (found[expected["rows"]] - expected["logits_bf16"]).abs()


def test_logits_in_the_stored_dtype(golden):
    # CPUs that multiply bfloat16 in hardware round differently, and later rows amplify that: by less than the logits
    # in float32 differ from these, but not by nothing.
    difference, expected = stored_difference(golden), expected_tensors("medium")
    float32 = (expected["logits"] - expected["logits_bf16"]).abs()
    assert difference[0].mean() < 0.01 < float32[0].mean()
    assert difference.mean() < 1.1 * float32.mean()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the numbers come from a CPU with AVX512"
)
def test_logits_in_the_stored_dtype_without_bfloat16_instructions(golden):
    """As on the machine that the numbers come from: here every bit agrees."""
    code = "from tests.test_golden_gpt import GOLDEN, stored_difference; print(float(stored_difference(GOLDEN).mean()))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.01
