"""The checks of NPT checkpoints, over a base or complete: their parts, what NPT layers must do, how close they come.

In standard mode NPT layers are the base's own, and they come back from every switch unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.checkpoint import Checkpoint
from runner.checks.check import by_name, check, failed, part_check, passed, skipped
from runner.checks.context import BUILT, Check, CheckContext, Outcome, Traits
from runner.checks.environment import write_zeros
from runner.errors import CheckpointError, ModelError
from runner.families.npt import edited

if TYPE_CHECKING:
    from torch import nn

    from runner.evaluation.evaluator import Evaluator

# Of the tiny layouts.
HIDDEN, INNER, RANK = 8, 12, 2


def _quality(name: str, title: str) -> Check:
    """A check of runner/checks/quality.py against the base; skipped where the base is not found."""

    def run(context: CheckContext) -> Outcome:
        measure: Callable[[CheckContext, Evaluator], Outcome] = getattr(import_module("runner.checks.quality"), name)
        try:
            evaluator = base_evaluator(context)
        except CheckpointError as error:
            return skipped(f"nothing to compare with: {error}")
        return measure(context, evaluator)

    return Check(name=name, title=title, run=run, needs=("control",), integrity=False)


CHECKS = by_name(
    part_check("config", "config.json of a complete model", BUILT, advice="restore the config.json of these weights",
               odd="copy training_info.pt from where it was trained: another scale is another model"),
    part_check("keys", "every NPT layer whole, nothing else", "files", "config"),
    part_check("shapes", "the layers' matrices fit each other", "keys"),
    part_check("pollution", "no merged model beside the weights", BUILT, advice="delete it: it is not read"),
    check("modes", "switching modes leaves nothing behind", "families.npt.checks.modes", "forward"),
    check("control", "all layers standard: the plain model", "families.npt.checks.control", "modes"),
    _quality("fidelity", "logits against the base's"),
    _quality("layers", "each NPT layer alone"),
    _quality("progressive", "the lowest n NPT layers"),
    _quality("generation", "continuations against the base's"),
)  # fmt: skip


class NptTraits(Traits):
    """Only the updates of NPT layers are trained."""

    def is_trained(self, name: str) -> bool:
        """As `Traits.is_trained`."""
        return ".updates." in name

    def may_be_zero(self, name: str, trained: Mapping[str, nn.Parameter]) -> bool:
        """Where another factor of the same update is zero, as before training."""
        front = name.rpartition(".")[0]
        return any(not bool(p.any()) for other, p in trained.items() if other != name and other.startswith(f"{front}."))


def base_misfits(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """As `Family.base_misfits`: hidden and MLP size, and the depth."""
    sizes = {
        "hidden_size": {layer.hidden_size for layer in checkpoint.layers},
        "intermediate_size": {layer.intermediate_size for layer in checkpoint.layers},
    }
    problems = [
        f"{key} is {config[key]} in the base, but the checkpoint is made for {', '.join(map(str, sorted(made)))}"
        for key, made in sizes.items()
        if key in config and made - {config[key]}
    ]
    depth, highest = config.get("num_hidden_layers"), max((layer.layer for layer in checkpoint.layers), default=-1)
    if isinstance(depth, int) and highest >= depth:
        problems.append(f"has layer {highest}, but the base only the layers 0 to {depth - 1}")
    return problems


def write_delta(root: Path) -> str:
    """The tiny npt_delta."""
    root.mkdir(parents=True)
    shapes = {"W_down": (HIDDEN, RANK), "W_a_up": (RANK, HIDDEN), "W_b_up": (RANK, INNER)}
    write_zeros(root / "npt_weights.safetensors", {f"layer_1_np.{name}": shape for name, shape in shapes.items()})
    (root / "config.json").write_text(json.dumps({"model_name": "base"}), encoding="utf-8")
    return "npt_weights.safetensors"


def write_full(root: Path) -> str:
    """The tiny npt_full."""
    from runner.families.hf.checks import write_model

    front = "model.layers.1.adapter"
    shapes = {"A_proj": (RANK, HIDDEN), "B_model": (HIDDEN, RANK), "B_ffn": (INNER, RANK)}
    return write_model(root, {f"{front}.{name}.weight": shape for name, shape in shapes.items()})


def write_edited(root: Path) -> str:
    """The tiny npt_edit, with its base in it."""
    from runner.families.hf.checks import write_model

    write_model(root)
    shapes = {"W_down": (HIDDEN, RANK), "W_a_up": (RANK, HIDDEN), "W_b_up": (RANK, INNER)}
    write_zeros(root / "npt_weights.safetensors", {f"layer_1_np.{name}": shape for name, shape in shapes.items()})
    (root / edited.HISTORY).write_text(json.dumps({"format": edited.VERSION, "edits": []}), encoding="utf-8")
    return "npt_weights.safetensors"


def modes(context: CheckContext) -> Outcome:
    """After switching to standard, to each layer alone and through an error, NPT and standard logits are as before."""
    import torch

    with torch.inference_mode():
        return _switched(context)


def _switched(context: CheckContext) -> Outcome:
    import torch

    from runner.evaluation.forward import device_of
    from runner.families.npt.model import NptLlamaForCausalLM

    model = context.model
    assert isinstance(model, NptLlamaForCausalLM)
    ids = context.prompts()[0].to(device_of(model))[None]
    layers = set(model.npt_layers)
    before = model(ids).logits
    with model.npt_mode(set()):
        standard = model(ids).logits
    for layer in sorted(layers):
        with model.npt_mode({layer}):
            model(ids)
    try:
        with model.npt_mode(set()):
            raise _Interruption
    except _Interruption:
        after = model(ids).logits
    with model.npt_mode(set()):
        standard_again = model(ids).logits
    with model.npt_mode(layers):
        switched_on = model(ids).logits
    pairs = {
        "NPT logits after switching back": (before, after),
        "standard logits the second time": (standard, standard_again),
        "logits with every NPT layer switched on": (before, switched_on),
    }
    for name, (expected, found) in pairs.items():
        if not torch.equal(expected, found):
            return failed(
                f"{name} differ by up to {(expected - found).abs().max().item():.3g}: a switch leaves something"
            )
    return passed(f"{len(layers)} NPT layers switched alone and together: nothing is left behind")


class _Interruption(Exception):
    """Stands for whatever ends a measurement early."""


def control(context: CheckContext) -> Outcome:
    """All layers standard must equal the plain model: exactly on a CPU in float32, elsewhere within its rounding."""
    import torch

    from runner.evaluation.forward import device_of

    evaluator = plain_evaluator(context)
    token_ids = min(context.prompts(), key=len)
    compared = evaluator.control(token_ids)
    exact = device_of(evaluator.model).type == "cpu" and context.model.dtype == torch.float32
    allowed = 0.0 if exact else evaluator.compare_to_floor(token_ids).mse
    mse = compared.mse if compared.finite else float("nan")
    said = f"all layers standard against the plain model: mse {mse:g}, allowed {allowed:g}"
    if not mse <= allowed:
        return failed(f"{said}: the architecture is at fault", "Look at the standard mode of the NPT layers.")
    return passed(said, mse=mse)


def plain_evaluator(context: CheckContext) -> Evaluator:
    """The NPT model beside the plain model of the same weights: its base, or where these are its own its own Llama."""
    from runner.evaluation.evaluator import Evaluator, plain_reference
    from runner.evaluation.reference import Reference

    shared = context.own if context.checkpoint.format != edited.NAME else None
    plain = plain_reference(context.model, Reference(shared.model, shared.key) if shared else None)
    tokenizer, seed = context.tokenizer, context.config.seed
    return Evaluator(model=context.model, reference=plain, plain=plain, tokenizer=tokenizer, seed=seed)


def base_evaluator(context: CheckContext) -> Evaluator:
    """The NPT model beside its base model. Raises CheckpointError where the base is not found."""
    from runner.evaluation.base_models import load_base
    from runner.evaluation.reference import Reference

    base = context.own or load_base(context.checkpoint, context.config.base, context.placement)
    return replace(plain_evaluator(context), reference=Reference(base.model, base.key))


STEP = 1


def build_small(context: CheckContext) -> Path:
    """One step of training on a few tokens, so that optimizer and scheduler states are saved too."""
    import torch

    from runner.families.hf.checks import small_base
    from runner.families.npt import EquivalenceSettings
    from runner.families.npt.training import train_run

    root = context.scratch / "built"
    base, name = small_base(context, root)
    depth = getattr(base.model.config, "num_hidden_layers", 0)
    if base.model.config.model_type != "llama":
        raise ModelError(f"base={base.path}: NPT layers stand on a Llama, not on a {base.model.config.model_type}")
    settings = EquivalenceSettings(
        layers=tuple(range(max(0, depth - 2), depth)), modulation="dual", np_rank=8, num_ranks=2, max_steps=STEP,
        save_every=STEP, warmup_steps=0, batch_size=1, sequence_length=8, seed=context.config.seed,
    )  # fmt: skip
    tokens = torch.arange(1, 9)[None].to(base.model.device)
    _, checkpoints = train_run(root, base, [tokens], settings, base_name=name)
    return checkpoints[-1]
