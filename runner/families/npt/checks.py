"""The parts of an NPT checkpoint, over a base or complete (spec/formats.md §1 and §2), from names and shapes.

What the states beside NPT weights say was trained, against what the weights still hold.

A layer, a rank-1 term or a projection that is gone altogether leaves weights that are whole: only the trainer's and the
optimizer's states tell.

What NPT layers must do: be the base's own layers in standard mode, and come back from every switch unchanged.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.checks.check import PASS, WARNING, Outcome, failed, passed
from runner.checks.context import Bench
from runner.checks.detected import MERGED_MODEL
from runner.checks.headers import TensorHeader
from runner.checks.inputs import prompts
from runner.checks.subjects import plain_subject
from runner.evaluation.forward import device_of
from runner.families.hf.checks import config as model_config_check
from runner.families.hf.checks import model_config, model_header, model_key_problems, model_shapes
from runner.families.npt.model import NptLlamaForCausalLM
from runner.files.strict_json import read_object

CURRICULUM, TRAINING = "multi_layer_state.pt", "training_state.pt"


def lost(bench: Bench, layers: Iterable[int], tensors: Mapping[str, TensorHeader]) -> list[str]:
    """What was trained and is not in `tensors`, NPT weights of these `layers`."""
    root = bench.look.path
    if not root.is_dir():
        return []
    named = _state(root / CURRICULUM).get("layers_to_train")
    absent = {layer for layer in named if type(layer) is int} - set(layers) if isinstance(named, list) else set()
    if absent:
        return [f"missing layers {', '.join(map(str, sorted(absent)))}, which {CURRICULUM} trains"]
    moments = _moments(_state(root / TRAINING).get("optimizer_state_dict"))
    held = Counter(tensor.shape for tensor in tensors.values())
    more = moments - held
    # Moments of anything else than such matrices are of something that was trained beside them.
    if not more or held - moments or not more.keys() <= held.keys():
        return []
    return [
        f"missing {more.total()} matrices: the optimizer in {TRAINING} has moments of {moments.total()}, "
        f"the weights are {held.total()}"
    ]


def _state(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    from runner.files.tensors import load_pickle

    content = load_pickle(path, tensors="meta")
    return content if isinstance(content, Mapping) else {}


def _moments(optimizer: Any) -> Counter[tuple[int, ...]]:
    """How many parameters of each shape the optimizer has a first moment of."""
    state = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    entries = [entry for entry in state.values() if isinstance(entry, Mapping)] if isinstance(state, Mapping) else []
    return Counter(tuple(entry["exp_avg"].shape) for entry in entries if hasattr(entry.get("exp_avg"), "shape"))


_KEY = re.compile(
    r"(?:layer_(?P<delta>\d+)_np|model\.layers\.(?P<full>\d+)\.np_component)"
    r"\.(?P<matrix>W_down|W_a_up|W_b_up)(?P<suffix>_gate|_up|_down)?(?:\.(?P<rank>\d+))?"
)
_FULL_KEY = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?:adapter\.(?P<matrix>A_proj|B_model|B_ffn)\.weight|original_gate_weight)"
)
_SUFFIXES = {"single": ("",), "dual": ("_gate", "_up"), "triple": ("_gate", "_up", "_down")}
_MATRICES = ("W_down", "W_a_up", "W_b_up")
TRAINING_INFO = "training_info.pt"
_FULL_MATRICES = ("A_proj", "B_model", "B_ffn")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One matrix of a layer: its projection's suffix, its name among the three, its rank-1 term (None where k = 1)."""

    layer: int
    suffix: str
    matrix: str
    rank: int | None


def is_full(bench: Bench) -> bool:
    """Whether base and adapters both stand in the checkpoint."""
    return bench.look.format == "npt_full"


def parts(tensors: Mapping[str, TensorHeader]) -> tuple[dict[Part, str], list[str]]:
    """The name of each part, and the names that are none, or are of a part that has one already."""
    found: dict[Part, str] = {}
    other = []
    for name in tensors:
        match = _KEY.fullmatch(name)
        rank = None if match is None or match["rank"] is None else int(match["rank"])
        part = match and Part(
            layer=int(match["delta"] or match["full"]), suffix=match["suffix"] or "", matrix=match["matrix"], rank=rank
        )
        if part is None or part in found:
            other.append(name)
        else:
            found[part] = name
    return found, other


def config(bench: Bench) -> Outcome:
    """A complete model has a config.json with its sizes; over a base it is optional."""
    if is_full(bench):
        return _full_config(bench)
    path = bench.look.directory / "config.json"
    if not path.is_file():
        return passed("none: the base is to be named as base=")
    values = read_object(path, "config", 16 << 20)
    return passed(f"base {values.get('model_name')}")


def _full_config(bench: Bench) -> Outcome:
    outcome = model_config_check(bench)
    if outcome.status == PASS and (kind := model_config(bench.look.path).get("model_type")) != "llama":
        return failed(f"config.json: model_type is {kind!r}; NPT layers stand on a 'llama'", "restore the config.json")
    if outcome.status == PASS and not (bench.look.path / TRAINING_INFO).is_file():
        return Outcome(
            status=WARNING,
            details=f"no {TRAINING_INFO}: modulation_scale is taken as the default, 0.1",
            recommendation=f"copy {TRAINING_INFO} from where it was trained: another scale is another model",
        )
    return outcome


def keys(bench: Bench) -> Outcome:
    """Every NPT layer is complete, and nothing else is in the file."""
    return _full_keys(bench) if is_full(bench) else _delta_keys(bench)


def _delta_keys(bench: Bench) -> Outcome:
    found, other = parts(bench.weights.tensors)
    other += bench.weights.extras
    if not found:
        shown = ", ".join([*bench.weights.tensors, *bench.weights.extras][:4]) or "nothing"
        return failed(f"No NPT layers found: no key looks like layer_<i>_np.W_down…; there is {shown}")
    problems, kinds = [], []
    for layer in sorted({part.layer for part in found}):
        own = {part for part in found if part.layer == layer}
        suffixes = {part.suffix for part in own}
        kind = "triple" if "_down" in suffixes else "single" if suffixes == {""} else "dual"
        terms = _terms(own)
        wanted = {
            Part(layer=layer, suffix=suffix, matrix=matrix, rank=rank)
            for suffix in _SUFFIXES[kind]
            for matrix in _MATRICES
            for rank in terms
        }
        problems += [f"missing {_spelled(part)}" for part in sorted(wanted - own, key=_spelled)]
        problems += [f"unexpected {found[part]}" for part in sorted(own - wanted, key=_spelled)]
        kinds.append(f"{layer}: {kind}, k {len(terms)}")
    problems += [f"unexpected {name}" for name in other]
    problems = problems or lost(bench, {part.layer for part in found}, bench.weights.tensors)
    if problems:
        shown = "; ".join(problems[:6]) + (f"; … ({len(problems)} in all)" if len(problems) > 6 else "")
        return failed(shown, "save the checkpoint again: a layer that is not whole computes something else")
    return passed(f"{len(found)} keys; layers {'; '.join(kinds)}")


def _terms(own: set[Part]) -> list[int | None]:
    """The rank-1 terms by the highest; a wild number is no reason to list thousands of names."""
    ranks = [part.rank for part in own if part.rank is not None]
    return list(range(min(1 + max(ranks), len(own)))) if ranks else [None]


def _spelled(part: Part) -> str:
    return f"layer_{part.layer}_np.{part.matrix}{part.suffix}" + ("" if part.rank is None else f".{part.rank}")


def _full_keys(bench: Bench) -> Outcome:
    tensors = model_header(bench)
    matches = [match for match in map(_FULL_KEY.fullmatch, tensors) if match]
    adapted = {(int(match["layer"]), match["matrix"]) for match in matches if match["matrix"]}
    if not adapted:
        return failed("No NPT layers found: no adapter keys among the weights", "format=hf tests it as a plain model")
    layers = sorted({layer for layer, _ in adapted})
    problems = [
        f"missing model.layers.{layer}.adapter.{matrix}.weight"
        for layer in layers
        for matrix in _FULL_MATRICES
        if (layer, matrix) not in adapted
    ]
    problems += model_key_problems(bench, {match.string for match in matches})
    if problems:
        return failed("; ".join(problems[:6]) + (f"; … ({len(problems)} in all)" if len(problems) > 6 else ""))
    return passed(f"{len(tensors)} keys; NPT layers {', '.join(map(str, layers))}")


def shapes(bench: Bench) -> Outcome:
    """Each layer's matrices fit each other, and all layers have one hidden size and one MLP size."""
    tensors = model_header(bench) if is_full(bench) else bench.weights.tensors
    problems: list[str] = []
    sizes: dict[tuple[int, int], int] = {}
    layers = _full_layers(tensors) if is_full(bench) else _delta_layers(tensors)
    for layer, matrices in layers.items():
        if wrong := [name for name, shape in matrices.values() if len(shape) != 2]:
            problems.append(f"{wrong[0]} is no matrix")
            continue
        if wrong := [name for name, _ in matrices.values() if not tensors[name].is_floating]:
            problems.append(f"{wrong[0]} is {tensors[wrong[0]].dtype}, no weights")
        hidden, rank, inner = _sizes(matrices)
        sizes[hidden, inner] = layer
        for (suffix, matrix, _), (name, shape) in matrices.items():
            d_in, d_out = (inner, hidden) if suffix == "_down" else (hidden, inner)
            wanted = {"W_down": (hidden, rank), "W_a_up": (rank, d_in), "W_b_up": (rank, d_out)}[matrix]
            if shape != wanted:
                problems.append(f"{name} is {list(shape)}, where the layer's others make it {list(wanted)}")
    if len(sizes) > 1:
        shown = ", ".join(f"layer {layer}: {hidden} and {inner}" for (hidden, inner), layer in sizes.items())
        problems.append(f"the layers are made for different hidden and MLP sizes ({shown})")
    if problems:
        return failed("; ".join(problems[:4]), "one layer has one rank, and one base one hidden size")
    if is_full(bench) and (outcome := model_shapes(bench)).status != PASS:
        return outcome
    if is_full(bench) and (problems := _recorded_gates(tensors)):
        return failed("; ".join(problems[:4]), "they are gate weights as they were: save the checkpoint again")
    hidden, inner = next(iter(sizes))
    return passed(f"hidden size {hidden}, MLP size {inner}", hidden_size=hidden, intermediate_size=inner)


def _recorded_gates(tensors: Mapping[str, TensorHeader]) -> list[str]:
    """Gates before permanent updates that have another shape than the gate; those of quantised models have none."""
    pairs = {name: name.replace("original_gate_weight", "mlp.gate_proj.weight") for name in tensors}
    return [
        f"{name} is {list(tensors[name].shape)}, the gate {list(tensors[gate].shape)}"
        for name, gate in pairs.items()
        if name != gate and gate in tensors and tensors[name].shape not in ((), tensors[gate].shape)
    ]


# (suffix, matrix, rank-1 term) → name and shape.
_Matrices = dict[tuple[str, str, int], tuple[str, tuple[int, ...]]]


def _delta_layers(tensors: Mapping[str, TensorHeader]) -> dict[int, _Matrices]:
    layers: dict[int, _Matrices] = {}
    for part, name in parts(tensors)[0].items():
        place = (part.suffix, part.matrix, part.rank or 0)
        layers.setdefault(part.layer, {})[place] = (name, tensors[name].shape)
    return layers


def _full_layers(tensors: Mapping[str, TensorHeader]) -> dict[int, _Matrices]:
    """The adapters' Linear weights turned to the shapes of the other layout."""
    layers: dict[int, _Matrices] = {}
    turned = dict(zip(_FULL_MATRICES, _MATRICES, strict=True))
    for name, tensor in tensors.items():
        match = _FULL_KEY.fullmatch(name)
        if match and match["matrix"]:
            place = ("", turned[match["matrix"]], 0)
            layers.setdefault(int(match["layer"]), {})[place] = (name, tensor.shape[::-1])
    return layers


def _sizes(matrices: _Matrices) -> tuple[int, int, int]:
    """Hidden size, rank and MLP size of a layer, each as most of its matrices have it: so the odd one is named."""
    votes: dict[str, Counter[int]] = {"hidden": Counter(), "rank": Counter(), "inner": Counter()}
    for (suffix, matrix, _), (_, (rows, columns)) in matrices.items():
        wide = {"W_down": "rank", "W_a_up": "hidden", "W_b_up": "inner"}[matrix]
        if suffix == "_down" and matrix != "W_down":
            wide = "inner" if matrix == "W_a_up" else "hidden"
        votes["hidden" if matrix == "W_down" else "rank"][rows] += 1
        votes[wide][columns] += 1
    hidden, rank, inner = (each.most_common(1)[0][0] for each in votes.values())
    return hidden, rank, inner


def pollution(bench: Bench) -> Outcome:
    """No merged model lies beside NPT weights that stand on a base."""
    root = bench.look.path
    if is_full(bench) or not root.is_dir():
        return passed("a complete model" if is_full(bench) else "a file by itself")
    stray = sorted(path for path in root.iterdir() if MERGED_MODEL.fullmatch(path.name))
    if stray:
        size = sum(path.stat().st_size for path in stray) / 1e6
        return failed(
            f"a merged model lies beside the NPT weights: {', '.join(p.name for p in stray)} ({size:,.1f} MB)",
            "delete it: it is not read",
        )
    return passed("no merged model beside the NPT weights")


@torch.inference_mode()
def modes(bench: Bench) -> Outcome:
    """After switching to standard, to each layer alone and through an error, NPT and standard logits are as before."""
    model = bench.model
    assert isinstance(model, NptLlamaForCausalLM)
    ids = prompts(bench)[0].to(device_of(model))[None]
    layers = set(model.npt_layers)
    before = model(ids).logits
    with model.npt_mode(set()):
        standard = model(ids).logits
    for layer in sorted(layers):
        with model.npt_mode({layer}):
            model(ids)
    try:
        with model.npt_mode(set()):
            raise _Interruption
    except _Interruption:
        after = model(ids).logits
    with model.npt_mode(set()):
        standard_again = model(ids).logits
    with model.npt_mode(layers):
        switched_on = model(ids).logits
    pairs = {
        "NPT logits after switching back": (before, after),
        "standard logits the second time": (standard, standard_again),
        "logits with every NPT layer switched on": (before, switched_on),
    }
    for name, (expected, found) in pairs.items():
        if not torch.equal(expected, found):
            return failed(
                f"{name} differ by up to {(expected - found).abs().max().item():.3g}: a switch leaves something"
            )
    return passed(f"{len(layers)} NPT layers switched alone and together: nothing is left behind")


class _Interruption(Exception):
    """Stands for whatever ends a measurement early."""


def control(bench: Bench) -> Outcome:
    """All layers standard must equal the plain model: exactly on a CPU in float32, elsewhere within its rounding."""
    subject = plain_subject(bench)
    token_ids = min(prompts(bench), key=len)
    compared = subject.control(token_ids)
    exact = device_of(subject.model).type == "cpu" and bench.model.dtype == torch.float32
    allowed = 0.0 if exact else subject.compare_to_floor(token_ids).mse
    mse = compared.mse if compared.finite else float("nan")
    said = f"all layers standard against the plain model: mse {mse:g}, allowed {allowed:g}"
    if not mse <= allowed:
        return failed(f"{said}: the architecture is at fault", "Look at the standard mode of the NPT layers.")
    return passed(said, mse=mse)
