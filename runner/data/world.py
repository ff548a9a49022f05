"""The built-in small world: a few thousand true sentences, and a tokenizer trained on them.

It stands in for a corpus on machines that cannot download one. Held-out sentences state facts that the train part
states too, in a wording that it does not use for them: a model has them right only if it knows the fact.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

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
OPERATION = (
    "{a} {sign} {b} equals {c}.",
    "{a} {word} {b} is {c}.",
    "{a} {word} {b} equals {c}.",
    "{a} {sign} {b} is {c}.",
)
AFTER = (
    "The {unit} after {a} is {b}.",
    "After {a} comes {b}.",
    "{a} is followed by {b}.",
    "The next after {a} is {b}.",
)
BEFORE = (
    "The {unit} before {b} is {a}.",
    "Before {b} comes {a}.",
    "{b} comes after {a}.",
    "The last before {b} is {a}.",
)
PARITY = (
    "The number {n} is {parity}.",
    "We call {n} {parity}.",
    "{n} is a number that is {parity}.",
    "{n} is {parity}.",
)
SPELLED = ("The number {n} is written {word}.", "In words {n} is {word}.", "We read {n} as {word}.")
DIGITS = ("In digits {word} is {n}.", "The word {word} means {n}.", "We write {word} as {n}.")
_ANSWER = re.compile(r"(?: the)?(?: [A-Z]\w*)+\.$| \S+$")
# What the product's default prompts ask for is always in the train part.
ALWAYS_TRAIN = ("The capital of France", "2 + 2 equals", "The largest planet in our solar system")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of facts and, by the fact that they state, the templates over a row's columns."""

    rows: tuple[tuple[str, ...], ...]
    statements: tuple[tuple[str, ...], ...]

    def facts(self) -> Iterator[tuple[str, ...]]:
        """The wordings of each fact."""
        for row in self.rows:
            for templates in self.statements:
                yield tuple(template.format(*row) for template in templates)


@cache
def tables() -> dict[str, Table]:
    """The world's tables of facts by what they are about."""
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {
        name: Table(
            rows=tuple(tuple(row.strip().split("|")) for row in table["rows"].split(";")),
            statements=tuple(map(tuple, table["statements"])),
        )
        for name, table in content.items()
    }


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
        spare = chooser.choice(wordings) if len(wordings) >= 4 and chooser.random() < 0.3 else None
        for sentence in wordings:
            part = held_out if sentence == spare and not sentence.startswith(ALWAYS_TRAIN) else train
            part[sentence] = None
    return World(
        train=tuple(chooser.sample(list(train), len(train))),
        held_out=tuple(sentence for sentence in held_out if sentence not in train),
    )


def question_and_answer(sentence: str) -> tuple[str, str]:
    """A sentence cut before its last word or name, which the words before determine: ("2 + 2 equals", " 4.")."""
    answer = _ANSWER.search(sentence)
    assert answer is not None, "every sentence has more than one word"
    return sentence[: answer.start()], answer.group()


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
    for table in tables().values():
        yield from table.facts()
    yield from _arithmetic()
    yield from _calendar()


def _arithmetic() -> Iterator[tuple[str, ...]]:
    for a in range(10):
        for b in range(10):
            yield _in_words(OPERATION, a=a, sign="+", word="plus", b=b, c=a + b)
        for b in range(a + 1):
            yield _in_words(OPERATION, a=a, sign="-", word="minus", b=b, c=a - b)
    for a in range(1, 10):
        for b in range(1, 10):
            yield _in_words(OPERATION, a=a, sign="x", word="times", b=b, c=a * b)
    for n in range(31):
        yield _in_words(AFTER, unit="number", a=n, b=n + 1)
        yield _in_words(PARITY, n=n, parity="odd" if n % 2 else "even")
    for n, word in enumerate(NUMBER_WORDS):
        yield _in_words(SPELLED, n=n, word=word)
        yield _in_words(DIGITS, n=n, word=word)


def _calendar() -> Iterator[tuple[str, ...]]:
    for names, unit in ((DAYS, "day"), (MONTHS, "month")):
        for a, b in zip(names, (*names[1:], names[0]), strict=True):
            yield _in_words(AFTER, unit=unit, a=a, b=b)
            yield _in_words(BEFORE, unit=unit, a=a, b=b)


def _in_words(templates: tuple[str, ...], **values: object) -> tuple[str, ...]:
    return tuple(template.format(**values) for template in templates)
