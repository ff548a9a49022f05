"""Each figure against a case worked out by hand."""

import math

import pytest
import torch

from runner.metrics.fidelity import compare, perplexities, standard_error, summarise

LN2, LN3 = math.log(2), math.log(3)
# Two positions, vocabulary of three. Probabilities: p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2) at the first position;
# equal at the second, where the subject's logits are the reference's plus 1.
REFERENCE = torch.tensor([[LN2, 0.0, 0.0], [0.0, LN3, 0.0]])
SUBJECT = torch.tensor([[0.0, 0.0, LN2], [1.0, 1.0 + LN3, 1.0]])
IDS = torch.tensor([0, 2])


def one(reference=REFERENCE, subject=SUBJECT, ids=IDS):
    return compare([(reference, subject)], ids)


def test_mse_and_cosine():
    figures = one().figures()
    assert figures["mse"] == pytest.approx((2 * LN2**2 + 3) / 6)
    product, reference, subject = LN3 * (1 + LN3), LN2**2 + LN3**2, LN2**2 + 2 + (1 + LN3) ** 2
    assert figures["cosine"] == pytest.approx(product / math.sqrt(reference * subject))


def test_kl_both_ways():
    comparison = one()
    # KL(p ‖ q) = ½ ln 2 + ¼ ln 1 + ¼ ln ½
    assert comparison.kl.tolist() == pytest.approx([0.25 * LN2, 0.0], abs=1e-7)
    assert comparison.kl_reverse.tolist() == pytest.approx([0.25 * LN2, 0.0], abs=1e-7)
    skewed = one(subject=torch.tensor([[0.0, 0.0, math.log(6)], [0.0, LN3, 0.0]]))  # q = (1/8, 1/8, 6/8)
    assert skewed.kl[0].item() == pytest.approx(0.5 * math.log(4) + 0.25 * LN2 + 0.25 * math.log(1 / 3), abs=1e-7)
    assert skewed.kl_reverse[0].item() == pytest.approx(
        0.125 * math.log(1 / 4) + 0.125 * math.log(1 / 2) + 0.75 * LN3, abs=1e-7
    )


def test_top1_top5():
    figures = one().figures()
    assert figures["top1"] == 0.5
    reference = torch.arange(8.0, 0, -1)[None]  # its five most likely: 0 1 2 3 4
    subject = torch.tensor([[0.0, 0, 9, 8, 7, 6, 5, 0]])  # its five: 2 3 4 5 6
    assert compare([(reference, subject)], torch.tensor([1])).figures()["top5"] == pytest.approx(3 / 5)


def test_probability_of_the_true_next_token():
    # Only position 0 has a known next token (2): q(2) - p(2) = 1/2 - 1/4.
    assert one().figures()["dp_rms"] == pytest.approx(0.25)
    assert one(REFERENCE[:1], SUBJECT[:1], IDS[:1]).figures()["dp_rms"] is None


def test_perplexity():
    found = perplexities([one()])
    assert (found.pop("loss"), found.pop("loss_reference")) == (pytest.approx(LN2), pytest.approx(2 * LN2))
    assert found == {"ppl": pytest.approx(2.0), "ppl_reference": pytest.approx(4.0), "ppl_ratio": pytest.approx(0.5)}


def test_scale_finds_a_wrong_magnitude():
    figures = one(subject=REFERENCE * 4).figures()
    assert figures["scale"] == pytest.approx(0.25)
    assert figures["magnitude_share"] == pytest.approx(1.0)
    orthogonal = one(torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]]), IDS[:1]).figures()
    assert (orthogonal["scale"], orthogonal["magnitude_share"]) == (0.0, pytest.approx(0.5))
    assert one(subject=REFERENCE).figures()["magnitude_share"] is None


def test_chunks_change_nothing():
    torch.manual_seed(0)
    reference, subject, ids = torch.randn(7, 11), torch.randn(7, 11), torch.arange(7)
    whole = compare([(reference, subject)], ids)
    parts = compare(zip(reference.split(3), subject.split(3), strict=True), ids)
    assert parts.figures() == pytest.approx(whole.figures(), rel=1e-12)
    assert torch.equal(parts.next_logprob, whole.next_logprob)


def test_means_are_over_prompts_and_quantiles_over_positions():
    long = compare([(torch.zeros(3, 3), torch.ones(3, 3))], torch.tensor([0, 1, 2]))
    found = summarise([one(), long])
    assert found["mse"] == pytest.approx((one().mse + 1.0) / 2)
    assert found["kl"] == pytest.approx(0.0625 * LN2, abs=1e-7)  # mean of 0.125 ln 2 and 0
    assert found["kl_max"] == pytest.approx(0.25 * LN2, abs=1e-7)
    assert found["kl_p50"] == pytest.approx(0.0, abs=1e-7)
    assert found["kl_p90"] == pytest.approx(0.6 * 0.25 * LN2, abs=1e-7)  # five positions, one of them not 0
    assert found["kl_se"] == pytest.approx(0.0625 * LN2, abs=1e-7)


def test_standard_error_of_the_mean():
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert standard_error([1.0]) is None


def test_what_is_not_finite_is_never_averaged():
    bad = one(subject=torch.tensor([[0.0, float("nan"), 0], [0, 0, 0]]))
    assert not bad.finite
    assert bad.figures()["mse"] is None
    assert summarise([one(), bad])["mse"] is None
    assert perplexities([one(), bad])["ppl"] is None


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[2, 2\]"):
        one(subject=SUBJECT[:, :2])
    with pytest.raises(ValueError, match="2 positions for 3 tokens"):
        one(ids=torch.tensor([0, 1, 2]))
