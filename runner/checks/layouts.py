"""A tiny checkpoint of each layout that needs no torch to be written, and the checks of structure run on it."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.checks.check import FAIL, Check, Outcome, failed, passed, run_checks
from runner.checks.context import Bench
from runner.config import Format
from runner.errors import RunnerError
from runner.families.family import Auto
from runner.families.gpt import checks as structure_gpt

HIDDEN, INNER, LAYERS, VOCABULARY, RANK, EXPERTS = 8, 12, 2, 16, 2, 2
# What is taken away from each, which the checks must then miss.
LAYOUTS = {"npt_delta": "npt_weights.safetensors", "npt_full": "config.json", "lora_moe": "router.safetensors",
           "peft": "adapter_config.json", "hf": "config.json", "gpt_small": "model.safetensors",
           "gpt_medium": "model.safetensors"}  # fmt: skip


STRUCTURE = (
    "files", "config", "layout", "experts", "gate", "adapters", "blocks", "keys", "shapes", "hidden_size", "pollution",
    "size",
)  # fmt: skip


def formats(bench: Bench) -> Outcome:
    """Each layout is created, passes its checks, and does not pass them without one of its files."""
    from runner.checks.catalogue import checks_for

    problems = []
    for name, part in LAYOUTS.items():
        root = bench.scratch / "layouts" / name
        write(root, name)
        found = _failing(bench, root, checks_for)
        (root / part).unlink()
        problems += [f"{name}: {text}" for text in found]
        if not _failing(bench, root, checks_for):
            problems.append(f"{name}: nothing misses {part}")
    if problems:
        return failed("; ".join(problems), "the checks of this runner do not fit its formats: report it")
    return passed(f"{', '.join(LAYOUTS)}: created and recognised, and refused without one of their files")


def _failing(bench: Bench, root: Path, checks_for: Callable[[str | None, Iterable[str]], list[Check]]) -> list[str]:
    auto, any_format = Auto(), Format(name="auto")
    config = replace(bench.config, ckpt=str(root), base=None, family=auto, format=any_format)
    inner = Bench(config=config, context=_Silent(root), path=root, scratch=root)
    try:
        checks = checks_for(inner.family, STRUCTURE)
        if inner.look.format != root.name:
            return [f"recognised as {inner.look.format}"]
    except RunnerError as error:
        return [str(error)]
    return [row["details"] for row in run_checks(checks, inner) if row["status"] == FAIL]


class _Silent:
    """A context without a progress bar."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def track(self, items: Iterable[Any], what: str, total: int | None = None) -> Any:
        """The items as they are."""
        return iter(items)


def write(root: Path, name: str) -> None:
    """Write the layout `name` into `root`, all weights zero."""
    root.mkdir(parents=True)
    if name == "npt_delta":
        tensors: dict[str, tuple[int, ...]] = {
            f"layer_1_np.{matrix}": shape
            for matrix, shape in {"W_down": (HIDDEN, RANK), "W_a_up": (RANK, HIDDEN), "W_b_up": (RANK, INNER)}.items()
        }
        _save(root / "npt_weights.safetensors", tensors)
        _json(root / "config.json", {"model_name": "base"})
    elif name == "lora_moe":
        for i in range(EXPERTS):
            _adapter(root / "peft_adapters" / f"expert_{i}" / f"expert_{i}")
        _save(root / "router.safetensors", {"gate.weight": (EXPERTS, HIDDEN), "gate.bias": (EXPERTS,)})
        _json(root / "config.json", {"model_type": "dylora-moe", "num_experts": EXPERTS})
    elif name == "peft":
        _adapter(root)
    elif name in structure_gpt.HEAD:
        _gpt(root, name)
    else:
        _model(root, full=name == "npt_full")


def _adapter(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{module}.lora_A.weight": (RANK, HIDDEN), f"{module}.lora_B.weight": (HIDDEN, RANK)}
    _save(root / "adapter_model.safetensors", tensors)
    _json(root / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"]})


def _model(root: Path, *, full: bool) -> None:
    from runner.families.hf.checks import llama_shapes

    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "vocab_size": VOCABULARY,
    }  # fmt: skip
    tensors = llama_shapes(config)
    if full:
        prefix = "model.layers.1.adapter"
        tensors |= {f"{prefix}.A_proj.weight": (RANK, HIDDEN), f"{prefix}.B_model.weight": (HIDDEN, RANK)}
        tensors |= {f"{prefix}.B_ffn.weight": (INNER, RANK)}
    _save(root / "model.safetensors", tensors)
    _json(root / "config.json", config)


def _gpt(root: Path, name: str) -> None:
    depth = structure_gpt.MEDIUM_DEPTH if name == "gpt_medium" else structure_gpt.SMALLEST_DEPTH
    d = structure_gpt.HEAD_SIZE
    tensors = {
        f"blocks.{i}.{part}": shape
        for i in range(depth)
        for part, shape in structure_gpt.block_shapes(name, d).items()
        if i != structure_gpt.WITHOUT_ATTENTION or not part.startswith("attn.")
    }
    tensors |= dict.fromkeys((*structure_gpt.EMBEDDINGS, structure_gpt.HEAD[name]), (VOCABULARY, d))
    _save(root / "model.safetensors", {**tensors, structure_gpt.SCALARS: (5 * depth,)})


def _save(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path, metadata={"format": "pt"})


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
