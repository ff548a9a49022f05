"""gpt_small and gpt_medium: recognised, read, written and refused by names and shapes alone."""

import argparse
import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runner.checkpoints.checkpoint import Listing
from runner.errors import CheckpointError, ConfigError
from runner.families.gpt.checkpoint import FORMATS, Provenance, provenance
from runner.families.gpt.layouts import GptDetails
from runner.families.gpt.save import WEIGHT_FILES, cut_vocabulary, save
from runner.files.file_type import sha256_of
from tests.gpt_files import BY_NAME, RECORD_OF, built, model, opened, random_state, script_file

DIALECTS = ["small", "medium"]


def as_script(path, state):
    return script_file(path / "state_step000300.pt", state)


def as_parallel(path, state):
    return script_file(path / "weights.pth", state, prefix="module._orig_mod.")


def as_bare(path, state):
    torch.save(state, path / "weights.bin")
    return path / "weights.bin"


def as_safetensors(path, state):
    return save(path, state, details_of(state), provenance=Provenance(step=300), weights_file="model.safetensors")


LAYOUTS = [as_script, as_parallel, as_bare, as_safetensors]


def details_of(state):
    """What the module must find in `random_state`'s tensors, worked out from their shapes by hand."""
    small = "lm_head.weight" in state
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    return GptDetails(
        record=RECORD_OF["small" if small else "medium"],
        vocab_size=state["embed.weight"].shape[0],
        head_rows=state["lm_head.weight" if small else "lm_head_w"].shape[0],
        num_layers=depth,
        head_dim=128,
        model_dim=state["embed.weight"].shape[1],
        num_scalars=len(state["scalars"]),
        keys=tuple(state),
    )


def sizes(details):
    names = "record vocab_size head_rows num_layers num_heads model_dim num_scalars".split()
    return {name: getattr(details, name) for name in names} | {"keys": set(details.keys)}


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("write", LAYOUTS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_layout_gives_the_same_tensors_and_sizes(dialect, write, directory, tmp_path):
    state = random_state(dialect, width=256, vocab=24, head_rows=128, scalar_padding=8 if dialect == "small" else 0)
    file = write(tmp_path, state)
    torch.save({"tokens": torch.arange(4)}, tmp_path / "expected.pt")
    before = sha256_of(file)
    listing = Listing.of(tmp_path if directory else file)
    assert [each.matches(listing) is not None for each in FORMATS] == [dialect == "small", dialect == "medium", False]
    checkpoint = BY_NAME[f"gpt_{dialect}"].open(listing)
    assert (checkpoint.format, checkpoint.family, checkpoint.path) == (f"gpt_{dialect}", "gpt", listing.path)
    assert sizes(checkpoint.details) == sizes(details_of(state))
    assert (checkpoint.details.head_rows, checkpoint.details.num_heads) == (128, 2)
    assert f"{dialect} attention in {7 if dialect == 'small' else 15} blocks" in checkpoint.evidence
    assert checkpoint.step == (None if write is as_bare else 300)
    assert checkpoint.weights.infos.keys() == state.keys()
    assert all(torch.equal(checkpoint.weights.read(name), tensor) for name, tensor in state.items())
    without_script = write in (as_bare, as_safetensors)
    assert [finding[:33] for finding in checkpoint.findings] == ["the size of a head is not said by"] * without_script
    assert sha256_of(file) == before


def test_other_files_do_not_match(checkpoint, base, tmp_path):
    torch.save({"blocks.0.attn.W_Q": torch.ones(2)}, tmp_path / "other.pt")
    for path in (checkpoint, base, tmp_path, tmp_path / "other.pt"):
        assert [each.matches(Listing.of(path)) for each in FORMATS] == [None, None, None]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_there_and_back_gives_identical_tensors(dialect, tmp_path):
    state = random_state(dialect, scalar_padding=4 if dialect == "small" else 0)
    state = {name: tensor.bfloat16() if "embed" in name else tensor for name, tensor in state.items()}
    state["blocks.0.mlp." + ("c_proj.weight" if dialect == "small" else "proj_w")] = torch.randn(512, 128).T
    code = "print('ünïcode', head_dim=128)\n" * 3
    source = opened(script_file(tmp_path / "source.pt", state, code=code, step=7, val_loss=1.2727), dialect)
    for step, name in enumerate((WEIGHT_FILES[1], WEIGHT_FILES[0], WEIGHT_FILES[1])):
        folder = tmp_path / str(step)
        folder.mkdir()
        tensors = {key: source.weights.read(key) for key in source.details.keys}
        save(folder, tensors, source.details, provenance=provenance(source.weights), weights_file=name)
        source = opened(folder, dialect)
        assert source.weights.files[0].name == name
        assert source.weights.infos.keys() == state.keys()
        for key, tensor in state.items():
            read = source.weights.read(key)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
        assert provenance(source.weights) == Provenance(step=7, val_loss=1.2727, code=code)
        assert source.findings == ()
    content = torch.load(tmp_path / "1" / "model.pt", weights_only=True)
    assert list(content) == ["step", "val_loss", "code", "model"]
    assert sha256_of(tmp_path / "0" / "model.safetensors") == sha256_of(tmp_path / "2" / "model.safetensors")


def test_saved_files_hold_no_more_than_the_tensors(tmp_path):
    state = random_state("small", layers=6)
    giant = torch.zeros(10_000, 128)
    giant[:24] = state["embed.weight"]
    state |= {"embed.weight": giant[:24], "value_embeds.0.weight": giant[:24]}
    for name in WEIGHT_FILES:
        path = save(tmp_path, state, details_of(state), provenance=Provenance(), weights_file=name)
        assert path.stat().st_size < 1.1 * sum(tensor.nbytes for tensor in state.values())
        weights = opened(path, "small").weights
        assert all(torch.equal(weights.read(key), tensor) for key, tensor in state.items())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_cutting_the_vocabulary_leaves_the_other_logits_as_they_are(dialect, tmp_path):
    state = random_state(dialect, vocab=256)
    checkpoint = opened(as_script(tmp_path, state), dialect)
    tensors, details = cut_vocabulary(state, checkpoint.details, 200)
    assert (details.vocab_size, details.head_rows) == (200, 200)
    again = opened(save(tmp_path, tensors, details, provenance=Provenance()), dialect)
    assert sizes(again.details) == sizes(details)
    ids = torch.tensor([[0, 199, 3, 77]])
    whole, cut = built(checkpoint)(ids).logits, built(again)(ids).logits
    assert cut.shape == (1, 4, 200)
    torch.testing.assert_close(cut, whole[..., :200], rtol=1e-5, atol=1e-5)
    for refused in (128, 257, 0, -1):
        with pytest.raises(ConfigError, match="give 129 to 256"):
            cut_vocabulary(state, checkpoint.details, refused)
    with pytest.raises(ConfigError, match="give 200 to 200"):
        cut_vocabulary(tensors, details, 199)


def test_cutting_a_head_that_alone_is_padded():
    state = random_state("small", vocab=24, head_rows=128)
    tensors, details = cut_vocabulary(state, details_of(state), 24)
    assert tensors["lm_head.weight"].shape == (24, 128)
    assert (details.vocab_size, details.head_rows) == (24, 24)


def test_description(tmp_path):
    state = random_state("small", layers=8, scalar_padding=8)
    state["embed.weight"] = state["embed.weight"].bfloat16()
    state["scalars"] = torch.arange(48.0)
    adam = {"state": {0: {"exp_avg": torch.zeros(5), "step": 3}, 1: {"exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": 0.1, "betas": (0.8, 0.95), "params": [0, 1]}]}  # fmt: skip
    path = script_file(tmp_path / "a.pt", state, code="exit()", optimizers=[adam, "odd"])
    found = BY_NAME["gpt_small"].describe(opened(path, "small"))
    kept = (
        "dialect vocab_size padded_vocab_size smallest_vocab_size num_layers num_heads model_dim step val_loss".split()
    )
    assert [found[name] for name in kept] == ["small", 24, 24, 24, 8, 1, 128, 300, 3.25]
    sizes = {part.pop("component"): {k: part[k] for k in ("parameters", "bytes")} for part in found["components"]}
    assert sizes == {
        "embedding": {"parameters": 24 * 128, "bytes": 24 * 128 * 2},
        "value_embeddings": {"parameters": 3 * 24 * 128, "bytes": 3 * 24 * 128 * 4},
        "attention": {"parameters": 7 * 4 * 128**2, "bytes": 7 * 4 * 128**2 * 4},
        "mlp": {"parameters": 8 * 8 * 128**2, "bytes": 8 * 8 * 128**2 * 4},
        "head": {"parameters": 24 * 128, "bytes": 24 * 128 * 4},
        "scalars": {"parameters": 48, "bytes": 48 * 4},
    }
    assert sum(size["bytes"] for size in sizes.values()) == sum(tensor.nbytes for tensor in state.values())
    assert found["code_sha256"] == hashlib.sha256(b"exit()").hexdigest()
    assert found["code_length"] == 6
    assert found["scalars"] == {
        "count": 48, "used": 40, "padding": 8,
        "values": {
            "skip": {"min": 0, "mean": 1.5, "max": 3},
            "lambda_x": {"min": 8, "mean": 15, "max": 22},
            "lambda_x0": {"min": 9, "mean": 16, "max": 23},
            "lambda_v": {"min": 24, "mean": 31, "max": 38},
            "lambda_ve": {"min": 25, "mean": 32, "max": 39},
        },
    }  # fmt: skip
    assert found["optimizers"] == [
        {
            "parameters": 2, "tensors": 2, "elements": 7, "bytes": 28,
            "groups": [{"lr": 0.1, "betas": (0.8, 0.95), "params": 2}],
        }
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "smallest"), [(512, 385), (50048, 49921), (50257, 50257)])
def test_the_vocabulary_that_was_padded(rows, smallest):
    state = random_state("small", layers=6)
    state |= {name: torch.empty(rows, 128, device="meta") for name in state if "embed" in name}
    assert details_of(state).smallest_vocab_size == smallest


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"step": 5, "val_loss": 2.5}, (5, 2.5)),
        ({"step": np.int64(5), "val_loss": np.float32(2.5)}, (5, 2.5)),
        ({"step": torch.tensor(5), "val_loss": torch.tensor(2.5)}, (5, 2.5)),
        ({"step": "late", "val_loss": None}, (None, None)),
        ({"step": True, "val_loss": float("nan")}, (None, None)),
        ({"step": argparse.Namespace(step=5), "val_loss": [2.5]}, (None, None)),
        ({"step": 10**400, "val_loss": 10**400}, (None, None)),
        ({"step": 5.0, "val_loss": 2}, (None, 2.0)),
    ],
)  # fmt: skip
def test_step_and_loss_however_they_were_saved(entries, expected, tmp_path):
    found = provenance(
        opened(script_file(tmp_path / "a.pt", random_state("small", layers=6), **entries), "small").weights
    )
    assert (found.step, found.val_loss) == expected


def test_metadata_that_is_not_ours(tmp_path):
    state = random_state("small", layers=6)
    save_file(state, tmp_path / "a.safetensors", metadata={"training": "{half"})
    with pytest.raises(CheckpointError, match="the metadata entry 'training' is not valid JSON"):
        opened(tmp_path, "small")
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt", "who": "me"})
    assert opened(tmp_path, "small").findings[0] == "beside the weights it holds who, which nothing reads"
    path = script_file(tmp_path / "b.pt", state, training="{half")
    assert opened(path, "small").step == 300


def test_entries_that_nothing_reads_are_said(tmp_path):
    path = script_file(tmp_path / "a.pt", random_state("small", layers=6), args=argparse.Namespace(lr=1), seed=3)
    assert opened(path, "small").findings == ("beside the weights it holds args, seed, which nothing reads",)


def test_a_medium_of_another_depth_needs_to_say_its_heads(tmp_path):
    state = random_state("medium", layers=12)
    checkpoint = opened(as_script(tmp_path, state), "medium")
    assert BY_NAME["gpt_medium"].describe(checkpoint)["num_layers"] == 12
    assert built(checkpoint)(torch.tensor([[3, 4]])).logits.isfinite().all()
    script_file(tmp_path / "b.pt", state, code="import torch\n")
    with pytest.raises(CheckpointError, match=r"heads of 128\) or ipa_large_lite \(heads of 64\).* family.record="):
        opened(tmp_path / "b.pt", "medium")


def without(*parts):
    return lambda state: [state.pop(name) for name in list(state) if any(part in name for part in parts)]


def put(name, *shape, dtype=torch.float32):
    return lambda state: state.update({name: torch.zeros(shape, dtype=dtype)})


def rename(old, new):
    return lambda state: state.update({new: state.pop(old)})


SMALL = [
    (without("blocks.7."), "has 7 blocks, but this architecture has an even number, at least 6"),
    (without("blocks.4.", "blocks.5.", "blocks.6.", "blocks.7."), "has 4 blocks"),
    (without("blocks.3."), "missing keys ['blocks.3.attn.c_proj.weight', 'blocks.3.attn.qkv_w', "),
    (rename("blocks.2.mlp.c_fc.weight", "blocks.2.mlp.c_fv.weight"),
     "missing keys ['blocks.2.mlp.c_fc.weight'], unexpected keys ['blocks.2.mlp.c_fv.weight']"),
    (put("lm_head.bias", 24), "missing keys [], unexpected keys ['lm_head.bias']"),
    (put("blocks.99999.mlp.c_fc.weight", 512, 128), "unexpected keys ['blocks.99999.mlp.c_fc.weight']"),
    (put("blocks.07.mlp.c_fc.weight", 512, 128), "unexpected keys ['blocks.07.mlp.c_fc.weight']"),
    (put("blocks.7.attn.qkv_w", 3, 128, 128), "block 7 of this architecture has no attention"),
    (without("scalars"), "missing keys ['scalars']"),
    (put("scalars", 39), "scalars is [39], where 8 blocks have at least 40"),
    (put("scalars", 8, 5), "scalars is [8, 5]"),
    (put("lm_head.weight", 48, 128), "lm_head.weight is [48, 128], not [24 or 128, 128]"),
    (put("lm_head.weight", 24, 256), "lm_head.weight is [24, 256]"),
    (put("value_embeds.1.weight", 25, 128), "value_embeds.1.weight is [25, 128], not [24, 128]"),
    (put("blocks.5.mlp.c_proj.weight", 512, 128), "blocks.5.mlp.c_proj.weight is [512, 128], not [128, 512]"),
    (put("blocks.5.attn.qkv_w", 4, 128, 128), "blocks.5.attn.qkv_w is [4, 128, 128], not [3, 128, 128]"),
    (put("blocks.5.attn.qkv_w", 3, 256, 128), "blocks.5.attn.qkv_w is [3, 256, 128]"),
    (put("embed.weight", 24, 100), "embed.weight is [24, 100], it must be [vocabulary, a multiple of 128]"),
    (put("embed.weight", 24), "embed.weight is [24], it must be"),
    (put("embed.weight", 0, 128), "embed.weight is [0, 128], it must be"),
    (put("embed.weight", 24, 128, dtype=torch.int8), "embed.weight: weights must be floating-point"),
    (lambda state: state.update({"note": "text"}), "unexpected keys ['note']"),
]  # fmt: skip
MEDIUM = [
    (without("blocks.15."), "has 15 blocks"),
    (put("scalars", 96), "scalars is [96], where 16 blocks have exactly 80"),
    (put("blocks.0.attn.qkvo_w", 3, 128, 128), "blocks.0.attn.qkvo_w is [3, 128, 128], not [4, 128, 128]"),
    (put("blocks.0.mlp.proj_w", 512, 128), "blocks.0.mlp.proj_w is [512, 128], not [128, 512]"),
    (rename("lm_head_w", "lm_head.weight"), "missing keys ['lm_head_w'], unexpected keys ['lm_head.weight']"),
    (put("blocks.7.attn.qkvo_w", 4, 128, 128), "unexpected keys ['blocks.7.attn.qkvo_w']; block 7 of this"),
    (without("value_embeds.2"), "missing keys ['value_embeds.2.weight']"),
]


@pytest.mark.parametrize(
    ("dialect", "change", "says"), [("small", *case) for case in SMALL] + [("medium", *case) for case in MEDIUM]
)
@pytest.mark.parametrize("bare", [False, True])
def test_models_that_do_not_fit(dialect, change, says, bare, tmp_path):
    state = random_state(dialect)
    change(state)
    path = tmp_path / "a.pt"
    if bare:
        torch.save(state, path)
    else:
        script_file(path, state, prefix="" if "note" in state else "_orig_mod.")
    assert BY_NAME[f"gpt_{dialect}"].matches(Listing.of(path))
    with pytest.raises(CheckpointError) as caught:
        opened(path, dialect)
    text = str(caught.value)
    assert says in text
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


def test_every_contradicting_shape_is_listed(tmp_path):
    state = random_state("small")
    for change in (put("blocks.5.mlp.c_proj.weight", 512, 128), put("lm_head.weight", 1, 2), put("scalars", 1)):
        change(state)
    with pytest.raises(CheckpointError) as caught:
        opened(as_script(tmp_path, state), "small")
    assert all(
        f"{name} is [" in str(caught.value) for name in ("blocks.5.mlp.c_proj.weight", "lm_head.weight", "scalars")
    )


def test_several_candidates_are_listed(tmp_path):
    for name in ("a.pt", "b.pt"):
        script_file(tmp_path / name, random_state("small", layers=6))
    assert BY_NAME["gpt_small"].matches(Listing.of(tmp_path))
    with pytest.raises(CheckpointError, match=r"several files could be meant: a\.pt, b\.pt; name one as ckpt="):
        opened(tmp_path, "small")


def test_forcing_a_format_that_is_not_there(tmp_path, checkpoint):
    path = script_file(tmp_path / "a.pt", random_state("small", layers=6))
    for place in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"a\.pt: its keys are those of format=gpt_small"):
            opened(place, "medium")
    with pytest.raises(CheckpointError, match=r"no file in it has the keys of format=gpt_small"):
        opened(checkpoint, "small")
    with pytest.raises(CheckpointError, match=r"missing keys \['embed.weight', 'lm_head.weight'"):
        opened(checkpoint / "npt_weights.pt", "small")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"no file in it has the keys of format=gpt_small; .*a\.pt: "):
        opened(tmp_path, "small")
    with pytest.raises(CheckpointError):
        opened(path, "small")


def test_tensors_of_other_sizes_are_not_saved(tmp_path):
    state = random_state("small", layers=6)
    details = details_of(state)
    without("blocks.5.")(state)
    with pytest.raises(CheckpointError, match="has 5 blocks"):
        save(tmp_path, state, details, provenance=Provenance())
    assert not list(tmp_path.iterdir())


def test_a_converted_model_gives_the_same_logits(tmp_path):
    state = random_state("small")
    converted = opened(as_safetensors(tmp_path, state), "small")
    ids = torch.tensor([[1, 5, 3]])
    assert torch.equal(built(converted)(ids).logits, model("small", state)(ids).logits)
