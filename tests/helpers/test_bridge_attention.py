"""Chapter 04's exports against attention written out, torch's own layers, and properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.chapters.attention import analysis as probe
from helpers import scenes
from helpers.bridges.attention import (
    AveragingReader,
    Finder,
    PixelEmbedding,
    PositionalEncoding2d,
    QueryDecoder,
    QueryReader,
    SelfAttention,
    SpatialGate,
    attention_maps,
    finder_loss,
    presence_and_middle,
    waves,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, Segmenter
from helpers.inspection import count_macs, pyramid_levels

SIZES = [(1, 1), (1, 5), (4, 3), (7, 7)]


def pyramid(height: int = 65, width: int = 97, batch: int = 2) -> Pyramid:
    levels = pyramid_levels(height, width)
    return Pyramid(*(torch.rand(batch, v.channels, v.height, v.width) for v in levels))


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax(QKᵀ/√d)V, one query and one value at a time, in float64."""
    answers = []
    for query in q.double():
        scores = [math.exp((query @ key).item() / math.sqrt(len(query))) for key in k.double()]
        weights = [score / sum(scores) for score in scores]
        answers.append(sum(w * value for w, value in zip(weights, v.double(), strict=True)))
    return torch.stack(answers)


# Gate


@pytest.mark.parametrize("size", SIZES)
def test_a_gate_of_zero_weights_halves_the_map_and_a_bias_opens_it(size):
    gate, x = SpatialGate(6), torch.randn(2, 6, *size)
    nn.init.zeros_(gate.conv.weight)
    for bias, share in [(0.0, 0.5), (30.0, 1.0), (-30.0, 0.0)]:
        nn.init.constant_(gate.conv.bias, bias)
        assert torch.allclose(gate(x), share * x, atol=1e-6)


def test_a_gate_is_one_number_a_position_from_that_position_alone():
    torch.manual_seed(0)
    gate, x = SpatialGate(6), torch.randn(2, 6, 4, 5)
    expected = torch.empty(2, 1, 4, 5)
    for b, y, z in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)):
        score = gate.conv.weight[0, :, 0, 0] @ x[b, :, y, z] + gate.conv.bias[0]
        expected[b, 0, y, z] = 1 / (1 + torch.exp(-score))
    assert torch.allclose(gate.gate(x), expected, atol=1e-6)
    assert torch.allclose(gate(x), expected * x, atol=1e-6)


# Positions


@pytest.mark.parametrize("length", [1, 2, 9, 200])
def test_waves_are_sines_and_cosines_of_slower_and_slower_speed(length):
    found = waves(12, length, torch.device("cpu"))
    for step in range(length):
        for k in range(6):
            angle = step * 0.01 ** (k / 5)
            assert found[k, step] == pytest.approx(math.sin(angle), abs=1e-4)
            assert found[6 + k, step] == pytest.approx(math.cos(angle), abs=1e-4)


def test_no_two_places_get_the_same_code():
    code = PositionalEncoding2d(16)(torch.zeros(1, 16, 40, 60)).flatten(2)[0].T
    distance = torch.cdist(code, code) + 10 * torch.eye(len(code))
    assert distance.min() > 0.1


def test_rows_are_in_the_first_half_and_columns_in_the_second():
    code = PositionalEncoding2d(8)(torch.zeros(1, 8, 5, 7))[0]
    assert torch.equal(code[:4], code[:4, :, :1].expand(-1, -1, 7))
    assert torch.equal(code[4:], code[4:, :1].expand(-1, 5, -1))
    assert torch.equal(code[:4, :, 0], code[4:, 0, :5])  # a row counts like a column


def test_a_place_has_the_same_code_on_every_map_and_the_map_is_only_shifted():
    position = PositionalEncoding2d(8)
    x = torch.randn(2, 8, 6, 9)
    large = position(torch.zeros(1, 8, 20, 30))
    assert torch.allclose(position(x), x + large[..., :6, :9], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 6, 63])
def test_channels_that_four_does_not_divide_are_refused(channels):
    with pytest.raises(ValueError, match=f"4 divides, got {channels}"):
        PositionalEncoding2d(channels)


# Self-attention


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_self_attention_is_softmax_of_scores_times_values(size, heads):
    torch.manual_seed(heads)
    layer, x = SelfAttention(8, heads), torch.randn(2, 8, *size)
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = layer.to_qkv(layer.norm(tokens)).chunk(3, dim=2)
    found = torch.stack(
        [
            torch.cat(
                [
                    written_out(*(part[b].chunk(heads, dim=1)[h] for part in (q, k, v)))
                    for h in range(heads)
                ],
                dim=1,
            )
            for b in range(2)
        ]
    ).float()
    expected = (tokens + layer.out(found)).transpose(1, 2).reshape(x.shape)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_self_attention_is_torchs_own_with_the_same_weights():
    torch.manual_seed(0)
    layer, torchs = SelfAttention(8, heads=2), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        torchs.in_proj_weight.copy_(layer.to_qkv.weight)
        torchs.in_proj_bias.copy_(layer.to_qkv.bias)
        torchs.out_proj.load_state_dict(layer.out.state_dict())
    x = torch.randn(3, 8, 4, 5)
    tokens = layer.norm(x.flatten(2).transpose(1, 2))
    expected = x + torchs(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_shuffled_positions_come_out_shuffled_unless_they_are_told_their_place():
    torch.manual_seed(0)
    blind = SelfAttention(8)
    told = nn.Sequential(PositionalEncoding2d(8), blind)
    x, order = torch.randn(2, 8, 4, 6), torch.randperm(24)

    def shuffle(map_: torch.Tensor) -> torch.Tensor:
        return map_.flatten(2)[:, :, order].reshape(map_.shape)

    assert torch.allclose(blind(shuffle(x)), shuffle(blind(x)), atol=1e-5)
    difference = (told(shuffle(x)) - shuffle(told(x))).abs().mean()
    assert difference > 0.1


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="3 heads divide, got 8"):
        SelfAttention(8, heads=3)
    with pytest.raises(ValueError, match="width that 5 heads divide, got 8"):
        QueryReader(6, queries=2, width=8, heads=5)


@pytest.mark.parametrize("side", [4, 8, 16])
def test_work_has_a_part_that_grows_with_the_square_of_the_positions(side):
    n, c = side**2, 16
    linear = 4 * n * c**2  # queries, keys, values, out
    assert count_macs(SelfAttention(c), torch.rand(1, c, side, side)) == linear + 2 * n**2 * c


# Queries


def test_a_reader_looks_where_its_map_says():
    torch.manual_seed(0)
    reader, x = QueryReader(6, queries=3, width=8, heads=2).eval(), torch.randn(2, 6, 4, 5)
    maps = attention_maps(reader, x)
    assert maps.shape == (2, 3, 4, 5)
    assert (maps >= 0).all() and torch.allclose(maps.sum((2, 3)), torch.ones(2, 3), atol=1e-5)
    # The map against scores by hand, from the layer's parts.
    layer = reader.layers.layers[0]
    asked = reader.queries.expand(2, -1, -1)
    normed = layer.norm1(asked)
    asked = layer.norm2(asked + layer.self_attn(normed, normed, normed)[0])
    attention, tokens = layer.multihead_attn, reader.tokens(x)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q = (asked @ weight[:8].T + bias[:8]).unflatten(2, (2, 4)).transpose(1, 2)
    k = (tokens @ weight[8:16].T + bias[8:16]).unflatten(2, (2, 4)).transpose(1, 2)
    expected = (q @ k.transpose(2, 3) / 2).softmax(3).mean(1).unflatten(2, (4, 5))
    assert torch.allclose(maps, expected, atol=1e-5)


def test_looking_leaves_no_hook_and_no_change():
    reader, x = QueryReader(6, queries=3, width=8).eval(), torch.randn(2, 6, 4, 5)
    before = reader(x)
    attention_maps(reader, x)
    with pytest.raises(ValueError, match="Expected x"):
        attention_maps(reader, x[:, :5])
    assert not any(part._forward_pre_hooks for part in reader.modules())
    assert torch.equal(reader(x), before)


def test_a_reader_knows_places_and_without_encoding_does_not():
    torch.manual_seed(0)
    reader, x = QueryReader(6, queries=3, width=8).eval(), torch.randn(2, 6, 4, 5)
    turned = x.flip(2)
    assert (reader(x) - reader(turned)).abs().max() > 1e-3
    reader.position = nn.Identity()
    assert torch.allclose(reader(x), reader(turned), atol=1e-5)


def test_averaging_is_attending_with_the_same_weight_everywhere():
    torch.manual_seed(0)
    attending = QueryReader(6, queries=3, width=8).eval()
    averaging = AveragingReader(6, queries=3, width=8).eval()
    averaging.load_state_dict(attending.state_dict())
    x = torch.randn(2, 6, 4, 5)
    assert (attending(x) - averaging(x)).abs().max() > 1e-4
    with torch.no_grad():  # queries that are zero score every key alike
        for reader in (attending, averaging):
            attention = reader.layers.layers[0].multihead_attn
            attention.in_proj_weight[:8] = 0
            attention.in_proj_bias[:8] = 0
    assert torch.allclose(attention_maps(attending, x), torch.tensor(1 / 20), atol=1e-6)
    assert torch.allclose(attending(x), averaging(x), atol=1e-5)


def test_an_averaging_reader_looks_everywhere_alike():
    torch.manual_seed(0)
    reader, x = AveragingReader(6, queries=3, width=8).eval(), torch.randn(2, 6, 4, 5)
    assert torch.allclose(attention_maps(reader, x), torch.tensor(1 / 20), atol=1e-6)
    order = torch.randperm(20)
    reader.position = nn.Identity()
    shuffled = x.flatten(2)[..., order].view_as(x)
    assert torch.allclose(reader(x), reader(shuffled), atol=1e-5)


def test_no_image_sees_another():
    torch.manual_seed(0)
    reader, layer = QueryReader(8, queries=3, width=8).eval(), SelfAttention(8).eval()
    x = torch.randn(2, 8, 4, 5)
    changed = torch.stack([x[0], torch.randn(8, 4, 5)])
    for look in (reader, layer, lambda map_: attention_maps(reader, map_)):
        assert torch.allclose(look(x)[0], look(changed)[0], atol=1e-6)
        assert (look(x)[1] - look(changed)[1]).abs().max() > 1e-4


# Masks


def test_logits_are_dot_products_of_pixels_and_classes():
    torch.manual_seed(0)
    decoder, maps = QueryDecoder(OUT_CHANNELS, 5, width=8).eval(), pyramid()
    logits = decoder(maps)
    pixels, classes = decoder.pixels(maps), decoder.head(decoder.reader(maps.c4))
    assert logits.shape == (2, 5, *maps.c2.shape[-2:])
    for b, k, y, x in [(0, 0, 0, 0), (1, 4, 3, 7), (0, 2, 16, 24)]:
        expected = pixels[b, :, y, x] @ classes[b, k] / 8**0.5
        assert torch.allclose(logits[b, k, y, x], expected, atol=1e-5)


def test_with_classes_that_are_always_the_same_it_is_a_1x1_convolution():
    torch.manual_seed(0)
    decoder, maps = QueryDecoder(OUT_CHANNELS, 5, width=8).eval(), pyramid()
    nn.init.zeros_(decoder.head.weight)
    head = nn.Conv2d(8, 5, 1, bias=False)
    nn.init.constant_(head.weight, 0)
    with torch.no_grad():
        head.weight += decoder.head.bias[:, None, None] / 8**0.5
    assert torch.allclose(decoder(maps), head(decoder.pixels(maps)), atol=1e-5)


def test_pixel_vectors_are_the_sum_of_projected_levels():
    torch.manual_seed(0)
    pixels, maps = PixelEmbedding(OUT_CHANNELS, width=8).eval(), pyramid(64, 96)
    total = torch.zeros(2, 8, 16, 24)
    for project, map_ in zip(pixels.project, maps[1:], strict=True):
        enlarged = F.interpolate(map_, size=(16, 24), mode="bilinear")  # the order does not matter
        total += torch.einsum("oc,bchw->bohw", project.weight[:, :, 0, 0], enlarged)
    expected = F.conv2d(
        (total / math.sqrt(1 + pixels.norm.eps)).relu(),
        pixels.conv.weight,
        pixels.conv.bias,
        padding=1,
    )
    assert torch.allclose(pixels(maps), expected, atol=1e-4)


def test_a_decoder_with_either_reader_learns_a_mask():
    torch.manual_seed(0)
    maps = pyramid(32, 64)
    target = torch.arange(2 * 8 * 16).view(2, 8, 16) * 3 // (2 * 8 * 16)
    for reader in (QueryReader, AveragingReader):
        decoder = QueryDecoder(OUT_CHANNELS, 3, width=16, reader=reader)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
        losses = []
        for _ in range(40):
            losses.append(F.cross_entropy(decoder(maps), target))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.3 * losses[0]


def test_a_segmenter_fills_images_of_any_size():
    class Encoder(nn.Module):
        def forward(self, x: torch.Tensor) -> Pyramid:
            return pyramid(*x.shape[-2:], batch=len(x))

    model = Segmenter(Encoder(), QueryDecoder(OUT_CHANNELS, 4, width=8)).eval()
    for size in [(32, 32), (75, 100), (180, 240)]:
        assert model(torch.rand(1, 3, *size)).shape == (1, 4, *size)


# Finding


def test_presence_and_middle_by_hand():
    masks = torch.zeros(2, 4, 8, dtype=torch.long)
    masks[0, 1:3, 2:4] = 2
    masks[1, 0, 7] = 1
    masks[1, 3, 0] = 1
    truth = presence_and_middle(masks, 4)
    assert truth.shape == (2, 3, 3)
    assert torch.allclose(truth[0, 1], torch.tensor([1, 3 / 8, 2 / 4]))
    assert torch.allclose(truth[1, 0], torch.tensor([1, 0.5, 0.5]))
    absent = [(0, 0), (0, 2), (1, 1), (1, 2)]
    assert all(torch.equal(truth[b, k], torch.zeros(3)) for b, k in absent)


def test_mirrored_masks_have_mirrored_middles():
    torch.manual_seed(0)
    masks = torch.randint(0, 3, (4, 9, 13))
    truth, mirrored = presence_and_middle(masks, 3), presence_and_middle(masks.flip(2), 3)
    assert torch.allclose(truth[..., 1] + mirrored[..., 1], torch.ones(4, 2), atol=1e-6)
    assert torch.allclose(truth[..., 2], mirrored[..., 2], atol=1e-6)


def test_a_right_answer_costs_nothing_and_absent_classes_have_no_place():
    truth = presence_and_middle(torch.randint(0, 2, (3, 6, 6)), 3)  # class 2 is nowhere
    said = truth.clone()
    said[..., 0] = 60 * truth[..., 0] - 30
    assert finder_loss(said, truth) == pytest.approx(0, abs=1e-6)
    elsewhere = said.clone()
    elsewhere[:, 1, 1:] = 0.9
    assert finder_loss(elsewhere, truth) == finder_loss(said, truth)
    elsewhere[:, 0, 1] += 0.1
    assert finder_loss(elsewhere, truth) == pytest.approx(0.3, abs=1e-5)


def test_a_wrong_answer_costs_its_cross_entropy():
    nothing = torch.zeros(2, 5, 3)
    assert finder_loss(nothing, nothing) == pytest.approx(math.log(2), abs=1e-6)
    said = nothing.clone()
    said[0, 0, 0] = 2  # "it is there", of a class that is not
    expected = (math.log(1 + math.e**2) + 9 * math.log(2)) / 10
    assert finder_loss(said, nothing) == pytest.approx(expected, abs=1e-6)


def test_a_finder_says_places_inside_the_image():
    torch.manual_seed(0)
    finder = Finder(QueryReader(6, queries=3, width=8))
    x = 100 * torch.randn(2, 6, 4, 5)
    said = finder(x)
    assert said.shape == (2, 3, 3)
    linear = finder.reader(x) @ finder.answer.weight.T + finder.answer.bias
    assert torch.allclose(said[..., 0], linear[..., 0], atol=1e-5)  # a logit: no sigmoid
    assert (said[..., 1:] >= 0).all() and (said[..., 1:] <= 1).all()


# The probe


def test_attention_on_the_object_is_best_and_everywhere_is_chance():
    masks = torch.zeros(1, 128, 128, dtype=torch.long)
    masks[0, 16:32, 32:48] = 1  # just the cell in row 1, column 2
    looks = torch.zeros(1, 6, 8, 8)
    looks[0, 0, 1, 2] = 1
    found = probe.on_objects(looks, masks, first=1)
    assert found["attention"]["disc"] == found["best"]["disc"] == 100
    assert found["chance"]["disc"] == pytest.approx(100 / 64, abs=0.01)
    even = probe.on_objects(torch.full((1, 6, 8, 8), 1 / 64), masks, first=1)
    assert even["attention"]["disc"] == even["chance"]["disc"] == even["largest"]["disc"]


def test_scores_by_hand():
    truth = torch.tensor([[[1, 0.5, 0.5], [1, 0.2, 0.2], [0, 0, 0], [0, 0, 0]]])
    said = torch.tensor([[[3, 0.5, 0.6], [-1, 0.2, 0.2], [-3, 0.9, 0.9], [-1, 0, 0]]])
    found = probe.scores(said, truth)  # half of what is there, all of what is not
    assert found == {"presence": 75.0, "middle": pytest.approx(0.1 * scenes.SIZE / 2, abs=0.01)}


def test_a_cover_fades_one_place_to_the_mean_and_has_no_edge():
    image = torch.rand(1, 3, 128, 128).round()  # far from its mean everywhere
    mean = image.mean((2, 3), keepdim=True)
    found = probe.cover(image, torch.tensor([40, 90]))
    left = ((found - mean).abs() / (image - mean).abs()).mean((0, 1))  # 0 covered, 1 as it was
    assert left[40, 90] == pytest.approx(0, abs=1e-4)
    assert left[40 + probe.SIDE, 90] > 0.98 and left[90, 40] > 0.98
    assert left.diff(dim=0).abs().max() < 0.1 and left.diff(dim=1).abs().max() < 0.1


class OnePlace(nn.Module):
    """A finder by hand: query k reads position 9·k of the map and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = self
        self.queries = torch.zeros(6, 1)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        marks = torch.arange(x.shape[2] * x.shape[3]).float()
        return torch.stack([x.mean(1).flatten(1), marks.expand(len(x), -1)], dim=2)

    def layers(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        wanted = 9 * torch.arange(6)[:, None] == tokens[:, None, :, 1]
        return (wanted * tokens[:, None, :, 0]).sum(2)[..., None]

    def answer(self, found: torch.Tensor) -> torch.Tensor:
        return torch.cat([10 * found - 1, found, found], dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(self.layers(self.queries[None], self.tokens(x)))


def test_dropping_what_is_read_is_the_only_thing_that_counts():
    maps, truth = torch.rand(3, 2, 8, 8) + 1, torch.ones(3, 6, 3)
    looks = torch.zeros(3, 6, 64)
    for k in range(6):
        looks[:, k, 9 * k : 9 * k + 4] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    found = probe.dropped(OnePlace(), maps, looks.view(3, 6, 8, 8), truth, seed=0)
    assert found["number"] == 18
    assert found["own"]["lost"] == 100 and found["own"]["fall"] > 5
    for other in ("another", "anywhere"):
        assert found[other] == {"fall": 0, "size": 0, "lost": 0}


def test_covering_what_is_read_counts_most(monkeypatch):
    class Colors(nn.Module):  # an "encoder" whose c4 is how far from grey a cell is
        def forward(self, x: torch.Tensor) -> Pyramid:
            c4 = F.avg_pool2d((x - x.mean((2, 3), keepdim=True)).abs(), 16)
            return Pyramid(*[c4] * 5)

    monkeypatch.setattr(probe, "ResNet18Encoder", Colors)
    looks = torch.zeros(5, 6, 64)
    for k in range(6):
        looks[:, k, 9 * k] = 1
    found = probe.covered(OnePlace(), looks.view(5, 6, 8, 8), torch.ones(5, 6, 3), seed=0)
    assert found["number"] > 5
    assert found["own"]["fall"] > 5 * found["another"]["size"] > 0
    assert found["own"]["fall"] > 5 * found["anywhere"]["size"]
