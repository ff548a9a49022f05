"""`npt_delta`: NPT weights over a frozen Llama (spec/formats.md §1). Which layers, how modulated, what ranks: all read
from the keys and shapes, layer by layer; nothing is assumed from a config."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, NptLayer, describe_training, plain
from runner.errors import CheckpointError
from runner.files.file_type import may_be_weights
from runner.files.strict_json import read_object
from runner.files.tensors import TensorInfo, load_pickle

NAME = "npt_delta"
FAMILY = "npt"
WEIGHT_FILES = ("npt_weights.pt", "npt_weights.safetensors")
TRAINING_STATE = "training_state.pt"
MULTI_LAYER_STATE = "multi_layer_state.pt"
CONFIG = "config.json"
MERGE_SUMMARY = "merge_summary.json"

MODULATIONS = {"single": ("",), "dual": ("_gate", "_up"), "triple": ("_gate", "_up", "_down")}
PROJECTIONS = {"": "gate", "_gate": "gate", "_up": "up", "_down": "down"}
MATRICES = ("W_down", "W_a_up", "W_b_up")

_KEY = re.compile(
    r"(?:layer_(?P<delta>\d+)_np|model\.layers\.(?P<full>\d+)\.np_component)"
    r"\.(?P<matrix>W_down|W_a_up|W_b_up)(?P<suffix>_gate|_up|_down)?(?:\.(?P<rank>\d+))?"
)


def is_key(name: str) -> bool:
    """Whether `name` is that of an NPT tensor, in either spelling."""
    return _KEY.fullmatch(name) is not None


def key(layer: int, modulation: str, projection: str, matrix: str, rank: int, num_ranks: int) -> str:
    """The name under which one matrix [d, r], [r, d] or [r, f] of one rank-1 term is saved."""
    suffix = "" if modulation == "single" else f"_{projection}"
    return f"layer_{layer}_np.{matrix}{suffix}" + (f".{rank}" if num_ranks > 1 else "")


@dataclass(frozen=True, kw_only=True)
class NptKeys:
    """What names and shapes say: the complete layers, lowest first, and the names that are missing or unknown."""

    layers: tuple[NptLayer, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]


def read_keys(infos: Mapping[str, TensorInfo], where: Path) -> NptKeys:
    """The NPT layers that names and shapes describe; every name is used exactly once, or stands in `unknown`.

    Raises CheckpointError where no name is one of an NPT layer, where two are one tensor, or where shapes contradict
    each other.
    """
    found: dict[int, dict[tuple[str, str], dict[int | None, str]]] = {}
    unknown = []
    for name in infos:
        match = _KEY.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        if not infos[name].dtype.is_floating_point:
            raise CheckpointError(f"{where}: {name} is {str(infos[name].dtype)[6:]}; NPT weights are floating-point")
        layer = int(match["delta"] or match["full"])
        ranks = found.setdefault(layer, {}).setdefault((match["suffix"] or "", match["matrix"]), {})
        rank = None if match["rank"] is None else int(match["rank"])
        if rank in ranks:
            raise CheckpointError(
                f"{where}: {name} and {ranks[rank]} are two spellings of one tensor; keep one of them"
            )
        ranks[rank] = name
    if not found:
        raise CheckpointError(f"{where}: No NPT layers found: no key looks like layer_<i>_np.W_down…; {_some(infos)}")
    missing: list[str] = []
    layers = [_layer(index, found[index], infos, where, missing, unknown) for index in sorted(found)]
    return NptKeys(
        layers=tuple(layer for layer in layers if layer is not None),
        missing=tuple(missing),
        unknown=tuple(unknown),
    )


def _layer(
    index: int,
    found: Mapping[tuple[str, str], Mapping[int | None, str]],
    infos: Mapping[str, TensorInfo],
    where: Path,
    missing: list[str],
    unknown: list[str],
) -> NptLayer | None:
    """One layer from its names by (suffix, matrix) and rank; None when `missing` or `unknown` names were added."""
    suffixes = {suffix for suffix, _ in found}
    modulation = "triple" if "_down" in suffixes else "single" if suffixes == {""} else "dual"
    ranks = {rank for by_rank in found.values() for rank in by_rank}
    expected_ranks: Sequence[int | None] = (
        [None]
        if ranks == {None}
        else list(range(min(1 + max(rank for rank in ranks if rank is not None), sum(map(len, found.values())))))
    )
    complete = True
    keys: dict[str, dict[str, tuple[str, ...]]] = {}
    for suffix in MODULATIONS[modulation]:
        for matrix in MATRICES:
            by_rank = found.get((suffix, matrix), {})
            absent = [rank for rank in expected_ranks if rank not in by_rank]
            missing += [f"layer_{index}_np.{matrix}{suffix}" + ("" if rank is None else f".{rank}") for rank in absent]
            unknown += [name for rank, name in by_rank.items() if rank not in expected_ranks]
            complete = complete and not absent and len(by_rank) == len(expected_ranks)
            keys.setdefault(PROJECTIONS[suffix], {})[matrix] = tuple(
                by_rank[rank] for rank in expected_ranks if rank in by_rank
            )
    for (suffix, _), by_rank in found.items():
        if suffix not in MODULATIONS[modulation]:
            unknown += by_rank.values()
            complete = False
    if not complete:
        return None
    return _sized(index, modulation, keys, infos, where)


def _sized(
    index: int,
    modulation: str,
    keys: Mapping[str, Mapping[str, tuple[str, ...]]],
    infos: Mapping[str, TensorInfo],
    where: Path,
) -> NptLayer:
    """The layer with its sizes, all shapes checked: W_down [d, r], W_a_up [r, d_in], W_b_up [r, d_out]."""
    first = keys["gate"]
    down, b_up = infos[first["W_down"][0]], infos[first["W_b_up"][0]]
    if len(down.shape) != 2 or len(b_up.shape) != 2:
        raise CheckpointError(f"{where}: layer {index}: {down.name} has shape {list(down.shape)}, not [hidden, rank]")
    (hidden, rank), inner = down.shape, b_up.shape[1]
    names = []
    for projection, matrices in keys.items():
        d_in, d_out = (inner, hidden) if projection == "down" else (hidden, inner)
        shapes = {"W_down": (hidden, rank), "W_a_up": (rank, d_in), "W_b_up": (rank, d_out)}
        for matrix, matrix_names in matrices.items():
            for name in matrix_names:
                names.append(name)
                if infos[name].shape != shapes[matrix]:
                    raise CheckpointError(
                        f"{where}: {name} has shape {list(infos[name].shape)}, but {down.name} {list(down.shape)} and "
                        f"{b_up.name} {list(b_up.shape)} make it {list(shapes[matrix])}; one layer has one rank"
                    )
    return NptLayer(
        layer=index,
        modulation=modulation,
        np_rank=rank,
        num_ranks=len(first["W_down"]),
        hidden_size=hidden,
        intermediate_size=inner,
        parameters=sum(infos[name].numel for name in names),
        keys=keys,
    )


def _some(infos: Mapping[str, TensorInfo]) -> str:
    names = list(infos)
    return f"its keys are {', '.join(names[:4])}{', …' if len(names) > 4 else ''}" if names else "it has no tensors"


def matches(listing: Listing) -> str | None:
    """Evidence: the file that the format names, or exactly one file with NPT keys among its names."""
    name = _weights_file(listing)
    if name is None:
        return None
    return f"{name}: {sum(map(is_key, listing.weights(name).infos))} NPT keys"


def open_npt_delta(listing: Listing) -> Checkpoint:
    """The checkpoint. Raises CheckpointError for no, several or incomplete NPT weights."""
    name = _weights_file(listing)
    if name is None:
        raise CheckpointError(f"{listing.path}: No NPT layers found: neither npt_weights.pt nor a file with NPT keys")
    weights = listing.weights(name)
    keys = read_keys(weights.infos, listing.file(name))
    state, config = _side_files(listing)
    step = state.get("global_step")
    base_name = config.get("model_name") or _older_config(state).get("model_name")
    if base_name is not None and not isinstance(base_name, str):
        raise CheckpointError(f"{listing.path}: model_name is {base_name!r:.80}, not the name of a base model")
    return Checkpoint(
        path=listing.path,
        format=NAME,
        family=FAMILY,
        evidence=f"{name}: {len(weights.infos)} NPT keys",
        weights=weights,
        layers=keys.layers,
        missing=keys.missing,
        unknown=keys.unknown,
        base_name=base_name,
        step=step if isinstance(step, int) else None,
        training={"state": state, "config": config},
    )


def _weights_file(listing: Listing) -> str | None:
    """The name of the file that holds the NPT weights, or None. Raises CheckpointError for several candidates."""
    if not listing.path.is_dir():
        return listing.path.name if any(map(is_key, listing.weights(listing.path.name).infos)) else None
    named = [name for name in WEIGHT_FILES if name in listing.entries]
    if len(named) > 1:
        raise CheckpointError(f"{listing.path}: holds {' and '.join(named)}; name one of them as ckpt=")
    if named:
        return named[0]
    files = [name for name in listing.entries if may_be_weights(name)]
    found = [name for name in files if any(map(is_key, listing.weights(name).infos))]
    if len(found) > 1:
        raise CheckpointError(f"{listing.path}: several files hold NPT weights: {', '.join(found)}; name one as ckpt=")
    return found[0] if found else None


def _side_files(listing: Listing) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training state (tensors on the meta device) and the config beside the weights; {} where there is none."""
    directory = listing if listing.path.is_dir() else Listing.of(listing.path.parent)
    state: Any = {}
    if TRAINING_STATE in directory.entries:
        state = load_pickle(directory.file(TRAINING_STATE), tensors="meta")
        if not isinstance(state, dict):
            raise CheckpointError(f"{directory.file(TRAINING_STATE)}: holds a {type(state).__name__}, not a dictionary")
    config = read_object(directory.file(CONFIG), CONFIG, 16 << 20) if CONFIG in directory.entries else {}
    return state, config


def _older_config(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config inside a training state, as older files have it; {} where there is none, or no plain one."""
    config = state.get("config")
    return config if isinstance(config, Mapping) else {}


def save(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    training_state: Mapping[str, Any] | None,
    multi_layer_state: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    weights_file: str = WEIGHT_FILES[0],
) -> None:
    """Write the files of a checkpoint into `directory` (a staged one: see commit.py).

    `tensors` holds names as `key` gives them. The file holds copies of its own, never views of larger storages.
    """
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    if weights_file.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(owned, directory / weights_file)
    else:
        torch.save(owned, directory / weights_file)
    if training_state is not None:
        torch.save(dict(training_state), directory / TRAINING_STATE)
    if multi_layer_state is not None:
        torch.save(dict(multi_layer_state), directory / MULTI_LAYER_STATE)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Training state, curriculum and merge history, as far as the files beside the weights tell them."""
    state, config = checkpoint.training["state"], checkpoint.training["config"]
    described: dict[str, Any] = {}
    if state or config:
        described["training"] = describe_training(state, config)
    listing = Listing.of(checkpoint.directory)
    if MULTI_LAYER_STATE in listing.entries:
        described["curriculum"] = plain(load_pickle(listing.file(MULTI_LAYER_STATE), tensors="meta"))
    found = config.get("merge_info") or state.get("merge_info")
    merge = plain(found) if isinstance(found, Mapping) else {}
    if MERGE_SUMMARY in listing.entries:
        merge = {**merge, **read_object(listing.file(MERGE_SUMMARY), MERGE_SUMMARY, 16 << 20)}
    if merge:
        described["merge"] = merge
    return described


FORMATS = (CheckpointFormat(name=NAME, family=FAMILY, matches=matches, open=open_npt_delta, describe=describe),)
