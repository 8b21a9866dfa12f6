"""What calibration knows of a linear's input: sums over tokens, never the activations themselves.

    tokens           how many
    mean square      E[x_k²]            importance of a column's error; Wanda's norm is its root
    mean magnitude   E[|x_k|]           AWQ's measure of a channel
    hessian          Σ x xᵀ [K, K]      only where it is needed: the squared output error of any change D of the weight
                                        over all tokens is then exactly Σ_n D_n H D_nᵀ, with no activation kept

Linears that share an input share these, so they are taken at the first of each group. Sums are float32 over a batch and
float64 between batches, the Hessian float32: 1,536² of them are 9 MB, 18,944² (a 7B model's `down_proj`) 1.4 GB.

Shape suffixes: M tokens, K input channels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from qerl_compile.errors import NotFiniteError

FLOOR = 0.01  # of the mean: what GPTQ adds to the Hessian's diagonal, and what a channel that was never seen counts


class InputStatistics:
    """Sums over the inputs of one linear. Invariant: all tensors are on the device of the inputs.

    Args:
        columns: K.
        hessian: whether Σ x xᵀ is kept.
        device: of the inputs.
    """

    def __init__(self, columns: int, *, hessian: bool, device: torch.device) -> None:
        self.tokens = 0
        self.square_K = torch.zeros(columns, dtype=torch.float64, device=device)
        self.magnitude_K = torch.zeros(columns, dtype=torch.float64, device=device)
        self.hessian_KK = torch.zeros(columns, columns, device=device) if hessian else None

    def add(self, x: Tensor) -> None:
        """Take inputs [..., K]."""
        x_MK = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += len(x_MK)
        self.square_K += x_MK.square().sum(0)
        self.magnitude_K += x_MK.abs().sum(0)
        if self.hessian_KK is not None:
            self.hessian_KK.addmm_(x_MK.T, x_MK)

    def divided(self, factor_K: Tensor) -> "InputStatistics":
        """Return the statistics of the inputs divided by a factor per channel, fp32 [K]."""
        new = InputStatistics(len(factor_K), hessian=False, device=factor_K.device)
        new.tokens = self.tokens
        new.square_K = self.square_K / factor_K.double().square()
        new.magnitude_K = self.magnitude_K / factor_K
        if self.hessian_KK is not None:
            new.hessian_KK = self.hessian_KK / factor_K / factor_K[:, None]
        return new

    def importance_K(self, factor_K: Tensor | None = None) -> Tensor | None:
        """Return what an error in each column counts, float32 [K], positive; None if no token came by.

        Args:
            factor_K: the inputs are divided by it.
        """
        square_K = self.square_K if factor_K is None else self.square_K / factor_K.double().square()
        mean = square_K.mean()
        if self.tokens == 0 or not bool(mean > 0):
            return None
        return ((square_K + FLOOR * mean) / mean).float()

    def norm_K(self) -> Tensor:
        """Return ‖x_k‖₂ over the tokens: float32 [K]."""
        return self.square_K.sqrt().float()


def _adding_to(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, args: statistics.add(args[0])


@contextmanager
def gathering(modules: Mapping[str, nn.Module], hessians: Mapping[str, bool]) -> Iterator[dict[str, InputStatistics]]:
    """Gather statistics of the inputs of linears while they are called inside.

    Args:
        modules: path → linear.
        hessians: path → whether its Hessian is kept.

    Raises:
        NotFiniteError: at the end, if NaN or Inf came by.
    """
    found: dict[str, InputStatistics] = {}
    hooks = []
    for path, module in modules.items():
        weight = module.get_parameter("weight")
        mine = found[path] = InputStatistics(weight.shape[1], hessian=hessians[path], device=weight.device)
        hooks.append(module.register_forward_pre_hook(_adding_to(mine)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for path, statistics in found.items():
        if not bool(statistics.square_K.isfinite().all()):
            refuse_not_finite(path, "inputs")


def refuse_not_finite(path: str, what: str) -> NoReturn:
    """Say that calibration met NaN or Inf: nothing can be rounded or scaled by them.

    Raises:
        NotFiniteError: always.
    """
    raise NotFiniteError(
        where=path,
        expected=f"finite {what} on the sample text",
        got="NaN or Inf",
        do="Calibrate in bfloat16 or float32 (dtype=), where numbers overflow later than in float16.",
    )
