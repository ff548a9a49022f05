"""Tiny adapters and lora_moe checkpoints with random weights, and how they become models."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from runner.checkpoints.checkpoint import Listing
from runner.evaluation.base_models import load_base
from runner.families.lora import checkpoint as peft_adapter
from runner.families.lora.checkpoint import adapter_config, check_fit, key, read_factors, save_adapter
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe import save as lora_moe_save
from runner.families.lora_moe.checkpoint import check_base, read_experts, read_router
from runner.families.lora_moe.model import LoraForCausalLM, LoraMoeForCausalLM

TARGETS = ("q_proj", "v_proj", "down_proj")


def modules_of(base: Path, targets=TARGETS, layers: list[int] | None = None) -> dict[str, tuple[int, int]]:
    """The modules of a base of conftest that `targets` name, with (inputs, outputs)."""
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, narrow), "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    return {
        f"model.layers.{layer}.{name}": size
        for layer in (range(config["num_hidden_layers"]) if layers is None else layers)
        for name, size in sizes.items()
        if name.rpartition(".")[2] in targets
    }


def adapter_tensors(base: Path, r: int, *, seed: int, targets=TARGETS, layers=None, ranks=None) -> dict:
    """Random A and B under PEFT's names, large enough to change the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (d_in, d_out) in modules_of(base, targets, layers).items():
        rank = (ranks or {}).get(module, r)
        tensors[key(module, "A")] = torch.randn(rank, d_in, generator=generator) * 0.2
        tensors[key(module, "B")] = torch.randn(d_out, rank, generator=generator) * 0.2
    return tensors


def write_adapter(
    directory: Path, base: Path, *, r=3, alpha=6, seed=0, targets=TARGETS, layers=None, ranks=None, **config
):
    """A plain adapter directory; `config` overrides fields of adapter_config.json."""
    values = {**adapter_config(base_name=str(base), r=r, alpha=alpha, target_modules=targets), **config}
    save_adapter(directory, adapter_tensors(base, r, seed=seed, targets=targets, layers=layers, ranks=ranks), values)
    return directory


def router_of(base: Path, experts: int, *, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """A random router: weight [E, d], bias [E]."""
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, hidden, generator=generator) * 0.3, torch.randn(experts, generator=generator) * 0.3


def write_moe(directory: Path, base: Path, *, experts=3, top_k=None, ranks=(3, 3, 2, 3), alphas=(6, 6, 5, 6)) -> Path:
    """A lora_moe checkpoint, written by the writer that training uses."""
    hidden = router_of(base, experts)[0].shape[1]
    lora_moe_save.save(
        directory,
        config=lora_moe_save.config(base_name=str(base), num_experts=experts, step=120, top_k=top_k),
        experts=[
            (
                adapter_config(base_name=str(base), r=ranks[i], alpha=alphas[i], target_modules=TARGETS),
                adapter_tensors(base, ranks[i], seed=20 + i),
            )
            for i in range(experts)
        ],
        router=router_of(base, experts),
        skills={i: torch.full((hidden,), float(i + 1)) for i in range(experts)},
    )
    return directory


def load_moe(path: Path, base: Path | None = None, **options) -> LoraMoeForCausalLM:
    """The checkpoint's model; `options` as for `LoraMoeForCausalLM`."""
    from runner.families.lora.model import linear_shapes

    checkpoint = lora_moe.read(Listing.of(path)).open()
    found = load_base(checkpoint, base)
    place = {"dtype": found.model.dtype, "device": found.model.device}
    check_base(checkpoint, linear_shapes(found.model), found.model.config.hidden_size, found.path)
    settings = {"top_k": checkpoint.details.top_k, "temperature": checkpoint.details.temperature, **options}
    return LoraMoeForCausalLM(
        found.model, read_experts(checkpoint, **place), read_router(checkpoint, **place), **settings
    )


def load_adapter(path: Path, base: Path | None = None) -> LoraForCausalLM:
    """The base with one plain adapter."""
    from runner.families.lora.model import linear_shapes

    checkpoint = peft_adapter.read(Listing.of(path)).open()
    found = load_base(checkpoint, base)
    checkpoint.require_complete()
    check_fit(checkpoint.details, linear_shapes(found.model), found.path)
    place = {"dtype": found.model.dtype, "device": found.model.device}
    return LoraForCausalLM(found.model, [read_factors(checkpoint.details, **place)])


def adapter_of(path: Path, index: int) -> Path:
    """Where the adapter of an expert lies."""
    return path / "peft_adapters" / f"expert_{index}" / f"expert_{index}"


def edit_json(path: Path, **values) -> None:
    """Change fields of a JSON file; "absent" removes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


def edit_tensors(path: Path, change) -> None:
    """Write the tensors of a safetensors file again, as `change` makes them."""
    tensors = load_file(path)
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, path)


def edit_adapter(path: Path, index: int, change) -> None:
    """`edit_tensors` on the weights of an expert."""
    edit_tensors(adapter_of(path, index) / "adapter_model.safetensors", change)


def hashes(path: Path) -> dict:
    """The SHA-256 of every file below `path`."""
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.rglob("*")) if file.is_file()}


def older(path: Path) -> None:
    """Turn a checkpoint into the older layout: config, router and skills in dylo_moe_state/."""
    state = path / "dylo_moe_state"
    state.mkdir()
    gate = {name.removeprefix("gate."): t for name, t in load_file(path / "router.safetensors").items()}
    values = {"num_experts": 3, "input_size": 32, "top_k": 1, "temperature": 2.0}
    torch.save({"gate_state_dict": gate, **values}, state / "router.pt")
    (path / "router.safetensors").unlink()
    (path / "skill_library.pt").rename(state / "skill_library.pt")
    config = json.loads((path / "config.json").read_text())
    old = {"model_name": config["base_model_name_or_path"], "num_experts": 3, "lora_r": 3, "lora_alpha": 6}
    (state / "config.json").write_text(json.dumps(old))
    (path / "config.json").unlink()
