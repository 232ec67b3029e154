"""vLLM V0's block manager with prefix caching once more, plainly: the oracle of the replay through `paged`."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count

from experiments.parity.rows import Row, canonical, histogram


class Block:
    """A physical block. Every block has a key at all times, if only one that nobody else will ever ask for."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.key: Hashable = None
        self.depth = 0
        self.references = 0
        self.last_accessed = -1
        self.computed = False


class Pool:
    """V0's `CachedBlockAllocator` and its evictor (0.4.2), block by block.

    Free blocks stand in the order in which they were freed. From the first of them on the evictor takes one that is
    deeper in its prompt than the one it has, up to a block that was used after the one it has.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.made: list[Block] = []
        self.held: dict[Hashable, Block] = {}
        self.free: dict[Hashable, Block] = {}
        self.unnamed = count()

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self.held)

    def knows(self, key: Hashable) -> bool:
        return key in self.held or key in self.free

    def obtain(self, key: Hashable | None, depth: int) -> Block:
        """The block with this key, or a new one for it."""
        if key is None:
            key = self, next(self.unnamed)
        if key in self.free:
            self.held[key] = self.free.pop(key)
        if key not in self.held:
            block = self.evict() if len(self.made) == self.num_blocks else Block(len(self.made))
            if block.number == len(self.made):
                self.made.append(block)
            block.key, block.depth = key, depth
            self.held[key] = block
        self.held[key].references += 1
        return self.held[key]

    def evict(self) -> Block:
        chosen = None
        for block in self.free.values():
            if chosen is None:
                chosen = block
            if chosen.last_accessed < block.last_accessed:
                break
            if chosen.depth < block.depth:
                chosen = block
        assert chosen is not None
        del self.free[chosen.key]
        chosen.computed = False
        return chosen

    def release(self, block: Block) -> None:
        block.references -= 1
        assert block.references >= 0
        if not block.references:
            self.free[block.key] = self.held.pop(block.key)

    def rename(self, block: Block, key: Hashable) -> None:
        del self.held[block.key]
        block.key = key
        self.held[key] = block


class Branch:
    """A sequence of a recording: its tokens and its blocks."""

    def __init__(self, tokens: list[int], table: list[Block]) -> None:
        self.tokens = list(tokens)
        self.table = table


class CachedManagerDriver:
    """Performs the operations of a block manager file with V0's prefix caching on."""

    gave_up = False

    def __init__(self, config: Row) -> None:
        self.block_size: int = config["block_size"]
        self.watermark_blocks: int = config["watermark_blocks"]
        self.device = Pool(config["num_gpu_blocks"])
        self.host = Pool(config["num_cpu_blocks"])
        self.groups: dict[str, dict[int, Branch]] = {}
        self.swapped: set[str] = set()
        self.clock = 0
        self.copies = 0

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One operation: what it returns, and the state afterwards."""
        arguments = {name: value for name, value in op.items() if name != "op"}
        return getattr(self, op["op"])(**arguments), self.state()

    def _key(self, tokens: list[int], index: int) -> Hashable:
        return tuple(tokens[: (index + 1) * self.block_size])

    def _admission(self, needed: int, largest: int) -> str:
        if needed > largest:
            return "NEVER"
        return "OK" if self.device.num_free - needed >= self.watermark_blocks else "LATER"

    def alloc(self, g: str, s: int, tokens: list[int]) -> Row:
        self.clock += 1
        needed = -(-len(tokens) // self.block_size)
        status = self._admission(needed, self.device.num_blocks - self.watermark_blocks)
        if status != "OK":
            return {"status": status}
        reused, table = 0, []
        for index in range(needed):
            key = self._key(tokens, index)
            reused += self.device.knows(key)
            table.append(self.device.obtain(key, index))
        computed = 0
        while computed < needed - 1 and table[computed].computed:
            computed += 1
        branch = Branch(tokens, table)
        self.groups[g] = {s: branch}
        self._used(branch)
        return {"status": status, "reused_blocks": reused, "computed_blocks": computed}

    def _used(self, branch: Branch) -> None:
        for block in branch.table:
            block.last_accessed = self.clock
        self.mark(branch)

    def mark(self, branch: Branch) -> None:
        """Its full blocks but the last count as computed."""
        for block in reversed(branch.table[: max(0, len(branch.tokens) // self.block_size - 1)]):
            if block.computed:
                break
            block.computed = True

    def fork(self, g: str, parent: int, child: int) -> Row:
        origin = self.groups[g][parent]
        for block in origin.table:
            block.references += 1
        self.groups[g][child] = Branch(origin.tokens, origin.table.copy())
        return {}

    def append(self, g: str, tokens: dict[str, int]) -> Row:
        self.clock += 1
        group = self.groups[g]
        if self.device.num_free < len(group):
            return {"ok": False}
        for name, branch in group.items():
            branch.tokens.append(tokens[str(name)])
        copied = [name for name, branch in group.items() if self._slot(branch)]
        for branch in group.values():
            self._used(branch)
        self.copies += len(copied)
        return {"ok": True, "cow": len(copied), "cow_seqs": copied}

    def _slot(self, branch: Branch) -> bool:
        """A slot for the last token; whether a block was copied for it."""
        table, length = branch.table, len(branch.tokens)
        index = (length - 1) // self.block_size
        key = self._key(branch.tokens, index) if length % self.block_size == 0 else None
        if index == len(table):
            table.append(self.device.obtain(key, index))
            return False
        last = table[-1]
        if last.references > 1:
            table[-1] = self.device.obtain(key, index)
            self.device.release(last)
            return True
        if key is not None:
            if self.device.knows(key):
                self.device.release(last)
                table[-1] = self.device.obtain(key, index)
            else:
                self.device.rename(last, key)
        return False

    def finish(self, g: str, s: int) -> Row:
        branch = self.groups[g].pop(s)
        for block in branch.table:
            (self.host if g in self.swapped else self.device).release(block)
        if not self.groups[g]:
            del self.groups[g]
            self.swapped.discard(g)
        return {}

    def _distinct(self, group: str) -> list[Block]:
        return list(dict.fromkeys(block for branch in self.groups[group].values() for block in branch.table))

    def swap_out(self, g: str) -> Row:
        if len(self._distinct(g)) > self.host.num_free:
            return {"ok": False}
        self.swapped.add(g)
        return {"ok": True, "blocks": self._move(g, self.device, self.host)}

    def swap_in(self, g: str) -> Row:
        needed = len(self._distinct(g)) + len(self.groups[g])
        status = self._admission(needed, self.device.num_blocks)
        if status != "OK":
            return {"status": status}
        self.swapped.discard(g)
        return {"status": status, "blocks": self._move(g, self.host, self.device)}

    def _move(self, group: str, source: Pool, target: Pool) -> int:
        places: dict[Block, Block] = {}
        for branch in self.groups[group].values():
            for index, block in enumerate(branch.table):
                if block in places:
                    places[block].references += 1
                else:
                    places[block] = target.obtain(block.key, block.depth)
                branch.table[index] = places[block]
                source.release(block)
        return len(places)

    def _tables(self, swapped: bool) -> dict[str, list[int]]:
        return canonical(
            {
                str(name): [block.number for block in branch.table]
                for group, branches in self.groups.items()
                if (group in self.swapped) is swapped
                for name, branch in branches.items()
            }
        )

    def state(self) -> Row:
        device, host = self.device, self.host
        seen: Row = {
            "free_gpu": device.num_free, "used_gpu": len(device.held),
            "free_cpu": host.num_free, "used_cpu": len(host.held),
            "tables": self._tables(swapped=False),
            "ref_hist": histogram(block.references for block in device.made),
            "cow_total": self.copies,
        }  # fmt: skip
        if host.num_blocks:
            seen["cpu_tables"] = self._tables(swapped=True)
            seen["cpu_ref_hist"] = histogram(block.references for block in host.made)
        return seen
