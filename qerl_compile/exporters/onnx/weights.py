"""Which numbers the graph computes with, and how each is stored.

    packed linears           their codes and scales (packed_nodes.py); full weights that are trained get theirs here
    adapter "kept"           lora_A and lora_B, float32, in a branch of two MatMuls (twin.py)
    adapter "folded"         W + B·A · alpha / r, dense, in the dtype that the linear had before it was packed
    norms that were trained  as trained, float32
    everything else          matrices of 16 bits as they are, with a Cast to float32 after; the rest float32

The graph computes in float32. A 16-bit table that is only looked up is cast after the look-up, so a runtime need not
hold it in 32 bits. Tensors that are one in the model (a tied head) are one initializer.

**Folding.** A sum W + B·A is on no 4-bit grid. Rounding it to 4 bits again would lose the adapter, so the adapted
linears become dense: four times their packed size in 16 bits, eight in 32. It is for runtimes in which two more small
MatMuls a linear cost more than that.

Noise is no part of an export: the twin has none.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import TRAINED_NORM, Adapter, adapters_of
from qerl_compile.errors import ExportError
from qerl_compile.exporters.served_state import packed_linears
from qerl_compile.formats.nvfp4 import dequantize
from qerl_compile.formats.packed_nvfp4 import PackedNVFP4
from qerl_compile.graph import held_tensor, leaf_tensor
from qerl_compile.passes.quantize import packed_of


@dataclass(frozen=True)
class Numbers:
    """All numbers of an export, read and checked before anything is traced or written.

    Attributes:
        packed: linears that are written packed, by module path.
        branches: adapters that are written as branches, by module path.
        folded: adapters that are added into dense weights, by module path.
    """

    packed: Mapping[str, PackedNVFP4]
    branches: Mapping[str, Adapter]
    folded: Mapping[str, Adapter]


def read_numbers(model: nn.Module, *, adapter: str) -> Numbers:
    """Find what is packed and adapted.

    Args:
        model: a transformed causal LM.
        adapter: "kept" or "folded".

    Raises:
        ExportError: nothing is packed, a packed weight breaks its format, NaN or Inf in another one, or an adapter is
            to be folded into a weight that two modules share.
        FormatError: NaN or Inf in a full weight that is trained and would be packed.
    """
    adapters = adapters_of(model)
    folded = adapters if adapter == "folded" else {}
    packed = packed_linears(model)
    _refuse_not_finite(model, packed)
    _refuse_shared(model, folded)
    return Numbers(
        packed={path: mine for path, mine in packed.items() if path not in folded},
        branches={} if folded else adapters,
        folded=folded,
    )


def _refuse_not_finite(model: nn.Module, packed: Mapping[str, PackedNVFP4]) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        if path in packed and leaf.startswith("weight"):
            continue  # checked with the format's invariants
        if tensor.is_floating_point() and not tensor.detach().isfinite().all():
            raise ExportError(
                where=name,
                expected="finite numbers",
                got="NaN or Inf",
                do="Load the model again, or go back to an earlier checkpoint if this is an adapter.",
            )


def _refuse_shared(model: nn.Module, folded: Mapping[str, Adapter]) -> None:
    holders = Counter(id(module._parameters.get("weight")) for module in model.modules())
    for path in folded:
        weight = model.get_submodule(path)._parameters.get("weight")
        if weight is not None and holders[id(weight)] > 1:
            raise ExportError(
                where=path,
                expected="a weight of its own to fold the adapter into",
                got="a weight that another module shares, such as a head tied to the embedding",
                do="Export with adapter='kept'.",
            )


def dense_number(model: nn.Module, numbers: Numbers, name: str) -> tuple[Callable[[], Tensor], torch.dtype]:
    """Return how to read a tensor that is written dense, and the dtype that it is written in.

    Args:
        model: the transformed model.
        numbers: what `read_numbers(model)` found.
        name: its checkpoint name, such as `model.norm.weight`.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and path in numbers.folded:
        ghost = held_tensor(module, "weight")
        return partial(_folded, module, numbers.folded[path]), ghost.dtype
    trained = leaf_tensor(module, TRAINED_NORM) if leaf == "weight" else None
    tensor = held_tensor(module, leaf) if trained is None else trained
    if isinstance(module, nn.Embedding) and tensor.ndim == 0:
        # Gemma multiplies embeddings by sqrt(d) rounded to their dtype; a model of 16 bits was trained with that.
        tensor = tensor.to(module.weight.dtype)
    stored = tensor.dtype if tensor.ndim > 1 and tensor.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return partial(tensor.detach().to, stored), stored


def _folded(module: nn.Module, adapter: Adapter) -> Tensor:
    packed = packed_of(module)
    weight = held_tensor(module, "weight")
    w_NK = weight.detach().float() if packed is None else dequantize(packed, torch.float32)
    delta_NK = adapter.b_NR.detach().float() @ adapter.a_RK.detach().float()
    return w_NK.add_(delta_NK, alpha=adapter.alpha / adapter.rank).to(weight.dtype)
