"""What the states beside NPT weights say was trained, against what the weights still hold.

A layer, a rank-1 term or a projection that is gone altogether leaves weights that are whole: only the trainer's and the
optimizer's states tell.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runner.checks.context import Bench
from runner.checks.headers import TensorHeader

CURRICULUM, TRAINING = "multi_layer_state.pt", "training_state.pt"


def lost(bench: Bench, layers: Iterable[int], tensors: Mapping[str, TensorHeader]) -> list[str]:
    """What was trained and is not in `tensors`, NPT weights of these `layers`."""
    root = bench.look.path
    if not root.is_dir():
        return []
    named = _state(root / CURRICULUM).get("layers_to_train")
    absent = {layer for layer in named if type(layer) is int} - set(layers) if isinstance(named, list) else set()
    if absent:
        return [f"missing layers {', '.join(map(str, sorted(absent)))}, which {CURRICULUM} trains"]
    moments = _moments(_state(root / TRAINING).get("optimizer_state_dict"))
    held = Counter(tensor.shape for tensor in tensors.values())
    more = moments - held
    # Moments of anything else than such matrices are of something that was trained beside them.
    if not more or held - moments or not more.keys() <= held.keys():
        return []
    return [
        f"missing {more.total()} matrices: the optimizer in {TRAINING} has moments of {moments.total()}, "
        f"the weights are {held.total()}"
    ]


def _state(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    from runner.files.pickles import load_pickle

    content = load_pickle(path, tensors="meta")
    return content if isinstance(content, Mapping) else {}


def _moments(optimizer: Any) -> Counter[tuple[int, ...]]:
    """How many parameters of each shape the optimizer has a first moment of."""
    state = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    entries = [entry for entry in state.values() if isinstance(entry, Mapping)] if isinstance(state, Mapping) else []
    return Counter(tuple(entry["exp_avg"].shape) for entry in entries if hasattr(entry.get("exp_avg"), "shape"))
