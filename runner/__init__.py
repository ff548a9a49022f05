"""Runner: what a checkpoint is, how close it is to its base, and how far its training has come.

import runner
model = runner.load("run7/checkpoint-22000", base="path/to/base")     # model(input_ids).logits
result = runner.diagnose("run7/checkpoint-22000", base="path/to/base")  # the dict of result.json
for sample in runner.generate("run7/checkpoint-22000", ["Two and two"], temperature=0): print(sample["text"])
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn

    from runner.evaluation.tokenizers import TextTokenizer

__version__ = "0.1.0"
__all__ = ["diagnose", "generate", "inspect", "load", "transfer"]

# What a key of the command line may be given from Python; None leaves its default.
Option = str | int | float | Path | Sequence[object] | Mapping[str, object] | None


def __getattr__(name: str) -> "ModuleType":
    """`runner.transfer` (runner/transfer.py), imported when it is used, as torch is with it."""
    if name == "transfer":
        from importlib import import_module

        return import_module("runner.transfer")
    raise AttributeError(f"module 'runner' has no attribute {name!r}")


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    device_map: str | Mapping[str, int | str] | None = None,
    format: str = "auto",
    step: int | None = None,
    **options: Option,
) -> "nn.Module":
    """The checkpoint at `path` as a module: `model(input_ids, attention_mask=None).logits` is [B, T, V].

    `base`: the model it needs to run (a directory or a hub name), by default the one that the checkpoint names.
    `dtype`: float32, bfloat16, float16, or "stored" (that of the embedding). `device_map`: auto, or
    module → device: spread a Llama base over devices. `step` chooses from a run directory. `options`: keys of the
    checkpoint's family, as `**{"family.window": 14}`.
    Raises CheckpointError, ModelError or ConfigError, each with one line that says what to do.
    """
    from runner.checkpoints.detect import open_checkpoint
    from runner.checkpoints.runs import resolve
    from runner.evaluation.placement import Placement
    from runner.families.family import configured

    own = configured(options)
    checkpoint = open_checkpoint(resolve(Path(path).expanduser(), step), format, family=own)
    family, placement = own.of(checkpoint), Placement(device=device, dtype=dtype, device_map=device_map)
    return family.build(checkpoint, family.load_base(checkpoint, base, placement), placement)


def diagnose(
    path: str | Path,
    *,
    base: str | Path | None = None,
    reference: str | Path | None = None,
    tier: str | None = None,
    step: int | None = None,
    accuracy: bool | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **options: Option,
) -> dict[str, Any]:
    """The result of `task=diagnose` as a dict, nothing written.

    `options`: further keys of the command line (tokenizer, format, seed, …), a nested one as `**{"data.path": …}`.
    Raises the RunnerError that the command line would print.
    """
    from runner.run import call

    own = {"base": base, "reference": reference, "tier": tier, "step": step, "accuracy": accuracy}
    return call("diagnose", path, **own, device=device, dtype=dtype, **options)


def inspect(path: str | Path, *, step: int | None = None, **options: Option) -> dict[str, Any]:
    """The result of `task=inspect` as a dict, from headers only, nothing written: options and errors as `diagnose`."""
    from runner.run import call

    return call("inspect", path, step=step, **options)


def generate(
    model: "str | Path | nn.Module",
    prompts: Sequence[str | Sequence[int]],
    *,
    base: str | Path | None = None,
    tokenizer: "str | Path | TextTokenizer | None" = None,
    step: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    stream: bool = False,
    **options: Option,
) -> Iterator[Any]:
    """Continuations of `prompts` (texts, or lists of token ids) by a checkpoint, or by a model that `load` gave.

    Yields the dicts of `generation` in result.json, a sample each, in the order of the prompts: `ids` (the prompt's),
    `new_ids`, `text`, `seed`, `finish`, …. With `stream=True`, for one prompt, the pieces of its text instead.
    `tokenizer`: by default the checkpoint's or its base's; a model by itself needs one for prompts that are texts.
    `options`: the keys `generate.…` (max_new_tokens, temperature, top_p, seed, stop, …). Raises as `load`.
    """
    from runner.tasks.generate import generate as made

    return made(
        model, prompts, base=base, tokenizer=tokenizer, step=step, device=device, dtype=dtype, stream=stream,
        options=options,
    )  # fmt: skip
