"""Training of experts over a tiny base: it learns, leaves whole checkpoints and nothing else, and goes on bit for bit."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from runner import load
from runner.errors import CheckpointError, ConfigError, DivergedError, ModelError, RunnerError
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.families.lora_moe import callback as moe_callback
from runner.families.lora_moe.settings import MoeSettings
from runner.families.lora_moe.training import train_moe
from runner.files import staging as commit
from tests.conftest import write_base
from tests.lora_files import edit_json, hashes

IDS = torch.tensor([[5, 9, 31, 7, 250, 3, 77, 4]])
SETTINGS = MoeSettings(
    lora_r=2, lora_alpha=4, lora_dropout=0.1, target_modules=("q_proj", "down_proj"), max_steps=20, save_every=10,
    warmup_steps=2, learning_rate=5e-2, batch_size=2, sequence_length=12, balance_weight=0.5, seed=2**40,
)  # fmt: skip


def with_(**values) -> MoeSettings:
    return MoeSettings(**{**SETTINGS.__dict__, **values})


def skills() -> dict[str, list[list[int]]]:
    """Two skills, each a few patterns that can be learned; 13 rows of three lengths, 8 batches an epoch."""
    up = [[*range(start, start + 12)] for start in range(10, 80, 10)]
    down = [
        [*range(start, start - length, -1)]
        for start, length in zip(range(200, 260, 10), (9, 9, 9, 7, 7, 7), strict=True)
    ]
    return {"up": up, "down": [*down, [3]]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("models") / "base", layers=2)


@pytest.fixture(scope="module")
def base(path):
    return load_base(None, path, Placement(device="cpu"))


@pytest.fixture(scope="module")
def trained(path, base, tmp_path_factory):
    """An uninterrupted training, its directory, and the rows of its log."""
    before = hashes(path)
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    directory, rows, losses = tmp_path_factory.mktemp("training") / "run", [], []
    result = train_moe(
        directory,
        base,
        skills(),
        SETTINGS,
        base_name=str(path),
        on_step=lambda step, figures: losses.append(figures["loss"]),
        on_log=lambda step, figures: rows.append((step, figures)),
    )
    assert hashes(path) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    return result, directory, rows, losses


@torch.inference_mode()
def cross_entropy(model) -> float:
    """Mean over the rows of both skills, in nats a token."""
    rows = [torch.tensor([row]) for texts in skills().values() for row in texts if len(row) > 1]
    losses = [torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:]) for row in rows]
    return torch.stack(losses).mean().item()


def state_of(checkpoint) -> dict:
    """What training goes on from, as comparable values."""
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return {
        "moments": {(i, n): t.tolist() for i, entry in optimizer["state"].items() for n, t in entry.items()},
        "groups": optimizer["param_groups"],
        "scheduler": torch.load(checkpoint / "scheduler.pt", weights_only=True),
        "trainer": json.loads((checkpoint / "trainer_state.json").read_text()),
    }


def test_its_files_are_the_layout_and_no_merged_model(trained):
    _, directory, *_ = trained
    adapters = [
        f"peft_adapters/expert_{i}/expert_{i}/adapter_{n}" for i in (0, 1) for n in ("config.json", "model.safetensors")
    ]
    own = [
        "MANIFEST.json",
        "config.json",
        "optimizer.pt",
        "router.safetensors",
        "scheduler.pt",
        "skill_library.pt",
        "trainer_state.json",
    ]
    everything = sorted(str(file.relative_to(directory)) for file in directory.rglob("*"))
    files = [name for name in everything if (directory / name).is_file() and not name.endswith(".lock")]
    assert files == sorted(f"checkpoint-{step}/{name}" for step in (10, 20) for name in [*adapters, *own])
    assert not [name for name in everything if ".trainer-" in name or ".partial" in name]
    assert commit.verify(directory / "checkpoint-20") == []


def test_the_loss_goes_down_and_everything_that_should_learn_does(trained, path):
    result, directory, rows, losses = trained
    assert [step for step, _ in rows] == [10, 20]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    with result.model.experts(False):
        off = cross_entropy(result.model)
    assert cross_entropy(result.model) < off - 0.3  # routed as in evaluation
    assert result.figures == rows[1][1]
    assert {"cross_entropy", "balance", "use_expert_0", "use_expert_1", "grad_norm", "learning_rate"} <= rows[0][
        1
    ].keys()
    assert rows[0][1]["use_expert_0"] + rows[0][1]["use_expert_1"] == pytest.approx(1)
    for file in (
        "router.safetensors",
        *(f"peft_adapters/expert_{i}/expert_{i}/adapter_model.safetensors" for i in (0, 1)),
    ):
        early, late = (load_file(directory / f"checkpoint-{step}" / file) for step in (10, 20))
        assert all(not torch.equal(early[name], late[name]) for name in late), file


def test_a_reloaded_checkpoint_routes_and_computes_as_the_trained_model(trained):
    result, directory, *_ = trained
    again = load(directory / "checkpoint-20", device="cpu")
    with torch.inference_mode():
        one, other = result.model(IDS), again(IDS)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.router_logits, other.router_logits)
    assert torch.equal(one.expert_weights, other.expert_weights)
    assert (one.expert_weights > 0).sum(-1).unique().tolist() == [1]
    assert other.balance_loss is None


@pytest.mark.parametrize("step", [10, 16])
def test_a_resumed_training_is_the_uninterrupted_one(trained, base, path, tmp_path, step):
    """From the middle of an epoch and from its end, across the next, with dropout: the same bytes and moments."""
    _, directory, *_ = trained
    source = directory / "checkpoint-10"
    if step == 16:
        train_moe(tmp_path / "first", base, skills(), with_(save_every=8), base_name=str(path))
        source = tmp_path / "first" / "checkpoint-16"
    result = train_moe(tmp_path / "run", base, skills(), SETTINGS, base_name=str(path), resume_from=source)
    assert result.checkpoints == [tmp_path / "run" / "checkpoint-20"]
    ends = directory / "checkpoint-20", tmp_path / "run" / "checkpoint-20"
    names = ("config.json", "router.safetensors", "peft_adapters/expert_1/expert_1/adapter_model.safetensors")
    for name in names:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    one, other = map(state_of, ends)
    history = other["trainer"].pop("log_history")
    assert history == one["trainer"].pop("log_history")
    one["trainer"].pop("save_steps"), other["trainer"].pop("save_steps")
    assert one == other
    assert all(not skill.is_new for skill in result.skills)
    assert result.findings == []


def test_an_interrupt_leaves_whole_checkpoints_only(trained, base, path, tmp_path):
    """And the same training writes the same bytes."""

    def interrupt(step, figures):
        if step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_moe(tmp_path / "run", base, skills(), SETTINGS, base_name=str(path), on_step=interrupt)
    left = [entry.name for entry in (tmp_path / "run").iterdir() if not entry.name.endswith(".lock")]
    assert left == ["checkpoint-10"]
    assert commit.verify(tmp_path / "run" / "checkpoint-10") == []
    one, other = (hashes(directory / "checkpoint-10") for directory in (trained[1], tmp_path / "run"))
    assert list(one.values()) == list(other.values())


def test_a_new_skill_gets_an_entry_and_a_known_one_does_not(trained, base, path, tmp_path):
    result, directory, *_ = trained
    assert result.skills[0].similarity is None
    library = torch.load(directory / "checkpoint-20" / "skill_library.pt", weights_only=True)
    assert set(library) == {skill.name for skill in result.skills if skill.is_new}
    assert all(vector.shape == (32,) for vector in library.values())
    more = {"once more": skills()["up"], "others": [[100, 2, 100, 2, 100, 2]]}
    new = train_moe(
        tmp_path / "run", base, more, with_(max_steps=11, novelty_threshold=0.99), base_name=str(path),
        resume_from=directory / "checkpoint-10",
    )  # fmt: skip
    assert [skill.is_new for skill in new.skills] == [False, True]
    assert new.skills[0].similarity == pytest.approx(1, abs=1e-6)
    grown = torch.load(tmp_path / "run" / "checkpoint-11" / "skill_library.pt", weights_only=True)
    assert list(grown) == [*library, "others"]


def test_each_new_skill_gets_an_expert_where_that_is_asked_for(base, path, tmp_path):
    values = with_(experts="auto", novelty_threshold=0.99, max_steps=2, warmup_steps=1)
    texts = {**skills(), "up again": skills()["up"]}
    first = train_moe(tmp_path / "one", base, texts, values, base_name=str(path))
    assert [skill.is_new for skill in first.skills] == [True, True, False]
    assert first.model.names == ("expert_0", "expert_1")
    more = with_(experts="auto", max_steps=3)
    again = train_moe(tmp_path / "two", base, texts, more, base_name=str(path), resume_from=first.checkpoints[0])
    assert again.model.names == first.model.names


def test_what_differs_from_the_training_that_is_gone_on_from_is_said(trained, base, path, tmp_path):
    source = shutil.copytree(trained[1] / "checkpoint-10", tmp_path / "checkpoint-10")
    values = with_(max_steps=11, batch_size=3, learning_rate=1e-3, save_every=5)
    other = {"up": skills()["up"]}
    first = train_moe(tmp_path / "one", base, other, values, base_name=str(path), resume_from=source)
    assert [text.removeprefix("train.resume_from: ") for text in first.findings] == [
        "goes on with other data than the checkpoint's: not what one uninterrupted training would have given",
        "goes on with max_steps 11 after 20: not what one uninterrupted training would have given",
        "learning_rate stays 0.05, as the checkpoint's optimizer has it, and is not 0.001",
        "goes on with batch_size 3 after 2: not what one uninterrupted training would have given",
    ]
    (source / "MANIFEST.json").unlink()
    second = train_moe(tmp_path / "two", base, skills(), with_(max_steps=11), base_name=str(path), resume_from=source)
    assert second.findings == [
        f"train.resume_from: {source} has no MANIFEST.json: what it was trained with is not known"
    ]


def without(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def other_state(checkpoint):
    torch.save({"state": {}, "param_groups": []}, checkpoint / "optimizer.pt")


def other_library(checkpoint):
    torch.save({0: torch.ones(7)}, checkpoint / "skill_library.pt")


CANNOT_RESUME = {
    "a library of another model": (other_library, {}, ModelError, "the skill library does not fit: 0 has shape"),
    "a changed manifest": (lambda c: (c / "MANIFEST.json").write_text("{}"), {}, CheckpointError, "MANIFEST.json: damaged"),
    "no optimizer": (without("optimizer.pt"), {}, CheckpointError, "has no optimizer.pt to go on from"),
    "no trainer state": (without("trainer_state.json"), {}, CheckpointError, "has no trainer_state.json to go on"),
    "another optimizer": (other_state, {}, CheckpointError, "optimizer.pt: is no state of this training"),
    "a strange trainer state": (lambda c: edit_json(c / "trainer_state.json", strange=1), {}, CheckpointError, "is no state of the Trainer"),
    "nothing left": (None, {"max_steps": 10}, ConfigError, "at step 10 already"),
    "another rank": (None, {"lora_r": 3}, ConfigError, "it has lora_r=2, not 3; they must be the same"),
    "other experts": (None, {"experts": 3}, ConfigError, "it has experts=2, not 3; they must be the same"),
    "other modules": (None, {"target_modules": ("q_proj",)}, ConfigError, r"it has target_modules=\[.*\], not \[q_proj\]; they"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT_RESUME)
def test_what_cannot_be_gone_on_from(trained, base, path, tmp_path, case):
    change, values, error, message = CANNOT_RESUME[case]
    source = shutil.copytree(trained[1] / "checkpoint-10", tmp_path / "checkpoint-10")
    if change:
        change(source)
    with pytest.raises(error, match=message) as raised:
        train_moe(tmp_path / "run", base, skills(), with_(**values), base_name=str(path), resume_from=source)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"target_modules": ("c_attn",)}, ModelError, "no linear module c_attn; it has down_proj, gate_proj"),
        ({"learning_rate": 1e38, "max_steps": 8}, ModelError, "the loss is no longer finite at step"),
        ({"learning_rate": 1e39, "save_every": 1}, ModelError, "NaN or Inf in the weights after step"),
    ],
)
def test_what_cannot_be_trained(base, path, tmp_path, values, error, message):
    with pytest.raises(error, match=message):
        train_moe(tmp_path / "run", base, skills(), with_(**{"warmup_steps": 0, **values}), base_name=str(path))
    assert not list(tmp_path.glob("run/*"))


def spoiled(step, weights):
    """A callback that, at a step, puts other weights into the model: what a training that diverged leaves."""

    def on_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == step:
            weights(model)

    return on_step


@torch.no_grad()
def huge(model):
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.fill_(1e12)


@torch.no_grad()
def nan(model):
    model.router.weight[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (nan, "NaN or Inf in the weights after step 20, not saved"),
        (huge, "all logits are equal after step 20, not saved"),
    ],
)
def test_what_diverged_is_not_saved_and_the_last_good_checkpoint_is_named(
    base, path, tmp_path, weights, message, monkeypatch
):
    monkeypatch.setattr(moe_callback.News, "on_step_end", spoiled(20, weights))
    with pytest.raises(DivergedError, match=message) as raised:
        train_moe(tmp_path / "run", base, skills(), SETTINGS, base_name=str(path))
    assert raised.value.exit_code == 1
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["checkpoint-10"]
    assert str(raised.value).endswith(f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-10'}")
    assert commit.verify(tmp_path / "run" / "checkpoint-10") == []


def test_experts_that_are_much_worse_than_their_base_are_not_saved(trained, base):
    """On what the base itself would say, so that it can be worse."""
    model = copy.deepcopy(trained[0].model).train()
    said = IDS
    with torch.no_grad():
        for _ in range(30):
            said = torch.cat([said, base.model(said).logits[:, -1:].argmax(-1)], 1)
        said = said[:, IDS.shape[1] :]
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 30)
    with pytest.raises(
        DivergedError, match=r"after step 7 the cross-entropy is \d+\.\d\d nats a token, without the experts"
    ):
        moe_callback.require_learning(model, said, 7)
    moe_callback.require_learning(trained[0].model, said, 7)
    assert model.training
    assert model.experts_on


def test_no_text_and_a_directory_in_the_way(base, path, tmp_path):
    with pytest.raises(ConfigError, match="no text to train on"):
        train_moe(tmp_path / "run", base, {"none": [[3]]}, SETTINGS, base_name=str(path))
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    with pytest.raises(RunnerError, match="checkpoint-10"):
        train_moe(tmp_path / "run", base, skills(), SETTINGS, base_name=str(path))
