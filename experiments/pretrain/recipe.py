"""How the encoder is trained: the numbers, and what they mean after a share of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A training's settings; the defaults are for a GPU. A share is one of the budget, 0…1."""

    epochs: float = 60.0
    minutes: float = 0.0  # of computing, over all runs; unless 0, it replaces the epochs
    batch: int = 512  # images, over all processes
    rate: float = 0.4  # the peak; linear to it, and linear from it to 0
    warm_up: float = 0.05  # share
    decay: float = 5e-4  # of weights, not of biases and BatchNorm
    momentum: float = 0.9
    smoothing: float = 0.1  # of the labels
    average: float = 0.999  # how much of the weights' running average stays at each step
    sides: tuple[int, ...] = (64, 80, 96, 112, 128)  # pixels; a batch draws one, up to a limit
    first: int = 64  # the limit at the start
    grown: float = 0.6  # share after which the limit is the largest side
    last: tuple[int, ...] = (128, 144, 160)  # the sides of the last phase
    last_from: float = 0.8  # share
    smallest_crop: float = 0.25  # of the area
    colors: float = 0.4  # brightness, contrast and saturation vary by 1 ± this
    cutmix: float = 0.5  # of the batches; none in the last phase
    recalibrate: int = 100  # batches that BatchNorm's statistics are taken from at the end
    mixed: bool = True  # bfloat16, or float16 on older GPUs, where it is safe; else float32
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.minutes > 0 or self.epochs > 0) or self.minutes < 0 or self.batch < 1:
            raise ValueError(
                f"Expected a budget and a batch above 0, got {self.epochs} epochs, "
                f"{self.minutes} minutes, batches of {self.batch}."
            )

    def rate_at(self, share: float) -> float:
        up = share / self.warm_up if self.warm_up else 1.0
        return self.rate * max(min(up, (1 - share) / (1 - self.warm_up)), 0.0)

    def sides_at(self, share: float) -> tuple[int, ...]:
        """Return the sides, in pixels, that a batch may be resized to."""
        if self.is_last(share):
            return self.last
        limit = self.first + (max(self.sides) - self.first) * min(share / self.grown, 1)
        return tuple(side for side in self.sides if side <= max(limit, min(self.sides)))

    def is_last(self, share: float) -> bool:
        return share >= self.last_from


# A CPU sees few epochs: smaller steps, milder augmentation, no image above 128 pixels. Not every
# CPU computes in bfloat16; for those that do, there is --mixed.
CPU: dict[str, Any] = dict(
    mixed=False,
    epochs=12,
    batch=128,
    rate=0.1,
    last=(128,),
    last_from=0.7,
    smallest_crop=0.35,
    colors=0.3,
    cutmix=0.25,
)
SMOKE: dict[str, Any] = dict(
    mixed=False,
    epochs=8,
    batch=32,
    rate=0.05,
    average=0.9,
    sides=(32, 48),
    first=32,
    last=(48,),
    cutmix=0.25,
    recalibrate=4,
)
