"""What the launch before the packed GEMM compiles to, without a GPU: loads in flight, registers, and when it waits."""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qerl_compile.kernels import lead_in, lora_down
from qerl_compile.kernels.nvfp4_workspace import Arrivals, _Captured
from tests.kernels.test_triton_lowering import disassemble

# K, tokens, as fragments: the linears of Qwen2.5 in 7B and 32B at 2, 8 and 16 rows
CASES = [(3584, 2, True), (5120, 8, True), (5120, 8, False), (18944, 8, False), (27648, 2, True), (27648, 16, True)]


def lower(m, k, fragments, *, waits=True, capability=90):
    """Compile as the launcher would: 16-byte pointers and strides."""
    form = dict(lora_down.config(m, k))
    del form["DEPENDENT"]
    options = {name: form.pop(name) for name in ("num_warps", "num_stages")}
    piece = form["KS"] * form["STEPS"]
    constants = form | {
        "SLICES": -(-k // piece), "EVEN_K": k % piece == 0, "FRAGMENTS": fragments, "TOKENS": 8 if m <= 8 else 16,
        "LANES": lead_in.lanes(fragments, options["num_warps"]), "CLEAR": True, "WAITS": waits, "TRIGGERS": waits,
        "ASM": True,
    }  # fmt: skip
    names, signature, attributes = lead_in.kernel.arg_names, {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointers = {"part_ptr": "*fp32", "counter_ptr": "*fp32", "flag_ptr": "*i32", "arrival_ptr": "*i32"}
        signature[name] = pointers.get(name, "*bf16") if name.endswith("_ptr") else "i32"
        if name not in ("M", "counter_at", "counters", "pieces", "arrival_at"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(lead_in.kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), form | options


@pytest.mark.parametrize(("k", "m", "fragments"), CASES)
def test_h_keeps_its_loads_in_flight_and_every_program_waits_before_it_reads_x_or_writes(k, m, fragments, tmp_path):
    compiled, form = lower(m, k, fragments)
    sass = disassemble(compiled, tmp_path)
    threads = 32 * form["num_warps"]
    assert not re.search(r"\b(LDL|STL)\b", sass)
    # tiles of h have as much room as alone: 32B's q/k/v at 8 tokens are 128 programs of 16 warps
    registers = int(re.search(r"REG:(\d+)", disassemble(compiled, tmp_path, "-res-usage"))[1])
    assert registers * threads <= 65536
    loads_x, loads_a = (form[name] * form["KS"] // (8 * threads) for name in ("BM", "BR"))
    ptx = compiled.asm["ptx"]
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    assert re.findall(r"griddepcontrol\.(\w+)", body) == ["launch_dependents", "wait", "wait"]
    border = body.rindex("$L__BB", 0, body.rindex("griddepcontrol.wait"))  # the label of the branch that makes h
    order, tile = body[:border], body[border:]
    for part, before in ((order, 0), (tile, loads_a if form["STEPS"] == 1 else 0)):
        wait = part.index("griddepcontrol.wait")
        loads = [at.start() for at in re.finditer(r"ld\.global|cp\.async\.c[ag]\.shared", part)]
        assert sum(at < wait for at in loads) == before
        assert len(loads) > before
        assert wait < min(at.start() for at in re.finditer(r"st\.global|atom\.|red\.", part))
    # x is stored, then all threads meet, then one counts the program, for whoever acquires the word
    counted = re.search(r"(red|atom)\.global\.gpu\.release\.add", body).start()
    assert body.rindex("st.global", 0, counted) < body.rindex("bar.sync", 0, counted) < counted
    if form["GROUPS"] == 0:
        assert sum(at > tile.index("griddepcontrol.wait") for at in loads) == loads_x
    else:
        before = sass[: sass.index("DEPBAR.LE")]
        begun = min(form["STEPS"], form["num_stages"] - 1)
        assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128", before)) == begun * (loads_x + loads_a)


def test_an_ordinary_launch_has_no_dependent_instructions_and_lowers_everywhere():
    for capability in (80, 90, 120):
        for fragments in (True, False):
            assert "griddepcontrol" not in lower(8, 3584, fragments, waits=False, capability=capability)[0].asm["ptx"]


@pytest.mark.parametrize("fragments", [True, False])
@pytest.mark.parametrize(("early", "triggers"), [(True, True), (False, True), (True, False)])
def test_the_gemm_awaits_as_many_programs_as_reorder_and_count_themselves(fragments, early, triggers, monkeypatch):
    launches = []
    prepare = lambda kernel, **constants: lambda grid, *arguments: launches.append((grid, arguments, constants))  # noqa: E731
    monkeypatch.setattr(lead_in, "prepare", prepare)
    x, a = (torch.empty(rows, 5120, dtype=torch.bfloat16, device="meta") for rows in (8, 32))
    words = torch.empty(4, dtype=torch.int32, device="meta")
    capture = _Captured(1, words, words)
    monkeypatch.setattr(lead_in, "arrivals", lambda device: Arrivals(words, 1, early, capture))
    order = lead_in.Order(fragments, 8, x, 0, 0)
    lead = lead_in.launch(x, a, order, None, 0, waits=True, triggers=triggers)
    ((grid, arguments, constants),) = launches
    given = dict(zip(lead_in.kernel.arg_names, arguments, strict=False))
    tiles = 32 // min(16, constants["BR"]) * constants["SLICES"]
    assert grid == (given["pieces"] + tiles,)
    assert given["pieces"] > 0
    assert lead.arriving == (given["pieces"] if early and triggers else 0)
    assert given["arrival_at"] == lead.at == 1
    assert capture.calls == 1


def test_every_argument_goes_into_the_key_of_a_prepared_launch():
    constant = [p.is_constexpr for p in lead_in.kernel.params]
    assert constant == sorted(constant)
