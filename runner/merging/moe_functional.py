"""Whether each expert of a merged lora_moe gives, alone over the base, the logits of its source: bit for bit."""

from collections.abc import Mapping
from pathlib import Path

import torch

from runner.checkpoints.adapter_tensors import Factors
from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.lora_moe_tensors import check_base, read_experts
from runner.errors import RunnerError
from runner.evaluation.base_models import Base
from runner.families.lora.model import linear_shapes
from runner.families.lora_moe.model import LoraForCausalLM
from runner.merging.files import Files


def check_experts(written: Path, files: Files, base: Base, prompts: Mapping[str, torch.Tensor]) -> list[int]:
    """The experts whose logits, alone and unweighted over the base, equal their source's on all `prompts`.

    `prompts`: text → token ids [T]. Raises RunnerError where a logit differs in a bit, ModelError or CheckpointError
    where the merged checkpoint does not fit the base.
    """
    merged = _experts(open_checkpoint(written), base)
    sources = {str(source.path): source for source in files.sources}
    known = {path: _experts(source.checkpoint, base) for path, source in sources.items()}
    checked = []
    for row, ours in zip(files.details["experts"], merged, strict=True):
        theirs = known[row["source"]][row["source_expert"]]
        for text, token_ids in prompts.items():
            if not torch.equal(_alone(ours, base, token_ids), _alone(theirs, base, token_ids)):
                raise RunnerError(
                    f"{written}: verification failed: on {text!r}, expert {row['expert']} alone gives other logits "
                    f"than in {row['source']}"
                )
        checked.append(row["expert"])
    return checked


def _experts(checkpoint: Checkpoint, base: Base) -> tuple[Factors, ...]:
    model = base.model
    check_base(checkpoint, linear_shapes(model), model.config.hidden_size, base.path)
    return read_experts(checkpoint, dtype=model.dtype, device=model.device)


@torch.inference_mode()
def _alone(factors: Factors, base: Base, token_ids: torch.Tensor) -> torch.Tensor:
    """The bits of the logits [1, T, V] of the base with one expert."""
    model = LoraForCausalLM(base.model, [factors]).eval()
    return model(token_ids.to(model.device)[None]).logits.contiguous().view(torch.uint8)
