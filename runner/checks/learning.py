"""What training must reach, and what it must leave alone: gradients and one optimizer step."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from runner.checks.check import Outcome, failed, passed
from runner.checks.context import Bench
from runner.checks.inputs import prompts, ragged, right_padded
from runner.evaluation.forward import device_of
from runner.families.lora_moe.model import LoraForCausalLM
from runner.families.npt.model import NptLlamaForCausalLM
from runner.files.tensors import is_finite

# By how much of its largest value a step moves a parameter: visible in every precision, whatever the gradient's scale.
STEP_SIZE = 1e-2


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes: NPT weights; adapters and router; all of a model without either."""
    named = dict(model.named_parameters())
    if isinstance(model, NptLlamaForCausalLM):
        return {name: p for name, p in named.items() if ".updates." in name}
    if isinstance(model, LoraForCausalLM):
        return {name: p for name, p in named.items() if ".lora_" in name or name.startswith("router.")}
    return named


def gradients(bench: Bench) -> Outcome:
    """A fine-tuning loss has a finite gradient for every parameter that should train, and for no other."""
    bench.free("reloaded")
    model = bench.model
    wanted = trained(model)
    with _training(model, wanted):
        _loss(bench, model).backward()
        reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        missing = sorted(wanted.keys() - reached.keys())
        stray = sorted(reached.keys() - wanted.keys())
        broken = sorted(name for name, gradient in reached.items() if not is_finite(gradient))
        zero = [name for name in wanted if name in reached and not bool(reached[name].any())]
    unexplained = sorted(name for name in zero if not _is_zero_by_neighbours(name, wanted))
    problems = [
        f"{what}: {', '.join(names[:4])}{f', … ({len(names)})' if len(names) > 4 else ''}"
        for what, names in (
            ("no gradient reaches", missing),
            ("a gradient reaches what should not train", stray),
            ("the gradient is not finite", broken),
            ("the gradient is zero everywhere", unexplained),
        )
        if names
    ]
    if problems:
        return failed("; ".join(problems), "Look at requires_grad, detach and no_grad in the model.")
    said = f" ({len(zero)} zero for now: what they are multiplied with is zero)" if zero else ""
    return passed(f"{len(wanted)} parameters have a gradient{said}, {_count(model) - len(wanted)} others none")


def optimizer_step(bench: Bench) -> Outcome:
    """One optimizer step changes every parameter that has a gradient, and not a bit of anything else."""
    model = bench.model
    wanted = trained(model)
    before = _digests(model)
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        with _training(model, wanted):
            _loss(bench, model).backward()
            moving = {name for name, p in wanted.items() if p.grad is not None and bool(p.grad.any())}
            stepped = [p for p in model.parameters() if p.grad is not None]
            kept += [(p, p.detach().clone()) for p in stepped] if bench.own else []
            for parameter in stepped:
                _scale(parameter)
            # Plain SGD: moments would take twice the memory of the weights.
            torch.optim.SGD(stepped, lr=STEP_SIZE, foreach=False).step()
        changed = {name for name, digest in _digests(model).items() if before[name] != digest}
    finally:
        # The base is shared with whoever comes next, and what was stepped may lie in its memory.
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)
        if not bench.own:
            bench.free("model", "checkpoint")  # a model may lie in the mapped file, and a step in its private copy
    if stray := sorted(changed - wanted.keys()):
        return failed(f"a step also changes {', '.join(stray[:4])}", "Look for tensors that share memory.")
    if not moving:
        return failed(
            "every gradient is zero, so no step can change anything: the factors that multiply each other are all zero",
            "start the training again: one factor of each product must begin with other values than zero",
        )
    if moving - changed:
        return failed(f"a step leaves {', '.join(sorted(moving - changed)[:4])} as it was")
    return passed(f"changes {len(changed)} parameters; {len(before) - len(changed)} other tensors keep every bit")


@contextmanager
def _training(model: nn.Module, wanted: dict[str, nn.Parameter]) -> Iterator[None]:
    """Within the block the model is in training mode and `wanted` require gradients; afterwards all is as before."""
    was_training, required = model.training, {name: p.requires_grad for name, p in wanted.items()}
    model.train()
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter in model.parameters():
            parameter.grad = None
        for name, parameter in wanted.items():
            parameter.requires_grad_(required[name])


def _scale(parameter: nn.Parameter) -> None:
    """Make the gradient's largest value that of the parameter; zero stays zero.

    In place of a learning rate each: an optimizer looks through all of its groups for each one that is added.
    """
    assert parameter.grad is not None
    largest, slope = (each.detach().abs().max().item() for each in (parameter, parameter.grad))
    if slope:
        parameter.grad.div_(slope).mul_(max(largest, 1e-3))


def _loss(bench: Bench, model: nn.Module) -> torch.Tensor:
    """Mean cross-entropy of the next token over a padded batch, and the balance loss of a router."""
    sequences = [*prompts(bench), ragged(bench, 1)[0]]
    ids, mask = (each.to(device_of(model)) for each in right_padded(sequences, filler=0))
    output = model(ids, attention_mask=mask)
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    loss = cross_entropy(output.logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100)
    balance = getattr(output, "balance_loss", None)
    return loss if balance is None else loss + balance


def _is_zero_by_neighbours(name: str, wanted: dict[str, nn.Parameter]) -> bool:
    """Whether another factor of the same product is zero, as in adapters that were not trained yet."""
    if ".lora_" in name:
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        return not bool(wanted[other].any())
    if ".updates." in name:
        front = name.rpartition(".")[0]
        return any(not bool(p.any()) for other, p in wanted.items() if other != name and other.startswith(f"{front}."))
    if name.startswith("router.") and wanted[name].shape[0] == 1:
        return True  # the softmax over one expert is constant
    return any(not bool(parameter.any()) for parameter in wanted.values())


def _digests(model: nn.Module) -> dict[str, int]:
    """A checksum of the bytes of every parameter and buffer."""
    return {name: _crc32(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _crc32(tensor: torch.Tensor) -> int:
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(values)


def _count(model: nn.Module) -> int:
    return sum(1 for _ in model.parameters())
