"""A W&B workspace that compares checkpoints: curves, layers, bars, scatter, parallel coordinates, a run comparer.

Made with `wandb-workspaces`, an extra (`.[panels]`) that is imported when a workspace is built. Only flat keys are
used: a workspace addresses nested ones inconsistently. `panels.json` keeps it on this machine's disk:

    entity, project, name   of the workspace; entity and project are empty as long as it was never saved
    spec                    its sections and panels, as W&B stores them
    view                    {url}, once it is saved
"""

import importlib
import importlib.util
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from runner.comparison.comparison import Comparison
from runner.errors import ConfigError
from runner.files.atomic import read_json, write_json
from runner.results import JsonObject
from runner.tracking.base import Tracker
from runner.tracking.compare import FORECAST_STEP, endings, figures, group, layer_figures
from runner.tracking.rows import STEP

FILE_NAME = "panels.json"
HOW_TO_INSTALL = "pip install -e '.[panels]' in runner's checkout"
# Figure, title, and whether its axis is logarithmic.
_CURVES = (
    ("mse", "MSE of the logits", True),
    ("cosine", "Cosine of the logits", False),
    ("kl", "KL (reference to subject), nats a token", True),
    ("kl_p99", "KL, 99 % quantile", True),
    ("top1", "Same most likely token", False),
    ("progress", "Estimated progress, %", False),
    ("magnitude_share", "Share of the MSE that is magnitude", False),
    ("text_ppl_ratio", "Perplexity on text over that of the reference", False),
)


def check_installed() -> None:
    """Raises ConfigError where the extra is not installed."""
    if not installed():
        raise ConfigError(f"panels are built with wandb-workspaces: {HOW_TO_INSTALL}")


def installed() -> bool:
    """Whether `wandb-workspaces` is there; nothing is imported."""
    return importlib.util.find_spec("wandb_workspaces") is not None


def _library(name: str) -> Any:
    """A module of the extra, without the warnings about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"wandb_workspaces.{name}")


def workspace(comparison: Comparison, *, entity: str, project: str) -> Any:
    """The workspace for the runs of `comparison`'s sweeps and for their compare run.

    A single series is drawn from the runs of its jobs, grouped by the sweep; several are drawn by the compare run,
    which keeps them apart.
    """
    expr, workspaces = _library("expr"), _library("workspaces")
    series = {directory.resolve().name for directory in comparison.directories} | {group(comparison)}
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=_name(comparison),
        sections=[
            workspaces.Section(name=name, panels=panels, is_open=True)
            for name, panels in _sections(comparison)
            if panels
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP, smoothing_type="none", max_runs=100),
        runset_settings=workspaces.RunsetSettings(
            filters=expr.And(expr.Config("series").isin(sorted(series))),
            order=[expr.Ordering(expr.Config("ckpt_step"), ascending=True)],
        ),
    )


def as_json(made: Any) -> JsonObject:
    """The workspace as W&B stores it: entity, project, name, and the `spec` of its sections and panels."""
    view = made._to_model()  # the library has no public way to what its save() sends
    spec = view.spec.model_dump(by_alias=True, exclude_none=True, mode="json")
    return {"entity": view.entity, "project": view.project, "name": view.display_name, "spec": spec}


def _name(comparison: Comparison) -> str:
    """W&B refuses names with symbols such as `+` or `=`."""
    return "runner: " + re.sub(r"[^\w.,:-]+", " ", group(comparison)).strip()[:100]


def _sections(comparison: Comparison) -> list[tuple[str, list[Any]]]:
    return [
        ("Checkpoints", _curves(comparison)),
        ("Estimate", _estimates(comparison)),
        ("Layers", _layers(comparison)),
        ("Comparison", _comparisons(comparison)),
    ]


def _line(title: str, keys: Sequence[str], *, x: str = STEP, log: bool = False, grouped: bool = False) -> Any:
    """A line plot of `keys`; `grouped`: one line through the points of the runs of each sweep."""
    panels = _library("reports.v2.interface")
    return panels.LinePlot(
        title=title,
        x=x,
        y=list(keys),
        log_y=log,
        title_x=x,
        groupby=panels.Config("series") if grouped else None,
        groupby_aggfunc="mean" if grouped else None,
        groupby_rangefunc="minmax" if grouped else None,
        max_runs_to_show=100,
    )


def _curves(comparison: Comparison) -> list[Any]:
    """One plot a figure that a series has, a line for each series."""
    made = []
    for name, title, log in _CURVES:
        keys = [f"eval/{name}{end}" for series, end in endings(comparison.series) if figures(series, name)]
        if keys:
            made.append(_line(title, keys, log=log, grouped=len(comparison.series) == 1))
    return made


def _estimates(comparison: Comparison) -> list[Any]:
    """The estimate's curve with its bounds, of the series that have one."""
    ends = [end for series, end in endings(comparison.series) if series.estimate and series.estimate.band]
    keys = [f"forecast/{name}{end}" for end in ends for name in ("lower", "median", "upper")]
    return [_line("MSE: the estimate and its band", keys, x=FORECAST_STEP, log=True)] if keys else []


def _layers(comparison: Comparison) -> list[Any]:
    """One plot a figure, a line for each layer of each series that was measured by itself."""
    made = []
    for figure, title, log in (
        ("mse", "MSE of each layer alone", True),
        ("cosine", "Cosine of each layer alone", False),
    ):
        keys = [
            f"layer_{figure}/{name}{end}"
            for series, end in endings(comparison.series)
            for name in dict.fromkeys(name for job in series.jobs for name in layer_figures(job, figure))
        ]
        if keys:
            made.append(_line(title, keys, log=log))
    return made


def _comparisons(comparison: Comparison) -> list[Any]:
    """Jobs against each other: by the last value of each run."""
    panels = _library("reports.v2.interface")
    columns = [panels.ParallelCoordinatesPlotColumn(metric=panels.Config("ckpt_step"), display_name="step")]
    for name, _, log in _CURVES:
        if any(figures(series, name) for series in comparison.series):
            metric = panels.SummaryMetric(f"eval/{name}")
            columns.append(panels.ParallelCoordinatesPlotColumn(metric=metric, display_name=name, log=log))
    return [
        panels.BarPlot(title="MSE by checkpoint", metrics=["eval/mse"], max_runs_to_show=100, max_bars_to_show=100),
        panels.ScatterPlot(
            title="Direction against magnitude",
            x=panels.SummaryMetric("eval/magnitude_share"),
            y=panels.SummaryMetric("eval/cosine"),
            z=panels.Config("ckpt_step"),
        ),
        panels.ParallelCoordinatesPlot(title="All figures", columns=columns),
        panels.RunComparer(diff_only="split"),
        panels.WeavePanelSummaryTable(table_name="tables/checkpoints", layout=panels.Layout(w=24, h=9)),
    ]


def write_panels(comparison: Comparison, tracker: Tracker, path: Path) -> JsonObject:
    """Write the workspace to `path`, and save it where `tracker` is online: a new one, or the one saved from there
    before. Returns what the file holds. Raises OSError.
    """
    earlier = _earlier(path)
    written = {**as_json(workspace(comparison, entity="", project="")), **earlier}
    write_json(path, written)
    saved = tracker.save_workspace(partial(_build, comparison, earlier))
    if saved is not None:
        written = {**saved.content, "view": {"url": saved.url}}
        write_json(path, written)
    return written


def _build(comparison: Comparison, earlier: JsonObject, entity: str, project: str) -> tuple[Any, JsonObject]:
    """The workspace to save, in the place of the `earlier` one where it was saved in the same project."""
    made = workspace(comparison, entity=entity, project=project)
    if (earlier.get("entity"), earlier.get("project")) == (entity, project):
        made = _in_place(made, earlier["view"]["url"])
    return made, as_json(made)


def _in_place(made: Any, url: str) -> Any:
    """What is saved at `url` with the content of `made`; `made` itself where it is gone from there."""
    try:
        saved = _library("workspaces").Workspace.from_url(url)
    except (LookupError, TypeError):
        return made
    for name in ("name", "sections", "settings", "runset_settings"):
        setattr(saved, name, getattr(made, name))
    return saved


def _earlier(path: Path) -> JsonObject:
    """Where the workspace of the file at `path` is saved: its entity, project and view; {} where it is not."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    view = content.get("view") if isinstance(content, dict) else None
    if not isinstance(view, dict) or not isinstance(view.get("url"), str):
        return {}
    return {"entity": content.get("entity"), "project": content.get("project"), "view": {"url": view["url"]}}
