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

# Fields that change nothing: where an adapter came from, how it was initialised; nn.Linear has no fan_in_fan_out.
_UNCHECKED = (
    "init_lora_weights bias base_model_name_or_path "
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

    def scaling(self, module: str) -> float:
        """The factor on B A x: alpha / r, or alpha / √r where the ranks are stabilised."""
        rank = self.rank(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

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


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _are_by_name(valid: Callable[[Any], bool], value: Any) -> bool:
    """A mapping whose names, perhaps anchored, take no time to match as patterns, which is what PEFT does."""
    return isinstance(value, dict) and all(re.fullmatch(r"\^?[\w.]+", k) and valid(v) for k, v in value.items())


_NO_PATTERN = ", not a mapping from plain names to numbers"
# What a field must be, and what is said of one that is not.
_RULES: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "peft_type": (lambda v: v == "LORA", "; only LORA adapters are read"),
    "r": (lambda v: _is_whole(v, 1), ", not a rank (a whole number from 1)"),
    "lora_alpha": (_is_number, ", not a number"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, ", not a probability below 1"),
    "use_rslora": (lambda v: not v or v is True, ", not true or false"),
    "target_modules": (
        lambda v: v and all(map(_is_name, _listed(v))),
        "; it must name the modules that the adapter changes",
    ),
    "exclude_modules": (
        lambda v: not v or (isinstance(v, list) and all(map(_is_name, v))),
        "; only a list of module names is read",
    ),
    "layers_to_transform": (lambda v: all(map(_is_whole, _listed(v))), ", not a list of layer numbers"),
    "layers_pattern": (
        lambda v: not v or all(_is_name(n) and re.fullmatch(r"\w+", n) for n in _listed(v)),
        "; only plain names of module lists are read",
    ),
    "rank_pattern": (lambda v: not v or _are_by_name(lambda n: _is_whole(n, 1), v), _NO_PATTERN),
    "alpha_pattern": (lambda v: not v or _are_by_name(_is_number, v), _NO_PATTERN),
}


def read_settings(directory: Path) -> LoraSettings:
    """The settings of the adapter in `directory`. Raises CheckpointError."""
    path = directory / FILE_NAME
    raw = read_object(path, "adapter config", _LIMIT)
    values = {"lora_dropout": 0.0, **raw}
    for field, (valid, otherwise) in _RULES.items():
        if not valid(values.get(field)):
            raise CheckpointError(f"{path}: {field} is {values.get(field)!r}{otherwise}")
    _refuse_variants(path, raw)
    targets, base_name = values["target_modules"], values.get("base_model_name_or_path")
    is_pattern = isinstance(targets, str) and targets != ALL_LINEAR
    return LoraSettings(
        r=values["r"],
        alpha=float(values["lora_alpha"]),
        use_rslora=bool(values.get("use_rslora")),
        dropout=float(values["lora_dropout"]),
        targets=None if is_pattern else tuple(sorted(set(_listed(targets)))),
        excluded=tuple(values.get("exclude_modules") or ()),
        layers=tuple(sorted(set(_listed(values.get("layers_to_transform"))))) or None,
        layers_pattern=tuple(_listed(values.get("layers_pattern") or None)),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
        base_name=base_name if _is_name(base_name) else None,
        raw=raw,
    )


def _listed(value: Any) -> list[Any]:
    """A field that is one item, a list of them, or null."""
    return [] if value is None else value if isinstance(value, list) else [value]


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
    unknown = sorted(name for name in raw if name not in (*_RULES, *_UNCHECKED, *_OTHER_ARITHMETIC) and raw[name])
    if unknown:
        values = ", ".join(f"{name}={raw[name]!r}" for name in unknown)
        raise CheckpointError(f"{path}: {values}: not known here, and it may change what the adapter computes")


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that fits, by the rule of PEFT's `get_pattern_key`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
