"""Curves and bars: numbers with their spread."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from helpers.pictures import INK, PALETTE, PAPER, Picture, check_alt, new_figure, picture, style

DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), "-")


def show_curves(
    curves: Mapping[str, ArrayLike],
    xlabel: str,
    ylabel: str,
    *,
    alt: str,
    x: Sequence[float] | None = None,
    log: bool = False,
) -> Picture:
    """Draw one line a name, labelled at its end.

    Each value is `[n]`, or `[seeds, n]`: then the line is the mean and the band reaches from the
    least to the greatest seed. `x` gives the n positions (else 1…n); `log` makes the vertical axis
    logarithmic. Raises `ValueError` where there is nothing to draw or lengths differ.
    """
    check_alt(alt)
    series = {name: _seeds(name, values) for name, values in curves.items()}
    if not series:
        raise ValueError("There are no curves to show.")
    with style():
        figure = new_figure(3.6)
        longest = max(map(len, series))
        right = 0.97 - (0.0135 * longest + 0.01)
        axes = figure.add_axes((0.11, 0.155, right - 0.11, 0.815))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if log:
            axes.set_yscale("log")
        ends = {}
        for (name, values), color, dash in zip(
            series.items(), _cycle(len(series)), DASHES * len(series), strict=False
        ):
            places = np.arange(1, values.shape[1] + 1) if x is None else np.asarray(x)
            if len(places) != values.shape[1]:
                raise ValueError(
                    f"{name} has {values.shape[1]} values for {len(places)} positions x."
                )
            mean = values.mean(0)
            axes.plot(places, mean, color=color, linestyle=dash)
            if len(values) > 1:
                band = values.min(0), values.max(0)
                axes.fill_between(places, *band, color=color, alpha=0.18, linewidth=0)
            ends[name] = (mean[-1], color)
        axes.margins(x=0.01)
        _label_ends(axes, ends, 0.815 * 3.6)
        return picture(figure, alt)


def show_bars(
    bars: Mapping[str, ArrayLike],
    ylabel: str,
    *,
    alt: str,
    digits: int = 1,
    highlight: str | None = None,
) -> Picture:
    """Draw one bar a name: the mean of its values, each single value as a point on it.

    Each value is a number or one number per seed. The bars lie when names are long or many. The
    mean is written at the bar's end with `digits` decimals; `highlight` names the bar to colour.
    """
    check_alt(alt)
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
    with style():
        figure, axes = _lying(series, ylabel) if lying else _standing(series, ylabel)
        draw = axes.barh if lying else axes.bar
        colors = [PALETTE["decoder" if name == highlight else "encoder"] for name in series]
        draw(range(len(series)), means, 0.62, color=colors)
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
            axes.text(x, y, written(means[place], digits), fontweight="bold", fontsize=10.5, **side)
        low = least - (0.2 if lying else 0.14) * span if least < 0 else 0  # room for the number
        (axes.set_xlim if lying else axes.set_ylim)(low, max(tops) + 0.12 * span)
        return picture(figure, alt)


def _lying(names: Collection[str], label: str) -> tuple[Figure, Axes]:
    height = 0.75 + 0.42 * len(names)
    left = min(0.018 + 0.0137 * max(map(len, names)), 0.5)
    figure = new_figure(height)
    axes = figure.add_axes((left, 0.55 / height, 0.97 - left, 1 - 0.65 / height))
    axes.set_yticks(range(len(names)), list(names))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _standing(names: Collection[str], label: str) -> tuple[Figure, Axes]:
    figure = new_figure(3.4)
    axes = figure.add_axes((0.11, 0.11, 0.86, 0.86))
    axes.set_xticks(range(len(names)), list(names))
    axes.set_ylabel(label)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    return figure, axes


def show_panels(
    panels: Mapping[str, Mapping[str, ArrayLike]], *, x: Sequence[Any], alt: str, xlabel: str = ""
) -> Picture:
    """Draw a few small charts side by side, each with the same lines over the same positions.

    `panels` maps a panel's title to its lines, as in `show_curves`; `x` names the positions, or
    gives them as integers, and `xlabel` says of what. Each panel has a vertical axis of its own.
    Raises `ValueError` where panels have different lines.
    """
    check_alt(alt)
    names = [list(curves) for curves in panels.values()]
    if not names or any(other != names[0] for other in names):
        raise ValueError(f"Expected at least one panel, all with the same lines; got {names}.")
    with style():
        height = 3.1 + (0.25 if xlabel else 0)  # inches
        figure = new_figure(height)
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        right = 0.985 - 0.007 * max(0, len(str(x[-1])) - 2)  # half of the last name is beyond
        bottom, top = (height - 2.35) / height, 1 - 0.4 / height
        figure.subplots_adjust(left=0.08, right=right, top=top, bottom=bottom, wspace=0.3)
        for axes, (title, curves) in zip(grid, panels.items(), strict=True):
            axes.set_title(title, fontsize=10.5, loc="left")
            axes.set_xlabel(xlabel)
            for (name, values), color, dash in zip(
                curves.items(), _cycle(len(curves)), DASHES * len(curves), strict=False
            ):
                series = _seeds(name, values)
                if series.shape[1] != len(x):
                    raise ValueError(f"{name} has {series.shape[1]} values for {len(x)} positions.")
                axes.plot(list(x), series.mean(0), color=color, linestyle=dash, label=name)
                band = series.min(0), series.max(0)
                axes.fill_between(list(x), *band, color=color, alpha=0.18, linewidth=0)
            if not isinstance(x[0], str):
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        lines, labels = grid[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="lower center", ncols=len(labels), handlelength=2.6)
        return picture(figure, alt)


def show_matrix(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    alt: str,
    digits: int = 0,
) -> Picture:
    """Draw numbers `[rows, columns]` as coloured cells with the number inside.

    Above zero cells are red, below zero blue, the more the further away; `label` says what the
    numbers are. Raises `ValueError` where there are not as many names as rows and columns.
    """
    check_alt(alt)
    array = np.asarray(values, dtype=float)
    if array.shape != (len(rows), len(columns)):
        raise ValueError(
            f"Expected values [{len(rows)}, {len(columns)}] for these names, got "
            f"{list(array.shape)}."
        )
    most = max(float(np.nanmax(np.abs(array))), 1e-12)
    with style():
        height = 0.62 + 0.34 * len(rows)
        figure = new_figure(height)
        left = 0.03 + 0.0137 * max(map(len, rows))
        axes = figure.add_axes((left, 0.06 / height, 0.97 - left, 1 - 0.62 / height))
        axes.imshow(array, cmap="RdBu_r", vmin=-1.3 * most, vmax=1.3 * most, aspect="auto")
        size = 10 if len(columns) < 8 else 8.5
        axes.set_xticks(range(len(columns)), list(columns), fontsize=size)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(label)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for (row, column), value in np.ndenumerate(array):
            strong = abs(value) > 0.75 * most
            color, weight = (PAPER, "bold") if strong else (INK, "normal")
            text = written(value, digits)
            axes.text(column, row, text, ha="center", va="center", color=color, fontweight=weight)
        return picture(figure, alt)


def written(value: float, digits: int) -> str:
    """Return the rounded number as text, with a true minus; what rounds to zero has no sign."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def _seeds(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=float)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"Expected {name} to be [n] or [seeds, n], got {list(array.shape)}.")
    return array


def _cycle(count: int) -> list[str]:
    colors = list(PALETTE.values())
    if count > len(colors):
        raise ValueError(
            f"{count} curves in one picture cannot be told apart: at most {len(colors)}."
        )
    return colors[:count]


def _label_ends(axes: Axes, ends: dict[str, tuple[float, str]], height: float) -> None:
    """Write each name beside the end of its line, moved apart where lines end close together."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    wanted = {name: to_axes.transform((x, y))[1] for name, (y, _) in ends.items()}
    step = 0.19 / height
    names = sorted(wanted, key=lambda name: wanted[name])
    spots = [wanted[name] for name in names]
    for _ in range(200):
        for i in range(len(spots) - 1):
            lack = step - (spots[i + 1] - spots[i])
            if lack > 0:
                spots[i] -= lack / 2
                spots[i + 1] += lack / 2
    for name, spot in zip(names, spots, strict=True):
        y, color = ends[name]
        start = to_axes.transform((x, y))[1]
        axes.plot(
            [1.0, 1.018],
            [start, spot],
            transform=axes.transAxes,
            color=color,
            linewidth=1.2,
            clip_on=False,
        )
        axes.text(1.026, spot, name, transform=axes.transAxes, va="center", fontsize=10)
