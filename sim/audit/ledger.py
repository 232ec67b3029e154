"""The ledger: which token every KV slot holds, kept beside any allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.allocators.base import Allocator
from sim.audit.journeys import Journeys
from sim.audit.layout import Layout
from sim.errors import ProbeError
from sim.identity import UNWRITTEN, History, Ints, identities, identity
from sim.request import Request, Sequence
from sim.tiers.tier import Tier

FEW = 12
"""Tokens that are faster entered one by one than as an array."""

FIRST_FOLLOWED, FOLLOWED = 8, 64
"""Of beam groups that could be counted the first are followed, and one in so many."""


class Written:
    """How far a sequence is entered: its history, the tokens in slots, and the sum of their keys.

    Its first `quantized` tokens have been swapped out and back at a lower precision.
    """

    __slots__ = ("history", "quantized", "tokens", "total")

    def __init__(self, history: History, tokens: int = 0, total: int = 0) -> None:
        self.history = history
        self.tokens = tokens
        self.total = total
        self.quantized = 0


class Ledger(Journeys):
    """Witness that knows of every slot which token was written there last.

    A token is known by its content identity, which stands for the whole history up to it: equal identity means
    equal K and V. A block that is handed out is unwritten, and a token that is written must find its slot so, or
    find the same content there; so a write into a slot that somebody else uses is seen. Tokens are entered as
    late as possible: before a fork or a swap, and where somebody looks. Those of a sequence that ends before are
    never entered, unless freed blocks keep their content for others.

    What it finds wrong is a ProbeError that begins with `when`.
    """

    def __init__(self, allocator: Allocator) -> None:
        super().__init__()
        self.allocator = allocator
        self.when = "before the first sample"
        size = allocator.block_size
        self.tiers = {pool.tier: Tier(pool.tier, pool.num_blocks, size, pool) for pool in allocator.pools}
        self.pooled = "device" in self.tiers
        if not self.pooled:  # nobody tells of takes; slots are as blocks of one
            self.tiers["device"] = Tier("device", allocator.num_slots, 1)
        self.device = self.tiers["device"]
        self.live: dict[Sequence, Written] = {}
        self.follows_all = False  # groups that could be counted too
        self._forked: dict[Sequence, History] = {}  # of branches, which may have to start again
        self._touched: set[int] = set()
        self._keeps_freed = allocator.keeps_freed
        self._stores_quantized = allocator.kv_cache_dtype is not None
        self.changed: set[int] = (
            set()
        )  # device blocks that were copied or moved to, until somebody clears them
        self.on_event: Callable[[], None] | None = None  # called at the 1st, 4th, 16th ... event of a kind
        self._events = dict.fromkeys(("fork", "copy", "swap", "load"), 0)

    # What it is told

    def touch(self, tier: str, blocks: Ordered[int]) -> None:
        """What the blocks hold stays."""
        if not self._keeps_freed:
            name = type(self.allocator).__name__
            raise self.error(
                f"{name} hands out blocks {list(blocks)} as cached, but its keeps_freed is False"
            )
        self.tiers[tier].reset()
        self._enter_holders(tier, blocks)
        self._touched.update(blocks)

    def _enter_holders(self, tier: str, blocks: Ordered[int]) -> None:
        """Enter the sequences that have yet to be entered in these blocks: others will look for their content."""
        at = np.array(blocks, np.int64)
        unwritten = set(at[self.tiers[tier].rows[at, -1] == UNWRITTEN].tolist())
        if unwritten:
            for sequence in self.allocator.sequences:
                if not unwritten.isdisjoint(sequence.block_table):
                    self._enter_one(sequence)

    def begin(self, sequence: Sequence) -> None:
        """Leading blocks that were touched count as entered: the sequence has to find its content there."""
        if self._touched:
            blocks = 0
            while blocks < len(sequence.block_table) and sequence.block_table[blocks] in self._touched:
                blocks += 1
            self._touched.clear()
            written = self._state(sequence)
            written.tokens = min(blocks * self.allocator.block_size, sequence.num_tokens)
            _, written.total = written.history.identities(0, written.tokens)

    def write(self, sequence: Sequence) -> None:
        """Enter the tokens of the sequence; what is in blocks of others that it holds, as they enter it."""
        if sequence.block_table:
            self._enter_one(sequence)
            if self._keeps_freed:
                full = sequence.num_tokens // self.device.block_size
                self._enter_holders("device", sequence.block_table[:full])
        else:
            self.enter(self.layout([sequence]))

    def leave(self, sequence: Sequence, group: int, tokens: int) -> None:
        """Tables of one group have no windows."""
        raise self.error(f"{sequence} leaves {tokens} tokens behind in layer group {group}")

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Both go on from the same history, the child as a branch of its own."""
        self._note("fork")
        written = self.live[parent]
        history = written.history.fork(child.request, child.branch, written.tokens)
        self.live[child] = Written(history, written.tokens, written.total)
        self.live[child].quantized = written.quantized
        self._forked[child] = history

    def follows(self, request: Request) -> bool:
        """One group in so many: who follows a group beam by beam takes far longer than who counts its blocks."""
        return self.follows_all or request.id < FIRST_FOLLOWED or request.id % FOLLOWED == 0

    def hide(self, sequence: Sequence) -> None:
        """Forget what is entered of the sequence, but for what others may find; other branches will have its blocks."""
        first = 0
        if self._keeps_freed:
            self._enter_one(sequence)
            first = sequence.request.prompt_tokens // self.device.block_size
        written = self.live.pop(sequence, None)
        if written is not None and written.tokens:
            for block in sequence.block_table[first:]:
                self.cut(block, 0)

    def show(self, sequence: Sequence) -> None:
        """Enter all that the sequence has written; what it shares it has to share with those of its descent."""
        self._forked[sequence] = History.along(sequence)
        self._enter_one(sequence)

    def copy(self, source: int, target: int) -> None:
        """The target holds what the source holds."""
        device = self.device
        if device.fresh[source]:
            device.reset()
        device.fresh[target] = 0
        self.changed.add(target)
        self._note("copy")
        device.rows[target] = device.rows[source]
        device.quantized[target] = device.quantized[source]

    def cut(self, block: int, offset: int) -> None:
        """Nothing is written there."""
        self.device.reset()
        self.device.rows[block, offset:] = UNWRITTEN

    def swap(self, tier: str, pairs: Ordered[tuple[int, int]], sequences: Ordered[Sequence] = ()) -> None:
        """The targets hold what the sources on the other tier hold, at the precision of swaps."""
        (other,) = (place for name, place in self.tiers.items() if name != tier)
        other.reset()
        self.tiers[tier].reset()
        moves = np.array(pairs, np.int64).reshape(-1, 2)
        self.tiers[tier].rows[moves[:, 1]] = other.rows[moves[:, 0]]
        self.tiers[tier].quantized[moves[:, 1]] = other.quantized[moves[:, 0]]
        if self.allocator.quantization is not None and tier != "device":
            self.tiers[tier].quantized[moves[:, 1]] = True
            for sequence in sequences:
                written = self._state(sequence)
                written.quantized = written.tokens
        if tier == "device":
            self.changed.update(moves[:, 1].tolist())
        self._note("swap")

    def _note(self, event: str) -> None:
        """Count an event of a kind, and call for a sample at the 1st, 4th, 16th, ... one."""
        self._events[event] = count = self._events[event] + 1
        if self.on_event is not None and not count & (count - 1) and count.bit_length() & 1:
            self.on_event()

    def offload(self, sequences: Iterable[Sequence]) -> None:
        """Enter the sequences; one that is over is entered already."""
        for sequence in dict.fromkeys(sequences):
            if sequence in self.allocator.sequences:
                self._enter_one(sequence)

    def arrived(self, block: int) -> None:
        """A block came back from a tier: others may find what it holds."""
        self._touched.add(block)
        self._note("load")

    def lose(self, sequence: Sequence) -> None:
        """What the sequence lost is not entered any more."""
        written = self.live.get(sequence)
        if written is not None and written.tokens > sequence.num_tokens:
            written.tokens = sequence.num_tokens
            written.quantized = min(written.quantized, written.tokens)
            _, written.total = written.history.identities(0, written.tokens)

    def end(self, sequence: Sequence) -> None:
        """Forget the sequence."""
        if self._keeps_freed and sequence.num_tokens and sequence in self.allocator.sequences:
            self.allocator.list_blocks(sequence)
            if sequence.request.counted is not None:
                pass  # nobody finds what it generated
            elif sequence.block_table:
                self._enter_one(sequence)
            else:
                self.enter(self.layout([sequence]))
        self.live.pop(sequence, None)
        if self._forked and (
            sequence.num_tokens >= sequence.final_tokens
            or (len(sequence.request.sequences) > 1 and sequence.request.status != "waiting")
        ):
            self._forked.pop(sequence, None)  # it will not start again

    # What it knows

    @property
    def precision(self) -> str | None:
        """That of all K and V, or of those that were swapped, where it is not the model's own."""
        return self.allocator.kv_cache_dtype or self.allocator.quantization

    def contents(self, sequence: Sequence) -> Ints:
        """Identities of the sequence's tokens by its history, shape [num_tokens]."""
        return self._state(sequence).history.identities(0, sequence.num_tokens)[0]

    def quantized(self, layout: Layout) -> NDArray[np.bool_]:
        """Which of the layout's tokens have lost precision, all or by a swap of their sequences."""
        if self._stores_quantized:
            return np.ones(len(layout.positions), np.bool_)
        lengths = [self._state(sequence).quantized for sequence in layout.sequences]
        return layout.positions < np.repeat(lengths, layout.lengths)

    def layout(self, sequences: list[Sequence]) -> Layout:
        """Where the sequences' tokens are on the device, checked against their block tables."""
        layout = Layout(sequences, [self.allocator.slots(sequence) for sequence in sequences])
        complaint = layout.complaint(self.device, self.pooled)
        if complaint:
            raise self.error(complaint)
        return layout

    def enter(self, layout: Layout) -> Ints:
        """Enter all tokens that are not entered yet; the identities of all, entered before or now."""
        self.device.reset()
        states = [self._state(sequence) for sequence in layout.sequences]
        contents, totals = identities([written.history for written in states], layout.lengths)
        slots, wanted, new = layout.slots, contents, None
        if any(written.tokens for written in states):
            before = np.repeat([written.tokens for written in states], layout.lengths)
            new = np.flatnonzero(layout.positions >= before)
            slots, wanted = slots[new], wanted[new]
        self._put(slots, wanted, lambda at: layout.told(at if new is None else int(new[at])))
        for written, length, total in zip(states, layout.lengths, totals, strict=True):
            written.tokens, written.total = length, total
        return contents

    def _put(self, slots: Ints, contents: Ints, told: Callable[[int], str]) -> None:
        """Write contents into slots that hold nothing yet, or the same; `told` says what is put at an index."""
        if self.pooled:
            found = self.device.slots[slots]
            clashes = np.flatnonzero((found != UNWRITTEN) & (found != contents))
            if len(clashes):
                at = int(clashes[0])
                raise self._clash(told(at), int(found[at]))
        self.device.slots[slots] = contents
        if self.precision is not None:
            self.device.quantized.reshape(-1)[slots] = self._stores_quantized

    def _clash(self, what: str, found: int) -> ProbeError:
        return self.error(f"{what} is written over {self.told(found)}")

    def _enter_one(self, sequence: Sequence) -> None:
        """`enter` for one sequence, where its block table says."""
        self.allocator.list_blocks(sequence)
        written = self._state(sequence)
        begin, end = written.tokens, sequence.num_tokens
        size, rows = self.device.block_size, self.device.rows
        first, stop = begin // size, -(-end // size)
        blocks = sequence.block_table[first:stop]
        if len(blocks) < stop - first or (blocks and not 0 <= min(blocks) <= max(blocks) < len(rows)):
            table = sequence.block_table
            raise self.error(
                f"{sequence}, token {end - 1} is not in the {len(rows)} device blocks by its table {table}"
            )
        fresh = self.device.fresh
        for block in blocks:
            if fresh[block]:
                self.device.reset()
                break
        if end - begin > FEW:
            contents, written.total = written.history.identities(begin, end, written.total)
            slots = (np.array(blocks)[:, None] * size + np.arange(size)).reshape(-1)[begin - first * size :][
                : end - begin
            ]
            self._put(slots, contents, lambda at: f"{sequence}, token {begin + at}, device slot {slots[at]}")
        else:
            for position in range(begin, end):
                written.total = written.history.total_after(position, written.total)
                index, offset = divmod(position, size)
                row, wanted = rows[blocks[index - first]], identity(written.total)
                found = row[offset]
                if found not in (UNWRITTEN, wanted):
                    slot = blocks[index - first] * size + offset
                    raise self._clash(f"{sequence}, token {position}, device slot {slot}", found)
                row[offset] = wanted
                if self.precision is not None:
                    self.device.quantized[blocks[index - first], offset] = self._stores_quantized
        written.tokens = end

    def _state(self, sequence: Sequence) -> Written:
        written = self.live.get(sequence)
        if written is None:
            history = self._forked.get(sequence) or History.of(sequence.request)
            written = self.live[sequence] = Written(history)
        return written

    def evidence(self) -> dict[str, Any]:
        """The memory as it is: plain values under `when` and `sequences`, arrays under `arrays`.

        Every live sequence with its block table; of each tier the identity in every slot, and of each sequence
        the identities that its history asks for.
        """
        held = [sequence for sequence in self.allocator.sequences if sequence.request.counted is None]
        live = dict.fromkeys([*held, *self.live])
        sequences = [
            {
                "sequence": str(sequence),
                "num_tokens": sequence.num_tokens,
                "on_device": sequence in self.allocator.sequences,
                "block_table": list(sequence.block_table),
            }
            for sequence in live
        ]
        for tier in self.tiers.values():
            tier.reset()
        arrays = {f"{tier.name} slots": tier.slots.copy() for tier in self.tiers.values()}
        arrays |= {str(sequence): self.contents(sequence) for sequence in live}
        return {"when": self.when, "sequences": sequences, "arrays": arrays}

    def error(self, what: str) -> ProbeError:
        """An error that says when."""
        return ProbeError(f"{self.when}: {what}")

    def told(self, found: int) -> str:
        """Whose token an identity is."""
        if found == UNWRITTEN:
            return "nothing, as nobody wrote there"
        for sequence in self.live:
            matches = np.flatnonzero(self.contents(sequence) == found)
            if len(matches):
                return f"token {matches[0]} of {sequence} ({found:#x})"
        return f"a token of nobody that is live ({found:#x})"
