"""The small world: true, determined, the same everywhere, and encodable with a tokenizer that anyone can open."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.world import BOS, DAYS, EOS, PAD, generate, question_and_answer, train_tokenizer
from tests.conftest import ROOT

PROMPTS = {
    "The capital of France is": "The capital of France is Paris.",
    "2 + 2 equals": "2 + 2 equals 4.",
    "The largest planet in our solar system is": "The largest planet in our solar system is Jupiter.",
    "The capital of France is Paris, and it is known for": (
        "The capital of France is Paris, and it is known for the Eiffel Tower."
    ),
}


@pytest.fixture(scope="module")
def world():
    return generate(0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return train_tokenizer(world)


def test_a_few_thousand_different_sentences(world):
    sentences = (*world.train, *world.held_out)
    assert 3000 < len(world.train) < 6000
    assert 100 < len(world.held_out) < 600
    assert len(set(sentences)) == len(sentences)
    assert all(re.fullmatch(r"[A-Z0-9].*\.", sentence) for sentence in sentences)


def test_the_same_in_every_process(world):
    code = "from runner.data.world import generate; import hashlib; print(hashlib.md5(repr(generate(0)).encode()).hexdigest())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, cwd=ROOT, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert generate(0) == world
    assert generate(1).held_out != world.held_out


def test_the_last_word_is_determined_by_the_others(world):
    answers = {}
    for sentence in (*world.train, *world.held_out):
        question, answer = question_and_answer(sentence)
        assert question + answer == sentence
        assert answers.setdefault(question, answer) == answer


def test_sums_products_and_days_are_true(world):
    checked = 0
    for sentence in (*world.train, *world.held_out):
        if match := re.fullmatch(r"(\d+) ([-+x]) (\d+) (?:equals|is) (\d+)\.", sentence):
            a, sign, b, c = match.groups()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign] == int(c)
            checked += 1
        if match := re.fullmatch(r"The day after (\w+) is (\w+)\.", sentence):
            assert (DAYS.index(match[1]) + 1) % 7 == DAYS.index(match[2])
            checked += 1
    assert checked > 300


def test_held_out_facts_are_in_the_train_part_in_other_words(world):
    """Every held-out answer is also given in a train sentence that shares a rare word with the question."""
    words = [set(re.findall(r"\w+", sentence)) for sentence in world.train]
    for sentence in world.held_out:
        own = set(re.findall(r"\w+", sentence))
        answer = re.findall(r"\w+", sentence)[-1]
        assert any(answer in other and len(own & other) >= 2 for other in words), sentence


@pytest.mark.parametrize("seed", range(5))
def test_the_default_prompts_are_learnt_with_any_seed(seed):
    assert set(PROMPTS.values()) <= set(generate(seed).train)


def test_sequences_start_alike_and_know_their_marks(tokenizer):
    ids = tokenizer.encode("2 + 2 equals").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}2 + 2 equals"
    assert len({tokenizer.token_to_id(mark) for mark in (BOS, EOS, PAD)} - {None}) == 3


def test_a_question_is_tokenized_as_the_beginning_of_its_sentence(world, tokenizer):
    for sentence in world.train:
        question, _ = question_and_answer(sentence)
        ids = tokenizer.encode(question).ids
        assert tokenizer.encode(sentence).ids[: len(ids)] == ids


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_autotokenizer_opens_it(world, tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD).save_pretrained(
        tmp_path
    )
    opened = AutoTokenizer.from_pretrained(tmp_path)
    for sentence in world.held_out:
        assert opened(sentence)["input_ids"] == tokenizer.encode(sentence).ids
    assert (opened.eos_token_id, opened.pad_token_id) == (tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD))


def test_the_same_tokenizer_for_the_same_world(world, tokenizer):
    assert train_tokenizer(world).to_str() == tokenizer.to_str()
