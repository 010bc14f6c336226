"""The trials of the chapter on spatial pyramids: one decoder, with and without context.

On scenes they are run by `experiments.spatial_pyramid_probe`, which also scores by size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.trials import Trial
from helpers.bridges.spatial_pyramid import (
    ASPP,
    BesideImage,
    ContextDecoder,
    NoContext,
    PyramidPooling,
    convolved,
)
from helpers.encoder import Pyramid, ResNet18Encoder

WIDE_RATES = (2, 4, 8)  # for c3, whose grid is four times as fine as that of c5
CLOSE_RATES = (1, 1, 1)
DEEPLAB_RATES = (6, 12, 18)  # made for maps of 33 × 33 positions and more


class PointwisePyramid(PyramidPooling):
    """As `PyramidPooling`, as many weights, but nothing is pooled: no position sees another."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        width = out_channels // len(self.grids)
        self.grids = nn.ModuleList(convolved(in_channels, width) for _ in self.grids)


class CloseConvolutions(ASPP):
    """As `ASPP` with rates of 1, but a 1×1 stands where the mean of the map stood."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, CLOSE_RATES)
        self.whole = convolved(in_channels, out_channels)


class MapBesideImage(BesideImage):
    """As `BesideImage`, but each pixel gets what c5 says there, by a 1×1, in place of a vector."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, width: int = 16) -> None:
        super().__init__(in_channels, out_channels, width)
        self.linear = nn.Conv2d(in_channels[-1], width, 1)

    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
        map_ = F.interpolate(self.linear(pyramid.c5), size=image.shape[-2:], mode="bilinear")
        return self.head(self.relu(self.conv(torch.cat([image, map_], dim=1))))


def c3(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ContextDecoder(encoder.out_channels, classes, NoContext, level=3)


def c3_pyramid(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ContextDecoder(encoder.out_channels, classes, PyramidPooling, level=3)


def c3_pointwise(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    """As many weights as `c3_pyramid`, without its context."""
    return ContextDecoder(encoder.out_channels, classes, PointwisePyramid, level=3)


def c3_dilated(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    context = partial(ASPP, rates=WIDE_RATES)
    return ContextDecoder(encoder.out_channels, classes, context, level=3)


def c3_close(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    """As many weights as `c3_dilated`, with taps that stay close together."""
    context = partial(ASPP, rates=CLOSE_RATES)
    return ContextDecoder(encoder.out_channels, classes, context, level=3)


def c3_close_no_mean(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ContextDecoder(encoder.out_channels, classes, CloseConvolutions, level=3)


def c5(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ContextDecoder(encoder.out_channels, classes, NoContext)


def c5_pyramid(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ContextDecoder(encoder.out_channels, classes, PyramidPooling)


def c5_dilated(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ContextDecoder(encoder.out_channels, classes, ASPP)


def c5_deeplab(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    context = partial(ASPP, rates=DEEPLAB_RATES)
    return ContextDecoder(encoder.out_channels, classes, context)


def beside_image(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return BesideImage(encoder.out_channels, classes)


def map_beside_image(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return MapBesideImage(encoder.out_channels, classes)


TRIALS = {
    "c3": Trial(c3),
    "c3, PPM": Trial(c3_pyramid),
    "c3, PPM unpooled": Trial(c3_pointwise),
    "c3, ASPP": Trial(c3_dilated),
    "c3, rates 1 1 1": Trial(c3_close),
    "c3, rates 1 1 1, no mean": Trial(c3_close_no_mean),
    "c5": Trial(c5),
    "c5, PPM": Trial(c5_pyramid),
    "c5, ASPP": Trial(c5_dilated),
    "c5, rates 6 12 18": Trial(c5_deeplab),
    "vector beside the image": Trial(beside_image),
    "map beside the image": Trial(map_beside_image),
}
