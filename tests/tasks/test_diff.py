"""`task=diff`: what differs between two checkpoints, tensor by tensor."""

import re
from pathlib import Path

import pytest
import torch

from tests.merge.sources import ONE, second_spelling, weights_of, write_source


@pytest.fixture
def pair(workdir):
    write_source(Path("a"), ONE, trained=0)
    return weights_of(ONE)


def diff(run, change, weights, **options):
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    weights = change(weights) or weights
    write_source(Path("b"), {}, weights=weights, trained=0)
    return run("task=diff", "ckpt=a", "reference=b", *(f"{k}={v}" for k, v in options.items()))


def test_a_copy_is_identical_in_any_spelling(run, pair):
    outcome = diff(run, second_spelling, pair)
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert (result["identical"], result["equal_tensors"], result["changed_tensors"]) == (True, 27, 0)
    assert result["totals"]["mse"] == 0
    assert "Identical: yes, every tensor bit for bit" in outcome.out


def test_figures_of_a_changed_tensor(run, pair):
    name = "layer_1_np.W_b_up_up.1"

    def change(weights):
        weights[name] = weights[name] * 1.5
        weights[name][0, 0] += 10

    outcome = diff(run, change, pair)
    (row,) = [row for row in outcome.result["tensors"] if not row["equal"]]
    other = pair[name].double() * 1.5
    other[0, 0] += 10
    ours, theirs = pair[name].double(), other.float().double()
    assert row["name"] == name
    assert row["mse"] == pytest.approx(float((ours - theirs).square().mean()), rel=1e-6)
    assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(ours.ravel(), theirs.ravel(), 0)), rel=1e-6)
    assert row["max_abs"] == pytest.approx(float((ours - theirs).abs().max()), rel=1e-6)
    assert row["relative"] == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-6)
    assert f"\n{name}  " in outcome.out
    assert outcome.out.count("layer_1_np") == 1
    verbose = run("task=diff", "ckpt=a", "reference=b", "verbose=true")
    assert verbose.out.count("layer_1_np") == 27


def test_one_bit_is_a_difference(run, pair):
    result = diff(
        run, lambda w: w["layer_1_np.W_down_gate.0"].view(torch.uint8)[0, :1].bitwise_xor_(1) and None, pair
    ).result
    assert (result["identical"], result["changed_tensors"]) == (False, 1)


def test_names_shapes_and_dtypes(run, pair):
    def change(weights):
        renamed = {
            name.replace("layer_1", "layer_2"): tensor for name, tensor in weights_of({1: ("single", 3, 1)}).items()
        }
        return {name: tensor.bfloat16() for name, tensor in weights.items()} | renamed

    outcome = diff(run, change, pair)
    result = outcome.result
    assert result["only_in_ckpt"] == []
    assert result["only_in_reference"] == [f"layer_2_np.W_{m}" for m in ("down", "a_up", "b_up")]
    assert {row["reference_dtype"] for row in result["tensors"]} == {"bfloat16"}
    assert all(0 < row["mse"] < 1e-4 for row in result["tensors"])
    assert "float32 ≠ bfloat16" in outcome.out
    assert "Only in Reference: 3: layer_2_np.W_down, " in outcome.out


def test_another_rank_has_no_figures(run, workdir):
    write_source(Path("a"), {1: ("single", 2, 1)})
    write_source(Path("b"), {1: ("single", 3, 1)})
    rows = run("task=diff", "ckpt=a", "reference=b").result["tensors"]
    write_source(Path("c"), {1: ("single", 2, 1), 2: ("dual", 1, 1)})
    write_source(Path("d"), {1: ("single", 2, 1), 2: ("dual", 3, 1)})
    shown = run("task=diff", "ckpt=c", "reference=d").out
    assert re.search(r"Common Weights: mse .* over 112 elements; without 6 of other shapes", shown)
    assert [(row["shape"], row["reference_shape"]) for row in rows] == [
        ([16, 2], [16, 3]), ([2, 16], [3, 16]), ([2, 24], [3, 24])
    ]  # fmt: skip
    assert "mse" not in rows[0]


def test_nan_is_said_and_no_figure(run, pair):
    def change(weights):
        weights["layer_1_np.W_down_gate.0"][0, 0] = float("nan")

    result = diff(run, change, pair).result
    row = next(row for row in result["tensors"] if row["name"] == "layer_1_np.W_down_gate.0")
    assert (row["equal"], row["mse"], row["max_abs"]) == (False, None, None)
    assert any("no figures for layer_1_np.W_down_gate.0" in finding for finding in result["findings"])


def test_any_format(run, base):
    result = run("task=diff", f"ckpt={base}", f"reference={base}").result
    assert (result["format"], result["identical"]) == ("hf", True)


def test_what_one_model_is_to_another_is_said(run, base, tmp_path):
    """A copy, one that was trained a little, one of other weights, and one of which a part was replaced."""
    from safetensors.torch import load_file, save_file

    from tests.conftest import write_base

    tuned, other, mixed = (write_base(tmp_path / name, seed=seed) for name, seed in (("t", 0), ("o", 7), ("m", 0)))
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    noise = {
        name: t + 0.01 * t.std() * torch.randn(t.shape, generator=generator) if t.dim() > 1 else t
        for name, t in weights.items()
    }
    save_file(noise, tuned / "model.safetensors", metadata={"format": "pt"})
    half = {name: noise[name] if ".mlp." in name else load_file(other / "model.safetensors")[name] for name in weights}
    save_file(half, mixed / "model.safetensors", metadata={"format": "pt"})
    for path, words in (
        (base, "identical"),
        (tuned, "a fine-tune of one another: 100%"),
        (other, "unrelated: 0%"),
        (mixed, "partly related"),
    ):
        outcome = run("task=diff", f"ckpt={base}", f"reference={path}")
        assert outcome.result["relation"].startswith(words)
        assert path == base or f"Relation: {words}" in outcome.out


def test_wrong_words(run, pair):
    for step in (1, 2):
        write_source(Path(f"run/checkpoint-{step}"), ONE, step=step)
    for words, message in (
        ([], "reference= is needed"),
        (["reference=nowhere"], "reference=nowhere: no such file"),
        (["reference=run"], "run is a run of 2 checkpoints; name one of them, as run/checkpoint-2"),
    ):
        outcome = run("task=diff", "ckpt=a", *words)
        assert outcome.code == 2
        assert message in outcome.err
        assert len(outcome.err.splitlines()) == 1
