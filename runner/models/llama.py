"""A plain Llama from a config's values and named tensors, every key accounted for."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from runner.errors import ModelError

# What a Llama's computation and generation depend on; the last three are older names that LlamaConfig still reads.
_USED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps attention_bias attention_dropout mlp_bias "
    "tie_word_embeddings rope_parameters pad_token_id bos_token_id eos_token_id "
    "rope_theta rope_scaling partial_rotary_factor"
).split()
# Buffers that older versions saved and that follow from the config.
_WAIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def config_from(values: Mapping[str, Any], where: object) -> LlamaConfig:
    """The architecture's own keys of a config.json; what could change behaviour otherwise (auto_map, …) is dropped.

    Raises ModelError for another architecture, for quantised weights, or for values that make no Llama.
    """
    kind = values.get("model_type")
    if kind != "llama":
        raise ModelError(f"{where}: model_type is {kind!r}; NPT layers stand on a Llama base (model_type 'llama')")
    if values.get("quantization_config"):
        raise ModelError(
            f"{where}: holds quantised weights, which cannot be measured exactly; give the full-precision base"
        )
    try:
        return LlamaConfig(**{name: values[name] for name in _USED if name in values})
    except Exception as error:  # transformers raises many kinds for a bad value; the user needs the value
        raise ModelError(f"{where}: config.json makes no Llama: {error}") from error


def check_keys(
    config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]], where: object, ignore: Iterable[str] = ()
) -> list[str]:
    """The names to load, once all names and shapes agree with the config. Raises ModelError with every difference.

    `shapes`: name → shape of every tensor in the checkpoint; `ignore`: names that something else accounts for.
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    given = {name for name in shapes if not _WAIVED.fullmatch(name)} - set(ignore)
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unexpected = sorted(set(expected) - given - optional), sorted(given - set(expected))
    if missing or unexpected:
        raise ModelError(f"{where}: does not fit its config.json: missing keys {missing}, unexpected keys {unexpected}")
    wrong = [
        f"{name} is {list(shapes[name])}, config.json makes it {list(expected[name])}"
        for name in sorted(given)
        if tuple(shapes[name]) != expected[name]
    ]
    if wrong:
        raise ModelError(f"{where}: shapes contradict config.json: {'; '.join(wrong)}")
    return sorted(given)


def build(
    config: LlamaConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, where: object
) -> LlamaForCausalLM:
    """The model with `tensors` (checked by `check_keys`) cast to `dtype`, in evaluation mode, gradients off.

    Raises ModelError where the embeddings are tied but `lm_head.weight` is there and differs.
    """
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        tensors = dict(tensors)
        if not torch.equal(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]):
            raise ModelError(f"{where}: config.json ties the embeddings, but lm_head.weight differs from them")
    transformers_logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)
    return model.eval().requires_grad_(False)
