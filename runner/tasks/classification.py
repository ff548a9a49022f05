"""Labelled sets under a classifier: what task=finetune and a diagnosis with data=classification both do."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.config import DiagnoseConfig
from runner.data.classification import ClassificationData, LabelledRow, LabelledRows, read_labelled
from runner.errors import ConfigError, RunnerError
from runner.evaluation.forward import limits
from runner.evaluation.placement import Placement
from runner.evaluation.tokenizers import TextTokenizer, load_tokenizer
from runner.families.family import Auto, Family
from runner.files.atomic import write_whole
from runner.finetuning.classifier import Classifier
from runner.finetuning.files import FORMAT
from runner.finetuning.rows import Encoder, TokenRows
from runner.finetuning.training import Scored, score
from runner.metrics.classification import difference, figures, in_words, per_class
from runner.results import JsonObject, Result, finite
from runner.tasks.context import Context, checkpoint_path

PREDICTIONS = "predictions.jsonl"
# The set that the others are compared with.
VALIDATION = "validation"
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A set of labelled rows as text and as token ids, with what was measured of it."""

    name: str
    rows: Sequence[LabelledRow]
    tokens: TokenRows
    scored: Scored


def test_sets(
    data: ClassificationData, paths: Mapping[str, Path], labels: Sequence[str], columns: Sequence[str]
) -> dict[str, LabelledRows]:
    """The rows of `data.test`, by name: that of the mapping, or of the file. Raises ConfigError."""
    found = {}
    for part, path in paths.items():
        if part.partition("/")[0] == "test":
            name = part.partition("/")[2] or "test"
            found[name] = read_labelled(path, data, labels=labels, columns=columns)
    return found


def by_group(name: str, rows: Sequence[LabelledRow]) -> Iterator[tuple[str, list[LabelledRow]]]:
    """A set as a whole, and then each of its groups."""
    yield name, list(rows)
    groups = sorted({row.group for row in rows if row.group is not None})
    for group in groups:
        yield f"{name}/{group}", [row for row in rows if row.group == group]


def measure(
    model: Classifier, sets: Mapping[str, Sequence[LabelledRow]], encoder: Encoder, labels: Sequence[str],
    batch_size: int = _BATCH,
) -> list[NamedSet]:  # fmt: skip
    """Every set, and each of its groups, under the model. A group's figures are those of its rows in the set."""
    found = []
    for name, rows in sets.items():
        tokens = encoder.encode(rows)
        whole = score(model, tokens, len(labels), batch_size)
        found.append(NamedSet(name=name, rows=rows, tokens=tokens, scored=whole))
        for group, own in list(by_group(name, rows))[1:]:
            chosen = [i for i, row in enumerate(rows) if row.group == group.rpartition("/")[2]]
            found.append(
                NamedSet(name=group, rows=own, tokens=tokens, scored=_part(whole, chosen, tokens, len(labels)))
            )
    return found


def _part(whole: Scored, chosen: Sequence[int], tokens: TokenRows, classes: int) -> Scored:
    from runner.metrics.classification import confusion

    logits, own = whole.logits[list(chosen)], [tokens.labels[i] for i in chosen]
    matrix = confusion(own, logits.argmax(1).tolist(), classes)
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(own)).item()
    return Scored(logits=logits, matrix=matrix, figures={"loss": loss, **figures(matrix)})


def transfer(sets: Sequence[NamedSet], against: NamedSet | None) -> list[JsonObject]:
    """A row for each set: its figures with their intervals, and the difference of accuracy from the set `against`."""
    rows = []
    for each in sets:
        found = each.scored.figures
        names = ("loss", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "macro_f2", "majority")
        row: JsonObject = {"set": each.name, "rows": int(found["rows"]), **{name: found[name] for name in names}}
        if against is not None and against is not each:
            ours, theirs = each.scored, against.scored
            change, low, high = difference(
                ours.right, int(ours.figures["rows"]), theirs.right, int(theirs.figures["rows"])
            )
            row |= {"difference": change, "difference_low": low, "difference_high": high}
        rows.append(row)
    return rows


def classes(scored: Scored, labels: Sequence[str]) -> list[JsonObject]:
    """A row for each class."""
    return [{"class": label, **row} for label, row in zip(labels, per_class(scored.matrix), strict=True)]


def write_predictions(directory: Path, sets: Sequence[NamedSet], labels: Sequence[str]) -> None:
    """A line for each row of each whole set: its number, label, prediction and probabilities. Raises RunnerError."""
    lines = []
    for each in sets:
        if len(each.scored.logits) != len(each.tokens.ids):
            continue  # a group: its rows stand with their set
        chances = each.scored.logits.softmax(1).tolist()
        for number, (row, prediction) in enumerate(zip(each.rows, each.scored.predictions, strict=True)):
            lines.append({
                "set": each.name, "row": number + 1, "label": labels[row.label], "prediction": labels[prediction],
                "probabilities": dict(zip(labels, chances[number], strict=True)),
            })  # fmt: skip
    text = "".join(json.dumps(finite(line), ensure_ascii=False) + "\n" for line in lines)
    path = directory / PREDICTIONS
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise RunnerError(f"{path}: not written: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A fine-tuned checkpoint in memory, and what turns texts into its token ids."""

    checkpoint: Checkpoint
    model: Classifier
    encoder: Encoder
    labels: tuple[str, ...]
    columns: tuple[str, ...] | None


def open_classifier(
    path: Path, config: DiagnoseConfig, context: Context, *, own: bool = True, labels: Sequence[str] | None = None
) -> Opened:
    """The classifier at `path`. `own`: whether format= and family= are about it. Raises as opening does."""
    with context.timed("open"):
        if own:
            checkpoint = open_checkpoint(path, config.format.name, config.format.module, config.family)
            family: Family = config.family.of(checkpoint)
        else:
            checkpoint = open_checkpoint(path)
            family = Auto().of(checkpoint)
    if checkpoint.format != FORMAT:
        raise ConfigError(
            f"{path}: is a {checkpoint.format}, and data=classification measures what task=finetune leaves; "
            "fine-tune it first"
        )
    placement = Placement(device=config.device, dtype=config.dtype)
    with context.timed("load_base"):
        base = family.load_base(checkpoint, config.base, placement)
    with context.timed("load_checkpoint"):
        model = family.build(checkpoint, base, placement)
    assert isinstance(model, Classifier)
    with context.timed("load_tokenizer"):
        tokenizer = load_tokenizer(config.tokenizer, [checkpoint.directory])
    said = checkpoint.details.description
    return Opened(
        checkpoint=checkpoint,
        model=model,
        encoder=encoder(
            tokenizer, model, separator=said["separator"], max_length=said["max_length"], pair=said["pair"]
        ),
        labels=checkpoint.details.labels,
        columns=tuple(said["text"]) if said.get("text") else None,
    )


def encoder(
    tokenizer: TextTokenizer, model: Classifier, *, separator: str, max_length: int, pair: str
) -> Encoder:  # fmt: skip
    """What turns texts into token ids that the model has, no longer than it takes."""
    vocabulary, positions = limits(model.backbone)
    longest = max_length if positions is None else min(max_length, positions)
    return Encoder(tokenizer=tokenizer, separator=separator, max_length=longest, vocab_size=vocabulary, pair=pair)


def diagnose(config: DiagnoseConfig, context: Context) -> Result:
    """`task=diagnose data=classification`: every labelled set that is named, and agreement with `reference`."""
    data: ClassificationData = config.data
    paths = {part: path for part, path in data.paths().items() if part != "train"}
    if not paths:
        raise ConfigError("data=classification needs data.test=FILE, or {name: FILE, …}, to measure on")
    opened = open_classifier(checkpoint_path(config), config, context)
    labels = opened.labels if data.labels is None else data.labels
    if len(labels) != len(opened.labels):
        raise ConfigError(f"data.labels={list(labels)}: the classifier has {len(opened.labels)} classes")
    columns = data.text or opened.columns or ()
    read = partial(test_sets, data, labels=labels, columns=columns)
    rows = {name: found.rows for name, found in read(paths).items()}
    if VALIDATION in paths:
        rows = {VALIDATION: read_labelled(paths[VALIDATION], data, labels=labels, columns=columns).rows, **rows}
    with context.timed("measure"):
        sets = measure(opened.model, rows, opened.encoder, labels)
    write_predictions(context.directory, sets, labels)
    first = sets[0]
    checkpoint = opened.checkpoint
    findings = [*checkpoint.findings, *(f"{each.name}: {in_words(each.scored.figures)}" for each in sets)]
    if cut := sum(each.tokens.cut for each in sets if "/" not in each.name or len(each.rows) == len(each.tokens.ids)):
        findings.append(f"{cut} rows were longer than {opened.encoder.max_length} tokens and were cut")
    result = context.result(
        "diagnose",
        checkpoint,
        metrics={**first.scored.figures, **{f"test/{each.name}": each.scored.figures for each in sets[1:]}},
        checks=[{"name": "load", "status": "pass", "details": checkpoint.evidence}],
        findings=findings,
        details=described(sets, labels, first if first.name == VALIDATION or len(sets) > 1 else None),
    )
    if config.reference is not None and config.reference != config.base:
        _compare(opened, config, context, rows, sets, result)
    return result


def described(sets: Sequence[NamedSet], labels: Sequence[str], against: NamedSet | None) -> dict[str, Any]:
    """What a result holds of sets beside the figures of the first: the others, and the first by class."""
    first = sets[0].scored
    return {
        "labels": list(labels),
        "confusion": first.matrix,
        "classes": classes(first, labels),
        "transfer": transfer(sets, against),
        "matrices": {each.name: each.scored.matrix for each in sets},
        "predictions": PREDICTIONS,
    }


def _compare(
    opened: Opened, config: DiagnoseConfig, context: Context, rows: Mapping[str, Sequence[LabelledRow]],
    sets: Sequence[NamedSet], result: Result,
) -> None:  # fmt: skip
    """How often `reference` gives the same class, into `result`. Raises ConfigError where its classes are others."""
    other = open_classifier(Path(str(config.reference)).expanduser(), config, context, own=False)
    if other.labels != opened.labels:
        raise ConfigError(f"reference={config.reference}: its classes are {', '.join(other.labels)}")
    theirs = {each.name: each for each in measure(other.model, rows, other.encoder, opened.labels)}
    for ours, row in zip(sets, result.details["transfer"], strict=True):
        pairs = list(zip(ours.scored.predictions, theirs[ours.name].scored.predictions, strict=True))
        row["agreement"] = sum(one == two for one, two in pairs) / len(pairs)
        row["reference_accuracy"] = theirs[ours.name].scored.figures["accuracy"]
    result.reference = str(other.checkpoint.path)
    result.metrics["agreement"] = result.details["transfer"][0]["agreement"]
