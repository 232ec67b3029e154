"""mini-sglang's cache manager once more, plainly: the oracle of the replay through `radix`."""

from __future__ import annotations

from collections import Counter

from experiments.parity.rows import Row, histogram
from sim.errors import IntegrityError
from sim.prefixes.radix_tree import Node, RadixTree


class _Request:
    """A request of a recording: tokens, those of them that have a slot, its pages, its place in the tree."""

    def __init__(self, tokens: list[int], out_len: int, pages: list[int], node: Node) -> None:
        self.tokens = list(tokens)
        self.computed = len(tokens)
        self.remaining = out_len
        self.several = out_len > 1
        self.pages = pages
        self.node = node
        self.shared = len(pages)  # leading pages that are the tree's


class CacheDriver:
    """Performs the operations of a cache file on a radix tree and a list of free pages."""

    gave_up = False

    def __init__(self, config: Row) -> None:
        self.page_size: int = config["page_size"]
        self.num_pages: int = config["num_pages"]
        self.tree = RadixTree()
        self.free = list(range(self.num_pages))
        self.requests: dict[str, _Request] = {}

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One operation: what it returns, and the state afterwards."""
        arguments = {name: value for name, value in op.items() if name != "op"}
        return getattr(self, op["op"])(**arguments), self.state()

    def _pages(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """The content of each whole page."""
        size = self.page_size
        return [tuple(tokens[end - size : end]) for end in range(size, len(tokens) + 1, size)]

    def admit(self, r: str, tokens: list[int], out_len: int) -> Row:
        pages, node = self.tree.match(self._pages(tokens[:-1]))
        hit = len(pages) * self.page_size
        wanted = len(tokens) - hit + out_len
        for other in self.requests.values():
            wanted += other.remaining + (self.page_size - 1 if other.several else 0)
        out: Row = {"hit_tokens": hit, "ok": wanted <= self._available()}
        if out["ok"]:
            self.tree.lock(node)
            out["ok"] = wanted <= self._available()  # the lock took the hit out of what is available
            if not out["ok"]:
                self.tree.unlock(node)
        if out["ok"]:
            request = self.requests[r] = _Request(tokens, out_len, pages, node)
            out["evicted_tokens"] = self._allocate(request)
        return out

    def _available(self) -> int:
        return (len(self.free) + self.tree.evictable) * self.page_size

    def _allocate(self, request: _Request) -> int:
        """Pages for all computed tokens; the tokens evicted for them."""
        needed = -(-request.computed // self.page_size) - len(request.pages)
        evicted = self.tree.evict(max(0, needed - len(self.free)))
        self.free += evicted
        request.pages += self.free[:needed]
        del self.free[:needed]
        return len(evicted) * self.page_size

    def prefill_done(self, r: str, token: int) -> Row:
        request = self.requests[r]
        self._sample(request, token)
        if request.remaining:
            node = self._insert(request)
            self.tree.lock(node)
            request.node = node
        return {}

    def decode(self, r: str, token: int) -> Row:
        request = self.requests[r]
        request.computed += 1
        evicted = self._allocate(request)
        self._sample(request, token)
        return {"evicted_tokens": evicted}

    def finish(self, r: str) -> Row:
        request = self.requests.pop(r)
        self._insert(request)
        self.free += request.pages[request.computed // self.page_size :]
        return {}

    def probe(self, tokens: list[int]) -> Row:
        pages, _ = self.tree.match(self._pages(tokens[:-1]))
        return {"hit_tokens": len(pages) * self.page_size}

    def _sample(self, request: _Request, token: int) -> None:
        request.tokens.append(token)
        request.remaining -= 1

    def _insert(self, request: _Request) -> Node:
        """Enter the whole pages of what is computed, free what the tree has already, and give the lock back."""
        content = self._pages(request.tokens[: request.computed])
        known, node = self.tree.insert(content, request.pages)
        self.tree.unlock(request.node)
        self.free += request.pages[request.shared : known]
        request.pages[: len(content)] = [
            page for each in reversed([*self.tree.path(node)]) for page in each.pages
        ]
        request.shared = len(content)
        return node

    def state(self) -> Row:
        tree, size = self.tree, self.page_size
        nodes = list(tree.nodes())
        return {
            "free_pages": len(self.free), "evictable_tokens": tree.evictable * size,
            "protected_tokens": tree.protected * size, "available_tokens": self._available(),
            "nodes": len(nodes), "leaves": sum(not node.children for node in nodes),
            "node_len_hist": histogram(len(node.pages) * size for node in nodes),
            "lock_hist": {str(locks): number for locks, number in Counter(node.locks for node in nodes).items()},
        }  # fmt: skip

    def check_integrity(self) -> None:
        """Every page is free, in the tree, or one request's own."""
        self.tree.check_integrity()
        own = [page for request in self.requests.values() for page in request.pages[request.shared :]]
        cached = [page for node in self.tree.nodes() for page in node.pages]
        if sorted([*self.free, *own, *cached]) != list(range(self.num_pages)):
            raise IntegrityError(
                f"free({len(self.free)}) + own({len(own)}) + cached({len(cached)}) != total({self.num_pages})"
            )
