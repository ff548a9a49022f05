"""Writing GPT checkpoints, as .pt in the training script's layout or as safetensors, and cutting their vocabulary."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from runner.checkpoints.checkpoint import Checkpoint, Expected, Writer
from runner.errors import ConfigError
from runner.families.gpt.checkpoint import STATE, Provenance, metadata, provenance
from runner.families.gpt.layouts import VOCABULARY_MULTIPLE, GptDetails, details_of, expanded
from runner.files.staging import staged

WEIGHT_FILES = ("model.pt", "model.safetensors")


def save(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    details: GptDetails,
    *,
    provenance: Provenance,
    weights_file: str = WEIGHT_FILES[0],
) -> Path:
    """Write one weights file into `directory` (a staged one); its path.

    A name that ends in .safetensors chooses that layout, where the provenance stands in the metadata; any
    other is the training script's. dtypes are kept; optimizers are not written. Raises CheckpointError for tensors
    that do not make the model which `details` describe.
    """
    path = directory / weights_file
    found = details_of(tensors, details.record, path, details.head_dim)
    sizes = ("vocab_size", "head_rows", "num_layers", "model_dim", "num_scalars")
    assert all(getattr(found, size) == getattr(details, size) for size in sizes), "the tensors have other sizes"
    provenance = noted(provenance, details, always=weights_file.endswith(".safetensors"))
    if weights_file.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(_own(tensors), path, metadata=metadata(provenance))
    else:
        beside = {name: value for name, value in asdict(provenance).items() if value is not None}
        torch.save({**beside, STATE: _own(tensors)}, path)
    return path


def noted(origin: Provenance, details: GptDetails, *, always: bool) -> Provenance:
    """`origin` with the record, where nothing else in the file would say it, or `always`."""
    needed = always or details.found_by in ("told", "metadata")
    return replace(origin, record=details.record.name if needed else None)


def cut_vocabulary(
    tensors: Mapping[str, torch.Tensor], details: GptDetails, vocab_size: int
) -> tuple[dict[str, torch.Tensor], GptDetails]:
    """The tensors with `vocab_size` rows in the embeddings and the head (views), and their details.

    Only padding is cut: rows up to the next multiple of 128. Raises ConfigError for any other number.
    """
    if not details.smallest_vocab_size <= vocab_size <= details.vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: the checkpoint has {details.vocab_size} rows, and only padding to a multiple of "
            f"{VOCABULARY_MULTIPLE} can be cut: give {details.smallest_vocab_size} to {details.vocab_size}"
        )
    cut, head_is_cut = dict(tensors), details.record.head_rows != "padded"
    for name, shape in expanded(details.record, details.num_layers).items():
        for dimension, size in enumerate(shape.split()):
            if size == "5V":
                cut[name] = tensors[name].unflatten(0, (5, -1))[:, :vocab_size].flatten(0, 1)
            elif size == "V" or (size == "W" and head_is_cut):
                cut[name] = tensors[name].narrow(dimension, 0, vocab_size)
    head_rows = vocab_size if head_is_cut else details.head_rows
    return cut, replace(details, vocab_size=vocab_size, head_rows=head_rows)


def model_tensors(checkpoint: Checkpoint, model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights under its checkpoint's names, in the dtypes that the checkpoint stores."""
    state = model.state_dict()
    return {name: state[name].to(checkpoint.weights.infos[name].dtype) for name in checkpoint.details.keys}


def save_model(checkpoint: Checkpoint, model: nn.Module, target: Path) -> None:
    """Write `model`, built from `checkpoint`, as the directory `target`."""
    origin = provenance(checkpoint.weights)
    with staged(target) as directory:
        save(directory, model_tensors(checkpoint, model), checkpoint.details, provenance=origin)


def conversion(checkpoint: Checkpoint, to: str, vocab_size: int | None) -> Writer:
    """What writes the checkpoint in the container `to`, its vocabulary cut to `vocab_size`. Raises ConfigError."""
    details: GptDetails = checkpoint.details
    tensors = {name: checkpoint.weights.read(name) for name in details.keys}
    if vocab_size is not None:
        tensors, details = cut_vocabulary(tensors, details, vocab_size)

    def write(directory: Path) -> Expected:
        origin = provenance(checkpoint.weights)
        save(directory, tensors, details, provenance=origin, weights_file=f"model.{to}")
        return {".": {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()}}

    return write


def _own(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, each with a storage of its own and no larger than itself; copied only where needed."""
    owned: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen or not plain.is_contiguous():
            plain = plain.clone(memory_format=torch.contiguous_format)
        seen.add(plain.untyped_storage().data_ptr())
        owned[name] = plain
    return owned
