"""How a token is drawn, against the same rules in plain Python."""

import math
import random

import pytest
import torch

from runner.metrics.generation import Sampling, choose, penalised, probabilities

VOCABULARY = 400


def by_hand(logits: list[float], how: Sampling, seen: set[int], draw: float) -> int:
    """One token, as the rules read (spec: penalty, temperature, top_k, top_p, min_p, softmax, first index beyond)."""
    theta = how.repetition_penalty
    z = [(v / theta if v > 0 else v * theta) if i in seen else v for i, v in enumerate(logits)]
    if how.temperature == 0:
        return z.index(max(z))
    z = [v / how.temperature for v in z]
    if how.top_k is not None:
        least = sorted(z, reverse=True)[min(how.top_k, len(z)) - 1]
        z = [v if v >= least else -math.inf for v in z]
    p = [math.exp(v - max(z)) for v in z]
    p = [v / math.fsum(p) for v in p]
    order, total, kept = sorted(range(len(p)), key=lambda i: -p[i]), 0.0, set()
    for i in order:
        if how.top_p == 1 or total < how.top_p:
            kept.add(i)
        total += p[i]
    p = [v if i in kept and v >= how.min_p * max(p) else 0 for i, v in enumerate(p)]
    target, total = draw * math.fsum(p), 0.0
    return next(i for i, v in enumerate(p) if (total := total + v) > target)


def cases():
    numbers = random.Random(3)
    for number in range(60):
        values = [numbers.gauss(0, numbers.choice([0.1, 2, 8])) for _ in range(VOCABULARY)]
        if number % 3 == 0:  # ties
            values = [round(v) * 0.5 for v in values]
        yield (
            values,
            Sampling(
                temperature=numbers.choice([0.0, 0.3, 0.7, 1.0, 2.5]),
                top_k=numbers.choice([None, 1, 2, 40, VOCABULARY, 1000]),
                top_p=numbers.choice([1.0, 0.9, 0.5, 0.05, 0.9999999]),
                min_p=numbers.choice([0.0, 0.1, 0.9]),
                repetition_penalty=numbers.choice([1.0, 1.3, 0.8]),
            ),
        )


def test_every_filter_as_it_is_defined():
    numbers = random.Random(4)
    for values, how in cases():
        logits = torch.tensor([values, values[::-1]])
        seen = [set(numbers.sample(range(VOCABULARY), 50)) for _ in range(2)]
        mask = torch.tensor([[i in each for i in range(VOCABULARY)] for each in seen])
        draws = [numbers.random() for _ in range(2)]
        chosen = choose(penalised(logits, mask, how.repetition_penalty), how, torch.tensor(draws, dtype=torch.float64))
        expected = [by_hand(logits[i].tolist(), how, seen[i], draws[i]) for i in range(2)]
        assert chosen.tolist() == expected, how


def test_the_nucleus_is_the_smallest_set_with_the_lowest_ids():
    """Four tokens of one probability, of which two are needed; and a vocabulary larger than what is sorted first."""
    logits = torch.full((1, 5000), -20.0)
    logits[0, [10, 20, 30, 40]] = 3.0
    assert probabilities(logits, Sampling(temperature=1.0, top_p=0.45)).nonzero()[:, 1].tolist() == [10, 20]
    flat = probabilities(torch.zeros(1, 5000), Sampling(temperature=1.0, top_p=0.49995))
    assert flat.nonzero()[:, 1].tolist() == list(range(2500))


def test_draws_at_both_ends():
    logits = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]))
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits.expand(3, 5), Sampling(temperature=1.0), ends).tolist() == [1, 3, 3]


def test_greedy_takes_the_lowest_id_of_a_tie():
    assert choose(torch.tensor([[0.0, 2.0, 2.0]]), Sampling(), None).tolist() == [1]


def test_one_token_that_is_left_still_takes_a_draw():
    """Many draws at once are those that are taken one by one: what a row draws does not depend on the others."""
    generator = torch.Generator().manual_seed(5)
    one_by_one = [torch.rand((), generator=generator, dtype=torch.float64).item() for _ in range(100)]
    assert torch.rand(100, generator=torch.Generator().manual_seed(5), dtype=torch.float64).tolist() == one_by_one


@pytest.mark.parametrize("count", [127, 128, 129, 300])
def test_top_p_around_the_number_that_is_sorted_first(count):
    """The smallest set has just as many tokens as are looked at first, one fewer, or one more."""
    values = torch.linspace(5, 0, 2000).unsqueeze(0)
    p = values.double().softmax(-1)
    how = Sampling(temperature=1.0, top_p=float(p[0, :count].sum() - p[0, count - 1] / 2))
    assert probabilities(values, how).count_nonzero() == count
