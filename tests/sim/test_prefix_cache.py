"""vLLM V1's prefix cache: its own tests told again with their numbers, and hits against their definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import IntegrityError
from sim.pools.prefix_pool import PrefixPool
from tests.sim.prefix_cache import NULL, Holding, PrefixCache


class Server:
    """Requests over one cache; a prompt is a list of block contents and a number of tokens beyond them."""

    def __init__(self, num_blocks: int = 10, block_size: int = 16, **fields) -> None:
        self.cache = PrefixCache(num_blocks, block_size, **fields)
        self.held: dict[str, tuple[Holding, list]] = {}

    def admit(self, name: str, contents: str, rest: int = 0, **fields) -> int | None:
        """Tokens hit, None if refused."""
        holding = Holding(len(self.cache.windows))
        keys = [contents[: end + 1] for end in range(len(contents))]
        tokens = len(contents) * self.cache.block_size + rest
        hit, blocks = self.cache.hit(keys, tokens)
        if not self.cache.allocate(holding, tokens - hit, keys, hits=blocks, **fields):
            return None
        self.held[name] = holding, keys
        self.check()
        return hit

    def more(self, name: str, tokens: int) -> bool:
        holding, keys = self.held[name]
        return self.cache.allocate(holding, tokens, keys)

    def free(self, name: str) -> None:
        self.cache.release(self.held.pop(name)[0])
        self.check()

    def table(self, name: str) -> list[int]:
        """Ids as vLLM has them, whose block 0 is the null block."""
        return [block + 1 for block in self.held[name][0].tables[0]]

    def queue(self) -> list[int]:
        return [block + 1 for block in self.cache.pool.free]

    def check(self) -> None:
        self.cache.pool.check_integrity(
            [block for block in table if block != NULL]
            for holding, _ in self.held.values()
            for table in holding.tables
        )


@pytest.mark.parametrize(
    ("keyless_first", "queue"),
    [(True, [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]), (False, [6, 7, 8, 9, 10, 4, 5, 3, 2, 1])],
)
def test_a_shared_prefix_and_the_order_of_eviction(keyless_first, queue):
    server = Server(keyless_first=keyless_first)
    assert server.admit("0", "abc", 7) == 0
    assert server.table("0") == [1, 2, 3, 4]
    assert server.cache.pool.num_keyed == 3
    assert server.admit("1", "abc", 5) == 48
    assert server.table("1") == [1, 2, 3, 5]
    assert server.cache.pool.references[:3] == [2, 2, 2]
    assert len(server.queue()) == 5
    server.free("0")
    server.free("1")
    assert server.queue() == queue
    assert server.admit("2", "abc", 5) == 48
    assert server.table("2")[3] == queue[0]
    server.free("2")
    first = server.queue()
    assert server.admit("3", "0123456789") == 0
    assert server.table("3") == first
    assert server.cache.pool.num_keyed == 10, "what was cached lost its keys where its block was handed out"


def test_freed_blocks_without_content_go_first():
    server = Server()
    server.admit("0", "abcde", 7)
    server.admit("1", "xyz")
    assert server.queue() == [10]
    server.free("0")
    server.free("1")
    assert server.queue() == [6, 10, 5, 4, 3, 2, 1, 9, 8, 7]
    assert server.admit("2", "ab", 3) == 32
    assert server.table("2") == [1, 2, 6]
    assert len(server.queue()) == 7


def test_a_refused_admission_leaves_everything_as_it_was():
    server = Server()
    server.admit("0", "abc")
    server.admit("1", "abcdef")
    server.free("1")
    server.admit("2", "xy")
    before = list(server.cache.pool.references), server.queue()
    assert server.cache.hit(["abcdefghi"[:end] for end in range(1, 10)], 144)[0] == 96
    assert server.admit("3", "abcdefghi") is None, "3 new, 3 hits in the queue, 5 free"
    assert (list(server.cache.pool.references), server.queue()) == before
    assert server.cache.pool.references[:6] == [1, 1, 1, 0, 0, 0]


def test_a_hit_is_not_evicted_for_its_own_request():
    server = Server(2)
    server.admit("0", "ab")
    server.free("0")
    assert server.admit("1", "ax", 0) == 16
    assert server.table("1") == [1, 2]


def test_a_reused_block_loses_its_key():
    server = Server(1)
    server.admit("0", "a")
    server.free("0")
    assert server.admit("1", "b") == 0
    server.free("1")
    assert server.admit("2", "a") == 0


def test_without_caching():
    server = Server(4, 4, caching=False)
    assert server.admit("0", "ab", 2) == 0
    server.free("0")
    assert server.admit("1", "abcd") == 0
    assert not server.more("1", 4)


def test_reset():
    server = Server()
    server.admit("0", "abc")
    assert not server.cache.pool.forget_all()
    server.free("0")
    assert server.cache.pool.forget_all()
    assert server.cache.pool.num_keyed == 0
    assert server.admit("1", "abc") == 0


def test_what_leaves_a_window_is_returned():
    """Blocks of 2, a window of 4: after 0, 4, 5, 6, 7, 11 tokens 0, 0, 1, 1, 2, 4 blocks are outside."""
    cache = PrefixCache(20, 2, windows=(4,), caching=False)
    holding = Holding(1)
    seen = []
    for step in range(12):
        cache.allocate(holding, 1, ())
        seen.append((step, holding.tables[0].count(NULL)))  # with so many computed before
    assert [seen[tokens][1] for tokens in (0, 4, 5, 6, 7, 11)] == [0, 0, 1, 1, 2, 4]


def test_a_hit_in_the_queue_counts_as_needed():
    server = Server(3)
    server.admit("0", "a")
    server.free("0")
    server.admit("1", "", 17)
    assert server.admit("2", "a", 1) is None
    server.free("1")
    assert server.admit("2", "a", 1) == 16


def test_the_whole_prompt_is_reserved_where_asked_for():
    cache = PrefixCache(10, 4)
    assert cache.allocate(Holding(1), 12, ())
    assert not cache.allocate(Holding(1), 4, (), whole=32)
    assert cache.allocate(Holding(1), 4, (), whole=28)
    windowed = PrefixCache(10, 4, windows=(8,))
    assert windowed.allocate(Holding(1), 8, (), whole=400, batched=8), (
        "a window never holds more than 5 blocks"
    )
    assert not PrefixCache(4, 4, windows=(8,)).allocate(Holding(1), 8, (), whole=400, batched=8)


def test_the_watermark_is_for_those_who_wait():
    cache = PrefixCache(4, 4, watermark_blocks=2)
    first = Holding(1)
    assert cache.allocate(first, 8, (), watermark=True)
    assert not cache.allocate(Holding(1), 4, (), watermark=True)
    assert cache.allocate(first, 8, ())


@pytest.mark.parametrize(("cached", "hit"), [("110100110111", 12), ("11010011000", 8)])
def test_a_windowed_hit_from_the_tests_of_vllm(cached, hit):
    cache = PrefixCache(20, 2, windows=(4,))
    for index, there in enumerate(cached):
        if there == "1":
            (block,) = cache.pool.take()
            cache.pool.register(block, (index, 0))
    tokens, (blocks,) = cache.hit(range(len(cached)), 2 * len(cached) + 1)
    assert tokens == 2 * hit
    assert len(blocks) == hit


@given(
    windows=st.lists(st.sampled_from([None, None, 3, 4, 8, 9, 17]), min_size=1, max_size=4),
    there=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=16),
    tokens=st.integers(1, 70),
    block_size=st.sampled_from([1, 2, 4]),
)
def test_hits_of_several_groups_by_their_definition(windows, there, tokens, block_size):
    """The longest prefix of which every group has all that the next token looks at."""
    cache = PrefixCache(80, block_size, windows=windows)
    for index, groups in enumerate(there):
        for group, cached in enumerate(groups[: len(windows)]):
            if cached:
                cache.pool.register(cache.pool.take()[0], (index, group))
    hit, blocks = cache.hit(range(len(there)), tokens)

    def fits(length: int) -> bool:
        for group, window in enumerate(windows):
            seen = length if window is None else min(length, -(-(window - 1) // block_size))
            if not all(there[index][group] for index in range(length - seen, length)):
                return False
        return True

    longest = min(len(there), (tokens - 1) // block_size)
    expected = max(length for length in range(longest + 1) if fits(length))
    assert hit == expected * block_size
    for group, found in enumerate(blocks):
        assert len(found) == expected
        window = windows[group]
        seen = expected if window is None else min(expected, -(-(window - 1) // block_size))
        for index, block in enumerate(found):
            if index >= expected - seen:
                assert cache.pool.keys[block] == (index, group)


@given(
    windows=st.lists(st.sampled_from([None, 1, 3, 8, 9]), min_size=1, max_size=3),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["admit", "more", "more", "more", "free"]), st.integers(0, 3), st.integers(1, 14)
        ),
        max_size=40,
    ),
    caching=st.booleans(),
)
def test_what_a_request_looks_at_is_there(windows, steps, caching):
    """Requests of equal content come, grow, leave and come back; nothing in a window is missing or another's."""
    cache = PrefixCache(24, 2, windows=windows, caching=caching)
    keys = range(1000)  # every request is the same endless text
    held: dict[int, Holding] = {}
    for what, name, tokens in steps:
        holding = held.get(name)
        before = list(cache.pool.free)
        if what == "admit" and holding is None:
            holding = Holding(len(windows))
            hit, hits = cache.hit(keys, tokens)
            assert hit < tokens
            if cache.allocate(holding, tokens - hit, keys, hits=hits):
                held[name] = holding
                assert holding.computed == tokens
            else:
                assert list(cache.pool.free) == before
        elif what == "more" and holding is not None:
            cache.allocate(holding, tokens, keys)
        elif what == "free" and holding is not None:
            cache.release(held.pop(name))
        for each in held.values():
            for group, (window, table) in enumerate(zip(windows, each.tables, strict=True)):
                assert len(table) == -(-each.computed // 2)
                first = 0 if window is None else max(0, each.computed - window + 1)
                assert NULL not in table[first // 2 :]
                for index, block in enumerate(table):
                    if block != NULL and caching and (index + 1) * 2 <= each.computed:
                        assert cache.pool.keys[block] == (index, group)
        tables = [
            [block for block in table if block != NULL] for each in held.values() for table in each.tables
        ]
        cache.pool.check_integrity(tables)
    for each in held.values():
        cache.release(each)
    assert cache.pool.num_free == 24


# The pool


def test_the_first_of_several_equal_blocks_is_found():
    pool = PrefixPool(4)
    one, two, three = pool.take(3)
    for block in (one, two, three):
        pool.register(block, "same")
    assert pool.find("same") == one
    pool.release([two])
    pool.release([one])
    pool.check_integrity([[three]])
    assert list(pool.free) == [3, two, one]
    pool.take(2)
    assert pool.find("same") == one
    pool.take()
    assert pool.find("same") == three
    pool.check_integrity([[0, 1, 2, 3]])


def test_or_the_newest_only():
    pool = PrefixPool(3, newest_found=True)
    one, two = pool.take(2)
    pool.register(one, "same")
    pool.register(two, "same")
    pool.check_integrity([[one, two]])
    assert pool.find("same") == two
    pool.release([two])
    pool.take(2)
    assert pool.find("same") is None, "nano-vllm forgets that the other one is there"
    pool.check_integrity([[0, 1, 2]])


def test_what_a_pool_refuses():
    pool = PrefixPool(2)
    (block,) = pool.take()
    pool.register(block, "a")
    with pytest.raises(ValueError, match="block 0 is registered already, as 'a'"):
        pool.register(block, "b")
    pool.release([block])
    with pytest.raises(ValueError, match="double free of block 0"):
        pool.release([block])
    with pytest.raises(RuntimeError, match="asked for 3 blocks, 2 of 2 are free"):
        pool.take(3)
    pool.keys[block] = "b"
    with pytest.raises(IntegrityError, match="block 0 is found as 'a', and holds 'b'"):
        pool.check_integrity([])
    pool.keys[block] = None
    with pytest.raises(IntegrityError):
        pool.check_integrity([])
