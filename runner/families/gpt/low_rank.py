"""Low-rank updates of a GPT's matrices: q, k, v, o are parts of merged tensors, fc and proj those of the MLP."""

import torch
from torch import Tensor, nn

from runner.errors import ConfigError, did_you_mean
from runner.families.gpt.model import GptForCausalLM
from runner.finetuning.low_rank import LowRankSettings

TARGETS = ("q", "k", "v", "o", "fc", "proj")
DEFAULT = ("q", "v")
# The part of a merged tensor that each matrix is, by the tensor's name in its block.
_MERGED = {"attn.qkv_w": "qkv", "attn.qkvo_w": "qkvo"}
_ALONE = {
    "o": ("attn.c_proj.weight",), "fc": ("mlp.fc_w", "mlp.c_fc.weight"), "proj": ("mlp.proj_w", "mlp.c_proj.weight"),
    "q": ("attn.c_q.weight",), "k": ("attn.c_k.weight",), "v": ("attn.c_v.weight",),
}  # fmt: skip


def add_low_rank(model: GptForCausalLM, settings: LowRankSettings) -> list[str]:
    """Add an update to each matrix that `settings` name; → the names of the new parameters. Raises ConfigError."""
    if settings.dropout:
        raise ConfigError(f"train.lora.dropout={settings.dropout}: a GPT's updates have none, as they change W itself")
    wanted = settings.targets or DEFAULT
    if unknown := sorted(set(wanted) - set(TARGETS)):
        raise ConfigError(f"train.lora.targets: a GPT has no matrix {unknown[0]}{did_you_mean(unknown[0], TARGETS)}")
    names: list[str] = []
    for i in range(model.config.num_layers):
        for target in wanted:
            names += _add(model, i, target, settings)
    if not names:
        raise ConfigError(
            f"train.scope=lora: the matrices of {model.record.name} lie together in banks; give all, head or last:N"
        )
    return names


def _add(model: GptForCausalLM, i: int, target: str, settings: LowRankSettings) -> list[str]:
    """The update of one matrix of block i, where the block has it."""
    prefix = model.block_prefix
    for name, letters in _MERGED.items():
        tensor = f"{prefix}.{i}.{name}"
        if target in letters and model.has(tensor):
            place = letters.index(target)
            whole = model.weight(tensor)
            flat = whole.view(len(letters), -1, whole.shape[-1])
            return _updated(model, tensor, target, flat[place].shape, settings, (place, len(letters)))
    for name in _ALONE[target]:
        tensor = f"{prefix}.{i}.{name}"
        if model.has(tensor):
            return _updated(model, tensor, target, model.weight(tensor).shape, settings, None)
    return []


def _updated(
    model: GptForCausalLM, tensor: str, target: str, shape: tuple[int, ...], settings: LowRankSettings,
    part: tuple[int, int] | None,
) -> list[str]:  # fmt: skip
    outputs, inputs = shape
    transposed = outputs > inputs if target == "proj" else outputs < inputs  # kept as x W
    outputs, inputs = (inputs, outputs) if transposed else (outputs, inputs)
    a, b = settings.factors(inputs, outputs, model.weight(tensor))
    holder, stem = nn.Module(), f"lora_{tensor.replace('.', '_')}_{target}"
    holder.A, holder.B = a, b
    model.add_module(stem, holder)

    def changed(weight: Tensor) -> Tensor:
        update = (b @ a).to(weight.dtype) * settings.scale
        update = update.T if transposed else update
        if part is None:
            return weight + update
        place, count = part
        parts = list(weight.view(count, -1, weight.shape[-1]).unbind(0))
        parts[place] = parts[place] + update
        return torch.stack(parts).view(weight.shape)

    model.change_weight(tensor, changed)
    return [f"{stem}.A", f"{stem}.B"]
