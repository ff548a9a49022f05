"""Which format a checkpoint has, decided from names and shapes alone."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Protocol

import yaml

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.runs import step_in_name
from runner.config import AUTO, group_files
from runner.errors import CheckpointError, ConfigError

_SUBDIRECTORIES = 200


class HasFormats(Protocol):
    """What detection asks a family for."""

    def formats(self) -> tuple[CheckpointFormat, ...]:
        """The formats that its checkpoints have."""


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


def formats(module: str | None = None) -> dict[str, CheckpointFormat]:
    """Every format by name: those of the families in conf/family/, and those of `module`. Raises ConfigError."""
    found = [each for family in families().values() for each in family.formats()]
    return {each.name: each for each in (*found, *(formats_of(module) if module else ()))}


def formats_of(module: str) -> tuple[CheckpointFormat, ...]:
    """The formats that a module exports as FORMATS. Raises ConfigError."""
    try:
        return tuple(import_module(module).FORMATS)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"format.module={module}: is no module with FORMATS: {error}") from error


def open_checkpoint(path: Path, format_name: str = "auto", module: str | None = None) -> Checkpoint:
    """The checkpoint at `path`, of the one format that matches or of the one that `format_name` forces.

    A directory that holds exactly one checkpoint is that checkpoint. Raises CheckpointError where no format or
    several match, with what was seen, and for a checkpoint that its format refuses.
    """
    known = formats(module)
    if format_name not in ("auto", *known):
        raise ConfigError(f"format={format_name} is unknown; formats are {', '.join(known)}")
    listing = Listing.of(path)
    if format_name != "auto":
        return _finished(known[format_name].open(listing))
    found, errors = _matching(listing, known)
    if not found:
        inside = [entry for entry in _directories(listing) if _matching(entry, known)[0]]
        if len(inside) == 1:
            return open_checkpoint(inside[0].path, format_name, module)
        if errors:
            raise errors[0]
        raise CheckpointError(_nothing_found(listing, known, inside))
    if len(found) > 1:
        shown = "; ".join(f"{name} ({evidence})" for name, evidence in found.items())
        raise CheckpointError(f"{path}: could be several formats: {shown}; choose one with format=")
    return _finished(known[next(iter(found))].open(listing))


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
    return found, errors


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


def _finished(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what every format has in common: the step in its name, and dtypes that are not float32."""
    findings = list(checkpoint.findings)
    dtypes = sorted(
        {str(info.dtype).removeprefix("torch.") for info in checkpoint.weights.infos.values()} - {"float32"}
    )
    if dtypes:
        findings.append(f"weights are stored as {', '.join(dtypes)}")
    named = step_in_name(checkpoint.path.name)
    if named is None and not checkpoint.path.is_dir():
        named = step_in_name(checkpoint.path.parent.name)
    if named is not None and checkpoint.step not in (None, named):
        findings.append(f"the name says step {named}, the checkpoint's own state says {checkpoint.step}")
    step = named if checkpoint.step is None else checkpoint.step
    return replace(checkpoint, step=step, findings=tuple(findings))
