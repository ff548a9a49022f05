"""modded-nanogpt's token shards: 256 int32 (magic, version, token count, zeros), then that many uint16 token ids."""

import glob
from pathlib import Path

import numpy as np
import torch

from runner.errors import ConfigError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
SUFFIX = ".bin"


def open_shard(path: Path) -> np.ndarray:
    """The token ids [N] of one shard as uint16, mapped, not read. Raises ConfigError for a file that is no shard."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
    except OSError as error:
        raise ConfigError(f"data.path={path}: cannot be read: {error.strerror}") from error
    if len(start) < HEADER_BYTES:
        raise ConfigError(f"data.path={path}: has {size} bytes, less than the {HEADER_BYTES} of a shard's header")
    magic, version, count = (int(value) for value in np.frombuffer(start, dtype="<i4")[:3])
    if magic != MAGIC:
        raise ConfigError(f"data.path={path}: is no token shard: its first number is {magic}, not {MAGIC}")
    if version != VERSION:
        raise ConfigError(f"data.path={path}: is a token shard of version {version}; only version {VERSION} is known")
    needed = HEADER_BYTES + 2 * count
    if count < 1 or size != needed:
        what = "truncated" if size < needed else "not what its header says"
        raise ConfigError(f"data.path={path}: {what}: {count} tokens make {needed} bytes, the file has {size}")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def find_shards(pattern: str | Path) -> list[Path]:
    """The shards that a file, a directory (all its *.bin) or a glob names, sorted. Raises ConfigError for none."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(path.glob(f"*{SUFFIX}"))
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - also absolute ones
    if not found:
        raise ConfigError(f"data.path={pattern}: no token shards there (*{SUFFIX})")
    return found


def read_shards(pattern: str | Path, max_tokens: int, vocab_size: int | None = None) -> torch.Tensor:
    """The first `max_tokens` token ids of the shards in the order of their names, one after the other: int64 [T].

    All shards' headers are checked down to the last one needed. Raises ConfigError as `find_shards` and `open_shard`
    do, and for the first id that a vocabulary of `vocab_size` does not have.
    """
    parts: list[np.ndarray] = []
    left = max_tokens
    for path in find_shards(pattern):
        if left <= 0:
            break
        tokens = open_shard(path)[:left].astype(np.int64)
        if vocab_size is not None and (beyond := np.flatnonzero(tokens >= vocab_size)).size:
            place = int(beyond[0])
            raise ConfigError(
                f"data.path={path}: token {place} has the id {tokens[place]}, but the model's vocabulary has "
                f"{vocab_size}: the shard was written with another tokenizer"
            )
        parts.append(tokens)
        left -= len(tokens)
    if not parts:
        raise ConfigError(f"max_tokens={max_tokens}: at least one token must be read")
    return torch.from_numpy(np.concatenate(parts))


def sequences(tokens: torch.Tensor, length: int) -> list[torch.Tensor]:
    """`tokens` [T] cut into pieces of `length`; a last one of a single token, which predicts nothing, is left out."""
    return [piece for piece in tokens.split(length) if len(piece) > 1]
