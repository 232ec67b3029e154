"""Calibration: made-up clocks that follow a law, and a grid small enough to be measured for real."""

from __future__ import annotations

import itertools
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from attention.calibration import calibrate as calibration
from attention.calibration import measuring
from attention.calibration.calibrate import calibrate, fitted, measure
from attention.calibration.fitting import predict
from attention.calibration.grid import GRIDS, TERMS, cases
from attention.calibration.measuring import Stopwatch, find_device, rotations, seconds
from attention.calibration.refining import MIN_STEPS, Refinement
from attention.calibration.trials import Bench, Heads, StepTimer, layer_weights, ragged, time_step
from attention.functional import paged_attention
from sim.errors import UserError
from sim.timing.profile import DecodeCost

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 8)
TINY = replace(
    GRIDS["cpu", True], heads=((4, 2, 8),), batches=(1, 3), contexts=(8, 24), block_sizes=(4, 16), prompts=(1, 2),
    prompt_tokens=(4, 8), prompt_contexts=(0, 16), hidden_sizes=(16, 32), tokens=(1, 4, 16), between=(8,),
    moved_blocks=(1, 4), moved_block_sizes=(4,), moved_layers=(1, 2), max_kv_bytes=1 << 20, passes=1,
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(measuring, "CPU_CACHE_BYTES", 1 << 18)
    return Bench(CPU, torch.float32, 1 << 20)


# Trials


def test_the_trials_compute_attention(bench, monkeypatch):
    """Each call of a rotation is real attention, through tables of its own."""
    monkeypatch.setattr("attention.calibration.trials.rotations", lambda size, device: 3)
    outs = [call() for call in bench.attention([9, 5, 12], 4, HEADS)]
    assert [out.shape for out in outs] == [(3, 4, 8)] * 3
    assert not torch.equal(outs[0], outs[1])
    (chunk, *_) = bench.attention([9, 5], 4, HEADS, [3, 5])
    assert chunk().shape == (8, 4, 8)
    assert chunk().isfinite().all()


def test_block_tables_differ_within_a_table_and_between_tables(bench):
    tables = bench.tables([9, 5, 12], 4, 100, 3)
    assert [table.shape for table in tables] == [(3, 3)] * 3
    used = [[*table[0, :3].tolist(), *table[1, :2].tolist(), *table[2, :3].tolist()] for table in tables]
    assert len({*itertools.chain(*used)}) == 24
    with pytest.raises(ValueError, match="got 8 blocks in all, expected at most 7"):
        bench.tables([9, 5, 12], 4, 7, 1)


def test_lengths_of_a_batch_are_ragged_around_their_mean():
    assert ragged(1, 100) == [100]
    lengths = ragged(32, 1000)
    assert sum(lengths) == pytest.approx(32 * 1000, rel=0.001)
    assert (min(lengths), max(lengths)) == (900, 1100)
    assert lengths == ragged(32, 1000)


def test_a_rotation_exceeds_the_cache_twice():
    size = measuring.cache_bytes(CPU)
    assert rotations(size // 2, CPU) == 4
    assert rotations(3 * size, CPU) == 1
    assert rotations(1, CPU) == measuring.MAX_ROTATIONS


def test_moves_move_blocks(bench):
    before = [cache.clone() for cache in bench.caches(4, HEADS)]
    for call in bench.moves("swap_in", 4, 4, HEADS, 2):
        call()
    zeros = [(cache == 0).all(dim=(1, 2, 3)).sum() for cache in bench.caches(4, HEADS)]
    assert [int(count) % 8 for count in zeros] == [0, 0]
    assert all(zeros)
    assert not all(map(torch.equal, before, bench.caches(4, HEADS)))


def test_a_layer_of_llama_3_8b_has_the_weights_of_ours():
    """218e6 weights in attention and MLP of a layer of hidden size 4096."""
    assert sum(rows * columns for rows, columns in layer_weights(4096)) == pytest.approx(218e6, rel=0.001)


# Stopwatch


def test_the_stopwatch_takes_all_calls_in_turn(monkeypatch):
    """A clock that only the calls move: 1, 2 and 3 seconds."""
    now, said = [0.0], []
    monkeypatch.setattr(measuring.time, "process_time", lambda: now[0])

    def call(number):
        def step():
            said.append(number)
            now[0] += number

        return step

    watch = Stopwatch([call(1), call(2), call(3)], CPU)
    assert said == [1, 1]  # the warm-up, and a first look at how long a call takes
    assert [watch.lap() for _ in range(4)] == [2, 3, 1, 2]
    assert seconds([call(1), call(2), call(3)], CPU, rounds=3) == 2


def test_short_calls_are_timed_many_at_once(monkeypatch):
    now, count = [0.0], [0]
    monkeypatch.setattr(measuring.time, "process_time", lambda: now[0])

    def call():
        count[0] += 1
        now[0] += 1e-5

    watch = Stopwatch([call], CPU)
    count[0] = 0
    assert watch.lap() == pytest.approx(1e-5)
    assert count[0] == pytest.approx(measuring.LAP_S["cpu"] / 1e-5, rel=0.01)


class FakeGPU:
    """The parts of torch.cuda that the stopwatch uses, for a GPU whose clock only calls move.

    A call that is captured takes no time until its graph is replayed.
    """

    def __init__(self, call_s: float, launch_s: float) -> None:
        self.now, self.call_s, self.launch_s = 0.0, call_s, launch_s
        self.graphs: list[FakeGPU.Graph] = []
        self.capturing: FakeGPU.Graph | None = None
        self.calls: list[int] = []

    class Graph:
        def __init__(self, gpu):
            self.gpu, self.held = gpu, []

        def replay(self):
            self.gpu.now += self.gpu.call_s * len(self.held)

    class Event:
        def __init__(self, gpu):
            self.gpu = gpu

        def record(self):
            self.at = self.gpu.now

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    def call(self, number: int):
        def step():
            if self.capturing is not None:
                self.capturing.held.append(number)
            else:
                self.calls.append(number)
                self.now += self.call_s + self.launch_s

        return step

    def patch(self, monkeypatch) -> None:
        @contextmanager
        def graph(made):
            self.capturing = made
            yield
            self.capturing = None
            self.graphs.append(made)

        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(measuring.torch, "cuda", SimpleNamespace(
            Stream=lambda device: stream, current_stream=lambda device: stream, stream=lambda made: nullcontext(),
            device=lambda device: nullcontext(), synchronize=lambda device: None, graph=graph,
            CUDAGraph=lambda: FakeGPU.Graph(self), Event=lambda enable_timing: FakeGPU.Event(self),
        ))  # fmt: skip


def test_on_a_gpu_launches_do_not_show(monkeypatch):
    """64 different calls of 2 us, each 5 us to launch: one graph of all of them, as often as a round is long."""
    gpu = FakeGPU(2e-6, 5e-6)
    gpu.patch(monkeypatch)
    calls = [gpu.call(number) for number in range(64)]
    watch = Stopwatch(calls, torch.device("cuda", 0))
    assert watch.median() == pytest.approx(2e-6)
    (graph,) = gpu.graphs
    assert {*graph.held} == {*range(64)}
    slow = Stopwatch([gpu.call(0)], torch.device("cuda", 0), capturable=False)
    assert slow.median() == pytest.approx(7e-6)
    assert slow.number >= measuring.CALLS_IN_GRAPH
    assert len(gpu.graphs) == 1


def test_on_a_gpu_a_round_of_long_calls_is_short(monkeypatch):
    gpu = FakeGPU(0.02, 0.0)
    gpu.patch(monkeypatch)
    assert Stopwatch([gpu.call(0)], torch.device("cuda", 0)).number == 3


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=f"device: got '{name}', expected auto, cpu, or a GPU"):
        find_device(name)


# Calibration


def test_a_device_that_follows_the_law_is_fitted_exactly(bench, monkeypatch):
    """Every case takes what known coefficients say; the profile has them, and its held-back errors are 0."""
    law = DecodeCost(base_us=3, us_per_sequence=2, ns_per_block=50, ms_per_kv_gb=300, ms_per_tflop=0)
    wanted = [case for case in cases(TINY, bench) if case.term == "decode"]
    assert 0 < sum(case.held_back for case in wanted) < len(wanted) / 2
    coefficients = {name: getattr(law, name) for name in wanted[0].amounts}
    measured = [(case, predict(coefficients, [case.observed(0)])[0]) for case in wanted]
    found, told, lines = fitted("decode", measured)
    assert predict(found, [case.observed(0) for case in wanted]) == pytest.approx(
        [taken for _, taken in measured], rel=2e-3
    )
    assert told["held_back"]["max_error"] < 2e-3
    assert told["fitted"]["cases"] + told["held_back"]["cases"] == len(wanted) == len(lines)
    assert lines[0].startswith("batch 1, context 8, block 4, heads 4/2x8 = ")


def test_held_back_cases_do_not_bend_the_fit(bench):
    """Those that the fit never sees take ten times as long: the errors say so, the coefficients do not change."""
    wanted = [case for case in cases(TINY, bench) if case.term == "copy"]
    plain = [(case, 1e-6 * (1 + case.amounts["us_per_block"] * 1e6)) for case in wanted]
    slow = [(case, taken * (10 if case.held_back else 1)) for case, taken in plain]
    assert fitted("copy", plain)[0] == fitted("copy", slow)[0]
    assert fitted("copy", slow)[1]["held_back"]["median_error"] == pytest.approx(0.9, abs=0.01)


def test_the_dense_curve_is_that_of_the_clock(bench):
    """1 us a layer, and 4 us per million weights and token from 4 tokens on; between 4 and 16, 8 are on the line."""
    wanted = [case for case in cases(TINY, bench) if case.term == "dense"]

    def taken(case):
        tokens = int(case.name.split()[0])
        weights = sum(case.amounts.values()) - 1e-6
        return 1e-6 + weights / 1e-12 * 4e-12 * max(4, tokens)

    cost, told, _ = fitted("dense", [(case, taken(case)) for case in wanted])
    assert cost["base_us"] == pytest.approx(1, rel=0.01)
    assert cost["ms_per_billion_weights"] == pytest.approx({"1": 16, "4": 16, "16": 64}, rel=0.01)
    assert told["held_back"]["max_error"] < 0.01


def test_passes_go_through_all_cases_and_their_median_counts(bench, monkeypatch):
    laps = iter([1.0, 10.0, 3.0, 30.0, 2.0, 50.0])
    monkeypatch.setattr(calibration.Stopwatch, "lap", lambda self: next(laps))
    wanted = list(cases(TINY, bench))[:2]
    seen = []
    measured = measure(wanted, CPU, 3, lambda done, number: seen.append((done, number)))
    assert [taken for _, taken in measured] == [2.0, 30.0]
    assert seen[-1] == (6, 6)


def test_a_tiny_grid_measured_for_real(monkeypatch):
    monkeypatch.setattr(measuring, "bandwidths", lambda device: (2e10, 1e10))
    profile = calibrate("cpu", grid=TINY)
    assert profile["kind"] == "cpu"
    assert profile["dtype"] == "float32"
    assert (profile["copy_gb_per_s"], profile["read_gb_per_s"]) == (20, 10)
    for term in TERMS:
        assert profile["fit"][term]["held_back"]["median_error"] < 100
        assert len(profile["residuals"][term]) == sum(part["cases"] for part in profile["fit"][term].values())
    assert profile["grid"]["heads"] == ["4/2x8"]
    errors = profile["quantization"]
    for figure in ("value_error", "attention_error"):
        assert 0 < errors["int8"][figure] < errors["fp8"][figure] < errors["int4"][figure]
    assert all(0.5 < figures["bound_share"] <= 1 for figures in errors.values())
    assert errors["int8"]["value_error"] < 6 / 254  # no K or V is 6 times the standard deviation


# Refining


def observed(cost: DecodeCost | None, true: DecodeCost, steps: int) -> Refinement:
    """A refinement that was told of steps which take what `true` says."""
    refinement = Refinement(16, HEADS, 4, cost)
    for step in range(steps):
        seq_lens = [5 + 7 * ((step + place) % 13) for place in range(1 + step % 5)]
        refinement.observe(seq_lens, Refinement(16, HEADS, 4, true).predicted(seq_lens))
    return refinement


def test_a_refined_cost_predicts_the_steps_of_its_run():
    true = DecodeCost(base_us=20, us_per_sequence=3, ms_per_kv_gb=500)
    refinement = observed(DecodeCost(base_us=10, us_per_sequence=1.5, ms_per_kv_gb=250), true, 40)
    report = refinement.report()
    assert report.steps == 40
    assert report.before.median == pytest.approx(0.5)
    assert report.after.largest < 0.05
    assert report.cost.base_us == pytest.approx(20, rel=0.1)
    assert report.figures()["attention_error_before_median"] == report.before.median


def test_without_a_profile_the_steps_alone_are_fitted():
    report = observed(None, DecodeCost(base_us=20, us_per_sequence=3), 40).report()
    assert report.before is None
    assert report.after.largest < 1e-6
    assert report.cost.us_per_sequence == pytest.approx(3)


def test_too_few_steps_refine_nothing():
    cost = DecodeCost(base_us=10)
    report = observed(cost, DecodeCost(base_us=20), MIN_STEPS - 1).report()
    assert report.before.median == pytest.approx(0.5)
    assert report.after is None
    assert report.cost == cost
    empty = Refinement(16, HEADS).report()
    assert (empty.steps, empty.before, empty.after, empty.cost) == (0, None, None, None)


def test_a_step_without_decodes_says_nothing_and_one_without_time_is_wrong():
    refinement = Refinement(16, HEADS)
    refinement.observe([], 1.0)
    assert not refinement.observations
    with pytest.raises(ValueError, match="seconds: got 0"):
        refinement.observe([3], 0.0)


def test_a_step_is_timed_on_its_own_shape(monkeypatch):
    shapes = []

    def spied(q, k_cache, v_cache, block_tables, seq_lens, **options):
        shapes.append((tuple(q.shape), k_cache.shape[1:], tuple(seq_lens.tolist())))
        return paged_attention(q, k_cache, v_cache, block_tables, seq_lens, **options)

    monkeypatch.setattr("attention.calibration.trials.paged_attention", spied)
    assert time_step([5, 30, 17], 8, 4, 2, 8, "cpu") > 0
    assert {*shapes} == {((3, 4, 8), (8, 2, 8), (5, 30, 17))}
    timer = StepTimer(8, HEADS, "cpu")
    assert timer.seconds([5]) > 0
    assert timer.seconds([5] * 4000) > 0  # more than there was room for
    with pytest.raises(ValueError, match="seq_lens: got"):
        timer.seconds([])
    with pytest.raises(ValueError, match="each at least 1"):
        timer.seconds([4, 0])
