"""One decode step of a running batch, on the device from end to end: forward, draw, record, stop.

Everything that a row needs to go on lies in tensors that stay where they are, one line per row (`Rows`). A step reads
and writes them in place, so it can be captured in a CUDA graph once per batch size and replayed; the host only puts new
requests into lines whose old ones have ended, and looks at `finished_R` from time to time.

    token, position  → model → logits → draw at uniform[drawn] → token, logp
    tokens[drawn], logps[drawn] = token, logp;   drawn += 1
    ended if the token is an end token or the limit is reached: finished = drawn, length = 0 (the row is idle)
    else length += 1, position = length - 1

An idle line goes on drawing tokens that nobody reads: into its column `drawn`, which is behind its completion.

**Few launches.** All that comes after the logits is one function of tensors, `advance`, which Inductor compiles where
steps are captured and the model's own graphs are Inductor's too. Written as PyTorch it is some seventy operators of a
few microseconds, whatever the model; a step of a 7B model takes 3 ms. What the model is fed lies ready in `Rows`, so
nothing comes before it, and what it runs beside its layers is compiled by leaves.py. Lines are passed as views of the
first B, and written by indexed assignment, which Inductor does in place; a scatter it would do on a copy of all
completions.

Graphs are keyed by the batch size and by what is fixed in their code (temperature, truncation). Limits, end tokens,
adapters, noise and everything in `Rows` are read from memory at each replay.

Shapes: R lines, B of them in a step, C longest completion, P pages of a row, V vocabulary, E end tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qerl_compile.isolation import isolated, mark_dynamic
from qerl_compile.rl.rollout.cache import DecodeView, PagedCache
from qerl_compile.rl.rollout.drawing import draw
from qerl_compile.rl.rollout.leaves import Calls, calling
from qerl_compile.rl.rollout.types import Sampling

Drawing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rows:
    """What each line of the batch needs.

    Attributes:
        token_R: int64, fed next.
        position_R: int64, of that token; any that the model knows for an idle line.
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
    position_R: Tensor
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
            position_R=zeros(rows, dtype=torch.int64),
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
        numbers = (self.token_R, self.position_R, self.length_R)
        counts = (self.drawn_R, self.finished_R)
        return (*numbers, self.table_RP, *counts, self.uniform_RC, self.tokens_RC, self.logps_RC)

    def first(self, size: int) -> "Rows":
        """Views of the first lines: what is written there is written here."""
        return Rows(*(line[:size] for line in self.lines()), limit=self.limit, ends_E=self.ends_E)

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
        length_B = torch.where(alive_B & ~ended_B, length_B + 1, 0)
        self.position_R[at] = (length_B - 1).clamp(min=0).long()
        self.length_R[at] = length_B.int()


MOST_ENDS = 16


def advance(lines: Rows, logits_BV: Tensor, drawing: Drawing) -> None:
    """Draw the next token of every line and write it down.

    Args:
        lines: all of a step; changed in place.
        logits_BV: in any floating dtype.
        drawing: tokens and log-probabilities of (logits [B, V], uniform [B]).
    """
    column_B1 = lines.drawn_R[:, None].clamp(max=lines.uniform_RC.shape[1] - 1)
    uniform_B = lines.uniform_RC.gather(1, column_B1).squeeze(1)
    token_B, logp_B = drawing(logits_BV, uniform_B)
    lines.record(slice(None), token_B, logp_B, lines.length_R, lines.length_R > 0)


@dataclass(frozen=True)
class StepCode:
    """What of a step is code: it outlives pages, lines and graphs, and compiling it takes seconds.

    Attributes:
        model: the policy, with paged attention switched on while steps run.
        draw: tokens and log-probabilities; temperature and truncation are fixed in it.
        leaves: compiled calls of small modules (leaves.py).
        advance: what comes after the logits.
        fused: whether that is compiled.
    """

    model: Any
    draw: Drawing
    leaves: Calls
    advance: Callable[[Rows, Tensor, Drawing], None]
    fused: bool

    @classmethod
    def of(cls, model: Any, params: Sampling, leaves: Calls, *, graphs: bool) -> "StepCode":
        """Return the code for a temperature and a truncation.

        Args:
            model: the policy.
            params: temperature and truncation are read.
            leaves: of the model; none to run them as they are.
            graphs: whether steps are captured.
        """
        limits = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
        drawing: Drawing = partial(draw, temperature=params.temperature, **limits)
        inner = getattr(getattr(model, "qerl", None), "inner", None)
        # Truncated draws sort the vocabulary or take its top: PyTorch's kernels either way, and most of the time.
        fused = graphs and inner == "inductor" and not params.truncated
        return cls(model, drawing, leaves, isolated(advance, "inductor") if fused else advance, fused)


class DecodeStep:
    """Runs steps; on CUDA from captured graphs.

    Args:
        code: of the model, for a temperature and a truncation.
        cache: pages.
        rows: the lines.
        graphs: whether to capture.
        pool: memory pool that graphs share, or None.
    """

    def __init__(self, code: StepCode, cache: PagedCache, rows: Rows, *, graphs: bool, pool: Any = None) -> None:
        self.code, self.cache, self.rows, self.graphs, self.pool = code, cache, rows, graphs, pool
        self.steps: dict[int, Callable[[], object]] = {}

    def run(self, size: int) -> None:
        """Advance the first `size` lines by one token."""
        if not self.graphs:
            self._step(size)
            return
        if size not in self.steps:
            self.steps[size] = self._capture(size)
        self.steps[size]()

    def _step(self, size: int) -> None:
        lines = self.rows.first(size)
        with calling(self.code.leaves):
            output = self.code.model(
                input_ids=lines.token_R[:, None],
                position_ids=lines.position_R[:, None],
                use_cache=False,
                qerl_cache=DecodeView(self.cache, lines.table_RP, lines.length_R),
                logits_to_keep=1,
            )
        logits_BV = output.logits[:, -1]
        if self.code.fused:
            _mark_dynamic(lines, logits_BV)
        self.code.advance(lines, logits_BV, self.code.draw)

    def _capture(self, size: int) -> Callable[[], object]:
        """Record a step. It runs eagerly first, on idle lines: compiling and allocating happen outside the graph."""
        saved = [line[:size].clone() for line in self.rows.lines()]
        self.rows.length_R[:size] = 0
        stream = _warm_up_stream(self.rows.token_R.device)
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


@cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for each stream it has seen, 36 MiB on an H200."""
    return torch.cuda.Stream(device)


def _mark_dynamic(lines: Rows, logits_BV: Tensor) -> None:
    """One graph for all batch sizes and completion lengths."""
    for tensor in (*lines.lines(), logits_BV):
        mark_dynamic(tensor, (0,))
    for tensor in (lines.uniform_RC, lines.tokens_RC, lines.logps_RC):
        mark_dynamic(tensor, (1,))
