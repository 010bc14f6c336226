"""How scenes are painted: palette, paper, light, shadows and grain. Private to `helpers.scenes`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from helpers._draw import (
    ONE,
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
    "yellow": (222, 178, 88),
    "green": (112, 138, 78),
    "teal": (52, 128, 126),
    "blue": (60, 86, 138),
    "purple": (116, 72, 116),
    "pink": (218, 140, 138),
    "cream": (228, 215, 188),
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
FRAME = (slice(0, SIZE), slice(0, SIZE))
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
        grain = self.grain if draws.between(0, 1) else self.grain.T
        texture = draws.uniform(0.3, 1.0) * self.piece(draws, self.mottle, window)
        texture += draws.uniform(0.1, 0.5) * self.piece(draws, self.paper, window)
        texture += draws.uniform(0.0, 1.0) * self.piece(draws, grain, window)
        if draws.between(1, 4) == 1:
            texture += draws.uniform(0.4, 0.9) * self._hatching(draws, window)
        return texture

    def _hatching(self, draws: Draws, window: Window) -> Floats:
        angle, period = draws.between(0, TURN - 1), draws.uniform(3.5, 9.0)
        y, x = (np.arange(side.stop - side.start, dtype=np.float32) / period for side in window)
        phase = x * (cosine(angle) / ONE) + (y * (sine(angle) / ONE))[:, None]
        phase += 0.6 * self.piece(draws, self.mottle, window)
        return 4 * np.abs(phase - np.floor(phase) - 0.5) - 1

    @staticmethod
    def piece(draws: Draws, field: Floats, window: Window) -> Floats:
        """Return as much of a field as covers a window, from a random place."""
        rows, columns = (
            np.arange(side.stop - side.start) + draws.between(0, SIZE - 1) for side in window
        )
        return field[rows[:, None] % SIZE, columns % SIZE]


class Lamp:
    """Where the light of one scene comes from: always from above, as in most pictures."""

    def __init__(self, draws: Draws) -> None:
        angle = draws.between(TURN * 9 // 16, TURN * 15 // 16)
        self.x, self.y = cosine(angle) / ONE, sine(angle) / ONE

    def steps(self, length: float) -> tuple[int, int]:
        """Return `length` pixels towards the light as whole pixels to the right and down."""
        return int(np.floor(length * self.x + 0.5)), int(np.floor(length * self.y + 0.5))

    def slope(self, window: Window) -> Floats:
        """Return a plane over a window that rises towards the light, about −0.5…0.5."""
        y, x = (
            (np.arange(side.stop - side.start, dtype=np.float32) + 0.5) / (side.stop - side.start)
            - np.float32(0.5)
            for side in window
        )
        return self.x * x + (self.y * y)[:, None]


def paint(draws: Draws, sheets: list[Sheet], colors: list[str]) -> NDArray[np.float32]:
    """Return the picture of `sheets`, rearmost first: `[3, 128, 128]`, 0…1, in steps of 1/255."""
    stock, lamp = Stock(draws), Lamp(draws)
    image = _ground(draws, stock)
    for k, (sheet, color) in enumerate(zip(sheets, colors, strict=True)):
        _lay(image, draws, stock, lamp, sheet, COLORS[color], height=1.5 + 0.5 * k)
    image *= _light(draws, lamp)
    image += _noise(draws)
    levels = np.floor(np.clip(image, 0, 1) * 255 + 0.5)
    return (levels / 255).astype(np.float32, copy=False)


def _ground(draws: Draws, stock: Stock) -> Floats:
    place = draws.between(0, len(GROUNDS) - 1)
    step = 1 if draws.between(0, 1) else -1
    here, there = (_column(*GROUNDS[(place + k * step) % len(GROUNDS)]) / 255 for k in range(2))
    texture = stock.cut(draws, FRAME)
    blend = soft_step(0.5 + 0.9 * stock.clouds)
    strength = draws.uniform(0.06, 0.16)
    return (here + (there - here) * blend) * (1 + strength * texture)


def _lay(image: Floats, draws: Draws, stock: Stock, lamp: Lamp, sheet: Sheet,
         color: tuple[int, int, int], height: float) -> None:  # fmt: skip
    """Put one sheet on the picture, `height` pixels above it."""
    window = sheet.around(REACH)
    region = (slice(None), *window)
    distance = sheet.distance(window).astype(np.float32) / UNIT

    shadow = soft_step(0.5 - distance / (2 + 2 * height))
    shadow = _shift(shadow, *lamp.steps(-1.4 * height)) * draws.uniform(0.4, 0.65)
    image[region] *= 1 - shadow * _column(0.92, 0.96, 0.86)

    texture = draws.uniform(0.05, 0.18) * stock.cut(draws, window)
    across = draws.uniform(0.1, 0.3) * lamp.slope(window)
    body = soft_step(0.5 - distance / 2.5)
    rim = _shift(body, *lamp.steps(-1)) - _shift(body, *lamp.steps(1))
    tone = draws.uniform(0.88, 1.06) + texture + across - 0.1 * rim
    drift = draws.uniform(0.0, 0.16) * stock.piece(draws, stock.clouds, window)
    paper = _column(*color) / 255 * tone * (1 + drift * _column(1, 0, -1))
    image[region] += np.clip(0.5 - distance, 0, 1) * (paper - image[region])


def _shift(field: Floats, dx: int, dy: int) -> Floats:
    """Move a field right and down; its margins repeat, as things go on beyond the frame."""
    h, w = field.shape
    rows, columns = np.clip(np.arange(h) - dy, 0, h - 1), np.clip(np.arange(w) - dx, 0, w - 1)
    return field[rows[:, None], columns]


def _light(draws: Draws, lamp: Lamp) -> Floats:
    slope = lamp.slope(FRAME)
    away = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE - np.float32(0.5)
    vignette = 1.05 - 0.4 * (away * away + (away * away)[:, None])
    warmth = draws.uniform(0.02, 0.16)
    return (
        vignette * (1 + draws.uniform(0.2, 0.6) * slope) * (1 + slope * _column(warmth, 0, -warmth))
    )


def _noise(draws: Draws) -> Floats:
    dots = draws.bytes(SIZE, SIZE, 8).astype(np.float32) / 127.5 - 1
    shared = dots[..., 0] + dots[..., 1]
    level = draws.uniform(0.008, 0.03)
    return np.stack([shared + dots[..., k] + dots[..., k + 1] for k in (2, 4, 6)]) * (level * 0.7)


def _column(*values: float) -> Floats:
    return np.array(values, np.float32)[:, None, None]
