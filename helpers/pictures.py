"""What every picture of the book shares: colours, lettering, paper, and alternative text."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

WIDTH = 6.4  # inches
CSS_DPI = 100  # a figure of 6.4 inches is shown 640 CSS pixels wide …
PNG_DPI = 200  # … and stored with twice as many, for sharp screens
MARGIN = 0.12  # inches
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

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=list(PALETTE.values())),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "legend.fontsize": 10,
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
    return Picture(encode(pixels), alt, *css_size(pixels))


def css_size(pixels: NDArray[np.uint8]) -> tuple[int, int]:
    height, width = (round(side * CSS_DPI / PNG_DPI) for side in pixels.shape[:2])
    return width, height


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


def check_alt(alt: str) -> None:
    """Raise a clear error unless `alt` is text that says something."""
    if not isinstance(alt, str):
        raise TypeError(f"Expected alternative text, got {type(alt).__name__}.")
    if not alt.strip():
        raise ValueError(
            'The alternative text is empty. Say in a sentence what the picture shows: alt="…".'
        )


@contextmanager
def style() -> Iterator[None]:
    """Inside this context matplotlib draws as the book does: paper, lettering, colours."""
    with matplotlib.rc_context(RC):
        yield


def new_figure(height: float, width: float = WIDTH, **keywords: Any) -> Figure:
    """Return an empty figure, `width × height` inches, that pyplot does not know about."""
    return Figure(figsize=(width, round(height, 2)), **keywords)


def as_image(image: Tensor | NDArray | Image.Image) -> NDArray[np.float32]:
    """Return `[H, W, 3]` in 0…1 from what people call an image.

    Takes a tensor, an array or a Pillow picture, `[3, H, W]`, `[H, W, 3]`, `[1, H, W]` or
    `[H, W]`, either uint8 or floating point in 0…1. Raises `ValueError` for another shape or
    range, `TypeError` for another dtype.
    """
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype == np.bool_:
        array = array.astype(np.float32)
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / 255
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"Expected uint8 or floating point in 0…1, got {array.dtype}.")
    if array.ndim == 4:
        raise ValueError(
            f"Expected one image, got a batch {list(array.shape)}: choose one, images[0]."
        )
    given = array.shape
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or not array.size:
        raise ValueError(f"Expected an image [3, H, W], [H, W, 3] or [H, W], got {list(given)}.")
    # Interpolation and float16 overshoot by a hair; what is further out is normalised or 0…255.
    if not (array.min() >= -0.01 and array.max() <= 1.01):
        raise ValueError(
            f"Expected values in 0…1, got {array.min():.3g}…{array.max():.3g}. Show the image as "
            "it was before normalize(), and divide pixels stored as 0…255 by 255."
        )
    return np.broadcast_to(array, (*array.shape[:2], 3)).clip(0, 1).astype(np.float32)


def as_mask(mask: Tensor | NDArray, classes: int) -> NDArray[np.int64]:
    """Return class indices `[H, W]`, each in 0…classes − 1; raises like `as_image`."""
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.ndim != 2:
        cure = "Take argmax over the classes first." if array.ndim == 3 else ""
        raise ValueError(f"Expected class indices [H, W], got {list(array.shape)}. {cure}".strip())
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_):
        raise TypeError(
            f"Expected whole class indices, got {array.dtype}: logits.argmax(0) gives them."
        )
    array = array.astype(np.int64)
    if array.size and (array.min() < 0 or array.max() >= classes):
        raise ValueError(
            f"Expected class indices 0…{classes - 1}, got {array.min()}…{array.max()}. Give "
            "colors= one colour for each class, or set what is ignored to a class."
        )
    return array


def colorize(
    mask: Tensor | NDArray, colors: Mapping[str, str] = CLASS_COLORS
) -> NDArray[np.float32]:
    """Return class indices `[H, W]` as colours `[H, W, 3]` in 0…1."""
    table = matplotlib.colors.to_rgba_array(list(colors.values()))[:, :3].astype(np.float32)
    return table[as_mask(mask, len(colors))]


def one_by_one(images: Any, what: str) -> list[Any]:
    """Return the members of a list or batch; raises `ValueError` where there are none."""
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim < 3:
        images = [images]
    members = list(images)
    if not members:
        raise ValueError(f"There are no {what} to show.")
    return members


def image_grid(
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
    first column, `foot` below the last row; no cell is wider than `widest`
    (a single column may be wider).
    """
    room = WIDTH - 2 * MARGIN - left - gap * (columns - 1)
    cell = min(room / columns, widest if columns > 1 else 1.8 * widest)
    start = MARGIN + left + (room - cell * columns) / 2
    high = cell * aspect
    height = 2 * MARGIN + rows * (head + high) + gap * (rows - 1) + foot
    figure = new_figure(height)
    grid = []
    for row in range(rows):
        top = MARGIN + row * (head + high + gap) + head
        line = []
        for column in range(columns):
            x = start + column * (cell + gap)
            box = (x / WIDTH, 1 - (top + high) / height, cell / WIDTH, high / height)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            line.append(axes)
        grid.append(line)
    return figure, grid


def put(axes: Axes, image: NDArray, title: str | None = None, **keywords: Any) -> None:
    """Draw one image into axes made by `image_grid`, filling them, with a title above."""
    axes.imshow(image, **{"interpolation": "nearest", "aspect": "auto", **keywords})
    if title:
        axes.set_title(title, pad=4, fontsize=10.5)


def class_legend(figure: Figure, colors: Mapping[str, str]) -> None:
    """Write the class names with their colours along the bottom of the figure.

    One row, of up to 7, goes below the axes where they leave `foot` free; the figure grows by
    what more rows take.
    """
    patches = [
        Patch(facecolor=color, edgecolor=MUTED, linewidth=0.6, label=name)
        for name, color in colors.items()
    ]
    rows = -(-len(patches) // 7)
    if rows > 1:
        _add_below(figure, (rows - 1) * LEGEND_ROW)
    figure.legend(
        handles=patches,
        loc="lower center",
        ncols=-(-len(patches) // rows),
        bbox_to_anchor=(0.5, 0.0),
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.4,
        columnspacing=0.9,
        fontsize=9.5,
    )


def _add_below(figure: Figure, inches: float) -> None:
    """Make the figure taller at its bottom; its axes keep their size and distance to the top."""
    width, height = figure.get_size_inches()
    share = height / (height + inches)
    figure.set_size_inches(width, height + inches)
    for axes in figure.axes:
        x, y, w, h = axes.get_position().bounds
        axes.set_position((x, 1 - (1 - y) * share, w, h * share))


def shape_text(shape: Sequence[int] | torch.Size) -> str:
    """Return `64 × 32 × 32`."""
    return " × ".join(str(side) for side in shape)
