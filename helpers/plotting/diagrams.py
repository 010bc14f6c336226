"""The pyramid diagram: the network that really ran, drawn to scale from its own forward pass."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, Polygon
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from helpers.encoder import Pyramid, Segmenter, normalize
from helpers.inspection import count_parameters, evaluating
from helpers.plotting.pictures import (
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

NAVY = ["#14203c", "#2b4578", "#7f9fce", "#f4f6fb"]
CORAL = ["#48150e", "#b8432c", "#f0a488", "#fff4ee"]
FRONT: dict[str, Colormap] = {
    "encoder": LinearSegmentedColormap.from_list("navy", NAVY),
    "decoder": LinearSegmentedColormap.from_list("coral", CORAL),
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
class Step:
    """One tensor of a forward pass: its name, whose it is, its value, the steps it came from."""

    name: str
    kind: str  # "image", "encoder", "decoder" or "output"
    value: Tensor
    sources: tuple[str, ...]


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
    def center(self) -> tuple[float, float]:  # of the front
        return self.x + self.width / 2, self.y + self.height / 2

    @property
    def middle(self) -> float:  # of front and depth, across
        return (self.x + self.right) / 2

    @property
    def right(self) -> float:
        return self.x + self.width + self.depth * SLANT[0]

    @property
    def top(self) -> float:
        return self.y + self.height + self.depth * SLANT[1]

    @property
    def label_width(self) -> float:
        name = _text_width(self.name, NAME_SIZE, bold=True)
        return max(name, _text_width(shape_text(self.shape), SHAPE_SIZE))


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
    decoder are its parts as `trace` finds them (`parts` chooses others), arrows are read off the
    autograd graph, `bridge` is written above those from encoder to decoder. The output is drawn as
    an image if it has 3 channels, as a heat map if 1, else as the likeliest class in `colors`.

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


# What ran


def trace(
    encoder: nn.Module,
    x: Tensor,
    decoder: nn.Module | None = None,
    query: Tensor | None = None,
    parts: Sequence[str] | None = None,
) -> list[Step]:
    """Run the network on normalised images `[1, 3, H, W]` and return its steps in order.

    The image, the encoder's five maps and, with a decoder, the output of each of its parts at
    each call, then the decoder's own output. Parts are the decoder's direct children that have
    parameters, with those inside a `ModuleList` counted singly; `parts` names others instead.
    Who feeds whom is read off the autograd graph. The hooks are removed, also after an error.
    Raises `ValueError` for a part that is not there.
    """
    with evaluating(encoder), torch.no_grad():
        pyramid = encoder(x)
    inputs = {"image": x.detach().clone().requires_grad_()}
    inputs |= {name: level.detach().requires_grad_() for name, level in pyramid._asdict().items()}
    steps = [Step("image", "image", x.detach(), ())]
    for before, name in itertools.pairwise(inputs):
        steps.append(Step(name, "encoder", inputs[name].detach(), (before,)))
    if decoder is None:
        return steps
    model = Segmenter(encoder, decoder)
    if model.takes_query != (query is not None):
        asks = "needs a query: pass" if model.takes_query else "takes no query: leave out"
        raise ValueError(f"{type(decoder).__name__} {asks} query=….")
    extra = {"image": inputs["image"]} if model.takes_image else {}
    if query is not None:
        extra["query"] = query
    maps = Pyramid(*list(inputs.values())[1:])
    calls: list[tuple[str, Tensor, Any]] = []

    def listen(name: str, module: nn.Module, given: Any, returned: Any) -> None:
        if tensors := [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]:
            calls.append((name, tensors[0].detach(), tensors[0].grad_fn))

    with evaluating(decoder), torch.enable_grad(), ExitStack() as hooks:
        for name, part in _parts(decoder, parts).items():
            hooks.callback(part.register_forward_hook(partial(listen, name)).remove)
        output = decoder(maps, **extra)
    known: dict[Any, str] = {}
    times: Counter[str] = Counter(list(inputs))
    for name, value, origin in calls or [(type(decoder).__name__, output.detach(), output.grad_fn)]:
        if origin in known:  # passed on unchanged
            continue
        times[name] += 1
        known[origin] = name if times[name] == 1 else f"{name} ({times[name]})"
        sources = _sources(origin, known, inputs)
        steps.append(Step(known[origin], "decoder", value, sources))
    last = output.grad_fn
    sources = (known[last],) if last in known else _sources(last, known, inputs)
    return [*steps, Step("output", "output", output.detach(), sources)]


def _parts(decoder: nn.Module, wanted: Sequence[str] | None) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, child in decoder.named_children():
        inside = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        found |= (
            {f"{name}.{key}": c for key, c in child.named_children()} if inside else {name: child}
        )
    if wanted is None:
        wanted = [name for name, part in found.items() if any(True for _ in part.parameters())]
    if unknown := ", ".join(name for name in wanted if name not in found):
        raise ValueError(
            f"{type(decoder).__name__} has no part {unknown}: it has {', '.join(found)}."
        )
    return {name: found[name] for name in wanted}


def _sources(origin: Any, known: dict[Any, str], inputs: dict[str, Tensor]) -> tuple[str, ...]:
    """Walk the autograd graph back from `origin` to the nearest steps."""
    leaves = {id(tensor): name for name, tensor in inputs.items()}
    found, seen = set(), set()
    waiting = [origin]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in known and node is not origin:
            found.add(known[node])
        elif id(getattr(node, "variable", None)) in leaves:
            found.add(leaves[id(node.variable)])
        else:
            waiting.extend(previous for previous, _ in node.next_functions)
    return tuple(name for name in [*inputs, *known.values()] if name in found)


# From steps to boxes


def _boxes(
    steps: Sequence[Step], array: NDArray, unit: float, colors: Mapping[str, str]
) -> list[Box]:
    height, width = array.shape[:2]
    rows: dict[str, int] = {}
    boxes = []
    for step in steps:
        name, shape = step.name, tuple(step.value.shape[1:])
        depth = DEEPEST * (shape[-1 if len(shape) < 3 else 0] / 512) ** 0.5
        if step.kind == "output":
            if len(shape) != 3:
                continue
            name, shape = "picture" if shape[0] == 3 else "mask", (shape[0], height, width)
        depth *= step.kind not in ("image", "output")
        face = array if step.kind == "image" else _face(step, (height, width), colors)
        if len(shape) == 3:
            row = max(0, round(np.log2(height / shape[1])))
        else:
            row = max((rows[source] for source in step.sources), default=5)
        rows[step.name] = row
        sides = _sides(shape, unit)
        boxes.append(Box(name, step.kind, shape, step.sources, face, row, *sides, depth))
    return boxes


def _sides(shape: tuple[int, ...], unit: float) -> tuple[float, float]:
    """Width and height in inches: the geometric mean of the sides is drawn as its square root."""
    if len(shape) < 3:
        return unit, unit * shape[0] ** 0.5 if len(shape) == 2 else unit
    _, height, width = shape
    factor = unit / (height * width) ** 0.25
    return width * factor, height * factor


def _face(step: Step, size: tuple[int, int], colors: Mapping[str, str]) -> NDArray[np.float32]:
    value = step.value[0].float().cpu()
    if step.kind == "output":
        value = F.interpolate(value[None], size=size, mode="bilinear", align_corners=False)[0]
        if len(value) == 3:
            return value.permute(1, 2, 0).clamp(0, 1).numpy()
        if 1 < len(value) <= len(colors):
            return colorize(value.argmax(0), colors)
    mean = value.mean(0) if value.ndim == 3 else value.mean(-1).reshape(-1, 1)
    low, high = mean.quantile(0.01), mean.quantile(0.99)
    stretched = ((mean - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).numpy()
    return FRONT["encoder" if step.kind == "encoder" else "decoder"](stretched)[..., :3]


# Placing the boxes


def _encoder_row(steps: Sequence[Step], array: NDArray) -> tuple[Figure, list[Box]]:
    """Image and maps on one line, as large as the page allows, names above, shapes below."""
    room, gap = WIDTH - 2 * MARGIN, 0.2
    boxes = _boxes(steps, array, 1.6 / max(array.shape[:2]) ** 0.5, CLASS_COLORS)
    labels = [f"{box.shape[0]} channels\n{shape_text(box.shape[1:])}" for box in boxes]
    widths = [max(_text_width(line, ROW_SIZE) for line in label.split("\n")) for label in labels]
    for scale in np.linspace(1, 0.1, 181):
        columns = [max(scale * b.right, width) for b, width in zip(boxes, widths, strict=True)]
        if sum(columns) + gap * (len(boxes) - 1) <= room:
            break
    for i, b in enumerate(boxes):
        sides = {"width": scale * b.width, "height": scale * b.height, "depth": scale * b.depth}
        boxes[i] = replace(b, **sides)
    gap = (room - sum(columns)) / (len(boxes) - 1)
    middle = 0.88 + max(box.height for box in boxes) / 2
    placed, x = [], MARGIN
    for box, column in zip(boxes, columns, strict=True):
        start = x + (column - box.right) / 2
        placed.append(replace(box, x=start, y=middle - box.height / 2))
        x += column + gap
    figure, axes = _page(max(box.top for box in placed) + 0.4)
    below: dict[str, Any] = {"ha": "center", "va": "top", "linespacing": 1.35}
    for box, label in zip(placed, labels, strict=True):
        _draw_box(axes, box)
        _name(axes, box.middle, box.top + 0.07, box, "center")
        axes.text(box.middle, 0.78, label, fontsize=ROW_SIZE, color=MUTED, **below)
    for source, target in itertools.pairwise(placed):
        left, right = source.right + 0.03, target.x - 0.03
        if right - left > 0.07:
            _arrow(axes, (left, middle), (right, middle), NAME_COLOR["encoder"])
    return figure, placed


def _descent_and_climb(
    steps: Sequence[Step],
    array: NDArray,
    encoder: nn.Module,
    decoder: nn.Module,
    bridge: str,
    colors: Mapping[str, str],
) -> tuple[Figure, list[Box]]:
    """Encoder maps go down to the right, decoder maps up again; one row for each stride."""
    longest = max(array.shape[:2]) ** 0.5
    unit = 1.0 / longest
    while (placed := _columns(boxes := _boxes(steps, array, unit, colors))) is None:
        unit *= 0.95
        if unit * longest < 0.4:
            count = sum(box.kind == "decoder" for box in boxes)
            raise ValueError(
                f"{count} parts of {type(decoder).__name__} do not fit beside each other: choose "
                "the ones that matter, parts=[…]."
            )
    above = _labelled_above(placed)
    placed, height = _rows(placed, above)
    figure, axes = _page(height)
    named = {box.name: box for box in placed}
    edges = [(named[source], box) for box in placed for source in box.sources]
    for source, target in edges:
        _connect(axes, source, target, above)
    for box in placed:
        _draw_box(axes, box)
        _label(axes, box, above)
    for module, x, align, kind in (
        (encoder, MARGIN, "left", "encoder"),
        (decoder, WIDTH - MARGIN, "right", "decoder"),
    ):
        text = f"{type(module).__name__}: {count_parameters(module) / 1e6:.2f} M parameters"
        words: dict[str, Any] = {"ha": align, "color": NAME_COLOR[kind], "fontsize": SHAPE_SIZE}
        axes.text(x, 0.4, text, fontweight="bold", **words)
    bridged = [(s, t) for s, t in edges if s.kind == "encoder" and t.kind == "decoder"]
    if bridge and bridged:
        source, target = min(bridged, key=lambda pair: pair[0].row)
        x, y = (source.right + target.x) / 2, source.center[1] + 0.08
        words = {"ha": "center", "va": "bottom", "color": BRIDGE_TEXT, "fontsize": 10.5}
        axes.text(x, y, bridge, fontweight="bold", **words)
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
            x = (done[-1].center[0] + step if done else start) - box.width / 2
            lifted, wide = box.row in above, box.right - box.x
            hang = max(0.0, (box.label_width - wide) / 2) if lifted else 0.0
            for other in (other for other in done if other.row == box.row):
                taken = other.right + 0.3
                if lifted and other.kind == "decoder":
                    taken = other.x + max(other.right - other.x, other.label_width) + 0.14
                x = max(x, taken + hang)
            done.append(replace(box, x=x))
            if box.kind == "decoder":
                beyond = hang if lifted else 0.08 + box.label_width
                beside = output.width + 0.3 if output and box.row == 0 else 0
                edge = max(edge, done[-1].right + beyond + beside)
        return done, edge

    limit = WIDTH - MARGIN
    narrow, wide = 0.26, 1.2
    if place(narrow)[1] > limit:
        return None
    for _ in range(30):
        step = (narrow + wide) / 2
        narrow, wide = (step, wide) if place(step)[1] <= limit else (narrow, step)
    placed = {box.name: box for box in place(narrow)[0]}
    placed["image"] = replace(boxes[0], x=MARGIN)
    if output:
        placed[output.name] = replace(output, x=WIDTH - MARGIN - output.width)
    return [placed[box.name] for box in boxes]


def _labelled_above(boxes: Sequence[Box]) -> set[int]:
    """Rows with several boxes of the decoder: there the labels stand above, not beside."""
    rows = [box.row for box in boxes if box.kind in ("decoder", "output")]
    return {row for row in rows if rows.count(row) > 1}


def _rows(boxes: Sequence[Box], above: set[int]) -> tuple[list[Box], float]:
    gap, y, levels = 0.19, 0.68, {}
    for row in sorted({box.row for box in boxes}, reverse=True):
        members = [box for box in boxes if box.row == row]
        high = max(0.4, *(box.height for box in members))
        levels[row] = y + high / 2
        y += high + max(box.depth * SLANT[1] for box in members) + gap
        y += LABEL_HEIGHT if row in above else 0
    placed = [replace(box, y=levels[box.row] - box.height / 2) for box in boxes]
    return placed, y - gap + MARGIN


# Drawing


def _page(height: float) -> tuple[Figure, Axes]:
    figure = new_figure(height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height), autoscale_on=False)
    axes.set_axis_off()
    axes.text(WIDTH / 2, 0.12, SCALE_NOTE, ha="center", fontsize=NOTE_SIZE, color=MUTED)
    return figure, axes


def _draw_box(axes: Axes, box: Box) -> None:
    x, y, w, h = box.x, box.y, box.width, box.height
    across, up = box.depth * SLANT[0], box.depth * SLANT[1]
    edge: dict[str, Any] = {"linewidth": 0.6, "joinstyle": "round"}
    color = SIDE.get(box.kind, MUTED)
    if box.depth:
        top = [(x, y + h), (x + w, y + h), (x + w + across, y + h + up), (x + across, y + h + up)]
        side = [(x + w, y), (x + w, y + h), (x + w + across, y + h + up), (x + w + across, y + up)]
        for corners, face in ((top, TOP[box.kind]), (side, color)):
            axes.add_patch(Polygon(corners, facecolor=face, edgecolor=color, zorder=3, **edge))
    extent = (x, x + w, y, y + h)
    axes.imshow(box.face, extent=extent, interpolation="nearest", aspect="auto", zorder=4)
    frame = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
    axes.add_patch(Polygon(frame, fill=False, edgecolor=color, zorder=5, **edge))


def _name(axes: Axes, x: float, y: float, box: Box, align: str) -> None:
    words: dict[str, Any] = {"ha": align, "va": "bottom", "fontweight": "bold"}
    color = NAME_COLOR.get(box.kind, INK)
    axes.text(x, y, box.name, fontsize=NAME_SIZE, color=color, path_effects=HALO, **words)


def _label(axes: Axes, box: Box, above: set[int]) -> None:
    """Name and shape: towards the margin for maps, inwards for the two pictures, or above."""
    if box.row in above and box.kind in ("decoder", "output"):
        x, align = box.middle, "center"
        name_at, shape_at = box.top + 0.24, box.top + 0.21
    else:
        at_left = box.kind in ("encoder", "output")
        x, align = (box.x - 0.08, "right") if at_left else (box.right + 0.08, "left")
        inward = box.kind in ("image", "output")
        y = box.center[1] + (box.height / 2 - 0.2 if inward else 0)
        name_at, shape_at = y + 0.015, y - 0.025
    _name(axes, x, name_at, box, align)
    words: dict[str, Any] = {"ha": align, "va": "top", "color": MUTED, "fontsize": SHAPE_SIZE}
    axes.text(x, shape_at, shape_text(box.shape), path_effects=HALO, **words)


def _connect(axes: Axes, source: Box, target: Box, above: set[int]) -> None:
    bridge = source.kind in ("encoder", "image") and target.kind == "decoder"
    color = PALETTE["bridge"] if bridge else NAME_COLOR.get(target.kind, NAME_COLOR["decoder"])
    gap = 0.045
    if source.row == target.row:
        y = source.center[1]
        _arrow(axes, (source.right + gap, y), (target.x - gap, y), color)
        return
    start = _over(source, target.center[0])
    end = _over(target, start)
    if source.row < target.row:
        _arrow(axes, (start, source.y - gap), (end, target.top + gap), color)
    else:
        labelled = source.row in above and source.kind == "decoder"
        top = source.top + gap + (LABEL_HEIGHT + 0.04 if labelled else 0)
        _arrow(axes, (start, top), (end, target.y - gap), color)


def _over(box: Box, x: float) -> float:
    """Return what is nearest to x within the inner 60 % of a box."""
    return min(max(x, box.x + 0.2 * box.width), box.x + 0.8 * box.width)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    look: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.5, "zorder": 2}
    axes.add_patch(FancyArrowPatch(start, end, color=color, shrinkA=0, shrinkB=0, **look))


@lru_cache
def _text_width(text: str, size: float, bold: bool = False) -> float:
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().width) / 72
