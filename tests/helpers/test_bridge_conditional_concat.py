"""Chapter 09's exports against their formulas, pixel by pixel, and their properties."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.measure import shannon_entropy
from torch import nn

from experiments.chapters.conditional_concat.trials import TRIALS
from helpers.bridges.conditional_concat import (
    SPADE,
    CoarseFeatures,
    Concat,
    ConditionalDecoder,
    FiLM,
    HardConcat,
    ImageStem,
    SoftConcat,
    fix_mask,
    harden,
    mask_report,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, Segmenter
from helpers.inspection import count_parameters, pyramid_levels

SIZES = [
    ((3, 4), (24, 32)),
    ((5, 7), (33, 51)),
    ((1, 1), (6, 5)),
    ((6, 6), (6, 6)),
    ((8, 8), (3, 5)),
]
MASKED = (SoftConcat, HardConcat)
JOINS = (Concat, *MASKED)


def pair(coarse=(3, 4), fine=(24, 32), batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, 6, *coarse), torch.randn(batch, 4, *fine)


def pyramid(height=65, width=97, batch=2):
    levels = pyramid_levels(height, width)
    return Pyramid(*(torch.rand(batch, v.channels, v.height, v.width) for v in levels))


# Joins


@pytest.mark.parametrize(("coarse", "fine"), SIZES)
def test_concatenation_keeps_the_fine_map_and_enlarges_the_features(coarse, fine):
    features, side = pair(coarse, fine)
    joined = Concat(6, 4)(features, side)
    assert joined.shape == (2, 10, *fine)
    assert torch.equal(joined[:, 6:], side)
    assert torch.equal(joined[:, :6], F.interpolate(features, fine, mode="bilinear"))
    assert not list(Concat(6, 4).parameters())


@pytest.mark.parametrize(("coarse", "fine"), SIZES)
@pytest.mark.parametrize("join", MASKED)
def test_both_sides_enter_in_shares_that_sum_to_one(join, coarse, fine):
    features, side = pair(coarse, fine)
    torch.manual_seed(1)
    module = join(6, 4)
    mask, whole = module.mask(features, fine).detach(), Concat(6, 4)(features, side)
    assert mask.shape == (2, 1, *fine) and mask.min() >= 0 and mask.max() <= 1
    joined = module(features, side)
    for b, y, x in [(0, 0, 0), (1, fine[0] - 1, fine[1] - 1), (0, fine[0] // 2, fine[1] // 3)]:
        m = float(mask[b, 0, y, x])
        assert torch.allclose(joined[b, :6, y, x], (1 - m) * whole[b, :6, y, x], atol=1e-5)
        assert torch.allclose(joined[b, 6:, y, x], m * whole[b, 6:, y, x], atol=1e-5)


def test_a_soft_mask_is_the_sigmoid_of_a_weighted_sum_at_each_position():
    features, _ = pair()
    join = SoftConcat(6, 4)
    weight, bias = join.score.weight[0, :, 0, 0].detach(), join.score.bias[0].detach()
    mask = join.mask(features, features.shape[-2:]).detach()
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)):
        score = float(weight @ features[b, :, y, x] + bias)
        assert float(mask[b, 0, y, x]) == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-5)


def test_a_hard_mask_is_the_rounded_soft_one_and_learns_like_it():
    features, side = pair()
    soft, hard = SoftConcat(6, 4), HardConcat(6, 4)
    hard.load_state_dict(soft.state_dict())
    size, pull = side.shape[-2:], torch.randn(2, 1, 24, 32)
    masks = {join: join.mask(features, size) for join in (soft, hard)}
    assert set(masks[hard].unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(masks[hard], (masks[soft] > 0.5).float())
    for mask in masks.values():
        (mask * pull).sum().backward()
    assert torch.allclose(soft.score.weight.grad, hard.score.weight.grad, atol=1e-5)
    assert soft.score.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hardening_gives_exact_values_in_every_precision(dtype):
    mask = torch.linspace(0, 1, 1001, dtype=dtype).requires_grad_()
    hard = harden(mask)
    assert hard.dtype == dtype and set(hard.tolist()) == {0.0, 1.0}
    assert torch.equal(hard.bool(), mask > 0.5)
    hard.sum().backward()
    assert torch.equal(mask.grad, torch.ones_like(mask))


@pytest.mark.parametrize("join", [*JOINS, FiLM, SPADE])
def test_other_maps_are_refused(join):
    module, (features, side) = join(6, 4), pair()
    for bad, message in [
        ((features[:, :5], side), r"features as \[B, 6, h, w\], got \[2, 5, 3, 4\]"),
        ((features, side[0]), r"fine as \[B, 4, h, w\], got \[4, 24, 32\]"),
        ((features[:1], side), "got features of 1 images and fine of 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(*bad)
    with pytest.raises(TypeError, match="floating point"):
        module(features.int(), side)


# FiLM and SPADE


@pytest.mark.parametrize("kind", [FiLM, SPADE])
@pytest.mark.parametrize(("coarse", "fine"), SIZES)
def test_with_gamma_one_and_beta_zero_nothing_changes(kind, coarse, fine):
    features, side = pair(coarse, fine)
    module = kind(6, 4)
    nn.init.zeros_(module.predict.weight), nn.init.zeros_(module.predict.bias)
    assert torch.equal(module(features, side), side)
    with torch.no_grad():  # γ = 3 for channel 0, β = 5 for channel 1
        module.predict.bias[0], module.predict.bias[4 + 1] = 2, 5
    changed = module(features, side)
    assert torch.allclose(changed[:, 0], 3 * side[:, 0])
    assert torch.allclose(changed[:, 1], side[:, 1] + 5)
    assert torch.equal(changed[:, 2:], side[:, 2:])


def test_film_is_one_line_for_each_image_and_channel():
    features, side = pair()
    module = FiLM(6, 4)
    found = module(features, side)
    for b in range(2):
        said = module.predict.weight @ features[b].mean((1, 2)) + module.predict.bias
        for c in range(4):
            expected = (1 + said[c]) * side[b, c] + said[4 + c]
            assert torch.allclose(found[b, c], expected, atol=1e-5)
    shuffled = features.flatten(2)[:, :, torch.randperm(12)].view_as(features)
    assert torch.allclose(module(shuffled, side), found, atol=1e-5)  # it does not know where


def test_spade_is_film_at_every_pixel():
    features, side = pair((4, 5), (4, 5))
    spade, film = SPADE(6, 4), FiLM(6, 4)
    film.predict.weight.data.copy_(spade.predict.weight[:, :, 0, 0])
    film.predict.bias.data.copy_(spade.predict.bias)
    found = spade(features, side)
    for y, x in torch.cartesian_prod(torch.arange(4), torch.arange(5)).tolist():
        one = features[:, :, y : y + 1, x : x + 1], side[:, :, y : y + 1, x : x + 1]
        assert torch.allclose(found[:, :, y, x], film(*one)[:, :, 0, 0], atol=1e-5)


def test_a_mask_is_a_spade_of_one_scale_and_no_shift():
    features, side = pair((4, 5), (4, 5))
    join, spade = SoftConcat(6, 4), SPADE(6, 4)
    mask = join.mask(features, (4, 5)).detach()
    for b, y, x in [(0, 0, 0), (1, 3, 4)]:
        nn.init.zeros_(spade.predict.weight), nn.init.zeros_(spade.predict.bias)
        nn.init.constant_(spade.predict.bias[:4], float(mask[b, 0, y, x]) - 1)
        expected = spade(features, side)[b, :, y, x]
        assert torch.allclose(join(features, side)[b, 6:, y, x], expected, atol=1e-5)


# Reports


def test_a_report_of_known_masks():
    flat = torch.full((2, 1, 8, 8), 0.25)
    report = mask_report(flat)
    assert report.mean == pytest.approx(0.25) and report.within == pytest.approx(0, abs=1e-9)
    bits = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert report.entropy == pytest.approx(bits)
    halves = torch.cat([torch.zeros(2, 1, 8, 4), torch.ones(2, 1, 8, 4)], dim=3)
    assert mask_report(halves) == pytest.approx((0.5, 0.5, 0), abs=1e-9)
    by_image = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    assert mask_report(by_image) == pytest.approx((0.5, 0, 0), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_report_agrees_with_numpy_and_does_not_know_places(seed):
    torch.manual_seed(seed)
    masks = torch.rand(3, 1, 7, 9)
    report = mask_report(masks)
    assert report.mean == pytest.approx(masks.mean().item(), abs=1e-6)
    assert report.within == pytest.approx(np.mean([m.numpy().std() for m in masks]), abs=1e-6)
    mixed = masks.flatten(2)[:, :, torch.randperm(63)].view_as(masks)
    assert mask_report(mixed) == pytest.approx(report)
    turned = mask_report(1 - masks)
    assert turned == pytest.approx((1 - report.mean, *report[1:]), abs=1e-5)


def test_the_entropy_is_that_of_a_coin():
    for heads in (1, 3, 5):
        coin = [1] * heads + [0] * (10 - heads)
        mask = torch.full((1, 1, 2, 2), heads / 10)
        assert mask_report(mask).entropy == pytest.approx(shannon_entropy(coin), abs=1e-6)


@pytest.mark.parametrize("bad", [torch.rand(2, 8, 8), torch.rand(2, 3, 8, 8)])
def test_a_report_wants_one_channel(bad):
    with pytest.raises(ValueError, match=r"Expected masks \[B, 1, H, W\]"):
        mask_report(bad)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_report_refuses_scores(value):
    with pytest.raises(ValueError, match=r"Expected values in 0…1.*sigmoid"):
        mask_report(torch.tensor([0.5, value]).view(1, 1, 1, 2))


@pytest.mark.parametrize("level", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_fixed_mask_is_its_level_whatever_it_sees_and_the_old_join_stays(level):
    features, side = pair()
    join = SoftConcat(6, 4)
    before = join(features, side)
    fixed = fix_mask(join, level)
    assert torch.allclose(fixed.mask(100 * features, (24, 32)), torch.tensor(level), atol=1e-5)
    assert torch.equal(join(features, side), before)
    hard = fix_mask(HardConcat(6, 4), level).mask(features, (24, 32))
    assert torch.equal(hard, torch.full_like(hard, float(level > 0.5)))


@pytest.mark.parametrize("level", [-0.01, 1.5])
def test_a_level_is_a_share(level):
    with pytest.raises(ValueError, match="Expected a level in 0…1"):
        fix_mask(SoftConcat(6, 4), level)


# Decoder


def test_parts_are_what_they_say():
    torch.manual_seed(0)
    maps, image = pyramid(), torch.randn(2, 3, 65, 97)
    decoder = ConditionalDecoder(OUT_CHANNELS, 5).eval()
    features, fine = decoder.coarse(maps), decoder.stem(image)
    assert features.shape == (2, 16, *maps.c3.shape[-2:]) and features.min() >= 0
    assert fine.shape == (2, 8, 65, 97) and fine.min() >= 0
    joined = decoder.join(features, fine)
    weight = decoder.mix.weight[:, :, 0, 0]
    for b, y, x in [(0, 0, 0), (1, 64, 96), (0, 30, 11)]:  # each pixel from what entered there
        hidden = (weight @ joined[b, :, y, x] / math.sqrt(1 + decoder.norm.eps)).relu()
        expected = decoder.head.weight[:, :, 0, 0] @ hidden + decoder.head.bias
        assert torch.allclose(decoder(maps, image)[b, :, y, x], expected, atol=1e-4)


def test_the_stem_sees_five_pixels_across():
    torch.manual_seed(0)
    stem, image = ImageStem(4).eval(), torch.randn(1, 3, 40, 40)
    changed = image.clone()
    changed[..., 20, 20] += 5
    moved = (stem(image) != stem(changed)).any(1)[0].nonzero()
    assert moved.min() >= 18 and moved.max() <= 22 and len(moved) > 9


def test_coarse_features_are_the_sum_of_projected_levels():
    torch.manual_seed(0)
    coarse, maps = CoarseFeatures(OUT_CHANNELS, 3, width=5).eval(), pyramid(64, 96)
    size, total = maps.c3.shape[-2:], 0
    for project, map_ in zip(coarse.project, maps[2:], strict=True):
        large = F.interpolate(map_, size, mode="bilinear")  # the order does not matter
        total = total + torch.einsum("oc,bchw->bohw", project.weight[:, :, 0, 0], large)
    scale = math.sqrt(1 + coarse.norm.eps)
    hidden = F.conv2d((total / scale).relu(), coarse.conv.weight, padding=1)
    assert torch.allclose(coarse(maps), (hidden / scale).relu(), atol=1e-4)


def test_a_mask_costs_one_weight_a_channel_and_a_bias():
    sizes = {
        join: count_parameters(ConditionalDecoder(OUT_CHANNELS, 7, join=join)) for join in JOINS
    }
    assert sizes[SoftConcat] == sizes[HardConcat] == sizes[Concat] + 16 + 1


def test_trials_with_the_image_start_alike_around_the_join():
    def start(what):
        torch.manual_seed(0)
        trial = TRIALS[what]
        return trial.decoder(OUT_CHANNELS, 7, **trial.settings).state_dict()

    plain = start("concatenate")
    for what in [what for what in TRIALS if not what.startswith("c1")]:
        found = start(what)
        assert {name for name in found if not name.startswith("join.")} == set(plain)
        assert all(torch.equal(found[name], plain[name]) for name in plain), what


@pytest.mark.parametrize("kind", [FiLM, SPADE])
def test_what_returns_the_fine_map_alone_is_no_join(kind):
    class Modulated(Concat):
        def __init__(self, in_channels, fine_channels):
            super().__init__(in_channels, fine_channels)
            self.modulate = kind(in_channels, fine_channels)

        def forward(self, features, fine):
            return super().forward(features, self.modulate(features, fine))

    maps, image = pyramid(33, 50), torch.randn(2, 3, 33, 50)
    with pytest.raises(RuntimeError, match="24 channels"):
        ConditionalDecoder(OUT_CHANNELS, 5, join=kind)(maps, image)
    assert ConditionalDecoder(OUT_CHANNELS, 5, join=Modulated)(maps, image).shape == (2, 5, 33, 50)


@pytest.mark.parametrize("join", JOINS)
def test_a_decoder_learns_a_mask_on_images_of_any_size(join):
    class Encoder(nn.Module):
        def forward(self, x):
            return maps

    torch.manual_seed(0)
    maps, image = pyramid(33, 50), torch.randn(2, 3, 33, 50)
    target = (image.sum(1) > 0).long()  # the image says it, pixel by pixel
    model = Segmenter(Encoder(), ConditionalDecoder(OUT_CHANNELS, 2, join=join))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(30):
        logits = model(image)
        assert logits.shape == (2, 2, 33, 50)
        losses.append(F.cross_entropy(logits, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    with pytest.raises(ValueError, match="Expected 3 channels"):
        model.decoder(maps, image[:, :1])
