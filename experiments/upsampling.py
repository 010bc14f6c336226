"""The trials of the chapter on upsampling: one decoder, its way up and what lies beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.trials import Trial
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
from helpers.encoder import Pyramid, ResNet18Encoder, check_map

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


def nearest(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, NearestConv)


def bilinear(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, BilinearConv)


def transposed(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, TransposedConv)


def even_start(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, EvenTransposedConv)


def small_start(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, SmallTransposedConv)


def uneven(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, UnevenConv)


def shuffle(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, ShuffleConv)


def uneven_shuffle(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, UnevenShuffle)


def widest(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, BilinearConv, WIDEST)


def wider(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, BilinearConv, WIDER)


def five_times(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, BilinearConv, FROM_C5, (2,) * 5)


def once(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UpsamplingDecoder(encoder.out_channels, classes, BilinearConv, (32, 16), (32,))


def image(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return BesideImageDecoder(encoder.out_channels, classes, BilinearConv)


def image_hidden(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return HiddenImage(image(encoder, classes))


def image_two_layers(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    """One 3×3 more where features and image meet."""
    decoder = BesideImageDecoder(encoder.out_channels, classes, BilinearConv)
    second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    decoder.mix = nn.Sequential(decoder.mix, nn.BatchNorm2d(16), nn.ReLU(), second)
    return decoder


def two_layers_hidden(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return HiddenImage(image_two_layers(encoder, classes))


def image_relu(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    """16 channels, and a ReLU before they meet."""
    decoder = BesideImageDecoder(encoder.out_channels, classes, BilinearConv)
    decoder.climb.head = nn.Sequential(decoder.climb.head, nn.ReLU())
    return decoder


def image_three_no_relu(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return BesideImageDecoder(encoder.out_channels, classes, BilinearConv, beside=3)


def image_three_channels(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    """As often advised: the image's 3 channels, and a ReLU, before they meet."""
    decoder = BesideImageDecoder(encoder.out_channels, classes, BilinearConv, beside=3)
    decoder.climb.head = nn.Sequential(decoder.climb.head, nn.ReLU())
    return decoder


def unet_transposed(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UNetDecoder(encoder.out_channels, classes, block=TransposedUpBlock)


def unet_bilinear(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UNetDecoder(encoder.out_channels, classes, block=BilinearUpBlock)


TRIALS = {
    "nearest": Trial(nearest),
    "bilinear": Trial(bilinear),
    "transposed": Trial(transposed),
    "transposed, even start": Trial(even_start),
    "transposed, small start": Trial(small_start),
    "transposed, 3×3": Trial(uneven),
    "pixel shuffle": Trial(shuffle),
    "shuffle, default start": Trial(uneven_shuffle),
    "bilinear, wider": Trial(wider),
    "bilinear, widest": Trial(widest),
    "five times ×2": Trial(five_times),
    "once ×32": Trial(once),
    "five times ×2, 18 epochs": Trial(five_times),
    "once ×32, 18 epochs": Trial(once),
    "image": Trial(image),
    "image hidden": Trial(image_hidden),
    "image, two layers": Trial(image_two_layers),
    "image hidden, two layers": Trial(two_layers_hidden),
    "image, ReLU": Trial(image_relu),
    "image, 3 channels": Trial(image_three_no_relu),
    "image, 3 channels, ReLU": Trial(image_three_channels),
    "U-Net, transposed": Trial(unet_transposed),
    "U-Net, bilinear": Trial(unet_bilinear),
}
