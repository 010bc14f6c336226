"""Scores one segmentation in every way that the benchmark reports, from one look at each image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import label, regionprops
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from experiments.trials import Pairs
from helpers.encoder import Segmenter, normalize
from helpers.feeding import Precision
from helpers.inspection import evaluating
from helpers.metrics import BoundaryIoU

PORTION = 8  # images at once
SMALL = 16  # pixels: a small thing's box is shorter and narrower
LEAST = 12  # pixels; less is what another thing left of one
AROUND = 8  # pixels about a thing's box in which its class counts as its own


class Scores(NamedTuple):
    """All in per cent.

    `miou` and `boundary_miou` (2 px) are those of `helpers.training.evaluate`, and `iou` holds each
    class's. `thin_iou` is the mean IoU of the classes called thin; `small_iou`
    is the mean over small things, each by itself, see `small_things`.
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
) -> Scores:
    """Score a model, which is left as it was, on pairs of images and masks of one size."""
    guesses = labels_of(model, pairs, mixed)
    masks = torch.stack([mask for _, mask in pairs])
    settings = {"average": None, "ignore_index": ignore_index, "zero_division": float("nan")}
    jaccard = MulticlassJaccardIndex(len(classes), validate_args=False, **settings)
    rims = BoundaryIoU(len(classes), 2, ignore_index)
    for guess, mask in zip(guesses.split(PORTION), masks.split(PORTION), strict=True):
        jaccard.update(guess, mask)
        rims.update(guess, mask)
    iou = dict(zip(classes, (100 * jaccard.compute()).tolist(), strict=True))
    counts = jaccard.confmat
    kinds = [classes.index(name) for name in things]
    small = small_things(guesses.numpy(), masks.numpy(), kinds, ignore_index)
    return Scores(
        miou=float(np.nanmean(list(iou.values()))),
        boundary_miou=float((100 * rims.compute()).nanmean()),
        thin_iou=float(np.nanmean([iou[name] for name in thin])),
        small_iou=100 * float(np.mean(small)) if small else float("nan"),
        small_things=len(small),
        accuracy=float(100 * counts.trace() / counts.sum()),
        iou=iou,
    )


@torch.no_grad()
def labels_of(model: Segmenter, pairs: Pairs, mixed: bool) -> Tensor:
    """Return the class of each pixel, `[N, H, W]`, on the CPU."""
    precision = Precision(next(model.parameters()).device, mixed)
    found = []
    with evaluating(model), precision.autocast():
        for start in range(0, len(pairs), PORTION):
            images = torch.stack([image for image, _ in pairs[start : start + PORTION]])
            images = images.to(precision.device, memory_format=torch.channels_last)
            found.append(model(normalize(images)).argmax(1).cpu())
    return torch.cat(found)


def small_things(
    guesses: NDArray[np.int64], masks: NDArray[np.int64], kinds: list[int], ignore_index: int
) -> list[float]:
    """Return the IoU (0…1) of each small thing.

    A thing is a connected region of one of the classes `kinds` in the true mask, whatever hides it
    in part. Its IoU counts the pixels of its class in and about its box, without those of other
    things of the class and without those that nobody labelled.
    """
    found = []
    for guess, truth in zip(guesses, masks, strict=True):
        labels = label(np.where(np.isin(truth, kinds), truth + 1, 0), background=0)
        for region in regionprops(labels):
            top, left, bottom, right = region.bbox
            if region.area < LEAST or max(bottom - top, right - left) >= SMALL:
                continue
            kind = truth[tuple(region.coords[0])]
            rows = slice(max(0, top - AROUND), bottom + AROUND)
            box = rows, slice(max(0, left - AROUND), right + AROUND)
            own = labels[box] == region.label
            free = (truth[box] != kind) & (truth[box] != ignore_index)
            claimed = (guess[box] == kind) & (own | free)
            found.append(float((claimed & own).sum() / (claimed | own).sum()))
    return found
