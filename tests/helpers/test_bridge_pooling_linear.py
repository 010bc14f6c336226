"""Chapter 02: bridges from a map to a vector, decoders back from one, and what it measures."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from experiments.chapters.pooling_linear import analysis, trials
from experiments.core.trials import SETTINGS
from helpers import scenes
from helpers.bridges.encoder import TruncatedEncoder
from helpers.bridges.pooling_linear import (
    GeM,
    GridLinear,
    MapDecoder,
    Painter,
    PoolLinear,
    VectorDecoder,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, ResNet18Encoder, Segmenter, load_bundled
from helpers.inspection import count_parameters

SIZES = [(1, 1), (4, 4), (7, 7), (6, 8), (5, 9)]


def map_of(batch: int, channels: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Return a random map without negative values, some of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator).relu()


def pyramid_of(c5: torch.Tensor) -> Pyramid:
    maps = (torch.zeros(len(c5), channels, 2, 2) for channels in OUT_CHANNELS[:4])
    return Pyramid(*maps, c5)


# --- PoolLinear


@pytest.mark.parametrize("side", [64, 97, 224])
def test_with_the_classifiers_weights_it_returns_the_classifiers_logits(side):
    network = resnet18(num_classes=200)
    network.load_state_dict(load_bundled())
    network.eval()
    bridge = PoolLinear(512, 200)
    bridge.linear.load_state_dict(network.fc.state_dict())
    x = torch.randn(2, 3, side, side + 20, generator=torch.Generator().manual_seed(side))
    with torch.no_grad():
        assert torch.allclose(bridge(TruncatedEncoder(network)(x)), network(x), atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_a_mean_and_a_matrix(size, batch):
    torch.manual_seed(0)
    bridge, x = PoolLinear(6, 4), map_of(batch, 6, size)
    mean = x.double().numpy().mean(axis=(2, 3))
    weight, bias = (p.detach().double().numpy() for p in bridge.linear.parameters())
    found = bridge(x).detach().numpy()
    assert found.shape == (batch, 4)
    np.testing.assert_allclose(found, mean @ weight.T + bias, atol=1e-5)


# --- GeM


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_gem_is_the_mean_at_one_and_approaches_the_maximum(size, scale):
    x = scale * map_of(2, 5, size)
    mean, largest = x.mean((2, 3)), x.amax((2, 3))
    slack = 1e-5 * scale + 1.1e-6  # nothing counts less than 1e-6
    assert torch.allclose(GeM(5, p=1)(x), mean, rtol=1e-4, atol=slack)
    before = mean
    for p in (1.5, 2, 3, 6, 20, 100):
        found = GeM(5, p)(x)
        assert found.isfinite().all()
        assert (found >= before - slack).all(), "a larger p gives no smaller value"
        assert (found <= largest + slack).all()
        before = found
    # The mean of n powers is at least one n-th of the largest.
    assert (before >= largest * x[0, 0].numel() ** (-1 / 100) - slack).all()


@pytest.mark.parametrize("p", [0.5, 2, 3, 7.5])
def test_gem_is_the_power_mean_of_another_library(p):
    from scipy.stats import pmean

    x = map_of(2, 4, (5, 6)) + 0.1
    expected = pmean(x.double().numpy(), p, axis=(2, 3))
    np.testing.assert_allclose(GeM(4, p)(x).detach().numpy(), expected, rtol=1e-4)


def test_gem_scales_with_its_input_and_knows_no_order():
    x = map_of(2, 4, (5, 6))
    gem = GeM(4)
    assert torch.allclose(gem(7 * x), 7 * gem(x), rtol=1e-4)
    shuffled = x.flatten(2)[..., torch.randperm(30)].view_as(x)
    assert torch.allclose(gem(shuffled), gem(x), rtol=1e-5)


@pytest.mark.parametrize("p", [0.5, 1, 3, 30])
def test_gems_gradient_is_finite_where_a_channel_is_dead(p):
    x = map_of(2, 4, (3, 3))
    x[0, 1], x[1] = 0, 0
    x.requires_grad_()
    gem = GeM(4, p)
    gem(x).sum().backward()
    assert x.grad.isfinite().all() and gem.log_p.grad.isfinite()


def test_gems_gradient_is_that_of_finite_differences():
    gem = GeM(2, p=2.5).double()
    x = (map_of(1, 2, (2, 3)).double() + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(gem, (x,))
    log_p = torch.tensor(0.7, dtype=torch.double, requires_grad=True)
    powers = lambda value: torch.func.functional_call(gem, {"log_p": value}, (x.detach(),))  # noqa: E731
    assert torch.autograd.gradcheck(powers, (log_p,))


def test_gem_learns_whether_the_mean_or_the_maximum_is_asked_for():
    x = map_of(64, 1, (4, 4))
    learnt = {}
    for name, target in {"mean": x.mean((2, 3)), "maximum": x.amax((2, 3))}.items():
        gem = GeM(1)
        optimizer = torch.optim.Adam(gem.parameters(), lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            (gem(x) - target).square().mean().backward()
            optimizer.step()
        learnt[name] = gem.log_p.exp().item()
    assert learnt["mean"] == pytest.approx(1, abs=0.1) and learnt["maximum"] > 10


@pytest.mark.parametrize("p", [0, -1, float("nan")])
def test_gem_refuses_a_power_that_is_none(p):
    with pytest.raises(ValueError, match=f"Expected p above 0, got {p}: 1 is the average"):
        GeM(512, p)


# --- GridLinear


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_a_grids_parameters_follow_the_formula_whatever_the_map(grid):
    bridge = GridLinear(64, 32, grid)
    assert count_parameters(bridge) == (64 * grid**2 + 1) * 32
    assert {tuple(bridge(map_of(1, 64, size)).shape) for size in SIZES} == {(1, 32)}


def test_a_grid_of_one_is_pool_linear():
    torch.manual_seed(0)
    pool, grid = PoolLinear(6, 4), GridLinear(6, 4, 1)
    grid.load_state_dict(pool.state_dict())
    x = map_of(3, 6, (5, 7))
    assert torch.allclose(grid(x), pool(x), atol=1e-6)


def test_a_grid_as_large_as_the_map_is_flattening():
    torch.manual_seed(0)
    bridge, x = GridLinear(6, 4, 4), map_of(3, 6, (4, 4))
    assert torch.allclose(bridge(x), bridge.linear(x.reshape(3, -1)), atol=1e-6)


def test_a_grid_averages_its_cells():
    bridge, x = GridLinear(2, 4, 2), map_of(1, 2, (4, 6))
    bridge.linear = nn.Identity()
    cells = bridge(x).view(2, 2, 2)
    for row in (0, 1):
        for column in (0, 1):
            cell = x[0, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            assert torch.allclose(cells[:, row, column], cell.mean((1, 2)))


@pytest.mark.parametrize("grid", [0, -2])
def test_a_grid_without_cells_is_refused(grid):
    with pytest.raises(ValueError, match=f"Expected a grid of 1 × 1 or more, got {grid}"):
        GridLinear(512, 4, grid)


# --- what knows places


@pytest.mark.parametrize(
    ("bridge", "knows"),
    [
        (PoolLinear(8, 4), False),
        (GeM(8), False),
        (GridLinear(8, 4, 1), False),
        (GridLinear(8, 4, 2), True),
    ],
    ids=["PoolLinear", "GeM", "1×1", "2×2"],
)
def test_only_a_grid_knows_places(bridge, knows):
    x = map_of(2, 8, (4, 4))
    shuffled = x.flatten(2)[..., torch.randperm(16)].view_as(x)
    assert torch.allclose(bridge(x), bridge(shuffled), atol=1e-5) is not knows


# --- decoders


@pytest.mark.parametrize("widths", [(6,), (6, 5), (6, 5, 4)])
def test_a_painter_doubles_once_for_each_width(widths):
    painted = Painter(8, 3, widths)(map_of(2, 8, (3, 5)))
    assert painted.shape == (2, 3, 3 * 2 ** len(widths), 5 * 2 ** len(widths))


@pytest.mark.parametrize("size", [(32, 32), (65, 97), (128, 128)])
def test_a_vector_decoder_sees_nothing_but_the_vector(size):
    torch.manual_seed(0)
    encoder = ResNet18Encoder(weights=None)
    decoder = VectorDecoder(PoolLinear(512, 16), 16, 3, grid=(3, 4)).eval()
    maps = encoder(torch.randn(2, 3, *size))
    expected = decoder(maps)
    assert expected.shape == (2, 3, 24, 32)
    positions = maps.c5[0, 0].numel()
    shuffled = maps.c5.flatten(2)[..., torch.randperm(positions)].view_as(maps.c5)
    assert torch.allclose(decoder(maps._replace(c5=shuffled)), expected, atol=1e-4)
    assert Segmenter(encoder, decoder)(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_both_decoders_have_the_same_painter():
    vector, map_ = VectorDecoder(PoolLinear(512, 16), 16, 3), MapDecoder(512, 3)
    assert str(vector.paint) == str(map_.paint)
    c5 = map_of(2, 512, (4, 4))
    assert vector(pyramid_of(c5)).shape == map_(pyramid_of(c5)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("bridge", "came"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(0), nn.Linear(512, 16)), r"\[16\]"),
        (GeM(512), r"\[1, 512\]"),
        (nn.AdaptiveAvgPool2d(1), r"\[1, 512, 1, 1\]"),
    ],
    ids=["without a batch", "another width", "a map"],
)
def test_a_bridge_that_returns_something_else_is_told_so(bridge, came):
    decoder = VectorDecoder(bridge, 16, 3)
    with pytest.raises(ValueError, match=rf"Expected a vector \[B, 16\].*got {came}.*flatten\(1\)"):
        decoder(pyramid_of(map_of(1, 512, (4, 4))))


@pytest.mark.parametrize("make", [lambda: PoolLinear(8, 4), lambda: GeM(8), lambda: Painter(8, 3)])
@pytest.mark.parametrize("shape", [(8, 4, 4), (1, 9, 4, 4), (1, 8)])
def test_other_maps_are_refused(make, shape):
    with pytest.raises(ValueError, match=r"Expected the map as \[B, 8, h, w\], got"):
        make()(torch.rand(shape))


# --- what is measured


@pytest.mark.parametrize("where", SETTINGS)
@pytest.mark.parametrize("what", trials.TRIALS)
def test_every_trial_paints_on_the_grid_that_the_map_has(what, where):
    setting = SETTINGS[where]
    encoder = ResNet18Encoder(weights=None)
    decoder = trials.TRIALS[what].model(0, len(setting.classes)).decoder.eval()
    size = {"scenes": (128, 128), "streets": (180, 240)}[where]
    maps = encoder(torch.randn(1, 3, *size))
    with torch.no_grad():
        painted, other = decoder(maps), decoder(maps._replace(c5=maps.c5 + 1))
    sides = [8 * side for side in maps.c5.shape[-2:]]
    assert painted.shape == (1, len(setting.classes), *sides)
    assert torch.equal(painted, other) is (what == "nothing")


@pytest.fixture(scope="module")
def asked() -> analysis.Vectors:
    """Return 60 scenes whose "c5" is what the questions ask for, one answer a channel."""
    vectors = analysis.Vectors.__new__(analysis.Vectors)
    drawn = [scenes.scene(index) for index in range(60)]
    vectors.objects = [each.objects for each in drawn]
    vectors.color = torch.stack([torch.from_numpy(each.image).mean((1, 2)) for each in drawn])
    answers = np.concatenate([vectors.largest()[:, :2] / 128, vectors.radii() > 0], axis=1)
    vectors.c5 = torch.from_numpy(answers).float()[..., None, None].expand(-1, -1, 4, 4)
    return vectors


def test_a_vector_that_holds_the_answers_is_read_without_error(asked):
    said = analysis.read(lambda c5: c5.mean((2, 3)), asked, asked)
    assert max(analysis.position_errors(said, asked)) < 3
    assert min(analysis.presence(said, asked)) > 0.95


def test_a_vector_that_holds_nothing_is_read_as_guessing(asked):
    torch.manual_seed(0)
    noise = torch.randn(60, 4)
    said = analysis.read(lambda c5: noise, asked, asked)
    guess = np.tile(asked.largest()[:, :2].mean(0), (60, 1))
    found, expected = (analysis.position_errors(each, asked)[-1] for each in (said, guess))
    assert found == pytest.approx(expected, rel=0.15)
    assert analysis.presence(said, asked)[-1] < 0.8


def test_neighbours_are_compared_by_what_they_share(asked):
    chance = analysis.chance(asked)
    shapes = asked.c5[:, 2:, 0, 0]
    by_shape = analysis.neighbourhood(shapes, asked)
    by_color = analysis.neighbourhood(asked.color, asked)
    assert by_shape["shapes"] > chance["shapes"] + 20
    assert by_color["color"] < 0.6 * chance["color"]
    sets = [{o.shape for o in objects} for objects in asked.objects]
    pairs = [(a, b) for i, a in enumerate(sets) for j, b in enumerate(sets) if i != j]
    expected = 100 * np.mean([len(a & b) / len(a | b) for a, b in pairs])
    assert chance["shapes"] == pytest.approx(expected, abs=0.01)


def test_the_largest_object_is_where_the_mask_has_it(asked):
    found = asked.largest()
    checked = 0
    for index, objects in enumerate(asked.objects):
        largest = max(objects, key=lambda each: each.pixels)
        if [o.shape for o in objects].count(largest.shape) > 1:
            continue  # two of a kind cannot be told apart in the mask
        mask = scenes.scene(index).mask == scenes.CLASSES.index(largest.shape)
        rows, columns = np.nonzero(mask)
        middle = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
        assert found[index, :2] == pytest.approx(middle, abs=1)
        assert found[index, 2] ** 2 == pytest.approx(mask.sum())
        checked += 1
    assert checked > 20


def test_an_error_counts_for_its_size_and_an_answer_stays_in_the_image(asked):
    truth = asked.largest()
    right = analysis.position_errors(truth[:, :2], asked)
    assert right == [0, 0, 0, 0, 0]
    small = int(np.argmin(truth[:, 2]))
    said = truth[:, :2].copy()
    said[small] = 1e6, said[small, 1]
    found = analysis.position_errors(said, asked)
    assert 0 < found[0] < 128 and found[1:4] == [0, 0, 0]
    assert found[4] == pytest.approx((128 - truth[small, 0]) / 60, abs=0.01)


def test_presence_is_the_share_of_pairs_in_the_right_order(asked):
    generator = np.random.default_rng(0)
    said = generator.normal(size=(60, 8))
    expected = []
    for score, radius in zip(said[:, 2:].T, asked.radii().T, strict=True):
        with_, without = score[radius > 0], score[radius == 0]
        expected.append(np.mean(with_[:, None] > without[None]))
    assert analysis.presence(said, asked)[-1] == pytest.approx(np.mean(expected), abs=1e-3)


def test_a_feature_that_slept_in_training_decides_nothing(asked):
    torch.manual_seed(0)
    features = torch.cat([asked.c5.mean((2, 3)), 1e-6 * torch.randn(60, 1)], dim=1)
    awake = features.clone()
    awake[7, -1] = 1.0  # a million standard deviations
    said = [
        analysis.position_errors(_read(features, other, asked), asked)[-1]
        for other in (features, awake)
    ]
    assert abs(said[0] - said[1]) < 1


def _read(train, test, asked):
    turns = iter((train, test))
    return analysis.read(lambda c5: next(turns), asked, asked)


def test_wrapped_around_a_map_moves_with_its_image():
    encoder = ResNet18Encoder()
    analysis.wrap(encoder)
    image = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        c5, moved = encoder(image).c5, encoder(image.roll((32, -32), (2, 3))).c5
    assert torch.allclose(moved, c5.roll((1, -1), (2, 3)), atol=1e-4)
