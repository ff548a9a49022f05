"""A modulation written into the MLPs for good: W += strength · Σ_i v_b_i v_a_iᵀ, for gate, up and down as it has them.

All layers are written from one extraction with unchanged weights, so their order does not matter; `sequential` takes
each layer's vectors after the layers below were changed, as older programs do. The base's own weights stay what they
are: a touched matrix is a copy, `plain()` has the old ones, and `reset` gives them back bit for bit.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from runner.checkpoints import model_directory
from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError
from runner.evaluation.base_models import Base, build_plain
from runner.evaluation.placement import Placement
from runner.families.npt import edited, save
from runner.families.npt.model import (
    NptLlamaForCausalLM,
    Origin,
    build_npt,
    npt_tensors,
    npt_updates,
    with_layers,
)
from runner.families.npt.modulation import Modulation, Pair, delta_norm
from runner.families.npt.transfer import extract
from runner.files.archive import require_crc
from runner.files.file_type import sha256_of
from runner.files.staging import staged
from runner.files.tensors import owned

STRENGTH, FULL_ALPHA = 0.3, 0.1
FORMS = ("delta", "hf")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One modulation in the weights: `vectors` by layer and projection, and the `matrices` that it changed.

    A row of `matrices`: layer, projection, delta_norm ‖ΔW‖ (strength in it), relative ‖ΔW‖/‖W‖, W after it.
    `of_checkpoint`: it was there when the model was loaded, so no reset takes it back; whole bases have no `vectors`.
    """

    expression: str
    texts: tuple[str, ...]
    strength: float
    vectors: Mapping[int, Mapping[str, Pair]] = field(repr=False)
    matrices: Sequence[Mapping[str, Any]]
    of_checkpoint: bool = False

    @property
    def layers(self) -> list[int]:
        """Those that it changed."""
        return sorted({row["layer"] for row in self.matrices})

    def values(self) -> dict[str, Any]:
        """What a file says of it beside its vectors."""
        said = {"expression": self.expression, "texts": list(self.texts), "strength": self.strength}
        return {**said, "layers": self.layers, "matrices": [dict(row) for row in self.matrices]}

    def without(self, layers: Collection[int]) -> "Edit":
        """As if `layers` had not been written."""
        if self.of_checkpoint:
            return self
        return replace(
            self,
            vectors={i: pairs for i, pairs in self.vectors.items() if i not in layers},
            matrices=[row for row in self.matrices if row["layer"] not in layers],
        )


def default_strength(model: NptLlamaForCausalLM) -> float:
    """0.3; of complete NPT models 0.1 (their alpha)."""
    return FULL_ALPHA if model.origin is not None and model.origin.format == "npt_full" else STRENGTH


def apply(
    model: NptLlamaForCausalLM,
    m: Modulation,
    layers: Collection[int] | None = None,
    strength: float | None = None,
    *,
    sequential: bool = False,
) -> Edit:
    """Write `m` into `layers` (None: all that it has) of `model`; what was done.

    Raises ConfigError where a layer is not in it, for a ΔW of 0, and for `sequential` of anything but an extraction.
    """
    chosen = sorted(set(m.layers if layers is None else layers))
    if wrong := sorted(set(chosen) - set(m.layers)):
        raise ConfigError(f"layer {wrong[0]} is not in the modulation, which has the layers {m.layers}")
    if m.count != 1:
        raise ConfigError(f"a modulation of {m.count} positions cannot be written into the weights; take one position")
    strength = default_strength(model) if strength is None else strength
    before, known = len(model.written), _weights(model, chosen)
    first = dict(model.first_weights)
    try:
        edits = [m.only(chosen)] if not sequential else (_taken_again(model, m, layer) for layer in chosen)
        parts = [_write(model, each, strength) for each in edits]
    except BaseException:
        restore(model, known, first, before)
        raise
    edit = Edit(
        expression=m.expression,
        texts=tuple(source.text or str(list(source.ids)) for source in m.sources),
        strength=strength,
        vectors={layer: pairs for part, _ in parts for layer, pairs in part.items()},
        matrices=[row for _, rows in parts for row in rows],
    )
    model.written.append(edit)
    return edit


def _taken_again(model: NptLlamaForCausalLM, m: Modulation, layer: int) -> Modulation:
    """One layer's vectors with the weights as they are now."""
    if len(m.sources) != 1 or m.sources[0].count != 1 or not m.expression.startswith("extract"):
        raise ConfigError("sequential writing extracts again: give a modulation that was extracted, not combined")
    source = m.sources[0]
    again = extract(model, source.ids, "mean" if source.mean else source.position, m.active)
    return again.only([layer])


def _write(
    model: NptLlamaForCausalLM, m: Modulation, strength: float
) -> tuple[Mapping[int, Mapping[str, Pair]], list[dict[str, Any]]]:
    """Put changed copies in the place of the matrices, all of them or none."""
    changed: dict[nn.Linear, tuple[str, nn.Parameter]] = {}
    rows = []
    for layer, pairs in m.vectors.items():
        for projection, pair in pairs.items():
            name = f"model.layers.{layer}.mlp.{projection}_proj"
            if layer >= len(model.model.layers):
                raise ConfigError(f"layer {layer}: the model has only the layers 0 to {len(model.model.layers) - 1}")
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            norm = abs(strength) * delta_norm(pair)
            if norm == 0:
                raise ConfigError(f"layer {layer}: the update of {projection} is 0: nothing would be written")
            weight = _changed(linear.weight, pair, strength, layer, projection)
            changed[linear] = (name, weight)
            total = float(weight.detach().float().norm())
            rows.append({"layer": layer, "projection": projection, "delta_norm": norm, "relative": norm / total})
    for linear, (name, weight) in changed.items():
        model.first_weights.setdefault(name, _weight(model, name))
        linear.weight = weight
    return m.vectors, rows


def _changed(weight: torch.Tensor, pair: Pair, strength: float, layer: int, projection: str) -> nn.Parameter:
    v_a, v_b = (tensor.detach().to(weight.device, torch.float32) for tensor in pair)
    if (v_b.shape[-1], v_a.shape[-1]) != tuple(weight.shape):
        raise ConfigError(
            f"layer {layer}: ΔW of {projection} is {[v_b.shape[-1], v_a.shape[-1]]}, the weights {list(weight.shape)}"
        )
    made = (weight.float() + strength * (v_b.mT @ v_a)).to(weight.dtype)
    if not bool(torch.isfinite(made).all()):
        raise ConfigError(f"layer {layer}: {projection} would not be finite with strength {strength:g}")
    return nn.Parameter(made, requires_grad=False)


def _weights(model: NptLlamaForCausalLM, layers: Collection[int]) -> dict[str, nn.Parameter]:
    """The MLP weights of `layers` as they are, by their modules."""
    names = [f"model.layers.{i}.mlp.{each}_proj" for i in layers for each in ("gate", "up", "down")]
    return {name: _weight(model, name) for name in names if int(name.split(".")[2]) < len(model.model.layers)}


def _weight(model: NptLlamaForCausalLM, name: str) -> nn.Parameter:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def restore(
    model: NptLlamaForCausalLM, weights: Mapping[str, nn.Parameter], first: Mapping[str, nn.Parameter], count: int
) -> None:
    """Put `weights` back, and what the model remembers: its first weights, and `count` edits."""
    for name, weight in weights.items():
        model.get_submodule(name).weight = weight
    model.first_weights.clear()
    model.first_weights.update(first)
    del model.written[count:]


def reset(model: NptLlamaForCausalLM, layers: Collection[int] | None = None) -> list[int]:
    """Give the first weights back to `layers` (None: all), bit for bit; those that had others."""
    touched = {name: int(name.split(".")[2]) for name in model.first_weights}
    chosen = set(touched.values()) if layers is None else set(layers) & set(touched.values())
    for name, layer in touched.items():
        if layer in chosen:
            model.get_submodule(name).weight = model.first_weights.pop(name)
    left = [edit.without(chosen) for edit in edits_of(model)]
    model.written[:] = [edit for edit in left if edit.matrices]
    return sorted(chosen)


@contextmanager
def unwritten(model: NptLlamaForCausalLM) -> Iterator[None]:
    """Within the block the model has its first weights."""
    written = {name: _weight(model, name) for name in model.first_weights}
    try:
        for name, weight in model.first_weights.items():
            model.get_submodule(name).weight = weight
        yield
    finally:
        for name, weight in written.items():
            model.get_submodule(name).weight = weight


def edits_of(model: NptLlamaForCausalLM) -> list[Edit]:
    """What was written into the model, in order."""
    return [edit for edit in model.written if isinstance(edit, Edit)]


class Permanent:
    """A modulation in the weights for as long as a `with` block: `report` has a row for each matrix that it changed."""

    def __init__(
        self, model: NptLlamaForCausalLM, m: Modulation, layers: Collection[int] | None, strength: float | None
    ) -> None:
        self._model, self._arguments = model, (m, layers, strength)
        self.report: list[dict[str, Any]] = []

    def __enter__(self) -> "Permanent":
        model, (m, layers, strength) = self._model, self._arguments
        self._before = _weights(model, m.layers), dict(model.first_weights), len(model.written)
        self.report = [dict(row) for row in apply(model, m, layers, strength).matrices]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        restore(self._model, *self._before)

    def reset(self, layers: Collection[int] | None = None) -> None:
        """Give the first weights back to `layers` (None: all)."""
        reset(self._model, layers)

    def save(self, path: str | Path, form: str = "delta") -> None:
        """As `save_edited`."""
        save_edited(self._model, Path(path), form)


def save_edited(model: NptLlamaForCausalLM, target: Path, form: str = "delta") -> None:
    """Write the model with all its edits as the new directory `target`, which `ckpt=` opens.

    `form`: delta, the factors of what was touched; or hf, the whole base as a Hugging Face directory, with the NPT
    weights beside it. An npt_full is written whole. Raises ConfigError where nothing was written or where a delta has
    nothing to stand on, CheckpointError or RunnerError where `target` cannot be written.
    """
    if form not in FORMS:
        raise ConfigError(f"{form} is unknown; choose {' or '.join(FORMS)}")
    edits, origin = edits_of(model), model.origin
    if not edits or origin is None:
        raise ConfigError("nothing was written into the weights: there is nothing to save")
    if origin.format == "npt_full":
        if form == "delta":
            raise ConfigError("a complete NPT model is saved whole: take the form hf")
        save.save_full(open_checkpoint(origin.checkpoint), model, target)
        return
    said = {
        "format": edited.VERSION,
        "base": str(origin.base.resolve()) if origin.base else None,
        "step": origin.step,
        "edits": [edit.values() for edit in edits],
    }
    with staged(target, inputs=[origin.checkpoint]) as directory:
        if form == "hf":
            _save_whole(model, origin, said, directory)
        else:
            _save_factors(edits, origin, said, directory, target)


def _save_factors(
    edits: Sequence[Edit], origin: Origin, said: Mapping[str, Any], directory: Path, target: Path
) -> None:
    under = origin.edited or origin.checkpoint
    if origin.format == edited.NAME and origin.edited is None:
        raise ConfigError(f"{origin.checkpoint}: holds its changed base itself: save it whole again, in the form hf")
    tensors = {
        edited.key(i, layer, projection, side): tensor
        for i, edit in enumerate(edits)
        for layer, pairs in edit.vectors.items()
        for projection, pair in pairs.items()
        for side, tensor in zip(("v_a", "v_b"), pair, strict=True)
    }
    save_file(owned(tensors), directory / edited.FACTORS)
    sha256 = {file.name: sha256_of(file) for file in origin.files if file.name != edited.FACTORS}
    # Relative where both are moved together, as a folder of results is.
    where = os.path.relpath(under.resolve(), Path(os.path.abspath(target)))  # noqa: PTH100 - it is not there yet
    _write_json(directory / edited.EDITS, {**said, "checkpoint": where, "sha256": sha256})


def _save_whole(model: NptLlamaForCausalLM, origin: Origin, said: Mapping[str, Any], directory: Path) -> None:
    """The base's own tensors but for the touched ones, in their own precision; these in that of the model."""
    home = origin.checkpoint if origin.format == edited.NAME and origin.edited is None else origin.base
    assert home is not None, "an npt_delta has a base"
    weights = model_directory.open_model_weights(home)
    touched = {f"{name}.weight" for edit in edits_of(model) for name in _names(edit)}
    state = model.state_dict()
    tensors = {name: state[name] if name in touched else weights.read(name) for name in weights.infos}
    model_directory.save(directory, tensors, config=model_directory.read_config(home))
    for name in save.BESIDE_MODEL:
        if (home / name).is_file():
            require_crc(home / name)
            shutil.copyfile(home / name, directory / name)
    save_file(owned(npt_tensors(model)), directory / "npt_weights.safetensors")
    _write_json(directory / edited.HISTORY, said)


def _names(edit: Edit) -> list[str]:
    return [f"model.layers.{layer}.mlp.{name}_proj" for layer, pairs in edit.vectors.items() for name in pairs]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def build_edited(checkpoint: Checkpoint, base: Base | None, placement: Placement) -> NptLlamaForCausalLM:
    """The model of an npt_edit: over `base`, or complete by itself. Its edits are its own base weights."""
    details: edited.EditDetails = checkpoint.details
    if details.config is not None:
        plain = build_plain(details.config, checkpoint.weights, details.base_keys, placement)
        checkpoint.require_complete()
        model = with_layers(plain, npt_updates(checkpoint, plain.dtype, plain.device))
        model.written = [_edit(edit, {}) for edit in details.edits]
    else:
        assert base is not None, "factors stand on a base"
        _check_hashes(checkpoint, details)
        model = build_npt(checkpoint, base)
        for i, edit in enumerate(details.edits):
            vectors = {
                layer: {name: edited.factors(checkpoint, i, layer, name) for name in names}
                for layer, names in edited.matrices(edit).items()
            }
            made = Modulation(vectors=vectors, active=(), expression=str(edit.get("expression", "")))
            _write(model, made, float(edit["strength"]))
            model.written.append(_edit(edit, vectors))
        model.first_weights.clear()
    model.origin = Origin(
        checkpoint=checkpoint.path,
        format=checkpoint.format,
        base=base.path if base else checkpoint.local_base(),
        files=checkpoint.weights.files,
        base_files=base.files if base else (),
        edited=details.checkpoint,
        step=checkpoint.step,
    )
    return model


def _edit(said: Mapping[str, Any], vectors: Mapping[int, Mapping[str, Pair]]) -> Edit:
    texts = said.get("texts")
    return Edit(
        expression=str(said.get("expression", "")),
        texts=tuple(map(str, texts)) if isinstance(texts, list) else (),
        strength=float(said["strength"]),
        vectors=vectors,
        matrices=said["matrices"],
        of_checkpoint=True,
    )


def _check_hashes(checkpoint: Checkpoint, details: edited.EditDetails) -> None:
    """Raise CheckpointError where the NPT weights are not those that were edited."""
    known = details.sha256 or {}
    for file in checkpoint.weights.files:
        if file.name in known and sha256_of(file) != known[file.name]:
            raise CheckpointError(f"{checkpoint.path}: {file} is not the file that was edited: its content differs")
