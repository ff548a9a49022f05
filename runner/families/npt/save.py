"""What writes NPT checkpoints: a model in memory, a conversion, and a training that leaves a run directory."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runner.checkpoints import model_directory
from runner.checkpoints.checkpoint import Checkpoint, Expected, tensor_readers
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError
from runner.evaluation.base_models import Base
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt import full
from runner.families.npt.model import NptLlamaForCausalLM, build_npt, npt_tensors
from runner.families.npt.settings import EquivalenceSettings
from runner.families.npt.training import OnStep, initial_updates, train_equivalence
from runner.files.staging import staged
from runner.files.tensors import TensorSource, load_pickle
from runner.training.optimization import is_step, naming_the_last

# What is copied beside converted NPT weights, and beside a base taken out of an npt_full.
_BESIDE_DELTA = (npt_delta.TRAINING_STATE, npt_delta.MULTI_LAYER_STATE, npt_delta.MERGE_SUMMARY)
_BESIDE_MODEL = (
    "generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    *model_directory.TOKENIZER_FILES,
)  # fmt: skip


def save_delta(checkpoint: Checkpoint, model: NptLlamaForCausalLM, base: Path | None, target: Path) -> None:
    """Write the NPT weights of `model`, over the base at `base`, as the directory `target`."""
    state = {"global_step": checkpoint.step} if checkpoint.step is not None else None
    config = {"model_name": str(base.resolve()) if base else ""}
    with staged(target) as directory:
        npt_delta.save(directory, npt_tensors(model), training_state=state, multi_layer_state=None, config=config)


def save_full(checkpoint: Checkpoint, model: NptLlamaForCausalLM, target: Path) -> None:
    """Write `model`, base and adapters together, as the directory `target`."""
    details: full.NptFullDetails = checkpoint.details
    tensors, own = model_directory.stored_tensors(checkpoint, model), npt_tensors(model)
    for layer in checkpoint.layers:
        for matrix, names in layer.keys["gate"].items():
            # Linear weights: transposed to what npt_delta has.
            tensors[names[0]] = own[npt_delta.key(layer.layer, "single", "gate", matrix, 0, 1)].T
    info = checkpoint.directory / full.TRAINING_INFO
    with staged(target) as directory:
        model_directory.save(directory, tensors, config=details.config, beside=[info] if info.is_file() else [])


def convert_delta(checkpoint: Checkpoint, to: str, target: Path, directory: Path) -> Expected:
    """Write the same names and tensors in the container `to` into `directory`, which becomes `target`."""
    read = tensor_readers(checkpoint.weights)
    config = dict(checkpoint.training["config"])
    if base := checkpoint.local_base():
        config["model_name"] = os.path.relpath(base, target)  # the old relative name would lead nowhere from there
    npt_delta.save(
        directory,
        {name: get() for name, get in read.items()},
        training_state=None,
        multi_layer_state=None,
        config=config,
        weights_file=f"npt_weights.{to}",
    )
    if checkpoint.path.is_dir():
        _copy(checkpoint.path, directory, _BESIDE_DELTA)
    return {".": read}


def take_apart(checkpoint: Checkpoint, directory: Path) -> Expected:
    """Write an npt_full as `base/`, a plain model, and `adapters/`, an npt_delta. The scale goes into W_b_up."""
    details: full.NptFullDetails = checkpoint.details
    base, adapters = directory / "base", directory / "adapters"
    base.mkdir()
    adapters.mkdir()
    plain = {n: get for n, get in tensor_readers(checkpoint.weights).items() if n not in details.adapter_keys}
    tensors = {name: get().contiguous() for name, get in plain.items()}
    save_file(tensors, base / model_directory.SINGLE[0], metadata={"format": "pt"})
    model_directory.write_config(base, details.config)
    _copy(checkpoint.path, base, _BESIDE_MODEL)
    deltas = {
        npt_delta.key(layer.layer, "single", "gate", matrix, 0, 1): _delta(
            checkpoint.weights, names[0], details.scale if matrix == "W_b_up" else 1.0
        )
        for layer in checkpoint.layers
        for matrix, names in layer.keys["gate"].items()
    }
    npt_delta.save(
        adapters,
        {name: get() for name, get in deltas.items()},
        training_state={"global_step": checkpoint.step} if checkpoint.step is not None else None,
        multi_layer_state=None,
        config={"model_name": "../base"},
        weights_file=npt_delta.WEIGHT_FILES[1],
    )
    return {"base": plain, "adapters": deltas}


def _delta(weights: TensorSource, name: str, scale: float) -> Callable[[], torch.Tensor]:
    """An adapter's Linear weight as npt_delta has it: transposed, in float32, times `scale`."""
    return lambda: weights.read(name).T.float() * scale


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def train_run(
    directory: Path,
    base: Base,
    batches: Sequence[torch.Tensor],
    settings: EquivalenceSettings,
    *,
    base_name: str,
    resume_from: Path | None = None,
    on_step: OnStep | None = None,
    moments: str = "every",
) -> tuple[dict[str, float], list[Path]]:
    """Train NPT layers over `base`, writing `directory`/checkpoint-<step>; → the last losses, the checkpoints.

    `base_name` is what the checkpoints say their base is: a hub name, or a path that starts at the checkpoint.
    `resume_from`: a checkpoint of the same training to go on from. `moments`: which checkpoints hold the optimizer's
    state, twice the size of the weights, and can be gone on from: "every" one or the "last".
    Raises CheckpointError, ConfigError or ModelError; DivergedError names the last good checkpoint.
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
        if moments == "last" and step < settings.max_steps:
            training_state = {name: x for name, x in training_state.items() if name != "optimizer_state_dict"}
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
    if not is_step(state["global_step"]):
        raise CheckpointError(f"{file}: its global_step is no number of steps")
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
