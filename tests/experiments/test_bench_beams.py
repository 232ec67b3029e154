"""The measured turnover of beams, in small."""

from __future__ import annotations

import pytest

from attention.generation.ngram import NGram
from experiments.bench import beams as bench_beams
from workloads.sampling import measured_turnover


@pytest.mark.parametrize("width", [2, 4])
def test_the_default_turnover_is_that_of_a_real_search_and_so_is_the_saving(width, monkeypatch):
    monkeypatch.setattr(bench_beams, "SEARCHES", 25)
    text, vocab_size = bench_beams.read_text()
    model = NGram([text], bench_beams.ORDER, vocab_size)
    searches = [bench_beams.search(model, prompt, width) for prompt in bench_beams.prompts(text)]
    deaths = [count for search in searches for count in search.deaths]
    assert len(deaths) == 25 * (bench_beams.OUTPUT - 2)
    assert sum(deaths) / len(deaths) / width == pytest.approx(measured_turnover(width), abs=0.04)
    saved = sum(search.saved for search in searches) / sum(search.unshared for search in searches)
    modelled = bench_beams.modelled_saving(width, measured_turnover(width))
    assert saved == pytest.approx(modelled, abs=0.06)


def test_deaths_and_savings_of_a_search_are_counted_from_its_tokens():
    """After 0 or 1 anything may come, but behind 0 the same again is far likelier: the beam of 1 dies at once."""
    text = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1, 3] * 4
    search = bench_beams.search(NGram([text], 2, 4), [0] * bench_beams.PROMPT, 2)
    assert set(search.deaths) <= {0, 1}
    assert 0 < search.saved < search.unshared / 2
    tokens = range(bench_beams.PROMPT + 1, bench_beams.PROMPT + bench_beams.OUTPUT)
    assert search.unshared == 2 * sum(tokens)
