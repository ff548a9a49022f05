"""Token shards as modded-nanogpt writes them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runner.data.shards import MAGIC, VERSION


def write_shard(path: Path, tokens: Sequence[int] | np.ndarray) -> None:
    """Write one shard. Raises ValueError for an id that does not fit 16 bits."""
    ids = np.asarray(tokens)
    if ids.size and not 0 <= ids.min() <= ids.max() < 1 << 16:
        raise ValueError("token ids of a shard are 0 to 65535")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(ids)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(ids.astype("<u2").tobytes())
