"""`task=diagnose`: how close a checkpoint is to its base model, and how far its training has come."""

import torch

from runner.config import DiagnoseConfig
from runner.evaluation.forward import device_of
from runner.metrics.verdict import judge
from runner.results import Result
from runner.tasks.context import Context
from runner.tasks.measuring import SEEDED_LENGTH, STEPS, Page
from runner.tasks.measuring import text as measure_text
from runner.tasks.setup import open_subject
from runner.versions import versions


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
            measure_text(page)
