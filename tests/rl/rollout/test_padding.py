"""Rectangles by hand."""

import pytest
import torch

from qerl_compile.rl.rollout.padding import last_positions, left_padded, positions


def test_padding_goes_left_and_positions_count_real_tokens():
    ids_BT, mask_BT = left_padded([(5, 6, 7), (8,)], 9, "cpu")
    assert ids_BT.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(mask_BT).tolist() == [[0, 1, 2], [0, 0, 0]]


@pytest.mark.parametrize("count, want", [(0, []), (1, [3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])])
def test_the_last_positions_are_indices(count, want):
    assert last_positions(torch.zeros(2, 4), count).tolist() == want
