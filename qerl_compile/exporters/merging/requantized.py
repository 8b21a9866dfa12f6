"""Merge an adapter into NVFP4: round `T = deq(W4) + s·B·A` to 4 bits again, so that B·A survives.

The old codes and scales represent deq(W4) without error, and B·A is small: some 0.1 to 1 % of a weight, when half a
rounding step is some 10 %. Rounding T to nearest therefore gives the old codes back, whatever scales are searched for
it: every weight is as near to T as can be, and the adapter is gone. What has to be small is not the error of a weight
but that of their sums, and B·A is coherent: thousands of small changes in one direction. So T is rounded **without
bias**, on the old scales, up with the probability of how far up it lies:

    q = ⌊T / step⌋ · step, one step more if r < T / step - ⌊T / step⌋        r uniform in [0, 1); the mean of q is T

A few weights in a hundred change, by a whole step, and each row of the product has the adapter's effect plus a noise
of random sign. Measured on SmolLM2 (benchmarks/results/merge_rounding.txt, KL to the adapted model in nats per token):

                                                                     KL       effect kept   without the adapter
    nearest, afresh                                                  0.472    0.4 %         0.474
    nearest, block scales of least squared error (scale_search.py)   0.473    0.3 %         0.474
    error feedback between columns, with calibration inputs (GPTQ)   0.075    75 %          0.428
    without bias, which needs no inputs                              0.030    97 %          0.428

A weight at the end of its block's range cannot grow, and what clipping takes from B·A is a bias: some 6 % of its energy
if it is small. Where it is a tenth of B·A's energy or more, B·A is no small change any more and the group
is rounded afresh, to nearest, with scales of least squared error. The matrix scale stays in the first case; in both,
linears that an engine fuses share one.

`r` is drawn on the CPU from the module's path, so a merge gives the same bytes each time and on every device.

`requantized(model)` is a context in which the model *holds* the merged weights and no adapter: exporters read it as
any NVFP4 model. It must not be run there, for its graphs are bound to the old tensors; afterwards all is as before.

Shape suffixes: N output features, K input features.
"""

import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import TRAINED_NORM, adapters_of, trained_norms_of
from qerl_compile.exporters.merging.modes import delta
from qerl_compile.formats import e2m1
from qerl_compile.formats.nvfp4 import PackedNVFP4, dequantize, pack, per_column, row_chunks
from qerl_compile.formats.scale_search import search_group
from qerl_compile.passes.quantize import GLOBAL_SCALES, packed_of
from qerl_compile.transforming import state_of

MOST_CLIPPED = 0.1
"""Share of |B·A|² that clipping may take before a group is rounded afresh. With Gaussian weights and a Gaussian B·A it
is 0.056 up to a third of the weights' size, and 0.105 at the same size."""


@contextmanager
def requantized(model: nn.Module) -> Iterator[None]:
    """Let the model hold its merged NVFP4 weights, merged norms and no adapter; for exporters, not for running.

    Args:
        model: a transformed model with an adapter; checked by `modes.check_merge`.
    """
    adapters, norms = adapters_of(model), trained_norms_of(model)
    groups = packed_groups(model, adapters)
    changed = {*adapters, *norms, *(path for group in groups for path in group)}
    modules = [model.get_submodule(path) for path in sorted(changed)]
    kept = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
    try:
        with torch.no_grad():
            for group in groups:
                deltas = {path: delta(adapters[path]) for path in group if path in adapters}
                packed = {path: found for path in group if (found := packed_of(model.get_submodule(path))) is not None}
                for path, merged in merge_group(packed, deltas).items():
                    _place_packed(model, path, merged)
            for path in set(adapters).difference(*groups):
                _place_dense(model, path, delta(adapters[path]))
            for path in adapters:
                module = model.get_submodule(path)
                del module._parameters["lora_A"], module._parameters["lora_B"]
            for path, trained_D in norms.items():
                module = model.get_submodule(path)
                dtype = module.get_parameter("weight").dtype
                module._parameters["weight"] = _frozen(trained_D.detach().to(dtype))
                del module._parameters[TRAINED_NORM]
        yield
    finally:
        for module, parameters, buffers in kept:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


def packed_groups(model: nn.Module, adapters: Collection[str]) -> list[tuple[str, ...]]:
    """Return the groups of packed linears that share a matrix scale and of which one at least has an adapter.

    Args:
        model: a transformed model.
        adapters: module paths.
    """
    plan = state_of(model).plan
    groups = dict.fromkeys(plan.group_of(path) for path in adapters if path in plan.quantize)
    return [group for group in groups if packed_of(model.get_submodule(group[0])) is not None]


def merge_group(packed: Mapping[str, PackedNVFP4], deltas: Mapping[str, Tensor]) -> dict[str, PackedNVFP4]:
    """Round `deq(packed) + delta` of linears that share a matrix scale to NVFP4, without bias.

    Args:
        packed: path → the weight [N, K] that the adapter was trained on.
        deltas: path → float32 [N, K]; a path that is not here gets none and keeps its bits.

    Returns:
        path → packed weight. With the old scales they keep their direction; afresh they have a divisor.
    """
    clipped, whole = 0.0, 0.0
    for path, delta_NK in deltas.items():
        clipped += _clipped_energy(packed[path], delta_NK)
        whole += float(delta_NK.square().sum(dtype=torch.float64))
    if clipped >= MOST_CLIPPED * whole > 0:
        targets = {path: dequantize(each, torch.float32) for path, each in packed.items()}
        for path, delta_NK in deltas.items():
            targets[path] += delta_NK
        return search_group(targets, "mse")
    return dict(packed) | {path: _without_bias(packed[path], deltas[path], path) for path in deltas}


def _clipped_energy(packed: PackedNVFP4, delta_NK: Tensor) -> float:
    """Sum of squares of what lies beyond ±6 block scales."""
    total = 0.0
    for rows in row_chunks(packed.shape, delta_NK.device):
        units_NK, step_NK = _units(packed, delta_NK, rows)
        over_NK = (units_NK.abs() - e2m1.MAX_VALUE).clamp_(min=0).mul_(step_NK)
        total += float(over_NK.square_().sum(dtype=torch.float64))
    return total


def _without_bias(packed: PackedNVFP4, delta_NK: Tensor, path: str) -> PackedNVFP4:
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    codes_NK2 = torch.empty_like(packed.codes_NK2)
    for rows in row_chunks(packed.shape, delta_NK.device):
        units_NK, _ = _units(packed, delta_NK, rows)
        random_NK = torch.rand(units_NK.shape, generator=generator).to(units_NK.device)
        codes_NK2[rows] = pack(e2m1.encode(round_without_bias(units_NK, random_NK)))
    return PackedNVFP4(codes_NK2, packed.block_decode_scale_NG, packed.global_scale, packed.direction)


def round_without_bias(units: Tensor, random: Tensor) -> Tensor:
    """Round to a value of E2M1, down or up, such that the mean over `random` is the number itself.

    Args:
        units: float32; magnitudes above 6 are clipped.
        random: float32 in [0, 1), of the same shape.

    Returns:
        float32. A value of E2M1 stays what it is.
    """
    magnitude = units.abs().clamp_(max=e2m1.MAX_VALUE)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))  # the gaps of E2M1
    steps = magnitude / step
    below = steps.floor()
    return (below + (random < steps - below)).mul_(step).copysign_(units)


def _units(packed: PackedNVFP4, delta_NK: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Some rows of the target in units of E2M1, and what one unit stands for: fp32 [N, K] each."""
    step_NK = per_column(packed.block_decode_scale_NG[rows].float()) * packed.decode_scale
    values_NK = e2m1.decode(packed.codes_NK2[rows], torch.float32)
    return values_NK + delta_NK[rows] / step_NK, step_NK


def _place_dense(model: nn.Module, path: str, delta_NK: Tensor) -> None:
    module = model.get_submodule(path)
    weight_NK = module.get_parameter("weight")
    module._parameters["weight"] = _frozen((weight_NK.float() + delta_NK).to(weight_NK.dtype))


def _place_packed(model: nn.Module, path: str, merged: PackedNVFP4) -> None:
    module = model.get_submodule(path)
    module._parameters["weight_packed"] = _frozen(merged.codes_NK2)
    module._parameters["weight_scale"] = _frozen(merged.block_decode_scale_NG)
    for leaf in GLOBAL_SCALES.values():
        module._buffers.pop(leaf, None)
    module._buffers[GLOBAL_SCALES[merged.direction]] = merged.global_scale.clone()  # partners would share one tensor


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
