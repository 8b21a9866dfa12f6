"""What the kernel of the adapter's first product compiles to, without a GPU: loads, matrix instructions, registers."""

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qerl_compile.kernels import lora_down
from tests.kernels.test_triton_lowering import disassemble

# K of Qwen2.5 in 7B and 32B, of a small one, and one that no tile divides
WIDTHS = [3584, 18944, 5120, 27648, 896, 4880]


def lower(form, k, *, capability=90):
    """Compile as the launcher would: 16-byte pointers and strides."""
    form = dict(form)
    options = {name: form.pop(name) for name in ("num_warps", "num_stages")}
    piece = form["KS"] * form["STEPS"]
    constants = form | {"SLICES": -(-k // piece), "EVEN_K": k % piece == 0, "ASM": True}
    names, signature, attributes = lora_down.kernel.arg_names, {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointers = {"part_ptr": "*fp32", "flag_ptr": "*i32"}
        signature[name] = pointers.get(name, "*bf16") if name.endswith("_ptr") else "i32"
        if name != "M":
            attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(lora_down.kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 64, 256])
def test_the_chosen_form_loads_sixteen_bytes_at_a_time_and_does_not_spill(m, k, tmp_path):
    form = lora_down.config(m, k)
    sass = disassemble(lower(form, k), tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert sass.count("ATOMG") == (k > form["KS"] * form["STEPS"])
    threads = 32 * form["num_warps"]
    loads_x, loads_a = (form[name] * form["KS"] // (8 * threads) for name in ("BM", "BR"))
    if form["GROUPS"] == 0:
        # nothing but x and A is loaded, and all of it before the first sum
        assert sass.count("LDG.E") == sass.count("LDG.E.128") == loads_x + loads_a
        assert not re.search(r"LDG\.E\.128", sass[sass.index("SHFL") :])
        assert "HMMA" not in sass
    else:
        assert "HGMMA" in sass if form["GROUPS"] == 1 else "HMMA.16816.F32.BF16" in sass
        before = sass[: sass.index("DEPBAR.LE")]
        begun = min(form["STEPS"], form["num_stages"] - 1)
        assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128", before)) == begun * (loads_x + loads_a)
        assert not re.search(r"LDGSTS\.E\.(64|BYPASS\.64)|LDGSTS\.E ", sass)
        # partial sums and nothing else
        assert sass.count("LDG.E") == len(re.findall(r"LDG\.E[.0-9]*\.STRONG\.GPU", sass))


def test_the_whole_piece_of_a_slice_is_in_flight_up_to_64_tokens():
    for m in (9, 16, 17, 64):
        form = lora_down.config(m, 3584)
        assert form["num_stages"] == form["STEPS"] + 1


@pytest.mark.parametrize("steps", [1, 2])
def test_a_dependent_launch_waits_once_before_x_and_in_one_step_after_a(steps):
    form = {"BM": 16, "BR": 16, "KS": 256, "STEPS": steps, "GROUPS": 4, "num_warps": 4, "num_stages": 3}
    ptx = lower(form | {"DEPENDENT": True}, 3584).asm["ptx"]
    assert re.findall(r"griddepcontrol\.(\w+)", ptx) == ["launch_dependents", "wait"]
    loads = [m.start() for m in re.finditer(r"ld\.global\.v4|cp\.async\.cg", ptx)]
    wait = ptx.index("griddepcontrol.wait")
    # 4 of A in one step; x's own come after it
    assert sum(at < wait for at in loads) == (4 if steps == 1 else 0)
    assert "griddepcontrol" not in lower(form | {"DEPENDENT": False}, 3584).asm["ptx"]


def test_it_lowers_on_ampere_and_blackwell():
    for capability in (80, 100, 120):
        for m in (1, 16, 64, 256):
            assert "st.global" in lower(lora_down.config(m, 3584), 3584, capability=capability).asm["ptx"]


def test_every_argument_goes_into_the_key_of_a_prepared_launch():
    constant = [p.is_constexpr for p in lora_down.kernel.params]
    assert constant == sorted(constant)
