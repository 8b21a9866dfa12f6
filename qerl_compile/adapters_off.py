"""The model without its adapter, for a while: the reference of a KL term, a baseline, a distillation teacher.

    with adapters_off(model):
        reference_BC = token_logps(model, …)      # the packed base, and nothing else

The branch is `y = W x + B·(A x)·s`. With B = 0 it adds an exact zero, so what the block computes is bit for bit what a
model transformed without adapters computes. A trained norm (passes/trained_norms.py) holds the base's weight beside
its own. B is therefore zeroed and trained norms set to the base's weights, in place, and all is copied back:

- no graph changes and none is compiled for it: training graphs read `lora_B` when they are called, and rollout engines
  round it into their stacked copies (stacked_adapters.py) when a rollout begins;
- nested blocks need no counting: the inner one saves and restores zeros;
- restoring is a copy of the same float32 numbers, also after an exception.

Another way is a factor per module that the branch is multiplied with. It would save the copy (N·r floats per module,
0.3 GB for a 7B model at rank 32) and cost a read in every graph of every step.

**No gradients inside.** The numbers are written behind autograd's back (`.data`), so that a graph recorded before
the block still runs backward after it. A graph recorded inside would run backward through restored numbers and give
wrong gradients; the block switches recording off, and nothing in it could be trained anyway.

What this module does not do: touch the noise (`transforming.resample_noise(model, 0.0)`), or save. Inside, `lora_B`
*is* zero: `adapters_are_off` lets writers refuse.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qerl_compile.adapter_files import adapters_of, trained_norms_of
from qerl_compile.graph import held_tensor

_DEPTH = "qerl_adapters_off"  # an attribute of the model: how many blocks it is in


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute without its adapters inside the block, and without recording gradients.

    Args:
        model: a transformed model, or any with Parameters `lora_A` and `lora_B`; without adapters nothing happens.
    """
    norms = trained_norms_of(model)
    learned = [adapter.b_NR.data for adapter in adapters_of(model).values()]
    base = [torch.zeros((), device=b_NR.device) for b_NR in learned]
    learned += [trained_D.data for trained_D in norms.values()]
    base += [held_tensor(model.get_submodule(path), "weight").detach() for path in norms]
    kept = [tensor.clone() for tensor in learned]
    depth = vars(model).get(_DEPTH, 0)
    vars(model)[_DEPTH] = depth + 1
    try:
        for tensor, without in zip(learned, base, strict=True):
            tensor.copy_(without)
        with torch.no_grad():
            yield
    finally:
        for tensor, before in zip(learned, kept, strict=True):
            tensor.copy_(before)
        vars(model)[_DEPTH] = depth


def adapters_are_off(model: nn.Module) -> bool:
    """Return whether the model is inside `adapters_off`, where its parameters are not what was learned."""
    return vars(model).get(_DEPTH, 0) > 0


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return all that makes the model differ from its base: `lora_A`, `lora_B` and trained norms, in module order."""
    factors = [factor for adapter in adapters_of(model).values() for factor in (adapter.a_RK, adapter.b_NR)]
    return [*factors, *trained_norms_of(model).values()]
