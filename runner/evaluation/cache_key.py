"""Where on disk the results of a base model are kept, for this process and those that compute the very same bits."""

import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import runner
from runner.evaluation.base_models import Base
from runner.evaluation.tensor_cache import Store, name_of
from runner.files.hashes import content_hash
from runner.versions import versions

log = logging.getLogger(__name__)
DIRECTORY = "reference"
MEMORY = "weights.json"
# To be counted up whenever what is kept, or how it is computed, changes.
_LAYOUT = 1
# What libraries choose their arithmetic by.
_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Where on disk a model's results are kept; `model` says exactly which model computed them, and on what."""

    store: Store
    model: str


def shelf_of(base: Base, cache: Path, *, may_read: bool) -> Shelf | None:
    """The shelf of `base` under the directory `cache`.

    Its name is made from the contents of the weights, so a base that is changed in any way has another one. With
    `may_read` they are read where their hash is not known yet; without, there is then no shelf.
    """
    directory = cache / DIRECTORY
    try:
        content = content_hash(base.files, directory / MEMORY, may_read=may_read)
        current = base.is_current()
    except OSError as error:
        log.warning("%s: the reference is not kept on disk: %s", directory, error)
        return None
    if content is None or not current:
        return None
    return Shelf(
        store=Store(directory=directory), model=name_of(_LAYOUT, content, str(base.model.dtype), *_machine(base))
    )


def _machine(base: Base) -> list[object]:
    """What else decides about the last bits: libraries, processor, number of threads."""
    used = versions()
    device = base.model.device
    return [
        runner.__version__, used.get("torch"), used.get("transformers"), device.type,
        torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(),
        torch.backends.cuda.matmul.allow_tf32, [os.environ.get(name) for name in _VARIABLES],
        getattr(base.model.config, "_attn_implementation", None),
        # Spread over several devices, each layer runs where it lies.
        sorted((name, str(parameter.device)) for name, parameter in base.model.named_parameters()),
    ]  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.machine())
