"""The command line around Hydra: flags and paths as people type them, one-line errors, exit codes.

0 done (a poor verdict is a result); 1 a runtime error or a failed check; 2 bad input or usage; 3 a sweep in which
jobs failed, or found failed checks; 130 interrupted.
"""

import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from itertools import dropwhile, pairwise
from pathlib import Path
from types import ModuleType

import runner
from runner.errors import ConfigError, RunnerError, did_you_mean, printable
from runner.installation import config_directory, demo_run, uncollected
from runner.overrides import CommandLine, check_paths, parse

INTERRUPTED = 130
# Hydra shows one thing at a time, and that of one run.
_SHOWING = ("--cfg", "-c", "--info", "-i", "-sc")


def main(words: Sequence[str] | None = None) -> None:
    """The console script and `python -m runner`; exits with the codes above."""
    # Threads that wait asleep: on a busy machine spinning ones make a run several times as long. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is no error
    sys.exit(run(list(sys.argv[1:] if words is None else words)))


def run(words: Sequence[str]) -> int:
    """One command line, from its words to its exit code."""
    try:
        line = parse(words)
        if {"-h", "--help"} & set(line.flags):
            task = line.get("task")
            print(help_text(config_directory()) if task is None else task_help(task, config_directory()))
            return 0
        if "--version" in line.flags:
            print(f"runner {runner.__version__}")
            return 0
        return _run(line)
    except RunnerError as error:
        print(f"runner: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("runner: interrupted; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the interpreter's own flush at exit
        return 0
    except Exception as error:
        logging.getLogger(__name__).exception("internal error")
        print(f"runner: error: internal error ({type(error).__name__}: {printable(error)})", file=sys.stderr)
        return 1


def _run(line: CommandLine) -> int:
    if {"--hydra-help", *_SHOWING} & set(line.flags):
        _check(line)
        runs = _hydra(line)
        runs.hand_to_hydra(line, runs.job)
        return 0
    from runner.expand import as_sweep, check_preset, expand, resume, with_demo_base

    resumed = None
    if line.get("resume") is not None:
        line, resumed = resume(line)
    _check(line)
    if resumed is None:
        line = expand(with_demo_base(as_sweep(line), demo_run), demo_run=demo_run)
        check_preset(line)
    if not line.multirun and line.get("hydra/launcher") not in (None, "basic"):
        raise ConfigError(f"hydra/launcher={line.get('hydra/launcher')} is for the jobs of a sweep: add -m")
    runs = _hydra(line)
    if line.multirun or line.get("hydra.mode") == "MULTIRUN":
        from runner.sweeps.command import run_sweep

        return run_sweep(line, resumed)
    return runs.run_once(line)


def _hydra(line: CommandLine) -> ModuleType:
    """The module of runs, with which Hydra is imported, and its launchers where one of them may be asked for."""
    with uncollected():
        from runner import run as runs

    runs.setup()
    if line.flags or any(key.lstrip("+~").startswith("hydra") for key, _ in line.overrides):
        from runner.sweeps.launchers import check_launcher, use_own_configs

        use_own_configs(config_directory())
        check_launcher(line, config_directory())
    return runs


def _check(line: CommandLine) -> None:
    """What Hydra would not answer, or not in a line: a fixed key, a directory that is not there, two things to show.

    And a key that no config knows, for which Hydra need not be imported.
    """
    from runner.config import FIXED_KEYS, check_keys

    for key, _ in line.overrides:
        if key.lstrip("+~").partition(".")[0] in FIXED_KEYS:
            raise ConfigError(f"{key} is fixed, so that verdicts compare; its values stand in conf/verdict.yaml")
    check_paths(line)
    for flag, value in pairwise(line.flags):
        if flag in ("--config-dir", "-cd") and not Path(value).is_dir():
            raise ConfigError(f"--config-dir {value}: no such directory")
    given = [flag for flag in line.flags if flag in ("--multirun", "-m", *_SHOWING)]
    if len(set(given)) > 1 and set(given) & set(_SHOWING):
        raise ConfigError(f"{' and '.join(given)} do not go together: --cfg and --info show one run")
    # A preset may choose the task, a directory of the user's bring keys.
    if not line.flags_of_hydra and line.get("experiment") is None:
        check_keys([key for key, _ in line.overrides], line.get("task") or "diagnose")


_TEXT = """\
runner: what a model checkpoint is, how close it is to its base model, how far its training has come.

  python -m runner [key=value …] [flags]        options in any order; no key at all runs the demonstration
  python -m runner task=diagnose ckpt=RUN/checkpoint-22000 base=meta-llama/Llama-3.2-1B
  python -m runner task=diagnose ckpt=PATH tier=full verbose=true output=report.json
  python -m runner -m task=diagnose ckpt=RUN step=1000,2000,3000      one job a step, then a table
  python -m runner -m task=diagnose ckpt=RUN step=all hydra/launcher=joblib
  python -m runner -m resume=sweeps/NAME                              what has no good result yet
  python -m runner task=generate ckpt=PATH prompt='The capital of France is'     without prompt= a chat
  python -m runner task=transfer ckpt=PATH transfer.script=FILE                   without a script a prompt
  python -m runner task=inspect ckpt=PATH_OR_RUN
  python -m runner task=test ckpt=PATH tier=full                      quick: structure only; minimal: builds, saves one
  python -m runner task=convert ckpt=PATH convert.to=safetensors convert.output=DIR
  python -m runner task=merge merge.sources=[A,B] merge.output=DIR
  python -m runner task=compare sweep=sweeps/NAME

tasks
{tasks}

what is measured
  ckpt=PATH         a checkpoint, a run directory (with step=), or demo, the built-in demonstration   [demo]
  step=N            one step of a run, or last; with several (1000,2000 · range(a,b) · every(n) · all) a sweep
  base=NAME         the model it needs to run: directory or hub name   [the one that the checkpoint names]
  reference=PATH    what it is compared with: a model or another checkpoint   [the base]
  tokenizer=PATH    directory, hub name or tokenizers JSON   [the checkpoint's, else the base's]
  tier=NAME         {tier}; tier.sequence_length=N of text, tier.new_tokens=N of continuations   [quick]
  data=NAME         {data}; data.prompts=[…] data.layer_prompt=… data.path=FILE   [prompts]
                    of shards also data.max_tokens=N, read from the first one on   [65536]
  accuracy=false    load and run only, compare nothing
  format=NAME       {format}   [auto]
  family=NAME       {family}; family.top_k= family.router_features= family.experts= for lora_moe   [auto]

other tasks
  transfer.script= session= experiment= space= controls= …   task=transfer; family.layers=[11,13] for npt in every task
  prompt=TEXT|[A,B]|-   prompts=FILE   reference=base   task=generate; generate.temperature= top_k= top_p= seed= stop= …
  experts=N   keep=true   strict=true   junit=PATH     task=test: experts to build; keep what was built; warnings fail
  strict=true       task=verify: a checkpoint without MANIFEST.json fails, as nothing is proved
  sweep=DIR|[A,B]   task=compare and task=panels: what they read      merge.…, convert.…, train.…: see --cfg job

how it runs, and what is left
  device=auto|cpu|cuda|mps   dtype=float32|bfloat16|float16|stored   family.device_map=auto   seed=0
  verbose=true      every figure      output=FILE   also write result.json there
  cache=DIR         where what the reference computed is kept   [~/.cache/runner]
  tracker=NAME      {tracker}; tracker.project= tracker.entity= tracker.mode=auto|online|offline   [wandb]
  experiment=NAME   presets: {experiment}
  hydra/launcher=NAME   of a sweep's jobs: basic (one process), {launcher}   [basic]
  Single runs land in outputs/, sweeps in sweeps/; result.json holds every figure.

flags
  -m, --multirun    a sweep: every combination of the values given
  --cfg job         print the composed config and stop          --config-dir DIR   options of your own
  --help            this text; with task=NAME its keys          --hydra-help       Hydra's own flags

exit codes: 0 done (a poor verdict is a result) · 1 runtime error, failed check · 2 bad input · 3 jobs of a sweep
failed · 130 interrupted
"""


def help_text(conf: Path) -> str:
    """The help with the choices that lie in `conf`, each task with the first comment of its file."""
    groups = ("tier", "data", "tracker", "experiment", "format", "family")
    choices = {group: ", ".join(sorted(f.stem for f in (conf / group).glob("*.yaml"))) for group in groups}
    choices["launcher"] = ", ".join(sorted(f.stem for f in (conf / "hydra" / "launcher").glob("*.yaml")))
    tasks = "\n".join(f"  task={f.stem:<12} {_first_comment(f)}" for f in sorted((conf / "task").glob("*.yaml")))
    return _TEXT.format(tasks=tasks, **choices).rstrip()


def task_help(task: str, conf: Path) -> str:
    """What a task does and its keys with their defaults, as its file and those of its groups explain them.

    Raises ConfigError for a task that there is not.
    """
    files = {file.stem: file for file in sorted((conf / "task").glob("*.yaml"))}
    if task not in files:
        raise ConfigError(f"task={task} is no task{did_you_mean(task, files)}")
    lines = [f"task={task}: {_first_comment(files[task])}", ""]
    own = files[task].read_text(encoding="utf-8").splitlines()
    lines += _keys(own)
    for entry in filter(None, map(_GROUP.match, own)):
        file = conf / entry[1] / f"{entry[2]}.yaml"
        if entry[1] != "schema" and file.is_file():
            options = ", ".join(sorted(each.stem for each in file.parent.glob("*.yaml")))
            lines += ["", f"{entry[1]}={entry[2]}   of {options}; {_first_comment(file)}".rstrip("; "), *_below(file)]
    if task == "train":  # whose keys follow the family
        for file in filter(
            lambda file: (conf / "family" / file.name).is_file(), sorted((conf / "train").glob("*.yaml"))
        ):
            lines += ["", f"family={file.stem}: {_first_comment(file)}", *_below(file)]
    return "\n".join(lines)


_GROUP = re.compile(r"\s+- (?:override )?/?(\w+): (\w+)")


def _below(file: Path) -> list[str]:
    """The keys of an option of a group, as they are written on the command line."""
    keys = _keys(file.read_text(encoding="utf-8").splitlines())
    return [f"  {file.parent.name}.{key}" if key[:1].isalpha() else f"  {key}" for key in keys]


def _keys(lines: Sequence[str]) -> list[str]:
    """The lines of a config file that give keys, and the comments between them, not what is Hydra's."""
    kept, skipping = [], False
    for line in dropwhile(lambda line: line.startswith("#"), lines):
        if line[:1].strip():  # a key of its own, or what closes a list
            skipping = line.startswith(("defaults:", "task:", "name:", "_target_:"))
        if line.strip() and not skipping and "_target_:" not in line:
            kept.append(line)
    return kept


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((x.lstrip("# ") for x in lines if x.startswith("#") and not x.startswith("# @")), "")
