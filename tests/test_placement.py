"""Models spread over devices: the same figures, and one line for a map that makes no sense."""

import pytest
import torch

from runner import load
from runner.checkpoints.detect import open_checkpoint
from runner.evaluation import base_models as bases
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import _moved, follow

HALVES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": 0, "model.layers.2": 0, "model.norm": 0, "lm_head": 0}  # fmt: skip


@pytest.mark.parametrize("spread", ["auto", "balanced", "sequential", "{model:cpu,lm_head:cpu}"])
def test_one_device_gives_the_same_figures(run, checkpoint, spread):
    plain = run(f"ckpt={checkpoint}", "device=cpu").result["metrics"]
    if torch.cuda.is_available() and spread[0] != "{":
        pytest.skip("there is more than one device here")
    outcome = run(f"ckpt={checkpoint}", f"family.device_map={spread}")
    assert outcome.code == 0, outcome.err
    assert outcome.result["metrics"] == plain


@pytest.mark.parametrize(
    ("spread", "message"),
    [
        ("everywhere", "choose auto, balanced"),
        ("{model:cpu}", "says nothing about lm_head.weight"),
        ("{model.layers.9:cpu}", "the model has no module 'model.layers.9'"),
        ("{model:cpu,lm_head:abacus}", "abacus is no device here"),
        ("{model:cpu,lm_head:99}", "99 is no device here"),
    ],
)
def test_maps_that_make_no_sense(run, checkpoint, spread, message):
    bases._bases.clear()
    outcome = run(f"ckpt={checkpoint}", f"family.device_map={spread}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert message in outcome.err


def test_other_families_run_on_one_device(run, golden, gpts):
    for path in (gpts("small"), golden("moe/two_experts")):
        outcome = run(f"ckpt={path}", "family.device_map=auto")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert "runs on one device; give device=" in outcome.err


def test_every_part_of_an_npt_model_moves_what_it_is_given(checkpoint, monkeypatch):
    """What the test below does on two devices, as far as one device can show it."""
    bases._bases.clear()
    plain = load(checkpoint, device="cpu")
    token_ids = torch.arange(3, 12)[None]
    expected = plain(token_ids).logits
    bases._bases.clear()
    monkeypatch.setattr("runner.families.npt.model.is_spread", lambda model: True)
    follow(load_base(open_checkpoint(checkpoint), None).model)
    model = load(checkpoint, device="cpu")
    moved = []
    monkeypatch.setattr("runner.evaluation.placement._to", lambda value, device: moved.append(device) or value)
    assert torch.equal(model(token_ids).logits, expected)
    hooked = [module for module in model.modules() if _moved in module._forward_pre_hooks.values()]
    assert {*model.npt_layers.values(), model.lm_head, model.model.norm, model.model.embed_tokens} <= set(hooked)
    assert len(moved) > len(hooked)
    bases._bases.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is only one device here")
@pytest.mark.parametrize("tier", ["quick", "full"])
def test_halves_on_two_devices_give_the_figures_of_one(run, checkpoint, tier):
    one = run(f"ckpt={checkpoint}", "device=cpu", f"tier={tier}").result
    spread = "{" + ",".join(f"{name}:{place}" for name, place in HALVES.items()) + "}"
    outcome = run(f"ckpt={checkpoint}", f"family.device_map={spread}", f"tier={tier}")
    assert outcome.code == 0, outcome.err
    two = outcome.result
    places = {str(p.device) for p in next(reversed(bases._bases.values())).model.parameters()}
    assert places == {"cpu", "cuda:0"}
    for key in ("mse", "cosine", "kl", "top1"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-3, abs=1e-5)
    assert all(check["status"] == "pass" for check in two["checks"])
