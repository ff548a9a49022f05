"""`task=merge` of PEFT adapters: every result is loaded by PEFT, and adds to the weights what the sources' sum does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import RunnerError
from runner.families.lora.checkpoint import adapter_config, save_adapter
from runner.files.staging import verify
from tests.lora_files import adapter_tensors, modules_of
from tests.merge.moe_sources import gathered

MODULE = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def adapters(workdir, base):
    """Three over one base: stabilised ranks, another rank and alpha in one module, other modules."""
    made = {
        "a": ({"r": 3, "alpha": 6}, ("q_proj", "v_proj"), {"use_rslora": True}),
        "b": ({"r": 2, "alpha": 5}, ("q_proj", "v_proj"), {"rank_pattern": {MODULE: 4}, "alpha_pattern": {MODULE: 10}}),
        "c": ({"r": 2, "alpha": 2}, ("q_proj", "down_proj"), {}),
    }
    for seed, (name, (options, targets, more)) in enumerate(made.items(), 1):
        ranks = more.get("rank_pattern")
        tensors = adapter_tensors(base, options["r"], seed=seed, targets=targets, ranks=ranks)
        save_adapter(Path(name), tensors, adapter_config(base_name=str(base), target_modules=targets, **options) | more)
    return base


def weights(base, *names):
    """The base's weights after PEFT has merged each of these adapters into it, one for each name."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = []
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        merged = PeftModel.from_pretrained(model, name).merge_and_unload()
        found.append({key: value.detach().clone() for key, value in merged.state_dict().items()})
    return found


def updates(base, *names):
    plain = {key: t.double() for key, t in load_file(base / "model.safetensors").items()}
    return [{key: w[key] - plain[key] for key in plain if key in w} for w in weights(base, *names)]


def merge(run, rule, sources, *words):
    outcome = run("task=merge", f"merge={rule}", f"merge.sources=[{sources}]", "merge.output=out", *words)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.result


def test_the_sum_is_exact_at_the_sum_of_the_ranks(run, adapters):
    result = merge(run, "cat", "{path: a, weight: 0.7},{path: b, weight: -0.4},c")
    assert result["verification"]["bytes"] == "pass"
    assert verify(Path("out")) == []
    a, b, c, out = updates(adapters, "a", "b", "c", "out")
    for name, update in out.items():
        torch.testing.assert_close(update, 0.7 * a[name] - 0.4 * b[name] + c[name], rtol=1e-5, atol=1e-6)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["use_rslora"], config["rank_pattern"][MODULE]) == (False, 3 + 4 + 2)
    assert set(config["target_modules"]) == set(modules_of(adapters, ("q_proj", "v_proj", "down_proj")))


def test_linear_is_the_mean_by_weights(run, adapters):
    merge(run, "linear", "{path: a, weight: 3},b")
    a, b, out = updates(adapters, "a", "b", "out")
    for name, update in out.items():
        torch.testing.assert_close(update, 0.75 * a[name] + 0.25 * b[name], rtol=1e-5, atol=1e-6)
    assert json.loads(Path("out/adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("rank", [2, 5])
def test_svd_is_the_best_of_its_rank(rank, run, adapters):
    merge(run, "svd", "a,b", f"merge.rank={rank}")
    a, b, out = updates(adapters, "a", "b", "out")
    for name in modules_of(adapters, ("q_proj", "v_proj")):
        whole = a[f"{name}.weight"] + b[f"{name}.weight"]
        u, s, vh = torch.linalg.svd(whole)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(out[f"{name}.weight"], best, rtol=1e-4, atol=1e-5)


def test_ties_over_the_updates(run, adapters):
    from tests.merge import naive

    merge(run, "ties", "{path: a, density: 0.5},{path: b, density: 0.7}", "merge.rank=32")
    a, b, out = updates(adapters, "a", "b", "out")
    for name in (f"{module}.weight" for module in modules_of(adapters, ("q_proj", "v_proj"))):
        masks = [naive.largest(a[name], 0.5), naive.largest(b[name], 0.7)]
        expected = naive.task_vectors(
            torch.zeros_like(a[name]), (a[name], b[name]), (1, 1), masks, elect=True, normalize=True
        )
        agree = torch.isclose(out[name], expected, rtol=1e-4, atol=1e-5)
        assert agree.double().mean() > 0.99, name  # PEFT's own update is rounded: an element at the edge may fall


def test_into_the_base_is_what_peft_merges(run, adapters):
    result = merge(run, "into_base", "a")
    (merged,) = weights(adapters, "a")
    found = load_file("out/model.safetensors")
    plain = load_file(adapters / "model.safetensors")
    assert set(found) == set(plain)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), merged[name], rtol=1e-6, atol=1e-7)
        if f"{name.removesuffix('.weight')}" not in modules_of(adapters, ("q_proj", "v_proj")):
            assert torch.equal(tensor, plain[name])
    assert result["format"] == "hf"
    assert Path("out/tokenizer.json").read_bytes() == (adapters / "tokenizer.json").read_bytes()
    assert run("task=verify", "ckpt=out").code == 0


def test_refused(adapters, base):
    tensors = adapter_tensors(base, 2, seed=9, targets=("q_proj",))
    save_adapter(
        Path("wide"),
        {name: torch.ones(2, 99) if ".lora_A." in name else t for name, t in tensors.items()},
        adapter_config(base_name=str(base), r=2, alpha=2, target_modules=("q_proj",)),
    )
    for message, (rule, sources, options) in {
        "merge=slerp is not for adapters": ("slerp", ["a", "b"], {}),
        "the weights sum to 0": ("linear", [{"path": "a", "weight": 1}, {"path": "b", "weight": -1}], {}),
        "merge.rank is for svd, ties and dare": ("cat", ["a", "b"], {"rank": 4}),
        "adapters are merged with adapters": ("cat", ["a", str(base)], {}),
        "they stand on different bases": ("cat", ["a", "wide"], {}),
        "adapts model.layers.*q_proj from 99 to": ("into_base", ["wide"], {}),
        "a is given twice": ("cat", ["a", "a"], {}),
        "takes no density": ("svd", [{"path": "a", "density": 0.5}, "b"], {}),
        "is one number, not": ("cat", [{"path": "a", "weight": [0, 1]}, "b"], {}),
    }.items():
        with pytest.raises(RunnerError, match=message) as error:
            gathered(sources, rule=rule, **options)
        assert "\n" not in str(error.value)
