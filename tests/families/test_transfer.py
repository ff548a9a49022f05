"""Modulations: taken, combined, injected, written in; against a naive model that builds every ΔW, and what is refused."""

import gc
import hashlib
import json

import pytest
import torch
from transformers import LlamaForCausalLM

import runner
from runner.errors import CheckpointError, ConfigError, ModelError, RunnerError
from runner.families.npt.checkpoint import key
from runner.families.npt.modulation import delta_norm
from runner.families.npt.transfer import combine, extract, permuted
from runner.families.npt.transfer_injection import How, continued, inject
from runner.families.npt.transfer_measures import controls, delta_map
from runner.families.npt.transfer_permanent import Permanent, apply, edits_of, reset, save_edited, unwritten
from runner.metrics.generation import Sampling
from tests.conftest import MIXED, npt_tensors, write_base, write_npt

SOURCE, TARGET = [5, 77, 9, 130, 41], [41, 8, 200, 17, 66, 3]
NAMES = ("gate", "up", "down")
HOWS = [
    How(space=space, mode=mode, alpha=0.3 if mode == "blend" else None, strength=0.5)
    for space in ("vectors", "weights")
    for mode in ("replace", "blend", "add")
]


class Naive:
    """The NPT model in float64, token by token, each ΔW = Σ_i v_b_i v_a_iᵀ built in full."""

    def __init__(self, base, tensors):
        self.base = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager").double()
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.taken = {}

    def vectors(self, layer, name, attention):
        kind, _, count = MIXED[layer]
        weights = [
            [self.tensors[key(layer, kind, name, matrix, i, count)] for i in range(count)]
            for matrix in ("W_down", "W_a_up", "W_b_up")
        ]
        terms = [(attention @ down @ a, attention @ down @ b) for down, a, b in zip(*weights, strict=True)]
        return torch.stack([a for a, _ in terms]), torch.stack([b for _, b in terms])

    @torch.no_grad()
    def logits(self, ids, change=None, position=None):
        """Logits [T, V]; `change(own pair, layer, name)` gives ΔW [d_out, d_in] at `position`."""
        model, ids = self.base.model, torch.tensor(ids)
        hidden = model.embed_tokens(ids[None])
        rotary = model.rotary_emb(hidden, position_ids=torch.arange(len(ids))[None])
        mask = torch.full((len(ids), len(ids)), float("-inf"), dtype=hidden.dtype).triu(1)[None, None]
        for index, layer in enumerate(model.layers):
            attention, _ = layer.self_attn(
                layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask
            )
            x, rows = layer.post_attention_layernorm(hidden)[0], []
            for token in range(len(ids)):
                weights = {name: getattr(layer.mlp, f"{name}_proj").weight for name in NAMES}
                for name in NAMES[: {"single": 1, "dual": 2, "triple": 3}[MIXED[index][0]]]:
                    own = self.vectors(index, name, attention[0, token])
                    self.taken[index, name, token] = own
                    here = change is not None and token == position
                    weights[name] = weights[name] + (change(own, index, name) if here else delta(own))
                m = torch.nn.functional.silu(weights["gate"] @ x[token]) * (weights["up"] @ x[token])
                rows.append(weights["down"] @ m)
            hidden = hidden + torch.stack(rows)[None]
        return self.base.lm_head(model.norm(hidden))[0]


def delta(pair):
    return pair[1].mT @ pair[0]


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """The model of MIXED, the naive one, and the directory of the checkpoint."""
    path = write_npt(tmp_path_factory.mktemp("transfer") / "npt", npt_tensors(base, MIXED), base=base)
    return runner.load(path), Naive(base, npt_tensors(base, MIXED)), path


@pytest.fixture
def model(made):
    """The model, which each test must leave as it was."""
    model = made[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield model
    reset(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(layer.override is None and layer.npt_mode for layer in model.npt_layers.values())
    assert (model.first_weights, model.written) == ({}, [])


def last(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("position", [-1, 1, "mean", slice(-3, None)])
def test_extraction_equals_the_naive_one(made, model, position):
    naive, m = made[1], extract(model, SOURCE, position)
    naive.logits(SOURCE)
    assert m.layers == [0, 1, 2]
    assert [m.kind(layer) for layer in m.layers] == ["single", "dual", "triple"]
    for layer in m.layers:
        for name, pair in m[layer].items():
            every = [naive.taken[layer, name, token] for token in range(len(SOURCE))]
            for side, found in enumerate(pair):
                stacked = torch.stack([each[side] for each in every])
                expected = stacked.mean(0) if position == "mean" else stacked[position]
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.space}-{how.mode}")
@pytest.mark.parametrize("position", [-1, 2])
def test_injection_equals_the_naive_one(made, model, how, position, cached):
    naive, m = made[1], extract(model, SOURCE)

    def change(own, layer, name):
        theirs = [tensor.double() for tensor in m[layer][name]]
        if how.space == "weights":
            return how.mixed(delta(own), delta(theirs))
        return delta([how.mixed(mine, their) for mine, their in zip(own, theirs, strict=True)])

    found = inject(model, TARGET, m, how, position, cached=cached)
    expected = naive.logits(TARGET, change, position % len(TARGET))
    torch.testing.assert_close(found.all_logits.double(), expected[position % len(TARGET) :], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.baseline.double(), naive.logits(TARGET)[-1], rtol=1e-4, atol=1e-4)
    assert (
        found.all_logits[0] - inject(model, TARGET, m, How(mode="add", strength=0.0), position).all_logits[0]
    ).abs().max() > 1e-3


def test_weight_space_is_about_delta_w(model):
    a, b = extract(model, SOURCE), extract(model, TARGET)
    norms = a.delta_norms()
    made = {
        "add": combine("add", a, b), "subtract": combine("subtract", a, b), "average": combine("average", a, b, b),
        "scale": combine("scale", a, -3.0), "negate": combine("negate", a),
    }  # fmt: skip
    for layer in a.layers:
        for name in a[layer]:
            one, two = delta(a[layer][name]), delta(b[layer][name])
            expected = {
                "add": one + two, "subtract": one - two, "average": (one + 2 * two) / 3, "scale": -3 * one,
                "negate": -one,
            }  # fmt: skip
            for operation, wanted in expected.items():
                torch.testing.assert_close(delta(made[operation][layer][name]), wanted, rtol=1e-4, atol=1e-5)
            assert norms[layer][name] == pytest.approx(float(one.norm()), rel=1e-5)
    same = combine("negate", a, space="vectors")
    assert same.delta_norms() == a.delta_norms()
    assert combine("scale", a, 2.0, space="vectors").delta_norms()[0]["gate"] == pytest.approx(4 * norms[0]["gate"])
    assert combine("scale", a, -2.0, space="vectors").magnitudes() == pytest.approx(
        {layer: 2 * value for layer, value in a.magnitudes().items()}
    )
    assert made["negate"].magnitudes() == pytest.approx({i: sum(n.values()) / len(n) for i, n in norms.items()})
    assert (made["subtract"].space, made["subtract"].expression.count(" - ")) == ("weights", 1)


def test_weight_space_needs_the_same_layers_alone(model, base, tmp_path):
    a = extract(model, SOURCE, layers=[0])
    kinds = {0: ("single", 3, 4), 1: MIXED[1], 2: MIXED[2]}
    other = runner.load(write_npt(tmp_path / "other", npt_tensors(base, kinds), base=base))
    b = extract(other, SOURCE, layers=[0])
    assert combine("add", a, b).ranks(0) == 5
    with pytest.raises(ConfigError, match=r"layer 0: .* has k 1, .* 4; .* space=weights"):
        combine("add", a, b, space="vectors")
    with pytest.raises(ConfigError, match=r"has the layers \[0\], .* \[0, 1, 2\]"):
        combine("add", a, extract(model, SOURCE))
    assert inject(model, TARGET, b, How(space="vectors"), layers=[0]).kl > 0
    with pytest.raises(ModelError, match=r"layer 0: the modulation has k 4, the layer 1.*space=weights"):
        inject(model, TARGET, b, How(space="vectors", mode="add"), layers=[0])


def test_what_does_not_fit_is_refused_by_name(model, base, tmp_path):
    other = runner.load(write_npt(tmp_path / "kind", npt_tensors(base, {0: ("dual", 3, 1)}), base=base))
    with pytest.raises(ModelError, match="layer 0: the modulation is single, the layer dual"):
        inject(other, TARGET, extract(model, SOURCE), How())
    wide = write_base(tmp_path / "wide", hidden=64)
    third = runner.load(write_npt(tmp_path / "width", npt_tensors(wide, {0: ("single", 3, 1)}), base=wide))
    with pytest.raises(ModelError, match="layer 0: v_a of gate is 32 wide, the layer needs 64"):
        inject(third, TARGET, extract(model, SOURCE), How(), layers=[0])
    with pytest.raises(ConfigError, match="layer 0: v_a of gate is 32 wide"):
        combine("add", extract(model, SOURCE, layers=[0]), extract(third, SOURCE))
    with pytest.raises(ModelError, match="No NPT layers found"):
        runner.transfer.extract(model.plain().__class__(model, {}).model, SOURCE)


@pytest.mark.parametrize("position", [5, -6, slice(5, None), True])
def test_a_position_outside_is_refused(model, position):
    with pytest.raises(ConfigError, match=r"position .*5 tokens"):
        extract(model, SOURCE, position)


def test_layers_that_are_missing_are_said(model):
    m = extract(model, SOURCE, layers=[0, 2])
    found = inject(model, TARGET, m, How(), layers=[1, 2])
    assert [note.partition("]")[0] for note in found.notes] == ["layers [0", "layers [1"]
    assert "skipped" in found.notes[0]
    assert "keep their own" in found.notes[1]
    with pytest.raises(ConfigError, match="nothing would change"):
        inject(model, TARGET, m, How(), layers=[1])
    for layers in ([99], [0, 7]):
        with pytest.raises(ConfigError, match=r"is no NPT layer; the NPT layers are 0, 1, 2"):
            extract(model, SOURCE, layers=layers)


def test_several_positions_end_where_the_text_does(model):
    m = extract(model, SOURCE, slice(-2, None))
    found = inject(model, TARGET, m, How())
    uncached = inject(model, TARGET, m, How(), cached=False)
    torch.testing.assert_close(found.logits, uncached.logits, rtol=1e-5, atol=1e-5)
    first = m.mapped(lambda layer, name, pair: (pair[0][0], pair[1][0]))
    only_first = inject(model, TARGET, first, How(), -2)
    torch.testing.assert_close(found.all_logits[0], only_first.all_logits[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="of 2 positions"):
        inject(model, TARGET, m, How(), 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "blend"}, "needs alpha"), ({"mode": "blend", "alpha": 1.5}, "outside 0"), ({"mode": "ad"}, "did you mean 'add'"),
        ({"space": "weight"}, "did you mean 'weights'"), ({"mode": "add", "strength": float("inf")}, "finite"),
    ],
)  # fmt: skip
def test_how_is_checked(options, says):
    with pytest.raises(ConfigError, match=says):
        How(**options)


@pytest.mark.parametrize("arguments", [("add", 1), ("scale", 1), ("average", 1), ("divide", 2)])
def test_arithmetic_is_checked(model, arguments):
    m = extract(model, SOURCE)
    with pytest.raises(ConfigError, match=r"takes|unknown"):
        combine(arguments[0], *[m] * arguments[1])


def test_what_is_not_finite_names_the_layer(model):
    m = extract(model, SOURCE)
    with pytest.raises(RunnerError, match="layer 0: v_b of gate is not finite") as caught:
        combine("scale", combine("scale", m, 1e38), 1e10)
    assert caught.value.exit_code == 1
    with pytest.raises(ConfigError, match="finite"):
        combine("scale", m, float("nan"))


class Stop(BaseException):
    """Stands for Ctrl-C in the middle of a pass."""


@pytest.mark.parametrize("error", [Stop, ValueError])
@pytest.mark.parametrize("cached", [True, False])
def test_nothing_survives_an_injection_that_ends_early(model, monkeypatch, error, cached):
    m, before = extract(model, SOURCE), last(model, TARGET)
    steps = continued(model, TARGET, m, How(), 5, cached=cached)
    next(steps)
    monkeypatch.setattr(How, "mixed", lambda self, own, source: (_ for _ in ()).throw(error()))
    with pytest.raises(error):
        next(steps)
    with pytest.raises(error):
        inject(model, TARGET, m, How(), cached=cached)
    monkeypatch.undo()
    assert all(layer.override is None for layer in model.npt_layers.values())
    assert torch.equal(last(model, TARGET), before)


@pytest.mark.slow
def test_a_thousand_injections_leave_no_memory(model):
    m, before = extract(model, SOURCE), last(model, TARGET)
    counts = []
    for number in range(1000):
        inject(model, TARGET, m, HOWS[number % len(HOWS)])
        if number % 250 == 249:
            gc.collect()
            counts.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
    assert len(set(counts)) == 1
    hooks = [module._forward_hooks | module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks)
    assert torch.equal(last(model, TARGET), before)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_k=20), Sampling(temperature=2.0, top_p=0.7)]
)
def test_generation_is_one_injection_a_token(model, sampling):
    m, how = extract(model, SOURCE), How(mode="add", strength=0.5)
    runs = [
        list(continued(model, TARGET, m, how, 6, sampling=sampling, seed=seed, cached=cached))
        for seed, cached in ((3, True), (3, False), (4, True))
    ]
    tokens = [[token for token, _ in run] for run in runs]
    assert tokens[0] == tokens[1]
    assert (tokens[0] == tokens[2]) == (sampling.temperature == 0)
    ids = list(TARGET)
    for token, found in runs[0]:
        alone = inject(model, ids, m, how, cached=False)
        torch.testing.assert_close(found.logits, alone.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.baseline, alone.baseline, rtol=1e-5, atol=1e-5)
        ids.append(token)


def test_generation_ends_after_eos_and_before_the_positions_do(model):
    m = extract(model, SOURCE)
    tokens = [token for token, _ in continued(model, TARGET, m, How(), 5)]
    assert [token for token, _ in continued(model, TARGET, m, How(), 5, eos={tokens[2]})] == tokens[:3]
    with pytest.raises(ConfigError, match="160 positions"):
        next(continued(model, TARGET, m, How(), 155))
    with pytest.raises(ConfigError, match="at least 1"):
        next(continued(model, TARGET, m, How(), 0))


def test_written_in_for_good_and_taken_back(model, made):
    naive, m, other = made[1], extract(model, SOURCE), extract(model, TARGET)
    before, plain = last(model, TARGET), last(model.plain(), TARGET)
    edit = apply(model, m)
    assert edit.strength == 0.3
    assert {(row["layer"], row["projection"]) for row in edit.matrices} == {
        (0, "gate"), (1, "gate"), (1, "up"), (2, "gate"), (2, "up"), (2, "down")
    }  # fmt: skip
    for row in edit.matrices:
        weight = getattr(naive.base.model.layers[row["layer"]].mlp, f"{row['projection']}_proj").weight.detach()
        written = 0.3 * delta([tensor.double() for tensor in m[row["layer"]][row["projection"]]])
        found = getattr(model.model.layers[row["layer"]].mlp, f"{row['projection']}_proj").weight
        torch.testing.assert_close(found.double(), weight + written, rtol=1e-5, atol=1e-6)
        assert row["delta_norm"] == pytest.approx(float(written.norm()), rel=1e-4)
        assert row["relative"] == pytest.approx(float(written.norm() / found.norm()), rel=1e-4)
    once = last(model, TARGET)
    apply(model, other, [1], 0.2)
    assert not torch.equal(last(model, TARGET), once)
    with unwritten(model):
        assert torch.equal(last(model, TARGET), before)
    assert torch.equal(last(model.plain(), TARGET), plain)
    assert reset(model, [1]) == [1]
    assert [edit.layers for edit in edits_of(model)] == [[0, 2]]
    assert reset(model) == [0, 2]
    assert torch.equal(last(model, TARGET), before)


def test_sequential_writing_takes_each_layer_after_the_ones_below(model):
    m = extract(model, SOURCE)
    together = apply(model, m, strength=1.0)
    reset(model)
    one_by_one = apply(model, m, strength=1.0, sequential=True)
    norms = [{(r["layer"], r["projection"]): r["delta_norm"] for r in e.matrices} for e in (together, one_by_one)]
    assert norms[0][0, "gate"] == norms[1][0, "gate"]
    assert norms[0][2, "gate"] != pytest.approx(norms[1][2, "gate"], rel=1e-3)
    reset(model)
    with pytest.raises(ConfigError, match="extracted, not combined"):
        apply(model, combine("negate", m), sequential=True)
    assert edits_of(model) == []


def broken_off(edit, path):
    with edit:
        edit.save(path)
        raise Stop


def test_permanent_is_a_block_that_leaves_nothing(model, tmp_path):
    m, before = extract(model, SOURCE), last(model, TARGET)
    with runner.transfer.permanent(model, m, strength=0.1) as first:
        inside = last(model, TARGET)
        second = Permanent(model, extract(model, TARGET), [2], 0.5)
        with pytest.raises(Stop):
            broken_off(second, tmp_path / "both")
        assert [row["layer"] for row in second.report] == [2, 2, 2]
        assert torch.equal(last(model, TARGET), inside)
        first.reset([0])
        assert not torch.equal(last(model, TARGET), inside)
    assert torch.equal(last(model, TARGET), before)
    assert len(edits_of(runner.load(tmp_path / "both"))) == 2


def test_what_would_write_nothing_is_refused(model):
    m = extract(model, SOURCE)
    zero = combine("subtract", m, m)
    for each, options, says in (
        (zero, {}, "the update of gate is 0"), (m, {"strength": 0.0}, "is 0"), (m, {"layers": [9]}, "not in the modulation"),
        (extract(model, SOURCE, slice(-2, None)), {}, "of 2 positions"), (m, {"strength": 1e39}, "not be finite"),
    ):  # fmt: skip
        before = dict(model.state_dict())
        with pytest.raises(ConfigError, match=says):
            apply(model, each, **options)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigError, match="nothing to save"):
        save_edited(model, "never")


@pytest.mark.parametrize("form", ["delta", "hf"])
def test_saved_edits_come_back_and_go_on(model, form, tmp_path):
    apply(model, extract(model, SOURCE), strength=0.1)
    apply(model, extract(model, TARGET), [2], 0.2)
    save_edited(model, tmp_path / "edited", form)
    expected = last(model, TARGET)
    with model.npt_mode(set()):
        base = last(model, TARGET)
    reset(model)
    again = runner.load(tmp_path / "edited")
    assert torch.equal(last(again, TARGET), expected)
    assert torch.equal(last(again.plain(), TARGET), base)
    with torch.inference_mode(), again.npt_mode(set()):
        assert torch.equal(last(again, TARGET), base)
    apply(again, extract(again, SOURCE), strength=0.3)
    more = last(again, TARGET)
    save_edited(again, tmp_path / "more", form)
    reset(again)
    assert torch.equal(last(again, TARGET), expected)
    assert [edit.layers for edit in edits_of(again)] == [[0, 1, 2], [2]]
    assert torch.equal(last(runner.load(tmp_path / "more"), TARGET), more)
    if form == "hf":
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "edited")
        torch.testing.assert_close(last(theirs, TARGET), base, rtol=1e-5, atol=1e-5)
        with pytest.raises(ConfigError, match="form hf"):
            save_edited(again if edits_of(again) else model, tmp_path / "never", "delta")


def test_edits_of_another_checkpoint_are_refused(model, made, base, tmp_path):
    apply(model, extract(model, SOURCE))
    save_edited(model, tmp_path / "edited")
    said = json.loads((tmp_path / "edited" / "injection.json").read_text())
    other = write_npt(tmp_path / "other", npt_tensors(base, MIXED, seed=9), base=base)
    for name, says in ((str(other), "not the file that was edited"), ("nowhere", "neither beside it nor here")):
        (tmp_path / "edited" / "injection.json").write_text(json.dumps({**said, "checkpoint": name}))
        with pytest.raises(CheckpointError, match=says):
            runner.load(tmp_path / "edited")
    (tmp_path / "edited" / "injection.json").write_text(json.dumps({**said, "edits": [{"strength": "x"}]}))
    with pytest.raises(CheckpointError, match="lists no edits"):
        runner.load(tmp_path / "edited")


def test_a_modulation_comes_back_from_its_file(model, made, tmp_path):
    m = combine("subtract", extract(model, SOURCE, text="one"), extract(model, TARGET, "mean", text="two"))
    m.save(tmp_path / "m.safetensors")
    again = runner.transfer.load(tmp_path / "m.safetensors")
    for layer in m.layers:
        for name, pair in m[layer].items():
            assert all(torch.equal(a, b) for a, b in zip(pair, again[layer][name], strict=True))
    assert (again.sources, again.active, again.space, again.expression) == (m.sources, m.active, m.space, m.expression)
    assert again.origin["checkpoint"].endswith("npt")
    assert again.origin["checkpoint_sha256"] == hashlib.sha256((made[2] / "npt_weights.pt").read_bytes()).hexdigest()
    torch.save({}, tmp_path / "x.pt")
    for other in (tmp_path / "x.pt", tmp_path / "nowhere.safetensors"):
        with pytest.raises(CheckpointError):
            runner.transfer.load(other)


def test_from_python_with_texts(model):
    m = runner.transfer.extract(model, "the sun", position="mean", special_tokens=False)
    tokenizer = runner.transfer.tokenizer_of(model)
    assert list(m.sources[0].ids) == tokenizer.encode("the sun", special=False)
    found = runner.transfer.inject(model, "the moon", m, mode="blend", alpha=0.5)
    same = inject(model, tokenizer.encode("the moon", special=False), m, How(mode="blend", alpha=0.5))
    assert torch.equal(found.logits, same.logits)
    rows = found.top(3)
    assert rows[0]["injected"] == pytest.approx(float(found.logits.double().softmax(-1).max()))
    assert [row["injected"] for row in rows] == sorted((row["injected"] for row in rows), reverse=True)
    assert rows[0]["percent"] == pytest.approx(100 * rows[0]["change"] / rows[0]["baseline"], rel=1e-6)
    for text, says in (("", "empty"), ([], "no tokens"), ([9999], "vocabulary")):
        with pytest.raises(ConfigError, match=says):
            runner.transfer.extract(model, text)


def test_controls_and_the_map(model):
    m = extract(model, SOURCE)
    others = {"source": SOURCE, "target": TARGET, "one": [9, 8, 7], "two": [100, 101, 102, 103]}
    found = controls(model, TARGET, m, How(), None, tracked={"x": 5}, others=others, seed=3)
    assert found["permuted"]["kl"] == inject(model, TARGET, permuted(m, 3), How()).kl
    assert found["other_prompt"]["kl"] == inject(model, TARGET, extract(model, others["one"]), How()).kl
    assert [row["prompt"] for row in found["locality"]["prompts"]] == ["one", "two"]
    kls = [inject(model, others[name], m, How()).kl for name in ("one", "two")]
    assert found["locality"]["kl"] == pytest.approx(sum(kls) / 2)
    assert found["permuted"]["tracked"][0]["token"] == 5
    for layer in m.layers:
        for name, pair in permuted(m, 3)[layer].items():
            for one, two in zip(pair, m[layer][name], strict=True):
                assert torch.equal(one.sort().values, two.sort().values)
    rows = delta_map(model, SOURCE, None)
    for row in rows:
        own = extract(model, SOURCE, slice(0, None))[row["layer"]]
        expected = [
            sum(delta_norm((v_a[i], v_b[i])) for v_a, v_b in own.values()) / len(own) for i in range(len(SOURCE))
        ]
        assert row["norms"] == pytest.approx(expected, rel=1e-4)
