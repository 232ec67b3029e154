"""A radix tree of cached prefixes: an edge holds a run of pages, shared beginnings are stored once."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal

from sim.errors import IntegrityError
from sim.prefixes.eviction import Eviction, lru
from sim.prefixes.foresight import NEVER_AGAIN, Foresight


class Node:
    """A run of pages below its parent: their content, where they are, and who needs them.

    `created` and `used` are ticks of the tree's clock, `uses` counts matches that ran through it, `locks` the
    requests that hold it, `next_use` is the next request that asks for all of it, where that is foreseen.
    """

    __slots__ = (
        "children", "content", "created", "locks", "next_use", "pages", "parent", "priority", "used", "uses"
    )  # fmt: skip

    def __init__(self, parent: Node | None, content: Sequence[Hashable], pages: list[int], now: int) -> None:
        self.parent = parent
        self.children: dict[Hashable, Node] = {}
        self.content = content
        self.pages = pages
        self.created = self.used = now
        self.uses = 0
        self.next_use = NEVER_AGAIN
        self.priority = 0
        self.locks = 0


class RadixTree:
    """Cached prefixes by pages, as in SGLang (`radix_cache.py`; Zheng et al., NeurIPS 2024) and mini-sglang.

    A match that ends inside a node splits it. Requests lock the path that they use; unlocked leaves are
    evicted whole, in the order of `eviction`, and a parent without children becomes a leaf. What a match visits
    counts as used: `refresh="whole"` leaves both halves of a node that it splits as old as they were (mini-
    sglang), `"visited"` refreshes both, and the upper half is new then (SGLang). With foresight leaves go page by
    page, the last one first, since that is the page that is used last of all. All lengths are in pages.
    """

    foresight: Foresight | None = None

    def __init__(self, *, eviction: Eviction = lru, refresh: Literal["whole", "visited"] = "whole") -> None:
        self.root = Node(None, (), [], 0)
        self.root.locks = 1
        self.evictable = 0  # pages in unlocked nodes
        self.protected = 0  # pages in locked ones
        self.extra_locks = 0  # locks beyond the first of each of these pages
        self.num_nodes = 0
        self._order = eviction
        self._refresh_split = refresh == "visited"
        self._clock = 0
        self._offers = 0
        self._leaves: list[tuple[tuple[int, ...], int, Node]] = []  # heap; entries may be out of date

    def match(self, content: Sequence[Hashable], priority: int = 0) -> tuple[list[int], Node]:
        """Pages of the longest cached prefix, and the node where it ends; splits a node that it ends in."""
        node, length = self._walk(content, priority)
        pages: list[int] = []
        for each in reversed(list(self.path(node))):
            pages += each.pages
        assert len(pages) == length
        return pages, node

    def match_above(self, node: Node, pages: int) -> Node:
        """What `match` would give for the prefix that ends so many pages above the end of a node."""
        while pages >= len(node.pages) and node.parent is not None:
            pages -= len(node.pages)
            node = node.parent
        return self._walk(node.content[: len(node.pages) - pages], 0, node.parent)[0]

    def peek(self, content: Sequence[Hashable]) -> tuple[int, int]:
        """Length of the longest cached prefix, and how much of it is not locked; changes nothing, is no use."""
        node, length, unlocked = self.root, 0, 0
        while length < len(content):
            child = node.children.get(content[length])
            if child is None:
                break
            common = _common(child.content, content, length)
            length += common
            if not child.locks:
                unlocked += common
            if common < len(child.content):
                break
            node = child
        return length, unlocked

    def insert(
        self,
        content: Sequence[Hashable],
        pages: list[int],
        priority: int = 0,
        below: Node | None = None,
        *,
        begin: int = 0,
        lock: bool = False,
    ) -> tuple[int, Node]:
        """Add a prefix that is in these pages, from `begin` on; how much of it was there, and the node where it ends.

        The tree takes over the pages behind what was there; those before are the caller's to free. What goes on
        below a node that is known begins there; all above it is used once more. With `lock` it is locked too.
        """
        node, length = self._walk(content, priority, below)
        if length < len(content):
            leaf = Node(node, content[length:], pages[begin + length : begin + len(content)], self._tick())
            leaf.priority = priority
            node.children[content[length]] = leaf
            self.num_nodes += 1
            self.evictable += len(leaf.pages)
            node = leaf
            if not lock:
                self._offer(leaf)
        if lock:
            self.lock(node)
        return length, node

    def _walk(
        self, content: Sequence[Hashable], priority: int, below: Node | None = None
    ) -> tuple[Node, int]:
        now = self._tick()
        node, length = self.root, 0
        if below is not None:
            node = below
            for each in self.path(below):
                each.used = now
                each.uses += 1
                each.priority = max(each.priority, priority)
                self._offer(each)
        while length < len(content):
            child = node.children.get(content[length])
            if child is None:
                break
            common = _common(child.content, content, length)
            length += common
            whole = common == len(child.content)
            if not whole and self._refresh_split:
                child.used = now
                self._offer(child)
            node = child if whole else self._split(child, common)
            if whole or self._refresh_split:
                node.used = now
                node.uses += 1
                node.priority = max(node.priority, priority)
                self._offer(node)
            if not whole:
                break
        return node, length

    def _split(self, node: Node, at: int) -> Node:
        """Put a node of the first `at` pages above the rest of this one."""
        parent = node.parent
        assert parent is not None
        created = self._clock if self._refresh_split else node.created
        upper = Node(parent, node.content[:at], node.pages[:at], created)
        upper.used, upper.uses, upper.priority, upper.locks = node.used, node.uses, node.priority, node.locks
        parent.children[node.content[0]] = upper
        node.content, node.pages, node.parent = node.content[at:], node.pages[at:], upper
        upper.children[node.content[0]] = node
        self.num_nodes += 1
        return upper

    def path(self, node: Node) -> Iterator[Node]:
        """The node and all above it, the root excepted."""
        while node.parent is not None:
            yield node
            node = node.parent

    def lock(self, node: Node) -> None:
        """Keep everything up to the node from eviction, once more."""
        for each in self.path(node):
            if each.locks:
                self.extra_locks += len(each.pages)
            else:
                self.evictable -= len(each.pages)
                self.protected += len(each.pages)
            each.locks += 1

    def unlock(self, node: Node) -> None:
        """Take back one lock. Raises ValueError if there is none."""
        for each in self.path(node):
            if not each.locks:
                raise ValueError(f"a node of {len(each.pages)} pages is unlocked, and was not locked")
            each.locks -= 1
            if each.locks:
                self.extra_locks -= len(each.pages)
            else:
                self.evictable += len(each.pages)
                self.protected -= len(each.pages)
                self._offer(each)

    def evict(self, count: int) -> list[int]:
        """Drop unlocked leaves, whole, until `count` pages are free or more. Raises ValueError if there are fewer.

        With foresight pages, and no more than that.
        """
        if count > self.evictable:
            raise ValueError(f"asked to evict {count} pages, {self.evictable} can be")
        freed: list[int] = []
        while len(freed) < count:
            order, _, node = heapq.heappop(self._leaves)
            parent = node.parent
            if parent is None or node.locks or node.children or order != self._order(node):
                continue  # gone, needed again, or used since
            if self.foresight is not None:
                if self.foresight.next_use(node.content[-1]) != node.next_use:
                    self._offer(node)  # who was to use it next was refused
                    continue
                if len(node.pages) > 1:
                    freed.append(node.pages.pop())
                    node.content = node.content[:-1]
                    self.evictable -= 1
                    self._offer(node)
                    continue
            freed += node.pages
            del parent.children[node.content[0]]
            node.parent = None
            self.num_nodes -= 1
            self.evictable -= len(node.pages)
            self._offer(parent)
        return freed

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _offer(self, node: Node) -> None:
        """Put a node on the heap if it can be evicted now."""
        if node.locks or node.children:
            return
        if len(self._leaves) > 4 * self.num_nodes + 64:
            self._leaves = [entry for entry in self._leaves if self._stands(entry)]
            heapq.heapify(self._leaves)
        if self.foresight is not None:
            node.next_use = self.foresight.next_use(node.content[-1])
        self._offers += 1
        heapq.heappush(self._leaves, (self._order(node), self._offers, node))

    def _stands(self, entry: tuple[tuple[int, ...], int, Node]) -> bool:
        order, _, node = entry
        return node.parent is not None and not node.locks and not node.children and order == self._order(node)

    def nodes(self) -> Iterator[Node]:
        """All nodes, the root excepted."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def check_integrity(self) -> None:
        """Recount the tree. Raises IntegrityError with the equation that failed."""
        evictable = protected = extra = count = 0
        for node in self.nodes():
            count += 1
            assert node.parent is not None
            if len(node.content) != len(node.pages) or not node.pages:
                raise IntegrityError(f"a node of {len(node.content)} keys has {len(node.pages)} pages")
            if node.parent.children.get(node.content[0]) is not node:
                raise IntegrityError("a node is not where its parent looks for it")
            if node.parent is not self.root and node.parent.locks < node.locks:
                raise IntegrityError(f"locks({node.locks}) > locks of the parent({node.parent.locks})")
            if node.locks:
                protected += len(node.pages)
                extra += (node.locks - 1) * len(node.pages)
            else:
                evictable += len(node.pages)
        for name, kept, counted in (
            ("nodes", self.num_nodes, count),
            ("evictable", self.evictable, evictable),
            ("protected", self.protected, protected),
            ("extra locks", self.extra_locks, extra),
        ):
            if kept != counted:
                raise IntegrityError(f"{name}({kept}) != recount over the tree({counted})")


def _common(run: Sequence[Hashable], content: Sequence[Hashable], begin: int) -> int:
    """How far a node's run goes along with the content from `begin` on."""
    length = min(len(run), len(content) - begin)
    here, there = run[:length], content[begin : begin + length]
    if here == there:
        return length
    for index, (one, other) in enumerate(zip(here, there, strict=True)):
        if one != other:
            return index
    return length  # the same in sequences of two types
