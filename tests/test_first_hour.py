"""What a new user types in the first hour: nothing false, nothing silent, one line for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import runner
from runner.config import TASKS
from runner.installation import demo_run
from tests.conftest import MIXED, ROOT, npt_tensors, write_npt

# The words, and what the one line on stderr says; nothing was written by then.
MISTAKES: dict[tuple[str, ...], str] = {
    ("ckpt=",): "ckpt= is empty",
    ("base=",): "base= is empty",
    ("task=merge", "merge.sources="): "merge.sources= is empty",
    ("hydra/launcher=joblib",): "add -m",
    ("ckpt=https://example.org/x",): "web address",
    ("base=https://example.org/x",): "name of the hub",
    ("ckpt=meta-llama/Llama-3.2-1B",): "hf download meta-llama/Llama-3.2-1B",
    ("experiment=compare_runs",): "ckpt=A,B",
    ("-m", "experiment=merged_against_separate", "ckpt=demo"): "ckpt=A,B",
    ("-m", "step=range(1,3)"): "its steps are 750",
}
# As above; these leave a result that says the same.
REFUSED: dict[tuple[str, ...], str] = {
    ("data.path=x.txt",): "add data=text",
    ("data.mix={a.txt:1}",): "choose it with data=",
    ("seed=one",): "seed=one: give a whole number",
    ("accuracy=flase",): "accuracy=flase: give true or false",
    ("+ckpt=demo",): "without the +: ckpt=demo",
    ("output=/proc/x",): "output=/proc/x: cannot be written",
    ("output=.",): "output=.: is a directory",
    ("cache=/proc/x",): "cache=/proc/x: cannot be written",
    ("reference=no/such/thing",): "reference=no/such/thing: no such directory",
    ("reference=no such",): "reference=no such: no such directory",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_before_anything_happens(run, words):
    outcome = run(*words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
    assert MISTAKES[words] in outcome.err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("words", REFUSED)
def test_a_refusal_is_one_line_and_nothing_is_measured(run, words):
    outcome = run(*words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
    assert REFUSED[words] in outcome.err


@pytest.mark.parametrize("words", [["tier=quick,full"], ["step=750,1500"], ["step=range(500,1501)"], ["seed=0,1"],
                                   ["ckpt={a},{b}"], ["ckpt=demo,{a}"]])  # fmt: skip
def test_what_is_listed_is_a_sweep_with_and_without_the_flag(words):
    from runner.expand import as_sweep, expand
    from runner.overrides import parse

    checkpoints = {"a": demo_run() / "checkpoint-750", "b": demo_run() / "checkpoint-1500"}
    given = [word.format(**checkpoints) for word in words]
    found = [expand(as_sweep(parse([*flag, *given])), demo_run=demo_run) for flag in ([], ["-m"])]
    assert [line.multirun for line in found] == [True, True]
    assert found[0].overrides == found[1].overrides


@pytest.mark.parametrize("word", ["prompt=a, b", "ckpt=nowhere,neither", "tier=quick", "data.prompts=[a,b]",
                                  "tier.temperatures=[0.1,0.7]", "merge.sources=[a,b]"])  # fmt: skip
def test_a_comma_alone_makes_no_sweep(word):
    from runner.expand import as_sweep
    from runner.overrides import parse

    assert not as_sweep(parse([word])).multirun


def test_the_last_step_and_the_demonstrations_base_have_names(run):
    outcome = run("step=last", "base=demo")
    assert outcome.code == 0, outcome.err
    assert (outcome.result["step"], outcome.result["base"]) == (6000, str(demo_run() / "base"))
    assert run("task=inspect", "step=last").result["step"] == 6000


def test_a_range_takes_the_steps_that_there_are():
    from runner.checkpoints.runs import find_run
    from runner.expand import steps_of

    demo = find_run(demo_run())
    assert demo is not None
    assert steps_of("range(500,1501)", demo) == [750, 1500]
    assert steps_of("range(750,4000,1500)", demo) == [750, 2250, 3750]


def test_failed_jobs_keep_their_names_and_say_why_once(run, tmp_path, base):
    for step in (100, 200):
        write_npt(tmp_path / "run" / f"checkpoint-{step}", npt_tensors(base, MIXED), base=base, step=step)
    broken = tmp_path / "run" / "checkpoint-200" / "npt_weights.pt"
    broken.write_bytes(broken.read_bytes()[:1000])
    outcome = run("-m", f"ckpt={tmp_path}/run", "step=all")
    assert outcome.code == 3
    assert "#2 checkpoint-200: FAILED" in outcome.out
    assert outcome.err.count("npt_weights.pt") == 1, outcome.err


def test_a_crc_check_without_crcs_is_skipped(run, tmp_path, base):
    from safetensors.torch import save_file

    (tmp_path / "st").mkdir()
    save_file(npt_tensors(base, MIXED), tmp_path / "st" / "npt_weights.safetensors")
    result = run("task=verify", f"ckpt={tmp_path}/st").result
    assert {row["name"]: row["status"] for row in result["checks"]}["crc"] == "skipped"


@pytest.mark.parametrize("to", ["safetensors", "pt"])
def test_written_files_have_the_mode_of_any_new_file(tmp_path, base, to):
    """In a process of its own, as the mask is the process's."""
    write_npt(tmp_path / "checkpoint-1", npt_tensors(base, MIXED), base=base)
    words = ["task=convert", "ckpt=checkpoint-1", f"convert.to={to}", "convert.output=out", "tracker=none"]
    code = f"import os; os.umask(0o027); from runner.cli import run; raise SystemExit(run({words!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {oct(file.stat().st_mode & 0o777) for file in written} == {"0o640"}


def test_an_output_that_is_there_is_replaced_by_the_tasks_own_option(run, checkpoint):
    Path("out").mkdir()
    outcome = run("task=convert", f"ckpt={checkpoint}", "convert.to=pt", "convert.output=out")
    assert outcome.err.rstrip().endswith("convert.force=true")


def test_the_version_is_ours(run):
    assert run("--version").out == f"runner {runner.__version__}\n"


def test_an_output_of_ascii_is_no_error(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "runner", "task=inspect", "ckpt=demo", "step=750", "tracker=none"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("task", ["diagnose", "generate", "convert", "test", "verify"])
def test_a_flipped_bit_ends_every_task_that_reads_weights(run, checkpoint, task):
    """A value that stays finite is seen by its CRC only. (task=inspect and the quick tier read no weights.)"""
    file = checkpoint / "npt_weights.pt"
    content = bytearray(file.read_bytes())
    tensor = next(iter(torch.load(file, weights_only=True).values()))
    place = bytes(content).index(tensor.contiguous().numpy().tobytes()[:64])
    content[place] ^= 1  # the lowest bit of a mantissa
    file.write_bytes(bytes(content))
    more = {"generate": ["prompt=hello"], "convert": ["convert.to=safetensors", "convert.output=out"],
            "test": ["tier=full", "tier.checks=[loading,finite,hashes]"]}  # fmt: skip
    outcome = run(f"task={task}", f"ckpt={checkpoint}", *more.get(task, []))
    assert outcome.code in (1, 2)
    assert "CRC" in outcome.out + outcome.err


def test_one_value_is_one_element(run, checkpoint):
    result = run(f"ckpt={checkpoint}", "data.prompts=hello", "tier.temperatures=0.5").result
    assert [row["prompt"] for row in result["per_prompt"]] == ["hello"]
    assert json.dumps(result["metrics"]["mse"]) == json.dumps(result["per_prompt"][0]["mse"])


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_help_of_a_task_explains_its_keys(run, task):
    outcome = run(f"task={task}", "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"task={task}: ")
    keys = yaml.safe_load((ROOT / "conf" / "task" / f"{task}.yaml").read_text()).keys() - {"defaults", "task"}
    assert all(f"\n{key}:" in outcome.out for key in keys)
    assert "_target_" not in outcome.out
    if task == "diagnose":
        assert "  tier.new_tokens: 32              # of each continuation" in outcome.out.splitlines()


def test_the_help_of_no_task_says_so(run):
    assert run("task=diagnos", "--help").err == "runner: error: task=diagnos is no task; did you mean 'diagnose'?\n"
