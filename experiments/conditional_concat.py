"""The trials of the chapter on conditional concatenation: what decides how the image enters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.trials import Trial
from helpers.bridges.attention import SpatialGate
from helpers.bridges.conditional_concat import (
    SPADE,
    CoarseFeatures,
    Concat,
    ConditionalDecoder,
    FiLM,
    HardConcat,
    SoftConcat,
)
from helpers.encoder import Pyramid, ResNet18Encoder

END = 8.0  # the bias from which a mask starts shut (−) or open (+): 0.0003 and 0.9997


class NoFine(Concat):
    """As `Concat`, but the fine map arrives as zeros."""

    def forward(self, features: Tensor, fine: Tensor) -> Tensor:
        return super().forward(features, torch.zeros_like(fine))


class SoftNoFine(SoftConcat):
    """As `SoftConcat`, but the fine map arrives as zeros: what is left weighs the features."""

    def forward(self, features: Tensor, fine: Tensor) -> Tensor:
        return super().forward(features, torch.zeros_like(fine))


class GatedConcat(nn.Module):
    """As `Concat`, followed by chapter 04's gate: one weight for all channels of a pixel."""

    def __init__(self, in_channels: int, fine_channels: int) -> None:
        super().__init__()
        self.concat = Concat(in_channels, fine_channels)
        self.gate = SpatialGate(in_channels + fine_channels)

    def forward(self, features: Tensor, fine: Tensor) -> Tensor:
        return self.gate(self.concat(features, fine))


class FiLMConcat(nn.Module):
    """As `Concat`, with a fine map that the features have modulated before, by `modulate`."""

    modulate: type[nn.Module] = FiLM

    def __init__(self, in_channels: int, fine_channels: int) -> None:
        super().__init__()
        self.concat = Concat(in_channels, fine_channels)
        self.film = self.modulate(in_channels, fine_channels)

    def forward(self, features: Tensor, fine: Tensor) -> Tensor:
        return self.concat(features, self.film(features, fine))


class SPADEConcat(FiLMConcat):
    modulate = SPADE


class BesideC1(nn.Module):
    """As `ConditionalDecoder`, with c1 in place of the image's stem.

    `forward(pyramid)` returns `[B, out_channels, ⌈H/2⌉, ⌈W/2⌉]`.
    """

    def __init__(
        self, in_channels: tuple[int, ...], out_channels: int, join: type[nn.Module]
    ) -> None:
        super().__init__()
        self.coarse = CoarseFeatures(in_channels, 16)
        self.project = nn.Conv2d(in_channels[0], 8, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.join = join(16, 8)
        self.mix = nn.Conv2d(24, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        fine = self.norm1(self.project(pyramid.c1)).relu()
        joined = self.join(self.coarse(pyramid), fine)
        return self.head(self.norm(self.mix(joined)).relu())


def conditional(encoder: ResNet18Encoder, classes: int, join: type[nn.Module]) -> nn.Module:
    """Return a decoder with this join; all around it starts alike, whatever the join."""
    decoder = ConditionalDecoder(encoder.out_channels, classes, join=Concat)
    decoder.join = join(*decoder.join.channels)
    return decoder


def no_image(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return conditional(encoder, classes, NoFine)


def no_image_soft(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return conditional(encoder, classes, SoftNoFine)


def concatenate(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return conditional(encoder, classes, Concat)


def soft(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return conditional(encoder, classes, SoftConcat)


def hard(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return conditional(encoder, classes, HardConcat)


def gate(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return conditional(encoder, classes, GatedConcat)


def film(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return conditional(encoder, classes, FiLMConcat)


def spade(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return conditional(encoder, classes, SPADEConcat)


def starts_shut(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    decoder = conditional(encoder, classes, SoftConcat)
    nn.init.constant_(decoder.join.score.bias, -END)
    return decoder


def starts_open(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    decoder = conditional(encoder, classes, SoftConcat)
    nn.init.constant_(decoder.join.score.bias, END)
    return decoder


def c1_concatenate(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return BesideC1(encoder.out_channels, classes, join=Concat)


def c1_soft(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return BesideC1(encoder.out_channels, classes, join=SoftConcat)


TRIALS = {
    "no image": Trial(no_image),
    "no image, soft mask": Trial(no_image_soft),
    "concatenate": Trial(concatenate),
    "soft mask": Trial(soft),
    "hard mask": Trial(hard),
    "gate": Trial(gate),
    "FiLM": Trial(film),
    "SPADE": Trial(spade),
    "starts shut": Trial(starts_shut),
    "starts open": Trial(starts_open),
    "c1: concatenate": Trial(c1_concatenate),
    "c1: soft mask": Trial(c1_soft),
}
