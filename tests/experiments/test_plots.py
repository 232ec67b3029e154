"""Figures: what was swept decides which are drawn; all are legible, labelled and complete."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from experiments.plots import merits as plots_merits
from experiments.plots import precision as plots_precision
from experiments.plots import recovery as plots_recovery
from experiments.plots import stored as plots
from experiments.plots import style as plots_style
from experiments.plots.rate import Saturation, saturation
from experiments.plots.reading import read_experiment
from experiments.plots.results import BLOCK_SIZE, Case, spread
from experiments.plots.series import Mean
from experiments.plots.shares import apart
from experiments.plots.stored import draw, stored_plots
from sim.errors import UserError
from tests.experiments.fake_results import CONTIGUOUS, ORCA, PAGED, QUICKSTART, VLLM, Sweep, write_results

RATE = "workload.arrivals.rate"
OVER_TIME = {"waste_over_time", "waste_shares", "running_batch", "latency"}
SWEEPS = {
    "policies and rates": Sweep(QUICKSTART, {RATE: [1.0, 2.0, 4.0]}, requests=20),
    "replications": Sweep(QUICKSTART, {RATE: [1.0, 4.0]}, replications=3, requests=15),
    "block sizes": Sweep({}, {"allocator.block_size": [1, 4, 16, 64, 256]}, requests=25),
    "block sizes and rates": Sweep({}, {"allocator.block_size": [8, 16], RATE: [1, 2]}, requests=20),
    "another number": Sweep(QUICKSTART, {"timing.step_overhead_ms": [1, 10, 100]}, requests=15),
    "numbers zipped": Sweep({"num_blocks": [250, 500], "scheduler.max_num_seqs": [4, 16]}, requests=15),
    "long names": Sweep(
        {},
        {"allocator": [PAGED, CONTIGUOUS], "scheduler": [VLLM, VLLM | {"preemption": "swap"}, ORCA]},
        requests=10,
    ),
    "ways to recover": Sweep(
        {}, {"allocator.block_size": [4, 16, 64], "scheduler.preemption": ["recompute", "swap"]}, requests=10
    ),
    "one run": Sweep(requests=25),
}
EXPECTED = {
    "policies and rates": OVER_TIME | {"request_rate"},
    "replications": OVER_TIME | {"request_rate"},
    "block sizes": OVER_TIME | {"block_size"},
    "block sizes and rates": OVER_TIME | {"block_size", "request_rate"},
    "another number": OVER_TIME | {"sweep_timing_step_overhead_ms"},
    "numbers zipped": OVER_TIME | {"sweep_num_blocks"},
    "long names": OVER_TIME | {"merit_bars"},
    "ways to recover": OVER_TIME | {"block_size", "recovery"},
    "one run": OVER_TIME,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Results of every sweep, made once."""
    top = tmp_path_factory.mktemp("results")
    yield {name: write_results(top / name.replace(" ", "_"), sweep) for name, sweep in SWEEPS.items()}
    shutil.rmtree(top)


@pytest.mark.parametrize("name", SWEEPS)
def test_the_sweep_decides_what_is_drawn_and_nothing_is_cut_off(made: dict[str, Path], name: str) -> None:
    with plots_style.style():
        drawings = dict(plots._drawings(read_experiment(made[name])))
        assert set(drawings) == EXPECTED[name]
        for stem, drawing in drawings.items():
            assert drawing.title
            assert drawing.caption.endswith(".")
            assert "nan" not in drawing.caption
            assert drawing.figure.get_figwidth() in (3.5, 7.0)
            check_words(drawing.figure, stem)


def test_the_caption_tells_where_swapping_begins_to_cost_less(made: dict[str, Path]) -> None:
    """Swapping costs 64 s over the block size, computing again 2 s: over the logarithm they cross at 16 * 4^(2/3)."""
    with plots_style.style():
        drawing = plots_recovery.recovery(read_experiment(made["ways to recover"]))
    assert drawing is not None
    assert "recompute costs less than vllm_v0 swap below 40.3, more above" in drawing.caption
    flat = {place: Mean(5.0, 0.0) for place in (1.0, 2.0, 3.0)}
    steep = {1.0: Mean(8.0, 0.0), 2.0: Mean(4.0, 0.0), 3.0: Mean(4.5, 0.0)}
    assert plots_recovery.crossings(flat, steep, doubled=False) == [1.75]
    assert plots_recovery.crossings(flat, flat, doubled=False) == []


def test_figures_are_stored_twice_with_their_captions(made: dict[str, Path]) -> None:
    told: list[Path] = []
    written = draw(made["policies and rates"], told.append)
    assert told == written
    assert {path.stem for path in written} == EXPECTED["policies and rates"]
    for plot in stored_plots(made["policies and rates"]):
        assert plot.caption.endswith(".")
        assert plot.path.with_suffix(".pdf").stat().st_size > 1000
        with Image.open(plot.path) as image:
            assert image.width in (3.5 * 300, 7 * 300)


def check_words(figure: Figure, name: str) -> None:
    """No text is cut off by the edge, below 8 points, or on top of another label of its kind."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    words = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    for text in words:
        assert text.get_fontsize() >= 8, f"{name}: {text.get_text()!r} is too small"
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = [
                tick.label1
                for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high and tick.label1.get_visible() and tick.label1.get_text()
            ]
            named = axis.get_label_text() or figure.get_supxlabel() or figure.get_supylabel()
            named = named or (axis is axes.yaxis and axes.get_title().endswith(")"))  # with its unit
            assert named or not any(tick.get_text()[0].isdigit() for tick in ticks), f"{name}: no label"
            assert len(ticks) <= 12, f"{name}: too many ticks"
            boxes = [tick.get_window_extent().padded(-0.5) for tick in ticks]
            for i, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[:i]), f"{name}: tick labels overlap"
        titles = [other.title for other in figure.axes if other.axison and other.title.get_text()]
        boxes = [title.get_window_extent() for title in titles]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i]), f"{name}: titles overlap"
    legends = [legend.get_window_extent() for legend in figure.legends]
    for box in legends + [axes.get_tightbbox() for axes in figure.axes if axes.axison]:
        assert box.x0 >= -1, f"{name}: cut off at the left"
        assert box.y0 >= -1, f"{name}: cut off at the bottom"
        assert box.x1 <= width + 1, f"{name}: cut off at the right"
        assert box.y1 <= height + 1, f"{name}: cut off at the top"
    for legend in legends:
        assert not any(legend.overlaps(axes.bbox) for axes in figure.axes), f"{name}: legend on top of data"


def test_drawing_again_takes_old_figures_away_but_not_others(tmp_path: Path) -> None:
    write_results(tmp_path / "a", Sweep({}, {"allocator.block_size": [8, 16]}, requests=5, record=()))
    draw(tmp_path / "a")
    mine = tmp_path / "a/plots/mine.png"
    Image.new("RGB", (3, 3)).save(mine)
    (tmp_path / "a/plots/broken.png").write_text("not an image")
    write_results(tmp_path / "b", Sweep(requests=5, record=("steps",)))
    (tmp_path / "a/plots").rename(tmp_path / "b/plots")
    left = {path.name for path in draw(tmp_path / "b")} | {"mine.png", "broken.png"}
    assert {path.name for path in (tmp_path / "b/plots").glob("*.png")} == left
    assert not (tmp_path / "b/plots/block_size.pdf").exists()
    assert [plot.path.stem for plot in stored_plots(tmp_path / "b")] == ["waste_shares", "running_batch"]


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    results = write_results(tmp_path / "a", Sweep(requests=5, record=("memory",)))
    first = {path.name: path.read_bytes() for path in draw(results)[0].parent.iterdir()}
    assert {path.name: path.read_bytes() for path in draw(results)[0].parent.iterdir()} == first


def test_tables_that_were_not_recorded_cost_only_their_figures(tmp_path: Path) -> None:
    results = write_results(tmp_path / "a", Sweep(QUICKSTART, {RATE: [1, 2]}, requests=8, record=()))
    assert {path.stem for path in draw(results)} == {"waste_shares", "request_rate"}


def test_figures_of_the_summary_survive_the_loss_of_run_folders(tmp_path: Path) -> None:
    results = write_results(tmp_path / "a", Sweep(QUICKSTART, {RATE: [1, 2]}, requests=8))
    for folder in results.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    assert {path.stem for path in draw(results)} == {"waste_shares", "request_rate"}


def test_policies_axes_and_replications_are_told_apart(made: dict[str, Path]) -> None:
    experiment = read_experiment(made["replications"])
    assert experiment.policies == ["contiguous max", "contiguous pow2", "contiguous oracle", "paged 16"]
    assert experiment.axes == {RATE: [1.0, 4.0]}
    assert experiment.reference == {RATE: 4.0}
    assert [len(case.runs) for case in experiment.cases(9)] == [3] * 4
    zipped = read_experiment(made["numbers zipped"])
    assert zipped.axes == {"num_blocks": [250.0, 500.0]}
    assert zipped.tied == {"num_blocks": ["scheduler.max_num_seqs"]}
    assert [case.label for case in zipped.cases(9)] == ["KV memory 250 blocks", "KV memory 500 blocks"]


def test_the_rate_of_sessions_is_none_of_requests(tmp_path: Path) -> None:
    """Each session is several requests: their throughput has nothing to do with that rate."""
    crossed = {"allocator": [CONTIGUOUS, PAGED], RATE: [1, 2], "workload.session": [{"kind": "agent"}]}
    experiment = read_experiment(write_results(tmp_path / "a", Sweep({}, crossed, requests=3)))
    assert list(experiment.axes) == ["workload.arrivals.session_rate"]
    assert experiment.reference == {"workload.arrivals.session_rate": 2}
    assert experiment.rate is None


def test_a_number_zipped_with_policies_is_no_axis(tmp_path: Path) -> None:
    zipped = {"allocator": [CONTIGUOUS, PAGED], "scheduler.max_num_seqs": [8, 64]}
    experiment = read_experiment(write_results(tmp_path / "a", Sweep(zipped, {RATE: [1, 2]}, requests=3)))
    assert experiment.policies == ["contiguous max", "paged 16"]
    assert list(experiment.axes) == [RATE]


def test_along_the_rate_a_second_axis_is_drawn_whole_if_there_is_room(tmp_path: Path) -> None:
    crossed = {"allocator": [CONTIGUOUS, PAGED], RATE: [1, 2], "num_blocks": [250, 500]}
    experiment = read_experiment(write_results(tmp_path / "a", Sweep({}, crossed, requests=3)))
    assert [case.label for case in experiment.series(RATE)] == [
        f"{policy}, KV memory {blocks} blocks"
        for policy in ("contiguous max", "paged 16") for blocks in (250, 500)
    ]  # fmt: skip
    assert [len(case.runs) for case in experiment.series(RATE)] == [2] * 4
    assert [case.label for case in experiment.series(RATE, 3)] == experiment.policies
    assert [case.label for case in experiment.series("num_blocks")] == experiment.policies


def test_policies_alone_are_compared_by_bars(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "a", Sweep({}, {"allocator": [CONTIGUOUS, PAGED]}, requests=20))
    table = pq.read_table(folder / "runs.parquet").to_pylist()
    for row, served in zip(table, (1.0, 2.5), strict=True):
        row |= {"request_throughput": served, "mean_running": 7.0}
    pq.write_table(pa.Table.from_pylist(table), folder / "runs.parquet")
    with plots_style.style():
        drawing = plots_merits.merit_bars(read_experiment(folder))
    assert drawing is not None
    assert [axes.get_title() for axes in drawing.figure.axes] == [
        "Throughput",
        "Mean batch",
        "Mean time to first token",
    ]
    assert "goes from 1 (contiguous max) to 2.5 requests/s (paged 16)." in drawing.caption
    assert "mean batch goes" not in drawing.caption  # it does not
    rates = write_results(
        tmp_path / "b", Sweep({}, {"allocator": [CONTIGUOUS, PAGED], RATE: [1, 2]}, requests=3)
    )
    assert plots_merits.merit_bars(read_experiment(rates)) is None  # lines show them


def test_the_error_of_a_precision_is_the_largest_of_all_its_runs(tmp_path: Path) -> None:
    crossed = {"kv_cache_dtype": ["int8", "fp8"], RATE: [1, 2]}
    folder = write_results(tmp_path / "a", Sweep({}, crossed, requests=3))
    table = pq.read_table(folder / "runs.parquet").to_pylist()
    for row, error, size in zip(table, (0.01, 0.02, 0.4, 0.3), (2048, 2048, 1024, 1024), strict=True):
        row |= {"quantization_max_error": error, "kv_bytes_per_token": size, "kv_bytes_saved_share": 0.5}
    pq.write_table(pa.Table.from_pylist(table), folder / "runs.parquet")
    with plots_style.style():
        drawing = plots_precision.precision(read_experiment(folder))
    assert drawing is not None
    assert (
        "int8 saves 50 %, attention is off by 0.02; fp8 saves 50 %, attention is off by 0.4;"
        in drawing.caption
    )


def test_means_over_a_moment_are_left_out_and_the_caption_says_so(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "a", Sweep({}, {"allocator": [CONTIGUOUS, PAGED]}, requests=3))
    table = pq.read_table(folder / "runs.parquet").to_pylist()
    for row, share in zip(table, (0.005, 0.02), strict=True):
        row["loaded_s"] = share * row["duration_s"]
    pq.write_table(pa.Table.from_pylist(table), folder / "runs.parquet")
    experiment = read_experiment(folder)
    assert [run.burst for run in experiment.runs] == [True, False]
    assert math.isnan(experiment.runs[0].figure("mean_running"))
    assert not math.isnan(experiment.runs[1].figure("free_share"))
    draw(folder)
    captions = {plot.path.stem: plot.caption for plot in stored_plots(folder)}
    assert "left out: 1 of 2 runs, whose memory was short for less than 1 % of" in captions["waste_shares"]


def test_a_figure_that_some_runs_lack_is_no_policy(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "a", Sweep({}, {BLOCK_SIZE: [8, 16]}, requests=3))
    table = pq.read_table(folder / "runs.parquet")
    told = pa.array([None, 0.01])
    pq.write_table(table.append_column("quantization_max_error", told), folder / "runs.parquet")
    experiment = read_experiment(folder)
    assert (len(experiment.policies), list(experiment.axes)) == (1, [BLOCK_SIZE])
    assert [run.summary["quantization_max_error"] for run in experiment.runs] == [None, 0.01]


def test_a_swept_seed_gives_replications(tmp_path: Path) -> None:
    experiment = read_experiment(write_results(tmp_path / "a", Sweep({}, {"seed": [0, 1, 2]}, requests=3)))
    assert experiment.axes == {}
    assert [run.replication for run in experiment.runs] == [0, 1, 2]


def rate_case(latencies: dict[float, float], tmp_path: Path) -> Case:
    rows = [
        {
            "run_id": str(i),
            "replication": 0,
            RATE: rate,
            "duration_s": 1.0,
            "normalized_latency_mean_s": value,
        }
        for i, (rate, value) in enumerate(latencies.items())
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "runs.parquet")
    return read_experiment(tmp_path).series(RATE)[0]


def test_saturation_lies_where_latency_passes_the_limit(tmp_path: Path) -> None:
    # Half way from 0.05 to 5 s/token on a logarithmic scale is 0.5.
    assert saturation(rate_case({1.0: 0.04, 2.0: 0.05, 4.0: 5.0}, tmp_path), RATE) == Saturation(
        pytest.approx(3.0)
    )
    assert saturation(rate_case({1.0: 0.7, 2.0: 0.9}, tmp_path), RATE) == Saturation(1.0, below=True)
    assert str(saturation(rate_case({1.0: 0.1, 2.5: 0.5}, tmp_path), RATE)) == "above 2.5"


def test_labels_beside_a_bar_keep_their_distance() -> None:
    placed = apart([96.0, 97.0, 97.5, 99.9])
    assert all(b - a >= 5.49 for a, b in pairwise(placed))
    assert placed[-1] <= 100
    assert apart([10.0, 50.0]) == [10.0, 50.0]


def test_a_choice_of_cases_keeps_the_ends_and_even_steps() -> None:
    cases = [Case(str(i), [], i) for i in range(9)]
    assert [case.label for case in spread(cases, 6)] == ["0", "2", "4", "6", "8"]
    assert [case.label for case in spread(cases, 9)] == [case.label for case in cases]


def luminance(colour: str) -> float:
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_colours_differ_in_grey() -> None:
    policies = sorted(luminance(plots_style.colour(Case("", [], rank))) for rank in range(4))
    assert min(b - a for a, b in pairwise(policies)) > 0.08
    greys = [luminance(state.face) for state in plots_style.STATES]
    assert min(abs(b - a) for a, b in pairwise(greys)) > 0.1
    hatched = [state.hatch for state in plots_style.STATES if state.hatch]
    assert len(set(hatched)) == len(hatched) == 3


def test_a_reader_s_own_matplotlib_settings_do_not_show(tmp_path: Path) -> None:
    import matplotlib

    results = write_results(tmp_path / "a", Sweep(requests=5, record=()))
    plain = draw(results)[0].read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert draw(results)[0].read_bytes() == plain
        assert matplotlib.rcParams["font.size"] == 30


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        draw(directory)
    return str(caught.value)


def test_a_folder_without_runs_is_refused_in_clear_words(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").startswith(
        f"{tmp_path / 'nowhere'}: no such folder; expected the folder of"
    )
    assert "no runs to draw, runs.parquet is missing; expected" in refused(tmp_path)
    results = write_results(tmp_path / "quickstart", Sweep(requests=3))
    assert refused(tmp_path).endswith(f"did you mean {results}?")
    run = next(path for path in results.iterdir() if path.is_dir())
    assert refused(run).endswith(f"is one run, did you mean {results}?")
    (results / "runs.parquet").write_text("no table")
    assert "runs.parquet: cannot be read" in refused(results)
    pq.write_table(pa.table({"run_id": pa.array([], pa.string())}), results / "runs.parquet")
    assert "holds no runs" in refused(results)


def test_a_damaged_manifest_and_a_blocked_folder_are_named(tmp_path: Path) -> None:
    results = write_results(tmp_path / "a", Sweep(requests=3))
    (results / "plots").write_text("in the way")
    assert f"{results / 'plots'}: cannot be made" in refused(results)
    damaged = next(results.glob("*/manifest.json"))
    damaged.write_text("{")
    assert f"{damaged}: not JSON" in refused(results)
