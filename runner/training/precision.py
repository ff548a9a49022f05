"""Passes in half precision over weights in float32, and what must stay in float32 within them."""

from contextlib import AbstractContextManager, nullcontext

import torch

from runner.errors import ConfigError

_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_OF_BASE = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Precision:
    """What the passes of a training compute in; `scaler` where gradients of float16 must be kept from vanishing."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device.type
        self.dtype = _DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def passes(self) -> AbstractContextManager[object]:
        """Within the block matrix products run in half precision; nothing changes for float32."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)


def precision_over(base: torch.dtype, name: str, device: torch.device) -> Precision:
    """The precision `name` over a base stored as `base`; auto is that of the base.

    Raises ConfigError where the base is smaller than what is asked for.
    """
    own = _OF_BASE[base]
    if name == "auto":
        name = own
    if own not in ("float32", name):
        raise ConfigError(f"train.precision={name} needs a base that is as exact; give dtype=float32, not {own}")
    return Precision(name, device)


def exact(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Within the block what is computed on the device of `tensor` is computed in the dtype of its operands."""
    if not torch.is_autocast_enabled(tensor.device.type):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
