"""Eviction orders: what goes first when a cache is full. A function of a cached node or block, the least goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from sim.registry import Registry


class Cached(Protocol):
    """Something that can be evicted: when it came and was used last, by the cache's clock, how often, by whom."""

    created: int
    used: int
    uses: int
    priority: int


Eviction = Callable[[Cached], tuple[int, ...]]

eviction: Registry[Eviction] = Registry("eviction")


@eviction("lru")
def lru(node: Cached) -> tuple[int, ...]:
    """The one that was used longest ago (SGLang's default)."""
    return (node.used,)


@eviction("lfu")
def lfu(node: Cached) -> tuple[int, ...]:
    """The one that was used least often since it came, of equals the one used longest ago."""
    return (node.uses, node.used)


@eviction("fifo")
def fifo(node: Cached) -> tuple[int, ...]:
    """The one that came first."""
    return (node.created,)


@eviction("filo")
def filo(node: Cached) -> tuple[int, ...]:
    """The one that came last."""
    return (-node.created,)


@eviction("mru")
def mru(node: Cached) -> tuple[int, ...]:
    """The one that was used last."""
    return (-node.used,)


@eviction("priority")
def priority(node: Cached) -> tuple[int, ...]:
    """The one of the lowest priority among the requests that used it, of equals the one used longest ago."""
    return (node.priority, node.used)


class Foreseen(Cached, Protocol):
    """Something of which it is known when it will be used next."""

    next_use: int


@eviction("belady")
def belady(node: Cached) -> tuple[int, ...]:
    """The one whose next use is farthest away: the bound, for it knows the future (Belady, 1966).

    Of equals the one used longest ago, which is the deepest of a prompt.
    """
    return (-cast("Foreseen", node).next_use, node.used)
