"""Experiments with knowledge transfer, as a YAML file lists them.

experiments:
  - name: paris
    source: The capital of France is       # the modulation is taken here,
    answer: " Paris"                       # at the first token of this answer, or without one at the last of source
    target: The capital of Germany is
    target_answer: " Berlin"
    mode: replace                          # blend with alpha, add with strength
    positions: last                        # last_n: the last 3, each from its counterpart; avg_last: mean of 5
    by_layer: true                         # each NPT layer alone, too
  - name: with and without
    source: Paris, the city of light, is
    without: It is                         # ΔW(source) - ΔW(without), written in for good and taken back
    target: The capital of France is
    track: [" Paris"]
    strengths: [0.01, 0.05, 0.1, 0.5, 1.0]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from runner.errors import ConfigError, did_you_mean
from runner.families.npt.modulation import Modulation
from runner.families.npt.tool.session import Tool
from runner.families.npt.transfer import check_ids, combine, extract
from runner.families.npt.transfer_injection import MODES, How, Reader, inject
from runner.families.npt.transfer_measures import controls
from runner.families.npt.transfer_permanent import Permanent
from runner.results import JsonObject

_POSITIONS = ("last", "last_n", "avg_last")
_LAST_N, _AVERAGED = 3, 5
_STRENGTHS = (0.01, 0.05, 0.1, 0.5, 1.0)
_TOP, _TINY = 3, 1e-10


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One entry of the file. Raises ConfigError for values that cannot be."""

    name: str
    source: str
    target: str
    answer: str | None = None
    target_answer: str | None = None
    mode: str = "replace"
    alpha: float | None = None
    strength: float = 1.0
    positions: str = "last"
    by_layer: bool = False
    without: str | None = None
    track: tuple[str, ...] = ()
    strengths: tuple[float, ...] = field(default=_STRENGTHS)

    def __post_init__(self) -> None:
        for key in ("name", "source", "target", "answer", "target_answer", "without"):
            value = getattr(self, key)
            if not (isinstance(value, str) and value) and not (
                value is None and key not in ("name", "source", "target")
            ):
                raise ConfigError(f"experiment {self.name!r}: {key} is {value!r}: give a text")
        if self.positions not in _POSITIONS:
            raise ConfigError(f"experiment {self.name!r}: positions {self.positions}: choose {', '.join(_POSITIONS)}")
        if self.mode not in MODES:
            raise ConfigError(f"experiment {self.name!r}: mode {self.mode}: choose {', '.join(MODES)}")
        for key in ("alpha", "strength"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None) if key == "alpha" else float)):
                raise ConfigError(f"experiment {self.name!r}: {key} is {value!r}: give a number")
        if not isinstance(self.by_layer, bool):
            raise ConfigError(f"experiment {self.name!r}: by_layer is {self.by_layer!r}: give true or false")
        numeric = isinstance(self.strengths, (list, tuple)) and self.strengths
        if not numeric or not all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in self.strengths):
            raise ConfigError(f"experiment {self.name!r}: strengths: give a list of numbers")
        if not isinstance(self.track, (list, tuple)) or not all(isinstance(text, str) and text for text in self.track):
            raise ConfigError(f"experiment {self.name!r}: track: give a list of texts")


def read_experiments(path: Path) -> list[Experiment]:
    """The experiments of a YAML file. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"transfer.experiment={path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"transfer.experiment={path}: no valid YAML: {' '.join(str(error).split())}") from error
    entries = content.get("experiments") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries or set(content) != {"experiments"}:
        raise ConfigError(f"transfer.experiment={path}: it must hold one key, experiments, with a list")
    known = [each.name for each in fields(Experiment)]
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping) or not {"source", "target"} <= set(entry):
            raise ConfigError(f"transfer.experiment={path}: experiment {number} needs source and target")
        for key in entry:
            if key not in known:
                raise ConfigError(
                    f"transfer.experiment={path}: experiment {number}: {key} is unknown{did_you_mean(str(key), known)}"
                )
    return [Experiment(**{"name": f"experiment {i}", **dict(entry)}) for i, entry in enumerate(entries, 1)]


def run_experiments(tool: Tool, wanted: Sequence[Experiment], show: Callable[[str], None]) -> JsonObject:
    """All of them: `experiments`, a row each, and the means of their figures. Errors name the experiment."""
    rows = []
    for each in wanted:
        try:
            row = _differential(tool, each) if each.without is not None else _transfer(tool, each)
        except ConfigError as error:
            raise ConfigError(f"experiment {each.name!r}: {error}") from error
        rows.append(row)
        figure = f"KL {row['kl']:.4f}" if "kl" in row else f"{len(row['by_strength'])} strengths"
        show(f"{each.name}: {figure}")
    kls = [row["kl"] for row in rows if "kl" in row]
    layers = [layer for row in rows for layer in row.get("by_layer", ())]
    means: JsonObject = {"kl": sum(kls) / len(kls)} if kls else {}
    if layers:
        of = {
            index: [row["kl"] for row in layers if row["layer"] == index]
            for index in sorted({r["layer"] for r in layers})
        }
        means["kl_by_layer"] = {str(index): sum(values) / len(values) for index, values in of.items()}
    return {"experiments": rows, "means": means}


def _transfer(tool: Tool, wanted: Experiment) -> JsonObject:
    """A modulation of one text into another; the answers' probabilities before and after."""
    answers = {
        kind: tool.ids(text, special_tokens=False)[0]
        for kind, text in (("source", wanted.answer), ("target", wanted.target_answer))
        if text is not None
    }
    source, target = tool.ids(wanted.source), tool.ids(wanted.target)
    source += [answers["source"]] if "source" in answers else []
    how = How(mode=wanted.mode, alpha=wanted.alpha, strength=wanted.strength, space=tool.settings.space)

    def taken(layers: Sequence[int]) -> Modulation:
        return _extracted(tool, wanted, source, len(target), layers)

    m = taken(tool.active)
    found = inject(tool.model, target, m, how, -1, tool.active)
    row: JsonObject = {
        "name": wanted.name,
        "source": wanted.source,
        "target": wanted.target,
        **vars(how),
        "positions": wanted.positions,
        "kl": found.kl,
        "magnitude": {str(layer): value for layer, value in m.magnitudes().items()},
        "top": tool.top_rows(found, _TOP),
        "answers": _answers(answers, found.probabilities),
    }
    if tool.settings.controls:
        row["controls"] = controls(
            tool.model, target, m, how, tool.active, tracked={}, seed=tool.settings.seed,
            others={text: tool.ids(text) for text in tool.unrelated},
        )  # fmt: skip
    if wanted.by_layer:
        row["by_layer"] = []
        for layer in tool.active:
            alone = inject(tool.model, target, taken([layer]), how, -1, [layer])
            row["by_layer"].append({"layer": layer, "kl": alone.kl, "answers": _answers(answers, alone.probabilities)})
    return row


def _extracted(tool: Tool, wanted: Experiment, ids: Sequence[int], room: int, layers: Sequence[int]) -> Modulation:
    if wanted.positions == "last":
        return extract(tool.model, ids, -1, layers, text=wanted.source)
    if wanted.positions == "last_n":
        count = min(_LAST_N, len(ids), room)
        return extract(tool.model, ids, slice(-count, None), layers, text=wanted.source)
    several = extract(tool.model, ids, slice(-min(_AVERAGED, len(ids)), None), layers, text=wanted.source)
    return several.mapped(lambda layer, name, pair: (pair[0].mean(0), pair[1].mean(0)))


def _answers(answers: Mapping[str, int], probabilities: Callable[[int], tuple[float, float]]) -> JsonObject:
    found: JsonObject = {}
    for kind, token in answers.items():
        before, after = probabilities(token)
        found[kind] = {"token": token, **_change(before, after)}
    return found


def _change(before: float, after: float) -> dict[str, float]:
    return {"before": before, "after": after, "change": after - before, "relative": (after - before) / (before + _TINY)}


def _differential(tool: Tool, wanted: Experiment) -> JsonObject:
    """ΔW(source) − ΔW(without) at some strengths, each written in and taken back."""
    assert wanted.without is not None
    parts = [
        extract(tool.model, tool.ids(text), -1, tool.active, text=text) for text in (wanted.source, wanted.without)
    ]
    m = combine("subtract", *parts, space="weights")
    target = check_ids(tool.model, tool.ids(wanted.target))
    tracked = {text: tool.ids(text, special_tokens=False)[0] for text in wanted.track} or tool.tracked
    reader = Reader(tool.model, None, How(), tool.active, cached=False)

    def probabilities() -> torch.Tensor:
        return reader.plain(target).double().softmax(-1)

    before = probabilities()
    rows: list[dict[str, Any]] = []
    for strength in wanted.strengths:
        with Permanent(tool.model, m, None, strength) as edit:
            after = probabilities()
        kl = float((before * (before.log() - (after + _TINY).log())).sum())
        named = {text: _change(float(before[token]), float(after[token])) for text, token in tracked.items()}
        rows.append({"strength": strength, "kl": kl, "tracked": named, "matrices": edit.report})
    return {
        "name": wanted.name,
        "source": wanted.source,
        "without": wanted.without,
        "target": wanted.target,
        "delta_norms": {str(layer): norms for layer, norms in m.delta_norms().items()},
        "by_strength": rows,
    }
