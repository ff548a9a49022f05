"""`task=convert`: the same checkpoint in another layout. Nothing is published that does not read back equal."""

from pathlib import Path

import torch

from runner.checkpoints.checkpoint import Expected
from runner.checkpoints.detect import open_checkpoint
from runner.config import Conversion, ConvertConfig
from runner.errors import ConfigError, RunnerError
from runner.families.family import Family
from runner.files.archive import require_crc
from runner.files.file_type import sha256_of
from runner.files.staging import staged
from runner.results import Result
from runner.tasks.context import Context, checkpoint_path


def run(config: ConvertConfig, context: Context) -> Result:
    """Write `convert.output`. Raises ConfigError for an unknown conversion, CheckpointError for bad files."""
    wanted: Conversion = config.convert
    with context.timed("open"):
        checkpoint = open_checkpoint(checkpoint_path(config), config.format.name, config.format.module, config.family)
        family: Family = config.family.of(checkpoint)
        checkpoint.require_complete()
    target = Path(wanted.output).expanduser()
    if wanted.vocab_size is not None and not family.can_cut_vocabulary:
        raise ConfigError(f"convert.vocab_size belongs to GPT checkpoints; {checkpoint.path} is {checkpoint.format}")
    write = family.convert(checkpoint, wanted, target)
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
            option="convert.force",
            inputs=[checkpoint.path],
            expected_bytes=size,
            manifest={"recipe": recipe, "inputs": inputs},
        ) as partial,
    ):
        compared = _read_back(partial, write(partial), config.format.module)
    return context.result(
        "convert",
        checkpoint,
        checks=[{"name": "read back", "status": "pass", "details": f"{compared} tensors equal, bit for bit"}],
        details={
            "output": str(target),
            "to": wanted.to,
            "files": sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()),
        },
    )


def _read_back(directory: Path, expected: Expected, module: str | None) -> int:
    """How many tensors were compared. Raises RunnerError for one that is not what it should be."""
    compared = 0
    for place, tensors in expected.items():
        written = open_checkpoint(directory / place, module=module).weights
        if set(written.infos) != set(tensors):
            raise RunnerError(f"conversion failed: {place} holds other names than it should; nothing was published")
        for name, get in tensors.items():
            ours, theirs = written.read(name), get()
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                raise RunnerError(f"conversion failed: {name} does not read back equal; nothing was published")
            compared += 1
    return compared
