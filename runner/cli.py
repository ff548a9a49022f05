"""The command line around Hydra: flags and paths as people type them, one-line errors, exit codes.

0 done (a poor verdict is a result); 1 a runtime error or a failed check; 2 bad input or usage; 3 a sweep in which
jobs failed, or found failed checks; 130 interrupted.

The text of `--help`.
"""

import gc
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config import config_directory
from runner.errors import ConfigError, RunnerError, printable
from runner.overrides import CommandLine, parse, spell

if TYPE_CHECKING:
    from runner.sweeps.plan import Plan

INTERRUPTED = 130


def main(words: Sequence[str] | None = None) -> None:
    """The console script and `python -m runner`; exits with the codes above."""
    # Threads that wait asleep: on a busy machine spinning ones make a run several times as long. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(run(list(sys.argv[1:] if words is None else words)))


def run(words: Sequence[str]) -> int:
    """One command line, from its words to its exit code."""
    try:
        line = parse(words)
        if {"-h", "--help"} & set(line.flags):
            print(help_text(config_directory()))
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
    from runner import run as runs
    from runner.sweeps.expand import expand
    from runner.sweeps.sweeper import check_launcher, use_own_configs

    runs.setup()
    use_own_configs(config_directory())
    if {"--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "-sc"} & set(line.flags):
        _check_choices(line)
        _check_commands(line)
        _hydra(line, runs.job)
        return 0
    resumed = None
    if line.get("resume") is not None:
        from runner.sweeps.resume import resume

        line, resumed = resume(line)
    _check_choices(line)
    check_launcher(line, config_directory())
    if resumed is None:
        line = expand(line, demo_run=lambda: _demo_run(line))
    if line.multirun or line.get("hydra.mode") == "MULTIRUN":
        return _sweep(line, resumed)
    runs.exit_code = 0
    _hydra(line, runs.job)
    return runs.exit_code


def _sweep(line: CommandLine, resumed: "Plan | None") -> int:
    """Run a sweep, then compare what its jobs left. Ctrl-C says what is kept and how to go on."""
    from runner import run as runs
    from runner.sweeps.sweeper import Sweep, launching

    sweep = Sweep(line=line, resumed=resumed)
    try:
        with launching(sweep):
            _hydra(line, runs.job)
    except KeyboardInterrupt:
        if sweep.directory is None:
            raise
        good, count = sweep.finished()
        print(f"runner: interrupted: {good} of {count} jobs are finished and kept", file=sys.stderr)
        if good:
            from runner.tasks.compare import conclude

            conclude(sweep.directory)
        print(f"runner: the others: {_resuming(sweep.directory)}", file=sys.stderr)
        return INTERRUPTED
    if sweep.directory is None:  # Hydra had only to show something
        return 0
    from runner.sweeps.resume import record
    from runner.tasks.compare import conclude

    gc.freeze()  # the collector need not go through what the jobs imported while the comparison imports its own
    comparison = conclude(sweep.directory)
    if sweep.config is not None:
        record(comparison, sweep.directory, sweep.config)
    if not comparison.failures:
        return 3 if any(job.passed is False for job in comparison.jobs) else 0
    print(f"runner: what has no result: {_resuming(sweep.directory)}", file=sys.stderr)
    return 3


def _resuming(directory: Path) -> str:
    """The command that goes on with a sweep, to be pasted into a shell."""
    return f"python -m runner -m {shlex.quote(f'resume={directory}')}"


def _hydra(line: CommandLine, job: object) -> None:
    """Hand the command line to Hydra, and translate what it refuses."""
    import hydra
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from runner.config import translated

    # With it Hydra raises instead of printing and exiting.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    overrides = [key if value is None else spell(key, value, multirun=line.multirun) for key, value in line.overrides]
    before, sys.argv = sys.argv, ["runner", *line.flags, *overrides]
    try:
        hydra.main(config_path=str(config_directory()), config_name="config", version_base="1.3")(job)()  # type: ignore[arg-type]
    except (HydraException, OmegaConfBaseException) as error:
        task = line.get("task") or "diagnose"
        raise translated(error, task, dict(line.overrides)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"{error.filename or Path.cwd()}: cannot be written: {error.strerror}") from error
    finally:
        sys.argv = before


def _check_choices(line: CommandLine) -> None:
    """A fixed key, or an unknown task, tier, …, is answered before anything is composed."""
    from runner.config import FIXED_KEYS, did_you_mean

    for key, _ in line.overrides:
        if key.lstrip("+~").partition(".")[0] in FIXED_KEYS:
            raise ConfigError(f"{key} is fixed, so that verdicts compare; its values stand in conf/verdict.yaml")
    extra = [Path(line.flags[i + 1]) for i, flag in enumerate(line.flags[:-1]) if flag in ("--config-dir", "-cd")]
    if absent := [path for path in extra if not path.is_dir()]:
        raise ConfigError(f"--config-dir {absent[0]}: no such directory")
    groups = [path for root in (config_directory(), *extra) for path in root.iterdir() if path.is_dir()]
    for key, value in line.overrides:
        choices = sorted({f.stem for g in groups if g.name == key for f in g.glob("*.yaml")})
        if not choices or value is None or value == "null":
            continue
        for choice in value.split(",") if line.multirun else [value]:
            if choice not in choices:
                raise ConfigError(f"{key}={choice} is no {key}{did_you_mean(choice, choices)}")


def _check_commands(line: CommandLine) -> None:
    """Hydra shows one thing at a time, and that of one run."""
    given = [flag for flag in line.flags if flag in ("--multirun", "-m", "--cfg", "-c", "--info", "-i", "-sc")]
    if len(set(given)) > 1:
        raise ConfigError(f"{' and '.join(given)} do not go together: --cfg and --info show one run")


def _demo_run(line: CommandLine) -> Path:
    """The demonstration's run directory, trained if it is not there yet."""
    from rich.console import Console

    from runner.tasks.naming import demo_run

    return demo_run(line.get("cache"), Console(stderr=True))


_TEXT = """\
runner: what a model checkpoint is, how close it is to its base model, how far its training has come.

  python -m runner [key=value …] [flags]        options in any order; no key at all runs the demonstration
  python -m runner task=diagnose ckpt=RUN/checkpoint-22000 base=meta-llama/Llama-3.2-1B
  python -m runner task=diagnose ckpt=PATH tier=full verbose=true output=report.json
  python -m runner -m task=diagnose ckpt=RUN step=1000,2000,3000      one job a step, then a table
  python -m runner -m task=diagnose ckpt=RUN step=all hydra/launcher=joblib
  python -m runner -m resume=sweeps/NAME                              what has no good result yet
  python -m runner task=inspect ckpt=PATH_OR_RUN
  python -m runner task=test ckpt=PATH tier=full                      quick: structure only; minimal: builds, saves one
  python -m runner task=convert ckpt=PATH convert.to=safetensors convert.output=DIR
  python -m runner task=merge merge.sources=[A,B] merge.output=DIR
  python -m runner task=compare sweep=sweeps/NAME

tasks
{tasks}

what is measured
  ckpt=PATH         a checkpoint, a run directory (with step=), or demo, the built-in demonstration   [demo]
  step=N            one step of a run; -1 is the last; with several (1000,2000 · range(a,b,c) · every(n) · all) a sweep
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
  experts=N   keep=true   strict=true   junit=PATH     task=test: experts to build; keep what was built; warnings fail
  strict=true       task=verify: a checkpoint without MANIFEST.json fails, as nothing is proved
  sweep=DIR|[A,B]   task=compare and task=panels: what they read      merge.…, convert.…, train.…: see --cfg job

how it runs, and what is left
  device=auto|cpu|cuda|mps   dtype=float32|bfloat16|float16|stored   family.device_map=auto   seed=0
  verbose=true      every figure      output=FILE   also write result.json there
  cache=DIR         where the demonstration and what the reference computed are kept   [~/.cache/runner]
  tracker=NAME      {tracker}; tracker.project= tracker.entity= tracker.mode=auto|online|offline   [wandb]
  experiment=NAME   presets: {experiment}
  hydra/launcher=NAME   of a sweep's jobs: basic (one process), {launcher}   [basic]
  Single runs land in outputs/, sweeps in sweeps/; result.json holds every figure.

flags
  -m, --multirun    a sweep: every combination of the values given
  --cfg job         print the composed config and stop          --config-dir DIR   options of your own
  --help            this text                                   --hydra-help       Hydra's own flags

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


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((x.lstrip("# ") for x in lines if x.startswith("#") and not x.startswith("# @")), "")
