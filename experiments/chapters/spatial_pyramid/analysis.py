"""Asks when context helps, and what other image sizes do to a vector.

Trains the chapter's trials on scenes and scores each thing by its size. And reads which shapes a
scene has from pooled vectors of c5, at sizes of the image that a readout was fitted at and at
others. 3 seeds; `results/spatial_pyramid_probe.json`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from experiments.chapters.spatial_pyramid.trials import TRIALS
from experiments.core.records import Record
from experiments.core.scores import Thing, things
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import SETTINGS, Pairs, Trial, figures, pairs, train_on
from helpers import scenes
from helpers.bridges.spatial_pyramid import BothSpatialPyramid, MaxSpatialPyramid, SpatialPyramid
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.metrics import NOTHING_IGNORED
from helpers.training import evaluate, predict

NAME = "spatial_pyramid_probe"
CLASSES = len(scenes.CLASSES)
EXTENTS = (0, 16, 32, 64, 129)  # pixels of the longer side of a thing's box
SIDES = (64, 80, 96, 128, 160, 192, 224, 256)  # of the image, for the vectors
SEVERAL = (64, 96, 128, 192, 256)  # to fit at, where a readout is fitted at more than one
TRAIN, TEST, PORTION = 600, 200, 20
STRENGTHS = np.logspace(0, 8, 17)
COMPACT = ("disc", "square", "triangle", "star")  # as wide as long, and not hollow
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda c5: c5.mean((2, 3)),
    "SPP, mean": SpatialPyramid(512),
    "SPP, max": MaxSpatialPyramid(512),
    "SPP, both": BothSpatialPyramid(512),
}


def by_extent(model: Segmenter, report: Pairs) -> dict[str, list[float] | list[int]]:
    """Return how well things are found: means over those of each extent, in %.

    `compact` is the IoU of `COMPACT` shapes; `things` is how many of all shapes there are.
    """
    found: list[list[Thing]] = [[] for _ in EXTENTS[1:]]
    for start in range(0, len(report), PORTION):
        images, masks = zip(*report[start : start + PORTION], strict=True)
        guesses = predict(model, torch.stack(images)).numpy()
        for guess, mask in zip(guesses, masks, strict=True):
            for thing in things(guess, mask.numpy(), list(range(1, CLASSES)), NOTHING_IGNORED):
                place = int(np.searchsorted(EXTENTS, thing.extent, side="right")) - 1
                found[place].append(thing)
    compact = [[t for t in some if scenes.CLASSES[t.kind] in COMPACT] for some in found]
    return {
        "iou": [_mean(thing.iou for thing in some) for some in found],
        "recall": [_mean(thing.recall for thing in some) for some in found],
        "compact": [_mean(thing.iou for thing in some) for some in compact],
        "things": [len(some) for some in found],
    }


def _mean(shares: Iterable[float]) -> float:
    return round(100 * float(np.mean(list(shares))), 2)


def train(trial: Trial, seed: int) -> Record:
    """Train one trial on scenes as `experiments.claims` would, and score it by size, too."""
    setting = SETTINGS["scenes"]
    training, report = pairs(setting)
    model = trial.model(seed, CLASSES)
    train_on(model, training, setting, seed)
    scores = evaluate(model, report, mixed=setting.mixed)
    return {
        **figures(model, scores, setting, report),
        "extents": EXTENTS,
        "by_extent": by_extent(model, report),
    }


class Maps:
    """Which shapes some scenes have, and c5 at any size of their images."""

    def __init__(self, encoder: nn.Module, indices: range) -> None:
        drawn = [scenes.scene(index) for index in indices]
        self.encoder = encoder
        self.images = torch.from_numpy(np.stack([each.image for each in drawn]))
        shapes = [{thing.shape for thing in each.objects} for each in drawn]
        self.has = np.array([[s in there for s in scenes.SHAPES] for there in shapes])

    def c5(self, side: int, chosen: slice = slice(None)) -> list[Tensor]:
        """Return c5 of the chosen images, enlarged or reduced to side × side, in portions."""
        size = (side, side)
        portions = self.images[chosen].split(PORTION)
        sized = (F.interpolate(x, size, mode="bilinear", antialias=True) for x in portions)
        return [self.encoder(normalize(x.clamp(0, 1))).c5 for x in sized]


def vectors(pool: Callable[[Tensor], Tensor], maps: Iterable[Tensor]) -> NDArray[np.float32]:
    return torch.cat([pool(c5) for c5 in maps]).numpy()


@torch.no_grad()
def read(seed: int) -> Record:
    """Fit linear readouts of the shapes at 128 pixels or at several sizes; try them at `SIDES`."""
    encoder = ResNet18Encoder("bundled")
    known = Maps(encoder, range(10_000 + 2000 * seed, 10_000 + 2000 * seed + TRAIN))
    unknown = Maps(encoder, range(20_000 + 2000 * seed, 20_000 + 2000 * seed + TEST))
    shares = [slice(start, None, len(SEVERAL)) for start in range(len(SEVERAL))]
    one = known.c5(128)
    several = [known.c5(side, share) for side, share in zip(SEVERAL, shares, strict=True)]
    answers = np.concatenate([known.has[share] for share in shares])
    fitted = {name: _fit(vectors(pool, one), known.has) for name, pool in POOLS.items()}
    for name, pool in POOLS.items():
        mixed = vectors(pool, itertools.chain.from_iterable(several))
        fitted[f"{name}, several sizes"] = _fit(mixed, answers)
    areas: dict[str, list[float]] = {name: [] for name in fitted}
    for side in SIDES:
        maps = unknown.c5(side)
        for name, model in fitted.items():
            said = model.predict(vectors(POOLS[name.removesuffix(", several sizes")], maps))
            areas[name].append(round(float(roc_auc_score(unknown.has, said)), 4))
    return {
        "sides": SIDES,
        "auc": areas,
        "strengths_at_an_end": {name: _ends(model) for name, model in fitted.items()},
        "scenes": {"train": TRAIN, "test": TEST},
    }


def _ends(model: Pipeline) -> int:
    """Return for how many of the shapes the strength is the least or the largest on offer."""
    return int(np.isin(model[-1].alpha_, STRENGTHS[[0, -1]]).sum())


def _fit(features: NDArray[np.float32], has: NDArray[np.bool_]) -> Pipeline:
    model = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS, alpha_per_target=True))
    return model.fit(features, 2.0 * has - 1)


def measure(what: str, seed: int) -> Record:
    return read(seed) if what == "sizes" else train(TRIALS[what], seed)


def entries(what: str, seed: int) -> Iterator[str]:
    code = "experiments/chapters/spatial_pyramid"
    if what == "sizes":
        yield f"{code}/analysis.py::read"
    else:
        yield f"{code}/analysis.py::train"
        yield f'{code}/trials.py::TRIALS["{what}"]'


SWEEPS = {NAME: Sweep(NAME, partial(measure), key=("what", "seed"), entries=entries)}


def main(given: Sequence[str] | None = None) -> None:
    said = arguments(__doc__, ["sizes", *TRIALS], given=given)
    tasks = [{"what": what, "seed": seed} for seed in range(said.seeds) for what in said.only]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
