"""Judge a checkpoint's tensors against the model: are the names right, and are the numbers numbers?

transformers fills a missing tensor with random numbers and warns; a NaN in a weight passes through it unseen and turns
up hundreds of steps later as a loss. Both are errors here, by name. These two checks need the model or the data and so
come after `open_checkpoint`, which needs neither.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from qerl_compile.wording import MAX_LISTED, nearest, refuse_checkpoint, shown

_CHUNK_ELEMENTS = 1 << 22  # bounds the temporaries of the search for the bad ones


def compare_names(
    expected: Collection[str],
    found: Collection[str],
    *,
    where: str,
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
) -> None:
    """Refuse a checkpoint whose tensors are not those of the model.

    Args:
        expected: names that the model needs.
        found: names in the checkpoint.
        where: the directory, for errors.
        optional: names that may be absent, such as a tied `lm_head.weight`.
        ignored: names that may be present in surplus, such as buffers that the model computes itself.

    Raises:
        CheckpointError: missing or extra tensors; lists up to five, each with the name that was probably meant.
    """
    needed, there = set(expected), set(found)
    missing = [name for name in expected if name not in there and name not in set(optional)]
    extra = [name for name in found if name not in needed and name not in set(ignored) and name not in set(optional)]
    if missing:
        refuse_checkpoint(
            where,
            "every tensor of the model",
            f"{len(missing)} missing: {_with_guesses(missing, extra)}",
            do="Fetch the checkpoint again, and check that config.json belongs to it.",
        )
    if extra:
        refuse_checkpoint(
            where,
            "no tensor that the model does not have",
            f"{len(extra)} extra: {_with_guesses(extra, needed)}",
            do="Check that config.json belongs to these weights.",
        )


def _with_guesses(names: list[str], others: Collection[str]) -> str:
    guesses = ((name, nearest(name, others)) for name in names[:MAX_LISTED])
    text = ", ".join(f"{shown(name)} (is it {shown(guess)}?)" if guess else shown(name) for name, guess in guesses)
    return text if len(names) <= MAX_LISTED else f"{text} and {len(names) - MAX_LISTED} more"


def finite_or_raise(name: str, tensor: Tensor, file: Path | str) -> Tensor:
    """Return the tensor if it holds no NaN and no Inf.

    Args:
        name: the tensor's name, for errors.
        tensor: any shape, dtype and device. Integers pass; E4M3 is looked at bit by bit (it has NaN but no Inf).
        file: the shard it came from, for errors.

    Raises:
        CheckpointError: names the tensor, the file, the first bad element and how many there are.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0 or _all_finite(tensor):
        return tensor
    flat_E = tensor.detach().reshape(-1)
    bad_count, first_bad = 0, -1
    for begin in range(0, flat_E.numel(), _CHUNK_ELEMENTS):
        bad_E = (~_finite(flat_E[begin : begin + _CHUNK_ELEMENTS])).nonzero()
        if bad_count == 0 and len(bad_E):
            first_bad = begin + int(bad_E[0])
        bad_count += len(bad_E)
    index = [int(i) for i in torch.unravel_index(torch.tensor(first_bad), tensor.shape)]
    refuse_checkpoint(
        f"{file}: tensor {shown(name)}",
        "finite numbers",
        f"{float(flat_E[first_bad])} at {index}, {bad_count} of {flat_E.numel()} elements not finite",
        do="Do not use this checkpoint; the run that wrote it had diverged, or the file is damaged.",
    )


def _all_finite(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float8_e4m3fn:
        return bool(_finite(tensor).all())
    # aminmax hands NaN through and reads without a temporary: 18 GB/s for bf16 on one core, isfinite().all() 0.4 GB/s.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor.detach()))


def _finite(values_E: Tensor) -> Tensor:
    if values_E.dtype == torch.float8_e4m3fn:  # isfinite has no kernel for it; S.1111.111 is its only non-number
        return (values_E.view(torch.uint8) & 0x7F) != 0x7F
    return torch.isfinite(values_E)
