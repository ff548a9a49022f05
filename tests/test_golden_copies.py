"""The golden checkpoints in the repository are those of the larger collection, where that is on this machine."""

import json

import pytest

from tests.conftest import GOLDEN

OWN, ALL = GOLDEN
# What mergekit made, which the larger collection does not have.
OURS = "mergekit"


@pytest.mark.skipif(not ALL.is_dir(), reason="../shared/golden is not on this machine")
def test_the_copies_are_copies():
    for file in sorted(path for path in OWN.rglob("*") if path.is_file() and path != OWN / "README.md"):
        if file.relative_to(OWN).parts[0] == OURS:
            continue
        theirs = ALL / file.relative_to(OWN)
        if file.name == "expected.json" and file.read_bytes() != theirs.read_bytes():  # a selection
            numbers = json.loads(theirs.read_text())
            assert json.loads(file.read_text()).items() <= numbers.items(), file
        else:
            assert file.read_bytes() == theirs.read_bytes(), file


def test_they_stay_small():
    assert sum(path.stat().st_size for path in OWN.rglob("*")) <= 4_000_000
