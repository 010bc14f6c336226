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

from helpers.bridges.attention import (
    AveragingReader,
    Finder,
    PixelEmbedding,
    PositionalEncoding2d,
    QueryDecoder,
    QueryReader,
    SelfAttention,
    SpatialGate,
)
from helpers.bridges.conditional_concat import (
    SPADE,
    CoarseFeatures,
    Concat,
    ConditionalDecoder,
    FiLM,
    HardConcat,
    ImageStem,
    SoftConcat,
)
from helpers.bridges.conv_projection import (
    AdaptedDecoder,
    ConcatAdaptation,
    ConcatConvAdaptation,
    ConvAdaptation,
    FeatureAdaptation,
)
from helpers.bridges.encoder import LinearProbe, TruncatedEncoder
from helpers.bridges.input_mapping import (
    AddFusion,
    AutoEncoder,
    ConcatFusion,
    ConvMapper,
    FiLMFusion,
    JoinedVector,
    LinearMapper,
    MLPMapper,
    PCAMapper,
    PointingDecoder,
    Standardize,
)
from helpers.bridges.multi_path import (
    FPNDecoder,
    MultiPathDecoder,
    OnePathDecoder,
    SegFormerDecoder,
    SummedPathDecoder,
    ThroughGrid,
)
from helpers.bridges.pooling_linear import (
    GeM,
    GridLinear,
    MapDecoder,
    Painter,
    PoolLinear,
    VectorDecoder,
)
from helpers.bridges.putting_together import BookDecoder, Merge
from helpers.bridges.sequences import (
    AverageTokens,
    CaptionBlock,
    CaptionTransformer,
    CausalAttention,
    CrossAttention,
    PooledState,
    PositionTokens,
    StateGRU,
)
from helpers.bridges.spatial_pyramid import (
    ASPP,
    BesideImage,
    BothSpatialPyramid,
    ContextDecoder,
    MaxSpatialPyramid,
    NoContext,
    PooledContext,
    PyramidPooling,
    SpatialPyramid,
)
from helpers.bridges.unet import AddBlock, UNetDecoder, UpBlock, Without
from helpers.bridges.upsampling import (
    BesideImageDecoder,
    BilinearConv,
    EvenTransposedConv,
    NearestConv,
    ShuffleConv,
    TransposedConv,
    UpsamplingDecoder,
)
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


C5_IN = {"inputs": lambda *size: {"x": map_of("c5", *size)}}
NO_BATCH = Misuse(
    lambda module: module(torch.rand(512, 2, 3)),
    ValueError,
    r"Expected the map as \[B, 512, h, w\], got \[512, 2, 3\]\. .* in_channels=enc",
)
C5_ONLY = {
    "inputs": lambda *size: {"pyramid": pyramid(*size)},
    "unread": ("c1", "c2", "c3", "c4"),
}


def adaptation(join: type[nn.Module]) -> Builder:
    """Return the builder of a module that joins c5 to a decoder's map on the grid of c4."""
    return Builder(
        cls=join,
        kind="map",
        build=lambda: join(in_channels=256, skip_channels=512, out_channels=4),
        inputs=lambda *size: {"x": map_of("c4", *size), "skip": map_of("c5", *size)},
        shape=lambda batch, height, width: (batch, 4, *sides("c4", height, width)),
        misuses={
            "training on one value": Misuse(
                lambda module: module.train()(torch.rand(1, 256, 1, 1), map_of("c5", 1, 32, 32)),
                ValueError,
                "Expected more than 1 value per channel when training",
            ),
            "skip first": Misuse(
                lambda module: module(map_of("c5", 2, 64, 96), map_of("c4", 2, 64, 96)),
                ValueError,
                r"Expected x as \[B, 256, h, w\], got \[2, 512, 2, 3\]\. .* in_channels=enc",
            ),
            "a skip of another batch": Misuse(
                lambda module: module(map_of("c4", 4, 64, 96), map_of("c5", 1, 64, 96)),
                ValueError,
                r"Expected maps of one batch, got x of 4 images and skip of 1\. Pass maps of the",
            ),
        },
    )


def adapted(adapt: type[nn.Module] = FeatureAdaptation) -> AdaptedDecoder:
    """Return a decoder of few channels that joins by `adapt`."""
    return AdaptedDecoder(OUT_CHANNELS, out_channels=3, width=6, adapt=adapt)


ADAPTED = Builder(
    cls=AdaptedDecoder,
    kind="decoder",
    build=adapted,
    inputs=lambda *size: {"pyramid": pyramid(*size)},
    shape=lambda batch, height, width: (batch, 3, *sides("c2", height, width)),
    misuses=UNET.misuses,
    unread=("c1",),
)


def no_batch(message: str) -> Misuse:
    """Return the misuse of handing c4 over without its batch, to what takes one map."""
    return Misuse(lambda module: module(torch.rand(256, 4, 6)), ValueError, message)


C4_IN = {
    "inputs": lambda *size: {"x": map_of("c4", *size)},
    "misuses": {
        "without a batch": no_batch(
            r"Expected x as \[B, 256, h, w\], got \[256, 4, 6\]\. .* in_chan"
        ),
        "another map": Misuse(
            lambda module: module(map_of("c5", 2, 64, 96)),
            ValueError,
            r"Expected x as \[B, 256, h, w\], got \[2, 512, 2, 3\]\. .* in_channels=enc",
        ),
    },
}
READER = Builder(
    cls=QueryReader,
    kind="tokens",
    build=lambda: QueryReader(256, queries=5, width=16),
    shape=lambda batch, height, width: (batch, 5, 16),
    **C4_IN,
)
READER = replace(
    READER,
    misuses=READER.misuses
    | {
        "a width that the heads do not divide": Misuse(
            lambda module: QueryReader(256, queries=5, width=18),
            ValueError,
            r"Expected a width that 4 heads divide, got 18\. Choose",
        ),
    },
)


def asking(reader: type[QueryReader] = QueryReader) -> QueryDecoder:
    """Return a decoder of few channels whose queries read by `reader`."""
    return QueryDecoder(OUT_CHANNELS, out_channels=3, width=8, reader=reader)


def paths(decoder: type[nn.Module], level: str = "c1", unread: tuple[str, ...] = ()) -> Builder:
    """Return the builder of a decoder of few channels that ends on the grid of `level`."""
    return Builder(
        cls=decoder,
        kind="decoder",
        build=lambda: decoder(OUT_CHANNELS, out_channels=3, width=6),
        inputs=lambda *size: {"pyramid": pyramid(*size)},
        shape=lambda batch, height, width: (batch, 3, *sides(level, height, width)),
        misuses=UNET.misuses,
        unread=unread,
        one_value=one_value_in_c5,
    )


MULTI_PATH = paths(MultiPathDecoder)


def grids(vector: type[nn.Module], features: int) -> Builder:
    """Return the builder of a spatial pyramid that makes this many numbers of each channel."""
    return Builder(
        cls=vector,
        kind="vector",
        build=lambda: vector(512),
        shape=lambda batch, height, width: (batch, 512 * features),
        misuses={
            "without a batch": NO_BATCH,
            "a grid of no cells": Misuse(
                lambda module: vector(512, (1, 0)),
                ValueError,
                r"Expected grids of 1 × 1 or more, got \[1, 0\]\.",
            ),
        },
        **C5_IN,
    )


TRAINED_ON_ONE_VALUE = Misuse(
    lambda module: module.train()(map_of("c5", 1, 32, 32)),
    ValueError,
    "Expected more than 1 value per channel when training",
)


def context(cls: type[nn.Module]) -> Builder:
    """Return the builder of a module that gives c5 context."""
    return Builder(
        cls=cls,
        kind="map",
        build=lambda: cls(512, 16),
        shape=lambda batch, height, width: (batch, 16, *sides("c5", height, width)),
        misuses={"without a batch": NO_BATCH},
        **C5_IN,
    )


def with_context(context: type[nn.Module], level: int = 5) -> ContextDecoder:
    """Return a decoder of few channels that reads c2 and one map with context."""
    return ContextDecoder(OUT_CHANNELS, 3, context, level, width=16)


CONTEXT = Builder(
    cls=ContextDecoder,
    kind="decoder",
    build=lambda: with_context(PyramidPooling),
    inputs=lambda *size: {"pyramid": pyramid(*size)},
    shape=lambda batch, height, width: (batch, 3, *sides("c2", height, width)),
    misuses=UNET.misuses
    | {
        "level 2": Misuse(
            lambda module: with_context(NoContext, level=2),
            ValueError,
            r"Expected level 3, 4 or 5, got 2\.",
        ),
    },
    unread=("c1", "c3", "c4"),
)


def way_up(way: type[nn.Module], **misuses: Misuse) -> Builder:
    """Return the builder of a step that enlarges c4."""
    return Builder(
        cls=way,
        kind="map",
        build=lambda: way(256, 4, factor=2),
        inputs=C4_IN["inputs"],
        shape=lambda batch, height, width: (
            batch,
            4,
            *(2 * side for side in sides("c4", height, width)),
        ),
        misuses=C4_IN["misuses"] | misuses,
    )


def even_sides(height: int, width: int) -> tuple[int, int]:
    """Return twice the sides of c1: those of the image, rounded up to even ones."""
    return tuple(2 * side for side in sides("c1", height, width))


UPSAMPLING = Builder(
    cls=UpsamplingDecoder,
    kind="decoder",
    build=lambda: UpsamplingDecoder(OUT_CHANNELS, 3, widths=(8, 7, 6, 5, 4)),
    inputs=lambda *size: {"pyramid": pyramid(*size)},
    shape=lambda batch, height, width: (batch, 3, *even_sides(height, width)),
    misuses={
        "one map short": UNET.misuses["one map short"],
        "factors that fit no map": Misuse(
            lambda module: UpsamplingDecoder(OUT_CHANNELS, 3, factors=(2, 3)),
            ValueError,
            r"Expected factors whose product is one of \(2, 4, 8, 16, 32\) and one width more, "
            r"got \(2, 3\) and .* For c5: \(2,\) \* 5\.",
        ),
    },
    unread=("c1", "c2", "c3", "c5"),
)
BESIDE_IMAGE = Builder(
    cls=BesideImageDecoder,
    kind="decoder",
    build=lambda: BesideImageDecoder(OUT_CHANNELS, 3, beside=5, widths=(8, 7, 6, 5, 4)),
    inputs=lambda *size: {"pyramid": pyramid(*size), "image": images(*size)},
    shape=lambda batch, height, width: (batch, 3, height, width),
    misuses={
        "an image of another size": Misuse(
            lambda module: module(pyramid(2, 64, 96), images(2, 128, 96)),
            ValueError,
            r"Expected the image that the maps came from, got \[2, 3, 128, 96\] beside a c1 of "
            r"\[2, 64, 32, 48\]\. Pass what the encoder was given\.",
        ),
        "one image for a batch": Misuse(
            lambda module: module(pyramid(4, 64, 96), images(1, 64, 96)),
            ValueError,
            r"Expected the image that the maps came from, got \[1, 3, 64, 96\]",
        ),
    },
    unread=("c1", "c2", "c3", "c5"),
)


def joining(join: Callable[[int, int], nn.Module], cls: type[nn.Module]) -> Builder:
    """Return the builder of a module that joins c4 to a finer map, c2."""
    return Builder(
        cls=cls,
        kind="map",
        build=lambda: join(256, 64),
        inputs=lambda *size: {"features": map_of("c4", *size), "fine": map_of("c2", *size)},
        shape=lambda batch, height, width: (batch, 320, *sides("c2", height, width)),
        misuses={
            "fine map first": Misuse(
                lambda module: module(map_of("c2", 2, 64, 96), map_of("c4", 2, 64, 96)),
                ValueError,
                r"Expected features as \[B, 256, h, w\], got \[2, 64, 16, 24\]\. .* in_channels=",
            ),
            "a fine map of another batch": Misuse(
                lambda module: module(map_of("c4", 1, 64, 96), map_of("c2", 4, 64, 96)),
                ValueError,
                r"Expected maps of one batch, got features of 1 images and fine of 4\. Pass maps",
            ),
        },
    )


def modulating(kind: type[nn.Module]) -> Builder:
    """Return the builder of a module that changes c2 as c4 says."""
    return replace(
        joining(kind, kind),
        shape=lambda batch, height, width: (batch, 64, *sides("c2", height, width)),
    )


def leaning(in_channels: int, fine_channels: int) -> HardConcat:
    """Return a hard join whose scores are seldom near 0, where rounding to bfloat16 flips them."""
    join = HardConcat(in_channels, fine_channels)
    nn.init.constant_(join.score.bias, 1.0)
    return join


CONDITIONAL = Builder(
    cls=ConditionalDecoder,
    kind="decoder",
    build=lambda: ConditionalDecoder(OUT_CHANNELS, out_channels=3, width=6, fine=4),
    inputs=lambda *size: {"pyramid": pyramid(*size), "image": images(*size)},
    shape=lambda batch, height, width: (batch, 3, height, width),
    misuses={
        "coarsest map first": Misuse(
            lambda module: module(Pyramid(*reversed(pyramid(2, 64, 96))), images(2, 64, 96)),
            ValueError,
            r"Expected c1 as \[B, 64, h, w\], got \[2, 512, 2, 3\]\. .* in_channels=enc",
        ),
        "one map short": Misuse(
            lambda module: module(pyramid(2, 64, 96)[1:], images(2, 64, 96)),
            ValueError,
            r"Expected 5 maps, got 4\. Pass all that the encoder returned",
        ),
        "one image for all": Misuse(
            lambda module: module(pyramid(4, 64, 96), images(1, 64, 96)),
            ValueError,
            r"Expected maps of one batch, got features of 4 images and fine of 1\. Pass maps",
        ),
        "channels last": Misuse(
            lambda module: module(pyramid(2, 64, 96), torch.rand(2, 64, 96, 3)),
            ValueError,
            r"Expected 3 channels, got \[2, 64, 96, 3\]\. The channels are last",
        ),
    },
    unread=("c1", "c2"),
)


def mapping(cls: type[nn.Module], build: Callable[[], nn.Module], out: int) -> Builder:
    """Return the builder of a module that takes a vector of 10 numbers."""
    return Builder(
        cls=cls,
        kind="mapper",
        build=build,
        inputs=lambda batch, height, width, dtype: {"query": torch.randn(batch, 10).to(dtype)},
        shape=lambda batch, height, width: (batch, out),
        misuses={
            "without a batch": Misuse(
                lambda module: module(torch.rand(10)),
                ValueError,
                r"Expected the query as \[B, 10\], got \[10\]\. Keep the batch",
            ),
            "counted words": Misuse(
                lambda module: module(torch.ones(2, 10, dtype=torch.long)),
                TypeError,
                r"Expected the query in floating point, got torch\.int64\. .* query\.float\(\)",
            ),
        },
    )


STANDARD = mapping(Standardize, lambda: Standardize(10).fit(3 + torch.randn(40, 10)), 10)
PCA = mapping(PCAMapper, lambda: PCAMapper(10, 4), 4)


def fusing(fusion: type[nn.Module]) -> Builder:
    """Return the builder of a module that brings a vector into c4."""
    return Builder(
        cls=fusion,
        kind="map",
        build=lambda: fusion(256, 10),
        inputs=lambda batch, height, width, dtype: {
            "x": map_of("c4", batch, height, width, dtype),
            "vector": torch.randn(batch, 10).to(dtype),
        },
        shape=lambda batch, height, width: (batch, 256, *sides("c4", height, width)),
        misuses={
            "another map": Misuse(
                lambda module: module(map_of("c5", 2, 64, 96), torch.rand(2, 10)),
                ValueError,
                r"Expected x as \[B, 256, h, w\], got \[2, 512, 2, 3\]\. .* in_channels=enc",
            ),
            "one query for all": Misuse(
                lambda module: module(map_of("c4", 4, 64, 96), torch.rand(1, 10)),
                ValueError,
                r"Expected one query an image, got 1 for 4\. The same query for all: query\.exp",
            ),
        },
    )


POINTING = Builder(
    cls=PointingDecoder,
    kind="decoder",
    build=lambda: PointingDecoder(OUT_CHANNELS, 2, LinearMapper(10, 5), features=5, width=6),
    inputs=lambda *size: {
        "pyramid": pyramid(*size),
        "query": torch.randn(size[0], 10).to(size[3] if len(size) > 3 else torch.float32),
    },
    shape=lambda batch, height, width: (batch, 2, *sides("c2", height, width)),
    misuses={
        "coarsest map first": Misuse(
            lambda module: module(Pyramid(*reversed(pyramid(2, 64, 96))), torch.rand(2, 10)),
            ValueError,
            r"Expected c1 as \[B, 64, h, w\], got \[2, 512, 2, 3\]\. .* in_channels=enc",
        ),
        "one map short": Misuse(
            lambda module: module(pyramid(2, 64, 96)[1:], torch.rand(2, 10)),
            ValueError,
            r"Expected 5 maps, got 4\. Pass all that the encoder returned",
        ),
        "one query for all": Misuse(
            lambda module: module(pyramid(4, 64, 96), torch.rand(1, 10)),
            ValueError,
            r"Expected one query an image, got 1 for 4\. The same query for all: query\.exp",
        ),
        "a mapper of another width": Misuse(
            lambda module: PointingDecoder(OUT_CHANNELS, 2, LinearMapper(10, 5), features=4)(
                pyramid(2, 64, 96), torch.rand(2, 10)
            ),
            ValueError,
            r"Expected the query as \[B, 4\], got \[2, 5\]",
        ),
    },
    unread=("c1",),
)


DEEP = {
    "inputs": lambda *size: {"pyramid": pyramid(*size)},
    "misuses": {
        "one map short": UNET.misuses["one map short"],
        "a map of another batch": UNET.misuses["a map of another batch"],
    },
    "unread": ("c1", "c2", "c3"),
}
NO_WIDTH = "each head takes an equal share"


def deep_positions(height: int, width: int) -> int:
    """Return how many positions c4 and c5 have together."""
    return sum(rows * columns for rows, columns in (sides(c, height, width) for c in ("c4", "c5")))


def sentence(batch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return five tokens of a sentence, of eight channels."""
    return torch.randn(batch, 5, 8).to(dtype)


def attentive(layer: type[nn.Module], **misuses: Misuse) -> Builder:
    """Return the builder of a layer whose sentence looks at an image's tokens."""
    return Builder(
        cls=layer,
        kind="tokens",
        build=lambda: layer(8),
        inputs=lambda batch, height, width, dtype: {
            "x": sentence(batch, height, width, dtype),
            "memory": torch.randn(batch, deep_positions(height, width), 8).to(dtype),
        },
        shape=lambda batch, height, width: (batch, 5, 8),
        misuses={
            "channels first": Misuse(
                lambda module: module(torch.rand(2, 5, 8), torch.rand(2, 8, 24)),
                ValueError,
                r"Expected memory as \[B, N, 8\], got \[2, 8, 24\]\. Channels are last",
            ),
            "one memory for all": Misuse(
                lambda module: module(torch.rand(4, 5, 8), torch.rand(1, 24, 8)),
                ValueError,
                r"Expected one memory for each sentence, got 1 for 4\. Repeat it",
            ),
        }
        | misuses,
    )


def captioner(decoder: type[nn.Module], **options: Any) -> Builder:
    """Return the builder of a captioner of few channels with eleven words."""
    return Builder(
        cls=decoder,
        kind="other",
        build=lambda: decoder(OUT_CHANNELS, 11, width=8, **options),
        inputs=lambda batch, height, width, dtype: {
            "pyramid": pyramid(batch, height, width, dtype),
            "words": torch.randint(1, 11, (batch, 5)),
        },
        shape=lambda batch, height, width: (batch, 5, 11),
        misuses={
            "words of another batch": Misuse(
                lambda module: module(pyramid(4, 64, 96), torch.ones(1, 5, dtype=torch.long)),
                ValueError,
                r"Expected words \[4, T\], one row an image, T at least 1, got \[1, 5\]\.",
            ),
            "no word at all": Misuse(
                lambda module: module(pyramid(2, 64, 96), torch.ones(2, 0, dtype=torch.long)),
                ValueError,
                r"Expected words \[2, T\], one row an image, T at least 1, got \[2, 0\]\.",
            ),
            "embedded words": Misuse(
                lambda module: module(pyramid(2, 64, 96), torch.rand(2, 5)),
                TypeError,
                r"Expected numbers of words, got torch\.float32\. Pass what Vocabulary",
            ),
            "one map short": Misuse(
                lambda module: module(pyramid(2, 64, 96)[1:], torch.ones(2, 5, dtype=torch.long)),
                ValueError,
                r"Expected 5 maps, got 4\. Pass all that the encoder returned",
            ),
        },
        unread=("c1", "c2", "c3"),
    )


POSITIONS = Builder(
    cls=PositionTokens,
    kind="tokens",
    build=lambda: PositionTokens(OUT_CHANNELS, 8),
    shape=lambda batch, height, width: (batch, deep_positions(height, width), 8),
    **DEEP,
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
    "PoolLinear": Builder(
        cls=PoolLinear,
        kind="vector",
        build=lambda: PoolLinear(512, 6),
        shape=lambda batch, height, width: (batch, 6),
        misuses={"without a batch": NO_BATCH},
        **C5_IN,
    ),
    "GeM": Builder(
        cls=GeM,
        kind="vector",
        build=lambda: GeM(512),
        shape=lambda batch, height, width: (batch, 512),
        misuses={
            "without a batch": NO_BATCH,
            "a power of 0": Misuse(
                lambda module: GeM(512, p=0), ValueError, r"Expected p above 0, got 0: 1 is"
            ),
        },
        **C5_IN,
    ),
    "GridLinear": Builder(
        cls=GridLinear,
        kind="vector",
        build=lambda: GridLinear(512, 6, grid=2),
        shape=lambda batch, height, width: (batch, 6),
        misuses={
            "without a batch": NO_BATCH,
            "no cells": Misuse(
                lambda module: GridLinear(512, 6, grid=0),
                ValueError,
                r"Expected a grid of 1 × 1 or more, got 0\.",
            ),
        },
        **C5_IN,
    ),
    "Painter": Builder(
        cls=Painter,
        kind="map",
        build=lambda: Painter(512, 3, widths=(8, 7, 6)),
        shape=lambda batch, height, width: (
            batch,
            3,
            *(8 * side for side in sides("c5", height, width)),
        ),
        misuses={"without a batch": NO_BATCH},
        **C5_IN,
    ),
    "VectorDecoder": Builder(
        cls=VectorDecoder,
        kind="decoder",
        build=lambda: VectorDecoder(PoolLinear(512, 16), 16, out_channels=3, grid=(2, 3)),
        shape=lambda batch, height, width: (batch, 3, 16, 24),
        misuses={
            "a bridge of another width": Misuse(
                lambda module: VectorDecoder(GeM(512), 256, 3)(pyramid(2, 64, 96)),
                ValueError,
                r"Expected a vector \[B, 256\] from the bridge, got \[2, 512\]\. .*in_features",
            ),
            "a bridge that drops the batch": Misuse(
                lambda module: VectorDecoder(
                    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(0)), 512, 3
                )(pyramid(1, 64, 96)),
                ValueError,
                r"Expected a vector \[B, 512\] from the bridge, got \[512\]\. .*flatten\(1\)",
            ),
        },
        **C5_ONLY,
    ),
    "MapDecoder": Builder(
        cls=MapDecoder,
        kind="decoder",
        build=lambda: MapDecoder(512, out_channels=3),
        shape=lambda batch, height, width: (
            batch,
            3,
            *(8 * side for side in sides("c5", height, width)),
        ),
        misuses={
            "coarsest map first": Misuse(
                lambda module: module(Pyramid(*reversed(pyramid(2, 64, 96)))),
                ValueError,
                r"Expected c5 as \[B, 512, h, w\], got \[2, 64, 32, 48\]\. .* in_channels=enc",
            ),
        },
        **C5_ONLY,
    ),
    "FeatureAdaptation": adaptation(FeatureAdaptation),
    "FeatureAdaptation of a finer map": replace(
        adaptation(FeatureAdaptation),
        build=lambda: FeatureAdaptation(in_channels=256, skip_channels=64, out_channels=4),
        inputs=lambda *size: {"x": map_of("c4", *size), "skip": map_of("c2", *size)},
        misuses={},
    ),
    "ConcatAdaptation": adaptation(ConcatAdaptation),
    "ConvAdaptation": adaptation(ConvAdaptation),
    "ConcatConvAdaptation": adaptation(ConcatConvAdaptation),
    "AdaptedDecoder": ADAPTED,
    "AdaptedDecoder of ConcatConvAdaptations": replace(
        ADAPTED, build=lambda: adapted(ConcatConvAdaptation)
    ),
    "SpatialGate": Builder(
        cls=SpatialGate,
        kind="map",
        build=lambda: SpatialGate(256),
        shape=lambda batch, height, width: (batch, 256, *sides("c4", height, width)),
        **C4_IN,
    ),
    "PositionalEncoding2d": Builder(
        cls=PositionalEncoding2d,
        kind="map",
        build=lambda: PositionalEncoding2d(256),
        inputs=C4_IN["inputs"],
        shape=lambda batch, height, width: (batch, 256, *sides("c4", height, width)),
        misuses=C4_IN["misuses"]
        | {
            "channels that 4 does not divide": Misuse(
                lambda module: PositionalEncoding2d(6),
                ValueError,
                r"Expected channels that 4 divides, got 6: .* Project the map first\.",
            ),
        },
    ),
    "SelfAttention": Builder(
        cls=SelfAttention,
        kind="map",
        build=lambda: SelfAttention(256),
        inputs=C4_IN["inputs"],
        shape=lambda batch, height, width: (batch, 256, *sides("c4", height, width)),
        misuses=C4_IN["misuses"]
        | {
            "channels that the heads do not divide": Misuse(
                lambda module: SelfAttention(256, heads=3),
                ValueError,
                r"Expected channels that 3 heads divide, got 256\. Choose another number",
            ),
        },
    ),
    "QueryReader": READER,
    "AveragingReader": replace(
        READER, cls=AveragingReader, build=lambda: AveragingReader(256, queries=5, width=16)
    ),
    "Finder": replace(
        READER,
        cls=Finder,
        build=lambda: Finder(QueryReader(256, queries=5, width=16)),
        shape=lambda batch, height, width: (batch, 5, 3),
        misuses=C4_IN["misuses"],
    ),
    "PixelEmbedding": Builder(
        cls=PixelEmbedding,
        kind="map",
        build=lambda: PixelEmbedding(OUT_CHANNELS, width=6),
        inputs=lambda *size: {"pyramid": pyramid(*size)},
        shape=lambda batch, height, width: (batch, 6, *sides("c2", height, width)),
        misuses=UNET.misuses,
        unread=("c1",),
    ),
    "QueryDecoder": Builder(
        cls=QueryDecoder,
        kind="decoder",
        build=asking,
        inputs=lambda *size: {"pyramid": pyramid(*size)},
        shape=lambda batch, height, width: (batch, 3, *sides("c2", height, width)),
        misuses=UNET.misuses,
        unread=("c1",),
    ),
    "QueryDecoder of an AveragingReader": Builder(
        cls=QueryDecoder,
        kind="decoder",
        build=lambda: asking(AveragingReader),
        inputs=lambda *size: {"pyramid": pyramid(*size)},
        shape=lambda batch, height, width: (batch, 3, *sides("c2", height, width)),
        misuses=UNET.misuses,
        unread=("c1",),
    ),
    "MultiPathDecoder": MULTI_PATH,
    "SummedPathDecoder": paths(SummedPathDecoder),
    "OnePathDecoder": paths(OnePathDecoder, unread=("c1", "c2", "c3", "c4")),
    "ThroughGrid": replace(
        MULTI_PATH,
        cls=ThroughGrid,
        build=lambda: ThroughGrid(MULTI_PATH.build(), "c4"),
        misuses=UNET.misuses
        | {
            "no map's name": Misuse(
                lambda module: ThroughGrid(MULTI_PATH.build(), "c6"),
                ValueError,
                r"Expected a name among c1…c5, got 'c6'\.",
            ),
            "a decoder that does not say its channels": Misuse(
                lambda module: ThroughGrid(nn.Identity(), "c5"),
                TypeError,
                r"Expected a decoder with in_channels, got Identity\. Wrap the decoder itself",
            ),
        },
    ),
    "FPNDecoder": paths(FPNDecoder, level="c2", unread=("c1",)),
    "SegFormerDecoder": replace(
        paths(SegFormerDecoder, level="c2", unread=("c1",)),
        one_value=lambda batch, height, width: False,
    ),
    "SpatialPyramid": grids(SpatialPyramid, 21),
    "MaxSpatialPyramid": grids(MaxSpatialPyramid, 21),
    "BothSpatialPyramid": grids(BothSpatialPyramid, 42),
    "BesideImage": Builder(
        cls=BesideImage,
        kind="decoder",
        build=lambda: BesideImage(OUT_CHANNELS, 3, width=6),
        inputs=lambda *size: {"pyramid": pyramid(*size), "image": images(*size)},
        shape=lambda batch, height, width: (batch, 3, height, width),
        misuses={
            "images of another batch": Misuse(
                lambda module: module(pyramid(2, 64, 96), images(1, 64, 96)),
                ValueError,
                r"Expected maps and images of one batch, got 2 and 1\. Pass the maps of these",
            ),
        },
        unread=("c1", "c2", "c3", "c4"),
    ),
    "PooledContext": Builder(
        cls=PooledContext,
        kind="map",
        build=lambda: PooledContext(512, 8, grid=2),
        shape=lambda batch, height, width: (batch, 8, *sides("c5", height, width)),
        misuses={
            "without a batch": NO_BATCH,
            "one channel": Misuse(
                lambda module: PooledContext(512, 1, grid=1),
                ValueError,
                r"Expected at least 2 output channels and a grid of 1 or more, got 1 and 1\.",
            ),
        },
        **C5_IN,
    ),
    "NoContext": context(NoContext),
    "PyramidPooling": replace(
        context(PyramidPooling),
        misuses={
            "without a batch": NO_BATCH,
            "no grids": Misuse(
                lambda module: PyramidPooling(512, 16, grids=()),
                ValueError,
                r"Expected at least one grid, got none\. Use NoContext\.",
            ),
        },
    ),
    "ASPP": replace(
        context(ASPP),
        misuses={"without a batch": NO_BATCH, "training on one value": TRAINED_ON_ONE_VALUE},
        one_value=one_value_in_c5,
    ),
    "ContextDecoder": CONTEXT,
    "ContextDecoder of ASPP": replace(
        CONTEXT, build=lambda: with_context(ASPP), one_value=one_value_in_c5
    ),
    "ContextDecoder on c3": replace(
        CONTEXT,
        build=lambda: with_context(NoContext, level=3),
        unread=("c1", "c4", "c5"),
    ),
    "NearestConv": way_up(NearestConv),
    "BilinearConv": way_up(BilinearConv),
    "TransposedConv": way_up(
        TransposedConv,
        odd=Misuse(
            lambda module: TransposedConv(256, 4, factor=3),
            ValueError,
            r"Expected an even factor, got 3: .* For an odd one use BilinearConv\.",
        ),
    ),
    "EvenTransposedConv": way_up(EvenTransposedConv),
    "ShuffleConv": way_up(ShuffleConv),
    "UpsamplingDecoder": UPSAMPLING,
    "UpsamplingDecoder from c5, transposed": replace(
        UPSAMPLING,
        build=lambda: UpsamplingDecoder(
            OUT_CHANNELS, 3, TransposedConv, widths=(8, 7, 6, 5, 4, 3), factors=(2,) * 5
        ),
        unread=("c1", "c2", "c3", "c4"),
    ),
    "BesideImageDecoder": BESIDE_IMAGE,
    "BesideImageDecoder, shuffled": replace(
        BESIDE_IMAGE,
        build=lambda: BesideImageDecoder(
            OUT_CHANNELS, 3, ShuffleConv, beside=5, widths=(8, 7, 6, 5, 4)
        ),
    ),
    "Concat": joining(Concat, Concat),
    "SoftConcat": joining(SoftConcat, SoftConcat),
    "HardConcat": joining(leaning, HardConcat),
    "FiLM": modulating(FiLM),
    "SPADE": modulating(SPADE),
    "CoarseFeatures": Builder(
        cls=CoarseFeatures,
        kind="map",
        build=lambda: CoarseFeatures(OUT_CHANNELS, out_channels=4, width=6),
        inputs=lambda *size: {"pyramid": pyramid(*size)},
        shape=lambda batch, height, width: (batch, 4, *sides("c3", height, width)),
        misuses=UNET.misuses,
        unread=("c1", "c2"),
    ),
    "ImageStem": Builder(
        cls=ImageStem,
        kind="map",
        build=lambda: ImageStem(4),
        inputs=lambda *size: {"image": images(*size)},
        shape=lambda batch, height, width: (batch, 4, height, width),
        misuses={
            "without a batch": Misuse(
                lambda module: module(torch.rand(3, 64, 96)),
                ValueError,
                r"Expected \[B, 3, H, W\], got \[3, 64, 96\]\. Add the batch dimension",
            ),
        },
    ),
    "ConditionalDecoder": CONDITIONAL,
    "ConditionalDecoder of a Concat": replace(
        CONDITIONAL,
        build=lambda: ConditionalDecoder(OUT_CHANNELS, 3, width=6, fine=4, join=Concat),
    ),
    "Standardize": replace(
        STANDARD,
        misuses=STANDARD.misuses
        | {
            "one vector": Misuse(
                lambda module: Standardize(10).fit(torch.rand(1, 10)),
                ValueError,
                r"Expected two vectors or more, all finite, got \[1, 10\]\. Look for NaN",
            ),
        },
    ),
    "LinearMapper": mapping(LinearMapper, lambda: LinearMapper(10, 4), 4),
    "MLPMapper": mapping(MLPMapper, lambda: MLPMapper(10, 4, hidden=6), 4),
    "ConvMapper": Builder(
        cls=ConvMapper,
        kind="mapper",
        build=lambda: ConvMapper(3, 4, width=2),
        inputs=lambda *size: {"query": images(*size)},
        shape=lambda batch, height, width: (batch, 4),
        misuses={
            "flattened": Misuse(
                lambda module: module(torch.rand(2, 3 * 64)),
                ValueError,
                r"Expected the query as \[B, 3, h, w\], got \[2, 192\]\. Keep the batch",
            ),
        },
    ),
    "JoinedVector": Builder(
        cls=JoinedVector,
        kind="vector",
        build=lambda: JoinedVector(512, LinearMapper(10, 4)),
        inputs=lambda batch, height, width, dtype: {
            "c5": map_of("c5", batch, height, width, dtype),
            "query": torch.randn(batch, 10).to(dtype),
        },
        shape=lambda batch, height, width: (batch, 516),
        misuses={
            "another map": Misuse(
                lambda module: module(map_of("c4", 2, 64, 96), torch.rand(2, 10)),
                ValueError,
                r"Expected c5 as \[B, 512, h, w\], got \[2, 256, 4, 6\]\. .* in_channels=enc",
            ),
            "one query for all": Misuse(
                lambda module: module(map_of("c5", 4, 64, 96), torch.rand(1, 10)),
                ValueError,
                r"Expected one query an image, got 1 for 4\. The same query for all: query\.exp",
            ),
            "a map beside a vector": Misuse(
                lambda module: JoinedVector(512, nn.Conv2d(3, 4, 1))(
                    map_of("c5", 2, 64, 96), torch.rand(2, 3, 8, 8)
                ),
                ValueError,
                r"Expected \[B, features\] from the mapper, got \[2, 4, 8, 8\]\. Pool a map",
            ),
        },
    ),
    "ConcatFusion": fusing(ConcatFusion),
    "AddFusion": fusing(AddFusion),
    "FiLMFusion": fusing(FiLMFusion),
    "PointingDecoder": POINTING,
    "PointingDecoder of a sum": replace(
        POINTING,
        build=lambda: PointingDecoder(OUT_CHANNELS, 2, LinearMapper(10, 5), 5, AddFusion, width=6),
    ),
    "PCAMapper": replace(
        PCA,
        misuses=PCA.misuses
        | {
            "too few vectors": Misuse(
                lambda module: module.fit(torch.rand(4, 10)),
                ValueError,
                r"Expected more than 4 vectors, all finite, got \[4, 10\]\. Keep fewer",
            ),
            "too many directions": Misuse(
                lambda module: PCAMapper(10, 11),
                ValueError,
                r"Expected 1 to 10 directions, got 11",
            ),
        },
    ),
    "AutoEncoder": replace(
        mapping(AutoEncoder, lambda: AutoEncoder(10, code=4, hidden=6), 10), kind="other"
    ),
    "PooledState": Builder(
        cls=PooledState,
        kind="vector",
        build=lambda: PooledState(OUT_CHANNELS, 8),
        shape=lambda batch, height, width: (batch, 8),
        **DEEP,
    ),
    "PositionTokens": replace(
        POSITIONS,
        misuses=POSITIONS.misuses
        | {
            "a width that 4 does not divide": Misuse(
                lambda module: PositionTokens(OUT_CHANNELS, 6),
                ValueError,
                r"Expected a width that 4 divides, got 6: row and column take sines and",
            ),
        },
    ),
    "AverageTokens": replace(
        POSITIONS, cls=AverageTokens, build=lambda: AverageTokens(OUT_CHANNELS, 8)
    ),
    "CrossAttention": attentive(
        CrossAttention,
        heads=Misuse(
            lambda module: CrossAttention(8, heads=3),
            ValueError,
            rf"Expected a width that 3 divides, got 8: {NO_WIDTH}\.",
        ),
    ),
    "CausalAttention": Builder(
        cls=CausalAttention,
        kind="tokens",
        build=lambda: CausalAttention(8),
        inputs=lambda *size: {"x": sentence(*size)},
        shape=lambda batch, height, width: (batch, 5, 8),
        misuses={
            "heads": Misuse(
                lambda module: CausalAttention(8, heads=3),
                ValueError,
                rf"Expected a width that 3 divides, got 8: {NO_WIDTH}\.",
            ),
        },
    ),
    "CaptionBlock": attentive(CaptionBlock),
    "StateGRU": captioner(StateGRU),
    "CaptionTransformer": captioner(CaptionTransformer),
    "CaptionTransformer of averages": captioner(CaptionTransformer, tokens=AverageTokens),
    "Merge": step_up(Merge),
    "BookDecoder": replace(
        UNET,
        cls=BookDecoder,
        build=lambda: BookDecoder(
            OUT_CHANNELS, out_channels=3, laterals=(4, 5, 6, 7, 8), widths=(8, 7, 6, 5)
        ),
        one_value=one_value_in_c5,
    ),
}
