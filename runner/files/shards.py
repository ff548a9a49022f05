"""The index of weights in several files: every shard inside the directory, every tensor in exactly one."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from runner.errors import CheckpointError
from runner.files.strict_json import read_object

MAX_INDEX_BYTES = 64 << 20


def read_index(index: Path) -> dict[str, str]:
    """Tensor name → shard name. Raises CheckpointError unless the shards are exactly the plain files beside `index`."""
    listed = read_object(index, "index", MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index}: the index has no weight_map from tensor names to file names")
    for name in dict.fromkeys(listed.values()):
        _check_shard(index, name)
    stem, _, extension = index.name.removesuffix(".index.json").rpartition(".")
    shard = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{re.escape(extension)}")
    present = {path.name for path in index.parent.iterdir() if shard.fullmatch(path.name)}
    if unlisted := sorted(present - set(listed.values())):
        raise CheckpointError(f"{index}: shards that the index does not list: {', '.join(unlisted)}")
    return listed


def check_keys(index: Path, listed: Mapping[str, str], held: Mapping[str, Iterable[str]]) -> None:
    """Each tensor must be in the shard that lists it and in no other; `held`: shard → the names in it."""
    problems = []
    place: dict[str, str] = {}
    for shard, names in held.items():
        for name in names:
            if name in place:
                problems.append(f"{name} is in both {place[name]} and {shard}")
            elif name not in listed:
                problems.append(f"{name} of {shard} is not listed")
            elif listed[name] != shard:
                problems.append(f"{name} is listed in {listed[name]} and found in {shard}")
            place[name] = shard
    problems += [f"{name} is missing from {shard}" for name, shard in listed.items() if name not in place]
    if problems:
        raise CheckpointError(f"{index}: index and shards disagree: {'; '.join(sorted(problems))}")


def _check_shard(index: Path, name: str) -> None:
    """A shard must be a file in the directory of the index."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{index}: shard {name!r}: a shard must be a plain file name in the index's directory")
    path = index.parent / name
    if path.is_symlink() and not _in_hub_cache(path):
        raise CheckpointError(f"{index}: shard {name}: a symbolic link; put the file itself beside the index")
    if not path.is_file():
        raise CheckpointError(f"{index}: shard {name} is missing: copy or download it")


def _in_hub_cache(path: Path) -> bool:
    """Whether `path` is a link that the hub's cache made: snapshots/REVISION/NAME → blobs/HASH of one repository."""
    repository = path.absolute().parent.parent.parent
    return path.absolute().parent.parent.name == "snapshots" and path.resolve().parent == (
        (repository / "blobs").resolve()
    )
