"""vLLM V1's KV-cache manager once more, plainly: the oracle of the replay through `prefix`."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.parity.rows import Row, canonical, histogram
from experiments.parity.v1 import windows_of
from tests.experiments.keys import block_keys
from tests.sim.prefix_cache import NULL, Holding, PrefixCache


class _Request:
    """A request of a recording: its tokens, with a key for each full block, and what it holds."""

    def __init__(self, tokens: Sequence[int], cache: PrefixCache) -> None:
        self.tokens = list(tokens)
        self.keys: list[int] = []
        self.holding = Holding(len(cache.windows))
        self.preempted = False
        self.extend((), cache.block_size)

    def extend(self, tokens: Sequence[int], block_size: int) -> None:
        self.tokens += tokens
        if len(self.tokens) // block_size > len(self.keys):
            self.keys = block_keys(self.tokens, block_size, self.keys)


class ManagerDriver:
    """Performs the operations of a KV-cache manager file on a prefix cache."""

    gave_up = False

    def __init__(self, config: Row, *, keyless_first: bool) -> None:
        self.cache = PrefixCache(
            config["usable_blocks"],
            config["block_size"],
            windows=windows_of(config),
            caching=config["prefix_caching"],
            watermark_blocks=config["watermark_blocks"],
            keyless_first=keyless_first,
        )
        self.requests: dict[str, _Request] = {}

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One operation: what it returns, and the state afterwards."""
        arguments = {name: value for name, value in op.items() if name != "op"}
        return getattr(self, op["op"])(**arguments), self.state()

    def admit(self, r: str, tokens: list[int], chunk: int | None = None) -> Row:
        request = _Request(tokens, self.cache)
        out = self._start(request, chunk)
        if out["ok"]:
            self.requests[r] = request
        return out

    def _start(self, request: _Request, chunk: int | None) -> Row:
        hit, blocks = self.cache.hit(request.keys, len(request.tokens))
        now = len(request.tokens) - hit
        if chunk is not None:
            now = min(chunk, now)
        ok = self.cache.allocate(request.holding, now, request.keys, hits=blocks, watermark=True)
        return {"ok": ok, "hit_tokens": hit, "computed_now": now if ok else 0}

    def continue_prefill(self, r: str, chunk: int) -> Row:
        request = self.requests[r]
        now = min(chunk, len(request.tokens) - request.holding.computed)
        ok = self.cache.allocate(request.holding, now, request.keys)
        return {"ok": ok, "computed_now": now if ok else 0}

    def append(self, r: str, token: int) -> Row:
        request = self.requests[r]
        request.extend([token], self.cache.block_size)
        missing = len(request.tokens) - request.holding.computed
        return {"ok": self.cache.allocate(request.holding, missing, request.keys)}

    def preempt(self, r: str) -> Row:
        self.cache.release(self.requests[r].holding)
        return {}

    def resume(self, r: str, chunk: int | None = None) -> Row:
        return self._start(self.requests[r], chunk)

    def free(self, r: str) -> Row:
        self.cache.release(self.requests.pop(r).holding)
        return {}

    def probe(self, tokens: list[int]) -> Row:
        hit, _ = self.cache.hit(block_keys(tokens, self.cache.block_size), len(tokens))
        return {"hit_tokens": hit}

    def reset_prefix_cache(self) -> Row:
        return {"ok": self.cache.pool.forget_all()}

    def state(self) -> Row:
        pool = self.cache.pool
        tables = {
            f"{name}/g{group}" if len(self.cache.windows) > 1 else name: table
            for name, request in self.requests.items()
            for group, table in enumerate(request.holding.tables)
        }
        seen: Row = {
            "free": pool.num_free, "used": pool.num_used, "tables": canonical(tables),
            "ref_hist": histogram(pool.references), "hashed_blocks": pool.num_keyed,
        }  # fmt: skip
        if any(window is not None for window in self.cache.windows):
            seen["null_blocks"] = {name: table.count(NULL) for name, table in tables.items()}
        return seen

    def check_integrity(self) -> None:
        """The pool's books against the tables."""
        self.cache.pool.check_integrity(
            [block for block in table if block != NULL]
            for request in self.requests.values()
            for table in request.holding.tables
        )
