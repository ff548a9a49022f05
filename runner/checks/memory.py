"""Memory of this process and of the machine, in bytes."""

import resource
import sys
from pathlib import Path

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
    found = _kilobytes(_STATUS, "VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int | None:
    """What the process holds now; None where the system does not say."""
    return _kilobytes(_STATUS, "VmRSS")


def available_bytes() -> int | None:
    """What can still be taken without swapping or being killed; None where the system does not say."""
    found = [_kilobytes(_MEMINFO, "MemAvailable"), *(_room(limit, used) for limit, used in _LIMITS)]
    return min((value for value in found if value is not None), default=None)


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _room(limit: Path, used: Path) -> int | None:
    try:
        most, now = limit.read_text().strip(), used.read_text().strip()
    except OSError:
        return None
    return int(most) - int(now) if most.isdecimal() and now.isdecimal() else None
