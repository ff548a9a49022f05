"""`npt_delta`: NPT weights over a frozen Llama. Which layers, how modulated, what ranks: all read
from the keys and shapes, layer by layer; nothing is assumed from a config."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, NptLayer, describe_training, plain
from runner.checkpoints.model_directory import INJECTION_HISTORY
from runner.checkpoints.reading import Parts, Reading, load_mapping, look_for_merged_model, some, weight_names
from runner.errors import CheckpointError
from runner.files.strict_json import read_object
from runner.files.tensors import TensorInfo, owned, read_pickle

if TYPE_CHECKING:
    import torch

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

NOT_WHOLE = "save the checkpoint again: a layer that is not whole computes something else"
ONE_SIZE = "one layer has one rank, and one base one hidden size"

_FRONT = r"(?:layer_(?P<delta>\d+)_np|model\.layers\.(?P<full>\d+)\.np_component)"
_KEY = re.compile(_FRONT + r"\.(?P<matrix>W_down|W_a_up|W_b_up)(?P<suffix>_gate|_up|_down)?(?:\.(?P<rank>\d+))?")
_SIMILAR = re.compile(_FRONT + r"\..+")


def is_key(name: str) -> bool:
    """Whether `name` is that of an NPT tensor, in either spelling."""
    return _KEY.fullmatch(name) is not None


def key(layer: int, modulation: str, projection: str, matrix: str, rank: int, num_ranks: int) -> str:
    """The name under which one matrix [d, r], [r, d] or [r, f] of one rank-1 term is saved."""
    suffix = "" if modulation == "single" else f"_{projection}"
    return f"layer_{layer}_np.{matrix}{suffix}" + (f".{rank}" if num_ranks > 1 else "")


@dataclass(frozen=True, kw_only=True)
class NptKeys:
    """What names and shapes say: the sound layers, lowest first, and the names that are missing or unknown."""

    layers: tuple[NptLayer, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]


def read_keys(infos: Mapping[str, TensorInfo], where: Path, parts: Parts, other: Iterable[str] = ()) -> NptKeys:
    """The NPT layers that names and shapes describe; every name is used exactly once, or stands in `unknown`.

    `other`: names of what else is in the file. Problems of `keys` and `shapes` go to `parts`.
    """
    found: dict[int, dict[tuple[str, str], dict[int | None, str]]] = {}
    unknown = list(other)
    for name in infos:
        match = _KEY.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        layer = int(match["delta"] or match["full"])
        ranks = found.setdefault(layer, {}).setdefault((match["suffix"] or "", match["matrix"]), {})
        rank = None if match["rank"] is None else int(match["rank"])
        if rank in ranks:
            text = f"{where}: {name} and {ranks[rank]} are two spellings of one tensor; keep one of them"
            parts.refuse("keys", text)
        ranks[rank] = name
    if not found:
        there = ", ".join([*infos, *other][:4]) or "nothing"
        parts.refuse("keys", f"{where}: No NPT layers found: no key looks like layer_<i>_np.W_down…; there is {there}")
    if whole := [name for name in infos if is_key(name) and not infos[name].is_floating]:
        text = f"{where}: {whole[0]} is {infos[whole[0]].dtype_name}; NPT weights are floating-point"
        parts.refuse("shapes", text)
    missing: list[str] = []
    layers = [_layer(index, found[index], infos, where, parts, missing, unknown) for index in sorted(found)]
    if missing or unknown:
        names = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unknown]
        parts.fail("keys", some(names), NOT_WHOLE if missing else None)
    sound = tuple(layer for layer in layers if layer is not None)
    shown = "; ".join(f"{layer.layer}: {layer.modulation}, k {layer.num_ranks}" for layer in sound)
    parts.is_sound("keys", f"{len(infos)} keys; layers {shown}")
    check_sizes(sound, parts)
    return NptKeys(layers=sound, missing=tuple(missing), unknown=tuple(unknown))


def _layer(
    index: int,
    found: Mapping[tuple[str, str], Mapping[int | None, str]],
    infos: Mapping[str, TensorInfo],
    where: Path,
    parts: Parts,
    missing: list[str],
    unknown: list[str],
) -> NptLayer | None:
    """One layer from its names by (suffix, matrix) and rank; None where it is not whole or its sizes contradict."""
    suffixes = {suffix for suffix, _ in found}
    modulation = "triple" if "_down" in suffixes else "single" if suffixes == {""} else "dual"
    terms = _terms(found)
    complete = True
    keys: dict[str, dict[str, tuple[str, ...]]] = {}
    for suffix in MODULATIONS[modulation]:
        for matrix in MATRICES:
            by_rank = found.get((suffix, matrix), {})
            absent = [rank for rank in terms if rank not in by_rank]
            missing += [f"layer_{index}_np.{matrix}{suffix}" + ("" if rank is None else f".{rank}") for rank in absent]
            unknown += [name for rank, name in by_rank.items() if rank not in terms]
            complete = complete and not absent and len(by_rank) == len(terms)
            names = tuple(by_rank[rank] for rank in terms if rank in by_rank)
            keys.setdefault(PROJECTIONS[suffix], {})[matrix] = names
    for (suffix, _), by_rank in found.items():
        if suffix not in MODULATIONS[modulation]:
            unknown += by_rank.values()
            complete = False
    shapes = {name: infos[name].shape for matrices in keys.values() for names in matrices.values() for name in names}
    return sized_layer(index, modulation, keys, shapes, where, parts) if complete else None


def _terms(found: Mapping[tuple[str, str], Mapping[int | None, str]]) -> list[int | None]:
    """The rank-1 terms by the highest; a wild number is no reason to list thousands of names."""
    ranks = [rank for by_rank in found.values() for rank in by_rank if rank is not None]
    return list(range(min(1 + max(ranks), sum(map(len, found.values()))))) if ranks else [None]


def sized_layer(
    index: int,
    modulation: str,
    keys: Mapping[str, Mapping[str, tuple[str, ...]]],
    shapes: Mapping[str, tuple[int, ...]],
    where: Path,
    parts: Parts,
    *,
    transposed: bool = False,
) -> NptLayer | None:
    """The layer with its sizes: W_down [d, r], W_a_up [r, d_in], W_b_up [r, d_out], in the file perhaps `transposed`.

    None where its shapes contradict each other. Hidden size, rank and MLP size are as most of its matrices have them:
    so the odd one is named, in `shapes`. Where as many have another size, it is said what contradicts what.
    """
    if flat := [name for name, shape in shapes.items() if len(shape) != 2]:
        parts.refuse("shapes", f"{where}: layer {index}: {flat[0]} is {list(shapes[flat[0]])}, no matrix", ONE_SIZE)
        return None
    votes = {"hidden": Counter[int](), "rank": Counter[int](), "inner": Counter[int]()}
    axes: dict[str, tuple[str, ...]] = {}
    for projection, matrices in keys.items():
        d_in, d_out = ("inner", "hidden") if projection == "down" else ("hidden", "inner")
        sizes = {"W_down": ("hidden", "rank"), "W_a_up": ("rank", d_in), "W_b_up": ("rank", d_out)}
        step = -1 if transposed else 1
        axes |= {name: sizes[matrix][::step] for matrix, names in matrices.items() for name in names}
    sizes_of = {name: tuple(zip(named, shapes[name], strict=True)) for name, named in axes.items()}
    for axis, size in chain.from_iterable(sizes_of.values()):
        votes[axis][size] += 1
    # Of several sizes that as many matrices have, that with which fewer are wrong.
    leading = [[size for size, n in c.most_common(2) if n == max(c.values())] for c in votes.values()]
    candidates = [dict(zip(votes, sizes, strict=True)) for sizes in product(*leading)]

    def misfits(size_of: Mapping[str, int]) -> list[str]:
        return [name for name, named in axes.items() if shapes[name] != tuple(size_of[axis] for axis in named)]

    size_of = min(candidates, key=lambda candidate: len(misfits(candidate)))
    wanted = {name: tuple(size_of[axis] for axis in named) for name, named in axes.items()}
    wrong = misfits(size_of)
    first_of = {sized: name for name in reversed(axes) for sized in sizes_of[name]}
    for name in wrong:
        made = "the layer's others make"
        if len(candidates) > 1:
            against = [first_of[axis, size_of[axis]] for axis, size in sizes_of[name] if size != size_of[axis]]
            other = [f"{other} {list(shapes[other])}" for other in dict.fromkeys(against)]
            made = " and ".join(other) + (" makes" if len(other) == 1 else " make")
        text = f"{name} is {list(shapes[name])}, where {made} it {list(wanted[name])}"
        parts.refuse("shapes", f"{where}: {text}; one layer has one rank", ONE_SIZE)
    if wrong:
        return None
    return NptLayer(
        layer=index,
        modulation=modulation,
        np_rank=size_of["rank"],
        num_ranks=len(keys["gate"]["W_down"]),
        hidden_size=size_of["hidden"],
        intermediate_size=size_of["inner"],
        parameters=sum(rows * columns for rows, columns in wanted.values()),
        keys=keys,
    )


def check_sizes(layers: Iterable[NptLayer], parts: Parts) -> None:
    """All layers must be made for one hidden size and one MLP size: what else there is is a problem of `shapes`."""
    sizes = {(layer.hidden_size, layer.intermediate_size): layer.layer for layer in layers}
    if len(sizes) > 1:
        shown = ", ".join(f"layer {layer}: {hidden} and {inner}" for (hidden, inner), layer in sizes.items())
        parts.fail("shapes", f"the layers are made for different hidden and MLP sizes ({shown})", ONE_SIZE)
    for hidden, inner in sizes:
        text = f"hidden size {hidden}, MLP size {inner}"
        parts.is_sound("shapes", text, hidden_size=hidden, intermediate_size=inner)


def matches(listing: Listing) -> str | None:
    """Evidence: the file that the format names, or exactly one file with NPT keys among its names."""
    name = _weights_file(listing)
    if name is None:
        return None
    return f"{name}: {sum(map(is_key, listing.weights(name).infos))} NPT keys"


def resembles(listing: Listing) -> int:
    """3 where the file that the format names is there, or one whose names look like NPT layers."""
    named = bool({*WEIGHT_FILES} & {*listing.entries})
    similar = (_SIMILAR.fullmatch(key) for name in weight_names(listing) for key in listing.names(name))
    return 3 if named or any(similar) else 0


def remains(listing: Listing) -> int:
    """3 where a trainer's state lies there, whose weights are lost."""
    return 3 if {TRAINING_STATE, MULTI_LAYER_STATE} & {*listing.entries} else 0


def read(listing: Listing) -> Reading:
    """The checkpoint, part by part: files, config, keys, shapes, pollution."""
    parts, where = Parts(), listing.path
    name = None
    with parts.within("files"):
        name = _weights_file(listing)
        if name is None:
            parts.refuse("keys", f"{where}: No NPT layers found: neither npt_weights.pt nor a file with NPT keys")
    state, curriculum, config = _side_files(listing, parts)
    base_name = config.get("model_name") or _older_config(state).get("model_name")
    if base_name is not None and not isinstance(base_name, str):
        parts.refuse("config", f"{where}: model_name is {base_name!r:.80}, not the name of a base model")
    parts.is_sound("config", f"base {config.get('model_name')}" if config else "none: the base is to be named as base=")
    look_for_merged_model(parts, where, "the NPT weights")
    weights = parts.weights(listing, name) if name else None
    checkpoint = None
    if weights is not None and name is not None:
        other = () if name.endswith(".safetensors") else weights.extras
        keys = read_keys(weights.infos, listing.file(name), parts, other)
        if not parts.has("keys") and (lost := _lost(weights.infos, state, curriculum)):
            parts.fail("keys", lost, NOT_WHOLE)
        step = state.get("global_step")
        checkpoint = Checkpoint(
            path=where,
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
    names = [name] if name else weight_names(listing)
    return parts.reading(where, tuple(map(listing.file, names)), checkpoint)


def _weights_file(listing: Listing) -> str | None:
    """The name of the file that holds the NPT weights, or None. Raises CheckpointError for several candidates."""
    if INJECTION_HISTORY in listing.entries:
        return None  # another format: the base beside the weights is not the one that they were trained on
    if not listing.path.is_dir():
        return listing.path.name if any(map(is_key, listing.weights(listing.path.name).infos)) else None
    named = [name for name in WEIGHT_FILES if name in listing.entries]
    if len(named) > 1:
        raise CheckpointError(f"{listing.path}: holds {' and '.join(named)}; name one of them as ckpt=")
    if named:
        return named[0]
    found = [name for name in weight_names(listing) if any(map(is_key, listing.weights(name).infos))]
    if len(found) > 1:
        raise CheckpointError(f"{listing.path}: several files hold NPT weights: {', '.join(found)}; name one as ckpt=")
    return found[0] if found else None


def _side_files(listing: Listing, parts: Parts) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The training state and the curriculum (as `read_pickle` gives them) and the config beside the weights; {} where
    there is none."""
    directory = listing if listing.path.is_dir() else Listing.of(listing.path.parent)
    state: dict[str, Any] = {}
    curriculum: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if TRAINING_STATE in directory.entries:
        with parts.within("files"):
            state = load_mapping(directory.file(TRAINING_STATE))
    if MULTI_LAYER_STATE in directory.entries:
        file = directory.file(MULTI_LAYER_STATE)
        try:
            content = read_pickle(file)
        except CheckpointError as error:
            parts.fail("files", str(error))  # only inspect shows it
        else:
            curriculum = content if isinstance(content, dict) else {}
            if not isinstance(content, dict):
                text = f"{file}: holds a {type(content).__name__}, not a dictionary: it does not tell what was trained"
                parts.odd("files", text)
    if CONFIG in directory.entries:
        with parts.within("config"):
            config = read_object(directory.file(CONFIG), CONFIG, 16 << 20)
    return state, curriculum, config


def _older_config(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config inside a training state, as older files have it; {} where there is none, or no plain one."""
    config = state.get("config")
    return config if isinstance(config, Mapping) else {}


def _lost(infos: Mapping[str, TensorInfo], state: Mapping[str, Any], curriculum: Mapping[str, Any]) -> str | None:
    """What was trained and is not in the weights. A layer, a rank-1 term or a projection that is gone altogether leaves
    weights that are whole: only the states of the trainer and its optimizer tell."""
    named = curriculum.get("layers_to_train")
    trained = {layer for layer in named if type(layer) is int} if isinstance(named, list) else set()
    # By their names: a layer whose sizes contradict each other is there.
    there = {int(match["delta"] or match["full"]) for match in map(_KEY.fullmatch, infos) if match}
    if absent := trained - there:
        return f"missing layers {', '.join(map(str, sorted(absent)))}, which {MULTI_LAYER_STATE} trains"
    moments, held = _moments(state.get("optimizer_state_dict")), Counter(info.shape for info in infos.values())
    more = moments - held
    # Moments of anything else than such matrices are of something that was trained beside them.
    if not more or held - moments or not more.keys() <= held.keys():
        return None
    return (
        f"missing {more.total()} matrices: the optimizer in {TRAINING_STATE} has moments of {moments.total()}, "
        f"the weights are {held.total()}"
    )


def _moments(optimizer: Any) -> Counter[tuple[int, ...]]:
    """How many parameters of each shape the optimizer has a first moment of."""
    state = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    entries = [entry for entry in state.values() if isinstance(entry, Mapping)] if isinstance(state, Mapping) else []
    return Counter(tuple(entry["exp_avg"].shape) for entry in entries if hasattr(entry.get("exp_avg"), "shape"))


def save(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    training_state: Mapping[str, Any] | None,
    multi_layer_state: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    weights_file: str = WEIGHT_FILES[0],
) -> None:
    """Write the files of a checkpoint into `directory` (a staged one).

    `tensors` holds names as `key` gives them. The file holds copies of its own, never views of larger storages.
    """
    import torch

    if weights_file.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(owned(tensors), directory / weights_file)
    else:
        torch.save(owned(tensors), directory / weights_file)
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
        described["curriculum"] = plain(read_pickle(listing.file(MULTI_LAYER_STATE)))
    found = config.get("merge_info") or state.get("merge_info")
    merge = plain(found) if isinstance(found, Mapping) else {}
    if MERGE_SUMMARY in listing.entries:
        merge = {**merge, **read_object(listing.file(MERGE_SUMMARY), MERGE_SUMMARY, 16 << 20)}
    if merge:
        described["merge"] = merge
    return described


FORMATS = (
    CheckpointFormat(
        name=NAME, family=FAMILY, matches=matches, describe=describe, read=read, resembles=resembles, remains=remains
    ),
)
