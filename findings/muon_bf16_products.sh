#!/usr/bin/env bash
# torch.optim.Muon orthogonalises float32 parameters on a CPU in bfloat16: each product of its Newton-Schulz rounds.
# Fails where that is no longer so. Holds dtypes, not times: a CPU without bfloat16 instructions is slow at them.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$directory"
"$directory/venv/bin/python" - <<'PYTHON'
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDS = 5
PRODUCTS = {"aten.mm.default", "aten.addmm.default"}


class Products(TorchDispatchMode):
    """Counts matrix products by the dtypes of what goes in and comes out."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if str(function) in PRODUCTS:
            dtypes = {str(x.dtype) for x in (*args, result) if isinstance(x, torch.Tensor)}
            self.seen[(str(function), *sorted(dtypes))] += 1
        return result


torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(128, 256))
weight.grad = torch.randn(128, 256)
assert weight.dtype == weight.grad.dtype == torch.float32 and weight.device.type == "cpu"
optimizer = torch.optim.Muon([weight], lr=1e-2)
with Products() as products:
    optimizer.step()

print("torch", torch.__version__)
print("parameter and gradient:", weight.dtype, "on", weight.device)
print("momentum:", optimizer.state[weight]["momentum_buffer"].dtype)
for (name, *dtypes), count in sorted(products.seen.items()):
    print(f"{count:3} x {name}: {', '.join(dtypes)}")
expected = {("aten.mm.default", "torch.bfloat16"): ROUNDS, ("aten.addmm.default", "torch.bfloat16"): 2 * ROUNDS}
assert products.seen == expected, f"changed: expected {expected}"
print("held: every product of Muon's step over float32 is one of bfloat16")
PYTHON
