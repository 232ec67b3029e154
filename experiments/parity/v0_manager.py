"""Recordings of vLLM V0's block manager, without prefix caching and with it."""

from __future__ import annotations

from collections.abc import Hashable

from experiments.parity.rows import Misuse, Row, canonical, histogram
from experiments.parity.tokens import ENDLESS
from sim import Admission, Capacity, Request, Sequence
from sim.allocators import PagedAllocator
from sim.allocators.cached_paged import CachedPagedAllocator
from sim.beams import fork
from sim.pools.hashed_blocks import UNUSED, HashedPool


def build_memory(
    config: Row, max_model_len: int, kind: type[PagedAllocator] = PagedAllocator
) -> PagedAllocator:
    """The paged allocator that a header describes."""
    blocks, size = config["num_gpu_blocks"], config["block_size"]
    memory = kind(
        Capacity(num_slots=blocks * size, max_model_len=max_model_len, num_blocks=blocks),
        block_size=size,
        watermark=config.get("watermark", (config["watermark_blocks"] + 0.5) / blocks),
        num_host_blocks=config["num_cpu_blocks"],
    )
    assert memory.watermark_blocks == config["watermark_blocks"]
    return memory


class ManagerDriver:
    """Performs the operations of a block manager file on the paged allocator."""

    gave_up = False

    def __init__(self, config: Row) -> None:
        self.memory = self._build(config)
        self.has_host = config["num_cpu_blocks"] > 0
        self.groups: dict[str, Request] = {}
        self.swapped: set[str] = set()
        self.names: dict[Sequence, int] = {}
        self.copies = 0

    def _build(self, config: Row) -> PagedAllocator:
        return build_memory(config, ENDLESS)

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One operation: what it returns, and the state afterwards."""
        arguments = {name: value for name, value in op.items() if name != "op"}
        self._check(op)
        return getattr(self, op["op"])(**arguments), self.state()

    def _check(self, op: Row) -> None:
        """Raises Misuse if a group or a sequence is not there, or is there already."""
        group, there = op["g"], op["g"] in self.groups
        if there is (op["op"] == "alloc"):
            raise Misuse(f"group {group} is {'there already' if there else 'not there'}")
        names = [self.names[each] for each in self.groups[group].sequences] if there else []
        asked = {name: op[name] for name in ("s", "parent") if there and name in op}
        for name in asked.values():
            if name not in names:
                raise Misuse(f"sequence {name} is not in group {group}")
        if op["op"] == "append" and not set(map(str, names)) <= op["tokens"].keys():
            raise Misuse(f"got tokens for {', '.join(op['tokens'])}, and group {group} has {names}")
        if op["op"] in ("append", "swap_out") and group in self.swapped:
            raise Misuse(f"group {group} is swapped out")
        if op["op"] == "swap_in" and group not in self.swapped:
            raise Misuse(f"group {group} is not swapped out")

    def alloc(self, g: str, s: int, tokens: list[int]) -> Row:
        request = Request(len(self.names), 0, len(tokens), ENDLESS)
        request.status = "running"
        admission = self.memory.admission(request, len(tokens))
        if admission is Admission.OK:
            sequence = Sequence(request, 0, 0, ENDLESS)
            self.memory.admit(sequence, len(tokens))
            request.sequences.append(sequence)
            self.groups[g] = request
            self.names[sequence] = s
        return {"status": admission.name}

    def fork(self, g: str, parent: int, child: int) -> Row:
        request = self.groups[g]
        branch = fork(self.memory, self._branch(request, parent))
        request.sequences.append(branch)
        self.names[branch] = child
        return {}

    def append(self, g: str, tokens: dict[str, int]) -> Row:
        request = self.groups[g]
        if not self.memory.can_append(request):
            return {"ok": False}
        copied = [sequence for sequence in request.sequences if self.memory.append(sequence)]
        for sequence in request.sequences:
            sequence.origin += 1
            self.memory.num_tokens += 1
        self.copies += len(copied)
        return {"ok": True, "cow": len(copied), "cow_seqs": [self.names[sequence] for sequence in copied]}

    def finish(self, g: str, s: int) -> Row:
        request = self.groups[g]
        sequence = self._branch(request, s)
        self.memory.free(sequence)
        request.sequences.remove(sequence)
        if not request.sequences:
            del self.groups[g]
            self.swapped.discard(g)
        return {}

    def swap_out(self, g: str) -> Row:
        if not self.memory.can_swap_out(self.groups[g]):
            return {"ok": False}
        self.swapped.add(g)
        return {"ok": True, "blocks": self.memory.swap_out(self.groups[g])}

    def swap_in(self, g: str) -> Row:
        admission = self.memory.swap_in_admission(self.groups[g])
        if admission is not Admission.OK:
            return {"status": admission.name}
        self.swapped.discard(g)
        return {"status": "OK", "blocks": self.memory.swap_in(self.groups[g])}

    def check_integrity(self) -> None:
        """The allocator's books."""
        self.memory.check_integrity()

    def _branch(self, request: Request, name: int) -> Sequence:
        return next(sequence for sequence in request.sequences if self.names[sequence] == name)

    def _tables(self, swapped: bool) -> dict[str, list[int]]:
        return canonical(
            {
                str(self.names[sequence]): sequence.block_table
                for group, request in self.groups.items()
                if (group in self.swapped) is swapped
                for sequence in request.sequences
            }
        )

    def state(self) -> Row:
        device, host = self.memory.pool, self.memory.host_pool
        seen = {
            "free_gpu": device.num_free, "used_gpu": device.num_used,
            "free_cpu": host.num_free, "used_cpu": host.num_used,
            "tables": self._tables(swapped=False), "ref_hist": histogram(device.references),
            "cow_total": self.copies,
        }  # fmt: skip
        if self.has_host:
            seen |= {"cpu_tables": self._tables(swapped=True), "cpu_ref_hist": histogram(host.references)}
        return seen


class _ToldMemory(CachedPagedAllocator):
    """V0's caching where every token is told as it comes, the generated ones too, and the caller says who runs.

    In a run nobody knows what is generated before its holder leaves, and all that run take part in every step; so
    blocks get their keys, their flags and the times of their use then. Here they get them with every token, as in V0.
    """

    def __init__(
        self, capacity: Capacity, *, block_size: int, watermark: float, num_host_blocks: int
    ) -> None:
        super().__init__(
            capacity, block_size=block_size, watermark=watermark, num_host_blocks=num_host_blocks
        )
        self.told: dict[tuple[Request, int], list[int]] = {}  # tokens by branch
        self._names: dict[tuple[int, ...], int] = {}

    def _name_of(self, tokens: list[int]) -> int:
        return self._names.setdefault(tuple(tokens), len(self._names))

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[int]:
        tokens, size = self.told[sequence.request, sequence.branch], self.block_size
        return [self._name_of(tokens[: (index + 1) * size]) for index in range(num_blocks)]

    def _tail_key(self, request: Request, num_tokens: int) -> int | None:
        return self._name_of(self.told[request, 0][:num_tokens])

    def _key_to_move(self, source: HashedPool, block: int, whole: bool) -> Hashable | None:
        return super()._key_to_move(source, block, whole=True)  # V0 minds not who has written on in it

    def _last_use(self, sequence: Sequence) -> int:
        return UNUSED  # its blocks have the times of their use already

    def take_part(self, sequence: Sequence, now: int) -> None:
        """A sequence ran in a step: its blocks were used, and the full ones but the last are computed."""
        for block in sequence.block_table:
            self.pool.last_accessed[block] = now
        self._flag(sequence, sequence.num_tokens // self.block_size)

    def append_told(self, sequence: Sequence) -> int:
        """Give the next token its slot, and the block that it fills its key; the number of blocks copied."""
        size, pool, table = self.block_size, self.pool, sequence.block_table
        index, offset = divmod(sequence.num_tokens, size)
        if offset < size - 1:
            copied = self.append(sequence)
            sequence.origin += 1
            self.num_tokens += 1
            return copied
        key = self._name_of(self.told[sequence.request, sequence.branch][: (index + 1) * size])
        self._count(sequence, -1)
        copied = 0
        if index == len(table):
            table.append(pool.obtain(key))
            sequence.capacity += size
        else:
            last = table[-1]
            copied = int(pool.references[last] > 1)
            if copied:
                table[-1] = pool.obtain(key)
                pool.release((last,), index)
            else:
                table[-1] = pool.promote(last, key, index)
            if table[-1] != last:
                self._part(sequence, last, index)
        self._tails.pop(sequence, None)
        sequence.origin += 1
        self._count(sequence, 1)
        return copied


class CachedManagerDriver(ManagerDriver):
    """Performs the operations of a block manager file with prefix caching on `paged` with `prefix_caching`."""

    memory: _ToldMemory

    def __init__(self, config: Row) -> None:
        super().__init__(config)
        self.clock = 0

    def _build(self, config: Row) -> PagedAllocator:
        return build_memory(config, ENDLESS, _ToldMemory)

    def alloc(self, g: str, s: int, tokens: list[int]) -> Row:
        self.clock += 1
        memory = self.memory
        request = Request(len(self.names), 0, len(tokens), ENDLESS, content=(0,), content_grain=ENDLESS)
        request.status = "running"
        admission = memory.admission(request, len(tokens))
        if admission is not Admission.OK:
            return {"status": admission.name}
        memory.told[request, 0] = list(tokens)
        sequence = Sequence(request, 0, 0, ENDLESS)
        request.sequences.append(sequence)
        self.groups[g] = request
        self.names[sequence] = s
        keys = list(memory.pool.keys)
        computed = memory.admit(sequence, len(tokens))
        reused = sum(
            keys[block] is not None and keys[block] == memory.pool.keys[block]
            for block in sequence.block_table
        )
        memory.take_part(sequence, self.clock)
        return {
            "status": "OK",
            "reused_blocks": reused,
            "computed_blocks": computed // memory.block_size,
        }

    def fork(self, g: str, parent: int, child: int) -> Row:
        super().fork(g, parent, child)
        request = self.groups[g]
        told, branch = self.memory.told, request.sequences[-1].branch
        told[request, branch] = list(told[request, self._branch(request, parent).branch])
        return {}

    def append(self, g: str, tokens: dict[str, int]) -> Row:
        self.clock += 1
        request, memory = self.groups[g], self.memory
        if not memory.can_append(request):
            return {"ok": False}
        for sequence in request.sequences:
            memory.told[request, sequence.branch].append(tokens[str(self.names[sequence])])
        copied = [sequence for sequence in request.sequences if memory.append_told(sequence)]
        for sequence in request.sequences:
            memory.take_part(sequence, self.clock)
        self.copies += len(copied)
        return {"ok": True, "cow": len(copied), "cow_seqs": [self.names[sequence] for sequence in copied]}
