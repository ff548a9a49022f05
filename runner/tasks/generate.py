"""`task=generate`: continuations of prompts, alone or beside a reference; without a prompt, the chat.

In the result: `generation` [{prompt, ids, new_ids, text, seed, finish (eos, stop, length, context), tokens, seconds,
tokens_per_second, logprobs, logprob_mean, repetition}], a row a sample; with a reference also its `reference_text` and
`reference_new_ids`, `agreement`, `first_divergence`, `reference_logprobs` of its tokens, and `path_kl`, the
mean KL(reference ‖ checkpoint) in nats over the positions that predict them. `settings`: how it was drawn;
`cache_bytes`: keys and values of a full batch; `shown`: whether the text was shown while it was made.
"""

import json
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.model_directory import has_tokenizer
from runner.checkpoints.runs import find_run, resolve
from runner.config import GenerateConfig
from runner.errors import ConfigError
from runner.evaluation.decoding import eos_ids
from runner.evaluation.forward import compare_finals, device_of, head_of, logit_chunks, logit_count, trace
from runner.evaluation.placement import Placement
from runner.evaluation.tokenizers import TextTokenizer, load_tokenizer
from runner.families.family import Auto
from runner.files.strict_json import read_object
from runner.generation.chat import Chat, Partner
from runner.generation.prompts import Prompt, given_prompts, prompts_of
from runner.generation.settings import AUTO, Settings
from runner.generation.speaker import Speaker, switched
from runner.generation.text import written
from runner.metrics.generation import agreement
from runner.results import JsonObject, Result
from runner.tasks.context import Context, cache_directory
from runner.tasks.setup import EvaluationSetup, open_evaluation

_LARGEST_CONFIG = 1 << 20
_MEANS = ("agreement", "path_kl", "logprob_mean", "repetition")
Encoded = Sequence[tuple[Prompt, list[int]]]


def run(config: GenerateConfig, context: Context) -> Result:
    """Continue what `config` names. Raises ConfigError where there is no prompt and no terminal, and as `load`."""
    settings: Settings = config.generate
    prompts = given_prompts(config.prompt, config.prompts)
    if not prompts and (context.in_sweep or not (sys.stdin.isatty() and sys.stdout.isatty())):
        raise ConfigError("there is no prompt: give prompt= or prompts=FILE; without one it is a chat, in a terminal")
    setup = open_evaluation(config, context)
    speaker = speaker_of(setup)
    reference = _reference(config, setup, speaker)
    with switched(speaker.model, settings.layers):
        pass  # refused before anything is drawn
    result = _result(setup, context)
    if not prompts:
        result.generation = _chat(config, context, setup, reference)
        result.details = {"settings": settings.values(), "shown": True}
        return result
    encoded = [(prompt, speaker.encode(prompt, settings)) for prompt in prompts]
    total = len(encoded) * settings.num_samples
    shown = _is_streamed(settings, total, reference, context)
    with context.timed("generate"):
        if shown:
            result.generation = [_streamed(speaker, *encoded[0], settings)]
        else:
            samples = speaker.samples(encoded, settings)
            result.generation = list(context.track(samples, "generating", total=total))
    if reference is not None:
        with context.timed("reference"):
            theirs = reference.samples(encoded, replace(settings, layers=None))
            for row, their in zip(context.track(result.generation, "comparing"), theirs, strict=True):
                row |= side_by_side(row, their, speaker.model, reference.model, settings)
    result.metrics = _means(result.generation)
    result.details = {
        "settings": settings.values(),
        "cache_bytes": _cache_bytes(speaker.model, encoded, settings),
        "shown": shown,
    }
    longest = max(len(row["ids"]) + len(row["new_ids"]) for row in result.generation)
    result.findings += setup.evaluator.notes(longest)
    if total > 1 and settings.batch_size > 1 and not _is_exact(speaker.model):
        result.findings.append(
            "near-ties may be decided otherwise in a batch of another size; only in float32 on a CPU they are not"
        )
    return result


def as_file(result: JsonObject, path: Path) -> bytes | None:
    """What `output` holds: a line a sample in a .jsonl, else the texts; None for the result itself in a .json."""
    rows = result.get("generation", [])
    if path.suffix == ".json":
        return None
    if path.suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    return "\n".join(f"{row['text']}\n" for row in rows).encode("utf-8", "surrogatepass")


def speaker_of(setup: EvaluationSetup) -> Speaker:
    """The checkpoint's model with its tokenizer and the ids that end a text."""
    directories = [setup.checkpoint.directory, *([setup.base] if setup.base else [])]
    model, tokenizer = setup.evaluator.model, setup.evaluator.tokenizer
    return Speaker(model=model, tokenizer=tokenizer, eos=eos_ids(model, tokenizer, *map(_ends, directories)))


def _ends(directory: Path) -> object:
    """`eos_token_id` of generation_config.json, where it is there."""
    file = directory / "generation_config.json"
    return read_object(file, file.name, _LARGEST_CONFIG).get("eos_token_id") if file.is_file() else None


def _reference(config: GenerateConfig, setup: EvaluationSetup, speaker: Speaker) -> Speaker | None:
    """What `reference=` names, None where nothing. Raises ConfigError where its tokenizer is another one."""
    if config.reference is None:
        return None
    if setup.evaluator.reference is None:
        raise ConfigError(
            f"reference={config.reference}: {setup.checkpoint.path} has no base; name a model or checkpoint"
        )
    path = setup.reference
    directory = path if path is None or path.is_dir() else path.parent
    theirs = load_tokenizer(None, [directory]) if directory is not None and has_tokenizer(directory) else None
    if speaker.tokenizer is not None and theirs is not None and theirs.vocabulary() != speaker.tokenizer.vocabulary():
        raise ConfigError(f"reference={path}: has another tokenizer than {setup.checkpoint.path}; their ids differ")
    return replace(speaker, model=setup.evaluator.reference.model)


def _result(setup: EvaluationSetup, context: Context) -> Result:
    checkpoint = setup.checkpoint
    return context.result(
        "generate",
        checkpoint,
        base=str(setup.base) if setup.base else None,
        reference=str(setup.reference) if setup.reference else None,
        layers=[layer.summary() for layer in checkpoint.layers],
    )


def _is_streamed(settings: Settings, total: int, reference: Speaker | None, context: Context) -> bool:
    wanted = sys.stdout.isatty() if settings.stream == AUTO else settings.stream is True
    return wanted and total == 1 and reference is None and not context.in_sweep


def _streamed(speaker: Speaker, prompt: Prompt, ids: list[int], settings: Settings) -> JsonObject:
    """One sample, shown as it is made."""
    sample = yield_from(speaker.stream(prompt, ids, settings), lambda piece: print(written(piece), end="", flush=True))
    print(flush=True)
    return sample


def yield_from(pieces: Generator[str, None, JsonObject], show: Any) -> JsonObject:
    """Give every piece to `show`; what the generator returns."""
    while True:
        try:
            show(next(pieces))
        except StopIteration as end:
            return end.value


def side_by_side(
    row: JsonObject, theirs: JsonObject, model: nn.Module, reference: nn.Module, settings: Settings
) -> JsonObject:
    """What a sample's row gets from the reference: its own continuation, and how it sees the checkpoint's.

    One pass of both models over the finished text; positions from the last of the prompt to the last but one.
    """
    ids, first = torch.tensor(row["ids"] + row["new_ids"]), len(row["ids"]) - 1
    with switched(model, settings.layers):
        final = trace(model, ids, frozenset()).final
    compared = compare_finals(
        logit_chunks(reference, trace(reference, ids, frozenset()).final),
        head_of(model),
        final,
        ids,
        logit_count(model),
    )
    return {
        "reference_text": theirs["text"],
        "reference_new_ids": theirs["new_ids"],
        **agreement(row["new_ids"], theirs["new_ids"]),
        "reference_logprobs": compared.next_logprob_reference[first:].tolist() if compared.finite else None,
        "path_kl": float(compared.kl[first:-1].mean()) if compared.finite else None,
    }


def _means(rows: Sequence[JsonObject]) -> JsonObject:
    """The mean of each figure over the samples that have it."""
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in _MEANS}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _cache_bytes(model: nn.Module, encoded: Encoded, settings: Settings) -> int | None:
    """Keys and values of a full batch: 2 · layers · rows · positions · key width · bytes · passes; None: unknown."""
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None)
    if not settings.cache or not heads:
        return None
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = min(settings.batch_size, len(encoded) * settings.num_samples)
    positions = max(len(ids) for _, ids in encoded) + settings.max_new_tokens
    layers: int = config.num_hidden_layers * getattr(model, "passes", 1)
    return 2 * layers * rows * positions * int(heads) * width * next(model.parameters()).element_size()


def _is_exact(model: nn.Module) -> bool:
    return device_of(model).type == "cpu" and next(model.parameters()).dtype == torch.float32


def _chat(
    config: GenerateConfig, context: Context, setup: EvaluationSetup, reference: Speaker | None
) -> list[JsonObject]:
    """Talk until the user ends it; the answers."""
    path = Path(setup.checkpoint.path)
    run_directory = path if find_run(path) else path.parent

    def at_step(step: int) -> Partner:
        own = replace(config, ckpt=str(resolve(run_directory, step)), step=None)
        return partner(open_evaluation(own, context))

    def partner(opened: EvaluationSetup) -> Partner:
        speaker = speaker_of(opened)
        other = opened.evaluator.reference.model if opened.evaluator.reference else opened.plain_model
        return Partner(
            speaker=speaker,
            base=replace(speaker, model=other) if other is not None else None,
            path=opened.checkpoint.path,
            files=opened.checkpoint.weights.files,
            step=opened.checkpoint.step,
        )

    history = cache_directory(config.cache) / "chat_history"
    chat = Chat(partner(setup), config.generate, at_step=at_step, compares=reference is not None, history=history)
    return chat.talk()


def generate(
    model: "str | Path | nn.Module",
    prompts: Sequence[str | Sequence[int]],
    *,
    base: str | Path | None = None,
    tokenizer: str | Path | TextTokenizer | None = None,
    step: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    stream: bool = False,
    options: Mapping[str, Any],
) -> Iterator[JsonObject] | Iterator[str]:
    """What `runner.generate` gives; `options`: the keys `generate.…`."""
    settings = Settings().changed({**options, "stream": stream})
    given = prompts_of(prompts)
    speaker = _speaker_from_python(model, base, tokenizer, step, Placement(device=device, dtype=dtype))
    encoded = [(prompt, speaker.encode(prompt, settings)) for prompt in given]
    with switched(speaker.model, settings.layers):
        pass
    if not stream:
        return speaker.samples(encoded, settings)
    if len(encoded) != 1:
        raise ConfigError(f"stream=True takes one prompt, not {len(encoded)}")
    return speaker.stream(*encoded[0], settings)


def _speaker_from_python(
    model: "str | Path | nn.Module",
    base: str | Path | None,
    tokenizer: str | Path | TextTokenizer | None,
    step: int | None,
    placement: Placement,
) -> Speaker:
    directories: list[Path] = []
    if not isinstance(model, nn.Module):
        checkpoint = open_checkpoint(resolve(Path(model).expanduser(), step))
        family = Auto().of(checkpoint)
        own = family.load_base(checkpoint, base, placement)
        model = family.build(checkpoint, own, placement)
        directories = [checkpoint.directory, *([own.path] if own else [])]
    if isinstance(tokenizer, (str, Path)) or (tokenizer is None and any(map(has_tokenizer, directories))):
        tokenizer = load_tokenizer(None if tokenizer is None else str(tokenizer), directories)
    if tokenizer is not None and not isinstance(tokenizer, TextTokenizer):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; give its directory, its file, or a hub name")
    return Speaker(model=model, tokenizer=tokenizer, eos=eos_ids(model, tokenizer, *map(_ends, directories)))
