"""From a checkpoint to figures: base model, placement, forward passes, reference."""

import os

# On a CPU, oneDNN's native bfloat16 instructions round otherwise than the programs did that wrote the files (by 0.03 on
# the mean logit of a GPT); without them the logits are bit-equal, in the time that float32 takes. oneDNN reads this
# once, before the first product of a process.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
