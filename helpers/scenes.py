"""Scenes: small painted still lifes, drawn from (seed, index), with a mask, a caption and a query.

What an object is, its shape alone says; colours and textures are drawn without looking at it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from helpers._draw import SIZE as SIZE
from helpers._draw import TURN, UNIT, Draws
from helpers._paint import COLORS as COLORS
from helpers._paint import Sheet, paint

VERSION = 1  # frozen: it was tuned on indices below 10,000 only, so report on others
CLASSES = ("background", "disc", "square", "triangle", "star", "ring", "pole")
SHAPES = CLASSES[1:]
PLURALS = {shape: shape + "s" for shape in SHAPES}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}
VOCABULARY = (
    *("a", "an", "and", "with", "above", "below", "left", "right", "in", "front", "of"),
    *("small", "large", "short", "long"),
    *NUMBERS.values(),
    *COLORS,
    *SHAPES,
    *PLURALS.values(),
)

SMALLEST, LARGEST = 4, 60  # radius in pixels
SHORTEST_POLE = 16
COUNTS = (2, 3, 4, 5, 5, 6, 6, 7, 7)  # of objects, equally likely
MIN_PIXELS = 12  # that every object shows
MIN_SHOWN = 0.4  # of what an object has inside the frame
TRIES = 20
IN_FRONT = 5  # pixels to hide before a caption says so


@dataclass(frozen=True)
class Object:
    """One object of a scene, as far as it can be seen.

    `x`, `y`, `radius` and `width` are in pixels, with (0, 0) the upper left corner of the image;
    `radius` is that of the circle around the shape (a pole: half its length), `width` is that of a
    ring's band or a pole and 0 for the others; `angle` is in degrees, clockwise. `size` is "small",
    "large" (a pole: "short", "long") or "". `box` is (left, top, right, bottom) of the `pixels`
    that can be seen, right and bottom excluded.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    width: float
    angle: float
    box: tuple[int, int, int, int]
    pixels: int


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene: what a camera sees, and what is there.

    `image` float32 `[3, 128, 128]`, 0…1, in steps of 1/255; `mask` uint8 `[128, 128]`, indices of
    `CLASSES`; `caption`, lower-case words of `VOCABULARY` between single spaces; `query`, a colour
    and a shape that exactly one object has; `query_mask` bool `[128, 128]`, that object's pixels,
    never empty; `objects`, every object, from the rearmost to the foremost.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.uint8]
    caption: str
    query: str
    query_mask: NDArray[np.bool_]
    objects: tuple[Object, ...]


def scene(index: int, seed: int = 0) -> Scene:
    """Return the scene that belongs to `(seed, index)`: the same on every machine, at any time.

    `index` and `seed` are integers from 0 to 2⁶⁴ − 1. Raises `TypeError` for anything but an
    integer and `ValueError` for one out of range. Takes about 4 ms.
    """
    index, seed = _natural(index, "index"), _natural(seed, "seed")
    draws = Draws(VERSION, seed, index)
    sheets, owner = _compose(draws)
    target = draws.between(0, len(sheets) - 1)
    shapes = [sheet.shape for sheet in sheets]
    colors = _choose_colors(draws, shapes, target)
    image = paint(draws, sheets, colors)
    objects = tuple(_describe(s, colors[k], owner == k) for k, s in enumerate(sheets))
    classes = np.array([0, *map(CLASSES.index, shapes)], np.uint8)
    return Scene(
        image=image,
        mask=classes[owner + 1],
        caption=_caption(objects, sheets, owner),
        query=f"{objects[target].color} {objects[target].shape}",
        query_mask=owner == target,
        objects=objects,
    )


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """The scenes `first`, `first + 1`, … as a data set of `count` pairs (image, mask).

    Image float32 `[3, 128, 128]`, 0…1 (see `helpers.encoder.normalize`); mask int64 `[128, 128]`,
    indices of `CLASSES`. The scenes are drawn when they are asked for. Raises `ValueError` for
    `count` below 1 or a negative `first` or `seed`, `IndexError` beyond the end.
    """

    def __init__(self, count: int, seed: int = 0, first: int = 0) -> None:
        self.count = _natural(count, "count")
        self.seed, self.first = _natural(seed, "seed"), _natural(first, "first")
        if self.count < 1:
            raise ValueError("Expected count ≥ 1, got 0: ask for at least one scene.")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        if not -self.count <= item < self.count:
            raise IndexError(f"There are {self.count} scenes, 0…{self.count - 1}; got {item}.")
        drawn = scene(self.first + item % self.count, self.seed)
        return torch.from_numpy(drawn.image), torch.from_numpy(drawn.mask).long()


def batch(indices: Iterable[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the scenes of `indices`, stacked: images `[B, 3, 128, 128]`, masks `[B, 128, 128]`.

    Images are float32, 0…1; masks int64, indices of `CLASSES`. Raises `ValueError` where there is
    no index, or a negative one.
    """
    if isinstance(indices, int):
        raise TypeError(f"Expected several indices, got {indices}: batch([{indices}]).")
    drawn = [scene(index, seed) for index in indices]
    if not drawn:
        raise ValueError("Expected at least one index, got none.")
    images = torch.from_numpy(np.stack([one.image for one in drawn]))
    return images, torch.from_numpy(np.stack([one.mask for one in drawn])).long()


def _natural(value: int, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"Expected an integer {name}, got {type(value).__name__}.") from None
    if not 0 <= number < 1 << 64:
        raise ValueError(f"Expected {name} ≥ 0 and below 2⁶⁴, got {number}.")
    return number


def _compose(draws: Draws) -> tuple[list[Sheet], NDArray[np.int8]]:
    """Place the objects, the rearmost first; also return who is on top where (−1: nobody)."""
    drawn = []
    for _ in range(COUNTS[draws.between(0, len(COUNTS) - 1)]):
        shape = SHAPES[draws.between(0, len(SHAPES) - 1)]
        radius, width = _radius_and_width(draws, shape)
        depth = radius * draws.between(2, 8)  # large ones tend to lie behind small ones
        drawn.append((depth, shape, radius, width))
    drawn.sort(key=lambda entry: -entry[0])
    sheets: list[Sheet] = []
    owner = np.full((SIZE, SIZE), -1, np.int8)
    for _, shape, radius, width in drawn:
        for attempt in range(TRIES):
            angle = draws.between(0, TURN - 1)
            x, y = (draws.between(0, SIZE * UNIT) for _ in range(2))
            if not sheets and attempt == TRIES - 1:
                x = y = SIZE * UNIT // 2  # where anything fits
            sheet = Sheet(shape, radius, width, angle, x, y)
            if _fits(sheet, sheets, owner):
                owner[sheet.window][sheet.inside] = len(sheets)
                sheets.append(sheet)
                break
    return sheets, owner


def _radius_and_width(draws: Draws, shape: str) -> tuple[int, int]:
    """Draw both in 1/64 px."""
    smallest = SHORTEST_POLE if shape == "pole" else SMALLEST
    radius = draws.log_uniform(smallest * UNIT, LARGEST * UNIT)
    width = draws.between(UNIT, 3 * UNIT)
    if shape == "ring" and draws.between(1, 3) == 1:
        width = max(width, radius // 8)
    return radius, width if shape in ("ring", "pole") else 0


def _fits(sheet: Sheet, below: list[Sheet], owner: NDArray[np.int8]) -> bool:
    if sheet.pixels < MIN_PIXELS:
        return False
    covered = np.bincount(owner[sheet.window][sheet.inside] + 1, minlength=len(below) + 1)[1:]
    return all(
        np.count_nonzero(owner == k) - covered[k] >= max(MIN_PIXELS, MIN_SHOWN * below[k].pixels)
        for k in np.flatnonzero(covered)
    )


def _choose_colors(draws: Draws, shapes: list[str], target: int) -> list[str]:
    """Draw a colour for every object; nobody else of the target's shape has the target's."""
    names = list(COLORS)
    colors = [names[draws.between(0, len(names) - 1)] for _ in shapes]
    others = [name for name in names if name != colors[target]]
    for k, shape in enumerate(shapes):
        if k != target and shape == shapes[target] and colors[k] == colors[target]:
            colors[k] = others[draws.between(0, len(others) - 1)]
    return colors


def _describe(sheet: Sheet, color: str, seen: NDArray[np.bool_]) -> Object:
    rows, columns = np.nonzero(seen)
    return Object(
        shape=sheet.shape,
        color=color,
        size=_size(sheet.shape, sheet.radius / UNIT),
        x=sheet.x / UNIT,
        y=sheet.y / UNIT,
        radius=sheet.radius / UNIT,
        width=sheet.width / UNIT,
        angle=sheet.angle * 360 / TURN,
        box=(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1),
        pixels=len(rows),
    )


def _size(shape: str, radius: float) -> str:
    if shape == "pole":
        return "short" if radius < 24 else "long" if radius > 38 else ""
    return "small" if radius < 10 else "large" if radius > 24 else ""


def _caption(objects: tuple[Object, ...], sheets: list[Sheet], owner: NDArray[np.int8]) -> str:
    """Say where the two most visible single objects lie, then what else there is.

    Objects of one shape are counted together, so that every object is mentioned once.
    """
    groups: dict[str, list[int]] = {}
    for k in sorted(range(len(objects)), key=lambda k: -objects[k].pixels):
        groups.setdefault(objects[k].shape, []).append(k)
    singles = [group[0] for group in groups.values() if len(group) == 1]
    parts = {shape: _mention([objects[k] for k in group]) for shape, group in groups.items()}
    if len(singles) < 2:
        return " and ".join(parts.values())
    behind, front = sorted(singles[:2])
    first, second = (objects[k] for k in singles[:2])
    hidden = owner[sheets[behind].window][sheets[behind].inside] == front
    if np.count_nonzero(hidden) >= IN_FRONT:
        first, second, relation = objects[front], objects[behind], "in front of"
    elif abs(first.y - second.y) > abs(first.x - second.x):
        relation = "above" if first.y < second.y else "below"
    else:
        relation = "left of" if first.x < second.x else "right of"
    said = f"{parts.pop(first.shape)} {relation} {parts.pop(second.shape)}"
    return " with ".join([said, " and ".join(parts.values())] if parts else [said])


def _mention(group: list[Object]) -> str:
    one = group[0]
    if len(group) == 1:
        words = [word for word in (one.size, one.color, one.shape) if word]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])
    same = all(each.color == one.color for each in group)
    return " ".join([NUMBERS[len(group)], *([one.color] if same else []), PLURALS[one.shape]])
