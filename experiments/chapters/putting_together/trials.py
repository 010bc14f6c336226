"""The trials of the chapter that puts it together: its decoder, then less or more of each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core.trials import Trial, without
from helpers.bridges.putting_together import BookDecoder, Merge
from helpers.bridges.spatial_pyramid import PyramidPooling
from helpers.encoder import Pyramid, check_map, check_pyramid

LATERALS = (32, 32, 48, 64, 64)  # the decoder's own, for c1…c5
WIDTHS = (64, 48, 32, 32)  # after the merges at c4, c3, c2, c1
SIDE = 16  # channels of each level that the head reads besides


class SumMerge(nn.Module):
    """As `Merge`, but x, projected to the skip's channels on its own grid, is added."""

    def __init__(self, merge: Merge) -> None:
        super().__init__()
        self.channels = merge.channels
        x, skip = merge.channels
        conv, norm, relu = merge.conv
        self.project = nn.Conv2d(x, skip, 1, bias=False)
        self.conv = nn.Sequential(
            nn.Conv2d(skip, conv.out_channels, conv.kernel_size, padding=conv.padding, bias=False),
            norm,
            relu,
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_map("x", x, self.channels[0])
        check_map("skip", skip, self.channels[1])
        x = F.interpolate(self.project(x), size=skip.shape[-2:], mode="bilinear")
        return self.conv(x + skip)


class EndsAtC2(nn.Module):
    """As `BookDecoder`, without all that belongs to c1: the logits are on c2's grid."""

    def __init__(self, decoder: BookDecoder) -> None:
        super().__init__()
        self.in_channels = decoder.in_channels
        self.laterals = decoder.laterals[1:]
        self.merge4, self.merge3, self.merge2 = decoder.merge4, decoder.merge3, decoder.merge2
        self.head = nn.Conv2d(WIDTHS[2], decoder.head.out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        levels = zip(self.laterals, pyramid[1:], strict=True)
        c2, c3, c4, c5 = [lateral(c) for lateral, c in levels]
        return self.head(self.merge2(self.merge3(self.merge4(c5, c4), c3), c2))


class HeadOnAll(nn.Module):
    """As `BookDecoder`, but the head reads c5, p4, p3 and p2, too, a few channels of each."""

    def __init__(self, decoder: BookDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.in_channels = decoder.in_channels
        levels = (LATERALS[4], *WIDTHS[:3])
        self.sides = nn.ModuleList(nn.Conv2d(c, SIDE, 1) for c in levels)
        wide = WIDTHS[3] + SIDE * len(levels)
        self.head = nn.Conv2d(wide, decoder.head.out_channels, 1)
        decoder.head = nn.Identity()

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        own = self.decoder
        levels = zip(own.laterals, pyramid, strict=True)
        c1, c2, c3, c4, c5 = [lateral(c) for lateral, c in levels]
        p4 = own.merge4(c5, c4)
        p3 = own.merge3(p4, c3)
        p2 = own.merge2(p3, c2)
        p1 = own.merge1(p2, c1)
        read = zip(self.sides, (c5, p4, p3, p2), strict=True)
        size = p1.shape[-2:]
        maps = [F.interpolate(side(p), size=size, mode="bilinear") for side, p in read]
        return self.head(torch.cat([p1, *maps], dim=1))


def changed(
    in_channels: tuple[int, ...], classes: int, *, by: Callable[[BookDecoder], nn.Module]
) -> nn.Module:
    return by(BookDecoder(in_channels, classes))


def bare_laterals(
    in_channels: tuple[int, ...], classes: int, *, dropped: Sequence[int]
) -> BookDecoder:
    """Return a decoder whose laterals lack some of their parts: 1 is BatchNorm, 2 the ReLU."""
    decoder = BookDecoder(in_channels, classes)
    for lateral in decoder.laterals:
        for part in dropped:
            lateral[part] = nn.Identity()
    return decoder


def no_laterals(in_channels: tuple[int, ...], classes: int) -> BookDecoder:
    """Return a decoder whose merges read all channels of the encoder's maps as they are."""
    decoder = BookDecoder(in_channels, classes)
    c1, c2, c3, c4, c5 = in_channels
    decoder.laterals = nn.ModuleList(nn.Identity() for _ in in_channels)
    decoder.merge4 = Merge(c5, c4, WIDTHS[0])
    decoder.merge3 = Merge(WIDTHS[0], c3, WIDTHS[1])
    decoder.merge2 = Merge(WIDTHS[1], c2, WIDTHS[2])
    decoder.merge1 = Merge(WIDTHS[2], c1, WIDTHS[3], kernel=1)
    return decoder


def summed(decoder: BookDecoder) -> BookDecoder:
    for name in ("merge4", "merge3", "merge2", "merge1"):
        setattr(decoder, name, SumMerge(getattr(decoder, name)))
    return decoder


def wide_at_c1(decoder: BookDecoder) -> BookDecoder:
    decoder.merge1 = Merge(WIDTHS[2], LATERALS[0], WIDTHS[3], kernel=3)
    return decoder


def pooled(decoder: BookDecoder) -> BookDecoder:
    decoder.laterals[4].append(PyramidPooling(LATERALS[4], LATERALS[4]))
    return decoder


TRIALS = {
    "book decoder": Trial(BookDecoder),
    "book, linear laterals": Trial(bare_laterals, dropped=(1, 2)),
    "book, laterals without ReLU": Trial(bare_laterals, dropped=(2,)),
    "book, laterals without BatchNorm": Trial(bare_laterals, dropped=(1,)),
    "book, no laterals": Trial(no_laterals),
    "book, summed": Trial(changed, by=summed),
    "book, 3×3 at c1": Trial(changed, by=wide_at_c1),
    "book, ends at c2": Trial(changed, by=EndsAtC2),
    # as many weights and as much work, but zeros for c1: what its values are worth
    "book, blind to c1": Trial(without, of=BookDecoder, levels=["c1"]),
    "book, PPM on c5": Trial(changed, by=pooled),
    "book, head on all levels": Trial(changed, by=HeadOnAll),
    "book, half as wide": Trial(
        BookDecoder, laterals=[n // 2 for n in LATERALS], widths=[n // 2 for n in WIDTHS]
    ),
    "book, twice as wide": Trial(
        BookDecoder, laterals=[n * 2 for n in LATERALS], widths=[n * 2 for n in WIDTHS]
    ),
}
