"""The launch cache without a GPU: what its key tells apart, when it trusts it, and what reaches the C launcher."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import native_specialize_impl

from qerl_compile.kernels import launch_internals as internals
from qerl_compile.kernels import prepared_launch
from qerl_compile.kernels.prepared_launch import Box, BoxKind


@triton.jit(do_not_specialize=["m"])
def _kernel(a_ptr, b, n, m, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    pass


class Compiled:
    """Stands for a CompiledKernel. `launched`: what its C function got."""

    def __init__(self):
        self.launched = []


class Public(list):
    """The public launches so far. Which compiled kernel one returns follows Triton's own specialization."""

    def __init__(self):
        super().__init__()
        self.compiled = {}

    def launch(self, grid, arguments):
        self.append((grid, arguments))
        key = str([triton_says(a, valued) for a, valued in zip(arguments, (True, True, True, False), strict=True)])
        return self.compiled.setdefault(key, Compiled())


def triton_says(argument, valued):
    """What Triton specializes on."""
    plain = argument.tensor if isinstance(argument, Box) else argument
    return native_specialize_impl(BaseBackend, plain, False, valued, True)


@pytest.fixture
def public(monkeypatch):
    public = Public()
    monkeypatch.setattr(internals, "AVAILABLE", True)
    monkeypatch.setattr(prepared_launch._Form, "_public", lambda form, grid, arguments: public.launch(grid, arguments))
    monkeypatch.setattr(prepared_launch, "stream_of", lambda device: 77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(internals, "opened", opened)
    monkeypatch.setattr(internals, "encoded", lambda descriptor, meta: ("map", *descriptor))
    monkeypatch.setattr(prepared_launch, "_descriptor", lambda box: box.tensor.shape)
    return public


def opened(compiled, constants, boxes):
    return internals.Raw(lambda *a: compiled.launched.append(a), ("fixed",), (None,) * constants, ({},) * boxes)


def form():
    return prepared_launch._Form(_kernel, {"BLOCK": 64, "EVEN": True})


def read(device, *arguments):
    return prepared_launch._reader(tuple(map(type, arguments)), form().valued)(device, *arguments)


STORAGE = torch.zeros(256)
ARGUMENTS = [
    STORAGE, STORAGE[1:], STORAGE[2:], STORAGE.bfloat16(), STORAGE.view(torch.int32), None,
    0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**63 - 1, 2**63,
]  # fmt: skip


@pytest.mark.parametrize("place", [1, 3])  # a parameter that is specialized on, and one that is not
def test_arguments_that_triton_tells_apart_have_different_keys(public, place):
    keys = {}
    for argument in ARGUMENTS:
        arguments = [STORAGE, 3, 3, 3]
        arguments[place] = argument
        key, _, _ = read(0, *arguments)
        keys.setdefault(key, set()).add(triton_says(argument, place == 1))
    assert all(len(said) == 1 for said in keys.values()), keys
    assert len(keys) == (len(ARGUMENTS) if place == 1 else 6 + 1 + 6)  # tensors and None, short integers, long ones


def test_a_key_holds_the_devices_and_the_kind_of_box(public):
    kind, other = BoxKind((8, 64), "layout"), BoxKind((8, 64), "layout")
    boxed = [Box(STORAGE, kind), Box(STORAGE, other), Box(STORAGE.bfloat16(), kind)]
    keys = {read(device, box, 1, 1, 1)[0] for box in boxed for device in (0, 1)}
    assert len(keys) == 6
    elsewhere = torch.zeros(256, device="meta")
    assert read(0, elsewhere, 1, 1, 1)[0][1:3] == (torch.float32, -16 + elsewhere.data_ptr() % 16)


def test_true_and_one_are_different_constants(public):
    assert prepared_launch.prepare(_kernel, BLOCK=1) is not prepared_launch.prepare(_kernel, BLOCK=True)
    assert prepared_launch.prepare(_kernel, BLOCK=1) is prepared_launch.prepare(_kernel, BLOCK=1)


def test_the_third_launch_of_a_kind_goes_to_the_c_launcher_with_plain_addresses(public):
    launch = form()
    for m in (5, 6, 7, 8):
        launch((m, 2), STORAGE, None, 16, m)
    (compiled,) = public.compiled.values()
    assert len(public) == 2
    address = STORAGE.data_ptr()
    assert compiled.launched == [(m, 2, 1, 77, "fixed", address, None, 16, m, None, None) for m in (7, 8)]


def test_another_alignment_or_extent_is_launched_publicly_first(public):
    launch = form()
    for _ in range(3):
        launch((1,), STORAGE, 3, 16, 5)
    launch((1,), STORAGE[1:], 3, 16, 5)
    launch((1,), STORAGE, 3, 17, 5)
    launch((1,), STORAGE, 3, 16, 2**40)
    assert len(public) == 5
    launch((1,), STORAGE, 3, 16, 5)
    assert len(public) == 5


def test_a_key_under_which_triton_chose_differently_is_never_prepared(public, monkeypatch):
    launch = form()
    for _ in range(5):
        public.compiled.clear()
        launch((1,), STORAGE, 3, 16, 5)
    assert len(public) == 5


def test_a_descriptor_is_encoded_once_per_address_and_shape(public, monkeypatch):
    count = []
    monkeypatch.setattr(internals, "encoded", lambda descriptor, meta: count.append(1) or ("map", *descriptor))
    launch, kind = form(), BoxKind((8, 64), "layout")
    first, second = torch.zeros(8, 64), torch.zeros(4, 64)
    for tensor in (first, first, first, second, first, second):
        launch((1,), Box(tensor, kind), 3, 16, 5)
    (compiled,) = public.compiled.values()
    assert len(count) == 2
    assert [a[5:9] for a in compiled.launched] == [("map", n, 64, 3) for n in (8, 4, 8, 4)]


def test_other_arguments_are_refused(public):
    kind = BoxKind((8, 64), "layout")
    for arguments in ((1.5, 1, 1, 1), (True, 1, 1, 1), (STORAGE, Box(STORAGE, kind), 1, 1)):
        with pytest.raises(TypeError, match="expected Box"):
            read(0, *arguments)


def test_hooks_and_other_releases_take_the_public_launch(public, monkeypatch):
    launch = form()
    for _ in range(3):
        launch((1,), STORAGE, 3, 16, 5)
    monkeypatch.setattr(internals, "watched", lambda: True)
    launch((1,), STORAGE, 3, 16, 5)
    assert len(public) == 3
    monkeypatch.setattr(internals, "AVAILABLE", False)
    launch = form()
    for _ in range(4):
        launch((1,), STORAGE, 3, 16, 5)
    assert len(public) == 7


def test_a_profiler_counts_as_watching(monkeypatch):
    assert not internals.watched()
    hook = triton.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(hook, "calls", [print])
    assert internals.watched()


def test_what_is_not_made_as_expected_is_not_opened():
    metadata = SimpleNamespace(tensordesc_meta=[])
    run = SimpleNamespace(
        global_scratch_size=0, profile_scratch_size=0, launch=len, launch_cooperative_grid=False, launch_pdl=True
    )
    compiled = SimpleNamespace(run=run, metadata=metadata, function=1234, packed_metadata=(4, 1, 0))
    raw = internals.opened(compiled, 2, 0)
    assert raw.launch is len
    assert raw.fixed == (1234, False, True, None, None, (4, 1, 0), None, None, None)
    assert raw.constants == (None, None)
    assert internals.opened(compiled, 2, 1) is None  # a TMA argument without its description
    for changed in ({"global_scratch_size": 128}, {"launch": lambda: None}):
        compiled.run = SimpleNamespace(**{**vars(run), **changed})
        assert internals.opened(compiled, 2, 0) is None


if internals.AVAILABLE:  # the launcher of Triton 3.6 is what is looked into

    def test_the_c_function_behind_a_launcher_with_tma_arguments_is_found():
        from triton.backends.nvidia.driver import wrap_handle_tensordesc

        meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [8, 64], "fp4_padded": False}
        run = SimpleNamespace(
            global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=False,
            launch=wrap_handle_tensordesc(len, {0: "tensordesc<bf16[8, 64]>", 1: "i32"}, [meta]),
        )  # fmt: skip
        metadata = SimpleNamespace(tensordesc_meta=[meta])
        compiled = SimpleNamespace(run=run, metadata=metadata, function=1, packed_metadata=())
        raw = internals.opened(compiled, 0, 1)
        assert raw.launch is len
        assert raw.boxes == (meta,)
