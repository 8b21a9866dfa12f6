"""Graph passes, in the order in which they run.

    training graphs   trained norms → noise → lora → fuse → quantize → fake quantize → sparsify → recompute
    rollout graphs    trained norms → noise → fuse → quantize → fake quantize → sparsify → adapt → residual → rotary

and in both, for models with packed experts, experts after quantize.

A pass is two things (ARCHITECTURE.md, idea 4): `state`, which says what a module owns afterwards, and `__call__`,
which says what the graph computes afterwards. A pass never touches a module's forward, never patches a class, and
never asks for a model family: it matches by graph fact (this linear's weight, the linears that share this input) and
uses names only to select.
"""

from collections.abc import Callable

from qerl_compile.graph import Program
from qerl_compile.passes.adapt import Adapt
from qerl_compile.passes.experts import Experts
from qerl_compile.passes.fake_quantize import FakeQuantize
from qerl_compile.passes.fuse import Fuse
from qerl_compile.passes.lora import LoRA, LoraSite
from qerl_compile.passes.noise import Noise
from qerl_compile.passes.quantize import Quantize
from qerl_compile.passes.quantize_site import QuantizeSite
from qerl_compile.passes.recompute import Recompute
from qerl_compile.passes.residual import Residual
from qerl_compile.passes.rotary import Rotary
from qerl_compile.passes.sparsify import Sparsify
from qerl_compile.passes.trained_norms import TrainedNorms

Pass = Callable[[Program], None]

__all__ = [
    "Adapt",
    "Experts",
    "FakeQuantize",
    "Fuse",
    "LoRA",
    "LoraSite",
    "Noise",
    "Pass",
    "Quantize",
    "QuantizeSite",
    "Recompute",
    "Residual",
    "Rotary",
    "Sparsify",
    "TrainedNorms",
]
