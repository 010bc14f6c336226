"""The trials of the chapter on skip connections: what is built, each with a seed."""

from __future__ import annotations

from torch import nn

from experiments.trials import Trial
from helpers.bridges.unet import AddBlock, UNetDecoder, Without
from helpers.encoder import ResNet18Encoder

SKIPS = ("c1", "c2", "c3", "c4")


def unet(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UNetDecoder(encoder.out_channels, classes)


def c5_only(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(UNetDecoder(encoder.out_channels, classes), *SKIPS)


def without_c1(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(UNetDecoder(encoder.out_channels, classes), "c1")


def without_c2(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(UNetDecoder(encoder.out_channels, classes), "c2")


def without_c3(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(UNetDecoder(encoder.out_channels, classes), "c3")


def without_c4(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(UNetDecoder(encoder.out_channels, classes), "c4")


def adding(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return UNetDecoder(encoder.out_channels, classes, block=AddBlock)


def no_relu(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    """In evaluation, what is left is one linear map (and a constant) of the pyramid."""
    decoder = UNetDecoder(encoder.out_channels, classes)
    for block in (decoder.up4, decoder.up3, decoder.up2, decoder.up1):
        block.relu = nn.Identity()
    return decoder


def one_relu(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    decoder = UNetDecoder(encoder.out_channels, classes)
    for block in (decoder.up4, decoder.up3, decoder.up2):
        block.relu = nn.Identity()
    return decoder


TRIALS = {
    "c5 only": Trial(c5_only),
    "U-Net": Trial(unet),
    "U-Net, random encoder": Trial(unet, weights=None),
    "U-Net, fine-tuned": Trial(unet, frozen=False),
    "U-Net, from scratch": Trial(unet, weights=None, frozen=False),
    "without c1": Trial(without_c1),
    "without c2": Trial(without_c2),
    "without c3": Trial(without_c3),
    "without c4": Trial(without_c4),
    "adding": Trial(adding),
    "no ReLU": Trial(no_relu),
    "one ReLU": Trial(one_relu),
}
