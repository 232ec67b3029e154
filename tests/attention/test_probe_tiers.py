"""The probe over tiers: blocks that come back from the host, a drive or a store hold what they held before."""

from __future__ import annotations

import re

import pytest

from attention.comparison import Comparison
from attention.probe import AttentionProbe
from sim import ProbeError, Recorder, simulate
from sim.audit.audit import Audit
from sim.tiers.tiered_store import TieredStore
from tests.sim.test_oracle import TIMINGS
from tests.sim.test_oracle_sessions import asked
from tests.sim.tiers import tiered, transfers


def run(probe, seed: int = 0, kind: str = "prefix 4", tiers: str = "three", policy: str = "write_through"):
    memory, over = tiered(kind, "vllm_v1", 64, tiers, {"policy": policy, "min_hits": 1})
    return simulate(
        asked(seed, "talk", True, count=24), scheduler=over, timing=TIMINGS["fixed"],
        transfers=transfers(memory), recorder=Recorder(), max_model_len=64, probe=probe,
    )  # fmt: skip


def run_all():
    for seed in range(20):
        run(AttentionProbe(every=1), seed)


@pytest.mark.parametrize("kind", ["prefix 4", "prefix 4 full and windows", "radix 4 lfu", "radix 1"])
@pytest.mark.parametrize("policy", ["write_through", "write_back", "selective"])
def test_attention_runs_over_blocks_that_went_through_every_tier(kind, policy, monkeypatch):
    gone_through = set()
    travel = Comparison._travel

    def watch(self, journey, end, first):
        gone_through.update(name for name, _ in journey.places[1:-1])
        travel(self, journey, end, first)

    monkeypatch.setattr(Comparison, "_travel", watch)
    for seed in range(4):
        probe = AttentionProbe(every=1)
        summary = run(probe, seed, kind, policy=policy)
        assert probe.num_samples == summary["steps"]
        assert probe.max_error is not None
        assert 0 < probe.max_error < 2e-6
    assert gone_through >= ({"host"} if policy == "selective" else {"host", "nvme", "remote"})


class NextSlot(TieredStore):
    """Reads the block behind the one that it looked for."""

    def _tell(self, source, blocks, tier, slots):
        if tier == "device" and len(blocks) > 1:
            blocks = [*blocks[1:], blocks[0]]
        super()._tell(source, blocks, tier, slots)


class NeverMoved(TieredStore):
    """Forgets to copy what it demotes."""

    def _tell(self, source, blocks, tier, slots):
        if source in ("device", "lifted") or tier == "device":
            super()._tell(source, blocks, tier, slots)


class WrongKey(TieredStore):
    """Names the blocks of a prompt in the wrong order."""

    def _store(self, keys, blocks, priority, source="device"):
        super()._store(keys[::-1], blocks, priority, source)


class TooLate(TieredStore):
    """Writes a plan later than it should, whatever the blocks hold by then."""

    def begin(self, now):
        pending, self._pending = self._pending, self._held if hasattr(self, "_held") else []
        self._held = pending
        self.device_keys = _Anything()
        super().begin(now)


class _Anything(list):
    def __getitem__(self, at):
        return _EQUAL


class _Equal:
    def __eq__(self, other):
        return True

    __hash__ = None


_EQUAL = _Equal()

MUTANTS = {"NextSlot": NextSlot, "NeverMoved": NeverMoved, "WrongKey": WrongKey, "TooLate": TooLate}


@pytest.mark.parametrize("kind", ["prefix 4", "prefix 4 full and windows"])
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("probe", [lambda: Audit(every=1), lambda: AttentionProbe(every=1)])
def test_a_store_that_mixes_blocks_up_is_found_out(mutant, probe, kind, monkeypatch):
    monkeypatch.setattr("tests.sim.tiers.TieredStore", MUTANTS[mutant])
    found = []
    for seed in range(4):
        try:
            run(probe(), seed, kind)
        except ProbeError as error:
            found.append(str(error))
    assert found
    assert re.search(r"expected its own content|nothing was written there", found[0])


def test_attention_alone_sees_a_slot_that_holds_another_block(monkeypatch):
    """The audit looks away; what was loaded from the wrong slot has the K and V of other tokens."""
    monkeypatch.setattr("tests.sim.tiers.TieredStore", NextSlot)
    monkeypatch.setattr(Audit, "_compare", lambda *_: None)
    with pytest.raises(ProbeError, match="paged attention differs from plain attention"):
        run_all()


def test_a_block_that_took_the_wrong_way_shows_in_attention(monkeypatch):
    """K and V are really moved: a swap-in that brings the block before puts other numbers there."""
    import attention.comparison as comparison

    last = []

    def stale(caches, kept, mapping):
        last.append([values.clone() for values in kept])
        real(caches, last[-2] if len(last) > 1 else kept, mapping)

    real = comparison.swap_in
    monkeypatch.setattr(comparison, "swap_in", stale)
    with pytest.raises(ProbeError, match="paged attention differs from plain attention"):
        run_all()
