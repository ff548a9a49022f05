"""Objects out of torch.save files: nothing in them is executed, and what is foreign becomes an inert record."""

import io
import pickle
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from runner.checkpoints.content import Kind, kind_of
from runner.errors import CheckpointError
from runner.files.archive import check_archive
from runner.files.legacy import check_legacy
from runner.files.pickle_check import scan
from runner.files.stubs import FUNCTIONS, STAND_INS, Inert

__all__ = ["Inert", "check_pickle", "file_offset", "load_pickle"]

# torch's table of allowed names belongs to the process, not to the call.
_LOCK = threading.Lock()
_INERT_GLOBALS: list[Any] = [(stand_in, name) for name, stand_in in (STAND_INS | FUNCTIONS).items()]


def load_pickle(path: Path, *, tensors: Literal["meta", "mmap"] = "meta") -> Any:
    """The object that torch.save wrote to `path`, checked before it is loaded.

    With `tensors="meta"` its tensors have shape and dtype only and no tensor data is read; with "mmap" they are
    views of the mapped file (of memory, in the old layout that cannot be mapped). Foreign objects are `Inert`.
    Raises CheckpointError.
    """
    kind = check_pickle(path)
    options = {"map_location": "meta"} if tensors == "meta" else {"map_location": "cpu", "mmap": kind is Kind.ZIP}
    if path.name.endswith(".safetensors"):
        raise CheckpointError(f"{path}: a torch.save file named .safetensors: rename it to .pt")
    try:
        # The old layout keeps its data in one stream, which torch would read through even for shapes alone.
        skip = torch.serialization.skip_data() if tensors == "meta" else nullcontext()
        with _LOCK, skip, torch.serialization.safe_globals(_INERT_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, **options)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, OSError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        # torch's own text is left out: it advises to switch the safe loading off.
        raise CheckpointError(
            f"{path}: torch cannot load this file ({type(error).__name__}): damaged, or not a dict of plain tensors"
        ) from error


def file_offset(tensor: torch.Tensor) -> int:
    """Where in its file the first byte of a tensor lies that `load_pickle(tensors="meta")` gave; not the old layout."""
    storage: Any = tensor.untyped_storage()
    return int(storage._checkpoint_offset + tensor.storage_offset() * tensor.itemsize)


def check_pickle(path: Path) -> Kind:
    """Check the structure of a torch.save file without loading it; its layout. Raises CheckpointError."""
    kind = kind_of(path)
    if kind is Kind.SAFETENSORS:
        raise CheckpointError(f"{path}: not a torch.save file: its content is safetensors")
    if kind is Kind.LEGACY:
        check_legacy(path)
        return kind
    archive = check_archive(path)
    for key, storage in scan(io.BytesIO(archive.pickle), path).storages.items():
        size = archive.records.get(key)
        if size != storage.record_bytes:
            found = "is missing" if size is None else f"holds {size}"
            raise CheckpointError(f"{path}: storage {key} needs {storage.record_bytes} bytes, its record {found}")
    return kind
