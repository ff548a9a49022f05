"""What a merge measures of its output before it gets its name: all of it together, as `task=diagnose` does."""

from dataclasses import replace
from pathlib import Path

import torch

from runner.config import DiagnoseConfig, Family, Format, MergeConfig
from runner.evaluation.base_models import Base
from runner.evaluation.tokenizers import encode, load_tokenizer
from runner.results import Result
from runner.tasks import diagnose
from runner.tasks.context import Context

# What the measurement has in common with task=diagnose.
_SHARED = ("seed", "base", "tokenizer", "device", "dtype", "data", "tier", "verdict")


def measure(config: MergeConfig, partial: Path, context: Context, reference: Path | None = None) -> Result:
    """The diagnosis of the written checkpoint, against its base or against `reference`. Raises its errors."""
    options = {name: getattr(config, name) for name in _SHARED}
    asked = DiagnoseConfig(
        task="diagnose",
        ckpt=str(partial),
        family=Family(name="auto"),
        format=Format(name="auto"),
        reference=None if reference is None else str(reference),
        **options,
    )
    return diagnose.run(asked, replace(context, timing={}))


def encoded_prompts(config: MergeConfig, directories: list[Path], base: Base) -> dict[str, torch.Tensor]:
    """The prompts and their token ids [T], by the tokenizer of the first directory that has one, else the base's."""
    tokenizer = load_tokenizer(config.tokenizer, [*directories, base.path])
    size = base.model.config.vocab_size
    return {text: encode(tokenizer, text, size) for text in config.data.prompts}
