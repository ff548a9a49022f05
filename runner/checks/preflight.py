"""How much memory and time a tier with models will take, from headers alone: asked before anything is loaded.

float32 on a CPU is assumed for weights that are cast (`dtype=float32`); where the models lie on another device nothing
is estimated.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from runner.checks.context import Bench
from runner.checks.detected import MERGED_MODEL
from runner.checks.headers import Header, read_header
from runner.checks.memory import available_bytes, resident_bytes
from runner.checks.structure import base_path
from runner.errors import ConfigError, RunnerError

# What torch and transformers take by themselves, and what is in use at once beside the weights at the very least.
IMPORTS = 450 << 20
# A sequence of the tier's length: logits of the model, of its reference, and of their comparison.
_LOGITS = 4
# Weights on top of a base: as read, saved, reloaded, with gradient, and the moments and copies of one optimizer step.
_ADDED = 7
# Seconds on two cores: for the imports, and for each 10⁹ parameters that run (tests/benchmarks/tier_time.py); an NPT
# model also writes continuations.
_IMPORT_SECONDS, _SECONDS, _NPT_SECONDS = 5, 170, 300
_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes: the peak that the process will reach, and what it can still take; None where that is not known.

    `seconds`: by a rule of thumb, on two cores.
    """

    peak: int
    seconds: float
    available: int | None
    resident: int

    @property
    def fits(self) -> bool:
        """Whether what is still to be taken is there."""
        return self.available is None or self.peak - self.resident <= self.available

    def fields(self) -> dict[str, object]:
        """For the result."""
        return {"estimate": self.words(), "estimated_peak_bytes": self.peak, "estimated_seconds": self.seconds}

    def words(self) -> str:
        """For the report."""
        there = "" if self.available is None else f", {_gigabytes(self.available + self.resident)} there"
        return f"about {_gigabytes(self.peak)} at the peak{there}; about {self.seconds:.0f} s on two cores"


def require_room(bench: Bench) -> Estimate | None:
    """The estimate for a tier with models; None where headers do not tell. Raises ConfigError where it does not fit."""
    from runner.evaluation.base_models import torch_device

    if torch_device(bench.config.device).type != "cpu":
        return None
    try:
        peak, seconds = estimate_peak(bench), estimate_seconds(bench)
    except (RunnerError, OSError, ValueError):
        # What cannot be read or found is for the checks to say.
        return None
    found = Estimate(peak=peak, seconds=seconds, available=available_bytes(), resident=resident_bytes() or 0)
    if not found.fits:
        assert found.available is not None
        raise ConfigError(
            f"tier={bench.config.tier.name} would need about {_gigabytes(peak)} of memory, and "
            f"{_gigabytes(found.available + found.resident)} are there; take tier=minimal, which holds one model at "
            "most and reloads none"
        )
    return found


def estimate_seconds(bench: Bench) -> float:
    """What the tier takes on two cores. Raises as `estimate_peak`."""
    tensors = [tensor for header in (*_base_headers(bench), *_own_headers(bench)) for tensor in header.tensors.values()]
    rate = _NPT_SECONDS if bench.family == "npt" else _SECONDS
    return _IMPORT_SECONDS + rate * sum(prod(tensor.shape) for tensor in tensors) / 1e9


def estimate_peak(bench: Bench) -> int:
    """The peak in bytes. Raises CheckpointError where the checkpoint or its base cannot be read from headers."""
    own, base = _own_headers(bench), _base_headers(bench)
    if base:
        # The base, once more under the reload, and where it is cast while it is read a mapped tensor of it.
        models = 2 * _cast(base, bench) + _largest(base) + _ADDED * _cast(own, bench)
    else:
        # Complete models: as stored, in memory, and reloaded; gradients come when the reload is gone.
        models = _stored(own) + 2 * _cast(own, bench)
    return IMPORTS + models + _LOGITS * 4 * bench.config.tier.sequence_length * _vocabulary([*base, *own])


def _own_headers(bench: Bench) -> list[Header]:
    return [bench.header(path) for path in bench.files] if bench.path is not None else []


def _base_headers(bench: Bench) -> list[Header]:
    if bench.family in ("gpt", "unknown") or (bench.path is not None and bench.look.format in ("hf", "npt_full")):
        return []
    if bench.path is None:
        if bench.config.base is None:
            return []
        root = Path(bench.config.base).expanduser()
    else:
        root = base_path(bench)
    indices = [
        path for path in root.iterdir() if path.name.endswith(".index.json") and MERGED_MODEL.fullmatch(path.name)
    ]
    if indices:
        names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        return [read_header(root / name) for name in names]
    return [read_header(path) for path in sorted(root.iterdir()) if MERGED_MODEL.fullmatch(path.name)]


def _stored(headers: list[Header]) -> int:
    return sum(header.nbytes for header in headers)


def _largest(headers: list[Header]) -> int:
    return max((tensor.nbytes for header in headers for tensor in header.tensors.values()), default=0)


def _cast(headers: list[Header], bench: Bench) -> int:
    """Bytes of the tensors in the dtype that is computed in."""
    itemsize = _ITEMSIZES.get(bench.config.dtype)
    tensors = [tensor for header in headers for tensor in header.tensors.values()]
    return sum(prod(t.shape) * (itemsize or t.itemsize) for t in tensors)


def _vocabulary(headers: list[Header]) -> int:
    """The rows of the embedding."""
    names = ("model.embed_tokens.weight", "embed.weight")
    return max((header.tensors[n].shape[0] for header in headers for n in names if n in header.tensors), default=0)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
