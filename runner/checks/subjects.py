"""An NPT model beside what it is compared with, for the checks that measure as diagnose does."""

from dataclasses import replace

from runner.checks.context import Bench
from runner.evaluation.base_models import load_base
from runner.evaluation.evaluator import Subject
from runner.evaluation.forward import logit_count
from runner.evaluation.reference import Reference
from runner.families.npt.model import NptLlamaForCausalLM


def plain_subject(bench: Bench) -> Subject:
    """The NPT model of `bench` beside the plain model of the same weights: its base, or for npt_full its own Llama."""
    model = bench.model
    assert isinstance(model, NptLlamaForCausalLM)
    # A key of its own: traces kept under an id() could be those of a model that is gone.
    plain = Reference(bench.own.model, bench.own.key) if bench.own else Reference(model.plain(), ("plain", object()))
    return Subject(model=model, reference=plain, plain=plain, shared_below=0, vocab_size=logit_count(model))


def subject_of(bench: Bench) -> Subject:
    """The NPT model of `bench` beside its base model. Raises CheckpointError where the base is not found."""
    base = bench.own or load_base(bench.checkpoint, bench.config.base, **bench.options)
    subject = plain_subject(bench)
    shared = min(subject.npt.npt_layers) if bench.own else 0
    return replace(subject, reference=Reference(base.model, base.key), shared_below=shared)
