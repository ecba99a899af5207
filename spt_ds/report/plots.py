"""Plots as inline SVG that follow the light or dark mode of the page.

Colours of text and lines are variables of the page. No text of a run gets into a plot: names are in
the page around it. Shape letters: K prompts, C columns, P points.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spt_ds.errors import SptError
from spt_ds.report.markup import Markup, join

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise SptError(
        f"plots are drawn by matplotlib, which cannot be imported ({error}); "
        "install it with: pip install 'spt-ds[report]'"
    ) from error

Floats = NDArray[np.float64]

# Each keeps a contrast of 3:1 or more on both backgrounds.
PALETTE = ("#2f7fd6", "#cc6a12", "#2b945a", "#d6336c", "#8b5cd6", "#0e8f9c", "#97702f", "#7b8494")
# Colours that stand for variables of the page until the SVG is written.
INK, LINE = "#010101", "#020202"
VARIABLES = {INK: "var(--ink)", LINE: "var(--line)"}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "spt-ds",  # the same plot has the same ids each time
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
PX_PER_INCH = 110  # a little over CSS's 96: brings 9 pt near the page's small text
MOST_POINTS = 400  # of a line; more are averaged in groups
MOST_PROMPTS = 12  # labels on the vertical axis of a heat map
LEAST_RANGE = 0.01  # of a scale of colours
ROUND = (1, 2, 5, 10)  # times a power of ten: what the ticks of a scale are apart
MOST_NUMBERS = 12  # rows of a heat map up to which each cell holds its number


@dataclass(frozen=True)
class Size:
    """A size in which a heat map is drawn; the page shows the one that fits the screen."""

    kind: str
    """A class of the page's style."""
    inches: float
    labels: int
    """On the horizontal axis, at most."""
    numbers: int
    """Columns up to which each cell holds its number."""


WIDE, NARROW = Size("wide", 7.6, 14, 16), Size("narrow", 3.2, 5, 6)


@dataclass(frozen=True)
class Line:
    """One line of a plot: (x, y) points and its looks."""

    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Heat:
    """A heat map: `values` `[K, C]` (NaN: no cell), column labels, names of axes and scale."""

    values: Floats
    columns: Sequence[str]
    across: str
    scale: str
    form: str
    """Format of a cell's number, such as `.0f`."""
    marked: Sequence[int | None] = ()
    """The prompt that gets a dot, for each column."""
    limits: tuple[float, float] | None = None
    """Of the scale of colours; by default round numbers around the values."""
    ends: bool = False
    """Whether a column's label is where it ends, and not where it begins."""


def colour(number: int) -> str:
    """The colour of a run by its number; from the ninth on they repeat."""
    return PALETTE[number % len(PALETTE)]


def curves(
    name: str, alt: str, lines: Sequence[Line], limits: tuple[float, float] | None = None
) -> Markup:
    """Draw lines over optimizer steps.

    `name` is the plot's own in the page, `alt` says what it shows, `limits` are of the vertical
    axis.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.7, 2.35), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            steps, values = thinned(line.points)
            few = len(steps) <= 30
            axes.plot(
                steps,
                values,
                color=line.colour,
                linewidth=1.5,
                linestyle="--" if line.dashed else "-",
                marker="o" if few else None,
                markersize=3,
            )
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=sorted((*ROUND, 2.5)), min_n_ticks=3))
        if limits is not None:
            margin = 0.04 * (limits[1] - limits[0])  # a line on the limit keeps its width
            axes.set_ylim(limits[0] - margin, limits[1] + margin)
        axes.set_xlabel("step")
        return _svg(figure, name, alt)


def heat(name: str, alt: str, data: Heat) -> Markup:
    """Draw a heat map, prompts from the top down, for wide and for narrow screens."""
    return join(_heat(f"{name}-{size.kind}", alt, data, size) for size in (WIDE, NARROW))


def _heat(name: str, alt: str, data: Heat, size: Size) -> Markup:
    prompts, count = data.values.shape
    with matplotlib.rc_context(
        {**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
    ):
        figure = Figure(
            figsize=(min(size.inches, 2.6 + 0.55 * count), min(1.1 + 0.3 * prompts, 6.5)),
            layout="constrained",
        )
        axes = figure.add_subplot()
        low, high = data.limits or round_limits(data.values)
        # Without interpolation the cells stay sharp in SVG at any size.
        image = axes.imshow(
            data.values, aspect="auto", interpolation="none", cmap="cividis", vmin=low, vmax=high
        )
        every = stride(count, size.labels)
        first = every - 1 if data.ends else 0
        ticks = [*range(first, count - every, every), count - 1]  # the last one has its label
        axes.set_xticks(ticks, [data.columns[tick] for tick in ticks])
        axes.set_yticks(range(0, prompts, stride(prompts, MOST_PROMPTS)))
        axes.set_ylim(prompts - 0.5, -0.5)
        axes.set_xlabel(data.across)
        axes.set_ylabel("prompt")
        axes.tick_params(length=0)
        dots = [(column, prompt) for column, prompt in enumerate(data.marked) if prompt is not None]
        if dots:
            axes.scatter(
                [x for x, _ in dots],
                [y for _, y in dots],
                s=14,
                color="#ffffff",
                edgecolors="#000000",
                linewidths=0.8,
            )
        elif prompts <= MOST_NUMBERS and count <= size.numbers:
            _write_numbers(axes, image, data)
        bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=MaxNLocator(5, steps=ROUND))
        bar.outline.set_visible(False)
        bar.set_label(data.scale)
        return _svg(figure, name, alt, size.kind)


def thinned(points: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Return x and y `[P]`, P up to MOST_POINTS.

    Where there are more points they are means over groups of neighbours.
    """
    table = np.asarray(points, dtype=np.float64)
    if len(table) > MOST_POINTS:
        table = np.stack([group.mean(axis=0) for group in np.array_split(table, MOST_POINTS)])
    return table[:, 0], table[:, 1]


def stride(count: int, most: int) -> int:
    """How many of `count` things make one, so that there are up to `most`: 1, 2, 5, 10 ..."""
    return max(1, round(_round_step(count / most)))


def round_limits(values: Floats) -> tuple[float, float]:
    """Round numbers around the values, at least LEAST_RANGE apart.

    Scores that differ by less are nearly the same, and their colours have to say so.
    """
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    middle, half = (low + high) / 2, max(high - low, LEAST_RANGE) / 2
    step = _round_step(half / 4)
    # The tolerance keeps a limit that is round already where it is.
    return (
        math.floor((middle - half) / step + 1e-6) * step,
        math.ceil((middle + half) / step - 1e-6) * step,
    )


def _round_step(number: float) -> float:
    """The smallest of 1, 2, 5 and 10 times a power of ten that is not below `number`."""
    power = 10.0 ** math.floor(math.log10(number))
    return next(step * power for step in ROUND if step * power >= number * (1 - 1e-9))


def _write_numbers(axes: Any, image: Any, data: Heat) -> None:
    for (prompt, column), value in np.ndenumerate(data.values):
        if np.isfinite(value):
            text = format(float(value), data.form)
            axes.text(
                column,
                prompt,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color=readable_on(image.cmap(image.norm(value))[:3]),
            )


def readable_on(colour: Sequence[float]) -> str:
    """White or black, by which has the higher contrast on an sRGB colour of parts 0 to 1."""
    # The parts are not proportional to light: half of their sum is a fifth of the light of white.
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "#ffffff" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "#000000"


def _svg(figure: Any, name: str, alt: str, kind: str = "plot") -> Markup:
    """The figure as an element of a page: no ids but its own, no references to anything outside.

    It shrinks with its box. `kind` is its class.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    box = re.search(r'viewBox="[^"]+"', text)
    body = re.search(r"<svg[^>]*>(.*)</svg>", text, re.DOTALL)
    assert box is not None, "matplotlib wrote no SVG"
    assert body is not None, "matplotlib wrote no SVG"
    # matplotlib writes its date and version, and a style that would hold for the whole page.
    inner = re.sub(
        r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body[1], flags=re.DOTALL
    )
    # Ids must differ within a page, and matplotlib gives two plots the same ones.
    for old, new in (
        ('id="', f'id="{name}-'),
        ('xlink:href="#', f'href="#{name}-'),
        ("url(#", f"url(#{name}-"),
    ):
        inner = inner.replace(old, new)
    inner = inner.replace("xlink:href=", "href=")
    for old, new in VARIABLES.items():
        inner = inner.replace(old, new)
    width = f"max-width:{figure.get_figwidth() * PX_PER_INCH:.0f}px"
    return Markup(
        f'<svg {box[0]} class="{kind}" role="img" aria-label="{escape(alt, quote=True)}"'
        f' style="{width}">{inner}</svg>'
    )
