"""A Llama some of whose layers are NPT: attention modulates the MLP's weights, token by token.

    a   = SelfAttention(input_layernorm(h))
    x   = post_attention_layernorm(h)                     # h alone: the attention output is not added
    ΔW·x = Σ_i v_b_i (v_a_i · x),  v_a_i = s_i W_a_up[i],  v_b_i = s_i W_b_up[i],  s_i = a W_down[i]
    out = h + (W_down + ΔW_down) (silu((W_gate + ΔW_gate) x) * ((W_up + ΔW_up) x))

v_a and v_b are never materialised: v_a_i · x = s_i · (W_a_up[i] x), so ΔW·x costs k·r numbers a token, not k·(d+f).
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import ConfigError, ModelError
from runner.evaluation.attention import Rotation
from runner.evaluation.base_models import Base, build_plain, require_finite
from runner.evaluation.llama import Llama, LlamaLayer
from runner.evaluation.placement import Placement, follow, is_spread, torch_device
from runner.families.npt import checkpoint as npt_delta

if TYPE_CHECKING:
    from runner.families.npt.full import NptFullDetails

PROJECTIONS = ("gate", "up", "down")
# Takes the place of an update: projection, attention [B, T, d], x [B, T, d_in], ΔW·x [B, T, d_out] → what counts.
Override = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RankKUpdate(nn.Module):
    """ΔW·x for one projection: k rank-1 terms, each read from the attention output through a bottleneck of r.

    Made from k matrices of each kind: `w_down` [d, r], `w_a_up` [r, d_in], `w_b_up` [r, d_out]; for gate and up
    d_in = d and d_out = f, for down d_in = f and d_out = d. Held stacked over k·r, so that a pass is three matrix
    products. `scale` multiplies the update (npt_full's modulation_scale).
    """

    def __init__(
        self,
        w_down: Iterable[torch.Tensor],
        w_a_up: Iterable[torch.Tensor],
        w_b_up: Iterable[torch.Tensor],
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        terms = tuple(w_down)
        self.num_ranks, self.np_rank = len(terms), terms[0].shape[1]
        self.w_down = nn.Parameter(torch.cat(terms, dim=1))  # [d, k·r]
        self.w_a_up = nn.Parameter(torch.cat(tuple(w_a_up)))  # [k·r, d_in]
        self.w_b_up = nn.Parameter(torch.cat(tuple(w_b_up)))  # [k·r, d_out]

    def matrices(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Views of `w_down` [d, r], `w_a_up` [r, d_in] and `w_b_up` [r, d_out], one for each rank-1 term."""
        return (
            list(self.w_down.unflatten(1, (self.num_ranks, self.np_rank)).unbind(1)),
            list(self.w_a_up.unflatten(0, (self.num_ranks, self.np_rank)).unbind(0)),
            list(self.w_b_up.unflatten(0, (self.num_ranks, self.np_rank)).unbind(0)),
        )

    def vectors(self, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v_a [..., k, d_in] and v_b [..., k, d_out] for `attention` [..., d]: for few positions, as they are large."""
        s = (attention @ self.w_down).unflatten(-1, (self.num_ranks, self.np_rank)).unsqueeze(-2)
        shape = (self.num_ranks, self.np_rank)
        up = (each.unflatten(0, shape) for each in (self.w_a_up, self.w_b_up))
        v_a, v_b = ((s @ each).squeeze(-2) for each in up)
        return v_a, v_b

    def forward(self, attention: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`attention` [..., d], `x` [..., d_in] → ΔW·x [..., d_out]."""
        s = attention @ self.w_down
        per_rank = s.unflatten(-1, (self.num_ranks, self.np_rank))
        products = (s * (x @ self.w_a_up.T)).unflatten(-1, (self.num_ranks, self.np_rank))
        dot = products.sum(-1, keepdim=True)  # v_a_i · x, [..., k, 1]
        update = (dot * per_rank).flatten(-2) @ self.w_b_up
        return update if self.scale == 1 else self.scale * update


class NptDecoderLayer(LlamaLayer):
    """A Llama layer with rank-k updates for some of its projections; `npt_mode = False` is the unchanged layer.

    It takes over the base layer's submodules: the keys of the base weights stay what they are.
    """

    def __init__(self, base: LlamaLayer, updates: Mapping[str, RankKUpdate]) -> None:
        nn.Module.__init__(self)
        self.self_attn = base.self_attn
        self.mlp = base.mlp
        self.input_layernorm = base.input_layernorm
        self.post_attention_layernorm = base.post_attention_layernorm
        self.updates = nn.ModuleDict(dict(updates))
        self.npt_mode = True
        self.override: Override | None = None
        self.train(base.training)

    @property
    def modulation(self) -> str:
        """single, dual or triple: how many of the projections are modulated."""
        return ("single", "dual", "triple")[len(self.updates) - 1]

    def forward(
        self, hidden: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None = None, cache: Any = None
    ) -> torch.Tensor:
        """As `LlamaLayer.forward`: [B, T, d] → [B, T, d]."""
        if not self.npt_mode:
            return super().forward(hidden, rotation, mask, cache)
        attention = self.self_attn(self.input_layernorm(hidden), rotation, mask, cache)
        return hidden + self.modulated_mlp(attention, self.post_attention_layernorm(hidden))

    def modulated_mlp(self, attention: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The MLP whose weights `attention` [..., d] modulates, at `x` [..., d] → [..., d]."""
        gate = self._project("gate", self.mlp.gate_proj, attention, x)
        up = self._project("up", self.mlp.up_proj, attention, x)
        return self._project("down", self.mlp.down_proj, attention, self.mlp.act_fn(gate) * up)

    def _project(self, name: str, linear: nn.Module, attention: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if name not in self.updates:
            return linear(x)
        update = self.updates[name](attention, x)
        return linear(x) + (update if self.override is None else self.override(name, attention, x, update))


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The files that a model in memory was made from; `base`: what it runs on, or was made from, as far as known.

    `edited`: the checkpoint to which the edits of an npt_edit belong, where they lie apart from it.
    """

    checkpoint: Path
    format: str
    base: Path | None
    files: tuple[Path, ...]
    base_files: tuple[Path, ...] = ()
    edited: Path | None = None
    step: int | None = None


class NptLlamaForCausalLM(Llama):
    """A Llama with NPT layers at some depths. It shares every base weight with `base`, which stays usable by itself.

    `updates`: layer index → projection name → `RankKUpdate`. Raises ModelError for a base that is no Llama, IndexError
    for a layer beyond its depth.
    """

    def __init__(self, base: nn.Module, updates: Mapping[int, Mapping[str, RankKUpdate]]) -> None:
        if not isinstance(base, Llama):
            raise ModelError(f"NPT layers stand on a Llama, not on a {type(base).__name__}")
        nn.Module.__init__(self)
        self.config = base.config
        # Modules of its own over shared tensors: what is hooked on one model is not run by the other.
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        self.model = copy.deepcopy(base.model, shared)
        self.lm_head = copy.deepcopy(base.lm_head, shared)
        for index, layer_updates in updates.items():
            layer = self.model.layers[index]
            assert isinstance(layer, LlamaLayer)
            self.model.layers[index] = NptDecoderLayer(layer, layer_updates)
        self.origin: Origin | None = None
        # The base's weights in place of which others were written for good, by their modules, and the edits that
        # did it, in order (transfer_permanent.py).
        self.first_weights: dict[str, nn.Parameter] = {}
        self.written: list[object] = []
        self.train(base.training)

    @property
    def npt_layers(self) -> dict[int, NptDecoderLayer]:
        """The NPT layers by depth, lowest first."""
        return {i: layer for i, layer in enumerate(self.model.layers) if isinstance(layer, NptDecoderLayer)}

    def plain(self) -> "NptLlamaForCausalLM":
        """A model over the same tensors with all layers standard, whatever was switched or written here."""
        twin = NptLlamaForCausalLM(self, {})
        for name, weight in self.first_weights.items():
            twin.get_submodule(name).weight = weight
        for layer in twin.npt_layers.values():
            layer.npt_mode, layer.override = False, None
        return twin

    @contextmanager
    def npt_mode(self, active: set[int]) -> Iterator[None]:
        """Within the block exactly the NPT layers in `active` modulate; the others are the base's."""
        before = {i: layer.npt_mode for i, layer in self.npt_layers.items()}
        try:
            for i, layer in self.npt_layers.items():
                layer.npt_mode = i in active
            yield
        finally:
            for i, layer in self.npt_layers.items():
                layer.npt_mode = before[i]


def build_npt(checkpoint: Checkpoint, base: Base) -> NptLlamaForCausalLM:
    """The NPT layers of `checkpoint` over `base`, whose weights it shares, in evaluation mode.

    Raises ModelError where the two do not fit, CheckpointError for missing or unknown keys and for NaN or Inf.
    """
    checkpoint.require_complete()
    _check_fit(checkpoint, base)
    model = with_layers(base.model, npt_updates(checkpoint, base.model.dtype, base.model.device))
    model.origin = _origin(checkpoint, base.path, base.files)
    return model


def build_complete(checkpoint: Checkpoint, details: "NptFullDetails", placement: Placement) -> NptLlamaForCausalLM:
    """An npt_full: its own Llama with its own adapters. Raises as `build_npt`."""
    checkpoint.require_complete()
    names = [name for name in checkpoint.weights.infos if name not in details.adapter_keys]
    plain = build_plain(details.config, checkpoint.weights, names, placement)
    device = torch_device(placement.device)
    model = with_layers(plain, npt_updates(checkpoint, plain.dtype, device, linear=True, scale=details.scale))
    model.origin = _origin(checkpoint, checkpoint.local_base())
    return model


def switch(model: NptLlamaForCausalLM, layers: Collection[int]) -> None:
    """Let exactly the NPT layers `layers` modulate. Raises ConfigError for one that is none."""
    if wrong := sorted(set(layers) - set(model.npt_layers)):
        raise ConfigError(
            f"layer {wrong[0]} is no NPT layer; the NPT layers are {', '.join(map(str, model.npt_layers))}"
        )
    for index, layer in model.npt_layers.items():
        layer.npt_mode = index in layers


def _origin(checkpoint: Checkpoint, base: Path | None, files: tuple[Path, ...] = ()) -> Origin:
    return Origin(
        checkpoint=checkpoint.path,
        format=checkpoint.format,
        base=base,
        files=checkpoint.weights.files,
        base_files=files,
        step=checkpoint.step,
    )


def with_layers(plain: nn.Module, updates: Mapping[int, Mapping[str, RankKUpdate]]) -> NptLlamaForCausalLM:
    """An NPT model over `plain`, in evaluation mode, each update where the layer's weights lie."""
    model = NptLlamaForCausalLM(plain, updates)
    if is_spread(plain):
        for layer in model.npt_layers.values():
            layer.updates.to(layer.mlp.down_proj.weight.device)
            follow(layer)
    model.eval().requires_grad_(False)
    return model


def _check_fit(checkpoint: Checkpoint, base: Base) -> None:
    config = base.model.config
    for layer in checkpoint.layers:
        if layer.layer >= config.num_hidden_layers:
            raise ModelError(
                f"{checkpoint.path}: has NPT layer {layer.layer}, but the base {base.path} has only the layers 0 to "
                f"{config.num_hidden_layers - 1}; give its own base model as base="
            )
        sizes, expected = (layer.hidden_size, layer.intermediate_size), (config.hidden_size, config.intermediate_size)
        if sizes != expected:
            raise ModelError(
                f"{checkpoint.path}: NPT layer {layer.layer} is made for hidden size {sizes[0]} and MLP size "
                f"{sizes[1]}, but the base {base.path} has {expected[0]} and {expected[1]}; give its own base as base="
            )


def npt_updates(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, linear: bool = False, scale: float = 1.0
) -> dict[int, dict[str, RankKUpdate]]:
    """The rank-k updates of every NPT layer, by layer and projection. Raises CheckpointError for NaN or Inf.

    `linear`: the matrices are stored as weights of nn.Linear, so transposed.
    """

    def matrices(names: tuple[str, ...]) -> list[torch.Tensor]:
        tensors = [checkpoint.weights.read(name).to(device=device, dtype=dtype) for name in names]
        return [tensor.T for tensor in tensors] if linear else tensors

    updates = {
        layer.layer: {
            projection: RankKUpdate(matrices(keys["W_down"]), matrices(keys["W_a_up"]), matrices(keys["W_b_up"]), scale)
            for projection, keys in layer.keys.items()
        }
        for layer in checkpoint.layers
    }
    made = (p for projections in updates.values() for update in projections.values() for p in update.parameters())
    require_finite(checkpoint, made, dtype)
    return updates


def npt_tensors(model: NptLlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The NPT weights of `model` under the names that npt_delta saves: the inverse of `npt_updates`."""
    return {
        npt_delta.key(index, layer.modulation, projection, matrix, rank, update.num_ranks): tensor
        for index, layer in model.npt_layers.items()
        for projection, update in _projections(layer).items()
        for matrix, tensors in zip(npt_delta.MATRICES, update.matrices(), strict=True)
        for rank, tensor in enumerate(tensors)
    }


def _projections(layer: NptDecoderLayer) -> dict[str, RankKUpdate]:
    return {name: update for name, update in layer.updates.items() if isinstance(update, RankKUpdate)}
