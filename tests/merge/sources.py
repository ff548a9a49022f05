"""Tiny checkpoints as separate trainings leave them: weights, a real optimizer's state, curriculum, config."""

import json
from pathlib import Path

import torch

from runner.checkpoints.detect import open_checkpoint
from runner.families.npt.merge import LayerPlan, open_source, plan_layers
from runner.merge.spec import MergeSpec

HIDDEN, INNER = 16, 24
SUFFIXES = {"single": [""], "dual": ["_gate", "_up"], "triple": ["_gate", "_up", "_down"]}
Layers = dict[int, tuple[str, int, int]]
ONE: Layers = {1: ("triple", 2, 3)}
THREE: Layers = {3: ("triple", 2, 3)}


def weights_of(layers: Layers, seed: int = 0, *, hidden: int = HIDDEN, inner: int = INNER) -> dict[str, torch.Tensor]:
    """Random weights, in the order in which a trainer's parameters are declared."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer, (modulation, rank, count) in layers.items():
        for suffix in SUFFIXES[modulation]:
            d_in, d_out = (inner, hidden) if suffix == "_down" else (hidden, inner)
            for matrix, shape in {"W_down": (hidden, rank), "W_a_up": (rank, d_in), "W_b_up": (rank, d_out)}.items():
                for i in range(count):
                    name = f"layer_{layer}_np.{matrix}{suffix}" + (f".{i}" if count > 1 else "")
                    weights[name] = torch.randn(shape, generator=generator)
    return weights


def second_spelling(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same under the other names that the format knows."""
    return {
        "model.layers.{}.np_component.{}".format(*name.removeprefix("layer_").split("_np.", 1)): tensor
        for name, tensor in weights.items()
    }


def adamw(tensors: list[torch.Tensor], **options: object) -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.nn.Parameter(t.clone()) for t in tensors], **{"lr": 1e-3, **options})  # type: ignore[arg-type]


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def step_with(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
    for parameter, gradient in zip(parameters(optimizer), gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def random_like(tensors: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tensor.shape, generator=generator) for tensor in tensors]


def write_source(
    directory: Path,
    layers: Layers,
    *,
    seed: int = 0,
    step: int | None = 100,
    trained: int = 2,
    base: str | None = "base",
    dtype: torch.dtype | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    groups: dict[str, object] | None = None,
    **state: object,
) -> Path:
    """One checkpoint. `trained`: steps of AdamW behind its moments (0: none); `step=None`: no training state at all."""
    directory.mkdir(parents=True)
    tensors = weights_of(layers, seed) if weights is None else weights
    if trained and step is not None:
        optimizer = adamw(list(tensors.values()), **(groups or {}))
        for turn in range(trained):
            step_with(optimizer, random_like(list(tensors.values()), 1000 * seed + turn))
        tensors = {name: p.detach() for name, p in zip(tensors, parameters(optimizer), strict=True)}
        state = {"optimizer_state_dict": optimizer.state_dict(), **state}
    torch.save(
        {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}, directory / "npt_weights.pt"
    )
    if step is not None:
        scheduler = {"last_epoch": step, "_step_count": step + 1, "base_lrs": [1e-3]}
        training = {"global_step": step, "batch_count": 2 * step, "scheduler_state_dict": scheduler, **state}
        torch.save(training, directory / "training_state.pt")
        multi = {
            "layers_to_train": sorted(layers),
            "layer_weights": dict.fromkeys(layers, 1.0 + seed),
            "curriculum_schedule": [{"name": "student", "until_step": 5000, "mixing_ratio": 1.0}],
            "current_stage_index": 0,
        }
        torch.save(multi, directory / "multi_layer_state.pt")
    if base is not None:
        (directory / "config.json").write_text(json.dumps({"model_name": base, "learning_rate": 1e-3, "seed": seed}))
    return directory


def layer_plan(spec: MergeSpec, paths: list[Path]) -> LayerPlan:
    """Which layer comes from where, or the refusal."""
    opened = [
        open_source(source, path, open_checkpoint(path)) for source, path in zip(spec.sources, paths, strict=True)
    ]
    return plan_layers(spec, opened)


def state_of(directory: Path) -> dict:
    return torch.load(directory / "training_state.pt", weights_only=True)


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "npt_weights.pt", weights_only=True)


def same(a: object, b: object) -> bool:
    """Whether two nested values are equal in type, order and every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
