"""The recipe of the demonstration that comes with the package, in runner/demo; and the sources of `merge=demo`.

python -m runner.families.npt.demo OUTPUT     # OUTPUT/run and OUTPUT/figures.json; minutes on one core
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import runner
from runner.checkpoints.runs import find_run
from runner.data.world import World, generate, train_tokenizer
from runner.errors import RunnerError
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.families.npt import EquivalenceSettings
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt.training import train_run
from runner.files.staging import staged
from runner.merge.spec import MergeSpec, SourceSpec
from runner.progress import step_bar
from runner.results import versions
from runner.training.batches import equal_length_batches, packed_samples, sentence_samples
from runner.training.language_model import LanguageModelSettings, save_language_model, train_language_model

# On models this small two threads wait for each other longer than they save; and the bits depend on their number.
THREADS = 1
METRICS = ("mse", "cosine", "kl", "top1")
WORDS = ("status", "cosine_status", "progress", "readiness")
# The base and the layers of `merge=demo`: layer → (modulation, r, k, step).
HIDDEN, INNER, VOCABULARY = 64, 160, 512
LAYERS = {1: ("triple", 8, 4, 2200), 2: ("dual", 16, 2, 2500)}


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


def figures(run: Path, *, seed: int = 0, settings: DemoSettings | None = None) -> dict[str, object]:
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
    parser = argparse.ArgumentParser(prog="python -m runner.families.npt.demo", description="Make the demonstration.")
    parser.add_argument("output", type=Path, help="gets run/ and figures.json")
    output = parser.parse_args().output
    try:
        run = make_demo(output, progress=Console(stderr=True))
    except RunnerError as error:
        print(f"runner: error: {error}", file=sys.stderr)
        return error.exit_code
    (output / "figures.json").write_text(json.dumps(figures(run), indent=2) + "\n", encoding="utf-8")
    return 0


def write_demo(directory: Path, spec: MergeSpec, *, seed: int = 0) -> MergeSpec:
    """Write base and sources below `directory`; `spec` with them as its sources. All weights are random."""
    generator = torch.Generator().manual_seed(seed)
    _write_base(directory / "base", seed)
    sources = []
    for layer, (modulation, rank, count, step) in LAYERS.items():
        path = directory / f"layer{layer}" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        weights = _weights(layer, modulation, rank, count, generator)
        npt_delta.save(
            path,
            weights,
            training_state=_training_state(weights, step, generator),
            multi_layer_state={"layers_to_train": [layer], "layer_weights": {layer: 1.0}},
            config={"model_name": "../../base", "learning_rate": 1e-3},
        )
        sources.append(SourceSpec(path=str(path)))
    return replace(spec, sources=tuple(sources), output=spec.output or str(directory / "merged"))


def _write_base(directory: Path, seed: int) -> None:
    directory.mkdir(parents=True)
    tokenizer = train_tokenizer(generate(seed), VOCABULARY)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_language_model(LlamaForCausalLM(config), tokenizer, directory)


def _weights(layer: int, modulation: str, rank: int, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    weights = {}
    for suffix in npt_delta.MODULATIONS[modulation]:
        projection = npt_delta.PROJECTIONS[suffix]
        d_in, d_out = (INNER, HIDDEN) if projection == "down" else (HIDDEN, INNER)
        shapes = dict(zip(npt_delta.MATRICES, ((HIDDEN, rank), (rank, d_in), (rank, d_out)), strict=True))
        for matrix, shape in shapes.items():
            for i in range(count):
                name = npt_delta.key(layer, modulation, projection, matrix, i, count)
                weights[name] = torch.randn(shape, generator=generator) * 0.1
    return weights


def _training_state(weights: dict[str, torch.Tensor], step: int, generator: torch.Generator) -> dict[str, object]:
    """The state of AdamW after one real step on random gradients, said to be its `step`-th."""
    parameters = [torch.nn.Parameter(weight) for weight in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["step"].fill_(step)
    return {
        "global_step": step,
        "batch_count": step,
        "optimizer_state_dict": state,
        "scheduler_state_dict": {"last_epoch": step, "_step_count": step + 1},
        "scaler_state_dict": None,
    }


if __name__ == "__main__":
    sys.exit(main())
