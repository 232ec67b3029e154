"""Genealogies of beam groups: whose copy each beam is after every step, and how many blocks that leaves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.identity import mixed, mixed_words

Ints = NDArray[np.int64]

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio

COPIES, TAKEN, WRITTEN, WASTED, LEFT, LOST, SPARED, PARTIAL = range(8)
"""Columns of `changes`. With a growth: blocks copied, blocks taken, slots filled beside one a beam, slots of them that
are never used. With a turnover: blocks given back, slots emptied, slots that are not wasted any more, and how many of
the blocks were filled in part."""
NUM_CHANGES = 8

_BITS = 1 << np.arange(62, dtype=np.int64)


def draw_parents(turnover: float, width: int, steps: int, *names: int) -> Ints:
    """Of each beam after each step the one that it was before it, or is a copy of; shape [steps, width].

    Those that live on come first, in their order, then the copies.

    In every step each beam dies with probability `turnover`, independently, and a survivor picked at random is copied
    in its place; one beam always survives. The draws are those of a SplitMix64 stream that whole numbers name, and
    those of a step do not depend on the number of steps.
    """
    state = 0
    for name in names:
        state = mixed(state + name + 1 & _MASK)
    words = np.arange(1, 2 * steps * width + 1, dtype=np.uint64)
    words *= np.uint64(_STEP)
    words += np.uint64(state)
    mixed_words(words)
    words >>= np.uint64(11)
    draws = (words * 2.0**-53).reshape(steps, 2, width)
    fates, picks = draws[:, 0], draws[:, 1]
    dying = fates < turnover
    survivors = width - dying.sum(axis=1)
    for step in np.flatnonzero(survivors == 0).tolist():
        dying[step, fates[step].argmax()] = False
        survivors[step] = 1
    living_first = dying.argsort(axis=1, kind="stable")
    picked = (picks * survivors[:, None]).astype(np.int64)
    copies = np.take_along_axis(living_first, picked, 1)
    return np.where(np.arange(width) < survivors[:, None], living_first, copies)


def changes(parents: Ints, prompt: int, final: int, size: int) -> Ints:
    """What becomes of a group's blocks of `size` slots, from `prompt` tokens a beam to `final`.

    Copy-on-write: beams with a common ancestor share the blocks that were full when they parted, and the last one
    until one of them writes on. Returns changes by tick, shape [final - prompt + 1, 8]; those of entry t come with the
    growth to prompt + t tokens, and with the turnover behind it.
    """
    width = parents.shape[1]
    ticks = final - prompt
    tails = np.ones(ticks, np.int64)  # distinct last blocks after each turnover; one behind the prompt
    tails[1:] = _distinct(parents[: ticks - 1])
    full = _full_blocks(parents, prompt, ticks, size)
    before = np.arange(prompt, final)  # tokens before each growth
    offset = before % size
    tails[offset == 0] = 0  # they are among the full ones
    blocks = full + tails
    slots = full * size + tails * offset
    taken = width - tails
    written = full * size + width * (offset + 1) - slots
    waste = -final % size
    wasted = waste * (before >= final + waste - size)  # in each last block
    found = np.zeros((ticks + 1, NUM_CHANGES), np.int64)
    found[1:, COPIES] = np.where(offset, taken, 0)
    found[1:, TAKEN] = taken
    found[1:, WRITTEN] = written - width
    found[1:, WASTED] = wasted * taken
    found[1:-1, LEFT] = blocks[:-1] + taken[:-1] - blocks[1:]
    found[1:-1, LOST] = slots[:-1] + written[:-1] - slots[1:]
    found[1:-1, SPARED] = wasted[:-1] * (width - tails[1:])
    found[1:-1, PARTIAL] = np.where(offset[1:], width - tails[1:], 0)
    return found


def _distinct(ancestors: Ints) -> Ints:
    """How many different ones each row has."""
    if ancestors.shape[1] <= len(_BITS):
        sets = np.bitwise_or.reduce(_BITS[ancestors], axis=1)
        count: Ints = np.bitwise_count(sets).astype(np.int64)
        return count
    ordered = np.sort(ancestors, axis=1)
    different: Ints = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return different


def _full_blocks(parents: Ints, prompt: int, ticks: int, size: int) -> Ints:
    """Full blocks behind the prompt's after each turnover, shape [ticks].

    A block lives as long as a beam is left that descends from the one that filled it.
    """
    ends = np.arange(size - prompt % size, ticks, size)  # in ticks from the prompt on
    if not len(ends):
        return np.zeros(ticks, np.int64)
    turning, last = _last_heirs(parents[: ticks - 1])
    lives = last[turning.searchsorted(ends - 1)]
    alive = lives >= ends[:, None]
    change = np.zeros(ticks + 1, np.int64)
    change[ends] = alive.sum(axis=1)
    change -= np.bincount(lives[alive] + 1, minlength=ticks + 1)
    full: Ints = change.cumsum()[:-1]
    return full


def _last_heirs(parents: Ints) -> tuple[Ints, Ints]:
    """After which turnover, counted from 1, the last beam dies that descends from a beam, or which is the last of all.

    The turnovers at which anything changes, counted from 0, in rising order, shape [n]; and for the beams before each
    of them, and those behind the last, the last turnover that heirs have lived through, shape [n + 1, beams].
    """
    steps, width = parents.shape
    turning = (parents != np.arange(width)).any(axis=1).nonzero()[0]
    heirs = [steps] * width
    found = [heirs]
    for step, line in zip(turning[::-1].tolist(), parents[turning[::-1]].tolist(), strict=True):
        before = [step] * width
        for beam, parent in enumerate(line):
            if heirs[beam] > before[parent]:
                before[parent] = heirs[beam]
        found.append(before)
        heirs = before
    return turning, np.array(found[::-1])
