"""2:4 sparsity: of every four consecutive weights along the input, two are zero.

    kept    W[n, k] is among the two of its four with the largest score; of equal scores the first stays
    score   |W[n, k]|                        magnitude (Mishra et al. 2021, arXiv 2104.08378)
            |W[n, k]| · ‖X[:, k]‖₂           Wanda (Sun et al. 2023, arXiv 2306.11695): needs the norms of the inputs

State and graph depend on what becomes of the weight afterwards:

    packed    masked, then quantized. A zero has the code 0 and decodes to exactly 0, so that the codes are 2:4 as well;
              the graph is that of any packed weight.
    frozen    masked once in place; the graph stays as it is.
    trained   masked once in place, and in the graph, so that gradients of the zeros are zero and they stay zero:

                  before    y = qerl::fake_quantized_linear(x, W)
                  after     y = qerl::fake_quantized_linear(x, where(kept, W, 0))

The mask of trained weights is chosen once and then fixed, as in NVIDIA's ASP and SparseGPT's fine-tuning: a mask that
follows the weights makes them flicker between two patterns. It is a buffer `weight_kept` (bool [N, K]) that is not
saved, because a saved weight says it already: zeros rank last, so masking a weight that is 2:4 changes nothing. The
same holds for weights that calibration masked by Wanda's score before.

An export is dense: the two formats have no sparse layout, and engines that want one compress the zeros themselves. What
this module does not do: other patterns, or redraw a mask while training.

Shape suffixes: N rows (output features), K columns (input features).
"""

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qerl_compile.errors import FormatError
from qerl_compile.graph import Program

FOUR, KEPT = 4, 2
MASK = "weight_kept"


def mask_2_4(w_NK: Tensor, channel_norm_K: Tensor | None = None) -> Tensor:
    """Say which weights stay: two of every four consecutive inputs, those with the largest scores.

    Args:
        w_NK: any float dtype [N, K], K a multiple of 4, finite.
        channel_norm_K: ‖X[:, k]‖₂ of each input channel over the calibration tokens, [K], for Wanda's score; None
            scores by magnitude. A common factor of all channels changes nothing.

    Returns:
        bool [N, K] on the weight's device, True where the weight stays; the first of equal scores stays.

    Raises:
        FormatError: K is no multiple of 4, or the norms are not [K].
    """
    check_fours("weight", w_NK)
    rows, columns = w_NK.shape
    score_NK = w_NK.detach().abs()
    if channel_norm_K is not None:
        if channel_norm_K.shape != (columns,):
            raise FormatError(
                where="channel_norm_K",
                expected=f"one norm per input channel: shape [{columns}]",
                got=f"shape {list(channel_norm_K.shape)}",
                do="Pass the norms of this linear's own input.",
            )
        score_NK = score_NK.float() * channel_norm_K.to(score_NK.device, torch.float32)
    scores = score_NK.view(rows, columns // FOUR, FOUR).unbind(-1)
    kept = []
    for mine, score in enumerate(scores):
        # A sort would have to be stable on every device; to count who ranks higher needs no order at all.
        higher = [s > score if other > mine else s >= score for other, s in enumerate(scores) if other != mine]
        kept.append(torch.stack(higher).sum(0) < KEPT)
    return torch.stack(kept, dim=-1).view(rows, columns)


def sparse_2_4(w_NK: Tensor) -> Tensor:
    """Return a copy of a weight [N, K] with zeros where its magnitude mask says so; 2:4 weights stay as they are."""
    return w_NK.masked_fill(~mask_2_4(w_NK), 0.0)


def check_fours(path: str, weight: Tensor) -> None:
    """Refuse a weight [N, K] whose K is no multiple of 4; its values are not looked at.

    Raises:
        FormatError: naming the module.
    """
    if weight.shape[-1] % FOUR:
        raise FormatError(
            where=path,
            expected=f"in_features to be a multiple of {FOUR}, of which {KEPT} stay",
            got=f"a weight of shape {list(weight.shape)}",
            do="Exclude it with an earlier sparsify rule with `score: none`.",
        )


@dataclass(frozen=True)
class Sparsify:
    """Masks the trained weights of `sites` (module paths) in the graph."""

    sites: Set[str]

    @staticmethod
    def state(module: nn.Module, *, trained: bool) -> None:
        """Set two weights of every four of the linear to zero, in place; a trained one remembers which."""
        weight = module.get_parameter("weight")
        kept_NK = mask_2_4(weight)
        weight.data.masked_fill_(~kept_NK, 0.0)
        if trained:
            module.register_buffer(MASK, kept_NK, persistent=False)

    def __call__(self, program: Program) -> None:
        """Mask every read of a site's weight."""
        for node in list(program.weights()):
            path, _, leaf = str(node.target).rpartition(".")
            if leaf != "weight" or path not in self.sites:
                continue
            users = list(node.users)
            with program.graph.inserting_after(node):
                mask = program.weight(f"{path}.{MASK}")
            with program.graph.inserting_after(mask):
                masked = program.call(torch.where, mask, node, 0.0)
            for user in users:
                user.replace_input_with(node, masked)
