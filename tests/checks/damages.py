"""Damages to tiny checkpoints of every layout: what is done, which check must see it, and what it must say."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.lora_files import adapter_of, edit_adapter, edit_json, edit_tensors

Damage = tuple[str, Callable[[Path], None], str, str]
A = "base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight"
WEIGHTS, ROUTER, ADAPTER = "npt_weights.pt", "router.safetensors", "adapter_model.safetensors"


def cut(name: str, count: int = 100):
    """The last bytes of a file are lost."""
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-count])


def text(name: str, content: str):
    """A file holds something else."""
    return lambda path: (path / name).write_text(content)


def lost(name: str):
    """A file or directory is not there."""
    return lambda path: shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()


def values(name: str, **content):
    """A JSON file says something else; "absent" takes a field away."""
    return lambda path: edit_json(path / name, **content)


def tensors(change, name: str = WEIGHTS, key: str | None = None):
    """The tensors of a weights file are others."""

    def apply(path: Path) -> None:
        file = path / name if path.is_dir() else path
        if name.endswith(".safetensors"):
            edit_tensors(file, change)
            return
        content = torch.load(file, weights_only=True)
        torch.save({**content, key: change(content[key])} if key else change(content), file)

    return apply


def without(*words: str):
    """Tensors whose names hold one of `words` are gone."""
    return lambda held: {name: t for name, t in held.items() if not any(word in name for word in words)}


def renamed(old: str, new: str):
    """`new` stands in the names where `old` stood."""
    return lambda held: {name.replace(old, new): t for name, t in held.items()}


def changed(name: str, change):
    """One tensor is another."""
    return lambda held: {**held, name: change(held[name]).contiguous()}


def gpt(change):
    """The state dict of a training script's file is another."""
    return tensors(change, key="model")


def adapter(index: int, change):
    """The weights of an expert are others."""
    return lambda path: edit_adapter(path, index, change)


def expert_config(index: int, **content):
    """An expert's adapter_config.json says something else."""
    return lambda path: edit_json(adapter_of(path, index) / "adapter_config.json", **content)


def nested_and_flat(path: Path) -> None:
    for file in adapter_of(path, 1).iterdir():
        shutil.copy(file, adapter_of(path, 1).parent)


def views_of_a_large_storage(path: Path) -> None:
    held = torch.load(path / WEIGHTS, weights_only=True)
    large = torch.zeros(1 << 18)
    name = next(iter(held))
    view = large[: held[name].numel()].view(held[name].shape)
    torch.save({**held, name: view.copy_(held[name])}, path / WEIGHTS)


def trailing_bytes(path: Path) -> None:
    file = adapter_of(path, 0) / ADAPTER
    file.write_bytes(file.read_bytes() + b"\0" * 16)


def with_states(path: Path) -> None:
    """What a trainer leaves beside the weights."""
    moments = {i: {"exp_avg": t} for i, t in enumerate(torch.load(path / WEIGHTS, weights_only=True).values())}
    torch.save({"global_step": 100, "optimizer_state_dict": {"state": moments}}, path / "training_state.pt")
    torch.save({"layers_to_train": [0, 1, 2]}, path / "multi_layer_state.pt")


def with_a_layer_of_two_sizes(path: Path) -> None:
    with_states(path)
    tensors(changed("layer_0_np.W_down", lambda w: w[:-1]))(path)


def without_a_layer(path: Path) -> None:
    with_states(path)
    tensors(without("layer_0_np"))(path)


def without_a_term(path: Path) -> None:
    with_states(path)
    tensors(lambda held: {n: t for n, t in held.items() if not (n.startswith("layer_1_np") and n.endswith(".2"))})(path)


def without_the_down_projection(path: Path) -> None:
    with_states(path)
    tensors(lambda held: {n: t for n, t in held.items() if "_down." not in n or "W_down." in n})(path)


def outputs_of_another_base(path: Path) -> None:
    for index in range(3):
        edit_adapter(path, index, changed(A.replace("lora_A", "lora_B"), lambda w: torch.cat([w, w])))


def inputs_of_another_base(path: Path) -> None:
    for index in range(3):
        edit_adapter(
            path, index, lambda t: {n: w[:, :16] if "lora_A" in n and "down" not in n else w for n, w in t.items()}
        )


def merged_model(path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(4, 4)}, path / "model.safetensors")


def flipped_bit(path: Path) -> None:
    content = bytearray((path / WEIGHTS).read_bytes())
    # Well inside the first record's numbers.
    content[len(content) // 2] ^= 1
    (path / WEIGHTS).write_bytes(bytes(content))


MOE: list[Damage] = [
    ("missing router", lost(ROUTER), "gate", "has no router"),
    ("two routers", lambda p: torch.save(load_file(p / ROUTER), p / "router.pt"), "gate", "several routers"),
    ("router pickled under another name", tensors(renamed("gate.bias", "gate.b"), ROUTER), "gate", "gate.bias"),
    ("transposed gate", tensors(changed("gate.weight", torch.t), ROUTER), "gate", "looks transposed"),
    (
        "router of another size",
        tensors(changed("gate.weight", lambda w: w[:, :16]), ROUTER),
        "hidden_size",
        "size of 16",
    ),
    ("router of fewer experts", tensors(lambda t: {n: w[:2] for n, w in t.items()}, ROUTER), "experts", "router has 2"),
    ("wrong expert count", values("config.json", num_experts=4), "experts", "config.json says 4"),
    ("missing expert", lost("peft_adapters/expert_1"), "experts", "adapters are expert_0, expert_2"),
    ("config without num_experts", values("config.json", num_experts="absent"), "config", "does not say num_experts"),
    ("num_experts as text", values("config.json", num_experts="3"), "config", "num_experts is '3'"),
    ("wrong k", values("config.json", top_k=4), "config", "top_k is 4; with 3 experts"),
    ("wrong temperature", values("config.json", temperature=0), "config", "temperature is 0"),
    ("missing config", lost("config.json"), "config", "has no config.json"),
    ("broken config", text("config.json", "{"), "config", "not valid JSON"),
    ("nested and flat", nested_and_flat, "layout", "expert_1: an adapter both flat and nested"),
    (
        "nested under another name",
        lambda p: adapter_of(p, 1).rename(p / "peft_adapters/expert_1/default"),
        "layout",
        "expert_1: no adapter",
    ),
    (
        "missing adapter config",
        lambda p: (adapter_of(p, 0) / "adapter_config.json").unlink(),
        "adapters",
        "expert_0 has no",
    ),
    ("missing adapter weights", lambda p: (adapter_of(p, 2) / ADAPTER).unlink(), "adapters", "expert_2 has no weights"),
    ("another kind of adapter", expert_config(0, peft_type="LOHA"), "adapters", "only LORA"),
    ("rank against the config", expert_config(0, r=8), "shapes", "gives it rank 8"),
    (
        "renamed key",
        adapter(0, renamed("layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.q_proj.lora_C")),
        "keys",
        "lora_C",
    ),
    ("half an adapter", adapter(0, without("lora_B")), "keys", "expert_0 lacks base_model.model.model.layers.0"),
    ("layer less", adapter(2, without("layers.1.")), "keys", "expert_2 lacks base_model.model.model.layers.1."),
    ("module less", adapter(0, without("v_proj")), "keys", "expert_0 lacks"),
    ("extra key", adapter(1, lambda t: {**t, "extra": torch.ones(2)}), "keys", "expert_1 has extra"),
    ("narrowed target modules", expert_config(1, target_modules=["q_proj", "v_proj"]), "keys", "does not ask for"),
    ("merged model added", merged_model, "pollution", "model.safetensors"),
    (
        "index of a merged model",
        text("pytorch_model.bin.index.json", "{}"),
        "pollution",
        "pytorch_model.bin.index.json",
    ),
    ("NaN in one expert", adapter(1, changed(A, lambda w: w * float("nan"))), "finite", f"experts.expert_1.{A}"),
    ("truncated adapter", lambda p: cut(ADAPTER)(adapter_of(p, 1)), "files", "truncated at byte"),
    ("trailing bytes", trailing_bytes, "files", "16 bytes after the last tensor"),
    ("LFS pointer", text(ROUTER, "version https://git-lfs.github.com/spec/v1\n"), "files", "git-LFS pointer"),
    (
        "skills of another size",
        lambda p: torch.save({0: torch.zeros(16)}, p / "skill_library.pt"),
        "skill_library",
        "of 16",
    ),
    (
        "skills that are not finite",
        lambda p: torch.save({0: torch.full((32,), float("nan"))}, p / "skill_library.pt"),
        "finite",
        "skill_library.pt: 0",
    ),
    (
        "another output size in one expert",
        adapter(1, changed(A.replace("lora_A", "lora_B"), lambda w: torch.cat([w, w]))),
        "shapes",
        "lora_B.weight is for 32 outputs, that of expert_0 for 16",
    ),
    ("another output size in every expert", outputs_of_another_base, "base", "but the base has 32 and 16"),
    ("every expert of another hidden size", inputs_of_another_base, "hidden_size", "a hidden size of 32"),
    ("skills of no kind", lambda p: torch.save([1], p / "skill_library.pt"), "skill_library", "not a dictionary"),
]
NPT: list[Damage] = [
    ("half a layer", tensors(without("layer_1_np.W_b_up_up")), "keys", "missing layer_1_np.W_b_up_up.0"),
    ("one rank-1 term less", tensors(without("layer_2_np.W_down_gate.3")), "keys", "missing layer_2_np.W_down_gate.3"),
    ("a whole layer lost", without_a_layer, "keys", "missing layers 0, which multi_layer_state.pt trains"),
    ("the last term lost everywhere", without_a_term, "keys", "missing 6 matrices: the optimizer in training_state.pt has"),
    ("a projection lost everywhere", without_the_down_projection, "keys", "missing 15 matrices"),
    ("extra key", tensors(lambda t: {**t, "extra": torch.ones(2)}), "keys", "unexpected extra"),
    ("renamed key", tensors(renamed("layer_0_np.W_down", "layer_0_np.W_dwn")), "keys", "missing layer_0_np.W_down"),
    ("no NPT layers", tensors(lambda t: {"weight": torch.ones(2)}), "keys", "No NPT layers found"),
    ("mixed widths", tensors(changed("layer_0_np.W_b_up", lambda w: w[:, :70])), "shapes", "different hidden and MLP sizes"),
    ("transposed", tensors(changed("layer_1_np.W_down_gate.0", torch.t)), "shapes", "layer_1_np.W_down_gate.0 is [4, 32]"),
    ("two ranks in a layer", tensors(changed("layer_2_np.W_a_up_down.1", lambda w: w[:1])), "shapes", "W_a_up_down.1 is [1,"),
    ("a trained layer of two sizes", with_a_layer_of_two_sizes, "shapes", "layer_0_np.W_a_up is [3, 32], where layer_0_np.W_down [31, 3] makes it [3, 31]"),
    ("transposed in a single layer", tensors(changed("layer_0_np.W_down", torch.t)), "shapes", "layer_0_np.W_down is [3, 32], where layer_0_np.W_a_up [3, 32] makes it [32, 3]"),
    ("layer beyond the base", tensors(renamed("layer_2_np", "layer_7_np")), "base", "has layer 7"),
    ("weights lost", lost(WEIGHTS), "files", "holds no weights; it holds"),
    ("weights under a key", tensors(lambda t: {"state": t}), "keys", "there is state"),
    ("whole numbers", tensors(changed("layer_0_np.W_down", lambda w: w.to(torch.int8))), "shapes", "layer_0_np.W_down is int8"),
    ("NaN", tensors(changed("layer_0_np.W_down", lambda w: w / 0)), "finite", "layer_0_np.W_down"),
    ("truncated", cut(WEIGHTS), "files", "truncated at byte"),
    ("truncated training state", cut("training_state.pt"), "files", "training_state.pt: truncated"),
    ("broken curriculum", text("multi_layer_state.pt", "[1]"), "files", "multi_layer_state.pt"),
    ("an HTML page", text(WEIGHTS, "<!doctype html><p>404"), "files", "HTML"),
    ("merged model added", merged_model, "pollution", "model.safetensors"),
    ("views of a large storage", views_of_a_large_storage, "size", "whole storages"),
    ("flipped bit", flipped_bit, "hashes", "CRC"),
    ("broken config", text("config.json", "[]"), "config", "not a JSON object"),
    ("edited config", values("config.json", learning_rate=9), "hashes", "config.json has"),
]  # fmt: skip
GPT: list[Damage] = [
    ("missing scalars", gpt(without("scalars")), "keys", "missing keys ['scalars']"),
    ("wrong block 7", gpt(lambda t: {**t, "_orig_mod.blocks.7.attn.qkv_w": torch.ones(3, 128, 128)}), "blocks", "block 7"),
    ("missing block", gpt(without("blocks.3.")), "blocks", "blocks 3 are missing"),
    ("last block less", gpt(without("blocks.7.")), "blocks", "has 7 blocks"),
    ("too few scalars", gpt(changed("_orig_mod.scalars", lambda w: w[:30])), "shapes", "scalars is [30]"),
    ("transposed MLP", gpt(changed("_orig_mod.blocks.0.mlp.c_fc.weight", torch.t)), "shapes", "blocks.0.mlp.c_fc.weight is [128"),
    ("head of another vocabulary", gpt(changed("_orig_mod.lm_head.weight", lambda w: w[:9])), "shapes", "lm_head.weight is [9"),
    ("extra key", gpt(lambda t: {**t, "_orig_mod.extra": torch.ones(2)}), "keys", "unexpected keys ['extra']"),
    ("Inf", gpt(changed("_orig_mod.embed.weight", lambda w: w / 0)), "finite", "embed.weight"),
    ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-100]), "files", "truncated at byte"),
]  # fmt: skip
MODEL = "model.safetensors"


def with_recorded_gate(held: dict) -> dict:
    return {**held, "model.layers.0.original_gate_weight": torch.ones(9, 32)}


FULL: list[Damage] = [
    ("half an adapter", tensors(without("layers.1.adapter.B_ffn"), MODEL), "keys", "missing model.layers.1.adapter.B_ffn"),
    ("missing base layer", tensors(without("layers.2.mlp.up_proj"), MODEL), "keys", "missing model.layers.2.mlp.up_proj"),
    ("extra key", tensors(lambda t: {**t, "extra": torch.ones(2)}, MODEL), "keys", "unexpected extra"),
    ("transposed adapter", tensors(changed("model.layers.0.adapter.A_proj.weight", torch.t), MODEL), "shapes", "A_proj.weight is [32, 2], where model.layers.0.adapter.B_model.weight [32, 2] makes it [2, 32]"),
    ("config of fewer layers", values("config.json", num_hidden_layers=2), "keys", "unexpected model.layers.2."),
    ("missing config", lost("config.json"), "config", "has no config.json"),
    ("config of another architecture", values("config.json", model_type="gpt2"), "config", "model_type is 'gpt2'"),
    ("recorded gate of another size", tensors(with_recorded_gate, MODEL), "shapes", "original_gate_weight is [9, 32], the gate [80, 32]"),
    ("rank against the training info", lambda p: torch.save({"adapter_config": {"r": 3}}, p / "training_info.pt"), "loading", "says rank 3"),
]  # fmt: skip
HF: list[Damage] = [
    ("missing layer", tensors(without("layers.1."), MODEL), "keys", "missing model.layers.1.input_layernorm"),
    ("config of other heads", values("config.json", num_key_value_heads=4), "shapes", "by config.json [32, 32]"),
    ("config without sizes", values("config.json", hidden_size="absent"), "config", "hidden_size is None"),
    ("config of a wild depth", values("config.json", num_hidden_layers=10**9), "config", "num_hidden_layers is 1000000000"),
    ("weights lost", lost(MODEL), "files", "holds no weights; it holds"),
    ("shards without their index", lambda p: (p / MODEL).rename(p / "model-00001-of-00002.safetensors"), "keys", "shards without their index"),
    ("whole numbers", tensors(changed("model.norm.weight", lambda w: w.to(torch.int32)), MODEL), "shapes", "model.norm.weight is int32"),
    ("two models", lambda p: torch.save({"a": torch.ones(1)}, p / "pytorch_model.bin"), "keys", "keep the one that is meant"),
    ("truncated", cut(MODEL), "files", "truncated at byte"),
]  # fmt: skip
PEFT: list[Damage] = [
    ("missing config", lost("adapter_config.json"), "adapters", "has no adapter_config.json"),
    ("rank against the config", values("adapter_config.json", r=5), "shapes", "gives it rank 5"),
    ("half an adapter", tensors(without("layers.0.self_attn.q_proj.lora_B"), ADAPTER), "keys", "lacks"),
    ("merged model added", merged_model, "pollution", "model.safetensors"),
]
TABLES = {"lora_moe": MOE, "npt_delta": NPT, "gpt": GPT, "npt_full": FULL, "hf": HF, "peft": PEFT}
