"""What every exported class promises: one builder each, read by the trial in `test_contract.py`.

A new chapter adds a builder per public class of its `helpers/bridges/<slug>.py` at the end of
`BUILDERS`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from helpers.bridges.encoder import LinearProbe, TruncatedEncoder
from helpers.bridges.unet import AddBlock, UNetDecoder, UpBlock, Without
from helpers.encoder import OUT_CHANNELS, Pyramid
from helpers.inspection import pyramid_levels

RANKS = {"decoder": 4, "vector": 2, "tokens": 3, "map": 4}


@dataclass(frozen=True)
class Misuse:
    """One mistake that a class documents: `make(module)` raises `error`, whose text fits `message`.

    The message says what came, what was expected and what to do.
    """

    make: Callable[[nn.Module], object]
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class Builder:
    """How to make one exported class and feed it, and what it promises.

    Heights and widths are those of the image that the encoder saw.

    Args:
        cls: the class.
        kind: decoder, vector, tokens or map, whose outputs have the rank in `RANKS`; mapper,
            encoder or other, whose outputs have the shape that `shape` says.
        build: makes a new module with random weights; few channels keep the trial fast.
        inputs: `(batch, height, width, dtype)` → what `forward` takes, by name: tensors, batch
            first, or a `Pyramid`. Random; the trial sets the seed.
        shape: `(batch, height, width)` → the output's shape.
        misuses: the errors that the class documents, by what was done wrong.
        unread: names of inputs, or of a pyramid's maps, that do not change the output.
        one_value: `(batch, height, width)` → whether BatchNorm meets one value per channel, so that
            a training pass raises its "Expected more than 1 value per channel".
        faults: what is known to be broken, by the trial's name: a regular expression for the whole
            text of its failure. The trial must fail, and in no other way, so that a cure takes the
            entry away. Not for new classes: mend those.
    """

    cls: type[nn.Module]
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int, torch.dtype], dict[str, Any]]
    shape: Callable[[int, int, int], tuple[int, ...]]
    misuses: dict[str, Misuse] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    one_value: Callable[[int, int, int], bool] = lambda batch, height, width: False
    faults: dict[str, str] = field(default_factory=dict)


# --- what builders share


def images(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random images, as if they were normalised."""
    return torch.randn(batch, 3, height, width).to(dtype)


def pyramid(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Pyramid:
    """Return random maps of the shapes that leave the encoder; no value is negative, as there."""
    return Pyramid(*(map_of(name, batch, height, width, dtype) for name in Pyramid._fields))


def map_of(
    name: str, batch: int, height: int, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return one map of such a pyramid, by its name."""
    channels = dict(zip(Pyramid._fields, OUT_CHANNELS, strict=True))[name]
    return torch.randn(batch, channels, *sides(name, height, width)).relu().to(dtype)


def sides(name: str, height: int, width: int) -> tuple[int, int]:
    """Return height and width of one of the encoder's maps, by its name."""
    (level,) = [level for level in pyramid_levels(height, width) if level.name == name]
    return level.height, level.width


def one_value_in_c5(batch: int, height: int, width: int) -> bool:
    """Whether c5 has one value per channel: a single image of 32×32 pixels."""
    return (batch, *sides("c5", height, width)) == (1, 1, 1)


def step_up(block: type[nn.Module]) -> Builder:
    """Return the builder of a block that joins c5 to the skip c4."""
    return Builder(
        cls=block,
        kind="map",
        build=lambda: block(in_channels=512, skip_channels=256, out_channels=4),
        inputs=lambda *size: {"x": map_of("c5", *size), "skip": map_of("c4", *size)},
        shape=lambda batch, height, width: (batch, 4, *sides("c4", height, width)),
        misuses={
            "training on one value": Misuse(
                lambda module: module.train()(map_of("c5", 1, 32, 32), torch.rand(1, 256, 1, 1)),
                ValueError,
                "Expected more than 1 value per channel when training",
            ),
            "skip first": Misuse(
                lambda module: module(map_of("c4", 2, 64, 96), map_of("c5", 2, 64, 96)),
                ValueError,
                r"Expected x as \[B, 512, h, w\], got \[2, 256, 4, 6\]\. .* in_channels=enc",
            ),
            "a skip of another level": Misuse(
                lambda module: module(map_of("c5", 2, 64, 96), map_of("c3", 2, 64, 96)),
                ValueError,
                r"Expected skip as \[B, 256, h, w\], got \[2, 128, 8, 12\]\. .* in_channels=enc",
            ),
        },
    )


def unet(block: type[nn.Module] = UpBlock) -> UNetDecoder:
    """Return a U-Net's decoder of few channels."""
    return UNetDecoder(OUT_CHANNELS, out_channels=3, widths=(8, 7, 6, 5), block=block)


UNET = Builder(
    cls=UNetDecoder,
    kind="decoder",
    build=unet,
    inputs=lambda *size: {"pyramid": pyramid(*size)},
    shape=lambda batch, height, width: (batch, 3, *sides("c1", height, width)),
    misuses={
        "coarsest map first": Misuse(
            lambda module: module(Pyramid(*reversed(pyramid(2, 64, 96)))),
            ValueError,
            r"Expected c1 as \[B, 64, h, w\], got \[2, 512, 2, 3\]\. .* in_channels=enc",
        ),
        "without a batch": Misuse(
            lambda module: module(Pyramid(*(map_[0] for map_ in pyramid(2, 64, 96)))),
            ValueError,
            r"Expected c1 as \[B, 64, h, w\], got \[64, 32, 48\]\. .* in_channels=enc",
        ),
        "one map short": Misuse(
            lambda module: module(pyramid(2, 64, 96)[1:]),
            ValueError,
            r"Expected 5 maps, got 4\. Pass all that the encoder returned",
        ),
        "a map of another batch": Misuse(
            lambda module: module(pyramid(4, 64, 96)._replace(c3=map_of("c3", 1, 64, 96))),
            ValueError,
            r"Expected maps of one batch, got c1 of 4 images and c3 of 1\.",
        ),
    },
)


# --- one builder per exported class

BUILDERS = {
    "TruncatedEncoder": Builder(
        cls=TruncatedEncoder,
        kind="encoder",
        build=lambda: TruncatedEncoder(resnet18(num_classes=10)),
        inputs=lambda *size: {"x": images(*size)},
        shape=lambda batch, height, width: (batch, 512, *sides("c5", height, width)),
        one_value=one_value_in_c5,
    ),
    "LinearProbe": Builder(
        cls=LinearProbe,
        kind="decoder",
        build=lambda: LinearProbe(OUT_CHANNELS, out_channels=3, level=5),
        inputs=lambda *size: {"pyramid": pyramid(*size)},
        shape=lambda batch, height, width: (batch, 3, *sides("c5", height, width)),
        misuses={
            "level 0": Misuse(
                lambda module: LinearProbe(OUT_CHANNELS, out_channels=3, level=0),
                ValueError,
                r"Expected a level from 1 to 5, got 0\.",
            ),
            "level 6": Misuse(
                lambda module: LinearProbe(OUT_CHANNELS, out_channels=3, level=6),
                ValueError,
                r"Expected a level from 1 to 5, got 6\.",
            ),
            "coarsest map first": Misuse(
                lambda module: module(Pyramid(*reversed(pyramid(2, 64, 96)))),
                ValueError,
                r"Expected c5 as \[B, 512, h, w\], got \[2, 64, 32, 48\]\. .* in_channels=enc",
            ),
            "without a batch": Misuse(
                lambda module: module(Pyramid(*(map_[0] for map_ in pyramid(2, 64, 96)))),
                ValueError,
                r"Expected c5 as \[B, 512, h, w\], got \[512, 2, 3\]\. .* in_channels=enc",
            ),
        },
        unread=("c1", "c2", "c3", "c4"),
        one_value=one_value_in_c5,
    ),
    "UpBlock": step_up(UpBlock),
    "AddBlock": step_up(AddBlock),
    "UNetDecoder": UNET,
    "UNetDecoder of AddBlocks": replace(UNET, build=lambda: unet(AddBlock)),
    "Without": replace(
        UNET,
        cls=Without,
        build=lambda: Without(unet(), "c4", "c2"),
        unread=("c2", "c4"),
        misuses={
            "coarsest map first": UNET.misuses["coarsest map first"],
            "without a batch": UNET.misuses["without a batch"],
            "no map's name": Misuse(
                lambda module: Without(unet(), "c4", "c6"),
                ValueError,
                r"Expected names among c1…c5, got \['c6'\]\.",
            ),
        },
    ),
}
