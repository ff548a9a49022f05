"""A Llama's config.json: read without transformers where every value is an ordinary one; and its rotary frequencies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The sizes and options of config.json under its names, with the defaults of transformers.

    `theirs`: the `LlamaConfig` of transformers, where a value is one that only transformers knows.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    theirs: Any = None

    model_type: ClassVar[str] = "llama"


# Older names that transformers still reads.
_OLD = ("rope_theta", "rope_scaling", "partial_rotary_factor")
# What each kind of rotation needs, and may have, as positive numbers.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read_config(values: Mapping[str, Any]) -> LlamaConfig:
    """The architecture that the `values` of a config.json describe; names that are no part of it are passed over.

    Raises what transformers raises for impossible values, and ValueError.
    """
    names = [each.name for each in fields(LlamaConfig) if each.name != "theirs"]
    given = {name: values[name] for name in (*names, *_OLD) if name in values}
    config = _ordinary(given)
    if config is None:
        from transformers import LlamaConfig as Theirs

        theirs = Theirs(**given)
        config = LlamaConfig(**{name: getattr(theirs, name) for name in names}, theirs=theirs)
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads "
            f"{config.num_key_value_heads}"
        )
    frequencies(config)
    return config


def _ordinary(given: Mapping[str, Any]) -> LlamaConfig | None:
    """The config, as transformers completes it; None where a value is not one of those that are known here."""
    found: dict[str, Any] = {}
    for name, default in vars(LlamaConfig()).items():
        if name not in given or name in ("rope_parameters", "theirs"):
            continue
        value = given[name]
        if name in ("num_key_value_heads", "head_dim") and value is None:
            continue
        if name.endswith("_token_id"):
            ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
            fine = all(token is None or type(token) is int for token in ids)
        elif type(default) is int:
            fine = type(value) is int and value > 0
        else:
            fine = type(value) is type(default) or (name == "attention_dropout" and type(value) is int)
        if not fine:
            return None
        found[name] = value
    heads, width = found.get("num_attention_heads", 32), found.get("hidden_size", 4096)
    found.setdefault("num_key_value_heads", heads)
    found.setdefault("head_dim", width // heads)
    rope = _rotation(given, found.get("max_position_embeddings", 2048))
    sound = width % heads == 0 and found["head_dim"] % 2 == 0 and found.get("hidden_act", "silu") == "silu"
    sound = sound and 0 <= found.get("initializer_range", 0) <= 1
    return LlamaConfig(**found, rope_parameters=rope) if rope and sound else None


def _rotation(given: Mapping[str, Any], max_positions: int) -> dict[str, Any] | None:
    """`rope_parameters` as transformers completes them."""
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or "partial_rotary_factor" in {*rope, *given}:
        return None
    rope = {"rope_theta": given.get("rope_theta", 10000.0), "rope_type": rope.get("type", "default"), **rope}
    if rope["rope_type"] not in _NEEDED:
        return None
    if rope["rope_type"] in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", max_positions)
    numbers: list[Any] = [rope.get(name) for name in ("rope_theta", *_NEEDED[rope["rope_type"]])]
    if rope["rope_type"] == "yarn":
        numbers += [rope[name] for name in _YARN if rope.get(name) is not None]
        if type(rope.get("truncate", True)) is not bool:
            return None
    return rope if all(type(number) in (int, float) and number > 0 for number in numbers) else None


def frequencies(config: LlamaConfig, length: int = 0) -> tuple[torch.Tensor, float]:
    """The angle of each pair of dimensions from one position to the next [head_dim / 2], and what cos and sin are
    multiplied by, where the longest sequence has `length` positions (or fewer than the model was made for).

    Linear: kaiokendev; dynamic: NTK-aware, bloc97 and emozilla; yarn: arXiv 2309.00071; llama3: Llama 3.1.
    """
    rope, dim = config.rope_parameters, config.head_dim
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if config.theirs is not None and kind != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        found, scaling = ROPE_INIT_FUNCTIONS[kind](config.theirs, None, seq_len=length or None)
        return found, float(scaling)
    if kind == "dynamic":
        theta = theta * _grown(rope["factor"], length, config.max_position_embeddings) ** (dim / (dim - 2))
    own = 1.0 / (theta ** (torch.arange(0, dim, 2).float() / dim))
    if kind == "linear":
        return own / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(own, rope), 1.0
    return _yarn(own, rope, config) if kind == "yarn" else (own, 1.0)


def _grown(factor: float, length: int, made_for: int) -> Any:
    """By how much the base grows: in float32 for a sequence that is longer than the model was made for."""
    longest = made_for if length <= made_for else torch.tensor(length)
    return factor * longest / made_for - (factor - 1)


def _llama3(own: torch.Tensor, rope: Mapping[str, Any]) -> torch.Tensor:
    """Long wavelengths are stretched by the factor, short ones stay, between the two a mixture."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / own
    stretched = torch.where(wavelength > trained / low, own / factor, own)
    share = (trained / wavelength - low) / (high - low)
    mixed = (1 - share) * stretched / factor + share * stretched
    return torch.where((wavelength >= trained / high) & (wavelength <= trained / low), mixed, stretched)


def _yarn(own: torch.Tensor, rope: Mapping[str, Any], config: LlamaConfig) -> tuple[torch.Tensor, float]:
    """Pairs that turn fewer than `beta_slow` times in the trained length are stretched, those over `beta_fast` stay."""
    dim, factor, trained = config.head_dim, rope["factor"], rope["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return (dim * math.log(trained / (turns * 2 * math.pi))) / (2 * math.log(rope["rope_theta"]))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    powers = rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    scaled = 1.0 / (factor * powers) * (1 - kept) + own * kept

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if (scaling := rope.get("attention_factor")) is None:
        scaling = temperature(over) / temperature(under) if over and under else temperature(1)
    return scaled, scaling
