"""What a tier runs: checks that say pass, warning, fail or skipped, one after the other, whatever happens to one.

An *integrity* check (structure, loading, keys, round trip, gradients, control) decides the exit code. A *quality*
check (fidelity, layers, progressive, generation) gives a score, warns at most, and decides the readiness.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.checks.context import Bench
from runner.checks.memory import peak_bytes, reset_peak
from runner.errors import ConfigError, RunnerError, printable

log = logging.getLogger(__name__)

PASS, WARNING, FAIL, SKIPPED = "pass", "warning", "fail", "skipped"
STATUSES = (PASS, WARNING, FAIL, SKIPPED)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check found, in one line of `details`.

    `score`: 0 to 1, of quality checks only. `data`: figures for machines (kept in `result.json`).
    """

    status: str
    details: str
    score: float | None = None
    recommendation: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert self.score is None or 0 <= self.score <= 1, self.score


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: `run` gives its outcome, or raises RunnerError, which is a failure with that message.

    `title` says in a few words what it looks at. `needs`: names of checks without whose success it means nothing; where
    one of them failed or was skipped it is skipped, so that a fault shows once. Those left out of the tier are no
    obstacle. `unless_failed`: the same, but such a check may have found nothing to look at. `unless_explained`: skipped
    where any check before it failed, which then says the same more clearly.
    """

    name: str
    title: str
    run: Callable[[Bench], Outcome]
    integrity: bool = True
    needs: tuple[str, ...] = ()
    unless_failed: tuple[str, ...] = ()
    unless_explained: bool = False


def passed(details: str, **data: Any) -> Outcome:
    """A pass without a score."""
    return Outcome(status=PASS, details=details, data=data)


def failed(details: str, recommendation: str | None = None, **data: Any) -> Outcome:
    """A failure, with what to do about it."""
    return Outcome(status=FAIL, details=details, recommendation=recommendation, data=data)


def skipped(details: str) -> Outcome:
    """A check that had nothing to look at, and why."""
    return Outcome(status=SKIPPED, details=details)


def run_checks(checks: Sequence[Check], bench: Bench) -> list[dict[str, Any]]:
    """Every check's row of the result contract, in order; `checks` in which a needed one comes before its user.

    A row is {name, title, integrity, status, details, seconds, peak_bytes} and, where there are any, score,
    recommendation and data. `peak_bytes`: the process's peak of resident memory while the check ran. Raises ConfigError
    where a check finds the command itself wrong: that is no fault of the checkpoint.
    """
    rows: list[dict[str, Any]] = []
    # What failed or was skipped → what began it.
    obstacles: dict[str, list[str]] = {}
    for check in _shown(checks, bench):
        missing = list(dict.fromkeys(root for name in check.needs for root in obstacles.get(name, [])))
        missing += [row["name"] for row in rows if row["status"] == FAIL and row["name"] in check.unless_failed]
        if check.unless_explained:
            missing += [row["name"] for row in rows if row["status"] == FAIL and row["name"] not in missing]
        reset_peak()
        start = time.perf_counter()
        outcome = skipped(f"needs {', '.join(missing)}") if missing else _outcome(check, bench)
        seconds = time.perf_counter() - start
        if outcome.status in (FAIL, SKIPPED):
            obstacles[check.name] = missing or [check.name]
        rows.append(_row(check, outcome, seconds))
    return rows


def _shown(checks: Sequence[Check], bench: Bench) -> Iterator[Check]:
    return bench.context.track(checks, "checking", total=len(checks))


def _outcome(check: Check, bench: Bench) -> Outcome:
    try:
        return check.run(bench)
    except ConfigError:
        raise
    except RunnerError as error:
        return failed(str(error))
    except Exception as error:
        # One check's defect must not hide what the others find.
        log.exception("check %s: internal error", check.name)
        return failed(f"internal error ({type(error).__name__}: {error})")


def _row(check: Check, outcome: Outcome, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": check.name,
        "title": check.title,
        "integrity": check.integrity,
        "status": outcome.status,
        "score": outcome.score,
        "details": printable(outcome.details),
        "recommendation": None if outcome.recommendation is None else printable(outcome.recommendation),
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "data": dict(outcome.data),
    }
    return {name: value for name, value in row.items() if value is not None and value != {}}
