"""What a script's text says: features of scripts that nobody published, numbers that no tensor holds, contradictions."""

import pytest
import torch

import runner
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError
from runner.evaluation.placement import Placement
from runner.families.gpt import Gpt, script
from runner.families.gpt.records import RECORDS
from runner.files.tensors import TensorSource
from tests.gpt_files import record_file, record_state, script_file
from tests.shard_files import write_shard

# Lines as scripts have them, by record.
LINES = {
    "2024-11-03_UntieEmbed": ["Rotary(dim, base=10000)"],
    "2024-11-06_ShortcutsTweaks": ["Rotary(dim, base=10000)", "self.lamb = 0.5"],
    "2024-12-17_SparsifyEmbeds": ["f = (1 / 1024) ** x", "logits = 30 * torch.tanh(logits / 30)"],
    "2025-01-13_Fp8LmHead": ["f = (1 / 1024) ** x", "logits = 30 * torch.sigmoid(logits / 7.5)"],
    "2025-02-01_RuleTweak": ["f = (1 / 1024) ** x", "logits = 30 * torch.sigmoid(logits.float() / 7.5)"],
    "2025-05-24_StableTorch": ["f = (1 / 1024) ** x", "logits = 30 * torch.sigmoid(logits / (7.5 * x.size(-1)**0.5))"],
    "2025-09-05_SkipMLPBlocks": ["f = (1 / 1024) ** x", "logits = 30 * torch.sigmoid(logits / 7.5)"],
    "2025-09-10_Yarn": ["f = (1/1024)**x", "logits = 30 * torch.sigmoid(logits / 7.5)", "def apply_yarn(a, b): ..."],
    "2025-09-11_VectSigmoidBFloat16": [
        "f = (1/1024)**x", "logits = 30 * torch.sigmoid(logits / 7.5)", "def apply_yarn(a, b): ...",
        "gate = torch.sigmoid(skip_weights[i - n])",
    ],
    "2025-10-04_Backout": [
        "f = (1/1024)**x", "logits = 30 * torch.sigmoid(logits / 7.5)", "class Yarn: ...", "torch.sigmoid(skip_weights)",
        "range(1, len(self.blocks))", "backout_layer = 8",
    ],
    "2025-11-18_RefineSkip": [
        "f = (1/1024)**x", "logits = 30 * torch.sigmoid(logits / 7.5)", "class Yarn: ...", "torch.sigmoid(skip_weights)",
        "range(1,len(self.blocks))", "backout_layer = 8", "skip_out = [7]",
    ],
    "2026-01-24_ImprovedLMHead": [
        "f = (1/1024)**x", "f.repeat_interleave(2)", "logits = 23 * torch.sigmoid((logits + 5) / 7.5)", "class Yarn: ...",
        "torch.sigmoid(skip_lambda)", "k[:, 1:, :, self.head_dim // 2:] = k", "paired_head_layers = [0, 2, 5, 9]",
        "backout_layer = 7",
    ],
    "2026-02-03_VeTuned": [
        "f = (1/1024)**x", "f.repeat_interleave(2)", "logits = 23 * torch.sigmoid((logits + 5) / 7.5)", "class Yarn: ...",
        "torch.sigmoid(skip_lambda)", "k[:, 1:, :, self.head_dim // 2:] = k", "paired_head_layers = [0, 2, 5, 9]",
        "backout_layer = 7", "gate(torch.cat([x[..., :6], ve[..., :6]], -1))",
    ],
    "2026-06-11_RecursiveFromBest": [
        "f = (1/1024)**x", "f.repeat_interleave(2)", "logits = 23 * torch.sigmoid((logits + 5) / 7.5)", "class Yarn: ...",
        "torch.sigmoid(skip_lambda)", "k[:, 1:, :, self.head_dim // 2:] = k", "paired_head_layers = [0, 5]",
        "gate(torch.cat([x[..., :6], ve[..., :6]], -1))",
    ],
}  # fmt: skip
LINES["2026-07-13_PrefixTokenPrediction"] = [
    line.replace("[0, 5]", "[0, 2, 5, 9]") for line in LINES["2026-06-11_RecursiveFromBest"]
]


def text(name, *more):
    """A whole script of a record, its caps in comments too; heads of 8."""
    lines = [*LINES[name], "head_dim=8", "x = 1  # 15 * torch.tanh(x)", *more]
    return "class GPT(nn.Module):\n" + "".join(f"    {line}\n" for line in lines)


@pytest.mark.parametrize("name", LINES)
def test_features_tell_records_apart(name, tmp_path):
    path = record_file(tmp_path / "a.pt", name, record_state(name), code=text(name))
    details = open_checkpoint(path).details
    assert (details.record.name, details.found_by) == (name, "features")


def test_a_part_of_a_script_denies_nothing(tmp_path):
    state = record_state("2025-01-13_Fp8LmHead")
    path = script_file(tmp_path / "a.pt", state, code="head_dim=8\nlogits = 30 * torch.sigmoid(logits / 7.5)")
    assert open_checkpoint(path).details.record.name == "2025-01-13_Fp8LmHead"


def test_kernels_after_the_script_are_not_the_script():
    kernels = f"\n\n{'-' * 40}\n# triton_kernels.py\n{'-' * 40}\n\n15 * torch.tanh(x)\n"
    found = script.read(text("2025-01-13_Fp8LmHead") + kernels)
    assert found.features["cap"] == "S30"


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("2026-02-03_VeTuned", "backout_layer = 6", "backout in 6, not in 7"),
        ("2026-02-03_VeTuned", "dc_layers = [9]", "composed in 9, not nowhere"),
        ("2026-02-03_VeTuned", "paired_head_layers = [1, 2]", "paired in 1, 2, not in 0, 2, 5, 9"),
        ("2025-10-04_Backout", "logits = 15 * torch.tanh(logits / 15)", "cap T15, not S30"),
    ],
)
def test_another_number_is_refused(name, line, says, tmp_path, run):
    lines = [each for each in LINES[name] if each.split(" = ")[0] != line.split(" = ")[0]]
    code = "class GPT(nn.Module):\n" + "".join(f"    {each}\n" for each in [line, *lines, "head_dim=8"])
    path = record_file(tmp_path / "a.pt", name, record_state(name), code=code)
    outcome = run("task=inspect", f"ckpt={path}")
    assert outcome.code == 2
    assert says in outcome.err
    assert name in outcome.err
    # Who knows better says it, and is told what does not fit.
    told = run("task=inspect", f"ckpt={path}", "format=gpt_record", f"family.record={name}")
    assert told.code == 0, told.err
    assert any(says in finding for finding in told.result["findings"])
    assert (told.result["record"], told.result["record_found_by"]) == (name, "told")


@pytest.mark.parametrize(
    ("step", "yarn", "before"),
    [(0, (3,), True), (332, (3,), True), (333, (3, 7), True), (666, (3, 7), True), (667, (3, 7, 11), False),
     (999, (3, 7, 11), False), (1040, (3, 7, 11, 13), False)],
)  # fmt: skip
def test_yarn_and_the_embedding_follow_the_step(step, yarn, before, tmp_path):
    name = "2025-12-26_LogitRescale"
    code = "num_scheduled_iterations: int = 1000  # steps\nsplit_embed_frac: float = 2/3\nhead_dim=8\n23 * torch.sigmoid(z)"
    path = record_file(tmp_path / "a.pt", name, record_state(name), code=code, step=step)
    details = open_checkpoint(path).details
    assert (details.record.name, details.yarn, details.before_split) == (name, yarn, before)
    state = record_state(name)
    state["embed.weight"] = torch.zeros_like(state["embed.weight"]) if before else state["embed.weight"]
    record_file(path, name, state, code=code, step=step)
    ids = torch.arange(12)[None]
    model = Gpt().build(open_checkpoint(path), None, Placement(device="cpu"))
    assert (model(ids).logits.std(1) > 0.01).any()  # a stale embedding of zeros would give the same everywhere


def test_medium_splits_earlier(tmp_path):
    name = "medium_2025-12-31_BulkSmallTrackTransfer"
    code = "num_scheduled_iterations: int = 4700\nsplit_embed_frac: float = 2/3/4\nhead_dim=8\n"
    for step, yarn, before in [(780, (3, 7), True), (785, (3, 7, 11), False), (1175, (3, 7, 11, 13), False)]:
        path = record_file(tmp_path / "a.pt", name, record_state(name), code=code, step=step)
        details = open_checkpoint(path).details
        assert (details.yarn, details.before_split) == (yarn, before)


def test_what_is_not_known_is_said(tmp_path):
    path = record_file(tmp_path / "a.pt", "2025-12-26_LogitRescale", record_state("2025-12-26_LogitRescale"))
    checkpoint = open_checkpoint(path)
    assert any("trained to the end, with the embedding as it is stored" in finding for finding in checkpoint.findings)
    assert checkpoint.details.yarn == (3, 7, 11, 13)


def test_gates_say_the_number_of_heads(tmp_path):
    name = "2025-09-05_SkipMLPBlocks"
    path = script_file(tmp_path / "a.pt", record_state(name), code=text(name).replace("head_dim=8", ""))
    details = open_checkpoint(path).details
    assert (details.num_heads, details.head_dim_from) == (4, "tensors")
    script_file(path, record_state(name), code=text(name).replace("head_dim=8", "head_dim=16"))
    with pytest.raises(CheckpointError, match="4 heads of 16 are no width of 32"):
        open_checkpoint(path)


def test_every_tensor_is_read_once(tmp_path, monkeypatch):
    name = "2026-07-13_PrefixTokenPrediction"
    path = record_file(tmp_path / "a.pt", name, record_state(name))
    read = []
    original = TensorSource.read
    monkeypatch.setattr(TensorSource, "read", lambda self, key: (read.append(key), original(self, key))[1])
    runner.load(path, device="cpu")
    assert sorted(read) == sorted(record_state(name))


def test_documents_and_windows_from_the_command_line(tmp_path, run):
    name = "2025-09-05_SkipMLPBlocks"
    path = record_file(tmp_path / "a.pt", name, record_state(name))
    other = record_file(tmp_path / "b.pt", name, record_state(name, seed=1))
    tokens = torch.randint(40, (600,), generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "t.bin", tokens.tolist())
    words = [
        f"ckpt={path}",
        f"reference={other}",
        "data=shards",
        f"data.path={tmp_path / 't.bin'}",
        "tier.sequence_length=600",
    ]

    def loss(*more):
        outcome = run(*words, *more)
        assert outcome.code == 0, outcome.err
        return outcome.result["metrics"]["text"]["loss"]

    def own(**options):
        model = runner.load(path, device="cpu", **{f"family.{key}": value for key, value in options.items()})
        with torch.inference_mode():
            logits = model(tokens[None]).logits[0, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits, tokens[1:]))

    # Documents are told apart on shards: the script says where they begin.
    default = loss()
    assert default == pytest.approx(own(documents=True), rel=1e-6)
    assert default != pytest.approx(own(), rel=1e-4)
    assert loss("family.documents=false") == pytest.approx(own(), rel=1e-6)
    assert loss("family.documents=5") == pytest.approx(own(documents=5), rel=1e-6)
    windowed = loss("family.window=1", "family.documents=false")
    assert windowed == pytest.approx(own(window=1), rel=1e-6)
    assert windowed != pytest.approx(own(), rel=1e-4)


def test_long_sequences_are_said(tmp_path):
    model = runner.load(record_file(tmp_path / "a.pt", "2026-02-03_VeTuned", record_state("2026-02-03_VeTuned")))
    assert model.notes(384) == ()
    assert "385 tokens is longer than 384" in model.notes(385)[0]
    path = record_file(tmp_path / "b.pt", "2025-05-30_noallreduce", record_state("2025-05-30_noallreduce"))
    assert "longer than 896" in runner.load(path).notes(897)[0]
    assert runner.load(path, **{"family.window": 14}).notes(5000) == ()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"record": "2025-13"}, "family.record=2025-13 is no record"),
        ({"record": "2025"}, "could be 2025-01-04"),
        ({"documents": -1}, "family.documents=-1: true, false"),
        ({"documents": "yes"}, "family.documents=yes: true, false"),
        ({"window": 0}, "family.window=0: a number of blocks"),
        ({"window": [1, 2, 3]}, "a number of blocks of 128, [long, short], or trained"),
        ({"window": "all"}, "family.window=all"),
    ],
)
def test_settings_that_mean_nothing(options, says):
    with pytest.raises(ConfigError) as caught:
        Gpt(**options)
    assert says in str(caught.value)


def test_windows_that_a_record_does_not_have(tmp_path):
    path = record_file(tmp_path / "a.pt", "2024-11-10_UNetDoubleLr", record_state("2024-11-10_UNetDoubleLr"))
    with pytest.raises(ConfigError, match="2024-11-10_UNetDoubleLr was trained without windows"):
        runner.load(path, **{"family.window": 2, "family.record": "2024-11-10"})


def test_published_texts_are_of_records_or_known_to_be_of_none():
    unknown = {name for name in script.published().values() if name not in RECORDS}
    assert unknown == {"2026-02-16_FlattenForward_baseline", "2026-02-16_FlattenForward_prior"}
    assert len(script.published()) == 145
    digest = next(key for key, name in script.published().items() if name.endswith("_prior"))
    stand_in = f"modded-nanogpt record=2026-02-16_FlattenForward_prior sha256={digest} head_dim=8 eot=3"
    assert script.read(stand_in).unknown == "2026-02-16_FlattenForward_prior"
