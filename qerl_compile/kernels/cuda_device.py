"""The GPU that a kernel runs on: what is asked of it, and making it the current one.

Triton launches on the current device and not on that of the tensors. Importing this costs nothing.

Meta tensors lie on no device. Where kernels are only compiled (rehearsal.py), `stand_in` says what is to be answered
for them.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


_stand_ins: list[tuple[tuple[int, int], int]] = []


def stand_in(capability: tuple[int, int], multiprocessors: int) -> None:
    """Answer for tensors on no device as such a GPU would, in this process for good."""
    _stand_ins[:] = [(capability, multiprocessors)]
    capability_and_multiprocessors.cache_clear()


@cache
def capability_and_multiprocessors(index: int | None) -> tuple[tuple[int, int], int]:
    """Compute capability of a device, and how many multiprocessors it has."""
    if index is None and _stand_ins:
        return _stand_ins[0]
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def on_its_device(kernel: Callable[P, R]) -> Callable[P, R]:
    """Run `kernel` with the device of its first argument, a tensor, current; a tensor on no GPU asks for none."""

    @wraps(kernel)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        index = args[0].device.index  # pyright: ignore[reportAttributeAccessIssue]
        if index is None or index == torch.cuda.current_device():
            return kernel(*args, **kwargs)
        with torch.cuda.device(index):
            return kernel(*args, **kwargs)

    return call
