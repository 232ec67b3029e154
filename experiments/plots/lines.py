"""Lines of a summary's figures along a swept number, with 95 % intervals over replications."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.plots.labels import axis_label
from experiments.plots.results import Case, Experiment
from experiments.plots.series import Mean, mean
from experiments.plots.style import line_style, numeric_scale, plain_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


@dataclass(frozen=True, slots=True)
class Merit:
    """A figure of merit: its column in the summary, what it is called, its unit, and how it is scaled."""

    key: str
    label: str
    unit: str
    scale: float = 1.0
    log: bool = False


THROUGHPUT = Merit("request_throughput", "Throughput", "requests/s")
TOKENS = Merit("output_token_throughput", "Output throughput", "tokens/s")
LATENCY = Merit("normalized_latency_mean_s", "Normalised latency", "s/token", log=True)
TPOT = Merit("tpot_mean_s", "Time per output token", "s/token")
TTFT = Merit("ttft_p99_s", "Time to first token, p99", "s", log=True)
BATCH = Merit("mean_running", "Mean batch", "requests")
LIVE = Merit("token_states_share", "Token states", "% of KV memory", 100.0)
OPTIONAL = (
    Merit("prefix_hit_rate", "Prefix hit rate", "%", 100.0),
    Merit("blocks_saved_share", "Blocks saved by sharing", "%", 100.0),
    Merit("preemptions", "Preemptions", "count"),
)


def points(case: Case, axis: str, merit: Merit) -> list[tuple[float, Mean]]:
    """Mean of a figure of merit at every value of an axis, in rising order."""
    places = sorted({run.at[axis] for run in case.runs})
    found = [
        (
            place,
            mean([run.figure(merit.key, merit.scale) for run in case.runs if run.at[axis] == place]),
        )
        for place in places
    ]
    return [(place, value) for place, value in found if not math.isnan(value.value)]


def merit_lines(axes: Axes, experiment: Experiment, axis: str, merit: Merit) -> list[Any]:
    """Draw one line per series under the merit's name; returns the handles for a legend."""
    from matplotlib.ticker import MaxNLocator

    handles = []
    found = {case.label: points(case, axis, merit) for case in experiment.series(axis)}
    for case in experiment.series(axis):
        x = [place for place, _ in found[case.label]]
        y = [value.value for _, value in found[case.label]]
        handles += axes.plot(x, y, label=case.label, **line_style(case))
        _intervals(axes, found[case.label], line_style(case)["color"])
    axes.set_title(f"{merit.label} ({merit.unit})")
    axes.set_xlabel(axis_label(axis))
    axes.grid(axis="y")
    if axis == experiment.rate:
        axes.set_xlim(0, 1.04 * experiment.axes[axis][-1])
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
        plain_ticks(axes.xaxis)
    else:
        numeric_scale(axes, experiment.axes[axis])
    _y_scale(axes, [value for line in found.values() for _, value in line], merit)
    return handles


def _intervals(axes: Axes, line: list[tuple[float, Mean]], colour: str) -> None:
    """95 % intervals: whiskers at a few points, a band along many."""
    if not any(value.half for _, value in line):
        return
    x = [place for place, _ in line]
    low = [max(value.value - value.half, 0.02 * value.value) for _, value in line]
    high = [value.value + value.half for _, value in line]
    if len(line) > 6:
        axes.fill_between(x, low, high, color=colour, alpha=0.17, linewidth=0)
    else:
        axes.vlines(x, low, high, color=colour, linewidth=0.8)
        axes.plot([*x, *x], [*low, *high], linestyle="none", marker="_", markersize=5, color=colour)


def _y_scale(axes: Axes, values: list[Mean], merit: Merit) -> None:
    """A y axis from 0, or a logarithmic one where values lie far apart; intervals may run out of wide ones."""
    if not values:
        return
    top, least = max(value.value for value in values), min(value.value for value in values)
    reach = max(value.value + value.half for value in values)
    if merit.log and least > 0 and top / least > 20:
        log_y(axes)
        axes.set_ylim(max(min(value.value - value.half for value in values), least / 3) / 1.3, reach * 1.3)
    else:
        axes.set_ylim(
            0, min(1.08 * min(reach, 2 * top) or 1, 102 if merit.unit.startswith("%") else math.inf)
        )
        plain_ticks(axes.yaxis)


def log_x(axes: Axes) -> None:
    """A logarithmic x axis for what is drawn, whose ticks are plain numbers."""
    axes.set_xscale("log")
    _log_ticks(axes.xaxis, *axes.dataLim.intervalx)


def log_y(axes: Axes) -> None:
    """A logarithmic y axis for what is drawn, whose ticks are plain numbers."""
    axes.set_yscale("log")
    _log_ticks(axes.yaxis, *axes.dataLim.intervaly)


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks at powers of ten; at 1, 2 and 5 too over few decades, and at even distances within less than one."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if low > 0 and high / low < 6:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_minor_locator(NullLocator())
    elif low > 0 and high / low < 60:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain_ticks(axis)
