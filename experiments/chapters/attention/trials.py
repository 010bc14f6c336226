"""The trials of the chapter on attention: one way to make masks, with and without looking."""

from __future__ import annotations

from torch import Tensor, nn

from experiments.core.trials import Trial
from helpers.bridges.attention import (
    AveragingReader,
    PixelEmbedding,
    PositionalEncoding2d,
    QueryDecoder,
    SelfAttention,
    SpatialGate,
)
from helpers.encoder import Pyramid

WIDTH = 64


class FixedHead(nn.Module):
    """The pixels' vectors and one vector for each class that is the same for all images."""

    def __init__(self, in_channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.pixels = PixelEmbedding(in_channels, WIDTH)
        self.head = nn.Conv2d(WIDTH, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        return self.head(self.pixels(pyramid))


def gated(in_channels: tuple[int, ...], classes: int) -> FixedHead:
    """Return a fixed head with a gate in front of each projection."""
    decoder = FixedHead(in_channels, classes)
    project = decoder.pixels.project
    for k, channels in enumerate(in_channels[1:]):
        project[k] = nn.Sequential(SpatialGate(channels), project[k])
    return decoder


def self_attending(in_channels: tuple[int, ...], classes: int) -> FixedHead:
    """Return a fixed head with self-attention after c5's projection.

    There it has 17 thousand parameters, not a million.
    """
    decoder = FixedHead(in_channels, classes)
    project = decoder.pixels.project
    project[-1] = nn.Sequential(project[-1], PositionalEncoding2d(WIDTH), SelfAttention(WIDTH))
    return decoder


TRIALS = {
    "fixed head": Trial(FixedHead),
    "gates": Trial(gated),
    "self-attention on c5": Trial(self_attending),
    "averaging queries": Trial(QueryDecoder, width=WIDTH, reader=AveragingReader),
    "attending queries": Trial(QueryDecoder, width=WIDTH),
}
