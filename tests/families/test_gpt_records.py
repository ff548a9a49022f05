"""Every public record's checkpoint computes what its own script computed: against the scripts' numbers."""

import json
from functools import cache

import pytest
import torch

from runner.checkpoints.detect import open_checkpoint
from runner.evaluation.placement import Placement
from runner.families.gpt import Gpt
from runner.families.gpt.records import RECORDS
from tests.conftest import golden_folders

GOLDENS = golden_folders("gpt_records")


@cache
def expected(path):
    return json.loads((path / "expected.json").read_text()), torch.load(path / "expected.pt", weights_only=True)


def logits(path, tokens, **options):
    """The logits of one sequence where the golden has them."""
    family = Gpt(**options)
    model = family.build(open_checkpoint(path), None, Placement(device="cpu"))
    wanted = expected(path)[1]
    with torch.inference_mode():
        return model(tokens[None]).logits[0][wanted["rows"]][:, wanted["columns"]]


def tolerance(record):
    return 2e-3 if RECORDS[record].mudd else 2e-4


@pytest.mark.parametrize("name", GOLDENS)
def test_logits(name, golden):
    path = golden(name)
    numbers, tensors = expected(path)
    record = numbers["record"]
    checkpoint = open_checkpoint(path)
    details = checkpoint.details
    found = [details.record.name, details.num_layers, details.num_heads, details.model_dim]
    assert found == [record, *(numbers[key] for key in ("layers", "heads", "model_dim"))]
    assert (details.found_by, details.end_of_text) == ("hash", numbers["eot"])
    close = {"rtol": 0, "atol": tolerance(record)}
    torch.testing.assert_close(logits(path, tensors["tokens"]), tensors["logits"], **close)
    torch.testing.assert_close(logits(path, tensors["tokens_docs"], documents=True), tensors["logits_docs"], **close)
    if numbers["small_window"]:
        window = 130 if RECORDS[record].window == "tokens" else 2
        found = logits(path, tensors["tokens"], window=window)
        torch.testing.assert_close(found, tensors["logits_small_window"], **close)
        assert (found - tensors["logits"]).abs().max() > 0.1
    # Sequences of this length see no window of training.
    if RECORDS[record].window:
        torch.testing.assert_close(logits(path, tensors["tokens"], window="trained"), tensors["logits"], **close)
