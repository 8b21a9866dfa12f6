"""What the paged kernels compile to for Hopper, without a GPU: registers, pipelined loads, matrix instructions."""

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qerl_compile.kernels import flash_decode
from tests.kernels.test_triton_lowering import disassemble

SHARED_PER_SM = 227 * 1024


def lower(function, constants, dtype, options, capability=90):
    """Compile as the launcher would: 16-byte pointers and strides, but for the page table's row stride."""
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointers = {"table_ptr": "*i32", "length_ptr": "*i32", "part_ptr": "*fp32", "ticket_ptr": "*i32"}
        signature[name] = pointers.get(name, dtype) if name.endswith("_ptr") else "i32"
        if name.endswith("_ptr") or (name.startswith("stride") and name != "stride_table"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def decode(
    group, d, page, *, dtype="*bf16", itemsize=2, splits=4, window=0, rotary=False, bias=False, dependent=False,
    capability=90,
):  # fmt: skip
    config = flash_decode.config(d, page, itemsize)
    constants = {
        "G": group, "GP": max(16, triton.next_power_of_2(group)), "GS": triton.next_power_of_2(group), "D": d,
        "DP": triton.next_power_of_2(d), "PAGE": page, "TILE": config["TILE"], "SP": splits, "WINDOW": window,
        "SCALE": 0.1, "BIAS": bias, "ROTARY": rotary, "DEPENDENT": dependent, "ASM": True,
    }  # fmt: skip
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    return lower(flash_decode._decode, constants, dtype, options, capability)


def registers(compiled, folder):
    (count,) = re.findall(r"REG:(\d+)", disassemble(compiled, folder, "-res-usage"))
    return int(count)


@pytest.mark.parametrize(
    ("group", "d", "page", "splits", "window"),
    [
        (5, 128, 64, 4, 0),
        (7, 128, 64, 32, 0),
        (7, 128, 64, 1, 0),
        (5, 128, 64, 8, 4096),
        (3, 64, 64, 16, 0),
        (4, 80, 64, 2, 0),
        (2, 96, 64, 4, 0),
        (1, 256, 64, 64, 0),
        (32, 128, 64, 8, 0),
        (5, 128, 16, 4, 0),
    ],
)
@pytest.mark.parametrize("before", [{}, {"rotary": True, "bias": True}], ids=["as it is", "bias and rotary"])
def test_decode_keeps_two_tiles_in_flight_in_sixteen_byte_pieces_and_does_not_spill(
    group, d, page, splits, window, before, tmp_path
):
    compiled = decode(group, d, page, splits=splits, window=window, **before)
    sass = disassemble(compiled, tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert "HMMA.16816.F32.BF16" in sass
    # K and V, each issued twice before the loop and once in it
    per_tile = 2 * flash_decode.config(d, page, 2)["TILE"] * triton.next_power_of_2(d) * 2 // (4 * 32 * 16)
    copies = len(re.findall(r"LDGSTS\.E\.BYPASS\.128", sass))
    assert copies >= (3 if page == 64 else 2) * per_tile
    assert not re.search(r"LDGSTS\.E\.64", sass)
    # as many programs at a time on a multiprocessor as a launch asks for; two where heads are many or large
    programs = flash_decode.PROGRAMS_PER_SM if d <= 128 and group <= 16 else 2
    assert programs * compiled.metadata.shared <= SHARED_PER_SM
    assert programs * registers(compiled, tmp_path) * 128 <= 65536


@pytest.mark.parametrize("dtype", ["*fp16", "*fp32"])
def test_the_other_dtypes_do_not_spill(dtype, tmp_path):
    sass = disassemble(decode(5, 128, 64, dtype=dtype, itemsize=2 if dtype == "*fp16" else 4), tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert ("HMMA" in sass) == (dtype == "*fp16")  # float32 is multiplied in float32, not in TF32


@pytest.mark.parametrize("d", [64, 80, 128])
def test_write_moves_sixteen_bytes_at_a_time(d, tmp_path):
    constants = {"D": d, "DP": triton.next_power_of_2(d), "PAGE": 64, "TILE": 4096 // triton.next_power_of_2(d)}
    sass = disassemble(lower(flash_decode._write, constants, "*bf16", {"num_warps": 4}), tmp_path)
    assert re.search(r"LDG\.E\.128", sass)
    assert re.search(r"STG\.E\.128", sass)
    assert not re.search(r"\b(LDL|STL)\b", sass)


def test_decode_lowers_on_ampere_and_blackwell():
    for capability in (80, 100, 120):
        assert "mma.sync" in decode(5, 128, 64, capability=capability).asm["ptx"]


@pytest.mark.parametrize("splits", [1, 4])
def test_a_dependent_decode_waits_before_it_touches_memory_and_triggers_after_its_loop(splits):
    ptx = decode(5, 128, 64, splits=splits, rotary=True, bias=True, dependent=True).asm["ptx"]
    assert re.findall(r"griddepcontrol\.(\w+)", ptx) == ["wait", "launch_dependents"]
    wait, trigger = ptx.index("griddepcontrol.wait"), ptx.index("griddepcontrol.launch_dependents")
    touched = [at.start() for at in re.finditer(r"(ld|st)\.global|cp\.async\.c[ag]\.shared|\bret;", ptx)]
    assert wait < min(touched)
    copies = [at.start() for at in re.finditer(r"cp\.async\.c[ag]\.shared|mma\.sync", ptx)]
    assert trigger > max(copies)
    assert "griddepcontrol" not in decode(5, 128, 64, splits=splits).asm["ptx"]


def test_every_argument_goes_into_the_key_of_a_prepared_launch():
    for kernel in (flash_decode._decode, flash_decode._write):
        constant = [p.is_constexpr for p in kernel.params]
        assert constant == sorted(constant)


@pytest.mark.parametrize(
    ("rows", "heads_kv", "positions", "count"),
    [(1, 8, 512, 8), (1, 8, 1 << 20, 49), (1, 4, 1 << 20, 64), (8, 8, 4096, 6), (64, 8, 4096, 1), (256, 8, 4096, 1)],
)
def test_splits_fill_the_chip_and_never_pass_the_number_of_tiles(rows, heads_kv, positions, count):
    assert flash_decode.splits(rows, heads_kv, positions, 64, 132) == count
