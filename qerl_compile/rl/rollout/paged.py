"""Our rollout engine: slot-wise continuous batching on the policy's own packed weights.

    admit    samples from the queue into free rows (schedule.py): prefill their prompts, copy partial pages, draw their
             first token
    step     one token for every running row (decode.py), a CUDA graph per batch size
    look     which rows have ended; collect their completions and free their pages; admit again

The host stays one step ahead of the device: it launches step i and then looks at the end flags of step i - 1, which
were copied to pinned memory meanwhile. Nothing else is waited for, but for the end of a batch that is at the limit. A
row that ends is refilled two steps later at most. When the queue is empty and few rows are left, they move together and
smaller graphs take over.

**What is deterministic.** Repeating a call with the same arguments repeats every bit: random numbers come from (seed,
prompt, sample) alone, the schedule from lengths alone, and end flags are looked at a fixed number of steps later,
whether the device is done or not. Attention and sampling of a row look at no other row. Products do: torch chooses how
to multiply by the number of rows, on a CPU too, and so do our linears on CUDA. So in another batch (other `rows`, other
prompts beside it, a ragged tail) a sample sees logits that differ in the last bits; a token that falls on the border
between two may then differ, and everything after it. In float32 that is rare enough for tests to expect equal tokens.

What this module does not do: hold weights. The model is the trainer's; adapters are copied into their stacked form at
the start of `generate`, noise is read from its buffers in every step.

Shapes: L prompts of a prefill, V vocabulary, R rows, C longest completion.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qerl_compile.rl.rollout.cache import CacheShape, PagedCache, PrefillView, paged_attention
from qerl_compile.rl.rollout.decode import MOST_ENDS, DecodeStep, Rows, StepCode
from qerl_compile.rl.rollout.leaves import Calls, compiled_leaves
from qerl_compile.rl.rollout.memory import CACHE_SHARE, Workload, plan_pages
from qerl_compile.rl.rollout.pages import PagePool
from qerl_compile.rl.rollout.positions import check_positions
from qerl_compile.rl.rollout.randomness import uniform
from qerl_compile.rl.rollout.schedule import (
    Admission,
    Prefill,
    Request,
    Schedule,
    Start,
    buckets,
    compact,
    prefill_batches,
)
from qerl_compile.rl.rollout.types import Rollout, Rollouts, Sampling, not_finite

PAGE_TOKENS = {
    "cuda": 64,
    "cpu": 16,
}  # a page is a tile of the GPU's kernel; a CPU kernel gains nothing from large ones
PREFILL_TOKENS = 8192


class PagedSampler:
    """Samples from a Hugging Face causal LM in this process, transformed or not.

    Args:
        model: in eval mode, on its final device.
        rows: most sequences that run at a time.
        budget_bytes: most that the key-value cache may take; None for a share of what is free when it is made.
        share: which; the cache stays for the next call, so a trainer leaves more than an evaluation has to.
        page_tokens: positions of a page; None for the device's default.
        prefill_tokens: prompt tokens that are run together.
        graphs: capture decode steps in CUDA graphs; None for wherever there is CUDA.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 64,
        budget_bytes: int | None = None,
        share: float = CACHE_SHARE,
        page_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        graphs: bool | None = None,
    ) -> None:
        self.model, self.rows, self.prefill_tokens = model, rows, prefill_tokens
        self.budget_bytes, self.share = budget_bytes, share
        self.device = model.get_input_embeddings().weight.device
        on_cuda = self.device.type == "cuda"
        self.graphs = on_cuda if graphs is None else graphs
        self.shape = CacheShape.of(model, page_tokens or PAGE_TOKENS.get(self.device.type, PAGE_TOKENS["cpu"]))
        self._cache: PagedCache | None = None
        self._lines: Rows | None = None
        self._pages, self._size = 0, (0, 0, 0)  # of cache and lines, also while they are given back
        self._steps: dict[tuple[float, int, float, float], DecodeStep] = {}
        self._code: dict[tuple[float, int, float, float], StepCode] = {}

    def release(self) -> int:
        """Give pages, lines and graphs back until the next `generate`; return the bytes of the pages.

        That call makes as many pages and lines again, so its samples are those of an engine that kept them, and
        captures the graphs again. Compiled functions stay.
        """
        freed_bytes = self._cache.nbytes if self._cache else 0
        self._cache = self._lines = None
        self._steps.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # whole blocks: an update would otherwise cut them up, and no page fit there again
        return freed_bytes

    @torch.inference_mode()  # operators skip autograd's Python wrappers: a tenth of a small model's step on a CPU
    def generate(self, prompts: Sequence[tuple[int, ...]], group_size: int, params: Sampling) -> Rollouts:
        """Sample `group_size` completions for each prompt; see `Sampler`.

        Raises:
            ModelError: logits that tokens were sampled from are not finite, or a request cannot fit into the budget, or
                a sequence may become longer than the model's positions.
            ValueError: a prompt is empty, there are no samples to draw, or there are too many end tokens.
        """
        if not prompts:
            return Rollouts(())
        _check_request(prompts, group_size, params)
        check_positions(self.model, prompts, params.max_new_tokens)
        lengths = tuple(map(len, prompts))
        work = Workload(lengths, group_size, params.max_new_tokens, self.shape.page_tokens)
        if _refresh_adapters(self.model):
            self._steps.clear()  # graphs read the tensors that were there when they were captured
        cache, lines = self._memory(work)
        key = (params.temperature, params.top_k, params.top_p, params.min_p)
        if key not in self._steps:
            pool = next((step.pool for step in self._steps.values()), None)
            self._steps[key] = DecodeStep(self._compiled(key, params), cache, lines, graphs=self.graphs, pool=pool)
        with paged_attention(self.model):
            return _Run(self, self._steps[key], prompts, work, params).run()

    def _compiled(self, key: tuple[float, int, float, float], params: Sampling) -> StepCode:
        if key not in self._code:
            self._code[key] = StepCode.of(self.model, params, self._leaves, graphs=self.graphs)
        return self._code[key]

    @cached_property
    def _leaves(self) -> Calls:
        return compiled_leaves(self.model) if self.graphs or self.device.type == "cuda" else {}

    def _memory(self, work: Workload) -> tuple[PagedCache, Rows]:
        """Return pages and lines that hold the workload: those of the last call if they do."""
        rows = min(self.rows, work.samples)
        cache = self._cache if self._cache and self._cache.pages >= work.most_pages(rows) else self._larger(work, rows)
        pages_of_a_row = max(work.full_pages(i) + work.own_pages(i) for i in range(len(work.prompt_lengths)))
        wanted = (max(2, rows), work.max_new_tokens, -(-pages_of_a_row // 4) * 4)
        lines, had = self._lines, self._size
        if lines is None or any(need > has for need, has in zip(wanted, had, strict=True)):
            self._steps.clear()
            count, columns, pages = map(max, wanted, had)  # what earlier calls needed will be needed again
            lines = self._lines = Rows.make(count, columns, pages, self.device)
            self._size = lines.size
        return cache, lines

    def _larger(self, work: Workload, rows: int) -> PagedCache:
        """Return as many pages as the workload can use or the budget allows, or as many as there were if that is more.

        Pages that were given back may not fit any more; then their number is decided anew.
        """
        shape, old = self.shape, self._cache
        bytes_of_a_page = shape.page_bytes
        free = _free_bytes(self.device) + (old.pages * bytes_of_a_page if old else 0)
        # What a step itself needs was to fit into the rest: half of that is left to it at least.
        most = free if self.budget_bytes is not None else int(free * (1 + self.share) / 2)
        had = self._pages if self._pages * bytes_of_a_page <= most else 0
        if had >= work.most_pages(rows):
            pages = had
        else:
            planned = plan_pages(
                work,
                rows=rows,
                page_bytes=bytes_of_a_page,
                free_bytes=free,
                budget_bytes=self.budget_bytes,
                share=self.share,
            )
            pages = max(had, planned)
        if old is not None and old.pages >= pages:
            return old
        del old
        self._cache = self._lines = None
        self._steps.clear()
        self._cache, self._pages = PagedCache(shape, pages, self.device), pages
        return self._cache


class _Run:
    """One call of `generate`."""

    def __init__(
        self,
        sampler: PagedSampler,
        step: DecodeStep,
        prompts: Sequence[tuple[int, ...]],
        work: Workload,
        params: Sampling,
    ) -> None:
        self.model, self.step, self.prompts, self.work, self.params = sampler.model, step, prompts, work, params
        self.cache, self.lines, self.prefill_tokens = step.cache, step.rows, sampler.prefill_tokens
        rows = min(sampler.rows, work.samples)
        self.schedule = Schedule(work, PagePool(self.cache.pages), rows)
        # Dynamo makes a graph of its own for one row; on a GPU two rows take as long, and a step less is compiled.
        self.sizes = buckets(max(2, rows))[1:] if step.graphs else buckets(rows)
        self.ends = _EndFlags(self.lines.finished_R, ahead=int(self.lines.token_R.is_cuda))
        self.logits: dict[int, Tensor] = {}  # of prompts whose samples still wait
        self.first_step: dict[int, int] = {}  # of each row: flags of earlier steps are another request's
        self.last_step = 0  # after which every row that has started has reached the limit
        self.collected: list[tuple[list[Request], list[int], Tensor, Tensor]] = []
        self.taken, self.row_steps, self.prefilled, self.prefill_s = 0, 0, 0, 0.0

    def run(self) -> Rollouts:
        begin = time.perf_counter()
        self.lines.begin(self.params)
        while not self.schedule.done():
            self._admit(self.schedule.admit())
            if self.params.max_new_tokens == 1 or not self.ends.ahead:  # a first token may be the last
                self._look([(self.taken + 1, self.lines.finished_R.tolist())])
                if not self.schedule.running:
                    continue
            if self.taken >= self.last_step:  # all are at the limit: no step to stay ahead by
                self._look(self.ends.drain())
                continue
            size = self._size()
            self.step.run(size)
            self.taken += 1
            self.row_steps += size
            self._look(self.ends.after(self.taken))
        rollouts = self._rollouts()
        drawn = sum(len(rollout.completion_ids) for rollout in rollouts)
        metrics = {
            "rollout/decode_steps": float(self.taken),
            "rollout/occupancy": (drawn - len(rollouts)) / self.row_steps if self.row_steps else 0.0,
            "rollout/prefill_tokens": float(self.prefilled),
            "rollout/prefill_time": self.prefill_s,
            "rollout/time": time.perf_counter() - begin,
            "rollout/cache_bytes": float(self.cache.nbytes),
        }
        return Rollouts(tuple(rollouts), metrics)

    def _admit(self, admission: Admission) -> None:
        begin = time.perf_counter()
        prefills = admission.prefills
        for batch in prefill_batches([len(self.prompts[p.prompt]) for p in prefills], self.prefill_tokens):
            self._prefill([prefills[index] for index in batch])
        self.cache.copy(admission.copies)
        if admission.starts:
            self._start(admission.starts)
        if prefills:
            self.prefill_s += time.perf_counter() - begin  # of the host; on CUDA the device may still be at it

    def _prefill(self, prefills: Sequence[Prefill]) -> None:
        prompts = [self.prompts[prefill.prompt] for prefill in prefills]
        view = PrefillView(self.cache, prompts, [prefill.pages for prefill in prefills])
        output = self.model(
            input_ids=view.ids_1N,
            position_ids=view.positions_1N,
            use_cache=False,
            qerl_cache=view,
            logits_to_keep=view.last,
        )
        self.prefilled += sum(map(len, prompts))
        self.logits.update(zip((prefill.prompt for prefill in prefills), output.logits[0], strict=True))

    def _start(self, starts: Sequence[Start]) -> None:
        """Fill the lines of new samples and draw their first tokens."""
        lines, device = self.lines, self.lines.token_R.device
        columns = self.params.max_new_tokens
        requests = [start.request for start in starts]
        seed, first = self.params.seed, self.params.first_prompt
        uniform_SC = torch.stack([uniform((*seed, first + r.prompt, r.sample), columns) for r in requests])
        width = lines.table_RP.shape[1]
        table_SP = torch.tensor([[*start.pages, *[0] * (width - len(start.pages))] for start in starts])
        at = torch.tensor([start.row for start in starts], device=device)
        length_S = torch.tensor([len(self.prompts[r.prompt]) for r in requests], device=device)
        lines.uniform_RC[at, :columns] = uniform_SC.to(device)
        lines.table_RP[at] = table_SP.to(device, torch.int32)
        lines.drawn_R[at] = 0
        lines.finished_R[at] = 0
        logits_SV = torch.stack([self.logits[r.prompt] for r in requests])
        token_S, logp_S = self.step.code.draw(logits_SV, uniform_SC[:, 0].to(device))
        lines.record(at, token_S, logp_S, length_S, torch.ones_like(at, dtype=torch.bool))
        for start in starts:
            self.first_step[start.row] = self.taken + 1
        self.last_step = self.taken + self.params.max_new_tokens - 1
        last = requests[-1]
        waits = last.sample + 1 < self.work.group_size
        self.logits = {last.prompt: self.logits[last.prompt].clone()} if waits else {}

    def _size(self) -> int:
        """The batch size of the next step; rows move together where that makes it smaller."""
        size, moves = compact(self.schedule.running, self.sizes)
        if moves:
            self._look(self.ends.drain())  # flags name rows by where they were
            size, moves = compact(self.schedule.running, self.sizes)
        for source, target in moves:
            self.schedule.move(source, target)
            self.first_step[target] = self.taken + 1
        self.lines.move(moves)
        return size

    def _look(self, flags: Sequence[tuple[int, list[int]]]) -> None:
        """Take over what has ended: (step, finished_R after it)."""
        for step, finished in flags:
            running = self.schedule.running
            ended = [row for row in running if finished[row] and step >= self.first_step[row]]
            if not ended:
                continue
            counts = [finished[row] for row in ended]
            at = torch.tensor(ended, device=self.lines.token_R.device)
            tokens, logps = (x[at, : max(counts)] for x in (self.lines.tokens_RC, self.lines.logps_RC))
            self.collected.append(([self.schedule.finish(row) for row in ended], counts, tokens, logps))

    def _rollouts(self) -> list[Rollout]:
        """Bring the completions to the host, in order of prompt and sample."""
        found: dict[Request, Rollout] = {}
        ends = set(self.params.end_ids)
        for requests, counts, tokens, logps in self.collected:
            rows = zip(requests, counts, tokens.tolist(), logps.tolist(), strict=True)
            for request, count, ids, numbers in rows:
                prompt = self.prompts[request.prompt]
                _check_finite(numbers[:count], request)
                completion = tuple(ids[:count])
                found[request] = Rollout(prompt, completion, tuple(numbers[:count]), ended=completion[-1] in ends)
        return [found[request] for request in sorted(found)]


class _EndFlags:
    """`finished_R` after each step, seen by the host `ahead` steps later."""

    def __init__(self, finished_R: Tensor, *, ahead: int) -> None:
        self.finished_R, self.ahead = finished_R, ahead
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.pinned = (
            [torch.empty_like(finished_R, device="cpu", pin_memory=True) for _ in range(ahead + 1)] if ahead else []
        )

    def after(self, step: int) -> list[tuple[int, list[int]]]:
        """Note the flags after `step`; return those that are `ahead` steps old."""
        if not self.ahead:
            return [(step, self.finished_R.tolist())]
        copy = self.pinned[step % len(self.pinned)]
        copy.copy_(self.finished_R, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((step, copy, event))
        return [self._take()] if len(self.pending) > self.ahead else []

    def drain(self) -> list[tuple[int, list[int]]]:
        """Return all flags that were noted and not returned yet."""
        return [self._take() for _ in range(len(self.pending))]

    def _take(self) -> tuple[int, list[int]]:
        step, copy, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        return step, copy.tolist()


def _check_request(prompts: Sequence[tuple[int, ...]], group_size: int, params: Sampling) -> None:
    empty = [index for index, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ValueError(f"generate: expected prompts of one token or more, got none in prompt {empty[0]}")
    if group_size < 1:
        raise ValueError(f"generate: expected group_size >= 1, got {group_size}")
    if len(params.end_ids) > MOST_ENDS:
        raise ValueError(f"Sampling: expected at most {MOST_ENDS} end_ids, got {len(params.end_ids)}")


def _check_finite(logps: Sequence[float], request: Request) -> None:
    if not all(-float("inf") < logp <= 0 for logp in logps):
        raise not_finite(f"rollout of prompt {request.prompt}, sample {request.sample}")


def _refresh_adapters(model: Any) -> bool:
    """Copy the trainer's adapters into the stacked form that rollout graphs read; whether that had to be made."""
    from qerl_compile.model import QerlModel
    from qerl_compile.stacked_adapters import refresh_stacked_adapters

    return isinstance(model, QerlModel) and refresh_stacked_adapters(model)


def _free_bytes(device: torch.device) -> int:
    """Return what the device can still give us."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")  # Linux; sysconf has what is free there, but not what files' cache would give back
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
