"""The trials of the chapter on attention: one way to make masks, with and without looking."""

from __future__ import annotations

from torch import Tensor, nn

from experiments.trials import Trial
from helpers.bridges.attention import (
    AveragingReader,
    PixelEmbedding,
    PositionalEncoding2d,
    QueryDecoder,
    SelfAttention,
    SpatialGate,
)
from helpers.encoder import Pyramid, ResNet18Encoder

WIDTH = 64


class FixedHead(nn.Module):
    """The pixels' vectors and one vector for each class that is the same for all images."""

    def __init__(self, in_channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.pixels = PixelEmbedding(in_channels, WIDTH)
        self.head = nn.Conv2d(WIDTH, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        return self.head(self.pixels(pyramid))


def fixed(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return FixedHead(encoder.out_channels, classes)


def gates(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    decoder = FixedHead(encoder.out_channels, classes)
    project = decoder.pixels.project
    for k, channels in enumerate(encoder.out_channels[1:]):
        project[k] = nn.Sequential(SpatialGate(channels), project[k])
    return decoder


def self_attention(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    """After the projection of c5, where it has 17 thousand parameters, not a million."""
    decoder = FixedHead(encoder.out_channels, classes)
    project = decoder.pixels.project
    looking = PositionalEncoding2d(WIDTH), SelfAttention(WIDTH)
    project[-1] = nn.Sequential(project[-1], *looking)
    return decoder


def averaging(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return QueryDecoder(encoder.out_channels, classes, WIDTH, reader=AveragingReader)


def attending(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return QueryDecoder(encoder.out_channels, classes, WIDTH)


TRIALS = {
    "fixed head": Trial(fixed),
    "gates": Trial(gates),
    "self-attention on c5": Trial(self_attention),
    "averaging queries": Trial(averaging),
    "attending queries": Trial(attending),
}
