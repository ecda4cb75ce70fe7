"""Pictures of EDFs and of what batches received, drawn with matplotlib."""

import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any, cast

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from . import edf
from ._report import EmphasisReport

# Okabe and Ito's colours, without the yellow that white swallows; then the same again in other strokes.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#4d4d4d", "#56b4e9", "#e69f00")
STROKES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
NAME, NOTE = "#222222", "#666666"
EXAMPLES, RECEIVED = "#b9c6d3", "#0072b2"
NOISY_EXAMPLES, NOISY_RECEIVED = "#f3cf9b", "#b25e00"
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "svg.fonttype": "none",
}
# The weights' panel shows this many powers of ten below the greatest weight, or more if an EDF needs it; most go to 0.
_DECADES = 4
_LN10 = math.log(10)
_P = torch.linspace(0, 1, 2001, dtype=torch.float64)


def number(value: float) -> str:
    """A figure for people: four digits, and the signs for none and for infinity."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.4g}"


def mode(density: edf.EDF) -> float:
    """The EDF's mode; nan for a constant, which has none."""
    return density.mode if density.peak_ratio > 1 else math.nan


def _save(figure: Figure, path: str | os.PathLike) -> None:
    figure.savefig(os.fspath(path), facecolor="white")


def _head(axes: Axes, title: str, note: str, x: float = 0) -> None:
    axes.annotate(title, (x, 1), (0, 27), "axes fraction", "offset points", size=12.5, weight="bold")
    axes.annotate(note, (x, 1), (0, 10), "axes fraction", "offset points", color=NOTE)


def _p_axis(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel("probability p of the label")


def _line(index: int) -> dict:
    stroke = STROKES[index // len(COLORS) % len(STROKES)]
    return {"color": COLORS[index % len(COLORS)], "linestyle": stroke, "linewidth": 2.4, "solid_capstyle": "round"}


def _log_weights(density: edf.EDF, p: Tensor = _P) -> Tensor:
    return density.log_weight(p.log().clamp(min=-1e30), torch.log1p(-p).clamp(min=-1e30))


def _draw_curves(axes: Axes, densities: Sequence[edf.EDF], curves: Sequence[Tensor], log_scales: Sequence[float]) -> None:
    for index, (density, curve, log_scale) in enumerate(zip(densities, curves, log_scales, strict=True)):
        if not math.isfinite(log_scale):
            continue
        axes.plot(_P.tolist(), torch.exp(curve - log_scale).tolist(), **_line(index))
        # A constant has no mode, and a pole is out of sight.
        if not math.isnan(mode(density)):
            # Beside it too: at the edge of a truncated EDF the weight may be that of the other side.
            p = (density.mode + torch.tensor([-1e-6, 0, 1e-6], dtype=torch.float64)).clamp(0, 1)
            peak = torch.exp(_log_weights(density, p) - log_scale).max().item()
            if math.isfinite(peak):
                place: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "markersize": 9, "clip_on": False, "zorder": 4}
                axes.plot([density.mode], [peak], "o", markeredgecolor="white", **place)


def _greatest(curves: Sequence[Tensor]) -> float:
    """The greatest log of the finite values away from the ends, where a curve may have a pole; 0 if there is none."""
    inner = torch.cat([curve[20:-20] for curve in curves]) if curves else torch.zeros(1)
    return inner[inner.isfinite()].max().item() if inner.isfinite().any() else 0.0


def _draw_weights(axes: Axes, densities: Sequence[edf.EDF], curves: Sequence[Tensor]) -> None:
    # Held within what ticks can be; a beta of thousands is not.
    peaks = [min(max(_greatest([curve]) / _LN10, -200), 200) for curve in curves]
    top = max(peaks) + 0.15
    axes.set_yscale("log")
    axes.set_ylim(10 ** min(top - _DECADES, min(peaks) - 1), 10**top)
    axes.yaxis.set_major_locator(LogLocator(10, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e+", "e")))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _draw_curves(axes, densities, curves, [0.0] * len(densities))
    _head(axes, "Weight w(p)", "L1 norm of an example's gradient; log scale")


def _draw_normalised(axes: Axes, densities: Sequence[edf.EDF], curves: Sequence[Tensor]) -> None:
    log_integrals = [density.log_integral for density in densities]
    _draw_curves(axes, densities, curves, log_integrals)
    scaled = [curve - scale for curve, scale in zip(curves, log_integrals, strict=True) if math.isfinite(scale)]
    axes.set_ylim(0, 1.08 * math.exp(_greatest(scaled)))
    _head(axes, "Density h(p) = w(p) / ∫ w", "share of the emphasis if p were uniform")


def _draw_key(axes: Axes, densities: Sequence[edf.EDF], names: Sequence[list[str]]) -> None:
    """A line, the name and two figures of each EDF. The axes' units are inches, from the top down."""
    axes.axis("off")
    y = 0.0
    for index, (density, name) in enumerate(zip(densities, names, strict=True)):
        axes.plot([0, 0.28], [y + 0.08, y + 0.08], **_line(index))
        axes.text(0.38, y, "\n".join(name), va="top", weight="bold", size=10.3, color=NAME, linespacing=1.15, parse_math=False)
        figures = f"mode {number(mode(density))}   peak ratio {number(density.peak_ratio)}"
        axes.text(0.38, y + 0.19 * len(name) + 0.02, figures, va="top", color=NOTE, size=9.5)
        y += _row_height(name)


def _row_height(name: list[str]) -> float:
    return 0.35 + 0.19 * len(name)


def draw_edfs(densities: Sequence[edf.EDF], path: str | os.PathLike | None = None) -> Figure:
    """w(p), on a logarithmic scale, and the density h(p) = w(p) / integral, with modes marked; written to `path` if given."""
    names = [textwrap.wrap(str(density), 27) for density in densities]
    above, below = 0.82, 0.6  # inches
    inner = max(3.3, sum(map(_row_height, names)) - 0.15)
    width, height = 12.5, above + inner + below
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
        left, right, key = (
            figure.add_axes((start, below / height, share, inner / height))
            for start, share in ((0.055, 0.3), (0.415, 0.3), (0.745, 0.25))
        )
        curves = [_log_weights(density) for density in densities]
        _draw_weights(left, densities, curves)
        _draw_normalised(right, densities, curves)
        for axes in (left, right):
            _p_axis(axes)
            axes.grid(axis="y", color="#ececec", zorder=0)
            axes.tick_params(which="both", length=0, pad=7)
        key.set_xlim(0, 0.25 * width)
        key.set_ylim(inner, 0)
        _draw_key(key, densities, names)
    if path is not None:
        _save(figure, path)
    return figure


def _densities(axes: Axes, report: EmphasisReport) -> None:
    width = report.edges[1] - report.edges[0]
    middles = [edge + width / 2 for edge in report.edges[:-1]]
    groups = [(report.density, report.emphasis_density, 1, EXAMPLES, RECEIVED)]
    if report.noisy_density is not None and report.noisy_emphasis_density is not None:
        clean = [whole - part for whole, part in zip(report.density, report.noisy_density, strict=True)]
        received = [whole - part for whole, part in zip(report.emphasis_density, report.noisy_emphasis_density, strict=True)]
        groups = [
            (tuple(clean), tuple(received), 1, EXAMPLES, RECEIVED),
            (report.noisy_density, report.noisy_emphasis_density, -1, NOISY_EXAMPLES, NOISY_RECEIVED),
        ]
    limits = {1: 0.0, -1: 0.0}
    for examples, emphasis, sign, fill, stroke in groups:
        shares = [sign * 100 * value * width for value in examples]
        axes.bar(middles, shares, 0.9 * width, color=fill, linewidth=0)
        steps = [sign * 100 * value * width for value in emphasis]
        axes.stairs(steps, report.edges, baseline=None, color=stroke, linewidth=2.4)
        limits[sign] = 1.12 * max([0.0, *(abs(value) for value in (*shares, *steps) if math.isfinite(value))])
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_ylim(-limits[-1], limits[1] or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g} %"))
    axes.grid(axis="y", color="#ececec")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    _p_axis(axes)


def _shares(axes: Axes, report: EmphasisReport) -> None:
    parts = report.parts
    for row, part in enumerate(parts):
        y = row + 0.45 * ((row > 2) + (row > 4))
        noisy = part.name.startswith("noisy")
        axes.barh(y - 0.17, part.example_share, 0.3, color=NOISY_EXAMPLES if noisy else EXAMPLES)
        emphasis = part.emphasis_share if math.isfinite(part.emphasis_share) else 0.0
        axes.barh(y + 0.17, emphasis, 0.3, color=NOISY_RECEIVED if noisy else RECEIVED)
        axes.text(-0.03, y, part.name, ha="right", va="center_baseline")
        figures = f"{100 * part.example_share:.0f} %", f"{100 * emphasis:.0f} %"
        for offset, share, text, weight in (
            (-0.17, part.example_share, figures[0], "normal"),
            (0.17, emphasis, figures[1], "bold"),
        ):
            axes.text(share + 0.015, y + offset, text, va="center_baseline", size=9, weight=weight, color=NOTE)
    axes.set_xlim(0, 1.1)
    axes.set_ylim(len(parts) - 0.5 + 0.45 * (1 + (len(parts) > 5)), -0.5)
    axes.axis("off")


def draw_report(report: EmphasisReport, where: str | os.PathLike | Axes) -> Figure:
    """The densities in the given axes; or a picture of its own, with every part's share beside them, written to a path."""
    if isinstance(where, Axes):
        _densities(where, report)
        return cast(Figure, where.get_figure(root=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.9), dpi=150, facecolor="white")
        left = figure.add_axes((0.06, 0.125, 0.45, 0.715))
        right = figure.add_axes((0.69, 0.06, 0.3, 0.78))
        _densities(left, report)
        _head(left, "What each probability received", "bars: share of examples; line: of emphasis")
        if report.noisy_density is not None:
            for y, text, color in ((27, "clean labels up", "#5a6f85"), (10, "noisy labels down", NOISY_RECEIVED)):
                left.annotate(text, (1, 1), (0, y), "axes fraction", "offset points", ha="right", color=color)
        _shares(right, report)
        note = f"{report.examples} examples; half of the emphasis is on {number(round(100 * report.half, 1))} % of them"
        _head(right, "Share of the examples (light) and emphasis (dark)", note, x=-0.44)
    _save(figure, where)
    return figure
