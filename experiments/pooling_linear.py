"""The trials of the chapter on vectors: the same decoder, fed by a map, a vector or nothing."""

from __future__ import annotations

from torch import nn

from experiments.trials import Trial
from helpers import camvid, scenes
from helpers.bridges.pooling_linear import GridLinear, MapDecoder, PoolLinear, VectorDecoder
from helpers.bridges.unet import Without
from helpers.encoder import ResNet18Encoder

# A decoder that starts from a vector has to be told a grid: here that of c5, by the classes.
GRIDS = {len(scenes.CLASSES): (4, 4), len(camvid.CLASSES): (6, 8)}


def map_(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return MapDecoder(encoder.out_channels[-1], classes)


def vector(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return _from_average(encoder, classes, 256)


def vector_of_4(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return _from_average(encoder, classes, 4)


def vector_of_32(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return _from_average(encoder, classes, 32)


def grid_2(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return _from_grid(encoder, classes, 2)


def grid_4(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return _from_grid(encoder, classes, 4)


def nothing(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    """The decoder of `vector`, blind: the best mask that fits every image."""
    return Without(vector(encoder, classes), "c5")


def _from_average(encoder: ResNet18Encoder, classes: int, width: int) -> nn.Module:
    bridge = PoolLinear(encoder.out_channels[-1], width)
    return VectorDecoder(bridge, width, classes, GRIDS[classes])


def _from_grid(encoder: ResNet18Encoder, classes: int, grid: int) -> nn.Module:
    bridge = GridLinear(encoder.out_channels[-1], 256, grid)
    return VectorDecoder(bridge, 256, classes, GRIDS[classes])


TRIALS = {
    "map": Trial(map_),
    "vector": Trial(vector),
    "nothing": Trial(nothing),
    "grid 2×2": Trial(grid_2),
    "grid 4×4": Trial(grid_4),
    "vector of 4": Trial(vector_of_4),
    "vector of 32": Trial(vector_of_32),
}
