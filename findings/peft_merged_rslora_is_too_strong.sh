#!/usr/bin/env bash
# peft 0.21.2: whatever add_weighted_adapter makes of adapters with use_rslora is √r times too strong.
#
# Guess before: one adapter with weight 1, merged by cat (which is exact by its documentation), adds to a layer what it
# did. Seen: the new adapter gets lora_alpha = r, so that its scaling be 1, and keeps the first one's use_rslora, by which
# its scaling is r / √r = √r. So it is with linear and svd. Without use_rslora all three are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
for stabilised in (False, True):
    settings = LoraConfig(r=4, lora_alpha=8, use_rslora=stabilised, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8, bias=False)), settings)
    layer = model.base_model.model[0]
    alone = layer.get_delta_weight("default").detach()
    for kind in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["default"], [1.0], kind, combination_type=kind, svd_rank=4)
        factor = float((layer.get_delta_weight(kind) / alone).mean())
        print(f"use_rslora={stabilised}, {kind}: {factor:.4f} times the one adapter that was merged")
        assert math.isclose(factor, 2 if stabilised else 1, rel_tol=1e-4), "behaves otherwise now"
PYTHON
