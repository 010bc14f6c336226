"""Pictures that compare many: score against cost, intervals about zero, ranks side by side."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike, NDArray

from helpers.pictures import (
    INK,
    MUTED,
    PALETTE,
    PAPER,
    Picture,
    check_alt,
    new_figure,
    picture,
    style,
)

COLORS = ("encoder", "decoder", "bridge", "gold")  # of groups, in order
ROW = 0.235  # inches that a line of names takes
FAR = 10  # points: a name further away gets a line to its point


def show_tradeoff(
    points: Mapping[str, tuple[float, ArrayLike]],
    xlabel: str,
    ylabel: str,
    *,
    alt: str,
    groups: Mapping[str, Collection[str]] | None = None,
    front: Collection[str] = (),
    floor: float | None = None,
) -> Picture:
    """Draw one point a name, its score over its cost, with the name beside it.

    Each value is a positive cost, on a logarithmic axis, and a score or one score per seed: then
    the point is their mean, and a line reaches from the least to the greatest. `groups` colours
    the names that it lists under a word for the legend. Where `front` names some, their points are
    full and their names bold; all others are hollow. What scores less than `floor` is drawn at the
    lower edge, with its score behind its name, so that the others have room. Raises `ValueError`
    for an empty picture, a cost that is not positive, and names without a point.
    """
    check_alt(alt)
    groups = groups or {"": list(points)}
    unknown = {*front, *(name for names in groups.values() for name in names)} - set(points)
    if not points or unknown:
        raise ValueError(f"Expected points, one a name; there are none for {unknown or 'any'}.")
    if len(groups) > len(COLORS):
        raise ValueError(f"Expected at most {len(COLORS)} groups, one a colour; got {len(groups)}.")
    wrong = {name: cost for name, (cost, _) in points.items() if not cost > 0}
    if wrong:
        raise ValueError(f"Expected costs above zero, which a logarithm needs; got {wrong}.")
    color = {name: MUTED for name in points} | {
        name: PALETTE[each]
        for each, names in zip(COLORS, groups.values(), strict=False)
        for name in names
    }
    with style():
        height = 3.2 + 0.11 * len(points)
        above = 0.12 if "" in groups else 0.4  # inches; a legend needs more
        axes_height = 1 - (0.57 + above) / height
        figure = new_figure(height)
        axes = figure.add_axes((0.11, 0.57 / height, 0.87, axes_height))
        axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
        middles, bars, said = {}, [], {}
        for name, (cost, scores) in points.items():
            values = np.atleast_1d(np.asarray(scores, dtype=float))
            said[name] = name
            low = floor is not None and values.mean() < floor
            if low:
                said[name] = f"{name} ({values.mean():.0f})"
                values = np.array([floor])
            middles[name] = cost, float(values.mean())
            bars += [((cost, values.min()), (cost, values.max()))]
            axes.plot(*zip(*bars[-1], strict=True), color=color[name], lw=1.5)
            fill = color[name] if name in front or not front else PAPER
            mark: Any = {"mfc": fill, "mec": color[name], "mew": 1.4, "zorder": 3}
            axes.plot(*middles[name], "v" if low else "o", ms=6, **mark)
        axes.margins(x=0.12, y=0.08)
        _readable_ticks(axes, [cost for cost, _ in points.values()])
        if "" not in groups:
            for each, group in zip(COLORS, groups, strict=False):
                axes.plot([], [], "o", color=PALETTE[each], label=group)
            figure.legend(loc="upper right", ncols=len(groups), borderaxespad=0.3)
        _name_points(figure, axes, middles, bars, said, color, front)
        return picture(figure, alt)


def _readable_ticks(axes: Axes, costs: list[float]) -> None:
    steps = (1, 1.5, 2, 3, 5, 7) if max(costs) / min(costs) < 20 else (1, 2, 5)
    ticks = [step * 10.0**n for n in range(-4, 9) for step in steps]
    low, high = axes.get_xlim()
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])


def _name_points(
    figure: Figure,
    axes: Axes,
    middles: Mapping[str, tuple[float, float]],
    bars: list[tuple[tuple[float, float], tuple[float, float]]],
    said: Mapping[str, str],
    color: Mapping[str, str],
    front: Collection[str],
) -> None:
    """Write each name where it covers least: near its point, inside the axes, beside the others."""
    figure.canvas = FigureCanvasAgg(figure)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    places = {name: axes.transData.transform(at) for name, at in middles.items()}
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places.values()]
    for ends in bars:
        (x, low), (_, high) = axes.transData.transform(ends)
        taken.append(Bbox.from_extents(x - 1, low, x + 1, high))
    for name in sorted(middles, key=lambda name: -middles[name][1]):
        label = axes.annotate(
            said[name],
            middles[name],
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=8.5,
            fontweight="bold" if name in front else "normal",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": color[name], "lw": 0.7, "shrinkB": 3},
        )
        best: tuple[float, tuple[float, float, str, str]] | None = None
        for penalty, spot in _spots():
            _move(label, spot)
            text = _text_box(label, renderer)
            cost = penalty + sum(_overlap(text, other) for other in taken)
            cost += 4 * (text.width * text.height - _overlap(text, inside))
            if best is None or cost < best[0]:
                best = cost, spot
        assert best is not None
        _move(label, best[1])
        near = max(abs(best[1][0]), abs(best[1][1])) < FAR
        label.arrow_patch.set_visible(not near)  # type: ignore[union-attr]
        taken.append(_text_box(label, renderer))


def _spots() -> Iterator[tuple[float, tuple[float, float, str, str]]]:
    """Yield offsets in points with the alignment that goes with each, and how far off it is."""
    for distance, (across, up) in product((7, 14, 22, 32, 44), product((1, -1, 0), (0, 1, -1))):
        if across or up:
            horizontal = {1: "left", -1: "right", 0: "center"}[across]
            vertical = {1: "bottom", -1: "top", 0: "center"}[up]
            x = across * distance * (0.7 if up else 1)
            y = up * distance * (0.5 if across else 0.8)
            yield 2.0 * distance, (x, y, horizontal, vertical)


def _move(label: Annotation, spot: tuple[float, float, str, str]) -> None:
    x, y, horizontal, vertical = spot
    label.set_position((x, y))
    label.set_horizontalalignment(horizontal)  # type: ignore[arg-type]
    label.set_verticalalignment(vertical)  # type: ignore[arg-type]


def _text_box(label: Annotation, renderer: object) -> Bbox:
    """Return where the words stand, without the line to the point."""
    label.update_positions(renderer)  # type: ignore[arg-type]
    return super(Annotation, label).get_window_extent(renderer)  # type: ignore[arg-type]


def _overlap(one: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(one, other)
    return shared.width * shared.height if shared is not None else 0.0


def show_intervals(
    intervals: Mapping[str, ArrayLike],
    xlabel: str,
    *,
    alt: str,
    digits: int = 1,
) -> Picture:
    """Draw one interval a name about a line at zero, the middle written at the right.

    Each value is (low, middle, high), or a number alone: a hollow point without an interval. An
    interval that holds zero is grey; the others are coloured by their side. Raises `ValueError`
    where there is nothing to draw or a value is neither.
    """
    check_alt(alt)
    found: dict[str, NDArray[np.float64]] = {
        name: np.atleast_1d(np.asarray(value, dtype=float)) for name, value in intervals.items()
    }
    wrong = [name for name, value in found.items() if value.shape not in ((1,), (3,))]
    if wrong or not found:
        raise ValueError(f"Expected (low, middle, high) or a number for each name; see {wrong}.")
    height = 0.75 + ROW * len(found)
    with style():
        figure = new_figure(height)
        left = min(0.018 + 0.0122 * max(map(len, found)), 0.5)
        axes = figure.add_axes((left, 0.55 / height, 0.91 - left, 1 - 0.65 / height))
        axes.axvline(0, color=INK, lw=1)
        for row, value in enumerate(found.values()):
            low, middle, high = value if len(value) == 3 else (-np.inf, value[0], np.inf)
            color = PALETTE["bridge"] if low > 0 else PALETTE["decoder"] if high < 0 else MUTED
            if len(value) == 3:
                axes.plot([low, high], [row, row], color=color, lw=3, alpha=0.55)
            fill = color if len(value) == 3 else PAPER
            axes.plot([middle], [row], "o", ms=5.5, color=color, mfc=fill, zorder=3)
            text = f"{middle:+.{digits}f}".replace("-", "−")
            axes.text(
                1.01, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9
            )
        axes.set_yticks(range(len(found)), list(found), fontsize=9.5)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        return picture(figure, alt)


def show_ranks(
    columns: Mapping[str, Mapping[str, float]],
    *,
    alt: str,
    highlight: Collection[str] = (),
    digits: int = 1,
) -> Picture:
    """Draw rankings side by side, the greatest score above, and a line from place to place.

    `columns` maps a title to scores by name, the same names in each; scores are written at the
    places, names at both sides. Lines of `highlight` are coloured. Raises `ValueError` for fewer
    than two columns and for columns with different names.
    """
    check_alt(alt)
    names = [set(scores) for scores in columns.values()]
    if len(names) < 2 or any(other != names[0] for other in names):
        raise ValueError("Expected two or more rankings of the same names.")
    orders = [sorted(scores, key=lambda name: -scores[name]) for scores in columns.values()]
    height = 0.45 + ROW * len(names[0])
    with style():
        figure = new_figure(height)
        left = 0.018 + 0.0122 * max(map(len, names[0]))
        axes = figure.add_axes((left, 0.05 / height, 1 - 2 * left, 1 - 0.45 / height))
        for name in orders[0]:
            places = [order.index(name) for order in orders]
            chosen = name in highlight
            color = PALETTE["decoder" if chosen else "sky"]
            axes.plot(places, color=color, lw=2.4 if chosen else 1.4, zorder=3 if chosen else 1)
            for column, (place, scores) in enumerate(zip(places, columns.values(), strict=True)):
                axes.text(
                    column,
                    place,
                    f"{scores[name]:.{digits}f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    fontweight="bold" if chosen else "normal",
                    zorder=4,
                    bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.2},
                )
        axes.set_xlim(-0.25, len(columns) - 0.75)
        for side, order in ((axes, orders[0]), (axes.twinx(), orders[-1])):
            side.set_ylim(len(names[0]) - 0.5, -0.5)
            side.set_yticks(range(len(order)), order, fontsize=9.5)
            side.tick_params(length=0)
            side.grid(visible=False)
            side.spines[:].set_visible(False)
        axes.set_xticks(range(len(columns)), list(columns))
        axes.xaxis.tick_top()
        return picture(figure, alt)
