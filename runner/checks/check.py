"""What a tier runs: checks that say pass, warning, fail or skipped, one after the other, whatever happens to one.

The checks of the machine and those of every checkpoint stand here, by the names that a tier lists; a family has others
of its own. Nothing heavy is imported until a check runs.

An *integrity* check (structure, loading, keys, round trip, gradients, control) decides the exit code. A *quality*
check (fidelity, layers, progressive, generation) gives a score, warns at most, and decides the readiness.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

from runner.checkpoints.checkpoint import MOST_SHOWN, Severity
from runner.checkpoints.reading import some
from runner.checks.context import BUILT, FAIL, PASS, SKIPPED, WARNING, Check, CheckContext, Outcome
from runner.checks.memory import peak_bytes, reset_peak
from runner.errors import ConfigError, RunnerError, did_you_mean, printable

log = logging.getLogger(__name__)


def passed(details: str, **data: Any) -> Outcome:
    """A pass without a score."""
    return Outcome(status=PASS, details=details, data=data)


def failed(details: str, recommendation: str | None = None, **data: Any) -> Outcome:
    """A failure, with what to do about it."""
    return Outcome(status=FAIL, details=details, recommendation=recommendation, data=data)


def skipped(details: str) -> Outcome:
    """A check that had nothing to look at, and why."""
    return Outcome(status=SKIPPED, details=details)


def run_checks(checks: Sequence[Check], context: CheckContext) -> list[dict[str, Any]]:
    """Every check's row of the result contract, in order; `checks` in which a needed one comes before its user.

    A row is {name, title, integrity, status, details, seconds, peak_bytes} and, where there are any, score,
    recommendation and data. `peak_bytes`: the process's peak of resident memory while the check ran. Raises ConfigError
    where a check finds the command itself wrong: that is no fault of the checkpoint.
    """
    rows: list[dict[str, Any]] = []
    # What failed or was skipped → what began it.
    obstacles: dict[str, list[str]] = {}
    for check in context.shows.track(checks, "checking", total=len(checks)):
        missing = list(dict.fromkeys(root for name in check.needs for root in obstacles.get(name, [])))
        missing += [row["name"] for row in rows if row["status"] == FAIL and row["name"] in check.unless_failed]
        if check.unless_explained:
            missing += [row["name"] for row in rows if row["status"] == FAIL and row["name"] not in missing]
        reset_peak()
        start = time.perf_counter()
        outcome = skipped(f"needs {', '.join(missing)}") if missing else _outcome(check, context)
        seconds = time.perf_counter() - start
        if outcome.status in (FAIL, SKIPPED):
            obstacles[check.name] = missing or [check.name]
        rows.append(_row(check, outcome, seconds))
    return rows


def _outcome(check: Check, context: CheckContext) -> Outcome:
    try:
        return check.run(context)
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


def late(place: str) -> Callable[[CheckContext], Outcome]:
    """`"checks.behaviour.save"`: `save` of runner/checks/behaviour.py, imported when it is called."""
    module, _, name = place.rpartition(".")

    def run(context: CheckContext) -> Outcome:
        outcome: Outcome = getattr(import_module(f"runner.{module}"), name)(context)
        return outcome

    return run


def check(name: str, title: str, place: str, *needs: str) -> Check:
    """An integrity check whose function lies at `place` (see `late`)."""
    return Check(name=name, title=title, run=late(place), needs=needs)


def part_check(name: str, title: str, *needs: str, advice: str | None = None, odd: str | None = None) -> Check:
    """The integrity check that lists what the format's reader found wrong with one part.

    `advice`: what to do about a fault that does not say so itself, `odd`: about what is only odd.
    """

    def run(context: CheckContext) -> Outcome:
        return part_outcome(context, name, advice, odd)

    return Check(name=name, title=title, run=run, needs=needs)


def part_outcome(context: CheckContext, part: str, advice: str | None = None, odd: str | None = None) -> Outcome:
    """What the format's reader says of a part: its problems, else what it holds."""
    reading = context.reading
    problems = [problem for problem in reading.problems if problem.part == part]
    faults = [problem for problem in problems if problem.severity is not Severity.ODD]
    if faults:
        own = next((problem.advice for problem in faults if problem.advice), advice)
        return failed(some([problem.text for problem in faults], MOST_SHOWN), own)
    if problems:
        return Outcome(status=WARNING, details="; ".join(problem.text for problem in problems), recommendation=odd)
    if part in reading.sound:
        return passed(reading.sound[part].text, **reading.sound[part].data)
    # Another problem stands in the way: said here where no other check of the tier says it.
    others = [problem for problem in reading.problems if problem.severity is Severity.REFUSED]
    listed = [problem.part for problem in others if problem.part in context.config.tier.checks]
    if context.format is not None and context.format.read is None:
        return skipped("the format's own code reads it as a whole")
    if listed:
        return skipped(f"needs {listed[0]}")
    return failed(others[0].text if others else f"the format says nothing of {part}")


def by_name(*checks: Check) -> dict[str, Check]:
    """The checks under their names."""
    assert len({check.name for check in checks}) == len(checks), "two checks of one name"
    return {check.name: check for check in checks}


# The checks of a checkpoint's parts: where one of them fails, what opens it as a whole would only fail again.
PARTS = ("files", "config", "layout", "experts", "gate", "adapters", "blocks", "keys", "shapes", "hidden_size",
         "skill_library")  # fmt: skip
# Of the machine: they need no checkpoint.
ENVIRONMENT = by_name(
    check("versions", "the libraries and their versions", "checks.environment.versions"),
    check("peft", "what the installed PEFT offers", "checks.environment.peft"),
    check("safetensors", "written and read back equal", "checks.environment.safetensors"),
    check("formats", "each layout is created and recognised", "checks.environment.formats", "safetensors"),
    check("writable", "outputs can be written, and there is room", "checks.environment.writable"),
)
# Of every checkpoint.
SHARED = by_name(
    check(BUILT, "built and saved by the code of training", "checks.structure.built"),
    check("files", "each weights file is whole", "checks.structure.files", BUILT),
    check("size", "as large as the shapes say, below the cap", "checks.structure.size", "files"),
    check("base", "the base that it names fits", "checks.structure.base",
          "keys", "shapes", "adapters", "layout", "hidden_size"),
    check("loading", "opened by its format, every key accounted for", "checks.structure.loading", *PARTS),
    Check(name="hashes", title="as it was written: manifest and CRCs", run=late("checks.structure.hashes"),
          needs=("files",), unless_explained=True),
    check("finite", "no NaN or Inf in the weights", "checks.structure.finite", "loading"),
    # A base that is not here yet, a hub's, is loaded all the same.
    Check(name="model", title="the model is built, strictly", run=late("checks.behaviour.build"),
          needs=("loading", "finite"), unless_failed=("base",)),
    check("forward", "finite logits, short and long", "checks.behaviour.forward", "model"),
    check("save", "saved again, it has the same names and shapes", "checks.behaviour.save", "model"),
    check("roundtrip", "reloaded, it gives the same logits", "checks.behaviour.roundtrip", "forward", "save", "router"),
    check("batch", "padded batches give the logits of each alone", "checks.behaviour.batch", "forward"),
    check("gradients", "they reach what should train", "checks.behaviour.gradients", "forward", "modes"),
    check("optimizer_step", "a step changes nothing else", "checks.behaviour.optimizer_step", "gradients"),
)  # fmt: skip


def checks_for(context: CheckContext, names: Iterable[str]) -> list[Check]:
    """The checks that `names` call for, in that order; those that the checkpoint's family has not are left out.

    Without a checkpoint only the machine is checked. Raises ConfigError for a name that no family has.
    """
    own = dict(ENVIRONMENT)
    if context.has_checkpoint:
        own |= SHARED
        own.update(context.family.checks() if context.family else {})
    known = {*ENVIRONMENT, *SHARED, *(name for family in context.families.values() for name in family.checks())}
    names = tuple(names)
    for name in names:
        if name not in known:
            raise ConfigError(f"tier.checks: {name!r} is unknown{did_you_mean(name, sorted(known))}")
    return [own[name] for name in names if name in own]
