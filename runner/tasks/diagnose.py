"""`task=diagnose`: how close a checkpoint is to its base model, and how far its training has come.

The measures of `task=diagnose`, each filling its part of the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runner.config import DiagnoseConfig
from runner.evaluation.forward import device_of
from runner.evaluation.tokenizers import encode, seeded_ids
from runner.families.npt import full as npt_full
from runner.metrics import layers as layer_measures
from runner.metrics.fidelity import Comparison, perplexities, perplexity, summarise
from runner.metrics.verdict import judge
from runner.results import Result, versions
from runner.tasks.context import Context
from runner.tasks.setup import Opened, open_subject

# Tokens that stand for a prompt where there is no tokenizer.
SEEDED_LENGTH = 64


@dataclass
class Page:
    """The result that is being filled, and what fills it."""

    config: DiagnoseConfig
    context: Context
    opened: Opened
    result: Result

    def wants(self, measure: str) -> bool:
        """Whether the tier names the measure."""
        return measure in self.config.tier.measures

    def encode(self, text: str) -> torch.Tensor:
        """Token ids [T] of a text, or what stands for it where there is no tokenizer."""
        if self.opened.tokenizer is None:
            return seeded_ids(text, self.opened.vocab_size, SEEDED_LENGTH, self.config.seed)
        return encode(self.opened.tokenizer, text, self.opened.vocab_size)

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids."""
        if self.opened.tokenizer is None:
            return " ".join(map(str, token_ids))
        return str(self.opened.tokenizer.decode(token_ids))


def control(page: Page) -> None:
    """All layers standard must equal the plain model: exactly on a CPU in float32, elsewhere within the floor."""
    subject, token_ids = page.opened.subject, page.encode(min(page.config.data.prompts, key=len))
    compared = subject.control(token_ids)
    allowed: float | None = 0.0
    exact = device_of(subject.model).type == "cpu" and subject.npt.dtype == torch.float32
    if compared.squared_difference and not exact:
        lowest = subject.compare_to_floor(token_ids)
        allowed = lowest.mse if lowest.finite else None
    passed = compared.finite and allowed is not None and compared.mse <= allowed
    mse = compared.mse if compared.finite else None
    page.result.metrics["control_mse"] = mse
    page.result.checks.append(
        {
            "name": "control",
            "status": "pass" if passed else "fail",
            "details": f"all layers standard against the plain model: mse {mse}, allowed {allowed}",
        }
    )
    if not passed:
        page.result.findings.append(
            f"control: with all layers standard the mse is {mse}, not 0: the architecture is at fault"
        )
    if page.opened.against_base and page.opened.checkpoint.format == npt_full.NAME:
        own = subject.plain_against_reference(token_ids)
        if own.squared_difference:
            page.result.findings.append(
                f"the checkpoint's base weights differ from the base model's: without adapters its mse is {own.mse:.6g}"
            )


def logits(page: Page) -> None:
    """Fidelity over the prompts: the figures that everyone compares."""
    prompts = page.config.data.prompts
    sequences = [page.encode(text) for text in prompts]
    comparisons = [page.opened.subject.compare(ids) for ids in sequences]
    page.result.metrics |= summarise(comparisons)
    page.result.per_prompt = [
        {"prompt": text, "tokens": c.tokens, **c.figures()} for text, c in zip(prompts, comparisons, strict=True)
    ]
    _report_non_finite(page, [f"prompt {text!r}" for text in prompts], sequences, comparisons)


def isolation(page: Page) -> None:
    """Each NPT layer alone, on the layer prompt."""
    token_ids = page.encode(page.config.data.layer_prompt)
    reference, run = page.opened.subject.layer_run(token_ids)
    indices = [row["layer"] for row in page.result.layers]
    for row, figures in zip(
        page.result.layers, layer_measures.isolation(run, reference, token_ids, indices), strict=True
    ):
        row.update(figures)


def progressive(page: Page) -> None:
    """The lowest 1, 2, … n NPT layers together, on the layer prompt."""
    token_ids = page.encode(page.config.data.layer_prompt)
    reference, run = page.opened.subject.layer_run(token_ids)
    indices = [row["layer"] for row in page.result.layers]
    page.result.progressive = layer_measures.progressive(run, reference, token_ids, indices)
    page.result.metrics["progressive_trend"] = layer_measures.trend([row["mse"] for row in page.result.progressive])


def additivity(page: Page) -> None:
    """Whether the layers' errors add up or interact; needs isolation and progressive."""
    if page.result.progressive and page.wants("isolation"):
        isolated = [row["kl"] for row in page.result.layers]
        page.result.metrics["additivity"] = layer_measures.additivity(isolated, page.result.progressive[-1]["kl"])


def generation(page: Page) -> None:
    """Greedy continuations of every prompt, sampled ones of the layer prompt."""
    config, tier = page.config, page.config.tier
    prompts = [*config.data.prompts, config.data.layer_prompt]
    wanted = [(text, 0.0) for text in prompts] + [(config.data.layer_prompt, float(t)) for t in tier.temperatures]
    limit = page.opened.max_length
    for text, temperature in wanted:
        token_ids = page.encode(text)
        count = tier.new_tokens if limit is None else min(tier.new_tokens, limit - len(token_ids))
        if count < 1:
            page.result.findings.append(f"prompt {text!r} fills the model's {limit} positions: no continuation of it")
            continue
        row = page.opened.subject.continuation(
            token_ids, count, temperature=temperature, seed=config.seed, decode=page.decode
        )
        page.result.generation.append({"prompt": text, "prompt_tokens": token_ids.tolist(), **row})
    greedy = [row["agreement"] for row in page.result.generation if row["temperature"] == 0]
    if greedy:
        page.result.metrics["greedy_agreement"] = sum(greedy) / len(greedy)


def text(page: Page) -> None:
    """Fidelity and perplexity over text or token shards, in sequences of up to the tier's length."""
    sequences, facts = _text_sequences(page)
    subject = page.opened.subject
    facts |= {"documents": len(sequences), "tokens": sum(map(len, sequences)), "longest": max(map(len, sequences))}
    tracked = page.context.track(sequences, "text")
    if subject.reference is None:
        logprobs = [subject.next_logprobs(ids) for ids in tracked]
        page.result.metrics["text"] = {**facts, **perplexity(logprobs)}
        return
    comparisons = [subject.compare(ids) for ids in tracked]
    page.result.metrics["text"] = {**facts, **summarise(comparisons), **perplexities(comparisons)}
    names = [f"text document {i}" for i in range(len(sequences))]
    _report_non_finite(page, names, sequences, comparisons)


def _text_sequences(page: Page) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The sequences [T] of text, each under the limit of tier and model, and how many documents were cut."""
    data, tier = page.config.data, page.config.tier
    limit = min(tier.sequence_length, page.opened.max_length or tier.sequence_length)
    sequences: list[torch.Tensor] = []
    cut = 0
    if data.name == "shards":
        sequences += data.token_sequences(limit, page.opened.vocab_size)
    if page.opened.tokenizer is None:
        return sequences or [seeded_ids("text", page.opened.vocab_size, limit, page.config.seed)], {"cut": cut}
    for document in [*([_long_document()] if page.wants("text") else []), *data.documents()]:
        token_ids = page.encode(document)
        cut += len(token_ids) > limit
        if len(token_ids) > 1:
            sequences.append(token_ids[:limit])
    return sequences, {"cut": cut}


def _long_document() -> str:
    """One text that is long in any tokenizer: the built-in world's held-out sentences in a row."""
    from runner.data.text import world_documents

    return world_documents(sentences=400)[0]


def floor(page: Page) -> None:
    """What no subject can beat: the reference against itself in another precision."""
    sequences = [page.encode(text) for text in page.config.data.prompts]
    page.result.metrics["floor"] = summarise([page.opened.subject.compare_to_floor(ids) for ids in sequences])


def _report_non_finite(
    page: Page, names: Sequence[str], sequences: Sequence[torch.Tensor], comparisons: Sequence[Comparison]
) -> None:
    bad = [i for i, comparison in enumerate(comparisons) if not comparison.finite]
    page.result.findings += page.opened.subject.non_finite_findings(
        [names[i] for i in bad], [sequences[i] for i in bad]
    )


# Name, whether it needs NPT layers, and what fills its part; in this order.
STEPS: tuple[tuple[str, bool, Callable[[Page], None]], ...] = (
    ("control", True, control),
    ("logits", False, logits),
    ("isolation", True, isolation),
    ("progressive", True, progressive),
    ("additivity", True, additivity),
    ("generation", False, generation),
    ("text", False, text),
    ("floor", False, floor),
)


def run(config: DiagnoseConfig, context: Context) -> Result:
    """Measure what the tier names. Raises CheckpointError, ModelError or ConfigError; a poor verdict is a result."""
    opened = open_subject(config, context)
    checkpoint = opened.checkpoint
    result = Result(
        task="diagnose",
        ckpt=str(checkpoint.path),
        base=str(opened.base) if opened.base else None,
        reference=str(opened.reference) if opened.reference else None,
        step=checkpoint.step,
        family=checkpoint.family,
        format=checkpoint.format,
        tier=config.tier.name,
        layers=[layer.summary() for layer in checkpoint.layers],
        checks=[
            {"name": "load", "status": "pass", "details": checkpoint.evidence},
            {"name": "finite", "status": "pass", "details": "no NaN or Inf in the weights of checkpoint and base"},
        ],
        findings=list(checkpoint.findings),
        timing=context.timing,
        versions=versions(),
    )
    page = Page(config, context, opened, result)
    if opened.tokenizer is None:
        result.findings.append(
            f"no tokenizer: each prompt is {SEEDED_LENGTH} token ids drawn with seed={config.seed}; give tokenizer="
        )
    if opened.subject.reference is None:
        _only_run(page)
    else:
        _measure(page)
    return result


def _measure(page: Page) -> None:
    """Every measure of the tier that the model has, then the verdict."""
    npt = page.opened.subject.plain is not None
    wanted = [
        (name, step)
        for name, needs_npt, step in STEPS
        if (npt or not needs_npt)
        and (page.wants(name) or (name == "text" and page.config.data.name != "prompts"))
        and (name != "floor" or page.opened.subject.has_floor())
    ]
    for name, step in page.context.track(wanted, "measuring", total=len(wanted)):
        with page.context.timed(name):
            step(page)
    result = page.result
    if not npt:
        return
    if not page.opened.against_base:
        result.findings.append("the reference is not the base model: no verdict on progress is given")
    elif page.wants("logits"):
        result.verdict = judge(
            result.metrics["mse"],
            result.metrics["cosine"],
            page.config.verdict,
            layer_mses=[row["mse"] for row in result.layers] if page.wants("isolation") else None,
            generations=[row for row in result.generation if row["temperature"] == 0],
        )


def _only_run(page: Page) -> None:
    """Nothing to compare with: the model runs on every prompt and its logits are finite."""
    model = page.opened.subject.model
    with page.context.timed("forward"), torch.inference_mode():
        prompts = [page.encode(text) for text in page.config.data.prompts]
        finite = [bool(torch.isfinite(model(ids.to(device_of(model))[None]).logits).all()) for ids in prompts]
    names = [f"prompt {text!r}" for text, ok in zip(page.config.data.prompts, finite, strict=True) if not ok]
    bad = [ids for ids, ok in zip(prompts, finite, strict=True) if not ok]
    page.result.findings += page.opened.subject.non_finite_findings(names, bad)
    why = "no reference= is given" if page.config.accuracy else "accuracy=false"
    page.result.checks.append(
        {
            "name": "forward",
            "status": "pass" if all(finite) else "fail",
            "details": f"ran on {len(prompts)} prompts; the comparison was skipped ({why})",
        }
    )
    if page.config.accuracy and (page.wants("text") or page.config.data.name != "prompts"):
        with page.context.timed("text"):
            text(page)
