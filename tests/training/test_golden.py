"""The stages of the original's trainer: its own figures, step by step (`shared/golden/train`)."""

import json
from itertools import count

import pytest
import torch

from runner.checkpoints.detect import open_checkpoint
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.families.npt import EquivalenceSettings
from runner.families.npt.model import NptLlamaForCausalLM, npt_tensors, npt_updates
from runner.families.npt.training import Layers, layer_loop
from runner.training.precision import Precision
from runner.training.sources import Ordered, TokenBatch

STARTS = ("dual_rank4", "fresh_triple_k3", "mixed_layers", "single_rank1")
NAMES = {
    "loss": "total", "logits": "fidelity_loss", "layer_{}": "layer_{}_direct_mlp", "regularization/layer_{}": "layer_{}_reg",
    "v_a_norm/layer_{}": "layer_{}_v_a_norm", "v_b_norm/layer_{}": "layer_{}_v_b_norm",
    "v_a_attention_similarity/layer_{}": "layer_{}_v_a_attn_similarity",
}  # fmt: skip


def trained(golden, content, schedule, steps, *, accumulation=1, layer_weights="uniform"):
    """The figures of each step, the rates, and the weights at the end."""
    base = load_base(None, golden(content["base"]), Placement(device="cpu"), llama=True)
    checkpoint = open_checkpoint(golden(content["start_weights"]), "npt_delta")
    own = content["settings"]
    settings = EquivalenceSettings(
        layers=content["layers"], curriculum=schedule, max_steps=own["max_steps"], warmup_steps=own["warmup_steps"],
        learning_rate=own["learning_rate"], weight_decay=own["weight_decay"], betas=(0.9, 0.999), save_every=100,
        gradient_clip_value=own["gradient_clip_value"], gradient_scale_factor=own["gradient_scale_factor"],
        direct_weight=own["direct_mlp_weight"], fidelity_weight=own["fidelity_weight"],
        regularization_weight=own["lambda_reg"], gradient_accumulation_steps=accumulation, batch_size=2,
        layer_weights=layer_weights, log_every=1,
    )  # fmt: skip
    model = NptLlamaForCausalLM(base.model, npt_updates(checkpoint, torch.float32, torch.device("cpu")))
    layers = Layers(model=model, settings=settings, precision=Precision("float32", torch.device("cpu")))
    batches = [torch.tensor(ids) for ids in content["ids"]]
    source = Ordered(lambda start: (TokenBatch(ids=batches[i % len(batches)]) for i in count(start)))
    rows = {}

    class Enough(Exception):
        pass

    def on_log(step, figures):
        rows[step] = figures
        if step == steps:
            raise Enough

    with pytest.raises(Enough):
        layer_loop(layers, source, on_log=on_log)()
    return rows, {name: tensor.detach() for name, tensor in npt_tensors(model).items()}


def check(rows, expected, weights, sums, layers):
    for want in expected:
        found, micro = rows[want["step"]], want["micro_batches"]
        tolerance = 1e-5 if want["step"] == 1 else 1e-4
        assert found["learning_rate"] == want["learning_rate"]
        scaled = found["gradient_norm"] * 2.5
        assert scaled == pytest.approx(want["gradient_norm_scaled"], rel=tolerance)
        for ours, theirs in NAMES.items():
            for layer in layers if "{}" in ours else (None,):
                values = [each[theirs.format(layer)] for each in micro]
                if set(values) == {0.0} and "similarity" in theirs:
                    assert ours.format(layer) not in found
                else:
                    mean = sum(values) / len(values)
                    assert found[ours.format(layer)] == pytest.approx(mean, rel=tolerance), (ours, layer)
    assert set(weights) == set(sums)
    for name, (_, norm) in sums.items():
        assert weights[name].double().norm().item() == pytest.approx(norm, rel=1e-5), name


@pytest.mark.parametrize("start", STARTS)
def test_each_stage_gives_the_originals_figures(golden, start):
    content = json.loads(golden(f"train/{start}.json").read_text())
    for schedule, expected in content["stages"].items():
        rows, weights = trained(golden, content, schedule, 3)
        check(rows, expected["steps"], weights, expected["final_weights_sum_and_norm"], content["layers"])


@pytest.mark.parametrize("start", STARTS)
def test_the_curriculum_with_accumulation_gives_the_originals_figures(golden, start):
    content = json.loads(golden(f"train/{start}.json").read_text())
    own = content["curriculum"]
    weights_of = [own["layer_weights"][str(layer)] for layer in content["layers"]]
    assert weights_of == [1.0, 0.5]
    rows, weights = trained(
        golden, content, own["schedule"], 6, accumulation=own["gradient_accumulation_steps"], layer_weights="linear"
    )
    check(rows, own["steps"], weights, own["final_weights_sum_and_norm"], content["layers"])
