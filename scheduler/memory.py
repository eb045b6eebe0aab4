"""Which KV pages each request holds: its page table, the page pool and the prefix cache.

A page is freed as soon as its last holder drops it, although a plan that was sent may still write
to it. This is safe because workers run plans strictly in order: the plan of the page's next owner
comes later and writes each position before it is read.

A page in the prefix cache never changes. It holds only tokens whose KV a sent plan writes, and no
later plan writes to these positions again. Drafts are written behind the known tokens. The extra
step of a request that has stopped writes its stop token, at that token's own position.
"""

import sys
from array import array
from collections.abc import Iterable

from .radix import Node, PagePool, PrefixCache


class PageTable:
    """The KV of one request: its pages in order, and its place in the prefix cache. `tokens` is
    the request's own array, which grows; `salt` is None if it does not use the cache."""

    def __init__(self, tokens: "array[int]", salt: str | None) -> None:
        self.tokens = tokens
        self.salt = salt
        self.waits_for: Node | None = None  # another request is about to fill this page
        self.clear()

    def clear(self) -> None:
        """Forget all pages: they were released, or they are gone with the workers."""
        self.pages: list[int] = []
        self.capacity = 0  # in tokens: len(pages) * page_size
        # Positions whose KV is written by the plans sent so far; with drafts in flight, the most
        # that it can be. Never above `capacity`: workers accept no draft that has no page.
        self.num_kv = 0
        self.num_shared = 0  # pages taken from the prefix cache at the start
        self.node: Node | None = None  # the deepest locked node of the prefix cache
        self.depth = 0  # of `node`: pages of this table that are in the prefix cache
        self.pending: list[Node] = []  # nodes that this request has yet to fill, deepest first
        self.publish_at = sys.maxsize  # number of tokens that completes the next page

    @property
    def waits_for_prefix(self) -> bool:
        """Whether a running request is about to fill a page that this one could use."""
        return self.waits_for is not None and self.waits_for.is_coming


class Memory:
    """All pages of the workers of one epoch."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool, page_size)

    @property
    def num_available(self) -> int:
        """Pages that can be taken now: free ones, and those that only the prefix cache holds."""
        return self.pool.num_free + self.cache.num_evictable

    def _take(self, count: int) -> list[int]:
        num_missing = count - self.pool.num_free
        if num_missing > 0:
            self.cache.evict(num_missing)
        return self.pool.take(count)

    # --- starting ------------------------------------------------------------------------

    def find(self, table: PageTable) -> tuple[list[Node], int]:
        """The cached prefix of a request that wants to start, and how many pages it would take
        from `num_available`. The last token is always computed, so it is never found. If the next
        page of the prefix is pending, `table.waits_for` is set to it."""
        num_tokens = len(table.tokens)
        num_needed = -(-num_tokens // self.page_size)
        table.waits_for = None
        if table.salt is None:
            return [], num_needed
        nodes = self.cache.match(table.salt, table.tokens, num_tokens // self.page_size)
        if nodes and not nodes[-1].ready:
            table.waits_for = nodes[-1]
        del nodes[(num_tokens - 1) // self.page_size :]
        num_locked = sum(node.locks > 0 for node in nodes)
        return nodes, num_needed - num_locked

    def start(self, table: PageTable, nodes: list[Node]) -> None:
        """Give a request pages for all its known tokens. The first are those of `nodes`, which
        `find` has just returned; enough pages must be available for the rest."""
        size = self.page_size
        shared = [node.page for node in nodes]
        if table.salt is not None:
            table.node = self.cache.enter(table.salt, nodes[-1] if nodes else None)
        self.pool.hold(shared)
        table.pages = shared + self._take(-(-len(table.tokens) // size) - len(shared))
        table.capacity = len(table.pages) * size
        table.num_shared = table.depth = len(shared)
        table.num_kv = len(shared) * size
        if table.node is not None:
            for index in range(len(shared), len(table.tokens) // size):
                node = self._extend(table, index, ready=False)
                if not node.ready:
                    table.pending.append(node)
            table.pending.reverse()
            table.publish_at = (table.depth + 1) * size

    # --- while running -------------------------------------------------------------------

    def append_page(self, table: PageTable) -> int:
        """Add a page, of which one must be available, at the end of the table."""
        (page,) = self._take(1)
        table.pages.append(page)
        table.capacity += self.page_size
        return page

    def publish_prefilled(self, table: PageTable) -> None:
        """A plan with a prompt chunk is made. Pages that it completes can be used by others in
        *later* plans: a step reads all KV before it writes any."""
        pending = table.pending
        while pending and (table.depth - len(pending) + 1) * self.page_size <= table.num_kv:
            pending.pop().ready = True

    def publish(self, table: PageTable) -> None:
        """Put pages that outputs have filled into the cache: KV planned and values known."""
        if table.node is None:
            return
        num_full = min(table.num_kv, len(table.tokens)) // self.page_size
        while table.depth < num_full:
            self._extend(table, table.depth, ready=True)
        table.publish_at = (table.depth + 1) * self.page_size

    def _extend(self, table: PageTable, index: int, ready: bool) -> Node:
        assert table.node is not None, "only requests that use the cache have a node"
        key = self.cache.page_key(table.tokens, index)
        table.node = self.cache.extend(table.node, key, table.pages[index], ready)
        table.depth += 1
        return table.node

    def release(self, table: PageTable) -> None:
        """Take all pages from a request; full ones stay in the prefix cache."""
        if table.node is not None:
            self.publish(table)
            self.cache.leave(table.node, table.pending)
        self.pool.drop(table.pages)
        table.clear()

    def flush(self) -> None:
        """Free the pages that only the prefix cache holds."""
        self.cache.evict(self.cache.num_evictable)

    # --- checking ------------------------------------------------------------------------

    def check_integrity(self, tables: Iterable[PageTable]) -> None:
        """Raise AssertionError unless pages, locks and counts are exactly those of the cache and
        of `tables`, which are all that have pages."""
        tables = list(tables)
        nodes = self.cache.check_integrity(t.node for t in tables if t.node is not None)
        held = [page for table in tables for page in table.pages]
        held += [node.page for node in nodes]
        self.pool.check_integrity(held)
        for table in tables:
            assert table.capacity == len(table.pages) * self.page_size, "capacity of a page table"
            assert table.num_kv <= table.capacity, "KV written beyond the page table"
