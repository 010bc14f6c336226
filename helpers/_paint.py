"""How scenes are painted: palette, paper, light, shadows and grain. Private to `helpers.scenes`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from helpers._draw import (
    SIZE,
    TURN,
    UNIT,
    Draws,
    Floats,
    Ints,
    Window,
    cosine,
    signed_distance,
    sine,
    soft_step,
    value_noise,
)

COLORS = {
    "red": (186, 62, 48),
    "orange": (222, 126, 58),
    "yellow": (228, 182, 84),
    "green": (112, 138, 78),
    "teal": (52, 128, 126),
    "blue": (58, 88, 148),
    "purple": (116, 72, 116),
    "pink": (218, 140, 138),
    "cream": (238, 226, 200),
}
# Neighbours in this row belong together; a background passes from one into the next.
GROUNDS = (
    (206, 186, 152),  # sand
    (190, 160, 126),  # clay
    (160, 122, 96),  # leather
    (120, 92, 84),  # umber
    (84, 72, 80),  # dusk
    (72, 82, 100),  # slate
    (94, 112, 124),  # rain
    (122, 136, 126),  # sage
    (160, 160, 128),  # moss
    (196, 184, 156),  # straw
)
REACH = 12  # pixels that a shadow may extend beyond its object


class Sheet:
    """One object as the painter has it: where it lies, in 1/64 px, and its outline."""

    def __init__(self, shape: str, radius: int, width: int, angle: int, x: int, y: int) -> None:
        self.shape, self.radius, self.width, self.angle = shape, radius, width, angle
        self.x, self.y = x, y
        self.window = self.around(0)
        self.inside: NDArray[np.bool_] = self.distance(self.window) <= 0
        self.pixels = int(np.count_nonzero(self.inside))

    def around(self, margin: int) -> Window:
        """Return the part of the frame within `margin` pixels of the object."""
        y, x = (
            slice(
                max(0, (centre - self.radius) // UNIT - margin),
                min(SIZE, (centre + self.radius) // UNIT + 1 + margin),
            )
            for centre in (self.y, self.x)
        )
        return y, x

    def distance(self, window: Window) -> Ints:
        """Return the distance to the outline in 1/64 px, negative inside, for a window's pixels."""
        y, x = (
            np.arange(side.start, side.stop, dtype=np.int32) * UNIT + UNIT // 2 - centre
            for side, centre in zip(window, (self.y, self.x), strict=True)
        )
        return signed_distance(self.shape, x[None], y[:, None], self.radius, self.width, self.angle)


class Stock:
    """The textures of one scene, shared by its background and its objects."""

    def __init__(self, draws: Draws) -> None:
        self.clouds = value_noise(draws, (64, 64), (32, 32), (16, 16))
        self.mottle = value_noise(draws, (16, 16), (8, 8), (4, 4))
        self.grain = value_noise(draws, (4, 64), (2, 32))
        self.paper = value_noise(draws, (2, 2))

    def cut(self, draws: Draws, window: Window) -> Floats:
        """Return the texture of one thing, about −1…1, cut from a random place."""
        height, width = (side.stop - side.start for side in window)
        mottle, grain = draws.uniform(0.2, 1.0), draws.uniform(0.0, 1.0)
        paper = draws.uniform(0.1, 0.5)
        texture = mottle * self._piece(draws, self.mottle, height, width)
        texture += paper * self._piece(draws, self.paper, height, width)
        upright = draws.between(0, 1)
        if upright:
            texture += grain * self._piece(draws, self.grain.T, height, width)
        else:
            texture += grain * self._piece(draws, self.grain, height, width)
        return texture

    @staticmethod
    def _piece(draws: Draws, field: Floats, height: int, width: int) -> Floats:
        top, left = draws.between(0, SIZE - 1), draws.between(0, SIZE - 1)
        rows = np.arange(top, top + height) % SIZE
        columns = np.arange(left, left + width) % SIZE
        return field[rows[:, None], columns]


def paint(draws: Draws, sheets: list[Sheet], colors: list[str]) -> NDArray[np.float32]:
    """Return the picture of `sheets`, rearmost first: float32 `[3, 128, 128]`, 0…1."""
    stock = Stock(draws)
    toward = draws.between(TURN * 9 // 16, TURN * 15 // 16)  # the light comes from above
    light = (cosine(toward) / 4096, sine(toward) / 4096)
    image = _ground(draws, stock)
    for height, (sheet, color) in enumerate(zip(sheets, colors, strict=True)):
        _lay(image, draws, stock, sheet, color, light, 1.5 + 0.5 * height)
    _light_up(image, draws, light)
    image += _noise(draws)
    levels = np.floor(np.clip(image, 0, 1) * 255 + 0.5)
    return (levels / 255).astype(np.float32, copy=False)


def _ground(draws: Draws, stock: Stock) -> Floats:
    place = draws.between(0, len(GROUNDS) - 1)
    step = 1 if draws.between(0, 1) else -1
    here, there = (_rgb(GROUNDS[(place + k * step) % len(GROUNDS)]) for k in range(2))
    texture = stock.cut(draws, (slice(0, SIZE), slice(0, SIZE)))
    blend = soft_step(0.5 + 0.9 * stock.clouds)
    strength = draws.uniform(0.06, 0.16)
    return (here + (there - here) * blend) * (1 + strength * texture)


def _lay(
    image: Floats, draws: Draws, stock: Stock, sheet: Sheet, color: str,
    light: tuple[float, float], height: float,
) -> None:  # fmt: skip
    window = sheet.around(REACH)
    distance = sheet.distance(window).astype(np.float32) / UNIT
    cover = np.clip(0.5 - distance, 0, 1)

    softness = 1.0 + height
    shadow = soft_step(0.5 - distance / (2 * softness))
    dx, dy = (-int(np.floor(part * height * 1.3 + 0.5)) for part in light)
    shadow = _shift(shadow, dx, dy) * draws.uniform(0.35, 0.55)
    region = (slice(None), *window)
    image[region] *= 1 - shadow * _column(0.9, 0.95, 0.85)

    texture = stock.cut(draws, window)
    strength = draws.uniform(0.04, 0.14)
    value = draws.uniform(0.9, 1.08)
    across = _plane(window, light) * draws.uniform(0.05, 0.18)
    slope = soft_step(0.5 - distance / 2.5)
    step = tuple(int(np.floor(part + 0.5)) for part in light)
    rim = _shift(slope, -step[0], -step[1]) - _shift(slope, step[0], step[1])
    tone = value * (1 + strength * texture + across) - 0.10 * rim
    paint_ = _rgb(COLORS[color]) * tone
    image[region] += cover * (paint_ - image[region])


def _plane(window: Window, light: tuple[float, float]) -> Floats:
    y, x = (
        (np.arange(side.start, side.stop, dtype=np.float32) - (side.start + side.stop) / 2)
        / (side.stop - side.start)
        for side in window
    )
    return light[0] * x[None] + light[1] * y[:, None]


def _shift(field: Floats, dx: int, dy: int) -> Floats:
    shifted = np.zeros_like(field)
    h, w = field.shape
    shifted[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = field[
        max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return shifted


def _light_up(image: Floats, draws: Draws, light: tuple[float, float]) -> None:
    plane = _plane((slice(0, SIZE), slice(0, SIZE)), light) * draws.uniform(0.2, 0.6)
    warmth = draws.uniform(0.0, 0.12)
    away = (np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2) / SIZE
    vignette = 1.04 - 0.35 * (away * away + (away * away)[:, None])
    image *= vignette * (1 + plane) * (1 + plane * _column(warmth, 0, -warmth))


def _noise(draws: Draws) -> Floats:
    dots = draws.bytes(SIZE, SIZE, 8).astype(np.float32) / 127.5 - 1
    shared = dots[..., 0] + dots[..., 1]
    level = draws.uniform(0.008, 0.03)
    return np.stack([shared + dots[..., k] + dots[..., k + 1] for k in (2, 4, 6)]) * (level * 0.7)


def _rgb(color: tuple[int, int, int]) -> Floats:
    return (np.array(color, np.float32) / 255)[:, None, None]


def _column(*values: float) -> Floats:
    return np.array(values, np.float32)[:, None, None]
