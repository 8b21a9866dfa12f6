"""One decode step of a running batch, on the device from end to end: forward, draw, record, stop.

Everything that a row needs to go on lies in tensors that stay where they are, one line per row (`Rows`). A step reads
and writes them in place, so it can be captured in a CUDA graph once per batch size and replayed; the host only puts new
requests into lines whose old ones have ended, and looks at `finished_R` from time to time.

    token, length  → model → logits → draw at uniform[drawn] → token, logp
    tokens[drawn], logps[drawn] = token, logp;   drawn += 1
    ended if the token is an end token or the limit is reached: finished = drawn, length = 0 (the row is idle)

An idle line goes on drawing tokens that nobody reads: into its column `drawn`, which is behind its completion.

Graphs are keyed by the batch size and by what is fixed in their code (temperature, truncation). Limits, end tokens,
adapters, noise and everything in `Rows` are read from memory at each replay.

Shapes: R lines, B of them in a step, C longest completion, P pages of a row, V vocabulary, E end tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qerl_compile.isolation import isolated, mark_dynamic
from qerl_compile.rl.rollout.cache import DecodeView, PagedCache
from qerl_compile.rl.rollout.drawing import draw
from qerl_compile.rl.rollout.types import Sampling


@dataclass(frozen=True)
class Rows:
    """What each line of the batch needs.

    Attributes:
        token_R: int64, fed next.
        length_R: int32, positions with this token; 0 for an idle line.
        table_RP: int32, pages in order of position.
        drawn_R: int64, tokens drawn so far.
        finished_R: int32, length of a completion that has ended; 0 before.
        uniform_RC: float64, one number per token.
        tokens_RC: int64 [R, C + 1], the completion; one more column for what idle lines draw.
        logps_RC: float32 [R, C + 1].
        limit: int64 [], longest completion.
        ends_E: int64, end tokens; -1 where there are fewer.
    """

    token_R: Tensor
    length_R: Tensor
    table_RP: Tensor
    drawn_R: Tensor
    finished_R: Tensor
    uniform_RC: Tensor
    tokens_RC: Tensor
    logps_RC: Tensor
    limit: Tensor
    ends_E: Tensor

    @classmethod
    def make(cls, rows: int, columns: int, pages: int, device: torch.device) -> "Rows":
        """Return idle lines."""

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            token_R=zeros(rows, dtype=torch.int64),
            length_R=zeros(rows, dtype=torch.int32),
            table_RP=zeros(rows, pages, dtype=torch.int32),
            drawn_R=zeros(rows, dtype=torch.int64),
            finished_R=zeros(rows, dtype=torch.int32),
            uniform_RC=zeros(rows, columns, dtype=torch.float64),
            tokens_RC=zeros(rows, columns + 1, dtype=torch.int64),
            logps_RC=zeros(rows, columns + 1, dtype=torch.float32),
            limit=zeros(dtype=torch.int64),
            ends_E=zeros(MOST_ENDS, dtype=torch.int64),
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """Lines, tokens and pages a row that fit."""
        return (len(self.token_R), self.uniform_RC.shape[1], self.table_RP.shape[1])

    def lines(self) -> tuple[Tensor, ...]:
        """The tensors that have one line per row."""
        per_row = (self.token_R, self.length_R, self.table_RP, self.drawn_R, self.finished_R)
        return (*per_row, self.uniform_RC, self.tokens_RC, self.logps_RC)

    def begin(self, params: Sampling) -> None:
        """Set limits and end tokens, and make every line idle."""
        self.limit.fill_(params.max_new_tokens)
        ends = [*params.end_ids, *[-1] * (MOST_ENDS - len(params.end_ids))]
        self.ends_E.copy_(torch.tensor(ends))
        self.length_R.zero_()

    def move(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Move lines, (from, to); those left behind are idle."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, device=self.token_R.device).T
        for line in self.lines():
            line[target] = line[source]
        self.length_R[source] = 0

    def record(self, at: slice | Tensor, token_B: Tensor, logp_B: Tensor, length_B: Tensor, alive_B: Tensor) -> None:
        """Take the drawn tokens of some lines: write them down, and end or lengthen the rows.

        Args:
            at: which lines.
            token_B: drawn.
            logp_B: its log-probability.
            length_B: positions so far, without this token.
            alive_B: bool, lines that are not idle.
        """
        drawn_B = self.drawn_R[at]
        index = torch.arange(len(self.token_R), device=token_B.device)[at]
        self.tokens_RC[index, drawn_B] = token_B
        self.logps_RC[index, drawn_B] = logp_B
        drawn_B = drawn_B + alive_B
        ended_B = alive_B & ((token_B[:, None] == self.ends_E).any(1) | (drawn_B >= self.limit))
        self.drawn_R[at] = drawn_B
        self.token_R[at] = token_B
        self.finished_R[at] = torch.where(ended_B, drawn_B.int(), self.finished_R[at])
        self.length_R[at] = torch.where(alive_B & ~ended_B, length_B + 1, 0).int()


MOST_ENDS = 16


class DecodeStep:
    """Runs steps; on CUDA from captured graphs.

    Args:
        model: the policy, with paged attention switched on while steps run.
        cache: its pages.
        rows: the lines.
        params: temperature and truncation are fixed in the code of a step.
        graphs: whether to capture.
        pool: memory pool that graphs share, or None.
    """

    def __init__(
        self, model: Any, cache: PagedCache, rows: Rows, params: Sampling, *, graphs: bool, pool: Any = None
    ) -> None:
        self.model, self.cache, self.rows, self.graphs, self.pool = model, cache, rows, graphs, pool
        self.steps: dict[int, Callable[[], object]] = {}

        def drawing(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
            limits = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
            return draw(logits_BV, uniform_B, params.temperature, **limits)

        self.draw = self._draw_in_step = drawing
        inner = getattr(getattr(model, "qerl", None), "inner", None)
        if graphs and inner == "inductor" and params.temperature and not params.truncated:
            # 40 launches otherwise: a twentieth of a step of one row of a 7B model.
            self._draw_in_step = isolated(drawing, "inductor")

    def run(self, size: int) -> None:
        """Advance the first `size` lines by one token."""
        if not self.graphs:
            self._step(size)
            return
        if size not in self.steps:
            self.steps[size] = self._capture(size)
        self.steps[size]()

    def _step(self, size: int) -> None:
        rows, at = self.rows, slice(0, size)
        length_B = rows.length_R[at]
        ids_B1, positions_B1 = rows.token_R[at, None], (length_B - 1).clamp(min=0).long()[:, None]
        output = self.model(
            input_ids=ids_B1,
            position_ids=positions_B1,
            use_cache=False,
            qerl_cache=DecodeView(self.cache, rows.table_RP[at], length_B),
            logits_to_keep=1,
        )
        column_B1 = rows.drawn_R[at, None].clamp(max=rows.uniform_RC.shape[1] - 1)
        uniform_B = rows.uniform_RC[at].gather(1, column_B1).squeeze(1)
        logits_BV = output.logits[:, -1]
        for tensor in (logits_BV, uniform_B):
            mark_dynamic(tensor, (0,))
        token_B, logp_B = self._draw_in_step(logits_BV, uniform_B)
        rows.record(at, token_B, logp_B, length_B, length_B > 0)

    def _capture(self, size: int) -> Callable[[], object]:
        """Record a step. It runs eagerly first, on idle lines: compiling and allocating happen outside the graph."""
        saved = [line[:size].clone() for line in self.rows.lines()]
        self.rows.length_R[:size] = 0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._step(size)
        self.pool = graph.pool()
        for line, before in zip(self.rows.lines(), saved, strict=True):
            line[:size] = before
        return graph.replay
