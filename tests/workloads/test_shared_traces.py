"""Real traces, where they are at hand: the statistics that their description states."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from workloads import Empirical, Mooncake, Streams, Trace, TraceFormat, trace_format

SHARED = Path(__file__).parents[2] / os.environ.get("KVSIM_SHARED", "../shared")
Tokens = NDArray[np.int64]


def shared(name: str) -> Path:
    """A file of the shared data; skips the test where it is absent."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"needs {name} in the shared data: set KVSIM_SHARED to its folder")
    return path


def columns(kind: str | TraceFormat, path: Path) -> tuple[Tokens, Tokens, Tokens]:
    """Arrival times, prompts and outputs of a whole trace."""
    reader = trace_format[kind]() if isinstance(kind, str) else kind
    parts = [(rows.arrival_time, rows.prompt_tokens, rows.output_tokens) for rows in reader.read(path)]
    times, prompts, outputs = map(np.concatenate, zip(*parts, strict=True))
    return times, prompts, outputs


def assert_like(tokens: Tokens, mean: float, deviation: float, *percentiles: float) -> None:
    """Mean, standard deviation, percentiles 5, 50, 95 and 99, as far as they are printed."""
    assert tokens.mean() == pytest.approx(mean, rel=2e-3, abs=0.05)
    assert tokens.std() == pytest.approx(deviation, rel=2e-3, abs=0.05)
    assert np.percentile(tokens, [5, 50, 95, 99]) == pytest.approx(percentiles, rel=1e-3, abs=0.5)


def test_azure_code() -> None:
    times, prompts, outputs = columns("azure", shared("traces/AzureLLMInferenceTrace_code_2023.csv"))
    assert len(times) == 8819
    assert_like(prompts, 2048, 1974, 75, 1469, 7303, 7436)
    assert_like(outputs, 27.9, 59.9, 6, 13, 90, 251)
    gaps = np.diff(times) / 1e9
    assert 1 / gaps.mean() == pytest.approx(2.567, rel=1e-3)
    assert gaps.std() / gaps.mean() == pytest.approx(13.2, rel=5e-3)
    seconds = (times - times[0]) / 1e9
    for window, dispersion in ((1, 13.2), (10, 71), (60, 161)):
        counts = np.bincount((seconds / window).astype(np.int64))[: int(seconds[-1] / window)]
        assert counts.var() / counts.mean() == pytest.approx(dispersion, rel=0.05)


def test_azure_code_as_a_workload() -> None:
    path = shared("traces/AzureLLMInferenceTrace_code_2023.csv")
    requests = list(Trace(Streams(0), 8192, path=path, format="azure", rate=10.0).requests())
    assert len(requests) == 8819
    assert [request.id for request in requests] == list(range(8819))
    assert requests[0].arrival_time == 0
    assert requests[-1].arrival_time == pytest.approx(881.8e9, rel=1e-9)
    assert (requests[0].prompt_tokens, requests[0].output_tokens) == (4808, 10)
    assert (requests[-1].prompt_tokens, requests[-1].output_tokens) == (549, 173)


def test_mooncake_conversation() -> None:
    path = shared("traces/mooncake_conversation_trace.jsonl")
    times, prompts, outputs = columns("mooncake", path)
    assert len(times) == 12_031
    assert_like(prompts, 12_035, 15_800, 901, 6909, 39_551, 85_400)
    assert_like(outputs, 343, 250, 10, 350, 698, 1119)
    quantum = 3_000_000_000
    assert abs(times - np.rint(times / quantum) * quantum).max() <= 3_000_000
    blocks, hits, seen = 0, 0, set()
    for request in Trace(Streams(0), 131_072, path=path, format="mooncake").requests():
        assert request.content is not None
        assert len(request.content) == -(-request.prompt_tokens // 512)
        blocks += len(request.content)
        hits += sum(block in seen for block in request.content)
        seen.update(request.content)
    assert hits / blocks == pytest.approx(0.3664, abs=5e-5)  # of an infinite cache


def test_mooncake_spread_over_its_tick_is_no_longer_bursty() -> None:
    path = shared("traces/mooncake_conversation_trace.jsonl")
    raw, prompts, _ = columns("mooncake", path)
    times, spread_prompts, _ = columns(Mooncake(spread_ms=3000), path)
    assert prompts.tolist() == spread_prompts.tolist()
    assert (np.diff(times) >= 0).all()
    assert (times >= raw).all()
    assert (times - raw).max() < 3_000_000_000
    raw_gaps, gaps = np.diff(raw), np.diff(times)
    assert raw_gaps.std() / raw_gaps.mean() > 2.5
    assert gaps.std() / gaps.mean() < 0.5


def test_arena_replay() -> None:
    times, prompts, outputs = columns("csv", shared("traces/vtc_arena_replay_10min.csv"))
    assert len(times) == 1500
    assert_like(prompts, 136, 206, 2, 40, 653, 902)
    assert_like(outputs, 256, 207, 10, 211, 513, 785)
    assert times[-1] / 1e9 == pytest.approx(600, abs=5)


@pytest.mark.parametrize(
    ("name", "count", "prompt", "output"),
    [
        (
            "sarathi_sharegpt_8k_llama2.csv",
            30_731,
            (2340, 2089, 29, 1730, 6563, 7434),
            (439, 266, 44, 415, 920, 998),
        ),
        (
            "vidur_arxiv_summarization_llama2.csv",
            28_257,
            (2588, 945, 749, 2730, 3813, 3933),
            (291, 531, 60, 167, 736, 3271),
        ),
    ],
)
def test_recorded_lengths(name: str, count: int, prompt: Any, output: Any) -> None:
    sampler = Empirical(path=shared(f"traces/{name}"))
    assert len(sampler.prompts) == count
    assert_like(sampler.prompts, *prompt)
    assert_like(sampler.outputs, *output)
    prompts, outputs = sampler.sample(Streams(0)("lengths"), 200_000, 8192)
    assert prompts.mean() == pytest.approx(sampler.prompts.mean(), rel=0.01)
    assert np.corrcoef(prompts, outputs)[0, 1] == pytest.approx(
        np.corrcoef(sampler.prompts, sampler.outputs)[0, 1], abs=0.01
    )


def test_gzipped_lengths() -> None:
    assert len(Empirical(path=shared("traces/sharegpt_turns_derived.csv.gz")).prompts) == 30_731


def test_sharegpt_prompts_are_as_wide_as_first_turns() -> None:
    path = shared("traces/sharegpt_turns_derived.csv.gz")
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    turn, prompts, outputs = table[:, 1], table[:, 3], table[:, 4]
    first = prompts[(turn == 0) & (prompts + outputs <= 2048)]
    assert np.log(first).std() == pytest.approx(1.28, abs=0.01)
    assert first.mean() == pytest.approx(161.31, rel=0.02)


def test_recorded_runs_of_other_tools() -> None:
    for name, reader, count in (
        ("parity/aisimulate/logn_1000.jsonl", Mooncake(block_size=16), 1000),
        ("parity/vidur/workload_n1000_qps12.csv", "vidur", 1000),
        ("vllm_runs/workload_sharegpt300_llama31_blksz16.jsonl", "jsonl", 300),
    ):
        times, _, _ = columns(reader, shared(name))
        assert len(times) == count
