"""The trials of the chapter on skip connections."""

from __future__ import annotations

from torch import nn

from experiments.core.trials import Trial, without
from helpers.bridges.unet import AddBlock, UNetDecoder

SKIPS = ("c1", "c2", "c3", "c4")


def linear_unet(in_channels: tuple[int, ...], classes: int, *, last: bool) -> UNetDecoder:
    """Return a U-Net without its ReLUs, but for the `last` one.

    In evaluation, what is left without any is one linear map (and a constant) of the pyramid.
    """
    decoder = UNetDecoder(in_channels, classes)
    blocks = [decoder.up4, decoder.up3, decoder.up2, decoder.up1]
    for block in blocks[:3] if last else blocks:
        block.relu = nn.Identity()
    return decoder


TRIALS = {
    "c5 only": Trial(without, of=UNetDecoder, levels=SKIPS),
    "U-Net": Trial(UNetDecoder),
    "U-Net, random encoder": Trial(UNetDecoder, weights=None),
    "U-Net, fine-tuned": Trial(UNetDecoder, frozen=False),
    "U-Net, from scratch": Trial(UNetDecoder, weights=None, frozen=False),
    "without c1": Trial(without, of=UNetDecoder, levels=["c1"]),
    "without c2": Trial(without, of=UNetDecoder, levels=["c2"]),
    "without c3": Trial(without, of=UNetDecoder, levels=["c3"]),
    "without c4": Trial(without, of=UNetDecoder, levels=["c4"]),
    "adding": Trial(UNetDecoder, block=AddBlock),
    "no ReLU": Trial(linear_unet, last=False),
    "one ReLU": Trial(linear_unet, last=True),
}
