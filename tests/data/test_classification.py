"""Labelled rows: every kind of file, labels as numbers and names, and what is wrong said with file, row and value."""

import gzip
import json

import pytest

from runner.data.classification import XNLI, ClassificationData, read_labelled, require_classes, split
from runner.errors import ConfigError
from tests.conftest import golden_file

ROWS = [
    {"premise": 'He said "stop",\nthey did.', "hypothesis": "They, all, stopped.", "label": 0, "language": "hi"},
    {"premise": "b", "hypothesis": "", "label": 2, "language": "ur"},
    {"premise": "c", "hypothesis": "x\ty", "label": 1, "language": "ur"},
]


def data(**values):
    return ClassificationData(name="classification", **values)


def write(path, rows, labels=None):
    rows = [{**row, "label": labels[row["label"]]} if labels else row for row in rows]
    names = list(rows[0]) if rows else []
    bare = path.name.removesuffix(".gz")
    if bare.endswith(".jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif bare.endswith(".json"):
        text = json.dumps(rows)
    else:
        mark = "\t" if bare.endswith(".tsv") else ","
        cells = [names, *([str(row[name]) for name in names] for row in rows)]
        text = "".join(mark.join('"' + c.replace('"', '""') + '"' for c in line) + "\r\n" for line in cells)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.csv.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("labels", [None, XNLI])
def test_every_kind_of_file(name, labels, tmp_path):
    found = read_labelled(write(tmp_path / name, ROWS, labels), data(group="language"))
    assert [row.texts for row in found.rows] == [(row["premise"], row["hypothesis"]) for row in ROWS]
    assert [row.label for row in found.rows] == [0, 2, 1]
    assert [row.group for row in found.rows] == ["hi", "ur", "ur"]
    assert found.labels == (labels or ("0", "1", "2"))
    assert found.empty_parts == 1


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    found = read_labelled(tmp_path / "a.parquet", data())
    assert [(row.texts[0], row.label) for row in found.rows] == [(row["premise"], row["label"]) for row in ROWS]


@pytest.mark.parametrize(("row", "said"), [
    ({"premise": "A.", "hypothesis": "B.", "label": -1}, "row 1: label=-1: a label is 0 or more"),
    ({"premise": "A.", "hypothesis": "B.", "label": None}, "row 1: label=null: a label is a whole number"),
    ({"premise": "A.", "hypothesis": "B.", "label": float("nan")}, "row 1: label=nan: a label is a whole number"),
    ({"premise": "A.", "hypothesis": "B.", "label": 1.0}, "row 1: label=1.0: a label is a whole number"),
    ({"premise": "A.", "hypothesis": "B.", "label": True}, "row 1: label=True"),
    ({"premise": "A.", "label": 0}, "row 1: has no column hypothesis"),
    ({"premise": "A.", "hypothesis": None, "label": 0}, "row 1: hypothesis=null: must be text"),
    ({"premise": "A.", "hypothesis": "B.", "label": "maybe"}, "row 1: label='maybe' is no class"),
    ({"premise": "A.", "hypothesis": "B.", "label": 7}, "row 1: label=7: there are 3 classes, 0 to 2"),
    ({"premise": "A.", "hypothesis": "B."}, "row 1: has no column label"),
])  # fmt: skip
def test_bad_rows_are_named(row, said, tmp_path):
    path = write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(ConfigError) as caught:
        read_labelled(path, data(), labels=XNLI, columns=("premise", "hypothesis"))
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_the_golden_bad_rows_one_by_one(tmp_path):
    path = golden_file("finetune/data/bad.jsonl")
    if path is None:
        pytest.skip("the golden data are not on this machine")
    allowed, said = [], []
    for number, line in enumerate(path.read_text().splitlines()):
        (tmp_path / "one.jsonl").write_text(line + "\n")
        try:
            read_labelled(tmp_path / "one.jsonl", data(), labels=XNLI, columns=("premise", "hypothesis"))
            allowed.append(number)
        except ConfigError as error:
            said.append(str(error))
    assert len(said) == 5
    assert all("row 1: " in text for text in said)
    assert allowed == [3, 6]  # an empty part, and a text that will be cut
    with pytest.raises(ConfigError, match=r"bad.jsonl: row 1: label=-1"):
        read_labelled(path, data())


def test_a_later_row_is_counted_from_one(tmp_path):
    path = write(tmp_path / "a.csv", [*ROWS, {**ROWS[0], "label": "maybe"}])
    with pytest.raises(ConfigError, match="row 4: label='maybe', where row 1 has 0: numbers and names are mixed"):
        read_labelled(path, data())


@pytest.mark.parametrize(("name", "text", "said"), [
    ("a.csv", "premise,hypothesis,label\nx,y\n", "row 1: has 2 cells, the header has 3"),
    ("a.csv", 'premise,hypothesis,label\n"x,y,0\n', "row 1: unexpected end of data"),
    ("a.csv", "premise,hypothesis,label\n", "holds no rows"),
    ("a.jsonl", "", "holds no rows"),
    ("a.jsonl", "{\n", "row 1: is no JSON"),
    ("a.jsonl", "[1]\n", "row 1: is no JSON object"),
    ("a.json", "{}", "is no JSON array"),
    ("a.csv", "first,second,label\nx,y,0\n", "say with data.text which are text"),
    ("a.txt", "x", "is none of .jsonl"),
    ("a.csv.gz", "no gzip", "cannot be read"),
    ("a.parquet", "no parquet", "cannot be read as parquet"),
])  # fmt: skip
def test_damaged_files(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_labelled(tmp_path / name, data())
    assert str(tmp_path / name) in str(caught.value)


def test_labels_of_one_file_hold_for_the_others(tmp_path):
    names = write(tmp_path / "names.jsonl", ROWS, ("b", "c", "a"))
    assert read_labelled(names, data()).labels == ("a", "b", "c")
    assert [row.label for row in read_labelled(names, data(labels=("c", "b", "a"))).rows] == [1, 2, 0]
    xnli = write(tmp_path / "xnli.jsonl", ROWS, XNLI)
    assert [row.label for row in read_labelled(xnli, data(), labels=("0", "1", "2")).rows] == [0, 2, 1]
    with pytest.raises(ConfigError, match="row 1: label='entailment' is no class"):
        read_labelled(xnli, data(), labels=("0", "1"))


def test_a_number_that_no_row_has_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], ROWS[1]])
    with pytest.raises(ConfigError, match="goes up to 2, but no row has 1"):
        read_labelled(path, data())


def test_one_class_cannot_be_told_apart(tmp_path):
    found = read_labelled(write(tmp_path / "a.jsonl", [ROWS[0], ROWS[0]]), data(labels=("yes", "no")))
    with pytest.raises(ConfigError, match="every row is of the class yes"):
        require_classes(found.rows, found.labels, found.path)


def test_held_out_rows_are_of_every_class_and_the_same_for_one_seed(tmp_path):
    found = read_labelled(
        write(tmp_path / "a.jsonl", [dict(row, premise=str(i)) for i in range(20) for row in ROWS]), data()
    )
    train, held = split(found, 0.1, 3)
    assert len(held) == 6
    assert {row.label for row in held} == {0, 1, 2}
    assert not set(train) & set(held)
    assert len(train) == 54
    assert (train, held) == split(found, 0.1, 3) != split(found, 0.1, 4)


def test_a_directory_has_its_parts(tmp_path):
    for name in ("train.jsonl", "dev.csv", "test.tsv"):
        write(tmp_path / name, ROWS)
    found = data(train=str(tmp_path)).paths()
    assert {part: path.name for part, path in found.items()} == {
        "train": "train.jsonl", "validation": "dev.csv", "test": "test.tsv",
    }  # fmt: skip
    write(tmp_path / "train.csv", ROWS)
    with pytest.raises(ConfigError, match=r"holds train.csv, train.jsonl; name one as data.train"):
        data(train=str(tmp_path)).paths()
    with pytest.raises(ConfigError, match="no such file or directory"):
        data(train=str(tmp_path / "nowhere.csv")).paths()


@pytest.mark.parametrize(("values", "said"), [
    ({"text": ["a", "a"]}, "data.text"), ({"labels": ["a"]}, "two classes"), ({"max_length": 0}, "data.max_length"),
    ({"pair": "both"}, "data.pair=both is unknown"), ({"validation_fraction": 1}, "data.validation_fraction"),
    ({"test": {"hi": None}}, "data.test"),
])  # fmt: skip
def test_settings(values, said):
    with pytest.raises(ConfigError, match=said):
        data(**values)
