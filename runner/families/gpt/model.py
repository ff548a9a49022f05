"""modded-nanogpt's GPT, as the script of each public record computes it.

    x = x0 = norm(embed(ids))                                     smear looks one token back
    block i: x = x + skip weight · output of an earlier block     (some blocks)
             x = λ x + λ' x0                                      (+ a second embedding, or bigrams)
             x = x + attention(norm(x))                           (not in every block)
             x = x + mlp(norm(x))
    logits   = cap(head(norm(x)))

That is the program of most; the records of 2026 have those of `lanes.py`. What a record leaves out, changes or adds
stands in `records.py`, the pieces in `pieces.py` and `attention.py`. Source: the records' scripts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import ConfigError, ModelError
from runner.evaluation.base_models import require_finite
from runner.evaluation.placement import Placement, torch_device, torch_dtype
from runner.families.gpt.attention import Cache, Pass
from runner.families.gpt.lanes import flat_lanes, one_lane, two_lanes
from runner.families.gpt.layouts import GptDetails, expected_shapes
from runner.families.gpt.pieces import CAPS, COEFFICIENT, GptConfig, Pieces
from runner.families.gpt.records import Record

# `family.window`, as build_gpt says.
Windows = int | Sequence[int] | Literal["trained"] | None
Program = Callable[[Pieces, Tensor, Tensor, Pass, list[Tensor]], Tensor]


@dataclass(frozen=True)
class GptOutput:
    """`logits` [B, T, head_rows] in float32, after the soft cap."""

    logits: Tensor


def blocks(model: Pieces, ids: Tensor, x0: Tensor, this: Pass, outputs: list[Tensor]) -> Tensor:
    """The program of all records to 2026-02-10; → the input of the last norm [B, T, d]."""
    record, depth = model.record, model.config.num_layers
    values, angles = model.value_embeddings(ids), model.rotations(this)
    entering = [x0]
    if model.has("embed2.weight"):
        entering.append(model.norm(F.embedding(ids, model.weight("embed2.weight"))))
    if record.bigram:
        entering.append(model.bigrams(ids, this))
    mixes = _mixes(model, len(entering))
    skips = model.weight("skip_weights") if model.has("skip_weights") else None
    if skips is None and model.skips:
        skips = model.scalar("skip")
    scale = (2 * depth) ** -0.5 if record.depth_scaled else 1.0
    x = x0
    for i in range(depth):
        if i in record.not_run:
            outputs.append(x)
            continue
        if i in model.skips and skips is not None:
            number, source = model.skips[i]
            weight = torch.sigmoid(skips[number]) if record.sigmoid_skips else skips[number]
            if record.skip_gate:
                name = f"skip_gates.{number}.weight" if model.has("skip_gates.0.weight") else "skip_gate.weight"
                weight = model.gated_skip(x0, name, skips[number])
            x = x + weight * outputs[source]
        if mixes is not None:
            own, *others = mixes[i]
            x = own * x
            for share, added in zip(others, entering, strict=True):
                x = x + share * added
        if i not in record.no_attention:
            u = model.norm(x) if record.input_norm else x
            out = model.attention(i, u, this, angles, values.get(i))
            x = x + (out * scale if record.depth_scaled else out)
        if i not in record.no_mlp and i not in record.not_run:
            x = x + model.mlp(i, x)
        outputs.append(x)
    if record.backout is not None:
        x = x - model.scalar("backout")[0] * outputs[record.backout]
    return x


def _mixes(model: Pieces, entering: int) -> list[tuple[Tensor, ...]] | None:
    """Of each block what x, and then each state that enters it again, is multiplied by; None: x goes on as it is."""
    depth, parts = model.config.num_layers, dict(model.record.scalars)
    if "lambdas" in parts:
        return [each.unbind(0) for each in model.scalar("lambdas").view(depth, -1)]
    if model.has("transformer.h.0.lambdas") or model.has("blocks.0.lambdas"):
        return [model.of_block(i, "lambdas").unbind(0) for i in range(depth)]
    if "resid" not in parts:
        return None
    own = model.scalar("resid")
    x0 = (model.scalar("x0") if "x0" in parts else model.weight("x0_lambdas")).view(depth, -1)
    columns = [own, *x0.unbind(1), *([model.scalar("bigram")] if "bigram" in parts else [])]
    assert len(columns) == entering + 1
    return list(zip(*columns, strict=True))


PROGRAMS: Mapping[str, Program] = {
    "blocks": blocks, "two lanes": two_lanes, "flat lanes": flat_lanes, "one lane": one_lane,
}  # fmt: skip


class GptForCausalLM(Pieces):
    """The model. Its logits are `head(hidden(ids))`, for callers that take them in chunks of positions.

    `document_token`: what every document of its training began with, where that is known.
    """

    document_token: int | None = None

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
        return self._run(ids, Pass(ids, self.config.end_of_text, None), record)

    def head(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., d] → logits [..., head_rows] in float32, after the record's soft cap."""
        name = "lm_head_w" if self.has("lm_head_w") else "lm_head.weight"
        weight = self.weight(name)
        z = hidden @ weight if self.record.keys[name] == "d W" else F.linear(hidden, weight)
        return CAPS[self.record.cap][0](z.float(), self.config.model_dim)

    def notes(self, length: int) -> tuple[str, ...]:
        """What should be known of figures of sequences of `length` tokens."""
        record = self.record
        if self.config.window is not None or not record.window:
            return ()
        least = min(record.windows) if record.window == "tokens" else 128 * min(record.windows)
        least = least // 2 if record.paired else least
        if length <= least:
            return ()
        return (
            f"a sequence of {length} tokens is longer than {least}: there training's windows end, and this attention "
            "looks at everything; family.window=trained gives the windows of validation",
        )

    def new_cache(self, padding: Tensor, length: int) -> Cache:
        """Room for `length` positions of B rows; `padding` [B]: positions on the left of each row that are none."""
        return Cache(padding=padding, length=length)

    def advance(self, token_ids: Tensor, cache: Cache) -> Tensor:
        """Feed `token_ids` [B, t], the next after those in `cache` → logits [B, head_rows] of the last position.

        Raises ModelError for token ids that the embedding does not have.
        """
        slots = torch.arange(cache.count, cache.count + token_ids.shape[1], device=token_ids.device)
        ids = token_ids.masked_fill(slots < cache.padding[:, None], 0)
        self._check_ids(ids)
        return self.head(self._run(ids, Pass(ids, self.config.end_of_text, cache), None)[:, -1])

    def _run(self, ids: Tensor, this: Pass, outputs: list[Tensor] | None) -> Tensor:
        outputs = [] if outputs is None else outputs
        x = PROGRAMS[self.record.program](self, ids, self.embedded(ids, this), this, outputs)
        if self.record.last_mix is None:
            return self.norm(x)
        shares = self.scalar("mix")
        x = shares[0] * self.norm(x) + shares[1] * self.norm(outputs[self.record.last_mix])
        if self.record.last_smear:
            x = x + self.scalar("last smear")[0] * this.previous("last smear", x, torch.zeros_like(x))
        return x

    def _checked(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The ids, 0 where padding is: causal attention lets no token see what stands to its right."""
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ModelError(f"input_ids must be [batch, tokens] and not empty, not {list(input_ids.shape)}")
        if mask is not None:
            if mask.shape != input_ids.shape or bool((mask[:, 1:] > mask[:, :-1]).any()):
                raise ModelError("attention_mask must have the shape of input_ids and its zeros on the right")
            input_ids = input_ids.masked_fill(mask == 0, 0)
        self._check_ids(input_ids)
        return input_ids

    def _check_ids(self, ids: Tensor) -> None:
        low, high = (int(extreme) for extreme in ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ModelError(
                f"token id {low if low < 0 else high} is not in the model's vocabulary of {self.config.vocab_size}; "
                "it is another model's tokenizer"
            )


def build(
    config: GptConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> GptForCausalLM:
    """The model with copies of `tensors`, whose names are exactly its record's, in evaluation mode, gradients off.

    `dtype` is the compute dtype; coefficients become float32. Raises ModelError with every difference in names or
    shapes.
    """
    given = {name: list(tensor.shape) for name, tensor in tensors.items()}
    sizes = {"V": config.vocab_size, "W": config.head_rows, "d": config.model_dim, "hd": config.head_dim}
    sizes["H"] = config.num_heads
    expected = expected_shapes(config.record, config.num_layers, sizes, given)
    if differing := sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n)):
        shown = "; ".join(f"{n}: {given.get(n, 'missing')}, expected {expected.get(n, 'none')}" for n in differing)
        raise ModelError(f"the tensors are not those of this GPT ({config.record.name}): {shown}")
    own = {
        name: tensor.to(device=device, dtype=torch.float32 if COEFFICIENT.search(name) else dtype, copy=True)
        for name, tensor in tensors.items()
    }
    return GptForCausalLM(config, own).eval()


def build_gpt(
    checkpoint: Checkpoint, placement: Placement, *, end_of_text: int | None = None, window: Windows = None
) -> GptForCausalLM:
    """The model of a checkpoint. `end_of_text`: the token with which a document starts that sees itself alone.

    `window`: blocks of 128 that long blocks see (tokens, where the record counts those), or long and short, or
    `trained`: as in validation. Raises ModelError for one that cannot be run, ConfigError for a window that the
    record does not have, CheckpointError for NaN or Inf.
    """
    checkpoint.require_complete()
    details: GptDetails = checkpoint.details
    record = details.record
    dtype = torch_dtype(placement.dtype, checkpoint.weights, record.table)
    config = GptConfig(
        record=record,
        vocab_size=details.vocab_size,
        head_rows=details.head_rows,
        num_layers=details.num_layers,
        model_dim=details.model_dim,
        head_dim=details.head_dim,
        yarn=details.yarn,
        before_split=details.before_split,
        end_of_text=end_of_text,
        window=chosen_windows(record, details.num_layers, window),
    )
    tensors = {name: checkpoint.weights.read(name) for name in details.keys}
    model = build(config, tensors, dtype, torch_device(placement.device))
    model.document_token = details.end_of_text
    require_finite(checkpoint, model.parameters(), dtype)
    return model


def end_of_text(details: GptDetails, documents: object) -> int | None:
    """The token at which documents start for `family.documents`; None where they are not told apart."""
    if not details.record.documents or documents in (None, False):
        return None
    if documents == "known":
        return details.end_of_text if details.end_is_known else None
    return details.end_of_text if documents is True else int(str(documents))


def chosen_windows(record: Record, depth: int, window: Windows) -> tuple[int, int, int] | None:
    """Long, short and last window of `family.window`. Raises ConfigError for a record, or a depth, without windows."""
    if window is None:
        return None
    if not record.window:
        raise ConfigError(f"family.window={window}: {record.name} was trained without windows")
    own_depth = record.depth or {"medium": 16, "small": 12}[record.track]
    if depth != own_depth and not record.pattern and record.long is not None:
        raise ConfigError(
            f"family.window={window}: which blocks are long is defined for {own_depth} blocks, not {depth}"
        )
    if window == "trained":
        return (*record.windows, record.last_window or record.windows[0])
    if isinstance(window, int):
        return window, max(1, window // 2) if record.long is not None else window, window
    long, short = window
    return long, short, long
