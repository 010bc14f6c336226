"""Chapter 06's exports against linear algebra by hand, and what late fusion promises."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.chapters.multi_path.trials import TRIALS
from helpers.bridges.multi_path import (
    FPNDecoder,
    MultiPathDecoder,
    OnePathDecoder,
    SegFormerDecoder,
    SummedPathDecoder,
    ThroughGrid,
    projection,
    resize_to,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, Segmenter
from helpers.inspection import count_macs, count_parameters, pyramid_levels

ON_C1 = [MultiPathDecoder, SummedPathDecoder, OnePathDecoder]
ON_C2 = [FPNDecoder, SegFormerDecoder]
DRAW = random.Random(6)
SIDES = [(DRAW.randint(32, 150), DRAW.randint(32, 150)) for _ in range(5)] + [(32, 33)]


def maps_of(height: int, width: int, batch: int = 2, seed: int = 0) -> Pyramid:
    torch.manual_seed(seed)
    levels = pyramid_levels(height, width)
    return Pyramid(*(torch.rand(batch, *level[1:4]) for level in levels))


def ready(module: nn.Module, pyramid: Pyramid) -> nn.Module:
    """Give BatchNorm statistics, scales and shifts other than 0 and 1, and go to evaluation."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -1, 1)
    with torch.no_grad():
        module.train()(pyramid)
    return module.eval()


def close(found: Tensor, expected: Tensor, share: float = 1e-4) -> bool:
    return float((found - expected).abs().max()) <= share * float(expected.abs().max())


def weights_1d(size: int, goal: int) -> np.ndarray:
    """Return [goal, size]: how much of each old position enters each new one, linearly."""
    at = np.clip((np.arange(goal) + 0.5) * size / goal - 0.5, 0, size - 1)
    return np.stack([np.interp(at, np.arange(size), unit) for unit in np.eye(size)], axis=1)


def enlarged(map_: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (weights_1d(map_.shape[d], size[d - 2]) for d in (2, 3))
    return np.einsum("Hh,bchw,Ww->bcHW", rows, map_, columns)


def projected(layers: nn.Sequential, map_: np.ndarray) -> np.ndarray:
    conv, norm, _ = layers
    x = np.einsum("oc,bchw->bohw", conv.weight.detach().double().numpy()[:, :, 0, 0], map_)
    mean, variance, scale, shift = (
        t.detach().double().numpy()[:, None, None]
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return np.maximum((x - mean) / np.sqrt(variance + norm.eps) * scale + shift, 0)


@pytest.mark.parametrize("size", [(7, 9), (3, 20), (12, 4), (5, 6)], ids=str)
def test_resizing_by_hand(size):
    torch.manual_seed(0)
    map_, goal = torch.rand(2, 3, 5, 6), torch.rand(1, 1, *size)
    found = resize_to(goal, map_)
    np.testing.assert_allclose(found.numpy(), enlarged(map_.numpy(), size), atol=1e-5)


def test_a_map_of_the_right_size_is_not_touched():
    map_ = torch.rand(2, 3, 5, 6)
    assert torch.equal(resize_to(map_, map_), map_)


@pytest.mark.parametrize("shape", [(5, 6), (3, 5, 6), (1, 2, 3, 5, 6)], ids=str)
def test_only_maps_are_resized(shape):
    with pytest.raises(ValueError, match=r"Expected a map \[B, C, h, w\], got \[") as caught:
        resize_to(torch.rand(1, 3, 8, 8), torch.rand(shape))
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("decoder", [MultiPathDecoder, SummedPathDecoder])
def test_late_fusion_by_hand(decoder):
    pyramid = maps_of(65, 97)
    model = ready(decoder(OUT_CHANNELS, 4, width=6), pyramid)
    size = tuple(pyramid.c1.shape[-2:])
    ends = [
        enlarged(projected(path, map_.double().numpy()), size)
        for path, map_ in zip(model.paths, pyramid, strict=True)
    ]
    fused = np.concatenate(ends, axis=1) if decoder is MultiPathDecoder else sum(ends)
    mixed = projected(model.mix, fused)
    head = model.head.weight.detach().double().numpy()[:, :, 0, 0]
    expected = np.einsum("oc,bchw->bohw", head, mixed)
    expected += model.head.bias.detach().double().numpy()[:, None, None]
    with torch.no_grad():
        np.testing.assert_allclose(model(pyramid).numpy(), expected, atol=1e-4)


def test_a_sum_is_a_concatenation_with_equal_blocks():
    pyramid = maps_of(64, 96)
    summed = ready(SummedPathDecoder(OUT_CHANNELS, 4, width=6), pyramid)
    stacked = MultiPathDecoder(OUT_CHANNELS, 4, width=6).eval()
    state = summed.state_dict()
    state["mix.0.weight"] = state["mix.0.weight"].repeat(1, 5, 1, 1)
    stacked.load_state_dict(state)
    with torch.no_grad():
        assert close(stacked(pyramid), summed(pyramid))
        stacked.mix[0].weight[:, :6] *= -1  # c1's block: now the levels are not treated alike
        assert not close(stacked(pyramid), summed(pyramid), 0.01)


def test_several_paths_from_one_map_are_one_wide_path():
    """Why `OnePathDecoder` is as wide as five paths: from c5 alone, more of them are the same."""
    pyramid = maps_of(64, 96)
    one = ready(OnePathDecoder(OUT_CHANNELS, 4, width=6), pyramid)
    several = MultiPathDecoder([64, 512, 512, 512, 512], 4, width=6).eval()
    conv, norm, _ = one.path
    with torch.no_grad():
        for k, path in enumerate(several.paths[1:], start=1):
            part = slice(6 * k, 6 * k + 6)
            path[0].weight.copy_(conv.weight[part])
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(path[1], name).copy_(getattr(norm, name)[part])
        one.mix[0].weight[:, :6] = 0  # the place of c1, which only lends its size
        several.mix.load_state_dict(one.mix.state_dict())
        several.head.load_state_dict(one.head.state_dict())
        assert close(several(Pyramid(pyramid.c1, *[pyramid.c5] * 4)), one(pyramid))


def differences(decoder: nn.Module, level: str) -> tuple[Tensor, Tensor]:
    """Return what a change of one level changes in the output, beside two sets of other levels."""
    one, other = maps_of(64, 96, seed=1), maps_of(64, 96, seed=2)
    new = getattr(maps_of(64, 96, seed=3), level)
    changes = []
    with torch.no_grad():
        for rest in (one, other):
            before = rest._replace(**{level: getattr(one, level)})
            changes.append(decoder(rest._replace(**{level: new})) - decoder(before))
    return changes[0], changes[1]


@pytest.mark.parametrize("level", Pyramid._fields)
@pytest.mark.parametrize("decoder", [MultiPathDecoder, SummedPathDecoder])
def test_before_the_mix_bends_levels_do_not_meet(decoder, level):
    model = ready(decoder(OUT_CHANNELS, 4, width=6), maps_of(64, 96))
    model.mix[2] = nn.Identity()
    beside_one, beside_other = differences(model, level)
    assert close(beside_one, beside_other, 1e-3)


def test_in_a_feature_pyramid_the_coarse_speak_to_the_fine_and_not_back():
    pyramid = maps_of(64, 96)
    model = ready(FPNDecoder(OUT_CHANNELS, 4, width=6), pyramid)
    seen: dict[int, list[Tensor]] = {k: [] for k in range(4)}
    for k, smooth in enumerate(model.smooths):
        smooth.register_forward_hook(lambda m, i, o, k=k: seen[k].append(i[0]))
    with torch.no_grad():
        model(pyramid)
        for name in ("c2", "c5"):
            model(pyramid._replace(**{name: getattr(pyramid, name) + 1}))
    changed = {
        name: [not torch.equal(seen[k][0], seen[k][run]) for k in range(4)]
        for run, name in ((1, "c2"), (2, "c5"))
    }
    assert changed == {"c2": [True, False, False, False], "c5": [True, True, True, True]}


def reach(decoder: nn.Module, level: str) -> int:
    """Return how many output positions one value of a level changes, with nothing bent."""
    pyramid = maps_of(96, 96)
    decoder = ready(decoder, pyramid)
    for part in decoder.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU):
                setattr(part, name, nn.Identity())
    moved = getattr(pyramid, level).clone()
    rows, columns = moved.shape[-2:]
    moved[:, :, rows // 2, columns // 2] += 10
    with torch.no_grad():
        change = decoder(pyramid._replace(**{level: moved})) - decoder(pyramid)
    return int((change[0].abs().amax(0) > 1e-4).sum())


@pytest.mark.parametrize(
    ("make", "level", "positions"),
    [
        (MultiPathDecoder, "c1", 1),
        (MultiPathDecoder, "c2", 16),  # ×2: two halves beside each position, along both sides
        (SummedPathDecoder, "c1", 1),
        (SegFormerDecoder, "c2", 1),
        (FPNDecoder, "c2", 9),
    ],
)
def test_only_the_pyramid_network_looks_at_neighbours(make, level, positions):
    assert reach(make(OUT_CHANNELS, 3, width=5), level) == positions


def shuffled_in_cells(map_: Tensor, cells: tuple[int, int]) -> Tensor:
    """Change the places of positions inside of each cell of a coarser grid."""
    batch, channels, height, width = map_.shape
    rows, columns = height // cells[0], width // cells[1]
    split = map_.view(batch, channels, cells[0], rows, cells[1], columns)
    flat = split.permute(0, 1, 2, 4, 3, 5).flatten(4)
    torch.manual_seed(5)
    mixed = flat[..., torch.randperm(rows * columns)].unflatten(4, (rows, columns))
    return mixed.permute(0, 1, 2, 4, 3, 5).reshape(map_.shape)


@pytest.mark.parametrize(("level", "blind"), [("c5", 4), ("c4", 3), ("c3", 2), ("c2", 1)])
def test_what_went_through_a_grid_has_lost_its_place(level, blind):
    pyramid = maps_of(64, 96)
    decoder = ready(MultiPathDecoder(OUT_CHANNELS, 3, width=6), pyramid)
    through = ThroughGrid(decoder, level).eval()
    grid = tuple(getattr(pyramid, level).shape[-2:])
    with torch.no_grad():
        for name in Pyramid._fields[:blind]:
            moved = pyramid._replace(**{name: shuffled_in_cells(getattr(pyramid, name), grid)})
            assert not close(decoder(moved), decoder(pyramid), 1e-3)
            assert close(through(moved), through(pyramid))
        for name in Pyramid._fields[blind:]:
            moved = pyramid._replace(**{name: getattr(pyramid, name).flip(-1)})
            assert not close(through(moved), through(pyramid), 1e-3), f"{name} is gone"


@pytest.mark.parametrize("level", ["c5", "c3"])
def test_through_a_grid_means_averaged_by_hand(level):
    pyramid, seen = maps_of(64, 96), []  # sides that halve without a rest
    decoder = MultiPathDecoder(OUT_CHANNELS, 3, width=6).eval()
    decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ThroughGrid(decoder, level).eval()(pyramid)
    rows, columns = getattr(pyramid, level).shape[-2:]
    for before, after in zip(pyramid, seen[0], strict=True):
        height, width = before.shape[-2:]
        if height <= rows:
            assert torch.equal(after, before)
            continue
        cells = before.double().numpy()
        cells = cells.reshape(2, -1, rows, height // rows, columns, width // columns)
        expected = enlarged(cells.mean((3, 5)), (height, width))
        np.testing.assert_allclose(after.numpy(), expected, atol=1e-5)


def test_through_the_finest_grid_nothing_is_lost():
    pyramid = maps_of(33, 65)
    decoder = ready(MultiPathDecoder(OUT_CHANNELS, 3, width=6), pyramid)
    with torch.no_grad():
        assert torch.equal(ThroughGrid(decoder, "c1")(pyramid), decoder(pyramid))


@pytest.mark.parametrize("level", ["c6", "C5", ""])
def test_there_are_five_grids(level):
    with pytest.raises(ValueError, match=f"Expected a name among c1…c5, got '{level}'"):
        ThroughGrid(MultiPathDecoder(OUT_CHANNELS, 3, width=4), level)


def test_a_decoder_says_its_channels():
    with pytest.raises(TypeError, match=r"Expected a decoder with in_channels, got Identity\."):
        ThroughGrid(nn.Identity(), "c5")


def test_segformers_linear_layers_are_one_sum_of_projections():
    """Nothing bends before the fusion, so each level could be fused on its own grid."""
    pyramid = maps_of(65, 97)
    model = ready(SegFormerDecoder(OUT_CHANNELS, 4, width=6), pyramid)
    conv, norm, relu = model.fuse
    with torch.no_grad():
        parts = []
        for linear, block, map_ in zip(
            model.linears, conv.weight.split(6, dim=1), pyramid[1:], strict=True
        ):
            small = torch.einsum("oc,bchw->bohw", block[:, :, 0, 0], linear(map_))
            parts.append(F.interpolate(small, pyramid.c2.shape[-2:], mode="bilinear"))
        assert close(model.head(relu(norm(sum(parts)))), model(pyramid))


@pytest.mark.parametrize("size", SIDES, ids=str)
def test_any_size(size):
    pyramid = maps_of(*size)
    for makers, goal in ((ON_C1, pyramid.c1), (ON_C2, pyramid.c2)):
        for make in makers:
            decoder = make(OUT_CHANNELS, 3, width=4)
            assert decoder(pyramid).shape == (2, 3, *goal.shape[-2:])
            filled = Segmenter(nn.Identity(), decoder).decode(pyramid, size)
            assert filled.shape == (2, 3, *size)


@pytest.mark.parametrize("make", ON_C1 + ON_C2)
def test_maps_of_two_batches_are_refused(make):
    mixed = maps_of(64, 96)._replace(c4=torch.rand(1, 256, 4, 6))
    with pytest.raises(ValueError, match=r"one batch, got c1 of 2 images and c4 of 1"):
        make(OUT_CHANNELS, 3, width=4)(mixed)


@pytest.mark.parametrize("make", [*ON_C1, FPNDecoder])
def test_one_value_cannot_be_normalised(make):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        make(OUT_CHANNELS, 3, width=4).train()(maps_of(32, 32, batch=1))


def test_a_projection_begins_a_path():
    torch.manual_seed(0)
    map_ = torch.randn(3, 7, 5, 4)
    layers = projection(7, 6)
    layers(map_)
    expected = projected(layers.eval(), map_.double().numpy())
    np.testing.assert_allclose(layers(map_).detach().numpy(), expected, atol=1e-5)


def test_the_opponent_has_more_parameters_and_the_rest_as_many():
    built = {name: t.decoder(OUT_CHANNELS, 7, **t.settings) for name, t in TRIALS.items()}
    many = count_parameters(built["many paths"])
    assert count_parameters(built["one path"]) > 2 * many
    for name, decoder in built.items():
        if name.startswith(("through", "without")):
            assert count_parameters(decoder) == many, name
    pyramid = maps_of(128, 128, batch=1)
    work = {name: count_macs(decoder, pyramid) for name, decoder in built.items()}
    assert work["through c5's grid"] == work["many paths"] == work["without c3"]
    assert work["SegFormer head"] < 0.4 * work["many paths"]
    for place, name in enumerate(Pyramid._fields):
        assert built[f"without {name}"].missing == (name,)
        if name != "c1":
            assert built[f"through {name}'s grid"].place == place
