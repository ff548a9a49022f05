"""`task=merge` of whole models: what is written, from what, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from runner.errors import ConfigError, RunnerError
from runner.files.staging import verify
from runner.merge.spec import MergeSpec
from tests.conftest import ROOT
from tests.merge import naive
from tests.merge.mergekit_figures import CONFIG, MODELS, RECIPES, random_models, write_models
from tests.merge.moe_sources import gathered
from tests.tasks.test_merge import check

FIGURES = ROOT / "tests" / "golden" / "mergekit" / "figures.safetensors"


@pytest.fixture
def models(workdir):
    """A base and three models in directories of their names, and their tensors."""
    found = random_models()
    write_models(Path(), found)
    return found


def file(directory: str) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def hybrid(run, content, output="out", **options):
    """A mergekit file, and what comes of it."""
    Path("recipe.yml").write_text(yaml.safe_dump(content))
    words = [f"merge.{key}={value}" for key, value in options.items()]
    return run("task=merge", "merge=recipe.yml", f"merge.output={output}", *words)


def test_a_weighted_sum(run, models):
    sources = "[{path: a, weight: 0.6},{path: b, weight: 0.4}]"
    outcome = run("task=merge", "merge=linear", f"merge.sources={sources}", "merge.output=out")
    assert (outcome.code, outcome.err) == (0, "")
    result = outcome.result
    assert (result["format"], result["family"], result["how"]) == ("hf", "hf", "linear")
    assert result["verification"] == {"structure": "pass", "bytes": "pass", "functional": "skipped"}
    found = file("out")
    assert set(found) == set(models["a"])
    for name, tensor in found.items():
        assert torch.equal(tensor, naive.linear((models["a"][name], models["b"][name]), (0.6, 0.4)).float()), name
    assert verify(Path("out")) == []
    config = json.loads(Path("out/config.json").read_text())
    assert config == CONFIG
    card = Path("out/README.md").read_text()
    hashes = json.loads(Path("out/MANIFEST.json").read_text())["inputs"]
    assert set(hashes) == {f"{name}/{each}" for name in "ab" for each in ("config.json", "model.safetensors")}
    assert all(digest in card for digest in hashes.values())
    assert "computed in float64 and rounded once, to float32" in result["findings"]
    assert run("task=diff", "ckpt=out", "reference=out").result["identical"]
    assert run("task=verify", "ckpt=out").code == 0


def test_the_same_recipe_gives_the_same_bytes_random_masks_included(run, models):
    words = ("task=merge", "merge=dare_ties", "merge.base=base", "merge.sources=[{path: a, density: 0.5},b]")
    for output in ("one/x", "two/x"):
        assert run(*words, f"merge.output={output}").code == 0
    for each in Path("one/x").iterdir():
        assert each.read_bytes() == (Path("two/x") / each.name).read_bytes(), each.name
    assert run(*words, "merge.output=other", "merge.seed=1").code == 0
    assert Path("other/model.safetensors").read_bytes() != Path("one/x/model.safetensors").read_bytes()


def test_random_masks_are_those_of_the_seed_the_place_and_the_name(run, models):
    words = ("merge.base=base", "merge.sources=[{path: a, density: 0.5},{path: b, density: 0.25, weight: 2}]")
    assert run("task=merge", "merge=dare_linear", *words, "merge.output=out", "merge.seed=7").code == 0
    for name, tensor in file("out").items():
        base, a, b = (models[each][name] for each in ("base", "a", "b"))
        masks = [
            naive.drawn(model.double() - base.double(), density, f"7|{number}|{name}".encode())
            for number, (model, density) in enumerate(((a, 0.5), (b, 0.25)))
        ]
        expected = naive.task_vectors(base, (a, b), (1.0, 2.0), masks, rescale=True)
        torch.testing.assert_close(tensor, expected.float(), rtol=0, atol=0)


def test_ties_from_the_command_line(run, models):
    words = ("merge=ties", "merge.base=base", "merge.sources=[{path: a, density: 0.5},{path: b}]")
    assert run("task=merge", *words, "merge.output=out", "merge.parameters.lambda=0.9").code == 0
    for name, tensor in file("out").items():
        base, a, b = (models[each][name] for each in ("base", "a", "b"))
        masks = [naive.largest(a.double() - base.double(), 0.5), torch.ones(a.shape)]
        expected = naive.task_vectors(base, (a, b), (1, 1), masks, elect=True, normalize=True, factor=0.9)
        assert torch.equal(tensor, expected.float()), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_mergekit_makes(recipe, run, models):
    """Its own files, as they stand. It rounds to float32 after every step, which are the last bits; here it is done once."""
    figures = load_file(FIGURES)
    assert all(torch.equal(figures[f"{model}/{name}"], t) for model in MODELS for name, t in models[model].items())
    outcome = hybrid(run, {**RECIPES[recipe], "dtype": "float32"})
    assert outcome.code == 0, outcome.err
    theirs = {key.partition("/")[2]: t for key, t in figures.items() if key.startswith(f"{recipe}/")}
    ours = file("out")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        largest = (
            max(float(each[name].abs().max()) for each in models.values() if name in each)
            if name in models["a"]
            else 4.0
        )
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-6, atol=1e-6 * largest)
    if recipe == "passthrough":
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_layers_one_below_the_other_are_copies(run, models):
    sources = "[{path: a, layer_range: [0,2]},{path: b, layer_range: [1,2]}]"
    outcome = run("task=merge", "merge=passthrough", f"merge.sources={sources}", "merge.output=out")
    assert outcome.code == 0, outcome.err
    assert "equal to what the sources hold" in outcome.out
    found = file("out")
    for name in ("self_attn.q_proj.weight", "input_layernorm.weight"):
        assert torch.equal(found[f"model.layers.1.{name}"], models["a"][f"model.layers.1.{name}"])
        assert torch.equal(found[f"model.layers.2.{name}"], models["b"][f"model.layers.1.{name}"])
    assert torch.equal(found["model.embed_tokens.weight"], models["a"]["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], models["b"]["lm_head.weight"])
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 3


def test_shards_dtypes_and_other_formats_of_the_sources(run, models):
    """One source sharded in bfloat16, one a torch.save file; the output in shards of its own, in float16."""
    names = list(models["a"])
    half = {name: tensor.bfloat16() for name, tensor in models["a"].items()}
    Path("a/model.safetensors").unlink()
    for number, group in enumerate((names[:9], names[9:]), 1):
        save_file({name: half[name] for name in group}, f"a/model-0000{number}-of-00002.safetensors")
    listed = {name: f"model-0000{1 + (names.index(name) >= 9)}-of-00002.safetensors" for name in names}
    Path("a/model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    Path("b/model.safetensors").unlink()
    torch.save(models["b"], "b/pytorch_model.bin")
    words = ("merge=average", "merge.sources=[a,b]", "merge.output=out", "merge.dtype=float16", "merge.shard_size=1e-6")
    outcome = run("task=merge", *words)
    assert outcome.code == 0, outcome.err
    files = sorted(Path("out").glob("model-*.safetensors"))
    assert len(files) > 1
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    found = {name: tensor for each in files for name, tensor in load_file(each).items()}
    for name, tensor in found.items():
        assert torch.equal(tensor, naive.linear((half[name], models["b"][name]), (1, 1)).half()), name
    assert run("task=diff", "ckpt=out", "reference=a").result["only_in_ckpt"] == []
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "float16"


def test_a_tied_head(run, models):
    """Left out of one, equal to the embedding in the other: the output leaves it out."""
    for name in "ab":
        tied = {**CONFIG, "tie_word_embeddings": True}
        (Path(name) / "config.json").write_text(json.dumps(tied))
        tensors = {**models[name], "lm_head.weight": models[name]["model.embed_tokens.weight"].clone()}
        if name == "a":
            del tensors["lm_head.weight"]
        save_file(tensors, Path(name) / "model.safetensors")
    assert run("task=merge", "merge=average", "merge.sources=[a,b]", "merge.output=out").code == 0
    assert "lm_head.weight" not in file("out")


def test_another_architecture_works_by_its_names(run, workdir):
    """GPT-2's names and layouts, and buffers of whole numbers, which are copied."""
    shapes = {"transformer.wte.weight": (24, 8), "transformer.ln_f.weight": (8,)}
    shapes |= {f"transformer.h.{i}.mlp.c_fc.weight": (8, 32) for i in range(3)}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 3, "n_embd": 8, "vocab_size": 24}
    made = {}
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        made[name] = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        Path(name).mkdir()
        save_file({**made[name], "transformer.steps": torch.arange(3)}, f"{name}/model.safetensors")
        Path(name, "config.json").write_text(json.dumps(config))
    content = {
        "merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": [0, 0.5, 1]},
    }  # fmt: skip
    outcome = hybrid(run, content)
    assert outcome.code == 0, outcome.err
    found = file("out")
    for layer, t in enumerate((0, 0.5, 1)):
        name = f"transformer.h.{layer}.mlp.c_fc.weight"
        assert torch.equal(found[name], naive.slerp(made["a"][name], made["b"][name], t).float())
    assert torch.equal(found["transformer.steps"], torch.arange(3))


def test_the_logits_against_every_source(run, workdir, base):
    """The merge of a model with itself computes what it does; against another source and the base it is said how far."""
    from tests.conftest import write_base

    other = write_base(Path("other"), seed=5)
    sources = f"[{{path: {base}, weight: 1}},{{path: {other}, weight: 0}}]"
    words = ("merge=linear", f"merge.sources={sources}", "merge.output=out", "merge.verify=functional", "tier=quick")
    outcome = run("task=merge", *words)
    assert outcome.code == 0, outcome.err
    rows = outcome.result["fidelity"]
    assert [row["source"] for row in rows] == [str(base), str(other)]
    assert rows[0]["mse"] == 0
    assert rows[1]["mse"] > 0
    assert "logits against" in outcome.out
    assert all(torch.equal(t, load_file(base / "model.safetensors")[name]) for name, t in file("out").items())


def tokenizer(tokens, added=()):
    entries = [
        {"id": len(tokens) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, token in enumerate(added)
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": entries, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": "a"},
    }  # fmt: skip


@pytest.fixture
def vocabularies(models):
    """Tokens a … x in the one, in the other the last four others and in another order, and an added one."""
    letters = [chr(ord("a") + i) for i in range(24)]
    others = [*reversed(letters[:20]), "W", "X", "Y"]
    Path("a/tokenizer.json").write_text(json.dumps(tokenizer(letters)))
    Path("b/tokenizer.json").write_text(json.dumps(tokenizer(others, ["<new>"])))
    return models, letters, [*others, "<new>"]


def row(models, letters, name, token):
    return models[name]["model.embed_tokens.weight"][letters.index(token)] if token in letters else None


@pytest.mark.parametrize("rule", ["union", "base"])
def test_embeddings_are_laid_over_each_other_by_token(rule, run, vocabularies):
    models, letters, others = vocabularies
    words = ("merge=average", "merge.sources=[a,b]", "merge.output=out", f"merge.tokenizer={rule}")
    outcome = run("task=merge", *words)
    assert outcome.code == 0, outcome.err
    vocabulary = dict(json.loads(Path("out/tokenizer.json").read_text())["model"]["vocab"])
    for entry in json.loads(Path("out/tokenizer.json").read_text())["added_tokens"]:
        vocabulary[entry["content"]] = entry["id"]
    wanted = [*letters, *(["W", "X", "Y", "<new>"] if rule == "union" else [])]
    assert vocabulary == {token: number for number, token in enumerate(wanted)}
    found = file("out")["model.embed_tokens.weight"]
    assert found.shape == (len(wanted), 8)
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == len(wanted)
    for token, number in vocabulary.items():
        a, b = row(models, letters, "a", token), row(models, others, "b", token)
        a, b = (b if a is None else a), (a if b is None else b)
        assert torch.equal(found[number], ((a.double() + b.double()) / 2).float()), token
    from tokenizers import Tokenizer

    assert Tokenizer.from_file("out/tokenizer.json").encode("c b a").ids == [2, 1, 0]


REFUSED = {
    "a has model_type 'llama', other 'mistral': only models of one": ("average", ["a", "other"], {}),
    "lacking: lacks model.norm.weight, which a has": ("average", ["a", "lacking"], {}),
    "more: has model.extra.weight, which a has not": ("average", ["a", "more"], {}),
    "vocabularies of two sizes need merge.tokenizer=union or base": ("average", ["a", "wide"], {}),
    "has no tokenizer.json": ("average", ["a", "wide"], {"tokenizer": "union"}),
    "quantised weights": ("average", ["a", "quantised"], {}),
    "a is given twice": ("average", ["a", "a"], {}),
    "the weights of .* sum to 0": ("linear", [{"path": "a", "weight": 1}, {"path": "b", "weight": -1}], {}),
    "has no weight; give it for each source": ("linear", ["a", {"path": "b", "weight": 1}], {}),
    "give each source a weight": ("linear", ["a", "b", "c"], {}),
    "merge=ties is over a base: give merge.base=PATH": ("ties", ["a", "b"], {}),
    "density=1.5: give a number from 0 to 1": ("ties", [{"path": "a", "density": 1.5, "weight": 1}], {"base": "base"}),
    "density=-0.1: give a number from 0 to 1": ("ties", ["a"], {"base": "base", "parameters": {"weight": 1, "density": -0.1}}),
    "merge: weight=nan: give a number": ("ties", ["a"], {"base": "base", "parameters": {"weight": float("nan")}}),
    "normalize=2: choose true or false": ("ties", ["a"], {"base": "base", "parameters": {"weight": 1, "normalize": 2}}),
    "did you mean 'density'": ("ties", [{"path": "a", "desity": 0.5}], {"base": "base"}),
    "did you mean 'lambda'": ("ties", ["a"], {"base": "base", "parameters": {"lambada": 1}}),
    "nowhere": ("ties", ["a", "b"], {"base": "nowhere"}),
    "must lie between 0 and 1": ("della", [{"path": "a", "density": 0.95, "weight": 1}], {"base": "base"}),
    "merge=slerp takes 2 models, not 3": ("slerp", ["a", "b", "c"], {}),
    "the base must be one of the two": ("slerp", ["a", "b"], {"base": "base"}),
    "the base can be neither": ("nuslerp", ["a", "b"], {"base": "b", "parameters": {"weight": 1}}),
    "at least 2 models beside the base": ("model_stock", ["a"], {"base": "base"}),
    "merge=layers is not for whole models; choose average": ("layers", ["a", "b"], {}),
    "give each source its layers": ("passthrough", ["a", "b"], {}),
    "has the layers 0 to 1, not": ("passthrough", [{"path": "a", "layer_range": [0, 3]}], {}),
    "layer_range is for merge=passthrough": ("average", [{"path": "a", "layer_range": [0, 1]}, "b"], {}),
    "a whole model has no layers to choose": ("average", [{"path": "a", "layers": [1]}, "b"], {}),
    "merge.dtype=float8 is unknown": ("average", ["a", "b"], {"dtype": "float8"}),
    "give a number, a list of numbers": ("slerp", ["a", "b"], {"parameters": {"t": ["x"]}}),
}  # fmt: skip


@pytest.fixture
def others(models):
    """Models that fit no other."""
    for name in ("other", "lacking", "more", "wide", "quantised"):
        shutil.copytree("a", name)
    Path("other/config.json").write_text(json.dumps({**CONFIG, "model_type": "mistral"}))
    Path("quantised/config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"bits": 4}}))
    a = models["a"]
    save_file({name: t for name, t in a.items() if name != "model.norm.weight"}, "lacking/model.safetensors")
    save_file({**a, "model.extra.weight": torch.ones(2)}, "more/model.safetensors")
    wide = {name: torch.ones(25, 8) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    save_file({**a, **wide}, "wide/model.safetensors")
    Path("wide/config.json").write_text(json.dumps({**CONFIG, "vocab_size": 25}))


def test_refused_before_anything_is_written(others):
    for message, (rule, sources, options) in REFUSED.items():
        with pytest.raises(RunnerError, match=message) as error:
            gathered(sources, rule=rule, **options)
        assert "\n" not in str(error.value)


def test_refused_in_one_line(run, others, models):
    shutil.copytree("a", "nan")
    models["a"]["model.norm.weight"][3] = float("nan")
    save_file(models["a"], "nan/model.safetensors")
    before = {each: each.read_bytes() for each in Path().rglob("*") if each.is_file()}
    for words, message in (
        (("merge=average", "merge.sources=[a,nan]"), "model.norm.weight.*NaN or Inf"),
        (("merge=average", "merge.sources=[a,wide]"), "vocabularies of two sizes"),
        (("merge=nowhere.yml",), "nowhere.yml: cannot be read"),
    ):
        check(run("task=merge", *words, "merge.output=out"), message)
    left = {each: each.read_bytes() for each in Path().rglob("*") if each.is_file() and each.parts[0] != "outputs"}
    assert left == before
    assert not Path("out").exists()


FILES = {
    "trust_remote_code: code that comes with a model is never run": {"merge_method": "linear", "models": [], "trust_remote_code": True},
    "did you mean 'dtype'": {"merge_method": "linear", "models": [{"model": "a"}], "dtyp": "float32"},
    "merge_method arcee_fusion is not done here": {"merge_method": "arcee_fusion", "models": [{"model": "a"}]},
    "modules: several modules in one model is not done here": {"merge_method": "linear", "modules": {"x": {}}},
    "chat_template: a chat template of its own": {"merge_method": "linear", "models": [{"model": "a"}], "chat_template": "auto"},
    "a model with an adapter: merge it first": {"merge_method": "linear", "models": [{"model": "a+lora"}]},
    "give either models or slices": {"merge_method": "linear"},
    "layer_range=": {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [2, 1]}]}]},
    "tokens: a rule for one token": {"merge_method": "linear", "models": [{"model": "a"}], "tokenizer": {"tokens": {"x": {}}}},
    "takes no gamma": {"merge_method": "ties", "base_model": "base", "models": [{"model": "a", "parameters": {"gamma": 1}}]},
    "must be keys and values": ["a"],
}  # fmt: skip


def test_files_that_ask_for_more_are_refused_by_name(workdir):
    for message, content in FILES.items():
        Path("x.yml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=message):
            MergeSpec(name="x", rule="mergekit", file="x.yml").read_file()
    for text, message in (
        ("a: [", "not valid YAML"),
        ("\0", "not valid YAML"),
        ("!!python/object:x.y {}", "not valid YAML"),
    ):
        Path("x.yml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            MergeSpec(name="x", rule="mergekit", file="x.yml").read_file()
    Path("x.yml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    with pytest.raises(ConfigError, match=r"stand in x.yml; leave them out"):
        MergeSpec(name="x", rule="mergekit", file="x.yml", sources=["a"]).read_file()
