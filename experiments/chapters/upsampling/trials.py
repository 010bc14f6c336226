"""The trials of the chapter on upsampling: one decoder, its way up and what lies beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.core.trials import Trial
from helpers.bridges.unet import UNetDecoder
from helpers.bridges.upsampling import (
    BesideImageDecoder,
    BilinearConv,
    EvenTransposedConv,
    NearestConv,
    ShuffleConv,
    TransposedConv,
    UpsamplingDecoder,
)
from helpers.encoder import Pyramid, check_map

WIDER = (60, 42, 32, 22, 20)  # with these, 3×3 convolutions have as many weights as 4×4 ones
WIDEST = (86, 60, 48, 34, 26)  # and with these as many as those before a pixel shuffle
SMALLER = 0.3125  # the norm of a bilinear kernel ×2 with the same first weight, to an even one's
FROM_C5 = (64, 48, 32, 24, 16, 16)


class UnevenConv(nn.Module):
    """As `TransposedConv`, ×2 only, with a kernel that the stride does not divide: 3×3."""

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(
            in_channels, out_channels, 3, factor, padding=1, output_padding=1, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SmallTransposedConv(TransposedConv):
    """As `TransposedConv`, with starting weights as small as those of an even start."""

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2) -> None:
        super().__init__(in_channels, out_channels, factor)
        with torch.no_grad():
            self.conv.weight.mul_(SMALLER)


class UnevenShuffle(ShuffleConv):
    """As `ShuffleConv`, with PyTorch's starting weights."""

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2) -> None:
        super().__init__(in_channels, out_channels, factor)
        self.conv.reset_parameters()


class HiddenImage(nn.Module):
    """A decoder that does not see the image beside its maps: zeros arrive in its place."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
        return self.decoder(pyramid, torch.zeros_like(image))


class TransposedUpBlock(nn.Module):
    """As the U-Net's `UpBlock`, but a transposed convolution makes the step, cut to the skip."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = in_channels, skip_channels
        self.up = TransposedConv(in_channels, out_channels)
        both = out_channels + skip_channels
        self.conv = nn.Conv2d(both, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_map("x", x, self.channels[0])
        check_map("skip", skip, self.channels[1])
        x = self.up(x)[..., : skip.shape[-2], : skip.shape[-1]]
        return self.relu(self.norm(self.conv(torch.cat([x, skip], dim=1))))


class BilinearUpBlock(TransposedUpBlock):
    """As `TransposedUpBlock`, but the step is `BilinearConv`."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, skip_channels, out_channels)
        self.up = BilinearConv(in_channels, out_channels)


def hidden(
    in_channels: tuple[int, ...], classes: int, *, of: Callable[..., nn.Module]
) -> HiddenImage:
    return HiddenImage(of(in_channels, classes))


def two_layers(in_channels: tuple[int, ...], classes: int) -> BesideImageDecoder:
    """Return a decoder with one 3×3 more where features and image meet."""
    decoder = BesideImageDecoder(in_channels, classes)
    second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    decoder.mix = nn.Sequential(decoder.mix, nn.BatchNorm2d(16), nn.ReLU(), second)
    return decoder


def with_relu(in_channels: tuple[int, ...], classes: int, *, beside: int) -> BesideImageDecoder:
    """Return a decoder with a ReLU before features and image meet."""
    decoder = BesideImageDecoder(in_channels, classes, beside=beside)
    decoder.climb.head = nn.Sequential(decoder.climb.head, nn.ReLU())
    return decoder


TRIALS = {
    "nearest": Trial(UpsamplingDecoder, up=NearestConv),
    "bilinear": Trial(UpsamplingDecoder, up=BilinearConv),
    "transposed": Trial(UpsamplingDecoder, up=TransposedConv),
    "transposed, even start": Trial(UpsamplingDecoder, up=EvenTransposedConv),
    "transposed, small start": Trial(UpsamplingDecoder, up=SmallTransposedConv),
    "transposed, 3×3": Trial(UpsamplingDecoder, up=UnevenConv),
    "pixel shuffle": Trial(UpsamplingDecoder, up=ShuffleConv),
    "shuffle, default start": Trial(UpsamplingDecoder, up=UnevenShuffle),
    "bilinear, wider": Trial(UpsamplingDecoder, widths=WIDER),
    "bilinear, widest": Trial(UpsamplingDecoder, widths=WIDEST),
    "five times ×2": Trial(UpsamplingDecoder, widths=FROM_C5, factors=(2,) * 5),
    "once ×32": Trial(UpsamplingDecoder, widths=(32, 16), factors=(32,)),
    "five times ×2, 18 epochs": Trial(UpsamplingDecoder, widths=FROM_C5, factors=(2,) * 5),
    "once ×32, 18 epochs": Trial(UpsamplingDecoder, widths=(32, 16), factors=(32,)),
    "image": Trial(BesideImageDecoder),
    "image hidden": Trial(hidden, of=BesideImageDecoder),
    "image, two layers": Trial(two_layers),
    "image hidden, two layers": Trial(hidden, of=two_layers),
    "image, ReLU": Trial(with_relu, beside=16),
    "image, 3 channels": Trial(BesideImageDecoder, beside=3),
    "image, 3 channels, ReLU": Trial(with_relu, beside=3),  # as often advised
    "U-Net, transposed": Trial(UNetDecoder, block=TransposedUpBlock),
    "U-Net, bilinear": Trial(UNetDecoder, block=BilinearUpBlock),
}
