"""E2M1: every code, every tie, and the byte layout, as literal tables."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.formats import e2m1

CODE_TABLE = [
    (0x0, 0.0),
    (0x1, 0.5),
    (0x2, 1.0),
    (0x3, 1.5),
    (0x4, 2.0),
    (0x5, 3.0),
    (0x6, 4.0),
    (0x7, 6.0),
    (0x8, -0.0),
    (0x9, -0.5),
    (0xA, -1.0),
    (0xB, -1.5),
    (0xC, -2.0),
    (0xD, -3.0),
    (0xE, -4.0),
    (0xF, -6.0),
]
TIES = [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)]


@pytest.mark.parametrize(("code", "value"), CODE_TABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_code_decodes_to_its_value(code, value, dtype):
    low, high = e2m1.decode(torch.tensor([[code | (code << 4)]], dtype=torch.uint8), dtype)[0]
    for decoded in (low, high):
        assert decoded.dtype == dtype
        assert decoded.item() == value
        assert torch.signbit(decoded).item() == (code >= 8)


@pytest.mark.parametrize(("code", "value"), CODE_TABLE)
def test_each_value_encodes_to_its_code(code, value):
    # -0.0 is an exact zero: code 0, as compressed-tensors has it.
    expected = 0x0 if value == 0 else code
    assert e2m1.encode(torch.tensor([value])).tolist() == [expected]


@pytest.mark.parametrize(("tie", "code"), TIES)
def test_a_tie_goes_to_the_even_code_and_its_neighbours_to_their_own_side(tie, code):
    tie = torch.tensor(tie)
    below, above = (torch.nextafter(tie, torch.tensor(limit)) for limit in (0.0, 9.0))
    lower = e2m1.encode(below).item()
    assert e2m1.encode(above).item() == lower + 1
    assert e2m1.encode(tie).item() == code
    assert code in (lower, lower + 1)
    assert code % 2 == 0


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (0.0, 0x0),
        (-0.0, 0x0),
        (1e-45, 0x0),
        (-1e-45, 0x8),
        (0.2, 0x0),
        (-0.2, 0x8),
        (-0.25, 0x8),
        (0.26, 0x1),
        (2.49, 0x4),
        (2.51, 0x5),
        (5.01, 0x7),
        (6.0, 0x7),
        (6.5, 0x7),
        (1e38, 0x7),
        (-1e38, 0xF),
    ],
)
def test_rounding_of(x, code):
    assert e2m1.encode(torch.tensor([x])).tolist() == [code]


def test_encoding_agrees_with_a_search_for_the_nearest_value_on_a_fine_grid():
    x = torch.linspace(-7, 7, 14 * 1024 + 1)  # steps of 2^-10: all ties and values lie on the grid
    distance = (x.abs().clamp(max=6)[:, None] - torch.tensor(e2m1.MAGNITUDES)).abs()
    is_nearest = distance == distance.amin(-1, keepdim=True)
    even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    nearest = even_first[is_nearest[:, even_first].to(torch.int8).argmax(-1)]
    expected = nearest + 8 * (x < 0)
    assert torch.equal(e2m1.encode(x), expected.to(torch.uint8))


def test_the_even_column_is_in_the_low_nibble():
    codes_NK = torch.tensor([[0x1, 0x2, 0xF, 0x0], [0x8, 0x7, 0x3, 0xC]], dtype=torch.uint8)
    codes_NK2 = torch.tensor([[0x21, 0x0F], [0x78, 0xC3]], dtype=torch.uint8)
    assert torch.equal(e2m1.pack(codes_NK), codes_NK2)
    assert torch.equal(e2m1.unpack(codes_NK2), codes_NK)


def test_every_byte_unpacks_and_packs_to_itself():
    every_byte = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert torch.equal(e2m1.pack(e2m1.unpack(every_byte)), every_byte)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_unpacking_inverts_packing(n_rows, n_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    codes_NK = torch.randint(16, (n_rows, 2 * n_bytes), generator=generator).to(torch.uint8)
    assert torch.equal(e2m1.unpack(e2m1.pack(codes_NK)), codes_NK)


def test_packing_takes_codes_in_any_memory_layout():
    codes_NK = torch.arange(16, dtype=torch.uint8).repeat(2, 1)
    assert torch.equal(e2m1.pack(codes_NK.t().contiguous().t()), e2m1.pack(codes_NK))
    wide_NK = torch.arange(64, dtype=torch.uint8).view(2, 32) % 16
    packed = e2m1.pack(wide_NK)
    assert torch.equal(e2m1.unpack(packed.t().contiguous().t()), wide_NK)
    assert torch.equal(e2m1.decode(packed[:, 4:8], torch.float32), e2m1.decode(packed, torch.float32)[:, 8:16])
