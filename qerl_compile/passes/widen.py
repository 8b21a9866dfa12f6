"""Let the reads of a norm's weight see a float32 tensor instead, and round once where the model rounded before.

    before      y = w * x̂                   w: bf16 [d]
    after       y = (wide * x̂).to(bf16)     wide: float32 [d]

Shared by the two passes that change what a norm multiplies with (trained_norms.py, noise.py): both have numbers that
bf16 cannot hold. With wide = w this changes no bit, since the product of two bf16 numbers is exact in float32. A model
that computes its norm in float32 itself gets no cast, because its product had that type before.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from qerl_compile.graph import Program


def widen_reads(program: Program, node: fx.Node, users: Iterable[fx.Node], wide: fx.Node) -> None:
    """Give `users` of the weight `node` the float32 node `wide`, and cast each result back to the dtype that it had."""
    for user in users:
        user.replace_input_with(node, wide)
        before = user.meta.get("example_value")
        program.infer(user)
        if isinstance(before, Tensor) and before.dtype != torch.float32:
            with program.replacing(user) as result:
                result.append(program.call(torch.ops.aten.to.dtype, user, before.dtype))
