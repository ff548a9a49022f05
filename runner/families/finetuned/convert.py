"""Fine-tuned classifiers in other layouts: the original script's .pt, and a directory of sequence classification."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints import model_directory
from runner.checkpoints.checkpoint import Checkpoint, Expected, Writer
from runner.errors import ConfigError
from runner.evaluation.placement import Placement
from runner.families.finetuned.checkpoint import BACKBONE, FinetunedDetails
from runner.families.finetuned.model import build, load_base, open_backbone
from runner.families.gpt.model import GptForCausalLM
from runner.families.gpt.records import SMALL
from runner.files.tensors import owned
from runner.finetuning.classifier import Classifier

CPU = Placement(device="cpu", dtype="float32")
SCRIPT_FILE = "ckpt.pt"


def conversion(checkpoint: Checkpoint, to: str, moved: str | None) -> Writer:
    """What writes the classifier as `pt` or `hf`. Raises ConfigError for what has no such layout."""
    details: FinetunedDetails = checkpoint.details
    if details.is_original:
        raise ConfigError(f"{checkpoint.path}: is the original script's already")
    inner, family = open_backbone(checkpoint, moved)
    if to == "pt" and (family.name != "gpt" or details.head != "mlp"):
        raise ConfigError(
            f"convert.to=pt is the original script's layout, of a gpt with train.head=mlp; this is a {inner.format}"
        )
    if to == "hf" and (family.name != "hf" or details.head != "linear"):
        raise ConfigError(
            f"convert.to=hf is a directory of transformers, of a plain model with train.head=linear; this is a "
            f"{inner.format}"
        )
    model = build(checkpoint, load_base(checkpoint, None, CPU), CPU, moved)
    return partial(_write_script_file, checkpoint, inner, model) if to == "pt" else partial(
        _write_directory, checkpoint, inner, model
    )  # fmt: skip


def _write_script_file(checkpoint: Checkpoint, inner: Checkpoint, model: Classifier, directory: Path) -> Expected:
    """`model`, figures, and args: what evaluate.py reads."""
    is_small = inner.details.record.name == SMALL
    depth, backbone = inner.details.num_layers, model.backbone
    assert isinstance(backbone, GptForCausalLM)
    tensors = {}
    for name in inner.details.keys:
        if name.startswith("lm_head"):
            continue
        tensor = backbone.weight(name).detach()  # with its low-rank update
        if name == "scalars":
            tensor = tensor[: 5 * depth]
        renamed = is_small and name.startswith("blocks.") and name.endswith(".weight")
        tensors[BACKBONE + (name.removesuffix(".weight") + "_weight" if renamed else name)] = tensor
    tensors |= {name: parameter.detach() for name, parameter in model.head_parameters().items()}
    said = checkpoint.details.description
    figures: Mapping[str, Any] = said.get("metrics") or {}
    config = inner.details
    args = {
        "text_column": said["text"], "num_classes": len(checkpoint.details.labels), "n_layer": depth,
        "n_head": config.num_heads, "n_embd": config.model_dim, "block_size": said["max_length"],
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    own = owned(tensors)
    content = {
        "model": own, "iter_num": checkpoint.step or 0, "val_loss": figures.get("loss"),
        "val_accuracy": figures.get("accuracy"), "val_f2": figures.get("macro_f2"), "args": args,
    }  # fmt: skip
    torch.save(content, directory / SCRIPT_FILE)
    return {".": {name: _given(tensor) for name, tensor in own.items()}}


def _write_directory(checkpoint: Checkpoint, inner: Checkpoint, model: Classifier, directory: Path) -> Expected:
    """config.json and weights for AutoModelForSequenceClassification, and the tokenizer."""
    labels = checkpoint.details.labels
    config = dict(inner.details.config)
    names = [
        str(name).removesuffix("ForCausalLM") + "ForSequenceClassification" for name in config.get("architectures", [])
    ]
    merged = _with_updates(model, checkpoint.details.description)
    tensors = {name: tensor for name, tensor in merged.items() if "lm_head" not in name}
    tensors |= {name: parameter.detach() for name, parameter in model.head_parameters().items()}
    config |= {
        "architectures": names,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "num_labels": len(labels),
        # Where transformers looks for the last token of a padded row: one of no text.
        "pad_token_id": config.get("pad_token_id") if config.get("pad_token_id") is not None else 0,
    }
    model_directory.save(directory, tensors, config=config)
    for name in model_directory.TOKENIZER_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)
    return {".": {name: _given(tensor.detach()) for name, tensor in owned(tensors).items()}}


def _with_updates(model: Classifier, said: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The backbone's tensors with low-rank updates added to what they belong to."""
    state = {name: tensor.detach() for name, tensor in model.backbone.state_dict().items()}
    for name in [name for name in state if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        scale = said["low_rank"]["alpha"] / said["low_rank"]["rank"]
        state[f"{stem}.weight"] = state[f"{stem}.weight"] + scale * state[f"{stem}.lora_B.weight"] @ state[name]
    return {name: tensor for name, tensor in state.items() if ".lora_" not in name}


def _given(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor
