"""Sources for `task=merge merge=demo`: a small base model, and single layers as separate trainings would leave them."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from runner.data.world import generate, train_tokenizer
from runner.families.npt import checkpoint as npt_delta
from runner.merge.spec import MergeSpec, SourceSpec
from runner.training.language_model import save_language_model

HIDDEN, INNER, VOCABULARY = 64, 160, 512
# Layer → (modulation, r, k, step).
LAYERS = {1: ("triple", 8, 4, 2200), 2: ("dual", 16, 2, 2500)}


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
