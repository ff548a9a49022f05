import pytest
import torch

from runner.families.npt import EquivalenceSettings, training_losses
from runner.families.npt.model import NptLlamaForCausalLM
from runner.families.npt.training_losses import base_outputs, cached_base_outputs, losses
from runner.families.npt.training_start import initial_updates


@pytest.fixture(params=[(0, 2), (1,), (1, 2)], ids=str)
def layers(request):
    return request.param


@pytest.fixture
def model(base, layers) -> NptLlamaForCausalLM:
    settings = EquivalenceSettings(layers=layers, np_rank=3, num_ranks=2, initial_scale=5.0)
    return NptLlamaForCausalLM(base, initial_updates(base.config, settings))


def test_losses_are_those_of_the_models_themselves(base, model, layers, batches):
    """Against hidden states that the base records, one NPT layer active at a time."""
    ids = batches[1]
    found = losses(model, base_outputs(model, ids))
    direct, logits = found.direct, found.logits
    states = base(ids, output_hidden_states=True, use_cache=False).hidden_states
    before_norm = []
    base.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    expected_logits = base(ids, use_cache=False).logits
    outputs = (*states[1:-1], before_norm[0])
    for i in layers:
        recorded = []
        handle = model.model.layers[i].register_forward_hook(lambda _, __, output: recorded.append(output))  # noqa: B023
        with model.npt_mode({i}):
            model(ids, use_cache=False)
        handle.remove()
        target = outputs[i] - states[i]
        expected = (recorded[0] - states[i] - target).square().mean() / target.square().mean()
        assert direct[i].item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(direct) == set(layers)
    expected = (model(ids, use_cache=False).logits - expected_logits).square().mean()
    assert logits.item() == pytest.approx(expected.item(), rel=1e-4)


def test_only_the_updates_get_gradients(model, batches):
    parameters = {name: parameter.requires_grad_(".updates." in name) for name, parameter in model.named_parameters()}
    found = losses(model, base_outputs(model, batches[0]))
    direct, logits = found.direct, found.logits
    (sum(direct.values()) + logits).backward()
    for name, parameter in parameters.items():
        assert (parameter.grad is not None) == (".updates." in name)


@pytest.mark.parametrize(("rooms", "passes"), [(0, 6), (1, 5), (3, 3)])
def test_what_is_kept_is_what_is_computed(model, batches, rooms, passes, monkeypatch):
    expected = [base_outputs(model, ids) for ids in batches]
    monkeypatch.setattr(training_losses, "CACHE_BYTES", sum(one.nbytes for one in expected[:rooms]))
    computed = []
    monkeypatch.setattr(training_losses, "base_outputs", lambda *a: computed.append(base_outputs(*a)) or computed[-1])
    get = cached_base_outputs(model, batches)
    for index in (0, 1, 2, 0, 1, 2):
        assert torch.equal(get(index).final, expected[index].final)
    assert len(computed) == passes
