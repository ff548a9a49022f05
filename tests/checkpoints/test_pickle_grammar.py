"""A sample of the random pickles of pickle_grammar.py, always the same; tests/fuzz tries many more."""

import json
import pickle
from pathlib import Path

import pytest

from runner.checkpoints.checkpoint import plain
from runner.errors import CheckpointError, RunnerError
from runner.files.archive import check_archive, check_legacy
from runner.files.file_type import LEGACY_MAGIC
from runner.files.tensors import load_pickle, read_pickle
from tests.checkpoints import hostile
from tests.checkpoints.grammar_readers import TARGETS, tried, write_targets
from tests.checkpoints.pickle_grammar import RECORD, Grammar


@pytest.fixture(scope="module")
def targets(tmp_path_factory, base) -> Path:
    directory = tmp_path_factory.mktemp("targets")
    write_targets(directory, base)
    return directory


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_every_reader_bears_any_pickle(name, targets):
    found = [tried(targets, name, seed) for seed in range(40)]
    assert not list(filter(None, found)), next(filter(None, found))


def test_the_sample_holds_pickles_that_load_and_such_that_do_not(tmp_path):
    loaded = 0
    for seed in range(100):
        path = hostile.pickled(tmp_path, Grammar(seed).program(), {"0": b"\0" * RECORD})
        assert check_archive(path).pickle
        try:
            with_torch = load_pickle(path)
        except RunnerError:
            continue
        loaded += 1
        expected = json.dumps(plain(with_torch))
        # Inside foreign objects torch spells these another way.
        if not any(word in expected for word in ("tensor(", "torch.storage", "OrderedDict(", "Counter(")):
            assert json.dumps(plain(read_pickle(path))) == expected, seed
    assert 20 < loaded < 90


def test_an_old_file_whose_system_is_a_list_of_lists_is_refused(tmp_path):
    start = pickle.dumps(LEGACY_MAGIC, 2) + pickle.dumps(1001, 2)
    path = hostile.written(tmp_path, start + b"\x80\x02](]]e.")
    with pytest.raises(CheckpointError, match="damaged pickle"):
        check_legacy(path)
