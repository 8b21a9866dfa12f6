"""Which sample runs in which row, on which pages, and when; decided on the host, without tensors.

A `Schedule` is a queue of samples in order of prompt, then sample, and a number of rows. Whenever rows are free,
`admit()` takes samples from the front, as many as rows and pages allow, and says what to do for them:

    prefills   run these prompts; each writes its pages
    copies     then copy one page to another, for samples that do not own their prompt's partial page
    starts     then draw the first token of these samples, in these rows

Why it cannot get stuck. A sample is taken only with all the pages it can ever need (memory.py), so what runs always
finishes. A prompt is prefilled only together with its first sample, so pages are never held by prompts alone; and the
front of the queue is never overtaken, so it gets the pages as soon as enough has finished. When nothing runs, only the
front prompt can hold pages, and `check_fits` has made sure that its next sample fits beside them.

At most one prompt is prefilled while samples of it still wait: the one at the front. An engine keeps one row of logits
for it, from which the waiting samples draw their first token.

Strict order costs something: a long request at the front keeps short ones behind it waiting although they would fit. It
buys that the order of starts is the same whichever samples end early, and that nothing starves.

What this module does not do: look at tokens. The engine tells it which rows have ended.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qerl_compile.rl.rollout.memory import Workload, check_fits
from qerl_compile.rl.rollout.pages import PagePool


@dataclass(frozen=True, order=True)
class Request:
    """One completion: sample `sample` of prompt `prompt`."""

    prompt: int
    sample: int


@dataclass(frozen=True)
class Prefill:
    """Run a prompt; its keys and values fill `pages` in order, the last one partly unless the length is a multiple."""

    prompt: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """Begin a completion.

    Args:
        request: which.
        row: where.
        pages: of all its positions in order; those full of prompt are shared, the others are its own.
        copy: (from, to), the prompt's partial page and the sample's own copy of it, or None.
    """

    request: Request
    row: int
    pages: tuple[int, ...]
    copy: tuple[int, int] | None


@dataclass(frozen=True)
class Admission:
    """What to do next: all prefills, then all copies, then all starts."""

    prefills: tuple[Prefill, ...]
    starts: tuple[Start, ...]

    @property
    def copies(self) -> tuple[tuple[int, int], ...]:
        """Pages to copy, (from, to); no page is both."""
        return tuple(start.copy for start in self.starts if start.copy)


class Schedule:
    """The samples of a workload, each of which waits, runs in one row, or has finished.

    Args:
        workload: what has to be generated.
        pool: the pages; those that others hold stay out of reach.
        rows: how many samples can run at a time.

    Raises:
        ModelError: a request can never fit into the free pages of the pool.
    """

    def __init__(self, workload: Workload, pool: PagePool, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"Schedule: expected rows >= 1, got {rows}")
        check_fits(workload, pool.free)
        self._workload, self._pool = workload, pool
        self._next = 0  # in the queue: prompt * group_size + sample
        self._prompt_pages: list[int] = []  # held for the samples of the front prompt that still wait
        self._free_rows = set(range(rows))
        self._running: dict[int, Start] = {}

    @property
    def running(self) -> dict[int, Request]:
        """The request in each row that is busy, in ascending order of rows."""
        return {row: self._running[row].request for row in sorted(self._running)}

    @property
    def waiting(self) -> int:
        """How many samples have not started."""
        return self._workload.samples - self._next

    def done(self) -> bool:
        """Whether every sample has started and finished."""
        return not self.waiting and not self._running

    def admit(self) -> Admission:
        """Start as many waiting samples as rows and pages allow, in order, in the lowest free rows."""
        prefills: list[Prefill] = []
        starts: list[Start] = []
        while self.waiting and self._free_rows:
            request = Request(*divmod(self._next, self._workload.group_size))
            if self._pool.free < self._pages_to_start(request):
                break
            if request.sample == 0:
                self._prompt_pages = self._pool.allocate(self._workload.prompt_pages(request.prompt))
                prefills.append(Prefill(request.prompt, tuple(self._prompt_pages)))
            starts.append(self._start(request))
        return Admission(tuple(prefills), tuple(starts))

    def finish(self, row: int) -> Request:
        """End the completion in `row`; its pages may be handed out by the next `admit`."""
        start = self._running.pop(row)
        self._free_rows.add(row)
        self._pool.release(start.pages)
        return start.request

    def move(self, source: int, target: int) -> None:
        """Let the completion in row `source` go on in row `target`, which must be free."""
        self._free_rows.remove(target)
        self._running[target] = self._running.pop(source)
        self._free_rows.add(source)

    def _pages_to_start(self, request: Request) -> int:
        work, prompt = self._workload, request.prompt
        taken_over = self._is_last(request) * (work.prompt_pages(prompt) - work.full_pages(prompt))
        prefilled = work.prompt_pages(prompt) if request.sample == 0 else 0
        return prefilled + work.own_pages(prompt) - taken_over

    def _is_last(self, request: Request) -> bool:
        return request.sample == self._workload.group_size - 1

    def _start(self, request: Request) -> Start:
        full = self._workload.full_pages(request.prompt)
        own = self._workload.own_pages(request.prompt)
        shared, partial = self._prompt_pages[:full], self._prompt_pages[full:]
        copy = None
        if self._is_last(request):  # what was held for the samples that wait is its own now
            pages = shared + partial + self._pool.allocate(own - len(partial))
            self._prompt_pages = []
        else:
            self._pool.share(shared)
            pages = shared + self._pool.allocate(own)
            copy = (partial[0], pages[full]) if partial else None
        row = min(self._free_rows)
        self._free_rows.remove(row)
        self._next += 1
        self._running[row] = Start(request, row, tuple(pages), copy)
        return self._running[row]


def buckets(max_rows: int) -> tuple[int, ...]:
    """Return the batch sizes for which a decode step is captured, ascending, the last one `max_rows`.

    Powers of two up to 64, and the numbers halfway above. Up to some 64 rows a step takes as long as reading the
    weights does, so padding is nearly free and few sizes do; above, time grows with the rows, and each size being at
    most half as much again as the one before bounds the padding to a third. A capture costs time before the first token
    and memory, so a size above three quarters of the largest is left out.
    """
    sizes = [2**power for power in range(max_rows.bit_length())]
    halves = [3 * size // 2 for size in sizes if size >= 64]
    return (*sorted(size for size in sizes + halves if 4 * size <= 3 * max_rows), max_rows)


def compact(running: Collection[int], sizes: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """Return the smallest batch size that holds the running rows, and the moves (from, to) that bring them below it.

    Args:
        running: busy rows.
        sizes: batch sizes, ascending, the last one large enough.

    Returns:
        The size and the moves, which touch each row once at most and so may be done in any order. No move is needed
        while the rows that run are below the size already.
    """
    size = sizes[bisect_left(sizes, len(running))]
    holes = sorted(set(range(size)) - set(running))
    return size, list(zip(sorted(row for row in running if row >= size), holes, strict=False))


def prefill_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group prompts of similar length, so that each batch, padded to its longest prompt, has at most `max_tokens`.

    Args:
        lengths: tokens of each prompt.
        max_tokens: of a batch, padding included. A prompt that is longer has a batch to itself.

    Returns:
        Indices into `lengths`, the longest prompts first, equal ones in their order.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
