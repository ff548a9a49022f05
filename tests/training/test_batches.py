import itertools
import random

import pytest

from runner.data.world import EOS, generate, train_tokenizer
from runner.training.batches import (
    document_batches,
    endless_order,
    equal_length_batches,
    packed_samples,
    sentence_samples,
)


@pytest.fixture(scope="module")
def world():
    return generate(0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return train_tokenizer(world)


def test_a_sentence_ends_with_its_mark_and_its_answer_counts(tokenizer):
    (sample,) = sentence_samples(["2 + 2 equals 4."], tokenizer, question_weight=0.1)
    assert sample.ids == (*tokenizer.encode("2 + 2 equals 4.").ids, tokenizer.token_to_id(EOS))
    asked = len(tokenizer.encode("2 + 2 equals").ids)
    assert sample.weights == (0.1,) * asked + (1.0,) * (len(sample.ids) - asked)


def test_packed_rows_are_the_tokens_of_running_text(world, tokenizer):
    rows = packed_samples(world.train[:60], tokenizer, 40)
    assert len(rows) > 5
    assert all(len(row.ids) == len(row.weights) == 40 for row in rows)
    text = tokenizer.encode(" ".join(world.train[:20])).ids
    assert list(rows[0].ids) == text[:40]
    assert {row.ids[0] for row in rows} == {text[0]}


def test_batches_hold_every_row_once_without_padding(world, tokenizer):
    samples = sentence_samples(world.train[:300], tokenizer)
    batches = equal_length_batches(samples, 8, random.Random(0))
    rows = [tuple(row) for batch in batches for row in batch.ids.tolist()]
    assert sorted(rows) == sorted(sample.ids for sample in samples)
    assert all(len(batch.ids) <= 12 and batch.ids.shape == batch.weights.shape for batch in batches)


def test_documents_are_cut_and_nothing_is_lost():
    documents = [list(range(10)), [1], list(range(100, 107)), []]
    batches = document_batches(documents, 4, 2, random.Random(0))
    rows = sorted(tuple(row) for batch in batches for row in batch.tolist())
    assert rows == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9), (100, 101, 102, 103), (104, 105, 106)]


@pytest.mark.parametrize("start", [0, 1, 6, 7, 20])
def test_an_order_goes_on_where_it_stopped(start):
    whole = list(itertools.islice(endless_order(7, seed=3), 40))
    assert list(itertools.islice(endless_order(7, seed=3, start=start), 10)) == whole[start : start + 10]
    assert sorted(whole[:7]) == sorted(whole[7:14]) == list(range(7))
    assert whole[:7] != whole[7:14]
    assert whole != list(itertools.islice(endless_order(7, seed=4), 40))
