"""What every reader of torch.save files makes of any pickle: a value, or an error of the user's kind."""

import json
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from runner.checkpoints.checkpoint import plain
from runner.checkpoints.detect import formats, open_checkpoint
from runner.errors import RunnerError
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.families.npt import EquivalenceSettings
from runner.families.npt.training import train_run
from runner.files.tensors import load_pickle, read_pickle
from runner.merge.spec import MergeSpec
from runner.tasks.merge import plan
from tests.checkpoints import hostile
from tests.checkpoints.pickle_grammar import RECORD, TENSOR, Grammar
from tests.checks.benches import write_npt_full
from tests.conftest import npt_tensors, write_npt
from tests.gpt_files import random_state, script_file
from tests.lora_files import write_moe


def read(path: Path) -> None:
    """As a file of its own."""
    for tensors in ("meta", "mmap"):
        json.dumps(plain(load_pickle(path, tensors=tensors)))
    json.dumps(plain(read_pickle(path)))


def opened(path: Path) -> None:
    """As one of a checkpoint's files: opened, described, every tensor read."""
    checkpoint = open_checkpoint(path)
    described = formats(None)[checkpoint.format].describe(checkpoint)
    json.dumps(described, default=str).encode("utf-8")
    for name in checkpoint.weights.infos:
        checkpoint.weights.read(name)


def merged(path: Path) -> None:
    """As one of the sources of a merge, and of an average."""
    for rule in ("layers", "average"):
        other = path.parent / "other"
        spec = MergeSpec(name="test", rule=rule, sources=[str(path), str(other)])
        plan(spec, [path, other], None, path.parent / "out")


def resumed(path: Path) -> None:
    """As what a training goes on from, for one step."""
    base = load_base(open_checkpoint(path), None, Placement(device="cpu"))
    settings = EquivalenceSettings(
        layers=(0,), modulation="single", np_rank=2, num_ranks=1, max_steps=4, warmup_steps=1, save_every=100
    )
    rows = [torch.tensor([[1, 2, 3]])]
    train_run(path.parent / "trained", base, rows, settings, base_name="base", resume_from=path)
    shutil.rmtree(path.parent / "trained")


OPTIMIZER = {
    "state": {i: {"step": 1, "exp_avg": TENSOR, "exp_avg_sq": TENSOR} for i in range(3)},
    "param_groups": [{"params": [0, 1, 2], "lr": 0.1, "betas": [0.9, 0.95], "param_names": ["a", "b", "c"]}],
}
MERGE_INFO = {
    "merged_from": ["a", "b"],
    "layer_sources": {0: "a", "1": ["b"]},
    "layer_steps": {0: 3},
    "merged_layers": [0],
}
STATE = {
    "global_step": 3, "batch_count": 3, "config": {"model_name": "base", "learning_rate": 0.1}, "merge_info": MERGE_INFO,
    "optimizer_state_dict": OPTIMIZER, "scheduler_state_dict": {"last_epoch": 3, "base_lrs": [0.1]}, "scaler_state_dict": None,
}  # fmt: skip
STAGES = [{"name": "a", "until_step": 3, "mixing_ratio": 0.5}]
LAYERS = {
    "layers_to_train": [0], "layer_weights": {0: 1.0}, "curriculum_schedule": STAGES, "current_stage_index": 0
}  # fmt: skip
NPT = {"layer_0_np.W_down": TENSOR, "layer_0_np.W_a_up": TENSOR, "layer_0_np.W_b_up": TENSOR}
INFO = {
    "step": 3,
    "args": {"model_name": "base", "modulation_scale": 0.5},
    "adapter_config": {"r": 2, "modulation_type": "x"},
}
GPT = {
    "step": 3,
    "code": "x",
    "val_loss": TENSOR,
    "optimizers": [OPTIMIZER],
    "model": {"embed.weight": TENSOR, "scalars": TENSOR},
}
ROUTER = {
    "gate_state_dict": {"weight": TENSOR, "bias": TENSOR},
    "num_experts": 3,
    "input_size": 32,
    "top_k": 1,
    "temperature": 2.0,
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file into which a random pickle goes, what it holds as a rule (None: anything), and who reads it then."""

    file: str
    template: Any
    readers: tuple[Callable[[Path], None], ...]


TARGETS = {
    "alone": Target(file="alone.pt", template=None, readers=(read,)),
    "npt weights": Target(file="npt/npt_weights.pt", template=NPT, readers=(opened,)),
    "training state": Target(file="npt/training_state.pt", template=STATE, readers=(opened, merged, resumed)),
    "multi-layer state": Target(file="npt/multi_layer_state.pt", template=LAYERS, readers=(opened, merged)),
    "training info": Target(file="full/training_info.pt", template=INFO, readers=(opened,)),
    "gpt": Target(file="gpt/state.pt", template=GPT, readers=(opened,)),
    "router": Target(file="moe/router.pt", template=ROUTER, readers=(opened,)),
    "skills": Target(file="moe/skill_library.pt", template={0: TENSOR, "a": TENSOR}, readers=(opened, merged)),
}


def write_targets(directory: Path, base: Path) -> None:
    """A sound checkpoint for each target, and a second one to merge it with."""
    for name in ("npt", "other"):
        write_npt(directory / name, npt_tensors(base, {0: ("single", 2, 1)}), base=base)
    write_npt_full(directory / "full", base)
    (directory / "gpt").mkdir()
    script_file(directory / "gpt" / "state.pt", random_state("small", layers=2, width=128, vocab=4))
    write_moe(directory / "moe", base)
    torch.save(load_file(directory / "moe" / "router.safetensors"), directory / "moe" / "router.pt")
    (directory / "moe" / "router.safetensors").unlink()


def tried(directory: Path, name: str, seed: int) -> str | None:
    """What one random pickle does to the readers of a target: None, or a traceback that no user should see."""
    target = TARGETS[name]
    path = directory / target.file
    healthy = path.read_bytes() if path.exists() else None
    grammar = Grammar(seed)
    written = hostile.pickled(directory, grammar.program(target.template if seed % 4 else None), {"0": b"\0" * RECORD})
    shutil.move(written, path)
    try:
        for reader in target.readers:
            try:
                reader(path if reader is read else path.parent)
            except RunnerError as error:
                if not str(error).isprintable() or len(str(error)) > 20_000:
                    return f"{name}, seed {seed}: {str(error)[:200]!r}"
            except Exception:
                return f"{name}, seed {seed}:\n{traceback.format_exc()}"
    finally:
        path.unlink() if healthy is None else path.write_bytes(healthy)
    return None
