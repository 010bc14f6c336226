"""The pyramid diagram: the network that really ran, drawn to scale from its own forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, Polygon
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from numpy.typing import NDArray
from torch import Tensor, nn

from helpers.encoder import normalize
from helpers.inspection import count_parameters
from helpers.pictures import (
    CLASS_COLORS,
    INK,
    MARGIN,
    MUTED,
    PALETTE,
    PAPER,
    WIDTH,
    Picture,
    as_image,
    check_alt,
    colorize,
    new_figure,
    picture,
    shape_text,
    style,
)
from helpers.trace import Step, trace

FRONT: dict[str, Colormap] = {
    "encoder": LinearSegmentedColormap.from_list(
        "navy", ["#14203c", "#2b4578", "#7f9fce", "#f4f6fb"]
    ),
    "decoder": LinearSegmentedColormap.from_list(
        "coral", ["#48150e", "#b8432c", "#f0a488", "#fff4ee"]
    ),
}
TOP = {"encoder": "#6c89ba", "decoder": "#f09a84"}
SIDE = {"encoder": "#1e3157", "decoder": "#9c3522"}
NAME_COLOR = {"encoder": PALETTE["encoder"], "decoder": "#b8432c"}
BRIDGE_TEXT = "#1f7a6f"

HALO = [withStroke(linewidth=4, foreground=PAPER)]  # keeps lettering legible where arrows pass

NAME_SIZE, SHAPE_SIZE, ROW_SIZE, NOTE_SIZE = 11.5, 9.5, 9.0, 9.5  # points
LABEL_HEIGHT = 0.36  # inches
DEEPEST = 0.34  # inches, for 512 channels
SLANT = (0.86, 0.5)  # of the depth, rightwards and upwards
SCALE_NOTE = "sides drawn as √pixels, depths as √channels; fronts show the mean of the real maps"


@dataclass(frozen=True)
class Box:
    """One box of a diagram: what ran, and how it is drawn.

    `shape` is `(C, h, w)`, `(N, D)` or `(D,)` as it came out of the forward pass; `x`, `y` (lower
    left corner of the front), `width`, `height` and `depth` inches, `row` log2 of the stride.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    face: NDArray[Any] = field(repr=False)
    row: int
    width: float
    height: float
    depth: float
    x: float = 0.0
    y: float = 0.0

    @property
    def middle(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2

    @property
    def right(self) -> float:
        return self.x + self.width + self.depth * SLANT[0]

    @property
    def top(self) -> float:
        return self.y + self.height + self.depth * SLANT[1]

    @property
    def label_width(self) -> float:
        return max(
            _text_width(self.name, NAME_SIZE, bold=True),
            _text_width(shape_text(self.shape), SHAPE_SIZE),
        )


@dataclass(frozen=True)
class Diagram(Picture):
    """A `Picture` that also says what it shows: its boxes, image and output included."""

    boxes: tuple[Box, ...] = field(default=(), repr=False)


def pyramid_diagram(
    encoder: nn.Module,
    image: Any,
    decoder: nn.Module | None = None,
    *,
    alt: str,
    bridge: str = "",
    query: Tensor | None = None,
    parts: Sequence[str] | None = None,
    colors: Mapping[str, str] = CLASS_COLORS,
) -> Diagram:
    """Run the network on one image and draw what ran: each map a box, each bridge an arrow.

    A box's sides follow the square root of its map's sides, its depth that of its channels; its
    front shows the mean over the channels. Without a decoder the five maps stand in a row; with
    one they descend, and the decoder climbs back at the right, one row a stride. Boxes of the
    decoder are its parts as `helpers.trace.trace` finds them (`parts` chooses others), arrows are
    read off the autograd graph, `bridge` is written above those from encoder to decoder. The
    output is drawn as an image if it has 3 channels, as a heat map if 1, else as the likeliest
    class in `colors`.

    `image` as in `show_images`, not normalised, sides at least 32 pixels; `query` goes to the
    decoder. Raises `ValueError` where `alt` is empty or there are too many parts to draw.
    """
    check_alt(alt)
    array = as_image(image)
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    x = normalize(torch.from_numpy(array).permute(2, 0, 1)[None]).to(device)
    steps = trace(encoder, x, decoder, query, parts)
    with style():
        if decoder is None:
            figure, boxes = _encoder_row(steps, array)
        else:
            figure, boxes = _descent_and_climb(steps, array, encoder, decoder, bridge, colors)
        drawn = picture(figure, alt)
    return Diagram(drawn.png, drawn.alt, drawn.width, drawn.height, boxes=tuple(boxes))


# From steps to boxes


def _boxes(
    steps: Sequence[Step], array: NDArray, unit: float, colors: Mapping[str, str]
) -> list[Box]:
    height, width = array.shape[:2]
    rows: dict[str, int] = {}
    boxes = []
    for step in steps:
        shape = tuple(step.value.shape[1:])
        if len(shape) == 3:
            rows[step.name] = max(0, round(np.log2(height / shape[1])))
        else:
            rows[step.name] = max((rows[name] for name in step.sources), default=5)
        sides = _sides(shape, unit)
        flat = step.kind in ("image", "output")
        if step.kind == "output":
            if len(shape) != 3:
                continue
            rows[step.name], sides = 0, _sides((3, height, width), unit)
        depth = 0.0 if flat else DEEPEST * (shape[-1 if len(shape) < 3 else 0] / 512) ** 0.5
        face = array if step.kind == "image" else _face(step, (height, width), colors)
        if step.kind == "output":
            shape = (shape[0], height, width)
        name = _output_name(shape) if step.kind == "output" else step.name
        boxes.append(
            Box(name, step.kind, shape, step.sources, face, rows[step.name], *sides, depth)
        )
    return boxes


def _sides(shape: tuple[int, ...], unit: float) -> tuple[float, float]:
    """Width and height in inches: the geometric mean of the sides is drawn as its square root."""
    if len(shape) == 1:
        return unit, unit
    if len(shape) == 2:
        return unit, unit * shape[0] ** 0.5
    _, height, width = shape
    factor = unit / (height * width) ** 0.25
    return width * factor, height * factor


def _face(step: Step, size: tuple[int, int], colors: Mapping[str, str]) -> NDArray[np.float32]:
    value = step.value[0].float().cpu()
    if step.kind == "output" and value.ndim == 3:
        value = F.interpolate(value[None], size=size, mode="bilinear", align_corners=False)[0]
        if len(value) == 3:
            return value.permute(1, 2, 0).clamp(0, 1).numpy()
        if 1 < len(value) <= len(colors):
            return colorize(value.argmax(0), colors)
        return FRONT["decoder"](_stretched(value.mean(0)))[..., :3]
    if value.ndim == 3:
        return FRONT[step.kind](_stretched(value.mean(0)))[..., :3]
    column = value.mean(-1, keepdim=True) if value.ndim == 2 else value.mean().reshape(1, 1)
    return FRONT[step.kind](_stretched(column))[..., :3]


def _stretched(values: Tensor) -> NDArray[np.float32]:
    low, high = values.quantile(0.01), values.quantile(0.99)
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).numpy()


def _output_name(shape: tuple[int, ...]) -> str:
    return "picture" if shape[0] == 3 else "mask"


# Placing the boxes


def _encoder_row(steps: Sequence[Step], array: NDArray) -> tuple[Any, list[Box]]:
    """Image and maps on one line, as large as the page allows, names above, shapes below."""
    room, gap = WIDTH - 2 * MARGIN, 0.2
    boxes = _boxes(steps, array, 1.6 / max(array.shape[:2]) ** 0.5, CLASS_COLORS)
    labels = [f"{box.shape[0]} channels\n{shape_text(box.shape[1:])}" for box in boxes]
    widths = [max(_text_width(line, ROW_SIZE) for line in label.split("\n")) for label in labels]
    for shrink in np.linspace(1, 0.1, 181):
        columns = [
            max(shrink * (box.right - box.x), width)
            for box, width in zip(boxes, widths, strict=True)
        ]
        if sum(columns) + gap * (len(boxes) - 1) <= room:
            break
    boxes = [
        replace(b, width=shrink * b.width, height=shrink * b.height, depth=shrink * b.depth)
        for b in boxes
    ]
    gap = (room - sum(columns)) / (len(boxes) - 1)
    middle = 0.88 + max(box.height for box in boxes) / 2
    placed, x = [], MARGIN
    for box, column in zip(boxes, columns, strict=True):
        start = x + (column - box.right) / 2
        placed.append(replace(box, x=start, y=middle - box.height / 2))
        x += column + gap
    figure, axes = _page(max(box.top for box in placed) + 0.4)
    for box, label in zip(placed, labels, strict=True):
        _draw_box(axes, box)
        center = (box.x + box.right) / 2
        _name(axes, center, box.top + 0.07, box, ha="center", va="bottom")
        axes.text(
            center,
            0.78,
            label,
            fontsize=ROW_SIZE,
            color=MUTED,
            ha="center",
            va="top",
            linespacing=1.35,
        )
    for source, target in itertools.pairwise(placed):
        start, end = source.right + 0.03, target.x - 0.03
        if end - start > 0.07:
            _arrow(axes, (start, middle), (end, middle), NAME_COLOR["encoder"])
    _note(axes)
    return figure, placed


def _descent_and_climb(
    steps: Sequence[Step],
    array: NDArray,
    encoder: nn.Module,
    decoder: nn.Module,
    bridge: str,
    colors: Mapping[str, str],
) -> tuple[Any, list[Box]]:
    """Encoder maps go down to the right, decoder maps up again; one row for each stride."""
    unit = 1.0 / max(array.shape[:2]) ** 0.5
    while True:
        boxes = _boxes(steps, array, unit, colors)
        placed = _columns(boxes)
        if placed is not None:
            break
        unit *= 0.95
        if unit * max(array.shape[:2]) ** 0.5 < 0.4:
            count = sum(box.kind == "decoder" for box in boxes)
            raise ValueError(
                f"{count} parts of {type(decoder).__name__} do not fit beside each other: choose "
                "the ones that matter, parts=[…]."
            )
    placed, height = _rows(placed)
    figure, axes = _page(height)
    for source, target in _edges(placed):
        _connect(axes, source, target, _labelled_above(placed))
    for box in placed:
        _draw_box(axes, box)
        _label(axes, box, _labelled_above(placed))
    _captions(axes, placed, encoder, decoder, bridge)
    _note(axes)
    return figure, placed


def _columns(boxes: Sequence[Box]) -> list[Box] | None:
    """Give each box its x, evenly spaced, without collisions in a row; None if there is no room."""
    chain = [box for box in boxes if box.kind in ("encoder", "decoder")]
    output = next((box for box in boxes if box.kind == "output"), None)
    start = MARGIN + chain[0].label_width + 0.08 + chain[0].width / 2
    above = _labelled_above(boxes)

    def place(step: float) -> tuple[list[Box], float]:
        done: list[Box] = []
        edge = 0.0
        for box in chain:
            x = (done[-1].middle[0] + step if done else start) - box.width / 2
            hang = (
                max(0.0, (box.label_width - (box.right - box.x)) / 2) if box.row in above else 0.0
            )
            for other in done:
                if other.row == box.row and other.row in above and other.kind == "decoder":
                    x = max(
                        x, other.x + max(other.right - other.x, other.label_width) + 0.14 + hang
                    )
                elif other.row == box.row:
                    x = max(x, other.right + 0.3 + hang)
            done.append(replace(box, x=x))
            if box.kind == "decoder":
                beyond = hang if box.row in above else 0.08 + box.label_width
                taken = output.width + 0.3 if output and box.row == 0 else 0
                edge = max(edge, done[-1].right + beyond + taken)
        return done, edge

    limit = WIDTH - MARGIN
    narrow, wide = 0.26, 1.2
    if place(narrow)[1] > limit:
        return None
    for _ in range(30):
        step = (narrow + wide) / 2
        narrow, wide = (step, wide) if place(step)[1] <= limit else (narrow, step)
    placed = {box.name: box for box in place(narrow)[0]}
    for box in boxes:
        if box.kind == "image":
            placed[box.name] = replace(box, x=MARGIN)
        if box.kind == "output":
            placed[box.name] = replace(box, x=WIDTH - MARGIN - box.width)
    return [placed[box.name] for box in boxes]


def _labelled_above(boxes: Sequence[Box]) -> set[int]:
    """Rows with several boxes of the decoder: there the labels stand above, not beside."""
    rows = [box.row for box in boxes if box.kind in ("decoder", "output")]
    return {row for row in rows if rows.count(row) > 1}


def _rows(boxes: Sequence[Box]) -> tuple[list[Box], float]:
    gap, least = 0.19, 0.4
    above = _labelled_above(boxes)
    y, levels = 0.68, {}
    for row in sorted({box.row for box in boxes}, reverse=True):
        members = [box for box in boxes if box.row == row]
        high = max(least, max(box.height for box in members))
        levels[row] = y + high / 2
        y += high + max(box.depth * SLANT[1] for box in members) + gap
        y += LABEL_HEIGHT if row in above else 0
    placed = [replace(box, y=levels[box.row] - box.height / 2) for box in boxes]
    return placed, y - gap + MARGIN


# Drawing


def _page(height: float) -> tuple[Any, Axes]:
    figure = new_figure(height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


def _draw_box(axes: Axes, box: Box) -> None:
    x, y, w, h = box.x, box.y, box.width, box.height
    across, up = box.depth * SLANT[0], box.depth * SLANT[1]
    edge: dict[str, Any] = {"linewidth": 0.6, "joinstyle": "round", "zorder": 3}
    if box.depth:
        dark = SIDE[box.kind]
        top = [(x, y + h), (x + w, y + h), (x + w + across, y + h + up), (x + across, y + h + up)]
        side = [(x + w, y), (x + w, y + h), (x + w + across, y + h + up), (x + w + across, y + up)]
        axes.add_patch(Polygon(top, facecolor=TOP[box.kind], edgecolor=dark, **edge))
        axes.add_patch(Polygon(side, facecolor=dark, edgecolor=dark, **edge))
    axes.imshow(
        box.face, extent=(x, x + w, y, y + h), interpolation="nearest", aspect="auto", zorder=4
    )
    frame = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
    color = SIDE.get(box.kind, MUTED)
    axes.add_patch(Polygon(frame, fill=False, edgecolor=color, **{**edge, "zorder": 5}))


def _name(axes: Axes, x: float, y: float, box: Box, **keywords: Any) -> None:
    color = NAME_COLOR.get(box.kind, INK)
    words: dict[str, Any] = {
        "fontsize": NAME_SIZE,
        "fontweight": "bold",
        "color": color,
        "path_effects": HALO,
    }
    axes.text(x, y, box.name, **words, **keywords)


def _shape(axes: Axes, x: float, y: float, box: Box, **keywords: Any) -> None:
    text = shape_text(box.shape)
    words: dict[str, Any] = {
        "va": "top",
        "fontsize": SHAPE_SIZE,
        "color": MUTED,
        "path_effects": HALO,
    }
    axes.text(x, y, text, **{**words, **keywords})


def _label(axes: Axes, box: Box, above: set[int]) -> None:
    """Name and shape: towards the margin for maps, inwards for the two pictures, or above."""
    if box.row in above and box.kind in ("decoder", "output"):
        center = (box.x + box.right) / 2
        _name(axes, center, box.top + 0.24, box, ha="center", va="bottom")
        _shape(axes, center, box.top + 0.21, box, ha="center")
        return
    inward = box.kind in ("image", "output")
    at_left = box.kind in ("encoder", "output")
    x = box.x - 0.08 if at_left else box.right + 0.08
    y = box.middle[1] + (box.height / 2 - 0.2 if inward else 0)
    align = "right" if at_left else "left"
    _name(axes, x, y + 0.015, box, ha=align, va="bottom")
    _shape(axes, x, y - 0.025, box, ha=align)


def _edges(boxes: Sequence[Box]) -> list[tuple[Box, Box]]:
    named = {box.name: box for box in boxes}
    return [(named[source], box) for box in boxes for source in box.sources]


def _connect(axes: Axes, source: Box, target: Box, above: set[int]) -> None:
    bridge = source.kind in ("encoder", "image") and target.kind == "decoder"
    color = PALETTE["bridge"] if bridge else NAME_COLOR.get(target.kind, NAME_COLOR["decoder"])
    gap = 0.045
    if source.row == target.row:
        y = source.middle[1]
        _arrow(axes, (source.right + gap, y), (target.x - gap, y), color)
        return
    start = _clamp(target.middle[0], source.x, source.x + source.width)
    end = _clamp(start, target.x, target.x + target.width)
    labelled = source.row in above and source.kind == "decoder"
    if source.row < target.row:
        _arrow(axes, (start, source.y - gap), (end, target.top + gap), color)
    else:
        top = source.top + gap + (LABEL_HEIGHT + 0.04 if labelled else 0)
        _arrow(axes, (start, top), (end, target.y - gap), color)


def _clamp(x: float, low: float, high: float) -> float:
    inset = 0.2 * (high - low)
    return min(max(x, low + inset), high - inset)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            linewidth=1.5,
            color=color,
            shrinkA=0,
            shrinkB=0,
            zorder=2,
        )
    )


def _captions(
    axes: Axes, boxes: Sequence[Box], encoder: nn.Module, decoder: nn.Module, bridge: str
) -> None:
    for module, x, align, kind in (
        (encoder, MARGIN, "left", "encoder"),
        (decoder, WIDTH - MARGIN, "right", "decoder"),
    ):
        words: dict[str, Any] = {"ha": align, "color": NAME_COLOR[kind], "fontsize": SHAPE_SIZE}
        size = f"{count_parameters(module) / 1e6:.2f} M parameters"
        axes.text(x, 0.4, f"{type(module).__name__}: {size}", fontweight="bold", **words)
    bridged = [(s, t) for s, t in _edges(boxes) if s.kind == "encoder" and t.kind == "decoder"]
    if bridge and bridged:
        source, target = min(bridged, key=lambda pair: pair[0].row)
        x, y = (source.right + target.x) / 2, source.middle[1] + 0.08
        axes.text(
            x,
            y,
            bridge,
            ha="center",
            va="bottom",
            color=BRIDGE_TEXT,
            fontsize=10.5,
            fontweight="bold",
        )


def _note(axes: Axes) -> None:
    axes.text(WIDTH / 2, 0.12, SCALE_NOTE, ha="center", fontsize=NOTE_SIZE, color=MUTED)


@lru_cache
def _text_width(text: str, size: float, bold: bool = False) -> float:
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().width) / 72
