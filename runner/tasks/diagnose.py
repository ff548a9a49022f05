"""`task=diagnose`: how close a checkpoint is to its base model, and how far its training has come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from runner.config import DiagnoseConfig
from runner.evaluation.evaluator import SEEDED_LENGTH, Evaluator
from runner.evaluation.forward import device_of
from runner.evaluation.tokenizers import seeded_ids
from runner.metrics.fidelity import LogitComparison, perplexities, perplexity, summarise
from runner.metrics.verdict import judge
from runner.results import Result
from runner.tasks.context import Context
from runner.tasks.setup import EvaluationSetup, open_evaluation


@dataclass(frozen=True)
class MeasurementRun:
    """The result that is being filled, and what fills it."""

    config: DiagnoseConfig
    context: Context
    setup: EvaluationSetup
    result: Result

    @property
    def evaluator(self) -> Evaluator:
        """The model beside what it is compared with."""
        return self.setup.evaluator

    def wants(self, measure: str) -> bool:
        """Whether the tier names the measure."""
        return measure in self.config.tier.measures


def control(job: MeasurementRun) -> None:
    """All layers standard must equal the plain model: exactly on a CPU in float32, elsewhere within the floor."""
    evaluator = job.evaluator
    token_ids = evaluator.encode(min(job.config.data.prompts, key=len))
    compared = evaluator.control(token_ids)
    allowed: float | None = 0.0
    exact = device_of(evaluator.model).type == "cpu" and next(evaluator.model.parameters()).dtype == torch.float32
    if compared.squared_difference and not exact:
        lowest = evaluator.compare_to_floor(token_ids)
        allowed = lowest.mse if lowest.finite else None
    passed = compared.finite and allowed is not None and compared.mse <= allowed
    mse = compared.mse if compared.finite else None
    job.result.metrics["control_mse"] = mse
    job.result.checks.append(
        {
            "name": "control",
            "status": "pass" if passed else "fail",
            "details": f"all layers standard against the plain model: mse {mse}, allowed {allowed}",
        }
    )
    if not passed:
        job.result.findings.append(
            f"control: with all layers standard the mse is {mse}, not 0: the architecture is at fault"
        )
    if job.setup.against_base and job.setup.has_own_base_weights:
        own = evaluator.plain_against_reference(token_ids)
        if own.squared_difference:
            job.result.findings.append(
                f"the checkpoint's base weights differ from the base model's: without adapters its mse is {own.mse:.6g}"
            )


def logits(job: MeasurementRun) -> None:
    """Fidelity over the prompts: the figures that everyone compares."""
    prompts = job.config.data.prompts
    sequences = [job.evaluator.encode(text) for text in prompts]
    comparisons = [job.evaluator.compare(ids) for ids in sequences]
    job.result.metrics |= summarise(comparisons)
    job.result.per_prompt = [
        {"prompt": job.evaluator.shown(text), "tokens": c.tokens, **c.figures()}
        for text, c in zip(prompts, comparisons, strict=True)
    ]
    _report_non_finite(job, [f"prompt {job.evaluator.shown(text)!r}" for text in prompts], sequences, comparisons)


def isolation(job: MeasurementRun) -> None:
    """Each NPT layer alone, on the layer prompt."""
    from runner.metrics import layers as layer_measures

    token_ids = job.evaluator.encode(job.config.data.layer_prompt)
    reference, run = job.evaluator.layer_run(token_ids)
    indices = [row["layer"] for row in job.result.layers]
    for row, figures in zip(
        job.result.layers, layer_measures.isolation(run, reference, token_ids, indices), strict=True
    ):
        row.update(figures)


def progressive(job: MeasurementRun) -> None:
    """The lowest 1, 2, … n NPT layers together, on the layer prompt."""
    from runner.metrics import layers as layer_measures

    token_ids = job.evaluator.encode(job.config.data.layer_prompt)
    reference, run = job.evaluator.layer_run(token_ids)
    indices = [row["layer"] for row in job.result.layers]
    job.result.progressive = layer_measures.progressive(run, reference, token_ids, indices)
    job.result.metrics["progressive_trend"] = layer_measures.trend([row["mse"] for row in job.result.progressive])


def additivity(job: MeasurementRun) -> None:
    """Whether the layers' errors add up or interact; needs isolation and progressive."""
    from runner.metrics import layers as layer_measures

    if job.result.progressive and job.wants("isolation"):
        isolated = [row["kl"] for row in job.result.layers]
        job.result.metrics["additivity"] = layer_measures.additivity(isolated, job.result.progressive[-1]["kl"])


def generation(job: MeasurementRun) -> None:
    """Greedy continuations of every prompt, sampled ones of the layer prompt."""
    config, tier = job.config, job.config.tier
    prompts = [*config.data.prompts, config.data.layer_prompt]
    wanted = [(text, 0.0) for text in prompts] + [(config.data.layer_prompt, float(t)) for t in tier.temperatures]
    limit = job.evaluator.max_length
    for text, temperature in wanted:
        token_ids = job.evaluator.encode(text)
        count = tier.new_tokens if limit is None else min(tier.new_tokens, limit - len(token_ids))
        if count < 1:
            job.result.findings.append(f"prompt {text!r} fills the model's {limit} positions: no continuation of it")
            continue
        row = job.evaluator.continuation(token_ids, count, temperature=temperature)
        job.result.generation.append({"prompt": job.evaluator.shown(text), "prompt_tokens": token_ids.tolist(), **row})
    greedy = [row["agreement"] for row in job.result.generation if row["temperature"] == 0]
    if greedy:
        job.result.metrics["greedy_agreement"] = sum(greedy) / len(greedy)


def text(job: MeasurementRun) -> None:
    """Fidelity and perplexity over text or token shards, in sequences of up to the tier's length."""
    sequences, facts = _text_sequences(job)
    evaluator = job.evaluator
    facts |= {"documents": len(sequences), "tokens": sum(map(len, sequences)), "longest": max(map(len, sequences))}
    tracked = job.context.track(sequences, "text")
    if evaluator.reference is None:
        logprobs = [evaluator.next_logprobs(ids) for ids in tracked]
        job.result.metrics["text"] = {**facts, **perplexity(logprobs)}
        return
    comparisons = [evaluator.compare(ids) for ids in tracked]
    job.result.metrics["text"] = {**facts, **summarise(comparisons), **perplexities(comparisons)}
    names = [f"text document {i}" for i in range(len(sequences))]
    _report_non_finite(job, names, sequences, comparisons)


def _text_sequences(job: MeasurementRun) -> tuple[list[torch.Tensor], dict[str, int]]:
    """The sequences [T] of text, each under the limit of tier and model, and how many documents were cut."""
    data, tier = job.config.data, job.config.tier
    limit = min(tier.sequence_length, job.evaluator.max_length or tier.sequence_length)
    sequences: list[torch.Tensor] = []
    cut = 0
    if data.name == "shards":
        sequences += data.token_sequences(limit, job.evaluator.vocab_size)
    if job.evaluator.tokenizer is None:
        return sequences or [seeded_ids("text", job.evaluator.vocab_size, limit, job.config.seed)], {"cut": cut}
    for document in [*([_long_document()] if job.wants("text") else []), *data.documents()]:
        token_ids = job.evaluator.encode(document)
        cut += len(token_ids) > limit
        if len(token_ids) > 1:
            sequences.append(token_ids[:limit])
    return sequences, {"cut": cut}


def _long_document() -> str:
    """One text that is long in any tokenizer: the built-in world's held-out sentences in a row."""
    from runner.data.text import world_documents

    return world_documents(sentences=400)[0]


def floor(job: MeasurementRun) -> None:
    """What no model can beat: the reference against itself in another precision."""
    sequences = [job.evaluator.encode(text) for text in job.config.data.prompts]
    job.result.metrics["floor"] = summarise([job.evaluator.compare_to_floor(ids) for ids in sequences])


def _report_non_finite(
    job: MeasurementRun, names: Sequence[str], sequences: Sequence[torch.Tensor], comparisons: Sequence[LogitComparison]
) -> None:
    bad = [i for i, comparison in enumerate(comparisons) if not comparison.finite]
    job.result.findings += job.evaluator.non_finite_findings([names[i] for i in bad], [sequences[i] for i in bad])


# Name, whether it needs NPT layers, and what fills its part; in this order.
STEPS: tuple[tuple[str, bool, Callable[[MeasurementRun], None]], ...] = (
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
    if config.data.name == "classification":
        from runner.tasks import classification

        return classification.diagnose(config, context)
    setup = open_evaluation(config, context)
    checkpoint = setup.checkpoint
    result = context.result(
        "diagnose",
        checkpoint,
        base=str(setup.base) if setup.base else None,
        reference=str(setup.reference) if setup.reference else None,
        tier=config.tier.name,
        layers=[layer.summary() for layer in checkpoint.layers],
        checks=[
            {"name": "load", "status": "pass", "details": checkpoint.evidence},
            {"name": "finite", "status": "pass", "details": "no NaN or Inf in the weights of checkpoint and base"},
        ],
        details={"computed_by": setup.evaluator.computed_by},
    )
    job = MeasurementRun(config, context, setup, result)
    if setup.evaluator.tokenizer is None:
        result.findings.append(
            f"no tokenizer: each prompt is {SEEDED_LENGTH} token ids drawn with seed={config.seed}; give tokenizer="
        )
    if setup.evaluator.reference is None:
        _only_run(job)
    else:
        _measure(job)
    _note_length(job)
    return result


def _note_length(job: MeasurementRun) -> None:
    """What the model says of sequences as long as the longest one here."""
    lengths = [row["tokens"] for row in job.result.per_prompt]
    lengths.append(job.result.metrics.get("text", {}).get("longest", 0))
    job.result.findings += job.evaluator.notes(max(lengths))


def _measure(job: MeasurementRun) -> None:
    """Every measure of the tier that the model has, then the verdict."""
    npt = job.evaluator.plain is not None
    wanted = [
        (name, step)
        for name, needs_npt, step in STEPS
        if (npt or not needs_npt)
        and (job.wants(name) or (name == "text" and job.config.data.name != "prompts"))
        and (name != "floor" or job.evaluator.has_floor())
    ]
    for name, step in job.context.track(wanted, "measuring", total=len(wanted)):
        with job.context.timed(name):
            step(job)
    result = job.result
    if not npt:
        return
    if not job.setup.against_base:
        result.findings.append("the reference is not the base model: no verdict on progress is given")
    elif job.wants("logits"):
        result.verdict = judge(
            result.metrics["mse"],
            result.metrics["cosine"],
            job.config.verdict,
            layer_mses=[row["mse"] for row in result.layers] if job.wants("isolation") else None,
            generations=[row for row in result.generation if row["temperature"] == 0],
        )


def _only_run(job: MeasurementRun) -> None:
    """Nothing to compare with: the model runs on every prompt and its logits are finite."""
    model = job.evaluator.model
    with job.context.timed("forward"), torch.inference_mode():
        prompts = [job.evaluator.encode(text) for text in job.config.data.prompts]
        finite = [bool(torch.isfinite(model(ids.to(device_of(model))[None]).logits).all()) for ids in prompts]
    names = [f"prompt {text!r}" for text, ok in zip(job.config.data.prompts, finite, strict=True) if not ok]
    bad = [ids for ids, ok in zip(prompts, finite, strict=True) if not ok]
    job.result.findings += job.evaluator.non_finite_findings(names, bad)
    why = "no reference= is given" if job.config.accuracy else "accuracy=false"
    job.result.checks.append(
        {
            "name": "forward",
            "status": "pass" if all(finite) else "fail",
            "details": f"ran on {len(prompts)} prompts; the comparison was skipped ({why})",
        }
    )
    if job.config.accuracy and (job.wants("text") or job.config.data.name != "prompts"):
        with job.context.timed("text"):
            text(job)
