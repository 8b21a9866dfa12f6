"""Reading machine code and ncu's log, from literal excerpts."""

import pytest

from benchmarks import kernel_profile

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
        /*0010*/                   LOP3.LUT R4, R2, 0x1, RZ, 0xc0, !PT ;     /* 0x0000000102047812 */
        /*0020*/                   HGMMA.64x8x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0030*/                   HMUL2.BF16_V2 R5, R5, R6 ;
        /*0040*/              @P0  BRA 0x10 ;                                /* 0xfffffff000000947 */
        /*0050*/                   STL [R1], R5 ;
        /*0060*/                   EXIT ;
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0080*/              @!P0 BRA 0x70 ;
        /*0090*/                   BRA 0x0 ;
"""

LOG = (
    "==PROF== Connected to process 1\n"
    '"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"\n'
    '"","","ns","%","inst","inst","inst"\n'
    '"0","void vectorized_elementwise_kernel<4>","2,100","1","1","1","1"\n'
    '"1","permute","2,000","3.5","9.25","1","7"\n'
    '"2","kernel","30,500","61.5","4.25","1","7"\n'
    '"3","void vectorized_elementwise_kernel<4>","2,100","1","1","1","1"\n'
    '"4","kernel","50,000","41","n/a","1","7"\n'
)


def test_the_main_loop_is_the_shortest_with_tensor_instructions():
    assert kernel_profile.main_loop(SASS) == {"instructions": 4, "tensor": 1, "spills": 1}
    assert [(begin, end) for begin, end, _ in kernel_profile.loops(SASS)] == [(0x10, 0x40), (0x70, 0x80), (0x0, 0x90)]


def test_instructions_per_weight_follow_from_the_choice():
    assert kernel_profile.code_facts(SASS, {"kernel": "hopper"}).endswith("0.50 per weight")
    assert kernel_profile.code_facts(SASS, {"kernel": "two_step"}) == "instructions 4, tensor 1, spills 1"
    assert kernel_profile.code_facts("", {"kernel": "hopper"}) == "spills 0"


@pytest.mark.parametrize(
    ("choice", "weights"),
    [
        ({"kernel": "decode", "SWAP": 1, "BM": 8}, 8),
        ({"kernel": "decode", "SWAP": 0, "BM": 64}, 1),
        ({"kernel": "stream", "T": 16}, 4),
        ({"kernel": "dx"}, None),
    ],
)
def test_operands_that_serve_several_tiles_of_tokens_count_once(choice, weights):
    assert kernel_profile.weights_per_tensor(choice) == weights


def test_launches_are_told_apart_by_marks():
    rows = kernel_profile.counters(LOG)
    assert [[row["ID"] for row in group] for group in kernel_profile.cells_of(rows)] == [["1", "2"], ["4"]]


def test_the_report_has_a_line_per_launch_and_dashes_for_what_was_not_collected():
    lines = kernel_profile.report([{"name": "48x96 M=1"}, {"name": "48x96 M=8"}], kernel_profile.counters(LOG))
    assert len(lines) == 4
    assert lines[1].split() == ["48x96", "M=1", "permute", "2.0", "3.5", *"----", "long_scoreboard", "9.2"]
    assert lines[3].split() == ["48x96", "M=8", "kernel", "50.0", "41.0", *"----"]


def test_a_log_without_counters_gives_no_rows():
    assert kernel_profile.counters("==ERROR== ERR_NVGPUCTRPERM\n") == []
