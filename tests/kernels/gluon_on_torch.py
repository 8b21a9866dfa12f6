"""Run a Gluon or Triton kernel on torch tensors: the device code's own source, with stand-ins for `gl` and `tl`.

Gluon has no interpreter. Here every function of a kernel's module is called as plain Python with its globals replaced:
a tensor is a torch tensor, a layout is nothing (converting moves values between threads and does not change the
tensor), inline PTX is executed instruction by instruction (ptx_on_torch.py), a pointer is a flat tensor and an offset,
shared memory is a torch tensor full of NaN, mbarriers block, the copy engine copies at once, and every partition of
`warp_specialize` is a thread. CTAs run one after the other, in launch order unless told otherwise, so a CTA that waits
for a later one is found out; waits have a deadline.

What it shows: index arithmetic (accesses outside of a tensor fail), that nothing depends on what a masked load leaves
undefined, the order of dimensions, decoding, that all roles walk the same tiles and meet at every barrier, what is left
in the counters, which CTA waits for which. What it cannot show: registers and layouts (Triton checks those that are
marked trivial when it compiles), synchronization within a role, the timing of asynchronous copies and of `wgmma`.
"""

import functools
import itertools
import sys
import threading
import types

import torch

from tests.kernels import ptx_on_torch

DEADLINE = 20.0


class Tensor(torch.Tensor):
    """Device code asks a tensor for `type.layout`, and its values never change: `+=` makes a new one."""

    type = types.SimpleNamespace(layout=None)

    def __iadd__(self, other):
        return self + other


def tensor(value):
    return value.as_subclass(Tensor)


class Barrier:
    def __init__(self):
        self.changed, self.parity, self.bytes = threading.Condition(), 0, 0

    def init(self, count):
        self.count = self.pending = count

    def _settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.parity, self.pending = self.parity ^ 1, self.count
            self.changed.notify_all()

    def arrive(self, count, more_bytes=0):
        with self.changed:
            self.pending, self.bytes = self.pending - count, self.bytes + more_bytes
            assert self.pending >= 0
            self._settle()

    def complete(self, size):
        with self.changed:
            self.bytes -= size
            self._settle()

    def wait(self, parity):
        with self.changed:
            assert self.changed.wait_for(lambda: self.parity != parity, DEADLINE), "a barrier is never passed"


class Barriers:
    def __init__(self, count):
        self.index = [Barrier() for _ in range(count)].__getitem__


class Shared:
    def __init__(self, data):
        self.data, self.shape = data, list(data.shape)

    def index(self, i):
        return Shared(self.data[i])

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return tensor(self.data.clone())

    def store(self, value):
        assert list(value.shape) == self.shape
        self.data.copy_(value)


class Pointer:
    """Elements `offset` (an integer or a tensor) of what lies in a tensor's storage from its first element on."""

    def __init__(self, data, offset=0):
        count = data.untyped_storage().nbytes() // data.element_size() - data.storage_offset()
        self.data, self.offset = data.as_strided((count,), (1,)), offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)

    def __getitem__(self, dims):
        return Pointer(self.data, self.offset[dims])

    def to(self, kind, bitcast):
        offset_bytes = self.offset * self.data.element_size()
        assert offset_bytes % kind.itemsize == 0
        return Pointer(self.data.view(kind), offset_bytes // kind.itemsize)


class Descriptor:
    def __init__(self, matrix, box):
        self.matrix, self.box = matrix, box


def _copy(descriptor, corner, barrier, shared):
    assert list(shared.data.shape) == list(descriptor.box)
    ends = [min(c + b, s) for c, b, s in zip(corner, descriptor.box, descriptor.matrix.shape, strict=True)]
    inside = descriptor.matrix[corner[0] : ends[0], corner[1] : ends[1]]
    shared.data.zero_()
    shared.data[: inside.shape[0], : inside.shape[1]] = inside
    barrier.complete(shared.data.numel() * shared.data.element_size())


def _inside(offset, data):
    assert bool(((offset >= 0) & (offset < data.numel())).all()), "an access outside of the tensor"
    return offset.long()


def _store(pointer, value, mask=None):
    offset, value = torch.as_tensor(pointer.offset), torch.as_tensor(value)
    mask = torch.ones((), dtype=torch.bool) if mask is None else mask
    offset, value, mask = torch.broadcast_tensors(offset, value, mask)
    pointer.data[_inside(offset[mask], pointer.data)] = value[mask].to(pointer.data.dtype)


_GARBAGE = torch.Generator().manual_seed(0)


def _load(pointer, mask=None, other=None, cache_modifier=""):
    """Where the mask is false and `other` is not given, the value is undefined: NaN or random bits here."""
    kind, offset = pointer.data.dtype, torch.as_tensor(pointer.offset)
    mask = torch.ones((), dtype=torch.bool) if mask is None else mask
    offset, mask = torch.broadcast_tensors(offset, mask)
    if other is not None:
        found = torch.full(offset.shape, other, dtype=kind)
    elif kind.is_floating_point:
        found = torch.full(offset.shape, float("nan"), dtype=kind)
    else:
        bits = torch.iinfo(kind)
        found = torch.randint(bits.min, bits.max + 1, offset.shape, dtype=kind, generator=_GARBAGE)
    found[mask] = pointer.data[_inside(offset[mask], pointer.data)]
    return tensor(found) if found.dim() else found.item()


def _add(pointer, value, sem):
    old = pointer.data[pointer.offset].item()
    pointer.data[pointer.offset] += value
    assert value or old, "a CTA waits for one that is launched after it"
    return old


def _where(condition, a, b):
    return torch.where(condition, a, b) if isinstance(condition, torch.Tensor) else a if condition else b


def _minimum(a, b):
    return (
        tensor(torch.minimum(*map(torch.as_tensor, (a, b)))) if torch.is_tensor(a) or torch.is_tensor(b) else min(a, b)
    )


def _split(value):
    assert value.shape[-1] == 2
    return value[..., 0], value[..., 1]


def _constant(function, *sizes):
    """A number or PTX that device code works out while it compiles; layouts are nothing."""
    value = function(*sizes)
    return value if isinstance(value, int | str) else None


def run(module, arguments, constants, grid, *, kernel="kernel", pack_dim=0, order=iter):
    """Run a module's kernel over a grid.

    Args:
        module: whose functions, and those it imports, call each other through globals.
        arguments: of the kernel, in order: Descriptor, Pointer, int or None.
        constants: its constexpr arguments.
        grid: CTAs along each axis.
        kernel: its name.
        pack_dim: the dimension along which the values that share an instance of inline assembly are neighbours.
        order: of a list of program ids, the order in which they run.
    """
    program = [()]
    homes = {f.fn.__module__ for f in vars(module).values() if hasattr(f, "fn")}
    helpers = [sys.modules[home] for home in sorted(homes) if home.startswith("qerl_compile.")]
    globals_ = {k: v for source in (*helpers, module) for k, v in vars(source).items()}

    def allocate(kind, shape, layout):
        if kind is torch.int64:
            return Barriers(shape[0])
        return Shared(torch.full(shape, float("nan") if kind.is_floating_point else torch.iinfo(kind).max, dtype=kind))

    def specialize(partitions, warps, registers):
        assert len(warps) == len(registers) == len(partitions) - 1
        failures = []

        def role(function, values):
            try:
                function(*values)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=role, args=p, daemon=True) for p in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * DEADLINE)
        if failures:
            raise failures[0]
        assert not any(thread.is_alive() for thread in threads)

    def inline_asm(asm, constraints, args, dtype, is_pure, pack):
        kinds = dtype if isinstance(dtype, tuple) else (dtype,)
        values = map(tensor, ptx_on_torch.execute(asm, constraints, args, kinds, pack, pack_dim))
        return tuple(values) if isinstance(dtype, tuple) else next(values)

    types_ = {name: getattr(torch, name) for name in ("uint8", "int16", "int32", "int64", "float32", "bfloat16")}
    fake = types.SimpleNamespace(
        **types_,
        pointer_type=lambda kind: kind,
        where=_where,
        minimum=_minimum,
        cdiv=lambda a, b: -(-a // b),
        num_programs=lambda axis: grid[axis],
        program_id=lambda axis: program[0][axis],
        static_range=range,
        arange=lambda start, end, layout=None: tensor(torch.arange(start, end, dtype=torch.int32)),
        zeros=lambda shape, kind, layout=None: tensor(torch.zeros(shape, dtype=kind)),
        join=lambda a, b: tensor(torch.stack((a, b), -1)),
        split=_split,
        sum=torch.sum,
        permute=torch.permute,
        convert_layout=lambda value, layout, assert_trivial=False: value,
        expand_dims=torch.unsqueeze,
        SliceLayout=lambda dim, parent: None,
        DotOperandLayout=lambda operand, parent, k_width: None,
        inline_asm_elementwise=inline_asm,
        atomic_add=_add,
        load=_load,
        store=_store,
        allocate_shared_memory=allocate,
        warp_specialize=specialize,
    )
    globals_["gl"] = globals_["tl"] = fake
    for name, value in list(globals_.items()):
        if hasattr(value, "fn") and hasattr(value, "arg_names"):  # a Gluon function
            globals_[name] = types.FunctionType(value.fn.__code__, globals_, name, value.fn.__defaults__)
        elif type(value).__name__ == "ConstexprFunction":
            globals_[name] = functools.partial(_constant, value.fn)
    globals_["mbarrier"] = types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, phase: barrier.wait(phase),
        arrive=lambda barrier, count: barrier.arrive(count),
        expect=lambda barrier, size: barrier.arrive(1, size),
    )
    globals_["tma_load"] = _copy
    silent = ("barrier", "fence_async_shared", "fence_for_copy_engine", "gdc_launch_dependents", "gdc_wait")
    for name in silent:
        globals_[name] = lambda: None
    globals_["mma_v2"] = lambda a, b, acc: tensor(acc + a.float() @ b.float())
    globals_["warpgroup_mma"] = lambda a, b, acc, is_async: tensor(acc + a.float() @ b.data.float())
    globals_["warpgroup_mma_init"] = lambda value: value
    globals_["warpgroup_mma_wait"] = lambda count, deps: deps[0] if len(deps) == 1 else tuple(deps)
    programs = list(itertools.product(*(range(n) for n in reversed(grid))))  # the first axis is the fastest
    for backwards in order(programs):
        program[0] = backwards[::-1]
        globals_[kernel](*arguments, **constants)
