"""Makes tests/golden/mergekit/figures.safetensors: three tiny models and a base, and what mergekit makes of them.

    python tests/merge/mergekit_figures.py tests/golden/mergekit/figures.safetensors

in an environment of its own with mergekit (here 0.1.4 with transformers 4 or 5), which the tests do not need.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 24, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "hidden_act": "silu", "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip
MODELS = ("base", "a", "b", "c")


def shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape, in the order in which the library writes them."""
    found: dict[str, tuple[int, ...]] = {"lm_head.weight": (24, 8), "model.embed_tokens.weight": (24, 8)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}{name}.weight": (8,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {
            f"{prefix}mlp.{name}.weight": (8, 12) if name == "down_proj" else (12, 8)
            for name in ("down_proj", "gate_proj", "up_proj")
        }
        found |= {
            f"{prefix}self_attn.{name}.weight": (4, 8) if name in ("k_proj", "v_proj") else (8, 8)
            for name in ("k_proj", "o_proj", "q_proj", "v_proj")
        }
    return found | {"model.norm.weight": (8,)}


def random_models() -> dict[str, dict[str, torch.Tensor]]:
    """A random base, and three models that are some way from it."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    found = {"base": base}
    for name in "abc":
        found[name] = {key: t + 0.3 * torch.randn(t.shape, generator=generator) for key, t in base.items()}
    return found


def models_of(**each: dict) -> list[dict]:
    return [{"model": name, **({"parameters": given} if given else {})} for name, given in each.items()]


ALL = {"a": {"weight": 0.7}, "b": {"weight": 0.4}, "c": {"weight": -0.2}}
SPARSE = {
    "a": {"weight": 0.7, "density": [1, 0.3]},
    "b": {"weight": 0.4, "density": 0.5},
    "c": {"weight": [{"filter": "mlp", "value": -0.2}, {"value": 0.9}], "density": 0.66},
}
RECIPES = {
    "linear": {"merge_method": "linear", "models": models_of(**ALL)},
    "linear_sum": {"merge_method": "linear", "models": models_of(**ALL), "parameters": {"normalize": False}},
    "slerp": {
        "merge_method": "slerp", "base_model": "a", "models": models_of(a={}, b={}),
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5]}, {"filter": "mlp", "value": [1, 0.3]}, {"value": 0.4}]},
    },
    "nuslerp": {"merge_method": "nuslerp", "models": models_of(a={"weight": 0.6}, b={"weight": 0.9})},
    "nuslerp_base": {
        "merge_method": "nuslerp", "base_model": "base", "models": models_of(a={"weight": 0.6}, b={"weight": 0.9}),
    },
    "nuslerp_columns": {
        "merge_method": "nuslerp", "models": models_of(a={"weight": 0.6}, b={"weight": 0.9}),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic", "base_model": "base", "models": models_of(**ALL), "parameters": {"lambda": 0.9},
    },
    "ties": {"merge_method": "ties", "base_model": "base", "models": models_of(**SPARSE), "parameters": {"int8_mask": True}},
    "ties_rescaled": {
        "merge_method": "ties", "base_model": "base", "models": models_of(**SPARSE),
        "parameters": {"rescale": True, "normalize": False, "lambda": 0.8},
    },
    "dare_linear": {
        "merge_method": "dare_linear", "base_model": "base", "models": models_of(**ALL), "parameters": {"density": 1.0},
    },
    "dare_ties": {
        "merge_method": "dare_ties", "base_model": "base", "models": models_of(**ALL), "parameters": {"density": 1.0},
    },
    "della": {"merge_method": "della", "base_model": "base", "models": models_of(**ALL), "parameters": {"density": 1.0}},
    "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": models_of(a={}, b={}, c={})},
    "model_stock_rows": {
        "merge_method": "model_stock", "base_model": "base", "models": models_of(a={}, b={}),
        "parameters": {"filter_wise": True},
    },
    "karcher": {"merge_method": "karcher", "models": models_of(a={}, b={}, c={})},
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 2]}]},
        ],
    },
}  # fmt: skip


def write_models(directory: Path, models: dict[str, dict[str, torch.Tensor]]) -> None:
    """Each model as a directory of its name."""
    for name, tensors in models.items():
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(CONFIG))
        save_file(tensors, directory / name / "model.safetensors", metadata={"format": "pt"})


def main(target: Path) -> None:
    """Run every recipe, and write what came of it."""
    models = random_models()
    kept = {f"{name}/{key}": tensor for name, tensors in models.items() for key, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_models(directory, models)
        for recipe, content in RECIPES.items():
            (directory / f"{recipe}.yml").write_text(yaml.safe_dump({**content, "dtype": "float32"}))
            words = [
                "mergekit-yaml",
                f"{recipe}.yml",
                f"out_{recipe}",
                "--no-copy-tokenizer",
                "--no-write-model-card",
                "--quiet",
            ]
            subprocess.run(words, cwd=directory, check=True)
            written = sorted((directory / f"out_{recipe}").glob("*.safetensors"))
            kept |= {f"{recipe}/{key}": tensor for file in written for key, tensor in load_file(file).items()}
            print(recipe, len(written))
    save_file({key: tensor.contiguous() for key, tensor in kept.items()}, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
