"""Uniting skill libraries: numbers continue from one source to the next, names that collide are a conflict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.errors import CheckpointError
from runner.families.lora_moe.state import SKILLS, Skills, read_skills
from runner.merge.execute import TensorFile
from runner.merge.lazy_tensor import Piece, from_tensor, mean
from runner.merge.spec import MergeSpec
from runner.merging.files import OpenedSource

SkillId = int | str
_Entry = tuple[OpenedSource, SkillId, Piece]  # a skill of one source, its id there, its embedding


@dataclass(frozen=True, kw_only=True)
class United:
    """The merged library; `file` is None where no source has one. `sources`: skill id → {path, skill} it was."""

    file: TensorFile | None
    sources: Mapping[str, Any]
    findings: tuple[str, ...]
    conflicts: tuple[dict[str, Any], ...]


def unite_skills(spec: MergeSpec, sources: Sequence[OpenedSource]) -> United:
    """Every skill of every source. Raises CheckpointError where sizes differ, or names collide under error."""
    having = [source for source in sources if _skills(source) is not None]
    _check_sizes(having)
    found: dict[SkillId, list[_Entry]] = {}
    findings, number = [], 0
    for source in having:
        kept, said = _kept(source)
        findings += said
        offset = number
        for own, piece in kept.items():
            new = own + offset if isinstance(own, int) else own
            number = max(number, new + 1) if isinstance(new, int) else number
            found.setdefault(new, []).append((source, own, piece))
    findings += [f"{source.path}: has no {SKILLS}" for source in sources if having and source not in having]
    library: dict[SkillId, Piece] = {}
    origins: dict[str, Any] = {}
    conflicts = []
    for name, entries in found.items():
        chosen, how = _resolved(spec.on_conflict, name, entries)
        library[name] = mean([piece for _, _, piece in chosen]) if len(chosen) > 1 else chosen[0][2]
        where = [{"path": str(source.path), "skill": own} for source, own, _ in chosen]
        origins[str(name)] = where[0] if len(where) == 1 else where
        if len(entries) > 1:
            paths = [str(source.path) for source, _, _ in entries]
            conflicts.append({"skill": name, "sources": paths, "resolution": how})
            findings.append(f"skill {name} is in {' and '.join(paths)}: {how}")
    file = TensorFile(name=SKILLS, value=library) if having else None
    return United(file=file, sources=origins, findings=tuple(findings), conflicts=tuple(conflicts))


def _skills(source: OpenedSource) -> Skills | None:
    found: Skills | None = source.checkpoint.details.skills
    return found


def _check_sizes(having: Sequence[OpenedSource]) -> None:
    first: tuple[OpenedSource, int] | None = None
    for source in having:
        skills = _skills(source)
        size = skills.size if skills else None
        if size is None:
            continue
        first = first or (source, size)
        if size != first[1]:
            raise CheckpointError(
                f"{source.path}: its skills are embeddings of size {size}, those of {first[0].path} of {first[1]}; "
                "they cannot be compared in one library"
            )


def _kept(source: OpenedSource) -> tuple[dict[SkillId, Piece], list[str]]:
    """The skills to take, renumbered from 0 where experts were chosen and each expert has its skill by number."""
    skills = _skills(source)
    assert skills is not None
    read = {name: from_tensor(t, f"{skills.file}: skill {name}") for name, t in read_skills(skills).items()}
    chosen = source.spec.experts
    if chosen is None:
        return read, []
    if set(read) == set(range(source.checkpoint.details.num_experts)):
        return {number: read[index] for number, index in enumerate(chosen)}, []
    return read, [f"{source.path}: its skills do not name its experts one by one, so all of them are taken"]


def _resolved(on_conflict: str, name: SkillId, entries: Sequence[_Entry]) -> tuple[list[_Entry], str]:
    """The entries that make the skill, and how that was decided."""
    if len(entries) == 1:
        return list(entries), ""
    paths = " and ".join(str(source.path) for source, _, _ in entries)
    rule = f"(merge.on_conflict={on_conflict})"
    if on_conflict == "error":
        raise CheckpointError(f"skill {name} is in {paths}; rename one of them, or choose merge.on_conflict=first")
    if on_conflict == "average":
        return list(entries), f"the mean of their embeddings {rule}"
    if on_conflict == "newest":
        unknown = next((source for source, _, _ in entries if source.step is None), None)
        if unknown:
            raise CheckpointError(
                f"{unknown.path}: reports no step, so merge.on_conflict=newest cannot compare its skill {name} with "
                "others; choose first or last"
            )
        chosen = max(entries, key=lambda entry: entry[0].step or 0)
    else:
        chosen = entries[0 if on_conflict == "first" else -1]
    return [chosen], f"that of {chosen[0].path} is taken {rule}"
