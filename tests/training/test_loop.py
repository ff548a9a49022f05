"""The loop by itself: precision, skipped steps, evaluations and the best checkpoint, what ends it; and new weights."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from runner.errors import ConfigError, DivergedError, RunnerError
from runner.families.npt import EquivalenceSettings, TrainSettings
from runner.families.npt.curriculum import from_state, parse, stage_at, to_state
from runner.families.npt.model import NptLlamaForCausalLM
from runner.families.npt.training import Layers, in_memory, layer_loop
from runner.families.npt.training_start import initial_updates
from runner.training.loop import Evaluation, Loop, take_steps
from runner.training.optimization import warmup_and_cosine
from runner.training.precision import Precision, precision_over
from runner.training.sources import Ordered

CPU = torch.device("cpu")


def quadratic(settings: EquivalenceSettings, directory: Path, **options) -> Loop:
    """A loop that brings one number to zero; a checkpoint is a file."""
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)

    def save(step, state):
        path = directory / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "state.json").write_text(json.dumps({"step": state["global_step"], "best": state["best_val_loss"]}))
        return path

    return Loop(
        settings=settings, parameters=[weight], optimizer=optimizer, schedule=LambdaLR(optimizer, lambda step: 1.0),
        source=Ordered(lambda start: iter(range(start, 1000))), losses=lambda batch, step: {"loss": (weight**2).sum()},
        save=save, **options,
    )  # fmt: skip


def settings(**values) -> EquivalenceSettings:
    return EquivalenceSettings(
        **{"layers": (1,), "max_steps": 10, "save_every": 5, "warmup_steps": 0, "seed": 1, **values}
    )


def test_the_best_checkpoint_is_linked_and_those_that_were_only_that_are_removed(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 0.5, 4.0])
    found = quadratic(
        settings(eval_every=2, save_every=100),
        tmp_path,
        evaluate=lambda step: Evaluation(figures={}, score=next(scores)),
    ).run()
    assert (tmp_path / "best").readlink() == Path("checkpoint-8")
    assert found.best == tmp_path / "checkpoint-8"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best", "checkpoint-10", "checkpoint-8"]
    assert found.checkpoints == [tmp_path / "checkpoint-8", tmp_path / "checkpoint-10"]
    assert json.loads((tmp_path / "checkpoint-10" / "state.json").read_text()) == {"step": 10, "best": 0.5}


def test_an_evaluation_may_end_it(tmp_path):
    found = quadratic(
        settings(eval_every=3), tmp_path, evaluate=lambda step: Evaluation(figures={}, score=1.0, stop=step == 6)
    ).run()
    assert (found.step, found.interrupted) == (6, False)
    assert (tmp_path / "checkpoint-6").is_dir()


def test_an_evaluation_leaves_the_random_state(tmp_path):
    drawn = []
    for draws in (0, 5):
        torch.manual_seed(3)
        quadratic(
            settings(eval_every=1), tmp_path / str(draws),
            evaluate=lambda step, n=draws: Evaluation(figures={"x": torch.rand(n).sum().item()}, score=1.0),
        ).run()  # fmt: skip
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_full_disk_names_the_last_good_checkpoint(tmp_path):
    loop = quadratic(settings(), tmp_path)
    keep = loop.save

    def save(step, state):
        if step == 10:
            raise RunnerError(f"{tmp_path}/checkpoint-10: not written: [Errno 28] No space left on device")
        return keep(step, state)

    object.__setattr__(loop, "save", save)
    with pytest.raises(
        RunnerError, match=r"No space left on device; the last good checkpoint is .*checkpoint-5$"
    ) as raised:
        loop.run()
    assert raised.value.exit_code == 1


def test_steps_that_overflow_are_skipped_and_not_counted():
    """The scaled gradient of the first batch is Inf until the scale is 2; then the step is taken with it."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    precision = Precision("fp16", CPU)
    factors = iter([1e38, 1.0])
    taken = list(
        take_steps(
            range(1, 3), [weight], [(optimizer, LambdaLR(optimizer, lambda step: 1.0))], lambda: next(factors),
            lambda batch, step: {"loss": (weight * batch).sum()}, clip=1.0, precision=precision,
        )
    )  # fmt: skip
    assert [(step, figures.get("skipped", 0)) for step, figures in taken] == [(1, 15), (2, 0)]
    assert taken[1][1]["gradient_norm"] == pytest.approx(1.0)
    assert optimizer.state[weight]["step"] == 2
    assert weight.dtype == optimizer.state[weight]["exp_avg"].dtype == torch.float32


def test_gradients_are_multiplied_before_they_are_clipped():
    def after(factor, clip):
        weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        steps = take_steps(
            [1], [weight], [(optimizer, LambdaLR(optimizer, lambda step: 1.0))], lambda: None,
            lambda batch, step: {"loss": (weight**2).sum() / 2}, clip=clip, factor=factor,
        )  # fmt: skip
        return next(steps)[1]["gradient_norm"], (torch.tensor([3.0, 4.0]) - weight).norm().item()

    assert after(1.0, 100.0) == pytest.approx((5.0, 5.0))
    assert after(2.5, 100.0) == pytest.approx((5.0, 12.5))
    assert after(2.5, 0.5) == pytest.approx((5.0, 0.5), rel=1e-5)


def test_accumulated_batches_give_the_step_of_one(base, batches):
    """Two micro-batches of one row each against both rows at once."""
    ids = batches[1]
    weights = []
    for rows, accumulation in (([ids], 1), ([ids[:1], ids[1:]], 2)):
        own = settings(
            layers=(0, 2),
            np_rank=3,
            num_ranks=2,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            direct_loss="mse",
        )
        model = NptLlamaForCausalLM(base, initial_updates(base.config, own))
        layers = Layers(model=model, settings=own, precision=Precision("float32", CPU))
        own = layer_loop(layers, in_memory(rows, 0))()
        weights.append(torch.cat([p.detach().flatten() for p in layers.parameters()]))
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_as_float32_does(base, batches, precision):
    losses = {}
    for name in ("float32", precision):
        own = settings(layers=(0, 2), np_rank=3, num_ranks=2, precision=name, max_steps=50, learning_rate=3e-3)
        model = NptLlamaForCausalLM(base, initial_updates(base.config, own))
        layers = Layers(model=model, settings=own, precision=precision_over(model.dtype, name, CPU))
        kept, seen = {}, []
        layer_loop(
            layers, in_memory(batches, 0), on_step=lambda step, figures, seen=seen: seen.append(figures["loss"]),
            save=lambda step, state, kept=kept: (kept.update(state), Path("x"))[1],
        )()  # fmt: skip
        losses[name] = seen
        assert {p.dtype for p in layers.parameters()} == {torch.float32}
        entries = kept["optimizer_state_dict"]["state"].values()
        assert {entry[n].dtype for entry in entries for n in ("exp_avg", "exp_avg_sq")} == {torch.float32}
        assert (kept["scaler_state_dict"] is not None) == (name == "fp16")
    for one, other in zip(losses["float32"], losses[precision], strict=True):
        assert other == pytest.approx(one, rel=0.02)
    assert losses[precision] != losses["float32"]


def test_a_base_in_half_precision_is_trained_over_in_that():
    assert precision_over(torch.bfloat16, "auto", CPU).name == "bf16"
    assert precision_over(torch.float32, "bf16", CPU).name == "bf16"
    with pytest.raises(ConfigError, match=r"train\.precision=float32 needs a base that is as exact"):
        precision_over(torch.bfloat16, "float32", CPU)
    assert settings(precision="bfloat16").precision == "bf16"


def test_the_rate_warms_up_and_falls_to_zero():
    share = warmup_and_cosine(2, 10)
    assert [share(step) for step in (0, 1, 2, 6, 10, 15)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert warmup_and_cosine(0, 4)(0) == 1


def test_a_loss_that_is_not_finite_is_no_overflow():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([weight])
    steps = take_steps(
        [1], [weight], [(optimizer, LambdaLR(optimizer, lambda step: 1.0))], lambda: None,
        lambda batch, step: {"loss": (weight * float("nan")).sum()}, clip=1.0, precision=Precision("fp16", CPU),
    )  # fmt: skip
    with pytest.raises(DivergedError, match="no longer finite at step 1"):
        next(steps)


def test_stages_by_step():
    stages = parse("teacher:2, mixed:3:0.2-0.8:0.5,student:4")
    assert [stages[stage_at(stages, step)].name for step in (1, 2, 3, 5, 6, 9, 50)] == [
        "teacher", "teacher", "mixed", "mixed", "student", "student", "student",
    ]  # fmt: skip
    assert [stages[1].ratios(step) for step in (3, 4, 5)] == [(0.2, 0.5), (0.5, 0.5), pytest.approx((0.8, 0.5))]
    assert parse("mixed:5:0.3")[0].ratios(1) == (0.3, 0.3)
    assert parse("mixed:5")[0].ratios(1) == (0.0, 0.0)
    assert parse("teacher:5:0.9")[0].ratios(1) == (0.0, 0.0)
    assert parse(from_state(to_state(stages))) == stages
    # As the original saves them.
    theirs = [
        {"name": "teacher", "until_step": 2, "mixing_ratio": 0.0},
        {"name": "mixed", "until_step": 9, "mixing_ratio": 0.5},
    ]
    assert from_state(theirs) == "teacher:2,mixed:7:0.5:0.5"


def test_layers_count_as_they_are_told():
    assert settings(layers=(5, 3, 1), layer_weights="linear").weight_of() == {5: 1.0, 3: 0.75, 1: 0.5}
    assert settings(layers=(5, 3), layer_weights=[2, 0.5]).weight_of() == {5: 2.0, 3: 0.5}
    assert TrainSettings(layers=[1], layer_weights=["uniform"]).weight_of() == {1: 1.0}


@pytest.mark.parametrize(("modulation", "k"), [("triple", 3), ("single", 1), ("single", 17)])
def test_new_weights_are_distributed_as_the_originals(base, modulation, k):
    base.config.hidden_size, base.config.intermediate_size  # noqa: B018 - d 16, f 24
    own = settings(layers=(0, 1, 2), modulation=modulation, num_ranks=k, np_rank=8, init="xavier", init_scale=0.01)
    updates = initial_updates(base.config, own)
    for projections in updates.values():
        for name, update in projections.items():
            sigma = 0.005 if name == "down" else 0.01
            down, a, b = update.matrices()
            assert all(term.abs().max() <= (6 / (16 + 8)) ** 0.5 for term in down)
            assert statistics.pstdev(torch.cat(down).flatten().tolist()) == pytest.approx(
                (6 / 24) ** 0.5 / 3**0.5, rel=0.1
            )
            if k > 16:
                assert torch.stack(a).std().item() == pytest.approx(sigma, rel=0.1)
                assert torch.stack(b).std().item() == pytest.approx(0.1 * sigma, rel=0.1)
                continue
            assert max(a[0].abs().max(), b[0].abs().max()) <= sigma
            assert min(a[0].abs().max(), b[0].abs().max()) > 0.8 * sigma
            for term, gain in [(t, sigma) for t in a[1:]] + [
                (t, sigma * (0.05 if name == "down" else 0.1)) for t in b[1:]
            ]:
                assert torch.allclose(term @ term.T, gain**2 * torch.eye(8), atol=1e-3 * gain**2)
