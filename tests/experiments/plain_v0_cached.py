"""Recordings of vLLM V0's block manager with prefix caching."""

from __future__ import annotations

from collections.abc import Hashable

from experiments.parity import Row, canonical, histogram
from sim.hashed_blocks import HashedPool


class Branch:
    """A sequence of a recording: its tokens and its blocks."""

    def __init__(self, tokens: list[int], table: list[int]) -> None:
        self.tokens = list(tokens)
        self.table = table


class CachedManagerDriver:
    """Performs the operations of a block manager file with V0's prefix caching on.

    Blocks are known by all tokens up to their end, the last of a prompt by its part. All blocks of a sequence
    count as used, and all full ones but the last as computed, after each allocation and append.
    """

    gave_up = False

    def __init__(self, config: Row) -> None:
        self.block_size: int = config["block_size"]
        self.watermark_blocks: int = config["watermark_blocks"]
        self.device = HashedPool(config["num_gpu_blocks"])
        self.host = HashedPool(config["num_cpu_blocks"], "host")
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
            reused += self.device.find(key) is not None
            table.append(_obtain(self.device, key))
        computed = 0
        while computed < needed - 1 and self.device.computed[table[computed]]:
            computed += 1
        branch = Branch(tokens, table)
        self.groups[g] = {s: branch}
        self._used(branch)
        return {"status": status, "reused_blocks": reused, "computed_blocks": computed}

    def _used(self, branch: Branch) -> None:
        for block in branch.table:
            self.device.last_accessed[block] = self.clock
        for block in branch.table[: max(0, len(branch.tokens) // self.block_size - 1)]:
            self.device.computed[block] = 1

    def fork(self, g: str, parent: int, child: int) -> Row:
        origin = self.groups[g][parent]
        self.device.share(origin.table)
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
            table.append(_obtain(self.device, key))
            return False
        last = table[-1]
        if self.device.references[last] > 1:
            table[-1] = _obtain(self.device, key)
            self.device.release((last,), index)
            return True
        if key is not None:
            table[-1] = self.device.promote(last, key, index)
        return False

    def finish(self, g: str, s: int) -> Row:
        branch = self.groups[g].pop(s)
        (self.host if g in self.swapped else self.device).release(branch.table)
        if not self.groups[g]:
            del self.groups[g]
            self.swapped.discard(g)
        return {}

    def _distinct(self, group: str) -> list[int]:
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

    def _move(self, group: str, source: HashedPool, target: HashedPool) -> int:
        places: dict[int, int] = {}
        for branch in self.groups[group].values():
            for index, block in enumerate(branch.table):
                if block in places:
                    target.hold(places[block])
                else:
                    places[block] = _obtain(target, source.keys[block])
                branch.table[index] = places[block]
                source.release((block,), index)
        return len(places)

    def _tables(self, swapped: bool) -> dict[str, list[int]]:
        return canonical(
            {
                str(name): branch.table
                for group, branches in self.groups.items()
                if (group in self.swapped) is swapped
                for name, branch in branches.items()
            }
        )

    def state(self) -> Row:
        device, host = self.device, self.host
        seen: Row = {
            "free_gpu": device.num_free, "used_gpu": device.num_used,
            "free_cpu": host.num_free, "used_cpu": host.num_used,
            "tables": self._tables(swapped=False),
            "ref_hist": histogram(device.references),
            "cow_total": self.copies,
        }  # fmt: skip
        if host.num_blocks:
            seen["cpu_tables"] = self._tables(swapped=True)
            seen["cpu_ref_hist"] = histogram(host.references)
        return seen

    def check_integrity(self) -> None:
        """References against tables."""
        for pool, away in ((self.device, False), (self.host, True)):
            pool.check_integrity(
                branch.table
                for group, branches in self.groups.items()
                if (group in self.swapped) is away
                for branch in branches.values()
            )


def _obtain(pool: HashedPool, key: Hashable) -> int:
    """The block with this content, or another one for it; without a key one that is never found."""
    found = None if key is None else pool.find(key)
    if found is not None:
        pool.hold(found)
        return found
    (block,) = pool.take()
    if key is not None:
        pool.rename(block, key)
    return block
