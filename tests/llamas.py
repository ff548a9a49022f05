"""Llamas of our own in tests, beside those of transformers."""

from transformers import LlamaForCausalLM

from runner.evaluation.llama import Llama
from runner.evaluation.llama_config import read_config


def own(theirs: LlamaForCausalLM) -> Llama:
    """Our Llama over the tensors of one of transformers, in evaluation mode."""
    model = Llama(read_config(theirs.config.to_dict())).assign(dict(theirs.state_dict()))
    return model.eval().requires_grad_(False)
