"""Merged optimizer states: every parameter steps on exactly as it would have alone."""

import pytest
import torch

from runner.merge.spec import MergeSpec
from runner.merge.training_state import merge_training_states
from tests.merge.sources import (
    ONE,
    THREE,
    adamw,
    layer_plan,
    parameters,
    random_like,
    same,
    second_spelling,
    state_of,
    step_with,
    weights_in,
    weights_of,
    write_source,
)


def merged(tmp_path, *paths, **options):
    """The merged training state with its tensors read, and what is said."""
    spec = MergeSpec(name="test", sources=[str(path) for path in paths], **options)
    plan = layer_plan(spec, list(paths))
    state = merge_training_states(plan.sources, plan.tensors, "training_state.pt", plan.merge_info())
    weights = {tensor.name: values(tensor.tensor) for tensor in plan.tensors}
    return weights, values(state.content), state


def values(tree):
    if hasattr(tree, "parts"):
        return torch.cat([*tree.parts(), torch.empty(0, dtype=tree.dtype)]).reshape(tree.shape).clone()
    if isinstance(tree, dict):
        return {key: values(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(values, tree))
    return tree


def resumed(weights, state, **options):
    optimizer = adamw(list(weights.values()), **options)
    optimizer.load_state_dict(state["optimizer_state_dict"])
    return optimizer


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"foreach": True}, {"weight_decay": 0.3, "betas": (0.7, 0.9)}]
)
def test_a_resumed_optimizer_steps_bit_equal_to_the_separate_ones(options, tmp_path):
    a = write_source(tmp_path / "a", {5: ("dual", 2, 3), 1: ("single", 3, 1)}, seed=1, trained=4, groups=options)
    b = write_source(tmp_path / "b", THREE, seed=2, trained=9, step=300, groups=options)
    weights, state, _ = merged(tmp_path, a, b)
    together = resumed(weights, state, **options)
    gradients = dict(zip(weights, random_like(list(weights.values()), 5), strict=True))
    for _ in range(3):
        step_with(together, list(gradients.values()))
    now = dict(zip(weights, parameters(together), strict=True))
    for source in (a, b):
        own = weights_in(source)
        alone = resumed(own, state_of(source), **options)
        for _ in range(3):
            step_with(alone, [gradients[name] for name in own])
        for name, parameter in zip(own, parameters(alone), strict=True):
            assert torch.equal(parameter, now[name]), name


def test_moments_follow_the_order_of_each_file(tmp_path):
    """A trainer that declared layer 3 before layer 1, in the other spelling: index i is its own i-th key."""
    shuffled = second_spelling(weights_of({3: ("dual", 2, 2), 1: ("triple", 2, 2)}, seed=4))
    source = write_source(tmp_path / "a", {}, weights=shuffled, seed=4)
    other = write_source(tmp_path / "b", {2: ("single", 2, 1)}, seed=6)
    weights, state, _ = merged(tmp_path, other, source)
    old = dict(zip(weights_in(source), state_of(source)["optimizer_state_dict"]["state"].values(), strict=True))
    assert next(iter(weights)).startswith("layer_1_np")
    for index, name in enumerate(weights):
        if not name.startswith("layer_2"):
            layer, rest = name.removeprefix("layer_").split("_np.")
            own = old[f"model.layers.{layer}.np_component.{rest}"]
            assert same(state["optimizer_state_dict"]["state"][index], own), name


def test_groups_are_those_of_the_furthest_and_differences_are_said(tmp_path):
    a = write_source(tmp_path / "a", ONE, step=100, groups={"lr": 1e-3})
    b = write_source(tmp_path / "b", THREE, step=300, groups={"lr": 5e-4, "eps": 1e-7})
    _, state, said = merged(tmp_path, a, b)
    (group,) = state["optimizer_state_dict"]["param_groups"]
    assert (group["lr"], group["eps"]) == (5e-4, 1e-7)
    assert group["params"] == list(range(54))
    assert [(d["setting"], d["value"], d["kept"]) for d in said.differences] == [
        ("lr", 1e-3, 5e-4),
        ("eps", 1e-8, 1e-7),
    ]
    assert sum("the furthest, is kept" in finding for finding in said.findings) == 2


def two_groups(directory, layers, **options):
    """A source whose optimizer has its first half in one group and the rest in another."""
    write_source(directory, layers, **options)
    state = state_of(directory)
    (group,) = state["optimizer_state_dict"]["param_groups"]
    half = len(group["params"]) // 2
    state["optimizer_state_dict"]["param_groups"] = [
        {**group, "params": group["params"][:half], "weight_decay": 0.0},
        {**group, "params": group["params"][half:], "weight_decay": 0.1},
    ]
    torch.save(state, directory / "training_state.pt")
    return directory


def test_several_groups_stay_several(tmp_path):
    a, b = two_groups(tmp_path / "a", ONE), two_groups(tmp_path / "b", THREE, step=7)
    weights, state, said = merged(tmp_path, a, b)
    first, second = state["optimizer_state_dict"]["param_groups"]
    names = list(weights)
    in_first = {names[i] for i in first["params"]}
    assert in_first == {*list(weights_in(a))[:13], *list(weights_in(b))[:13]}
    assert sorted(first["params"] + second["params"]) == list(range(54))
    assert said.differences == ()


def test_another_number_of_groups_is_said(tmp_path):
    a, b = two_groups(tmp_path / "a", ONE, step=1), write_source(tmp_path / "b", THREE, step=7)
    _, state, said = merged(tmp_path, a, b)
    assert len(state["optimizer_state_dict"]["param_groups"]) == 1
    assert said.differences[0]["setting"] == "number of groups"


def test_a_source_without_moments_starts_without(tmp_path):
    a, b = write_source(tmp_path / "a", ONE), write_source(tmp_path / "b", THREE, trained=0, step=900)
    weights, state, said = merged(tmp_path, a, b)
    assert state["global_step"] == 900
    assert sorted(state["optimizer_state_dict"]["state"]) == list(range(27))
    assert any(f"{b}: has no optimizer moments" in finding for finding in said.findings)
    step_with(resumed(weights, state), random_like(list(weights.values()), 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["param_groups"][0]["params"].pop(), "for 26 parameters, the weights are 27"),
        (lambda s: s["state"][4].update(exp_avg=torch.zeros(3, 3)), r"exp_avg of entry 4 is \[3, 3\]"),
        (lambda s: s["state"].update({99: {}}), "entry 99 belongs to no parameter"),
        (lambda s: s.pop("param_groups"), "no parameter groups"),
    ],
)
def test_a_state_that_does_not_belong_to_the_weights_is_left_out_and_said(damage, message, tmp_path):
    a, b = write_source(tmp_path / "a", ONE), write_source(tmp_path / "b", THREE)
    state = state_of(a)
    damage(state["optimizer_state_dict"])
    torch.save(state, a / "training_state.pt")
    _, united, said = merged(tmp_path, a, b)
    assert sorted(united["optimizer_state_dict"]["state"]) == list(range(27, 54))
    import re

    assert any(re.search(message, finding) for finding in said.findings), said.findings


def test_no_moments_at_all(tmp_path):
    a, b = (write_source(tmp_path / n, layers, trained=0) for n, layers in (("a", ONE), ("b", THREE)))
    _, state, _ = merged(tmp_path, a, b)
    assert "optimizer_state_dict" not in state
    assert state["scheduler_state_dict"]["last_epoch"] == 100


def test_moments_of_a_combined_layer_are_combined_alike(tmp_path):
    a, b = (write_source(tmp_path / n, ONE, seed=s, step=s * 100, trained=s) for n, s in (("a", 1), ("b", 2)))
    one, two = (state_of(path)["optimizer_state_dict"]["state"] for path in (a, b))
    for options, share in (({"on_conflict": "average"}, 0.5), ({"rule": "slerp", "t": 0.25}, 0.25)):
        _, state, _ = merged(tmp_path, a, b, **options)
        entry = state["optimizer_state_dict"]["state"][3]
        expected = (1 - share) * one[3]["exp_avg"].double() + share * two[3]["exp_avg"].double()
        assert torch.equal(entry["exp_avg"], expected.float())
        assert entry["step"] == two[3]["step"]


@pytest.mark.parametrize("half", [(), (1,), (3,)], ids=["one dtype", "layer 1 in bfloat16", "layer 3 in bfloat16"])
def test_shared_safetensors_order(half, tmp_path):
    """safetensors' own writer sorts names, dtype by dtype; the moments are in the order of the parameters."""
    from safetensors.torch import save_file

    layers = {1: ("dual", 2, 12), 3: ("dual", 2, 12)}
    a, b = write_source(tmp_path / "a", layers), write_source(tmp_path / "b", {2: ("single", 2, 1)})
    _, expected, _ = merged(tmp_path, a, b)
    weights = {n: t.bfloat16() if int(n[len("layer_")]) in half else t for n, t in weights_in(a).items()}
    save_file(weights, a / "npt_weights.safetensors")
    (a / "npt_weights.pt").unlink()
    _, state, said = merged(tmp_path, a, b)
    assert same(state["optimizer_state_dict"], expected["optimizer_state_dict"])
    assert said.findings == ()


def trained_with(directory, layers, build, *, step=100, skip=0):
    """A source trained by the optimizer that `build` makes; every `skip`-th parameter never had a gradient."""
    tensors = weights_of(layers, seed=step)
    optimizer = build([torch.nn.Parameter(tensor.clone()) for tensor in tensors.values()])
    for number, (parameter, gradient) in enumerate(
        zip(parameters(optimizer), random_like(list(tensors.values()), step), strict=True)
    ):
        parameter.grad = None if skip and number % skip == 0 else gradient
    optimizer.step()
    weights = dict(zip(tensors, (p.detach() for p in parameters(optimizer)), strict=True))
    return write_source(
        directory, layers, weights=weights, step=step, trained=0, optimizer_state_dict=optimizer.state_dict()
    )


def sgd(tensors):
    return torch.optim.SGD(tensors, lr=0.1, momentum=0.9)


def with_amsgrad(tensors):
    return torch.optim.AdamW(tensors, amsgrad=True)


@pytest.mark.parametrize(
    ("theirs", "kept", "needs"),
    [(sgd, torch.optim.AdamW, "step, exp_avg, exp_avg_sq"), (torch.optim.AdamW, with_amsgrad, "max_exp_avg_sq")],
)
def test_moments_of_another_optimizer_are_left_out_and_said(theirs, kept, needs, tmp_path):
    """With them, the first step of the kept optimizer would fail for what they lack."""
    a, b = trained_with(tmp_path / "a", ONE, theirs), trained_with(tmp_path / "b", THREE, kept, step=300)
    weights, state, said = merged(tmp_path, a, b)
    assert sorted(state["optimizer_state_dict"]["state"]) == list(range(27, 54))
    assert f"that of {b}, the furthest, needs {needs}" in said.findings[0]
    optimizer = kept([torch.nn.Parameter(tensor) for tensor in weights.values()])
    optimizer.load_state_dict(state["optimizer_state_dict"])
    step_with(optimizer, random_like(list(weights.values()), 1))


def test_what_the_kept_optimizer_does_not_need_stays(tmp_path):
    a, b = (
        trained_with(tmp_path / "a", ONE, with_amsgrad),
        trained_with(tmp_path / "b", THREE, torch.optim.AdamW, step=300),
    )
    weights, state, _ = merged(tmp_path, a, b)
    assert sorted(state["optimizer_state_dict"]["state"]) == list(range(54))
    step_with(resumed(weights, state), random_like(list(weights.values()), 1))


def test_parameters_that_never_had_a_gradient_are_counted(tmp_path):
    a = trained_with(tmp_path / "a", ONE, torch.optim.AdamW, skip=3)
    b = trained_with(tmp_path / "b", THREE, torch.optim.AdamW, step=300)
    weights, state, said = merged(tmp_path, a, b)
    assert len(state["optimizer_state_dict"]["state"]) == 54 - 9
    assert said.findings == (f"{a}: has no optimizer moments for 9 of its 27 parameters, which start without",)
    step_with(resumed(weights, state), random_like(list(weights.values()), 1))


def test_a_mean_with_a_source_without_moments_names_that_source_alone(tmp_path):
    a, b = (write_source(tmp_path / n, ONE, seed=s, step=s, trained=s - 1) for n, s in (("a", 1), ("b", 2)))
    _, state, said = merged(tmp_path, a, b, rule="average")
    assert said.findings == (
        f"{a}: has no optimizer moments: its parameters start without moments",
        f"layer 1 starts without optimizer moments, since {a} has none for it",
    )
    assert state["optimizer_state_dict"]["state"] == {}


def test_statistics_smaller_than_their_parameters_keep_their_places(tmp_path):
    """Adafactor's means of rows and columns."""
    a, b = (trained_with(tmp_path / str(n), {n: ("dual", 2, 3)}, torch.optim.Adafactor, step=n) for n in (1, 3))
    weights, state, said = merged(tmp_path, b, a)
    assert said.findings == ()
    for offset, path in ((0, a), (18, b)):
        own = state_of(path)["optimizer_state_dict"]["state"]
        assert all(same(state["optimizer_state_dict"]["state"][offset + i], own[i]) for i in range(18))
    optimizer = torch.optim.Adafactor([torch.nn.Parameter(tensor) for tensor in weights.values()])
    optimizer.load_state_dict(state["optimizer_state_dict"])
    step_with(optimizer, random_like(list(weights.values()), 1))


def test_names_of_parameters_are_those_of_each_source(tmp_path):
    """torch's named parameters: a list beside `params`, no setting of the group."""
    a, b = write_source(tmp_path / "a", ONE), write_source(tmp_path / "b", THREE, step=300)
    for path, name in ((a, "one"), (b, "three")):
        state = state_of(path)
        state["optimizer_state_dict"]["param_groups"][0]["param_names"] = [f"{name}.{i}" for i in range(27)]
        torch.save(state, path / "training_state.pt")
    _, state, said = merged(tmp_path, a, b)
    (group,) = state["optimizer_state_dict"]["param_groups"]
    assert group["param_names"] == [f"{name}.{i}" for name in ("one", "three") for i in range(27)]
    assert (said.findings, said.differences) == ((), ())
    _, state, said = merged(tmp_path, a, write_source(tmp_path / "c", {0: ("single", 2, 1)}))
    assert "param_names" not in state["optimizer_state_dict"]["param_groups"][0]
    assert said.differences == ()


def test_a_state_that_names_its_parameters_as_the_weights_are_named_is_read_by_name(tmp_path):
    """Two groups count their parameters group by group, not in the order of the file."""
    source = write_source(tmp_path / "a", ONE)
    state, names = state_of(source), list(weights_in(source))
    whole = state["optimizer_state_dict"]
    order = [*names[1::2], *names[0::2]]
    whole["state"] = {i: whole["state"][names.index(name)] for i, name in enumerate(order)}
    (group,) = whole["param_groups"]
    whole["param_groups"] = [
        {**group, "params": list(range(13)), "param_names": order[:13]},
        {**group, "params": list(range(13, 27)), "param_names": order[13:]},
    ]
    expected = state_of(source)["optimizer_state_dict"]["state"]
    torch.save(state, source / "training_state.pt")
    _, united, _ = merged(tmp_path, source, write_source(tmp_path / "b", THREE, trained=0))
    assert all(same(united["optimizer_state_dict"]["state"][i], expected[i]) for i in range(27))
    first, second = (group["params"] for group in united["optimizer_state_dict"]["param_groups"])
    assert (first, second) == ([*range(1, 27, 2), *range(27, 54)], list(range(0, 27, 2)))
