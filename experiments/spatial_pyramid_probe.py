"""Asks when context helps, and what other image sizes do to a vector.

`python -m experiments.spatial_pyramid_probe` trains the chapter's trials on scenes and scores each
thing by its size. And it reads which shapes a scene has from pooled vectors of c5, at sizes of the
image that a readout was fitted at and at others. 3 seeds. Started twice, they share the work.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import Timeout
from numpy.typing import NDArray
from skimage.measure import label, regionprops
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from experiments import records
from experiments.spatial_pyramid import TRIALS
from experiments.trials import SCENES, Pairs, data
from helpers import scenes
from helpers.bridges.spatial_pyramid import BothSpatialPyramid, MaxSpatialPyramid, SpatialPyramid
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.inspection import count_macs, count_parameters
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import evaluate, fit, predict

NAME = "spatial_pyramid_probe"
MODULE = "helpers/bridges/spatial_pyramid.py"
EXTENTS = (0, 16, 32, 64, 129)  # pixels of the longer side of a thing's box
SIDES = (64, 80, 96, 128, 160, 192, 224, 256)  # of the image, for the vectors
SEVERAL = (64, 96, 128, 192, 256)  # to fit at, where a readout is fitted at more than one
TRAIN, TEST, PORTION = 600, 200, 20
STRENGTHS = np.logspace(0, 8, 17)
COMPACT = ("disc", "square", "triangle", "star")  # as wide as long, and not hollow
LEAST = 12  # pixels; less is what another thing left of one
AROUND = 8  # pixels about a thing's box in which its class counts as its own
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda c5: c5.mean((2, 3)),
    "SPP, mean": SpatialPyramid(512),
    "SPP, max": MaxSpatialPyramid(512),
    "SPP, both": BothSpatialPyramid(512),
}


class BySize(NamedTuple):
    """Means over the things of each extent, in %, and how many things there are."""

    iou: list[float]
    recall: list[float]
    compact: list[float]
    things: list[int]


def by_extent(model: Segmenter, report: Pairs) -> BySize:
    """Return how well things are found: each by itself, as means for each extent.

    A thing is a connected region of one class in the true mask, whatever hides it in part. Its IoU
    counts the pixels of its class in and about its box, without those of other things; `recall`
    only those on the thing; `compact` is the IoU of `COMPACT` shapes.
    """
    found: list[list[tuple[float, float, bool]]] = [[] for _ in EXTENTS[1:]]
    for start in range(0, len(report), PORTION):
        images, masks = zip(*report[start : start + PORTION], strict=True)
        guesses = predict(model, torch.stack(images)).numpy()
        for mask, guess in zip(masks, guesses, strict=True):
            truth = mask.numpy()
            labels = label(truth, background=0)
            for region in regionprops(labels):
                if region.area < LEAST:
                    continue
                top, left, bottom, right = region.bbox
                extent = max(bottom - top, right - left)
                place = int(np.searchsorted(EXTENTS, extent, side="right")) - 1
                box = slice(max(0, top - AROUND), bottom + AROUND)
                box = box, slice(max(0, left - AROUND), right + AROUND)
                own = labels[box] == region.label
                kind = truth[tuple(region.coords[0])]
                claimed = (guess[box] == kind) & (own | (truth[box] != kind))
                right_ones = (claimed & own).sum()
                iou = right_ones / (claimed | own).sum()
                compact = scenes.CLASSES[kind] in COMPACT
                found[place].append((iou, right_ones / own.sum(), compact))
    return BySize(
        [_mean(iou for iou, _, _ in things) for things in found],
        [_mean(recall for _, recall, _ in things) for things in found],
        [_mean(iou for iou, _, compact in things if compact) for things in found],
        [len(things) for things in found],
    )


def _mean(shares: Iterable[float]) -> float:
    return round(100 * float(np.mean(list(shares))), 2)


def train(what: str, seed: int) -> records.Record:
    """Train one trial on scenes as `experiments.trials` would, and score it by size, too."""
    pairs, report = data("scenes")
    trial, classes = TRIALS[what], len(SCENES.classes)
    model = trial.model(seed, classes)
    sources = (
        "experiments/trials.py::SCENES",
        f"experiments/{NAME}.py::train",
        *trial.sources(model),
    )
    versions = ["weights", "scenes", "training", "metrics"]
    provenance = records.provenance(*sources, versions=versions)
    started = time.perf_counter()
    loss = SegmentationLoss(class_weights=class_weights((m for _, m in pairs), classes))
    fit(
        model,
        pairs,
        epochs=SCENES.epochs,
        batch_size=SCENES.batch_size,
        rate=SCENES.rate,
        loss=loss,
        seed=seed,
        mixed=SCENES.mixed,
    )
    scores = evaluate(model, report, mixed=SCENES.mixed)
    image = normalize(report[0][0][None]).to(next(model.parameters()).device)
    return {
        "what": what,
        "seed": seed,
        "miou": round(scores.miou, 2),
        "boundary_miou": round(scores.boundary_miou, 2),
        "iou": dict(zip(SCENES.classes, (round(v, 2) for v in scores.iou), strict=True)),
        "extents": EXTENTS,
        "by_extent": by_extent(model, report)._asdict(),
        "parameters": count_parameters(model.decoder),
        "macs": count_macs(model, image) - count_macs(model.encoder, image),
        "seconds": round(time.perf_counter() - started, 1),
        "provenance": provenance,
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


def vectors(pool: Callable[[Tensor], Tensor], maps: Sequence[Tensor]) -> NDArray[np.float32]:
    return torch.cat([pool(c5) for c5 in maps]).numpy()


@torch.no_grad()
def read(seed: int) -> records.Record:
    """Fit linear readouts of the shapes at 128 pixels or at several sizes; try them at `SIDES`."""
    started = time.perf_counter()
    sources = [f"{MODULE}::{cls}" for cls in ("SpatialPyramid", "BothSpatialPyramid")]
    provenance = records.provenance(f"experiments/{NAME}.py::read", *sources)
    encoder = ResNet18Encoder("bundled")
    known = Maps(encoder, range(10_000 + 2000 * seed, 10_000 + 2000 * seed + TRAIN))
    unknown = Maps(encoder, range(20_000 + 2000 * seed, 20_000 + 2000 * seed + TEST))
    shares = [slice(start, None, len(SEVERAL)) for start in range(len(SEVERAL))]
    one = known.c5(128)
    several = [known.c5(side, share) for side, share in zip(SEVERAL, shares, strict=True)]
    answers = np.concatenate([known.has[share] for share in shares])
    fitted = {name: _fit(vectors(pool, one), known.has) for name, pool in POOLS.items()}
    for name, pool in POOLS.items():
        mixed = vectors(pool, list(itertools.chain.from_iterable(several)))
        fitted[f"{name}, several sizes"] = _fit(mixed, answers)
    areas: dict[str, list[float]] = {name: [] for name in fitted}
    for side in SIDES:
        maps = unknown.c5(side)
        for name, model in fitted.items():
            said = model.predict(vectors(POOLS[name.removesuffix(", several sizes")], maps))
            areas[name].append(round(float(roc_auc_score(unknown.has, said)), 4))
    ends = {name: _ends(model) for name, model in fitted.items()}
    return {
        "what": "sizes",
        "seed": seed,
        "sides": SIDES,
        "auc": areas,
        "strengths_at_an_end": ends,
        "scenes": {"train": TRAIN, "test": TEST},
        "seconds": round(time.perf_counter() - started, 1),
        "provenance": provenance,
    }


def _ends(model: Pipeline) -> int:
    """Return for how many of the shapes the strength is the least or the largest on offer."""
    return int(np.isin(model[-1].alpha_, STRENGTHS[[0, -1]]).sum())


def _fit(features: NDArray[np.float32], has: NDArray[np.bool_]) -> Pipeline:
    model = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS, alpha_per_target=True))
    return model.fit(features, 2.0 * has - 1)


def main() -> None:
    if os.environ.get("BOOK_WEIGHTS"):
        sys.exit("BOOK_WEIGHTS is set, and would measure another encoder: unset it.")
    torch.set_num_threads(1)
    for seed in range(3):
        tasks = {"sizes": partial(read, seed)}
        tasks |= {what: partial(train, what, seed) for what in TRIALS}
        for what, task in tasks.items():
            try:
                with records.lock(f"{NAME} {what} {seed}", timeout=0):
                    if records.is_done(NAME, what=what, seed=seed):
                        continue
                    record = task()
                    records.append(NAME, record, key=("what", "seed"))
            except Timeout:
                continue  # another process is at it
            print(what, seed, record.get("miou", record.get("auc")), flush=True)


if __name__ == "__main__":
    main()
