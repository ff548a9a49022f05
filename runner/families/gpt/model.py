"""modded-nanogpt's GPT in its two dialects, `small` and `medium`.

    x0 = x = norm(embed(ids))
    block i: x = x + skip weight · output of an earlier block     (some blocks: `skip_connections`)
             x = lambda · x + lambda' · x0
             x = x + attention(x)                                 (not in block 7)
             x = x + proj(relu(fc(norm(x)))²)
    logits   = soft cap(head(norm(x)))

`norm` is RMS norm without weights. Attention is causal with scale 0.12; q and k are normed, then rotated; in the first
and last three blocks a value embedding of the token is mixed into v. Parameters are named as in the checkpoints.
Source: modded-nanogpt's training scripts; README.md has the arithmetic.

Weights are held in the compute dtype; `scalars` stay in float32 and promote nothing. Rotary, attention scores,
softmax and the soft cap run in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import ModelError
from runner.evaluation.base_models import require_finite
from runner.evaluation.placement import Placement, torch_device, torch_dtype
from runner.families.gpt.layouts import EMBEDDING

HEAD_SIZE = 128
ATTENTION_SCALE = 0.12
BLOCK_WITHOUT_ATTENTION = 7
VALUE_EMBEDDINGS = 3
TRAINED_WINDOW = 1024
MEDIUM_SKIPS = {9: 6, 10: 4, 11: 2}  # block → the earlier block whose output is added before it
MEDIUM_BLOCKS = 16
QUERY_CHUNK = 512  # queries that meet their keys at once: the scores of a long sequence are never whole in memory

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class GptConfig:
    """Sizes: `vocab_size` rows of each embedding, `head_rows` logits, `num_scalars` with their padding.

    Raises ModelError for sizes whose arithmetic is not defined.
    """

    dialect: Literal["small", "medium"]
    vocab_size: int
    head_rows: int
    num_layers: int
    model_dim: int
    num_scalars: int

    def __post_init__(self) -> None:
        if self.num_layers % 2 or self.num_layers < 2 * VALUE_EMBEDDINGS:
            raise ModelError(f"a GPT has an even number of blocks, at least 6, not {self.num_layers}")
        if self.dialect == "medium" and self.num_layers != MEDIUM_BLOCKS:
            raise ModelError(f"the skips of a medium GPT are defined for {MEDIUM_BLOCKS} blocks, not {self.num_layers}")
        if self.model_dim % HEAD_SIZE:
            raise ModelError(f"a GPT's width is a multiple of the head size {HEAD_SIZE}, not {self.model_dim}")
        if self.num_scalars < 5 * self.num_layers:
            raise ModelError(f"{self.num_scalars} scalars are too few: each of {self.num_layers} blocks has 5")


@dataclass(frozen=True)
class GptOutput:
    """`logits` [B, T, head_rows] in float32, after the soft cap."""

    logits: Tensor


def skip_connections(config: GptConfig) -> dict[int, tuple[int, int]]:
    """Block → (index of its skip weight in `scalars`, the block whose output is added before it)."""
    if config.dialect == "medium":
        return {block: (source, source) for block, source in MEDIUM_SKIPS.items()}
    half = config.num_layers // 2
    return {half + i: (i, half - 1 - i) for i in range(half)}


def notes(length: int) -> tuple[str, ...]:
    """What a reader should know before trusting figures of sequences of `length` tokens."""
    if length <= TRAINED_WINDOW:
        return ()
    return (
        f"a sequence of {length} tokens leaves the trained window of {TRAINED_WINDOW}: training used sliding windows "
        "and document masks, this is plain causal attention",
    )


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without weights."""
    return F.rms_norm(x, (x.shape[-1],))


def rotation(length: int, device: torch.device) -> Rotation:
    """Cosines and sines [T, 64] of the half-truncated rotary embedding: half of the pairs do not turn."""
    quarter = HEAD_SIZE // 4
    frequencies = (1 / 1024) ** torch.linspace(0, 1, quarter, dtype=torch.float32)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), F.pad(frequencies, (0, quarter)))
    return angles.cos().to(device), angles.sin().to(device)


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Turn the pairs (element j of the first half, element j of the second) of `x` [B, heads, T, 128]."""
    cos, sin = angles
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three times [B, heads, T, 128] → [B, heads, T, 128]."""
    length, parts = q.shape[2], []
    for start in range(0, length, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, length)
        scores = q[:, :, start:end].float() @ k[:, :, :end].float().mT * ATTENTION_SCALE
        future = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
        probabilities = scores.masked_fill(future, float("-inf")).softmax(-1).to(v.dtype)
        parts.append(probabilities @ v[:, :, :end])
    return torch.cat(parts, dim=2)


def heads(x: Tensor) -> Tensor:
    """[B, T, d] → [B, heads, T, 128]."""
    return x.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)


def attend(qkv: Tensor, value: Tensor | None, weights: Tensor, angles: Rotation, norm_v: bool) -> Tensor:
    """q, k and v side by side [B, T, 3d] → the outputs of the heads side by side [B, T, d].

    `value` [B, T, d] is the value embedding, where the block has one; `weights` [2] are those of v and of `value`.
    """
    q, k, v = map(heads, qkv.chunk(3, dim=-1))
    v = weights[0] * (norm(v) if norm_v else v)
    if value is not None:
        v = v + weights[1] * heads(value)
    y = causal_attention(rotate(norm(q), angles), rotate(norm(k), angles), v)
    return y.transpose(1, 2).flatten(2)


class SmallAttention(nn.Module):
    """Reads the normed stream; v is not normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv_w = nn.Parameter(torch.empty(3, width, width))
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, value: Tensor | None, weights: Tensor, angles: Rotation) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        qkv = F.linear(norm(x), self.qkv_w.flatten(0, 1))
        return self.c_proj(attend(qkv, value, weights, angles, norm_v=False))


class MediumAttention(nn.Module):
    """Reads the stream as it is; v is normed. The fourth matrix projects out and, like `c_proj`, is not transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkvo_w = nn.Parameter(torch.empty(4, width, width))

    def forward(self, x: Tensor, value: Tensor | None, weights: Tensor, angles: Rotation) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        qkv = F.linear(x, self.qkvo_w[:3].flatten(0, 1))
        return F.linear(attend(qkv, value, weights, angles, norm_v=True), self.qkvo_w[3])


class SmallMlp(nn.Module):
    """proj(relu(fc x)²)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        return self.c_proj(self.c_fc(x).relu().square())


class MediumMlp(nn.Module):
    """The same under other names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc_w = nn.Parameter(torch.empty(4 * width, width))
        self.proj_w = nn.Parameter(torch.empty(width, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        return F.linear(F.linear(x, self.fc_w).relu().square(), self.proj_w)


class Block(nn.Module):
    """Attention, where the block has it, and an MLP."""

    def __init__(self, config: GptConfig, index: int) -> None:
        super().__init__()
        small, width = config.dialect == "small", config.model_dim
        self.attn = None
        if index != BLOCK_WITHOUT_ATTENTION:
            self.attn = SmallAttention(width) if small else MediumAttention(width)
        self.mlp = SmallMlp(width) if small else MediumMlp(width)

    def forward(self, x: Tensor, value: Tensor | None, weights: Tensor, angles: Rotation) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        if self.attn is not None:
            x = x + self.attn(x, value, weights, angles)
        return x + self.mlp(norm(x))


class GptForCausalLM(nn.Module):
    """The model. Its logits are `head(hidden(ids))`, for callers that take them in chunks of positions."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        width = config.model_dim
        self.embed = nn.Embedding(config.vocab_size, width)
        self.value_embeds = nn.ModuleList(nn.Embedding(config.vocab_size, width) for _ in range(VALUE_EMBEDDINGS))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        if config.dialect == "small":
            self.lm_head = nn.Linear(width, config.head_rows, bias=False)
        else:
            self.lm_head_w = nn.Parameter(torch.empty(config.head_rows, width))
        self.scalars = nn.Parameter(torch.empty(config.num_scalars, dtype=torch.float32))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> GptOutput:
        """`input_ids` [B, T], `attention_mask` [B, T] (1 token, 0 padding on the right) → logits [B, T, head_rows].

        Raises ModelError for padding on the left and for token ids that the embedding does not have.
        """
        return GptOutput(self.head(self.hidden(input_ids, attention_mask)))

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, record: list[Tensor] | None = None
    ) -> Tensor:
        """The input of the head [B, T, d]. `record` receives the output of each block [B, T, d], lowest first."""
        ids = self._checked(input_ids, attention_mask)
        layers, skips = self.config.num_layers, skip_connections(self.config)
        lambdas = self.scalars[layers : 3 * layers].view(layers, 2)
        weights = self.scalars[3 * layers : 5 * layers].view(layers, 2)
        tables = [table(ids) for table in self.value_embeds]
        values = [*tables, *[None] * (layers - 2 * len(tables)), *tables]
        angles = rotation(ids.shape[1], ids.device)
        outputs: list[Tensor] = []
        x = x0 = norm(self.embed(ids))
        for i, block in enumerate(self.blocks):
            if i in skips:
                weight, source = skips[i]
                x = x + self.scalars[weight] * outputs[source]
            x = lambdas[i, 0] * x + lambdas[i, 1] * x0
            x = block(x, values[i], weights[i], angles)
            outputs.append(x)
        if record is not None:
            record.extend(outputs)
        return norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., d] → logits [..., head_rows] in float32, capped softly at 30 (small) or ±15 (medium)."""
        if self.config.dialect == "small":
            return 30 * torch.sigmoid(self.lm_head(hidden).float() / (7.5 * self.config.model_dim**0.5))
        z = F.linear(hidden, self.lm_head_w).float()
        return 15 * z * torch.rsqrt(z.square() + 225)

    def _checked(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The ids, 0 where padding is: causal attention lets no token see what stands to its right."""
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ModelError(f"input_ids must be [batch, tokens] and not empty, not {list(input_ids.shape)}")
        if mask is not None:
            if mask.shape != input_ids.shape or bool((mask[:, 1:] > mask[:, :-1]).any()):
                raise ModelError("attention_mask must have the shape of input_ids and its zeros on the right")
            input_ids = input_ids.masked_fill(mask == 0, 0)
        low, high = (int(extreme) for extreme in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ModelError(
                f"token id {low if low < 0 else high} is not in the model's vocabulary of {self.config.vocab_size}; "
                "it is another model's tokenizer"
            )
        return input_ids


def build(
    config: GptConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> GptForCausalLM:
    """The model with copies of `tensors`, whose names are exactly its parameters', in evaluation mode, gradients off.

    `dtype` is the compute dtype; `scalars` become float32. Raises ModelError with every difference in names or shapes.
    """
    with torch.device("meta"):
        model = GptForCausalLM(config)
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    given = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if differing := sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n)):
        shown = "; ".join(f"{n}: {given.get(n, 'missing')}, expected {expected.get(n, 'none')}" for n in differing)
        raise ModelError(f"the tensors are not those of this {config.dialect} GPT: {shown}")
    dtypes = {name: torch.float32 if name == "scalars" else dtype for name in expected}
    own = {name: tensors[name].to(device=device, dtype=dtypes[name], copy=True) for name in expected}
    model.load_state_dict(own, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def build_gpt(checkpoint: Checkpoint, placement: Placement) -> GptForCausalLM:
    """The model of a checkpoint. Raises ModelError for one that cannot be run, CheckpointError for NaN or Inf."""
    checkpoint.require_complete()
    details, dtype = checkpoint.details, torch_dtype(placement.dtype, checkpoint.weights, EMBEDDING)
    config = GptConfig(**{each.name: getattr(details, each.name) for each in fields(GptConfig)})
    tensors = {name: checkpoint.weights.read(name) for name in details.keys}
    model = build(config, tensors, dtype, torch_device(placement.device))
    require_finite(checkpoint, model.parameters(), dtype)
    return model
