"""The trials of the chapter on many paths: one, five, all through one grid, and their cousins."""

from __future__ import annotations

from torch import nn

from experiments.trials import Trial
from helpers.bridges.multi_path import (
    FPNDecoder,
    MultiPathDecoder,
    OnePathDecoder,
    SegFormerDecoder,
    SummedPathDecoder,
    ThroughGrid,
)
from helpers.bridges.unet import Without
from helpers.encoder import ResNet18Encoder


def one_path(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return OnePathDecoder(encoder.out_channels, classes)


def many_paths(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return MultiPathDecoder(encoder.out_channels, classes)


def through_c5(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ThroughGrid(MultiPathDecoder(encoder.out_channels, classes), "c5")


def through_c4(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ThroughGrid(MultiPathDecoder(encoder.out_channels, classes), "c4")


def through_c3(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ThroughGrid(MultiPathDecoder(encoder.out_channels, classes), "c3")


def through_c2(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return ThroughGrid(MultiPathDecoder(encoder.out_channels, classes), "c2")


def summed(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return SummedPathDecoder(encoder.out_channels, classes)


def fpn(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return FPNDecoder(encoder.out_channels, classes)


def segformer(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return SegFormerDecoder(encoder.out_channels, classes)


def without_c1(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(MultiPathDecoder(encoder.out_channels, classes), "c1")


def without_c2(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(MultiPathDecoder(encoder.out_channels, classes), "c2")


def without_c3(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(MultiPathDecoder(encoder.out_channels, classes), "c3")


def without_c4(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(MultiPathDecoder(encoder.out_channels, classes), "c4")


def without_c5(encoder: ResNet18Encoder, classes: int) -> nn.Module:
    return Without(MultiPathDecoder(encoder.out_channels, classes), "c5")


TRIALS = {
    "one path": Trial(one_path),
    "many paths": Trial(many_paths),
    "through c5's grid": Trial(through_c5),
    "through c4's grid": Trial(through_c4),
    "through c3's grid": Trial(through_c3),
    "through c2's grid": Trial(through_c2),
    "sum": Trial(summed),
    "FPN": Trial(fpn),
    "SegFormer head": Trial(segformer),
    "without c1": Trial(without_c1),
    "without c2": Trial(without_c2),
    "without c3": Trial(without_c3),
    "without c4": Trial(without_c4),
    "without c5": Trial(without_c5),
}
