"""Scores of a segmentation, accumulated over a whole data set, and the losses beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers._deprecated import old_names

VERSION = 2  # raised when the same predictions would get other scores: records rest on it
NOTHING_IGNORED = -100  # what torch's cross-entropy ignores by default


class Scores(NamedTuple):
    """How well a model segments a data set, every value in per cent.

    `iou` and `boundary_iou` hold one value for each class, NaN where neither the masks nor the
    predictions have it, and for a class that is ignored; `miou` and `boundary_miou` are their
    means without the NaNs.
    """

    miou: float
    boundary_miou: float
    iou: tuple[float, ...]
    boundary_iou: tuple[float, ...]
    accuracy: float


class BoundaryIoU(nn.Module):
    """IoU of boundaries only: of the pixels of a class within `width` pixels of its edge.

    `update` takes predicted and true classes, integers `[B, H, W]`; `compute` returns one value
    in 0…1 for each class, accumulated over all updates, NaN for a class that never came. The edge
    of the image is no edge of a thing, and neither is the edge of an area with the mask's
    `ignore_index`: its pixels are not counted, whatever is predicted there. Distance is measured
    along rows and columns at once (a square of side `2 × width + 1`).

    Source: Cheng et al., Boundary IoU, CVPR 2021.
    """

    intersection: Tensor
    union: Tensor

    def __init__(
        self, num_classes: int, width: int = 2, ignore_index: int = NOTHING_IGNORED
    ) -> None:
        super().__init__()
        self.width, self.ignore_index = width, ignore_index
        for name in ("intersection", "union"):
            self.register_buffer(name, torch.zeros(num_classes, dtype=torch.long))

    def update(self, predicted: Tensor, target: Tensor) -> None:
        valid = target != self.ignore_index
        for k in range(len(self.union)):
            found = boundary_pixels(predicted == k, valid, self.width)
            wanted = boundary_pixels(target == k, valid, self.width)
            self.intersection[k] += (found & wanted).sum()
            self.union[k] += (found | wanted).sum()

    def compute(self) -> Tensor:
        return self.intersection / self.union


def boundary_pixels(mask: Tensor, valid: Tensor, width: int) -> Tensor:
    """Return the pixels of a mask within `width` pixels of what lies outside of it.

    Both are boolean, `[B, H, W]`. A pixel is one of them where it is valid and the square of side
    `2 × width + 1` around it reaches a valid pixel beyond the mask.
    """
    outside = (~mask & valid).float()
    return mask & valid & (F.max_pool2d(outside, 2 * width + 1, stride=1, padding=width) > 0)


class SegmentationLoss(nn.Module):
    """Cross-entropy per pixel; with `dice`, that many times the soft Dice loss on top.

    `forward(logits, masks)` takes `[B, num_classes, H, W]` and integers `[B, H, W]`, and returns
    a scalar ≥ 0. Pixels with `ignore_index` count nowhere; a batch that has no other is NaN.
    `class_weights` (`[num_classes]`, see `class_weights`) weigh the cross-entropy.

    Source of Dice for segmentation: Milletari et al., V-Net, 3DV 2016.
    """

    def __init__(
        self,
        ignore_index: int = NOTHING_IGNORED,
        class_weights: Tensor | None = None,
        dice: float = 0.0,
    ) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss(class_weights, ignore_index=ignore_index)
        self.ignore_index, self.dice = ignore_index, dice

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        logits, masks = logits.float(), _indices(masks)
        loss: Tensor = self.cross_entropy(logits, masks)
        if self.dice:
            loss = loss + self.dice * dice_loss(logits, masks, self.ignore_index)
        return loss


def dice_loss(logits: Tensor, masks: Tensor, ignore_index: int = NOTHING_IGNORED) -> Tensor:
    """Return 1 − the soft Dice coefficient, averaged over the classes that the masks have.

    `logits` `[B, num_classes, H, W]`, `masks` `[B, H, W]`; 0 is perfect, 1 is nothing found.
    """
    masks = _indices(masks)
    valid = (masks != ignore_index)[:, None]
    probabilities = logits.softmax(1) * valid
    wanted = F.one_hot(masks.where(valid[:, 0], 0), logits.shape[1]).movedim(-1, 1) * valid
    overlap, total, pixels = (
        part.sum((0, 2, 3)) for part in (probabilities * wanted, probabilities + wanted, wanted)
    )
    present = pixels > 0
    return 1 - (2 * overlap[present] / total[present]).mean()


def _indices(masks: Tensor) -> Tensor:
    """Return integers of any kind as int64, the only kind that cross-entropy takes."""
    return masks if masks.is_floating_point() else masks.long()


def class_weights(
    masks: Iterable[Tensor], num_classes: int, ignore_index: int = NOTHING_IGNORED
) -> Tensor:
    """Return `[num_classes]` weights ∝ 1/√(pixels of the class), their mean 1.

    Thin things have few pixels: unweighted, a short training never gets to them. Weights of
    1/pixels would make it see little else. A class without a pixel counts as one with a single one.
    """
    pixels = torch.zeros(num_classes)
    for mask in masks:
        counted = mask[mask != ignore_index].flatten()
        pixels += torch.bincount(counted, minlength=num_classes).cpu()
    weights = pixels.clamp(min=1).rsqrt()
    return weights / weights.mean()


__getattr__ = old_names(__name__, rim="boundary_pixels")
