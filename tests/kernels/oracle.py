"""Weights with their exact value, the rounding that is allowed, and hiding the C++ kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import cpu_native

SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


@dataclass(frozen=True)
class Weight:
    """A packed weight as the operators take it, with its exact value in float64."""

    packed: nvfp4.PackedNVFP4
    exact: Tensor

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed.codes_NK2, self.packed.block_decode_scale_NG, self.packed.decode_scale


def make_weight(n: int, k: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    packed = nvfp4.quantize(torch.randn(n, k, generator=generator) * 0.05)
    products = nvfp4.exact_products(packed.codes_NK2, packed.block_decode_scale_NG, torch.float32)
    return Weight(packed, products.double() * packed.decode_scale.double())


def assert_rounded_once(y: Tensor, x: Tensor, w: Tensor) -> None:
    """y is x · wᵀ, summed in float32 (float64 for float64) and rounded once to its dtype."""
    exact = x.double() @ w.T
    magnitude = x.double().abs() @ w.abs().T  # what summation errors are relative to
    half_ulp = torch.ldexp(torch.full_like(exact, 0.5), exact.frexp().exponent - SIGNIFICANT_BITS[y.dtype])
    summation = 2**-50 if y.dtype == torch.float64 else 2**-21
    smallest_half = 2**-25 if y.dtype == torch.float16 else 1e-40  # where float16 becomes subnormal
    allowed = torch.clamp(half_ulp, min=smallest_half) * (1 + 1e-9) + summation * magnitude
    worst = ((y.double() - exact).abs() / allowed).max().item() if y.numel() else 0.0
    assert worst <= 1, f"{worst:.2f} times the allowed error"


def hide_native(monkeypatch: pytest.MonkeyPatch) -> None:
    load: Callable[[], None] = lambda: None  # noqa: E731
    monkeypatch.setattr(cpu_native, "load", load)
