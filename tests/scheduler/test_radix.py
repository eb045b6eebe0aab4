"""The prefix cache finds exactly the stored prefixes, keeps used ones and evicts the oldest."""

from array import array

import pytest
from glimmer.scheduler.radix import Node, PagePool, PrefixCache
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE = 2


class Tree:
    """A cache and a way to store sequences in it, as requests do."""

    def __init__(self, num_pages: int = 64) -> None:
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool, SIZE)
        self.standing: list[Node] = []

    def store(self, tokens: list[int], salt: str = "") -> Node:
        """Lock the path of `tokens`, adding missing nodes. Returns its end."""
        ids = array("i", tokens)
        node = self.cache.enter(salt, None)
        for index in range(len(tokens) // SIZE):
            self.cache.evict(1 - self.pool.num_free)
            (page,) = self.pool.take(1)
            node = self.cache.extend(node, self.cache.page_key(ids, index), page, ready=True)
            self.pool.drop([page])
        self.standing.append(node)
        return node

    def leave(self, node: Node) -> None:
        self.standing.remove(node)
        self.cache.leave(node)

    def num_stored(self, tokens: list[int], salt: str = "") -> int:
        """Tokens of the longest stored prefix."""
        ids = array("i", tokens)
        return SIZE * len(self.cache.match(salt, ids, len(tokens) // SIZE))

    def check(self) -> None:
        self.cache.check_integrity(self.standing)
        self.pool.check_integrity(node.page for node in self.cache.nodes())


sequences = st.lists(st.integers(0, 2), max_size=10)


@settings(max_examples=60)
@given(st.lists(st.tuples(sequences, st.sampled_from(["", "salt"])), max_size=12), sequences)
def test_the_longest_stored_prefix_is_found(
    stored: list[tuple[list[int], str]], wanted: list[int]
) -> None:
    tree = Tree()
    for tokens, salt in stored:
        tree.store(tokens, salt)
        tree.check()

    def shared(tokens: list[int]) -> int:
        same = 0
        while (
            same < len(tokens) // SIZE
            and tokens[: (same + 1) * SIZE] == wanted[: (same + 1) * SIZE]
        ):
            same += 1
        return same * SIZE

    for salt in ("", "salt"):
        best = max((shared(tokens) for tokens, s in stored if s == salt), default=0)
        assert tree.num_stored(wanted, salt) == best


@settings(max_examples=60)
@given(st.lists(st.tuples(sequences, st.booleans(), st.integers(0, 4)), max_size=30))
def test_integrity_holds_and_locked_paths_survive_any_eviction(
    actions: list[tuple[list[int], bool, int]],
) -> None:
    tree = Tree(num_pages=200)
    kept: list[list[int]] = []
    for tokens, keep, evict in actions:
        node = tree.store(tokens)
        if keep:
            kept.append(tokens)
        else:
            tree.leave(node)
        free = tree.pool.num_free
        evictable = tree.cache.num_evictable
        tree.cache.evict(evict)
        assert tree.pool.num_free == free + min(evict, evictable)
        tree.check()
        for path in kept:
            assert tree.num_stored(path) == len(path) // SIZE * SIZE


def test_the_least_recently_released_prefix_goes_first_tail_before_head() -> None:
    tree = Tree()
    old, new = [1, 1, 1, 2, 1, 3], [2, 1, 2, 2]
    a, b = tree.store(old), tree.store(new)
    tree.leave(a)
    tree.leave(b)
    tree.cache.evict(2)
    assert (tree.num_stored(old), tree.num_stored(new)) == (2, 4)
    tree.cache.evict(1)
    assert (tree.num_stored(old), tree.num_stored(new)) == (0, 4)


def test_using_a_prefix_again_makes_it_young() -> None:
    tree = Tree()
    first, second = [1, 1], [2, 2]
    for tokens in (first, second, first):
        tree.leave(tree.store(tokens))
    tree.cache.evict(1)
    assert (tree.num_stored(first), tree.num_stored(second)) == (2, 0)


def test_salts_are_forgotten_with_their_last_page() -> None:
    tree = Tree()
    for number in range(50):
        tree.leave(tree.store([1, 2], f"salt {number}"))
    tree.cache.evict(50)
    assert tree.cache.num_nodes == 0
    assert not tree.cache._roots


def test_the_eviction_order_does_not_grow_without_bound() -> None:
    tree = Tree()
    for _ in range(1000):
        tree.leave(tree.store([1, 2, 3, 4]))
    tree.check()
    assert len(tree.cache._leaves) < 100


def test_a_pending_page_is_found_as_such_and_removed_if_it_is_never_filled() -> None:
    tree = Tree()
    root = tree.cache.enter("", None)
    (page,) = tree.pool.take(1)
    node = tree.cache.extend(root, tree.cache.page_key(array("i", [1, 2]), 0), page, ready=False)
    tree.pool.drop([page])
    assert tree.cache.match("", array("i", [1, 2]), 1) == [node]
    assert node.is_coming
    tree.cache.leave(node, [node])
    assert not node.is_coming
    assert tree.num_stored([1, 2]) == 0
    tree.check()
    assert tree.pool.num_free == 64


def test_a_filled_page_takes_the_place_of_a_pending_one() -> None:
    tree = Tree()
    key = tree.cache.page_key(array("i", [1, 2]), 0)
    mine, other = tree.pool.take(2)
    owner = tree.cache.extend(tree.cache.enter("", None), key, mine, ready=False)
    taker = tree.cache.extend(tree.cache.enter("", None), key, other, ready=True)
    assert owner is taker
    assert (taker.page, taker.ready) == (other, True)
    tree.cache.leave(owner, [owner])  # its owner ends: the page stays
    tree.cache.leave(taker)
    tree.pool.drop([mine, other])
    assert tree.num_stored([1, 2]) == 2
    tree.check()


def test_leaving_twice_is_an_error() -> None:
    tree = Tree()
    node = tree.store([1, 2])
    tree.leave(node)
    with pytest.raises(AssertionError, match="unlocked twice"):
        tree.cache.leave(node)


@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "drop"]), st.integers(0, 5))))
def test_pages_are_conserved_under_any_use(actions: list[tuple[str, int]]) -> None:
    pool = PagePool(12)
    held: list[int] = []  # one entry per holder
    for action, count in actions:
        if action == "take" and count <= pool.num_free:
            pages = pool.take(count)
            assert not set(pages) & set(held), "a held page was handed out"
            held += pages
        elif action == "hold":
            pool.hold(held[:count])
            held += held[:count]
        elif action == "drop":
            pool.drop(held[:count])
            del held[:count]
        pool.check_integrity(held)
    assert pool.num_free == 12 - len(set(held))


def test_freeing_twice_is_an_error() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    pool.drop(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.drop(pages[:1])


def test_a_free_page_cannot_be_shared() -> None:
    with pytest.raises(AssertionError, match="cannot be shared"):
        PagePool(3).hold([1])


def test_more_than_there_is_cannot_be_taken() -> None:
    with pytest.raises(AssertionError, match="4 pages asked, 3 free"):
        PagePool(3).take(4)


def test_integrity_check_notices_a_lost_holder() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    with pytest.raises(AssertionError, match="holders counted"):
        pool.check_integrity(pages[:1])
