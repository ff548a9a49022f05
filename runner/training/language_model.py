"""A small Llama that is really trained on the built-in world: the base of the demonstration."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from runner.data.world import BOS, EOS, PAD, World
from runner.errors import ConfigError
from runner.training.batches import Batch, equal_length_batches, packed_samples, sentence_samples
from runner.training.loop import OnStep, take_steps
from runner.training.optimization import Muon, warmup_and_cosine

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings:
    """Sizes of the model and how it is trained. Rates are those of AdamW (embeddings, norms) and Muon (the rest)."""

    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 3
    num_heads: int = 4
    max_positions: int = 1024
    initial_range: float = 0.08
    max_steps: int = 560
    warmup_steps: int = 50
    batch_size: int = 64
    learning_rate: float = 1e-2
    muon_learning_rate: float = 5e-3
    weight_decay: float = 2.0
    gradient_clip_value: float = 1.0
    question_weight: float = 0.1
    packed_length: int = 256
    packed_rows: int = 12

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ConfigError("hidden_size must be a multiple of num_heads, with an even quotient for the rotation")
        if min(self.num_layers, self.max_steps, self.batch_size, self.packed_length) < 1:
            raise ConfigError("num_layers, max_steps, batch_size and packed_length must be at least 1")
        if self.packed_length > self.max_positions:
            raise ConfigError(f"packed_length must be at most max_positions, {self.max_positions}")


def train_language_model(
    world: World,
    tokenizer: "Tokenizer",
    settings: LanguageModelSettings,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> LlamaForCausalLM:
    """A Llama trained on the world's train part, in evaluation mode.

    The loss is the cross-entropy of the next token; the words of a question, which nothing before them determines,
    count little. The weight decay is strong: a smooth model is one whose layers others can learn to stand in for.
    `on_step` is called after each step. The same seed, thread count and machine give the same weights. Raises
    DivergedError where the loss is no longer finite.
    """
    model = _new_model(tokenizer, settings, seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    optimizers = (
        Muon(matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    )
    share = warmup_and_cosine(settings.warmup_steps, settings.max_steps)
    scheduled = [(optimizer, LambdaLR(optimizer, share)) for optimizer in optimizers]
    batches = _batches(world, tokenizer, settings, seed)

    def losses(batch: Batch, step: int) -> dict[str, torch.Tensor]:
        return {"loss": _loss(model, batch)}

    steps, parameters, clip = range(1, settings.max_steps + 1), list(model.parameters()), settings.gradient_clip_value
    for step, figures in take_steps(steps, parameters, scheduled, lambda: next(batches), losses, clip=clip):
        if on_step is not None:
            on_step(step, figures)
    for parameter in parameters:
        parameter.grad = None
    return model.eval().requires_grad_(False)


def save_language_model(model: LlamaForCausalLM, tokenizer: "Tokenizer", directory: Path) -> None:
    """Write a Hugging Face directory: config, safetensors and tokenizer."""
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def _new_model(tokenizer: "Tokenizer", settings: LanguageModelSettings, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=settings.max_positions,
        initializer_range=settings.initial_range,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train()


def _batches(world: World, tokenizer: "Tokenizer", settings: LanguageModelSettings, seed: int) -> Iterator[Batch]:
    """Batches without end: each epoch all train sentences, and some of them as running text, newly arranged."""
    chooser = random.Random(seed)
    sentences = sentence_samples(world.train, tokenizer, settings.question_weight)
    while True:
        shuffled = chooser.sample(world.train, len(world.train))
        packed = packed_samples(shuffled, tokenizer, settings.packed_length, settings.question_weight)
        rows_each = max(1, settings.batch_size * 10 // settings.packed_length)
        epoch = equal_length_batches(sentences, settings.batch_size, chooser)
        epoch += equal_length_batches(packed[: settings.packed_rows], rows_each, chooser)
        yield from chooser.sample(epoch, len(epoch))


def _loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean cross-entropy of the next token, in nats."""
    # Moving the targets, instead of cutting the last logits off, spares a copy of the logits and of their gradient.
    targets, weights = batch.ids.roll(-1, 1), batch.weights.roll(-1, 1)
    weights[:, -1] = 0.0
    logits = model(batch.ids, use_cache=False).logits
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()
