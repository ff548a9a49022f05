"""Every public record's checkpoint computes what its own script computed: against the scripts' numbers."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import runner
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError
from runner.evaluation.placement import Placement
from runner.families import gpt as families
from runner.families.gpt import Gpt
from runner.families.gpt.checkpoint import Provenance
from runner.families.gpt.records import LARGE, RECORDS
from runner.families.gpt.save import save
from tests.conftest import golden_folders
from tests.gpt_files import model, random_state, record_file, record_state, script_file

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


# Records that share every tensor and compute different functions.
GROUPS = [
    ("2024-10-14_ModernArch", "2024-11-03_UntieEmbed", "2024-11-06_ShortcutsTweaks"),
    ("2024-12-17_SparsifyEmbeds", "2025-01-13_Fp8LmHead"),
    ("2025-02-01_RuleTweak", "2025-05-24_StableTorch"),
    ("2025-09-05_SkipMLPBlocks", "2025-09-10_Yarn", "2025-09-11_VectSigmoidBFloat16"),
    ("2025-10-04_Backout", "2025-11-18_RefineSkip"),
    ("2025-12-22_MultiTokenPrediction", "2025-12-26_LogitRescale"),
    ("2025-12-31_GatesToCompiledAdam", "2026-01-07_PairedHeadAttention"),
    ("2026-01-24_ImprovedLMHead", "2026-02-03_VeTuned"),
    ("2026-06-11_RecursiveFromBest", "2026-07-13_PrefixTokenPrediction"),
]
IDS = torch.arange(40)[None] * 7 % 37


@pytest.mark.parametrize("name", RECORDS)
@torch.inference_mode()
def test_every_record_opens_runs_and_is_saved(name, tmp_path):
    path = record_file(tmp_path / "a.pt", name, record_state(name))
    checkpoint = open_checkpoint(path)
    details = checkpoint.details
    assert (details.record.name, details.found_by, details.head_dim_from) == (name, "hash", "script")
    model = Gpt().build(checkpoint, None, Placement(device="cpu"))
    found = model(IDS).logits
    low, high = Gpt().traits(checkpoint).logit_bounds
    assert low <= found.min() < found.max() <= high
    later = IDS.clone()
    later[0, 30:] = 5
    torch.testing.assert_close(model(later).logits[:, :30], found[:, :30], rtol=1e-5, atol=1e-5)
    # The container of ours notes the record, and has the same bits.
    (tmp_path / "out").mkdir()
    tensors = {key: checkpoint.weights.read(key) for key in details.keys}
    save(tmp_path / "out", tensors, details, provenance=Provenance(), weights_file="model.safetensors")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["training"])["record"] == name
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
@torch.inference_mode()
def test_every_record_in_bfloat16(name, tmp_path):
    path = record_file(tmp_path / "a.pt", name, record_state(name))
    low = runner.load(path, device="cpu", dtype="bfloat16", **{"family.documents": True})
    hidden = low.hidden(IDS)
    found, high = low.head(hidden), runner.load(path, device="cpu", **{"family.documents": True})(IDS).logits
    assert (hidden.dtype, found.dtype) == (torch.bfloat16, torch.float32)
    assert (found - high).abs().mean() < 1
    cache = low.new_cache(torch.zeros(1, dtype=torch.long), IDS.shape[1])
    assert (low.advance(IDS, cache) - found[:, -1]).abs().max() < 2


@pytest.mark.parametrize(
    "name",
    ["2024-12-04_ValueEmbed", "2024-12-17_SparsifyEmbeds", "2025-12-19_RetieLMHead", "2026-01-24_ImprovedLMHead"],
)
def test_the_vocabulary_is_cut_in_every_tensor_that_has_it(name, tmp_path, run):
    vocab = 122 if RECORDS[name].head_rows == "padded" else 128
    path = record_file(tmp_path / "a.pt", name, record_state(name, vocab=vocab))
    wanted = 122 if vocab == 122 else 100
    outcome = run(
        "task=convert", f"ckpt={path}", "convert.to=safetensors", "convert.output=out", f"convert.vocab_size={wanted}"
    )
    assert outcome.code == 0, outcome.err
    found = open_checkpoint(Path("out"))
    assert (found.details.record.name, found.details.vocab_size) == (name, wanted)
    ids = IDS % wanted
    whole, cut = (runner.load(place, device="cpu")(ids).logits[..., :wanted] for place in (path, "out"))
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


def test_the_records_are_those_of_the_readme():
    text = (Path(families.__file__).parent / "README.md").read_text()
    assert [name for name in RECORDS if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_records_that_share_every_tensor_are_told_apart(group, tmp_path, run):
    tied = group[0] == "2024-10-14_ModernArch"
    state = record_state(group[-1])
    path = record_file(tmp_path / "a.pt", group[0], state, code="head_dim=8")
    outcome = run("task=inspect", f"ckpt={path}")
    candidates = group[1:] if tied else group  # tied weights are their own evidence
    assert outcome.code == 2
    assert all(name in outcome.err for name in candidates)
    assert "family.record=" in outcome.err
    found = {}
    for name in group:
        told = Gpt(record=name)
        if tied and name == group[0]:
            continue
        checkpoint = open_checkpoint(path, family=told)
        assert (checkpoint.details.record.name, checkpoint.details.found_by) == (name, "told")
        found[name] = told.build(checkpoint, None, Placement(device="cpu"))(IDS).logits
        record_file(path, name, state)
        own = open_checkpoint(path)
        assert own.details.found_by == "hash"
        assert torch.equal(Gpt().build(own, None, Placement(device="cpu"))(IDS).logits, found[name])
        for other in set(group) - {name}:
            with pytest.raises(CheckpointError, match=f"family.record={other}, but its script is that of {name}"):
                open_checkpoint(path, family=Gpt(record=other))
        record_file(path, name, state, code="head_dim=8")
    values = list(found.values())
    assert all((values[0] - other).abs().max() > 0.01 for other in values[1:])


def test_tied_weights_are_evidence(tmp_path):
    path = record_file(
        tmp_path / "a.pt", "2024-10-14_ModernArch", record_state("2024-10-14_ModernArch"), code="head_dim=8"
    )
    assert open_checkpoint(path).details.record.name == "2024-10-14_ModernArch"


def test_the_tensors_of_one_record_and_the_script_of_another(tmp_path):
    path = record_file(tmp_path / "a.pt", "2025-12-29_VeSkipGates", record_state("2025-10-04_Backout"))
    with pytest.raises(
        CheckpointError, match=r"script is that of 2025-12-29.*, but its tensors are those of 2025-10-04"
    ):
        open_checkpoint(path)


def test_heads_of_64_under_the_names_of_medium(tmp_path):
    """What used to open as medium with heads of 128, and computed something else without a word."""
    state = random_state("medium")
    code = "class CausalSelfAttention:\n    head_dim = dim // num_heads\nmodel = GPT(num_heads=2)\n"
    path = script_file(tmp_path / "a.pt", state, code=code)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.format, checkpoint.details.record.name, checkpoint.details.head_dim) == ("gpt_record", LARGE, 64)
    small_heads = Gpt().build(checkpoint, None, Placement(device="cpu"))(IDS % 24).logits
    assert torch.equal(small_heads, model("medium", state, head_dim=64)(IDS % 24).logits)
    script_file(path, state, code="nothing")
    told = open_checkpoint(path, family=Gpt(record=LARGE))
    assert (told.details.head_dim, told.details.head_dim_from) == (64, "nothing")
    assert torch.equal(Gpt().build(told, None, Placement(device="cpu"))(IDS % 24).logits, small_heads)
    assumed = open_checkpoint(path)
    assert any("heads of 64" in finding for finding in assumed.findings)
    assert (Gpt().build(assumed, None, Placement(device="cpu"))(IDS % 24).logits - small_heads).abs().max() > 0.1
