"""How scenes are drawn: hashed numbers, fixed-point shapes, textures. Private to `helpers.scenes`.

What decides a mask is computed in integers, so that it is the same on every machine. What
decides a colour uses +, −, × and ÷ in float32, which IEEE 754 defines exactly.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]  # float32 throughout
Ints = NDArray[np.signedinteger]  # int32 throughout
Window = tuple[slice, slice]  # rows, columns

SIZE = 128
UNIT = 64  # fixed-point steps in a pixel
TURN = 960  # angle steps in a full turn: divisible by 3, 4 and 5
ONE = 1 << 12  # what the sine table calls 1

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_ALL = (1 << 64) - 1


class Draws:
    """An endless row of random numbers that depends on nothing but its key.

    Source: SplitMix64, in Steele, Lea and Flood, Fast splittable pseudorandom number generators,
    OOPSLA 2014.
    """

    def __init__(self, *key: int) -> None:
        self.state = 0
        for part in key:
            self.state = _mix(((self.state + _GOLDEN) ^ part) & _ALL)

    def bits(self) -> int:
        """Return the next 64 bits."""
        self.state = (self.state + _GOLDEN) & _ALL
        return _mix(self.state)

    def between(self, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, both included."""
        return low + (self.bits() * (high - low + 1) >> 64)

    def uniform(self, low: float, high: float) -> float:
        """Return a float from `low` to `high`."""
        return low + (high - low) * ((self.bits() >> 11) / (1 << 53))

    def log_uniform(self, low: int, high: int) -> int:
        """Return an integer whose logarithm is uniform, without computing a logarithm."""
        while True:
            value = self.between(low, high)
            if self.between(1, value) <= low:  # kept in proportion to 1 / value
                return value

    def bytes(self, *shape: int) -> NDArray[np.uint8]:
        """Return an array of random bytes."""
        count = math.prod(shape)
        counter = np.arange(1, (count + 7) // 8 + 1, dtype=np.uint64)
        hashed: NDArray[np.uint64] = _mix(self.bits() + counter * _GOLDEN)
        return hashed.astype("<u8", copy=False).view(np.uint8)[:count].reshape(shape)


def _mix(z: Any) -> Any:
    """Hash an integer below 2⁶⁴, or an array of them, which wraps around by itself."""
    z = (z ^ (z >> 30)) * _FIRST & _ALL
    z = (z ^ (z >> 27)) * _SECOND & _ALL
    return z ^ (z >> 31)


# None lies within 0.0003 of halfway, so that every machine rounds alike.
_SINE = [round(math.sin(2 * math.pi * step / TURN) * ONE) for step in range(TURN)]


def sine(angle: int) -> int:
    """Return the sine of `angle` (in 1/960 of a turn) in units of 1/4096."""
    return _SINE[angle % TURN]


def cosine(angle: int) -> int:
    """Return the cosine of `angle` (in 1/960 of a turn) in units of 1/4096."""
    return _SINE[(angle + TURN // 4) % TURN]


def signed_distance(shape: str, x: Ints, y: Ints, radius: int, width: int, angle: int) -> Ints:
    """Return the distance to a shape's outline, negative inside, in 1/64 px.

    `x` `[1, w]` and `y` `[h, 1]` are pixel centres relative to the shape's centre. Outside a
    corner the value is a little smaller than the Euclidean distance.
    """
    if shape == "disc":
        return _length(x, y) - radius
    if shape == "ring":
        return np.abs(_length(x, y) - (radius - width // 2)) - width // 2
    if shape == "square":
        u, v = np.abs(_along(x, y, angle)), np.abs(_along(x, y, angle + TURN // 4))
        return np.maximum(u, v) - (radius * cosine(TURN // 8) // ONE)
    if shape == "pole":
        u, v = np.abs(_along(x, y, angle)), np.abs(_along(x, y, angle + TURN // 4))
        return np.maximum(u - radius, v - width // 2)
    if shape == "triangle":
        return np.max([_along(x, y, angle + k * TURN // 3) for k in range(3)], 0) - radius // 2
    # A star's inside lies within at least four of the five lines that its sides run along.
    sides = np.sort([_along(x, y, angle + k * TURN // 5) for k in range(5)], 0)
    # Without the circle, the tips of its shadow would run far ahead of it.
    return np.maximum(sides[3] - (radius * cosine(TURN // 5) // ONE), _length(x, y) - radius)


def _along(x: Ints, y: Ints, angle: int) -> Ints:
    return (x * cosine(angle) + y * sine(angle)) >> 12


def _length(x: Ints, y: Ints) -> Ints:
    # The square root of an integer below 2⁵² is correctly rounded, so its floor is exact.
    return np.sqrt((x * x + y * y).astype(np.float64)).astype(np.int32)


def value_noise(draws: Draws, *cells: tuple[int, int]) -> Floats:
    """Return smooth noise `[128, 128]`, values in −1…1, that repeats without a seam.

    Each of `cells` is the height and width in pixels (powers of two) of one octave's cells; every
    octave weighs half of the one before.
    """
    total = np.zeros((SIZE, SIZE), np.float32)
    weight, weights = 1.0, 0.0
    for height, width in cells:
        corners = draws.bytes(SIZE // height, SIZE // width).astype(np.float32) / 127.5 - 1
        rows = _interpolate(corners, height)
        total += weight * _interpolate(rows.T, width).T
        weights += weight
        weight /= 2
    return total / np.float32(weights)


def _interpolate(corners: Floats, steps: int) -> Floats:
    t = (np.arange(steps, dtype=np.float32) + np.float32(0.5)) / steps
    t = (t * t * (3 - 2 * t))[:, None]
    here, there = corners[:, None], np.roll(corners, -1, axis=0)[:, None]
    return (here + (there - here) * t).reshape(-1, corners.shape[1])


def soft_step(x: Floats) -> Floats:
    """Return 0 below 0, 1 above 1, and a smooth passage between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)
