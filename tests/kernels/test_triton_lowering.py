"""What the kernels compile to, without a GPU: instructions, spills, serialization, for Hopper and for Blackwell.

Nothing here ran on Blackwell hardware: these tests say that the code lowers, not that it is fast or right there.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from qerl_compile.kernels import (
    dispatch,
    nvfp4_arithmetic,
    nvfp4_decode,
    nvfp4_dequantize,
    nvfp4_dx,
    nvfp4_permute,
    nvfp4_quantize,
    nvfp4_wgmma,
)
from qerl_compile.kernels import nvfp4_wgmma_layouts as layouts

POINTERS = {
    "x_ptr": "*i32", "codes_ptr": "*u8", "decode_ptr": "*fp32", "y_ptr": "*bf16", "part_ptr": "*fp32",
    "flag_ptr": "*i32", "h_ptr": "*bf16", "lora_ptr": "*bf16", "dy_ptr": "*bf16", "dx_ptr": "*bf16", "w_ptr": "*bf16",
    "out_ptr": "*bf16", "global_ptr": "*fp32", "arrival_ptr": "*i32", "residual_ptr": "*bf16",
}  # fmt: skip


def lower(function, constants, capability, num_warps, *, block="*u8", gluon=False, extra=None, maxnreg=None, stages=3):
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = (extra or {}).get(name) or (block if name == "block_ptr" else POINTERS.get(name, "i32"))
        signature[name] = kind
        if kind.startswith("*") or name in ("N", "K") or "stride" in name:
            attributes[(index,)] = [["tt.divisibility", 16]]
    names = function.arg_names
    source = (GluonASTSource if gluon else ASTSource)(
        function, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    options = (
        {"num_warps": num_warps} | ({"maxnreg": maxnreg} if maxnreg else {}) | ({} if gluon else {"num_stages": stages})
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassemble(compiled, folder, option="-sass"):
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(tool) if tool.exists() else shutil.which("cuobjdump")
    return subprocess.run([tool, option, str(file)], capture_output=True, text=True, check=True).stdout


def hopper(bucket, rank=0, dependent=None, residual=False):
    config = dispatch._HOPPER[bucket]
    group = min(4, 256 // config["tokens"])
    constants = {
        "TOKENS": config["tokens"], "ROWS": config["rows"], "CONSUMERS": config["consumers"],
        "SLOTS_W": config["slots_w"], "SLOTS_X": config["slots_x"], "GROUP": group,
        "CONSUMER_REGISTERS": config["registers"], "RANK": rank, "RESIDUAL": residual,
        "DEPENDENT": config["dependent"] if dependent is None else dependent,
    }  # fmt: skip
    descriptors = {
        "x_desc": f"tensordesc<bf16[{group * config['tokens']}, 64],{layouts.X_SMEM!r}>",
        "w_desc": f"tensordesc<u8[{config['rows']}, 128],{layouts.CODES_SMEM!r}>",
    }
    if not rank:
        constants |= {"h_ptr": None, "lora_ptr": None, "stride_h": 1, "stride_lora": 1, "arrival_ptr": None}
    if not residual:
        constants |= {"residual_ptr": None, "stride_residual": 1}
    return lower(
        nvfp4_wgmma.kernel,
        constants,
        90,
        4,
        block="*fp8e4nv",
        gluon=True,
        extra=descriptors,
        maxnreg=config["max_registers"],
    )


if nvfp4_arithmetic.GLUON:

    @pytest.mark.parametrize(
        ("bucket", "dependent", "rank"),
        [(8, 1, 0), (8, 2, 16), (16, 1, 32), (64, 0, 0), (64, 2, 64), (256, 3, 0), (128, 3, 64)],
    )
    def test_the_hopper_kernel_overlaps_decoding_with_wgmma_and_does_not_spill(bucket, dependent, rank, tmp_path):
        compiled = hopper(bucket, rank, dependent, residual=bucket == 16)
        sass = disassemble(compiled, tmp_path)
        assert "HGMMA" in sass
        assert not re.search(r"\b(LDL|STL)\b", sass)
        # A wait that lets one group run on: if ptxas serialized the groups there would be only gsb0, 0x0.
        assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in sass
        # One wait per group of four, not one after every HGMMA.
        assert sass.count("WARPGROUP.DEPBAR") == sass.count("HGMMA") // 4
        assert compiled.metadata.shared <= 227 * 1024
        # LoRA moves nothing between lanes or through shared memory.
        consumers = dispatch._HOPPER[bucket]["consumers"]
        tokens, rows = dispatch._HOPPER[bucket]["tokens"], dispatch._HOPPER[bucket]["rows"]
        assert len(re.findall(r"\bHMMA", sass)) == consumers * (rows // 64) * (tokens // 8) * (rank // 16)
        assert sass.count("SHFL") == (rank > 0 and dependent > 0)  # the count of arrivals, to a warp
        assert sass.count("LDSM") == 0
        # 1 triggers when x is there, 3 at the end, 1 to 3 wait: the producer before x, consumers before h, if at all
        ptx = compiled.asm["ptx"]
        assert ("griddepcontrol.launch_dependents" in ptx) == (dependent in (1, 3))
        assert ptx.count("griddepcontrol.wait") == (1 + consumers if dependent else 0)
        assert ("fence.proxy.async.global" in ptx) == (dependent > 0)

    @pytest.mark.parametrize("dependent", [0, 1, 2])
    def test_the_permutation_triggers_before_it_waits(dependent):
        constants = {"TOKENS": 64, "LANES": 512, "DEPENDENT": dependent, "CLEAR": True}
        pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16", "counter_ptr": "*fp32"}
        ptx = lower(nvfp4_permute._kernel, constants, 90, 4, extra=pointers).asm["ptx"]
        order = re.findall(r"griddepcontrol\.(\w+)", ptx)
        assert (
            order
            == [[], ["launch_dependents", "wait"], ["launch_dependents"], ["launch_dependents", "wait"]][dependent]
        )
        assert "ld.global.v4.b32" in ptx

    def test_every_argument_of_the_hopper_kernels_goes_into_the_key_of_a_prepared_launch():
        for kernel in (nvfp4_wgmma.kernel, nvfp4_permute._kernel):
            constant = [p.is_constexpr for p in kernel.params]
            assert constant == sorted(constant)


def decode(capability, layout=0):
    constants = {
        "BM": 16, "BN": 64, "BK": 256, "SPLIT": True, "SWAP": 0, "LAYOUT": layout, "EVEN_N": True, "EVEN_K": True,
        "RANK": 0, "ASM": True,
    }  # fmt: skip
    return lower(nvfp4_decode.kernel, constants, capability, 4, stages=4)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize(("capability", "instruction"), [(90, "wgmma"), (100, "tcgen05.mma"), (120, "mma.sync")])
def test_decode_lowers_to_the_matrix_instruction_of_each_architecture(capability, instruction, layout):
    ptx = decode(capability, layout).asm["ptx"]
    assert instruction in ptx or "mma.sync" in ptx
    assert "fma.rn.bf16x2" in ptx


def test_weight_only_decode_does_not_spill_on_blackwell(tmp_path):
    assert not re.search(r"\b(LDL|STL)\b", disassemble(decode(100), tmp_path))


def test_dx_lowers_on_every_architecture():
    constants = {
        "BM": 64, "BK": 128, "BN": 64, "GROUP": 8, "SPLIT": True, "LAYOUT": 0, "EVEN_N": True, "EVEN_K": True,
        "ASM": True,
    }  # fmt: skip
    for capability in (90, 100, 120):
        assert "mma" in lower(nvfp4_dx.kernel, constants, capability, 4).asm["ptx"]


def test_quantize_and_dequantize_lower_on_blackwell(tmp_path):
    for capability in (90, 100, 120):
        constants = {"ROWS": 16, "COLUMNS": 512, "LAYOUT": 0, "ASM": True}
        assert "st.global" in lower(nvfp4_dequantize._kernel, constants, capability, 8).asm["ptx"]
        constants = {"BLOCKS": 128, "TILES": 2}
        for dtype in ("*bf16", "*fp16", "*fp32"):
            extra = {"w_ptr": dtype, "codes_ptr": "*i64"}
            sass = disassemble(lower(nvfp4_quantize._encode_kernel, constants, capability, 4, extra=extra), tmp_path)
            # A block stays in one thread, so nothing is shared; 16 bytes a load.
            assert not re.search(r"\b(LDL|STL|SHFL|STS|BAR)\b", sass)
            assert "LDG.E.128" in sass


@triton.jit
def _w4a4(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, out_ptr):
    m, n = tl.arange(0, 128), tl.arange(0, 128)
    byte, group = tl.arange(0, 64), tl.arange(0, 8)
    a = tl.load(a_ptr + m[:, None] * 64 + byte[None, :])
    b = tl.load(b_ptr + n[:, None] * 64 + byte[None, :])
    a_scale = tl.load(a_scale_ptr + m[:, None] * 8 + group[None, :])
    b_scale = tl.load(b_scale_ptr + n[:, None] * 8 + group[None, :])
    out = tl.dot_scaled(a, a_scale, "e2m1", tl.trans(b), b_scale, "e2m1")
    tl.store(out_ptr + m[:, None] * 128 + n[None, :], out)


@pytest.mark.parametrize(
    ("capability", "instruction"),
    [(100, "tcgen05.mma.*mxf4nvf4.*block_scale"), (120, "mma.sync.*mxf4nvf4.*block_scale")],
)
def test_four_bit_activations_would_use_the_block_scaled_instruction_on_blackwell(capability, instruction):
    extra = {"a_ptr": "*u8", "b_ptr": "*u8", "a_scale_ptr": "*fp8e4nv", "b_scale_ptr": "*fp8e4nv", "out_ptr": "*fp32"}
    ptx = lower(_w4a4, {}, capability, 4, extra=extra).asm["ptx"]
    assert re.search(instruction, ptx)
