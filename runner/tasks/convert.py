"""`task=convert`: the same checkpoint in another layout. Nothing is published that does not read back equal."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from runner.checkpoints.checkpoint import Checkpoint, Expected, Writer
from runner.checkpoints.detect import open_checkpoint
from runner.config import Conversion, ConvertConfig
from runner.errors import ConfigError, RunnerError
from runner.families.gpt import save as gpt_save
from runner.families.gpt.checkpoint import provenance
from runner.families.gpt.layouts import GptDetails
from runner.families.hf import checkpoint as hf
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt import full as npt_full
from runner.files.archive import require_crc
from runner.files.file_type import sha256_of
from runner.files.staging import staged
from runner.files.tensors import TensorSource
from runner.results import Result, versions
from runner.tasks.context import Context
from runner.tasks.naming import check_family, checkpoint_path

# What is copied beside converted NPT weights, and beside a base taken out of an npt_full.
_NPT_FILES = (npt_delta.TRAINING_STATE, npt_delta.MULTI_LAYER_STATE, npt_delta.MERGE_SUMMARY)
_MODEL_FILES = (
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    *hf.TOKENIZER_FILES,
)


def run(config: ConvertConfig, context: Context) -> Result:
    """Write `convert.output`. Raises ConfigError for an unknown conversion, CheckpointError for bad files."""
    wanted: Conversion = config.convert
    with context.timed("open"):
        checkpoint = open_checkpoint(checkpoint_path(config, context), config.format.name, config.format.module)
        check_family(config, checkpoint)
        checkpoint.require_complete()
    target = Path(wanted.output).expanduser()
    write = _writer(checkpoint, wanted, target)
    with context.timed("check"):
        for file in checkpoint.weights.files:
            require_crc(file)
    with context.timed("hash"):
        inputs = {file.name: sha256_of(file) for file in checkpoint.weights.files}
    recipe = {"task": "convert", "format": checkpoint.format, "to": wanted.to, "vocab_size": wanted.vocab_size}
    size = sum(info.nbytes for info in checkpoint.weights.infos.values())
    with (
        context.timed("write"),
        staged(
            target,
            replace=wanted.force,
            inputs=[checkpoint.path],
            expected_bytes=size,
            manifest={"recipe": recipe, "inputs": inputs},
        ) as partial,
    ):
        compared = _read_back(partial, write(partial))
    return Result(
        task="convert",
        ckpt=str(checkpoint.path),
        step=checkpoint.step,
        family=checkpoint.family,
        format=checkpoint.format,
        checks=[{"name": "read back", "status": "pass", "details": f"{compared} tensors equal, bit for bit"}],
        findings=list(checkpoint.findings),
        timing=context.timing,
        versions=versions(),
        details={
            "output": str(target),
            "to": wanted.to,
            "files": sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()),
        },
    )


def _writer(checkpoint: Checkpoint, wanted: Conversion, target: Path) -> Writer:
    """What writes this conversion. Raises ConfigError, before anything is written, where there is none."""
    if wanted.vocab_size is not None and not isinstance(checkpoint.details, GptDetails):
        raise ConfigError(f"convert.vocab_size belongs to GPT checkpoints; {checkpoint.path} is {checkpoint.format}")
    if wanted.to == "hf":
        if checkpoint.format != npt_full.NAME:
            raise ConfigError(f"convert.to=hf takes an npt_full apart; {checkpoint.path} is {checkpoint.format}")
        return lambda directory: _write_base_and_adapters(checkpoint, directory)
    if checkpoint.format == npt_delta.NAME:
        return lambda directory: _write_npt_delta(checkpoint, wanted, directory, target)
    if isinstance(checkpoint.details, GptDetails):
        return _gpt_writer(checkpoint, checkpoint.details, wanted)
    raise ConfigError(f"{checkpoint.path}: a {checkpoint.format} cannot be converted to {wanted.to}")


def _write_npt_delta(checkpoint: Checkpoint, wanted: Conversion, directory: Path, target: Path) -> Expected:
    """The same names and tensors in the other container, with the files beside them."""
    read = _readers(checkpoint.weights)
    config = dict(checkpoint.training["config"])
    if base := checkpoint.local_base():
        config["model_name"] = os.path.relpath(base, target)  # the old relative name would lead nowhere from there
    npt_delta.save(
        directory,
        {name: get() for name, get in read.items()},
        training_state=None,
        multi_layer_state=None,
        config=config,
        weights_file=f"npt_weights.{wanted.to}",
    )
    if checkpoint.path.is_dir():
        _copy(checkpoint.path, directory, _NPT_FILES)
    return {".": read}


def _gpt_writer(checkpoint: Checkpoint, details: GptDetails, wanted: Conversion) -> Writer:
    tensors = {name: checkpoint.weights.read(name) for name in details.keys}
    if wanted.vocab_size is not None:
        tensors, details = gpt_save.cut_vocabulary(tensors, details, wanted.vocab_size)

    def write(directory: Path) -> Expected:
        gpt_save.save(
            directory,
            tensors,
            details,
            provenance=provenance(checkpoint.weights),
            weights_file=f"model.{wanted.to}",
        )
        return {".": {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()}}

    return write


def _write_base_and_adapters(checkpoint: Checkpoint, directory: Path) -> Expected:
    """`base/`, a plain Hugging Face model, and `adapters/`, an npt_delta over it. The scale goes into W_b_up."""
    from safetensors.torch import save_file

    details: npt_full.NptFullDetails = checkpoint.details
    base, adapters = directory / "base", directory / "adapters"
    base.mkdir()
    adapters.mkdir()
    plain = {n: get for n, get in _readers(checkpoint.weights).items() if n not in details.adapter_keys}
    save_file(
        {name: get().contiguous() for name, get in plain.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    (base / hf.CONFIG).write_text(json.dumps(details.config, indent=2) + "\n", encoding="utf-8")
    _copy(checkpoint.path, base, _MODEL_FILES)
    deltas = {
        npt_delta.key(layer.layer, "single", "gate", matrix, 0, 1): _delta(
            checkpoint.weights, names[0], matrix, details.scale
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


def _delta(weights: TensorSource, name: str, matrix: str, scale: float) -> Callable[[], torch.Tensor]:
    """An adapter's Linear weight as npt_delta has it: transposed, in float32, W_b_up times the scale."""
    return lambda: weights.read(name).T.float() * (scale if matrix == "W_b_up" else 1.0)


def _readers(weights: TensorSource) -> dict[str, Callable[[], torch.Tensor]]:
    return {name: lambda name=name: weights.read(name) for name in weights.infos}  # type: ignore[misc]


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            require_crc(source / name)
            shutil.copyfile(source / name, target / name)


def _read_back(directory: Path, expected: Expected) -> int:
    """How many tensors were compared. Raises RunnerError for one that is not what it should be."""
    compared = 0
    for place, tensors in expected.items():
        written = open_checkpoint(directory / place).weights
        if set(written.infos) != set(tensors):
            raise RunnerError(f"conversion failed: {place} holds other names than it should; nothing was published")
        for name, get in tensors.items():
            ours, theirs = written.read(name), get()
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                raise RunnerError(f"conversion failed: {name} does not read back equal; nothing was published")
            compared += 1
    return compared
