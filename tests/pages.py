"""A page cache without pages: what makes a region take its rollout graphs, for tests that need no attention over pages.

The attention of transformers ignores the keyword, so a rollout graph then computes what a training graph computes.
"""

import torch
from torch import Tensor


class LayerPages:
    """What one layer sees: the two tensors whose sizes regions mark dynamic."""

    def __init__(self, table_BP: Tensor, length_B: Tensor) -> None:
        self.table_BP, self.length_B = table_BP, length_B


class Pages:
    """Hands out layer views and notes for which layers."""

    def __init__(self, rows: int, columns: int = 3, device: str = "cpu") -> None:
        self.table_BP = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        self.length_B = torch.ones(rows, dtype=torch.int32, device=device)
        self.asked: list[int] = []

    def layer(self, index: int) -> LayerPages:
        self.asked.append(index)
        return LayerPages(self.table_BP, self.length_B)
