#!/usr/bin/env bash
# torch 2.13.0: to make an optimizer, of one number and never compiled, imports torch._dynamo, and with it sympy: about
# as many CPU seconds as `import torch` once more.
#
# Guess before: whoever compiles nothing pays for no compiler. Seen: add_param_group, which every constructor calls, is
# wrapped by torch._disable_dynamo, and the wrapper imports what it switches off when it first runs.
# Holds modules, not times.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$directory"
"$directory/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch

spent = time.process_time()
weight = torch.nn.Parameter(torch.zeros(1))
weight.square().sum().backward()
before = set(sys.modules)
taken = time.process_time()
torch.optim.SGD([weight], lr=0.1)
taken = time.process_time() - taken
new = set(sys.modules) - before
print("torch", torch.__version__)
print(f"import torch: {spent:.2f} CPU seconds; one optimizer: {taken:.2f} CPU seconds, {len(new)} new modules")
assert not {"torch._dynamo", "sympy"} & before, "changed: torch imports them by itself"
assert {"torch._dynamo", "sympy"} <= new, "changed: an optimizer imports no compiler"
print("held: making an optimizer imports torch._dynamo and sympy")
PYTHON
