"""`task=finetune`: a head over a checkpoint's last hidden state, and what trains under it, to tell classes apart."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.reading import some
from runner.checkpoints.runs import resolve
from runner.config import FinetuneConfig, given_below
from runner.data.classification import ClassificationData, LabelledRow, read_labelled, require_classes, split
from runner.errors import CheckpointError, ConfigError, RunnerError
from runner.evaluation.base_models import Base
from runner.evaluation.placement import Placement
from runner.evaluation.tokenizers import TextTokenizer, load_tokenizer
from runner.families.family import Family
from runner.files.strict_json import read_object
from runner.finetuning.classifier import Classifier
from runner.finetuning.files import (
    DESCRIPTION,
    content_hash,
    copy_checkpoint,
    load_trained,
    peft_config,
    tokenizer_files,
    write,
)
from runner.finetuning.rows import Encoder, padded, separator_of
from runner.finetuning.scope import Scope, choose, reached
from runner.finetuning.settings import FinetuneSettings
from runner.finetuning.training import BEST, LAST, FinetuneRun, Scored
from runner.metrics.classification import in_words
from runner.progress import step_bar
from runner.results import Result, finite, versions
from runner.tasks.classification import VALIDATION, NamedSet, described, encoder, measure, test_sets, write_predictions
from runner.tasks.context import Context, checkpoint_path
from runner.training.loop import seeded

INTERRUPTED = 130
LOG = "training_log.jsonl"
# What a resumed run keeps of the run that it goes on from, where the command line says nothing else.
_KEPT = ("ckpt", "base", "tokenizer")


def run(config: FinetuneConfig, context: Context) -> Result:
    """Train, leaving checkpoint-best and checkpoint-last in the run's directory, and measure the test sets.

    Raises ConfigError, CheckpointError or ModelError, each with one line that says what to do.
    """
    config, resume_from = _resumed(config)
    settings: FinetuneSettings = config.train
    if config.dtype != "float32":
        raise ConfigError(
            f"dtype={config.dtype}: weights are trained in float32; the passes take train.precision=bfloat16"
        )
    with context.timed("data"):
        data, findings = _read(config.data, settings.seed)
    with context.timed("load_checkpoint"):
        opened = _open(config)
    with context.timed("prepare"):
        prepared = _prepare(opened, settings, data, config)
    findings += prepared.findings
    training = FinetuneRun(
        model=prepared.model,
        scope=prepared.scope,
        train=prepared.encoder.encode(data.train),
        validation=prepared.encoder.encode(data.validation),
        labels=data.labels,
        settings=settings,
        directory=context.directory,
        save=_Writer(prepared, opened, data, config).save,
        resume_from=resume_from,
    )
    if resume_from is not None:
        load_trained(prepared.model, resume_from)
        if (old := resume_from.with_name(BEST)).is_dir() and not (context.directory / BEST).exists():
            copy_checkpoint(old, context.directory / BEST)
    if cut := training.train.cut + training.validation.cut:
        findings.append(f"{cut} rows were longer than {prepared.encoder.max_length} tokens: their longest text was cut")
    untrained = None if resume_from else training.scored().figures["accuracy"]
    bar = step_bar(context.progress, "fine-tuning", _total(training))
    with context.timed("train"), bar as on_step:
        done = replace(training, on_step=on_step, on_log=_Log(context).row).run()
    if done.interrupted and context.in_sweep:
        raise KeyboardInterrupt  # which is for the whole sweep
    with context.timed("measure"):
        best = _best_again(training, context.directory / BEST)
        named = NamedSet(name=VALIDATION, rows=data.validation, tokens=training.validation, scored=best)
        tests = measure(prepared.model, data.tests, prepared.encoder, data.labels, settings.eval_batch_size)
    sets = [named, *tests]
    write_predictions(context.directory, sets, data.labels)
    findings += [f"{each.name}: {in_words(each.scored.figures)}" for each in sets]
    context.tracker.log({f"best/{name}": value for name, value in done.best.items()})
    for each in tests:
        context.log({f"test/{each.name}/{name}": value for name, value in each.scored.figures.items()})
    return Result(
        task="finetune",
        ckpt=str(opened.checkpoint.path),
        base=str(opened.base.path) if opened.base else None,
        step=opened.checkpoint.step,
        family=opened.family.name,
        format=opened.checkpoint.format,
        metrics={
            **best.figures,
            **({} if untrained is None else {"untrained_accuracy": untrained}),
            "best_step": int(done.best["step"]),
            "best_epoch": done.best["epoch"],
            **{f"test/{each.name}": each.scored.figures for each in tests},
        },
        findings=[*opened.checkpoint.findings, *findings],
        timing=context.timing,
        versions=versions(),
        details={
            "checkpoints": [str(context.directory / name) for name in (BEST, LAST)],
            "steps": done.step,
            "stopped": done.reason,
            "scope": prepared.scope_name,
            "trained": _counts(prepared),
            "groups": done.groups,
            "evaluations": done.history,
            "data": data.counts,
            **described(sets, data.labels, named),
        },
        exit_code=INTERRUPTED if done.interrupted else 0,
    )


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Rows to train, validate and test on, and what was found about them."""

    train: Sequence[LabelledRow]
    validation: Sequence[LabelledRow]
    tests: Mapping[str, Sequence[LabelledRow]]
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    counts: dict[str, object]


def _read(data: ClassificationData, seed: int) -> tuple[_Data, list[str]]:
    """Every file, before anything is loaded. Raises ConfigError."""
    paths = data.paths()
    if "train" not in paths:
        raise ConfigError("data.train is needed: a file of labelled rows, or a directory with train.* and others")
    train = read_labelled(paths["train"], data)
    require_classes(train.rows, train.labels, train.path)
    findings = []
    rows: Sequence[LabelledRow] = train.rows
    if "validation" in paths:
        held = read_labelled(paths["validation"], data, labels=train.labels, columns=train.columns)
        validation: Sequence[LabelledRow] = held.rows
    else:
        rows, validation = split(train, data.validation_fraction, seed)
        findings.append(f"no data.validation: {len(validation)} of {len(train.rows)} rows were held out by seed {seed}")
    tests = test_sets(data, paths, train.labels, train.columns)
    known = {row.texts for row in rows}
    for name, own in ((VALIDATION, validation), *((name, found.rows) for name, found in tests.items())):
        if overlap := sum(row.texts in known for row in own):
            findings.append(f"{overlap} of the {len(own)} rows of {name} are among the training rows")
    empty = train.empty_parts + sum(found.empty_parts for found in tests.values())
    if empty:
        findings.append(f"{empty} texts are empty")
    counts = {
        "train": len(rows), "validation": len(validation), **{name: len(own.rows) for name, own in tests.items()},
        "files": {part: {"path": str(path), "sha256": content_hash([path])} for part, path in paths.items()},
    }  # fmt: skip
    found = _Data(
        train=rows, validation=validation, tests={name: own.rows for name, own in tests.items()}, labels=train.labels,
        columns=train.columns, counts=counts,
    )  # fmt: skip
    return found, findings


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The checkpoint that is fine-tuned, its base where it needs one, and its model."""

    checkpoint: Checkpoint
    family: Family
    base: Base | None
    model: nn.Module
    tokenizer: TextTokenizer
    tokenizer_files: list[Path]


def _open(config: FinetuneConfig) -> _Opened:
    if config.ckpt is None:
        raise ConfigError("ckpt= is needed: the checkpoint to fine-tune")
    path = checkpoint_path(config)
    checkpoint = open_checkpoint(path, config.format.name, config.format.module, config.family)
    family: Family = config.family.of(checkpoint)
    placement = Placement(device=config.device, dtype=config.dtype)
    base = family.load_base(checkpoint, config.base, placement)
    model = family.build(checkpoint, base, placement)
    if isinstance(model, Classifier):
        raise ConfigError(
            f"{path}: is fine-tuned already; train.resume_from= goes on with a run, ckpt= takes what it was made from"
        )
    directories = [checkpoint.directory, *([base.path] if base else [])]
    return _Opened(
        checkpoint=checkpoint,
        family=family,
        base=base,
        model=model,
        tokenizer=load_tokenizer(config.tokenizer, directories),
        tokenizer_files=tokenizer_files(config.tokenizer, directories),
    )


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """The classifier, what of it trains, and what turns texts into token ids."""

    model: Classifier
    scope: Scope
    scope_name: str
    low_rank: list[str]
    encoder: Encoder
    findings: list[str]


def _prepare(opened: _Opened, settings: FinetuneSettings, data: _Data, config: FinetuneConfig) -> _Prepared:
    base, family, backbone = opened.base, opened.family, opened.model
    own = {id(parameter) for parameter in base.model.parameters()} if base is not None else set()
    added = [name for name, parameter in backbone.named_parameters() if id(parameter) not in own]
    name = settings.scope
    if name == "auto":
        name = "added" if base is not None else "all"
    if name == "added" and base is None:
        raise ConfigError("train.scope=added: the checkpoint is complete by itself; give all, head, lora or last:N")
    if settings.routing == "train" and not hasattr(backbone, "router"):
        raise ConfigError(f"train.routing=train: a model of the family {family.name} has no router")
    if base is not None and (name == "all" or name.startswith("last")):
        backbone = copy.deepcopy(backbone)  # the base stays what it is for whoever loads it next
    device = next(backbone.parameters()).device
    with seeded(settings.seed, device):
        low_rank = [] if settings.low_rank is None else family.add_low_rank(backbone, settings.low_rank)
        kind = settings.head or family.classifier_head
        model = Classifier(backbone, len(data.labels), head=kind, dropout=settings.dropout)
        model.head_modules.to(device)
    separator, said = separator_of(opened.tokenizer, config.data.separator)
    several = len(data.columns) > 1 and config.data.pair == "separator"
    found = encoder(
        opened.tokenizer, model, separator=separator, max_length=config.data.max_length, pair=config.data.pair
    )
    ids, mask = padded([found.ids(data.train[0].texts)[0][:64]])
    model.eval()
    scope = reached(model, choose(model, name, added, low_rank), lambda: (ids.to(device), mask.to(device)))
    findings = [said] if said and several else []
    if odd := [each for each in scope.unreached if "lm_head" not in each]:  # which only a language model has a use for
        findings.append(f"no gradient reaches {some(odd, 4, ', ')}: left as it is")
    return _Prepared(
        model=model, scope=scope, scope_name=name, low_rank=low_rank, encoder=found, findings=findings
    )  # fmt: skip


class _Writer:
    """Writes the run's checkpoints."""

    def __init__(self, prepared: _Prepared, opened: _Opened, data: _Data, config: FinetuneConfig) -> None:
        self._prepared, self._opened = prepared, opened
        self._description = _description(prepared, opened, data, config)
        settings: FinetuneSettings = config.train
        self._peft: dict[str, Any] | None = None
        is_plain = opened.family.is_base(opened.checkpoint)
        if is_plain and settings.low_rank is not None and prepared.model.head_name == "linear":
            targets = [name.split(".lora_")[0].rpartition(".")[2] for name in prepared.low_rank]
            self._peft = peft_config(settings.low_rank, targets, str(opened.checkpoint.path.resolve()))

    def save(
        self, target: Path, step: int, found: Mapping[str, float], state: Mapping[str, Any] | None
    ) -> None:  # fmt: skip
        """As `FinetuneRun.save`."""
        write(
            target, self._prepared.model, self._prepared.scope.trained,
            {**self._description, "step": step, "metrics": finite(found)},
            tokenizer=self._opened.tokenizer_files, state=state, peft=self._peft,
        )  # fmt: skip


def _description(prepared: _Prepared, opened: _Opened, data: _Data, config: FinetuneConfig) -> dict[str, Any]:
    """What classification.json says, but for step and figures."""
    checkpoint, base = opened.checkpoint, opened.base
    settings: FinetuneSettings = config.train
    low_rank = settings.low_rank
    updates = None if low_rank is None else {each.name: getattr(low_rank, each.name) for each in fields(low_rank)}
    return {
        "backbone": {
            "path": str(checkpoint.path.resolve()), "family": opened.family.name, "format": checkpoint.format,
            "step": checkpoint.step, "sha256": content_hash(checkpoint.weights.files),
        },
        "base": None if base is None else {"path": str(base.path.resolve()), "sha256": content_hash(base.files)},
        "head": {"kind": prepared.model.head_name, "classes": len(data.labels)},
        "pooled": "last_token",
        "labels": list(data.labels),
        "text": list(data.columns),
        "separator": prepared.encoder.separator,
        "pair": prepared.encoder.pair,
        "max_length": prepared.encoder.max_length,
        "tokenizer_sha256": content_hash(opened.tokenizer_files),
        "scope": prepared.scope_name,
        "low_rank": updates,
        "trained": list(prepared.scope.trained),
        "settings": settings.values(),
        "data": {each.name: _plain(getattr(config.data, each.name)) for each in fields(config.data)},
        "files": data.counts["files"],
        "tokenizer": config.tokenizer,
    }  # fmt: skip


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


class _Log:
    """A row in training_log.jsonl and, live, in W&B."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def row(self, step: int, figures: Mapping[str, float]) -> None:
        """What happened at `step`."""
        path = self._context.directory / LOG
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite({"step": step, **figures})) + "\n")
        except OSError as error:
            raise RunnerError(f"{path}: not written: {error}") from error
        self._context.log({"train/step": step, **figures})


def _best_again(training: FinetuneRun, best: Path) -> Scored:
    """The best checkpoint's weights in memory again, and what they give on the validation rows."""
    load_trained(training.model, best)
    training.model.eval()
    return training.scored()


def _counts(prepared: _Prepared) -> dict[str, object]:
    """How many parameters train, of the backbone and of the head."""
    return {
        "backbone_tensors": len(prepared.scope.trained),
        "backbone_parameters": sum(each.numel() for each in prepared.scope.trained.values()),
        "head_parameters": sum(each.numel() for each in prepared.model.head_parameters().values()),
        "all_parameters": sum(each.numel() for each in prepared.model.backbone.parameters()),
        "unreached": list(prepared.scope.unreached),
    }


def _total(training: FinetuneRun) -> int:
    from runner.finetuning.rows import steps_in_epoch

    settings = training.settings
    total = settings.epochs * steps_in_epoch(len(training.train.ids), settings.batch_size, settings.accumulation)
    return total if settings.max_steps is None else min(total, settings.max_steps)


def _resumed(config: FinetuneConfig) -> tuple[FinetuneConfig, Path | None]:
    """The config with what the run to go on from says and the command line does not, and that run's last checkpoint.

    Raises CheckpointError where there is none, ConfigError for what may not change.
    """
    settings: FinetuneSettings = config.train
    if settings.resume_from is None:
        return config, None
    path = Path(settings.resume_from).expanduser()
    path = path / LAST if (path / LAST).is_dir() else resolve(path, by_step=False)
    if not (path / DESCRIPTION).is_file():
        raise CheckpointError(f"train.resume_from={settings.resume_from}: holds no {LAST} of task=finetune")
    said = read_object(path / DESCRIPTION, DESCRIPTION, 64 << 20)
    for root, target in (("settings", settings), ("data", config.data)):
        saved = said.get(root)
        if not isinstance(saved, dict):
            raise CheckpointError(f"{path / DESCRIPTION}: says no {root} to go on with")
        given = given_below("train" if root == "settings" else "data")
        names = {each.name for each in fields(target)}
        kept = {
            name: value for name, value in saved.items() if name in names and given is not None and name not in given
        }
        if root == "settings":
            settings = replace(settings, **kept)
        else:
            config = replace(config, data=replace(config.data, **kept))
    places = {
        "ckpt": said.get("backbone", {}).get("path"),
        "base": (said.get("base") or {}).get("path"),
        "tokenizer": said.get("tokenizer"),
    }
    own = {name: places[name] for name in _KEPT if getattr(config, name) is None}
    return replace(config, train=settings, **own), path
