"""Training that leaves a run directory: checkpoints in the npt_delta layout, and how to go on from one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError
from runner.evaluation.base_models import Base
from runner.evaluation.build import build_npt, npt_tensors
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt.model import NptLlamaForCausalLM
from runner.families.npt.settings import EquivalenceSettings
from runner.families.npt.training import OnStep, initial_updates, train_equivalence
from runner.files.staging import staged
from runner.files.tensors import load_pickle
from runner.training.optimization import naming_the_last


def train_run(
    directory: Path,
    base: Base,
    batches: Sequence[torch.Tensor],
    settings: EquivalenceSettings,
    *,
    base_name: str,
    resume_from: Path | None = None,
    on_step: OnStep | None = None,
) -> tuple[dict[str, float], list[Path]]:
    """Train NPT layers over `base`, writing `directory`/checkpoint-<step>; → the last losses, the checkpoints.

    `base_name` is what the checkpoints say their base is: a hub name, or a path that starts at the checkpoint.
    `resume_from`: a checkpoint of the same training to go on from. Raises CheckpointError, ConfigError or ModelError;
    DivergedError names the last good checkpoint.
    """
    state: Mapping[str, Any] | None = None
    if resume_from is None:
        updates = initial_updates(base.model.config, settings)
        for layer_updates in updates.values():
            for update in layer_updates.values():
                update.to(device=base.model.device, dtype=base.model.dtype)
        model = NptLlamaForCausalLM(base.model, updates)
    else:
        model, state = _reopen(resume_from, base, settings)
    checkpoints: list[Path] = []

    def on_checkpoint(step: int, training_state: Mapping[str, Any]) -> None:
        target = directory / f"checkpoint-{step}"
        _save(target, model, training_state, settings, base_name=base_name)
        checkpoints.append(target)

    with naming_the_last(checkpoints, resume_from):
        figures = train_equivalence(
            model, batches, settings, on_step=on_step, on_checkpoint=on_checkpoint, resume=state
        )
    return figures, checkpoints


def _save(
    target: Path,
    model: NptLlamaForCausalLM,
    training_state: Mapping[str, Any],
    settings: EquivalenceSettings,
    *,
    base_name: str,
) -> None:
    """Write one checkpoint directory, absent or complete whatever happens. Raises CheckpointError where it exists."""
    multi_layer_state = {
        "layers_to_train": sorted(settings.layers),
        "curriculum_schedule": [{"name": "equivalence", "until_step": settings.max_steps, "mixing_ratio": 1.0}],
        "current_stage_index": 0,
        "layer_weights": dict.fromkeys(sorted(settings.layers), 1.0),
    }
    config = {
        "model_name": base_name,
        **asdict(settings),
        "gradient_accumulation_steps": 1,
        "mixed_precision": False,
    }
    with staged(target) as partial:
        npt_delta.save(
            partial,
            npt_tensors(model),
            training_state=training_state,
            multi_layer_state=multi_layer_state,
            config=config,
        )


def _reopen(path: Path, base: Base, settings: EquivalenceSettings) -> tuple[NptLlamaForCausalLM, Mapping[str, Any]]:
    """A checkpoint's model over `base` and its training state.

    Raises CheckpointError where it has no such state, ConfigError where its layers are not those of `settings` or
    nothing is left to train.
    """
    checkpoint = open_checkpoint(path, npt_delta.NAME)
    file = checkpoint.directory / npt_delta.TRAINING_STATE
    if not file.is_file():
        raise CheckpointError(f"{path}: has no {file.name} to go on from; start a new training instead")
    state = load_pickle(file, tensors="mmap")
    needed = ("global_step", "optimizer_state_dict", "scheduler_state_dict")
    if not isinstance(state, Mapping) or any(state.get(name) is None for name in needed):
        raise CheckpointError(f"{file}: training goes on from {', '.join(needed)}, and not all of them are there")
    kinds = {(layer.layer, layer.modulation, layer.np_rank, layer.num_ranks) for layer in checkpoint.layers}
    wanted = {(layer, settings.modulation, settings.np_rank, settings.num_ranks) for layer in settings.layers}
    if kinds != wanted:
        raise ConfigError(
            f"train.resume_from={path}: its (layer, modulation, np_rank, num_ranks) are {sorted(kinds)}, "
            f"those asked for {sorted(wanted)}; they must be the same"
        )
    if state["global_step"] >= settings.max_steps:
        raise ConfigError(
            f"train.resume_from={path}: is at step {state['global_step']} already; give a larger train.max_steps"
        )
    return build_npt(checkpoint, base), state
