"""Scores one segmentation in every way that the benchmark reports, from one look at each image."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label, regionprops
from torch import Tensor

from helpers.encoder import Segmenter
from helpers.training import Pairs, evaluate

SMALL = 16  # pixels: a small thing's box is shorter and narrower
LEAST = 12  # pixels; less is what another thing left of one
AROUND = 8  # pixels about a thing's box in which its class counts as its own


class WideScores(NamedTuple):
    """All in per cent.

    `miou`, `boundary_miou` (2 px) and `accuracy` are those of `helpers.training.evaluate`, and
    `iou` holds each class's. `thin_iou` is the mean IoU of the classes called thin; `small_iou` is
    the mean over small things, each by itself, see `small_things`.
    """

    miou: float
    boundary_miou: float
    thin_iou: float
    small_iou: float
    small_things: int
    accuracy: float
    iou: dict[str, float]


def score(
    model: Segmenter,
    pairs: Pairs,
    *,
    classes: tuple[str, ...],
    thin: tuple[str, ...],
    things: tuple[str, ...],
    ignore_index: int,
    mixed: bool,
) -> WideScores:
    """Score a model, which is left as it was, on pairs of images and masks of one size."""
    kinds = [classes.index(name) for name in things]
    small: list[float] = []

    def look(labels: Tensor, masks: Tensor) -> None:
        small.extend(small_things(labels.cpu().numpy(), masks.cpu().numpy(), kinds, ignore_index))

    scores = evaluate(model, pairs, ignore_index=ignore_index, mixed=mixed, also=look)
    iou = dict(zip(classes, scores.iou, strict=True))
    return WideScores(
        miou=float(np.nanmean(scores.iou)),  # in float64, as the records have it
        boundary_miou=scores.boundary_miou,
        thin_iou=float(np.nanmean([iou[name] for name in thin])),
        small_iou=100 * float(np.mean(small)) if small else float("nan"),
        small_things=len(small),
        accuracy=scores.accuracy,
        iou=iou,
    )


def small_things(
    guesses: NDArray[np.int64], masks: NDArray[np.int64], kinds: list[int], ignore_index: int
) -> list[float]:
    """Return the IoU (0…1) of each small thing of the classes `kinds`, see `things`."""
    found = itertools.chain.from_iterable(
        things(guess, truth, kinds, ignore_index)
        for guess, truth in zip(guesses, masks, strict=True)
    )
    return [thing.iou for thing in found if thing.extent < SMALL]


class Thing(NamedTuple):
    """One thing's class, the longer side of its box in pixels, its IoU and its recall (0…1)."""

    kind: int
    extent: int
    iou: float
    recall: float


def things(
    guess: NDArray[np.int64], truth: NDArray[np.int64], kinds: list[int], ignore_index: int
) -> Iterator[Thing]:
    """Yield how well each thing of one image is found.

    A thing is a connected region of one of the classes `kinds` in the true mask, whatever hides it
    in part. Its IoU counts the pixels of its class in and about its box, without those of other
    things of the class and without those that nobody labelled; its recall only those on the thing.
    """
    labels = label(np.where(np.isin(truth, kinds), truth + 1, 0), background=0)
    for region in regionprops(labels):
        if region.area < LEAST:
            continue
        top, left, bottom, right = region.bbox
        kind = truth[tuple(region.coords[0])]
        rows = slice(max(0, top - AROUND), bottom + AROUND)
        box = rows, slice(max(0, left - AROUND), right + AROUND)
        own = labels[box] == region.label
        free = (truth[box] != kind) & (truth[box] != ignore_index)
        claimed = (guess[box] == kind) & (own | free)
        hits = (claimed & own).sum()
        iou, recall = float(hits / (claimed | own).sum()), float(hits / own.sum())
        yield Thing(int(kind), max(bottom - top, right - left), iou, recall)
