"""From an opened adapter to tensors: whether it fits a base model, its matrices, several files as one source."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from runner.errors import CheckpointError, ModelError
from runner.families.lora.adapter import AdapterDetails, key
from runner.files.tensors import TensorInfo, TensorSource, is_finite

# Adapters by module: A [r, in], B [out, r], and the scaling of B A x.
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]


def check_fit(adapter: AdapterDetails, linears: Mapping[str, tuple[int, int]], base: object) -> None:
    """Check an adapter against `linears`, the base's linear modules by name with (inputs, outputs).

    Raises ModelError for modules that the base has not or has in other sizes, CheckpointError for modules of the
    base that the adapter's config names but its file leaves out.
    """
    path = adapter.weights_file
    absent = sorted(module.name for module in adapter.modules if module.name not in linears)
    if absent:
        raise ModelError(
            f"{path}: adapts {', '.join(absent)}, which the base {base} has not; give its own base as base="
        )
    for module in adapter.modules:
        sizes = (module.in_features, module.out_features)
        if sizes != linears[module.name]:
            raise ModelError(
                f"{path}: {module.name} is adapted from {sizes[0]} to {sizes[1]} features, but the base {base} has "
                f"{linears[module.name][0]} and {linears[module.name][1]}; give its own base as base="
            )
    if adapter.settings.targets is not None:
        wanted = {name for name in linears if adapter.settings.target_of(name) is not None}
        absent = sorted(wanted - {module.name for module in adapter.modules})
        if absent:
            missing = [key(name, matrix) for name in absent for matrix in "AB"]
            raise CheckpointError(f"{path}: lacks modules that it adapts in the base {base}: missing keys {missing}")


def read_factors(
    weights: TensorSource, adapter: AdapterDetails, *, prefix: str = "", dtype: torch.dtype, device: torch.device
) -> Factors:
    """The adapter's matrices by module; `prefix` is what `weights` puts before its keys. Raises as `read_finite`."""

    def read(name: str) -> torch.Tensor:
        return read_finite(weights, prefix + name, f"{adapter.weights_file}: {name}", dtype, device)

    return {module.name: (read(module.key_a), read(module.key_b), module.scaling) for module in adapter.modules}


def read_finite(weights: TensorSource, name: str, where: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One tensor as a copy of its own; `where` names it in messages.

    Raises CheckpointError for NaN, Inf, and values that `dtype` cannot hold.
    """
    stored = weights.read(name)
    tensor = stored.to(device=device, dtype=dtype, copy=True)
    if not is_finite(tensor):
        what = "holds NaN or Inf" if not is_finite(stored) else f"holds a value that overflows {dtype}"
        raise CheckpointError(f"{where} {what}")
    return tensor


def compose(path: Path, parts: Iterable[tuple[str, TensorSource]]) -> TensorSource:
    """Several files as one source: each part's names with its prefix before them."""
    held = {prefix + name: (source, name) for prefix, source in parts for name in source.infos}
    infos = {
        name: TensorInfo(name=name, shape=source.infos[own].shape, dtype=source.infos[own].dtype)
        for name, (source, own) in held.items()
    }

    def read(name: str) -> torch.Tensor:
        source, own = held[name]
        return source.read(own)

    files = tuple(dict.fromkeys(file for source, _ in held.values() for file in source.files))
    return TensorSource(path=path, files=files, infos=infos, reader=read)
