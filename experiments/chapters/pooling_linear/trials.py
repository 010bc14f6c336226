"""The trials of the chapter on vectors: the same decoder, fed by a map, a vector or nothing."""

from __future__ import annotations

from torch import nn

from experiments.core.trials import Trial, without
from helpers import camvid, scenes
from helpers.bridges.pooling_linear import GridLinear, MapDecoder, PoolLinear, VectorDecoder

# A decoder that starts from a vector has to be told a grid: here that of c5, by the classes.
GRIDS = {len(scenes.CLASSES): (4, 4), len(camvid.CLASSES): (6, 8)}


def from_map(in_channels: tuple[int, ...], classes: int) -> nn.Module:
    return MapDecoder(in_channels[-1], classes)


def from_average(in_channels: tuple[int, ...], classes: int, *, width: int = 256) -> nn.Module:
    bridge = PoolLinear(in_channels[-1], width)
    return VectorDecoder(bridge, width, classes, GRIDS[classes])


def from_grid(in_channels: tuple[int, ...], classes: int, *, grid: int) -> nn.Module:
    bridge = GridLinear(in_channels[-1], 256, grid)
    return VectorDecoder(bridge, 256, classes, GRIDS[classes])


TRIALS = {
    "map": Trial(from_map),
    "vector": Trial(from_average),
    "nothing": Trial(without, of=from_average, levels=["c5"]),  # the best mask that fits all
    "grid 2×2": Trial(from_grid, grid=2),
    "grid 4×4": Trial(from_grid, grid=4),
    "vector of 4": Trial(from_average, width=4),
    "vector of 32": Trial(from_average, width=32),
}
