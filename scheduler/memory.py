"""Which KV pages each request holds: the page pool and the prefix cache, used together.

One object per worker epoch. Why freeing at once is safe: workers run plans strictly in order, so
when a page is freed while a sent plan still writes to it, its next owner's plan comes later and
writes every position before reading it. Pages in the prefix cache hold only tokens whose KV a sent
plan writes, and no plan ever writes below a request's length, so they never change. (The extra
step of a request that turned out to have stopped writes its stop token, behind the cached part or
completing it correctly. Drafts are written behind the tokens known when the step runs, too.)
"""

import sys
from collections.abc import Callable

from ..shared.messages import RowAdmit
from .pages import PagePool
from .radix import Node, PrefixCache
from .request import Request


class Memory:
    """All pages of the workers of one epoch."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool, page_size)

    @property
    def num_pages(self) -> int:
        """All pages."""
        return self.pool.num_pages

    @property
    def num_available(self) -> int:
        """Pages that can be taken now: free, or in the prefix cache alone."""
        return self.pool.num_free + self.cache.num_evictable

    def _take(self, count: int) -> list[int]:
        self.cache.evict(count - self.pool.num_free)
        return self.pool.take(count)

    # --- admission -----------------------------------------------------------------------

    def find(self, request: Request) -> tuple[list[Node], int]:
        """The cached prefix of a request that wants to start: its nodes and their number, and how
        many pages it takes from `num_available` to start. The last token is always computed, so
        at most `len(tokens) - 1` tokens are found. If a page that the request will have in full
        is pending, `request.waits_for` is set to it."""
        num_tokens = len(request.tokens)
        num_needed = -(-num_tokens // self.page_size)
        request.waits_for = None
        if not request.uses_cache:
            return [], num_needed
        nodes = self.cache.match(request.cache_salt, request.tokens, num_tokens // self.page_size)
        if nodes and not nodes[-1].ready:
            request.waits_for = nodes[-1]
        del nodes[(num_tokens - 1) // self.page_size :]
        num_locked = sum(node.locks > 0 for node in nodes)
        return nodes, num_needed - num_locked

    def start(self, request: Request, nodes: list[Node]) -> None:
        """Give the request pages for all its known tokens, the first ones from `nodes` (as found
        by `find` just now, with enough pages available)."""
        size = self.page_size
        shared = [node.page for node in nodes]
        if request.uses_cache:
            request.node = self.cache.enter(request.cache_salt, nodes[-1] if nodes else None)
        self.pool.hold(shared)
        request.pages = shared + self._take(-(-len(request.tokens) // size) - len(shared))
        request.kv_capacity = len(request.pages) * size
        request.num_shared_pages = request.num_tree_pages = len(shared)
        request.num_kv = len(shared) * size
        if request.node is not None:
            for index in range(len(shared), len(request.tokens) // size):
                node = self._extend(request, index, ready=False)
                if not node.ready:
                    request.pending.append(node)
            request.pending.reverse()
            request.publish_at = (request.num_tree_pages + 1) * size

    def row_admit(self, request: Request) -> RowAdmit:
        """The message part that gives a just started request its row."""
        return RowAdmit(
            row=request.row,
            sampling=request.sampling,
            pages=list(request.pages),
            num_cached_tokens=request.num_kv,
            num_output_tokens=request.num_output_tokens,
            counted_ids=request.counted_ids(),
            grammar=request.grammar,
            matched_ids=request.matched_ids(),
        )

    # --- while running -------------------------------------------------------------------

    def make_room(
        self, request: Request, num_kv: int, reclaim: Callable[[Request], bool]
    ) -> list[int] | None:
        """Append pages to the request's table until `num_kv` tokens fit, but none behind the last
        token that is ever run, and none taken from others for drafts: those that find no page are
        not accepted. -> the pages; None if the request had to give way (see `add_decodes`)."""
        num_kv = min(num_kv, request.max_total_tokens - 1)
        pages: list[int] = []
        while request.kv_capacity < num_kv:
            if not self.num_available:
                if request.kv_capacity > request.num_kv:
                    break
                if not reclaim(request):
                    return None
            pages += self._take(1)
            request.pages.append(pages[-1])
            request.kv_capacity += self.page_size
        return pages

    def publish_planned(self, request: Request) -> None:
        """A plan with prompt chunks of the request is made: its full pages can be used by others
        in *later* plans (not in the same one, which reads before it has written)."""
        size, pending = self.page_size, request.pending
        while pending and (request.num_tree_pages - len(pending) + 1) * size <= request.num_kv:
            pending.pop().ready = True

    def publish(self, request: Request) -> None:
        """Put pages that outputs have filled into the cache: KV planned and values known."""
        if request.node is None:
            return
        size = self.page_size
        num_full = min(request.num_kv, len(request.tokens)) // size
        while request.num_tree_pages < num_full:
            self._extend(request, request.num_tree_pages, ready=True)
        request.publish_at = (request.num_tree_pages + 1) * size

    def _extend(self, request: Request, index: int, ready: bool) -> Node:
        assert request.node is not None, "only requests that use the cache stand on a node"
        key = self.cache.page_key(request.tokens, index)
        request.node = self.cache.extend(request.node, key, request.pages[index], ready)
        request.num_tree_pages += 1
        return request.node

    def release(self, request: Request) -> None:
        """Take all pages from the request; full ones stay in the prefix cache."""
        if request.node is not None:
            self.publish(request)
            self.cache.leave(request.node, request.pending)
        self.pool.drop(request.pages)
        forget(request)

    # --- checking ------------------------------------------------------------------------

    def check_integrity(self, holders: list[Request]) -> None:
        """Raise AssertionError unless pages, locks and counts are exactly those of `holders`
        (all requests that have pages) and the cache."""
        held = [page for request in holders for page in request.pages]
        held += [node.page for node in self.cache.nodes()]
        self.pool.check_integrity(held)
        self.cache.check_integrity([r.node for r in holders if r.node is not None])
        for request in holders:
            assert request.kv_capacity == len(request.pages) * self.page_size, "page table size"
            assert request.num_kv <= request.kv_capacity, "KV written beyond the page table"


def forget(request: Request) -> None:
    """The request has no pages any more (released, or gone with the workers)."""
    request.pages = []
    request.kv_capacity = request.num_shared_pages = request.num_tree_pages = request.num_kv = 0
    request.node = None
    request.pending = []
    request.publish_at = sys.maxsize
