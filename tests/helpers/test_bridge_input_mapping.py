"""Mappers, fusions and shorter codes, against plain sums, numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor, nn

from helpers import scenes
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
    crop_square,
    overlap,
    own_pixels,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, ResNet18Encoder, Segmenter
from helpers.training import minimise

FUSIONS = [ConcatFusion, AddFusion, FiLMFusion]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def maps(batch: int = 2, side: int = 16) -> Pyramid:
    sides = [side >> k for k in range(5)]
    return Pyramid(*(torch.rand(batch, c, s, s) for c, s in zip(OUT_CHANNELS, sides, strict=True)))


def pointing(fusion: type[nn.Module] = FiLMFusion) -> PointingDecoder:
    return PointingDecoder(OUT_CHANNELS, 1, LinearMapper(5, 4), 4, fusion, width=6).eval()


def spread(count: int, features: int, rank: int | None = None) -> Tensor:
    """Return vectors whose variance falls from direction to direction, none of them an axis."""
    rank = rank or features
    scale = 0.8 ** torch.arange(rank, dtype=torch.float32)
    turn = torch.linalg.qr(torch.randn(features, features))[0][:rank]
    return 3 + (torch.randn(count, rank) * scale) @ turn


# --- standardising


def test_standardised_vectors_are_numpys():
    vectors = torch.randn(50, 7) * torch.logspace(-3, 3, 7) + 5
    standard = Standardize(7).fit(vectors)
    known = vectors.double().numpy()
    expected = (known - known.mean(0)) / known.std(0, ddof=1)
    assert np.allclose(standard(vectors).numpy(), expected, atol=1e-2)
    one = standard(vectors[:1])
    assert one.shape == (1, 7) and torch.equal(one, standard(vectors)[:1])


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.7, -4.0, 1e4])
def test_a_number_that_never_varies_is_only_shifted(constant):
    vectors = torch.cat([torch.randn(300, 1), torch.full((300, 1), constant)], dim=1)
    standard = Standardize(2).fit(vectors)
    found = standard(torch.tensor([[0.0, constant + 2.0]]))[0, 1]
    assert abs(float(found) - 2) < 0.01


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_a_small_spread_is_none_of_rounding(unit):
    vectors = unit * torch.randn(50, 2)
    assert torch.allclose(Standardize(2).fit(vectors)(vectors).std(0), torch.ones(2), atol=1e-3)


def test_units_do_not_matter_after_standardising():
    vectors = torch.randn(30, 4)
    metres, millimetres = (Standardize(4).fit(v)(v) for v in (vectors, 1000 * vectors))
    assert torch.allclose(metres, millimetres, atol=1e-4)


def test_before_fit_nothing_changes():
    query = torch.randn(3, 4)
    assert torch.equal(Standardize(4)(query), query)


@pytest.mark.parametrize("vectors", [torch.randn(1, 4), torch.full((3, 4), float("nan"))])
def test_standardize_refuses_what_has_no_deviation(vectors):
    with pytest.raises(ValueError, match=r"Expected two vectors or more, all finite"):
        Standardize(4).fit(vectors)


# --- mappers


def test_linear_and_mlp_are_plain_sums():
    query = torch.randn(3, 5)
    linear, mlp = LinearMapper(5, 4), MLPMapper(5, 4, hidden=7)
    assert torch.allclose(linear(query), query @ linear.linear.weight.T + linear.linear.bias)
    inner = np.maximum(0, (query @ mlp.enter.weight.T + mlp.enter.bias).detach().numpy())
    expected = inner @ mlp.leave.weight.detach().numpy().T + mlp.leave.bias.detach().numpy()
    assert np.allclose(mlp(query).detach().numpy(), expected, atol=1e-5)


def test_without_its_bend_an_mlp_is_one_linear_map():
    mlp = MLPMapper(5, 4, hidden=7)
    one = nn.Linear(5, 4)
    query = 10 * torch.randn(20, 5)
    with torch.no_grad():
        one.weight.copy_(mlp.leave.weight @ mlp.enter.weight)
        one.bias.copy_(mlp.leave.weight @ mlp.enter.bias + mlp.leave.bias)
    assert not torch.allclose(mlp(query), one(query), atol=1e-2)
    mlp.relu = nn.Identity()
    assert torch.allclose(mlp(query), one(query), atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (5, 9), (48, 33)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_conv_mapper_pools_any_size_to_one_vector(size, batch):
    mapper = ConvMapper(3, 4, width=2)
    picture = torch.rand(batch, 3, *size)
    x = picture
    for conv, norm in ((mapper.layers[i], mapper.layers[i + 1]) for i in (0, 3, 6)):
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        flat = x.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, False, True) + 1e-5).sqrt()
        x = flat.view_as(x) * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = x.clamp(min=0)
    expected = mapper.linear(x.mean(-1).mean(-1))
    assert mapper(picture).shape == (batch, 4)
    assert torch.allclose(mapper(picture), expected, atol=1e-4)


def test_the_conv_mapper_trains_on_a_batch_of_one_as_it_evaluates():
    mapper, picture = ConvMapper(3, 4), torch.rand(1, 3, 8, 8)
    assert torch.equal(mapper.train()(picture), mapper.eval()(picture))


# --- beside the encoder's vector


@pytest.mark.parametrize("size", [(1, 1), (4, 6)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_joined_vector_is_both_side_by_side(size, batch):
    c5, query = torch.randn(batch, 8, *size), torch.randn(batch, 5)
    joined = JoinedVector(8, LinearMapper(5, 4))
    found = joined(c5, query)
    assert found.shape == (batch, 12)
    assert torch.allclose(found[:, :8], c5.flatten(2).sum(2) / (size[0] * size[1]), atol=1e-6)
    assert torch.equal(found[:, 8:], joined.mapper(query))


def test_a_map_is_not_joined_to_a_vector():
    joined = JoinedVector(8, nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match=r"\[B, features\] from the mapper, got \[2, 4, 5, 5\]"):
        joined(torch.randn(2, 8, 1, 1), torch.randn(2, 3, 5, 5))


# --- fusions


def test_concatenating_is_adding():
    x, vector = torch.randn(2, 6, 3, 4), torch.randn(2, 5)
    both, add = ConcatFusion(6, 5), AddFusion(6, 5)
    weight = both.mix.weight[..., 0, 0]
    with torch.no_grad():
        add.project.weight.copy_(weight[:, 6:])
        add.project.bias.copy_(both.mix.bias)
    projected = torch.einsum("oc,bchw->bohw", weight[:, :6], x)
    assert torch.allclose(both(x, vector), add(projected, vector), atol=1e-5)


def test_film_scales_and_shifts_every_channel_of_every_image():
    film, x, vector = FiLMFusion(3, 2), torch.randn(4, 3, 2, 5), torch.randn(4, 2)
    said = vector @ film.predict.weight.T + film.predict.bias
    for image in range(4):
        for channel in range(3):
            factor, shift = 1 + said[image, channel], said[image, 3 + channel]
            expected = factor * x[image, channel] + shift
            assert torch.allclose(film(x, vector)[image, channel], expected, atol=1e-5)


def test_film_of_nothing_changes_nothing():
    film, x = FiLMFusion(3, 2), torch.randn(4, 3, 2, 5)
    nn.init.zeros_(film.predict.bias)
    assert torch.equal(film(x, torch.zeros(4, 2)), x)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_vector_is_the_same_at_all_positions(fusion):
    fuse, x, vector = fusion(3, 2), torch.randn(2, 3, 4, 5), torch.randn(2, 2)
    turned = fuse(x.flip(-1).roll(1, -2), vector)
    assert torch.allclose(turned, fuse(x, vector).flip(-1).roll(1, -2), atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_query_for_several_images_is_refused_and_expanded_is_not(fusion):
    fuse, x, vector = fusion(3, 2), torch.randn(4, 3, 2, 2), torch.randn(1, 2)
    with pytest.raises(ValueError, match=r"Expected one query an image, got 1 for 4\. .*expand"):
        fuse(x, vector)
    one_by_one = torch.cat([fuse(x[i : i + 1], vector) for i in range(4)])
    assert torch.allclose(fuse(x, vector.expand(4, -1)), one_by_one, atol=1e-5)


# --- the decoder


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_query_changes_its_own_image_only(fusion):
    decoder, pyramid, query = pointing(fusion), maps(3), torch.randn(3, 5)
    other = query.clone()
    other[1] += 1
    before, after = decoder(pyramid, query), decoder(pyramid, other)
    assert torch.allclose(before[[0, 2]], after[[0, 2]], atol=1e-6)
    assert not torch.allclose(before[1], after[1], atol=1e-4)


def test_a_segmenter_hands_the_query_on():
    encoder = ResNet18Encoder(weights=None)
    model = Segmenter(encoder, pointing()).eval()
    images, query = torch.randn(2, 3, 33, 65), torch.randn(2, 5)
    with torch.no_grad():
        logits = model(images, query=query)
        small = model.decoder(encoder(images), query)
    assert small.shape == (2, 1, 9, 17) and logits.shape == (2, 1, 33, 65)
    assert torch.allclose(logits, F.interpolate(small, (33, 65), mode="bilinear"), atol=1e-6)
    with pytest.raises(ValueError, match="needs a query"):
        model(images)


def test_a_mapper_of_another_width_is_found_out():
    decoder = PointingDecoder(OUT_CHANNELS, 1, LinearMapper(5, 3), features=4, width=6)
    with pytest.raises(ValueError, match=r"Expected the query as \[B, 4\], got \[2, 3\]"):
        decoder(maps(), torch.randn(2, 5))


def test_a_flattened_picture_is_found_out():
    mapper = ConvMapper(3, 4)
    with pytest.raises(ValueError, match=r"Expected the query as \[B, 3, h, w\], got \[2, 48\]"):
        mapper(torch.rand(2, 3, 4, 4).flatten(1))
    with pytest.raises(TypeError, match=r"got torch.uint8\. .*picture\.float\(\) / 255"):
        mapper(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


# --- pictures and masks of single objects


def test_a_cut_of_the_right_size_is_the_image_itself():
    image = torch.rand(3, 60, 80)
    assert torch.allclose(crop_square(image, (20, 12, 48, 40)), image[:, 10:42, 18:50], atol=1e-5)


@pytest.mark.parametrize("box", [(0, 0, 3, 2), (75, 50, 80, 60), (0, 0, 80, 60), (40, 0, 41, 60)])
@pytest.mark.parametrize("side", [8, 32])
def test_a_cut_has_one_size_wherever_the_box_lies(box, side):
    found = crop_square(torch.full((3, 60, 80), 0.3), box, side)
    assert torch.allclose(found, torch.full((3, side, side), 0.3), atol=1e-5)


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (5, 9, 8, 5)])
def test_an_empty_box_is_refused(box):
    with pytest.raises(ValueError, match="Expected left < right and top < bottom"):
        crop_square(torch.rand(3, 20, 20), box)


def test_boxes_overlap_where_their_pixels_do():
    rng = np.random.default_rng(0)
    for _ in range(300):
        boxes = [np.sort(rng.choice(9, (2, 2), replace=False), 0).T for _ in range(2)]
        drawn = np.zeros((2, 9, 9), bool)
        for part, ((left, right), (top, bottom)) in zip(drawn, boxes, strict=True):
            part[top:bottom, left:right] = True
        one, other = [(left, top, right, bottom) for (left, right), (top, bottom) in boxes]
        assert overlap(one, other) == bool(drawn.all(0).any())


def test_own_pixels_are_those_that_the_scene_counts():
    known = 0
    for index in range(40):
        drawn = scenes.scene(index)
        labels = [scenes.CLASSES.index(each.shape) for each in drawn.objects]
        boxes = [each.box for each in drawn.objects]
        found = own_pixels(torch.from_numpy(drawn.mask), boxes, labels)
        names = [f"{each.color} {each.shape}" for each in drawn.objects]
        for mask, each, name in zip(found, drawn.objects, names, strict=True):
            if mask is not None:
                known += 1
                assert mask.sum() == each.pixels
                if name == drawn.query:
                    assert torch.equal(mask, torch.from_numpy(drawn.query_mask))
    assert known > 100


# --- training


# --- shorter codes


@pytest.mark.parametrize(("count", "features"), [(200, 30), (20, 50)])
def test_pca_is_scikit_learns_up_to_the_sign(count, features):
    vectors = spread(count, features)
    ours, theirs = PCAMapper(features, 6), PCA(6, svd_solver="full")
    kept = ours.fit(vectors)
    expected = theirs.fit_transform(vectors.double().numpy())
    found = ours(vectors).numpy()
    sign = np.sign((found * expected).sum(0))
    assert np.allclose(found * sign, expected, atol=1e-2)
    assert np.allclose(kept.numpy(), theirs.explained_variance_ratio_, atol=1e-4)


def test_pca_directions_are_orthonormal_and_its_codes_uncorrelated():
    vectors = spread(300, 20)
    pca = PCAMapper(20, 5)
    kept = pca.fit(vectors)
    assert torch.allclose(pca.directions.T @ pca.directions, torch.eye(5), atol=1e-4)
    codes = pca(vectors)
    assert codes.mean(0).abs().max() < 1e-4
    correlation = torch.corrcoef(codes.T) - torch.eye(5)
    assert correlation.abs().max() < 1e-2
    assert (kept.diff() <= 0).all() and 0 < kept.sum() < 1


def test_vectors_of_low_rank_come_back_whole():
    vectors = spread(100, 40, rank=3)
    pca = PCAMapper(40, 3)
    assert pca.fit(vectors).sum() > 0.9999
    back = pca(vectors) @ pca.directions.T + pca.mean
    assert torch.allclose(back, vectors, atol=1e-3)
    assert torch.allclose(pca(vectors[:1]), pca(vectors)[:1], atol=1e-6)


@pytest.mark.parametrize("vectors", [torch.randn(4, 9), torch.full((8, 9), float("inf"))])
def test_pca_refuses_too_few_and_infinite_vectors(vectors):
    with pytest.raises(ValueError, match=r"Expected more than 4 vectors, all finite"):
        PCAMapper(9, 4).fit(vectors)


@pytest.mark.parametrize("directions", [0, 10])
def test_pca_refuses_more_directions_than_there_are(directions):
    with pytest.raises(ValueError, match=f"Expected 1 to 9 directions, got {directions}"):
        PCAMapper(9, directions)


def test_an_autoencoder_bends_where_pca_cannot():
    """Points on a circle have one number each, and no single direction keeps them."""
    angle = torch.linspace(-2.5, 2.5, 200)[:, None]
    vectors = torch.cat([angle.cos(), angle.sin()], dim=1)
    variance = vectors.var(0, correction=0).mean()
    pca = PCAMapper(2, 1)
    pca.fit(vectors)
    straight = (pca(vectors) @ pca.directions.T + pca.mean - vectors).square().mean()
    auto = AutoEncoder(2, code=1, hidden=32)
    assert auto.encode(vectors).shape == (200, 1)

    def loss_of(chosen, epoch):
        return F.mse_loss(auto(vectors[chosen]), vectors[chosen])

    minimise(auto, loss_of, 200, epochs=60, lr=0.02)
    with torch.no_grad():
        bent = (auto(vectors) - vectors).square().mean()
    assert straight > 0.2 * variance and bent < 0.5 * straight
    assert torch.equal(auto(vectors), auto.decode(auto.encode(vectors)))
