"""Golden numbers of modulation transfer: vectors, arithmetic, injection, generation, in both spaces, cached and not."""

import json
import sys

import pytest
import torch

import runner
from runner.families.npt.transfer import combine, extract
from runner.families.npt.transfer_files import load_session
from runner.families.npt.transfer_injection import How, continued, inject
from runner.families.npt.transfer_permanent import apply, edits_of, reset, save_edited

NAMES = ["single_rank1", "dual_rank4", "mixed_layers", "triple_rank20"]
PARIS = [265, 286, 274, 311, 261, 299, 378]
FULL = ["full_single_file", "full_updated_base"]


@pytest.fixture(scope="module", params=NAMES)
def case(request, golden):
    """The golden file, the model, and all its modulations by name in both spaces."""
    known = torch.load(golden(f"transfer/{request.param}.pt"), weights_only=True)
    model = runner.load(golden(known["checkpoint"]), base=golden("npt/base"))
    ids = known["ids"]
    taken = {
        "a": extract(model, ids["a"]),
        "b": extract(model, ids["b"]),
        "a_pos": extract(model, ids["a"], known["position"]),
        "a_seq": extract(model, ids["a"], "mean"),
        "b_seq": extract(model, ids["b"], "mean"),
        "a_only_top": extract(model, ids["a"], layers=[max(known["layers"])]),
    }
    spaces = {space: {**taken, **combined(taken, space, known["scale_factor"])} for space in ("vectors", "weights")}
    return known, model, spaces


def combined(m, space, factor):
    return {
        "add": combine("add", m["a"], m["b"], space=space),
        "subtract": combine("subtract", m["a"], m["b"], space=space),
        "average": combine("average", m["a"], m["b"], m["a_seq"], space=space),
        "scale": combine("scale", m["a"], factor, space=space),
        "negate": combine("negate", m["a"], space=space),
    }


def how_of(row, space):
    return How(mode=row["mode"], alpha=row.get("alpha"), strength=row.get("strength", 1.0), space=space)


def test_vectors_and_magnitudes(case):
    known, _, spaces = case
    for name, layers in known["modulations"].items():
        mine = spaces["vectors"][name]
        assert mine.layers == sorted(layers)
        for layer, expected in layers.items():
            for projection, (v_a, v_b) in mine[layer].items():
                end = "" if mine.kind(layer) == "single" else f"_{projection}"
                for found, key in ((v_a, f"v_a{end}"), (v_b, f"v_b{end}")):
                    theirs = expected[key].reshape(found.shape)
                    assert (found - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    for name, layers in known["magnitudes"].items():
        mine = spaces["vectors"][name].magnitudes()
        for layer, row in layers.items():
            assert mine[layer] == pytest.approx(row, rel=1e-4)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("space", ["vectors", "weights"])
def test_injections(case, space, cached):
    known, model, spaces = case
    rows = known["inject" if space == "vectors" else "weight_space"]
    assert len(rows) > 8
    for row in rows:
        found = inject(model, known["ids"]["t"], spaces[space][row["modulation"]], how_of(row, space), cached=cached)
        torch.testing.assert_close(found.baseline, known["baseline"], rtol=0, atol=1e-3)
        torch.testing.assert_close(found.logits, row["logits"], rtol=0, atol=1e-3)
        if "kl" in row:
            assert found.kl == pytest.approx(row["kl"], abs=1e-4)


def test_negated_vectors_change_nothing(case):
    known, model, spaces = case
    both = [inject(model, known["ids"]["t"], spaces["vectors"][n], How(space="vectors")) for n in ("a", "negate")]
    assert torch.equal(both[0].logits, both[1].logits)


def test_fewer_layers(case):
    known, model, spaces = case
    row = known["inject_only_top"]
    found = inject(
        model,
        known["ids"]["t"],
        spaces["vectors"][row["modulation"]],
        how_of(row, "vectors"),
        layers=row["active_layers"],
    )
    torch.testing.assert_close(found.baseline, row["baseline"], rtol=0, atol=1e-3)
    torch.testing.assert_close(found.logits, row["logits"], rtol=0, atol=1e-3)
    assert found.kl == pytest.approx(row["kl"], abs=1e-4)
    assert "not active: skipped" in found.notes[0]


@pytest.mark.parametrize("cached", [True, False])
def test_an_earlier_position(case, cached):
    known, model, spaces = case
    row = known["inject_at"]
    found = inject(
        model,
        known["ids"]["t"],
        spaces["vectors"][row["modulation"]],
        how_of(row, "vectors"),
        row["position"],
        cached=cached,
    )
    torch.testing.assert_close(found.all_logits, row["logits"][row["position"] :], rtol=0, atol=1e-3)


def last_logits(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1]


def test_permanent(case):
    known, model, spaces = case
    before = last_logits(model, known["ids"]["t"])
    with model.npt_mode(set()):
        base = last_logits(model, known["ids"]["t"])
    for row in known["permanent"]:
        edit = apply(model, spaces["vectors"][row["modulation"]], row["layers"], row["strength"])
        norms = {f"{each['layer']}.{each['projection']}_proj": each["delta_norm"] for each in edit.matrices}
        assert norms == pytest.approx(row["delta_norms"], rel=1e-4)
        torch.testing.assert_close(last_logits(model, known["ids"]["t"]), row["npt_logits"], rtol=0, atol=1e-3)
        with model.npt_mode(set()):
            torch.testing.assert_close(last_logits(model, known["ids"]["t"]), row["base_logits"], rtol=0, atol=1e-3)
        assert torch.equal(last_logits(model.plain(), known["ids"]["t"]), base)
        assert reset(model) == row["layers"]
        assert torch.equal(last_logits(model, known["ids"]["t"]), before)


@pytest.mark.parametrize("name", FULL)
def test_permanent_in_complete_models(name, golden, tmp_path):
    known = torch.load(golden(f"transfer/{name}.pt"), weights_only=True)
    model = runner.load(golden(known["checkpoint"]))
    before = last_logits(model, known["target_ids"])
    torch.testing.assert_close(before, known["baseline"], rtol=0, atol=1e-3)
    m = extract(model, known["source_ids"])
    for i, layer in enumerate(m.layers):
        for found, expected in zip(m[layer]["gate"], (known["vm"][i], known["vf"][i]), strict=True):
            assert (found[0] - expected).abs().max() <= 1e-4 * expected.abs().max()
    for sequential, wanted in ((False, "once_logits"), (True, "sequential_logits")):
        edit = apply(model, m, sequential=sequential)
        assert edit.strength == known["alpha"]
        after = last_logits(model, known["target_ids"])
        torch.testing.assert_close(after, known[wanted], rtol=0, atol=1e-3)
        if sequential:
            outer = [row["delta_norm"] / known["alpha"] for row in edit.matrices]
            assert outer == pytest.approx(known["sequential_outer_norms"], rel=1e-4)
            save_edited(model, tmp_path / "saved", "hf")
            assert torch.equal(last_logits(runner.load(tmp_path / "saved"), known["target_ids"]), after)
        reset(model)
        assert torch.equal(last_logits(model, known["target_ids"]), before)
        assert edits_of(model) == []


@pytest.mark.parametrize("form", ["delta", "hf"])
def test_saved_edits_open_as_they_were(case, form, tmp_path):
    known, model, spaces = case
    ids = known["ids"]["t"]
    apply(model, spaces["weights"]["a"], strength=0.05)
    apply(model, spaces["weights"]["b"], known["layers"][-1:], strength=0.02)
    save_edited(model, tmp_path / "edited", form)
    expected = last_logits(model, ids)
    reset(model)
    again = runner.load(tmp_path / "edited")
    assert torch.equal(last_logits(again, ids), expected)
    assert [edit.layers for edit in edits_of(again)] == [known["layers"], known["layers"][-1:]]


@pytest.mark.parametrize("cached", [True, False])
def test_generation(case, cached):
    known, model, spaces = case
    prompt = known["ids"]["t"]
    for row in known["generate"]:
        m, how = spaces["vectors"][row["modulation"]], how_of(row, "vectors")
        steps = list(continued(model, prompt, m, how, len(row["steps"]), cached=cached))
        assert prompt + [token for token, _ in steps] == row["ids"]
        for (token, found), expected in zip(steps, row["steps"], strict=True):
            assert found.kl == pytest.approx(expected["kl"], abs=1e-4)
            probabilities = [expected["baseline_prob"], expected["injected_prob"]]
            assert found.probabilities(token) == pytest.approx(probabilities, abs=1e-4)


def test_the_older_tools_session_injects_to_the_same_logits(golden):
    """Nothing is imported, opened or run while the pickle is read, but what reads it."""
    known = json.loads(golden("transfer/session_original.json").read_text())
    model = runner.load(golden(known["checkpoint"]), base=golden("npt/base"))
    path = golden("transfer/session_original.pkl")
    events = []
    recording = True
    sys.addaudithook(lambda name, _: events.append(name) if recording else None)
    session = load_session(path)
    recording = False
    assert not {name for name in events if name.startswith(("os.system", "subprocess", "pickle.find_class", "exec"))}
    assert session.tracked == dict(zip(known["tracked_tokens"], known["tracked_token_ids"], strict=True))
    assert (list(session.active), list(session.history)) == (known["active_layers"], known["commands"])
    ids = runner.transfer.tokenizer_of(model).encode("The capital of Germany is", special=False)
    own = {
        "paris": extract(model, PARIS[:-2]),
        "mid": extract(model, PARIS[:-2], 1),
        "seq": extract(model, PARIS, "mean"),
    }
    own["diff"] = combine("subtract", own["paris"], own["mid"], space="vectors")
    for name, layers in known["modulations"].items():
        m = session.bank[name]
        for layer, row in layers.items():
            assert m.magnitudes()[int(layer)] == pytest.approx(row["magnitude"], rel=1e-6)
            for (shape, total, norm), tensor in zip(row["tensors"].values(), m[int(layer)]["gate"], strict=True):
                assert shape[-1] == tensor.shape[-1]
                assert float(tensor.double().sum()) == pytest.approx(total, abs=1e-9)
                assert float(tensor.double().norm()) == pytest.approx(norm, abs=1e-9)
        found, expected = (inject(model, ids, each, How()) for each in (m, own[name]))
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-3)
