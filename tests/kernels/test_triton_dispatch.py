"""The table and the rule that choose kernels: pure functions of shapes."""

import json
from pathlib import Path

import pytest
import torch

from qerl_compile.kernels import cuda, dispatch

H200 = {"capability": (9, 0), "multiprocessors": 132}
KERNELS = {"stream", "decode", "hopper", "hopper_dx", "dx", "two_step"}


def test_a_tuned_layer_comes_from_the_table():
    table = json.loads((Path(dispatch.__file__).parent / "tables" / "sm_90.json").read_text(encoding="utf-8"))
    assert dispatch.choose("forward", 27648, 5120, 256, **H200) == table["forward"]["27648x5120"]["256"]


def test_tokens_use_the_smallest_bucket_that_holds_them():
    five = dispatch.choose("forward", 27648, 5120, 5, **H200)
    eight = dispatch.choose("forward", 27648, 5120, 8, **H200)
    assert five == eight


def test_an_adapter_has_choices_of_its_own_where_they_were_measured_and_else_those_of_forward():
    table = dispatch._table((9, 0))
    adapted, shape = table["adapted"]["5120x27648"], (5120, 27648)
    found = [dispatch.choose("adapted", *shape, m, **H200) for m in (1, 2, 3, 8, 16)]
    assert found == [adapted[bucket] for bucket in ("2", "2", "8", "8", "16")]
    assert found[3] != dispatch.choose("forward", *shape, 8, **H200)
    for other, m in ((shape, 17), ((3584, 3584), 8), ((4096, 4096), 8), ((40, 512), 3)):
        assert dispatch.choose("adapted", *other, m, **H200) == dispatch.choose("forward", *other, m, **H200)


def test_an_unknown_architecture_never_gets_the_hopper_kernel():
    for m in (1, 16, 64, 200, 5000):
        choice = dispatch.choose("forward", 27648, 5120, m, capability=(10, 0), multiprocessors=148)
        assert choice["kernel"] in ("decode", "two_step")


@pytest.mark.parametrize("m", [1, 7, 8, 9, 64, 65, 256, 257, 8192, 10**6])
@pytest.mark.parametrize(("n", "k"), [(48, 96), (576, 576), (192, 576), (12345, 1040), (151936, 896)])
def test_every_shape_has_a_choice(n, k, m):
    assert dispatch.choose("forward", n, k, m, **H200)["kernel"] in KERNELS
    assert dispatch.choose("dx", n, k, m, **H200)["kernel"] in KERNELS


def test_the_hopper_kernel_is_only_chosen_for_whole_column_tiles():
    table = json.loads((Path(dispatch.__file__).parent / "tables" / "sm_90.json").read_text(encoding="utf-8"))
    for shape, row in table["forward"].items():
        k = int(shape.split("x")[1])
        assert k % 256 == 0 or all(choice["kernel"] not in ("hopper", "stream") for choice in row.values())


@pytest.mark.parametrize("m", [1, 5, 8, 9, 16, 17, 64, 200, 256, 257, 1024, 1025, 2048, 2049])
@pytest.mark.parametrize(
    ("n", "k"), [(3072, 1024), (4096, 4096), (14336, 4096), (4096, 14336), (131072, 8192), (1032, 512)]
)
def test_the_rule_for_hopper_chooses_forms_that_hold_the_tokens(n, k, m):
    forward = dispatch.choose("forward", n, k, m, **H200)
    if forward["kernel"] == "stream":
        assert m <= forward["T"]
        assert forward["SLICES"] * 4 <= k // 256 or forward["SLICES"] == 1
    backward = dispatch.choose("dx", n, k, m, **H200)
    assert backward["kernel"] == ("two_step" if m > 2048 else "hopper_dx") or n * k < 1 << 22
    few, large = m <= 16, n * k >= dispatch.LARGE
    assert (forward["kernel"] == "stream") == (few and not large)


def test_a_stream_entry_of_the_table_holds_every_number_of_tokens_of_its_bucket():
    table = json.loads((Path(dispatch.__file__).parent / "tables" / "sm_90.json").read_text(encoding="utf-8"))
    held = [
        (int(bucket), choice["T"])
        for row in table["forward"].values()
        for bucket, choice in row.items()
        if choice["kernel"] == "stream"
    ]
    assert held
    assert all(bucket <= tokens for bucket, tokens in held)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"rank": 8}, False),
        ({"dtype": torch.float32}, False),
        ({"transposed": True}, False),
    ],
)
def test_a_lora_branch_goes_to_an_epilogue_only_as_it_is_read_there(change, fits):
    rank, dtype = change.get("rank", 16), change.get("dtype", torch.bfloat16)
    h = torch.zeros(3, rank, dtype=dtype)
    lora_B = torch.zeros(rank, 64, dtype=dtype).T if change.get("transposed") else torch.zeros(64, rank, dtype=dtype)
    got = cuda._for_epilogue(h, lora_B)
    assert [part is not None for part in got] == [fits, fits]
    assert cuda._for_epilogue(None, lora_B) == (None, None)


def test_the_portable_choice_stays_portable():
    assert dispatch.portable(1000, 2304, 64, 132)["kernel"] == "decode"
    assert dispatch.portable(1000, 2304, 65, 132) == dispatch.TWO_STEP


def test_slices_never_leave_a_slice_with_less_than_two_tiles():
    config = {"BM": 16, "BN": 64, "BK": 256}
    assert dispatch.slices_for(64, 512, 16, config, 132) == 1
    assert dispatch.slices_for(64, 5120, 16, config, 132) == 10
