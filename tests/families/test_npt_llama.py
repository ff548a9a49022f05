"""The factored NPT layer against a naive one that materialises v_a, v_b and ΔW."""

import pytest
import torch
from transformers import LlamaForCausalLM

import runner
from runner.evaluation.decoding import generate
from runner.evaluation.forward import run_layers
from runner.families.npt.checkpoint import key
from runner.families.npt.model import RankKUpdate
from runner.families.npt.model import npt_tensors as saved_tensors
from tests.conftest import MIXED, npt_tensors, write_base, write_npt


def naive_logits(base: LlamaForCausalLM, tensors: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one sequence, token by token, with each layer's ΔW built in full (float64)."""
    model, config = base.model, base.config
    hidden = model.embed_tokens(ids[None])
    positions = torch.arange(len(ids))[None]
    rotary = model.rotary_emb(hidden, position_ids=positions)
    mask = torch.full((len(ids), len(ids)), float("-inf"), dtype=hidden.dtype).triu(1)[None, None]
    for index, layer in enumerate(model.layers):
        attention, _ = layer.self_attn(
            layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask, position_ids=positions
        )
        if index not in MIXED:
            after = hidden + attention
            hidden = after + layer.mlp(layer.post_attention_layernorm(after))
            continue
        modulation, _, count = MIXED[index]
        x, rows = layer.post_attention_layernorm(hidden)[0], []
        for token in range(len(ids)):
            weights = {
                "gate": layer.mlp.gate_proj.weight,
                "up": layer.mlp.up_proj.weight,
                "down": layer.mlp.down_proj.weight,
            }
            for projection in ("gate", "up", "down")[: {"single": 1, "dual": 2, "triple": 3}[modulation]]:
                for i in range(count):
                    w_down, w_a, w_b = (
                        tensors[key(index, modulation, projection, m, i, count)].double()
                        for m in ("W_down", "W_a_up", "W_b_up")
                    )
                    s = attention[0, token] @ w_down
                    weights[projection] = weights[projection] + torch.outer(s @ w_b, s @ w_a)
            m = torch.nn.functional.silu(weights["gate"] @ x[token]) * (weights["up"] @ x[token])
            rows.append(weights["down"] @ m)
        hidden = hidden + torch.stack(rows)[None]
    assert config.num_hidden_layers == len(model.layers)
    return base.lm_head(model.norm(hidden))[0]


@pytest.fixture
def model(checkpoint, base):
    return runner.load(checkpoint)


IDS = torch.tensor([5, 77, 9, 130, 41, 41, 8, 200])


def test_factored_layers_equal_naive_ones(model, base):
    reference = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager").double()
    with torch.no_grad():
        expected = naive_logits(reference, npt_tensors(base, MIXED), IDS)
        torch.testing.assert_close(model(IDS[None]).logits[0].double(), expected, rtol=1e-4, atol=1e-5)
        assert (reference(IDS[None]).logits[0] - expected).abs().max() > 0.05  # the layers do something


def test_update_equals_materialised_vectors():
    torch.manual_seed(0)
    update = RankKUpdate(torch.randn(3, 8, 4), torch.randn(3, 4, 8), torch.randn(3, 4, 20))
    attention, x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    s = (attention @ update.w_down).unflatten(-1, (3, 4))
    v_a = torch.einsum("...kr,krd->...kd", s, update.w_a_up.unflatten(0, (3, 4)))
    v_b = torch.einsum("...kr,krf->...kf", s, update.w_b_up.unflatten(0, (3, 4)))
    expected = ((v_a * x.unsqueeze(-2)).sum(-1, keepdim=True) * v_b).sum(-2)
    torch.testing.assert_close(update(attention, x), expected, rtol=1e-4, atol=1e-4)


def test_saved_names_and_tensors_are_the_loaded_ones(model, base):
    saved, loaded = saved_tensors(model), npt_tensors(base, MIXED)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in loaded)


def test_cached_and_uncached_generation_agree(model):
    prompt = IDS[:4]
    assert generate(model, prompt, 12) == generate(model, prompt, 12, cache=False)
    cache, step, found = model.new_cache(torch.tensor([0]), length=16), prompt[None], []
    for _ in range(12):
        step = model.advance(step, cache).argmax(-1, keepdim=True)
        found.append(step.item())
    assert found == generate(model, prompt, 12)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(model, side):
    lengths, width = [8, 5, 1], 8
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = IDS[:length], 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.inference_mode():
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, length in enumerate(lengths):
            alone = model(IDS[None, :length]).logits[0]
            torch.testing.assert_close(batch[row][mask[row] == 1], alone, rtol=1e-4, atol=1e-5)


def test_starting_at_a_later_layer_gives_the_same_bits(model):
    record = []
    with torch.inference_mode():
        final = run_layers(model, model.model.embed_tokens(IDS[None]), record=record)
        assert torch.equal(model.model(IDS[None]).last_hidden_state, final)
        for start, state in enumerate(record):
            assert torch.equal(run_layers(model, state, start), final)


def test_hidden_states_are_recorded_once_for_base_and_model(model, base):
    from runner.evaluation.base_models import load_base

    shared = load_base(None, base).model
    for each in (shared, model, shared, model):
        assert len(each(IDS[None], output_hidden_states=True).hidden_states) == len(model.model.layers) + 1


def test_model_shares_the_base_weights(model, base):
    from runner.evaluation.base_models import load_base

    theirs = {p.data_ptr() for p in load_base(None, base).model.parameters()}
    own = {name for name, p in model.named_parameters() if p.data_ptr() not in theirs}
    assert own
    assert all(".updates." in name for name in own)


def test_standard_mode_is_the_base(model, base):
    from runner.evaluation.base_models import load_base

    with torch.inference_mode(), model.npt_mode(set()):
        assert torch.equal(model(IDS[None]).logits, load_base(None, base).model(IDS[None]).logits)


def test_tied_embeddings(tmp_path):
    tied = write_base(tmp_path / "tied", tie_word_embeddings=True)
    path = write_npt(tmp_path / "npt", npt_tensors(tied, {1: ("dual", 2, 2)}), base=tied)
    model = runner.load(path)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
