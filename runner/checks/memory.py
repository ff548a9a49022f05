"""Memory of this process and of the machine, in bytes; and how much memory and time a tier with models will take.

The estimate is from headers alone: it is asked before anything is loaded. float32 on a CPU is assumed for weights that
are cast (`dtype=float32`); where the models lie on another device nothing is estimated.
"""

import re
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoints.detect import open_checkpoint
from runner.checks.context import CheckContext
from runner.errors import ConfigError, RunnerError
from runner.files.tensors import TensorInfo

_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
# The limit of a container, where there is one (cgroup v2, then v1), and what it uses of it.
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def reset_peak() -> None:
    """Let the peak start from what the process holds now. On other systems than Linux it stays that of the process."""
    try:
        _REFS.write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The most resident memory since `reset_peak`, or since the process began where that cannot be reset."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _kilobytes(_STATUS, "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int | None:
    """What the process holds now; None where the system does not say."""
    return _kilobytes(_STATUS, "VmRSS")


def available_bytes() -> int | None:
    """What can still be taken without swapping or being killed; None where the system does not say."""
    found = [_kilobytes(_MEMINFO, "MemAvailable"), *(_room(limit, used) for limit, used in _LIMITS)]
    return min((value for value in found if value is not None), default=None)


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s*(\d+)", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _room(limit: Path, used: Path) -> int | None:
    try:
        most, now = limit.read_text().strip(), used.read_text().strip()
    except OSError:
        return None
    return int(most) - int(now) if most.isdecimal() and now.isdecimal() else None


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


def require_room(context: CheckContext) -> Estimate | None:
    """The estimate for a tier with models; None where headers do not tell. Raises ConfigError where it does not fit."""
    from runner.evaluation.base_models import torch_device

    if torch_device(context.config.device).type != "cpu":
        return None
    try:
        peak, seconds = estimate_peak(context), estimate_seconds(context)
    except (RunnerError, OSError, ValueError):
        # What cannot be read or found is for the checks to say.
        return None
    found = Estimate(peak=peak, seconds=seconds, available=available_bytes(), resident=resident_bytes() or 0)
    if not found.fits:
        assert found.available is not None
        raise ConfigError(
            f"tier={context.config.tier.name} would need about {_gigabytes(peak)} of memory, and "
            f"{_gigabytes(found.available + found.resident)} are there; take tier=minimal, which holds one model at "
            "most and reloads none"
        )
    return found


def estimate_seconds(context: CheckContext) -> float:
    """What the tier takes on two cores. Raises as `estimate_peak`."""
    rate = _NPT_SECONDS if context.family_name == "npt" else _SECONDS
    return _IMPORT_SECONDS + rate * sum(info.numel for info in (*_base_tensors(context), *_own_tensors(context))) / 1e9


def estimate_peak(context: CheckContext) -> int:
    """The peak in bytes. Raises CheckpointError where the checkpoint or its base cannot be read from headers."""
    own, base = _own_tensors(context), _base_tensors(context)
    if base:
        # The base, once more under the reload, and where it is cast while it is read a mapped tensor of it.
        largest = max(info.nbytes for info in base)
        models = 2 * _cast(base, context) + largest + _ADDED * _cast(own, context)
    else:
        # Complete models: as stored, in memory, and reloaded; gradients come when the reload is gone.
        models = sum(info.nbytes for info in own) + 2 * _cast(own, context)
    return IMPORTS + models + _LOGITS * 4 * context.config.tier.sequence_length * _vocabulary([*base, *own])


def _own_tensors(context: CheckContext) -> list[TensorInfo]:
    sources = () if context.path is None else context.reading.sources
    return [info for source in sources for info in source.infos.values()]


def _base_tensors(context: CheckContext) -> list[TensorInfo]:
    if context.path is None:
        if context.config.base is None:
            return []
        root = Path(context.config.base).expanduser()
    else:
        checkpoint = context.reading.checkpoint
        if context.family is None or checkpoint is None or not context.family.needs_base(checkpoint):
            return []
        root = context.base_path()
    return list(open_checkpoint(root, "hf").weights.infos.values())


def _cast(tensors: Iterable[TensorInfo], context: CheckContext) -> int:
    """Bytes of the tensors in the dtype that is computed in."""
    itemsize = _ITEMSIZES.get(context.config.dtype)
    return sum(info.numel * (itemsize or info.itemsize) for info in tensors)


def _vocabulary(tensors: Iterable[TensorInfo]) -> int:
    """The rows of the embedding."""
    names = ("model.embed_tokens.weight", "embed.weight")
    return max((info.shape[0] for info in tensors if info.name in names), default=0)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
