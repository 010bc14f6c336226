"""Scores and losses agree with loops, formulas and morphology that were written independently."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_erosion, gaussian_filter
from torch import Tensor

from helpers import metrics
from helpers.metrics import BoundaryIoU, SegmentationLoss, class_weights, dice_loss


def blobs(seed: int, count: int = 2, classes: int = 4, size: tuple[int, int] = (40, 56)) -> Tensor:
    """Labels `[count, H, W]` in smooth patches that also touch the edges of the image."""
    noise = np.random.default_rng(seed).normal(size=(count, classes, *size))
    return torch.tensor(gaussian_filter(noise, (0, 0, 3, 3)).argmax(1))


def eroded_boundary_iou(
    predicted: Tensor, target: Tensor, classes: int, width: int, ignored: int
) -> list[float]:
    """Boundary IoU by erosion with a square, image by image, from the paper's definition."""
    square = np.ones((2 * width + 1, 2 * width + 1))
    values = []
    for k in range(classes):
        both = either = 0
        for found, wanted in zip(predicted.numpy(), target.numpy(), strict=True):
            counted = wanted != ignored
            found_edge, wanted_edge = (
                (labels == k) & ~binary_erosion((labels == k) | ~counted, square, border_value=1)
                for labels in (found, wanted)
            )
            both += (found_edge & wanted_edge & counted).sum()
            either += ((found_edge | wanted_edge) & counted).sum()
        values.append(both / either if either else math.nan)
    return values


def boundary_iou(predicted: Tensor, target: Tensor, width: int = 2, classes: int = 2) -> Tensor:
    metric = BoundaryIoU(classes, width)
    metric.update(predicted, target)
    return metric.compute()


def square(top: int, left: int, side: int = 24) -> Tensor:
    mask = torch.zeros(1, 64, 64, dtype=torch.long)
    mask[:, top : top + side, left : left + side] = 1
    return mask


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_boundary_iou_is_that_of_eroded_masks(width: int) -> None:
    metric = BoundaryIoU(5, width, ignore_index=255)  # the fifth class never comes
    predicted, target = blobs(1), blobs(2)
    target = torch.where(
        torch.tensor(np.random.default_rng(3).random((2, 40, 56)) < 0.1), 255, target
    )
    for i in range(2):  # one update for each image, one division at the end
        metric.update(predicted[i : i + 1], target[i : i + 1])
    expected = eroded_boundary_iou(predicted, target, 5, width, 255)
    assert metric.compute().tolist() == pytest.approx(expected, nan_ok=True)
    assert math.isnan(expected[4]) and 0 < min(expected[:4]) < max(expected[:4]) < 1


def test_equal_masks_have_a_boundary_iou_of_one() -> None:
    assert boundary_iou(blobs(4), blobs(4), classes=4).tolist() == [1] * 4


def test_what_is_predicted_where_nothing_is_labelled_changes_nothing() -> None:
    target = blobs(5)
    target[:, 8:30, 10:40] = 255
    for filler in (0, 3, blobs(6)):
        metric = BoundaryIoU(4, ignore_index=255)
        metric.update(torch.where(target == 255, filler, target), target)
        assert metric.compute().tolist() == [1] * 4


def test_boundary_iou_falls_the_further_a_shape_is_shifted() -> None:
    values = [boundary_iou(square(10, 10 + by), square(10, 10))[1] for by in range(6)]
    assert values[0] == 1
    assert all(later < earlier for earlier, later in pairwise(values))


def test_a_shifted_edge_costs_boundary_iou_more_than_iou() -> None:
    wanted, found = square(10, 10) == 1, square(10, 12) == 1
    iou = (wanted & found).sum() / (wanted | found).sum()
    assert boundary_iou(found.long(), wanted.long())[1] < iou - 0.2


def test_the_edge_of_the_image_is_no_edge_and_a_hole_has_one() -> None:
    whole = torch.ones(1, 64, 64, dtype=torch.long)
    metric = BoundaryIoU(2)
    metric.update(whole, whole)
    assert metric.compute().isnan().all()  # no edge anywhere, so nothing to compare
    wanted, holed = square(10, 10, 40), square(10, 10, 40)
    holed[:, 30, 30] = 0
    edge_of_square = 40**2 - 36**2
    expected = edge_of_square / (edge_of_square + 5**2 - 1)
    assert boundary_iou(holed, wanted)[1].item() == pytest.approx(expected)


def test_a_width_that_covers_every_shape_makes_it_the_usual_iou() -> None:
    wanted, found = square(10, 10), square(14, 13)
    both, either = (wanted & found).sum(), (wanted | found).sum()
    value = boundary_iou(found, wanted, width=64)[1]
    assert value.item() == pytest.approx((both / either).item())


def test_the_boundary_went_by_another_name() -> None:
    with pytest.warns(DeprecationWarning, match=r"metrics\.rim is now helpers\.metrics\.boundary_"):
        assert metrics.rim is metrics.boundary_pixels
    with pytest.raises(AttributeError, match="no attribute 'brim'"):
        metrics.brim  # noqa: B018


@pytest.mark.parametrize("ignored", [-100, 255])
def test_dice_is_what_a_loop_computes(ignored: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, generator=generator)
    masks = torch.randint(0, 3, (2, 5, 6), generator=generator)  # the fourth class never comes
    masks[0, :2] = ignored
    probabilities = logits.softmax(1).numpy()
    overlap, total = np.zeros(4), np.zeros(4)
    for b in range(2):
        for y in range(5):
            for x in range(6):
                label = int(masks[b, y, x])
                if label == ignored:
                    continue
                for k in range(4):
                    overlap[k] += probabilities[b, k, y, x] * (k == label)
                    total[k] += probabilities[b, k, y, x] + (k == label)
    expected = 1 - (2 * overlap[:3] / total[:3]).mean()
    assert dice_loss(logits, masks, ignored).item() == pytest.approx(expected, rel=1e-5)


def test_dice_is_zero_for_the_masks_and_one_for_nothing_found() -> None:
    masks = blobs(5)
    perfect = 50.0 * F.one_hot(masks, 4).movedim(-1, 1)
    assert dice_loss(perfect, masks).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(perfect.roll(1, dims=1), masks).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_masks_may_be_integers_of_any_kind(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 5, 6, 7), torch.randint(5, (2, 6, 7))
    loss = SegmentationLoss(4, dice=1.0)
    assert torch.equal(loss(logits, masks.to(dtype)), loss(logits, masks))


def test_the_loss_is_cross_entropy_with_dice_on_top() -> None:
    logits, masks = torch.randn(2, 4, 40, 56), blobs(6)
    masks[:, :7] = 255
    plain = F.cross_entropy(logits, masks, ignore_index=255)
    assert torch.equal(SegmentationLoss(255)(logits, masks), plain)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.5])
    weighted = F.cross_entropy(logits, masks, weights, ignore_index=255)
    assert torch.equal(SegmentationLoss(255, weights)(logits, masks), weighted)
    both = SegmentationLoss(255, weights, dice=0.7)(logits, masks)
    torch.testing.assert_close(both, weighted + 0.7 * dice_loss(logits, masks, 255))


def test_the_loss_of_bfloat16_logits_is_summed_in_float32() -> None:
    logits, masks = torch.randn(2, 4, 40, 56).bfloat16(), blobs(6)
    loss = SegmentationLoss(dice=1.0)(logits, masks)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, SegmentationLoss(dice=1.0)(logits.float(), masks))


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_ignored_pixels_get_no_gradient(dice: float) -> None:
    logits, masks = torch.randn(2, 4, 40, 56, requires_grad=True), blobs(7)
    masks[:, :, 30:] = 255
    SegmentationLoss(255, dice=dice)(logits, masks).backward()
    assert logits.grad is not None
    assert not logits.grad[..., 30:].any() and logits.grad[..., :30].any()


def test_class_weights_are_the_roots_of_the_inverse_counts() -> None:
    masks = [torch.tensor([[0, 0, 0, 0], [9, 9, 1, 0]]), torch.tensor([[0, 0, 0, 0], [9, 9, 9, 9]])]
    found = class_weights(masks, 3, ignore_index=9)  # 9, 1 and no pixels
    roots = np.array([1 / 3, 1.0, 1.0])
    assert found.tolist() == pytest.approx(list(roots / roots.mean()))
    assert found.mean().item() == pytest.approx(1)
