"""What NPT layers must do: be the base's own layers in standard mode, and come back from every switch unchanged."""

import torch

from runner.checks.check import Outcome, failed, passed
from runner.checks.context import Bench
from runner.checks.inputs import prompts
from runner.checks.subjects import plain_subject
from runner.evaluation.forward import device_of
from runner.families.npt.model import NptLlamaForCausalLM


@torch.inference_mode()
def modes(bench: Bench) -> Outcome:
    """After switching to standard, to each layer alone and through an error, NPT and standard logits are as before."""
    model = bench.model
    assert isinstance(model, NptLlamaForCausalLM)
    ids = prompts(bench)[0].to(device_of(model))[None]
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


def control(bench: Bench) -> Outcome:
    """All layers standard must equal the plain model: exactly on a CPU in float32, elsewhere within its rounding."""
    subject = plain_subject(bench)
    token_ids = min(prompts(bench), key=len)
    compared = subject.control(token_ids)
    exact = device_of(subject.model).type == "cpu" and subject.npt.dtype == torch.float32
    allowed = 0.0 if exact else subject.compare_to_floor(token_ids).mse
    mse = compared.mse if compared.finite else float("nan")
    said = f"all layers standard against the plain model: mse {mse:g}, allowed {allowed:g}"
    if not mse <= allowed:
        return failed(f"{said}: the architecture is at fault", "Look at the standard mode of the NPT layers.")
    return passed(said, mse=mse)
