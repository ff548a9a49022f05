"""From a config to the checkpoint, its model, and what that is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.model_directory import has_tokenizer
from runner.checkpoints.runs import resolve
from runner.config import BASE, DiagnoseConfig, GenerateConfig
from runner.errors import ConfigError, ModelError
from runner.evaluation.base_models import Base, find_base, load_base
from runner.evaluation.evaluator import Evaluator, plain_reference
from runner.evaluation.forward import logit_count
from runner.evaluation.placement import Placement
from runner.evaluation.reference import Reference
from runner.evaluation.tensor_cache import model_cache
from runner.evaluation.tokenizers import TextTokenizer, load_tokenizer
from runner.families.family import Family
from runner.tasks.context import Context, cache_directory, checkpoint_path


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """A checkpoint, ready to be measured.

    `base`: the model that it runs on, or was made from; `against_base`: whether that is its reference.
    `plain_model`: the same without what the checkpoint adds, over the same tensors; None where it adds nothing.
    """

    checkpoint: Checkpoint
    base: Path | None
    reference: Path | None
    against_base: bool
    has_own_base_weights: bool
    plain_model: nn.Module | None
    evaluator: Evaluator


def open_evaluation(config: DiagnoseConfig | GenerateConfig, context: Context) -> EvaluationSetup:
    """Open what `config` names, with the models in memory. Raises the errors of `runner.load`."""
    placement = Placement(device=config.device, dtype=config.dtype, device_map=config.family.device_map)
    with context.timed("open"):
        checkpoint = open_checkpoint(checkpoint_path(config), config.format.name, config.format.module, config.family)
        family: Family = config.family.of(checkpoint).on(getattr(config, "data", None))
        _require_language_model(family, checkpoint)
    with context.timed("load_base"):
        own = family.load_base(checkpoint, config.base, placement)
    with context.timed("load_checkpoint"):
        model = family.build(checkpoint, own, placement)
    with context.timed("load_reference"):
        # Read once more for its hash, a base's weights are kept on disk for other processes: that pays in a sweep only.
        cached = partial(_cached, cache=cache_directory(config.cache), in_sweep=context.in_sweep)
        made_from_base = family.is_made_from_base(checkpoint)
        base = own
        if made_from_base and config.accuracy and _against_base(config):
            base = load_base(checkpoint, config.base, placement)
        reference, path = None, None
        if config.accuracy and not _against_base(config):
            reference, path = _other_reference(config, family, placement, cached)
        elif config.accuracy and base is not None:
            reference, path = cached(base), base.path
        # What brings base weights of its own is by itself the plain model.
        plain = plain_reference(model, cached(own) if own and not made_from_base else None)
    with context.timed("load_tokenizer"):
        tokenizer = _tokenizer(config, family, checkpoint, base)
    if reference is not None and logit_count(reference.model) != logit_count(model):
        raise ModelError(
            f"reference={path}: gives {logit_count(reference.model)} logits, {checkpoint.path} gives "
            f"{logit_count(model)}; the two cannot be compared"
        )
    return EvaluationSetup(
        checkpoint=checkpoint,
        base=base.path if base else None,
        reference=path,
        against_base=base is not None and reference is not None and reference.model is base.model,
        has_own_base_weights=made_from_base,
        plain_model=own.model if own else plain.model if plain else None,
        evaluator=Evaluator(model=model, reference=reference, plain=plain, tokenizer=tokenizer, seed=config.seed),
    )


def _require_language_model(family: Family, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a classifier, which gives no logits of tokens."""
    if not family.continues_text:
        raise ConfigError(
            f"{checkpoint.path}: is a classifier and continues no text; task=diagnose data=classification "
            "data.test=FILE measures it"
        )


def _against_base(config: DiagnoseConfig | GenerateConfig) -> bool:
    return config.reference in (None, config.base, BASE)


def _tokenizer(
    config: DiagnoseConfig | GenerateConfig, family: Family, checkpoint: Checkpoint, base: Base | None
) -> TextTokenizer | None:
    """The tokenizer; None where there is none and the family can be measured on seeded token ids."""
    directories = [checkpoint.directory, *([base.path] if base else [])]
    if config.tokenizer is None and not family.needs_tokenizer and not any(map(has_tokenizer, directories)):
        return None
    return load_tokenizer(config.tokenizer, directories)


def _cached(base: Base, *, cache: Path, in_sweep: bool) -> Reference:
    return Reference(base.model, base.key, model_cache(base, cache, may_read=in_sweep))


def _other_reference(
    config: DiagnoseConfig | GenerateConfig,
    own_family: Family,
    placement: Placement,
    cached: Callable[[Base], Reference],
) -> tuple[Reference, Path]:
    """What `reference=` names: a base model, or another checkpoint, over the same base where it needs one."""
    path = Path(config.reference or "").expanduser()
    if not path.exists():
        found = load_base(None, find_base(None, config.reference, "reference"), placement)
        return cached(found), found.path
    checkpoint = open_checkpoint(resolve(path, by_step=False))
    family = own_family.of_reference(checkpoint)
    _require_language_model(family, checkpoint)
    if family.is_base(checkpoint):
        found = load_base(None, checkpoint.path, placement)
        return cached(found), found.path
    own = family.load_base(checkpoint, config.base, placement)
    stats = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in checkpoint.weights.files)
    key = (str(checkpoint.path.resolve()), stats, own.key if own else None, repr(placement), repr(family))
    return Reference(family.build(checkpoint, own, placement), key), checkpoint.path
