"""The parts of a lora_moe checkpoint (spec/formats.md §4), each looked at by itself, from headers and configs.

What a mixture of LoRA experts must keep when it is saved: its router, its skills, and which expert gets a token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.detect import open_checkpoint
from runner.checks.check import WARNING, Outcome, failed, passed, skipped
from runner.checks.context import Bench
from runner.checks.detected import ADAPTER_WEIGHTS, EXPERT, MERGED_MODEL
from runner.checks.headers import Header, TensorHeader
from runner.checks.inputs import prompts, ragged
from runner.errors import CheckpointError
from runner.evaluation.forward import device_of
from runner.families.lora.checks import (
    Adapter,
    contradictions,
    hidden_sizes,
    key_problems,
    modules,
    open_parts,
    shape_problems,
)
from runner.families.lora_moe.model import LoraMoeForCausalLM
from runner.families.lora_moe.state import read_skills
from runner.files.file_type import may_be_weights
from runner.files.strict_json import read_object

OLDER = "dylo_moe_state"
ADAPTERS = "peft_adapters"
_ADAPTER_FILES = ("adapter_config.json", *ADAPTER_WEIGHTS)
_JSON_LIMIT = 64 << 20


@dataclass(frozen=True, kw_only=True)
class ExpertPlace:
    """Where an expert's adapter lies: in its directory (`flat`), in one of its name inside that (`nested`), or both."""

    number: int
    directory: Path
    flat: bool
    nested: bool

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"expert_{self.number}"

    @property
    def adapter(self) -> Path:
        """The directory of the adapter."""
        return self.directory / self.directory.name if self.nested else self.directory


def places(root: Path) -> dict[Path, list[ExpertPlace]]:
    """The experts' directories in numeric order, by the directory that holds them."""
    found: dict[Path, list[ExpertPlace]] = {}
    for parent in (root / ADAPTERS, root, root / OLDER):
        entries = list(parent.iterdir()) if parent.is_dir() else []
        numbered = [(int(match[1]), entry) for entry in entries if (match := EXPERT.fullmatch(entry.name))]
        experts = [
            ExpertPlace(number=number, directory=d, flat=_is_adapter(d), nested=_is_adapter(d / d.name))
            for number, d in sorted(numbered)
        ]
        if experts:
            found[parent] = experts
    return found


def _is_adapter(directory: Path) -> bool:
    return any((directory / name).exists() for name in _ADAPTER_FILES)


def _experts(bench: Bench) -> list[ExpertPlace]:
    return next(iter(places(bench.look.path).values()))


def _adapters(bench: Bench) -> list[Adapter]:
    return [open_parts(place.adapter, place.label, bench.header) for place in _experts(bench)]


def _router(bench: Bench) -> tuple[Path, Header]:
    root = bench.look.path
    found = [path for path in _router_files(root) if path.exists()]
    if not found:
        raise CheckpointError("has no router: neither router.safetensors nor router.pt")
    if len(found) > 1:
        shown = ", ".join(str(path.relative_to(root)) for path in found)
        raise CheckpointError(f"holds several routers: {shown}; keep the one that is meant")
    return found[0], bench.header(found[0], "gate_state_dict")


def _router_files(root: Path) -> list[Path]:
    return [place / name for place in (root, root / OLDER) for name in ("router.safetensors", "router.pt")]


def _gate(header: Header) -> tuple[TensorHeader, TensorHeader]:
    """Weight and bias. Raises CheckpointError for other names."""
    names = ("weight", "bias") if "weight" in header.tensors else ("gate.weight", "gate.bias")
    missing, unknown = sorted(set(names) - set(header.tensors)), sorted(set(header.tensors) - set(names))
    if missing or unknown:
        raise CheckpointError(f"{header.file.name} is no router: missing keys {missing}, unexpected keys {unknown}")
    return header.tensors[names[0]], header.tensors[names[1]]


def _settings(bench: Bench) -> dict[str, dict[str, Any]]:
    """What config.json, that of the older layout and an older router.pt say, by file."""
    root, said = bench.look.path, {}
    for path in (root / "config.json", root / OLDER / "config.json"):
        if path.is_file():
            values = read_object(path, "config", _JSON_LIMIT)
            if path.parent.name == OLDER or "num_experts" in values or values.get("model_type") in ("dylora-moe", None):
                said[str(path.relative_to(root))] = values
    for path in _router_files(root):
        if path.is_file() and path.suffix == ".pt":
            said[path.name] = bench.extras(path, "gate_state_dict")
    return said


def config(bench: Bench) -> Outcome:
    """config.json is there and says how many experts there are, and k and the temperature, if at all, soundly."""
    said = _settings(bench)
    if not any(name.endswith("config.json") for name in said):
        return failed("has no config.json, which says num_experts", "write it with the checkpoint's num_experts")
    counts = {name: values["num_experts"] for name, values in said.items() if "num_experts" in values}
    if not counts:
        return failed("config.json does not say num_experts", "without it no expert is known to be missing: add it")
    problems = [f"{name}: num_experts is {n!r}" for name, n in counts.items() if type(n) is not int or n < 1]
    if problems:
        return failed("; ".join(problems))
    highest = max(counts.values())
    for name, values in said.items():
        k, temperature = values.get("top_k"), values.get("temperature")
        if k is not None and (type(k) is not int or not 1 <= k <= highest):
            problems.append(f"{name}: top_k is {k!r}; with {highest} experts it is a number from 1 to {highest}")
        if temperature is not None and (type(temperature) not in (int, float) or not 0 < temperature < 1e9):
            problems.append(f"{name}: temperature is {temperature!r}, not a number above 0")
    for key in ("top_k", "temperature"):
        if len(given := {repr(v[key]) for v in said.values() if v.get(key) is not None}) > 1:
            problems.append(f"{key} is {' and '.join(sorted(given))} in {' and '.join(said)}")
    if problems:
        return failed("; ".join(problems), "correct config.json")
    return passed(f"{', '.join(said)}: {highest} experts, top_k {_said(said, 'top_k', 1)}")


def _said(said: dict[str, dict[str, Any]], key: str, default: Any) -> Any:
    return next((values[key] for values in said.values() if values.get(key) is not None), default)


def layout(bench: Bench) -> Outcome:
    """Each expert's adapter lies in one place: nested as PEFT nests it, or flat."""
    found = places(bench.look.path)
    if not found:
        return failed(f"holds no experts: no {ADAPTERS}/expert_0")
    if len(found) > 1:
        return failed(f"holds experts in {' and in '.join(map(str, found))}", "keep those that are meant")
    experts = _experts(bench)
    if both := [place.label for place in experts if place.flat and place.nested]:
        return failed(f"{', '.join(both)}: an adapter both flat and nested", "keep one of the two")
    if none := [place.label for place in experts if not place.flat and not place.nested]:
        return failed(f"{', '.join(none)}: no adapter, neither flat nor nested in a directory of the same name")
    root = bench.look.path
    if next(iter(found)) != root and (stray := [name for name in _ADAPTER_FILES if (root / name).exists()]):
        return Outcome(
            status=WARNING,
            details=f"{len(experts)} adapters, and {', '.join(stray)} beside them: of no expert, and not read",
            recommendation="delete what is beside them, or put it where its expert lies",
        )
    kinds = sorted({"nested" if place.nested else "flat" for place in experts})
    return passed(f"{len(experts)} adapters, {' and '.join(kinds)}", layout="+".join(kinds))


def gate(bench: Bench) -> Outcome:
    """One router of weight [experts, hidden size] and bias [experts]."""
    path, header = _router(bench)
    weight, bias = _gate(header)
    if len(weight.shape) != 2 or bias.shape != weight.shape[:1] or 0 in weight.shape:
        turned = ", which looks transposed" if len(weight.shape) == 2 and bias.shape == weight.shape[1:] else ""
        return failed(
            f"{path.name}: the weight is {list(weight.shape)} and the bias {list(bias.shape)}{turned}: they must be "
            "[experts, hidden size] and [experts]"
        )
    if not weight.is_floating or not bias.is_floating:
        return failed(f"{path.name}: is {weight.dtype} and {bias.dtype}; a router is floating-point")
    return passed(f"{path.name}: {weight.shape[0]} experts, hidden size {weight.shape[1]}")


def experts(bench: Bench) -> Outcome:
    """Config, router and directories agree on how many experts there are."""
    said = {name: values["num_experts"] for name, values in _settings(bench).items() if "num_experts" in values}
    found = [place.label for place in _experts(bench)]
    rows = _gate(_router(bench)[1])[0].shape[0]
    if {*said.values(), rows, len(found)} == {rows} and found == [f"expert_{i}" for i in range(rows)]:
        return passed(f"{rows} in config, router and directories")
    claims = " and ".join(f"{name} says {count}" for name, count in said.items())
    return failed(
        f"{claims}, the router has {rows}, and the adapters are {', '.join(found)}; they must agree",
        "restore what is missing, or the num_experts that was trained",
    )


def adapters(bench: Bench) -> Outcome:
    """Every expert has a config that can be read and one file of weights."""
    found, problems = [], []
    for place in _experts(bench):
        try:
            found.append(open_parts(place.adapter, place.label, bench.header))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        return failed("; ".join(problems), "copy the adapter again from where it was trained")
    ranks = sorted({adapter.settings.r for adapter in found})
    return passed(f"{len(found)} configs, r {', '.join(map(str, ranks))}")


def keys(bench: Bench) -> Outcome:
    """Every tensor that the configs ask for is there, under its name, and no other."""
    found = _adapters(bench)
    if problems := key_problems(found):
        return failed("; ".join(problems), "PEFT would load the rest without an error: save the adapter again")
    return passed(f"{sum(map(len, map(modules, found)))} modules with A and B, nothing else")


def shapes(bench: Bench) -> Outcome:
    """The tensors' shapes are those of the rank that the configs give."""
    found = _adapters(bench)
    if problems := [problem for adapter in found for problem in shape_problems(adapter)] or contradictions(found):
        return failed("; ".join(problems[:4]), "the config and the weights are of different trainings")
    return passed("ranks as the configs say")


def hidden_size(bench: Bench) -> Outcome:
    """The router reads hidden states of the size that the adapters are made for."""
    size = _gate(_router(bench)[1])[0].shape[1]
    other = {n: who for adapter in _adapters(bench) for n, who in hidden_sizes(adapter).items() if n != size}
    if other:
        shown = ", ".join(f"{who} for {n}" for n, who in sorted(other.items()))
        return failed(f"the router reads a hidden size of {size}, but made are {shown}")
    return passed(f"{size} in router and adapters")


def skill_library(bench: Bench) -> Outcome:
    """The skill library is a dictionary of embeddings of the hidden size."""
    root = bench.look.path
    found = [path for path in (root / "skill_library.pt", root / OLDER / "skill_library.pt") if path.exists()]
    if not found:
        return passed("no skill library")
    from runner.families.lora_moe.state import open_skills

    library = open_skills(root)
    assert library is not None, "the file is there"
    size = _gate(_router(bench)[1])[0].shape[1]
    if library.size not in (None, size):
        return failed(f"{library.file.name}: embeddings of {library.size}, but the hidden size is {size}")
    return passed(f"{len(library.ids)} skills of size {library.size}")


def pollution(bench: Bench) -> Outcome:
    """No merged model lies beside the adapters: those are gigabytes that belong to the base."""
    root = bench.look.directory
    stray = sorted(path for path in root.rglob("*") if MERGED_MODEL.fullmatch(path.name) and path.is_file())
    if not stray and (other := [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if _is_stray(path)]):
        return Outcome(
            status=WARNING,
            details=f"{', '.join(other)}: weights that are no part of such a checkpoint, and not read",
            recommendation="delete them, if they are a merged model",
        )
    if not stray:
        return passed("no merged model beside the adapters")
    size = sum(path.stat().st_size for path in stray)
    names = ", ".join(str(path.relative_to(root)) for path in stray)
    return failed(
        f"a merged model lies beside the adapters: {names} ({size / 1e6:,.1f} MB)",
        "delete it, and keep the Trainer from saving the model: it is not read",
    )


def _is_stray(path: Path) -> bool:
    """Whether it looks like weights, and is neither a part of the layout nor a state that a Trainer leaves."""
    known = (*ADAPTER_WEIGHTS, "router.safetensors")
    return may_be_weights(path.name) and path.name not in known


def router(bench: Bench) -> Outcome:
    """Weight, bias, top_k and temperature of the reloaded router are those of the loaded one."""
    ours, theirs = _model(bench.model), _model(bench.reloaded)
    wrong = [
        f"gate.{name} differs by up to {(a.float() - b.float()).abs().max().item():.3g}"
        for name, a, b in (
            ("weight", ours.router.weight, theirs.router.weight),
            ("bias", ours.router.bias, theirs.router.bias),
        )
        if not torch.equal(a, b)
    ]
    wrong += [
        f"{name} is {getattr(theirs, name)} instead of {getattr(ours, name)}"
        for name in ("top_k", "temperature")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if wrong:
        return failed(f"the reloaded router is another one: {'; '.join(wrong)}")
    count, size = ours.router.weight.shape
    return passed(f"{count} experts over a hidden size of {size}, top {ours.top_k}: equal, bit for bit")


def skills(bench: Bench) -> Outcome:
    """The saved skill library has the same ids and embeddings."""
    own = bench.checkpoint.details.skills
    if own is None:
        return skipped("the checkpoint has no skill library")
    copy = open_checkpoint(bench.saved, bench.checkpoint.format).details.skills
    ours, theirs = read_skills(own), {} if copy is None else read_skills(copy)
    if ours.keys() != theirs.keys():
        return failed(f"the saved skill library holds {sorted(map(str, theirs))} instead of {sorted(map(str, ours))}")
    wrong = [str(name) for name in ours if not torch.equal(ours[name], theirs[name])]
    if wrong:
        return failed(f"the saved embeddings of {', '.join(wrong)} differ from the loaded ones")
    return passed(f"{len(ours)} embeddings of size {own.size}: equal, bit for bit")


@torch.inference_mode()
def routing(bench: Bench) -> Outcome:
    """Every token of the prompts and of a longer sequence goes to the same experts, with the same weights."""
    ours, theirs = _model(bench.model), _model(bench.reloaded)
    tokens, used = 0, torch.zeros(len(ours.names))
    for sequence in [*prompts(bench), ragged(bench, 1)[0]]:
        ids = sequence.to(device_of(ours))[None]
        expected, found = ours(ids).expert_weights, theirs(ids).expert_weights
        if not torch.equal(expected, found):
            moved = int(((expected > 0) != (found > 0)).any(-1).sum())
            return failed(
                f"of {len(sequence)} tokens {moved} go to other experts after reloading; weights differ by up to "
                f"{(expected - found).abs().max().item():.3g}"
            )
        tokens += len(sequence)
        used += (expected > 0).sum((0, 1)).cpu()
    shares = ", ".join(f"{name} {count / tokens:.0%}" for name, count in zip(ours.names, used.tolist(), strict=True))
    return passed(f"{tokens} tokens go where they went: {shares}")


def _model(model: torch.nn.Module) -> LoraMoeForCausalLM:
    assert isinstance(model, LoraMoeForCausalLM)
    return model
