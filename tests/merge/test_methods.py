"""Every method, part by part and element by element, against its naive form on whole tensors in float64."""

import math

import numpy as np
import pytest
import torch

from runner.merge import combination, masks, methods
from tests.merge import naive

SHAPE = (6, 37)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Steps that end inside of rows."""
    monkeypatch.setattr(combination, "PART", 25)


def tensors(count=3, dtype=torch.float32, shape=SHAPE, seed=0):
    """A base and `count` models that are some way from it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base.to(dtype), *((base + 0.3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count))]


def whole(computed, shape=SHAPE):
    """By parts; and element by element it is the same, bit for bit."""
    count = math.prod(shape)
    found = torch.cat([computed.part(a, b) for a, b in combination.steps(count)])
    one_by_one = torch.from_numpy(computed.sample(np.arange(count)))
    assert torch.equal(found.view(torch.int64), one_by_one.view(torch.int64))
    return found.reshape(shape)


def close(found, expected, dtype=torch.float32):
    """Equal in float64 but for its last bits, and equal in the dtype that is written."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(found.to(dtype), expected.to(dtype))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_those_that_are_sums_by_numbers(dtype):
    base, a, b, c = tensors(dtype=dtype)
    weights = (0.6, -0.3, 1.1)
    close(whole(methods.linear((a, b, c), weights=weights)), naive.linear((a, b, c), weights), dtype)
    close(
        whole(methods.linear((a, b, c), weights=weights, normalize=False)),
        naive.linear((a, b, c), weights, normalize=False),
        dtype,
    )
    for t in (0.0, 0.3, 1.0):
        close(whole(methods.slerp(a, b, t=t)), naive.slerp(a, b, t), dtype)
    close(whole(methods.nuslerp(a, b, weights=(0.7, 0.5))), naive.nuslerp(a, b, (0.7, 0.5)), dtype)
    close(whole(methods.nuslerp(a, b, weights=(1, 3), base=base)), naive.nuslerp(a, b, (1, 3), base), dtype)
    for row_wise, dim in ((False, -1), (True, 0)):
        for under in (None, base):
            found = methods.nuslerp(a, b, weights=(2, 3), base=under, row_wise=row_wise, flatten=False)
            close(whole(found), naive.nuslerp(a, b, (2, 3), under, dim), dtype)
    for filter_wise in (False, True):
        for others in ((a, b), (a, b, c)):
            found = methods.model_stock(base, others, filter_wise=filter_wise)
            close(whole(found), naive.model_stock(base, others, filter_wise), dtype)
    close(whole(methods.karcher((a, b, c))), naive.karcher((a, b, c)), dtype)
    close(whole(methods.karcher((a, b), max_iter=1)), naive.karcher((a, b), max_iter=1), dtype)
    assert torch.equal(whole(methods.passthrough(a, scale=0.25)), a.double() * 0.25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rescale", [False, True])
def test_those_over_a_base(rescale, dtype):
    base, a, b, c = tensors(dtype=dtype)
    models, weights, densities = (a, b, c), (0.5, -0.2, 1.0), (0.5, 0.9, 1.0)
    deltas = [t.double() - base.double() for t in models]
    options = {"normalize": rescale, "factor": 0.8}
    close(
        whole(methods.task_arithmetic(base, models, weights=weights, **options)),
        naive.task_vectors(base, models, weights, **options),
        dtype,
    )
    options["rescale"] = rescale
    largest = [naive.largest(delta, density) for delta, density in zip(deltas, densities, strict=True)]
    close(
        whole(methods.ties(base, models, weights=weights, densities=densities, **options)),
        naive.task_vectors(base, models, weights, largest, elect=True, **options),
        dtype,
    )
    seeds = [b"one", b"two", b"three"]
    drawn = [naive.drawn(*each) for each in zip(deltas, densities, seeds, strict=True)]
    ranked = [
        torch.ones(SHAPE, dtype=torch.float64) if d >= 1 else naive.drawn_by_rank(delta, d, 0.09, seed)
        for delta, d, seed in zip(deltas, densities, seeds, strict=True)
    ]
    for elect in (False, True):
        given = {"weights": weights, "densities": densities, "seeds": seeds, "elect": elect, **options}
        close(
            whole(methods.dare(base, models, **given)),
            naive.task_vectors(base, models, weights, drawn, elect=elect, **options),
            dtype,
        )
        close(
            whole(methods.della(base, models, epsilons=(0.09,) * 3, **given)),
            naive.task_vectors(base, models, weights, ranked, elect=elect, **options),
            dtype,
        )


@pytest.mark.parametrize("density", [0.0, 0.004, 0.1, 0.5, 0.77, 0.999, 1.0])
def test_ties_keeps_exactly_its_share_of_equal_magnitudes(density):
    """Whole numbers: many differences are equal, and the first of them are kept."""
    generator = torch.Generator().manual_seed(1)
    base = torch.zeros(400)
    model = torch.randint(-4, 5, (400,), generator=generator).float()
    found = methods.ties(base, [model], weights=[1.0], densities=[density], normalize=False)
    expected = naive.largest(model, density) * model
    assert torch.equal(whole(found, (400,)), expected.double())
    assert int(naive.largest(model, density).sum()) == int(density * 400)


def test_random_numbers_are_the_same_wherever_they_begin():
    numbers = masks.uniform(b"seed", 0, 1001)
    for start, stop in ((0, 1), (1, 2), (7, 30), (500, 1001), (333, 333)):
        assert np.array_equal(masks.uniform(b"seed", start, stop), numbers[start:stop])
    assert not np.array_equal(masks.uniform(b"other", 0, 1001), numbers)
    # The stream of PCG64DXSM itself, so that another machine or version draws the same.
    assert numbers[:4].tolist() == [1870217082, 2024502255, 773137071, 1239398864]
    assert abs(float(numbers.mean()) / 2**32 - 0.5) < 0.02


def test_what_has_no_direction():
    """Tensors of zeros, of one element, empty, and equal ones."""
    a, zero = torch.randn(5), torch.zeros(5)
    assert torch.equal(whole(methods.slerp(zero, a, t=0.5), (5,)), 0.5 * a.double())
    assert torch.equal(whole(methods.karcher((zero, zero)), (5,)), zero.double())
    torch.testing.assert_close(whole(methods.karcher((a, a)), (5,)), a.double(), rtol=1e-12, atol=0)
    assert torch.equal(whole(methods.model_stock(a, (a, a)), (5,)), a.double())
    one = torch.tensor(2.0)
    assert whole(methods.linear((one, one), weights=(1, 1)), ()).item() == 2
    della = methods.della(
        one.reshape(1), [one.reshape(1) + 1], weights=[1], densities=[0.5], epsilons=[0.1], seeds=[b""]
    )
    assert whole(della, (1,)).item() in (2, 3)
    empty = torch.zeros(0, 3)
    found = methods.ties(empty, [empty], weights=[1], densities=[0.5], rescale=True)
    assert list(combination.steps(0)) == []
    assert found.sample(np.arange(0)).shape == (0,)


def test_a_coefficient_of_zero_does_not_count():
    a, bad = torch.ones(3), torch.full((3,), float("nan"))
    assert torch.equal(whole(methods.linear((a, bad), weights=(1.0, 0.0)), (3,)), a.double())
