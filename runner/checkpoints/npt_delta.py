"""`npt_delta`: NPT weights over a frozen Llama (spec/formats.md §1). Which layers, how modulated, what ranks: all read
from the keys and shapes, layer by layer; nothing is assumed from a config."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.checkpoint import NptLayer
from runner.checkpoints.tensors import TensorInfo
from runner.errors import CheckpointError

NAME = "npt_delta"
FAMILY = "npt"
WEIGHT_FILES = ("npt_weights.pt", "npt_weights.safetensors")
TRAINING_STATE = "training_state.pt"
MULTI_LAYER_STATE = "multi_layer_state.pt"
CONFIG = "config.json"

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


def layers(infos: Mapping[str, TensorInfo], where: Path) -> tuple[NptLayer, ...]:
    """The NPT layers that names and shapes describe, lowest first.

    Every name is used exactly once. Raises CheckpointError with all missing and unexpected names, and for shapes
    that contradict each other.
    """
    found: dict[int, dict[tuple[str, str], dict[int | None, str]]] = {}
    unexpected = []
    for name in infos:
        match = _KEY.fullmatch(name)
        if match is None:
            unexpected.append(name)
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
    result = []
    for index in sorted(found):
        result.append(_layer(index, found[index], infos, where, missing, unexpected))
    if missing or unexpected:
        raise CheckpointError(f"{where}: missing keys {sorted(missing)}, unexpected keys {sorted(unexpected)}")
    return tuple(layer for layer in result if layer is not None)


def _layer(
    index: int,
    found: Mapping[tuple[str, str], Mapping[int | None, str]],
    infos: Mapping[str, TensorInfo],
    where: Path,
    missing: list[str],
    unexpected: list[str],
) -> NptLayer | None:
    """One layer from its names by (suffix, matrix) and rank; None when `missing` or `unexpected` names were added."""
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
            unexpected += [name for rank, name in by_rank.items() if rank not in expected_ranks]
            complete = complete and not absent and len(by_rank) == len(expected_ranks)
            keys.setdefault(PROJECTIONS[suffix], {})[matrix] = tuple(
                by_rank[rank] for rank in expected_ranks if rank in by_rank
            )
    for (suffix, _), by_rank in found.items():
        if suffix not in MODULATIONS[modulation]:
            unexpected += by_rank.values()
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
