"""The chat: a conversation in a terminal with one checkpoint, beside its base, or from step to step of a run."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.text import Text

from runner.errors import ConfigError, RunnerError, did_you_mean, printable
from runner.evaluation.decoding import Feed
from runner.files.atomic import write_whole
from runner.files.file_type import sha256_of
from runner.generation.prompts import Message, Prompt, checked_messages
from runner.generation.settings import Settings, is_whole, spoken
from runner.generation.speaker import Speaker, switched
from runner.generation.text import written
from runner.metrics.generation import agreement
from runner.results import JsonObject

_HELP = {
    "help": "what can be typed here",
    "quit": "end the chat; also /exit, quit, exit, q, and Ctrl-D",
    "set": "NAME=VALUE …: change settings, such as temperature=0 top_k=40",
    "settings": "how answers are drawn now",
    "seed": "N: the seed of the next answer; the one after has N + 1",
    "system": "TEXT: the system prompt of the chat template; alone: none",
    "context": "on|off: plain models: keep the text so far before each line",
    "clear": "forget the conversation",
    "retry": "answer the last prompt again, with the next seed",
    "base": "the base's answer to the last prompt, with the same draws",
    "compare": "on|off: the base's answer below each one",
    "layers": "1,3|all|none: which NPT layers modulate",
    "step": "N: go on with another checkpoint of the run",
    "stats": "tokens and speed so far, and what the cache holds",
    "save": "FILE: messages, settings and the checkpoint's hash, as JSON lines",
    "load": "FILE: go on where it was saved",
}
_ENDS = ("quit", "exit", "q")
_QUOTES = '"""'
_HISTORY = 1000
# Positions of a cache for what follows an answer.
_SPARE = 4096
# Two Ctrl-C within so many seconds end the chat.
_TWICE = 1.0


@dataclass(frozen=True, kw_only=True)
class Partner:
    """Who answers: a checkpoint at `path` with its weights' `files`, and the `base` it is compared with, if any."""

    speaker: Speaker
    base: Speaker | None
    path: Path
    files: Sequence[Path]
    step: int | None


class Interrupts:
    """Ctrl-C while it answers asks for an end of the answer; a second one soon after, or at the prompt, is raised."""

    def __init__(self) -> None:
        self.answering = False
        self.asked = False
        self.again = False
        self._last = float("-inf")

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within the block; a thread that is not the main one gets no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.again, self._last = now - self._last < _TWICE, now
        if self.again or not self.answering:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Within the block it answers."""
        self.answering, self.asked = True, False
        try:
            yield
        finally:
            self.answering = False


class Chat:
    """A conversation with `partner`; `at_step` opens another checkpoint of its run, `read` gives the next line."""

    def __init__(
        self,
        partner: Partner,
        settings: Settings,
        *,
        at_step: Callable[[int], Partner],
        compares: bool = False,
        history: Path | None = None,
        read: Callable[[str], str] = input,
    ) -> None:
        self.settings = settings
        self.messages: list[Message] = []
        self.answers: list[JsonObject] = []
        self._partner = partner
        self._at_step = at_step
        self._compares = compares
        self._history = history
        self._read = read
        self._console = Console(highlight=False)
        self._interrupts = Interrupts()
        self._feed: Feed | None = None
        self._context: list[int] = []  # the text so far, of a plain model that keeps it
        self._keeps_context = False
        self._number = 0  # of the next answer since the seed was set
        self._last: tuple[str, Prompt, list[int], int] | None = None  # line, prompt, its ids, seed
        self._before: tuple[list[Message], list[int]] = ([], [])  # messages and context before the last line
        self._told_of_empty = False

    def talk(self) -> list[JsonObject]:
        """Until the user ends it; the samples of all answers. A second Ctrl-C is raised as KeyboardInterrupt."""
        with line_history(self._history), self._interrupts.caught():
            self._greet()
            while True:
                try:
                    text, quoted = self._message()
                    if self._is_end(text, quoted):
                        return self.answers
                    self._handle(text, quoted)
                except EOFError:
                    print()
                    return self.answers
                except KeyboardInterrupt:
                    if self._interrupts.again:
                        raise
                    print()
                    self._note("Ctrl-C once more ends the chat")

    def _message(self) -> tuple[str, bool]:
        """The next line, or the lines between three quotes; and whether it was in quotes."""
        line = self._read("you> ")
        if not line.lstrip().startswith(_QUOTES):
            return line.strip(), False
        lines = [line.lstrip()[len(_QUOTES) :]]
        while not lines[-1].rstrip().endswith(_QUOTES):
            lines.append(self._read("...> "))
        lines[-1] = lines[-1].rstrip()[: -len(_QUOTES)]
        return "\n".join(lines).strip("\n"), True

    def _is_end(self, text: str, quoted: bool) -> bool:
        return not quoted and text.lower() in (*_ENDS, "/quit", "/exit", "/q", "!quit", "!exit")

    def _handle(self, text: str, quoted: bool) -> None:
        try:
            name, _, rest = text[1:].partition(" ")
            if not text:
                if not self._told_of_empty:
                    self._note("an empty line does nothing; /quit or Ctrl-D ends the chat")
                self._told_of_empty = True
            elif not quoted and (text[0] == "/" or (text[0] == "!" and name in _HELP)):
                self._command(name, rest.strip())
            else:
                self._ask(text)
        except RunnerError as error:
            self._fault(str(error))
        except (torch.OutOfMemoryError, MemoryError):
            self._feed = None
            self._fault("out of memory; the cache was dropped: /clear, or a smaller max_new_tokens, may help")

    def _command(self, name: str, rest: str) -> None:
        if name not in _HELP:
            raise ConfigError(f"/{name} is no command{did_you_mean(name, _HELP)}")
        getattr(self, f"_do_{name}")(rest)

    # Answers.

    def _ask(self, text: str) -> None:
        speaker, settings = self._partner.speaker, self.settings
        self._before = list(self.messages), list(self._context)
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        templated = speaker.tokenizer is not None and speaker.has_template(settings)
        if templated:
            prompt = Prompt(messages=tuple(messages))
            ids = speaker.encode(prompt, settings)
        else:
            prompt = Prompt(text=text)
            goes_on = settings if not self._context else replace(settings, special_tokens=False)
            ids = speaker.checked([*self._context, *speaker.encode(prompt, goes_on)])
        seed = settings.seed + self._number
        self._last = text, prompt, ids, seed
        self._feed = self._feed or speaker.feed(settings, spare=_SPARE)
        sample = self._speak(speaker, prompt, ids, seed, self._feed)
        self._number += 1
        self.messages = [*messages, {"role": "assistant", "content": sample["text"]}]
        if self._keeps_context and not templated:
            new = sample["new_ids"]
            self._context = ids + (new[:-1] if sample["finish"] == "eos" else new)
        if self._compares:
            sample |= self._base_answer(sample)
        self.answers.append(sample)

    def _speak(self, speaker: Speaker, prompt: Prompt, ids: list[int], seed: int, feed: Feed | None) -> JsonObject:
        """One answer, shown as it is made, and the line below it."""
        pieces = speaker.stream(
            prompt, ids, replace(self.settings, seed=seed), feed=feed, broken_off=lambda: self._interrupts.asked
        )
        with self._interrupts.answer():
            while True:
                try:
                    print(written(next(pieces)), end="", flush=True)
                except StopIteration as end:
                    sample: JsonObject = end.value
                    break
        print(flush=True)
        speed = sample["tokens_per_second"] or 0
        self._note(
            f"{sample['tokens']} tokens, {sample['seconds']:.1f} s, {speed:.1f} tokens/s, "
            f"{sample['finish']}, seed {seed}"
        )
        return sample

    def _base_answer(self, sample: JsonObject) -> JsonObject:
        """The base's answer to the last prompt under the same draws, shown, and where it parts from `sample`."""
        assert self._last is not None
        if self._partner.base is None:
            raise ConfigError("this model stands on no base; start with reference=PATH to compare it")
        self._note("base:")
        _, prompt, ids, seed = self._last
        own, self.settings = self.settings, replace(self.settings, layers=None)
        try:
            theirs = self._speak(self._partner.base, prompt, ids, seed, None)
        finally:
            self.settings = own
        found = agreement(sample["new_ids"], theirs["new_ids"])
        place, share = found["first_divergence"], found["agreement"]
        if place is not None:
            at = int(place)
            mine, others = (
                repr(self._partner.speaker.decode(each["new_ids"][at : at + 1])) for each in (sample, theirs)
            )
            self._note(f"{share or 0:.0%} of the tokens agree; they part at token {at}: {mine}, base {others}")
        else:
            self._note("every token agrees")
        return {"reference_text": theirs["text"], "reference_new_ids": theirs["new_ids"], **found}

    # Commands.

    def _do_help(self, rest: str) -> None:
        for name, text in _HELP.items():
            self._note(f"/{name:<9} {text}")
        self._note(f"{_QUOTES} opens and closes a prompt of several lines; Ctrl-C ends an answer, twice the chat")

    def _do_set(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/set temperature=0 top_k=40: give at least one NAME=VALUE")
        self._change(**spoken(rest))

    def _change(self, **values: object) -> None:
        changed = self.settings.changed(values)
        switched(self._partner.speaker.model, changed.layers)
        self._partner.speaker.has_template(changed)
        if "seed" in values:
            self._number = 0
        if {"cache", "layers"} & set(values):
            self._feed = None
        self.settings = changed

    def _do_settings(self, rest: str) -> None:
        self._note(" ".join(f"{name}={value}" for name, value in self.settings.values().items()))

    def _do_seed(self, rest: str) -> None:
        self._change(seed=_whole("/seed", rest))

    def _do_system(self, rest: str) -> None:
        if not self._partner.speaker.has_template(self.settings):
            raise ConfigError("/system needs a chat template, and the tokenizer has none")
        self._change(system=rest or None)

    def _do_context(self, rest: str) -> None:
        self._keeps_context = _on("/context", rest)
        self._context = []

    def _do_clear(self, rest: str) -> None:
        self.messages, self._context, self._feed, self._last = [], [], None, None

    def _do_retry(self, rest: str) -> None:
        text, *_ = self._asked()
        self.messages, self._context = self._before
        self._ask(text)

    def _asked(self) -> tuple[str, Prompt, list[int], int]:
        if self._last is None:
            raise ConfigError("nothing was asked yet")
        return self._last

    def _do_base(self, rest: str) -> None:
        self._asked()
        self._base_answer(self.answers[-1])

    def _do_compare(self, rest: str) -> None:
        wanted = _on("/compare", rest)
        if wanted and self._partner.base is None:
            raise ConfigError("this model stands on no base; start with reference=PATH to compare it")
        self._compares = wanted

    def _do_layers(self, rest: str) -> None:
        if rest in ("all", "none", "[]"):
            self._change(layers=None if rest == "all" else ())
            return
        words = rest.strip("[]").replace(",", " ").split()
        if not words or not all(word.isdecimal() for word in words):
            raise ConfigError("/layers 1,3: give layer numbers, all, or none")
        self._change(layers=tuple(map(int, words)))

    def _do_step(self, rest: str) -> None:
        self._partner = self._at_step(_whole("/step", rest))
        self._feed = None
        self._greet()

    def _do_stats(self, rest: str) -> None:
        tokens = sum(answer["tokens"] for answer in self.answers)
        seconds = sum(answer["seconds"] for answer in self.answers)
        speed = tokens / seconds if seconds else 0
        held = len(self._feed.fed) if self._feed else 0
        limit = self._partner.speaker.max_length
        self._note(
            f"{len(self.answers)} answers, {tokens} tokens, {seconds:.1f} s, {speed:.1f} tokens/s; the cache holds "
            f"{held}{f' of {limit}' if limit else ''} positions"
        )

    def _do_save(self, rest: str) -> None:
        path = _file("/save", rest)
        head = {
            "checkpoint": str(self._partner.path),
            "step": self._partner.step,
            "hash": self._hashes(),
            "settings": self.settings.values(),
            "context": self._context if self._keeps_context else None,
        }
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in (head, *self.messages)]
        try:
            write_whole(path, "".join(lines).encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
        self._note(f"saved {len(self.messages)} messages to {path}")

    def _hashes(self) -> dict[str, str]:
        return {file.name: sha256_of(file) for file in self._partner.files}

    def _do_load(self, rest: str) -> None:
        path = _file("/load", rest)
        try:
            head, *messages = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
            settings, context = Settings().changed(head["settings"]), head["context"]
            known = head["hash"]
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: is not what /save writes") from error
        if context is not None and not (isinstance(context, list) and all(is_whole(each, 0) for each in context)):
            raise ConfigError(f"{path}: is not what /save writes")
        switched(self._partner.speaker.model, settings.layers)
        self.messages = list(checked_messages(messages, str(path))) if messages else []
        self.settings, self._feed, self._last = settings, None, None
        self._keeps_context, self._context = context is not None, context or []
        self._note(f"loaded {len(self.messages)} messages")
        if known != self._hashes():
            self._note(f"they were said by other weights: {printable(head.get('checkpoint'))}")

    # What is shown.

    def _greet(self) -> None:
        step = "" if self._partner.step is None else f", step {self._partner.step}"
        speaker = self._partner.speaker
        if speaker.tokenizer is not None and speaker.has_template(self.settings):
            kind = "a conversation, in the tokenizer's chat template"
        else:
            kind = "each line is continued by itself; /context on keeps the text so far"
        self._note(f"{self._partner.path.name}{step}: {kind}; /help lists the commands")

    def _note(self, text: str) -> None:
        self._console.print(Text(printable(text)), style="dim")

    def _fault(self, text: str) -> None:
        self._console.print(Text(printable(text)), style="red")


def _whole(command: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{command} {text}: give a whole number") from error


def _on(command: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise ConfigError(f"{command} {text}: give on or off")
    return text == "on"


def _file(command: str, text: str) -> Path:
    if not text:
        raise ConfigError(f"{command} FILE: give a file")
    return Path(text).expanduser()


@contextmanager
def line_history(path: Path | None) -> Iterator[None]:
    """Lines that were typed before, under the arrow keys, kept in `path`; None: no history."""
    try:
        import readline
    except ImportError:  # a Python without it: lines are read all the same
        path = None
    if path is None:
        yield
        return
    readline.set_history_length(_HISTORY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        readline.read_history_file(path)
    except OSError as error:
        print(f"{path}: the history cannot be read: {error.strerror}")
    try:
        yield
    finally:
        try:
            readline.write_history_file(path)
        except OSError as error:
            print(f"{path}: the history cannot be written: {error.strerror}")
