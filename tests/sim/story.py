"""Stories: a model of ten lines, then the log of its steps, as one reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sim import Capacity, Recorder, Request, Step, Transfers, allocator, scheduler, simulate, timing
from sim.schedulers.base import Scheduler

MS = 1_000_000


class Asked:
    """A workload of given requests."""

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        clients: int | None = None,
        think_ms: float = 0,
        beams: tuple[float, int] | None = None,
    ) -> None:
        self._requests = requests
        self.clients = clients
        self.think_time = round(think_ms * MS)
        self.beams = beams

    def requests(self) -> Iterator[Request]:
        return iter(self._requests)


def ask(*rows: tuple[float, int, int], **fields: Any) -> list[Request]:
    """Requests from (arrival in ms, prompt tokens, output tokens); `fields` go to all of them."""
    return [
        Request(number, round(at * MS), prompt, output, **fields)
        for number, (at, prompt, output) in enumerate(rows)
    ]


def memory(kind: str = "paged", *, slots: int, longest: int = 64, **fields: Any):
    """An allocator over so many slots; paged in blocks of four without a watermark unless told otherwise."""
    if kind == "paged":
        fields = {"block_size": 4, "watermark": 0.0, **fields}
    return allocator[kind](Capacity(num_slots=slots, max_model_len=longest), **fields)


class Story:
    """A run that is over: a line a plan in `log`, the tables of the recorder, the summary.

    A line reads `start in ms: what happened`; `prompt 0(12)` is request 0 with 12 tokens to compute.
    """

    def __init__(
        self,
        policy: Scheduler,
        workload: Asked | list[Request],
        *,
        prefill_ms: float = 10.0,
        decode_ms: float = 1.0,
        clock: Any = None,
        stretches: bool = False,
        block_ms: float = 0.0,
        transfers: Transfers | None = None,
    ) -> None:
        if isinstance(workload, list):
            workload = Asked(workload)
        self.policy = policy
        self.log: list[str] = []
        self.chunks: dict[str, list[dict[str, np.ndarray]]] = {"requests": [], "steps": [], "memory": []}
        if not stretches:
            policy.quiet_for = lambda now: 0  # every step is planned
        next_step = policy.next_step
        policy.next_step = lambda now: self._note(now, next_step(now))
        if transfers is None:
            transfers = Transfers(None, None, 1, copy_latency_us=1e3 * block_ms)
        self.summary = simulate(
            workload,
            scheduler=policy,
            timing=clock or timing["fixed"](prefill_ms=prefill_ms, decode_ms=decode_ms),
            transfers=transfers,
            recorder=Recorder(lambda table, columns: self.chunks[table].append(columns)),
            max_model_len=policy.allocator.max_model_len,
        )
        policy.allocator.check_integrity()
        usage = policy.allocator.usage()
        assert usage.token_states == usage.reserved == usage.internal == 0, "something is still held"

    def _note(self, now: int, step: Step) -> Step:
        policy = self.policy
        fresh = {sequence.request for sequence, _, _ in step.chunks}
        decoding = [each.id for each in policy.running if each not in fresh and each.sequences[0].decodes]
        named = {
            "prompt": [f"{sequence.request.id}({tokens})" for sequence, _, tokens in step.chunks],
            "decode": sorted(decoding) if step.num_decodes else [],
            "recompute": [each.id for each in step.preempted if each.status == "waiting"],
            "swap out": [each.id for each in step.preempted if each.status == "swapped"],
            "reject": [each.id for each in step.rejected],
        }
        parts = [f"{what} {' '.join(map(str, names))}" for what, names in named.items() if names]
        parts += [f"swap in {step.swapped_in_blocks} blocks"] * bool(step.swapped_in_blocks)
        parts += [f"copy {step.copied_blocks}"] * bool(step.copied_blocks)
        if parts:
            self.log.append(f"{now / MS:g}: {', '.join(parts)}")
        policy.allocator.check_integrity()
        return step

    def column(self, table: str, name: str) -> list[Any]:
        """A recorded column; of requests in order of their ids, times in ms."""
        joined = {
            each: np.concatenate([chunk[each] for chunk in self.chunks[table]])
            for each in self.chunks[table][0]
        }
        values = joined[name]
        if table == "requests":
            values = values[np.argsort(joined["request_id"])]
        if name.endswith("time") or name == "duration":
            return [None if np.isnan(value) else round(float(value) * 1e3, 6) for value in values]
        return values.tolist()


def scheduled(kind: str, over, **fields: Any) -> Scheduler:
    """A scheduler of this kind over this memory."""
    return scheduler[kind](over, **fields)
