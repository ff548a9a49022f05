"""Models with one defect each: exactly the check that should see it fails, and says what."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from runner.families.gpt import model as gpt_model
from runner.families.lora.model import RoutedLinear
from runner.families.npt.model import NptDecoderLayer, NptLlamaForCausalLM, RankKUpdate
from tests.checks.benches import bench_of, failing, rows_of
from tests.conftest import MIXED, npt_tensors, write_npt
from tests.gpt_files import random_state, script_file
from tests.lora_files import write_adapter, write_moe

LIVING = ("model", "forward", "batch", "modes", "control", "gradients", "optimizer_step")


@pytest.fixture(scope="module")
def places(tmp_path_factory, base):
    """One checkpoint of each kind of model."""
    root = tmp_path_factory.mktemp("models")
    untrained = {name: t * ("W_b_up" not in name) for name, t in npt_tensors(base, MIXED).items()}
    return {
        "npt": write_npt(root / "npt", npt_tensors(base, MIXED), base=base),
        "npt_untrained": write_npt(root / "untrained", untrained, base=base),
        "moe": write_moe(root / "moe", base),
        "peft": write_adapter(root / "adapter", base),
        "gpt": script_file(root / "small.pt", random_state("small")),
        "hf": base,
        # As the training scripts begin: every logit of this dialect is 0.
        "gpt_untrained": script_file(root / "medium.pt", random_state("medium") | {"lm_head_w": torch.zeros(24, 128)}),
    }


@pytest.mark.parametrize("name", ["npt", "npt_untrained", "moe", "peft", "gpt", "hf", "gpt_untrained"])
def test_sound_models_pass(name, places, tmp_path):
    bench = bench_of(places[name], tmp_path / "scratch")
    before = weights_of(bench)
    rows = rows_of(bench, LIVING)
    assert {row["name"]: row["details"] for row in rows.values() if row["status"] != "pass"} == {}
    # What was trained for a test is as it was, or gone.
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(bench).items())
    assert not any(p.requires_grad or p.grad is not None for p in bench.model.parameters())
    assert not bench.model.training


def weights_of(bench) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}


def test_gradients_that_cannot_be_anything_but_zero_are_said(places, tmp_path):
    rows = rows_of(bench_of(places["npt_untrained"], tmp_path / "scratch"), LIVING)
    # Of one, two and three projections, the two factors whose partner W_b_up is zero.
    assert "(12 zero for now" in rows["gradients"]["details"]


def test_weights_that_no_training_can_move_fail(tmp_path, base):
    path = write_npt(tmp_path / "npt", {name: t * 0 for name, t in npt_tensors(base, MIXED).items()}, base=base)
    rows = rows_of(bench_of(path, tmp_path / "scratch"), LIVING)
    assert [name for name, row in rows.items() if row["status"] == "fail"] == ["optimizer_step"]
    assert "every gradient is zero, so no step can change anything" in rows["optimizer_step"]["details"]


def every_row_sees_the_mean_of_the_batch(patch, model):
    real = RankKUpdate.forward
    patch.setattr(RankKUpdate, "forward", lambda self, a, x: real(self, a.mean(0, keepdim=True).expand_as(a), x))


def every_row_gets_the_first_ones_experts(patch, model):
    real = RoutedLinear.forward

    def forward(self, x, *args, **kwargs):
        active = self.routing.active
        self.routing.active = tuple((n, None if w is None else w[:1].expand_as(w)) for n, w in active)
        try:
            return real(self, x, *args, **kwargs)
        finally:
            self.routing.active = active

    patch.setattr(RoutedLinear, "forward", forward)


def padding_is_seen(patch, model):
    real = gpt_model.GptForCausalLM._checked

    def checked(self, ids, mask):
        ids = real(self, ids, mask)
        return ids if mask is None else ids.roll(1, dims=1)

    patch.setattr(gpt_model.GptForCausalLM, "_checked", checked)


def the_mask_is_inverted(patch, model):
    real = model.model.forward

    def forward(*args, attention_mask=None, **kwargs):
        # The first token stays: a row without any would not be finite.
        turned = None if attention_mask is None else (1 - attention_mask).index_fill(1, torch.tensor([0]), 1)
        return real(*args, attention_mask=turned, **kwargs)

    patch.setattr(model.model, "forward", forward)


def a_logit_is_nan(patch, model):
    head = model.lm_head
    patch.setattr(head, "forward", lambda x: nn.functional.linear(x, head.weight).log())


def the_cap_is_forgotten(patch, model):
    def head(self, hidden):
        return nn.functional.linear(hidden, self.weight("lm_head.weight")).float()

    patch.setattr(gpt_model.GptForCausalLM, "head", head)


def a_layer_has_no_weights(patch, model):
    norm = model.model.layers[1].input_layernorm
    patch.setitem(norm._parameters, "weight", nn.Parameter(norm.weight.to("meta"), requires_grad=False))


def a_switch_is_not_switched_back(patch, model):
    @contextmanager
    def npt_mode(self, active):
        for i, layer in self.npt_layers.items():
            layer.npt_mode = i in active
        yield

    patch.setattr(NptLlamaForCausalLM, "npt_mode", npt_mode)


def an_error_leaves_the_switch(patch, model):
    @contextmanager
    def npt_mode(self, active):
        for i, layer in self.npt_layers.items():
            layer.npt_mode = i in active
        yield
        for layer in self.npt_layers.values():
            layer.npt_mode = True

    patch.setattr(NptLlamaForCausalLM, "npt_mode", npt_mode)


def standard_mode_still_modulates(patch, model):
    real = NptDecoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        # As if standard mode only switched the MLP back, and left the attention's residual out.
        if self.npt_mode:
            return real(self, hidden_states, *args, **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    patch.setattr(NptDecoderLayer, "forward", forward)


def a_base_weight_requires_a_gradient(patch, model):
    patch.setattr(model.get_submodule("lm_head"), "weight", nn.Parameter(model.lm_head.weight.detach()))


def an_update_is_detached(patch, model):
    def forward(self, attention, x):
        down, a_up, b_up = self.w_down, self.w_a_up.detach(), self.w_b_up
        s = attention @ down
        each = s.unflatten(-1, (self.num_ranks, self.np_rank))
        dot = (s * (x @ a_up.T)).unflatten(-1, (self.num_ranks, self.np_rank)).sum(-1, keepdim=True)
        return (dot * each).flatten(-2) @ b_up

    patch.setattr(RankKUpdate, "forward", forward)


def the_router_has_no_gradient(patch, model):
    patch.setattr(model.router, "forward", torch.no_grad()(model.router.forward))


def an_expert_is_left_out(patch, model):
    real = RoutedLinear.forward

    def forward(self, x, *args, **kwargs):
        active = self.routing.active
        self.routing.active = tuple((n, w) for n, w in active if n != "expert_2")
        try:
            return real(self, x, *args, **kwargs)
        finally:
            self.routing.active = active

    patch.setattr(RoutedLinear, "forward", forward)


def a_gradient_is_not_finite(patch, model):
    real = RankKUpdate.forward
    # The value is unchanged, the derivative of sqrt at 0 is infinite.
    patch.setattr(RankKUpdate, "forward", lambda self, a, x: real(self, a, x) + (self.w_down * 0).abs().sqrt().sum())


def an_update_shares_memory_with_the_base(patch, model):
    layer = model.model.layers[1]
    update = layer.updates["gate"]
    shared = layer.mlp.gate_proj.weight.view(-1)[: update.w_down.numel()].view_as(update.w_down)
    patch.setattr(update.w_down, "data", shared.detach())


def a_step_does_nothing(patch, model):
    patch.setattr(torch.optim.SGD, "step", lambda self: None)


# Name → the checkpoint, the defect, the check that must fail (and no other), and what it must say.
DEFECTS = [
    ("npt", a_layer_has_no_weights, "model", "1 parameters have no weights: model.layers.1.input_layernorm.weight"),
    ("hf", a_logit_is_nan, "forward", "are not finite: from head on"),
    ("gpt", the_cap_is_forgotten, "forward", "leave the soft cap"),
    ("npt", every_row_sees_the_mean_of_the_batch, "batch", "in a padded batch of 4"),
    ("moe", every_row_gets_the_first_ones_experts, "batch", "in a padded batch of 4"),
    ("npt", the_mask_is_inverted, "batch", "in a padded batch of 1"),
    ("gpt", padding_is_seen, "batch", "in a padded batch of 1"),
    ("npt", a_switch_is_not_switched_back, "modes", "a switch leaves something"),
    ("npt", an_error_leaves_the_switch, "modes", "a switch leaves something"),
    ("npt", standard_mode_still_modulates, "control", "the architecture is at fault"),
    ("npt", a_base_weight_requires_a_gradient, "gradients", "reaches what should not train: lm_head.weight"),
    ("npt", an_update_is_detached, "gradients", "no gradient reaches: model.layers.0.updates.gate.w_a_up"),
    ("npt", a_gradient_is_not_finite, "gradients", "the gradient is not finite: model.layers.0.updates.gate.w_down"),
    ("moe", the_router_has_no_gradient, "gradients", "no gradient reaches: router.bias, router.weight"),
    ("moe", an_expert_is_left_out, "gradients", "lora_A.expert_2"),
    ("npt", an_update_shares_memory_with_the_base, "optimizer_step", "also changes model.layers.1.mlp.gate_proj.weight"),
    ("gpt", a_step_does_nothing, "optimizer_step", "as it was"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "inject", "expected", "words"), DEFECTS, ids=[d[1].__name__ for d in DEFECTS])
def test_a_defect_fails_the_one_check_that_should_see_it(name, inject, expected, words, places, tmp_path, monkeypatch):
    bench = bench_of(places[name], tmp_path / "scratch")
    base = bench.own.model.state_dict() if bench.own else {}
    before = {key: tensor.clone() for key, tensor in base.items()}
    inject(monkeypatch, bench.model)
    rows = rows_of(bench, LIVING)
    assert failing(rows) == [expected]
    assert words in rows[expected]["details"]
    assert all(torch.equal(before[key], tensor) for key, tensor in base.items())


def test_a_near_tie_between_experts_is_no_fault(places, tmp_path):
    bench = bench_of(places["moe"], tmp_path / "scratch")
    with torch.no_grad():
        # All experts are as good for every token: only rounding orders them.
        bench.model.router.weight.mul_(1e-6)
        bench.model.router.bias.zero_()
    rows = rows_of(bench, ("model", "forward", "batch"))
    assert rows["batch"]["status"] == "pass"


def test_bfloat16_is_held_to_its_own_rounding(places, tmp_path):
    bench = bench_of(places["npt"], tmp_path / "scratch", dtype="bfloat16")
    rows = rows_of(bench, LIVING)
    assert failing(rows) == []


def test_the_optimizer_has_one_group_however_many_parameters_there_are(places, tmp_path, monkeypatch):
    """Each group that is added is compared with all before it: thousands took minutes."""
    groups = []
    add = torch.optim.SGD.add_param_group
    monkeypatch.setattr(
        torch.optim.SGD, "add_param_group", lambda self, group: (groups.append(group), add(self, group))
    )
    rows = rows_of(bench_of(places["moe"], tmp_path / "scratch"), LIVING)
    assert rows["optimizer_step"]["status"] == "pass"
    assert len(groups) == 1
