"""Plots, each as SVG in the page's colours and as PNG."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from loram_ray.errors import LoramError
from loram_ray.estimating.gpus import GPUS
from loram_ray.utils.names import slug
from loram_ray.utils.printing import plain

_INK = "#13579b"  # placeholder for the page's text colour
# Okabe and Ito's colours, which are distinguishable with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#f0e442")
_MARKERS = "osD^vPX*<"  # one more than colours, so that pairs repeat late
_FAR = 1.5  # larger multiples of the base's perplexity are listed in the legend instead of plotted
_POINTS, _BINS = 400, 30
_MOST_CURVES = 12
_LONGEST_LABEL = 60


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        name: Name of the file, without suffix.
        title: Title of the plot.
        says: Caption of one sentence.
        svg: SVG without a background, with text in ``currentColor``.
        png: PNG with a white background.
    """

    name: str
    title: str
    says: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Curve:
    """Values of a metric by step."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


Draw = Callable[[Any], None]
"""Function that draws on matplotlib axes."""


def figure_of(
    name: str, title: str, says: str, draw: Draw, size: tuple[float, float] = (7.0, 3.4)
) -> Figure:
    """Draw a plot as SVG and PNG.

    Raises:
        LoramError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise LoramError(
            f"report needs the package matplotlib ({error}); run pip install 'loram-ray[report]'"
        ) from error

    def drawn(ink: str, kind: str, **options: Any) -> bytes:
        colours = dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink
        )
        settings: Any = {
            **colours,
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "font.size": 9.0,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
        with rc_context(settings), warnings.catch_warnings():
            # for characters that the font lacks, PNG shows a box and SVG the text itself
            warnings.filterwarnings("ignore", message=r"Glyph \d+")
            canvas = Canvas(figsize=size, layout="constrained")
            draw(canvas.add_subplot())
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None,
                           **options)  # fmt: skip
        return buffer.getvalue()

    svg = drawn(_INK, "svg", transparent=True).decode()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    head, _, rest = svg.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)  # fill the available width
    svg = f"{head}>{rest}"
    svg = re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", svg)  # ids would not be unique on the page
    return Figure(slug(name), title, says, svg, drawn("#000000", "png", dpi=150))


def _label(text: str) -> str:
    """Format a label on one line, with formulas escaped and leading underscores legend-safe."""
    shown = plain(text)
    if len(shown) > _LONGEST_LABEL:
        shown = f"{shown[: _LONGEST_LABEL - 1]}…"
    return (f" {shown}" if shown.startswith("_") else shown).replace("$", r"\$")


def curves(axes: Any, lines: Sequence[Curve], label: str, log: bool = False) -> None:
    """Plot curves by step; for many curves, plot the median and the interquartile range."""
    if len(lines) > _MOST_CURVES:
        _bands(axes, lines)
    else:
        for number, curve in enumerate(lines):
            steps, values = _thinned(curve)
            axes.plot(
                steps,
                values,
                color=COLOURS[number % len(COLOURS)],
                linestyle="-" if number < len(COLOURS) else "--",
                linewidth=1.4,
                marker="o" if len(steps) < 3 else None,
                label=_label(curve.name),
            )
    axes.legend(fontsize=8)
    axes.set(xlabel="step", ylabel=_label(label))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)


def _thinned(curve: Curve) -> tuple[Any, Any]:
    """Reduce a curve to at most `_POINTS` points by averaging neighbours."""
    steps, values = numpy.asarray(curve.steps, float), numpy.asarray(curve.values, float)
    if len(steps) <= _POINTS:
        return steps, values
    pieces = numpy.array_split(numpy.arange(len(steps)), _POINTS)
    return (
        numpy.array([steps[piece].mean() for piece in pieces]),
        numpy.array([values[piece].mean() for piece in pieces]),
    )


def _bands(axes: Any, lines: Sequence[Curve]) -> None:
    grid = numpy.unique(numpy.concatenate([numpy.asarray(c.steps, float) for c in lines]))
    if len(grid) > _POINTS:
        grid = numpy.linspace(grid[0], grid[-1], _POINTS)
    rows = numpy.array(
        [numpy.interp(grid, c.steps, c.values, left=math.nan, right=math.nan) for c in lines]
    )
    low, middle, high = numpy.nanquantile(rows, (0.25, 0.5, 0.75), axis=0)
    label = f"median of {len(lines):,} and interquartile range"
    if len(grid) < 3:
        reach = numpy.array([middle - low, high - middle])
        axes.errorbar(grid, middle, yerr=reach, fmt="o", color=COLOURS[0], capsize=3, label=label)
        return
    axes.fill_between(grid, low, high, color=COLOURS[0], alpha=0.25, lw=0)
    axes.plot(grid, middle, color=COLOURS[0], label=label)


def histogram(axes: Any, values: Sequence[float], label: str, unit: str) -> None:
    """Plot a histogram of values."""
    axes.hist(values, bins=min(_BINS, max(len(values) // 2, 5)), color=COLOURS[0])
    axes.set(xlabel=_label(label), ylabel=unit)
    axes.grid(alpha=0.25, axis="y")


def memory(axes: Any, peaks: Sequence[tuple[str, float]]) -> None:
    """Plot the peak memory of stages in GB, with the memory of GPUs as lines."""
    names = [_label(name) for name, _ in peaks]
    values = [gigabytes for _, gigabytes in peaks]
    axes.barh(range(len(peaks)), values, color=COLOURS[0], height=0.6)
    axes.set_yticks(range(len(peaks)), names)
    axes.invert_yaxis()
    axes.set(xlabel="GB")
    above = [gpu for gpu in GPUS if gpu.memory / 1e9 > max(values)]
    for gpu in above[:2]:
        axes.axvline(gpu.memory / 1e9, color=COLOURS[1], linestyle="--", linewidth=1.2)
        axes.annotate(
            gpu.name, (gpu.memory / 1e9, 1.0), xycoords=("data", "axes fraction"), rotation=90,
            ha="right", va="top", fontsize=8,
        )  # fmt: skip


def heat(axes: Any, shares: Any, names: tuple[str, str]) -> None:
    """Plot a heat map of shares from 0 to 1; ``names`` label the rows and columns."""
    image = axes.imshow(shares, aspect="auto", cmap="cividis", vmin=0, vmax=1,
                        interpolation="nearest", origin="lower")  # fmt: skip
    axes.set(ylabel=_label(names[0]), xlabel=_label(names[1]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, label="share kept")


def bars(
    axes: Any,
    rows: Sequence[tuple[str, float, float | None]],
    label: str,
    least: float = -math.inf,
) -> None:
    """Plot labelled bars with error bars; bars are clipped at ``least``."""
    values = [value for _, value, _ in rows]
    errors = [0.0 if error is None or value < least else error for _, value, error in rows]
    shown = [max(value, least) for value in values]
    axes.barh(range(len(rows)), shown, xerr=errors, color=COLOURS[0], height=0.6,
              error_kw={"ecolor": COLOURS[1], "capsize": 3})  # fmt: skip
    for place, (value, end, error) in enumerate(zip(values, shown, errors, strict=True)):
        axes.annotate(
            f"{value:.3g}", (max(end + error, 0.0), place), xytext=(4, 0), fontsize=8,
            textcoords="offset points", va="center",
        )  # fmt: skip
    axes.margins(x=0.12)
    axes.set_yticks(range(len(rows)), [_label(name) for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set(xlabel=_label(label))
    axes.grid(alpha=0.25, axis="x")


def dots(axes: Any, rows: Sequence[tuple[str, float, float | None]], label: str) -> None:
    """Plot values with error bars on a logarithmic axis."""
    errors = [0.0 if error is None else error for _, _, error in rows]
    axes.errorbar([value for _, value, _ in rows], range(len(rows)), xerr=errors, fmt="o",
                  color=COLOURS[0], ecolor=COLOURS[1], capsize=3)  # fmt: skip
    axes.set_yticks(range(len(rows)), [_label(name) for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set(xlabel=f"{_label(label)} (logarithmic)")
    axes.grid(alpha=0.25, axis="x", which="both")


@dataclass(frozen=True)
class Point:
    """Score of a system at a parameter reduction.

    Attributes:
        system: Name of the system.
        reduction: Parameters of the base divided by those of the model trained on.
        value: Score of the system.
        error: Standard deviation, if known.
    """

    system: str
    reduction: float
    value: float
    error: float | None


def quality(axes: Any, points: Sequence[Point], label: str, is_perplexity: bool) -> None:
    """Plot scores against the parameter reduction of the model trained on.

    Perplexities far above the base's would compress the scale and are listed in the legend instead.
    """
    unreduced = [point.value for point in points if point.reduction == 1]
    limit = _FAR * max(unreduced) if is_perplexity and unreduced else math.inf
    for number, system in enumerate(dict.fromkeys(point.system for point in points)):
        own = sorted((p for p in points if p.system == system), key=lambda p: p.reduction)
        shown = [p for p in own if p.value <= limit]
        far = ", ".join(f"{p.value:,.4g}" for p in own if p.value > limit)
        axes.errorbar(
            [p.reduction for p in shown],
            [p.value for p in shown],
            yerr=[p.error or 0.0 for p in shown],
            color=COLOURS[number % len(COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="-" if len(shown) > 1 else "none",
            linewidth=1.2,
            capsize=3,
            label=f"{_label(system)} (far above: {far})" if far else _label(system),
        )
    axes.set(xlabel="parameter reduction during training (base / model)", ylabel=_label(label))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
