"""The trials of the chapter on conditional concatenation: what decides how the image enters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from experiments.core.trials import Trial
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
from helpers.encoder import Pyramid

SHUT, OPEN = -8.0, 8.0  # the bias from which a mask starts at 0.0003 or at 0.9997


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


class ModulatedConcat(nn.Module):
    """As `Concat`, with a fine map that the features have modulated before."""

    def __init__(self, in_channels: int, fine_channels: int, modulation: type[nn.Module]) -> None:
        super().__init__()
        self.concat = Concat(in_channels, fine_channels)
        self.modulate = modulation(in_channels, fine_channels)

    def forward(self, features: Tensor, fine: Tensor) -> Tensor:
        return self.concat(features, self.modulate(features, fine))


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


def conditional(
    in_channels: tuple[int, ...],
    classes: int,
    *,
    join: Callable[[int, int], nn.Module],
    bias: float | None = None,
) -> ConditionalDecoder:
    """Return a decoder with this join; all around it starts alike, whatever the join."""
    decoder = ConditionalDecoder(in_channels, classes, join=Concat)
    decoder.join = join(*decoder.join.channels)
    if bias is not None:
        nn.init.constant_(decoder.join.score.bias, bias)
    return decoder


TRIALS = {
    "no image": Trial(conditional, join=NoFine),
    "no image, soft mask": Trial(conditional, join=SoftNoFine),
    "concatenate": Trial(conditional, join=Concat),
    "soft mask": Trial(conditional, join=SoftConcat),
    "hard mask": Trial(conditional, join=HardConcat),
    "gate": Trial(conditional, join=GatedConcat),
    "FiLM": Trial(conditional, join=partial(ModulatedConcat, modulation=FiLM)),
    "SPADE": Trial(conditional, join=partial(ModulatedConcat, modulation=SPADE)),
    "starts shut": Trial(conditional, join=SoftConcat, bias=SHUT),
    "starts open": Trial(conditional, join=SoftConcat, bias=OPEN),
    "c1: concatenate": Trial(BesideC1, join=Concat),
    "c1: soft mask": Trial(BesideC1, join=SoftConcat),
}
