"""Savers and readers that lose or change something: exactly the check that should see it fails, and says what."""

import pytest
import torch
from safetensors.torch import load_file

from runner.checkpoints import model_directory as hf_save
from runner.families.gpt import save as gpt_save
from runner.families.hf import Hf
from runner.families.lora import checkpoint as adapter
from runner.families.lora_moe import model as lora_moe_model
from runner.families.lora_moe import save as lora_moe_save
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt import model as npt_model
from tests.checks.benches import bench_of, failing, rows_of, write_npt_full
from tests.conftest import MIXED, npt_tensors, write_base, write_npt
from tests.gpt_files import random_state, script_file
from tests.lora_files import adapter_of, edit_adapter, edit_tensors, write_adapter, write_moe

COPIES = ("model", "forward", "save", "router", "skills", "roundtrip", "routing", "convert")


@pytest.fixture(scope="module")
def places(tmp_path_factory, base):
    """One checkpoint of each format."""
    root = tmp_path_factory.mktemp("formats")
    narrow, gpt = write_base(root / "narrow", hidden=8), {}
    for dialect in ("small", "medium"):
        gpt[dialect] = script_file(root / f"{dialect}.pt", random_state(dialect))
    return {
        "npt_delta": write_npt(root / "npt", npt_tensors(base, MIXED), base=base),
        "lora_moe": write_moe(root / "moe", base, top_k=2),
        "one_expert": write_moe(root / "one", base, experts=1),
        "peft": write_adapter(root / "adapter", base),
        "gpt_small": gpt["small"],
        "gpt_medium": gpt["medium"],
        "hf": base,
        "npt_full": write_npt_full(root / "full", base),
        "npt_square": write_npt(root / "square", npt_tensors(base, {1: ("single", 32, 1)}), base=base),
        "moe_square": write_moe(root / "moe_square", base, experts=2, ranks=(32, 3)),
        "moe_square_router": write_moe(root / "many", narrow, experts=8, ranks=[1] * 8, alphas=[2] * 8),
    }


@pytest.mark.parametrize(
    "name", ["npt_delta", "lora_moe", "one_expert", "peft", "npt_full", "hf", "gpt_small", "gpt_medium"]
)
def test_every_saver_gives_back_the_same_model(name, places, tmp_path):
    rows = rows_of(bench_of(places[name], tmp_path / "scratch"), COPIES)
    assert {row["name"]: row["details"] for row in rows.values() if row["status"] != "pass"} == {}
    assert rows["roundtrip"]["data"] == {"max_difference": 0.0, "mean_difference": 0.0, "bit_equal": True}


def test_a_format_that_is_only_read_is_skipped(places, tmp_path, monkeypatch):
    monkeypatch.setattr(Hf, "can_save", lambda family, checkpoint: False)
    rows = rows_of(bench_of(places["hf"], tmp_path / "scratch"), COPIES)
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {"model": "pass", "forward": "pass", "save": "skipped", "roundtrip": "skipped"}
    assert rows["save"]["details"] == "hf checkpoints are read, never written"
    assert rows["roundtrip"]["details"] == "needs save"


def test_a_tied_head_and_old_buffers_are_kept_as_they_are(tmp_path):
    tied = write_base(tmp_path / "tied", tie_word_embeddings=True)
    path = write_npt_full(tmp_path / "full", tied)
    edit_tensors(path / "model.safetensors", lambda t: t | {"model.rotary_emb.inv_freq": torch.ones(4)})
    rows = rows_of(bench_of(path, tmp_path / "scratch"), COPIES)
    assert (failing(rows), rows["roundtrip"]["status"]) == ([], "pass")


def test_integrity_decides_the_exit_code(places, run, monkeypatch):
    words = ("task=test", "tier=full", f"ckpt={places['npt_full']}", "tier.new_tokens=2")
    hf_saves(monkeypatch, each(lambda t: t * 1.01, lambda name, tensor: "B_ffn" in name))
    outcome = run(*words)
    assert (outcome.code, outcome.result["overall"]) == (1, "NOT_READY")
    assert [row["name"] for row in outcome.result["checks"] if row["status"] == "fail"] == ["roundtrip"]


def without(tensors, index=0):
    """All but one of the tensors."""
    dropped = sorted(tensors)[index]
    return {name: tensor for name, tensor in tensors.items() if name != dropped}


def each(change, wanted=lambda name, tensor: True):
    """A function from tensors to tensors that changes the wanted ones."""

    def apply(tensors):
        chosen = [name for name, tensor in tensors.items() if wanted(name, tensor)]
        assert chosen, f"nothing to change among {sorted(tensors)[:4]}"
        return {name: change(tensor) if name in chosen else tensor for name, tensor in tensors.items()}

    return apply


def is_square(name, tensor):
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]


def exchanged(first, second):
    """The tensors whose names hold `first` and `second` change places."""

    def apply(tensors):
        names = {name: name.replace(first, "\0").replace(second, first).replace("\0", second) for name in tensors}
        assert any(name != other for name, other in names.items())
        return {name: tensors[other] for name, other in names.items()}

    return apply


def npt_saves(patch, change):
    real = npt_delta.save
    patch.setattr(npt_delta, "save", lambda directory, tensors, **rest: real(directory, change(tensors), **rest))


def hf_saves(patch, change):
    real = hf_save.save
    patch.setattr(hf_save, "save", lambda directory, tensors, **rest: real(directory, change(tensors), **rest))


def gpt_saves(patch, change, suffix=".pt"):
    real = gpt_save.save

    def save(directory, tensors, details, *, weights_file="model.pt", **rest):
        changed = change(tensors) if weights_file.endswith(suffix) else tensors
        return real(directory, changed, details, weights_file=weights_file, **rest)

    patch.setattr(gpt_save, "save", save)


def moe_saves(patch, **changes):
    """`experts`, `router`, `skills` or `config`, as their functions change them on the way to the files."""
    real = lora_moe_save.save

    def save(directory, **parts):
        real(directory, **{name: changes[name](part) if name in changes else part for name, part in parts.items()})

    patch.setattr(lora_moe_save, "save", save)


def on_expert(index, change):
    return lambda experts: [(c, change(t)) if i == index else (c, t) for i, (c, t) in enumerate(experts)]


def on_reload(patch, module, name, change):
    """From the second call on, what a function of `module` gives is changed: a reader that errs."""
    real, calls = getattr(module, name), []

    def read(*args, **options):
        calls.append(name)
        return change(real(*args, **options)) if len(calls) > 1 else real(*args, **options)

    patch.setattr(module, name, read)


def provenance_is_lost(patch):
    patch.setattr(gpt_save, "metadata", lambda origin: {})


def adapter_alpha_is_lost(patch):
    real = adapter.save_adapter
    patch.setattr(
        adapter, "save_adapter", lambda place, tensors, config: real(place, tensors, {**config, "lora_alpha": 3})
    )


# Name → the checkpoint, what is broken, the check that must fail (and no other), and what it must say.
FAULTS = {
    "npt saver drops a tensor": (
        "npt_delta", lambda p: npt_saves(p, without), "save", "missing or unknown keys ['layer_0_np.W_a_up']",
    ),
    "npt saver drops a layer": (
        "npt_delta", lambda p: npt_saves(p, lambda t: {n: x for n, x in t.items() if "layer_1" not in n}), "save",
        "became absent",
    ),
    "npt saver transposes square matrices": (
        "npt_square", lambda p: npt_saves(p, each(lambda t: t.T, is_square)), "roundtrip", "other logits",
    ),
    "npt saver takes gate for up": (
        "npt_delta", lambda p: npt_saves(p, exchanged("_gate.", "_up.")), "roundtrip", "other logits",
    ),
    "npt saver rounds": (
        "npt_delta", lambda p: npt_saves(p, each(lambda t: t.bfloat16())), "roundtrip", "allowed 1e-05",
    ),
    "npt reader forgets the down projection": (
        "npt_delta",
        lambda p: on_reload(p, npt_model, "npt_updates", lambda u: {i: {n: x for n, x in r.items() if n != "down"} for i, r in u.items()}),
        "roundtrip", "other logits",
    ),
    "npt_full saver writes the gate before permanent updates": (
        "npt_full",
        lambda p: hf_saves(p, lambda t: t | {n: t[f"{n.partition('.mlp')[0]}.original_gate_weight"] for n in t if "gate_proj" in n}),
        "roundtrip", "other logits",
    ),
    "npt_full saver drops an adapter": (
        "npt_full", lambda p: hf_saves(p, lambda t: {n: x for n, x in t.items() if "B_ffn" not in n}), "save", "B_ffn",
    ),
    "npt_full saver writes the plain model": (
        "npt_full", lambda p: hf_saves(p, lambda t: {n: x for n, x in t.items() if "adapter" not in n}), "save",
        "No NPT layers found",
    ),
    "moe saver drops a matrix": (
        "lora_moe", lambda p: moe_saves(p, experts=on_expert(1, without)), "save", "missing or unknown keys ['experts.expert_1",
    ),
    "moe saver transposes square matrices": (
        "moe_square", lambda p: moe_saves(p, experts=on_expert(0, each(lambda t: t.T, is_square))), "roundtrip", "other logits",
    ),
    "moe saver swaps experts": (
        "lora_moe", lambda p: moe_saves(p, experts=lambda e: [e[1], e[0], e[2]]), "roundtrip", "other logits",
    ),
    "moe reader swaps experts": (
        "lora_moe", lambda p: on_reload(p, lora_moe_model, "read_experts", lambda e: (e[1], e[0], e[2])), "roundtrip", "other logits",
    ),
    "moe saver swaps the router's rows": (
        "lora_moe", lambda p: moe_saves(p, router=lambda r: (r[0].flip(0), r[1])), "router", "gate.weight differs",
    ),
    "moe saver writes the square gate transposed": (
        "moe_square_router", lambda p: moe_saves(p, router=lambda r: (r[0].T, r[1])), "router", "gate.weight differs",
    ),
    "moe saver forgets the router's bias": (
        "lora_moe", lambda p: moe_saves(p, router=lambda r: (r[0], torch.zeros_like(r[1]))), "router", "gate.bias differs",
    ),
    "moe saver forgets top_k": (
        "lora_moe", lambda p: moe_saves(p, config=lambda c: {n: v for n, v in c.items() if n != "top_k"}), "router",
        "top_k is 1 instead of 2",
    ),
    "moe saver forgets a skill": (
        "lora_moe", lambda p: moe_saves(p, skills=lambda s: {n: x for n, x in s.items() if n}), "skills",
        "holds ['1', '2'] instead of ['0', '1', '2']",
    ),
    "moe saver changes an embedding": (
        "lora_moe", lambda p: moe_saves(p, skills=lambda s: s | {1: s[1] + 1}), "skills", "embeddings of 1 differ",
    ),
    "gpt saver drops a tensor": (
        "gpt_small", lambda p: gpt_saves(p, without), "save", "missing keys ['blocks.0.attn.c_proj.weight']",
    ),
    "gpt saver transposes the projection": (
        "gpt_small", lambda p: gpt_saves(p, each(lambda t: t.T, is_square)), "roundtrip", "other logits",
    ),
    "gpt converter turns the fourth matrix": (
        "gpt_medium",
        lambda p: gpt_saves(p, each(lambda t: torch.cat([t[:3], t[3:].mT]), lambda n, t: "qkvo" in n), ".safetensors"),
        "convert", "other logits",
    ),
    "gpt converter loses the step": ("gpt_small", provenance_is_lost, "convert", "are lost"),
    "hf saver takes one layer's MLP for another's": (
        "hf", lambda p: hf_saves(p, exchanged("layers.0.mlp", "layers.1.mlp")), "roundtrip", "other logits",
    ),
    "adapter saver loses alpha": ("peft", adapter_alpha_is_lost, "roundtrip", "other logits"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_the_one_check_that_should_see_it(fault, places, tmp_path, monkeypatch):
    name, inject, expected, words = FAULTS[fault]
    inject(monkeypatch)
    rows = rows_of(bench_of(places[name], tmp_path / "scratch"), COPIES)
    assert failing(rows) == [expected]
    assert words in rows[expected]["details"]


def test_routing_is_seen_where_equal_experts_hide_it_in_the_logits(base, tmp_path):
    path = write_moe(tmp_path / "moe", base, experts=2, ranks=(3, 3))
    edit_adapter(path, 1, lambda tensors: load_file(adapter_of(path, 0) / "adapter_model.safetensors"))
    bench = bench_of(path, tmp_path / "scratch")
    reloaded = bench.reloaded
    reloaded.router.forward = lambda features: (
        -torch.nn.functional.linear(features, reloaded.router.weight, reloaded.router.bias)
    )
    rows = rows_of(bench, COPIES)
    assert failing(rows) == ["routing"]
    assert rows["roundtrip"]["data"]["bit_equal"]
    assert "go to other experts after reloading" in rows["routing"]["details"]


def test_a_difference_within_the_tolerance_is_a_warning(places, tmp_path, monkeypatch):
    npt_saves(monkeypatch, each(lambda t: t * (1 + 1e-7)))
    row = rows_of(bench_of(places["npt_delta"], tmp_path / "scratch"), COPIES)["roundtrip"]
    assert (row["status"], row["data"]["bit_equal"]) == ("warning", False)
    assert 0 < row["data"]["max_difference"] <= 1e-5
