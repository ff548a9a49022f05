"""Which format a checkpoint has, decided from names and shapes alone."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Protocol

import yaml

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.reading import read, weight_names
from runner.checkpoints.runs import step_in_name
from runner.config import AUTO, group_files
from runner.errors import CheckpointError, ConfigError

_SUBDIRECTORIES = 200


class HasFormats(Protocol):
    """What detection asks a family for."""

    def formats(self) -> tuple[CheckpointFormat, ...]:
        """The formats that its checkpoints have."""

    def likely_formats(self, listing: Listing) -> tuple[CheckpointFormat, ...]:
        """Those of them that could match what lies there."""


def families() -> dict[str, HasFormats]:
    """The families that conf/family/*.yaml name, those of --config-dir included, each with its YAML's settings.

    Raises ConfigError for a `_target_` that makes none.
    """
    return {name: _family(file) for name, file in group_files("family").items() if name != AUTO}


@lru_cache(maxsize=32)
def _family(file: Path) -> HasFormats:
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    module, _, name = str(settings.pop("_target_", "")).rpartition(".")
    try:
        family: HasFormats = getattr(import_module(module), name)(**settings)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: its _target_ makes no family: {error}") from error
    return family


def formats(module: str | None = None, family: HasFormats | None = None) -> dict[str, CheckpointFormat]:
    """Every format by name: those of the families in conf/family/, and those of `module`. Raises ConfigError.

    `family`: one of them with the settings of the command line, which its formats follow.
    """
    found = [each for known in families().values() for each in known.formats()]
    own = () if family is None else family.formats()
    return {each.name: each for each in (*found, *own, *(formats_of(module) if module else ()))}


def _likely(listing: Listing, module: str | None, family: HasFormats | None) -> dict[str, CheckpointFormat]:
    """As `formats`, without those that cannot match."""
    found = [each for known in families().values() for each in known.likely_formats(listing)]
    own = () if family is None else family.likely_formats(listing)
    return {each.name: each for each in (*found, *own, *(formats_of(module) if module else ()))}


def format_of(checkpoint: Checkpoint, module: str | None = None) -> CheckpointFormat:
    """The format of an opened checkpoint."""
    own = families().get(checkpoint.family)
    known = {each.name: each for each in (own.formats() if own else ())}
    return known.get(checkpoint.format) or formats(module)[checkpoint.format]


def formats_of(module: str) -> tuple[CheckpointFormat, ...]:
    """The formats that a module exports as FORMATS. Raises ConfigError."""
    try:
        return tuple(import_module(module).FORMATS)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"format.module={module}: is no module with FORMATS: {error}") from error


def open_checkpoint(
    path: Path, format_name: str = "auto", module: str | None = None, family: HasFormats | None = None
) -> Checkpoint:
    """The checkpoint at `path`, of the one format that matches or of the one that `format_name` forces.

    `family`: as `formats`. A directory that holds exactly one checkpoint is that checkpoint. Raises CheckpointError
    where no format or several match, with what was seen, and for a checkpoint that its format refuses.
    """
    listing = Listing.of(path)
    known = _likely(listing, module, family)
    if format_name == "auto" and (found := _matching(listing, known)[0]):
        return finished(read(listing, known[_only(found, path)]).open())
    if format_name not in known:
        known = _known(format_name, module, family)
    if format_name != "auto":
        return finished(read(listing, known[format_name]).open())
    found, errors = _matching(listing, known)
    if not found:
        inside = [entry for entry in _directories(listing) if _matching(entry, known)[0]]
        if len(inside) == 1:
            return open_checkpoint(inside[0].path, format_name, module, family)
        if errors:
            raise errors[0]
        raise CheckpointError(_nothing_found(listing, known, inside))
    return finished(read(listing, known[_only(found, path)]).open())


def recognise(
    path: Path, format_name: str = "auto", module: str | None = None, family: HasFormats | None = None
) -> tuple[Listing, CheckpointFormat | None]:
    """What lies at `path`, however damaged, and the format that it shows itself to be; None where nothing does.

    A directory that holds exactly one checkpoint is that checkpoint. Raises CheckpointError where nothing is there that
    could be a checkpoint, or several formats match.
    """
    known = _known(format_name, module, family)
    listing = Listing.of(path)
    if format_name != "auto":
        return listing, known[format_name]
    name = _shown(listing, known)
    if name is None:
        inside = [(entry, found) for entry in _directories(listing) if (found := _shown(entry, known)) is not None]
        if len(inside) == 1:
            return inside[0][0], known[inside[0][1]]
        if not weight_names(listing):
            name = _strongest({each.name: each.remains(listing) for each in known.values() if each.remains})
            if name is None:
                shown = ", ".join(listing.entries[:8]) or "nothing"
                raise CheckpointError(f"{path}: holds no checkpoint that is known; it holds {shown}")
    return listing, known[name] if name else None


def _known(format_name: str, module: str | None, family: HasFormats | None) -> dict[str, CheckpointFormat]:
    """Every format by name. Raises ConfigError where `format_name` is none of them."""
    known = formats(module, family)
    if format_name not in ("auto", *known):
        raise ConfigError(f"format={format_name} is unknown; formats are {', '.join(known)}")
    return known


def several(path: Path) -> list[Path]:
    """The checkpoints in a directory that is none itself, where it holds more than one; else []."""
    if not path.is_dir():
        return []
    known, listing = formats(), Listing.of(path)
    if _shown(listing, known) is not None:
        return []
    inside = [entry.path for entry in _directories(listing) if _shown(entry, known) is not None]
    return inside if len(inside) > 1 else []


def _shown(listing: Listing, known: Mapping[str, CheckpointFormat]) -> str | None:
    """The name of the format that matches, else of the first that a damaged checkpoint resembles."""
    if found := _matching(listing, known)[0]:
        return _only(found, listing.path)
    marks = {each.name: each.resembles(listing) for each in known.values() if each.resembles}
    return _strongest(marks)


def _strongest(marks: Mapping[str, int]) -> str | None:
    """The name with the highest mark above 0."""
    name = max(marks, key=lambda name: marks[name], default=None)
    return name if name is not None and marks[name] > 0 else None


def _only(found: Mapping[str, str], path: Path) -> str:
    if len(found) > 1:
        shown = "; ".join(f"{name} ({evidence})" for name, evidence in found.items())
        raise CheckpointError(f"{path}: could be several formats: {shown}; choose one with format=")
    return next(iter(found))


def _matching(listing: Listing, known: Mapping[str, CheckpointFormat]) -> tuple[dict[str, str], list[CheckpointError]]:
    """The evidence of every format that matches, and what stopped the others from looking."""
    found, errors = {}, []
    for name, each in known.items():
        try:
            evidence = each.matches(listing)
        except CheckpointError as error:
            errors.append(error)
            continue
        if evidence is not None:
            found[name] = evidence
    deciding = {name: evidence for name, evidence in found.items() if known[name].decides}
    return deciding or found, errors


def _directories(listing: Listing) -> list[Listing]:
    if not listing.path.is_dir():
        return []
    paths = [path for name in listing.entries if not name.startswith(".") and (path := listing.path / name).is_dir()]
    return [Listing.of(path) for path in paths[:_SUBDIRECTORIES]]


def _nothing_found(listing: Listing, known: Mapping[str, CheckpointFormat], inside: list[Listing]) -> str:
    if inside:
        return f"{listing.path}: holds several checkpoints: {', '.join(each.path.name for each in inside)}; name one"
    if not listing.entries:
        return f"{listing.path}: the directory is empty"
    if listing.path.is_dir():
        seen = "it holds " + ", ".join(listing.entries[:8]) + (", …" if len(listing.entries) > 8 else "")
    else:
        names = list(listing.weights(listing.path.name).infos)
        seen = f"its keys are {', '.join(names[:4])}{', …' if len(names) > 4 else ''}" if names else "it has no tensors"
    return f"{listing.path}: No NPT layers found, nor any other known format ({', '.join(known)}); {seen}"


def finished(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what every format has in common: the step in its name, and dtypes that are not float32."""
    findings = list(checkpoint.findings)
    dtypes = sorted({info.dtype_name for info in checkpoint.weights.infos.values()} - {"float32"})
    if dtypes:
        findings.append(f"weights are stored as {', '.join(dtypes)}")
    named = step_in_name(checkpoint.path.name)
    if named is None and not checkpoint.path.is_dir():
        named = step_in_name(checkpoint.path.parent.name)
    if named is not None and checkpoint.step not in (None, named):
        findings.append(f"the name says step {named}, the checkpoint's own state says {checkpoint.step}")
    step = named if checkpoint.step is None else checkpoint.step
    return replace(checkpoint, step=step, findings=tuple(findings))
