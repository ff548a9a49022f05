"""Small checkpoints with random weights, saved by the code that training uses: what is tested without `ckpt=`."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from runner.checks.check import Outcome, passed
from runner.checks.context import Bench
from runner.data.world import generate, train_tokenizer
from runner.errors import ModelError
from runner.evaluation.base_models import Base, load_base
from runner.families.gpt import model as gpt
from runner.families.gpt import save as gpt_save
from runner.families.gpt.checkpoint import Provenance
from runner.families.gpt.layouts import read_details
from runner.families.lora.model import linear_shapes
from runner.families.lora_moe.model import LoraMoeForCausalLM
from runner.families.lora_moe.save import save_moe
from runner.families.npt.save import train_run
from runner.families.npt.settings import EquivalenceSettings
from runner.files.staging import staged
from runner.files.tensors import TensorInfo
from runner.training.language_model import save_language_model

# The built-in base: large enough that every part of a Llama with grouped queries is there, small enough to be instant.
HIDDEN, INNER, LAYERS, VOCABULARY, POSITIONS = 64, 160, 3, 512, 512
GPT = gpt.GptConfig(dialect="small", vocab_size=256, head_rows=256, num_layers=8, model_dim=128, num_scalars=40)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEP = 1


def build(bench: Bench) -> Path:
    """The path of the checkpoint, in `scratch`/built. Raises ModelError for a base that nothing can be added to."""
    root = bench.scratch / "built"
    if bench.family == "gpt":
        return _gpt(bench, root)
    base, name = _base(bench, root)
    target = root / f"checkpoint-{STEP}"
    if bench.family == "lora_moe":
        _moe(bench, base, name, target)
        return target
    return _npt(bench, base, name, root)


def built(bench: Bench) -> Outcome:
    """The checkpoint is built and saved, absent or complete, by the code that training uses."""
    path = bench.built
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    kept = f", kept in {path}" if bench.config.keep else ""
    return passed(f"{bench.family}: {len(files)} files, {size / 1e6:,.2f} MB{kept}", path=str(path), bytes=size)


def _base(bench: Bench, root: Path) -> tuple[Base, str]:
    """The base in memory, and what the checkpoint calls it."""
    if bench.config.base is not None:
        base = load_base(None, bench.config.base, bench.placement)
        return base, str(base.path.resolve())
    directory = root / "base"
    if not directory.is_dir():
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]), staged(directory) as partial:
            torch.manual_seed(bench.config.seed)
            save_language_model(LlamaForCausalLM(config), train_tokenizer(generate(0), VOCABULARY), partial)
    return load_base(None, directory, bench.placement), "../base"


def _npt(bench: Bench, base: Base, name: str, root: Path) -> Path:
    """One step of training on a few tokens, so that optimizer and scheduler states are saved too."""
    depth = getattr(base.model.config, "num_hidden_layers", 0)
    if base.model.config.model_type != "llama":
        raise ModelError(f"base={base.path}: NPT layers stand on a Llama, not on a {base.model.config.model_type}")
    settings = EquivalenceSettings(
        layers=tuple(range(max(0, depth - 2), depth)), modulation="dual", np_rank=8, num_ranks=2, max_steps=STEP,
        save_every=STEP, warmup_steps=0, batch_size=1, sequence_length=8, seed=bench.config.seed,
    )  # fmt: skip
    tokens = torch.arange(1, 9)[None].to(base.model.device)
    _, checkpoints = train_run(root, base, [tokens], settings, base_name=name)
    return checkpoints[-1]


def _moe(bench: Bench, base: Base, name: str, target: Path) -> None:
    """Experts whose B is not zero, so that a lost or exchanged one shows in the logits, and a library of skills."""
    count = bench.config.experts
    model, generator = base.model, torch.Generator().manual_seed(bench.config.seed)
    hidden = model.config.hidden_size
    r = 16 if hidden >= 256 else 4
    modules = {module: sizes for module, sizes in linear_shapes(model).items() if module.rpartition(".")[2] in TARGETS}
    if not modules:
        raise ModelError(f"{base.path}: has none of the modules {', '.join(TARGETS)} for experts to adapt")

    def random(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return tensor.to(device=model.device, dtype=model.dtype)

    experts = [
        {module: (random(r, d_in), random(d_out, r), 2.0) for module, (d_in, d_out) in modules.items()}
        for _ in range(count)
    ]
    router = random(count, hidden), torch.zeros(count, device=model.device, dtype=model.dtype)
    skills: dict[int | str, torch.Tensor] = {f"skill_{i}": random(hidden).float().cpu() for i in range(count)}
    made = LoraMoeForCausalLM(model, experts, router, top_k=1)
    save_moe(made, target, base_name=name, step=STEP, skills=skills)


def _gpt(bench: Bench, root: Path) -> Path:
    generator = torch.Generator().manual_seed(bench.config.seed)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in gpt.Gpt(GPT).named_parameters()}
    tensors = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    tensors["scalars"] = torch.rand(GPT.num_scalars, generator=generator) + 0.3
    target = root / f"checkpoint-{STEP}"
    infos = {name: TensorInfo(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()}
    details = read_details(infos, GPT.dialect, target)
    with staged(target) as partial:
        gpt_save.save(partial, tensors, details, provenance=Provenance(step=STEP))
    return target
