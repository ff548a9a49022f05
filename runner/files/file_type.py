"""What a file is: how it holds tensors, told by its first bytes; which names are never those of weights."""

import hashlib
import re
from enum import Enum
from pathlib import Path

from runner.errors import CheckpointError

ZIP_START = b"PK\x03\x04"
# torch.save's legacy layout starts with its magic number as a pickle of protocol 2 (or an older one).
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# What lies beside weights under the same suffixes: what trainers leave, and the router of lora_moe, which is no model.
BESIDE = re.compile(
    r"(training_state|multi_layer_state|training_info|skill_library|scaler|router)\.pt|training_args\.bin"
    r"|(optimizer|scheduler)\.(pt|bin)|rng_state(_\d+)?\.pth"
)
_FOREIGN = {
    b"version https://git-lfs": "a git-LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"GGUF": "a GGUF file: convert it to safetensors first",
    b"\x89HDF": "an HDF5 file (Keras), not a PyTorch checkpoint",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"PK\x05\x06": "an empty zip archive",
}


class Kind(Enum):
    """The layouts that hold tensors."""

    ZIP = "zip"
    LEGACY = "legacy"
    SAFETENSORS = "safetensors"


def may_be_weights(name: str) -> bool:
    """Whether a file of this name can hold weights: by its suffix, and as no state or router that lies beside them."""
    return name.endswith(WEIGHT_SUFFIXES) and BESIDE.fullmatch(name) is None


def require_file(path: Path) -> int:
    """The size of the regular file `path` in bytes. Raises CheckpointError where there is none, or an empty one."""
    if not path.exists():
        broken = " (a link that leads nowhere)" if path.is_symlink() else ""
        raise CheckpointError(f"{path}: no such file{broken}")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path}: an empty file (0 bytes): copy or download it again")
    return size


def kind_of(path: Path) -> Kind:
    """How `path` holds tensors. Raises CheckpointError that names what it is instead."""
    require_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if start.startswith(ZIP_START):
        return Kind.ZIP
    if start.startswith(b"\x80") and start[2:].startswith(_LEGACY_START):
        return Kind.LEGACY
    for prefix, what in _FOREIGN.items():
        if start.startswith(prefix):
            raise CheckpointError(f"{path}: {what}")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(f"{path}: an HTML or XML page, not a checkpoint: the download gave an error page")
    if len(start) > 8 and start[8:9] == b"{":
        return Kind.SAFETENSORS
    if start.startswith(b"\x80"):
        raise CheckpointError(f"{path}: a plain Python pickle, not written by torch.save: it is not read")
    raise CheckpointError(
        f"{path}: not a weights file (neither a torch.save file nor safetensors); it starts with {start[:16].hex(' ')}"
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
