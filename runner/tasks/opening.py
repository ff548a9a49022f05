"""From `ckpt`, `step`, `base` and `reference` of a config to models in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from runner.bases import Base, find_base, load_base
from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import find_run, resolve
from runner.config import DiagnoseConfig, ModelConfig
from runner.errors import ConfigError, ModelError
from runner.loading import build
from runner.reference import Reference
from runner.subject import Subject
from runner.tasks.context import Context
from runner.tokens import load_tokenizer

DEMO = "demo"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint, ready to be measured. `against_base`: whether the reference is its base model."""

    checkpoint: Checkpoint
    base: Base
    reference_path: Path
    against_base: bool
    subject: Subject
    tokenizer: Any


def checkpoint_path(config: ModelConfig, context: Context) -> Path:
    """The one checkpoint that `ckpt` and `step` name; `demo` is built when missing, its last step the default."""
    if config.step is not None and (isinstance(config.step, bool) or not isinstance(config.step, int)):
        raise ConfigError(f"step={config.step}: a step is a whole number; several steps are a sweep: add -m")
    if config.ckpt != DEMO:
        return resolve(Path(config.ckpt).expanduser(), config.step)
    run = find_run(demo_run(config.cache, context.progress))
    if run is None:
        raise ConfigError("the demonstration holds no checkpoints; delete its cache directory and run again")
    return resolve(run.path, run.steps[-1] if config.step is None else config.step)


def demo_run(cache: str | None, progress: Console) -> Path:
    """The run directory of the built-in demonstration, trained on the first call; `cache` is where it is kept."""
    from runner.training.demo import ensure_demo

    return ensure_demo(Path(cache).expanduser() if cache else Path.home() / ".cache" / "runner", progress=progress)


def open_subject(config: DiagnoseConfig, context: Context) -> Opened:
    """Open what `config` names, with the models in memory. Raises the errors of `runner.load`."""
    with context.timed("open"):
        checkpoint = open_checkpoint(checkpoint_path(config, context), config.format.name)
        _check_family(config, checkpoint)
    with context.timed("load_base"):
        base = load_base(checkpoint, config.base, device=config.device, dtype=config.dtype)
    with context.timed("load_checkpoint"):
        model = build(checkpoint, base)
    with context.timed("load_tokenizer"):
        tokenizer = load_tokenizer(config.tokenizer, [checkpoint.directory, base.path])
    base_reference = Reference(base.model, (base.fingerprint, base.model.dtype, base.model.device))
    first = min(model.npt_layers)
    if config.reference is None or config.reference == config.base:
        subject = Subject(model=model, base=base_reference, reference=base_reference, shared_below=first)
        return Opened(
            checkpoint=checkpoint,
            base=base,
            reference_path=base.path,
            against_base=True,
            subject=subject,
            tokenizer=tokenizer,
        )
    with context.timed("load_reference"):
        path, reference, reference_first = _open_reference(config, base)
    if reference.model.config.vocab_size != model.config.vocab_size:
        raise ModelError(
            f"reference={path}: its vocabulary has {reference.model.config.vocab_size} entries, that of "
            f"{checkpoint.path} {model.config.vocab_size}; the two cannot be compared"
        )
    shared = min(first, reference_first) if reference_first is not None else 0
    same = reference.model is base.model
    return Opened(
        checkpoint=checkpoint,
        base=base,
        reference_path=path,
        against_base=same,
        subject=Subject(model=model, base=base_reference, reference=reference, shared_below=first if same else shared),
        tokenizer=tokenizer,
    )


def _open_reference(config: DiagnoseConfig, base: Base) -> tuple[Path, Reference, int | None]:
    """The path and model of `reference=`, and its first NPT layer where it stands on the same base."""
    path = Path(str(config.reference)).expanduser()
    if not (path / "config.json").is_file() or not _is_model(path):
        checkpoint = open_checkpoint(resolve(path)) if path.exists() else None
        if checkpoint is not None:
            own = load_base(checkpoint, config.base, device=config.device, dtype=config.dtype)
            model = build(checkpoint, own)
            stats = tuple((f.name, f.stat().st_mtime_ns) for f in checkpoint.weights.files)
            key = (str(checkpoint.path.resolve()), stats, own.fingerprint, model.dtype, model.device)
            return checkpoint.path, Reference(model, key), min(model.npt_layers) if own.model is base.model else None
    found = load_base(None, find_base(None, config.reference), device=config.device, dtype=config.dtype)
    return found.path, Reference(found.model, (found.fingerprint, found.model.dtype, found.model.device)), None


def _is_model(path: Path) -> bool:
    """Whether a Hugging Face model lies in the directory, told by its config's `model_type`."""
    from runner.checkpoints.hf import read_config

    return "model_type" in read_config(path)


def _check_family(config: DiagnoseConfig, checkpoint: Checkpoint) -> None:
    if config.family.name not in ("auto", checkpoint.family):
        raise ConfigError(
            f"family={config.family.name}, but {checkpoint.path} is of the family {checkpoint.family} "
            f"(format {checkpoint.format}: {checkpoint.evidence})"
        )
