"""What a fine-tuned classifier is on disk: only what was trained, the head, and what says what it stands on.

classification.json    backbone and base with hashes, labels, texts, tokenizer, settings, figures, step
head.safetensors       classifier.* or score.weight
backbone.safetensors   what was trained of the backbone, by the names of its parameters; absent where nothing was
adapter_model.safetensors, adapter_config.json   in its place for low-rank updates of a plain model: as PEFT saves them
tokenizer.json, …      copies
training.pt            what a training goes on from
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.model_directory import TOKENIZER_FILES
from runner.errors import CheckpointError
from runner.files import manifest
from runner.files.file_type import sha256_of
from runner.files.tensors import open_weights, owned

if TYPE_CHECKING:
    import torch

    from runner.finetuning.classifier import Classifier
    from runner.finetuning.low_rank import LowRankSettings

FORMAT, VERSION = "finetuned", 1
DESCRIPTION, HEAD_FILE, BACKBONE_FILE = "classification.json", "head.safetensors", "backbone.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What PEFT puts before the names of a model's parameters.
PEFT_PREFIX = "base_model.model."
_BESIDE = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt")


def content_hash(files: Iterable[Path]) -> str:
    """One hash of the content of files, whatever their names."""
    return hashlib.sha256("\n".join(sorted(map(sha256_of, files))).encode()).hexdigest()


def write(
    target: Path,
    model: "Classifier",
    trained: Iterable[str],
    description: Mapping[str, Any],
    *,
    tokenizer: Sequence[Path] = (),
    state: Mapping[str, Any] | None = None,
    peft: Mapping[str, Any] | None = None,
) -> None:
    """Write the directory `target`, whole or not at all, in the place of an older one of this runner.

    `trained`: names of the backbone's parameters; `peft`: adapter_config.json of low-rank updates as PEFT has them.
    Raises CheckpointError where `target` cannot be written, RunnerError where the disk fails.
    """
    import torch
    from safetensors.torch import save_file

    from runner.files.staging import staged

    named = dict(model.backbone.named_parameters())
    own = owned({name: named[name] for name in trained})
    head = owned(model.head_parameters())
    with staged(target, replace=target.exists()) as directory:
        save_file(head, directory / HEAD_FILE)
        if peft is not None:
            save_file({PEFT_PREFIX + name: each for name, each in {**own, **head}.items()}, directory / ADAPTER_FILE)
            (directory / ADAPTER_CONFIG).write_text(json.dumps(dict(peft), indent=2) + "\n", encoding="utf-8")
        elif own:
            save_file(own, directory / BACKBONE_FILE)
        for file in tokenizer:
            shutil.copyfile(file, directory / (file.name if file.name in _BESIDE else "tokenizer.json"))
        if state is not None:
            torch.save(dict(state), directory / "training.pt")
        text = json.dumps({"format": FORMAT, "version": VERSION, **description}, indent=2, ensure_ascii=False)
        (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def tokenizer_files(option: str | None, directories: Sequence[Path]) -> list[Path]:
    """The files of the tokenizer that `load_tokenizer` takes, to be copied."""
    if option is not None and Path(option).expanduser().is_file():
        return [Path(option).expanduser()]
    places = directories if option is None else [Path(option).expanduser()]
    found = [[place / name for name in _BESIDE if (place / name).is_file()] for place in places]
    return next((files for files in found if files), [])


def peft_config(settings: "LowRankSettings", targets: Iterable[str], base: str) -> dict[str, Any]:
    """adapter_config.json of low-rank updates and a `score` for sequence classification."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": False,
        "target_modules": sorted(set(targets)),
        "modules_to_save": ["classifier", "score"],
        "bias": "none",
        "init_lora_weights": True,
    }


def load_trained(model: "Classifier", directory: Path) -> None:
    """Give the backbone's and the head's parameters what a checkpoint of the same training holds.

    Raises CheckpointError.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in (ADAPTER_FILE, BACKBONE_FILE, HEAD_FILE):
        if (directory / name).is_file():
            source = open_weights(directory / name)
            tensors |= {key.removeprefix(PEFT_PREFIX): source.read(key) for key in source.infos}
    load_parameters(model, tensors, directory)


def copy_checkpoint(source: Path, target: Path) -> None:
    """The checkpoint `source` once more as `target`. Raises CheckpointError or RunnerError."""
    from runner.files.staging import staged

    with staged(target) as directory:
        for file in source.iterdir():
            if file.name != manifest.FILE_NAME:
                shutil.copyfile(file, directory / file.name)


def load_parameters(model: "Classifier", tensors: "Mapping[str, torch.Tensor]", where: Path) -> None:
    """Give the backbone's and the head's parameters the values of `tensors`. Raises CheckpointError for misfits."""
    import torch

    named = {**dict(model.backbone.named_parameters()), **model.head_parameters()}
    for name, tensor in tensors.items():
        if name not in named or named[name].shape != tensor.shape:
            own = "none" if name not in named else str(list(named[name].shape))
            raise CheckpointError(f"{where}: {name} is {list(tensor.shape)}, the model has {own}")
        with torch.no_grad():
            named[name].copy_(tensor)
    if lacking := sorted(set(model.head_parameters()) - set(tensors)):
        raise CheckpointError(f"{where}: has no {', '.join(lacking)}")
