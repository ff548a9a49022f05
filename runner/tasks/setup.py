"""From `ckpt`, `step`, `base` and `reference` of a config to models in memory.

From `ckpt` and `step` of a config to the one checkpoint that they name. No model is imported here.

What a task may use beside its config: where its files go, who is told, and how long work is shown.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import resolve
from runner.config import DiagnoseConfig
from runner.errors import ModelError
from runner.evaluation.base_models import Base, find_base, load_base
from runner.evaluation.build import build, own_base
from runner.evaluation.evaluator import Subject
from runner.evaluation.forward import limits, logit_count
from runner.evaluation.placement import Placement
from runner.evaluation.reference import Reference
from runner.evaluation.tensor_cache import shelf_of
from runner.evaluation.tokenizers import load_tokenizer
from runner.families.hf import checkpoint as hf
from runner.families.npt.full import FAMILY
from runner.families.npt.model import NptLlamaForCausalLM
from runner.tasks.context import Context
from runner.tasks.naming import cache_directory, check_family, checkpoint_path

GPT_FAMILY = "gpt"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint, ready to be measured.

    `base` is what it runs on, or for npt_full what it was made from; `against_base`: whether that is its reference.
    `vocab_size`: how many tokens its embedding knows; `max_length`: how many positions, None for any number.
    """

    checkpoint: Checkpoint
    base: Path | None
    reference: Path | None
    against_base: bool
    subject: Subject
    tokenizer: Any  # None: measured on seeded token ids
    vocab_size: int
    max_length: int | None


def open_subject(config: DiagnoseConfig, context: Context) -> Opened:
    """Open what `config` names, with the models in memory. Raises the errors of `runner.load`."""
    options: dict[str, Any] = {
        "device": config.device,
        "dtype": config.dtype,
        "device_map": config.family.device_map,
    }
    with context.timed("open"):
        checkpoint = open_checkpoint(checkpoint_path(config, context), config.format.name, config.format.module)
        check_family(config, checkpoint)
    with context.timed("load_base"):
        family = config.family.of(checkpoint)
        placement = Placement(**options)
        own = family.load_base(checkpoint, config.base, placement)
    with context.timed("load_checkpoint"):
        model = family.build(checkpoint, own, placement)
    with context.timed("load_reference"):
        base = own or (_base_of_a_complete_model(checkpoint, config, options) if config.accuracy else None)
        keep = partial(_kept, cache=cache_directory(config.cache), in_sweep=context.in_sweep)
        reference, path = _reference(config, base, options, keep)
    plain = None
    if isinstance(model, NptLlamaForCausalLM):
        plain = keep(own) if own else Reference(model.plain(), object())  # its own: no other model may answer
    with context.timed("load_tokenizer"):
        tokenizer = _tokenizer(config, checkpoint, base)
    vocab_size, max_length = limits(model)
    if reference is not None and logit_count(reference.model) != logit_count(model):
        raise ModelError(
            f"reference={path}: gives {logit_count(reference.model)} logits, {checkpoint.path} gives "
            f"{logit_count(model)}; the two cannot be compared"
        )
    return Opened(
        checkpoint=checkpoint,
        base=base.path if base else None,
        reference=path,
        against_base=base is not None and reference is not None and reference.model is base.model,
        subject=Subject(
            model=model,
            reference=reference,
            plain=plain,
            shared_below=_shared_below(model, own, reference),
            vocab_size=logit_count(model),
        ),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        max_length=max_length,
    )


def _tokenizer(config: DiagnoseConfig, checkpoint: Checkpoint, base: Base | None) -> Any:
    """The tokenizer; None for a GPT that has none, which is then measured on seeded token ids."""
    directories = [checkpoint.directory, *([base.path] if base else [])]
    if config.tokenizer is None and checkpoint.family == GPT_FAMILY and not any(map(hf.has_tokenizer, directories)):
        return None
    return load_tokenizer(config.tokenizer, directories)


def _kept(base: Base, *, cache: Path, in_sweep: bool) -> Reference:
    """A base as a reference, with what earlier processes computed. To read its weights once more for their hash pays
    in a sweep only."""
    return Reference(base.model, base.key, shelf_of(base, cache, may_read=in_sweep))


def _base_of_a_complete_model(checkpoint: Checkpoint, config: DiagnoseConfig, options: dict[str, Any]) -> Base | None:
    """The base that a checkpoint with weights of its own is compared with; None where another reference is given."""
    if checkpoint.family != FAMILY or (config.reference is not None and config.reference != config.base):
        return None
    return load_base(checkpoint, config.base, **options)


def _reference(
    config: DiagnoseConfig, base: Base | None, options: dict[str, Any], keep: Callable[[Base], Reference]
) -> tuple[Reference | None, Path | None]:
    """What is compared with, and its path: `reference=`, else the base; nothing where there is neither."""
    if not config.accuracy:
        return None, None
    if config.reference is None or config.reference == config.base:
        return (keep(base), base.path) if base else (None, None)
    path = Path(config.reference).expanduser()
    if not path.exists():
        found = load_base(None, find_base(None, config.reference), **options)
        return keep(found), found.path
    checkpoint = open_checkpoint(resolve(path, by_step=False))
    if checkpoint.format == hf.NAME:
        found = load_base(None, checkpoint.path, **options)
        return keep(found), found.path
    own = own_base(checkpoint, config.base, **options)
    stats = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in checkpoint.weights.files)
    key = (str(checkpoint.path.resolve()), stats, own.key if own else None, *map(repr, options.values()))
    return Reference(build(checkpoint, own, **options), key), checkpoint.path


def _shared_below(model: nn.Module, own: Base | None, reference: Reference | None) -> int:
    """The first layer whose input the reference's hidden states do not give."""
    if own is None or reference is None or not isinstance(model, NptLlamaForCausalLM):
        return 0
    first = min(model.npt_layers)
    if reference.model is own.model:
        return first
    other = reference.model
    if not isinstance(other, NptLlamaForCausalLM) or other.lm_head.weight is not own.model.lm_head.weight:
        return 0
    return min(first, *other.npt_layers)
