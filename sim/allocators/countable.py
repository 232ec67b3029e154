"""What allocators share whose blocks can be counted for a group of beams, without a table for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Ordered
from contextlib import nullcontext

from sim.allocators.base import Allocator
from sim.allocators.counted_group import CountedGroup
from sim.pools.block_pool import BlockPool
from sim.request import Request, Sequence


class CountableAllocator(Allocator):
    """Equal blocks from a pool, shared on fork and copied on write (`sim/allocators/counted_beams.py`).

    A class whose blocks can be counted says so itself (`counts_beams`): one that goes by other rules than the class
    that it comes from would not be counted right.
    """

    pool: BlockPool

    def __init_subclass__(cls) -> None:
        """Other rules for blocks are not counted for beams."""
        super().__init_subclass__()
        if "counts_beams" not in cls.__dict__:
            cls.counts_beams = False

    def copies(self, branches: list[Sequence]) -> int:
        """The last who has a block keeps it."""
        held = Counter([each.block_table[each.num_tokens // self.block_size] for each in branches])
        return len(branches) - sum([self.pool.count(block) == holders for block, holders in held.items()])

    def share_prompt(self, parent: Sequence, others: Ordered[Sequence]) -> int:
        """Let the other beams have the full blocks of the prompt, and nothing behind them; their number."""
        whole = parent.origin // self.block_size
        self.pool.share(parent.block_table[:whole], len(others))
        return whole

    def take_blocks(self, count: int) -> list[int]:
        """So many blocks for beams that are counted."""
        return self.pool.take(count)

    def give_back(self, blocks: list[int], partial: int) -> None:
        """Take blocks of counted beams back, of which so many are filled in part."""
        self.pool.release(blocks)

    def forget(self, blocks: list[int]) -> bool:
        """Let nobody find these blocks of one group any more; false where it stays to be told which are whose."""
        return True

    def leave_group(self, group: CountedGroup, blocks: list[int]) -> None:
        """A counted group is done: take its blocks back, and its references to the full blocks of its prompt."""
        beams = len(group.done)
        self.give_back(blocks, beams if group.final % self.block_size else 0)
        self.give_back_prompt(group.prefix, beams)

    def give_back_prompt(self, blocks: list[int], beams: int) -> None:
        """Take the full blocks of a prompt back, which so many beams have shared."""
        self.pool.unshare(blocks, beams - 1)
        self.pool.release(blocks)

    def list_beams(self, request: Request) -> None:
        """Give the beams of a group their block tables, if they have none."""
        if request.counted is not None:
            request.counted.list_blocks()

    def check_integrity(self) -> None:
        """Recount everything, with the block tables that counted beams would have. Raises IntegrityError."""
        with self.counted.all_listed() if self.counted is not None else nullcontext():
            super().check_integrity()
