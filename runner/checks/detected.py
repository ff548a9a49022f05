"""What a damaged checkpoint still shows itself to be: its format and its weight files, from names alone if need be.

The formats' own modules refuse a checkpoint for its first fault; the checks must look at each part by itself.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoints.runs import step_in_name
from runner.checks.headers import Header
from runner.errors import CheckpointError
from runner.files.file_type import may_be_weights

Headers = Callable[[Path], Header]
FAMILIES = {
    "npt_delta": "npt", "npt_full": "npt", "gpt_small": "gpt", "gpt_medium": "gpt", "lora_moe": "lora_moe",
    "hf": "hf", "peft": "hf",
}  # fmt: skip
NPT_WEIGHTS = ("npt_weights.pt", "npt_weights.safetensors")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MERGED_MODEL = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
EXPERT = re.compile(r"expert_(\d+)")
NPT_KEY = re.compile(r"(?:layer_\d+_np|model\.layers\.\d+\.np_component)\..+")
_FULL_KEY = re.compile(r"model\.layers\.\d+\.adapter\..+")
_GPT_KEYS = {"gpt_small": re.compile(r"blocks\.\d+\.attn\.qkv_w"), "gpt_medium": re.compile(r"blocks\.\d+\..*\.qkvo_w")}


@dataclass(frozen=True, kw_only=True)
class Look:
    """`path`: the checkpoint, a directory or a file; `format`: what it shows itself to be, None where nothing does."""

    path: Path
    format: str | None

    @property
    def family(self) -> str | None:
        """The family of the format."""
        return FAMILIES.get(self.format or "")

    @property
    def directory(self) -> Path:
        """Where its other files lie."""
        return self.path if self.path.is_dir() else self.path.parent


def look(path: Path, headers: Headers) -> Look:
    """What lies at `path`; a directory that holds exactly one checkpoint is that checkpoint.

    Raises CheckpointError where nothing is there, or nothing that could be a checkpoint.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    found = _format(path, headers)
    if found is None and path.is_dir():
        inside = _checkpoints_in(path, headers)
        if len(inside) == 1:
            return inside[0]
        if not _weight_files(path):
            found = _without_weights(path)
        if found is None and not _weight_files(path):
            shown = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise CheckpointError(f"{path}: holds no checkpoint that is known; it holds {shown}")
    return Look(path=path, format=found)


def several(path: Path) -> list[Path]:
    """The checkpoints in a directory that is none itself, where it holds more than one; else []."""
    from runner.checks.headers import read_header

    if not path.is_dir() or _format(path, read_header) is not None:
        return []
    inside = [found.path for found in _checkpoints_in(path, read_header)]
    return inside if len(inside) > 1 else []


def _without_weights(path: Path) -> str | None:
    """What a directory was before its weights were lost, by what lies beside them: its check of files then fails."""
    names = {entry.name for entry in path.iterdir()}
    if {"training_state.pt", "multi_layer_state.pt"} & names:
        return "npt_delta"
    if "training_info.pt" in names:
        return "npt_full"
    return "hf" if _model_type(path / "config.json") else None


def _checkpoints_in(path: Path, headers: Headers) -> list[Look]:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    formats = [(folder, _format(folder, headers)) for folder in folders[:200]]
    return [Look(path=folder, format=found) for folder, found in formats if found is not None]


def _format(path: Path, headers: Headers) -> str | None:
    if path.is_file():
        return _of_file(path, headers)
    names = {entry.name for entry in path.iterdir()}
    if {"peft_adapters", "dylo_moe_state", "router.safetensors", "router.pt"} & names or any(
        map(EXPERT.fullmatch, names)
    ):
        return "lora_moe"
    model_type = _model_type(path / "config.json")
    if model_type == "dylora-moe":
        return "lora_moe"
    if set(NPT_WEIGHTS) & names:
        return "npt_delta"
    if {"adapter_config.json", *ADAPTER_WEIGHTS} & names:
        return "peft"
    weights = sorted(name for name in names if MERGED_MODEL.fullmatch(name) and not name.endswith(".json"))
    if weights:
        keys = {key for name in weights for key in _names(path / name, headers)}
        if not any(_GPT_KEYS["gpt_small"].fullmatch(key) or _GPT_KEYS["gpt_medium"].fullmatch(key) for key in keys):
            full = "training_info.pt" in names or any(map(_FULL_KEY.fullmatch, keys))
            return "npt_full" if full else "hf"
    found = {_of_file(file, headers) for file in _weight_files(path)} - {None}
    return found.pop() if len(found) == 1 else None


def _of_file(path: Path, headers: Headers) -> str | None:
    if path.name in NPT_WEIGHTS:
        return "npt_delta"
    if path.name in ADAPTER_WEIGHTS:
        return "peft"
    keys = _names(path, headers)
    if any(map(NPT_KEY.fullmatch, keys)):
        return "npt_delta"
    for name, pattern in _GPT_KEYS.items():
        if any(map(pattern.fullmatch, keys)):
            return name
    return "gpt_small" if step_in_name(path.name) is not None and not path.is_dir() else None


def _names(path: Path, headers: Headers) -> list[str]:
    """The tensors' names; none where the file cannot be read, which is for the check of files to say."""
    try:
        return list(headers(path).tensors)
    except CheckpointError:
        return []


def _weight_files(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_file() and may_be_weights(entry.name))


def _model_type(path: Path) -> str | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = value.get("model_type") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def weight_files(found: Look) -> list[Path]:
    """The files that hold the checkpoint's weights, those of no format that is known included."""
    if found.path.is_file():
        return [found.path]
    root = found.path
    if found.format == "lora_moe":
        return sorted(
            path
            for path in root.rglob("*")
            if path.name in ("router.safetensors", "router.pt", *ADAPTER_WEIGHTS) and path.is_file()
        )
    files = _weight_files(root)
    if found.format == "npt_delta":
        return [file for file in files if file.name in NPT_WEIGHTS] or files
    if found.format == "peft":
        return [file for file in files if file.name in ADAPTER_WEIGHTS]
    return files
