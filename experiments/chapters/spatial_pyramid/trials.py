"""The trials of the chapter on spatial pyramids: one decoder, with and without context.

On scenes they are run by `experiments.chapters.spatial_pyramid.analysis`, which also scores by
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core.trials import Trial
from helpers.bridges.spatial_pyramid import (
    ASPP,
    BesideImage,
    ContextDecoder,
    NoContext,
    PyramidPooling,
    conv_bn_relu,
)
from helpers.encoder import Pyramid

WIDE_RATES = (2, 4, 8)  # for c3, whose grid is four times as fine as that of c5
CLOSE_RATES = (1, 1, 1)
DEEPLAB_RATES = (6, 12, 18)  # made for maps of 33 × 33 positions and more


class PointwisePyramid(PyramidPooling):
    """As `PyramidPooling`, as many weights, but nothing is pooled: no position sees another."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        width = out_channels // len(self.grids)
        self.grids = nn.ModuleList(conv_bn_relu(in_channels, width) for _ in self.grids)


class CloseConvolutions(ASPP):
    """As `ASPP` with rates of 1, but a 1×1 stands where the mean of the map stood."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, CLOSE_RATES)
        self.whole = conv_bn_relu(in_channels, out_channels)


class MapBesideImage(BesideImage):
    """As `BesideImage`, but each pixel gets what c5 says there, by a 1×1, in place of a vector."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, width: int = 16) -> None:
        super().__init__(in_channels, out_channels, width)
        self.linear = nn.Conv2d(in_channels[-1], width, 1)

    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
        map_ = F.interpolate(self.linear(pyramid.c5), size=image.shape[-2:], mode="bilinear")
        return self.head(self.relu(self.conv(torch.cat([image, map_], dim=1))))


TRIALS = {
    "c3": Trial(ContextDecoder, context=NoContext, level=3),
    "c3, PPM": Trial(ContextDecoder, context=PyramidPooling, level=3),
    # as many weights, without its context
    "c3, PPM unpooled": Trial(ContextDecoder, context=PointwisePyramid, level=3),
    "c3, ASPP": Trial(ContextDecoder, context=partial(ASPP, rates=WIDE_RATES), level=3),
    # as many weights, with taps that stay close together
    "c3, rates 1 1 1": Trial(ContextDecoder, context=partial(ASPP, rates=CLOSE_RATES), level=3),
    "c3, rates 1 1 1, no mean": Trial(ContextDecoder, context=CloseConvolutions, level=3),
    "c5": Trial(ContextDecoder, context=NoContext),
    "c5, PPM": Trial(ContextDecoder, context=PyramidPooling),
    "c5, ASPP": Trial(ContextDecoder, context=ASPP),
    "c5, rates 6 12 18": Trial(ContextDecoder, context=partial(ASPP, rates=DEEPLAB_RATES)),
    "vector beside the image": Trial(BesideImage),
    "map beside the image": Trial(MapBesideImage),
}
