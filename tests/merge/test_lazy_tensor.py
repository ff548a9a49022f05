"""Computed tensors against the same arithmetic on whole tensors."""

import math

import pytest
import torch

from runner.merge import lazy_tensor
from runner.merge.lazy_tensor import from_tensor, linear, mean, slerp, weighted


def whole(tensor):
    return torch.cat(list(tensor.parts())).reshape(tensor.shape)


def of(*tensors):
    return [from_tensor(tensor, f"t{i}") for i, tensor in enumerate(tensors)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(lazy_tensor, "PART", 7)


def test_parts_cover_a_tensor_in_order():
    tensor = torch.arange(40.0).reshape(5, 8)
    (lazy,) = of(tensor.T)
    assert [len(part) for part in lazy.parts()] == [7, 7, 7, 7, 7, 5]
    assert torch.equal(whole(lazy), tensor.T)
    assert (lazy.numel, lazy.nbytes) == (40, 160)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_mean_of_equal_tensors_is_themselves(count, dtype):
    tensor = torch.randn(50).to(dtype)
    assert torch.equal(whole(mean(of(*[tensor] * count))), tensor)


def test_mean_and_linear_are_computed_in_float64():
    a, b = torch.randn(30).bfloat16(), torch.randn(30).bfloat16()
    assert torch.equal(whole(mean(of(a, b))), ((a.double() + b.double()) / 2).bfloat16())
    assert torch.equal(whole(linear(*of(a, b), 0.25)), (0.75 * a.double() + 0.25 * b.double()).bfloat16())
    assert mean(of(a, b.float())).dtype == torch.float32


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_float8_with_another_dtype(other):
    """torch refuses to promote float8; the result has a dtype that holds all values of both."""
    a, b = torch.randn(30).to(torch.float8_e4m3fn), torch.randn(30).to(other)
    for found in (mean(of(a, b)), linear(*of(b, a), 0.25), slerp(*of(a, b), 0.25)):
        assert found.dtype == (torch.float32 if other.itemsize == 1 else other)
    assert torch.equal(whole(mean(of(a, b))), ((a.double() + b.double()) / 2).to(mean(of(b, a)).dtype))
    assert mean(of(a, a)).dtype == a.dtype


@pytest.mark.parametrize("interpolate", [linear, slerp])
def test_the_ends_are_the_sources_bit_for_bit(interpolate):
    a, b = torch.randn(4, 9), torch.randn(4, 9)
    a[0, 0] = -0.0
    assert torch.equal(whole(interpolate(*of(a, b), 0.0)).view(torch.int32), a.view(torch.int32))
    assert torch.equal(whole(interpolate(*of(a, b), 1.0)), b)


def test_slerp_moves_along_the_arc():
    angle = 1.1
    a = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    b = 2 * torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
    for t in (0.25, 0.5, 0.9):
        expected = 2 * torch.tensor([math.cos(t * angle), math.sin(t * angle), 0.0], dtype=torch.float64)
        assert torch.allclose(whole(slerp(*of(a, b), t)), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("b", [torch.zeros(3), torch.tensor([2.0, 4.0, 6.0]), torch.tensor([-1.0, -2.0, -3.0])])
def test_slerp_without_an_arc_is_linear(b):
    a = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(whole(slerp(*of(a, b), 0.25)), 0.75 * a + 0.25 * b)


def test_a_weight_of_zero_does_not_count():
    a, bad = torch.ones(3), torch.full((3,), float("nan"))
    assert torch.equal(whole(weighted(of(a, bad), (1.0, 0.0))), a)
