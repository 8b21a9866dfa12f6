"""Building and loading the C++ kernel, and its arithmetic on every instruction set that this machine can run."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import cpu_native, cpu_products
from tests.kernels.oracle import assert_rounded_once, make_weight

# What the same source becomes elsewhere: AVX2 laptops, and the plain vector path that other CPUs take.
INSTRUCTION_SETS = {"this machine": "native", "AVX2": "x86-64-v3", "128-bit vectors": "x86-64"}


def every_byte_pair() -> tuple[Tensor, Tensor]:
    """All 256 code bytes with all 256 scale bytes: codes [256, 256], blocks [256, 32]."""
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    blocks = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32).contiguous()
    return codes, blocks.view(torch.float8_e4m3fn)


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> cpu_native.NativeKernels:
    march = f"-march={INSTRUCTION_SETS[request.param]}"
    flags = tuple(march if flag.startswith("-march") else flag for flag in cpu_native.FLAGS)
    return cpu_native.NativeKernels(cpu_native.build(flags))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_code_with_every_scale_is_exact(kernels: cpu_native.NativeKernels, dtype: torch.dtype) -> None:
    codes, blocks = every_byte_pair()
    expected = nvfp4.exact_products(codes, blocks, torch.float32)
    out = torch.full((256, 512), 7.0, dtype=dtype)
    kernels.products(codes, blocks, out)
    assert torch.equal(out.float().isnan(), expected.isnan())
    assert torch.equal(out.float().nan_to_num(), expected.nan_to_num())
    assert torch.equal(out.signbit()[:127], expected.signbit()[:127])  # -0 stays -0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_code_with_every_scale_is_exact_in_torch_too(dtype: torch.dtype) -> None:
    codes, blocks = every_byte_pair()
    expected = nvfp4.exact_products(codes, blocks, torch.float32)
    out = torch.full((256, 512), 7.0, dtype=dtype)
    cpu_products.write_products(codes, blocks, out)
    assert torch.equal(out.float().nan_to_num(), expected.nan_to_num())
    assert torch.equal(out.signbit()[:127], expected.signbit()[:127])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (3, 5, 48), (7, 4, 64), (13, 33, 80), (32, 9, 32)])
def test_linear_rounds_once(kernels: cpu_native.NativeKernels, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    weight = make_weight(n, k)
    x = torch.randn(m, k).to(dtype)
    codes, blocks, decode_scale = weight.args
    assert_rounded_once(kernels.linear(x, codes, blocks, decode_scale.item()), x, weight.exact)


def test_ties_go_to_the_even_bf16(kernels: cpu_native.NativeKernels) -> None:
    codes = torch.tensor([[0x22, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)  # 1, 1, 0, ...
    blocks = torch.tensor([[0x38]], dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1
    x = torch.zeros(3, 16, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = torch.tensor([1.0, 1 + 2**-7, -1.0]), torch.tensor([2**-8, 2**-8, -(2**-8)])
    assert kernels.linear(x, codes, blocks, 1.0).flatten().tolist() == [1.0, 1 + 2**-6, -1.0]


def test_rows_with_a_stride_are_decoded_in_place() -> None:
    native = cpu_native.load()
    assert native is not None
    codes, blocks, _ = make_weight(5, 96).args
    out = torch.empty(5, 32)
    native.products(codes[:, 16:32], blocks[:, 2:4], out)
    assert torch.equal(out, nvfp4.exact_products(codes, blocks, torch.float32)[:, 32:64])


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_native.load.cache_clear()
    yield tmp_path / "qerl-compile"
    cpu_native.load.cache_clear()


def test_the_second_build_finds_the_first(empty_cache: Path) -> None:
    library = cpu_native.build(cpu_native.FLAGS)
    assert [entry.name for entry in empty_cache.iterdir()] == [library.name]
    stamp = library.stat().st_mtime_ns
    assert cpu_native.build(cpu_native.FLAGS) == library
    assert library.stat().st_mtime_ns == stamp


def test_other_flags_get_another_library(empty_cache: Path) -> None:
    assert cpu_native.build(cpu_native.FLAGS) != cpu_native.build((*cpu_native.FLAGS, "-fno-unroll-loops"))


def test_builds_at_the_same_time_leave_one_whole_library(empty_cache: Path) -> None:
    threads = [threading.Thread(target=cpu_native.build, args=(cpu_native.FLAGS,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (library,) = empty_cache.iterdir()
    cpu_native.NativeKernels(library)


def test_the_cache_folder_belongs_to_the_user_alone(empty_cache: Path) -> None:
    cpu_native.build(cpu_native.FLAGS)
    assert empty_cache.stat().st_mode & 0o077 == 0


def test_an_unusable_cache_folder_is_replaced_by_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cpu_native.NativeKernels(cpu_native.build(cpu_native.FLAGS))


@pytest.mark.parametrize("compiler", ["/nonexistent/g++", "false"])
def test_without_a_working_compiler_torch_serves_with_one_warning(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(RuntimeWarning, match="Install g\\+\\+ or clang") as caught:
        assert cpu_native.load() is None
        assert cpu_native.load() is None
    assert len(caught) == 1


def test_the_environment_can_keep_it_in_torch(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QERL_CPU_KERNEL", "torch")
    assert cpu_native.load() is None
    assert not empty_cache.exists()


def test_importing_the_kernels_builds_nothing_and_imports_no_triton(tmp_path: Path) -> None:
    code = "import sys, qerl_compile.kernels; sys.exit('triton' in sys.modules)"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    repository = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=repository, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
