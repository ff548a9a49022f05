"""A loaded model written back to a directory, by the writer of its format: that which training and convert use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.evaluation.build import npt_tensors
from runner.families.gpt import save as gpt_save
from runner.families.gpt.checkpoint import provenance
from runner.families.gpt.layouts import GptDetails
from runner.families.hf import checkpoint as hf_save
from runner.families.hf.checkpoint import HfDetails
from runner.families.lora.adapter import AdapterDetails, key, save_adapter
from runner.families.lora_moe.checkpoint import MoeDetails
from runner.families.lora_moe.model import LoraForCausalLM, LoraMoeForCausalLM
from runner.families.lora_moe.state import read_skills
from runner.families.lora_moe.trained import save_moe
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt import full as npt_full
from runner.families.npt.full import NptFullDetails
from runner.families.npt.model import NptLlamaForCausalLM
from runner.files.staging import staged

# An adapter lies in a directory of its own below the one that is written.
ADAPTER = "adapter"
# Writes a model, built from the checkpoint on the base with this path, as a new directory.
Writer = Callable[[Checkpoint, Any, str, Path], None]


def writer_of(checkpoint: Checkpoint) -> Writer | None:
    """What writes a checkpoint of this format; None where it is only ever read."""
    if checkpoint.format == npt_delta.NAME:
        return _write_npt_delta
    writers: dict[type, Writer] = {
        NptFullDetails: _write_npt_full,
        HfDetails: _write_hf,
        GptDetails: _write_gpt,
        MoeDetails: _write_moe,
        AdapterDetails: _write_adapter,
    }
    return writers.get(type(checkpoint.details))


def save_model(checkpoint: Checkpoint, model: nn.Module, base: Path | None, target: Path) -> None:
    """Write `model`, which was built from `checkpoint` on `base`, as the directory `target`.

    Raises CheckpointError where `target` cannot be written, RunnerError where the disk fails.
    """
    write = writer_of(checkpoint)
    assert write is not None, f"{checkpoint.format} is only read"
    write(checkpoint, model, str(base.resolve()) if base else "", target)


def _write_npt_delta(checkpoint: Checkpoint, model: NptLlamaForCausalLM, base: str, target: Path) -> None:
    state = {"global_step": checkpoint.step} if checkpoint.step is not None else None
    with staged(target) as directory:
        npt_delta.save(
            directory, npt_tensors(model), training_state=state, multi_layer_state=None, config={"model_name": base}
        )


def _write_npt_full(checkpoint: Checkpoint, model: NptLlamaForCausalLM, base: str, target: Path) -> None:
    tensors, own = _stored_tensors(checkpoint, model), npt_tensors(model)
    for layer in checkpoint.layers:
        for matrix, names in layer.keys["gate"].items():
            # Linear weights: transposed to what npt_delta has.
            tensors[names[0]] = own[npt_delta.key(layer.layer, "single", "gate", matrix, 0, 1)].T
    info = checkpoint.directory / npt_full.TRAINING_INFO
    with staged(target) as directory:
        hf_save.save(directory, tensors, config=checkpoint.details.config, beside=[info] if info.is_file() else [])


def _write_hf(checkpoint: Checkpoint, model: nn.Module, base: str, target: Path) -> None:
    with staged(target) as directory:
        hf_save.save(directory, _stored_tensors(checkpoint, model), config=checkpoint.details.config)


def _stored_tensors(checkpoint: Checkpoint, model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names that the checkpoint stores: a tied head that it leaves out is left out again.

    What no model computes with is read: gates before permanent updates, buffers that follow from the config.
    """
    state = model.state_dict()
    return {name: state[name] if name in state else checkpoint.weights.read(name) for name in checkpoint.weights.infos}


def _write_gpt(checkpoint: Checkpoint, model: nn.Module, base: str, target: Path) -> None:
    origin = provenance(checkpoint.weights)
    with staged(target) as directory:
        gpt_save.save(directory, gpt_tensors(checkpoint, model), checkpoint.details, provenance=origin)


def gpt_tensors(checkpoint: Checkpoint, model: nn.Module) -> dict[str, torch.Tensor]:
    """A GPT's weights under its checkpoint's names, in the dtypes that the checkpoint stores."""
    state = model.state_dict()
    return {name: state[name].to(checkpoint.weights.infos[name].dtype) for name in checkpoint.details.keys}


def _write_moe(checkpoint: Checkpoint, model: LoraMoeForCausalLM, base: str, target: Path) -> None:
    skills = checkpoint.details.skills
    save_moe(
        model,
        target,
        base_name=base,
        step=checkpoint.step,
        skills=None if skills is None else read_skills(skills),
    )


def _write_adapter(checkpoint: Checkpoint, model: LoraForCausalLM, base: str, target: Path) -> None:
    config = {**checkpoint.details.settings.raw, "base_model_name_or_path": base}
    (adapter,) = model.adapters()
    pairs = {module: {"A": a, "B": b} for module, (a, b, _) in adapter.items()}
    tensors = {key(module, matrix): tensor for module, pair in pairs.items() for matrix, tensor in pair.items()}
    with staged(target) as directory:
        save_adapter(directory / ADAPTER, tensors, config)
