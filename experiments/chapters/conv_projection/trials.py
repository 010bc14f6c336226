"""The trials of the chapter on 1×1 convolutions: how maps are joined, and how wide they become."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core.trials import Trial
from helpers.bridges.conv_projection import (
    AdaptedDecoder,
    ConcatAdaptation,
    ConcatConvAdaptation,
    ConvAdaptation,
    FeatureAdaptation,
)


class ReshapeAdaptation(nn.Module):
    """As `FeatureAdaptation`, but the skip gets its channels by `reshape`: positions are mixed up.

    Twice the channels become twice the height, four times also twice the width, and so on. A 1×1
    convolution follows, so that no layer is missing. Takes and returns what `FeatureAdaptation`
    does, where `skip_channels` is a power of two times `out_channels`.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.across = 1
        while self.across**2 * 4 * out_channels <= skip_channels:
            self.across *= 2
        self.down = skip_channels // out_channels // self.across
        self.project_x = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.project_skip = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        batch, _, height, width = skip.shape
        skip = skip.reshape(batch, self.out_channels, height * self.down, width * self.across)
        skip = F.interpolate(self.project_skip(skip), size=x.shape[-2:], mode="bilinear")
        return torch.relu(self.norm(self.project_x(x) + skip))


class FirstAdaptation(nn.Module):
    """As `FeatureAdaptation`, but of the skip only the first `out_channels` channels are read."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.adapt = FeatureAdaptation(in_channels, out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.adapt(x, skip[:, : self.out_channels])


TRIALS = {
    "sum": Trial(AdaptedDecoder),
    "concatenate": Trial(AdaptedDecoder, adapt=ConcatAdaptation),
    "sum, 3×3": Trial(AdaptedDecoder, adapt=ConvAdaptation),
    "concatenate, 3×3": Trial(AdaptedDecoder, adapt=ConcatConvAdaptation),
    "reshaped": Trial(AdaptedDecoder, adapt=ReshapeAdaptation),
    "first 64 channels": Trial(AdaptedDecoder, adapt=FirstAdaptation),
    "4 channels": Trial(AdaptedDecoder, width=4),
    "8 channels": Trial(AdaptedDecoder, width=8),
    "16 channels": Trial(AdaptedDecoder, width=16),
    "32 channels": Trial(AdaptedDecoder, width=32),
    "128 channels": Trial(AdaptedDecoder, width=128),
}
