"""Whether each layer of a merged checkpoint computes, alone, what it computed in its source: bit for bit."""

from collections.abc import Mapping
from pathlib import Path

import torch

from runner.checkpoints.detect import open_checkpoint
from runner.errors import RunnerError
from runner.evaluation.base_models import Base
from runner.evaluation.forward import Trace, continue_from, logits
from runner.evaluation.reference import Reference
from runner.families.npt.model import NptLlamaForCausalLM, build_npt
from runner.merge.plan import Plan


def check_functions(written: Path, plan: Plan, base: Base, prompts: Mapping[str, torch.Tensor]) -> list[int]:
    """The layers whose logits, alone in NPT mode, equal their source's on all `prompts` (text → token ids [T]).

    Layers that were computed from several sources have no source to equal and are left out. Raises RunnerError
    where a logit differs in a bit.
    """
    merged = build_npt(open_checkpoint(written), base)
    reference = Reference(base.model, base.key)
    checked = []
    for source in plan.sources:
        layers = [p.layer.layer for p in plan.layers if p.how == "copy" and p.sources[0] is source]
        if not layers:
            continue
        model = build_npt(source.checkpoint, base)
        for layer in layers:
            for text, token_ids in prompts.items():
                known = reference.trace(token_ids, [layer])
                if not torch.equal(_alone(merged, layer, known), _alone(model, layer, known)):
                    raise RunnerError(
                        f"{written}: verification failed: on {text!r}, layer {layer} alone gives other logits than in "
                        f"{source.path}"
                    )
        checked += layers
    return sorted(checked)


def _alone(model: NptLlamaForCausalLM, layer: int, known: Trace) -> torch.Tensor:
    """The bits of the logits [T, V] with one NPT layer active; the layers below it give the base's hidden states."""
    with model.npt_mode({layer}):
        return logits(model, continue_from(model, known, layer)).contiguous().view(torch.uint8)
