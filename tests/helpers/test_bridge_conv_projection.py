"""Chapter 03's exports against linear algebra done by hand, and what may change places."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.chapters.conv_projection import analysis as order
from experiments.chapters.conv_projection.trials import TRIALS, FirstAdaptation, ReshapeAdaptation
from helpers.bridges.conv_projection import (
    AdaptedDecoder,
    ConcatAdaptation,
    ConcatConvAdaptation,
    ConvAdaptation,
    FeatureAdaptation,
    as_conv,
    check_pair,
    project_to,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, Segmenter
from helpers.inspection import count_macs, pyramid_levels

JOINS = [FeatureAdaptation, ConcatAdaptation, ConvAdaptation, ConcatConvAdaptation]
DRAW = random.Random(3)
# Side lengths of a map and of the grid it is brought to: larger, smaller, mixed, equal, one.
SIZES = [[DRAW.randint(1, 19) for _ in range(4)] for _ in range(12)] + [[4, 5, 4, 5], [1, 1, 7, 3]]


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-4) -> bool:
    return float((found - expected).abs().max()) <= share * float(expected.abs().max())


def with_statistics(module: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """Give BatchNorm statistics, scales and shifts other than 0 and 1, and go to evaluation."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -1, 1)
    with torch.no_grad():
        module.train()(*inputs)
    return module.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 8), (17, 2)])
def test_a_1x1_convolution_is_a_linear_layer_at_every_position(height, width, bias):
    torch.manual_seed(height)
    linear = nn.Linear(11, 6, bias=bias)
    maps = torch.randn(2, 11, height, width)
    conv = as_conv(linear)
    with torch.no_grad():
        found = conv(maps).numpy()
    weight = linear.weight.detach().double().numpy()
    for b, y, x in np.ndindex(2, height, width):
        vector = weight @ maps[b, :, y, x].double().numpy()
        if bias:
            vector = vector + linear.bias.detach().double().numpy()
        np.testing.assert_allclose(found[b, :, y, x], vector, atol=1e-5)


def test_the_convolution_is_a_copy_on_the_same_device_and_dtype():
    linear = nn.Linear(5, 3).to(torch.float64)
    conv = as_conv(linear)
    assert conv.weight.dtype == torch.float64 and conv.kernel_size == (1, 1)
    assert torch.equal(conv.weight[:, :, 0, 0], linear.weight)  # no digit is lost
    nn.init.zeros_(conv.weight)
    assert linear.weight.abs().sum() > 0
    assert as_conv(nn.Linear(5, 3, device="meta")).weight.device.type == "meta"


def test_a_layer_whose_weight_is_computed_is_copied_as_it_stands():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    x = torch.randn(2, 5)
    with torch.no_grad():
        assert close(as_conv(linear)(x[..., None, None])[..., 0, 0], linear(x))


@pytest.mark.parametrize("wrong", [nn.Conv2d(5, 3, 1), nn.Sequential(nn.Linear(5, 3)), None])
def test_only_linear_layers_become_convolutions(wrong):
    with pytest.raises(TypeError, match=f"Expected an nn.Linear, got {type(wrong).__name__}"):
        as_conv(wrong)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_projecting_and_resizing_change_places(sizes, bias):
    torch.manual_seed(sum(sizes))
    height, width, *size = sizes
    conv, map_ = nn.Conv2d(9, 4, 1, bias=bias), torch.randn(2, 9, height, width)
    with torch.no_grad():
        for way in ("nearest", "bilinear", "bicubic", "area"):
            one = F.interpolate(conv(map_), size=size, mode=way)
            assert close(one, conv(F.interpolate(map_, size=size, mode=way))), way


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_project_to_does_the_work_on_the_smaller_grid(sizes):
    height, width, *size = sizes
    conv, map_ = nn.Conv2d(9, 4, 1), torch.randn(2, 9, height, width)

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return project_to(conv, x, size)

    with torch.no_grad():
        found = Layer()(map_)
        fewer = height * width > size[0] * size[1]
        way = {"mode": "area"} if fewer else {"mode": "bilinear"}
        assert found.shape == (2, 4, *size)
        assert close(found, conv(F.interpolate(map_, size=size, **way)))
    assert count_macs(Layer(), map_) == 2 * 9 * 4 * min(height * width, size[0] * size[1])


def test_a_finer_map_is_averaged_over_all_its_positions():
    torch.manual_seed(0)
    conv, map_ = nn.Conv2d(9, 4, 1), torch.randn(2, 9, 8, 12)
    blocks = map_.reshape(2, 9, 4, 2, 3, 4).mean((3, 5))  # 2 × 4 positions a block
    with torch.no_grad():
        assert close(project_to(conv, map_, (4, 3)), conv(blocks))


def test_where_the_order_matters_it_is_seen():
    torch.manual_seed(0)
    map_ = torch.randn(2, 9, 4, 5)
    conv, up = nn.Conv2d(9, 4, 1), nn.Upsample((16, 20), mode="bilinear")
    with torch.no_grad():
        for layer in (nn.Sequential(conv, nn.ReLU()), nn.Conv2d(9, 4, 3, padding=1)):
            assert not close(up(layer(map_)), layer(up(map_)), 0.01)
        pad, bare = nn.ZeroPad2d(1), nn.Conv2d(9, 4, 1, bias=False)
        assert not close(pad(conv(map_)), conv(pad(map_)), 0.01)
        assert close(pad(bare(map_)), bare(pad(map_)))


@pytest.mark.parametrize("where", [(4, 5), (40, 31)])
def test_the_sum_by_hand(where):
    torch.manual_seed(0)
    x, skip = torch.randn(3, 5, 16, 20), torch.randn(3, 7, *where)
    join = with_statistics(FeatureAdaptation(5, 7, 6), x, skip)
    resized = F.interpolate(skip, size=(16, 20), mode="bilinear" if where == (4, 5) else "area")
    total = torch.einsum("oc,bchw->bohw", join.project_x.weight[:, :, 0, 0], x)
    total = total + torch.einsum("oc,bchw->bohw", join.project_skip.weight[:, :, 0, 0], resized)
    norm = join.norm
    mean, deviation = (v.view(-1, 1, 1) for v in (norm.running_mean, norm.running_var.sqrt()))
    scaled = norm.weight.view(-1, 1, 1) * (total - mean) / deviation + norm.bias.view(-1, 1, 1)
    with torch.no_grad():
        assert close(join(x, skip), scaled.clamp(min=0), 1e-3)


def test_concatenating_and_a_1x1_is_a_sum_of_two_projections():
    torch.manual_seed(0)
    x, skip = torch.randn(2, 5, 9, 12), torch.randn(2, 7, 3, 4)
    joined = with_statistics(ConcatAdaptation(5, 7, 6), x, skip)
    summed = FeatureAdaptation(5, 7, 6).eval()
    left, right = joined.mix.weight.split([5, 6], dim=1)
    with torch.no_grad():
        summed.project_x.weight.copy_(left)
        merged = torch.einsum("om,mi->oi", right[..., 0, 0], joined.project_skip.weight[..., 0, 0])
        summed.project_skip.weight.copy_(merged[..., None, None])
        summed.norm.load_state_dict(joined.norm.state_dict())
        assert close(summed(x, skip), joined(x, skip))


def test_a_3x3_over_a_concatenation_is_a_sum_of_two_with_kernels_of_their_own():
    torch.manual_seed(0)
    x, skip = torch.randn(2, 5, 9, 12), torch.randn(2, 7, 9, 12)
    join = with_statistics(ConcatConvAdaptation(5, 7, 6), x, skip)
    first, second = join.mix.weight.split([5, 6], dim=1)
    with torch.no_grad():
        total = F.conv2d(x, first, padding=1)
        total = total + F.conv2d(join.project_skip(skip), second, padding=1)
        assert close(join(x, skip), join.norm(total).clamp(min=0))


def test_a_3x3_after_a_sum_has_one_set_of_kernels_for_both():
    torch.manual_seed(0)
    x, skip = torch.randn(2, 5, 9, 12), torch.randn(2, 7, 9, 12)
    join = with_statistics(ConvAdaptation(5, 7, 6), x, skip)
    with torch.no_grad():
        parts = join.project_x(x), join.project_skip(skip)
        total = sum(F.conv2d(part, join.conv.weight, padding=1) for part in parts)
        assert close(join(x, skip), join.norm(total).clamp(min=0))


def reach(join: nn.Module) -> int:
    """Return how many positions of the output one value of `x` changes."""
    torch.manual_seed(0)
    x, skip = torch.randn(1, 5, 15, 15), torch.randn(1, 7, 4, 4)
    join = with_statistics(join, x, skip)
    join.relu = nn.Identity()  # so that nothing hides behind a zero
    moved = x.clone()
    moved[0, :, 7, 7] += 10
    with torch.no_grad():
        change = (join(moved, skip) - join(x, skip)).abs().amax(1)
    return int((change > 1e-4).sum())


@pytest.mark.parametrize(("join", "positions"), list(zip(JOINS, (1, 1, 9, 9), strict=True)))
def test_only_a_3x3_sees_neighbours(join, positions):
    assert reach(join(5, 7, 6)) == positions


@pytest.mark.parametrize("join", JOINS)
def test_maps_of_two_batches_are_refused(join):
    with pytest.raises(ValueError, match=r"x of 4 images and skip of 1\. Pass maps of the same"):
        join(5, 7, 6)(torch.rand(4, 5, 8, 8), torch.rand(1, 7, 4, 4))
    with pytest.raises(ValueError, match=r"Expected skip as \[B, 7, h, w\]"):
        check_pair(torch.rand(4, 5, 8, 8), torch.rand(4, 5, 8, 8), (5, 7))


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("width", [1, 16])
def test_a_decoder_of_any_width_ends_on_the_grid_of_c2(join, width):
    maps = Pyramid(*(torch.rand(2, *m[1:4]) for m in pyramid_levels(75, 100)))
    decoder = AdaptedDecoder(OUT_CHANNELS, 3, width, join)
    assert decoder(maps).shape == (2, 3, 19, 25)
    size = Segmenter(nn.Identity(), decoder).decode(maps, (75, 100)).shape
    assert size == (2, 3, 75, 100)


def test_the_wrong_order_gives_equal_results_and_more_work():
    for what in (*order.WAYS, order.WHOLE):
        record = order.measure(what, seed=0, repeats=3)
        if what == "c2 to c5's grid":
            assert record["macs"] == 1 / 64
        else:
            assert record["macs"] > 1.5
        assert record["difference"] < 1e-5


def test_the_decoder_that_reshapes_mixes_channels_with_positions():
    torch.manual_seed(0)
    for skip_channels, (down, across) in {128: (2, 1), 256: (2, 2), 512: (4, 2)}.items():
        join = ReshapeAdaptation(64, skip_channels, 64)
        assert (join.down, join.across) == (down, across)
        x, skip = torch.rand(2, 64, 16, 16), torch.rand(2, skip_channels, 4, 4)
        assert join(x, skip).shape == (2, 64, 16, 16)
        other = skip.clone()
        other[:, :, 0, 0] += 1  # one position …
        changed = where_changed(join, x, skip, other)
        assert changed[: 16 // down].any() and changed[-16 // down :].any()  # … is everywhere
        assert not where_changed(FeatureAdaptation(64, skip_channels, 64), x, skip, other)[8:].any()


def where_changed(
    join: nn.Module, x: torch.Tensor, one: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        join.eval()
        return (join(x, other) - join(x, one)).abs().amax((0, 1)) > 1e-4


def test_of_the_first_channels_only_these_are_read():
    torch.manual_seed(0)
    join, x, skip = FirstAdaptation(5, 12, 4), torch.rand(2, 5, 8, 8), torch.rand(2, 12, 8, 8)
    rest, first = skip.clone(), skip.clone()
    rest[:, 4:] += 1
    first[:, :4] += 1
    assert not where_changed(join, x, skip, rest).any()
    assert where_changed(join, x, skip, first).any()


@pytest.mark.parametrize("name", TRIALS)
def test_every_trial_is_what_its_name_says(name):
    decoder = TRIALS[name].decoder(OUT_CHANNELS, 7, **TRIALS[name].settings)
    join = {
        "concatenate": ConcatAdaptation,
        "sum, 3×3": ConvAdaptation,
        "concatenate, 3×3": ConcatConvAdaptation,
        "reshaped": ReshapeAdaptation,
        "first 64 channels": FirstAdaptation,
    }.get(name, FeatureAdaptation)
    assert {type(decoder.adapt3), type(decoder.adapt4), type(decoder.adapt5)} == {join}
    width = int(name.split()[0]) if name.endswith(" channels") and name[0].isdigit() else 64
    assert decoder.head.in_channels == width
