"""Chapter 11's module and its scores against PyTorch's layers, brute force and properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from contract.builders import pyramid
from torch import Tensor, nn

from experiments.chapters.sequences import trials as measured
from helpers import scenes
from helpers.bridges.sequences import (
    END,
    PAD,
    START,
    AverageTokens,
    CaptionTransformer,
    CausalAttention,
    CrossAttention,
    PositionTokens,
    StateGRU,
    Vocabulary,
    beam_search,
    caption_loss,
    greedy,
    log_likelihood,
    next_word,
    place_code,
    unroll,
    waves,
)
from helpers.encoder import OUT_CHANNELS, Pyramid

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
DECODERS = (StateGRU, CaptionTransformer)
each_decoder = pytest.mark.parametrize("kind", DECODERS)


def make(kind: type[nn.Module], words: int = 11, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return kind(OUT_CHANNELS, words, width=8, **options).eval()


def some(batch: int = 3, seed: int = 1) -> Pyramid:
    torch.manual_seed(seed)
    return pyramid(batch, 64, 96)


def sentences(batch: int = 3, length: int = 7, words: int = 11) -> Tensor:
    """Random words, START first; the last row ends early and is padded."""
    torch.manual_seed(2)
    rows = torch.randint(3, words, (batch, length))
    rows[:, 0], rows[:, -1] = START, END
    rows[-1, length - 3] = END
    rows[-1, length - 2 :] = PAD
    return rows


# --- words


def test_captions_come_back_and_are_padded_to_the_longest() -> None:
    vocabulary = Vocabulary(scenes.VOCABULARY)
    captions = [scenes.scene(index).caption for index in range(5_000, 5_012)]
    words = vocabulary.encode(captions)
    assert vocabulary.decode(words) == vocabulary.decode(words[:, 1:]) == captions
    longest = max(len(caption.split()) for caption in captions)
    assert words.shape == (12, longest + 2) and words.dtype == torch.int64
    assert (words[:, 0] == START).all() and ((words == END).sum(1) == 1).all()
    assert len(vocabulary) == len(scenes.VOCABULARY) + 3 > words.max()


def test_what_follows_the_end_is_not_decoded() -> None:
    vocabulary = Vocabulary(["a", "disc"])
    assert vocabulary.decode(torch.tensor([[3, 4, END, 3, 3], [3, PAD, 4, 4, 4]])) == [
        "a disc",
        "a disc disc disc",
    ]


@pytest.mark.parametrize(
    ("captions", "error", "message"),
    [
        ("a disc", TypeError, "got a str"),
        ([], ValueError, "got none"),
        (["a cube", "a disc"], ValueError, r"got \['cube'\]\. Add them"),
        (["<end>"], ValueError, r"got \['<end>'\]"),
    ],
)
def test_captions_that_cannot_be_encoded(
    captions: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Vocabulary(["a", "disc"]).encode(captions)  # type: ignore[arg-type]


def test_a_vocabulary_has_no_word_twice() -> None:
    for words in (["a", "a"], ["a", "<pad>"]):
        with pytest.raises(ValueError, match="distinct"):
            Vocabulary(words)


# --- layers, against PyTorch's


def test_unrolled_by_hand_a_cell_is_torchs_gru() -> None:
    torch.manual_seed(0)
    cell, layer = nn.GRUCell(5, 7), nn.GRU(5, 7, batch_first=True)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    inputs, state = torch.randn(3, 6, 5), torch.randn(3, 7)
    assert torch.allclose(unroll(cell, inputs, state), layer(inputs, state[None])[0], **CLOSE)


def reference(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.MultiheadAttention:
    """PyTorch's attention with the weights of one of ours."""
    theirs = nn.MultiheadAttention(layer.width, layer.heads, batch_first=True)
    state = {"in_proj_weight": weight, "in_proj_bias": bias}
    state |= {f"out_proj.{name}": value for name, value in layer.out.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs.eval()


def test_cross_attention_is_torchs_and_so_are_its_weights() -> None:
    torch.manual_seed(0)
    ours = CrossAttention(8, heads=2)
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 9, 8)
    parts = ours.to_query, ours.to_key_value
    theirs = reference(
        ours, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    )
    found, weights = theirs(ours.norm(x), memory, memory)
    assert torch.allclose(ours(x, memory), x + found, **CLOSE)
    assert torch.allclose(ours.weights(x, memory), weights, **CLOSE)


def test_causal_attention_is_torchs_with_a_mask() -> None:
    torch.manual_seed(0)
    ours, x = CausalAttention(8, heads=2), torch.randn(3, 5, 8)
    theirs = reference(ours, ours.to_qkv.weight, ours.to_qkv.bias)
    normed, ahead = ours.norm(x), torch.ones(5, 5).triu(1).bool()
    found = theirs(normed, normed, normed, attn_mask=ahead)[0]
    assert torch.allclose(ours(x), x + found, **CLOSE)


# --- tokens


def test_places_of_c4_and_c5_are_told_in_one_unit() -> None:
    # 4 × 4 cells of c5, stride 32: their middles are corners between cells of c4.
    coarse = place_code(4, 4, 32, 16, torch.device("cpu")).view(4, 4, 16)
    expected = waves(torch.tensor([1.0, 3.0, 5.0, 7.0]), 8)  # in units of 16 pixels
    assert torch.allclose(coarse[:, 2, :8], expected)
    assert torch.allclose(coarse[2, :, 8:], expected)
    fine = place_code(8, 8, 16, 16, torch.device("cpu")).view(8, 8, 16)
    assert torch.allclose(fine[:, 0, :8], waves(torch.arange(8) + 0.5, 8))


def shuffled(maps: Pyramid) -> Pyramid:
    """The same with the positions of c4 and of c5 in another order."""
    torch.manual_seed(5)
    mixed = [
        map_.flatten(2)[..., torch.randperm(map_[0, 0].numel())].view_as(map_) for map_ in maps[3:]
    ]
    return Pyramid(*maps[:3], *mixed)


def test_positions_know_their_places() -> None:
    maps, mixed = some(), shuffled(some())
    for kind, same in {PositionTokens: False, measured.NoPlaces: True}.items():
        torch.manual_seed(0)
        tokens = kind(OUT_CHANNELS, 8)
        found = (tokens(each)[:, :24].sort(1).values for each in (maps, mixed))
        assert torch.allclose(*found, atol=1e-5) == same


def test_averages_leave_out_nothing_but_the_choice_of_positions() -> None:
    one, other = (make(CaptionTransformer, tokens=t) for t in (PositionTokens, AverageTokens))
    for (name, weight), (twin, same) in zip(
        one.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == twin and torch.equal(weight, same)
    tiny, words = pyramid(3, 32, 32), sentences()
    assert tiny.c4[0, 0].numel() == 4 and tiny.c5[0, 0].numel() == 1
    maps = Pyramid(*tiny[:3], tiny.c4[..., :1, :1], tiny.c5)  # one position a map
    assert torch.equal(one.encode(maps), other.encode(maps))
    maps = some()
    assert one.encode(maps).shape == other.encode(maps).shape
    assert torch.allclose(one.encode(maps)[:, :24].mean(1), other.encode(maps)[:, 5], **CLOSE)
    assert not torch.allclose(one(maps, words), other(maps, words), **CLOSE)
    weights = other.attention_weights(other.encode(maps), words)
    assert torch.allclose(weights[..., :24], weights[..., :1].expand_as(weights[..., :24]))


# --- decoders


@each_decoder
def test_step_by_step_is_teacher_forcing(kind: type[nn.Module]) -> None:
    decoder, maps, words = make(kind), some(), sentences()
    together = decoder(maps, words)
    for t in range(1, words.shape[1] + 1):
        alone = decoder(maps, words[:, :t])[:, -1]
        assert torch.allclose(alone, together[:, t - 1], **CLOSE)


@each_decoder
def test_no_word_sees_its_future_and_every_one_its_past(kind: type[nn.Module]) -> None:
    decoder, maps, words = make(kind), some(), sentences()
    before = decoder(maps, words)
    for t in range(words.shape[1]):
        changed = words.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        moved = (decoder(maps, changed) - before).abs().amax((0, 2))
        assert (moved[:t] < 1e-6).all(), f"word {t} moves what was said before it"
        assert moved[t] > 1e-6


@each_decoder
def test_an_image_alone_is_as_in_its_batch(kind: type[nn.Module]) -> None:
    decoder, maps, words = make(kind), some(), sentences()
    alone = decoder(Pyramid(*(map_[1:2] for map_ in maps)), words[1:2])
    assert torch.allclose(alone, decoder(maps, words)[1:2], **CLOSE)


@each_decoder
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.ones(2, 5, dtype=torch.long), ValueError),  # of another batch
        (torch.ones(3, 0, dtype=torch.long), ValueError),  # not even START
        (torch.ones(3, 5), TypeError),
    ],
)
def test_words_that_do_not_fit(kind: type[nn.Module], bad: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="Expected"):
        make(kind)(some(), bad)


# --- the loss


@each_decoder
def test_padding_never_changes_a_loss_or_a_gradient(kind: type[nn.Module]) -> None:
    maps, words = some(), sentences()
    found = []
    for rows in (words, F.pad(words, (0, 4), value=PAD)):
        decoder = make(kind)
        loss = caption_loss(decoder(maps, rows[:, :-1]), rows[:, 1:])
        loss.backward()
        found.append([loss, *(each.grad for each in decoder.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, **CLOSE)


def test_the_loss_is_the_mean_over_real_words() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[3, 4, END], [4, END, PAD]])
    real = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    by_hand = [-logits[b, t].log_softmax(0)[targets[b, t]] for b, t in real]
    assert torch.allclose(caption_loss(logits, targets), torch.stack(by_hand).mean())
    with pytest.raises(ValueError, match=r"got \[2, 3, 5\] and \[2, 2\]\. The decoder reads"):
        caption_loss(logits, targets[:, 1:])


# --- writing


@each_decoder
def test_one_beam_is_greedy(kind: type[nn.Module]) -> None:
    for seed in range(5):
        decoder, maps = make(kind, seed=seed), some(seed=seed)
        assert torch.equal(beam_search(decoder, maps, beams=1, longest=6), greedy(decoder, maps, 6))


@each_decoder
def test_with_enough_beams_no_sentence_is_likelier(kind: type[nn.Module]) -> None:
    decoder, maps = make(kind, words=5), some(2)
    said = beam_search(decoder, maps, beams=40, longest=3)
    every = [
        row
        for row in itertools.product((END, 3, 4), repeat=3)  # END only at the end, then PADs
        if END not in row[:-1]
    ]
    every += [(3, END, PAD), (4, END, PAD), (END, PAD, PAD)]
    rows = torch.tensor([(START, *row) for row in every])
    for b in range(2):
        one = Pyramid(*(map_[b : b + 1].expand(len(rows), -1, -1, -1) for map_ in maps))
        likely = log_likelihood(decoder, one, rows)
        assert math.isclose(float(likely.exp().sum()), 1, rel_tol=1e-4)  # all of them, cut at 3
        best = F.pad(said[b], (0, 3 - said.shape[1]), value=PAD)
        assert best.tolist() == list(every[likely.argmax()])


@each_decoder
def test_after_the_end_comes_padding_and_no_sign_before_it(kind: type[nn.Module]) -> None:
    maps = some()
    for seed, search in itertools.product(range(4), (greedy, beam_search)):
        said = search(make(kind, seed=seed, words=5), maps, longest=9)
        for row in said.tolist():
            length = row.index(END) if END in row else len(row)
            assert all(word > END for word in row[:length])
            assert all(word == PAD for word in row[length + 1 :])


@each_decoder
def test_a_decoder_that_knows_nothing_is_right_by_chance(kind: type[nn.Module]) -> None:
    decoder, words = make(kind), sentences()
    head = decoder.head[-1] if kind is CaptionTransformer else decoder.head
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    said = (words[:, 1:] != PAD).sum(1)  # END, too
    chance = -said * math.log(11 - 2)  # neither PAD nor START is ever said
    assert torch.allclose(log_likelihood(decoder, some(), words), chance.float(), **CLOSE)


def test_probabilities_of_the_next_word_sum_to_one() -> None:
    decoder, maps, words = make(StateGRU), some(), sentences()
    for part in (words, words[:, :3]):  # all have ended, none has
        with torch.no_grad():
            following = next_word(decoder, decoder.encode(maps), part).exp()
        assert torch.allclose(following.sum(1), torch.ones(3), **CLOSE)
        assert (following[:, PAD] == float(part is words)).all()
        assert (following[:, START] == 0).all()


def test_fewer_than_one_beam() -> None:
    with pytest.raises(ValueError, match="at least one beam, got 0"):
        beam_search(make(StateGRU), some(), beams=0)


# --- what the experiment asks and counts


def test_what_is_asked_begins_the_caption_and_names_two_that_can_be_seen() -> None:
    taken = 0
    for index in range(5_000, 5_060):
        scene = scenes.scene(index)
        sentence = measured.asked(scene)
        shapes = [each.shape for each in scene.objects]
        single = [each for each in scene.objects if shapes.count(each.shape) == 1]
        if sentence is None:
            visible = sorted(each.pixels for each in single)[-2:]
            assert len(visible) < 2 or visible[0] < 150
            continue
        taken += 1
        assert f"{scene.caption} ".startswith(f"{sentence} ") and " with " not in sentence
        named = [each for each in single if each.shape in sentence.split()]
        assert len(named) == 2 and min(each.pixels for each in named) >= 150
        assert all(each.color in sentence for each in named)
        # The named object's cover, in cells of 16 and of 32 pixels, adds up to its pixels.
        covers = measured.cover(torch.from_numpy(scene.mask), sentence)
        first, second = sorted(named, key=lambda each: sentence.split().index(each.shape))
        for cover, each in zip(covers, (first, second), strict=True):
            assert math.isclose(256 * float(cover[:64].sum()), each.pixels, rel_tol=1e-5)
            assert math.isclose(1024 * float(cover[64:].sum()), each.pixels, rel_tol=1e-5)
    assert 10 < taken < 40


def test_words_belong_to_the_object_that_they_describe() -> None:
    assert measured.named("a short teal pole in front of a pink disc") == [
        (1, "size", 0),
        (2, "colour", 0),
        (3, "shape", 0),
        (8, "colour", 1),
        (9, "shape", 1),
    ]


def test_phrases_are_split_at_every_relation() -> None:
    for joint in ("in front of", "above", "below", "left of", "right of"):
        assert measured.phrases(f"a red disc {joint} a long teal pole") == {
            "a red disc": 1,
            "a long teal pole": 1,
        }
    assert measured.overlap(["a red disc above a pole"], ["a pole below a star"]) == 50


def hand_made() -> tuple[measured.Part, Tensor]:
    """Two scenes; each object covers one cell of c4, no two the same; looks that sit on them."""
    sentences = ["a red disc above a teal pole", "a small red star left of a teal ring"]
    covers, looks = torch.zeros(2, 2, 80), torch.zeros(2, 10, 80)
    for index, sentence in enumerate(sentences):
        covers[index, 0, 4 * index], covers[index, 1, 4 * index + 1] = 1, 0.5
        for step, _, which in measured.named(sentence):
            looks[index, step, 4 * index + which] = 1
    empty = torch.empty(2, 0)
    return measured.Part(empty, empty, sentences, [2, 2], [False, False], covers), looks


def test_a_look_at_the_named_object_counts_as_one() -> None:
    data, looks = hand_made()
    found = measured.on_objects(looks, data)
    # The second sentence's last two come after the first one's end, so nothing compares with them.
    assert {kind: each["number"] for kind, each in found.items()} == {
        "size": 1,
        "colour": 3,
        "shape": 3,
    }
    for each in found.values():
        assert each["named"] == each["best"] > 0
        assert each["elsewhere"] == each["other_scene"] == 0
    assert found["size"]["chance"] == round(100 / 80, 2)


def test_a_look_that_never_moves_is_not_taken_for_attention() -> None:
    data, looks = hand_made()
    still = looks.mean(1, keepdim=True).expand_as(looks)
    for each in measured.on_objects(still, data).values():
        assert each["named"] == each["elsewhere"] > each["chance"]


class Parrot(nn.Module):
    """Says given sentences, whatever it sees or reads."""

    def __init__(self, said: Tensor) -> None:
        super().__init__()
        self.said = said

    def forward(self, maps: Pyramid, words: Tensor) -> Tensor:
        return 50 * F.one_hot(self.said[:, : words.shape[1]], len(measured.WORDS)).float()


def test_saying_too_much_costs() -> None:
    data, _ = hand_made()
    true = measured.WORDS.encode([*data.sentences, *data.sentences])
    maps = torch.zeros(4, 1, 1, 1)
    data = measured.Part(maps, maps, 2 * data.sentences, 4 * [2], 4 * [False], torch.empty(4))
    right = measured.forced(Parrot(true[:, 1:]), data, blind=False)
    assert right["accuracy"] == 100 and set(right["by_kind"].values()) == {100}
    above, left = (measured.WORDS.numbers[word] for word in ("above", "left"))
    always = true[:, 1:].clone()
    always[always == left] = above
    found = measured.forced(Parrot(always), data, blind=False)
    assert found["by_kind"]["relation"] == 50 and found["by_kind"]["shape"] == 100
    rows = dict(zip(measured.KINDS["relation"], found["relations"], strict=True))
    assert rows["above"] == rows["left"] == [2, 0, 0, 0, 0, 0]
    said = always.clone()
    said[:, 1] = measured.WORDS.numbers["small"]  # two of the four have no such size
    assert measured.forced(Parrot(said), data, blind=False)["by_kind"]["size"] == 50
