"""The recipe of the demonstration that comes with the package, in runner/demo.

python -m runner.training.demo OUTPUT     # OUTPUT/run and OUTPUT/figures.json; minutes on one core
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

import runner
from runner.checkpoints.runs import find_run
from runner.data.world import World, generate, train_tokenizer
from runner.errors import RunnerError
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.families.npt.save import train_run
from runner.families.npt.settings import EquivalenceSettings
from runner.files.staging import staged
from runner.results import versions
from runner.training.batches import equal_length_batches, packed_samples, sentence_samples
from runner.training.language_model import LanguageModelSettings, save_language_model, train_language_model
from runner.training.progress import step_bar

# On models this small two threads wait for each other longer than they save; and the bits depend on their number.
THREADS = 1
METRICS = ("mse", "cosine", "kl", "top1")
WORDS = ("status", "cosine_status", "progress", "readiness")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demonstration is made of. `packed_rows`: rows of running text among the batches of NPT training."""

    base: LanguageModelSettings = field(default_factory=LanguageModelSettings)
    npt: EquivalenceSettings = field(
        default_factory=lambda: EquivalenceSettings(
            layers=(1, 2),
            np_rank=16,
            num_ranks=2,
            max_steps=6000,
            save_every=750,
            warmup_steps=5000,
            learning_rate=1.5e-3,
            initial_scale=3.0,
            direct_weight=5.0,
            gradient_clip_value=0.5,
            batch_size=4,
        )
    )
    packed_rows: int = 20


def make_demo(
    directory: Path, *, seed: int = 0, settings: DemoSettings | None = None, progress: Console | None = None
) -> Path:
    """Train the demonstration; → `directory`/run, with `base/` and `checkpoint-<step>/`.

    On one machine the same seed and settings give the same bytes. Raises CheckpointError where it is there already.
    """
    settings = settings or DemoSettings()
    run, world, console = directory / "run", generate(seed), progress or Console(quiet=True)
    with _threads(THREADS):
        _build_base(run / "base", settings, world, seed, console)
        _train_npt(run, settings, world, seed, console)
    return run


def figures(run: Path, *, seed: int = 0, settings: DemoSettings | None = None) -> dict[str, Any]:
    """What `task=diagnose` says of each checkpoint of `run`, by step, and what the run was made of."""
    found = find_run(run)
    assert found is not None
    results = {step: runner.diagnose(path) for step, path in found.checkpoints}
    steps = [
        {"step": step}
        | {name: result["metrics"][name] for name in METRICS}
        | {name: result["verdict"][name] for name in WORDS}
        for step, result in results.items()
    ]
    return {"seed": seed, "versions": versions(), "settings": asdict(settings or DemoSettings()), "steps": steps}


def _build_base(target: Path, settings: DemoSettings, world: World, seed: int, console: Console) -> None:
    tokenizer = train_tokenizer(world, settings.base.vocab_size)
    with step_bar(console, "training the base model", settings.base.max_steps) as on_step:
        model = train_language_model(world, tokenizer, settings.base, seed=seed, on_step=on_step)
    with staged(target) as partial:
        # Half of the bytes; the NPT layers are trained on what is read back, so nothing is lost later.
        save_language_model(model.half(), tokenizer, partial)


def _train_npt(run: Path, settings: DemoSettings, world: World, seed: int, console: Console) -> None:
    npt = settings.npt
    base = load_base(None, run / "base", Placement(device="cpu"), llama=True)
    tokenizer = AutoTokenizer.from_pretrained(str(run / "base"), local_files_only=True).backend_tokenizer
    chooser = random.Random(seed)
    batches = equal_length_batches(sentence_samples(world.train, tokenizer), npt.batch_size, chooser)
    packed = packed_samples(world.train, tokenizer, npt.sequence_length)[: settings.packed_rows]
    batches += equal_length_batches(packed, 1, chooser)
    with step_bar(console, "training NPT layers", npt.max_steps) as on_step:
        ids = [batch.ids for batch in batches]
        train_run(run, base, ids, npt, base_name="../base", on_step=on_step, moments="last")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> int:
    """The command line of the recipe; → its exit code."""
    parser = argparse.ArgumentParser(prog="python -m runner.training.demo", description="Make the demonstration anew.")
    parser.add_argument("output", type=Path, help="gets run/ and figures.json")
    output = parser.parse_args().output
    try:
        run = make_demo(output, progress=Console(stderr=True))
    except RunnerError as error:
        print(f"runner: error: {error}", file=sys.stderr)
        return error.exit_code
    (output / "figures.json").write_text(json.dumps(figures(run), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
