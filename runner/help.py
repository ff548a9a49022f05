"""The text of `--help`."""

from pathlib import Path

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
  tier=NAME         {tier}   [quick]
  data=NAME         {data}; data.prompts=[…] data.layer_prompt=… data.path=FILE   [prompts]
  accuracy=false    load and run only, compare nothing
  format=NAME       {format}   [auto]
  family=NAME       {family}; family.top_k= family.router_features= family.experts= for lora_moe   [auto]

other tasks
  experts=N   keep=true   strict=true   junit=PATH     task=test: experts to build; keep what was built; warnings fail
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
