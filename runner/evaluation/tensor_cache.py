"""Tensors on disk between processes: the results of a base model, for those that would compute the very same bits.

They lie in safetensors files under names that say exactly what is in them. A file is whole or absent, is checked
against the checksum in its header when it is read, and the least recently used ones go when all together exceed a
limit. Whatever is wrong with a file costs a warning and the work of making it again.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import runner
from runner.evaluation.base_models import Base
from runner.files.atomic import write_json
from runner.files.file_type import sha256_of
from runner.results import versions

log = logging.getLogger(__name__)
LIMIT = 2 << 30  # bytes in all
_SUFFIX = ".safetensors"
# An unfinished file this old, in seconds, has been left by a process that died.
_ABANDONED = 3600
# Bytes that this process has written since it last looked whether there is room, by directory.
_written: dict[Path, int] = {}


@dataclass(frozen=True, kw_only=True)
class Store:
    """`directory` holds at most `limit` bytes, a quarter more for a moment."""

    directory: Path
    limit: int = LIMIT


def name_of(*parts: object) -> str:
    """A file name for what `parts` determine: a hash of their spelling."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()


def read(store: Store, name: str) -> dict[str, torch.Tensor] | None:
    """The tensors kept under `name`; None where there are none, or they are not what was written."""
    path = store.directory / f"{name}{_SUFFIX}"
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: the file's own memory is aligned otherwise, and products over it may round otherwise.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - it is no dict
            written = (file.metadata() or {}).get("sha256")
        if written != _digest(name, tensors):
            raise ValueError("its checksum does not fit its content")
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, SafetensorError) as error:
        log.warning("%s: cannot be used and is computed again: %s", path, error)
        _remove(path)
        return None
    return tensors


def write(store: Store, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Keep `tensors` under `name`. Where that is not possible, nothing is kept and a warning says so."""
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    if sum(tensor.nbytes for tensor in held.values()) > store.limit // 4:
        return
    unfinished: Path | None = None
    try:
        store.directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=store.directory, suffix=".unfinished")
        os.close(handle)
        unfinished = Path(temporary)
        save_file(held, unfinished, metadata={"sha256": _digest(name, held)})
        unfinished.replace(store.directory / f"{name}{_SUFFIX}")
        _make_room_sometimes(store, sum(tensor.nbytes for tensor in held.values()))
    except (OSError, SafetensorError) as error:
        log.warning("%s: nothing can be kept there: %s", store.directory, error)
        if unfinished is not None:
            _remove(unfinished)


def _digest(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(name.encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"\0{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _make_room_sometimes(store: Store, written: int) -> None:
    """Make room at this process's first file, and again whenever it has written a sixteenth of the limit."""
    since = _written.get(store.directory)
    _written[store.directory] = 0 if since is None else since + written
    if since is None or _written[store.directory] > store.limit // 16:
        _make_room(store)
        _written[store.directory] = 0


def _make_room(store: Store) -> None:
    """Remove what was not used for longest until the rest fits, and what dead processes left unfinished."""
    found = []
    with os.scandir(store.directory) as entries:
        for entry in entries:
            try:
                stat = entry.stat()
            except FileNotFoundError:  # another process made room
                continue
            if entry.name.endswith(_SUFFIX):
                found.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
            elif entry.name.endswith(".unfinished") and time.time() - stat.st_mtime > _ABANDONED:
                _remove(Path(entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= store.limit:
            break
        _remove(path)
        total -= size


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be removed: %s", path, error)


DIRECTORY = "reference"
MEMORY = "weights.json"
# To be counted up whenever what is kept, or how it is computed, changes.
_LAYOUT = 2
# What libraries choose their arithmetic by.
_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)


@dataclass(frozen=True, kw_only=True)
class ModelCache:
    """Where on disk a model's results are kept; `model` says exactly which model computed them, and on what."""

    store: Store
    model: str


def model_cache(base: Base, cache: Path, *, may_read: bool) -> ModelCache | None:
    """Where the results of `base` are cached under the directory `cache`.

    Its name is made from the contents of the weights, so a base that is changed in any way has another one. With
    `may_read` they are read where their hash is not known yet; without, there is then no cache.
    """
    directory = cache / DIRECTORY
    try:
        content = content_hash(base.files, directory / MEMORY, may_read=may_read)
        current = base.is_current()
    except OSError as error:
        log.warning("%s: the reference is not kept on disk: %s", directory, error)
        return None
    if content is None or not current:
        return None
    return ModelCache(
        store=Store(directory=directory), model=name_of(_LAYOUT, content, str(base.model.dtype), *_machine(base))
    )


def _machine(base: Base) -> list[object]:
    """What else decides about the last bits: libraries, processor, number of threads."""
    used = versions()
    device = base.model.device
    return [
        runner.__version__, used.get("torch"), used.get("transformers"), device.type,
        torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(),
        torch.backends.cuda.matmul.allow_tf32, [os.environ.get(name) for name in _VARIABLES],
        getattr(base.model.config, "_attn_implementation", None),
        # Spread over several devices, each layer runs where it lies.
        sorted((name, str(parameter.device)) for name, parameter in base.model.named_parameters()),
    ]  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.machine())


# A file that changed so shortly before it was hashed, in nanoseconds, may change again within the clock's resolution.
_SETTLED = 2_000_000_000
_REMEMBERED = 1000


def content_hash(files: Sequence[Path], memory: Path, *, may_read: bool) -> str | None:
    """The SHA-256 over the contents of `files`; None where `may_read` is false and one of them is not in `memory`.

    `memory` is a JSON file of hashes by path. An entry holds as long as size, inode, mtime and ctime of the file are
    the same: whoever changes a file in place and sets its mtime back still changes its ctime. Raises OSError.
    """
    known = _remembered(memory)
    hashes, learned = [], False
    for file in files:
        path = str(file.resolve())
        entry = known.get(path)
        stamp = _stamp(file)
        if not (isinstance(entry, dict) and entry.get("stamp") == stamp and _settled(entry)):
            if not may_read:
                return None
            entry = {"stamp": stamp, "sha256": sha256_of(file), "hashed": time.time_ns()}
            if _stamp(file) != stamp:
                return None  # it changes under our hands
            known.pop(path, None)
            known[path] = entry
            learned = True
        hashes.append(str(entry["sha256"]))
    if learned:
        write_json(memory, dict(list(known.items())[-_REMEMBERED:]))
    return hashlib.sha256("\0".join(hashes).encode()).hexdigest()


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _settled(entry: dict[str, Any]) -> bool:
    return int(entry["hashed"]) - int(entry["stamp"][2]) > _SETTLED  # [2]: ctime


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
