"""What a GPT checkpoint says of its training: step, validation loss, the script's text, optimizers. None of it runs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from runner.checkpoints.content import Kind, kind_of
from runner.files.pickles import load_pickle
from runner.files.strict_json import parse_object
from runner.files.tensors import TensorSource

STATE = "model"
TOP_LEVEL = ("step", "code", "optimizers", "val_loss")
# One entry of the metadata of our safetensors, since several would come in an order that changes from file to file.
METADATA = "training"
LARGEST = 1 << 53  # beyond it a step or a loss is no number that anything here can use
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """`step` and `val_loss` as the checkpoint's own state gives them, `code` the text of the training script."""

    step: int | None = None
    val_loss: float | None = None
    code: str | None = None

    def describe(self) -> dict[str, Any]:
        """Fields of the result contract; of the code its SHA-256 and its length in characters."""
        found: dict[str, Any] = {"step": self.step, "val_loss": self.val_loss}
        if self.code is not None:
            text = self.code.encode("utf-8", "surrogatepass")
            found |= {"code_sha256": hashlib.sha256(text).hexdigest(), "code_length": len(self.code)}
        return {name: value for name, value in found.items() if value is not None}


def provenance(source: TensorSource) -> Provenance:
    """That of an opened file, a .pt or our safetensors; what it does not hold is None. Raises CheckpointError."""
    entries = source.extras
    if METADATA in entries and kind_of(source.path) is Kind.SAFETENSORS:
        entries = parse_object(entries[METADATA].encode(), source.path, f"metadata entry {METADATA!r}")
    step, loss, code = (_value(source, entries, name) for name in ("step", "val_loss", "code"))
    return Provenance(
        step=step if isinstance(step, int) and _is_number(step) else None,
        val_loss=float(loss) if _is_number(loss) else None,
        code=code if isinstance(code, str) else None,
    )


def metadata(origin: Provenance) -> dict[str, str]:
    """What `provenance` reads back from a safetensors file that has this as its metadata."""
    return {METADATA: json.dumps(asdict(origin), sort_keys=True)}


def _value(source: TensorSource, entries: Mapping[str, Any], name: str) -> Any:
    """An entry beside the weights; a tensor of one element as the number that it holds."""
    value = entries.get(name)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return load_pickle(source.path, tensors="mmap")[name].item()
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def optimizer_summaries(optimizers: Any) -> list[dict[str, Any]]:
    """Of each optimizer: tensors, elements and bytes of its state, and its parameter groups without their tensors."""
    if not isinstance(optimizers, (list, tuple)):
        return []
    return [_summary(each) for each in optimizers if isinstance(each, Mapping)]


def _summary(optimizer: Mapping[Any, Any]) -> dict[str, Any]:
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    entries = [entry for entry in state.values() if isinstance(entry, Mapping)] if isinstance(state, Mapping) else []
    tensors = [value for entry in entries for value in entry.values() if isinstance(value, torch.Tensor)]
    return {
        "parameters": len(entries),
        "tensors": len(tensors),
        "elements": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "groups": [_group(group) for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else [],
    }


def _group(group: Mapping[Any, Any]) -> dict[str, Any]:
    parameters = group.get("params")
    settings = {str(name): value for name, value in group.items() if name != "params" and _is_plain(value)}
    return {**settings, "params": len(parameters) if isinstance(parameters, (list, tuple)) else 0}


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, _PLAIN) for item in value)
    )
