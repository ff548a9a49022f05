"""A fine-tuned classifier in memory: the backbone as it was, what was trained of it, and the head."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError
from runner.evaluation.base_models import Base, require_finite
from runner.evaluation.placement import Placement, torch_device, torch_dtype
from runner.families.family import Auto, Family
from runner.families.finetuned.checkpoint import BACKBONE, FinetunedDetails
from runner.families.gpt.layouts import details_of, key_matches, padded
from runner.families.gpt.model import GptForCausalLM
from runner.families.gpt.model import build as build_gpt
from runner.families.gpt.pieces import GptConfig
from runner.finetuning.classifier import Classifier
from runner.finetuning.files import content_hash, load_parameters, write
from runner.finetuning.low_rank import LowRankSettings

# The names that the script gives what other checkpoints of its small model call otherwise.
_RENAMED = ("attn.c_proj_weight", "mlp.c_fc_weight", "mlp.c_proj_weight")


def open_backbone(checkpoint: Checkpoint, moved: str | None = None) -> tuple[Checkpoint, Family]:
    """The checkpoint that was fine-tuned, and its family.

    Raises CheckpointError where it is not there or is not what it was; `moved`: where it lies now.
    """
    details: FinetunedDetails = checkpoint.details
    assert details.backbone is not None
    path = _place(checkpoint, details.backbone, moved, "family.backbone")
    inner = open_checkpoint(path, str(details.backbone.get("format", "auto")))
    found = content_hash(inner.weights.files)
    if found != details.backbone.get("sha256"):
        raise CheckpointError(f"{path}: is not what {checkpoint.path} was made from: its content has another hash")
    return inner, Auto().of(inner)


def _place(checkpoint: Checkpoint, said: Mapping[str, Any], given: str | None, key: str) -> Path:
    if given is not None:
        return Path(given).expanduser()
    path = Path(str(said.get("path")))
    places = [path, checkpoint.directory / path, checkpoint.directory.parent / path]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise CheckpointError(f"{path}: is not there, and {checkpoint.path} stands on it; say where with {key}=")
    return found


def load_base(checkpoint: Checkpoint, base: str | Path | None, placement: Placement) -> Base | None:
    """The base that the backbone stands on; None where it is complete. Raises CheckpointError for another one."""
    details: FinetunedDetails = checkpoint.details
    if details.base is None:
        return None
    inner, family = open_backbone(checkpoint)
    place = str(base) if base is not None else str(details.base.get("path"))
    found = family.load_base(inner, place, placement)
    assert found is not None
    if content_hash(found.files) != details.base.get("sha256"):
        raise CheckpointError(
            f"{found.path}: is not the base that {checkpoint.path} was made on: its content has another hash"
        )
    return found


def build(checkpoint: Checkpoint, base: Base | None, placement: Placement, moved: str | None = None) -> Classifier:
    """The classifier in evaluation mode, gradients off. Raises CheckpointError or ModelError."""
    checkpoint.require_complete()
    details: FinetunedDetails = checkpoint.details
    said, classes = details.description, len(details.labels)
    backbone: nn.Module
    if details.is_original:
        backbone = _script_backbone(checkpoint, placement)
        values = {
            name: checkpoint.weights.read(name) for name in checkpoint.weights.infos if not name.startswith(BACKBONE)
        }
    else:
        inner, family = open_backbone(checkpoint, moved)
        backbone = family.build(inner, base, placement)
        if base is not None and said.get("scope") not in ("added", "lora", "head"):
            backbone = copy.deepcopy(backbone)  # others stand on the base's tensors
        if isinstance(low_rank := said.get("low_rank"), Mapping):
            family.add_low_rank(backbone, LowRankSettings(**low_rank))
        values = {name: checkpoint.weights.read(name) for name in checkpoint.weights.infos}
    with torch.random.fork_rng([]):
        model = Classifier(backbone, classes, head=details.head)
    load_parameters(model, values, checkpoint.path)
    head = next(model.head_modules.parameters())
    model.head_modules.to(device=torch_device(placement.device), dtype=head.dtype)
    require_finite(checkpoint, model.parameters(), torch.float32)
    return model.eval().requires_grad_(False)


def backbone_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The backbone of the script's .pt under its checkpoint's names."""
    found = {}
    for name in checkpoint.weights.infos:
        if name.startswith(BACKBONE):
            own = name.removeprefix(BACKBONE)
            renamed = next((each for each in _RENAMED if own.endswith(each)), None)
            own = own if renamed is None else own.removesuffix("_weight") + ".weight"
            found[own] = checkpoint.weights.read(name)
    return found


def _script_backbone(checkpoint: Checkpoint, placement: Placement) -> GptForCausalLM:
    """The GPT of the script's .pt; its head, which is not in the file, is zero and never run."""
    tensors = backbone_tensors(checkpoint)
    table = tensors.get("embed.weight")
    if table is None or table.dim() != 2:
        raise CheckpointError(f"{checkpoint.path}: the backbone has no embed.weight [vocabulary, width]")
    rows, width = table.shape
    for head, count in (("lm_head.weight", rows), ("lm_head_w", padded(rows))):
        records = key_matches({*tensors, head})
        if records:
            tensors[head] = torch.zeros(count, width)
            break
    else:
        raise CheckpointError(f"{checkpoint.path}: its backbone has the keys of no known GPT")
    details = details_of(tensors, records[0], checkpoint.path, _head_dim(checkpoint, width))
    config = GptConfig(
        record=details.record, vocab_size=details.vocab_size, head_rows=details.head_rows,
        num_layers=details.num_layers, model_dim=details.model_dim, head_dim=details.head_dim, yarn=details.yarn,
    )  # fmt: skip
    return build_gpt(config, tensors, torch_dtype(placement.dtype, checkpoint.weights, BACKBONE + "embed.weight"),
                     torch_device(placement.device))  # fmt: skip


def _head_dim(checkpoint: Checkpoint, width: int) -> int | None:
    """The size of a head as the script's arguments say it, where they fit."""
    args = checkpoint.details.description.get("args") or {}
    heads = args.get("n_head")
    return width // heads if isinstance(heads, int) and heads > 0 and width % heads == 0 else None


def save(checkpoint: Checkpoint, model: nn.Module, target: Path) -> Path:
    """Write the classifier once more. Raises ConfigError for what is only read."""
    details: FinetunedDetails = checkpoint.details
    if details.is_original or not isinstance(model, Classifier):
        raise ConfigError(f"{checkpoint.path}: the script's .pt is read, never written; task=convert converts it")
    said = {name: value for name, value in details.description.items() if name not in ("format", "version")}
    peft = None
    if (file := checkpoint.path / "adapter_config.json").is_file():
        from runner.files.strict_json import read_object

        peft = read_object(file, file.name, 1 << 20)
    write(target, model, [str(name) for name in said["trained"]], said, peft=peft)
    return target
