"""Texts as token ids: nothing of one text is lost before the other, every row once an epoch."""

import random

import pytest
import torch

from runner.data.classification import LabelledRow
from runner.errors import ConfigError, ModelError
from runner.evaluation.tokenizers import load_tokenizer
from runner.finetuning.rows import (
    SEPARATOR,
    Encoder,
    EpochBatches,
    TokenRows,
    by_length,
    epoch_order,
    padded,
    separator_of,
    shortened,
)


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(None, [base])


def encoder(tokenizer, **values):
    return Encoder(**{"tokenizer": tokenizer, "separator": "</s>", "max_length": 20, "vocab_size": 272, **values})


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


def test_texts_are_joined_by_one_token(tokenizer):
    ids, cut = encoder(tokenizer).ids(["ab", "cd"])
    assert not cut
    assert text_of(tokenizer, ids) == "ab </s> cd"
    assert ids.count(tokenizer.token_id("</s>")) == 1


def test_the_longest_text_loses_first(tokenizer):
    own = encoder(tokenizer, max_length=11)
    assert [text_of(tokenizer, own.ids(texts)[0]) for texts in (["abcdefghi", "xyz"], ["abc", "tuvwxyz"])] == [
        "abcde </s> xyz", "abc </s> tuvwx",
    ]  # fmt: skip
    ids, cut = own.ids(["abcdefghi", "qrstuvwxyz"])
    assert cut
    assert text_of(tokenizer, ids) == "abcd </s> qrst"
    with pytest.raises(ConfigError, match="leaves no room for 2 texts"):
        encoder(tokenizer, max_length=4).ids(["abc", "def"])


def test_shortened_is_what_taking_one_by_one_gives():
    chooser = random.Random(0)
    for _ in range(200):
        lengths = [chooser.randint(0, 12) for _ in range(chooser.randint(1, 4))]
        room = chooser.randint(0, sum(lengths) + 2)
        slow = list(lengths)
        while sum(slow) > room:
            slow[slow.index(max(slow))] -= 1
        assert shortened(lengths, room) == slow, (lengths, room)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(ModelError, match="it is another model's tokenizer"):
        encoder(tokenizer, vocab_size=50).encode([LabelledRow(texts=("zz",), label=0)])


def test_the_separator(tokenizer):
    assert separator_of(tokenizer, None) == ("</s>", None)
    assert separator_of(tokenizer, "###") == ("###", None)
    import tokenizers

    from runner.evaluation.tokenizers import TextTokenizer

    bare = TextTokenizer(
        backend=tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])), special_tokens={}
    )
    found, said = separator_of(bare, None)
    assert found == SEPARATOR
    assert "no end-of-text token" in said


def test_a_pair_has_the_tokenizer_s_own_template(tokenizer):
    own = encoder(tokenizer, pair="tokenizer", max_length=6)
    ids, cut = own.ids(["abcd", "xyz"])
    assert cut
    assert text_of(tokenizer, ids) == "abcxyz"
    with pytest.raises(ConfigError, match="takes two texts, not 1"):
        own.ids(["a"])


@pytest.mark.parametrize(("count", "size", "accumulation"), [(37, 4, 2), (3, 1, 2), (1, 4, 3), (64, 8, 1)])
def test_every_row_once_an_epoch(count, size, accumulation):
    lengths = [5 + i % 7 for i in range(count)]
    order = epoch_order(lengths, size, accumulation, seed=1, epoch=0)
    assert sorted(number for batch in order for number in batch) == list(range(count))
    assert max(map(len, order)) <= size
    assert order == epoch_order(lengths, size, accumulation, seed=1, epoch=0)
    if count > 3:
        assert order != epoch_order(lengths, size, accumulation, seed=1, epoch=1)


@pytest.mark.parametrize(("count", "size", "accumulation"), [(37, 4, 2), (3, 1, 2), (1, 4, 3)])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0)])
def test_a_step_is_the_weighted_mean_over_its_rows(count, size, accumulation, weights):
    rows = TokenRows(ids=[[i + 1] for i in range(count)], labels=[i % 2 for i in range(count)])
    source = EpochBatches(rows, size=size, accumulation=accumulation, seed=0, weights=weights)
    losses = torch.rand(count, generator=torch.Generator().manual_seed(0)).tolist()
    weight = [1.0 if weights is None else weights[label] for label in rows.labels]
    for _ in range(source.per_epoch // accumulation):
        found, seen = 0.0, set()
        for _ in range(accumulation):
            batch = source.next()
            numbers = [int(each) - 1 for each in batch.ids[:, 0]]
            found += sum(weight[n] * losses[n] for n in numbers) * batch.share / accumulation
            seen |= set(numbers)
        wanted = sum(weight[n] * losses[n] for n in seen) / sum(weight[n] for n in seen)
        assert found == pytest.approx(wanted)


def test_where_a_source_stands_can_be_taken_up():
    rows = TokenRows(ids=[[i + 1] for i in range(10)], labels=[0] * 10)
    sources = [EpochBatches(rows, size=3, accumulation=1, seed=0) for _ in "ab"]
    for _ in range(6):
        sources[0].next()
    sources[1].restore(sources[0].state())
    assert [sources[0].next().ids.tolist() for _ in range(5)] == [sources[1].next().ids.tolist() for _ in range(5)]
    with pytest.raises(ValueError, match="no number of batches"):
        sources[1].restore({"position": -1})


def test_padding():
    ids, mask = padded([[5, 0], [7, 8, 9], []])
    assert ids.tolist() == [[5, 0, 0], [7, 8, 9], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    rows = TokenRows(ids=[[1], [1, 2, 3], [1, 2]], labels=[0, 0, 0])
    assert by_length(rows, 2) == [[1, 2], [0]]
