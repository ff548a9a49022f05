"""Any causal language model of transformers from a config's values and named tensors, every key accounted for."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from runner.errors import ModelError

# What a Llama's computation and generation depend on; the last three are older names that LlamaConfig still reads.
_LLAMA = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps attention_bias attention_dropout mlp_bias "
    "tie_word_embeddings rope_parameters pad_token_id bos_token_id eos_token_id "
    "rope_theta rope_scaling partial_rotary_factor"
).split()
# For other architectures, what is no part of them, or would fetch and run code.
_DROPPED = (
    "model_type architectures auto_map custom_pipelines dtype torch_dtype transformers_version _name_or_path "
    "_attn_implementation attn_implementation _commit_hash _from_model_config"
).split()
# Buffers that older versions saved and that follow from the config.
_WAIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def config_from(values: Mapping[str, Any], where: object) -> PreTrainedConfig:
    """The architecture of a config.json; what could change behaviour otherwise (auto_map, …) is dropped.

    Raises ModelError for an architecture that transformers does not know, quantised weights, or impossible values.
    """
    kind = values.get("model_type")
    if values.get("quantization_config"):
        raise ModelError(f"{where}: holds quantised weights, which cannot be measured exactly; give full precision")
    try:
        if kind == "llama":
            return LlamaConfig(**{name: values[name] for name in _LLAMA if name in values})
        return AutoConfig.for_model(
            str(kind), **{name: value for name, value in values.items() if name not in _DROPPED}
        )
    except Exception as error:  # transformers raises many kinds for a bad value; the user needs the value
        lines = str(error).splitlines() or [type(error).__name__]
        raise ModelError(f"{where}: config.json (model_type {kind!r}) makes no model: {lines[0]}") from error


def names_to_load(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], where: object) -> list[str]:
    """The names to load, once all names and shapes agree with the config. Raises ModelError with every difference.

    `lm_head.weight` may be absent where the config ties the embeddings; buffers that follow from the config are waived.
    """
    empty = _empty(config, where)
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    given = {name: tuple(shape) for name, shape in shapes.items() if not _WAIVED.fullmatch(name)}
    missing, unexpected = sorted(set(expected) - set(given) - set(_tied(empty))), sorted(set(given) - set(expected))
    if missing or unexpected:
        raise ModelError(f"{where}: does not fit its config.json: missing keys {missing}, unexpected keys {unexpected}")
    wrong = [
        f"{name} is {list(given[name])}, config.json makes it {list(expected[name])}"
        for name in sorted(given)
        if given[name] != expected[name]
    ]
    if wrong:
        raise ModelError(f"{where}: shapes contradict config.json: {'; '.join(wrong)}")
    return sorted(given)


def build(
    config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, where: object
) -> PreTrainedModel:
    """The model with `tensors` (checked by `names_to_load`) cast to `dtype`, in evaluation mode, gradients off.

    Raises ModelError where the embeddings are tied but the head is there and differs, and for whole numbers.
    """
    tensors, empty = dict(tensors), _empty(config, where)
    for name, source in _tied(empty).items():
        if name in tensors and not torch.equal(tensors.pop(name), tensors[source]):
            raise ModelError(f"{where}: config.json ties {name} to {source}, but the two differ")
    floating = {name for name, tensor in empty.state_dict().items() if tensor.is_floating_point()}
    if whole := sorted(name for name, t in tensors.items() if name in floating and not t.is_floating_point()):
        kind = str(tensors[whole[0]].dtype)[6:]
        raise ModelError(f"{where}: {whole[0]} is {kind}; weights are floating-point, quantised ones are not read")
    transformers_logging.disable_progress_bar()
    model = type(empty).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return model.eval().requires_grad_(False)


def _tied(empty: PreTrainedModel) -> dict[str, str]:
    """The names that are tied, and the names that they are tied to."""
    return dict(empty.all_tied_weights_keys or {}) if empty.config.tie_word_embeddings else {}


def _empty(config: PreTrainedConfig, where: object) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        if isinstance(config, LlamaConfig):
            return LlamaForCausalLM(config)
        try:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError as error:
            raise ModelError(f"{where}: a {config.model_type} is no causal language model") from error
