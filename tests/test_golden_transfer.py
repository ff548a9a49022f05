"""Golden numbers of modulation transfer: vectors, arithmetic, injection, generation, in both spaces, cached and not."""

import pytest
import torch

import runner
from runner.families.npt.transfer import combine, extract
from runner.families.npt.transfer_injection import How, inject

NAMES = ["single_rank1", "dual_rank4", "mixed_layers", "triple_rank20"]
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
