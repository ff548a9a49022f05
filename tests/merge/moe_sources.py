"""lora_moe checkpoints as separate trainings leave them, and plans of merges."""

from pathlib import Path

import torch

from runner.families.lora.checkpoint import adapter_config
from runner.families.lora_moe import save as lora_moe_save
from runner.merge.plan import MergeOutput
from runner.merge.spec import MergeSpec
from runner.tasks.merge import plan
from tests.lora_files import TARGETS, adapter_tensors, router_of


def write_moe(directory, base, *, experts=2, seed=1, step=120, rank=3, skills=None, base_name=None, **config):
    """A lora_moe checkpoint with weights of its own for each `seed`."""
    name = str(base) if base_name is None else base_name
    width = router_of(base, experts)[0].shape[1]
    lora_moe_save.save(
        directory,
        config={**lora_moe_save.config(base_name=name, num_experts=experts, step=step), **config},
        experts=[
            (
                adapter_config(base_name=name, r=rank, alpha=2 * rank + i, target_modules=TARGETS),
                adapter_tensors(base, rank, seed=100 * seed + i),
            )
            for i in range(experts)
        ],
        router=router_of(base, experts, seed=seed),
        skills={
            name: torch.full((width,), float(10 * seed + i))
            for i, name in enumerate(range(experts) if skills is None else skills)
        },
    )
    return directory


def gathered(sources, **options) -> MergeOutput:
    """The plan of a merge, or its refusal, which comes before anything is written."""
    spec = MergeSpec(name="test", sources=sources, **options)
    return plan(spec, [Path(source.path) for source in spec.sources], None, Path("out"))[1]
