"""Charts: numbers with their spread, alone, side by side, over a cost, as ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike

from helpers.plotting.pictures import INK, MUTED, PALETTE, PAPER, Picture, drawn, new_figure

Values = Mapping[str, ArrayLike]  # by name: a number or several, of one seed or of each

DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), "-")
COLORS = ("encoder", "decoder", "bridge", "gold")  # of groups, in order
ROW = 0.235  # inches that a line of names takes
FAR = 10  # points: a name further away gets a line to its point


@drawn
def show_curves(
    curves: Values,
    xlabel: str,
    ylabel: str,
    *,
    alt: str,
    x: Sequence[float] | None = None,
    log: bool = False,
) -> Figure:
    """Draw one line a name, labelled at its end.

    Each value is `[n]`, or `[seeds, n]`: then the line is the mean and the band reaches from the
    least to the greatest seed. `x` gives the n positions (else 1…n); `log` makes the vertical axis
    logarithmic. Raises `ValueError` where there is nothing to draw or lengths differ.
    """
    if not curves:
        raise ValueError("There are no curves to show.")
    figure = new_figure(3.6)
    right = 0.97 - (0.0135 * max(map(len, curves)) + 0.01)
    axes = figure.add_axes((0.11, 0.155, right - 0.11, 0.815))
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    ends = _lines(axes, curves, x)
    axes.margins(x=0.01)
    _label_ends(axes, ends, 0.815 * 3.6)
    return figure


@drawn
def show_panels(
    panels: Mapping[str, Values], *, x: Sequence[Any], alt: str, xlabel: str = ""
) -> Figure:
    """Draw a few small charts side by side, each with the same lines over the same positions.

    `panels` maps a panel's title to its lines, as in `show_curves`; `x` names the positions, or
    gives them as integers, and `xlabel` says of what. Each panel has a vertical axis of its own.
    Raises `ValueError` where panels have different lines.
    """
    names = [list(curves) for curves in panels.values()]
    if not any(names) or any(other != names[0] for other in names):
        raise ValueError(f"Expected at least one panel, all with the same lines; got {names}.")
    height = 3.1 + (0.25 if xlabel else 0)  # inches
    figure = new_figure(height)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    right = 0.985 - 0.007 * max(0, len(str(x[-1])) - 2)  # half of the last name is beyond
    bottom, top = (height - 2.35) / height, 1 - 0.4 / height
    figure.subplots_adjust(left=0.08, right=right, top=top, bottom=bottom, wspace=0.3)
    for axes, (title, curves) in zip(grid, panels.items(), strict=True):
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.set_xlabel(xlabel)
        _lines(axes, curves, x)
        if not isinstance(x[0], str):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines, labels = grid[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncols=len(labels), handlelength=2.6)
    return figure


def show_histories(histories: Mapping[str, Any], *, alt: str) -> Picture:
    """Draw loss and mIoU of several trainings of the same length, one line each, over the epochs.

    `histories` maps a name to what `helpers.training.fit` returned. Raises like `show_panels`.
    """
    kinds = {history.validated for history in histories.values()}
    of = "" if len(kinds) != 1 else " in validation" if True in kinds else " in training"
    panels = {
        "loss in training": {name: history.loss for name, history in histories.items()},
        f"mIoU{of}, %": {name: history.miou for name, history in histories.items()},
    }
    panels = {title: lines for title, lines in panels.items() if all(lines.values())}
    longest = max((len(history.loss) for history in histories.values()), default=0)
    return show_panels(panels, x=range(1, longest + 1), xlabel="epoch", alt=alt)


def _lines(axes: Axes, curves: Values, x: Sequence[Any] | None) -> dict[str, tuple[float, str]]:
    """Draw each curve with the band of its seeds; return where it ends, and its colour."""
    colors = list(PALETTE.values())
    if len(curves) > len(colors):
        raise ValueError(f"{len(curves)} curves cannot be told apart: at most {len(colors)}.")
    ends = {}
    for (name, values), color, dash in zip(curves.items(), colors, DASHES, strict=False):
        seeds = np.asarray(values, dtype=float)
        seeds = seeds[None] if seeds.ndim == 1 else seeds
        if seeds.ndim != 2 or seeds.size == 0:
            raise ValueError(f"Expected {name} to be [n] or [seeds, n], got {list(seeds.shape)}.")
        places = range(1, seeds.shape[1] + 1) if x is None else x
        if len(places) != seeds.shape[1]:
            raise ValueError(f"{name} has {seeds.shape[1]} values for {len(places)} positions x.")
        mean = seeds.mean(0)
        axes.plot(list(places), mean, color=color, linestyle=dash, label=name)
        if len(seeds) > 1:
            band = seeds.min(0), seeds.max(0)
            axes.fill_between(list(places), *band, color=color, alpha=0.18, linewidth=0)
        ends[name] = mean[-1], color
    return ends


def _label_ends(axes: Axes, ends: dict[str, tuple[float, str]], height: float) -> None:
    """Write each name beside the end of its line, moved apart where lines end close together."""
    axes.set_ylim(axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    starts = {name: to_axes.transform((x, y))[1] for name, (y, _) in ends.items()}
    step = 0.19 / height
    names = sorted(starts, key=lambda name: starts[name])
    spots = [starts[name] for name in names]
    for _ in range(200):
        for i in range(len(spots) - 1):
            lack = step - (spots[i + 1] - spots[i])
            if lack > 0:
                spots[i] -= lack / 2
                spots[i + 1] += lack / 2
    inside: Any = {"transform": axes.transAxes}
    for name, spot in zip(names, spots, strict=True):
        to_name, color = [starts[name], spot], ends[name][1]
        axes.plot([1.0, 1.018], to_name, color=color, linewidth=1.2, clip_on=False, **inside)
        axes.text(1.026, spot, name, va="center", fontsize=10, **inside)


@drawn
def show_bars(
    bars: Values, ylabel: str, *, alt: str, digits: int = 1, highlight: str | None = None
) -> Figure:
    """Draw one bar a name: the mean of its values, each single value as a point on it.

    Each value is a number or one number per seed. The bars lie when names are long or many. The
    mean is written at the bar's end with `digits` decimals; `highlight` names the bar to colour.
    """
    series = {name: np.atleast_1d(np.asarray(v, dtype=float)) for name, v in bars.items()}
    if not series:
        raise ValueError("There are no bars to show.")
    if highlight is not None and highlight not in series:
        raise ValueError(f"There is no bar {highlight!r} to highlight: {', '.join(series)}.")
    empty = [name for name, values in series.items() if values.ndim != 1 or not values.size]
    if empty:
        raise ValueError(f"Expected a number or one number per seed for {', '.join(empty)}.")
    lying = max(map(len, series)) > 52 // len(series)
    means = [values.mean() for values in series.values()]
    tops = [max(values.max(), 0) for values in series.values()]
    least = min(0, *(values.min() for values in series.values()))
    span = max(tops) - least
    if lying:
        figure, axes = _rows_of_names(list(series), 0.42, 0.0137, 0.97)
        axes.invert_yaxis()
        axes.set_xlabel(ylabel)
    else:
        figure = new_figure(3.4)
        axes = figure.add_axes((0.11, 0.11, 0.86, 0.86))
        axes.set_xticks(range(len(series)), list(series))
        axes.set_ylabel(ylabel)
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)
    colors = [PALETTE["decoder" if name == highlight else "encoder"] for name in series]
    (axes.barh if lying else axes.bar)(range(len(series)), means, 0.62, color=colors)
    for place, values in enumerate(series.values()):
        if len(values) > 1:
            across = place + np.linspace(-0.14, 0.14, len(values))
            points = (values, across) if lying else (across, values)
            look: dict[str, Any] = {"ms": 4.8, "mfc": PAPER, "mec": INK, "mew": 0.9}
            axes.plot(*points, "o", zorder=3, clip_on=False, **look)
        falls = values.max() <= 0 and means[place] < 0
        end = values.min() - 0.02 * span if falls else tops[place] + 0.02 * span
        x, y = (end, place) if lying else (place, end)
        side: dict[str, Any] = {"ha": "center", "va": "top" if falls else "bottom"}
        if lying:
            side = {"ha": "right" if falls else "left", "va": "center"}
        axes.text(x, y, _written(means[place], digits), fontweight="bold", fontsize=10.5, **side)
    low = least - (0.2 if lying else 0.14) * span if least < 0 else 0  # room for the number
    (axes.set_xlim if lying else axes.set_ylim)(low, max(tops) + 0.12 * span)
    return figure


def _rows_of_names(
    names: Sequence[str], row: float, letter: float, right: float
) -> tuple[Figure, Axes]:
    """Return a figure with a name a row: a row is `row` inches high, a letter `letter` wide."""
    height = 0.75 + row * len(names)
    left = min(0.018 + letter * max(map(len, names)), 0.5)
    figure = new_figure(height)
    axes = figure.add_axes((left, 0.55 / height, right - left, 1 - 0.65 / height))
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _written(value: float, digits: int) -> str:
    """Return the rounded number as text, with a true minus; what rounds to zero has no sign."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


@drawn
def show_matrix(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    alt: str,
    digits: int = 0,
) -> Figure:
    """Draw numbers `[rows, columns]` as coloured cells with the number inside.

    Above zero cells are red, below zero blue, the more the further away; `label` says what the
    numbers are. Raises `ValueError` where there are not as many names as rows and columns.
    """
    array = np.asarray(values, dtype=float)
    named = (len(rows), len(columns))
    if array.shape != named:
        raise ValueError(f"Expected values {list(named)} for these names, got {list(array.shape)}.")
    most = max(float(np.nanmax(np.abs(array))), 1e-12)
    height = 0.62 + 0.34 * len(rows)
    figure = new_figure(height)
    left = 0.03 + 0.0137 * max(map(len, rows))
    axes = figure.add_axes((left, 0.06 / height, 0.97 - left, 1 - 0.62 / height))
    axes.imshow(array, cmap="RdBu_r", vmin=-1.3 * most, vmax=1.3 * most, aspect="auto")
    axes.set_xticks(range(len(columns)), list(columns), fontsize=10 if len(columns) < 8 else 8.5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(label)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for (row, column), value in np.ndenumerate(array):
        color, weight = (PAPER, "bold") if abs(value) > 0.75 * most else (INK, "normal")
        look: dict[str, Any] = {"color": color, "fontweight": weight}
        axes.text(column, row, _written(value, digits), ha="center", va="center", **look)
    return figure


@drawn
def show_tradeoff(
    points: Mapping[str, tuple[float, ArrayLike]],
    xlabel: str,
    ylabel: str,
    *,
    alt: str,
    groups: Mapping[str, Collection[str]] | None = None,
    front: Collection[str] = (),
    floor: float | None = None,
) -> Figure:
    """Draw one point a name, its score over its cost, with the name beside it.

    Each value is a positive cost, on a logarithmic axis, and a score or one score per seed: then
    the point is their mean, and a line reaches from the least to the greatest. `groups` colours
    the names that it lists under a word for the legend. Where `front` names some, their points are
    full and their names bold; all others are hollow. What scores less than `floor` is drawn at the
    lower edge, with its score behind its name, so that the others have room. Raises `ValueError`
    for an empty picture, a cost that is not positive, and names without a point.
    """
    listed = groups or {}
    unknown = {*front, *(name for names in listed.values() for name in names)} - set(points)
    if not points or unknown:
        raise ValueError(f"Expected points, one a name; there are none for {unknown or 'any'}.")
    if len(listed) > len(COLORS):
        raise ValueError(f"Expected at most {len(COLORS)} groups, one a colour; got {len(listed)}.")
    wrong = {name: cost for name, (cost, _) in points.items() if not cost > 0}
    if wrong:
        raise ValueError(f"Expected costs above zero, which a logarithm needs; got {wrong}.")
    height = 3.2 + 0.11 * len(points)
    above = 0.4 if listed else 0.12  # inches; a legend needs more
    figure = new_figure(height)
    axes = figure.add_axes((0.11, 0.57 / height, 0.87, 1 - (0.57 + above) / height))
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    color = dict.fromkeys(points, MUTED if listed else PALETTE[COLORS[0]])
    for each, names in zip(COLORS, listed.values(), strict=False):
        color |= dict.fromkeys(names, PALETTE[each])
    names_at: dict[str, tuple[str, float, float]] = {}
    bars = []
    for name, (cost, scores) in points.items():
        values = np.atleast_1d(np.asarray(scores, dtype=float))
        text, mark = name, "o"
        if floor is not None and values.mean() < floor:
            text, mark = f"{name} ({values.mean():.0f})", "v"
            values = np.array([floor])
        names_at[name] = text, cost, float(values.mean())
        bars += [((cost, values.min()), (cost, values.max()))]
        axes.plot(*zip(*bars[-1], strict=True), color=color[name], lw=1.5)
        fill = color[name] if name in front or not front else PAPER
        look: Any = {"ms": 6, "mfc": fill, "mec": color[name], "mew": 1.4, "zorder": 3}
        axes.plot(*names_at[name][1:], mark, **look)
    axes.margins(x=0.12, y=0.08)
    _readable_ticks(axes, [cost for cost, _ in points.values()])
    if listed:
        for each, group in zip(COLORS, listed, strict=False):
            axes.plot([], [], "o", color=PALETTE[each], label=group)
        figure.legend(loc="upper right", ncols=len(listed), borderaxespad=0.3)
    _name_points(figure, axes, names_at, bars, color, front)
    return figure


def _readable_ticks(axes: Axes, costs: list[float]) -> None:
    steps = (1, 1.5, 2, 3, 5, 7) if max(costs) / min(costs) < 20 else (1, 2, 5)
    low, high = axes.get_xlim()
    every = (step * 10.0**n for n in range(-4, 9) for step in steps)
    ticks = [tick for tick in every if low <= tick <= high]
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])


def _name_points(
    figure: Figure,
    axes: Axes,
    names_at: Mapping[str, tuple[str, float, float]],
    bars: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    color: Mapping[str, str],
    front: Collection[str],
) -> None:
    """Write each name where it covers least: near its point, inside the axes, beside the others."""
    canvas = figure.canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    taken = []
    for _, cost, score in names_at.values():
        x, y = axes.transData.transform((cost, score))
        taken.append(Bbox.from_bounds(x - 5, y - 5, 10, 10))
    for ends in bars:
        (x, low), (_, high) = axes.transData.transform(ends)
        taken.append(Bbox.from_extents(x - 1, low, x + 1, high))
    for name, (text, cost, score) in sorted(names_at.items(), key=lambda item: -item[1][2]):
        label = axes.annotate(
            text,
            (cost, score),
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=8.5,
            fontweight="bold" if name in front else "normal",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": color[name], "lw": 0.7, "shrinkB": 3},
        )
        costs = []
        for penalty, x, y, ha, va in (spots := list(_spots())):
            label.set(position=(x, y), ha=ha, va=va)
            box = _text_box(label, renderer)
            outside = box.width * box.height - _overlap(box, inside)
            costs.append(penalty + sum(_overlap(box, other) for other in taken) + 4 * outside)
        _, x, y, ha, va = spots[int(np.argmin(costs))]
        label.set(position=(x, y), ha=ha, va=va)
        label.arrow_patch.set_visible(max(abs(x), abs(y)) >= FAR)  # type: ignore[union-attr]
        taken.append(_text_box(label, renderer))


def _spots() -> Iterator[tuple[float, float, float, str, str]]:
    """Yield how far off a name would be, its offset in points, and the alignment to go with it."""
    for distance, (across, up) in product((7, 14, 22, 32, 44), product((1, -1, 0), (0, 1, -1))):
        if across or up:
            x = across * distance * (0.7 if up else 1)
            y = up * distance * (0.5 if across else 0.8)
            horizontal, vertical = ("center", "left", "right"), ("center", "bottom", "top")
            yield 2.0 * distance, x, y, horizontal[across], vertical[up]


def _text_box(label: Annotation, renderer: Any) -> Bbox:
    """Return where the words stand, without the line to the point."""
    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)


def _overlap(one: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(one, other)
    return shared.width * shared.height if shared is not None else 0.0


@drawn
def show_intervals(intervals: Values, xlabel: str, *, alt: str) -> Figure:
    """Draw one interval a name about a line at zero, the middle written at the right.

    Each value is (low, middle, high), or a number alone: a hollow point without an interval. An
    interval that holds zero is grey; the others are coloured by their side. Raises `ValueError`
    where there is nothing to draw or a value is neither.
    """
    found = {name: np.atleast_1d(np.asarray(v, dtype=float)) for name, v in intervals.items()}
    wrong = [name for name, value in found.items() if value.shape not in ((1,), (3,))]
    if wrong or not found:
        raise ValueError(f"Expected (low, middle, high) or a number for each name; see {wrong}.")
    figure, axes = _rows_of_names(list(found), ROW, 0.0122, 0.91)
    axes.tick_params(axis="y", labelsize=9.5)
    axes.axvline(0, color=INK, lw=1)
    for row, value in enumerate(found.values()):
        whole = len(value) == 3
        low, middle, high = value if whole else (-np.inf, value[0], np.inf)
        color = PALETTE["bridge"] if low > 0 else PALETTE["decoder"] if high < 0 else MUTED
        if whole:
            axes.plot([low, high], [row, row], color=color, lw=3, alpha=0.55)
        axes.plot(
            [middle], [row], "o", ms=5.5, color=color, mfc=color if whole else PAPER, zorder=3
        )
        text = f"{middle:+.1f}".replace("-", "−")
        axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    return figure


@drawn
def show_ranks(
    columns: Mapping[str, Mapping[str, float]], *, alt: str, highlight: Collection[str] = ()
) -> Figure:
    """Draw rankings side by side, the greatest score above, and a line from place to place.

    `columns` maps a title to scores by name, the same names in each; scores are written at the
    places, names at both sides. Lines of `highlight` are coloured. Raises `ValueError` for fewer
    than two columns and for columns with different names.
    """
    names = [set(scores) for scores in columns.values()]
    if len(names) < 2 or any(other != names[0] for other in names):
        raise ValueError("Expected two or more rankings of the same names.")
    orders = [sorted(scores, key=lambda name: -scores[name]) for scores in columns.values()]
    height = 0.45 + ROW * len(names[0])
    figure = new_figure(height)
    left = 0.018 + 0.0122 * max(map(len, names[0]))
    axes = figure.add_axes((left, 0.05 / height, 1 - 2 * left, 1 - 0.45 / height))
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5, "zorder": 4}
    words["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2}
    for name in orders[0]:
        places = [order.index(name) for order in orders]
        color, width, zorder, weight = (
            ("decoder", 2.4, 3, "bold") if name in highlight else ("sky", 1.4, 1, "normal")
        )
        axes.plot(places, color=PALETTE[color], lw=width, zorder=zorder)
        for column, (place, scores) in enumerate(zip(places, columns.values(), strict=True)):
            axes.text(column, place, f"{scores[name]:.1f}", fontweight=weight, **words)
    axes.set_xlim(-0.25, len(columns) - 0.75)
    for side, order in ((axes, orders[0]), (axes.twinx(), orders[-1])):
        side.set_ylim(len(names[0]) - 0.5, -0.5)
        side.set_yticks(range(len(order)), order, fontsize=9.5)
        side.tick_params(length=0)
        side.grid(visible=False)
        side.spines[:].set_visible(False)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.xaxis.tick_top()
    return figure
