"""A safetensors file, written piece by piece; the order of its header is that of the pieces."""

import json
from collections.abc import Mapping

import torch

from runner.errors import CheckpointError
from runner.files.safetensors_header import DTYPES, MAX_HEADER_BYTES
from runner.merge.lazy_tensor import Piece, as_bytes
from runner.merging.sinks import Sink

_NAMES = {getattr(torch, in_torch): name for name, (in_torch, _) in DTYPES.items()}


def write_safetensors(sink: Sink, pieces: Mapping[str, Piece], metadata: Mapping[str, str] | None = None) -> None:
    """Write `pieces` under their names, with `metadata` in the header.

    Raises OSError, CheckpointError for a dtype that safetensors does not have.
    """
    header, order = _header(pieces, metadata or {})
    sink.write(len(header).to_bytes(8, "little") + header)
    for name in order:
        for part in pieces[name].parts():
            sink.write(as_bytes(part))


def _header(pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header, padded to a multiple of 8, and the names in the order of their bytes."""
    for name, piece in pieces.items():
        if piece.dtype not in _NAMES:
            raise CheckpointError(f"{piece.origin}: safetensors has no {piece.dtype}; give merge.format=pt for {name}")
    # Wide elements first, so that each tensor starts at a multiple of its element's size.
    order = sorted(pieces, key=lambda name: -pieces[name].dtype.itemsize)
    begin, offsets = 0, {}
    for name in order:
        offsets[name] = [begin, begin + pieces[name].nbytes]
        begin += pieces[name].nbytes
    entries = {
        name: {"dtype": _NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": offsets[name]}
        for name, piece in pieces.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **entries}, separators=(",", ":")).encode()
    padded = text + b" " * (-len(text) % 8)
    if len(padded) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{len(pieces)} tensors need a safetensors header of {len(padded)} bytes; the limit is 16 MB"
        )
    return padded, order
