"""Data parallel training: every rank holds the packed base, rolls out its own groups and adds up gradients.

    torchrun --nproc-per-node N -m qerl_compile train …

A step's prompts are cut into N equal, contiguous shares; a group never leaves its rank, so advantages need no exchange
beyond the rewards themselves. What crosses ranks in a step is small and always has the same shape on all of them:

    rewards, lengths      gathered, so that every rank computes the same metrics and the same decisions
    LoRA gradients        summed, once per optimizer step, in one flat tensor
    token counts          summed: the losses divide by totals of the whole step, so nothing is averaged

Micro-batches may differ in number, since nothing is exchanged between them. Every rank then takes the same optimizer
step on the same numbers, and the adapters stay equal without ever being sent. Seeds name a prompt by its position in
the step, not in its share: N ranks draw what one would, up to the rounding of other batch shapes.

Rank 0 writes files. If a rank fails, it leaves with its message; torchrun ends the others (SIGTERM, and SIGKILL 30 s
later, for a rank may be waiting inside a collective) and prints which one failed first.

What this module does not do: shard the base (a 4-bit 32B model is 21 GB), or anything without torchrun.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qerl_compile.errors import RecipeError

PATIENCE = timedelta(minutes=30)  # ranks wait for the slowest rollout of a step; a dead rank is torchrun's to notice

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them; alone by default.

    Args:
        rank: 0 to size - 1.
        size: how many.
        device: where tensors must be to be exchanged.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @classmethod
    def join(cls) -> "Ranks":
        """Join the processes that torchrun started; alone if it did not."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        device = CPU
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), size, device)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` prompts are this rank's.

        Raises:
            RecipeError: they cannot be shared equally.
        """
        if count % self.size:
            raise RecipeError(
                where="train.prompts_per_step",
                expected=f"a multiple of the {self.size} ranks",
                got=str(count),
                do=f"Set train.prompts_per_step={-(-count // self.size) * self.size}.",
            )
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def gather(self, values: Tensor) -> Tensor:
        """Return the tensors of all ranks, which have one shape, joined along the first dimension in order of rank."""
        if self.size == 1:
            return values
        mine = values.to(self.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts).to(values.device)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Return the maximum over ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank."""
        return bool(self.max(torch.tensor(float(flag))))

    def _reduce(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return values
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total, how)
        return total.to(values.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks; a rank that had nothing to train on adds zeros."""
        if self.size == 1:
            return
        parameters = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
        flat = self.sum(flat)
        for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype)

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.any(False)
