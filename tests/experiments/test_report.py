"""The report: one page that stands alone, with the table, the figures and how it was run."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments.plots.stored import stored_plots
from experiments.report import write_report
from sim.errors import UserError
from tests.experiments.fake_results import QUICKSTART, Sweep, write_results

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags that open and close in order, and the text of table cells row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sweep = Sweep(QUICKSTART, {"workload.arrivals.rate": [1.0, 4.0]}, replications=2, requests=15)
    return write_results(tmp_path_factory.mktemp("results") / "made-up", sweep)


def test_the_page_stands_alone(results: Path) -> None:
    text = write_report(results).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|<script|<link|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_table_gives_means_and_intervals_of_all_points(results: Path) -> None:
    rows = Page(write_report(results).read_text(encoding="utf-8")).rows
    cells = [row for row in rows if row[:2] == ["paged 16", "4"]]
    assert len(cells) == 2  # service, memory
    stored = [
        row
        for row in pq.read_table(results / "runs.parquet").to_pylist()
        if "paged" in row["allocator"] and row["workload.arrivals.rate"] == 4
    ]
    expected = 100 * sum(row["token_states_share"] for row in stored) / len(stored)
    assert cells[1][4].startswith(f"{expected:.1f} ± ")
    headings = [row for row in rows if row[0] == "Policy"]
    assert headings[0][1:3] == ["Request raterequests/s", "Throughputrequests/s"]


def test_figures_carry_their_captions(results: Path) -> None:
    text = write_report(results).read_text(encoding="utf-8")
    for place, plot in enumerate(stored_plots(results), 1):
        assert f"<b>Figure {place}. {plot.title}.</b> {plot.caption}</figcaption>" in text


def test_it_tells_how_it_was_run(results: Path) -> None:
    text = write_report(results).read_text(encoding="utf-8")
    rows = {row[0]: row[1] for row in Page(text).rows if len(row) == 2}
    assert rows["Swept"] == "Request rate (requests/s): 1, 4"
    assert rows["Versions"].startswith("kvsim 0.1.0+made-up, python ")
    assert rows["KV memory"] == "15,728 slots"
    assert rows["Seed"] == "0"
    assert rows["Replications"] == "2"
    assert "allocator.reserve: max" in rows["contiguous max"]
    assert "\n  step_overhead_ms: 20.0" in text
    assert "rate: " not in text.split("<pre>")[1]  # swept, so not shared


def test_it_opens_with_the_experiment_s_own_purpose(tmp_path: Path) -> None:
    results = write_results(tmp_path / "a", Sweep(requests=3, record=()))
    assert "One run of paged 16." in write_report(results).read_text(encoding="utf-8")
    file = next(results.glob("*/manifest.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"purpose": "Shows <that> & more."}))
    text = write_report(results).read_text(encoding="utf-8")
    assert "Shows &lt;that&gt; &amp; more." in text


def test_figures_older_than_the_runs_are_drawn_again(tmp_path: Path) -> None:
    results = write_results(tmp_path / "a", Sweep(requests=3, record=()))
    write_report(results)
    figure = stored_plots(results)[0].path
    fresh = figure.stat().st_mtime_ns
    write_report(results)
    assert figure.stat().st_mtime_ns == fresh
    later = (results / "runs.parquet").stat().st_mtime + 5
    os.utime(results / "runs.parquet", (later, later))
    write_report(results)
    assert figure.stat().st_mtime_ns != fresh


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runs\.parquet is missing"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    results = write_results(tmp_path / "a", Sweep(requests=3, record=()))
    (results / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        write_report(results)
