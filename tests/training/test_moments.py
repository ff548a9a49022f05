"""The saved optimizer state belongs to the saved keys, and comes back without a changed bit."""

import pytest
import torch

from runner.errors import ModelError
from runner.families.npt.model import npt_tensors
from runner.families.npt.optimizer_state import flat_optimizer_state, stacked_optimizer_state
from runner.families.npt.training import train_equivalence


@pytest.fixture
def optimizer(model, batches, settings) -> torch.optim.Optimizer:
    """AdamW over the updates after two steps on their own gradients."""
    updates = [update for layer in model.npt_layers.values() for update in layer.updates.values()]
    parameters = [parameter.requires_grad_(True) for update in updates for parameter in update.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for ids in batches[:2]:
        optimizer.zero_grad()
        model(ids, use_cache=False).logits.square().mean().backward()
        optimizer.step()
    return optimizer


def test_entry_i_is_the_state_of_key_i(model, optimizer, batches):
    """One more step, taken over the keys' own tensors with the flat state, gives what the stacked step gives."""
    flat = flat_optimizer_state(optimizer.state_dict(), model)
    optimizer.zero_grad()
    model(batches[2], use_cache=False).logits.square().mean().backward()
    own = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in npt_tensors(model).items()}
    values = [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.copy_(parameter.grad)
    for name, gradient in npt_tensors(model).items():
        own[name].grad = gradient.detach().clone()
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter, value in zip(group["params"], values, strict=True):
                parameter.copy_(value)
    separate = torch.optim.AdamW(own.values(), lr=1e-2)
    separate.load_state_dict(flat)
    separate.step()
    optimizer.step()
    for name, tensor in npt_tensors(model).items():
        assert torch.equal(own[name], tensor), name


def test_there_and_back(model, optimizer):
    state = optimizer.state_dict()
    again = stacked_optimizer_state(flat_optimizer_state(state, model), model)
    assert again["param_groups"] == state["param_groups"]
    assert list(again["state"]) == list(state["state"])
    for index, entries in state["state"].items():
        for name, value in entries.items():
            assert torch.equal(again["state"][index][name], value)


def test_parts_own_their_memory(model, optimizer):
    """Views would each save the whole matrix."""
    for entries in flat_optimizer_state(optimizer.state_dict(), model)["state"].values():
        for value in entries.values():
            assert value.untyped_storage().nbytes() == value.nbytes


def test_a_state_of_other_layers_is_refused(model, optimizer, batches, settings):
    state = flat_optimizer_state(optimizer.state_dict(), model)
    del state["state"][0]
    resume = {"global_step": 2, "optimizer_state_dict": state, "scheduler_state_dict": {}}
    with pytest.raises(ModelError, match="moments for 35 tensors"):
        train_equivalence(model, batches, settings, resume=resume)
