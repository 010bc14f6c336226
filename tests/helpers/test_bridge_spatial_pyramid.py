"""Chapter 07's exports against cells counted by hand, PyTorch's pooling, and its ONNX exporter."""

from __future__ import annotations

import io
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.chapters.spatial_pyramid.analysis import EXTENTS, by_extent
from experiments.chapters.spatial_pyramid.trials import TRIALS
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
    average_grid,
    bin_weights,
    conv_bn_relu,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, Segmenter
from helpers.inspection import count_parameters, pyramid_levels

CLOSE = "rates 1 1 1, no mean"
DRAW = random.Random(7)
SIZES = [(DRAW.randint(1, 23), DRAW.randint(1, 23)) for _ in range(50)] + [(1, 1), (1, 9), (7, 7)]
CONTEXTS = [NoContext, PyramidPooling, ASPP]


def maps(batch: int, height: int, width: int) -> Pyramid:
    return Pyramid(*(torch.rand(batch, *m[1:4]) for m in pyramid_levels(height, width)))


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 6, 9])
def test_cells_begin_rounded_down_and_end_rounded_up(grid):
    for size in range(1, 25):
        weights = bin_weights(size, grid, torch.ones(1, dtype=torch.float64)).numpy()
        for cell in range(grid):
            first, beyond = math.floor(cell * size / grid), math.ceil((cell + 1) * size / grid)
            expected = np.zeros(size)
            expected[first:beyond] = 1 / (beyond - first)
            np.testing.assert_allclose(weights[cell], expected)
        assert (weights.sum(0) > 0).all(), "a position is in no cell"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_follow_the_dtype_and_device(dtype):
    weights = bin_weights(7, 3, torch.ones(1, dtype=dtype))
    assert weights.dtype == dtype and weights.shape == (3, 7)
    assert bin_weights(7, 3, torch.ones(1, device="meta")).device.type == "meta"


def test_averages_are_pytorchs_for_any_size_and_grid():
    torch.manual_seed(0)
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width)
        for grid in (1, 2, 3, 4, 6, 30):
            expected = F.adaptive_avg_pool2d(x, grid)
            assert torch.allclose(average_grid(x, grid), expected, atol=1e-5), (height, width, grid)


def test_averages_in_bfloat16_are_those_of_float32_rounded():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 10)
    expected = F.adaptive_avg_pool2d(x, 3)
    assert torch.allclose(average_grid(x.bfloat16(), 3).float(), expected, atol=0.02)


def test_gradients_are_pytorchs_too():
    torch.manual_seed(0)
    x, weights = torch.randn(1, 2, 7, 5, requires_grad=True), torch.randn(1, 2, 3, 3)
    gradients = [
        torch.autograd.grad((pool(x, 3) * weights).sum(), x)[0]
        for pool in (average_grid, F.adaptive_avg_pool2d)
    ]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_length_for_any_size(batch):
    vectors = [SpatialPyramid(5), MaxSpatialPyramid(5), BothSpatialPyramid(5)]
    assert [v.out_features for v in vectors] == [105, 105, 210]
    for height, width in SIZES:
        x = torch.rand(batch, 5, height, width)
        assert [v(x).shape for v in vectors] == [(batch, 105), (batch, 105), (batch, 210)]


def test_cells_stand_grid_by_grid_and_channel_by_channel():
    x = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    mean, largest = SpatialPyramid(2, (1, 2))(x)[0], MaxSpatialPyramid(2, (1, 2))(x)[0]
    assert mean.tolist() == [7.5, 23.5, 2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5]
    assert largest.tolist() == [15, 31, 5, 7, 13, 15, 21, 23, 29, 31]
    both = BothSpatialPyramid(2, (1, 2))(x)[0]
    assert torch.equal(both, torch.cat([mean, largest]))


@pytest.mark.parametrize("grids", [(), (0,), (2, -1)])
@pytest.mark.parametrize("cls", [SpatialPyramid, MaxSpatialPyramid, BothSpatialPyramid])
def test_no_grid_is_refused(cls, grids):
    with pytest.raises(ValueError, match="Expected grids of 1 × 1 or more, got"):
        cls(5, grids)


def test_beside_the_image_every_pixel_meets_the_same_vector():
    torch.manual_seed(0)
    decoder = BesideImage(OUT_CHANNELS, 3).eval()
    plain = torch.zeros(2, 3, 40, 52)  # an image that says nothing
    with torch.no_grad():
        inner = decoder(maps(2, 40, 52), plain)[..., 1:-1, 1:-1]
    assert torch.allclose(inner, inner[..., :1, :1].expand_as(inner), atol=1e-5)
    with pytest.raises(ValueError, match=r"maps and images of one batch, got 2 and 1\. Pass the"):
        decoder(maps(2, 64, 64), torch.zeros(1, 3, 64, 64))


def test_beside_the_image_a_batch_of_one_still_sees_its_vector():
    torch.manual_seed(0)
    decoder = BesideImage(OUT_CHANNELS, 3).train()
    plain = torch.zeros(1, 3, 40, 52)
    with torch.no_grad():
        first, second = (decoder(maps(1, 40, 52), plain)[..., 1:-1, 1:-1] for _ in range(2))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("context", [PyramidPooling, ASPP])
def test_the_mean_of_the_whole_map_learns_from_a_batch_of_one(context):
    torch.manual_seed(0)
    module = context(12, 16).train()
    whole = module.whole if context is ASPP else module.grids[0]
    assert whole.grid == 1
    out = module(torch.rand(1, 12, 5, 7))
    (out * torch.randn_like(out)).sum().backward()
    mix = module.mix[0].weight.grad.norm()
    assert whole.conv.weight.grad.norm() > 1e-3 * mix


def test_a_batchnorm_behind_the_mean_would_silence_it():
    torch.manual_seed(0)
    module = PyramidPooling(12, 16).train()
    conv = nn.Conv2d(12 + 16, 16, 1, bias=False)
    module.mix = nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU())
    out = module(torch.rand(1, 12, 5, 7))
    (out * torch.randn_like(out)).sum().backward()
    whole = module.grids[0].conv.weight.grad.norm()
    assert whole < 1e-5 * module.mix[0].weight.grad.norm()


@pytest.mark.parametrize("grid", [1, 2, 3, 6])
def test_a_pooled_branch_learns_from_one_image(grid):
    torch.manual_seed(0)
    branch = PooledContext(12, 4, grid).train()
    x = torch.rand(3, 12, 5, 7)
    together, alone = branch(x), torch.cat([branch(one) for one in x.split(1)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    alone.sum().backward()
    assert branch.conv.weight.grad.abs().sum() > 0


def test_batchnorm_on_a_single_cell_raises_or_falls_silent():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1, bias=False))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nn.Sequential(*pooled, nn.BatchNorm2d(4))(torch.rand(1, 12, 5, 7))
    enlarged = nn.Sequential(*pooled, nn.Upsample(size=(5, 7)), nn.BatchNorm2d(4))
    for _ in range(3):
        assert enlarged(torch.rand(1, 12, 5, 7)).abs().max() < 1e-2


@pytest.mark.parametrize(("channels", "grid"), [(1, 1), (0, 2), (4, 0)])
def test_a_pooled_branch_refuses_what_cannot_work(channels, grid):
    with pytest.raises(ValueError, match="at least 2 output channels and a grid of 1 or more"):
        PooledContext(12, channels, grid)
    with pytest.raises(ValueError, match="at least 2 output channels"):
        PyramidPooling(12, 7)  # four grids share seven channels: one each
    with pytest.raises(ValueError, match="at least one grid, got none"):
        PyramidPooling(12, 8, grids=())


def reach(context: nn.Module, side: int = 21) -> int:
    """Return how many positions of the output one position of the input changes."""
    torch.manual_seed(0)
    for part in context.modules():
        if isinstance(part, nn.ReLU):
            part.forward = lambda x: x  # so that nothing hides behind a zero
    x = torch.rand(1, 6, side, side)
    moved = x.clone()
    moved[..., side // 2, side // 2] += 1
    with torch.no_grad():
        change = (context.eval()(moved) - context(x)).abs().amax(1)
    return int((change > 1e-6).sum())


def test_context_reaches_as_far_as_it_says():
    assert reach(NoContext(6, 8)) == 1
    for rate in (1, 2, 5):
        assert reach(conv_bn_relu(6, 8, kernel=3, rate=rate)) == 9
    assert reach(PyramidPooling(6, 8)) == reach(ASPP(6, 8)) == 21**2
    dilated = ASPP(6, 8, rates=(1, 2, 5))
    dilated.whole.conv.weight.data.zero_()
    assert reach(dilated) == 1 + 3 * 8


@pytest.mark.parametrize("rate", [4, 6, 18])
def test_a_rate_as_large_as_the_map_leaves_the_middle_tap(rate):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 3, 3, padding=rate, dilation=rate, bias=False)
    x = torch.randn(2, 6, 4, 4)
    middle = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 1, 1], x)
    assert torch.allclose(conv(x), middle, atol=1e-5)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("level", [3, 4, 5])
def test_context_on_any_level_ends_on_the_grid_of_c2(context, level):
    decoder = ContextDecoder(OUT_CHANNELS, 3, context, level, width=8)
    pyramid = maps(2, 75, 100)
    assert decoder(pyramid).shape == (2, 3, 19, 25)
    assert Segmenter(nn.Identity(), decoder).decode(pyramid, (75, 100)).shape == (2, 3, 75, 100)
    others = {f"c{n}": torch.rand_like(pyramid[n - 1]) for n in (1, 3, 4, 5) if n != level}
    with torch.no_grad():
        assert torch.equal(decoder.eval()(pyramid), decoder(pyramid._replace(**others)))


@pytest.mark.parametrize("level", [0, 1, 2, 6])
def test_other_levels_are_refused(level):
    with pytest.raises(ValueError, match=f"Expected level 3, 4 or 5, got {level}"):
        ContextDecoder(OUT_CHANNELS, 3, level=level)


class Cells(nn.Module):
    def __init__(self, pool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pool", [F.adaptive_avg_pool2d, F.adaptive_max_pool2d])
def test_adaptive_pooling_stops_the_onnx_exporter(pool):
    x = torch.rand(1, 2, 7, 7)
    with pytest.raises(RuntimeError, match="output size that are not factor of input size"):
        torch.onnx.export(Cells(pool), (x,), io.BytesIO(), dynamo=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [Cells(average_grid), PyramidPooling(2, 8), ASPP(2, 8)])
def test_matrix_products_do_not_stop_it(module):
    """Without the package onnx the exporter stops at its last step, the file's checks."""
    file = io.BytesIO()
    try:
        torch.onnx.export(module.eval(), (torch.rand(1, 2, 7, 7),), file, dynamo=False)
    except Exception as error:
        assert "onnx is not installed" in str(error)
    else:
        onnx = pytest.importorskip("onnx")
        onnx.checker.check_model(onnx.load_from_string(file.getvalue()))


def test_trials_differ_in_what_their_names_say():
    built = {name: t.decoder(OUT_CHANNELS, 3, **t.settings) for name, t in TRIALS.items()}
    kinds = {"": NoContext, ", PPM": PyramidPooling, ", ASPP": ASPP}
    for level in (3, 5):
        for kind, context in kinds.items():
            decoder = built[f"c{level}{kind}"]
            assert decoder.level == level and type(decoder.context) is context
    rates = {
        name: [conv[0].dilation[0] for conv in decoder.context.dilated]
        for name, decoder in built.items()
        if isinstance(getattr(decoder, "context", None), ASPP)
    }
    assert rates.pop("c3, ASPP") == [2, 4, 8] and rates.pop("c5, ASPP") == [1, 2, 3]
    assert rates.pop("c5, rates 6 12 18") == [6, 12, 18]
    assert set(rates) == {"c3, rates 1 1 1", "c3, rates 1 1 1, no mean"}
    assert all(each == [1, 1, 1] for each in rates.values())


def test_controls_have_as_many_weights_and_no_context():
    built = {name: t.decoder(OUT_CHANNELS, 3, **t.settings) for name, t in TRIALS.items()}
    size = {name: count_parameters(decoder) for name, decoder in built.items()}
    assert size["c3, PPM"] == size["c3, PPM unpooled"]
    assert size["c3, ASPP"] == size["c3, rates 1 1 1"] == size["c3, rates 1 1 1, no mean"]
    torch.manual_seed(0)
    unpooled, close = (built[f"c3, {name}"].context for name in ("PPM unpooled", CLOSE))
    x = torch.rand(1, 128, 21, 21)
    moved = x.clone()
    moved[..., 10, 10] += 1
    for context, positions in ((unpooled, 1), (close, 9)):
        with torch.no_grad():
            change = (context.eval()(moved) - context(x)).abs().amax(1)
        assert 0 < int((change > 1e-6).sum()) <= positions


class Fixed(nn.Module):
    """A model that says the same of every image."""

    def __init__(self, guess: torch.Tensor) -> None:
        super().__init__()
        self.guess, self.unused = guess, nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.one_hot(self.guess, 7).movedim(-1, 0).float().expand(len(x), -1, -1, -1)


def test_things_are_scored_by_the_longer_side_of_their_box():
    mask = torch.zeros(128, 128, dtype=torch.long)
    mask[2:6, 2:12] = 1  # longer side 10
    mask[20:30, 10:30] = 2  # 20
    mask[60:64, 0:100] = 6  # 100, a pole
    mask[120:122, 120:122] = 4  # too small to count
    guess = mask.clone()
    guess[20:25, 10:30] = 0  # half of the second
    guess[60:64, 25:100] = 1  # three quarters of the third
    scores = by_extent(Fixed(guess), [(torch.rand(3, 128, 128), mask)])
    assert all(len(each) == len(EXTENTS) - 1 for each in scores.values())
    assert scores["things"] == [1, 1, 0, 1]
    assert scores["recall"][:2] == [100, 50] and scores["recall"][3] == 25
    assert scores["iou"][:2] == [100, 50] and scores["iou"][3] == 25
    assert scores["compact"][:2] == [100, 50] and math.isnan(scores["compact"][3])


def test_painting_beyond_a_thing_costs_iou_and_no_recall():
    mask = torch.zeros(128, 128, dtype=torch.long)
    mask[40:60, 40:60] = 2
    mask[40:60, 64:84] = 2  # a neighbour of its kind, 4 pixels away
    guess = mask.clone()
    guess[30:40, 40:60] = 2  # ten rows above the first, eight of them near enough to count
    scores = by_extent(Fixed(guess), [(torch.rand(3, 128, 128), mask)])
    assert scores["recall"][1] == 100 and scores["things"][1] == 2
    near = 8 * 4  # what lies above the first, about the second's box
    expected = (400 / (400 + 8 * 20) + 400 / (400 + near)) / 2
    assert scores["iou"][1] == pytest.approx(100 * expected, abs=0.01)
