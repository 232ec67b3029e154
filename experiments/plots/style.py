"""How figures look: sizes, fonts, and colours that stay apart in grey and for colour-blind readers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.plots.labels import number
from experiments.plots.results import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

COLUMN, PAGE = 3.5, 7.0  # widths in inches of one column and of both
DPI = 300
GREY = "#707070"


@dataclass(frozen=True, slots=True)
class State:
    """How one state of KV slots is filled in; `ink` is the colour of hatch and value label."""

    column: str
    label: str
    face: str
    hatch: str
    hatch_colour: str
    ink: str


#: From the bottom of a stack to its top. Neighbours differ in lightness, and all but two carry a hatch.
STATES = (
    State("token_states", "Token states", "#123F6D", "", "#123F6D", "white"),
    State("reserved", "Reserved", "#7CC0EA", "////", "#3D8FC4", "black"),
    State("internal", "Internal", "#D55E00", "\\\\\\\\", "#F2A671", "black"),
    State("external", "External", "#F4E36B", "....", "#857A1C", "black"),
    State("free", "Free", "#FFFFFF", "", "#FFFFFF", "black"),
)

# Okabe and Ito's hues, moved in lightness so that each of the first six is another grey.
_COLOURS = ("#14365C", "#B83A0B", "#12A882", "#E09F1A", "#8E5AA8", "#74BDEB", "#6B6B6B", "#5E3A1B")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (5, 1.4, 1.2, 1.4)), (0, (1.4, 1.2)), (0, (8, 1.6)), "-")
_MARKERS = "osD^v<*"

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 8.5,
    "mathtext.fontset": "dejavusans",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlepad": 4,
    "axes.labelpad": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.2,
    "lines.markeredgewidth": 0.6,
    "hatch.linewidth": 0.55,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.4,
    "legend.handletextpad": 0.5,
    "legend.borderaxespad": 0.2,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "savefig.dpi": DPI,
    "pdf.fonttype": 42,
    "path.simplify": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw with this style alone, whatever a reader's own matplotlibrc says; all is put back afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that is bound to no window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_style(case: Case) -> dict[str, Any]:
    """Colour, dashes and marker of a line: the same for a policy in all figures."""
    return {
        "color": colour(case),
        "linestyle": _DASHES[case.rank % len(_DASHES)],
        "marker": _MARKERS[case.rank % len(_MARKERS)],
        "markeredgecolor": "white",
    }


def colour(case: Case) -> str:
    """Colour of a policy, or of a value on an axis: there from dark to light."""
    if case.of is None:
        return _COLOURS[case.rank % len(_COLOURS)]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis"](0.82 * case.rank / max(case.of - 1, 1)))


def state_handles() -> list[Patch]:
    """Legend entries of the states, in the order of the stack."""
    from matplotlib.patches import Patch

    return [
        Patch(
            facecolor=state.face,
            edgecolor=state.hatch_colour if state.hatch else GREY,
            hatch=state.hatch,
            linewidth=0 if state.hatch else 0.5,
            label=state.label,
        )
        for state in STATES
    ]


def percent_axis(axes: Axes) -> None:
    """Let the y axis run from 0 to 100 % of KV memory."""
    axes.set_ylim(0, 100)
    axes.set_yticks((0, 25, 50, 75, 100))


def upper_legend(figure: Figure, handles: list[Any], width: float, below: list[Any] | None = None) -> None:
    """One legend above all panels, in as many columns as fit; `below` is a row of its own if it fits."""
    if below:
        handles = _two_rows(handles, below, width) or handles + below
    columns = next((n for n in range(len(handles), 1, -1) if _legend_width(handles, n) < width), 1)
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.16 * max(rows - 2, 0))  # panels keep their height
    figure.legend(handles=handles, loc="outside upper center", ncols=-(-len(handles) // rows))


def _two_rows(upper: list[Any], lower: list[Any], width: float) -> list[Any] | None:
    """Handles in the order that fills two rows with one list each, None if that is too wide."""
    from matplotlib.lines import Line2D

    columns = max(len(upper), len(lower))
    rows = [
        row + [Line2D([], [], linestyle="none", label="")] * (columns - len(row)) for row in (upper, lower)
    ]
    merged = [handle for pair in zip(*rows, strict=True) for handle in pair]
    return merged if _legend_width(merged, columns) < width else None


def _legend_width(handles: list[Any], columns: int) -> float:
    """About how many inches a legend takes whose columns are filled from top to bottom."""
    rows = -(-len(handles) // columns)
    lengths = [len(str(handle.get_label())) for handle in handles]
    return sum(0.45 + 0.064 * max(lengths[i : i + rows]) for i in range(0, len(lengths), rows))


def grid_shape(panels: int) -> tuple[int, int]:
    """Rows and columns for small multiples on a page's width."""
    columns = panels if panels <= 3 else 2 if panels == 4 else 3 if panels <= 9 else 4
    return -(-panels // columns), columns


def numeric_scale(axes: Axes, values: list[float]) -> None:
    """A scale for swept values: log 2 where each doubles the last, log 10 for wide ranges; ticks at few values."""
    from matplotlib.ticker import FixedLocator, NullLocator

    positive = values[0] > 0
    doubled = positive and len(values) > 2 and all(is_power_of_two(value / values[0]) for value in values)
    if doubled:
        axes.set_xscale("log", base=2)
    elif positive and values[-1] / values[0] >= 30:
        axes.set_xscale("log")
    if doubled or len(values) <= 6:
        step = 2 if len(values) > 6 else 1
        axes.xaxis.set_major_locator(FixedLocator(values[::step]))
        axes.xaxis.set_minor_locator(NullLocator())
    plain_ticks(axes.xaxis)


def plain_ticks(axis: Axis) -> None:
    """Plain numbers at the major ticks of an axis, whatever its scale."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def is_power_of_two(value: float) -> bool:
    """True for 1, 2, 4, ... and for 1/2, 1/4, ..."""
    return value > 0 and math.frexp(value)[0] == 0.5
