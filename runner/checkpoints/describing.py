"""What files say, as plain JSON values: for `task=inspect`."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from runner.checkpoints.checkpoint import Checkpoint
from runner.files.stubs import Inert
from runner.files.tensors import TensorInfo

# Longer lists and texts of a foreign file are cut: inspect shows what is there, not all of it.
_ITEMS, _CHARACTERS = 200, 2000


def plain(value: Any, depth: int = 6) -> Any:
    """`value` as JSON values: tensors as dtype and shape, foreign objects as their state, long things cut."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value if len(value) <= _CHARACTERS else f"{value[:_CHARACTERS]}… ({len(value)} characters)"
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    if depth == 0:
        return "…"
    if isinstance(value, Inert):
        return plain(value.state, depth) if value.state and "state" not in value.state else repr(value)[:_CHARACTERS]
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth - 1) for key, item in list(value.items())[:_ITEMS]}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, depth - 1) for item in list(value)[:_ITEMS]]
    return repr(value)[:_CHARACTERS]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def describe_training(state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Step, learning rates, optimizer, scheduler and mixed precision of a training state."""
    optimizer, scheduler = state.get("optimizer_state_dict"), state.get("scheduler_state_dict")
    groups = optimizer.get("param_groups", []) if isinstance(optimizer, Mapping) else []
    rates = [group["lr"] for group in groups if isinstance(group, Mapping) and "lr" in group]
    shown = ("step", "global_step", "batch_count", "current_epoch", "best_val_loss")
    return {
        **{name: plain(state[name]) for name in shown if state.get(name) is not None},
        "learning_rates": plain(rates) if rates else plain(config.get("learning_rate")),
        "optimizer": _optimizer(optimizer, groups),
        "scheduler": plain(scheduler),
        "mixed_precision": bool(state.get("scaler_state_dict")) or plain(config.get("mixed_precision")),
        "config": plain(config or state.get("config")),
    }


def _optimizer(optimizer: Any, groups: list[Any]) -> dict[str, Any] | None:
    if not isinstance(optimizer, Mapping):
        return None
    moments = optimizer.get("state")
    return {
        "groups": [
            {name: plain(value) for name, value in group.items() if name != "params"}
            for group in groups
            if isinstance(group, Mapping)
        ],
        "parameters_with_moments": len(moments) if isinstance(moments, Mapping) else 0,
    }


def totals(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """`keys`, `parameters`, `bytes`, and the number of tensors of each dtype."""
    return {
        "keys": len(infos),
        "parameters": sum(info.numel for info in infos.values()),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": dict(Counter(dtype_name(info.dtype) for info in infos.values())),
    }


def components(checkpoint: Checkpoint, group_of: Callable[[str], str]) -> list[dict[str, Any]]:
    """Tensors, parameters and bytes of each group of names, in file order."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.weights.infos.items():
        groups.setdefault(group_of(name), {})[name] = info
    return [
        {"component": group, **{k: v for k, v in totals(infos).items() if k != "dtypes"}}
        for group, infos in groups.items()
    ]
