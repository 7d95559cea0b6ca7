"""PagePool and PageNames, and how each kind of group holds and shares pages."""

from __future__ import annotations

import pytest

from quire.core.pages import NULL_PAGE, PageNames, PagePool
from quire.core.plan import GroupSpec
from quire.core.request import Table
from quire.core.tables import EncoderPages, PositionPages, StatePage, make_group

NAMES = [bytes([number]) for number in range(20)]


def test_the_null_page_is_never_handed_out() -> None:
    pool = PagePool(5)
    assert pool.free == 4
    assert sorted(pool.take(4)) == [1, 2, 3, 4]
    assert pool.free == 0
    with pytest.raises(AssertionError):
        pool.take(1)


def test_nameless_pages_come_back_blank() -> None:
    pool = PagePool(4)
    pages = pool.take(3)
    pool.give_back(pages)
    assert pool.free == 3
    pool.check({})
    with pytest.raises(AssertionError, match="given back by nobody"):
        pool.give_back(pages[:1])


def test_a_named_page_is_shared_and_stays_known_until_it_is_needed() -> None:
    pool = PagePool(4)
    (page,) = pool.take(1)
    pool.name(page, b"a")
    assert pool.find(b"a") == page
    pool.share(page)
    pool.check({page: 2})
    pool.give_back([page])
    pool.check({page: 1})
    pool.give_back([page])
    assert pool.free == 3 and page in pool.kept_pages() and pool.find(b"a") == page
    pool.share(page)
    assert pool.free == 2
    pool.give_back([page])
    assert set(pool.take(3)) == {1, 2, 3}
    assert pool.find(b"a") == NULL_PAGE
    pool.check({1: 1, 2: 1, 3: 1})


def test_the_page_given_back_first_is_evicted_first_and_blank_ones_before_it() -> None:
    pool = PagePool(5)
    pages = pool.take(3)
    for page, name in zip(pages, NAMES, strict=False):
        pool.name(page, name)
    pool.give_back([pages[2], pages[0], pages[1]])
    pool.share(pages[2])
    pool.give_back([pages[2]])  # used again, so now the youngest
    assert pool.take(1) == [4]
    assert [pool.take(1)[0] for _ in range(3)] == [pages[0], pages[1], pages[2]]


def test_the_first_page_with_a_content_keeps_the_name() -> None:
    pool = PagePool(4)
    first, second = pool.take(2)
    pool.name(first, b"a")
    pool.name(second, b"a")
    assert pool.find(b"a") == first and pool.named == 1
    pool.give_back([second])
    assert second not in pool.kept_pages()
    pool.check({first: 1})


def test_forget_all() -> None:
    pool = PagePool(4)
    owned, free = pool.take(2)
    pool.name(owned, b"a")
    pool.name(free, b"b")
    pool.give_back([free])
    pool.forget_all()
    assert pool.find(b"a") == pool.find(b"b") == NULL_PAGE
    assert pool.free == 2
    pool.check({owned: 1})


def test_check_finds_wrong_owners() -> None:
    pool = PagePool(4)
    (page,) = pool.take(1)
    pool.check({page: 1})
    for wrong in ({}, {page: 2}, {page: 1, 3: 1}, {page: 1, 0: 1}):
        with pytest.raises(AssertionError):
            pool.check(wrong)


def test_names_stand_for_everything_before() -> None:
    names = PageNames()
    root = names.root(b"model")
    first = names.follow(root, [1, 2])
    assert len(first) == 16
    assert first == names.follow(names.root(b"model"), [1, 2])
    assert first != names.follow(root, [2, 1])
    assert first != names.follow(names.root(b"other"), [1, 2])
    assert names.follow(first, [3, 4]) != names.follow(root, [3, 4])
    assert names.follow(root, [1, 2**40]) != names.follow(root, [1, 0]), "large ids do not wrap"
    assert first != PageNames().follow(PageNames().root(b"model"), [1, 2]), "the key is another in each process"
    assert PageNames(b"k").root(b"x") == PageNames(b"k").root(b"x")


def known(group: PositionPages | StatePage, count: int) -> list[int]:
    """Fill the pool with `count` pages named NAMES[0], NAMES[1] ... and give them back."""
    pages = group.pool.take(count)
    for page, name in zip(pages, NAMES, strict=False):
        group.pool.name(page, name)
    group.pool.give_back(reversed(pages))
    return pages


def forget(group: PositionPages, index: int) -> None:
    """Evict one named page."""
    group.pool._kept.pop(group.pool.find(NAMES[index]))
    page = group.pool.find(NAMES[index])
    group.pool._forget(page)
    group.pool._blank.append(page)


def test_a_full_group_hits_up_to_the_first_unknown_page() -> None:
    group = PositionPages(GroupSpec("full", 4, 20), budget=100)
    pages = known(group, 5)
    assert group.hit(NAMES, 20) == 20
    assert group.hit(NAMES, 19) == 16
    assert group.hit(NAMES, 3) == 0
    forget(group, 3)
    assert group.hit(NAMES, 20) == 12
    table = Table()
    group.adopt(table, NAMES, 12)
    assert table.pages == pages[:3] and table.first == 0
    group.pool.check(dict.fromkeys(pages[:3], 1))


def test_a_window_group_needs_only_the_pages_that_the_window_covers() -> None:
    # At position 20 a window of 6 sees positions 15 to 20: pages 3 and 4.
    group = PositionPages(GroupSpec("window", 4, 20, window=6), budget=100)
    pages = known(group, 5)
    forget(group, 2)
    assert group.hit(NAMES, 20) == 20
    table = Table()
    group.adopt(table, NAMES, 20)
    assert table.pages == [0, 0, 0, pages[3], pages[4]] and table.first == 3
    group.pool.give_back(table.pages[3:])
    forget(group, 4)
    # Page 4 is gone: a hit ends at 16 at most, where it would need pages 2 and 3, so at 8.
    assert group.hit(NAMES, 20) == 8


@pytest.mark.parametrize(
    ("window", "start", "first"), [(1, 8, 2), (4, 8, 1), (5, 8, 1), (6, 8, 0), (8, 7, 0), (1, 7, 1)]
)
def test_a_window_gives_back_what_it_left(window: int, start: int, first: int) -> None:
    group = PositionPages(GroupSpec("window", 4, 20, window=window), budget=100)
    table = Table(pages=group.pool.take(3))
    held = list(table.pages)
    group.trim(table, start)
    assert table.first == first
    assert table.pages == [0] * first + held[first:]
    group.pool.check(dict.fromkeys(held[first:], 1))


def test_least_and_reach_of_a_window() -> None:
    group = PositionPages(GroupSpec("window", 4, 4, window=6), budget=100)
    assert group.least(100, 0, chunked=True) == 3  # positions 3 to 8, say: pages 0, 1 and 2
    assert group.least(7, 0, chunked=True) == 2
    assert group.least(100, 0, chunked=False) == 25
    assert group.reach(0) == 12
    assert group.reach(9) == 16  # page 0 has left the window
    assert group.reach(8) == 12


def test_a_state_group_hits_where_a_snapshot_is() -> None:
    group = StatePage(GroupSpec("state", 4, 6))
    (page,) = group.pool.take(1)
    group.pool.name(page, NAMES[2])
    group.pool.give_back([page])
    assert group.hit(NAMES, 20) == 12
    assert group.hit(NAMES, 11) == 0
    table = Table()
    group.adopt(table, NAMES, 12)
    assert table.snapshot == page and table.pages == []
    assert group.missing(table, 100, 0) == 1


def test_a_known_state_is_not_kept_twice_and_none_is_kept_without_room() -> None:
    group = StatePage(GroupSpec("state", 4, 3))
    table = Table(pages=group.pool.take(1))
    kept = group.keep(table, b"a")
    assert kept and table.snapshot == kept
    group.pool.name(kept, b"a")
    group.pool.give_back([kept])
    table.snapshot = 0
    assert group.keep(table, b"a") == NULL_PAGE
    group.pool.take(1)
    assert group.keep(table, b"b") == NULL_PAGE


def test_encoder_pages_are_taken_at_once() -> None:
    group = make_group(GroupSpec("cross", 4, 10), budget=100)
    assert isinstance(group, EncoderPages)
    table = Table()
    assert group.missing(table, 1, 9) == group.least(1, 9, True) == 3
    table.pages = group.pool.take(3)
    assert group.missing(table, 1000, 9) == 0
    assert group.hit([], 7) == 7
