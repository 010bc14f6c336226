"""Pictures of images, masks and features, and what every picture of the book shares."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgba, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from helpers.encoder import Pyramid

P = ParamSpec("P")
Images = Sequence[Any] | Tensor | NDArray  # a list or a batch
Maps = Pyramid | Mapping[str, Tensor]
Colors = Mapping[str, str]  # by the names of the classes, in their order

WIDTH = 6.4  # inches
CSS_DPI = 100  # a figure of 6.4 inches is shown 640 CSS pixels wide …
PNG_DPI = 200  # … and stored with twice as many, for sharp screens
MARGIN = 0.12  # inches
TITLE = 0.3  # inches above an image that has a title
LEGEND = 0.34  # inches below the images for the classes
LEGEND_ROW = 0.2  # inches that each row of class names after the first takes

PAPER = "#faf8f4"
INK = "#22304a"
MUTED = "#5b6577"
LINE = "#d9d4c8"

CLASS_COLORS = {
    "background": "#1d2845",
    "disc": "#d8553d",
    "square": "#f4cc6c",
    "triangle": "#80c291",
    "star": "#546fc0",
    "ring": "#bb5a85",
    "pole": "#f7f4ec",
}
"""The seven classes of the scenes, by class index; told apart in every kind of colour blindness."""

PALETTE = {
    "encoder": "#1f4c89",
    "decoder": "#ca4c38",
    "bridge": "#2f9c8d",
    "gold": "#e0b44e",
    "plum": "#6d1f4e",
    "sky": "#9cb2de",
}
"""The colours of series and of the network's parts."""

FEATURES = "magma"
ERROR_TEXT = "#b8432c"
HEAT = LinearSegmentedColormap.from_list(
    "heat", [to_rgba("#d8553d", 0.0), to_rgba("#d8553d", 0.75), to_rgba("#ffe08a", 0.95)]
)

RC: Any = {
    "font.family": "DejaVu Sans",
    "axes.prop_cycle": cycler(color=list(PALETTE.values())),
    "axes.titleweight": "bold",
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2,
    **dict.fromkeys(["figure.facecolor", "axes.facecolor"], PAPER),
    **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"], INK),
    **dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color"], MUTED),
    **dict.fromkeys(["font.size", "axes.labelsize", "axes.titlesize"], 11),
    **dict.fromkeys(["xtick.labelsize", "ytick.labelsize", "legend.fontsize"], 10),
    **dict.fromkeys(["axes.grid", "axes.axisbelow"], True),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
}


@dataclass(frozen=True)
class Picture:
    """A finished picture: PNG, alternative text, size in CSS pixels. The notebook displays it."""

    png: bytes = field(repr=False)
    alt: str
    width: int
    height: int

    def save(self, path: str | Path) -> None:
        """Write the PNG to `path`."""
        Path(path).write_bytes(self.png)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        data = {"image/png": base64.b64encode(self.png).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt, "width": self.width, "height": self.height}}


def picture(figure: Figure, alt: str) -> Picture:
    """Turn a finished matplotlib figure into a `Picture`; nothing displays the figure again.

    `alt` says in a sentence what the figure shows, for those who cannot see it. Raises
    `ValueError` where `alt` is empty and `TypeError` where `figure` is no matplotlib figure.
    """
    check_alt(alt)
    if not isinstance(figure, Figure):
        raise TypeError(f"Expected a matplotlib Figure, got {type(figure).__name__}.")
    figure.set_facecolor(PAPER)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(PNG_DPI)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    if "matplotlib.pyplot" in sys.modules:  # else nothing knows the figure, nothing shows it
        sys.modules["matplotlib.pyplot"].close(figure)
    height, width = (round(side * CSS_DPI / PNG_DPI) for side in pixels.shape[:2])
    return Picture(encode(pixels), alt, width, height)


def drawn(draw: Callable[P, Figure]) -> Callable[P, Picture]:
    """Make a function that draws a figure return a `Picture` in the book's style."""
    draw.__annotations__["return"] = "Picture"  # what help() shows

    @functools.wraps(draw)
    def wrapped(*args: P.args, **keywords: P.kwargs) -> Picture:
        alt: Any = keywords.get("alt")
        check_alt(alt)
        with style():
            return picture(draw(*args, **keywords), alt)

    return wrapped


def check_alt(alt: str) -> None:
    """Raise a clear error unless `alt` is text that says something."""
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(
            'The alternative text is empty. Say in a sentence what the picture shows: alt="…".'
        )


@contextmanager
def style() -> Iterator[None]:
    """Inside this context matplotlib draws as the book does: paper, lettering, colours."""
    with matplotlib.rc_context(RC):
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Return an empty figure, `width × height` inches, that pyplot does not know about."""
    return Figure(figsize=(width, round(height, 2)))


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Return RGB `[H, W, 3]` as a PNG, with 256 colours if they are enough, else with all.

    They are enough if they are within 2 grey levels (root mean square), or if all of them would
    take more than 300 kB.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    reduced = image.quantize(palette=_palette(pixels), dither=Image.Dither.NONE)
    error = np.asarray(reduced.convert("RGB"), dtype=np.float32) - pixels
    if np.square(error).mean() > 2**2:
        whole = _png(image)
        if len(whole) <= 300_000:
            return whole
    return _png(reduced)


def _palette(pixels: NDArray[np.uint8]) -> Image.Image:
    """Choose 256 colours; those of flat areas and legends are kept as they are."""
    codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    found, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:64]
    flat = found[order][counts[order] >= 400]
    colors = np.stack([flat >> 16, flat >> 8 & 255, flat & 255], -1).astype(np.uint8)
    others = pixels[~np.isin(codes, flat)]
    if len(others):
        sample = Image.fromarray(others[None, :: 1 + len(others) // 60_000])
        rest = sample.quantize(256 - len(flat), dither=Image.Dither.NONE, kmeans=1).getpalette()
        colors = np.concatenate([colors, np.array(rest, dtype=np.uint8).reshape(-1, 3)])
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors.tobytes())
    return palette


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def as_image(image: Tensor | NDArray | Image.Image) -> NDArray[np.float32]:
    """Return `[H, W, 3]` in 0…1 from what people call an image.

    Takes a tensor, an array or a Pillow picture, `[3, H, W]`, `[H, W, 3]`, `[1, H, W]` or
    `[H, W]`, either uint8 or floating point in 0…1. Raises `ValueError` for another shape or
    range, `TypeError` for another dtype.
    """
    array = _array(image)
    if array.dtype in (np.bool_, np.uint8):
        array = array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"Expected uint8 or floating point in 0…1, got {array.dtype}.")
    given = list(array.shape)
    if array.ndim == 4:
        raise ValueError(f"Expected one image, got a batch {given}: choose one, images[0].")
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or not array.size:
        raise ValueError(f"Expected an image [3, H, W], [H, W, 3] or [H, W], got {given}.")
    # Interpolation and float16 overshoot by a hair; what is further out is normalised or 0…255.
    if not (array.min() >= -0.01 and array.max() <= 1.01):
        raise ValueError(
            f"Expected values in 0…1, got {array.min():.3g}…{array.max():.3g}. Show the image as "
            "it was before normalize(), and divide pixels stored as 0…255 by 255."
        )
    return np.broadcast_to(array, (*array.shape[:2], 3)).clip(0, 1).astype(np.float32)


def as_mask(mask: Tensor | NDArray, classes: int) -> NDArray[np.int64]:
    """Return class indices `[H, W]`, each in 0…classes − 1; raises like `as_image`."""
    array = _array(mask)
    if array.ndim != 2:
        cure = " Take argmax over the classes first." if array.ndim == 3 else ""
        raise ValueError(f"Expected class indices [H, W], got {list(array.shape)}.{cure}")
    if array.dtype.kind not in "iub":
        raise TypeError(f"Expected class indices, got {array.dtype}: logits.argmax(0) gives them.")
    if array.size and (array.min() < 0 or array.max() >= classes):
        raise ValueError(
            f"Expected class indices 0…{classes - 1}, got {array.min()}…{array.max()}. Give "
            "colors= one colour for each class, or set what is ignored to a class."
        )
    return array.astype(np.int64)


def _array(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def colorize(mask: Tensor | NDArray, colors: Colors = CLASS_COLORS) -> NDArray[np.float32]:
    """Return class indices `[H, W]` as colours `[H, W, 3]` in 0…1."""
    table = to_rgba_array(list(colors.values()))[:, :3].astype(np.float32)
    return table[as_mask(mask, len(colors))]


def shape_text(shape: Sequence[int]) -> str:
    """Return `64 × 32 × 32`."""
    return " × ".join(map(str, shape))


# Images and masks


@drawn
def show_images(
    images: Images, titles: Sequence[str] | None = None, columns: int = 4, *, alt: str
) -> Figure:
    """Show images side by side, `columns` in a row, each with its title.

    `images` is a list or a batch; each one `[3, H, W]`, `[H, W, 3]` or `[H, W]`, uint8 or
    floating point in 0…1. Raises `ValueError` or `TypeError` for anything else, and where there
    are not as many titles as images.
    """
    arrays = [as_image(image) for image in _one_by_one(images, "images")]
    aspect = max(array.shape[0] / array.shape[1] for array in arrays)
    figure, cells = _wrapped(arrays, titles, columns, aspect)
    for axes, array, title in cells:
        _put(axes, array, title, aspect="equal", interpolation="auto")
    return figure


def show_scenes(
    images: Images,
    masks: Images,
    predictions: Images | None = None,
    *,
    alt: str,
    colors: Colors = CLASS_COLORS,
) -> Picture:
    """Show images above their masks and, where given, above what a network predicts.

    `images` as in `show_images`; `masks` and `predictions` are class indices `[H, W]`, one for
    each image, all of one size. `colors` gives each class its name and colour, by index.
    """
    rows = {"mask": masks} if predictions is None else {"mask": masks, "prediction": predictions}
    shown = {"image": [as_image(image) for image in _one_by_one(images, "images")]}
    return _show_rows(shown | _colored(rows, colors), colors, alt=alt)


def show_masks(rows: Mapping[str, Images], *, alt: str, colors: Colors = CLASS_COLORS) -> Picture:
    """Show rows of masks under each other, one name a row, as many masks in each.

    Masks are class indices `[H, W]`, all of one size; `colors` as in `show_scenes`.
    """
    return _show_rows(_colored(rows, colors), colors, alt=alt)


def _colored(rows: Mapping[str, Any], colors: Colors) -> dict[str, list[NDArray]]:
    return {
        name: [colorize(mask, colors) for mask in _one_by_one(row, name + "s")]
        for name, row in rows.items()
    }


@drawn
def _show_rows(rows: Mapping[str, list[NDArray]], colors: Colors, *, alt: str) -> Figure:
    first = next(iter(rows.values()))
    for name, row in rows.items():
        _check_count(name + "s", row, first)
    height, width = first[0].shape[:2]
    figure, grid = _image_grid(
        len(rows), len(first), height / width, left=0.24, foot=LEGEND, gap=0.07, widest=2.0
    )
    words: Any = {"rotation": 90, "va": "center", "fontsize": 10.5}
    for axes_row, (name, row) in zip(grid, rows.items(), strict=True):
        _beside(axes_row[0], -0.05, 0.5, name, fontweight="bold", **words)
        for axes, array in zip(axes_row, row, strict=True):
            _put(axes, array)
    _class_legend(figure, colors)
    return figure


@drawn
def show_errors(
    image: Any, mask: Any, prediction: Any, *, alt: str, colors: Colors = CLASS_COLORS
) -> Figure:
    """Show mask, prediction, and where they differ, over the dimmed image.

    `image` as in `show_images`; `mask` and `prediction` are class indices `[H, W]`. Wrong pixels
    are red; fine lines are the true boundaries; the title gives the share of wrong pixels.
    """
    from skimage.segmentation import find_boundaries  # no other picture of a mask needs it

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
    figure, ((left, middle, right),) = _image_grid(1, 3, height / width, head=TITLE, foot=LEGEND)
    _put(left, colorize(truth, colors), "mask")
    _put(middle, colorize(found, colors), "prediction")
    _put(right, _dimmed(array), f"wrong: {100 * wrong.mean():.1f} %", extent=extent)
    right.title.set_color(ERROR_TEXT)
    fine = find_boundaries(truth.repeat(4, 0).repeat(4, 1), mode="inner")
    for where, color in ((wrong, PALETTE["decoder"]), (fine, PAPER)):
        layer = where[..., None] * np.array(to_rgba(color, 0.9), dtype=np.float32)
        _put(right, layer, extent=extent)
    _class_legend(figure, colors)
    return figure


@drawn
def show_heatmaps(
    image: Any, maps: Images, titles: Sequence[str] | None = None, *, alt: str, columns: int = 4
) -> Figure:
    """Lay heat maps over an image: the warmer and denser, the larger the value.

    `image` as in `show_images`; each map is `[h, w]`, no value negative, of any size, stretched
    over the image, and drawn relative to its own largest value.
    """
    array = as_image(image)
    heats = [_heat(heat) for heat in _one_by_one(maps, "heat maps")]
    height, width = array.shape[:2]
    extent = (0, width, height, 0)
    figure, cells = _wrapped(heats, titles, columns, height / width)
    for axes, heat, title in cells:
        _put(axes, _dimmed(array), title, extent=extent)
        _put(axes, heat, extent=extent, cmap=HEAT, vmin=0, vmax=max(heat.max(), 1e-12))
    return figure


def _heat(heat: Any) -> NDArray[np.float32]:
    array = torch.as_tensor(heat).detach().cpu().float()
    if array.ndim != 2:
        raise ValueError(f"Expected a heat map [h, w], got {list(array.shape)}.")
    if not bool((array >= 0).all()):
        raise ValueError("A heat map has negative values or NaN: .abs() or .clamp(min=0) first.")
    return array.numpy()


def _dimmed(array: NDArray[np.float32]) -> NDArray[np.float32]:
    gray = array @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.repeat((0.12 + 0.5 * gray)[..., None], 3, axis=-1)


# Features


@drawn
def show_features(maps: Maps, *, alt: str, channels: int | Sequence[int] = 6) -> Figure:
    """Show feature maps, one level a row, one channel a column, each pixel of a map as a square.

    `maps` is a `Pyramid` or names with maps `[C, h, w]` or `[1, C, h, w]`. `channels` lists the
    channels to show, or says how many: then those that vary most over the image. Each map is
    drawn from its least value (dark) to its greatest (bright).
    """
    levels = _levels(maps)
    count = channels if isinstance(channels, int) else len(channels)
    _, height, width = next(iter(levels.values())).shape
    figure, grid = _image_grid(len(levels), count, height / width, left=1.12, gap=0.06)
    for axes_row, (name, level) in zip(grid, levels.items(), strict=True):
        shape = shape_text(level.shape)
        _beside(axes_row[0], -0.08, 0.53, name, va="bottom", fontweight="bold")
        _beside(axes_row[0], -0.08, 0.47, shape, va="top", fontsize=9.5, color=MUTED)
        for axes, channel in zip(axes_row, _choose(level, channels), strict=False):
            _put(axes, level[channel].numpy(), cmap=FEATURES)
    return figure


@drawn
def show_features_as_color(image: Any, maps: Maps, *, alt: str) -> Figure:
    """Show an image beside each level's three principal components as one colour a position.

    Positions that a level describes alike get the same colour. `image` as in `show_images`,
    `maps` as in `show_features`, at least three channels each. Colours are comparable within one
    level, not between levels.
    """
    levels = _levels(maps)
    shown = [as_image(image), *map(principal_colors, levels.values())]
    titles = ["image", *(f"{name}  {shape_text(level.shape)}" for name, level in levels.items())]
    columns = 3 if len(shown) in (3, 5, 6) else 4
    figure, cells = _wrapped(shown, titles, columns, shown[0].shape[0] / shown[0].shape[1])
    for cell in cells:
        _put(*cell)
    return figure


def principal_colors(level: Tensor) -> NDArray[np.float32]:
    """Return the three strongest principal components of `[C, h, w]` as colours `[h, w, 3]`.

    The first is lightness, the second runs from green to red, the third from blue to yellow
    (CIELAB), each stretched from its 2nd to its 98th percentile. The covariance is decomposed
    exactly, so there is no seed; a component's largest loading is positive. Values in 0…1.
    """
    from skimage.color import lab2rgb

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


def _levels(maps: Maps) -> dict[str, Tensor]:
    levels = {}
    for name, level in (maps._asdict() if isinstance(maps, Pyramid) else maps).items():
        if level.ndim == 4 and len(level) != 1:
            raise ValueError(f"{name} is a batch {list(level.shape)}: choose one, {name}[:1].")
        if level.ndim not in (3, 4):
            raise ValueError(f"Expected {name} to be [C, h, w], got {list(level.shape)}.")
        levels[name] = level.detach().cpu().float().reshape(level.shape[-3:])
    if not levels:
        raise ValueError("There are no maps to show.")
    return levels


def _choose(level: Tensor, channels: int | Sequence[int]) -> Sequence[int]:
    if isinstance(channels, int):
        return level.flatten(1).std(1).topk(min(channels, len(level))).indices.tolist()
    if max(channels) >= len(level):
        raise ValueError(f"Channel {max(channels)} is not there: the map has {len(level)}.")
    return channels


# Grids of images


def _one_by_one(images: Any, what: str) -> list[Any]:
    """Return the members of a list or batch; raises `ValueError` where there are none."""
    single = isinstance(images, (Tensor, np.ndarray)) and images.ndim < 3
    if members := [images] if single else list(images):
        return members
    raise ValueError(f"There are no {what} to show.")


def _check_count(what: str, given: Sequence[Any], images: Sequence[Any]) -> None:
    if len(given) != len(images):
        raise ValueError(f"Expected as many {what} as images, {len(images)}, got {len(given)}.")


def _wrapped(
    arrays: Sequence[NDArray], titles: Sequence[str] | None, columns: int, aspect: float
) -> tuple[Figure, Iterator[tuple[Axes, NDArray, str]]]:
    """Return a figure with rows of `columns` cells, and axes, array and title of each."""
    _check_count("titles", arrays if titles is None else titles, arrays)
    columns = min(columns, len(arrays))
    rows = -(-len(arrays) // columns)
    figure, grid = _image_grid(rows, columns, aspect, head=TITLE if titles else 0)
    cells = itertools.chain.from_iterable(grid)
    return figure, zip(cells, arrays, titles or [""] * len(arrays), strict=False)


def _image_grid(
    rows: int,
    columns: int,
    aspect: float,
    *,
    head: float = 0.0,
    left: float = 0.0,
    foot: float = 0.0,
    gap: float = 0.1,
    widest: float = 2.6,
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with a grid of empty axes of one size, measured in inches.

    `aspect` is height ÷ width of one cell; `head` is kept free above each row, `left` before the
    first column, `foot` below the last row; no cell is wider than `widest`, a single one 1.8 times.
    """
    room = WIDTH - 2 * MARGIN - left - gap * (columns - 1)
    cell = min(room / columns, widest if columns > 1 else 1.8 * widest)
    start = MARGIN + left + (room - cell * columns) / 2
    high = cell * aspect
    height = 2 * MARGIN + rows * (head + high) + gap * (rows - 1) + foot
    figure = new_figure(height)

    def cell_axes(row: int, column: int) -> Axes:
        x = start + column * (cell + gap)
        below = MARGIN + row * (head + high + gap) + head + high
        box = (x / WIDTH, 1 - below / height, cell / WIDTH, high / height)
        axes = figure.add_axes(box)
        axes.set_axis_off()
        return axes

    return figure, [[cell_axes(row, column) for column in range(columns)] for row in range(rows)]


def _put(axes: Axes, image: NDArray, title: str = "", **keywords: Any) -> None:
    """Draw one image into axes of a grid, filling them, with a title above."""
    axes.imshow(image, **{"interpolation": "nearest", "aspect": "auto", **keywords})
    if title:
        axes.set_title(title, pad=4, fontsize=10.5)


def _beside(axes: Axes, x: float, y: float, text: str, **words: Any) -> None:
    axes.text(x, y, text, transform=axes.transAxes, ha="right", **words)


def _class_legend(figure: Figure, colors: Colors) -> None:
    """Write the classes below the axes: up to 7 go where `foot` is free; for more, it grows."""
    rows = -(-len(colors) // 7)
    width, before = figure.get_size_inches()
    height = before + (rows - 1) * LEGEND_ROW
    figure.set_size_inches(width, height)
    for axes in figure.axes:  # they keep their size and distance to the top
        x, y, w, h = axes.get_position().bounds
        axes.set_position((x, 1 - (1 - y) * before / height, w, h * before / height))
    box: dict[str, Any] = {"edgecolor": MUTED, "linewidth": 0.6}
    patches = [Patch(facecolor=color, label=name, **box) for name, color in colors.items()]
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.0), "fontsize": 9.5}
    em: dict[str, Any] = {"handlelength": 0.9, "handleheight": 0.9, "columnspacing": 0.9}
    columns = -(-len(colors) // rows)
    figure.legend(handles=patches, ncols=columns, handletextpad=0.4, **place, **em)
