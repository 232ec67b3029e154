"""Genealogies of beam groups: whose copy each beam is after every step, and how many blocks that leaves."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.identity import mixed, mixed_words

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio

COPIES, TAKEN, WRITTEN, WASTED, LEFT, LOST, SPARED, PARTIAL = range(8)
"""Columns of `changes`. With a growth: blocks copied, blocks taken, slots filled beside one a beam, slots of them that
are never used. With a turnover: blocks given back, slots emptied, slots that are not wasted any more, and how many of
the blocks were filled in part."""
NUM_CHANGES = 8

_BITS = 1 << np.arange(62, dtype=np.int64)


class Turnover(NamedTuple):
    """How often beams die that were forked so many steps ago: with the chance young / age ** decay in a step."""

    young: float
    decay: float


def draw_parents(turnover: Turnover | float, width: int, steps: int, *names: int) -> Ints:
    """Of each beam after each step the one that it was before it, or is a copy of; shape [steps, width].

    Those that live on come first, in their order, then the copies.

    In every step each beam dies with a chance, independently, which is the same for all or goes by their ages, and a
    survivor picked at random is copied in its place; one beam always survives. The draws are those of a SplitMix64
    stream that whole numbers name, and those of a step do not depend on the number of steps.
    """
    state = 0
    for name in names:
        state = mixed(state + name + 1 & _MASK)
    if isinstance(turnover, Turnover):
        return _parents_by_age(turnover, width, steps, state)
    draws = _uniform(state, 0, 2 * steps * width).reshape(steps, 2, width)
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


def _uniform(state: int, first: int, count: int) -> Floats:
    """Numbers of a stream in [0, 1), from the one with this index on, shape [count]."""
    words = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    words *= np.uint64(_STEP)
    words += np.uint64(state)
    mixed_words(words)
    words >>= np.uint64(11)
    return words * np.float64(2.0**-53)


def _parents_by_age(turnover: Turnover, width: int, steps: int, state: int) -> Ints:
    """`draw_parents` where the chance goes by age: how long a beam will live is drawn when it is forked."""
    dead = _dead_by_age(turnover, 1 << steps.bit_length())
    chunk = width + steps * width // 6
    lives: list[int] = []
    picks: list[float] = []
    others: list[int] = []  # the same, of all beams but one

    def draw() -> None:
        draws = _uniform(state, 2 * len(lives), 2 * chunk).reshape(chunk, 2)
        lives.extend((dead.searchsorted(draws[:, 0], side="right") + 1).tolist())
        picks.extend(draws[:, 1].tolist())
        others.extend((draws[:, 1] * (width - 1)).astype(np.int64).tolist())

    draw()
    ends = lives[:width]  # the steps, from 1 on, in which the beams die
    used = width
    without = [[each for each in range(width) if each != beam] for beam in range(width)]
    turning: list[int] = []
    rows: list[int] = []
    step = min(ends)
    while step <= steps:
        if used + width > len(lives):
            draw()
        turning.append(step - 1)
        if ends.count(step) == 1:
            beam = ends.index(step)
            del ends[beam]
            ends.append(step + lives[used])
            living = without[beam]
            rows += living
            rows.append(living[others[used]])
            used += 1
        else:
            living = [beam for beam, end in enumerate(ends) if end > step]
            ends = [end for end in ends if end > step]
            if not living:  # one lives on, as if it had been forked just now
                living, ends = [0], [step + lives[used]]
                used += 1
            rows += living
            for index in range(used, used + width - len(living)):
                rows.append(living[int(picks[index] * len(living))])
                ends.append(step + lives[index])
            used += width - len(living)
        step = min(ends)
    parents = np.tile(np.arange(width), (steps, 1))
    if rows:
        parents[turning] = np.array(rows).reshape(-1, width)
    return parents


@lru_cache(maxsize=64)
def _dead_by_age(turnover: Turnover, ages: int) -> Floats:
    """The share of beams that have died at an age or before, from age 1 on, shape [ages]; rounded, for all machines."""
    chances = np.minimum(1.0, turnover.young / np.arange(1, ages + 1) ** turnover.decay)
    dead: Floats = np.round(1 - np.cumprod(1 - chances), 12)
    return dead


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
        for last, parent in zip(heirs, line, strict=True):
            if last > before[parent]:
                before[parent] = last
        found.append(before)
        heirs = before
    flat = np.fromiter(chain.from_iterable(reversed(found)), np.int64, len(found) * width)
    return turning, flat.reshape(-1, width)
