"""The attention probe: sound tables pass within rounding, broken ones show in what attention computes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from attention.comparison import Comparison
from attention.probe import MAX_SEQUENCES, MAX_TOKENS, AttentionProbe
from sim import Capacity, ProbeError, Stalled, UserError, allocator, scheduler
from sim.audit.audit import Audit
from tests.sim.broken_allocators import BROKEN, Paged
from tests.sim.probing import GROUPS, requests, run
from tests.sim.story import ask, memory


@pytest.mark.parametrize("policy", scheduler.kinds)
@pytest.mark.parametrize("kind", allocator.kinds)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_every_registered_allocator_passes(kind, policy, preemption):
    for seed in range(3):
        probe = AttentionProbe(every=1)
        owner = allocator[kind](Capacity(num_slots=120, max_model_len=64))
        summary = run(owner, requests(seed, groups=kind in GROUPS), probe, policy, preemption=preemption)
        assert probe.num_samples == summary["steps"]
        assert probe.max_error is not None
        assert 0 < probe.max_error < 2e-6
        assert probe.cpu_s > 0


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 256, 512])
def test_windows_stay_small_and_reach_everything(block_size, monkeypatch):
    seen = set()
    errors = Comparison.errors

    def watch(self, windows):
        assert 1 <= len(windows) <= MAX_SEQUENCES
        assert sum(len(window.wanted) for window in windows) <= MAX_TOKENS
        for window in windows:
            assert len(window.blocks) == -(-len(window.wanted) // block_size)
            seen.update(window.wanted.tolist())
        return errors(self, windows)

    monkeypatch.setattr(Comparison, "errors", watch)
    owner = allocator["paged"](
        Capacity(num_slots=4096, max_model_len=600), block_size=block_size, watermark=0.0
    )
    run(owner, ask(*[(0, 150, 200)] * 5), AttentionProbe(every=1))
    reached = min(256, 349) if block_size > 256 else 349
    assert len(seen) > 5 * reached * 0.9


SEEN_BY_ATTENTION = (
    "NoCopyOnWrite", "EmptyCopy", "ForkOfTheWrongBranch", "NothingSwapped", "SwappedToTheWrongPlace",
    "TwoTablesOneBlock", "BlockLetGo", "TwoOnOneChunk", "ChunkThatMoves",
)  # fmt: skip


@pytest.mark.parametrize("name", SEEN_BY_ATTENTION)
def test_attention_alone_sees_what_is_wrong(name, monkeypatch):
    """With no check of the audit but those that hold up the writing, the numbers differ."""
    for check in ("_compare", "_check_books", "_check_held", "_check_disjoint", "_check_swapped"):
        monkeypatch.setattr(Audit, check, lambda *_: None)
    cls, _ = BROKEN[name]
    paged = issubclass(cls, Paged)
    for seed in range(20):
        owner = cls(Capacity(num_slots=100 if paged else 200, max_model_len=64))
        asked = requests(seed, groups=paged)
        try:
            run(owner, asked, AttentionProbe(every=1), "orca", preemption="swap" if paged else "auto")
        except ProbeError as error:
            if re.match(
                r"step \d+: sequence \d+\.\d, \d+ tokens in blocks \[[\d, ]+\]: paged attention differs from plain "
                r"attention by (\d\S+|nan), expected at most 1e-05$",
                str(error),
            ):
                return
        except (Stalled, ValueError):
            continue
    pytest.fail("never seen")


def test_the_tolerance_is_kept():
    with pytest.raises(
        ProbeError, match=r"^step 0: .* differs from plain attention by \S+, expected at most 1e-12$"
    ):
        run(memory(slots=200), requests(1), AttentionProbe(every=1, tolerance=1e-12))


def test_a_run_under_the_probe_is_repeated_exactly():
    def once() -> tuple[dict, float | None, int]:
        probe = AttentionProbe(12, samples=16)
        summary = run(memory(slots=100), requests(5, groups=True), probe)
        return summary, probe.max_error, probe.num_samples

    torch.manual_seed(1)
    first = once()
    torch.manual_seed(2)
    assert once() == first


def test_the_number_of_threads_is_left_as_it_was():
    torch.set_num_threads(2)
    try:
        run(memory(slots=100), requests(5), AttentionProbe(every=5))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "teapot"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(
        UserError, match=rf"^probe.device: got '{name}', expected auto or a device of torch: .+"
    ):
        run(memory(slots=100), requests(5), AttentionProbe(device=name))


def test_torch_is_imported_at_the_first_sample():
    program = """
import sys
from attention.probe import AttentionProbe
from tests.sim.probing import requests, run
from tests.sim.story import memory

owner = memory(slots=100)
probe = AttentionProbe()
probe.next_sample = 1 << 60
run(owner, requests(5), probe)
assert "torch" not in sys.modules
probe = AttentionProbe()
run(memory(slots=100), requests(5), probe)
assert "torch" in sys.modules
assert probe.num_samples > 2
"""
    subprocess.run([sys.executable, "-c", program], check=True)
