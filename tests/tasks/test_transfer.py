"""`task=transfer` from the command line: scripts, a pipe, a terminal, experiments, what is left, and errors."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

import runner
from runner.families.npt.tool.commands import COMMANDS
from tests.conftest import MIXED, npt_tensors, write_gpt, write_npt
from tests.generation.test_chat import Terminal

A, B = "the capital of France is", "12 planets"
SESSION = f"""\
# a comment, then an empty line

track x
extract a "{A}"
extract-seq b "{A} x"
inject a "{B}"
inject-add b "{B}" -strength 0.5 -tokens 3
sweep a "{B}" -strengths 0,1
map "{A}"
"""


@pytest.fixture(scope="module")
def npt(base, tmp_path_factory):
    return write_npt(tmp_path_factory.mktemp("task") / "npt", npt_tensors(base, MIXED), base=base)


@pytest.fixture
def script(run, npt):
    """Run these lines as a script; the outcome."""

    def call(text, *words):
        Path("lines.txt").write_text(text, encoding="utf-8")
        return run("task=transfer", f"ckpt={npt}", "transfer.script=lines.txt", *words)

    return call


def test_a_script(script, npt):
    outcome = script(SESSION)
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert [row["line"] for row in result["commands"]] == list(range(3, 10))
    assert result["commands"][3]["command"] == f'inject a "{B}"'
    model = runner.load(npt)
    m = runner.transfer.extract(model, A)
    found = runner.transfer.inject(model, B, m)
    assert result["commands"][3]["kl"] == result["metrics"]["kl"] == pytest.approx(found.kl)
    assert result["per_prompt"][0]["prompt"] == B
    assert {"permuted_kl", "other_prompt_kl", "locality_kl"} < set(result["metrics"])
    assert "> " not in outcome.out
    assert "\x1b" not in outcome.out
    assert f"KL {found.kl:.4f} nats" in outcome.out
    assert "injections" in outcome.out
    page = Path(result["page"])
    text = page.read_text(encoding="utf-8")
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', text)[1])
    assert len(charts) == 5  # probabilities, along new tokens, by strength, by layer, the map
    assert charts[2]["data"][0]["x"] == [0.0, 1.0]
    rows = list(csv.DictReader(io.StringIO((page.parent / "transfer.csv").read_text(encoding="utf-8"))))
    kinds = {row["kind"] for row in rows}
    assert kinds == {"injection", "by_strength", "by_layer", "steps", "delta_map"}
    assert float(next(row for row in rows if row["kind"] == "injection")["kl"]) == pytest.approx(found.kl)


def test_a_pipe(run, npt, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f'extract a "{A}"\nexit\nnever read\n'))
    outcome = run("task=transfer", f"ckpt={npt}", "transfer.page=false")
    assert outcome.code == 0, outcome.err
    assert [row["command"] for row in outcome.result["commands"]] == [f'extract a "{A}"', "exit"]
    assert "page" not in outcome.result


@pytest.mark.parametrize(
    ("line", "says"),
    [('save s\nextrakt b "x"', "did you mean 'extract'"), ('inject nobody "x"', "the bank holds a"), ("save lines.txt", "lines.txt")],
)  # fmt: skip
def test_the_first_bad_line_ends_a_script(script, line, says):
    outcome = script(f'extract a "{A}"\n{line}\nsave later\n')
    number = 2 + line.count("\n")
    assert outcome.code == 2
    assert f"lines.txt, line {number}: " in outcome.err
    assert says in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not Path("later").exists()
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []
    assert outcome.result["status"] == "error"
    assert Path("s").exists() == line.startswith("save s")


def test_what_is_not_finite_ends_with_1(script):
    outcome = script(f'extract a "{A}"\nscale a 1e30 b\nscale b 1e30 c\n')
    assert outcome.code == 1
    assert "line 3: layer 0: v_b of gate is not finite" in outcome.err


def test_a_checkpoint_without_npt_layers(run, base, tmp_path):
    (tmp_path / "gpt").mkdir()
    write_gpt(tmp_path / "gpt", "small")
    Path("lines.txt").write_text("list\n")
    for path in (base, tmp_path / "gpt"):
        outcome = run("task=transfer", f"ckpt={path}", "transfer.script=lines.txt")
        assert outcome.code == 2
        assert "No NPT layers found" in outcome.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["transfer.space=weight"], "choose weights or vectors"), (["transfer.scipt=x"], "transfer.scipt"),
        (["transfer.script=nowhere.txt"], "cannot be read"), (["transfer.session=nowhere"], "No such file"),
        (["family.layers=[1,9]"], "layer 9 is no NPT layer"), (["transfer.experiment=nowhere.yaml"], "cannot be read"),
    ],
)  # fmt: skip
def test_bad_options(run, npt, words, says):
    Path("lines.txt").write_text("list\n")
    given = words if words[0].startswith(("transfer.script", "transfer.exp")) else ["transfer.script=lines.txt", *words]
    outcome = run("task=transfer", f"ckpt={npt}", *given)
    assert outcome.code == 2
    assert says in outcome.err


def test_layers_and_a_session_to_begin_with(script, run, npt):
    assert script(f'extract a "{A}"\nsave with\\ space\n').code == 0
    outcome = script(
        f'inject a "{B}"\n', "transfer.session=with space", "family.layers=[0,2]", "transfer.controls=false"
    )
    assert outcome.code == 0, outcome.err
    (row,) = outcome.result["commands"]
    assert (row["active_layers"], "controls" in row) == ([0, 1, 2], False)  # as the session says
    fresh = script(f'extract a "{A}"\n', "family.layers=[0,2]").result["commands"][0]
    assert fresh["active_layers"] == [0, 2]
    diagnosed = [
        run(f"ckpt={npt}", *words).result["metrics"]["mse"] for words in ([], ["family=npt", "family.layers=[]"])
    ]
    assert diagnosed[0] > diagnosed[1] == 0


def test_edits_are_diagnosed_and_tested(script, run, base):
    assert script(f'inject-all "{A}" -strength 0.05\nsave-model edited\nsave-model whole -form hf\n').code == 0
    mses = []
    for path in ("edited", "whole"):
        outcome = run("task=diagnose", f"ckpt={path}", "reference=base")
        assert outcome.code == 0, outcome.err
        assert outcome.result["format"] == "npt_edit"
        assert Path(outcome.result["reference"]) == base
        assert outcome.result["metrics"]["control_mse"] == 0
        assert any("base weights differ" in each for each in outcome.result["findings"])
        mses.append(outcome.result["metrics"]["mse"])
        outcome = run("task=test", f"ckpt={path}", "tier=quick")
        assert outcome.code == 0, outcome.out
        assert "Edits" in run("task=inspect", f"ckpt={path}").out
    assert mses[0] == mses[1]


EXPERIMENTS = {
    "experiments": [
        {"name": "last", "source": A, "answer": " Paris", "target": B, "target_answer": " x", "by_layer": True},
        {"name": "blend", "source": A, "target": B, "mode": "blend", "alpha": 0.5},
        {"name": "several", "source": A, "target": B, "positions": "last_n"},
        {"name": "mean", "source": A, "target": B, "positions": "avg_last"},
        {"name": "context", "source": A, "without": "it is", "target": B, "track": ["x"], "strengths": [0.01, 0.1]},
    ]
}  # fmt: skip


def test_experiments(run, npt):
    Path("e.yaml").write_text(yaml.safe_dump(EXPERIMENTS))
    outcome = run("task=transfer", f"ckpt={npt}", "transfer.experiment=e.yaml")
    assert outcome.code == 0, outcome.err
    result = outcome.result
    last, blend, several, mean, context = result["experiments"]
    model = runner.load(npt)
    tokenizer = runner.transfer.tokenizer_of(model)
    first = tokenizer.encode(" Paris", special=False)[0]
    source = [*tokenizer.encode(A, special=False), first]
    found = runner.transfer.inject(model, B, runner.transfer.extract(model, source))
    assert last["kl"] == pytest.approx(found.kl)
    before, after = found.probabilities(first)
    answer = last["answers"]["source"]
    assert [answer["before"], answer["after"]] == pytest.approx([before, after])
    assert answer["relative"] == pytest.approx((after - before) / (before + 1e-10))
    assert [row["layer"] for row in last["by_layer"]] == [0, 1, 2]
    alone = runner.transfer.inject(model, B, runner.transfer.extract(model, source, layers=[1]), layers=[1])
    assert last["by_layer"][1]["kl"] == pytest.approx(alone.kl)
    assert result["means"]["kl_by_layer"]["1"] == pytest.approx(alone.kl)
    assert result["means"]["kl"] == pytest.approx(sum(row["kl"] for row in (last, blend, several, mean)) / 4)
    m = runner.transfer.extract(model, A, slice(-3, None))
    assert several["kl"] == pytest.approx(runner.transfer.inject(model, B, m).kl)
    m = runner.transfer.extract(model, A, slice(-5, None)).mapped(lambda i, n, pair: tuple(t.mean(0) for t in pair))
    assert mean["kl"] == pytest.approx(runner.transfer.inject(model, B, m).kl)
    m = runner.transfer.combine("subtract", *(runner.transfer.extract(model, text) for text in (A, "it is")))
    with runner.transfer.permanent(model, m, strength=0.1) as edit:
        norms = [row["delta_norm"] for row in edit.report]
    assert [row["strength"] for row in context["by_strength"]] == [0.01, 0.1]
    assert [row["delta_norm"] for row in context["by_strength"][1]["matrices"]] == pytest.approx(norms)
    assert context["by_strength"][1]["kl"] > context["by_strength"][0]["kl"] > 0
    assert "last: KL" in outcome.out
    assert Path(result["page"]).exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("experiments: []", "with a list"), ("experiments: [{source: a}]", "needs source and target"), ("a: [", "no valid YAML"),
        ("experiments: [{source: a, target: b, positons: last}]", "did you mean 'positions'"),
        ("experiments: [{source: a, target: b, mode: blend}]", "experiment 1.*needs alpha"),
        ("experiments: [{source: a, target: b, mode: mix}]", "choose replace"), ("experiments: [{source: '', target: b}]", "give a text"),
        ("experiments: [{source: a, target: b, strengths: [x]}]", "list of numbers"),
    ],
)  # fmt: skip
def test_experiments_are_checked(run, npt, content, says):
    Path("e.yaml").write_text(content)
    outcome = run("task=transfer", f"ckpt={npt}", "transfer.experiment=e.yaml")
    assert outcome.code == 2
    assert re.search(says, outcome.err)


def test_a_hostile_text_is_only_text_in_the_page(script):
    text = "</script><script>alert(1)</script>{{ 7*7 }}"
    outcome = script(f"extract a '{text}'\ninject a '{text}'\nmap '{text}'\n")
    assert outcome.code == 0, outcome.err
    assert "<script>alert" not in Path(outcome.result["page"]).read_text(encoding="utf-8")


TYPED = [
    ('track x " y" Paris', "tracked|tokens"), ("track", "id"), ("untrack x", "2 tokens"), (f'extract a "{A}"', "magnitude"),
    (f'extract p "{A}" -pos -2', "magnitude"), (f'extract-seq b "{B}"', "mean over"), ("list", "layer 0"), ("info a", "taken"),
    (f'test "{B}"', "layers 0, 1, 2"), (f'inject a "{B}"', "locality"), (f'inject-blend a "{B}" -alpha 0.5', "locality"),
    (f'inject-add a "{B}" -strength 2', "locality"), (f'inject a "{B}" -tokens 3', "KL mean"),
    (f'inject a "{B}" -tokens 3 -strategy top_p -top_p 0.8 -temp 1.5', "KL mean"), (f'compare a "{B}"', "baseline"),
    ("add a b c", "magnitude"), ("subtract a b c", "replaces"), ("average a b c d", "magnitude"), ("scale a 2 e", "magnitude"),
    ("negate a n", "magnitude"), ("layers", "NPT layers"), ("layers 1,2", "active: 1, 2"), ("delete p", "is gone"),
    (f'sweep a "{B}"', "by layer"), (f'map "{A}"', "layer 1"), ("save s", "saved in"), ("load s", "modulations:"),
    ("layer 1", "layer 1"), (f'inject-one "{A} x"', "written"), (f'inject-all "{A} x"', "written"), (f'inject-multi "{A} x" 1', "written"),
    ("write a 2", "written"), ("edits", "4\\."), ("recall", "of 9"), ("general", "2 \\+ 2"), ("save-model m", "opens it"),
    ("reset 1", "first weights"), ("reset-all", "first weights"), ("strength 0.5", "0.5"), ("layer 2", "layer 2"),
    ("mode 0 npt", "layer 0: npt"), ("modes", "layer 1"), ("arch", "hidden size"), ("status", "edits"), (f'ask "{A}"', "\r\n"),
    ("clear", "no token"), ("history", "status"), ("clear-history", "empty"), ("help", "inject-blend"),
    ("injekt", "did you mean 'inject'"), ("layers 99", "no NPT layer"),
]  # fmt: skip


@pytest.mark.slow
def test_every_command_in_a_terminal(npt, tmp_path):
    assert {line.split()[0] for line, _ in TYPED} >= set(COMMANDS) - {"exit"}
    terminal = Terminal(tmp_path, "task=transfer", f"ckpt={npt}")
    for line, says in TYPED:
        terminal.until("> ")
        terminal.type(f"{line}\r")
        terminal.until("\r\n")
        terminal.until(says)
    terminal.until("> ")
    terminal.type("\x03")
    terminal.until("interrupted")
    terminal.until("> ")
    terminal.type("exit\r")
    assert terminal.end() == 0
    (file,) = (tmp_path / "outputs").rglob("result.json")
    assert [row["command"] for row in json.loads(file.read_text())["commands"]] == [line for line, _ in TYPED[:-2]] + [
        "exit"
    ]
    assert (tmp_path / ".cache" / "runner" / "transfer_history").read_text().startswith("track x")


@pytest.mark.slow
def test_ctrl_c_ends_a_command_and_twice_the_session(npt, tmp_path):
    terminal = Terminal(tmp_path, "task=transfer", f"ckpt={npt}")
    terminal.until("> ")
    terminal.type(f'extract a "{A}"\r')
    terminal.until("> ")
    terminal.type(f'inject a "{B}" -tokens 140 -strategy sample\r')
    terminal.until("\r\n")
    terminal.type("\x03")
    terminal.until("interrupted|140 tokens")
    terminal.until("> ")
    terminal.type(f'inject a "{B}"\r')
    terminal.until("locality")
    terminal.until("> ")
    said = ""
    while "runner: interrupted" not in said:  # on a busy machine the second may come too late to be one
        terminal.type("\x03")
        said = terminal.until("once more to end|runner: interrupted", again="\x03")
    assert terminal.end() == 130


def test_injections_are_rows_in_the_tracker(script):
    from runner.tracking.rows import job_record

    record = job_record(script(SESSION).result, 100)
    assert record.rows[0]["eval/kl"] > 0
    assert "eval/locality_kl" in record.rows[0]
    assert "permuted_kl" in record.tables["tables/per_prompt"].columns
