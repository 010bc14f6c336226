"""Chapter 12's exports against plain torch, and what its trials promise to differ in."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from experiments.chapters.putting_together.trials import TRIALS
from helpers.bridges.putting_together import (
    BookDecoder,
    Merge,
    conv_bn_relu,
    grey_of,
    l1_where,
    punch,
    tinted,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, ResNet18Encoder, Segmenter
from helpers.inspection import count_macs, count_parameters, pyramid_levels

DRAW = random.Random(12)
SIDES = [(DRAW.randint(32, 150), DRAW.randint(32, 150)) for _ in range(4)] + [(32, 33)]


def maps_of(height: int, width: int, batch: int = 2, seed: int = 0) -> Pyramid:
    torch.manual_seed(seed)
    levels = pyramid_levels(height, width)
    return Pyramid(*(torch.rand(batch, *level[1:4]) for level in levels))


def ready(module: nn.Module) -> nn.Module:
    """Give BatchNorm statistics, scales and shifts other than 0 and 1, and go to evaluation."""
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -1, 1)
            nn.init.uniform_(part.running_mean, -1, 1)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module.eval()


def by_hand(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Unfold, multiply, normalise, bend: no convolution and no BatchNorm of torch."""
    conv, norm, _ = layers
    kernel = conv.kernel_size[0]
    columns = F.unfold(x, kernel, padding=kernel // 2)
    y = (conv.weight.flatten(1) @ columns).view(len(x), -1, *x.shape[-2:])
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    y = (y - norm.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    return y.clamp_min(0)


def merged(merge: Merge, x: Tensor, skip: Tensor) -> Tensor:
    large = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
    return by_hand(merge.conv, torch.cat([large, skip], 1))


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
def test_merging_by_hand(kernel):
    merge = ready(Merge(6, 5, 4, kernel=kernel))
    x, skip = torch.randn(2, 6, 5, 7), torch.randn(2, 5, 12, 15)
    torch.testing.assert_close(merge(x, skip), merged(merge, x, skip), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", SIDES, ids=str)
def test_the_decoder_by_hand(size):
    decoder, maps = ready(BookDecoder(OUT_CHANNELS, 3)), maps_of(*size)
    c1, c2, c3, c4, c5 = (
        by_hand(lateral, map_) for lateral, map_ in zip(decoder.laterals, maps, strict=True)
    )
    x = merged(decoder.merge4, c5, c4)
    x = merged(decoder.merge3, x, c3)
    x = merged(decoder.merge2, x, c2)
    x = merged(decoder.merge1, x, c1)
    weight, bias = decoder.head.weight[:, :, 0, 0], decoder.head.bias
    expected = torch.einsum("oc,bchw->bohw", weight, x) + bias.view(-1, 1, 1)
    found = decoder(maps)
    assert found.shape == (2, 3, *maps.c1.shape[-2:])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_convolution_keeps_the_size(kernel):
    found = conv_bn_relu(4, 6, kernel)(torch.randn(2, 4, 7, 3))
    assert found.shape == (2, 6, 7, 3) and found.min() == 0


@torch.no_grad()
def test_at_c1_no_pixel_sees_its_neighbour():
    """What is changed in c1 at one position changes the logits at that position only."""
    decoder, maps = ready(BookDecoder(OUT_CHANNELS, 3)), maps_of(64, 96)
    changed = maps.c1.clone()
    changed[:, :, 5, 8] += 3
    differs = (decoder(maps) != decoder(maps._replace(c1=changed))).any(1)
    assert differs[:, 5, 8].all() and differs.sum() == len(differs)


@pytest.mark.parametrize("name", Pyramid._fields)
def test_every_map_is_read(name):
    decoder, maps = ready(BookDecoder(OUT_CHANNELS, 3)), maps_of(64, 96)
    leaves = Pyramid(*(map_.requires_grad_() for map_ in maps))
    decoder(leaves).sum().backward()
    assert getattr(leaves, name).grad.abs().sum() > 0


def test_an_image_does_not_see_the_others_of_its_batch():
    decoder, maps = ready(BookDecoder(OUT_CHANNELS, 3)), maps_of(64, 64, batch=3)
    alone = Pyramid(*(map_[1:2] for map_ in maps))
    with torch.no_grad():
        torch.testing.assert_close(decoder(maps)[1:2], decoder(alone), rtol=1e-4, atol=1e-5)


def test_it_costs_what_the_chapter_says():
    encoder = ResNet18Encoder(None)
    decoder = BookDecoder(OUT_CHANNELS, 11)
    image = torch.zeros(1, 3, 192, 256)
    work = count_macs(Segmenter(encoder, decoder).eval(), image)
    assert count_parameters(decoder) < 0.49e6 and work < 1.98e9


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="argument"):
        BookDecoder(OUT_CHANNELS[:4], 3)
    with pytest.raises(ValueError, match=r"Expected c1 as \[B, 64, h, w\], got \[2, 512"):
        BookDecoder(OUT_CHANNELS, 3)(Pyramid(*reversed(maps_of(64, 64))))
    with pytest.raises(ValueError, match=r"Expected skip as \[B, 5, h, w\]"):
        Merge(6, 5, 4)(torch.rand(2, 6, 4, 4), torch.rand(2, 7, 8, 8))
    with pytest.raises(TypeError, match="floating point"):
        Merge(6, 5, 4)(torch.rand(2, 6, 4, 4), torch.ones(2, 5, 8, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BookDecoder(OUT_CHANNELS, 3)(maps_of(32, 32, batch=1))


# --- the loss


def test_the_loss_counts_where_it_counts():
    torch.manual_seed(2)
    prediction, goal = torch.rand(2, 3, 8, 9), torch.rand(2, 3, 8, 9)
    counts = (torch.rand(2, 1, 8, 9) < 0.3).float()
    where = counts.bool().expand(-1, 3, -1, -1)
    expected = F.l1_loss(prediction[where], goal[where])
    found = l1_where(prediction, torch.cat([goal, counts], 1))
    torch.testing.assert_close(found, expected)
    elsewhere = torch.where(where, prediction, prediction + 9)
    torch.testing.assert_close(l1_where(elsewhere, torch.cat([goal, counts], 1)), expected)


def test_the_loss_of_nothing_is_zero_and_wrong_shapes_are_refused():
    prediction = torch.rand(2, 3, 8, 9, requires_grad=True)
    nothing = l1_where(prediction, torch.zeros(2, 4, 8, 9))
    nothing.backward()
    assert nothing == 0 and prediction.grad.eq(0).all()
    for wrong in [(2, 3, 8, 9), (2, 4, 8, 8), (1, 4, 8, 9), (2, 8, 9)]:
        with pytest.raises(ValueError, match=r"Expected a target \[2, 4, 8, 9\], got"):
            l1_where(prediction, torch.zeros(wrong))


# --- the trials


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Module]:
    found = {}
    for what, trial in TRIALS.items():
        torch.manual_seed(0)
        found[what] = trial.decoder(OUT_CHANNELS, 7, **trial.settings)
    return found


@pytest.mark.parametrize("what", TRIALS)
def test_every_trial_takes_any_size(built, what):
    for size in [(64, 64), (45, 71)]:
        maps = maps_of(*size)
        with torch.no_grad():
            found = built[what].eval()(maps)
        goal = maps.c2 if what == "book, ends at c2" else maps.c1
        assert found.shape == (2, 7, *goal.shape[-2:])


def weights(module: nn.Module) -> set[bytes]:
    return {w.detach().numpy().tobytes() for w in module.parameters() if w.ndim > 1}


@pytest.mark.parametrize(
    ("what", "new"),
    [
        ("book, linear laterals", 0),
        ("book, laterals without ReLU", 0),
        ("book, laterals without BatchNorm", 0),
        ("book, blind to c1", 0),
        ("book, 3×3 at c1", 1),
        ("book, no laterals", 4),
        ("book, summed", 8),
        ("book, ends at c2", 1),
        ("book, head on all levels", 5),
    ],
)
def test_the_rest_starts_alike(built, what, new):
    """All but the part in question starts with the default's very weights."""
    assert len(weights(built[what]) - weights(built["book decoder"])) == new


def test_trials_cost_more_or_less_as_their_names_say(built):
    encoder, image = ResNet18Encoder(None), torch.zeros(1, 3, 64, 64)
    work = {
        what.removeprefix("book, "): count_macs(Segmenter(encoder, d).eval(), image)
        for what, d in built.items()
    }
    own = work["book decoder"]
    for same in ("linear laterals", "laterals without ReLU", "blind to c1"):
        assert work[same] == own
    for less in ("summed", "ends at c2", "half as wide"):
        assert work[less] < own
    for more in ("no laterals", "3×3 at c1", "head on all levels", "twice as wide"):
        assert work[more] > own


# --- images to images


def test_grey_is_the_brightness_of_another_library():
    torch.manual_seed(3)
    images = torch.rand(2, 3, 9, 7)
    grey = grey_of(images)
    assert grey.shape == images.shape and torch.equal(grey[:, 0], grey[:, 2])
    expected = torch.stack([torch.from_numpy(_luma(each)) for each in images])
    torch.testing.assert_close(grey[:, 0], expected, atol=5e-3, rtol=0)


def _luma(image: Tensor) -> np.ndarray:
    """Return Pillow's brightness, which it rounds to 256 steps, 0…1."""
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    return np.asarray(Image.fromarray(pixels).convert("L"), np.float32) / 255


@pytest.mark.parametrize("size", [(128, 128), (180, 240), (33, 50)])
def test_a_quarter_of_the_squares_becomes_holes_and_the_rest_stays(size):
    torch.manual_seed(4)
    images = torch.rand(3, 3, *size)
    filled, holes = punch(images, seed=5)
    assert holes.shape == (3, 1, *size) and set(holes.unique().tolist()) == {0.0, 1.0}
    squares = holes[:, 0, ::16, ::16]
    assert torch.equal(
        squares.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, : size[0], : size[1]],
        holes[:, 0],
    )
    assert (squares.flatten(1).sum(1) == squares[0].numel() // 4).all()
    assert not torch.equal(squares[0], squares[1])
    assert torch.equal(torch.where(holes > 0, 0.0, filled), images * (1 - holes))
    assert torch.equal(punch(images, seed=5)[0], filled)


def test_what_fills_a_hole_comes_from_around_it_only():
    images = torch.full((1, 3, 128, 128), 0.25)
    _, holes = punch(images, seed=0)
    hidden = torch.where(holes > 0, 1.0, images)  # what lies in holes must not be seen
    torch.testing.assert_close(punch(hidden, seed=0)[0], images)
    images[..., 64:] = 0.75
    filled = punch(images, seed=0)[0]
    assert filled.min() >= 0.25 - 1e-6 and filled.max() <= 0.75 + 1e-6


def test_a_tint_is_the_median_of_its_brightness():
    torch.manual_seed(6)
    seen = torch.rand(2, 3, 8, 8)
    seen_grey, grey = grey_of(seen), grey_of(torch.rand(1, 3, 5, 5))
    found = tinted(grey, seen_grey, seen, levels=4) - grey
    for y, x, channel in [(0, 0, 0), (2, 3, 1), (4, 4, 2)]:
        level = int(grey[0, 0, y, x] * 4)
        alike = (seen_grey[:, 0] * 4).int() == level
        tints = sorted((seen - seen_grey)[:, channel][alike].tolist())
        assert found[0, channel, y, x].item() == pytest.approx(tints[(len(tints) - 1) // 2])
    black = torch.zeros(1, 3, 2, 2)
    assert tinted(black, seen_grey * 0 + 1, seen, levels=4).abs().sum() == 0  # nothing seen there
