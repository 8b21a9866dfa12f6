"""The kernel's own order of bits is a rearrangement: nothing is lost."""

import torch

from qerl_compile.kernels.nvfp4_twiddle import twiddle, untwiddle


def test_untwiddle_returns_every_bit():
    codes = torch.randint(0, 256, (64, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    twiddled = twiddle(codes)
    assert not torch.equal(twiddled, codes)
    assert torch.equal(untwiddle(twiddled), codes)


def test_every_bit_of_a_word_goes_to_a_place_of_its_own():
    words = (torch.ones(32, dtype=torch.int64) << torch.arange(32)).to(torch.int32).view(32, 1).view(torch.uint8)
    moved = twiddle(words).view(torch.int32).view(-1).to(torch.int64) & 0xFFFFFFFF
    assert sorted(moved.tolist()) == [1 << i for i in range(32)]
