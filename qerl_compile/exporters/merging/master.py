"""The bf16 master: the weights that a packed model was made from, read again and compared with the model.

A path or hub id can hold other weights than it did when the model was packed: a newer revision, an instruct model in
the place of its base. Names and shapes would agree. What tells is the model itself:

- tensors that stayed dense must be equal, bit for bit, once both are rounded to the model's dtype;
- a linear's packed form must be what rounding to NVFP4 makes of the master: about 20 dB of signal to noise. Below
  10 dB it is another matrix. (Unrelated weights give about 0 dB or less, searched scales and GPTQ not below 15 dB.)

Tensors are read one at a time and in whatever order is asked for; nothing is kept.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.checkpoint_tensors import finite_or_raise
from qerl_compile.errors import ExportError
from qerl_compile.exporters.merging.dense_names import dense_shapes
from qerl_compile.exporters.merging.held import Held
from qerl_compile.exporters.sqnr import sqnr_db
from qerl_compile.formats.nvfp4 import dequantize
from qerl_compile.wording import listed, shown

SAME_MATRIX_DB = 10.0


class Master:
    """The dense checkpoint that a model was packed from.

    Args:
        root: its directory.
        model: the transformed model.

    Raises:
        CheckpointError: the directory is damaged or hostile.
        ExportError: it is packed itself, or holds other names or shapes than the model's.
    """

    def __init__(self, root: Path, model: nn.Module) -> None:
        self.checkpoint = open_checkpoint(root)
        self._held = Held(model)
        if self.checkpoint.config.get("quantization_config") is not None:
            raise self._other("dense weights in 16 bits", "a checkpoint that is quantized itself")
        shapes = dense_shapes(model)
        absent = [name for name in shapes if name not in self.checkpoint.tensors]
        if absent:
            raise self._other("every weight of the model", f"no {listed(absent)}")
        for name, shape in shapes.items():
            found = self.checkpoint.tensors[name].shape
            if found != shape:
                raise self._other(f"{shown(name)} of shape {list(shape)}", f"shape {list(found)}")

    def read(self, name: str) -> Tensor:
        """Return a tensor on the model's device, in its own dtype, after comparing it with the model's.

        Raises:
            CheckpointError: NaN or Inf in it.
            ExportError: it is not what the model was made from.
        """
        from safetensors import safe_open

        own = self._held.tensor(name)
        file = self.checkpoint.tensors[name].file
        with safe_open(file, framework="pt", device=str(own.device)) as reader:
            tensor = finite_or_raise(name, reader.get_tensor(name), file)
        packed = self._held.packed(name)
        if packed is not None:
            found_db = sqnr_db(tensor.float(), dequantize(packed, torch.float32))
            if found_db < SAME_MATRIX_DB:
                raise self._other(
                    f"{shown(name)} to be the model's up to 4-bit rounding, some 20 dB", f"{found_db:.1f} dB"
                )
        elif not torch.equal(tensor.to(own.dtype), own):
            raise self._other(f"{shown(name)} equal to the model's", "another tensor")
        return tensor

    def _other(self, expected: str, got: str) -> ExportError:
        do = "Name the bf16 checkpoint that this model was made from (base=…, --base)."
        return ExportError(where=str(self.checkpoint.root), expected=expected, got=got, do=do)
