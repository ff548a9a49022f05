"""Whose checkpoint a state dict is: by the hash of its script, the script's features, or names and shapes alone.

What is the same for several records, and is not told apart by anything in the file, is decided by who asks
(`family.record`) or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from runner.errors import ConfigError, did_you_mean
from runner.families.gpt import script as scripts
from runner.families.gpt.layouts import depth_of, is_padding, key_matches, nearest, solved
from runner.families.gpt.records import LARGE, MEDIUM, RECORDS, Record
from runner.files.tensors import TensorInfo

How = Literal["told", "hash", "metadata", "features", "keys"]
# What two records may differ in without computing another thing of one document within the window.
_MASKS = (
    "name", "new", "documents", "window", "windows", "last_window", "long", "pattern", "least_depth", "depth",
    "head_rows",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The record and how it was found; `problem`: why nothing may be opened; `candidates`: which could be meant."""

    record: Record
    how: How = "keys"
    problem: str | None = None
    findings: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


def named(name: str) -> Record:
    """The record of that name, or of the only name that begins so. Raises ConfigError."""
    found = [each for each in RECORDS.values() if each.name == name or each.name.startswith(name)]
    exact = RECORDS.get(name)
    if exact is not None or len(found) == 1:
        return exact or found[0]
    if found:
        raise ConfigError(f"family.record={name}: could be {', '.join(each.name for each in found)}")
    raise ConfigError(
        f"family.record={name} is no record{did_you_mean(name, list(RECORDS))}; README.md of the family lists them"
    )


def identify(
    infos: Mapping[str, TensorInfo],
    script: scripts.Script,
    *,
    told: Record | None,
    noted: str | None,
    is_tied: Callable[[], bool],
) -> Decision:
    """The record of the tensors `infos`.

    `told`: by the user; `noted`: in metadata of our own. `is_tied`: whether head and embedding are equal, for which
    both are read.
    """
    code = script.record
    exact = key_matches(infos)
    if not exact:
        return Decision(record=told or code or nearest(infos)[0])
    shapes = {name: info.shape for name, info in infos.items()}
    wrong = {
        each.name: solved(
            each, depth_of(infos, each), shapes, {} if script.head_dim is None else {"hd": script.head_dim}
        )
        for each in exact
    }
    pool = [each for each in exact if not wrong[each.name]]
    if not pool:
        likely = [each for each in (told, code) if each in exact]
        return Decision(record=(likely or sorted(exact, key=lambda each: len(wrong[each.name])))[0])
    names = ", ".join(each.name for each in pool)
    if told is not None:
        if told not in pool:
            return Decision(record=told, problem=f"family.record={told.name}: its tensors are those of {names}")
        against = scripts.contradictions(script, told)
        others = [each for each in pool if each != told and script.whole and not scripts.contradictions(script, each)]
        other = code or (others[0] if against and len(others) == 1 else told)
        if other != told:
            return Decision(record=told, problem=f"family.record={told.name}, but its script is that of {other.name}")
        said = (f"its script is not that of {told.name}: {'; '.join(against)}",) if against else ()
        return Decision(record=told, how="told", findings=said)
    if code is not None:
        if code not in pool:
            return Decision(
                record=code, problem=f"its script is that of {code.name}, but its tensors are those of {names}"
            )
        return Decision(record=code, how="hash")
    count = math.prod(shapes.get("scalars", (0,)))
    pool = [each for each in pool if is_padding(each, depth_of(infos, each), count)] or pool
    found = _without_hash(pool, script, is_tied)
    if (found.problem or found.candidates) and (own := RECORDS.get(noted or "")) in pool and own is not None:
        return Decision(record=own, how="metadata")
    return found


def _without_hash(pool: Sequence[Record], script: scripts.Script, is_tied: Callable[[], bool]) -> Decision:
    """What a script that is not known, and tied weights, leave of records with these tensors."""
    if script.unknown:
        return _unknown(pool, f"its script, {script.unknown}, is published, but is no record's that is known here")
    if len({each.tied for each in pool}) > 1:
        tied = is_tied()
        pool = [each for each in pool if each.tied == tied]
    return _by_features(pool, script)


def _by_features(pool: Sequence[Record], script: scripts.Script) -> Decision:
    """What the script's features leave of records with these tensors."""
    against = {each.name: scripts.contradictions(script, each) for each in pool}
    left = [each for each in pool if not against[each.name]]
    if not left:
        reasons = "; ".join(f"{name}: {', '.join(wrong)}" for name, wrong in against.items())
        return _unknown(pool, f"its script contradicts what its tensors could be ({reasons})")
    if {each.name for each in left} == {MEDIUM, LARGE}:
        return _medium(left, script)
    how: How = "features" if script.whole or len(left) < len(pool) else "keys"
    if len(left) == 1:
        return Decision(record=left[0], how=how)
    if len({_function(each) for each in left}) == 1:
        chosen = next((each for each in left if each.documents), left[0])
        others = ", ".join(each.name for each in left if each != chosen)
        said = f"{others} has the same tensors and computes the same of one document within its window"
        return Decision(record=chosen, how=how, findings=(said,))
    return _unknown(left, "nothing in it tells them apart")


def _medium(left: Sequence[Record], script: scripts.Script) -> Decision:
    """Medium or the large model: they differ in the size of a head alone."""
    medium, large = RECORDS[MEDIUM], RECORDS[LARGE]
    if script.heads_from_width:
        return Decision(record=large, how="features")
    if script.head_dim is not None or script.num_heads is not None:
        return Decision(record=medium, how="features" if script.whole else "keys")
    return Decision(record=medium, candidates=tuple(each.name for each in (medium, large)))


def _unknown(pool: Sequence[Record], why: str) -> Decision:
    """No decision, with the candidates and what they differ in."""
    return Decision(
        record=pool[0],
        problem=f"could be {'; '.join(map(str, _differences(pool)))}: {why}; "
        f"format=gpt_record family.record={pool[0].name} decides",
        candidates=tuple(each.name for each in pool),
    )


def _differences(pool: Sequence[Record]) -> list[str]:
    """Each record with its pieces that are not the same in all."""
    differing = [
        each.name
        for each in fields(Record)
        if each.name not in (*_MASKS, "keys") and len({repr(getattr(record, each.name)) for record in pool}) > 1
    ]
    found = []
    for record in pool:
        pieces = [f"{name.replace('_', ' ')} {_shown(getattr(record, name))}" for name in differing]
        found.append(f"{record.name} ({', '.join(pieces)})" if pieces else record.name)
    return found


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{each[1] if isinstance(each, tuple) else each}→{into}" for into, each in value.items())
    return {True: "yes", False: "no", "": "none"}.get(value, str(value))


def _function(record: Record) -> str:
    """All of the record but its name and its masks."""
    return repr([getattr(record, each.name) for each in fields(Record) if each.name not in _MASKS])
