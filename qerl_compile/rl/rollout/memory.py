"""How many pages: those of a request, those of a workload, and those that a budget of bytes pays for.

    prompt of L tokens, N new ones, pages of PAGE tokens

    |  full page  |  full page  | partial |             one prompt's, after prefill: ceil(L / PAGE)
                                |  copy …  |   …   |    each sample's own: ceil((L + N) / PAGE) - floor(L / PAGE)

The full pages of a prompt are shared by its group. Its partial page (if L is no multiple of PAGE) is overwritten by
whoever continues it, so each sample works on a copy, and the last sample to start takes the original over.

A sample counts as L + N tokens long, though the last token drawn is never fed back: an engine that looks for stops one
step late may write it. Pages are reserved for that length when a sample starts, so a sample that runs cannot run out of
memory, and nothing ever has to be evicted or recomputed. The price is that a sample that stops early has held pages it
did not use; in exchange no rollout dies halfway, and how many samples run at once is known beforehand.

What fits is decided before any work: a budget larger than the device, or too small for the largest request, is refused
in bytes and tokens. Given enough memory, no more pages are made than `most_pages`, which a workload cannot exceed.

What this module does not count: what a step itself needs besides the cache (activations, logits, CUDA graphs). Without
a budget a fifth of the free memory is left for it.
"""

from dataclasses import dataclass

from qerl_compile.errors import ModelError

CACHE_SHARE = 0.8  # of the free memory, if nobody sets a budget; the rest is for activations, logits and graphs


@dataclass(frozen=True)
class Workload:
    """What one `generate` has to do; every number here is at least 1.

    Args:
        prompt_lengths: tokens of each prompt.
        group_size: samples of each prompt.
        max_new_tokens: longest completion.
        page_tokens: tokens of a page.
    """

    prompt_lengths: tuple[int, ...]
    group_size: int
    max_new_tokens: int
    page_tokens: int

    def __post_init__(self) -> None:
        if min(self.group_size, self.max_new_tokens, self.page_tokens, *self.prompt_lengths) < 1:
            raise ValueError(f"Workload: expected every number to be at least 1, got {self}")

    @property
    def samples(self) -> int:
        """How many completions there will be."""
        return len(self.prompt_lengths) * self.group_size

    def full_pages(self, prompt: int) -> int:
        """Pages that the prompt fills, which its samples share."""
        return self.prompt_lengths[prompt] // self.page_tokens

    def prompt_pages(self, prompt: int) -> int:
        """Pages that prefill writes: the full ones, and the partial one if there is one."""
        return -(-self.prompt_lengths[prompt] // self.page_tokens)

    def own_pages(self, prompt: int) -> int:
        """Pages that a sample of the prompt shares with nobody, at least one; the first starts as the partial page."""
        return -(-(self.prompt_lengths[prompt] + self.max_new_tokens) // self.page_tokens) - self.full_pages(prompt)

    def least_pages(self, prompt: int) -> int:
        """Pages without which the prompt can never be sampled: one sample runs, and the next needs the partial page."""
        kept = self.prompt_pages(prompt) if self.group_size > 1 else self.full_pages(prompt)
        return kept + self.own_pages(prompt)

    def most_pages(self, rows: int) -> int:
        """Pages in use at most while `rows` samples run at a time, whichever of them end early.

        The first running sample of a prompt brings the prompt's full pages with it, each further one its own only.
        While samples wait, one prompt at most has been prefilled for some of them (schedule.py).
        """
        prompts = range(len(self.prompt_lengths))
        first = [self.full_pages(prompt) + self.own_pages(prompt) for prompt in prompts]
        further = [self.own_pages(prompt) for prompt in prompts for _ in range(self.group_size - 1)]
        running = sum(sorted(first + further, reverse=True)[:rows])
        waiting = max(map(self.prompt_pages, prompts), default=0) if rows < self.samples else 0
        return running + waiting


def plan_pages(
    workload: Workload,
    *,
    rows: int,
    page_bytes: int,
    free_bytes: int,
    budget_bytes: int | None = None,
    share: float = CACHE_SHARE,
) -> int:
    """Return how many pages to make.

    Args:
        workload: what has to be generated.
        rows: most samples that run at a time.
        page_bytes: of one page, in all layers.
        free_bytes: what the device has left.
        budget_bytes: most that the cache may take, or None for a share of what is free.
        share: which.

    Returns:
        What the budget pays for, but no more than the workload can use.

    Raises:
        ModelError: the budget exceeds the free memory, or cannot hold the largest request.
    """
    if budget_bytes is not None and budget_bytes > free_bytes:
        raise ModelError(
            where="rollout memory",
            expected=f"a key-value cache within the {_gib(free_bytes)} that are free on the device",
            got=f"a budget of {_gib(budget_bytes)}",
            do=f"Lower the budget, or leave it out to use {share * 100:.0f} % of what is free.",
        )
    allowed_bytes = int(free_bytes * share) if budget_bytes is None else budget_bytes
    affordable = allowed_bytes // page_bytes
    check_fits(workload, affordable, page_bytes)
    return min(affordable, workload.most_pages(rows))


def check_fits(workload: Workload, pages: int, page_bytes: int | None = None) -> None:
    """Raise a ModelError if the largest request can never run in `pages` pages; bytes are for the message."""
    largest = max(range(len(workload.prompt_lengths)), key=workload.least_pages, default=None)
    if largest is None or (needed := workload.least_pages(largest)) <= pages:
        return

    def amount(count: int) -> str:
        tokens = f"{count} pages of {workload.page_tokens} tokens"
        return f"{tokens} ({_gib(count * page_bytes)})" if page_bytes else tokens

    length = workload.prompt_lengths[largest]
    raise ModelError(
        where="rollout memory",
        expected=f"a key-value cache of at least {amount(needed)}, since prompt {largest} has {length} tokens and its "
        f"completions may have {workload.max_new_tokens}",
        got=amount(pages),
        do="Raise the rollout's memory budget, or lower max_new_tokens or the longest prompt.",
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.2f} MiB"
