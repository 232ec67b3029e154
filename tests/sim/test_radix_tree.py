"""The radix tree against a set of prefixes, and its orders of eviction."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import IntegrityError
from sim.prefixes.eviction import eviction, fifo
from sim.prefixes.radix_tree import RadixTree


class Cache:
    """A tree with a list of free pages, as a server has them."""

    def __init__(self, **fields) -> None:
        self.tree = RadixTree(**fields)
        self.next_page = 0

    def add(self, text: str, priority: int = 0):
        pages = list(range(self.next_page, self.next_page + len(text)))
        self.next_page += len(text)
        known, node = self.tree.insert(text, pages, priority)
        self.tree.check_integrity()
        return known, node

    def cached(self) -> set[str]:
        """Every prefix that is there, read from the nodes."""
        found = set()
        stack = [("", node) for node in self.tree.root.children.values()]
        while stack:
            before, node = stack.pop()
            text = before + "".join(node.content)
            found |= {text[:end] for end in range(len(before) + 1, len(text) + 1)}
            stack += [(text, child) for child in node.children.values()]
        return found


texts = st.text("ab", min_size=1, max_size=8)


@settings(max_examples=200)
@given(
    order=st.sampled_from(["lru", "lfu", "fifo", "filo", "mru", "priority"]),
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "match", "lock", "unlock", "evict"]), texts), max_size=40
    ),
)
def test_the_tree_is_a_set_of_prefixes(order, steps):
    cache = Cache(eviction=eviction[order])
    tree = cache.tree
    prefixes: set[str] = set()
    locked: list[tuple[str, object]] = []
    where: dict[str, int] = {}
    for what, text in steps:
        known = max((end for end in range(len(text) + 1) if text[:end] in prefixes), default=0)
        if what == "add":
            first = cache.next_page
            assert cache.add(text)[0] == known
            prefixes |= {text[:end] for end in range(1, len(text) + 1)}
            for end in range(known + 1, len(text) + 1):
                where[text[:end]] = first + end - 1
        elif what in ("match", "lock"):
            held = {mine[:end] for mine, _ in locked for end in range(len(mine) + 1)}
            unlocked = sum(text[:end] not in held for end in range(1, known + 1))
            assert tree.peek(text) == (known, unlocked)
            pages, node = tree.match(text)
            assert pages == [where[text[:end]] for end in range(1, known + 1)]
            if what == "lock":
                tree.lock(node)
                locked.append((text[:known], node))
        elif what == "unlock" and locked:
            tree.unlock(locked.pop(0)[1])
        elif what == "evict":
            count = min(len(text), tree.evictable)
            freed = tree.evict(count)
            assert len(freed) >= count
            gone = prefixes - cache.cached()
            assert sorted(freed) == sorted(where[prefix] for prefix in gone)
            prefixes -= gone
        tree.check_integrity()
        assert cache.cached() == prefixes
        held = {text[:end] for text, _ in locked for end in range(1, len(text) + 1)}
        assert held <= prefixes, "what is locked stays"
        assert tree.evictable + tree.protected == len(prefixes)
        if not locked:
            assert tree.protected == 0
    with pytest.raises(ValueError, match="asked to evict"):
        tree.evict(tree.evictable + 1)


def story(order: str) -> list[str]:
    """Four leaves of different lives; who goes first, second, ..."""
    cache = Cache(eviction=eviction[order])
    tree = cache.tree
    for name, priority in (("a", 2), ("b", 1), ("c", 1), ("d", 3)):
        cache.add(name, priority)
    for name in "abacbad":
        tree.match(name)
    gone = []
    while tree.evictable:
        before = cache.cached()
        tree.evict(1)
        gone += before - cache.cached()
    return gone


@pytest.mark.parametrize(
    ("order", "gone"),
    [
        ("lru", "cbad"), ("lfu", "cdba"), ("fifo", "abcd"), ("filo", "dcba"), ("mru", "dabc"),
        ("priority", "cbad"),
    ],
)  # fmt: skip
def test_orders(order, gone):
    assert "".join(story(order)) == gone


def test_a_leaf_goes_whole_and_its_parent_next():
    cache = Cache()
    cache.add("abcd")
    cache.add("abxy")
    assert cache.tree.num_nodes == 3
    cache.tree.match("abcd")
    assert len(cache.tree.evict(1)) == 2
    assert cache.cached() == {"a", "ab", "abc", "abcd"}
    assert len(cache.tree.evict(3)) == 4


@pytest.mark.parametrize(
    ("refresh", "left"), [("whole", {"a", "ab", "x"}), ("visited", {"a", "ab", "abc", "abcd"})]
)
def test_whether_a_match_that_ends_inside_a_node_makes_it_younger(refresh, left):
    """The lower half is the leaf that would go: mini-sglang leaves it as old as it was, SGLang refreshes it."""
    cache = Cache(refresh=refresh)
    cache.add("abcd")
    cache.add("x")
    cache.tree.match("ab")
    cache.tree.evict(1)
    assert cache.cached() == left


def test_the_upper_half_of_a_split_is_new_in_sglang():
    """First in, first out: what others go on from came with the split, behind what was added before it."""
    for refresh, left in (("whole", {"x"}), ("visited", {"a", "ab"})):
        cache = Cache(refresh=refresh, eviction=fifo)
        cache.add("abcd")
        cache.add("x")
        cache.tree.match("ab")
        cache.tree.evict(2)  # "cd", the oldest leaf
        cache.tree.evict(1)
        assert cache.cached() == left


def test_what_a_tree_refuses():
    cache = Cache()
    _, node = cache.add("ab")
    with pytest.raises(ValueError, match="a node of 2 pages is unlocked, and was not locked"):
        cache.tree.unlock(node)
    cache.tree.num_nodes = 5
    with pytest.raises(IntegrityError, match=r"nodes\(5\) != recount over the tree\(1\)"):
        cache.tree.check_integrity()


def test_the_heap_stays_small():
    cache = Cache()
    cache.add("ab")
    for _ in range(1000):
        cache.tree.match("ab")
    assert len(cache.tree._leaves) < 100
