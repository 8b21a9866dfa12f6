"""How a weight becomes codes: the choices of a quantize rule that the graph does not show.

Two linears whose sites differ only in how scales were searched or codes rounded run through the same graph: a packed
weight is codes and scales, whatever chose them. So a site is a value of its own, and only its `format` is a fact that
graphs depend on (plan.py, `Plan.kind`). Members of a fused group must have equal sites, because they share one scale.

    amax            the bytes of compressed-tensors                        formats/nvfp4.py
    mse, four_over_six   block scales searched for the least error         formats/scale_search.py
    gptq            column by column with error feedback: needs data       calibrating/

What this module does not do: round by `gptq`. Whoever has the data rounds, and gives the result to `Attacher.packed`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qerl_compile.formats.nvfp4 import PackedNVFP4, quantize_group


@dataclass(frozen=True)
class QuantizeSite:
    """What a quantize rule says about one packed linear; fields as in recipe_fields.QuantizeRule."""

    format: Literal["nvfp4"] = "nvfp4"
    scales: Literal["amax", "mse", "four_over_six"] = "amax"
    rounding: Literal["nearest", "gptq"] = "nearest"

    def pack(self, weights: Mapping[str, Tensor]) -> dict[str, PackedNVFP4]:
        """Quantize the weights of one group, rounding to nearest.

        Args:
            weights: module path → bf16, fp16 or fp32 [N, K]; all of this site, sharing an input.

        Returns:
            module path → packed weight, all with one global scale.

        Raises:
            FormatError: a weight cannot be packed.
        """
        if self.scales == "amax":
            return quantize_group(weights)
        from qerl_compile.formats.scale_search import search_group

        return search_group(weights, self.scales)
