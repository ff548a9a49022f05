"""Muon against torch's own, which rounds to bfloat16, and against the singular vectors that it stands for."""

import pytest
import torch

from runner.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_singular_vectors_stay_and_values_come_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix) @ v.T
    kept = found.diagonal()[values / values.norm() > 0.02]  # smaller ones are not there yet after five rounds
    assert len(kept) > 10
    assert kept.min() > 0.6
    assert kept.max() < 1.3
    torch.testing.assert_close(found, torch.diag(found.diagonal()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_steps_are_those_of_torch_up_to_its_rounding(shape):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.9}
    optimizers = Muon([ours], **options), torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_gradient_of_zero_only_decays():
    parameter = torch.nn.Parameter(torch.ones(3, 5))
    parameter.grad = torch.zeros(3, 5)
    Muon([parameter], lr=0.1, weight_decay=1.0).step()
    torch.testing.assert_close(parameter.detach(), torch.full((3, 5), 0.9))
