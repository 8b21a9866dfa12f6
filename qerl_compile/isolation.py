"""torch.compile of a private copy of a function.

Dynamo keeps compiled graphs, counts recompilations and remembers which sizes changed *per code object*. Two callers
that compile the same function with different backends would therefore see each other's graphs, and share one limit.
A copy whose code object is new and whose name is unique has a history of its own, so nothing global needs a reset.
"""

import inspect
import itertools
import types
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

RECOMPILE_LIMIT = 64
"""Graphs per kind of region: gradients or none, batch 1 or more, one token or more, caches."""

_serial = itertools.count()
_ours = False
"""Whether a call of `isolated` is being captured or running."""


def isolated(function: Callable[..., Any], backend: Callable[..., Any] | str) -> Callable[..., Any]:
    """Compile a private copy of a Python `function` as one graph per set of guards."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    private = types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    newer = "recompile_limit" in inspect.signature(torch.compile).parameters  # from torch 2.13 on; no overload lists it
    limit: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT} if newer else {}
    compiled = torch.compile(private, backend=backend, fullgraph=True, **limit)

    def call(*args: Any, **kwargs: Any) -> Any:
        global _ours
        before, _ours = _ours, True
        try:
            with nullcontext() if newer else torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                return compiled(*args, **kwargs)
        finally:
            _ours = before

    return call


def captured_by_others() -> bool:
    """Whether code is being captured by a compiler that knows none of our passes, such as torch.compile(model).

    Only `isolated` is ours. Another would take packed weights for their ghosts, which are NaN, and see no adapters.
    """
    return torch.compiler.is_compiling() and not _ours


def mark_dynamic(tensor: torch.Tensor, dims: Iterable[int]) -> None:
    """Mark sizes that differ from call to call, so that one graph serves all; Dynamo specialises sizes 0 and 1."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def call_region(region: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module past its compiled call; hooks run. The function to isolate when a region is compiled."""
    return region._call_impl(*args, **kwargs)
