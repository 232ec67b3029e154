"""The measured turnover of beams, in small."""

from __future__ import annotations

import pytest

from attention.generation.ngram import NGram
from experiments.bench import beams as bench_beams
from workloads.sampling import measured_turnover


@pytest.mark.parametrize("width", [2, 4])
def test_the_default_turnover_is_that_of_a_real_search_and_so_is_the_saving(width, monkeypatch):
    monkeypatch.setattr(bench_beams, "SEARCHES", 60)
    text, vocab_size = bench_beams.read_text()
    model = NGram([text], bench_beams.ORDER, vocab_size)
    searches = [bench_beams.search(model, prompt, width) for prompt in bench_beams.prompts(text)]
    died = sum(search.died.total() for search in searches)
    lived = sum(search.lived.total() for search in searches)
    assert lived == 60 * width * (bench_beams.OUTPUT - 2)
    turnover = measured_turnover(width)
    assert died / lived == pytest.approx(bench_beams.modelled_deaths(width, turnover), abs=0.05)
    for ages in (range(1, 8), range(8, 32)):
        stood = sum(search.lived[age] for search in searches for age in ages)
        dead = sum(search.died[age] for search in searches for age in ages)
        expected = sum(
            search.lived[age] * turnover.young / age**turnover.decay for search in searches for age in ages
        )
        assert dead / stood == pytest.approx(expected / stood, abs=0.06)
    saved = sum(search.saved for search in searches) / sum(search.unshared for search in searches)
    assert saved == pytest.approx(bench_beams.modelled_saving(width, turnover), abs=0.03)


def test_deaths_and_savings_of_a_search_are_counted_from_its_tokens():
    """After 0 or 1 anything may come, but behind 0 the same again is far likelier: the beam of 1 dies at once."""
    text = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1, 3] * 4
    search = bench_beams.search(NGram([text], 2, 4), [0] * bench_beams.PROMPT, 2)
    assert 0 < search.died.total() <= search.lived.total() / 2
    assert 0 < search.saved < search.unshared / 2
    tokens = range(bench_beams.PROMPT + 1, bench_beams.PROMPT + bench_beams.OUTPUT)
    assert search.unshared == 2 * sum(tokens)
