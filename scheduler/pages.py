"""The pool of KV pages: who holds which page number, by reference count.

A page is held once by each request that has it in its table and once by the prefix cache; it is
free when nobody holds it. Only numbers live here; the bytes are in the workers.
"""

from collections import Counter
from collections.abc import Iterable


class PagePool:
    """Free list and reference counts of pages 0..num_pages-1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low numbers first
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each held once. There must be that many."""
        assert 0 <= count <= len(self._free), f"{count} pages asked, {len(self._free)} free"
        split = len(self._free) - count
        pages = self._free[split:][::-1]
        del self._free[split:]
        for page in pages:
            self._holders[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of `pages`, which somebody holds already."""
        holders = self._holders
        for page in pages:
            assert holders[page] > 0, f"page {page} is free and cannot be shared"
            holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One holder less; a page without holders is free at once."""
        holders = self._holders
        for page in pages:
            left = holders[page] - 1
            assert left >= 0, f"page {page} freed twice"
            holders[page] = left
            if not left:
                self._free.append(page)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless `held` (each page as often as it has holders) and the free
        list account for every page exactly."""
        counts = Counter(held)
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        for page, holders in enumerate(self._holders):
            assert counts[page] == holders, (
                f"page {page}: {holders} holders counted, {counts[page]} found"
            )
            assert (page in free) == (holders == 0), f"page {page}: free list and holders disagree"
