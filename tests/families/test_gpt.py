"""The two dialects of the GPT against a naive implementation, token by token, straight from the formula."""

import math
from dataclasses import replace

import pytest
import torch

from runner.errors import ModelError
from runner.families.gpt import attention, pieces
from runner.families.gpt import model as gpt
from tests.gpt_files import RECORD_OF, model, random_state

IDS = [5, 17, 9, 0, 23, 17, 2]
DIALECTS = ["small", "medium"]


def rms(x):
    return x / (x.pow(2).mean() + 2**-23).sqrt()


def rotated(x, position):
    out = x.clone()
    for j in range(64):
        angle = position * (1 / 1024) ** (j / 31) if j < 32 else 0.0
        cos, sin = math.cos(angle), math.sin(angle)
        out[j] = x[j] * cos + x[j + 64] * sin
        out[j + 64] = -x[j] * sin + x[j + 64] * cos
    return out


def naive_attention(dialect, state, i, x, value, weights):
    small = dialect == "small"
    matrices = state[f"blocks.{i}.attn." + ("qkv_w" if small else "qkvo_w")]
    out = state[f"blocks.{i}.attn.c_proj.weight"] if small else matrices[3]
    width = len(x[0])
    y = [torch.zeros(width, dtype=torch.float64) for _ in x]
    read = [rms(row) if small else row for row in x]
    for start in range(0, width, 128):
        head = slice(start, start + 128)
        q = [rotated(rms(matrices[0][head] @ row), t) for t, row in enumerate(read)]
        k = [rotated(rms(matrices[1][head] @ row), t) for t, row in enumerate(read)]
        v = [matrices[2][head] @ row for row in read]
        v = [weights[0] * (row if small else rms(row)) for row in v]
        if value is not None:
            v = [row + weights[1] * value[t][head] for t, row in enumerate(v)]
        for t in range(len(x)):
            scores = [0.12 * float(q[t] @ k[s]) for s in range(t + 1)]
            exps = [math.exp(score - max(scores)) for score in scores]
            for s in range(t + 1):
                y[t][head] += exps[s] / sum(exps) * v[s]
    return [out @ row for row in y]


def naive_logits(dialect, state, ids):
    """Logits [T, head_rows] in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    small = dialect == "small"
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    scalars = state["scalars"]
    x = [rms(state["embed.weight"][i]) for i in ids]
    x0, outputs, stack = list(x), [], []
    for i in range(layers):
        if small and i >= layers // 2:
            skip = stack.pop()
            x = [row + scalars[i - layers // 2] * skip[t] for t, row in enumerate(x)]
        if not small and i in (9, 10, 11):
            j = {9: 6, 10: 4, 11: 2}[i]
            x = [row + scalars[j] * outputs[j][t] for t, row in enumerate(x)]
        a, b = scalars[layers + 2 * i], scalars[layers + 2 * i + 1]
        x = [a * row + b * x0[t] for t, row in enumerate(x)]
        if i != 7:
            table = i if i < 3 else i - (layers - 3) if i >= layers - 3 else None
            value = None if table is None else [state[f"value_embeds.{table}.weight"][token] for token in ids]
            weights = scalars[3 * layers + 2 * i], scalars[3 * layers + 2 * i + 1]
            y = naive_attention(dialect, state, i, x, value, weights)
            x = [row + y[t] for t, row in enumerate(x)]
        fc = state[f"blocks.{i}.mlp." + ("c_fc.weight" if small else "fc_w")]
        proj = state[f"blocks.{i}.mlp." + ("c_proj.weight" if small else "proj_w")]
        x = [row + proj @ (fc @ rms(row)).clamp_min(0).pow(2) for row in x]
        outputs.append(x)
        if small and i < layers // 2:
            stack.append(x)
    head = state["lm_head.weight" if small else "lm_head_w"]
    z = torch.stack([head @ rms(row) for row in x])
    if small:
        return 30 / (1 + torch.exp(-z / (7.5 * math.sqrt(head.shape[1]))))
    return 15 * z / (z.pow(2) + 225).sqrt()


@pytest.mark.parametrize(
    ("dialect", "sizes"),
    [
        ("small", {"layers": 6}),
        ("small", {"layers": 8, "width": 256, "head_rows": 128, "scalar_padding": 8}),
        ("small", {"layers": 12}),
        ("medium", {}),
        ("medium", {"width": 256}),
    ],
)
def test_logits_equal_the_naive_ones(dialect, sizes):
    state = random_state(dialect, **sizes)
    expected = naive_logits(dialect, state, IDS)
    found = model(dialect, state)(torch.tensor([IDS])).logits[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).mean() > 0.3  # the logits depend on the tokens


@pytest.mark.parametrize("dialect", DIALECTS)
def test_bfloat16_holds_weights_in_bfloat16_and_scalars_in_float32(dialect):
    state = random_state(dialect)
    ids = torch.tensor([IDS])
    low = model(dialect, state, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in low.named_parameters()}
    assert dtypes.pop("scalars") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    hidden = low.hidden(ids)
    assert (hidden.dtype, low.head(hidden).dtype) == (torch.bfloat16, torch.float32)
    # The same weights in float32: only the arithmetic differs, by bfloat16's rounding.
    high = model(dialect, {n: t if n == "scalars" else t.bfloat16() for n, t in state.items()})(ids).logits
    difference = (low(ids).logits - high).abs().mean()
    assert 0 < difference < 0.03 * high.abs().mean()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_padding_and_batch_change_nothing(dialect):
    net = model(dialect, random_state(dialect))
    lengths = [7, 4, 1]
    ids, mask = torch.full((3, 7), -1), torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = torch.tensor(IDS[:length]), 1
    batch = net(ids, attention_mask=mask).logits
    torch.testing.assert_close(net(ids, attention_mask=mask.bool()).logits, batch, rtol=0, atol=0)
    for row, length in enumerate(lengths):
        alone = net(torch.tensor([IDS[:length]])).logits[0]
        torch.testing.assert_close(batch[row, :length], alone, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(batch).all()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_later_tokens_do_not_change_earlier_logits(dialect):
    net = model(dialect, random_state(dialect))
    changed = [*IDS[:-1], 11]
    a, b = net(torch.tensor([IDS])).logits[0], net(torch.tensor([changed])).logits[0]
    torch.testing.assert_close(a[:-1], b[:-1], rtol=1e-5, atol=1e-5)
    assert (a[-1] - b[-1]).abs().max() > 0.1


def test_attention_in_chunks_of_queries(monkeypatch):
    q, k, v = torch.randn(3, 2, 3, 20, 128, generator=torch.Generator().manual_seed(0))
    whole = attention.causal_attention(q, k, v)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 7)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    found = attention.causal_attention(q, k, v, mask=lambda start, end: mask[None, None, start:end])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    low = [x.bfloat16() for x in (q, k, v)]
    torch.testing.assert_close(attention.causal_attention(*low).float(), whole, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_hidden_states_blocks_and_head(dialect):
    net = model(dialect, random_state(dialect))
    ids, record = torch.tensor([IDS, IDS[::-1]]), []
    hidden = net.hidden(ids, record=record)
    assert [tuple(x.shape) for x in record] == [(2, 7, 128)] * net.config.num_layers
    assert torch.equal(pieces.norm(record[-1]), hidden)
    chunks = torch.cat([net.head(part) for part in hidden.split(3, dim=1)], dim=1)
    torch.testing.assert_close(chunks, net(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_gradients_reach_what_is_used_and_nothing_else(dialect):
    net = model(dialect, random_state(dialect, scalar_padding=3 if dialect == "small" else 0)).requires_grad_(True)
    logits = net(torch.tensor([IDS])).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:])).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    depth = net.config.num_layers
    used = set(range(depth // 2)) if dialect == "small" else {2, 4, 6}
    used |= set(range(depth, 3 * depth))
    used |= {3 * depth + 2 * i for i in range(depth) if i != 7}
    used |= {3 * depth + 2 * i + 1 for i in (0, 1, 2, depth - 3, depth - 2, depth - 1) if i != 7}
    assert set(net.scalars.grad.nonzero().flatten().tolist()) == used


def test_the_model_has_copies():
    state = random_state("small")
    net, ids = model("small", state), torch.tensor([IDS])
    before = net(ids).logits
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(net(ids).logits, before)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        ([[1, 24]], None, "token id 24 is not in the model's vocabulary of 24"),
        ([[1, -1]], None, "token id -1 is not in"),
        ([[1, 2]], [[0, 1]], "zeros on the right"),
        ([[1, 2]], [[1]], "shape of input_ids"),
        ([1, 2], None, "must be [batch, tokens]"),
        ([[]], None, "must be [batch, tokens]"),
    ],
)
def test_inputs_that_cannot_be_right(ids, mask, says):
    net = model("small", random_state("small", layers=6))
    with pytest.raises(ModelError) as caught:
        net(torch.tensor(ids, dtype=torch.long), None if mask is None else torch.tensor(mask))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 7}, "an even number of blocks"),
        ({"num_layers": 4}, "at least 6, not 4"),
        ({"record": RECORD_OF["medium"]}, "at least 12, not 8"),
        ({"model_dim": 100}, "a multiple of the head size 128, not 100"),
    ],
)
def test_sizes_that_are_not_defined(change, says):
    config = model("small", random_state("small")).config
    with pytest.raises(ModelError) as caught:
        replace(config, **change)
    assert says in str(caught.value)


def test_tensors_of_another_model_are_refused():
    state = random_state("small")
    config = model("small", state).config
    state["extra"] = state.pop("lm_head.weight")
    state["blocks.3.mlp.c_proj.weight"] = state["blocks.3.mlp.c_proj.weight"].T
    with pytest.raises(ModelError) as caught:
        gpt.build(config, state, torch.float32)
    for part in (
        "blocks.3.mlp.c_proj.weight: [512, 128], expected [128, 512]",
        "extra: [24, 128], expected none",
        "lm_head.weight: missing, expected [24, 128]",
    ):
        assert part in str(caught.value)
