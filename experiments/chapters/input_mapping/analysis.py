"""Maps vectors into the encoder's space: `results/input_mapping_probe.json`.

Small pictures of objects, described by their HOG vector, their pixels or two words, are mapped to
what the encoder says of the same picture (c5, averaged). How much of its variance is explained on
pictures that no training saw, and what a classifier of shapes, built for the encoder's vectors,
makes of it: for linear and other mappers, hidden widths, amounts of data, PCA and autoencoders.
Then vectors joined to the encoder's, as a reader of both uses them, and copies of low resolution.
3 seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial

import numpy as np
import skimage
import sklearn
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from torch import Tensor, nn

from experiments.chapters.input_mapping.trials import (
    PORTION,
    USUAL,
    Scaled,
    cycle,
    encoder,
    hog_of,
    mean_and_error,
    pictured,
    words_of,
)
from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from helpers import scenes
from helpers.bridges.input_mapping import (
    AutoEncoder,
    ConvMapper,
    JoinedVector,
    LinearMapper,
    MLPMapper,
    PCAMapper,
    Standardize,
)
from helpers.encoder import Pyramid, normalize
from helpers.inspection import count_parameters
from helpers.training import minimise

NAME = "input_mapping_probe"
FEW, MANY, CHOOSING, UNSEEN = 300, 2400, 400, 800  # pictures
START, CHOICE, REPORT, SPACING = 50_000, 70_000, 60_000, 1_000  # scenes; each seed has its own
EPOCHS, BATCH, LR = {FEW: 75, MANY: 10}, 32, 2e-3  # about 750 steps either way
STRENGTHS = np.logspace(0, 5, 11)


# --- vectors into the encoder's space


@torch.no_grad()
def c5_of(images: Tensor) -> Tensor:
    """Return c5 averaged over its positions, `[N, 512]`."""
    parts = images.split(PORTION)
    return torch.cat([encoder()(normalize(part)).c5.mean((2, 3)) for part in parts])


@cache
def described(first: int, count: int) -> dict[str, Tensor]:
    """Return `count` pictures from scenes `first`, …, in every form, the encoder's among them."""
    found: list[tuple[Tensor, str]] = []
    for index in itertools.count(first):
        found += pictured(scenes.scene(index))
        if len(found) >= count:
            break
    small = torch.stack([picture for picture, _ in found[:count]])
    said = [name for _, name in found[:count]]
    large = F.interpolate(small, (64, 64), mode="bilinear").clamp(0, 1)
    return {
        "words": torch.stack([words_of(each) for each in said]),
        "HOG": hog_of(small),
        "pixels": small.flatten(1),
        "picture": small,
        "encoded": c5_of(large),
        "shape": torch.tensor([scenes.SHAPES.index(each.split()[1]) for each in said]),
    }


class FlatConvMapper(ConvMapper):
    """As `ConvMapper`, but its map is flattened instead of averaged: for one size of picture."""

    def __init__(self, in_channels: int, out_features: int, width: int = 16) -> None:
        super().__init__(in_channels, out_features, width)
        self.linear = nn.Linear(4 * width * 4 * 4, out_features)

    def forward(self, query: Tensor) -> Tensor:
        return self.linear(self.layers(query).flatten(1))


class NarrowConvMapper(ConvMapper):
    """As `FlatConvMapper`, from so few channels that the linear layer is `ConvMapper`'s."""

    def __init__(self, in_channels: int, out_features: int, width: int = 16) -> None:
        super().__init__(in_channels, out_features, width)
        self.narrow = nn.Conv2d(4 * width, width // 4, 1)

    def forward(self, query: Tensor) -> Tensor:
        return self.linear(self.narrow(self.layers(query)).flatten(1))


def explained(found: Tensor, truth: Tensor) -> float:
    """Return how much of the variance is explained, in %: 0 for the mean, 100 for all of it."""
    return round(100 * float(1 - (found - truth).square().mean() / truth.square().mean()), 2)


def standardized(vectors: list[Tensor]) -> list[Tensor]:
    """Return all in units of the first's deviations; what lies far out is taken for less."""
    if vectors[0].ndim > 2:
        return vectors
    standard = Standardize(vectors[0].shape[1]).fit(vectors[0])
    return [standard(each).clamp(-USUAL, USUAL) for each in vectors]


learn = partial(minimise, batch_size=BATCH, lr=LR, schedule=cycle)


def train(module: nn.Module, inputs: Tensor, targets: Tensor, seed: int) -> None:
    def loss_of(chosen: Tensor, epoch: int) -> Tensor:
        return F.mse_loss(module(inputs[chosen]), targets[chosen])

    learn(module, loss_of, len(inputs), epochs=EPOCHS[len(inputs)], seed=seed)


Coded = tuple[list[Tensor], list[Tensor]]  # vectors in few numbers, and rebuilt from them


@torch.no_grad()
def by_pca(code: int, vectors: list[Tensor], fitted: bool) -> Coded:
    """Return all in `code` numbers, and as rebuilt; unfitted, along random directions."""
    pca = PCAMapper(vectors[0].shape[1], code)
    pca.mean.copy_(vectors[0].mean(0))
    if fitted:
        pca.fit(vectors[0])
    codes = [pca(each) for each in vectors]
    return codes, [each @ pca.directions.T + pca.mean for each in codes]


def by_autoencoder(code: int, vectors: list[Tensor], seed: int) -> Coded:
    auto = AutoEncoder(vectors[0].shape[1], code)
    train(auto, vectors[0], vectors[0], seed)
    with torch.no_grad():
        return [auto.encode(each) for each in vectors], [auto(each) for each in vectors]


@dataclass(frozen=True)
class Mapping:
    """What is mapped, by what (`number`: how wide, or how long a code), learnt from how many."""

    source: str
    kind: str
    number: int = 0
    count: int = FEW

    def mapper(self, features: int, out: int) -> nn.Module:
        if self.kind == "MLP":
            return MLPMapper(features, out, self.number)
        if self.kind == "straight":  # an MLP without its ReLU
            parts = LinearMapper(features, self.number), LinearMapper(self.number, out)
            return nn.Sequential(*parts)
        convs = {"conv": ConvMapper, "flattened": FlatConvMapper, "narrow": NarrowConvMapper}
        return convs.get(self.kind, LinearMapper)(features, out)

    def measure(self, seed: int) -> Record:
        many = described(START + SPACING * seed, MANY)
        parts = [
            {key: value[: self.count] for key, value in many.items()},
            described(CHOICE + SPACING * seed, CHOOSING),
            described(REPORT + SPACING * seed, UNSEEN),
        ]
        *truths, known = standardized([part["encoded"] for part in (*parts, many)])
        inputs = standardized([part[self.source] for part in parts])
        torch.manual_seed(seed)
        kept: dict[str, float] = {}
        if self.kind in ("PCA", "random", "autoencoder"):
            codes, rebuilt = (
                by_autoencoder(self.number, inputs, seed)
                if self.kind == "autoencoder"
                else by_pca(self.number, inputs, fitted=self.kind == "PCA")
            )
            kept["kept"] = explained(rebuilt[0], inputs[0])
            kept["kept_unseen"] = explained(rebuilt[2], inputs[2])
            inputs = standardized(codes)
        torch.manual_seed(seed)
        if self.kind == "ridge":
            ridge = RidgeCV(STRENGTHS, alpha_per_target=True)
            ridge.fit(inputs[0].numpy(), truths[0].numpy())
            found = [torch.from_numpy(ridge.predict(each.numpy())).float() for each in inputs]
            size = ridge.coef_.size + ridge.intercept_.size
        else:
            mapper = self.mapper(inputs[0].shape[1], truths[0].shape[1])
            train(mapper, inputs[0], truths[0], seed)
            with torch.no_grad():
                found = [mapper(each) for each in inputs]
            size = count_parameters(mapper)
        reader = RidgeClassifierCV(STRENGTHS).fit(known.numpy(), many["shape"].numpy())
        shapes = parts[2]["shape"].numpy()
        named = {
            key: round(100 * float((reader.predict(vectors.numpy()) == shapes).mean()), 2)
            for key, vectors in {"accuracy": found[2], "accuracy_of_encoded": truths[2]}.items()
        }
        return {
            "told_known": explained(found[0], truths[0]),
            "told_choosing": explained(found[1], truths[1]),
            "told": explained(found[2], truths[2]),
            **named,
            "chance": round(100 * float(np.bincount(shapes).max()) / len(shapes), 2),
            **kept,
            "parameters": size,
        }


# --- a vector of one's own beside the encoder's: is there such a shape?

JOIN_TRAIN, JOIN_REPORT = range(10_000, 10_600), range(20_000, 20_400)
JOIN_EPOCHS = 10


@cache
def seen(indices: range) -> tuple[Tensor, Tensor]:
    """Return c5 averaged over its positions, `[N, 512]`, and which shapes there are, `[N, 6]`."""
    drawn = [scenes.scene(index) for index in indices]
    shapes = [{each.shape for each in one.objects} for one in drawn]
    there = [[float(shape in one) for shape in scenes.SHAPES] for one in shapes]
    return c5_of(torch.from_numpy(np.stack([one.image for one in drawn]))), torch.tensor(there)


class Patches(nn.Module):
    """The chapter's first attempt for a picture of 32 pixels: a map, flattened or averaged."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 512, 4, stride=4), nn.ReLU())
        self.flat = flat

    def forward(self, query: Tensor) -> Tensor:
        map_ = self.layers(query)
        return map_.flatten(1) if self.flat else map_.mean((2, 3))


class Reading(nn.Module):
    """Says yes or no, from the joined vector."""

    def __init__(self, joined: JoinedVector, reader: nn.Module) -> None:
        super().__init__()
        self.joined, self.reader = joined, reader

    def forward(self, c5: Tensor, query: Tensor) -> Tensor:
        return self.reader(self.joined(c5, query))[:, 0]


@dataclass(frozen=True)
class Joining:
    """What asks for a shape, in what unit (0: both sides standardised), and what reads the two."""

    asks: str
    reader: str = "MLP"
    unit: float = 0.0
    image: bool = True

    def mapper(self, known: Tensor) -> nn.Module:
        if self.asks in ("flattened", "averaged"):
            return Patches(flat=self.asks == "flattened")
        features = known.shape[1]
        first = Scaled(self.unit) if self.unit else Standardize(features).fit(known)
        return nn.Sequential(first, LinearMapper(features, 512))

    def measure(self, seed: int) -> Record:
        (known, there), (unseen, truth) = seen(JOIN_TRAIN), seen(JOIN_REPORT)
        if not self.unit:
            known, unseen = standardized([known, unseen])
        kinds = len(scenes.SHAPES)
        words = torch.stack([words_of(shape) for shape in scenes.SHAPES])
        first = SPACING * seed
        pictures = described(START + first, MANY), described(REPORT + first, UNSEEN)
        of = [[torch.nonzero(some["shape"] == k)[:, 0] for k in range(kinds)] for some in pictures]
        rng = np.random.default_rng(seed)

        def ask(which: Tensor, where: int) -> Tensor:
            if self.asks in ("flattened", "averaged", "encoded"):
                drawn = [of[where][k][rng.integers(len(of[where][k]))] for k in which.tolist()]
                form = "encoded" if self.asks == "encoded" else "picture"
                return pictures[where][form][torch.stack(drawn)]
            return words[which] * (self.asks != "nothing")

        torch.manual_seed(seed)
        mapper = self.mapper(pictures[0]["encoded"] if self.asks == "encoded" else words)
        torch.manual_seed(seed)
        joined = JoinedVector(512, mapper)
        width = joined(torch.zeros(1, 512, 1, 1), ask(torch.zeros(1).long(), 0)).shape[1]
        reader = MLPMapper(width, 1, 64) if self.reader == "MLP" else LinearMapper(width, 1)
        model = Reading(joined, reader)

        def says(vectors: Tensor, chosen: Tensor, where: int) -> Tensor:
            c5 = vectors[chosen // kinds, :, None, None] * self.image
            return model(c5, ask(chosen % kinds, where))

        def loss_of(chosen: Tensor, epoch: int) -> Tensor:
            answers = there.flatten()[chosen]
            return F.binary_cross_entropy_with_logits(says(known, chosen, 0), answers)

        learn(model, loss_of, there.numel(), epochs=JOIN_EPOCHS, seed=seed)
        found = []
        with torch.no_grad():
            for vectors, answers, where in ((known, there, 0), (unseen, truth, 1)):
                parts = torch.arange(answers.numel()).split(200)
                logits = torch.cat([says(vectors, part, where) for part in parts])
                right = (logits > 0) == (answers.flatten() > 0)
                scene = (torch.arange(answers.numel()) // kinds).tolist()
                found.append(mean_and_error(right.float().tolist(), scene))
        often = (there.mean(0) > 0.5) == (truth > 0)
        return {
            "right_known": found[0][0],
            "right": found[1][0],
            "right_error": found[1][1],
            "chance": round(100 * float(often.float().mean()), 2),
            "numbers": width - 512,
            "parameters": count_parameters(model),
        }


# --- a copy of low resolution, enlarged

COPY_KNOWN, COPY_REPORT, COPIES = range(10_000, 10_100), 20_000, 100


@torch.no_grad()
def maps_of(images: Tensor) -> list[Tensor]:
    parts = [encoder()(normalize(part)) for part in images.split(PORTION)]
    return [torch.cat(level) for level in zip(*parts, strict=True)]


@cache
def copied(indices: range) -> tuple[Tensor, list[Tensor]]:
    images, _ = scenes.batch(indices)
    return images, maps_of(images)


@dataclass(frozen=True)
class Enlarging:
    """A copy of `side` pixels is enlarged and shown to the encoder; nothing is learnt."""

    side: int

    @torch.no_grad()
    def measure(self, seed: int) -> Record:
        first = COPY_REPORT + SPACING * seed
        images, truth = copied(range(first, first + COPIES))
        small = F.interpolate(images, (self.side, self.side), mode="area")
        large = F.interpolate(small, images.shape[-2:], mode="bilinear")
        maps, scores = zip(maps_of(large), truth, copied(COPY_KNOWN)[1], strict=True), {}
        for name, (found, true, known) in zip(Pyramid._fields, maps, strict=True):
            mean = known.mean((0, 2, 3), keepdim=True)
            spread = known.std((0, 2, 3), keepdim=True)
            spread = spread.clamp(min=0.01 * float(spread.mean()))  # some channels never fire
            scores[name] = explained((found - mean) / spread, (true - mean) / spread)
        return {"levels": scores}


# --- what is measured

TASKS: dict[str, Mapping | Joining | Enlarging] = {
    "HOG, MLP 4": Mapping("HOG", "MLP", 4),
    "HOG, MLP 16": Mapping("HOG", "MLP", 16),
    "HOG, MLP 64": Mapping("HOG", "MLP", 64),
    "HOG, MLP 256": Mapping("HOG", "MLP", 256),
    "HOG, MLP 1024": Mapping("HOG", "MLP", 1024),
    "HOG, MLP 4, many": Mapping("HOG", "MLP", 4, MANY),
    "HOG, MLP 16, many": Mapping("HOG", "MLP", 16, MANY),
    "HOG, MLP 64, many": Mapping("HOG", "MLP", 64, MANY),
    "HOG, MLP 256, many": Mapping("HOG", "MLP", 256, MANY),
    "HOG, MLP 1024, many": Mapping("HOG", "MLP", 1024, MANY),
    "HOG, linear": Mapping("HOG", "linear"),
    "HOG, linear, many": Mapping("HOG", "linear", count=MANY),
    "HOG, straight 256, many": Mapping("HOG", "straight", 256, MANY),
    "HOG, ridge": Mapping("HOG", "ridge"),
    "HOG, PCA 4": Mapping("HOG", "PCA", 4),
    "HOG, PCA 16": Mapping("HOG", "PCA", 16),
    "HOG, PCA 64": Mapping("HOG", "PCA", 64),
    "HOG, autoencoder 4": Mapping("HOG", "autoencoder", 4),
    "HOG, autoencoder 16": Mapping("HOG", "autoencoder", 16),
    "HOG, autoencoder 64": Mapping("HOG", "autoencoder", 64),
    "HOG, random 16": Mapping("HOG", "random", 16),
    "words, linear": Mapping("words", "linear"),
    "words, MLP 16": Mapping("words", "MLP", 16),
    "words, MLP 256": Mapping("words", "MLP", 256),
    "words, straight 256": Mapping("words", "straight", 256),
    "pixels, linear, many": Mapping("pixels", "linear", count=MANY),
    "pixels, straight 64, many": Mapping("pixels", "straight", 64, MANY),
    "pixels, MLP 64, many": Mapping("pixels", "MLP", 64, MANY),
    "picture, conv, many": Mapping("picture", "conv", count=MANY),
    "picture, flattened, many": Mapping("picture", "flattened", count=MANY),
    "picture, narrow, many": Mapping("picture", "narrow", count=MANY),
    "image alone": Joining("nothing"),
    "question alone": Joining("words", image=False),
    "joined, linear reader": Joining("words", "linear"),
    "joined": Joining("words"),
    "joined, as they are": Joining("words", unit=1.0),
    "joined, words ÷ 100": Joining("words", unit=0.01),
    "joined, words × 100": Joining("words", unit=100.0),
    "joined, picture averaged": Joining("averaged"),
    "joined, picture flattened": Joining("flattened"),
    "joined, picture encoded": Joining("encoded"),
    "copy of 1": Enlarging(1),
    "copy of 8": Enlarging(8),
    "copy of 16": Enlarging(16),
    "copy of 32": Enlarging(32),
    "copy of 64": Enlarging(64),
}


def measure(what: str, seed: int) -> Record:
    task = TASKS[what]
    used = {"scikit-image": skimage.__version__, "scikit-learn": sklearn.__version__}
    return {**asdict(task), **task.measure(seed), "libraries": used}


def entries(what: str, seed: int) -> Iterator[str]:
    yield f'experiments/chapters/input_mapping/analysis.py::TASKS["{what}"]'


SWEEPS = {NAME: Sweep(NAME, partial(measure), key=("what", "seed"), entries=entries)}


def main(given: Sequence[str] | None = None) -> None:
    said = arguments(__doc__, TASKS, given=given)
    tasks = [{"what": what, "seed": seed} for seed in range(said.seeds) for what in said.only]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
