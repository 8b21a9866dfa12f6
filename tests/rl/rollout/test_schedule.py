"""The queue, the rows and the pages: by hand, and in simulated rollouts whose pages hold what was written to them."""

from dataclasses import dataclass
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import ModelError
from qerl_compile.rl.rollout.memory import Workload
from qerl_compile.rl.rollout.pages import PagePool
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


def test_a_group_shares_full_pages_copies_the_partial_one_and_the_last_sample_takes_it_over():
    work = Workload((6,), group_size=3, max_new_tokens=5, page_tokens=4)  # |0 1 2 3|4 5 . .|. . .|
    schedule = Schedule(work, PagePool(9), rows=8)
    admission = schedule.admit()
    assert admission == Admission(
        (Prefill(0, (0, 1)),),
        (
            Start(Request(0, 0), 0, (0, 2, 3), copy=(1, 2)),
            Start(Request(0, 1), 1, (0, 4, 5), copy=(1, 4)),
            Start(Request(0, 2), 2, (0, 1, 6), copy=None),
        ),
    )
    assert admission.copies == ((1, 2), (1, 4))


def test_a_prompt_of_whole_pages_needs_no_copy():
    schedule = Schedule(Workload((8,), group_size=2, max_new_tokens=4, page_tokens=4), PagePool(9), rows=8)
    assert schedule.admit() == Admission(
        (Prefill(0, (0, 1)),),
        (Start(Request(0, 0), 0, (0, 1, 2), None), Start(Request(0, 1), 1, (0, 1, 3), None)),
    )


def test_a_group_of_one_works_on_its_prompts_pages():
    schedule = Schedule(Workload((6, 3), group_size=1, max_new_tokens=3, page_tokens=4), PagePool(9), rows=8)
    assert schedule.admit() == Admission(
        (Prefill(0, (0, 1)), Prefill(1, (3,))),
        (Start(Request(0, 0), 0, (0, 1, 2), None), Start(Request(1, 0), 1, (3, 4), None)),
    )


def test_samples_wait_for_rows_and_their_prompt_is_prefilled_once():
    pool = PagePool(9)
    schedule = Schedule(Workload((6, 2), group_size=2, max_new_tokens=2, page_tokens=4), pool, rows=1)
    first = schedule.admit()
    assert first.prefills == (Prefill(0, (0, 1)),)
    assert first.starts == (Start(Request(0, 0), 0, (0, 2), (1, 2)),)
    assert (schedule.waiting, schedule.admit()) == (3, Admission((), ()))
    assert schedule.finish(0) == Request(0, 0)
    assert pool.free == 7  # the prompt's pages are kept for the sample that waits
    assert schedule.admit() == Admission((), (Start(Request(0, 1), 0, (0, 1), None),))
    schedule.finish(0)
    assert pool.free == 9
    assert schedule.admit() == Admission((Prefill(1, (0,)),), (Start(Request(1, 0), 0, (1,), (0, 1)),))
    schedule.finish(0)
    assert schedule.admit().starts == (Start(Request(1, 1), 0, (0,), None),)
    assert not schedule.done()
    schedule.finish(0)
    assert schedule.done()
    assert pool.free == 9


def test_a_long_request_at_the_front_is_not_overtaken():
    schedule = Schedule(Workload((4, 16, 4), group_size=1, max_new_tokens=4, page_tokens=4), PagePool(6), rows=8)
    assert [start.request.prompt for start in schedule.admit().starts] == [0]  # the long one needs 5 of the 4 left
    schedule.finish(0)
    assert [start.request.prompt for start in schedule.admit().starts] == [1]
    schedule.finish(0)
    assert [start.request.prompt for start in schedule.admit().starts] == [2]


def test_a_request_that_can_never_fit_is_refused_before_any_work():
    work = Workload((4, 16), group_size=2, max_new_tokens=4, page_tokens=4)
    Schedule(work, PagePool(5), rows=1)
    with pytest.raises(ModelError, match=r"at least 5 pages of 4 tokens, since prompt 1 has 16 tokens .* got 4 pages"):
        Schedule(work, PagePool(4), rows=1)
    pool = PagePool(5)
    pool.allocate(1)  # pages that somebody else holds do not count
    with pytest.raises(ModelError, match="got 4 pages"):
        Schedule(work, pool, rows=1)


def test_no_prompts_are_done_at_once_and_no_rows_are_a_mistake():
    schedule = Schedule(Workload((), 4, 5, 16), PagePool(0), rows=3)
    assert schedule.done()
    assert schedule.admit() == Admission((), ())
    with pytest.raises(ValueError, match="Schedule: expected rows >= 1, got 0"):
        Schedule(Workload((), 4, 5, 16), PagePool(0), rows=0)


def test_a_moved_row_keeps_its_pages_and_frees_its_place():
    pool = PagePool(9)
    schedule = Schedule(Workload((4, 4, 4), group_size=1, max_new_tokens=4, page_tokens=4), pool, rows=2)
    schedule.admit()
    schedule.finish(0)
    schedule.move(1, 0)
    assert schedule.running == {0: Request(1, 0)}
    assert [start.row for start in schedule.admit().starts] == [1]
    with pytest.raises(KeyError):
        schedule.move(1, 0)  # busy
    assert schedule.finish(0) == Request(1, 0)
    assert schedule.finish(1) == Request(2, 0)
    assert pool.free == 9
    with pytest.raises(KeyError):
        schedule.finish(1)


@dataclass
class Simulation:
    """An engine whose pages hold, at each position, what was written there, and that ends samples at random."""

    work: Workload
    pages: int
    rows: int
    seed: int

    def __post_init__(self):
        self.pool = PagePool(self.pages)
        self.schedule = Schedule(self.work, self.pool, self.rows)
        self.random = Random(self.seed)  # noqa: S311
        self.contents = [[None] * self.work.page_tokens for _ in range(self.pages)]
        self.starts, self.written = {}, {}  # by row: what runs there, how many new tokens it has written
        self.started, self.finished, self.prefilled, self.peak = [], [], [], 0

    def write(self, pages, position, token):
        self.contents[pages[position // self.work.page_tokens]][position % self.work.page_tokens] = token

    def read(self, pages, length):
        tokens = [token for page in pages for token in self.contents[page]]
        return tokens[:length]

    def admit(self):
        admission = self.schedule.admit()
        for prefill in admission.prefills:
            self.prefilled.append(prefill.prompt)
            for position in range(self.work.prompt_lengths[prefill.prompt]):
                self.write(prefill.pages, position, (prefill.prompt, position))
        sources, targets = zip(*admission.copies, strict=True) if admission.copies else ((), ())
        assert len(set(targets)) == len(targets)
        assert not set(sources) & set(targets)
        for source, target in self.random.sample(admission.copies, len(admission.copies)):  # their order is free
            self.contents[target] = list(self.contents[source])
        for start in admission.starts:
            assert start.row not in self.starts
            self.starts[start.row], self.written[start.row] = start, 0
            self.started.append(start.request)
        self.peak = max(self.peak, self.pages - self.pool.free)

    def decode(self, row):
        """Write one token, then check that the row still reads all that is its own."""
        start = self.starts[row]
        prompt, length = start.request.prompt, self.work.prompt_lengths[start.request.prompt]
        self.write(start.pages, length + self.written[row], (start.request, self.written[row]))
        self.written[row] += 1
        want = [(prompt, position) for position in range(length)]
        want += [(start.request, column) for column in range(self.written[row])]
        assert self.read(start.pages, len(want)) == want

    def finish(self, row):
        self.finished.append(self.schedule.finish(row))
        assert self.finished[-1] == self.starts.pop(row).request
        del self.written[row]

    def check(self):
        assert self.schedule.running == {row: self.starts[row].request for row in sorted(self.starts)}
        assert len(self.starts) <= self.rows
        assert all(row < self.rows for row in self.starts)
        assert self.pool.free <= self.pages
        holders = {}
        for start in self.starts.values():
            assert len(set(start.pages)) == len(start.pages)
            for index, page in enumerate(start.pages):
                holders.setdefault(page, []).append((start.request.prompt, index))
        for owners in holders.values():
            prompt, index = owners[0]
            assert len(owners) == 1 or (set(owners) == {owners[0]} and index < self.work.full_pages(prompt))

    def compact(self):
        size, moves = compact(list(self.starts), buckets(self.rows))
        assert size >= len(self.starts)
        for source, target in self.random.sample(moves, len(moves)):  # their order is free
            self.schedule.move(source, target)
            self.starts[target], self.written[target] = self.starts.pop(source), self.written.pop(source)
        assert all(row < size for row in self.starts)

    def run(self):
        while not self.schedule.done():
            self.admit()
            self.check()
            assert self.starts, "nothing runs and nothing was started"
            if self.random.random() < 0.3:
                self.compact()
                self.check()
            for row in sorted(self.starts):
                if self.written[row] == self.work.max_new_tokens or self.random.random() < 0.2:
                    self.finish(row)
                else:
                    self.decode(row)
        return self


workloads = st.builds(
    Workload,
    st.lists(st.integers(1, 12), max_size=6).map(tuple),
    group_size=st.integers(1, 4),
    max_new_tokens=st.integers(1, 9),
    page_tokens=st.integers(1, 5),
)


def least_pages(work):
    return max(map(work.least_pages, range(len(work.prompt_lengths))), default=0)


@given(workloads, st.integers(0, 20), st.integers(1, 7), st.integers(0, 2**32))
def test_every_sample_runs_once_on_pages_that_nobody_else_writes_and_all_pages_come_back(work, spare, rows, seed):
    simulation = Simulation(work, least_pages(work) + spare, rows, seed).run()
    everything = [Request(p, s) for p in range(len(work.prompt_lengths)) for s in range(work.group_size)]
    assert simulation.started == everything  # once each, in the order of the queue
    assert sorted(simulation.finished) == everything
    assert simulation.prefilled == list(range(len(work.prompt_lengths)))
    assert simulation.pool.free == simulation.pages
    assert simulation.peak <= work.most_pages(rows)


@given(workloads, st.integers(1, 7), st.integers(0, 2**32))
def test_with_the_most_pages_a_sample_waits_for_rows_only(work, rows, seed):
    simulation = Simulation(work, max(work.most_pages(rows), least_pages(work)), rows, seed)
    assert simulation.pages == work.most_pages(rows)  # it is never less than the least
    admit = simulation.schedule.admit

    def checked():
        admission = admit()
        assert not simulation.schedule.waiting or len(simulation.schedule.running) == rows
        return admission

    simulation.schedule.admit = checked
    simulation.run()


@given(workloads, st.integers(0, 20), st.integers(2, 7), st.integers(0, 2**32))
def test_the_order_in_which_rows_finish_does_not_show_in_what_starts_next(work, spare, rows, seed):
    chance = Random(seed)  # noqa: S311
    pages = least_pages(work) + spare
    one, other = (Schedule(work, PagePool(pages), rows) for _ in range(2))
    while not one.done():
        assert one.admit() == other.admit()
        ended = [row for row in one.running if chance.random() < 0.4]
        for row in ended:
            one.finish(row)
        for row in chance.sample(ended, len(ended)):
            other.finish(row)
    assert other.done()


def test_the_soak_of_two_thousand_requests_leaves_no_page_behind():
    chance = Random(7)  # noqa: S311
    work = Workload(tuple(chance.randint(1, 200) for _ in range(250)), group_size=8, max_new_tokens=64, page_tokens=16)
    simulation = Simulation(work, pages=120, rows=32, seed=1).run()
    assert len(set(simulation.finished)) == len(simulation.finished) == 2000
    assert simulation.pool.free == 120


@pytest.mark.parametrize(
    "max_rows, sizes",
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (5, (1, 2, 5)),
        (64, (1, 2, 4, 8, 16, 32, 64)),
        (100, (1, 2, 4, 8, 16, 32, 64, 100)),
        (256, (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)),
        (300, (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 300)),
    ],
)
def test_decode_steps_are_captured_for_few_sizes_close_together_where_rows_cost_time(max_rows, sizes):
    assert buckets(max_rows) == sizes


@given(st.integers(1, 2000))
def test_no_batch_is_padded_to_more_than_twice_its_rows_or_above_64_by_half(max_rows):
    sizes = buckets(max_rows)
    assert sizes[-1] == max_rows
    for smaller, size in pairwise(sizes):
        assert smaller < size
        assert size < 8 / 3 * smaller if size == max_rows else size <= (2 if smaller < 64 else 1.5) * smaller


@pytest.mark.parametrize(
    "running, size, moves",
    [
        ([0, 1, 2], 4, []),
        ([0, 1, 2, 3], 4, []),
        ([0, 1, 2, 7], 4, [(7, 3)]),
        ([7, 5, 0], 4, [(5, 1), (7, 2)]),
        ([6], 1, [(6, 0)]),
        ([], 1, []),
        ([0, 2, 4, 6, 7], 8, []),
    ],
)
def test_rows_beyond_the_smaller_size_move_into_the_holes_below_it(running, size, moves):
    assert compact(running, (1, 2, 4, 8)) == (size, moves)


@pytest.mark.parametrize(
    "lengths, max_tokens, batches",
    [
        ([], 10, []),
        ([3, 5, 3, 2], 10, [[1, 0], [2, 3]]),
        ([5, 5, 5], 10, [[0, 1], [2]]),
        ([20, 4, 4], 10, [[0], [1, 2]]),  # longer than a batch may be: alone
        ([1, 2, 3], 100, [[2, 1, 0]]),
    ],
)
def test_prompts_of_similar_length_are_prefilled_together(lengths, max_tokens, batches):
    assert prefill_batches(lengths, max_tokens) == batches


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_each_prompt_is_in_one_batch_and_no_batch_of_several_is_too_large(lengths, max_tokens):
    batches = prefill_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
