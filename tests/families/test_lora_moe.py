"""Routed LoRA layers against a naive model with explicit loops over tokens and experts."""

import copy
import hashlib

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from runner.errors import ConfigError
from runner.evaluation.base_models import load_base
from runner.evaluation.decoding import generate
from runner.families.lora_moe import model as routing
from runner.families.lora_moe.model import LoraMoeForCausalLM
from tests.lora_files import load_moe, router_of, write_moe

IDS = torch.tensor([5, 77, 9, 130, 41, 41, 8, 200])


@pytest.fixture(scope="module")
def moe(tmp_path_factory, base):
    """Three experts of different ranks and scalings, top-2."""
    return write_moe(tmp_path_factory.mktemp("moe") / "checkpoint-120", base, top_k=2)


@pytest.fixture
def model(moe):
    return load_moe(moe)


class NaiveLinear(torch.nn.Module):
    """W x + Σ_e w[t][e] · scaling_e · B_e (A_e x), one token and one expert at a time; `weights` [T, E] is shared."""

    def __init__(self, base, factors, weights):
        super().__init__()
        self.base, self.factors, self.weights = base, factors, weights

    def forward(self, x):
        rows = []
        for token, row in enumerate(x[0]):
            y = self.base.weight @ row
            for expert, (a, b, scaling) in enumerate(self.factors):
                y = y + self.weights[token, expert] * scaling * (b @ (a @ row))
            rows.append(y)
        return torch.stack(rows)[None]


def naive(base, model, ids, *, first: torch.Tensor, weigh) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] and weights [T, E] of one sequence in float64, `first` [E] weighting the experts in pass one."""
    reference = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager").double()
    weights = first.double().repeat(len(ids), 1)
    adapters = [{k: (a.double(), b.double(), s) for k, (a, b, s) in each.items()} for each in model.adapters()]
    for name in adapters[0]:
        parent, _, leaf = name.rpartition(".")
        layer = NaiveLinear(reference.get_submodule(name), [each[name] for each in adapters], weights)
        setattr(reference.get_submodule(parent), leaf, layer)
    with torch.no_grad():
        features = reference.model(ids[None]).last_hidden_state[0]
        weight, bias = (tensor.double() for tensor in router_of(base, len(adapters)))
        for token, row in enumerate(features):
            weights[token] = weigh(weight @ row + bias)
        return reference(ids[None]).logits[0], weights


def top_two(logits):
    best = sorted(range(len(logits)), key=lambda i: -logits[i])[:2]
    total = sum(torch.exp(logits[i]) for i in best)
    return torch.stack([torch.exp(logits[i]) / total if i in best else torch.zeros(()) for i in range(len(logits))])


@pytest.mark.parametrize(
    ("features", "first"), [("all_experts", [1, 1, 1]), ("base", [0, 0, 0]), ("expert_0", [1, 0, 0])]
)
def test_routed_layers_equal_naive_ones(moe, base, features, first):
    model = load_moe(moe, router_features=features)
    expected, weights = naive(base, model, IDS, first=torch.tensor(first), weigh=top_two)
    with torch.inference_mode():
        output = copy.deepcopy(model).double()(IDS[None])
        plain = load_base(None, base).model(IDS[None]).logits
    # The weights are rounded to float32 on their way; all else is float64.
    torch.testing.assert_close(output.expert_weights[0], weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(output.logits[0], expected, rtol=1e-5, atol=1e-5)
    assert (plain[0] - expected).abs().max() > 0.1
    assert (weights > 0).sum(-1).tolist() == [2] * len(IDS)


def test_dense_training_equals_naive(model, base):
    expected, weights = naive(
        base, model, IDS, first=torch.ones(3), weigh=lambda logits: torch.exp(logits / 2) / torch.exp(logits / 2).sum()
    )
    trained = copy.deepcopy(model).double().train()
    output = trained(IDS[None])
    torch.testing.assert_close(output.expert_weights[0], weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(output.logits[0], expected, rtol=1e-5, atol=1e-5)
    use = weights.mean(0)
    assert output.balance_loss.item() == pytest.approx(sum((u - 1 / 3) ** 2 for u in use.tolist()) / 3, rel=1e-6)


def test_dense_at_temperature_one_is_top_e(moe):
    every = load_moe(moe, top_k=3)
    dense = load_moe(moe, temperature=1.0).train()
    with torch.inference_mode():
        torch.testing.assert_close(every(IDS[None]).logits, dense(IDS[None]).logits, rtol=1e-5, atol=1e-5)


def test_weights_by_hand():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    e = torch.e
    torch.testing.assert_close(routing.top_k_weights(logits, 1), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(routing.top_k_weights(logits, 2), torch.tensor([[0.0, e / (e + 1), 1 / (e + 1)]]))
    dense = routing.dense_weights(torch.tensor([[0.0, 2.0]]), 2.0)
    torch.testing.assert_close(dense, torch.tensor([[1 / (1 + e), e / (1 + e)]]))


def test_balance_loss_by_hand():
    weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    assert routing.balance_loss(weights).item() == pytest.approx(0.0625)  # mean use 3/4 and 1/4
    mask = torch.tensor([[1, 1], [0, 0]])
    assert routing.balance_loss(weights, mask).item() == 0.0


def test_experts_off_are_the_base_and_leave_it_alone(moe, base):
    def fingerprint(module):
        digest = hashlib.sha256()
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    shared = load_base(None, base).model
    with torch.inference_mode():
        before, logits = fingerprint(shared), shared(IDS[None]).logits
        model = load_moe(moe)
        on = model(IDS[None])
        with model.experts(False):
            off, hidden = model(IDS[None]), model.head(model.hidden(IDS[None]))
        again = model(IDS[None])
        assert torch.equal(off.logits, logits)
        assert torch.equal(hidden, logits)
        assert off.router_logits is None
        assert torch.equal(on.logits, again.logits)
        assert not torch.equal(on.logits, logits)
        assert torch.equal(shared(IDS[None]).logits, logits)
    assert fingerprint(shared) == before
    theirs = {p.data_ptr() for p in shared.parameters()}
    own = {name for name, p in model.named_parameters() if p.data_ptr() not in theirs}
    assert all("lora_" in name or name.startswith("router.") for name in own)
    assert len(theirs) + len(own) == len(list(model.named_parameters()))
    assert len(shared(IDS[None], output_hidden_states=True).hidden_states) == shared.config.num_hidden_layers + 1


def test_building_draws_no_random_numbers(moe):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_moe(moe)
    assert torch.equal(torch.rand(4), expected)


def test_an_expert_without_a_token_is_skipped(model):
    with torch.inference_mode():
        before = model(IDS[None])
        model.router.bias[1] -= 1000  # no token chooses it, at the same logits for the others
        after = model(IDS[None])
        assert after.expert_weights[..., 1].abs().max() == 0
        assert [name for name, _ in model.routing.active] == ["expert_0", "expert_2"]
        assert not torch.equal(before.expert_weights, after.expert_weights)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(model, side):
    lengths, width = [8, 5, 1], 8
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = IDS[:length], 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0) if side == "left" else None
    with torch.inference_mode():
        batch = model(ids, attention_mask=mask, position_ids=positions)
        for row, length in enumerate(lengths):
            alone = model(IDS[None, :length])
            torch.testing.assert_close(batch.logits[row][mask[row] == 1], alone.logits[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                batch.expert_weights[row][mask[row] == 1], alone.expert_weights[0], rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("features", ["all_experts", "base", "expert_0"])
def test_cached_and_uncached_generation_agree(moe, base, features):
    model = load_moe(moe, router_features=features)
    cached = generate(model, IDS[:4], 16)
    assert cached == generate(model, IDS[:4], 16, cache=False)
    with model.experts(False):
        off = generate(model, IDS[:4], 16)
        assert off == generate(model, IDS[:4], 16, cache=False)
    assert off == generate(load_base(None, base).model, IDS[:4], 16)
    assert off != cached


def test_a_cache_of_other_experts_is_refused(model):
    with torch.inference_mode():
        with model.experts(False):
            cache = model.new_cache(torch.zeros(1, dtype=torch.long), 9)
            model.advance(IDS[None], cache)
        with pytest.raises(ValueError, match="experts as now"):
            model.advance(IDS[None, :1], cache)


def test_gradients_reach_router_and_experts_only(moe):
    model = load_moe(moe).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("router."))
    output = model(IDS[None])
    loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], IDS[1:]) + output.balance_loss
    loss.backward()
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or name.startswith("router.")
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name


def test_gradient_checkpointing_runs_layers_again_with_the_same_routing(moe):
    def gradients(checkpointing: bool) -> dict:
        model = load_moe(moe).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith("router."))
        if checkpointing:
            model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(IDS[None]).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_another_architecture_keeps_what_it_does_after_the_head():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = Gemma2Config(vocab_size=272, num_key_value_heads=2, initializer_range=0.2, **sizes)
    gemma = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    adapters = [{"model.layers.1.mlp.down_proj": (torch.randn(2, 64), torch.randn(32, 2), 0.5)} for _ in range(2)]
    model = LoraMoeForCausalLM(gemma, adapters, (torch.randn(2, 32), torch.zeros(2)))
    with torch.inference_mode():
        assert torch.equal(model.head(model.hidden(IDS[None])), model(IDS[None]).logits)
        with model.experts(False):
            assert torch.equal(model.head(model.hidden(IDS[None])), gemma(IDS[None]).logits)
    assert generate(model, IDS, 6) == generate(model, IDS, 6, cache=False)


@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_k": 0}, {"router_features": "expert_1"}])
def test_impossible_options(moe, options):
    with pytest.raises(ConfigError, match=r"top_k=|router_features="):
        load_moe(moe, **options)
