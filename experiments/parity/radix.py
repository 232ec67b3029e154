"""Recordings of mini-sglang: its cache manager over a radix tree."""

from __future__ import annotations

from collections import Counter

from experiments.parity.rows import Row, histogram
from experiments.parity.tokens import TokenManager, Told
from sim import Capacity, Request
from sim.allocators import RadixAllocator


class _Memory(RadixAllocator):
    """mini-sglang's tree; whoever looks something up there has used it."""

    refresh = "whole"

    def look_up(self, request: Request, num_tokens: int) -> int:
        """Tokens that the tree has of a prompt, which may split a node."""
        pages, _ = self.tree.match(self._keys(request, num_tokens))
        return len(pages) * self.block_size


class CacheDriver(TokenManager):
    """Performs the operations of a cache file on the allocator `radix`.

    That nobody is ever preempted is a promise of mini-sglang's scheduler, and kept here: a request is admitted only
    if beside it all that run can have their remaining outputs.
    """

    memory: _Memory

    def __init__(self, config: Row) -> None:
        super().__init__()
        pages, size = config["num_pages"], config["page_size"]
        self.memory = _Memory(Capacity(pages * size, pages * size, pages), block_size=size)
        self.promised: dict[Told, int] = {}  # outputs that requests were admitted with

    def admit(self, r: str, tokens: list[int], out_len: int) -> Row:
        memory, size = self.memory, self.memory.block_size
        told = self.tell(tokens, len(tokens) + out_len - 1)
        hit = memory.look_up(told.request, len(tokens))
        wanted = len(tokens) - hit + out_len
        for other in self.requests.values():
            wanted += self._remaining(other) + (size - 1 if self.promised[other] > 1 else 0)
        _, unlocked = memory.cached(told.request, len(tokens))
        if wanted > (memory.pool.num_free - unlocked) * size:  # what it finds cannot be evicted for it
            return {"hit_tokens": hit, "ok": False}
        self.requests[r] = told
        self.promised[told] = out_len
        cached = self._cached
        memory.admit(told.sequence, len(tokens))
        return {"hit_tokens": hit, "ok": True, "evicted_tokens": (cached - self._cached) * size}

    @property
    def _cached(self) -> int:
        return self.memory.tree.evictable + self.memory.tree.protected

    def _remaining(self, told: Told) -> int:
        return told.prompt_tokens + self.promised[told] - told.num_tokens

    def prefill_done(self, r: str, token: int) -> Row:
        told = self.requests[r]
        told.tell(token)
        self.memory.computed(told.sequence)
        return {}

    def decode(self, r: str, token: int) -> Row:
        told, cached = self.requests[r], self._cached
        self.memory.extend(told.sequence, 1)
        told.tell(token)
        return {"evicted_tokens": (cached - self._cached) * self.memory.block_size}

    def finish(self, r: str) -> Row:
        told = self.requests.pop(r)
        del self.promised[told]
        if told.sequence.num_tokens < told.sequence.final_tokens:  # else `free` does it
            self.memory.finished(told.sequence)
        self.memory.free(told.sequence)
        return {}

    def probe(self, tokens: list[int]) -> Row:
        return {"hit_tokens": self.memory.look_up(self.tell(tokens).request, len(tokens))}

    def state(self) -> Row:
        memory = self.memory
        tree, size = memory.tree, memory.block_size
        nodes = list(tree.nodes())
        return {
            "free_pages": len(memory.pool.free), "evictable_tokens": tree.evictable * size,
            "protected_tokens": tree.protected * size, "available_tokens": memory.pool.num_free * size,
            "nodes": len(nodes), "leaves": sum(not node.children for node in nodes),
            "node_len_hist": histogram(len(node.pages) * size for node in nodes),
            "lock_hist": {str(locks): number for locks, number in Counter(node.locks for node in nodes).items()},
        }  # fmt: skip
