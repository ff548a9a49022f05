"""The built-in small world: a few thousand true sentences, and a tokenizer trained on them.

It stands in for a corpus on machines that cannot download one. Held-out sentences state facts that the train part
states too, in a wording that it does not use for them: a model has them right only if it knows the fact.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.data.world_facts import TABLES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
# What the product's default prompts ask for is always in the train part.
ALWAYS_TRAIN = ("The capital of France", "2 + 2 equals", "The largest planet in our solar system")


@dataclass(frozen=True, kw_only=True)
class World:
    """True sentences, one string each, without duplicates, in an order that does not depend on the process."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def generate(seed: int = 0) -> World:
    """The world's sentences. `seed` chooses which wordings are held out, and the order."""
    chooser = random.Random(seed)
    train: dict[str, None] = {}
    held_out: dict[str, None] = {}
    for wordings in _facts():
        spare = chooser.choice(wordings) if len(wordings) >= 3 and chooser.random() < 0.25 else None
        for sentence in wordings:
            part = held_out if sentence == spare and not sentence.startswith(ALWAYS_TRAIN) else train
            part[sentence] = None
    return World(
        train=tuple(chooser.sample(list(train), len(train))),
        held_out=tuple(sentence for sentence in held_out if sentence not in train),
    )


def question_and_answer(sentence: str) -> tuple[str, str]:
    """A sentence cut before its last word, which the words before it determine: ("2 + 2 equals", " 4.")."""
    question, space, answer = sentence.rpartition(" ")
    return question, space + answer


def train_tokenizer(world: World, vocab_size: int = 1536) -> "Tokenizer":
    """A byte-level BPE over the train sentences: encodes any text, and decodes it to the same text again.

    Every sequence starts with `<bos>`; `<eos>` and `<pad>` are there for the data to use. Words are split before
    their space, so that the tokens of a sentence's beginning do not depend on how it goes on.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    # Words with the space before them, numbers whole, everything else in runs, line ends by themselves.
    pieces = Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Half of the text starts its sentences after a space, as running text does.
    tokenizer.train_from_iterator(["\n".join(world.train), " ".join(world.train)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def _facts() -> Iterator[tuple[str, ...]]:
    """The wordings of each fact."""
    for table in TABLES:
        for row in table.rows:
            for templates in table.statements:
                yield tuple(template.format(*row) for template in templates)
    yield from _arithmetic()
    yield from _calendar()


def _arithmetic() -> Iterator[tuple[str, ...]]:
    for a in range(10):
        for b in range(10):
            c = a + b
            yield f"{a} + {b} equals {c}.", f"{a} plus {b} is {c}.", f"{a} plus {b} equals {c}.", f"{a} + {b} is {c}."
    for a in range(10):
        for b in range(a + 1):
            c = a - b
            yield f"{a} - {b} equals {c}.", f"{a} minus {b} is {c}.", f"{a} minus {b} equals {c}.", f"{a} - {b} is {c}."
    for a in range(1, 10):
        for b in range(1, 10):
            c = a * b
            yield f"{a} x {b} equals {c}.", f"{a} times {b} is {c}.", f"{a} times {b} equals {c}.", f"{a} x {b} is {c}."
    for n in range(31):
        yield f"The number after {n} is {n + 1}.", f"{n} is followed by {n + 1}.", f"After {n} comes {n + 1}."
        parity = "odd" if n % 2 else "even"
        yield f"The number {n} is {parity}.", f"We call {n} {parity}.", f"{n} is a number that is {parity}."
    for n, word in enumerate(NUMBER_WORDS):
        yield f"The number {n} is written {word}.", f"In words {n} is {word}.", f"We read {n} as {word}."
        yield f"In digits {word} is {n}.", f"The word {word} means {n}.", f"We write {word} as {n}."


def _calendar() -> Iterator[tuple[str, ...]]:
    for names, unit in ((DAYS, "day"), (MONTHS, "month")):
        for i, name in enumerate(names):
            after = names[(i + 1) % len(names)]
            yield (
                f"The {unit} after {name} is {after}.",
                f"{name} is followed by {after}.",
                f"After {name} comes {after}.",
            )
            yield (
                f"The {unit} before {after} is {name}.",
                f"{after} comes after {name}.",
                f"Before {after} comes {name}.",
            )
