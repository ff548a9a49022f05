"""The demonstration: a run directory with a small base model and NPT checkpoints, trained here once and kept."""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from transformers import AutoTokenizer

from runner.checkpoints.runs import find_run
from runner.data.world import World, generate, train_tokenizer
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.families.npt.save import train_run
from runner.families.npt.settings import EquivalenceSettings
from runner.files.staging import staged
from runner.training.batches import equal_length_batches, packed_samples, sentence_samples
from runner.training.language_model import LanguageModelSettings, save_language_model, train_language_model
from runner.training.progress import step_bar

# Part of the cache's key: change it with whatever changes the bytes and is neither a setting nor a sentence.
FORMAT = 2
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
# On models this small two threads wait for each other longer than they save; and the bits depend on their number.
THREADS = 1


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demonstration is made of. `packed_rows`: rows of running text among the batches of NPT training."""

    base: LanguageModelSettings = field(default_factory=LanguageModelSettings)
    npt: EquivalenceSettings = field(
        default_factory=lambda: EquivalenceSettings(
            layers=(1, 2),
            np_rank=32,
            max_steps=4000,
            warmup_steps=3000,
            learning_rate=8e-4,
            initial_scale=3.0,
            direct_weight=5.0,
            gradient_clip_value=0.5,
            batch_size=3,
        )
    )
    packed_rows: int = 20


def ensure_demo(
    cache: Path, *, seed: int = 0, progress: Console | None = None, settings: DemoSettings | None = None
) -> Path:
    """The run directory with `base/` and `checkpoint-<step>/`: trained on the first call, at once afterwards.

    It lies in `cache` under a hash of all that determines its bytes. One process trains while others wait; after a
    kill the next call goes on from the last whole checkpoint, to the same bytes. `progress` shows what is done.
    """
    settings = settings or DemoSettings()
    world = generate(seed)
    run = cache / f"demo-{_key(settings, world, seed)}"
    if run.is_dir():
        return run
    cache.mkdir(parents=True, exist_ok=True)
    console = progress or Console(quiet=True)
    with _locked(run.with_name(f"{run.name}.lock"), console):
        if not run.is_dir():
            console.print(f"Training the demonstration, once, in about a minute; kept in {run}", soft_wrap=True)
            unfinished = run.with_name(f"{run.name}.unfinished")
            with _threads(THREADS):
                _build_base(unfinished / "base", settings, world, seed, console)
                _train_npt(unfinished, settings, world, seed, console)
            unfinished.rename(run)
    return run


def _build_base(target: Path, settings: DemoSettings, world: World, seed: int, console: Console) -> None:
    if target.is_dir():
        return
    tokenizer = train_tokenizer(world, settings.base.vocab_size)
    with step_bar(console, "training the base model", settings.base.max_steps) as on_step:
        model = train_language_model(world, tokenizer, settings.base, seed=seed, on_step=on_step)
    with staged(target) as partial:
        save_language_model(model, tokenizer, partial)


def _train_npt(run: Path, settings: DemoSettings, world: World, seed: int, console: Console) -> None:
    """Train the NPT layers from the last checkpoint there is."""
    npt = settings.npt
    base = load_base(None, run / "base", Placement(device="cpu"), llama=True)
    tokenizer = AutoTokenizer.from_pretrained(str(run / "base"), local_files_only=True).backend_tokenizer
    chooser = random.Random(seed)
    batches = equal_length_batches(sentence_samples(world.train, tokenizer), npt.batch_size, chooser)
    packed = packed_samples(world.train, tokenizer, npt.sequence_length)[: settings.packed_rows]
    batches += equal_length_batches(packed, 1, chooser)
    found = find_run(run)
    step, last = found.checkpoints[-1] if found else (0, None)
    if step >= npt.max_steps:
        return
    with step_bar(console, "training NPT layers", npt.max_steps, step) as on_step:
        ids = [batch.ids for batch in batches]
        train_run(run, base, ids, npt, base_name="../base", resume_from=last, on_step=on_step)


def _key(settings: DemoSettings, world: World, seed: int) -> str:
    content = {
        "format": FORMAT,
        "settings": asdict(settings),
        "seed": seed,
        "world": [world.train, world.held_out],
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print("Another process is training the demonstration; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
