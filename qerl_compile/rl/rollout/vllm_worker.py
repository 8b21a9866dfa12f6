"""What runs inside vLLM's worker processes: norm weights are read from a file and loaded into vLLM's copy of the model.

vLLM adds the class that `worker_extension_cls` names to its worker's bases, and `LLM.collective_rpc("qerl_load_norms",
args=(path,))` then calls the method on every worker. Both are documented, and unlike a function sent to
`LLM.apply_model` the call carries only strings: nothing is pickled, so VLLM_ALLOW_INSECURE_SERIALIZATION stays off.

**A norm counts as loaded when it has been read back.** `load_weights` of vLLM's models passes over names that it does
not know without a word (0.24.0, models/qwen2.py: `if name not in params_dict: continue`), and noise that is silently
applied to nothing is how the method failed before (design/method.md, trap 2). So each norm is loaded alone, the
parameter that vLLM says it loaded is compared with the file, bit by bit, and only then is its name returned.

`load_weights` copies into the parameter's storage, which is what vLLM's CUDA graphs read.
"""

from typing import Any

import torch
from torch import Tensor, nn


class NormLoader:
    """Mixed into vLLM's worker, whose `get_model()` returns the model of this rank; all names must be new to it."""

    def qerl_load_norms(self: Any, path: str) -> list[str]:
        """Load every tensor of a safetensors file; return the checkpoint names of those found in the model afterwards.

        Args:
            path: the file, on a disk that the worker sees; names are those of the checkpoint.
        """
        from safetensors.torch import load_file

        model = self.get_model()
        return [name for name, weight in load_file(path).items() if _loaded(model, name, weight)]


def _loaded(model: Any, name: str, weight: Tensor) -> bool:
    """Whether `name` is on this rank (with pipeline parallelism it may be elsewhere) and has the value of the file."""
    loaded = model.load_weights([(name, weight)]) or ()
    held: list[nn.Parameter] = [model.get_parameter(each) for each in loaded]
    return len(held) == 1 and held[0].dtype == weight.dtype and torch.equal(held[0].detach().cpu(), weight)
