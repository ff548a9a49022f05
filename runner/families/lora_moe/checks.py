"""The checks of mixtures of LoRA experts: their parts, and that saving keeps the router, the skills and the routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checks.check import by_name, check, failed, part_check, part_outcome, passed, skipped
from runner.checks.context import BUILT, CheckContext, Outcome
from runner.checks.environment import write_zeros
from runner.errors import ModelError
from runner.families.hf import checks as hf
from runner.families.lora_moe import TARGETS
from runner.families.lora_moe.state import CONFIG, OLDER, read_skills

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runner.families.lora_moe.model import LoraMoeForCausalLM

CHECKS = by_name(
    check("config", "config.json says how many experts", "families.lora_moe.checks.config", BUILT),
    part_check("layout", "each adapter nested or flat, not both", BUILT, advice="keep one adapter for each expert",
               odd="delete what is beside them, or put it where its expert lies"),
    part_check("gate", "one router, weight and bias", "files"),
    part_check("experts", "config, router and adapters agree", "config", "layout", "gate",
               advice="restore what is missing, or the num_experts that was trained"),
    part_check("adapters", "each expert has config and weights", "files", "layout",
               advice="copy the adapter again from where it was trained"),
    part_check("keys", "every A and B, nothing else", "adapters",
               advice="PEFT would load the rest without an error: save the adapter again"),
    part_check("shapes", "ranks as the configs say", "adapters",
               advice="the config and the weights are of different trainings"),
    part_check("hidden_size", "router and adapters fit each other", "gate", "shapes"),
    part_check("skill_library", "embeddings of the hidden size", "files", "hidden_size"),
    part_check("pollution", "no merged model beside the adapters", BUILT,
               advice="delete it, and keep the Trainer from saving the model: it is not read",
               odd="delete them, if they are a merged model"),
    check("router", "the reloaded router is the same", "families.lora_moe.checks.router", "save"),
    check("skills", "the saved skill library is the same", "families.lora_moe.checks.skills", "save"),
    check("routing", "reloaded, each token has the same experts", "families.lora_moe.checks.routing", "roundtrip"),
)  # fmt: skip
# Router logits closer than this may be ordered otherwise by rounding alone.
NEAR_TIE = 1e-2
# Of the tiny layout, and of the small checkpoint.
EXPERTS = 2
STEP = 1


class MoeTraits(hf.LoraTraits):
    """Tokens may go to another expert where two are as good."""

    def comparable(self, model: nn.Module, alone: Any, together: Any, row: int, length: int) -> int:
        """Up to the first token for which two experts are as good, which rounding may order in either way."""
        mixture = _model(model)
        if mixture.top_k == len(mixture.names):
            return length
        chosen = (alone.expert_weights[0] > 0) != (together.expert_weights[row, :length] > 0)
        best = alone.router_logits[0].float().topk(mixture.top_k + 1).values
        ties = chosen.any(-1) & (best[:, -2] - best[:, -1] < NEAR_TIE)
        return int(ties.nonzero()[0, 0]) if ties.any() else length


def write_example(root: Path) -> str:
    """The tiny layout."""
    for i in range(EXPERTS):
        hf.write_adapter(root / "peft_adapters" / f"expert_{i}" / f"expert_{i}")
    write_zeros(root / "router.safetensors", {"gate.weight": (EXPERTS, hf.TINY_HIDDEN), "gate.bias": (EXPERTS,)})
    config = {"model_type": "dylora-moe", "num_experts": EXPERTS}
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return "router.safetensors"


def build_small(context: CheckContext) -> Path:
    """Experts whose B is not zero, so that a lost or exchanged one shows in the logits, and a library of skills."""
    import torch

    from runner.families.lora.model import linear_shapes
    from runner.families.lora_moe.model import LoraMoeForCausalLM
    from runner.families.lora_moe.save import save_moe

    root = context.scratch / "built"
    base, name = hf.small_base(context, root)
    target = root / f"checkpoint-{STEP}"
    count = context.config.experts
    model, generator = base.model, torch.Generator().manual_seed(context.config.seed)
    hidden = model.config.hidden_size
    r = 16 if hidden >= 256 else 4
    modules = {module: sizes for module, sizes in linear_shapes(model).items() if module.rpartition(".")[2] in TARGETS}
    if not modules:
        raise ModelError(f"{base.path}: has none of the modules {', '.join(TARGETS)} for experts to adapt")

    def random(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return tensor.to(device=model.device, dtype=model.dtype)

    experts = [
        {module: (random(r, d_in), random(d_out, r), 2.0) for module, (d_in, d_out) in modules.items()}
        for _ in range(count)
    ]
    router = random(count, hidden), torch.zeros(count, device=model.device, dtype=model.dtype)
    skills: dict[int | str, torch.Tensor] = {f"skill_{i}": random(hidden).float().cpu() for i in range(count)}
    made = LoraMoeForCausalLM(model, experts, router, top_k=1)
    save_moe(made, target, base_name=name, step=STEP, skills=skills)
    return target


def config(context: CheckContext) -> Outcome:
    """What the reader says of config.json, which is written where there is none and corrected where there is one."""
    there = any((context.directory / place / CONFIG).is_file() for place in ("", OLDER))
    return part_outcome(
        context, "config", "correct config.json" if there else "write it with the checkpoint's num_experts"
    )


def router(context: CheckContext) -> Outcome:
    """Weight, bias, top_k and temperature of the reloaded router are those of the loaded one."""
    import torch

    ours, theirs = _model(context.model), _model(context.reloaded)
    wrong = [
        f"gate.{name} differs by up to {(a.float() - b.float()).abs().max().item():.3g}"
        for name, a in ours.router.named_parameters()
        if not torch.equal(a, b := theirs.router.get_parameter(name))
    ]
    wrong += [
        f"{name} is {getattr(theirs, name)} instead of {getattr(ours, name)}"
        for name in ("top_k", "temperature")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if wrong:
        return failed(f"the reloaded router is another one: {'; '.join(wrong)}")
    count, size = ours.router.weight.shape
    return passed(f"{count} experts over a hidden size of {size}, top {ours.top_k}: equal, bit for bit")


def skills(context: CheckContext) -> Outcome:
    """The saved skill library has the same ids and embeddings."""
    import torch

    from runner.checkpoints.detect import open_checkpoint

    own = context.checkpoint.details.skills
    if own is None:
        return skipped("the checkpoint has no skill library")
    copy = open_checkpoint(context.saved, context.checkpoint.format).details.skills
    ours, theirs = read_skills(own), {} if copy is None else read_skills(copy)
    if ours.keys() != theirs.keys():
        return failed(f"the saved skill library holds {sorted(map(str, theirs))} instead of {sorted(map(str, ours))}")
    wrong = [str(name) for name in ours if not torch.equal(ours[name], theirs[name])]
    if wrong:
        return failed(f"the saved embeddings of {', '.join(wrong)} differ from the loaded ones")
    return passed(f"{len(ours)} embeddings of size {own.size}: equal, bit for bit")


def routing(context: CheckContext) -> Outcome:
    """Every token of the prompts and of a longer sequence goes to the same experts, with the same weights."""
    import torch

    from runner.evaluation.forward import device_of

    ours, theirs = _model(context.model), _model(context.reloaded)
    tokens, used = 0, torch.zeros(len(ours.names))
    for sequence in [*context.prompts(), context.ragged(1)[0]]:
        ids = sequence.to(device_of(ours))[None]
        with torch.inference_mode():
            expected, found = ours(ids).expert_weights, theirs(ids).expert_weights
        if not torch.equal(expected, found):
            moved = int(((expected > 0) != (found > 0)).any(-1).sum())
            return failed(
                f"of {len(sequence)} tokens {moved} go to other experts after reloading; weights differ by up to "
                f"{(expected - found).abs().max().item():.3g}"
            )
        tokens += len(sequence)
        used += (expected > 0).sum((0, 1)).cpu()
    shares = ", ".join(f"{name} {count / tokens:.0%}" for name, count in zip(ours.names, used.tolist(), strict=True))
    return passed(f"{tokens} tokens go where they went: {shares}")


def _model(model: nn.Module) -> LoraMoeForCausalLM:
    from runner.families.lora_moe.model import LoraMoeForCausalLM

    assert isinstance(model, LoraMoeForCausalLM)
    return model
