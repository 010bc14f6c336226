"""What a Segmenter predicts, and how well."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers.encoder import Segmenter, normalize
from helpers.inspection import evaluating
from helpers.metrics import NOTHING_IGNORED, BoundaryIoU, Scores
from helpers.training.feeding import Images, Pairs, Precision, check_counts


def evaluate(
    model: Segmenter,
    data: Pairs,
    *,
    ignore_index: int = NOTHING_IGNORED,
    width: int = 2,
    batch_size: int = 8,
    mixed: bool | None = None,
    also: Callable[[Tensor, Tensor], object] | None = None,
) -> Scores:
    """Compare predictions with masks over a whole data set, where the model's parameters are.

    Counts are accumulated over all images before they are divided: the mean of each batch's IoU
    would depend on the batches. `width` (pixels) is the boundary IoU's. Data as for `fit`. `also`
    is called with each batch's predicted and true classes, `[B, H, W]`, for scores of your own.
    The model is left as it was. Raises `ValueError` for data that do not fit.
    """
    count = len(data)  # type: ignore[arg-type]
    check_counts(images=count, batch_size=batch_size)
    precision = Precision(next(model.parameters()).device, mixed)
    images = Images(data, precision)
    inside: Any = None
    with evaluating(model), torch.no_grad():
        for chosen in torch.arange(count).split(batch_size):
            batch = images.batch(chosen.tolist(), torch.zeros(len(chosen), dtype=torch.bool))
            with precision.autocast():
                logits = batch.logits(model)
            if batch.masks.is_floating_point():
                raise ValueError(
                    f"The targets are {batch.masks.dtype}: there are no classes to compare. "
                    "Masks of class indices are integers: masks.long()."
                )
            check_masks(logits, batch.masks, ignore_index)
            labels, classes = logits.argmax(1), logits.shape[1]
            if inside is None:
                inside = new_iou(classes, ignore_index, logits.device)
                boundary = BoundaryIoU(classes, width, ignore_index).to(logits.device)
            inside.update(labels, batch.masks)
            boundary.update(labels, batch.masks)
            if also is not None:
                also(labels, batch.masks)
    iou = per_cent(inside.compute(), ignore_index)
    boundary_iou = per_cent(boundary.compute(), ignore_index)
    counts = inside.confmat
    return Scores(
        miou=iou.nanmean().item(),
        boundary_miou=boundary_iou.nanmean().item(),
        iou=tuple(iou.tolist()),
        boundary_iou=tuple(boundary_iou.tolist()),
        accuracy=(100 * counts.trace() / counts.sum()).item(),
    )


def predict(model: Segmenter, images: Tensor) -> Tensor:
    """Return the class of each pixel, `[B, H, W]`, for images `[B, 3, H, W]` in 0…1, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        return model(normalize(images.to(device))).argmax(1).cpu()


def new_iou(num_classes: int, ignore_index: int, device: torch.device) -> Any:
    """Return torchmetrics' IoU of each class, for `update(labels, masks)` and `compute()`."""
    # Imported here: it takes longer than all of this package.
    from torchmetrics.classification import MulticlassJaccardIndex

    return MulticlassJaccardIndex(
        num_classes,
        average=None,
        ignore_index=ignore_index,
        validate_args=False,
        zero_division=math.nan,
    ).to(device)


def per_cent(values: Tensor, ignore_index: int) -> Tensor:
    """Return `[num_classes]` in per cent, NaN for a class that is ignored: it would be 0."""
    values = 100 * values
    if 0 <= ignore_index < len(values):
        values[ignore_index] = math.nan
    return values


def check_masks(logits: Tensor, masks: Tensor, ignore_index: int) -> None:
    """Raise `ValueError` unless `masks` are classes that `logits` have, or no classes at all."""
    if masks.is_floating_point():
        return  # an image to reconstruct: its loss knows what fits
    if masks.ndim != 3:
        cure = "One-hot masks become indices in the data set: mask.argmax(0)."
        if masks.shape[1] == 1:
            cure = "Drop the channel in the data set: mask[0]."
        raise ValueError(
            f"Expected masks [B, H, W] of class indices, got {list(masks.shape)}. {cure}"
        )
    classes = logits.shape[1]
    wrong = masks[(masks < 0) | (masks >= classes)]
    wrong = wrong[wrong != ignore_index]
    if len(wrong):
        raise ValueError(
            f"The masks contain {wrong[0].item()}, but the model has {classes} classes "
            f"(0…{classes - 1}). If that value means “do not count”, pass "
            f"ignore_index={wrong[0].item()}; if not, give the decoder more out_channels."
        )
