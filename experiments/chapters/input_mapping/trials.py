"""Asks for one object of a scene, in several ways: `results/input_mapping.json`.

A query is words, a small picture of another such object, its pixels, its HOG vector or what the
encoder says of it; the mappers and fusions of the chapter bring it to the decoder. Trained on
scenes, with another question in every epoch, reported on scenes and pictures that no training saw;
3 seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from skimage.feature import hog
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from helpers import scenes
from helpers.bridges.input_mapping import (
    AddFusion,
    ConcatFusion,
    ConvMapper,
    FiLMFusion,
    LinearMapper,
    MLPMapper,
    PointingDecoder,
    Standardize,
    crop_square,
    own_pixels,
)
from helpers.encoder import Pyramid, ResNet18Encoder, normalize
from helpers.inspection import count_parameters
from helpers.training import minimise, one_cycle

NAME = "input_mapping"
TRAIN, REPORT = range(10_000, 10_600), range(20_000, 20_400)
# Where the pictures to ask with come from.
OTHERS, REPORT_OTHERS = range(30_000, 30_600), range(40_000, 40_400)
EPOCHS, LR, PORTION, FEATURES, HIDDEN, WIDTH = 12, 4e-3, 20, 32, 64, 24
LEAST = 16  # the longer side of an object that gets a small picture, in pixels
USUAL = 5.0  # standard deviations; what lies further out is taken for that
FOUND = 4.0  # times that a pixel of the object counts in the loss
SIDES = (1, 8, 16, 32, 64)  # of the low-resolution copies
WORDS = (*scenes.COLORS, *scenes.SHAPES)


def cycle(optimizer: Optimizer, steps: int) -> OneCycleLR:
    return one_cycle(optimizer, steps + 1)  # the last step, at almost no rate, is left out


# --- the queries


def words_of(query: str) -> Tensor:
    """Return 1 for each of `WORDS` that is there, `[15]`."""
    said = query.split()
    return torch.tensor([float(word in said) for word in WORDS])


def pictured(drawn: scenes.Scene) -> list[tuple[Tensor, str]]:
    """Return small pictures of the objects that are large enough, and what they show."""
    image, found = torch.from_numpy(drawn.image), []
    for each in drawn.objects:
        left, top, right, bottom = each.box
        if max(right - left, bottom - top) >= LEAST:
            found.append((crop_square(image, each.box), f"{each.color} {each.shape}"))
    return found


@cache
def small_pictures(indices: range) -> dict[str, Tensor]:
    """Return small pictures by what they show ("red ring"), `[n, 3, 32, 32]` each."""
    found: dict[str, list[Tensor]] = {}
    for index in indices:
        for picture, name in pictured(scenes.scene(index)):
            found.setdefault(name, []).append(picture)
    return {name: torch.stack(pictures) for name, pictures in found.items()}


def hog_of(pictures: Tensor) -> Tensor:
    """Return histograms of oriented gradients of grey pictures `[N, 3, 32, 32]`, `[N, 324]`."""
    grey = pictures.mean(1).numpy()
    return torch.from_numpy(np.stack([hog(each) for each in grey])).float()


@torch.no_grad()
def encoded(pictures: Tensor) -> Tensor:
    """Return the means of c1 to c5 of pictures, enlarged to 64 × 64 pixels, `[N, 1024]`."""
    found = []
    for part in pictures.split(PORTION):
        large = F.interpolate(part, (64, 64), mode="bilinear")
        maps = encoder()(normalize(large.clamp(0, 1)))
        found.append(torch.cat([map_.mean((2, 3)) for map_ in maps], 1))
    return torch.cat(found)


DESCRIBE = {
    "picture": lambda pictures: pictures,
    "pixels": lambda pictures: pictures.flatten(1),
    "HOG": hog_of,
    "encoded": encoded,
}


@cache
def described(form: str, indices: range) -> dict[str, Tensor]:
    """Return all of `small_pictures` in another form."""
    return {name: DESCRIBE[form](pictures) for name, pictures in small_pictures(indices).items()}


def queries(form: str, names: Sequence[str], where: range, rng: np.random.Generator) -> Tensor:
    """Return one query for each name: words, or what is made of a picture that is drawn."""
    if form in DESCRIBE:
        there = described(form, where)
        return torch.stack([there[name][rng.integers(len(there[name]))] for name in names])
    known = torch.stack([words_of(name) for name in names])
    colors = torch.arange(len(WORDS)) < len(scenes.COLORS)
    forms = {"words": known, "nothing": 0 * known}
    return (forms | {"colour": known * colors, "shape": known * ~colors})[form]


@cache
def encoder() -> ResNet18Encoder:
    return ResNet18Encoder()


# --- the scenes


@dataclass(frozen=True, eq=False)
class Asked:
    """Some scenes, the objects whose pixels are known, and all questions: pairs (scene, object)."""

    images: Tensor
    masks: list[Tensor]
    names: list[list[str]]
    pairs: list[tuple[int, int]]

    def name(self, pair: tuple[int, int]) -> str:
        return self.names[pair[0]][pair[1]]

    def small(self, pairs: Sequence[tuple[int, int]], side: int) -> Tensor:
        """Return how much of each cell of a grid is the object asked for, `[N, 1, side, side]`."""
        masks = torch.stack([self.masks[scene][k] for scene, k in pairs])[:, None].float()
        return F.interpolate(masks, (side, side), mode="area")


@cache
def asked(indices: range) -> Asked:
    images, masks, names, pairs = [], [], [], []
    for number, index in enumerate(indices):
        drawn = scenes.scene(index)
        said = [f"{each.color} {each.shape}" for each in drawn.objects]
        labels = [scenes.CLASSES.index(each.shape) for each in drawn.objects]
        boxes = [each.box for each in drawn.objects]
        own = own_pixels(torch.from_numpy(drawn.mask), boxes, labels)
        if drawn.query in said:
            own[said.index(drawn.query)] = torch.from_numpy(drawn.query_mask)
        kept = [k for k, mask in enumerate(own) if mask is not None]
        images.append(torch.from_numpy(drawn.image))
        masks.append(torch.stack([own[k] for k in kept]))
        names.append([said[k] for k in kept])
        pairs += [(number, j) for j, k in enumerate(kept) if said.count(said[k]) == 1]
    return Asked(torch.stack(images), masks, names, pairs)


@cache
@torch.no_grad()
def maps_of(indices: range, side: int = scenes.SIZE) -> Pyramid:
    """Return the maps in float16, from copies of side × side pixels, enlarged; c1 as a zero."""
    parts = []
    for part in asked(indices).images.split(PORTION):
        if side < scenes.SIZE:
            small = F.interpolate(part, (side, side), mode="area")
            part = F.interpolate(small, part.shape[-2:], mode="bilinear")
        maps = encoder()(normalize(part))
        parts.append([torch.zeros(len(part), 64, 1, 1).half(), *(m.half() for m in maps[1:])])
    return Pyramid(*(torch.cat(level) for level in zip(*parts, strict=True)))


def some(maps: Pyramid, chosen: Sequence[int] | Tensor) -> Pyramid:
    return Pyramid(*(map_[chosen].float() for map_ in maps))


# --- the mappers: each is built for the queries that it is trained on


def raw(known: Tensor) -> nn.Module:
    return LinearMapper(known.shape[1], FEATURES)


def linear(known: Tensor) -> nn.Module:
    features = known.shape[1]
    standard = Standardize(features).fit(known)
    return nn.Sequential(standard, nn.Hardtanh(-USUAL, USUAL), LinearMapper(features, FEATURES))


def mlp(known: Tensor) -> nn.Module:
    mapper = linear(known)
    mapper[2] = MLPMapper(known.shape[1], FEATURES, HIDDEN)
    return mapper


def conv(known: Tensor) -> nn.Module:
    return ConvMapper(known.shape[1], FEATURES)


class Scaled(nn.Module):
    """Numbers in another unit."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, query: Tensor) -> Tensor:
        return query * self.factor


def tiny(known: Tensor) -> nn.Module:
    return nn.Sequential(Scaled(0.01), raw(known))


class TwoSums(FiLMFusion):
    """FiLM's layer, and both of its halves are added: as many weights, and no product."""

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        change, shift = self.predict(vector)[:, :, None, None].chunk(2, dim=1)
        return x + change + shift


@dataclass(frozen=True)
class Variant:
    """What is asked with, what maps it, how it enters the decoder, and the images' side.

    `by_side` also reports on images of other sides.
    """

    form: str
    mapper: Callable[[Tensor], nn.Module] = linear
    fusion: type[nn.Module] = FiLMFusion
    side: int = scenes.SIZE
    by_side: bool = False


TRIALS = {
    "no query": Variant("nothing"),
    "words": Variant("words", by_side=True),
    "words, added": Variant("words", fusion=AddFusion),
    "words, two sums": Variant("words", fusion=TwoSums),
    "words, concatenated": Variant("words", fusion=ConcatFusion),
    "words, as they are": Variant("words", raw),
    "words in hundredths": Variant("words", tiny),
    "words, copies of 32": Variant("words", side=32),
    "colour word only": Variant("colour"),
    "shape word only": Variant("shape"),
    "HOG, linear": Variant("HOG"),
    "pixels, linear": Variant("pixels"),
    "picture, conv": Variant("picture", conv),
    "encoded, linear": Variant("encoded"),
    "encoded, MLP": Variant("encoded", mlp),
}


# --- training and scores


def mean_and_error(values: Sequence[float], of: Sequence[int]) -> tuple[float, float]:
    """Return the mean and its standard error, in %; what belongs to one scene is no news twice."""
    number = np.array(values)
    rest = np.bincount(of, number - number.mean())
    return (
        round(100 * float(number.mean()), 2),
        round(100 * float(np.sqrt((rest**2).sum())) / len(number), 2),
    )


@torch.no_grad()
def scores(
    model: nn.Module, maps: Pyramid, query: Tensor, of: Asked, pairs: list[tuple[int, int]]
) -> Record:
    """Return how often the object meant has the highest mean logit of all, and its IoU, in %."""
    right, ious, shared = [], [], {"colour": [], "shape": []}
    for start in range(0, len(pairs), PORTION):
        part = pairs[start : start + PORTION]
        logits = model(some(maps, [scene for scene, _ in part]), query[start : start + PORTION])
        logits = F.interpolate(logits, of.images.shape[-2:], mode="bilinear")[:, 0]
        for logit, (scene, target) in zip(logits, part, strict=True):
            masks, names = of.masks[scene], of.names[scene]
            means = (logit * masks).sum((1, 2)) / masks.sum((1, 2))
            right.append(float(means.argmax() == target))
            found, meant = logit > 0, masks[target]
            ious.append(float((found & meant).sum() / (found | meant).sum()))
            for k, word in enumerate(shared.values()):
                rivals = [name.split()[k] for name in names]
                if rivals.count(rivals[target]) > 1:
                    word.append(right[-1])
    where = [scene for scene, _ in pairs]
    (hits, hits_error), (iou, iou_error) = (mean_and_error(x, where) for x in (right, ious))
    return {
        "right": hits,
        "right_error": hits_error,
        "iou": iou,
        "iou_error": iou_error,
        "right_where_shared": {k: round(100 * float(np.mean(v)), 2) for k, v in shared.items()},
    }


def answers(variant: Variant, seed: int) -> Record:
    """Train one variant; report how often it finds the object meant."""
    train, report = asked(TRAIN), asked(REPORT)
    maps = maps_of(TRAIN, variant.side)
    side = maps.c2.shape[-1]
    rng = np.random.default_rng(seed)
    by_scene = [[pair for pair in train.pairs if pair[0] == k] for k in range(len(train.images))]
    turns = []
    for _ in range(EPOCHS):  # another question to each scene, and another picture to ask with
        pairs = [each[rng.integers(len(each))] for each in by_scene]
        query = queries(variant.form, [train.name(pair) for pair in pairs], OTHERS, rng)
        turns.append((query, train.small(pairs, side)))
    torch.manual_seed(seed)
    mapper = variant.mapper(torch.cat([query for query, _ in turns]))
    torch.manual_seed(seed)  # the decoder starts alike behind every mapper …
    model = PointingDecoder(encoder().out_channels, 1, mapper, FEATURES, width=WIDTH)
    torch.manual_seed(seed)
    model.fuse = variant.fusion(WIDTH, FEATURES)  # … and around every fusion
    weight = torch.tensor(FOUND)

    def loss_of(chosen: Tensor, epoch: int) -> Tensor:
        query, masks = turns[epoch]
        logits = model(some(maps, chosen), query[chosen])
        return F.binary_cross_entropy_with_logits(logits, masks[chosen], pos_weight=weight)

    count = len(train.images)
    loss = minimise(model, loss_of, count, epochs=EPOCHS, lr=LR, seed=seed, schedule=cycle)
    asking = queries(variant.form, list(map(report.name, report.pairs)), REPORT_OTHERS, rng)
    known = [pair for pair in train.pairs if pair[0] < 100]
    again = queries(variant.form, list(map(train.name, known)), OTHERS, rng)
    seen = scores(model, maps, again, train, known)

    def reported(side: int) -> Record:
        return scores(model, maps_of(REPORT, side), asking, report, report.pairs)

    by_side = {str(each): reported(each) for each in SIDES if variant.by_side}
    few = {s: {name: found[name] for name in ("right", "iou")} for s, found in by_side.items()}
    return {
        "form": variant.form,
        "mapper": variant.mapper.__name__,
        "fusion": variant.fusion.__name__,
        "side": variant.side,
        **reported(variant.side),
        "train_right": seen["right"],
        "train_iou": seen["iou"],
        "loss": [round(value, 4) for value in loss],
        "numbers": asking[0].numel(),
        "mapper_parameters": count_parameters(mapper),
        "fusion_parameters": count_parameters(model.fuse),
        "scenes": count,
        "questions": len(report.pairs),
        "reported": len(report.images),
        **({"by_side": few} if few else {}),
        "libraries": {"scikit-image": skimage.__version__},
    }


def levels() -> Record:
    """Return what is right without, or with half of, the question, on the reported scenes."""
    report = asked(REPORT)
    right: dict[str, list[float]] = {}
    ious: dict[str, list[float]] = {}
    for scene, target in report.pairs:
        masks, names = report.masks[scene], report.names[scene]
        meant = masks[target]
        color, shape = names[target].split()
        guesses = {
            "any object": names,
            "any of the colour": [n for n in names if n.startswith(color)],
            "any of the shape": [n for n in names if n.endswith(shape)],
        }
        for what, rest in guesses.items():
            right.setdefault(what, []).append(1 / len(rest))
            chosen = torch.tensor([name in rest for name in names])
            ious.setdefault(what, []).append(float(meant.sum() / masks[chosen].any(0).sum()))
        largest = masks.sum((1, 2)).argmax() == target
        right.setdefault("the largest", []).append(float(largest))
        grid = F.interpolate(report.small([(scene, target)], 32), meant.shape, mode="bilinear")
        found = grid[0, 0] > 1 / (1 + FOUND)
        iou = float((found & meant).sum() / (found | meant).sum())
        ious.setdefault("the grid's best", []).append(iou)
    where = [scene for scene, _ in report.pairs]
    return {
        "form": "none",
        "right": {what: mean_and_error(values, where)[0] for what, values in right.items()},
        "iou": {what: mean_and_error(values, where)[0] for what, values in ious.items()},
        "objects": round(float(np.mean([len(names) for names in report.names])), 2),
        "questions": len(report.pairs),
    }


def measure(what: str, seed: int) -> Record:
    return levels() if what == "levels" else answers(TRIALS[what], seed)


def entries(what: str, seed: int) -> Iterator[str]:
    code = "experiments/chapters/input_mapping/trials.py"
    if what == "levels":
        yield f"{code}::levels"
    else:
        yield f"{code}::answers"
        yield f'{code}::TRIALS["{what}"]'


SWEEPS = {NAME: Sweep(NAME, partial(measure), key=("what", "seed"), entries=entries)}


def main(given: Sequence[str] | None = None) -> None:
    said = arguments(__doc__, ["levels", *TRIALS], given=given)
    wanted = [(0, "levels"), *itertools.product(range(said.seeds), TRIALS)]
    tasks = [{"what": what, "seed": seed} for seed, what in wanted if what in said.only]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
