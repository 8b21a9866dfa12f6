"""Who holds which page of the key-value cache: reference counts on the host, no tensors.

Invariants:

* a page is free exactly when nobody holds it;
* `allocate` hands out the lowest free numbers, in ascending order, so the same calls give the same pages;
* holding and releasing take whole lists, and a list with a page that is not held changes nothing.

A mistake here would let two sequences write into one page, which shows as slightly wrong text and never as a crash. So
every call checks what it is told and raises `ValueError`: such mistakes are the engine's, and no user could mend them.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping


class PagePool:
    """The pages 0 … pages - 1 and how many holders each has.

    Args:
        pages: how many there are.
    """

    def __init__(self, pages: int) -> None:
        if pages < 0:
            raise ValueError(f"PagePool: expected pages >= 0, got {pages}")
        self.pages = pages
        self._free = list(range(pages))  # a heap; ascending numbers are one already
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, the lowest numbers first; each has one holder then."""
        if not 0 <= count <= self.free:
            raise ValueError(f"PagePool.allocate: expected 0 to {self.free} pages (those free), got {count}")
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add one holder to each page, all of which must be held."""
        counts = Counter(pages)
        self._require(dict.fromkeys(counts, 1), "share")
        for page, times in counts.items():
            self._holders[page] += times

    def release(self, pages: Iterable[int]) -> None:
        """Take one holder from each page; a page without holders is free again."""
        counts = Counter(pages)
        self._require(counts, "release")
        for page, times in counts.items():
            self._holders[page] -= times
            if not self._holders[page]:
                heapq.heappush(self._free, page)

    def holders(self, page: int) -> int:
        """How many hold the page; none if there is no such page."""
        return self._holders[page] if 0 <= page < self.pages else 0

    def _require(self, least: Mapping[int, int], verb: str) -> None:
        for page, needed in least.items():
            if self.holders(page) < needed:
                raise ValueError(
                    f"PagePool.{verb}: expected page {page} to have {needed} or more holders, got {self.holders(page)}"
                )
