"""Page numbers: the pool that counts who holds each, and the prefix cache, which holds some.

The prefix cache is a tree of full pages, keyed by (the bytes of) the tokens that they hold. A node
is one page, and its path from the root spells the whole token prefix. Each cache salt has a root of
its own. A node is *pending* while the request that owns it has not yet planned the step that fills
the page: other requests wait for it instead of computing it too. A request locks the path from the
root to its node. Unlocked leaves are evicted, least recently released first.
"""

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence


class PagePool:
    """Reference counts of pages 0..num_pages-1, and the list of free ones. Each request that has a
    page in its table holds it once, and the prefix cache holds it once. Only numbers are kept
    here; the bytes are in the workers."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low numbers first
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages without a holder."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` free pages, each held once from now on. There must be that many."""
        assert 0 <= count <= len(self._free), f"{count} pages asked, {len(self._free)} free"
        split = len(self._free) - count
        pages = self._free[split:][::-1]
        del self._free[split:]
        for page in pages:
            self._holders[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Add a holder to each of `pages`, which must have one already."""
        holders = self._holders
        for page in pages:
            assert holders[page] > 0, f"page {page} is free and cannot be shared"
            holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Remove a holder from each of `pages`. A page without holders is free at once."""
        holders = self._holders
        for page in pages:
            num_holders = holders[page] - 1
            assert num_holders >= 0, f"page {page} freed twice"
            holders[page] = num_holders
            if not num_holders:
                self._free.append(page)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless `held` (each page as often as it has holders) and the free
        list account for every page exactly."""
        counts = Counter(held)
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        for page, holders in enumerate(self._holders):
            assert counts[page] == holders, (
                f"page {page}: {holders} holders counted, {counts[page]} exist"
            )
            assert (page in free) == (holders == 0), f"page {page}: free list and holders disagree"


class Node:
    """One page of the tree (a root has page -1 and its salt as key)."""

    __slots__ = ("children", "key", "last_used", "locks", "page", "parent", "ready")

    def __init__(self, key: bytes | str, page: int, parent: "Node | None", ready: bool) -> None:
        self.key = key
        self.page = page
        self.parent = parent  # None: a root, or removed from the tree
        self.ready = ready  # the step that fills the page has been planned
        self.locks = 0  # requests whose path contains this node
        self.last_used = 0
        self.children: dict[bytes, Node] = {}

    @property
    def is_coming(self) -> bool:
        """Whether a running request is about to fill this page."""
        return not self.ready and self.parent is not None


class PrefixCache:
    """The tree. It holds each of its pages once in `pool`."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._roots: dict[str, Node] = {}
        self._clock = 0  # counts releases: the order for eviction
        self._pushes = 0
        self._leaves: list[tuple[int, int, Node]] = []  # heap; entries may be out of date
        self.num_nodes = 0
        self.num_evictable = 0  # unlocked nodes; always whole subtrees

    # --- finding -------------------------------------------------------------------------

    def page_key(self, tokens: "array[int]", index: int) -> bytes:
        """Key of page number `index` of the sequence `tokens`."""
        return tokens[index * self._page_size : (index + 1) * self._page_size].tobytes()

    def match(self, salt: str, tokens: "array[int]", num_pages: int) -> list[Node]:
        """Nodes of the longest stored prefix of `tokens`, at most `num_pages`. A pending node
        ends the list. Changes nothing."""
        node = self._roots.get(salt)
        nodes: list[Node] = []
        for index in range(num_pages):
            node = node and node.children.get(self.page_key(tokens, index))
            if node is None:
                break
            nodes.append(node)
            if not node.ready:
                break
        return nodes

    # --- locking a path ------------------------------------------------------------------

    def enter(self, salt: str, node: Node | None) -> Node:
        """Lock the path from the root to `node`, and return `node`. None: the salt's root."""
        if node is None:
            node = self._roots.get(salt)
            if node is None:
                node = self._roots[salt] = Node(salt, -1, None, ready=True)
        end = node
        while True:
            self._lock(node)
            if node.parent is None:
                return end
            node = node.parent

    def extend(self, node: Node, key: bytes, page: int, ready: bool) -> Node:
        """Lock the child `key` of the locked `node`, and return it. Without such a child, `page`
        becomes one. If the child is pending for another request and `page` is ready, the node
        gets this page; the other request keeps its own one."""
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = Node(key, page, node, ready)
            self._pool.hold((page,))
            self.num_nodes += 1
            self.num_evictable += 1  # _lock takes it back
        elif ready and not child.ready:
            self._pool.hold((page,))
            self._pool.drop((child.page,))
            child.page = page
            child.ready = True
        self._lock(child)
        return child

    def leave(self, node: Node, pending: Sequence[Node] = ()) -> None:
        """Unlock the path from the root to `node`. `pending` are the nodes at its end that the
        request had to fill, deepest first: those that are still pending are removed."""
        for unfilled in pending:
            if unfilled.ready:  # taken over by a request that had the page already
                break
            assert node is unfilled, "pending nodes are the end of the path"
            assert unfilled.parent is not None, "a pending node is in the tree"
            node = unfilled.parent
            unfilled.locks -= 1
            self._remove(unfilled, locked=True)
        self._clock += 1
        end: Node | None = node
        while end is not None:
            parent = end.parent
            self._unlock(end)
            end = parent

    def _lock(self, node: Node) -> None:
        if node.locks == 0 and node.page >= 0:
            self.num_evictable -= 1
        node.locks += 1

    def _unlock(self, node: Node) -> None:
        node.locks -= 1
        assert node.locks >= 0, "prefix-cache node unlocked twice"
        if node.locks == 0:
            if node.page >= 0:
                self.num_evictable += 1
                node.last_used = self._clock
            if not node.children:
                self._add_leaf(node)

    # --- removing ------------------------------------------------------------------------

    def evict(self, count: int) -> None:
        """Remove up to `count` unlocked nodes, so that their pages become free."""
        while count > 0 and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            stale = node.locks or node.children or node.parent is None
            if not stale and node.last_used == last_used:
                self._remove(node, locked=False)
                count -= 1

    def _add_leaf(self, node: Node) -> None:
        """`node` has neither children nor locks: it can be evicted."""
        if node.parent is None:
            assert isinstance(node.key, str), "only roots have no parent"
            self._roots.pop(node.key, None)
            return
        self._pushes += 1
        heapq.heappush(self._leaves, (node.last_used, self._pushes, node))
        if len(self._leaves) > 2 * self.num_nodes + 64:
            self._leaves = [entry for entry in self._leaves if self._is_current(entry)]
            heapq.heapify(self._leaves)

    @staticmethod
    def _is_current(entry: tuple[int, int, Node]) -> bool:
        last_used, _, node = entry
        return (
            node.last_used == last_used
            and node.parent is not None
            and not node.locks
            and not node.children
        )

    def _remove(self, node: Node, locked: bool) -> None:
        parent = node.parent
        assert parent is not None, "a root holds no page"
        assert not node.children, "only leaves are removed"
        assert not node.locks, "a locked node is in use"
        assert isinstance(node.key, bytes), "only roots have a salt as key"
        del parent.children[node.key]
        node.parent = None
        self.num_nodes -= 1
        self.num_evictable -= not locked
        self._pool.drop((node.page,))
        if not parent.children and not parent.locks:
            self._add_leaf(parent)

    # --- checking ------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """All nodes that hold a page, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.page >= 0:
                yield node

    def check_integrity(self, ends: Iterable[Node]) -> list[Node]:
        """All nodes. Raise AssertionError unless the tree is sound and its locks are exactly those
        of the paths that end at `ends`."""
        locks: dict[int, int] = {}
        for end in ends:
            step: Node | None = end
            while step is not None:
                locks[id(step)] = locks.get(id(step), 0) + 1
                step = step.parent
        nodes = list(self.nodes())
        current = {id(entry[2]) for entry in self._leaves if self._is_current(entry)}
        for root in self._roots.values():
            assert root.locks == locks.get(id(root), 0), "root: wrong number of locks"
            assert root.children or root.locks, "an empty root was kept"
        for node in nodes:
            parent = node.parent
            assert parent is not None, "a node in the tree has a parent"
            assert isinstance(node.key, bytes), "a node in the tree has tokens as key"
            assert parent.children[node.key] is node, "parent and child disagree"
            assert node.locks == locks.get(id(node), 0), f"page {node.page}: wrong number of locks"
            assert parent.ready or not node.ready, "a ready node below a pending one"
            assert node.ready or node.locks == 1, "a pending node belongs to one request"
            if not node.locks and not node.children:
                assert id(node) in current, f"page {node.page} can never be evicted"
        assert len(nodes) == self.num_nodes, "node count"
        assert sum(not node.locks for node in nodes) == self.num_evictable, "evictable count"
        assert len({node.page for node in nodes}) == len(nodes), "a page is in the tree twice"
        assert len(self._leaves) <= 2 * self.num_nodes + 64 + len(nodes), "leaf heap grows"
        return nodes
