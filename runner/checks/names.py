"""What a checkpoint says of its base, from its configs and names alone: which it is, and what sizes it must have."""

import re
from pathlib import Path
from typing import Any

from runner.checks.context import Bench
from runner.families.hf.checks import bad_sizes, llama_shapes
from runner.families.lora.checks import Adapter, hidden_sizes, modules, open_parts
from runner.families.lora_moe import checks as structure_moe
from runner.families.npt import checks as structure_npt
from runner.files.strict_json import read_object

_LIMIT = 64 << 20
_LAYER = re.compile(r".*\.layers\.(\d+)\.")


def base_name(bench: Bench) -> str | None:
    """The name of the base as the checkpoint writes it."""
    root = bench.look.directory
    keys = {"npt_delta": ("model_name",), "lora_moe": ("base_model_name_or_path", "model_name")}
    for path in (root / "config.json", root / structure_moe.OLDER / "config.json"):
        values = read_object(path, "config", _LIMIT) if path.is_file() else {}
        for key in keys.get(bench.look.format or "", ()):
            if isinstance(values.get(key), str):
                return str(values[key])
    adapters = _adapters(bench)
    return adapters[0].settings.base_name if adapters else None


def made_for(bench: Bench) -> dict[str, int]:
    """`hidden_size`, `intermediate_size` and the highest `layer` that the tensors tell of."""
    if bench.look.format == "npt_delta":
        outcome = structure_npt.shapes(bench)
        return {**outcome.data, "layer": max(part.layer for part in structure_npt.parts(bench.weights.tensors)[0])}
    adapters = _adapters(bench)
    sizes = {size for adapter in adapters for size in hidden_sizes(adapter)}
    layers = [int(match[1]) for a in adapters for match in map(_LAYER.match, modules(a)) if match]
    found = {"hidden_size": sizes.pop()} if len(sizes) == 1 else {}
    return found | ({"layer": max(layers)} if layers else {})


def module_misfits(bench: Bench, values: dict[str, Any]) -> list[str]:
    """Adapted modules that the base, a Llama by its config's `values`, has not, or of another size."""
    if values.get("model_type") != "llama" or bad_sizes(values):
        return []
    wanted, problems = llama_shapes(values), []
    for adapter in _adapters(bench):
        for module, pair in modules(adapter).items():
            shape = wanted.get(f"{module}.weight")
            if shape is None:
                problems.append(f"{adapter.label} adapts {module}, which the base has not")
            elif (found := _adapted(adapter, pair)) is not None and found != shape:
                problems.append(
                    f"{adapter.label} adapts {module} from {found[1]} to {found[0]} features, "
                    f"where the base has {shape[1]} and {shape[0]}"
                )
    return problems[:4]


def _adapted(adapter: Adapter, pair: dict[str, str]) -> tuple[int, int] | None:
    """(outputs, inputs) of the module that A [r, in] and B [out, r] adapt."""
    a, b = (adapter.header.tensors[pair[matrix]].shape if matrix in pair else () for matrix in "AB")
    return (b[0], a[1]) if len(a) == len(b) == 2 else None


def _adapters(bench: Bench) -> list[Adapter]:
    if bench.look.format == "peft":
        return [open_parts(bench.look.directory, "the adapter", bench.header)]
    if bench.look.format != "lora_moe":
        return []
    found: dict[Path, list[structure_moe.ExpertPlace]] = structure_moe.places(bench.look.path)
    return [open_parts(place.adapter, place.label, bench.header) for place in next(iter(found.values()), [])]
