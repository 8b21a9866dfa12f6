"""Launching a kernel in a few microseconds: what Triton works out at every call is worked out once.

`kernel[grid](...)` takes 30 to 50 µs of host time: it binds arguments, reads what it specializes on, makes a string of
the options, asks the driver about every pointer, encodes every TMA descriptor. At 8 tokens that is more than the
kernel. Here

    prepare(kernel, BLOCK=64, num_warps=4)((grid,), x, y, n)

does the same as `kernel[(grid,)](x, y, n, BLOCK=64, num_warps=4)`. The first two calls of a kind *are* that. From the
third on the compiled kernel is found under a key and its C launcher is called with plain addresses.

The key holds all that selects a compiled kernel, as fine as Triton's own choice or finer:
    constants and options       `prepare` keeps one form per set of them, types included (True is not 1)
    device                      a module is loaded per device
    tensor                      dtype, its device, address modulo 16 (Triton: whether it divides by 16)
    integer                     its value (Triton: whether 1, whether 16 divides it, its width); for a parameter in
                                do_not_specialize nothing but whether it fits 31 bits
    Box                         dtype, device, and the kind of its box
    None                        that it is None
A key counts only after two public launches under it gave the same compiled kernel; if they do not, that key stays with
the public launch for good.

TMA. A Box is a matrix and the piece of it that one copy fetches. Its encoded form holds address, shape and strides, so
that triple is its key: memory that was freed and given out again at the same address with the same shape has the same
descriptor. No tensor is kept alive by it.

Not seen after a form is prepared: changes of Triton's debug and instrumentation settings and of module constants. A
CPU tensor among the arguments gets a key of its own and thus Triton's error. Interpreter, other releases of Triton and
attached profilers take the public launch (launch_internals.py).

In a process that only compiles (rehearsal.py) launches are handed to a `Recorder` instead.
"""

# pyright: basic, reportArgumentType=false

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qerl_compile.kernels import launch_internals as internals
from qerl_compile.kernels.nvfp4_workspace import stream_of

__all__ = ["Box", "BoxKind", "Recorder", "prepare", "record"]

MOST_KEYS = 4096  # of one form: values of M, strides and addresses; about 1 KB each
MOST_BOXES = 16384  # of one argument: more than a model has weights; about 0.5 KB each


class BoxKind:
    """Extents and shared-memory layout of a TMA copy. Make one per use and keep it: it is compared by identity."""

    __slots__ = ("layout", "shape")

    def __init__(self, shape: tuple[int, int], layout: object) -> None:
        self.shape = shape
        self.layout = layout


class Box(NamedTuple):
    """A TMA argument: a matrix with contiguous rows at a 16-byte address, and how it is fetched."""

    tensor: Tensor
    kind: BoxKind


class _Prepared(NamedTuple):
    raw: internals.Raw
    encoded: tuple[dict[tuple[object, ...], tuple[object, ...]], ...]  # per TMA argument


Recorder = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
"""Receives a kernel, its arguments as Triton takes them, and its constexpr parameters and launch options."""

_recorders: list[Recorder] = []


def record(recorder: Recorder) -> None:
    """Launch nothing in this process from here on: hand every launch to `recorder`."""
    _recorders[:] = [recorder]
    prepare.cache_clear()


@lru_cache(maxsize=4096, typed=True)
def prepare(kernel: Any, **constants: Any) -> "_Form":
    """The kernel with its constexpr arguments and launch options, ready for `(grid, *arguments)`.

    Args:
        kernel: a `triton.jit` or `gluon.jit` function: TMA arguments first, constexpr parameters last.
        constants: constexpr parameters by name, and num_warps, num_stages, maxnreg, launch_pdl.

    Returns:
        A callable; its arguments are Boxes, tensors, integers and None, in the order of the parameters. Keep it where
        a microsecond counts: finding it again costs one.
    """
    return _Form(kernel, constants)


class _Form:
    __slots__ = ("constants", "constexprs", "kernel", "once", "prepared", "readers", "usable", "valued")

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel = kernel
        self.constants = constants
        self.usable = not _recorders and internals.AVAILABLE and internals.jit_function(kernel)
        if self.usable:
            plain = [p for p in kernel.params if not p.is_constexpr]
            # whether an integer argument's value matters; a parameter that is specialized in part counts as a whole
            self.valued = tuple(not p.do_not_specialize for p in plain)
            self.constexprs = len(kernel.params) - len(plain)
            self.usable = all(p.is_constexpr for p in kernel.params[len(plain) :])
        self.readers: dict[tuple[type, ...], Callable[..., Any]] = {}
        self.prepared: dict[tuple[object, ...], _Prepared | None] = {}
        self.once: dict[tuple[object, ...], object] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch on the current stream of the current device."""
        if not self.usable or internals.watched() or self.kernel.pre_run_hooks:
            self._public(grid, arguments)
            return
        kinds = tuple(map(type, arguments))
        reader = self.readers.get(kinds)
        if reader is None:
            reader = self.readers[kinds] = _reader(kinds, self.valued)
        device = torch.cuda.current_device()
        key, places, flat = reader(device, *arguments)
        prepared = self.prepared.get(key)
        if prepared is None:
            compiled = self._public(grid, arguments)
            if key not in self.prepared:
                self._learn(key, compiled, len(places))
            return
        raw, tables = prepared
        boxes: tuple[object, ...] = ()
        for i, place in enumerate(places):
            boxes += tables[i].get(place) or _encode(tables[i], place, arguments[i], raw.boxes[i])
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        raw.launch(x, y, z, stream_of(device), *raw.fixed, *boxes, *flat, *raw.constants)

    def _public(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> object:
        plain = tuple(_descriptor(a) if type(a) is Box else a for a in arguments)
        if _recorders:
            return _recorders[0](self.kernel, plain, self.constants)
        return self.kernel[grid](*plain, **self.constants)

    def _learn(self, key: tuple[object, ...], compiled: object, boxes: int) -> None:
        for table in (self.once, self.prepared):
            if len(table) >= MOST_KEYS:
                table.clear()
        before = self.once.pop(key, None)
        if before is None:
            self.once[key] = compiled
            return
        raw = internals.opened(compiled, self.constexprs, boxes) if compiled is before else None
        self.prepared[key] = None if raw is None else _Prepared(raw, tuple({} for _ in range(boxes)))


def _reader(kinds: tuple[type, ...], valued: tuple[bool, ...]) -> Callable[..., Any]:
    """A function of (device, *arguments of these types) -> key, places of the Boxes, other arguments for the launcher.

    Written out as source, as `dataclasses` does: a loop over the arguments takes twice as long. For (Tensor, int):
        def read(device, a0, a1):
            p0 = a0.data_ptr()
            return (device, a0.dtype, a0.get_device() * 16 + (p0 & 15), a1), (), (p0, a1)
    The types are not part of the key, but what they put there differs: a Box its kind, a tensor a dtype, an integer a
    value or `int`, None None. So no two lists of arguments share a key by accident.
    """
    lines, key, places, flat = [], ["device"], [], []
    for i, (kind, matters) in enumerate(zip(kinds, valued, strict=True)):
        a = f"a{i}"
        if kind is Box and len(places) == i:
            lines.append(f"t{i} = {a}.tensor")
            key += [f"{a}.kind", f"t{i}.dtype", f"t{i}.get_device()"]
            places.append(f"(t{i}.data_ptr(), t{i}.shape, t{i}.stride())")
        elif kind is int:
            key.append(a if matters else f"int if {a}.bit_length() < 32 else {a}")
            flat.append(a)
        elif kind is type(None):
            key.append(a)
            flat.append(a)
        elif issubclass(kind, Tensor):
            lines.append(f"p{i} = {a}.data_ptr()")
            key += [f"{a}.dtype", f"{a}.get_device() * 16 + (p{i} & 15)"]
            flat.append(f"p{i}")
        else:
            raise TypeError(f"argument {i}: expected Box (these first), Tensor, int or None, got {kind.__name__}")
    result = ", ".join(f"({''.join(f'{part}, ' for part in parts)})" for parts in (key, places, flat))
    names = ", ".join(f"a{i}" for i in range(len(kinds)))
    space: dict[str, Any] = {}
    exec("\n    ".join([f"def read(device, {names}):", *lines, f"return {result}"]), space)  # noqa: S102
    return space["read"]


def _encode(
    table: dict[tuple[object, ...], tuple[object, ...]], place: tuple[object, ...], box: Box, meta: dict[str, Any]
) -> tuple[object, ...]:
    if len(table) >= MOST_BOXES:
        table.clear()
    table[place] = encoded = internals.encoded(_descriptor(box), meta)
    return encoded  # another thread may have cleared the table


def _descriptor(box: Box) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(box.tensor, list(box.kind.shape), box.kind.layout)
