"""An NPT model beside what it is compared with, for the checks that measure as diagnose does."""

from dataclasses import replace

from runner.checks.context import Bench
from runner.evaluation.base_models import load_base
from runner.evaluation.evaluator import Evaluator, plain_reference
from runner.evaluation.reference import Reference


def plain_subject(bench: Bench) -> Evaluator:
    """The NPT model of `bench` beside the plain model of the same weights: its base, or for npt_full its own Llama."""
    own = Reference(bench.own.model, bench.own.key) if bench.own else None
    plain = plain_reference(bench.model, own)
    return Evaluator(model=bench.model, reference=plain, plain=plain, tokenizer=bench.tokenizer, seed=bench.config.seed)


def subject_of(bench: Bench) -> Evaluator:
    """The NPT model of `bench` beside its base model. Raises CheckpointError where the base is not found."""
    base = bench.own or load_base(bench.checkpoint, bench.config.base, bench.placement)
    return replace(plain_subject(bench), reference=Reference(base.model, base.key))
