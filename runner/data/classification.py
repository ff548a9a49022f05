"""Labelled texts from files: JSON lines, a JSON array, CSV, TSV, parquet, each also in .gz; every row is checked.

Rows are counted from 1, without a header. What is wrong is said with file, row, column and value.
"""

import csv
import gzip
import hashlib
import io
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.data.streams import json_object
from runner.errors import ConfigError, did_you_mean

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Column names that are taken where data.text and data.label say none, the first that fits.
TEXT_COLUMNS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question", "sentence"), ("text",), ("sentence",),
)  # fmt: skip
LABEL_COLUMNS = ("label", "gold_label")
# The order of natural-language inference, whose data sets number these names so.
XNLI = ("entailment", "neutral", "contradiction")
PARTS = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}
_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class ClassificationData:
    """Where labelled rows lie, and what of them is text and label.

    `train`, `validation`: a file, or for `train` a directory with train.*, validation.* or dev.*, and test.*. `test`: a
    file, or name → file. `text`, `label`, `labels`: columns, and the classes in order; None: found. `group`: a column
    by which figures are split. `max_length`: of a row in tokens. `separator`: between texts; None: the tokenizer's
    end-of-text. `pair`: separator, or tokenizer for its own template of two texts. `validation_fraction` of the
    training rows is held out where there is no `validation`. Raises ConfigError.
    """

    name: str
    train: str | None = None
    validation: str | None = None
    test: str | Mapping[str, str] | None = None
    text: tuple[str, ...] | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    group: str | None = None
    max_length: int = 512
    separator: str | None = None
    pair: str = "separator"
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        for key in ("text", "labels"):
            value = getattr(self, key)
            if value is not None:
                names = [str(each) for each in value] if isinstance(value, (list, tuple)) else []
                if not names or len(set(names)) < len(names):
                    raise ConfigError(f"data.{key}={value}: give a list of names, each once")
                object.__setattr__(self, key, tuple(names))
        if self.labels is not None and len(self.labels) < 2:
            raise ConfigError(f"data.labels={list(self.labels)}: two classes at least")
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
            raise ConfigError(f"data.max_length={self.max_length}: give a whole number of tokens, at least 1")
        if self.pair not in ("separator", "tokenizer"):
            raise ConfigError(f"data.pair={self.pair} is unknown; choose separator or tokenizer")
        fraction = self.validation_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise ConfigError(f"data.validation_fraction={fraction}: give a share between 0 and 1")
        if isinstance(self.test, str) and self.test.startswith("{"):
            object.__setattr__(self, "test", _mapping(self.test))
        if isinstance(self.test, Mapping) and not all(isinstance(path, str) and path for path in self.test.values()):
            raise ConfigError(f"data.test={dict(self.test)}: give names with a file each, as {{hi: test.hi.jsonl}}")

    def paths(self) -> dict[str, Path]:
        """Each file: `train`, `validation`, `test` or `test/<name>` → its path. Raises ConfigError."""
        found: dict[str, Path] = {}
        for part in ("train", "validation", "test"):
            given = getattr(self, part)
            if isinstance(given, Mapping):
                found |= {f"{part}/{name}": self._file(path, part) for name, path in given.items()}
            elif given is not None:
                found[part] = self._file(given, part)
            elif self.train is not None and Path(self.train).expanduser().is_dir():
                inside = _in_directory(Path(self.train).expanduser(), part)
                found |= {part: inside} if inside else {}
        return found

    @staticmethod
    def _file(path: str, part: str) -> Path:
        place = Path(path).expanduser()
        inside = _in_directory(place, part) if place.is_dir() else place
        if inside is None:
            raise ConfigError(
                f"data.{part}={path}: the directory holds no {' or '.join(f'{n}.*' for n in PARTS[part])}"
            )
        if not inside.is_file():
            raise ConfigError(f"data.{part}={path}: no such file or directory")
        return inside


def _mapping(text: str) -> dict[str, str]:
    """`{hi: test.hi.jsonl, ur: test.ur.jsonl}` as it was typed: names up to a colon, entries up to a comma."""
    found = {}
    for entry in text.strip().removeprefix("{").removesuffix("}").split(","):
        name, colon, path = (part.strip().strip("'\"") for part in entry.partition(":"))
        if not colon or not name or name in found:
            raise ConfigError(f"data.test={text}: give names with a file each, each once, as {{hi: test.hi.jsonl}}")
        found[name] = path
    return found


@dataclass(frozen=True, kw_only=True)
class LabelledRow:
    """The texts of a row, the number of its class, and the group that it belongs to."""

    texts: tuple[str, ...]
    label: int
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """The rows of a file. `columns` of text, `labels` in order; `sha256` of the file; `empty_parts`: texts of no
    character."""

    path: Path
    rows: tuple[LabelledRow, ...]
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    sha256: str

    @property
    def empty_parts(self) -> int:
        """How many texts have no character."""
        return sum(not text for row in self.rows for text in row.texts)


def read_labelled(
    path: Path, data: ClassificationData, *, labels: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> LabelledRows:  # fmt: skip
    """The rows of a file. `labels`, `columns`: those of the rows that were trained on; None: this file decides.

    Raises ConfigError with file, row, column and value.
    """
    texts, raw, groups = [], [], []
    found: tuple[str, ...] | None = tuple(columns) if columns else None
    label_column = data.label
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}: row {number}"
        if number == 1:
            found = found or data.text or _choose(row, where)
            label_column = label_column or next((name for name in LABEL_COLUMNS if name in row), LABEL_COLUMNS[0])
        assert found is not None
        assert label_column is not None
        texts.append(tuple(_text(row, column, where) for column in found))
        raw.append(_label(row, label_column, where))
        groups.append(None if data.group is None else str(_cell(row, data.group, where)))
    if not texts:
        raise ConfigError(f"{path}: holds no rows")
    assert found is not None
    assert label_column is not None
    kinds = {isinstance(value, int) for value in raw}
    if len(kinds) > 1:
        odd = next(i for i, value in enumerate(raw) if isinstance(value, int) is not isinstance(raw[0], int))
        raise ConfigError(
            f"{path}: row {odd + 1}: {label_column}={raw[odd]!r}, where row 1 has {raw[0]!r}: numbers and names are "
            "mixed"
        )
    known = tuple(labels) if labels else _classes(raw, data.labels, path, label_column)
    numbers = [_number(value, known, f"{path}: row {i}", label_column) for i, value in enumerate(raw, 1)]
    rows = tuple(
        LabelledRow(texts=own, label=label, group=group)
        for own, label, group in zip(texts, numbers, groups, strict=True)
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LabelledRows(path=path, rows=rows, columns=found, labels=known, sha256=digest)


def split(rows: LabelledRows, fraction: float, seed: int) -> tuple[tuple[LabelledRow, ...], tuple[LabelledRow, ...]]:
    """The rows to train on and those held out: `fraction` of each class, at least one, drawn by `seed`.

    Raises ConfigError for a class with one row only.
    """
    by_class: dict[int, list[int]] = {}
    for i, row in enumerate(rows.rows):
        by_class.setdefault(row.label, []).append(i)
    chooser, held = random.Random(f"{seed}/validation"), set()
    for label, own in sorted(by_class.items()):
        if len(own) < 2:
            raise ConfigError(
                f"{rows.path}: the class {rows.labels[label]} has one row, of which none can be held out; "
                "give data.validation"
            )
        held |= set(chooser.sample(own, min(len(own) - 1, max(1, round(fraction * len(own))))))
    return (
        tuple(row for i, row in enumerate(rows.rows) if i not in held),
        tuple(row for i, row in enumerate(rows.rows) if i in held),
    )


def require_classes(rows: Sequence[LabelledRow], labels: Sequence[str], path: Path) -> None:
    """Raise ConfigError where the training rows are of one class only."""
    seen = {row.label for row in rows}
    if len(seen) < 2:
        raise ConfigError(f"{path}: every row is of the class {labels[seen.pop()]}: nothing can be told apart")


def _classes(raw: Sequence[int | str], given: Sequence[str] | None, path: Path, column: str) -> tuple[str, ...]:
    """The classes in order, as the values of the label column show them."""
    if given is not None:
        return tuple(given)
    if isinstance(raw[0], str):
        names = {str(value) for value in raw}
        return XNLI if names <= set(XNLI) else tuple(sorted(names))
    seen = {int(value) for value in raw}
    if negative := min(seen) < 0 and next(i for i, value in enumerate(raw, 1) if int(value) < 0):
        raise ConfigError(f"{path}: row {negative}: {column}={raw[negative - 1]}: a label is 0 or more")
    if absent := sorted(set(range(min(max(seen), len(raw)) + 1)) - seen):
        raise ConfigError(
            f"{path}: {column} goes up to {max(seen)}, but no row has {absent[0]}; give data.labels, or number the "
            "classes from 0"
        )
    return tuple(map(str, range(max(seen) + 1)))


def _number(value: int | str, labels: Sequence[str], where: str, column: str) -> int:
    if isinstance(value, int):
        if not 0 <= value < len(labels):
            raise ConfigError(f"{where}: {column}={value}: there are {len(labels)} classes, 0 to {len(labels) - 1}")
        return value
    if value in labels:
        return list(labels).index(value)
    if tuple(labels) == ("0", "1", "2") and value in XNLI:
        return XNLI.index(value)
    raise ConfigError(f"{where}: {column}={value!r} is no class{did_you_mean(value, labels)}")


def _choose(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = next((columns for columns in TEXT_COLUMNS if all(column in row for column in columns)), None)
    if found is None:
        raise ConfigError(f"{where}: has the columns {', '.join(map(str, row))}; say with data.text which are text")
    return found


def _cell(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise ConfigError(f"{where}: has no column {column}{did_you_mean(column, map(str, row))}")
    return row[column]


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = _cell(row, column, where)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {column}={_shown(value)}: must be text")
    return value


def _label(row: Mapping[str, Any], column: str, where: str) -> int | str:
    """A number, or a name; a text that is a number is that number."""
    value = _cell(row, column, where)
    if isinstance(value, str):
        text = value.strip()
        if text.lstrip("-").isdecimal():
            value = int(text)
        elif text:
            return text
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: {column}={_shown(value)}: a label is a whole number from 0 on, or a name")
    if value < 0:
        raise ConfigError(
            f"{where}: {column}={value}: a label is 0 or more; {value} stands for no label in many data sets"
        )
    return value


def _shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _in_directory(directory: Path, part: str) -> Path | None:
    """The one file of a part. Raises ConfigError for several."""
    if not directory.is_dir():
        return None
    names = {f"{name}{suffix}{packed}" for name in PARTS[part] for suffix in SUFFIXES for packed in ("", ".gz")}
    found = sorted(path for path in directory.iterdir() if path.name in names)
    if len(found) > 1:
        raise ConfigError(f"{directory}: holds {', '.join(path.name for path in found)}; name one as data.{part}")
    return found[0] if found else None


# Files.


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    suffix = (path.suffixes[-2:-1] or [""])[0] if path.suffix == ".gz" else path.suffix
    readers: dict[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    if suffix not in readers:
        raise ConfigError(f"{path}: is none of {', '.join(SUFFIXES)} (or one of them in .gz)")
    try:
        yield from readers[suffix](path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _opened(path: Path) -> io.TextIOWrapper:
    binary: Any = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    number = 0
    with _opened(path) as stream:
        for line in stream:
            if line.strip():
                number += 1
                yield json_object(line, f"{path}: row {number}:")


def _json(path: Path) -> Iterator[Mapping[str, Any]]:
    with _opened(path) as stream:
        try:
            rows = json.load(stream)
        except ValueError as error:
            raise ConfigError(f"{path}: is no JSON: {error}") from error
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: is no JSON array of objects; lines of JSON are a .jsonl")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: row {number}: is no JSON object")
        yield row


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    is_tsv = ".tsv" in path.suffixes
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as stream:
        reader = csv.reader(stream, delimiter="\t" if is_tsv else ",", strict=True)
        number = 0
        try:
            header = next(reader, None)
            for cells in reader:
                if not cells:
                    continue
                number += 1
                assert header is not None
                if len(cells) != len(header):
                    raise ConfigError(f"{path}: row {number}: has {len(cells)} cells, the header has {len(header)}")
                yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ConfigError(f"{path}: row {number + 1}: {error}") from error


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise ConfigError(f"{path}: parquet needs pyarrow: pip install 'checkpoint-runner[data]'") from error
    try:
        source: Any = path
        if path.suffix == ".gz":
            source = io.BytesIO(gzip.decompress(path.read_bytes()))
        rows = read_table(source).to_pylist()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as parquet: {error}") from error
    yield from rows
