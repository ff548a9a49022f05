"""Per-layer tests and continuations on models whose answers are known."""

from types import SimpleNamespace

import pytest
import torch

from runner.evaluation.decoding import generate
from runner.evaluation.evaluator import Evaluator
from runner.evaluation.reference import Reference
from runner.metrics import layers
from runner.metrics.generation import agreement, repetition, until_end

REFERENCE = torch.zeros(2, 4)
IDS = torch.tensor([0, 1])


def run(active):
    """Each active layer adds 1 to the first logit of every position."""
    logits = REFERENCE.clone()
    logits[:, 0] += len(active)
    return logits


def test_isolation_and_progressive():
    alone = layers.isolation(run, REFERENCE, IDS, [2, 5])
    assert [(row["layer"], row["mse"]) for row in alone] == [(2, 0.25), (5, 0.25)]
    together = layers.progressive(run, REFERENCE, IDS, [2, 5])
    assert [(row["layers"], row["mse"]) for row in together] == [([2], 0.25), ([2, 5], 1.0)]
    last = run({2, 5})[-1].double().log_softmax(-1)
    assert together[-1]["kl"] == pytest.approx(float((0.25 * (torch.tensor(0.25).log() - last)).sum()))


def test_kl_is_that_of_the_last_position():
    subject = torch.zeros(2, 4)
    subject[0, 0] = 9.0
    assert layers.figures(REFERENCE, subject, IDS)["kl"] == pytest.approx(0, abs=1e-12)


def test_trend_and_additivity():
    assert layers.trend([0.5, 0.9, 0.4]) == "improving"
    assert layers.trend([0.4, 0.5]) == "degrading"
    assert layers.trend([0.4]) is None
    assert layers.trend([0.4, None]) is None
    assert layers.additivity([0.1, 0.3], 0.8) == pytest.approx(0.5)
    assert layers.additivity([0.1, None], 0.8) is None
    assert layers.additivity([0.1], 0.0) is None


def test_agreement_and_repetition():
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == {"agreement": 0.75, "first_divergence": 2}
    assert agreement([1, 2], [1, 2]) == {"agreement": 1.0, "first_divergence": None}
    assert agreement([1, 2], [1, 2, 3, 4]) == {"agreement": 0.5, "first_divergence": 2}
    assert repetition([1, 2, 3, 1, 2, 3, 1]) == pytest.approx(2 / 5)
    assert repetition([1, 2, 3, 4]) == 0
    assert repetition([1, 2]) is None


class Chooser(torch.nn.Module):
    """Logits that depend on the last token only: probability 3/4 for token 1, 1/4 for token 2."""

    def forward(self, ids, past_key_values=None, use_cache=False):
        logits = torch.tensor([-torch.inf, 3.0, 1.0]).log().nan_to_num(nan=-1e9)
        return type("Output", (), {"logits": logits.expand(1, ids.shape[1], 3), "past_key_values": None})


def test_sampling_follows_the_probabilities_and_the_seed():
    prompt = torch.tensor([1])
    tokens = generate(Chooser(), prompt, 4000, temperature=1.0, seed=3)
    assert tokens == generate(Chooser(), prompt, 4000, temperature=1.0, seed=3)
    assert tokens != generate(Chooser(), prompt, 4000, temperature=1.0, seed=4)
    assert tokens.count(1) / 4000 == pytest.approx(0.75, abs=0.03)
    cold = generate(Chooser(), prompt, 4000, temperature=0.5, seed=3)  # 9 : 1
    assert cold.count(1) / 4000 == pytest.approx(0.9, abs=0.02)
    assert generate(Chooser(), prompt, 5) == [1] * 5


class Counter(torch.nn.Module):
    """Always says the token after the last one; after 3, the end of a text, it goes on with `after`."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(eos_token_id=3)
        self.after = after

    def forward(self, ids):
        last = int(ids[0, -1])
        logits = torch.nn.functional.one_hot(torch.tensor(self.after if last >= 3 else last + 1), 9).float()
        return SimpleNamespace(logits=logits.expand(1, ids.shape[1], 9))


def test_what_follows_the_end_of_a_text_counts_for_nothing():
    assert until_end([1, 2, 3, 3], {3}) == [1, 2, 3]
    assert until_end([1, 2], {3}) == [1, 2]
    evaluator = Evaluator(model=Counter(after=7), reference=Reference(Counter(after=8), "other"))
    found = evaluator.continuation(torch.tensor([0]), 20, temperature=0.0)
    assert (found["tokens"][:5], found["reference_tokens"][:5]) == ([1, 2, 3, 7, 7], [1, 2, 3, 8, 8])
    assert (found["agreement"], found["first_divergence"]) == (1.0, None)  # of 3 tokens, not 3 of 20
    assert (found["repetition"], found["text"]) == (0, "1 2 3")  # 17 of 20 tokens repeat themselves
