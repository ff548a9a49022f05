"""The chat: scripted in this process, and under a pseudo-terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import runner
from runner.checkpoints.runs import resolve
from runner.errors import ConfigError
from runner.evaluation.decoding import eos_ids
from runner.evaluation.tokenizers import load_tokenizer
from runner.generation import chat as chats
from runner.generation.chat import Chat, Interrupts, Partner, line_history
from runner.generation.settings import Settings
from runner.generation.speaker import Speaker
from tests.conftest import MIXED, ROOT, npt_tensors, write_npt
from tests.machine import LIMIT

TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"


@pytest.fixture(scope="module")
def run_directory(base, tmp_path_factory):
    """A run of two NPT checkpoints."""
    root = tmp_path_factory.mktemp("chat") / "run"
    for step in (100, 200):
        write_npt(root / f"checkpoint-{step}", npt_tensors(base, MIXED, seed=step), base=base, step=step)
    return root


@pytest.fixture(scope="module")
def partners(run_directory, base):
    """A function from a step to who answers there; the tokenizer has a chat template where that is asked for."""
    plain, made = runner.load(base), {}

    def at(step: int, template: str | None = None) -> Partner:
        path = resolve(run_directory, step)
        if step not in made:
            made[step] = runner.load(path)
        tokenizer = replace(load_tokenizer(None, [base]), chat_template=template)
        speaker = Speaker(model=made[step], tokenizer=tokenizer, eos=eos_ids(made[step], tokenizer))
        other = Speaker(model=plain, tokenizer=tokenizer, eos=speaker.eos)
        return Partner(speaker=speaker, base=other, path=path, files=[path / "npt_weights.pt"], step=step)

    return at


@pytest.fixture
def talk(partners, capsys):
    """Let a chat read these lines, the end of input after them; the chat, and what it showed."""

    def call(*lines: str, template=None, settings=None, **options):
        rest = iter(lines)

        def read(prompt: str) -> str:
            try:
                return next(rest)
            except StopIteration:
                raise EOFError from None

        given = settings or Settings(max_new_tokens=6, temperature=0.8, seed=5)
        chat = Chat(partners(100, template), given, at_step=lambda step: partners(step, template), read=read, **options)
        chat.talk()
        return chat, " ".join(capsys.readouterr().out.split())

    return call


def expected(partner: Partner, prompt, seed: int, **options) -> dict:
    speaker, given = partner.speaker, {"max_new_tokens": 6, "temperature": 0.8, "seed": seed, **options}
    (sample,) = runner.generate(speaker.model, [prompt], tokenizer=speaker.tokenizer, **given)
    return sample


def test_each_line_is_a_prompt_with_the_next_seed(talk, partners):
    chat, shown = talk("hello", "", "", "hello", '"""two', 'lines"""', "/retry", "quit", "never")
    prompts = ["hello", "hello", "two\nlines", "two\nlines"]
    assert [answer["prompt"] for answer in chat.answers] == prompts
    for number, (prompt, answer) in enumerate(zip(prompts, chat.answers, strict=True)):
        known = expected(partners(100), prompt, 5 + number)
        assert (answer["new_ids"], answer["text"], answer["seed"]) == (known["new_ids"], known["text"], 5 + number)
    assert shown.count("an empty line does nothing") == 1
    assert shown.count("tokens/s, length, seed") == 4


def test_settings_hold_from_then_on(talk, partners):
    chat, shown = talk(
        "/set temperature=0 max_new_tokens=3", "hello", "/seed 9", "/set temperature=0.8", "hello", "/settings"
    )
    first, second = chat.answers
    assert first["new_ids"] == expected(partners(100), "hello", 0, temperature=0, max_new_tokens=3)["new_ids"]
    assert second["new_ids"] == expected(partners(100), "hello", 9, max_new_tokens=3)["new_ids"]
    assert "max_new_tokens=3 temperature=0.8" in shown


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/retry", "nothing was asked"), ("/base", "nothing was asked"), ("/set", "at least one"), ("/set top_kk=3", "top_k"),
        ("/set top_k=0", "at least 1"), ("/nothing", "no command"), ("/layers 7", "layer 7 is no NPT layer"),
        ("/layers x", "layer numbers"), ("/seed x", "whole number"), ("/compare maybe", "on or off"), ("/step 300", "no step 300"),
        ("/load nowhere.jsonl", "cannot be read"), ("/save", "give a file"), ("/system be kind", "chat template"),
        ("/set chat=true", "no chat template"), ("x" * 200, "leaves no room"),
    ],
)  # fmt: skip
def test_a_mistake_is_a_line_and_the_chat_goes_on(talk, line, says):
    chat, shown = talk(line, "hello")
    assert says in shown
    assert [answer["seed"] for answer in chat.answers] == [5]


def test_a_conversation_in_the_chat_template(talk, partners):
    chat, _ = talk("one", "/system be brief", "two", "/clear", "three", "!help", template=TEMPLATE)
    first, second, third = chat.answers
    speaker = partners(100, TEMPLATE).speaker
    texts = ["<u>one<a>", f"<s>be brief<u>one<a>{first['text']}<u>two<a>", "<s>be brief<u>three<a>"]
    assert [speaker.decode(each["ids"]) for each in (first, second, third)] == texts
    for number, answer in enumerate(chat.answers):
        assert answer["new_ids"] == expected(partners(100), answer["ids"], 5 + number)["new_ids"]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_the_cache_goes_on_with_the_conversation(talk, partners):
    """What was fed is fed once: the second prompt of a kept context costs its new tokens."""
    chat, shown = talk("/context on", "one", "two", "/stats", "/context off", "one")
    first, second, third = chat.answers
    own = partners(100).speaker.encode(chats.Prompt(text="two"), Settings())
    assert second["ids"] == [*first["ids"], *first["new_ids"], *own]
    assert second["new_ids"] == expected(partners(100), second["ids"], 6)["new_ids"]
    assert third["ids"] == first["ids"]
    assert f"the cache holds {len(second['ids']) + 5} of 160 positions" in shown


def test_beside_the_base(talk, partners):
    chat, shown = talk("/compare on", "hello", "/compare off", "hello", "/base")
    known = expected(partners(100), "hello", 5)
    (base,) = runner.generate(
        partners(100).base.model, ["hello"], tokenizer=partners(100).speaker.tokenizer,
        max_new_tokens=6, temperature=0.8, seed=5,
    )  # fmt: skip
    assert chat.answers[0]["new_ids"] == known["new_ids"]
    assert chat.answers[0]["reference_new_ids"] == base["new_ids"]
    assert "reference_text" not in chat.answers[1]
    assert shown.count("base:") == 2
    assert "of the tokens agree; they part at token" in shown


def test_layers_and_steps(talk, partners):
    chat, _ = talk("/layers none", "hello", "/layers 1", "hello", "/layers all", "/step 200", "hello")
    base, one, other = chat.answers
    assert base["new_ids"] == expected(partners(100), "hello", 5, layers=[])["new_ids"]
    assert one["new_ids"] == expected(partners(100), "hello", 6, layers=[1])["new_ids"]
    assert other["new_ids"] == expected(partners(200), "hello", 7)["new_ids"]


def test_save_and_load(talk, tmp_path):
    file = tmp_path / "talk.jsonl"
    before, _ = talk("/set top_k=40", "/context on", "one", f"/save {file}", "two")
    head, *messages = map(json.loads, file.read_text().splitlines())
    assert (head["step"], head["settings"]["top_k"], list(head["hash"])) == (100, 40, ["npt_weights.pt"])
    assert [message["role"] for message in messages] == ["user", "assistant"]
    after, shown = talk(f"/load {file}", "/seed 6", "two")
    assert after.answers[0]["ids"] == before.answers[1]["ids"]
    assert after.answers[0]["new_ids"] == before.answers[1]["new_ids"]
    assert "other weights" not in shown
    _, shown = talk("/step 200", f"/load {file}")
    assert "other weights" in shown
    file.write_text("[]\n")
    _, shown = talk(f"/load {file}")
    assert "is not what /save writes" in shown


def test_out_of_memory_drops_the_cache(talk, partners, monkeypatch):
    def failing(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Speaker, "stream", failing)
    chat, shown = talk("hello")
    assert "out of memory" in shown
    assert chat.answers == []


def test_interrupts_of_an_answer_and_of_the_chat(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(chats.time, "monotonic", lambda: now[0])
    interrupts = Interrupts()
    with interrupts.caught(), interrupts.answer():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked
        now[0] += 1.1
        os.kill(os.getpid(), signal.SIGINT)  # a later one is another first one
        now[0] += 0.9
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.again


def test_the_history_of_lines(tmp_path):
    import readline

    with line_history(tmp_path / "deep" / "history"):
        readline.add_history("typed before")
    assert "typed before" in (tmp_path / "deep" / "history").read_text()
    with line_history(None):
        pass


class Terminal:
    """A runner in a pseudo-terminal."""

    def __init__(self, directory: Path, *words: str, columns: int = 100) -> None:
        self.parent, child = pty.openpty()
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(columns), "HOME": str(directory),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runner", *words, "tracker=none"], cwd=directory, env=environment,
            stdin=child, stdout=child, stderr=child, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.parent, text.encode())

    def until(self, pattern: str, again: str = "") -> str:
        """Read until `pattern` comes; what came before it and with it.

        `again` is typed once more when nothing comes: readline can miss a signal in the moment before it waits.
        """
        end = time.monotonic() + LIMIT
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if not select.select([self.parent], [], [], 2)[0]:
                self.type(again)
                continue
            try:
                self.seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(self.parent, 4096).decode(errors="replace"))
            except OSError:  # the other end is closed
                match = re.search(pattern, self.seen)
                assert match, self.seen
                break
        said, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return said

    def end(self) -> int:
        code = self.process.wait(LIMIT)
        os.close(self.parent)
        return code


def test_in_a_terminal(run_directory, tmp_path):
    """Streaming, a block, commands, one Ctrl-C and then the end of input; the answers are in the result."""
    terminal = Terminal(tmp_path, "task=generate", f"ckpt={run_directory}", "step=-1", "generate.max_new_tokens=4")
    terminal.until("you> ")
    terminal.type("hello\r")
    terminal.until(r"4 tokens, .* length, seed 0\r\n")
    terminal.until("you> ")
    terminal.type('"""two\r')
    terminal.until(r"\.\.\.> ")
    terminal.type('lines"""\r')
    terminal.until(r"seed 1\r\n")
    terminal.until("you> ")
    terminal.type("/set max_new_tokens=150 ignore_eos=true\r")
    terminal.until("you> ")
    terminal.type("on\r")
    terminal.until("on\r\n.")
    terminal.type("\x03")
    terminal.until(r"interrupted, seed 2\r\n")
    terminal.until("you> ")
    terminal.type("/step 100\r")
    terminal.until("checkpoint-100, step 100")
    terminal.until("you> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    (file,) = (tmp_path / "outputs").rglob("result.json")
    answers = json.loads(file.read_text())["generation"]
    assert [answer["prompt"] for answer in answers] == ["hello", "two\nlines", "on"]
    assert [answer["finish"] for answer in answers] == ["length", "length", "interrupted"]
    assert (tmp_path / ".cache" / "runner" / "chat_history").read_text().startswith("hello\n")


@pytest.mark.slow
def test_twice_ends_the_chat(run_directory, tmp_path):
    terminal = Terminal(tmp_path, "task=generate", f"ckpt={run_directory}", "step=100")
    terminal.until("you> ")
    said = ""
    while "runner: interrupted" not in said:  # on a busy machine the second may come too late to be one
        terminal.type("\x03")
        said = terminal.until("Ctrl-C once more|runner: interrupted", again="\x03")
    assert terminal.end() == 130


def test_no_terminal_is_no_chat(run, run_directory):
    outcome = run("task=generate", f"ckpt={run_directory}", "step=100")
    assert outcome.code == 2
    assert "give prompt=" in outcome.err


def test_settings_of_the_configs_are_those_of_python():
    import yaml

    node = yaml.safe_load((ROOT / "conf" / "task" / "generate.yaml").read_text())["generate"]
    del node["_target_"]
    assert {**node, "seed": 0} == Settings().values()
    with pytest.raises(ConfigError):
        next(runner.generate("demo", ["a"], temprature=1))
