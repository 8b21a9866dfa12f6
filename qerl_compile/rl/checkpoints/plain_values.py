"""Python values as JSON and tensors, and back with every bit and type: no pickle.

JSON has no tensors, tuples, integer keys, NaN or Inf. Each of them becomes an object with one member that says what it
was, and so does a dict, which leaves no two meanings for an object:

    None, bool, int, finite float, str, list      themselves (Python prints a float so that it reads back the same)
    (0.9, 0.99)                                   {"tuple": [0.9, 0.99]}
    {0: {"step": tensor(3.)}}                     {"dict": [[0, {"dict": [["step", {"tensor": "t0"}]]}]]}
    inf                                           {"float": "inf"}

The tensors go into a safetensors file under the names t0, t1, …. That is enough for the `state_dict` of any torch
optimizer and for every generator's state. What this module does not do: objects of classes, shared references (a
tensor that occurs twice is stored twice), devices (everything comes back on the CPU), autograd.
"""

import math
from typing import Any

from torch import Tensor

from qerl_compile.errors import ExportError
from qerl_compile.wording import refuse_checkpoint, shown

MAX_DEPTH = 32
"""Levels of nesting; the state of torch's own optimizers has 4."""


def pack(value: Any, where: str) -> tuple[Any, dict[str, Tensor]]:
    """Return a value as JSON and the tensors in it.

    Args:
        value: of None, bool, int, float, str, list, tuple, dict (keys int or str) and tensors of any dtype.
        where: what errors call the value.

    Returns:
        (what json.dumps takes, tensors by the names in it: on the CPU, contiguous, none sharing another's memory).

    Raises:
        ExportError: something else is in it, or it is nested deeper than 32 levels.
    """
    tensors: dict[str, Tensor] = {}
    memories: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        """The tensor on the CPU, copied if it is a view or occurs twice: safetensors refuses shared memory."""
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.numel() * tensor.element_size() or memory.data_ptr() in memories:
            return tensor.clone()
        memories.add(memory.data_ptr())
        return tensor

    def packed(value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            _refuse(path, f"at most {MAX_DEPTH} levels of nesting", "more")
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if isinstance(value, Tensor):
            name = f"t{len(tensors)}"
            tensors[name] = own(value)
            return {"tensor": name}
        if isinstance(value, list | tuple):
            items = [packed(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, dict) and all(type(key) in (int, str) for key in value):
            return {"dict": [[key, packed(item, f"{path}[{key!r}]", depth + 1)] for key, item in value.items()]}
        _refuse(
            path, "None, bool, int, float, str, list, tuple, dict with such keys, or a tensor", type(value).__name__
        )

    def _refuse(path: str, expected: str, got: str) -> Any:
        do = "Keep it out of what is saved, or save it as one of these."
        raise ExportError(where=path, expected=expected, got=got, do=do)

    return packed(value, where, 0), tensors


def unpack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Return what `pack` was given.

    Args:
        value: parsed JSON.
        tensors: by name; each is used once.
        where: the file, for errors.

    Raises:
        CheckpointError: it is not what `pack` makes, or names and tensors do not agree.
    """
    left = dict(tensors)

    def unpacked(value: Any, depth: int) -> Any:
        if depth > 2 * MAX_DEPTH + 2:
            refuse_checkpoint(where, f"at most {MAX_DEPTH} levels of nesting", "more", do=_DO)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list):
            return [unpacked(item, depth + 1) for item in value]
        if isinstance(value, dict) and len(value) == 1:
            [(kind, inner)] = value.items()
            if kind == "tensor" and isinstance(inner, str) and inner in left:
                return left.pop(inner)
            if kind == "tuple" and isinstance(inner, list):
                return tuple(unpacked(item, depth + 1) for item in inner)
            if kind == "float" and inner in ("nan", "inf", "-inf"):
                return float(inner)
            if kind == "dict" and isinstance(inner, list) and all(_is_member(item) for item in inner):
                result = {key: unpacked(item, depth + 1) for key, item in inner}
                if len(result) == len(inner):
                    return result
        refuse_checkpoint(where, "a value as qerl-compile writes it, and its tensor", shown(value), do=_DO)

    result = unpacked(value, 0)
    if left:
        refuse_checkpoint(where, "a use of every tensor", f"none of {shown(sorted(left)[0])}", do=_DO)
    return result


_DO = "Do not use this checkpoint; another program wrote it."


def _is_member(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (int, str)
