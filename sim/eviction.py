"""Eviction orders: which unlocked leaf of a radix tree goes first. A function of the node, the least goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sim.registry import Registry

if TYPE_CHECKING:
    from sim.radix_tree import Node

Eviction = Callable[["Node"], tuple[int, ...]]

eviction: Registry[Eviction] = Registry("eviction")


@eviction("lru")
def lru(node: Node) -> tuple[int, ...]:
    """The one that was used longest ago (SGLang's default)."""
    return (node.used,)


@eviction("lfu")
def lfu(node: Node) -> tuple[int, ...]:
    """The one that was used least often since it came, of equals the one used longest ago."""
    return (node.uses, node.used)


@eviction("fifo")
def fifo(node: Node) -> tuple[int, ...]:
    """The one that came first."""
    return (node.created,)


@eviction("filo")
def filo(node: Node) -> tuple[int, ...]:
    """The one that came last."""
    return (-node.created,)


@eviction("mru")
def mru(node: Node) -> tuple[int, ...]:
    """The one that was used last."""
    return (-node.used,)


@eviction("priority")
def priority(node: Node) -> tuple[int, ...]:
    """The one of the lowest priority among the requests that used it, of equals the one used longest ago."""
    return (node.priority, node.used)
