"""What a mixture of LoRA experts must keep when it is saved: its router, its skills, and which expert gets a token."""

import torch

from runner.checkpoints.detect import open_checkpoint
from runner.checks.check import Outcome, failed, passed, skipped
from runner.checks.context import Bench
from runner.checks.inputs import prompts, ragged
from runner.evaluation.forward import device_of
from runner.families.lora_moe.model import LoraMoeForCausalLM
from runner.families.lora_moe.state import read_skills


def router(bench: Bench) -> Outcome:
    """Weight, bias, top_k and temperature of the reloaded router are those of the loaded one."""
    ours, theirs = _model(bench.model), _model(bench.reloaded)
    wrong = [
        f"gate.{name} differs by up to {(a.float() - b.float()).abs().max().item():.3g}"
        for name, a, b in (
            ("weight", ours.router.weight, theirs.router.weight),
            ("bias", ours.router.bias, theirs.router.bias),
        )
        if not torch.equal(a, b)
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


def skills(bench: Bench) -> Outcome:
    """The saved skill library has the same ids and embeddings."""
    own = bench.checkpoint.details.skills
    if own is None:
        return skipped("the checkpoint has no skill library")
    copy = open_checkpoint(bench.saved, bench.checkpoint.format).details.skills
    ours, theirs = read_skills(own), {} if copy is None else read_skills(copy)
    if ours.keys() != theirs.keys():
        return failed(f"the saved skill library holds {sorted(map(str, theirs))} instead of {sorted(map(str, ours))}")
    wrong = [str(name) for name in ours if not torch.equal(ours[name], theirs[name])]
    if wrong:
        return failed(f"the saved embeddings of {', '.join(wrong)} differ from the loaded ones")
    return passed(f"{len(ours)} embeddings of size {own.size}: equal, bit for bit")


@torch.inference_mode()
def routing(bench: Bench) -> Outcome:
    """Every token of the prompts and of a longer sequence goes to the same experts, with the same weights."""
    ours, theirs = _model(bench.model), _model(bench.reloaded)
    tokens, used = 0, torch.zeros(len(ours.names))
    for sequence in [*prompts(bench), ragged(bench, 1)[0]]:
        ids = sequence.to(device_of(ours))[None]
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


def _model(model: torch.nn.Module) -> LoraMoeForCausalLM:
    assert isinstance(model, LoraMoeForCausalLM)
    return model
