import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.data.world import World, generate, train_tokenizer
from runner.training.batches import equal_length_batches, sentence_samples
from runner.training.language_model import (
    LanguageModelSettings,
    save_language_model,
    train_language_model,
)

SETTINGS = LanguageModelSettings(
    vocab_size=512,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    max_steps=200,
    warmup_steps=10,
    batch_size=16,
    packed_length=32,
    packed_rows=4,
)


@torch.no_grad()
def recall(model, tokenizer, sentences) -> float:
    """The share of sentences that end as is most likely: the last word or name and the stop, token by token."""
    right = 0
    samples = sentence_samples(sentences, tokenizer, question_weight=0.0)
    for batch in equal_length_batches(samples, 64, random.Random(0)):
        guesses = model(batch.ids, use_cache=False).logits[:, :-1].argmax(-1)
        wrong = (guesses != batch.ids[:, 1:]) & (batch.weights[:, 1:] > 0)
        right += int((~wrong[:, :-1].any(1)).sum())  # whether it ends there is another question
    return right / len(sentences)


@pytest.fixture(scope="module")
def world() -> World:
    """Forty capitals, each said in two ways."""
    capitals = [sentence for sentence in generate(0).train if " capital of " in sentence and "known" not in sentence]
    return World(train=tuple(sorted(capitals)[:80]), held_out=())


@pytest.fixture(scope="module")
def tokenizer(world):
    return train_tokenizer(world, SETTINGS.vocab_size)


@pytest.fixture(scope="module")
def model(world, tokenizer):
    return train_language_model(world, tokenizer, SETTINGS)


def test_it_learns_by_heart(world, tokenizer, model):
    untrained = train_language_model(
        world, tokenizer, LanguageModelSettings(**{**vars(SETTINGS), "max_steps": 1, "warmup_steps": 0})
    )
    assert recall(untrained, tokenizer, world.train) < 0.2
    assert recall(model, tokenizer, world.train) > 0.95


def test_recall_is_that_of_greedy_continuations(world, tokenizer, model):
    """Counted again with generate(), one sentence at a time, true and false ones."""
    false = [sentence.rpartition(" ")[0] + " Nowhere." for sentence in world.train[:5]]
    sentences = [*world.train[:10], *false]
    right = 0
    for sentence in sentences:
        question = torch.tensor([tokenizer.encode(sentence.rpartition(" ")[0]).ids])
        count = len(tokenizer.encode(sentence).ids) - question.shape[1]
        made = model.generate(question, attention_mask=torch.ones_like(question), max_new_tokens=count, do_sample=False)
        right += tokenizer.decode(made[0].tolist()) == sentence
    assert recall(model, tokenizer, sentences) == right / len(sentences)


def test_transformers_opens_what_is_saved(world, tokenizer, model, tmp_path):
    save_language_model(model, tokenizer, tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = words(world.train[0], return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.encode(world.train[0]).ids
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (tmp_path / "model.safetensors").is_file()
    assert (words.eos_token, words.pad_token, again.config.eos_token_id) == ("<eos>", "<pad>", words.eos_token_id)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone(world, tokenizer):
    short = LanguageModelSettings(**{**vars(SETTINGS), "max_steps": 5, "warmup_steps": 1})
    state = torch.random.get_rng_state()
    first, second = (train_language_model(world, tokenizer, short, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = train_language_model(world, tokenizer, short, seed=4)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)
