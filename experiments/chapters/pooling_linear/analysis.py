"""Asks pooled vectors what they still know: `results/pooling_linear_probe.json`.

Linear readouts of c5, pooled in several ways: where is the largest object, and which shapes are in
the scene? Then the nearest neighbours of each vector. Once with the encoder as it is, once with
convolutions that wrap around instead of padding with zeros; 3 seeds. Last, for a picture, what the
chapter's decoders draw on four scenes (seed 0, trained as in its trials).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import Tensor, nn

from experiments.chapters.pooling_linear.trials import TRIALS
from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import SETTINGS, Trial, pairs, train_on
from helpers import scenes
from helpers.bridges.pooling_linear import GeM
from helpers.encoder import ResNet18Encoder, normalize
from helpers.inspection import evaluating

NAME = "pooling_linear_probe"
PADDINGS = ("zeros", "circular")
TRAIN, TEST, PORTION, NEIGHBOURS = 1000, 500, 20, 4
STRENGTHS = np.logspace(0, 6, 13)
USUAL = 10  # standard deviations: a feature beyond them, asleep in training, decides nothing
SIDES = (0, 24, 40, 56, 129)  # of a square with as many pixels as the largest object shows
RADII = (4, 8, 16, 32, 61)  # of the largest object of a shape
DRAWN = range(20_000, 20_004)
FRAMES = {
    f"drawn: {what}": what
    for what in ("vector of 4", "vector of 32", "vector", "grid 2×2", "grid 4×4", "map")
}
Answers = NDArray[np.float64]

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda c5: c5.mean((2, 3)),
    "GeM": GeM(512).eval(),  # p = 3, as it starts
    "max": lambda c5: c5.amax((2, 3)),
    "grid 2×2": lambda c5: F.adaptive_avg_pool2d(c5, 2).flatten(1),
    "grid 4×4": lambda c5: c5.flatten(1),  # of 128 pixels it is the whole map
}


class Vectors:
    """Some scenes: their c5, their mean colours, and what is in them."""

    def __init__(self, encoder: nn.Module, indices: range) -> None:
        maps, colors = [], []
        self.objects: list[tuple[scenes.Object, ...]] = []
        for start in range(0, len(indices), PORTION):
            drawn = [scenes.scene(index) for index in indices[start : start + PORTION]]
            images = torch.from_numpy(np.stack([each.image for each in drawn]))
            maps.append(encoder(normalize(images)).c5)
            colors.append(images.mean((2, 3)))
            self.objects += [each.objects for each in drawn]
        self.c5, self.color = torch.cat(maps), torch.cat(colors)

    def largest(self) -> Answers:
        """Return x and y of the middle of the largest object, and its side, `[N, 3]`."""
        found = []
        for objects in self.objects:
            largest = max(objects, key=lambda each: each.pixels)
            left, top, right, bottom = largest.box
            found.append([(left + right) / 2, (top + bottom) / 2, largest.pixels**0.5])
        return np.array(found)

    def radii(self) -> Answers:
        """Return the radius of the largest object of each shape, 0 for none, `[N, shapes]`."""
        return np.array(
            [
                [max((o.radius for o in objects if o.shape == s), default=0) for s in scenes.SHAPES]
                for objects in self.objects
            ]
        )


def read(pool: Callable[[Tensor], Tensor], train: Vectors, test: Vectors) -> Answers:
    """Fit one linear readout for all questions: x, y and ±1 for each shape, `[test, 2 + 6]`."""
    answers = np.concatenate([train.largest()[:, :2], np.sign(train.radii()) * 2 - 1], axis=1)
    usual = FunctionTransformer(lambda features: features.clip(-USUAL, USUAL))
    model = make_pipeline(StandardScaler(), usual, RidgeCV(STRENGTHS, alpha_per_target=True))
    return model.fit(pool(train.c5).numpy(), answers).predict(pool(test.c5).numpy())


def position_errors(said: Answers, test: Vectors) -> list[float]:
    """Return the mean distance in pixels, for the sizes between `SIDES`, then for all.

    What lies outside the image counts as said at its border.
    """
    x, y, side = test.largest().T
    said = said.clip(0, scenes.SIZE)
    distance = np.hypot(said[:, 0] - x, said[:, 1] - y)
    parts = [distance[(low <= side) & (side < high)] for low, high in itertools.pairwise(SIDES)]
    return [round(float(part.mean()), 2) for part in (*parts, distance)]


def presence(said: Answers, test: Vectors) -> list[float]:
    """Return the area under the curve against scenes without the shape, for `RADII`, then all.

    The mean over the shapes that there are in that size: no pole is shorter than 16.
    """
    rows = []
    for score, radius in zip(said[:, 2:].T, test.radii().T, strict=True):
        without = radius == 0
        sizes = [(low <= radius) & (radius < high) for low, high in itertools.pairwise(RADII)]
        rows.append(
            [
                roc_auc_score(these[these | without], score[these | without])
                if these.any()
                else np.nan
                for these in (*sizes, ~without)
            ]
        )
    return [round(float(value), 4) for value in np.nanmean(rows, axis=0)]


def neighbourhood(vectors: Tensor, test: Vectors) -> dict[str, float]:
    """Return what the nearest scenes by cosine share with the one that was asked about.

    `shapes`: what both have of what either has; `color`: distance of mean colours in grey levels.
    """
    unit = F.normalize(vectors - vectors.mean(0))
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return _shared(similarity.topk(NEIGHBOURS).indices, test)


def chance(test: Vectors) -> dict[str, float]:
    """Return the same for all the other scenes."""
    others = torch.arange(len(test.c5)).repeat(len(test.c5), 1)
    return _shared(others[~torch.eye(len(others), dtype=torch.bool)].view(len(others), -1), test)


def _shared(others: Tensor, test: Vectors) -> dict[str, float]:
    has = torch.from_numpy(test.radii() > 0)
    both = (has[:, None] & has[others]).sum(-1)
    either = (has[:, None] | has[others]).sum(-1)
    color = 255 * (test.color[:, None] - test.color[others]).norm(dim=-1)
    return {
        "shapes": round(100 * float((both / either).mean()), 2),
        "color": round(float(color.mean()), 2),
    }


def wrap(encoder: nn.Module) -> None:
    """Let an encoder's layers continue at the other side of a map, instead of padding."""
    for part in encoder.modules():
        if isinstance(part, nn.Conv2d):
            part.padding_mode = "circular"
        if isinstance(part, nn.MaxPool2d):
            part.padding = 0
            part.register_forward_pre_hook(
                lambda _, given: (F.pad(given[0], (1, 1, 1, 1), mode="circular"),)
            )


@torch.no_grad()
def ask(padding: str, seed: int) -> Record:
    """Ask everything of one encoder, on scenes of its own for every seed."""
    encoder = ResNet18Encoder("bundled")
    if padding == "circular":
        wrap(encoder)
    train = Vectors(encoder, range(10_000 + 2000 * seed, 10_000 + 2000 * seed + TRAIN))
    test = Vectors(encoder, range(20_000 + 2000 * seed, 20_000 + 2000 * seed + TEST))
    said = {name: read(pool, train, test) for name, pool in POOLS.items()}
    said["guessing"] = np.tile(train.largest()[:, :2].mean(0), (TEST, 1))
    neighbours = {name: neighbourhood(POOLS[name](test.c5), test) for name in list(POOLS)[:3]}
    neighbours["mean colour"] = neighbourhood(test.color, test)
    neighbours["any other"] = chance(test)
    return {
        "sides": SIDES,
        "position": {name: position_errors(each, test) for name, each in said.items()},
        "radii": RADII,
        "presence": {name: presence(said[name], test) for name in POOLS},
        "neighbours": neighbours,
        "scenes": {"train": TRAIN, "test": TEST},
    }


def draw(trial: Trial, seed: int) -> Record:
    """Train one decoder as its trial does; return what it draws, on its own grid."""
    setting = SETTINGS["scenes"]
    model = trial.model(seed, len(scenes.CLASSES))
    train_on(model, pairs(setting)[0], setting, seed)
    with evaluating(model), torch.no_grad():
        maps = model.encoder(normalize(scenes.batch(DRAWN)[0].to(next(model.parameters()).device)))
        labels = model.decoder(maps).argmax(1).cpu()
    return {
        "scenes": list(DRAWN),
        "shape": list(labels.shape[1:]),
        "drawn": ["".join(map(str, mask.flatten().tolist())) for mask in labels],
    }


def measure(what: str, seed: int) -> Record:
    return ask(what, seed) if what in PADDINGS else draw(TRIALS[FRAMES[what]], seed)


def entries(what: str, seed: int) -> Iterator[str]:
    code = "experiments/chapters/pooling_linear"
    if what in PADDINGS:
        yield f"{code}/analysis.py::ask"
    else:
        yield f"{code}/analysis.py::draw"
        yield f'{code}/trials.py::TRIALS["{FRAMES[what]}"]'


SWEEPS = {NAME: Sweep(NAME, partial(measure), key=("what", "seed"), entries=entries)}


def main(given: Sequence[str] | None = None) -> None:
    said = arguments(__doc__, [*PADDINGS, *FRAMES], given=given)
    asked = itertools.product(range(said.seeds), PADDINGS)
    wanted = [*asked, *((0, frame) for frame in FRAMES)]
    tasks = [{"what": what, "seed": seed} for seed, what in wanted if what in said.only]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
