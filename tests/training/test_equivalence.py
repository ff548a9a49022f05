import copy

import pytest
import torch

from runner.errors import ModelError
from runner.families.npt import PROJECTIONS, EquivalenceSettings
from runner.families.npt.model import NptLlamaForCausalLM, npt_tensors
from runner.families.npt.training import train_equivalence
from runner.families.npt.training_losses import base_outputs, losses
from runner.families.npt.training_start import initial_updates


def test_the_logits_come_close_to_the_bases(base, batches):
    settings = EquivalenceSettings(
        layers=(1, 2), np_rank=8, max_steps=300, warmup_steps=20, learning_rate=1e-2, batch_size=2
    )
    model = NptLlamaForCausalLM(base, initial_updates(base.config, settings))
    seen = []
    before = [losses(model, base_outputs(model, ids)).logits.item() for ids in batches]
    final = train_equivalence(model, batches, settings, on_step=lambda step, figures: seen.append((step, figures)))
    after = [losses(model, base_outputs(model, ids)).logits.item() for ids in batches]
    assert sum(after) < 0.05 * sum(before)
    assert [step for step, _ in seen] == list(range(1, 301))
    assert final == seen[-1][1]
    assert set(final) == {"loss", "logits", "gradient_norm", "layer_1", "layer_2"}
    assert final["loss"] == pytest.approx(final["logits"] + final["layer_1"] + final["layer_2"], rel=1e-5)


def test_the_base_is_not_touched(base, model, batches, settings):
    before = copy.deepcopy(base.state_dict())
    train_equivalence(model, batches, settings)
    after = base.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_every_so_many_steps_and_at_the_end(model, batches, settings):
    settings = EquivalenceSettings(layers=(0, 2), np_rank=3, num_ranks=2, max_steps=7, save_every=3, warmup_steps=1)
    states = {}
    train_equivalence(model, batches, settings, on_checkpoint=states.__setitem__)
    assert list(states) == [3, 6, 7]
    for step, state in states.items():
        assert state["global_step"] == state["batch_count"] == step
        assert state["scheduler_state_dict"]["last_epoch"] == step
        assert len(state["optimizer_state_dict"]["state"]) == len(npt_tensors(model))


@pytest.mark.parametrize("stop", [10, 13])
def test_resuming_gives_the_same_bits_as_never_having_stopped(base, batches, settings, stop):
    """Across the end of an epoch, of the warmup, and with the scheduler's state from a copy."""
    states, weights = {}, {}

    def trained(**options):
        updates = initial_updates(base.config, settings)
        model = NptLlamaForCausalLM(base, updates)

        def keep(step, state):
            states[step] = copy.deepcopy(state)
            weights[step] = {name: tensor.detach().clone() for name, tensor in npt_tensors(model).items()}

        own = EquivalenceSettings(**{**vars(settings), "save_every": stop})
        if "resume" in options:
            for name, tensor in npt_tensors(model).items():
                tensor.detach().copy_(weights[stop][name])
        train_equivalence(model, batches, own, on_checkpoint=keep, **options)
        return {name: tensor.clone() for name, tensor in npt_tensors(model).items()}, states[20]

    whole, last = trained()
    resumed, again = trained(resume=states[stop])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for index, entries in last["optimizer_state_dict"]["state"].items():
        for name, value in entries.items():
            assert torch.equal(value, again["optimizer_state_dict"]["state"][index][name])
    assert last["scheduler_state_dict"] == again["scheduler_state_dict"]


@pytest.mark.parametrize("modulation", PROJECTIONS)
def test_initial_updates_have_the_shapes_asked_for(base, modulation):
    settings = EquivalenceSettings(layers=(2, 0), modulation=modulation, np_rank=3, num_ranks=2, initial_scale=0.0)
    updates = initial_updates(base.config, settings)
    assert list(updates) == [0, 2]
    for projections in updates.values():
        assert tuple(projections) == PROJECTIONS[modulation]
        for name, update in projections.items():
            d_in, d_out = (24, 16) if name == "down" else (16, 24)
            assert update.w_down.shape == (16, 6)
            assert update.w_a_up.shape == (6, d_in)
            assert torch.equal(update.w_b_up, torch.zeros(6, d_out))
    again = initial_updates(base.config, settings)
    assert torch.equal(updates[0]["gate"].w_down, again[0]["gate"].w_down)


def test_a_layer_beyond_the_base_is_refused(base):
    with pytest.raises(ModelError, match="layers 0 to 2, not 3"):
        initial_updates(base.config, EquivalenceSettings(layers=(1, 3)))


def test_a_loss_that_is_not_finite_stops_training(base, batches):
    settings = EquivalenceSettings(layers=(1,), initial_scale=1e38, max_steps=3, warmup_steps=0)
    model = NptLlamaForCausalLM(base, initial_updates(base.config, settings))
    with pytest.raises(ModelError, match="no longer finite"):
        train_equivalence(model, batches, settings)
