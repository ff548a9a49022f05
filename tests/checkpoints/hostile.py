"""Writers of files that are damaged, hostile or merely unusual, for the tests of the readers.

Each function writes one file (or a small directory) below `folder` and returns the path to open.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def good_state() -> dict[str, torch.Tensor]:
    """A small, healthy state dict."""
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(8, 16, generator=generator),
        "layer.bias": torch.randn(8, generator=generator, dtype=torch.float32).to(torch.bfloat16),
        "count": torch.tensor(3),
    }


def saved(folder: Path, content: Any, name: str = "weights.pt", **options: Any) -> Path:
    """`content`, written by torch.save."""
    path = folder / name
    torch.save(content, path, **options)
    return path


def written(folder: Path, content: bytes, name: str = "weights.pt") -> Path:
    """A file with exactly these bytes."""
    path = folder / name
    path.write_bytes(content)
    return path


def archive(
    folder: Path,
    entries: Mapping[str, bytes] | list[tuple[str, bytes]],
    *,
    compression: int = zipfile.ZIP_STORED,
    name: str = "weights.pt",
) -> Path:
    """A zip file in torch.save's layout with these entries, duplicates allowed."""
    path = folder / name
    pairs = entries if isinstance(entries, list) else list(entries.items())
    with zipfile.ZipFile(path, "w", compression=compression) as file:
        for entry, content in pairs:
            file.writestr(f"archive/{entry}", content)
    return path


def rewritten(folder: Path, change: Callable[[dict[str, bytes]], Any], content: Any = None) -> Path:
    """A healthy torch.save file whose entries `change` has altered."""
    source = saved(folder, content or good_state(), "source.pt")
    with zipfile.ZipFile(source) as file:
        entries = {entry.partition("/")[2]: file.read(entry) for entry in file.namelist()}
    source.unlink()
    change(entries)
    return archive(folder, entries)


def pickled(folder: Path, data: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    """A torch.save archive around any pickle."""
    entries = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    return archive(folder, {**entries, **{f"data/{key}": value for key, value in (records or {}).items()}})


class Call:
    """Pickles to a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.made


def calling(folder: Path, function: Callable[..., Any], *arguments: Any) -> Path:
    """A torch.save file whose loading calls `function`."""
    return pickled(folder, pickle.dumps({"weight": Call(function, *arguments)}, protocol=2))


def calling_legacy(folder: Path, function: Callable[..., Any], *arguments: Any) -> Path:
    """The same in the layout before zip."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"weight": Call(function, *arguments)}, [])
    return written(folder, b"".join(pickle.dumps(part, protocol=2) for part in parts))


def short(text: str) -> bytes:
    """A string as pickle's BINUNICODE."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def number(value: int) -> bytes:
    """A whole number as pickle's LONG1."""
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(*parts: bytes) -> bytes:
    """A tuple as pickle writes it."""
    return b"(" + b"".join(parts) + b"t"


def tensor_pickle(
    *, count: int = 4, offset: int = 0, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), key: str = "0"
) -> bytes:
    """The pickle of {"layer.weight": tensor} over one float32 storage, with any sizes."""
    storage = tuple_of(short("storage"), b"ctorch\nFloatStorage\n", short(key), short("cpu"), number(count)) + b"Q"
    sizes = tuple_of(*(number(n) for n in shape)), tuple_of(*(number(n) for n in stride))
    arguments = tuple_of(storage, number(offset), *sizes, b"\x89", b"ccollections\nOrderedDict\n)R")
    return b"\x80\x02}" + short("layer.weight") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def safetensors(folder: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header (an object or raw text) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    return written(folder, size + text + data, "model.safetensors")


def entry(begin: int, end: int, shape: tuple[int, ...] | list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    """One tensor of a safetensors header."""
    sizes = [(end - begin) // 4] if shape is None else list(shape)
    return {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}


def sharded(folder: Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """An index and its shards, which need not agree."""
    for name, state in shards.items():
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        (folder / name).write_bytes(buffer.getvalue())
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))
    return index


def touch(path: Path) -> tuple[Callable[..., Any], str]:
    """A call that would create `path`, in case anything executes."""
    return os.system, f"touch '{path}'"
