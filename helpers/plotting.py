"""Every kind of picture that more than one chapter needs; each returns a `Picture`.

Every function takes `alt`, a sentence for those who cannot see the picture, and raises
`ValueError` where it is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from numpy.typing import NDArray
from skimage.color import lab2rgb
from skimage.segmentation import find_boundaries
from torch import Tensor

from helpers.charts import show_bars, show_curves, show_matrix, show_panels
from helpers.comparisons import show_intervals, show_ranks, show_tradeoff
from helpers.diagram import Diagram, pyramid_diagram
from helpers.encoder import Pyramid
from helpers.flipbook import Flipbook, flipbook
from helpers.pictures import (
    CLASS_COLORS,
    INK,
    MUTED,
    PALETTE,
    PAPER,
    Picture,
    as_image,
    as_mask,
    check_alt,
    class_legend,
    colorize,
    image_grid,
    new_figure,
    one_by_one,
    picture,
    put,
    shape_text,
    style,
)

__all__ = [
    "CLASS_COLORS",
    "INK",
    "MUTED",
    "PALETTE",
    "PAPER",
    "Diagram",
    "Flipbook",
    "Picture",
    "colorize",
    "flipbook",
    "new_figure",
    "picture",
    "pyramid_diagram",
    "show_bars",
    "show_curves",
    "show_errors",
    "show_features",
    "show_features_as_color",
    "show_heatmaps",
    "show_images",
    "show_intervals",
    "show_masks",
    "show_matrix",
    "show_panels",
    "show_ranks",
    "show_scenes",
    "show_tradeoff",
    "style",
]

TITLE = 0.3  # inches above an image that has a title
LEGEND = 0.34  # inches below the images for the classes
FEATURES = "magma"
ERROR_TEXT = "#b8432c"
HEAT = LinearSegmentedColormap.from_list(
    "heat", [to_rgba("#d8553d", 0.0), to_rgba("#d8553d", 0.75), to_rgba("#ffe08a", 0.95)]
)


def show_images(
    images: Sequence[Any] | Tensor | NDArray,
    titles: Sequence[str] | None = None,
    columns: int = 4,
    *,
    alt: str,
) -> Picture:
    """Show images side by side, `columns` in a row, each with its title.

    `images` is a list or a batch; each one `[3, H, W]`, `[H, W, 3]` or `[H, W]`, uint8 or
    floating point in 0…1. Raises `ValueError` or `TypeError` for anything else, and where there
    are not as many titles as images.
    """
    check_alt(alt)
    arrays = [as_image(image) for image in one_by_one(images, "images")]
    _same_length("titles", titles, arrays)
    columns = min(columns, len(arrays))
    rows = -(-len(arrays) // columns)
    aspect = max(array.shape[0] / array.shape[1] for array in arrays)
    with style():
        figure, grid = image_grid(rows, columns, aspect, head=TITLE if titles else 0)
        for index, array in enumerate(arrays):
            axes = grid[index // columns][index % columns]
            put(
                axes, array, titles[index] if titles else None, aspect="equal", interpolation="auto"
            )
        return picture(figure, alt)


def show_scenes(
    images: Sequence[Any] | Tensor,
    masks: Sequence[Any] | Tensor,
    predictions: Sequence[Any] | Tensor | None = None,
    *,
    alt: str,
    colors: Mapping[str, str] = CLASS_COLORS,
) -> Picture:
    """Show images above their masks and, where given, above what a network predicts.

    `images` as in `show_images`; `masks` and `predictions` are class indices `[H, W]`, one for
    each image, all of one size. `colors` gives each class its name and colour, by index.
    """
    arrays = [as_image(image) for image in one_by_one(images, "images")]
    rows = {"image": arrays, "mask": _colored(masks, "masks", colors)}
    if predictions is not None:
        rows["prediction"] = _colored(predictions, "predictions", colors)
    return _show_rows(rows, colors, alt)


def show_masks(
    rows: Mapping[str, Sequence[Any] | Tensor],
    *,
    alt: str,
    colors: Mapping[str, str] = CLASS_COLORS,
) -> Picture:
    """Show rows of masks under each other, one name a row, as many masks in each.

    Masks are class indices `[H, W]`, all of one size; `colors` as in `show_scenes`.
    """
    return _show_rows(
        {name: _colored(row, name, colors) for name, row in rows.items()}, colors, alt
    )


def _colored(masks: Any, what: str, colors: Mapping[str, str]) -> list[NDArray]:
    return [colorize(mask, colors) for mask in one_by_one(masks, what)]


def _show_rows(rows: Mapping[str, list[NDArray]], colors: Mapping[str, str], alt: str) -> Picture:
    check_alt(alt)
    first = next(iter(rows.values()))
    for name, row in rows.items():
        _same_length(name + "s", row, first)
    height, width = first[0].shape[:2]
    with style():
        figure, grid = image_grid(
            len(rows), len(first), height / width, left=0.24, foot=LEGEND, gap=0.07, widest=2.0
        )
        for axes_row, (name, row) in zip(grid, rows.items(), strict=True):
            _beside(axes_row[0], name)
            for axes, array in zip(axes_row, row, strict=True):
                put(axes, array)
        class_legend(figure, colors)
        return picture(figure, alt)


def show_features(
    maps: Pyramid | Mapping[str, Tensor], *, alt: str, channels: int | Sequence[int] = 6
) -> Picture:
    """Show feature maps, one level a row, one channel a column, each pixel of a map as a square.

    `maps` is a `Pyramid` or names with maps `[C, h, w]` or `[1, C, h, w]`. `channels` lists the
    channels to show, or says how many: then those that vary most over the image. Each map is
    drawn from its least value (dark) to its greatest (bright).
    """
    check_alt(alt)
    levels = _levels(maps)
    count = channels if isinstance(channels, int) else len(channels)
    _, height, width = next(iter(levels.values())).shape
    with style():
        figure, grid = image_grid(len(levels), count, height / width, left=1.12, gap=0.06)
        for axes_row, (name, level) in zip(grid, levels.items(), strict=True):
            _level_label(axes_row[0], name, level)
            for axes, channel in zip(axes_row, _choose(level, channels), strict=False):
                put(axes, level[channel].numpy(), cmap=FEATURES)
        return picture(figure, alt)


def show_features_as_color(
    image: Any, maps: Pyramid | Mapping[str, Tensor], *, alt: str
) -> Picture:
    """Show an image beside each level's three principal components as one colour a position.

    Positions that a level describes alike get the same colour. `image` as in `show_images`,
    `maps` as in `show_features`, at least three channels each. Colours are comparable within one
    level, not between levels.
    """
    check_alt(alt)
    array = as_image(image)
    levels = _levels(maps)
    cells: list[tuple[str, NDArray]] = [("image", array)]
    for name, level in levels.items():
        cells.append((f"{name}  {shape_text(level.shape)}", principal_colors(level)))
    columns = 3 if len(cells) in (3, 5, 6) else min(4, len(cells))
    rows = -(-len(cells) // columns)
    with style():
        aspect = array.shape[0] / array.shape[1]
        figure, grid = image_grid(rows, columns, aspect, head=TITLE)
        for index, (title, cell) in enumerate(cells):
            put(grid[index // columns][index % columns], cell, title)
        return picture(figure, alt)


def principal_colors(level: Tensor) -> NDArray[np.float32]:
    """Return the three strongest principal components of `[C, h, w]` as colours `[h, w, 3]`.

    The first is lightness, the second runs from green to red, the third from blue to yellow
    (CIELAB), each stretched from its 2nd to its 98th percentile. The covariance is decomposed
    exactly, so there is no seed; a component's largest loading is positive. Values in 0…1.
    """
    if level.shape[0] < 3:
        raise ValueError(f"Expected at least 3 channels, got {list(level.shape)}.")
    flat = level.flatten(1).double()
    flat = flat - flat.mean(1, keepdim=True)
    loadings = torch.linalg.eigh(flat @ flat.T).eigenvectors[:, -3:].flip(1)
    largest = loadings.gather(0, loadings.abs().argmax(0, keepdim=True))
    parts = (loadings * largest.sign()).T @ flat
    low, high = (parts.quantile(q, dim=1, keepdim=True) for q in (0.02, 0.98))
    parts = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    lightness, red, yellow = parts.reshape(3, *level.shape[1:]).numpy()
    lab = np.stack([30 + 64 * lightness, 90 * red - 45, 100 * yellow - 50], -1)
    return lab2rgb(lab).clip(0, 1).astype(np.float32)


def show_errors(
    image: Any,
    mask: Any,
    prediction: Any,
    *,
    alt: str,
    colors: Mapping[str, str] = CLASS_COLORS,
) -> Picture:
    """Show mask, prediction, and where they differ, over the dimmed image.

    `image` as in `show_images`; `mask` and `prediction` are class indices `[H, W]`. Wrong pixels
    are red; fine lines are the true outlines; the title gives the share of wrong pixels.
    """
    check_alt(alt)
    array, truth = as_image(image), as_mask(mask, len(colors))
    found = as_mask(prediction, len(colors))
    if not array.shape[:2] == truth.shape == found.shape:
        raise ValueError(
            f"Image {list(array.shape[:2])}, mask {list(truth.shape)} and prediction "
            f"{list(found.shape)} differ in size: bring the logits to the image's size first."
        )
    wrong = truth != found
    height, width = truth.shape
    extent = (0, width, height, 0)
    with style():
        figure, grid = image_grid(1, 3, height / width, head=TITLE, foot=LEGEND)
        put(grid[0][0], colorize(truth, colors), "mask")
        put(grid[0][1], colorize(found, colors), "prediction")
        put(grid[0][2], _dimmed(array), f"wrong: {100 * wrong.mean():.1f} %", extent=extent)
        grid[0][2].title.set_color(ERROR_TEXT)
        put(grid[0][2], _overlay(wrong, PALETTE["decoder"], 0.9), extent=extent)
        fine = find_boundaries(truth.repeat(4, 0).repeat(4, 1), mode="inner")
        put(grid[0][2], _overlay(fine, PAPER, 0.9), extent=extent)
        class_legend(figure, colors)
        return picture(figure, alt)


def show_heatmaps(
    image: Any,
    maps: Sequence[Any] | Tensor,
    titles: Sequence[str] | None = None,
    *,
    alt: str,
    columns: int = 4,
) -> Picture:
    """Lay heat maps over an image: the warmer and denser, the larger the value.

    `image` as in `show_images`; each map is `[h, w]`, no value negative, of any size, stretched
    over the image, and drawn relative to its own largest value.
    """
    check_alt(alt)
    array = as_image(image)
    heats = [_heat(heat) for heat in one_by_one(maps, "heat maps")]
    _same_length("titles", titles, heats)
    columns = min(columns, len(heats))
    rows = -(-len(heats) // columns)
    height, width = array.shape[:2]
    extent = (0, width, height, 0)
    with style():
        figure, grid = image_grid(rows, columns, height / width, head=TITLE if titles else 0)
        for index, heat in enumerate(heats):
            axes = grid[index // columns][index % columns]
            put(axes, _dimmed(array), titles[index] if titles else None, extent=extent)
            put(axes, heat, extent=extent, cmap=HEAT, vmin=0, vmax=max(heat.max(), 1e-12))
        return picture(figure, alt)


def _heat(heat: Any) -> NDArray[np.float32]:
    array = torch.as_tensor(heat).detach().cpu().float()
    if array.ndim != 2:
        raise ValueError(f"Expected a heat map [h, w], got {list(array.shape)}.")
    if not bool((array >= 0).all()):
        raise ValueError(
            "A heat map has negative values or NaN: take .abs() or .clamp(min=0) first."
        )
    return array.numpy()


def _dimmed(array: NDArray[np.float32]) -> NDArray[np.float32]:
    gray = array @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.repeat((0.12 + 0.5 * gray)[..., None], 3, axis=-1)


def _overlay(where: NDArray[np.bool_], color: str, strength: float) -> NDArray[np.float32]:
    layer = np.zeros((*where.shape, 4), dtype=np.float32)
    layer[where] = to_rgba(color, strength)
    return layer


def _levels(maps: Pyramid | Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = maps._asdict() if isinstance(maps, Pyramid) else dict(maps)
    if not named:
        raise ValueError("There are no maps to show.")
    levels = {}
    for name, level in named.items():
        level = level.detach().cpu().float()
        if level.ndim == 4:
            if len(level) != 1:
                raise ValueError(
                    f"{name} is a batch {list(level.shape)}: choose one image, {name}[:1]."
                )
            level = level[0]
        if level.ndim != 3:
            raise ValueError(f"Expected {name} to be [C, h, w], got {list(level.shape)}.")
        levels[name] = level
    return levels


def _choose(level: Tensor, channels: int | Sequence[int]) -> list[int]:
    if isinstance(channels, int):
        return level.flatten(1).std(1).topk(min(channels, len(level))).indices.tolist()
    if max(channels) >= len(level):
        raise ValueError(
            f"Channel {max(channels)} is not there: the map has {len(level)} channels."
        )
    return list(channels)


def _level_label(axes: Axes, name: str, level: Tensor) -> None:
    words: dict[str, Any] = {"transform": axes.transAxes, "ha": "right"}
    axes.text(-0.08, 0.53, name, va="bottom", fontweight="bold", **words)
    axes.text(-0.08, 0.47, shape_text(level.shape), va="top", fontsize=9.5, color=MUTED, **words)


def _beside(axes: Axes, name: str) -> None:
    axes.text(
        -0.05,
        0.5,
        name,
        transform=axes.transAxes,
        rotation=90,
        ha="right",
        va="center",
        fontsize=10.5,
        fontweight="bold",
    )


def _same_length(what: str, given: Sequence[Any] | None, images: Sequence[Any]) -> None:
    if given is not None and len(given) != len(images):
        raise ValueError(f"Expected as many {what} as images, {len(images)}, got {len(given)}.")
