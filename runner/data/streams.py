"""Documents of a corpus of any size, one at a time, from files of text, JSON lines or parquet, from `datasets`, or from
the hub; where a reader stands can be saved and taken up again by another process.
"""

import glob
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, did_you_mean

SUFFIXES = (".txt", ".jsonl", ".parquet")
# A hub data set is only asked for where the path says so: nothing is downloaded for a mistyped file.
HUB = "hf:"
# A longer document is read in pieces of so many characters: memory stays bounded by it.
LONGEST = 1 << 20
_ROWS = 256  # of a parquet file, read at once
# A document and where the next one begins: a byte of a text file, a row of others, a library's own state.
Found = tuple[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file, saved data set or hub name of a corpus; `read(column, start)` gives its documents from there on."""

    name: str
    read: Callable[[str, Any], Iterator[Found]]
    size: int | None = None  # in bytes, where known


def find_parts(path: str) -> list[Part]:
    """The parts that a file, a directory, a glob, a directory of `datasets` or hf:NAME names, in the order of names.

    Raises ConfigError where there are none, or a file of another kind is named.
    """
    if path.startswith(HUB):
        return [Part(name=path, read=lambda column, start: _hub(path, column, start))]
    place = Path(path).expanduser()
    if place.is_dir() and any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return [Part(name=str(place), read=lambda column, start: _saved(place, column, start))]
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    elif place.exists():
        found = [place]
    else:
        found = sorted(map(Path, glob.glob(str(place), recursive=True)))  # noqa: PTH207 - also absolute ones
        found = [file for file in found if file.is_file()]
    if not found:
        what = f"no {', '.join(f'*{suffix}' for suffix in SUFFIXES)} in it" if place.is_dir() else "no such file"
        raise ConfigError(f"data.path={path}: {what}")
    return [Part(name=str(file), read=_reader(file), size=file.stat().st_size) for file in found]


def _reader(file: Path) -> Callable[[str, Any], Iterator[Found]]:
    read = {".jsonl": _json_lines, ".parquet": _parquet}.get(file.suffix, _text)
    return lambda column, start: read(file, column, start)


def _text(file: Path, column: str, start: Any) -> Iterator[Found]:
    """Documents between empty lines."""
    lines: list[str] = []
    length = 0
    with _opened(file) as stream:
        stream.seek(start or 0)
        while True:
            raw = stream.readline(LONGEST)
            if len(raw) == LONGEST:
                raw = raw[: _whole(raw)]
                stream.seek(len(raw) - LONGEST, 1)
            line = _decoded(raw, file, stream.tell())
            if line.strip():
                lines.append(line)
                length += len(line)
            if lines and (not raw or not line.strip() or length >= LONGEST):
                yield "".join(lines).strip(), stream.tell()
                lines, length = [], 0
            if not raw:
                return


def _whole(raw: bytes) -> int:
    """Where the last character of a cut text in UTF-8, which may be half of one, begins."""
    end = len(raw)
    while end and raw[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if end and raw[end - 1] >= 0xC0 else end or len(raw)


def _decoded(raw: bytes, file: Path, end: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = end - len(raw) + error.start
        raise ConfigError(f"data.path={file}: byte {place} is not UTF-8 text ({error.reason})") from error


def json_object(line: str | bytes, where: str) -> dict[str, Any]:
    """The object of one line of JSON. Raises ConfigError, which begins with `where`."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is no JSON object")
    return row


def _json_lines(file: Path, column: str, start: Any) -> Iterator[Found]:
    """One JSON object a line."""
    with _opened(file) as stream:
        stream.seek(start or 0)
        for raw in stream:
            if not raw.strip():
                continue
            where = f"data.path={file}: the line that ends at byte {stream.tell()}"
            row = json_object(raw, where)
            if column not in row:
                raise _no_column(str(file), column, list(row))
            yield _value(row[column], where, column), stream.tell()


def _parquet(file: Path, column: str, start: Any) -> Iterator[Found]:
    """One document a row; a group of rows is read in small batches."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"data.path={file}: parquet needs pyarrow: pip install 'checkpoint-runner[data]'") from error
    try:
        with ParquetFile(file, pre_buffer=False, memory_map=False) as parquet:
            if column not in parquet.schema_arrow.names:
                raise _no_column(str(file), column, parquet.schema_arrow.names)
            row = 0
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                if row + count <= (start or 0):
                    row += count
                    continue
                for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
                    for value in batch.column(0):
                        row += 1
                        if row > (start or 0):
                            yield _value(value.as_py(), f"data.path={file}: row {row}", column), row
    except (ArrowException, OSError) as error:
        raise ConfigError(f"data.path={file}: cannot be read as parquet: {error}") from error


def _saved(directory: Path, column: str, start: Any) -> Iterator[Found]:
    """What `save_to_disk` of `datasets` wrote; of several splits `train`."""
    datasets = _datasets(str(directory))
    found = datasets.load_from_disk(str(directory))
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise ConfigError(f"data.path={directory}: has no split train; it has {', '.join(found)}")
        found = found["train"]
    if column not in found.column_names:
        raise _no_column(str(directory), column, found.column_names)
    for row in range(start or 0, len(found)):
        yield _value(found[row][column], f"data.path={directory}: row {row + 1}", column), row + 1


def _hub(path: str, column: str, start: Any) -> Iterator[Found]:
    """A hub data set, streamed: hf:OWNER/NAME, or hf:OWNER/NAME:SPLIT."""
    name, _, split = path.removeprefix(HUB).partition(":")
    datasets = _datasets(path)
    try:
        stream = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # network, authorisation and format errors of several libraries: one answer
        raise ConfigError(f"data.path={path}: cannot be streamed: {' '.join(str(error).split())}") from error
    if start:
        stream.load_state_dict(start)
    for row in stream:
        if column not in row:
            raise _no_column(path, column, list(row))
        yield _value(row[column], f"data.path={path}", column), stream.state_dict()


def _datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"data.path={path}: needs datasets: pip install 'checkpoint-runner[data]'") from error
    datasets.disable_progress_bars()
    return datasets


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise ConfigError(f"data.path={file}: cannot be read: {error.strerror}") from error


def _value(value: object, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: its {column} is {value!r:.80}, not a text")
    return value


def _no_column(path: str, column: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(f"data.path={path}: has no column {column!r}{did_you_mean(column, names)}; give data.column=")


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document is among the `fraction` that is never trained on; equal documents are on one side."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


class Documents:
    """The documents of `parts` that `wanted` keeps, epoch after epoch, parts in an order that `seed` gives.

    Raises ConfigError for what cannot be read, and where no document is left.
    """

    def __init__(
        self, parts: Sequence[Part], column: str, *, seed: int, wanted: Callable[[str], bool] = lambda text: True
    ) -> None:
        self._parts, self._column, self._seed, self._wanted = parts, column, seed, wanted
        self._at: dict[str, Any] = {"epoch": 0, "part": 0, "start": None}
        self._read: Iterator[Found] | None = None
        self._found = False

    def __next__(self) -> str:
        while (text := self._advance()) is None:
            if not self._found:
                names = self._parts[0].name if len(self._parts) == 1 else f"{self._parts[0].name} and the others"
                raise ConfigError(f"data.path={names}: holds no text to train on")
        return text

    def epoch(self) -> Iterator[str]:
        """The documents up to the end of this epoch; none is no error."""
        while (text := self._advance()) is not None:
            yield text

    def _advance(self) -> str | None:
        """The next document, or None at the end of an epoch."""
        while True:
            if self._read is None:
                self._read = self._order()[self._at["part"]].read(self._column, self._at["start"])
            for text, after in self._read:
                self._at["start"] = after
                if text.strip() and self._wanted(text):
                    self._found = True
                    return text
            self._read = None
            if self._at["part"] + 1 == len(self._parts):
                self._at = {"epoch": self._at["epoch"] + 1, "part": 0, "start": None}
                return None
            self._at = {"epoch": self._at["epoch"], "part": self._at["part"] + 1, "start": None}

    def state(self) -> dict[str, object]:
        """Where it stands: epoch, part (and its name), and where in that the next document begins."""
        return {**self._at, "name": self._order()[self._at["part"]].name}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says. Raises ValueError where the parts are others."""
        self._at = {"epoch": int(state["epoch"]), "part": int(state["part"]), "start": state["start"]}
        order = self._order()
        if self._at["part"] >= len(order) or order[self._at["part"]].name != state["name"]:
            raise ValueError(f"the data are others than those that were read: {state['name']} is not where it was")
        self._read, self._found = None, True

    def _order(self) -> list[Part]:
        return random.Random(f"{self._seed}/parts/{self._at['epoch']}").sample(self._parts, len(self._parts))


class Mixture:
    """Documents of several corpora, each drawn as often as its weight says."""

    def __init__(self, corpora: Sequence[Documents], weights: Sequence[float], *, seed: int) -> None:
        self._corpora, self._weights, self._seed, self._drawn = corpora, weights, seed, 0

    def __next__(self) -> str:
        chooser = random.Random(f"{self._seed}/mix/{self._drawn}")
        self._drawn += 1
        return next(chooser.choices(self._corpora, self._weights)[0])

    def epoch(self) -> Iterator[str]:
        """The documents of one epoch of each, one after the other."""
        for corpus in self._corpora:
            yield from corpus.epoch()

    def state(self) -> dict[str, object]:
        """Where each stands."""
        return {"drawn": self._drawn, "corpora": [corpus.state() for corpus in self._corpora]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says. Raises ValueError where the corpora are others."""
        if len(state["corpora"]) != len(self._corpora):
            raise ValueError("the mixture is of another number of corpora")
        self._drawn = int(state["drawn"])
        for corpus, own in zip(self._corpora, state["corpora"], strict=True):
            corpus.restore(own)
