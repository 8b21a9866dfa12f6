"""Sums over a linear's inputs are what a direct computation over all tokens gives."""

import torch
from torch import nn

from qerl_compile.calibrating.statistics import FLOOR, InputStatistics, gathering


def gathered(x, *, hessian=True):
    linear = nn.Linear(x.shape[-1], 4)
    with gathering({"path": linear}, {"path": hessian}) as found:
        for part in x:
            linear(part)
    linear(x[0])  # after the context nothing is added
    return found["path"]


def test_sums_are_those_of_all_tokens():
    x = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    found, flat = gathered(x), x.reshape(-1, 16)
    assert found.tokens == 30
    torch.testing.assert_close(found.square_K, flat.double().square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.magnitude_K, flat.double().abs().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.hessian_KK, flat.T @ flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.norm_K(), flat.norm(dim=0), rtol=1e-5, atol=0)


def test_statistics_of_divided_inputs():
    x = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(0))
    factor = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5
    divided, direct = gathered(x).divided(factor), gathered(x / factor)
    torch.testing.assert_close(divided.hessian_KK, direct.hessian_KK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(divided.square_K, direct.square_K, rtol=1e-5, atol=0)
    torch.testing.assert_close(divided.importance_K(), gathered(x).importance_K(factor), rtol=1e-5, atol=0)


def test_importance_is_positive_even_for_a_channel_that_was_never_seen():
    x = torch.ones(1, 4, 16)
    x[..., 3] = 0
    importance = gathered(x, hessian=False).importance_K()
    assert importance is not None
    assert importance[3] > 0.9 * FLOOR
    assert importance[3] < 0.02 * importance[0]


def test_no_tokens_or_only_zeros_have_no_importance():
    assert InputStatistics(16, hessian=False, device=torch.device("cpu")).importance_K() is None
    assert gathered(torch.zeros(1, 4, 16)).importance_K() is None
