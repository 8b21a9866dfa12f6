"""Reference counts of pages: literal cases, and against a dictionary that counts naively."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qerl_compile.rl.rollout.pages import PagePool


def test_the_lowest_free_pages_are_handed_out_in_order():
    pool = PagePool(6)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.release([2, 0])
    assert pool.allocate(0) == []
    assert pool.allocate(3) == [0, 2, 4]
    assert pool.free == 1


def test_a_page_is_free_when_its_last_holder_releases_it():
    pool = PagePool(2)
    pages = pool.allocate(2)
    pool.share(pages)
    pool.share([1])
    pool.release([0, 1])
    assert (pool.free, pool.holders(0), pool.holders(1)) == (0, 1, 2)
    pool.release([0, 1, 1])
    assert (pool.free, pool.holders(0), pool.holders(1)) == (2, 0, 0)


@pytest.mark.parametrize("count", [-1, 3])
def test_more_pages_than_are_free_are_refused_and_none_is_taken(count):
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(ValueError, match=f"PagePool.allocate: expected 0 to 2 pages .those free., got {count}"):
        pool.allocate(count)
    assert pool.allocate(2) == [1, 2]


@pytest.mark.parametrize(
    "pages, page, needed, got", [([0, 2], 2, 1, 0), ([0, 0], 0, 2, 1), ([0, 3], 3, 1, 0), ([0, -1], -1, 1, 0)]
)
def test_releasing_what_is_not_held_is_refused_and_changes_nothing(pages, page, needed, got):
    pool = PagePool(3)
    pool.allocate(2)
    with pytest.raises(ValueError, match=f"release: expected page {page} to have {needed} or more holders, got {got}"):
        pool.release(pages)
    assert [pool.holders(page) for page in range(3)] == [1, 1, 0]
    assert pool.allocate(1) == [2]


@pytest.mark.parametrize("page", [2, 3, -1])
def test_sharing_what_is_not_held_is_refused_and_changes_nothing(page):
    pool = PagePool(3)
    pool.allocate(2)
    with pytest.raises(ValueError, match=f"share: expected page {page} to have 1 or more holders, got 0"):
        pool.share([0, page])
    assert pool.holders(0) == 1


def test_a_pool_has_no_negative_size():
    with pytest.raises(ValueError, match="expected pages >= 0, got -1"):
        PagePool(-1)


class CountsAgree(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool, self.counts = PagePool(12), dict.fromkeys(range(12), 0)

    def held(self):
        return [page for page, holders in self.counts.items() if holders]

    def free(self):
        return [page for page, holders in self.counts.items() if not holders]

    @rule(data=st.data())
    def allocate(self, data):
        count = data.draw(st.integers(0, len(self.free())))
        want = self.free()[:count]
        assert self.pool.allocate(count) == want
        self.counts.update(dict.fromkeys(want, 1))

    @precondition(held)
    @rule(data=st.data())
    def share(self, data):
        pages = data.draw(st.lists(st.sampled_from(self.held())))
        self.pool.share(pages)
        for page in pages:
            self.counts[page] += 1

    @precondition(held)
    @rule(data=st.data())
    def release(self, data):
        everything = [page for page, holders in self.counts.items() for _ in range(holders)]
        chosen = data.draw(st.sets(st.sampled_from(range(len(everything)))))
        self.pool.release(everything[index] for index in chosen)
        for index in chosen:
            self.counts[everything[index]] -= 1

    @invariant()
    def the_same(self):
        assert [self.pool.holders(page) for page in range(12)] == list(self.counts.values())
        assert self.pool.free == len(self.free())


TestCountsAgree = CountsAgree.TestCase
