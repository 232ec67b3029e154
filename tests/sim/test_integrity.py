"""Wrong books are found: `check_integrity` names the equation that failed."""

from __future__ import annotations

import pytest

from sim import Capacity, IntegrityError, Request, Sequence, allocator
from sim.allocators.base import Allocator
from sim.beams import fork


def admit(memory: Allocator, number: int, prompt: int, output: int) -> Sequence:
    request = Request(number, 0, prompt, output)
    sequence = Sequence(request, 0, 0, prompt + output - 1)
    request.sequences.append(sequence)
    memory.admit(sequence, prompt)
    return sequence


def paged() -> tuple[Allocator, Sequence, Sequence]:
    """Ten blocks of four slots: 0 holds two, 1 holds one; nobody shares."""
    memory = allocator["paged"](Capacity(num_slots=42, max_model_len=32), block_size=4)
    sequences = admit(memory, 0, 6, 10), admit(memory, 1, 3, 1)
    memory.check_integrity()
    return memory, *sequences


def contiguous() -> tuple[Allocator, Sequence, Sequence]:
    """0 takes slots 0 to 15, 1 the four from 16 on."""
    memory = allocator["contiguous"](Capacity(num_slots=42, max_model_len=32), reserve="oracle")
    sequences = admit(memory, 0, 6, 10), admit(memory, 1, 2, 1)
    memory.check_integrity()
    return memory, *sequences


MUTATIONS = {
    "paged: a token too many": (paged, "num_tokens += 1", r"token states\(10\) != distinct slots\(9\)"),
    "paged: a held slot too many": (paged, "num_held += 1", r"held\(13\) != recount over the block tables\(12\)"),
    "paged: internal forgotten": (
        paged, "num_internal -= 1", r"internal\(0\) != recount over the block tables\(1\)",
    ),
    "paged: a reference too many": (
        paged, "pool.references[one.block_table[0]] += 1", r"references\(2\) != tables holding it\(1\)",
    ),
    "paged: a block free and held": (
        paged, "pool.free.append(one.block_table[0])", r"used\(3\) \+ free\(8\) != total\(10\)",
    ),
    "paged: a block free twice": (
        paged, "pool.free[0] = memory.pool.free[1]", r"distinct free\(6\) != free\(7\)",
    ),
    "paged: a block lost": (paged, "pool.free.pop()", r"used\(3\) \+ free\(6\) != total\(10\)"),
    "paged: a sharing that is none": (paged, "pool.extra_references += 1", r"extra"),
    "paged: a table entry lost": (paged, "one.block_table.pop()", r"slots\(4\) != tokens\(6\)"),
    "paged: somebody else's block": (
        paged, "two.block_table[0] = one.block_table[1]", r"token states\(9\) != distinct slots\(7\)",
    ),
    "paged: a block twice in a table": (
        paged, "one.block_table[1] = one.block_table[0]", r"distinct slots\(4\) != slots\(6\)",
    ),
    "paged: a capacity without blocks": (
        paged, "one.capacity += 4", r"held\(12\) != slots of its table\(8\)",
    ),
    "paged: more tokens than slots": (paged, "two.origin = 5", r"slots\(4\) != tokens\(5\)"),
    "paged: a host block lost": (paged, "host_pool.free.pop()", r"host pool: used\(0\) \+ free\(9\) != total\(10\)"),
    "contiguous: a token too many": (contiguous, "num_tokens += 1", r"token states\(9\) != distinct slots\(8\)"),
    "contiguous: a held slot too many": (
        contiguous, "num_held += 1", r"held\(20\) != slots held by all sequences\(19\)",
    ),
    "contiguous: internal forgotten": (
        contiguous, "num_internal -= 1", r"internal\(1\) != slots that no sequence will use\(2\)",
    ),
    "contiguous: rounding forgotten": (contiguous, "_rounding = 0", r"rounding\(0\) != recount over the chunks\(1\)"),
    "contiguous: chunks that overlap": (
        contiguous, "_chunks[two] = (8, 3)", r"(distinct slots of all sequences|chunk at)\(\d+\) != .*\(\d+\)",
    ),
    "contiguous: a chunk lost": (contiguous, "_chunks[two] = (20, 3)", r"chunk at\(\d+\) != end of the chunk before"),
    "contiguous: a chunk outside": (contiguous, "_chunks[two] = (41, 3)", r"slots 0\.\.42 are not inside 0\.\.41"),
    "contiguous: a free chunk lost": (
        contiguous, "placement._free[1].clear()", r"end of the last chunk\(40\) != slots\(42\)",
    ),
    "contiguous: less held than its chunk": (
        contiguous, "num_held -= 1; memory.num_internal -= 1; one.capacity -= 1",
        r"held\(15\) != slots of its chunk\(16\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_wrong_books_are_named(mutation):
    build, statement, equation = MUTATIONS[mutation]
    memory, one, two = build()
    if not statement.startswith(("one.", "two.")):
        statement = f"memory.{statement}"
    exec(statement, {"memory": memory, "one": one, "two": two})
    with pytest.raises(IntegrityError, match=equation):
        memory.check_integrity()


@pytest.mark.parametrize("kind", allocator.kinds)
@pytest.mark.parametrize(
    ("counter", "change"), [("num_tokens", 1), ("num_held", 3), ("num_held", -3), ("num_internal", -1)]
)
def test_every_allocator_guards_its_counters(kind, counter, change):
    memory = allocator[kind](Capacity(num_slots=256, max_model_len=32))
    admit(memory, 0, 6, 10)
    admit(memory, 1, 3, 1)
    memory.check_integrity()
    setattr(memory, counter, getattr(memory, counter) + change)
    with pytest.raises(IntegrityError):
        memory.check_integrity()


def test_a_missing_copy_on_write_shows():
    """Two branches that write their next token into the block that they share."""
    memory = allocator["paged"](Capacity(num_slots=40, max_model_len=32), block_size=4)
    parent = admit(memory, 0, 6, 10)
    child = fork(memory, parent)
    parent.request.sequences.append(child)
    memory.check_integrity()
    for sequence in (parent, child):  # no append() before
        sequence.origin += 1
        memory.num_tokens += 1
    with pytest.raises(IntegrityError, match=r"token states\(8\) != distinct slots\(7\)"):
        memory.check_integrity()


def test_a_swapped_sequence_is_still_accounted_for():
    memory, one, _ = paged()
    memory.swap_out(one.request)
    memory.check_integrity()
    memory.host_pool.references[one.block_table[0]] = 0
    with pytest.raises(IntegrityError, match=r"host block \d+: references\(0\) != tables holding it\(1\)"):
        memory.check_integrity()
