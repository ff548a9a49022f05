"""adapter_config.json of a PEFT LoRA adapter: what it says of ranks, scaling and modules. Whatever would make the
adapter compute something else than `W x + scaling · B A x` is refused by name."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError
from runner.files.strict_json import read_object

FILE_NAME = "adapter_config.json"
ALL_LINEAR = "all-linear"
_LIMIT = 4 << 20

_READ = (
    "peft_type r lora_alpha use_rslora lora_dropout target_modules exclude_modules layers_to_transform layers_pattern "
    "rank_pattern alpha_pattern init_lora_weights bias base_model_name_or_path"
).split()
# Fields that say where an adapter came from or how it was initialised; PEFT itself ignores fan_in_fan_out on nn.Linear.
_NEUTRAL = (
    "task_type auto_mapping peft_version revision inference_mode fan_in_fan_out megatron_core qalora_group_size "
    "loftq_config eva_config corda_config lora_ga_config runtime_config ephemeral_gpu_offload"
).split()
_OTHER_ARITHMETIC = (
    "use_dora use_qalora lora_bias modules_to_save trainable_token_indices target_parameters "
    "layer_replication alora_invocation_tokens arrow_config kasa_config velora_config monteclora_config use_bdlora "
    "megatron_config ensure_weight_tying"
).split()
# The other initialisations subtract something from the base's weights, or bring a variant of their own.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# A name, perhaps anchored: such a pattern is matched as PEFT does, and takes no time to match.
_SIMPLE_PATTERN = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What adapter_config.json says, checked. `raw` is its content.

    `targets`: names or endings of names of modules; ("all-linear",); or None for a regular expression, which is not
    evaluated. `layers`: the only layers that are adapted, or None for all.
    """

    r: int
    alpha: float
    use_rslora: bool
    dropout: float
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_name: str | None
    raw: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """The rank of the adapter on `module`."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """lora_alpha of the adapter on `module`."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def scaling(self, module: str) -> float:
        """The factor on B A x: alpha / r, or alpha / √r where the ranks are stabilised."""
        rank = self.rank(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def target_of(self, module: str) -> str | None:
        """The target that names `module`, as PEFT decides it; None where it would leave the module alone.

        Must not be asked where `targets` is None.
        """
        if any(module == name or module.endswith(f".{name}") for name in self.excluded):
            return None
        targets = self.targets or ()
        if targets == (ALL_LINEAR,):
            return None if module.rpartition(".")[2] == "lm_head" else ALL_LINEAR
        if module in targets:
            return module
        found = next((target for target in targets if module.endswith(f".{target}")), None)
        if found is None or self.layers is None:
            return found
        return found if self._layer(module) in self.layers else None

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for match in (re.match(pattern, module) for pattern in patterns) if match), None)
        return int(found[1]) if found else None


def read_settings(directory: Path) -> LoraSettings:
    """The settings of the adapter in `directory`. Raises CheckpointError."""
    path = directory / FILE_NAME
    raw = read_object(path, "adapter config", _LIMIT)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA adapters are read")
    _refuse_variants(path, raw)
    dropout = _checked(path, "lora_dropout", raw.get("lora_dropout", 0.0), _is_number, "a number")
    if not 0 <= dropout < 1:
        raise CheckpointError(f"{path}: lora_dropout is {dropout!r}, not a probability below 1")
    base_name = raw.get("base_model_name_or_path")
    return LoraSettings(
        r=_checked(path, "r", raw.get("r"), _is_rank, "a rank (a whole number from 1)"),
        alpha=float(_checked(path, "lora_alpha", raw.get("lora_alpha"), _is_number, "a number")),
        use_rslora=_checked(path, "use_rslora", raw.get("use_rslora") or False, _is_flag, "true or false"),
        dropout=float(dropout),
        targets=_targets(path, raw.get("target_modules")),
        excluded=_excluded(path, raw.get("exclude_modules")),
        layers=_layers(path, raw.get("layers_to_transform")),
        layers_pattern=_layers_pattern(path, raw.get("layers_pattern")),
        rank_pattern=_pattern(path, raw, "rank_pattern", _is_rank),
        alpha_pattern=_pattern(path, raw, "alpha_pattern", _is_number),
        base_name=base_name if isinstance(base_name, str) and base_name else None,
        raw=raw,
    )


def _refuse_variants(path: Path, raw: Mapping[str, Any]) -> None:
    found = [name for name in _OTHER_ARITHMETIC if raw.get(name)]
    if raw.get("bias", "none") != "none":
        found.append("bias")
    if found:
        values = ", ".join(f"{name}={raw[name]!r}" for name in found)
        raise CheckpointError(f"{path}: {values}: computes more than W x + scaling · B A x, which is all that is read")
    if raw.get("init_lora_weights") not in _PLAIN_INITIALISATIONS:
        raise CheckpointError(
            f"{path}: init_lora_weights={raw['init_lora_weights']!r} changes the base's weights as well; convert it "
            "to a plain LoRA adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    unknown = sorted(name for name in raw if name not in (*_READ, *_NEUTRAL, *_OTHER_ARITHMETIC) and raw[name])
    if unknown:
        values = ", ".join(f"{name}={raw[name]!r}" for name in unknown)
        raise CheckpointError(f"{path}: {values}: not known here, and it may change what the adapter computes")


def _targets(path: Path, value: Any) -> tuple[str, ...] | None:
    if value == ALL_LINEAR:
        return (ALL_LINEAR,)
    if isinstance(value, str) and value:
        return None
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return tuple(sorted(set(value)))
    raise CheckpointError(f"{path}: target_modules is {value!r}; it must name the modules that the adapter changes")


def _excluded(path: Path, value: Any) -> tuple[str, ...]:
    if not value:
        return ()
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise CheckpointError(f"{path}: exclude_modules is {value!r}; only a list of module names is read")


def _layers(path: Path, value: Any) -> tuple[int, ...] | None:
    listed = [value] if type(value) is int else value
    if listed is None or listed == []:
        return None
    if isinstance(listed, list) and all(type(layer) is int and layer >= 0 for layer in listed):
        return tuple(sorted(set(listed)))
    raise CheckpointError(f"{path}: layers_to_transform is {value!r}, not a list of layer numbers")


def _layers_pattern(path: Path, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not listed:
        return ()
    if isinstance(listed, list) and all(isinstance(name, str) and re.fullmatch(r"\w+", name) for name in listed):
        return tuple(listed)
    raise CheckpointError(f"{path}: layers_pattern is {value!r}; only plain names of module lists are read")


def _pattern(path: Path, raw: Mapping[str, Any], field: str, valid: Callable[[Any], bool]) -> dict[str, Any]:
    value = raw.get(field) or {}
    if not isinstance(value, dict) or not all(map(valid, value.values())):
        raise CheckpointError(f"{path}: {field} is {value!r}, not a mapping from module names to numbers")
    odd = [key for key in value if not _SIMPLE_PATTERN.fullmatch(key)]
    if odd:
        raise CheckpointError(f"{path}: {field} uses the regular expression {odd[0]!r}; only plain names are read")
    return value


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that fits, by the rule of PEFT's `get_pattern_key`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _checked(path: Path, field: str, value: Any, valid: Callable[[Any], bool], what: str) -> Any:
    if not valid(value):
        raise CheckpointError(f"{path}: {field} is {value!r}, not {what}")
    return value


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9
