"""Writes the files of a merge from tensors that never are in memory at once: each file is only appended to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import CheckpointError
from runner.files.safetensors_header import DTYPES, MAX_HEADER_BYTES
from runner.files.tensors import is_finite
from runner.merge.lazy_tensor import LazyTensor, as_bytes, replaced
from runner.merge.plan import MergeOutput, TensorFile
from runner.merge.sink import Sink, Written, new_file
from runner.merge.torch_file import write_torch_file
from runner.merge.verify import not_finite

if TYPE_CHECKING:
    import torch

# Bytes allowed for config.json, merge_summary.json, MANIFEST.json and the like, each.
SMALL_FILE = 1 << 16
# What a record costs beside its bytes: local header and padding, data descriptor, directory entry, and its pickle.
RECORD_BYTES = 512


def expected_bytes(output: MergeOutput) -> int:
    """About how much space `output` takes, never less."""
    tensors = [tensor for file in output.tensor_files for tensor in file.tensors]
    small = len(output.texts) + 4  # the summary, the manifest, the card
    copies = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in output.copies.values())
    return copies + sum(tensor.nbytes + RECORD_BYTES for tensor in tensors) + SMALL_FILE * small


def write_tensors(
    directory: Path,
    files: Iterable[TensorFile],
    on_bytes: Callable[[int], None] = lambda count: None,
    hashes: dict[str, str | None] | None = None,
    runs: dict[str, list[Written]] | None = None,
) -> list[str]:
    """Write `files` into `directory`; `on_bytes` hears how many bytes each write took.

    `hashes` receives the SHA-256 of each file by its name; None for one with tensors that the kernel copied, of which
    `runs` receives what was written between them, and whose NaN or Inf is not looked for here. Returns what the user
    should know of tensors that are not finite. Raises CheckpointError where such a tensor is refused, OSError where the
    disk fails.
    """
    hashes = {} if hashes is None else hashes
    runs = {} if runs is None else runs
    bad: dict[str, None] = {}

    def note(tensor: LazyTensor) -> None:
        bad[tensor.origin] = None

    for file in files:
        value = replaced(dict(file.value), partial(_watched, on_bad=_refuse if file.finite else note))
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, on_bytes) as sink:
            if file.is_safetensors:
                write_safetensors(sink, value, file.metadata)
            else:
                write_torch_file(sink, path.stem, value)
            runs[file.name] = sink.runs() if sink.has_copies else []
            hashes[file.name] = None if sink.has_copies else sink.sha256()
    return [f"{origin}: NaN or Inf, written as it is" for origin in bad]


def _refuse(tensor: LazyTensor) -> None:
    raise not_finite(tensor)


def _watched(tensor: LazyTensor, on_bad: Callable[[LazyTensor], None]) -> LazyTensor:
    """The same tensor, which calls `on_bad` for a part with NaN or Inf.

    It is copied by the kernel only where such are refused, which the read-back does.
    """

    def parts() -> Iterator[torch.Tensor]:
        for part in tensor.parts():
            if not is_finite(part):
                on_bad(tensor)
            yield part

    return replace(tensor, parts=parts, stored=tensor.stored if on_bad is _refuse else None)


def write_json_files(directory: Path, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write new JSON files into `directory` by their names. Raises OSError where the disk fails."""
    for name, values in texts.items():
        with new_file(directory / name) as sink:
            text = json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n"
            # Half a surrogate pair, as of a path that is no UTF-8, stands in JSON as its escape.
            sink.write(text.encode(errors="backslashreplace"))


def write_files(directory: Path, files: Mapping[str, bytes | str | Path]) -> None:
    """Write new files into `directory` by their names: their content, or the file that they copy."""
    for name, content in files.items():
        with new_file(directory / name) as sink:
            if isinstance(content, Path):
                content = content.read_bytes()
            sink.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


_NAMES = {in_torch: name for name, (in_torch, _) in DTYPES.items()}


def write_safetensors(sink: Sink, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` under their names, with `metadata` in the header.

    Raises OSError, CheckpointError for a dtype that safetensors does not have.
    """
    header, order = _header(tensors, metadata or {})
    sink.write(len(header).to_bytes(8, "little") + header)
    for name in order:
        tensor = tensors[name]
        if tensor.stored is not None and sink.copies(tensor.stored):
            sink.copy(tensor.stored)
            continue
        for part in tensor.parts():
            sink.write(as_bytes(part))


def _header(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header, padded to a multiple of 8, and the names in the order of their bytes."""
    for name, tensor in tensors.items():
        if tensor.dtype_name not in _NAMES:
            raise CheckpointError(
                f"{tensor.origin}: safetensors has no {tensor.dtype_name}; give merge.format=pt for {name}"
            )
    # Wide elements first, so that each tensor starts at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    begin, offsets = 0, {}
    for name in order:
        offsets[name] = [begin, begin + tensors[name].nbytes]
        begin += tensors[name].nbytes
    entries = {
        name: {"dtype": _NAMES[tensor.dtype_name], "shape": list(tensor.shape), "data_offsets": offsets[name]}
        for name, tensor in tensors.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **entries}, separators=(",", ":")).encode()
    padded = text + b" " * (-len(text) % 8)
    if len(padded) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{len(tensors)} tensors need a safetensors header of {len(padded)} bytes; the limit is 16 MB"
        )
    return padded, order
