"""Chapter 08's exports against interpolation and convolution done another way."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import zoom
from torch import nn

from experiments.chapters.upsampling import trials
from experiments.chapters.upsampling.analysis import unevenness
from helpers.bridges.upsampling import (
    BesideImageDecoder,
    BilinearConv,
    EvenTransposedConv,
    NearestConv,
    ShuffleConv,
    TransposedConv,
    UpsamplingDecoder,
    check_beside,
    edge_profiles,
    icnr_,
    measure_edges,
    start_bilinear,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, ResNet18Encoder, Segmenter
from helpers.inspection import pyramid_levels

WAYS = [NearestConv, BilinearConv, TransposedConv, ShuffleConv]
DRAW = random.Random(8)
SIDES = [(32, 32), (33, 32), (47, 180)] + [
    (DRAW.randint(32, 150), DRAW.randint(32, 150)) for _ in range(5)
]


def maps_of(height: int, width: int, batch: int = 1) -> Pyramid:
    return Pyramid(*(torch.rand(batch, *level[1:4]) for level in pyramid_levels(height, width)))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


# --- the ways up


@pytest.mark.parametrize("way", [*WAYS, EvenTransposedConv])
@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 8), (7, 2)])
def test_every_way_multiplies_the_sides(way, factor, height, width):
    layer = way(5, 3, factor)
    assert layer(torch.rand(1, 5, height, width)).shape == (1, 3, factor * height, factor * width)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_shuffle_is_a_transposed_convolution_with_its_weights_rearranged(factor):
    torch.manual_seed(factor)
    layer, x = ShuffleConv(3, 5, factor), torch.randn(2, 3, 6, 7)
    nn.init.normal_(layer.conv.weight)  # no two kernels alike
    kernels = layer.conv.weight.detach().view(5, factor, factor, 3, 3, 3)
    large = torch.zeros(3, 5, 3 * factor, 3 * factor)
    for i, j, row, column in np.ndindex(factor, factor, 3, 3):
        place = i + factor * (2 - row), j + factor * (2 - column)
        large[:, :, place[0], place[1]] = kernels[:, i, j, :, row, column].T
    expected = F.conv_transpose2d(x, large, stride=factor, padding=factor)
    with torch.no_grad():
        assert close(layer(x), expected)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_icnr_starts_as_nearest(factor):
    torch.manual_seed(factor)
    layer, x = ShuffleConv(4, 3, factor), torch.randn(2, 4, 5, 6)
    weight = layer.conv.weight.detach()
    coarse = F.conv2d(x, weight[:: factor**2], padding=1)
    expected = coarse.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    with torch.no_grad():
        assert close(layer(x), expected)
    assert len(torch.unique(weight.flatten(1), dim=0)) == 3  # a kernel of its own per channel


def test_icnr_changes_only_what_it_must_and_says_what_it_cannot():
    weight = torch.randn(8, 2, 3, 3)
    before = weight.clone()
    assert icnr_(weight, 2) is weight
    assert torch.equal(weight[[0, 4]], before[[0, 4]])
    assert torch.equal(weight[[1, 2, 3]], before[[0, 0, 0]])
    with pytest.raises(ValueError, match=r"kernels that 4 divides, got 6\. A pixel shuffle deals"):
        icnr_(torch.randn(6, 2, 3, 3), 2)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
@pytest.mark.parametrize("channels", [(3, 3), (5, 2)])
def test_a_bilinear_start_is_interpolation_away_from_the_borders(factor, channels):
    torch.manual_seed(factor)
    layer, x = TransposedConv(*channels, factor), torch.randn(2, channels[0], 6, 5)
    mix = layer.conv.weight.detach()[:, :, 0, 0].clone()
    start_bilinear(layer.conv)
    torch.manual_seed(factor)
    even = EvenTransposedConv(*channels, factor)
    assert torch.equal(even.conv.weight, layer.conv.weight)
    mixed = torch.einsum("io,bihw->bohw", mix, x)
    inside = (..., slice(factor, -factor), slice(factor, -factor))
    with torch.no_grad():
        found = layer(x)
    expected = F.interpolate(mixed, scale_factor=factor, mode="bilinear", align_corners=False)
    assert close(found[inside], expected[inside])
    other = zoom(mixed[0, 0].numpy(), factor, order=1, grid_mode=True, mode="nearest")
    assert np.allclose(found[0, 0][inside].numpy(), other[inside], atol=1e-5)
    assert not close(found, expected)  # at the borders nothing paints from outside


def test_a_bilinear_start_leaves_the_bias_and_the_dtype():
    conv = nn.ConvTranspose2d(2, 2, 4, 2, 1).double()
    bias = conv.bias.clone()
    assert start_bilinear(conv) is conv and conv.weight.dtype == torch.float64
    assert torch.equal(conv.bias, bias)


@pytest.mark.parametrize(
    "conv",
    [
        nn.ConvTranspose2d(2, 2, 3, 2),
        nn.ConvTranspose2d(2, 2, (4, 3), 2),
        nn.ConvTranspose2d(2, 2, 4, 2, groups=2),
    ],
)
def test_only_a_kernel_of_twice_the_stride_starts_bilinear(conv):
    before = conv.weight.clone()
    with pytest.raises(ValueError, match="Expected a kernel of twice the stride, 4, and one group"):
        start_bilinear(conv)
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize("factor", [0, 1, 3])
def test_a_transposed_step_wants_an_even_factor(factor):
    with pytest.raises(ValueError, match=f"Expected an even factor, got {factor}:"):
        TransposedConv(2, 2, factor)


@pytest.mark.parametrize(("way", "even"), list(zip(WAYS, (True, True, False, False), strict=True)))
def test_only_resizing_stays_even_whatever_is_learned(way, even):
    torch.manual_seed(0)
    layer = way(4, 3)
    nn.init.normal_(layer.conv.weight)
    with torch.no_grad():
        inside = layer(torch.ones(1, 4, 10, 10))[..., 4:-4, 4:-4]
    assert (float(inside.std((2, 3)).max()) < 1e-5) == even


@pytest.mark.parametrize("side", range(1, 12))
def test_two_sizes_become_one_and_output_padding_tells_them_apart(side):
    down = nn.Conv2d(1, 1, 3, stride=2, padding=1)
    for extra, large in ((0, 2 * side - 1), (1, 2 * side)):
        assert down(torch.rand(1, 1, large, large)).shape[-1] == side
        up = nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, output_padding=extra)
        assert up(torch.rand(1, 1, side, side)).shape[-1] == large


# --- the decoders


@pytest.mark.parametrize("size", SIDES, ids=str)
def test_any_size_and_a_batch_of_one_fill_the_image(size):
    encoder = ResNet18Encoder(None)
    for decoder in (
        UpsamplingDecoder(OUT_CHANNELS, 3, DRAW.choice(WAYS), widths=(4,) * 5),
        BesideImageDecoder(OUT_CHANNELS, 3, DRAW.choice(WAYS), widths=(4,) * 5),
    ):
        model = Segmenter(encoder, decoder).train()
        assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_cutting_leaves_the_rest_where_it_was():
    torch.manual_seed(0)
    decoder = UpsamplingDecoder(OUT_CHANNELS, 3, TransposedConv, widths=(4,) * 5).eval()
    maps = maps_of(75, 101)
    with torch.no_grad():
        whole = decoder.head(decoder.steps(decoder.project(maps.c4)))
        assert whole.shape == (1, 3, 80, 112)
        assert close(decoder(maps), whole[..., :76, :102])


@pytest.mark.parametrize("factors", [(2,) * 5, (32,), (4, 8), (2, 2), (2,)])
def test_factors_choose_the_map(factors):
    decoder = UpsamplingDecoder(OUT_CHANNELS, 3, BilinearConv, (4,) * (len(factors) + 1), factors)
    maps = maps_of(64, 96)
    level = int(math.log2(math.prod(factors))) - 1
    assert decoder(maps).shape == (1, 3, 64, 96)
    for index, name in enumerate(Pyramid._fields):
        moved = maps._replace(**{name: torch.rand_like(maps[index])})
        with torch.no_grad():
            same = torch.equal(decoder.eval()(maps), decoder(moved))
        assert same == (index != level)


@pytest.mark.parametrize(
    ("widths", "factors"), [((4, 4), (3,)), ((4, 4), (64,)), ((4, 4), (2, 2)), ((4,), (16, 2))]
)
def test_factors_that_fit_no_map_are_refused(widths, factors):
    with pytest.raises(ValueError, match=r"Expected factors whose product is one of \(2, 4, 8"):
        UpsamplingDecoder(OUT_CHANNELS, 3, BilinearConv, widths, factors)


@pytest.mark.parametrize("shape", [(1, 3, 128, 64), (1, 3, 64, 99), (2, 3, 64, 96)])
def test_the_image_must_be_the_one_that_the_maps_came_from(shape):
    maps = maps_of(64, 96)
    check_beside(maps, torch.rand(1, 3, 64, 96))
    with pytest.raises(ValueError, match=r"Expected the image that the maps came from, got \["):
        check_beside(maps, torch.rand(shape))


def test_beside_the_image_means_a_3x3_of_its_pixels():
    torch.manual_seed(0)
    decoder = BesideImageDecoder(OUT_CHANNELS, 3, widths=(4,) * 5).eval()
    maps, image = maps_of(64, 64), torch.randn(1, 3, 64, 64)
    moved = image.clone()
    moved[..., 30, 40] += 10
    with torch.no_grad():
        change = (decoder(maps, moved) - decoder(maps, image)).abs().amax((0, 1))
    rows, columns = change.nonzero().T
    assert set(rows.tolist()) <= {29, 30, 31} and set(columns.tolist()) <= {39, 40, 41}
    assert len(rows) > 0


# --- edges


def half_plane(side: int = 40, at: int = 20) -> torch.Tensor:
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[..., at:] = True
    return mask


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("moved", [-3, 0, 2])
def test_a_moved_edge_is_sharp_and_off_by_as_much(moved, flip, turn):
    mask, found = half_plane(), half_plane(at=20 + moved)
    if flip:
        mask, found = ~mask, ~found
    if turn:
        mask, found = mask.mT, found.mT
    edges = measure_edges(edge_profiles(found.float(), mask))
    assert edges == (100, 1, abs(moved))


def blurred_edge(deviation: float, moved: float = 0.0) -> torch.Tensor:
    """The edge of `half_plane`, blurred by a bell, and really elsewhere: nothing comes round."""
    place = torch.arange(40) - 19.5 - moved
    return (0.5 * (1 + torch.erf(place / deviation / math.sqrt(2)))).expand(1, 40, 40)


@pytest.mark.parametrize("pattern", [0.0, 0.05])
@pytest.mark.parametrize(("deviation", "within"), [(1.0, 0.1), (2.0, 0.1), (3.0, 0.2)])
def test_a_blurred_edge_has_its_width_with_and_without_a_checkerboard(deviation, within, pattern):
    board = pattern * (-1.0) ** (torch.arange(40) + torch.arange(40)[:, None])
    edges = measure_edges(edge_profiles(blurred_edge(deviation) + board, half_plane()))
    # The slope of a bell's integral is steepest in the middle: 1 / (deviation · √2π).
    assert edges.width == pytest.approx(deviation * math.sqrt(2 * math.pi), rel=within)
    assert edges.offset == 0 and edges.found == 100


@pytest.mark.parametrize("deviation", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("moved", [-4.0, -1.5, 0.5, 3.0])
def test_a_moved_blurred_edge_is_off_by_as_much(deviation, moved):
    edges = measure_edges(edge_profiles(blurred_edge(deviation, moved), half_plane()))
    assert edges.offset == pytest.approx(abs(moved), abs=0.25)
    true = max(1, deviation * math.sqrt(2 * math.pi))
    assert edges.width == pytest.approx(true, rel=0.2)


def test_width_and_offset_are_means_over_the_edges_found():
    mask = half_plane()
    inside = torch.cat([blurred_edge(2.0, 3.0), half_plane().float(), torch.zeros(1, 40, 40)])
    each = [measure_edges(edge_profiles(one[None], mask)) for one in inside[:2]]
    edges = measure_edges(edge_profiles(inside, mask.expand(3, -1, -1)))
    assert edges.found == pytest.approx(200 / 3)
    assert edges.width == pytest.approx((each[0].width + each[1].width) / 2, rel=1e-4)
    assert edges.offset == pytest.approx((each[0].offset + each[1].offset) / 2, rel=1e-4)


def test_profiles_by_hand():
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(1, 24, 24, generator=generator)
    mask = torch.zeros(1, 24, 24, dtype=torch.bool)
    mask[0, 8:16, 6:20] = True
    wanted = set()
    for values, truth in ((inside[0], mask[0]), (inside[0].T, mask[0].T)):
        for row in range(24):
            for start in range(24 - 8 + 1):
                piece = truth[row, start : start + 8].tolist()
                run = values[row, start : start + 8].tolist()
                if piece == [False] * 4 + [True] * 4:
                    wanted.add(tuple(run))
                if piece == [True] * 4 + [False] * 4:
                    wanted.add(tuple(run[::-1]))
    found = {tuple(profile) for profile in edge_profiles(inside, mask, reach=4).tolist()}
    assert found == wanted and len(found) == 2 * 8 + 2 * 14


def test_where_no_edge_is_found():
    nothing = measure_edges(edge_profiles(torch.zeros(1, 40, 40), half_plane()))
    assert nothing.found == 0 and math.isnan(nothing.width) and math.isnan(nothing.offset)
    assert measure_edges(torch.zeros(0, 16)).found == 0
    with pytest.raises(ValueError, match=r"two \[B, H, W\] of one size, got \[1, 7, 40, 40\]"):
        edge_profiles(torch.zeros(1, 7, 40, 40), half_plane())


# --- what the trials are made of


def decoder_of(what: str) -> nn.Module:
    torch.manual_seed(0)
    trial = trials.TRIALS[what]
    return trial.decoder(OUT_CHANNELS, 7, **trial.settings).eval()


@pytest.mark.parametrize("what", ["image hidden", "image hidden, two layers"])
def test_the_hidden_image_is_not_seen(what):
    decoder = decoder_of(what)
    maps = maps_of(64, 64)
    with torch.no_grad():
        one, other = (decoder(maps, torch.randn(1, 3, 64, 64)) for _ in range(2))
        seeing = decoder.decoder(maps, torch.randn(1, 3, 64, 64))
    assert torch.equal(one, other) and not torch.equal(one, seeing)
    assert Segmenter(ResNet18Encoder(None), decoder).takes_image


@pytest.mark.parametrize(
    ("wide", "other"), [("bilinear, wider", "transposed"), ("bilinear, widest", "pixel shuffle")]
)
def test_the_wider_controls_have_as_many_weights_as_what_they_control(wide, other):
    ours, theirs = (sum(p.numel() for p in decoder_of(what).parameters()) for what in (wide, other))
    assert 0.95 < ours / theirs < 1.1


def test_the_small_start_is_as_small_as_the_even_one_and_not_as_even():
    torch.manual_seed(0)
    small, even = trials.SmallTransposedConv(48, 32), EvenTransposedConv(48, 32)
    norms = [float(layer.conv.weight.detach().norm()) for layer in (small, even)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    with torch.no_grad():
        small, even = (layer(torch.ones(1, 48, 9, 9))[..., 4:-4, 4:-4] for layer in (small, even))
    assert float(even.std((2, 3)).max()) < 1e-5 < 0.01 < float(small.std((2, 3)).min())


def test_the_default_start_of_a_shuffle_is_not_icnr():
    torch.manual_seed(0)
    assert len(torch.unique(ShuffleConv(4, 3).conv.weight.flatten(1), dim=0)) == 3
    assert len(torch.unique(trials.UnevenShuffle(4, 3).conv.weight.flatten(1), dim=0)) == 12


@pytest.mark.parametrize(
    ("what", "channels", "relu"),
    [
        ("image", 16, False),
        ("image, ReLU", 16, True),
        ("image, 3 channels", 3, False),
        ("image, 3 channels, ReLU", 3, True),
    ],
)
def test_what_lies_beside_the_image(what, channels, relu):
    decoder = decoder_of(what)
    with torch.no_grad():
        beside = decoder.climb(maps_of(64, 64))
    assert beside.shape == (1, channels, 64, 64)
    assert bool((beside >= 0).all()) == relu and decoder.mix.in_channels == channels + 3


def test_two_layers_see_further_into_the_image():
    decoder = decoder_of("image, two layers")
    maps, image = maps_of(64, 64), torch.randn(1, 3, 64, 64)
    moved = image.clone()
    moved[..., 30, 40] += 10
    with torch.no_grad():
        change = (decoder(maps, moved) - decoder(maps, image)).abs().amax((0, 1))
    rows, columns = change.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (28, 32, 38, 42)


def test_the_uneven_step_gives_the_same_size_and_the_block_that_of_its_skip():
    assert trials.UnevenConv(4, 3)(torch.rand(1, 4, 5, 7)).shape == (1, 3, 10, 14)
    for block in (trials.TransposedUpBlock(6, 5, 4), trials.BilinearUpBlock(6, 5, 4)):
        assert block(torch.rand(1, 6, 6, 8), torch.rand(1, 5, 12, 15)).shape == (1, 4, 12, 15)


def test_the_two_unets_differ_in_their_steps_alone():
    bilinear, transposed = (
        {name: p.shape for name, p in decoder_of(what).named_parameters()}
        for what in ("U-Net, bilinear", "U-Net, transposed")
    )
    differing = {name for name in bilinear if bilinear[name] != transposed[name]}
    assert bilinear.keys() == transposed.keys() and differing
    assert all(name.endswith("up.conv.weight") for name in differing)


@pytest.mark.parametrize(("what", "even"), [("bilinear", True), ("transposed", False)])
def test_the_pattern_on_a_constant_map_is_the_decoders_own(what, even):
    model = trials.TRIALS[what].model(0, 7)
    found = unevenness(model, torch.rand(2, 3, 64, 64), spread=1.0)
    assert (found < 1e-3) == even
