"""Page numbers are never lost, doubled or handed out while somebody holds them."""

import pytest
from glimmer.scheduler.pages import PagePool
from hypothesis import given
from hypothesis import strategies as st


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
