"""Augments whole batches where they lie, on the CPU or the GPU; every image by its own dice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Dice = torch.Generator


def crop_and_flip(images: Tensor, side: int, smallest: float, dice: Dice) -> Tensor:
    """Return random resized crops `[B, C, side, side]`, half of them mirrored.

    Each image gets its own crop: `smallest` to 1 of the area, width to height 3:4 to 4:3
    (torchvision's `RandomResizedCrop`), read bilinearly.
    """
    count, device = len(images), images.device
    area = _between(smallest, 1, count, device, dice)
    ratio = _between(-1, 1, count, device, dice).mul(torch.log(torch.tensor(4 / 3))).exp()
    scale = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
    # In grid_sample's coordinates the image spans -1…1, and so a crop's centre ±(1 - scale).
    centre = (1 - scale) * _between(-1, 1, 2 * count, device, dice).view(count, 2)
    mirror = torch.where(_between(0, 1, count, device, dice) < 0.5, -1.0, 1.0)
    matrix = torch.zeros(count, 2, 3, device=device)
    matrix[:, 0, 0] = scale[:, 0] * mirror
    matrix[:, 1, 1] = scale[:, 1]
    matrix[:, :, 2] = centre
    grid = F.affine_grid(matrix, [count, images.shape[1], side, side], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def change_colors(images: Tensor, strength: float, dice: Dice) -> Tensor:
    """Scale brightness, contrast and saturation of `[B, 3, H, W]` in 0…1 by 1 ± `strength`."""
    factors = _between(1 - strength, 1 + strength, 3 * len(images), images.device, dice)
    brightness, contrast, saturation = factors.view(3, -1, 1, 1, 1)
    images = images * brightness
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
    return torch.lerp(images.mean(1, keepdim=True), images, saturation).clamp(0, 1)


def cutmix(images: Tensor, dice: Dice) -> tuple[Tensor, Tensor, Tensor]:
    """Paste into each image a box of another one.

    Returns the images, who gave the box (`[B]`, indices), and what each image keeps of its own
    (`[B]`, 0…1). The share to keep is uniform in 0…1 before boxes are cut off at the border.
    Source: Yun et al., CutMix, ICCV 2019.
    """
    count, _, height, width = images.shape
    device = images.device
    other = torch.randperm(count, generator=dice, device=device)
    half = (1 - _between(0, 1, count, device, dice)).sqrt().view(-1, 1, 1) / 2
    y, x = _between(0, 1, 2 * count, device, dice).view(2, -1, 1, 1)
    rows = (torch.arange(height, device=device) + 0.5).view(1, -1, 1) / height
    columns = (torch.arange(width, device=device) + 0.5).view(1, 1, -1) / width
    box = ((rows - y).abs() < half) & ((columns - x).abs() < half)
    kept = 1 - box.float().mean((1, 2))
    return torch.where(box[:, None], images[other], images), other, kept


def _between(low: float, high: float, count: int, device: torch.device, dice: Dice) -> Tensor:
    return torch.rand(count, generator=dice, device=device) * (high - low) + low
