"""Hands out training batches: images, or maps that a frozen encoder computed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from helpers.encoder import Pyramid, Segmenter, normalize
from helpers.inspection import evaluating

Pairs = Dataset[tuple[Tensor, Tensor]]
CACHE_LIMIT = 4 * 1024**3  # bytes
PORTION = 16  # images whose maps are computed at once


class Precision:
    """Where and in which precision to compute: mixed on a GPU, unless told otherwise."""

    def __init__(self, device: str | torch.device | None = None, mixed: bool | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = self.device.type == "cuda"
        self.mixed = on_gpu if mixed is None else mixed
        old_gpu = on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.float16 if old_gpu else torch.bfloat16
        # float16 ends at 65504 and 6e-8: gradients are scaled to lie between.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.mixed and self.dtype == torch.float16
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.mixed)

    def step(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Take one step down the gradient of `loss`."""
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


class Batch(NamedTuple):
    """One step's masks `[B, H, W]`, and normalised images `[B, 3, H, W]`, their maps, or both."""

    masks: Tensor
    images: Tensor | None
    pyramid: Pyramid | None

    def logits(self, model: Segmenter) -> Tensor:
        """Run the whole model, or only its decoder where the maps are there."""
        if self.pyramid is None:
            return model(self.images)
        extra = {} if self.images is None else {"image": self.images}
        return model.decode(self.pyramid, self.masks.shape[-2:], **extra)


class Images:
    """Batches of images, read from the data set when they are asked for."""

    def __init__(self, data: Pairs, precision: Precision) -> None:
        self.data, self.device = data, precision.device

    def batch(self, chosen: list[int], mirrored: Tensor) -> Batch:
        images, masks = (mirror(part, mirrored).to(self.device) for part in read(self.data, chosen))
        images = normalize(images).contiguous(memory_format=torch.channels_last)
        # Masks come as bytes, too; cross-entropy takes int64 only.
        return Batch(masks if masks.is_floating_point() else masks.long(), images, None)


class Features:
    """Batches of maps: each image's, and each mirror image's, are computed once, here.

    Kept in float16, with the channels last as the decoder wants them, beside the masks; where the
    decoder takes `image`, the normalised images too. `memory` tells beforehand how many bytes.
    """

    def __init__(self, model: Segmenter, data: Pairs, flip: bool, precision: Precision) -> None:
        self.count, self.device = len(data), precision.device  # type: ignore[arg-type]
        self.dtype = precision.dtype if precision.mixed else torch.float32
        self.made_for = _settings(model, self.count, flip, precision)
        images = Images(data, precision)
        first = _kept(model, images, [0], False, precision)
        rows = self.count * (1 + flip)
        # Taken at once: to join the parts later would need all the memory twice.
        self.masks, *self.maps = (each.new_empty((rows, *each.shape[1:])) for each in first)
        for side in (False, True)[: 1 + flip]:
            for chosen in torch.arange(self.count).split(PORTION):
                part = _kept(model, images, chosen.tolist(), side, precision)
                now, wanted = list(part[0].shape[1:]), list(self.masks.shape[1:])
                if now != wanted:
                    raise ValueError(
                        f"Items {chosen[0]} to {chosen[-1]} have masks {now}, the first has "
                        f"{wanted}; expected the same for all. Resize or crop them in the data set."
                    )
                for all_, some in zip((self.masks, *self.maps), part, strict=True):
                    all_[chosen + side * self.count] = some

    def batch(self, chosen: list[int], mirrored: Tensor) -> Batch:
        index = (torch.tensor(chosen) + self.count * mirrored).to(self.device)
        maps = [each[index].permute(0, 3, 1, 2).to(self.dtype) for each in self.maps]
        image = maps[5] if len(maps) > 5 else None
        return Batch(self.masks[index], image, Pyramid(*maps[:5]))

    def check(self, model: Segmenter, count: int, flip: bool, precision: Precision) -> None:
        """Raise `ValueError` unless these are features for this training."""
        _check_frozen(model.encoder, "features=")
        now = _settings(model, count, flip, precision)
        other = [f"{k} was {v}, is {now[k]}" for k, v in self.made_for.items() if v != now[k]]
        if other:
            raise ValueError(
                f"The features belong to another training: {', '.join(other)}. "
                "Call cache_features with the settings, data and kind of decoder that fit gets."
            )

    @staticmethod
    def memory(model: Segmenter, data: Pairs, flip: bool, precision: Precision) -> int:
        """Return the bytes that all this takes, seen on the first image."""
        first = _kept(model, Images(data, precision), [0], False, precision)
        return sum(each.nbytes for each in first) * len(data) * (1 + flip)  # type: ignore[arg-type]


def cache_features(
    model: Segmenter,
    data: Pairs,
    *,
    flip: bool = True,
    mixed: bool | None = None,
    device: str | torch.device | None = None,
) -> Features:
    """Return what the frozen encoder makes of `data`, for `fit(…, features=…)`.

    They serve every decoder on the same encoder, with the same data, `flip`, `mixed` and `device`,
    that takes the image as this one does or does not. Moves the model to `device`; says how much
    memory they take. Raises `ValueError` for an encoder that learns, and for data that do not fit.
    """
    check_counts(images=len(data))  # type: ignore[arg-type]
    precision = Precision(device, mixed)
    model.to(precision.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = source(model, data, flip, True, precision)
    assert isinstance(features, Features)
    return features


def source(
    model: Segmenter, data: Pairs, flip: bool, cache: bool | None, precision: Precision
) -> Images | Features:
    """Choose: `Features` for a frozen encoder (`cache=None`: up to 4 GB), else `Images`."""
    if cache:
        _check_frozen(model.encoder, "cache=True")
    if cache is False or not is_frozen(model.encoder):
        return Images(data, precision)
    needed = Features.memory(model, data, flip, precision)
    kind = "images and their mirror images" if flip else "images"
    what = f"the features of {len(data)} {kind}: {needed / 1e6:,.0f} MB"  # type: ignore[arg-type]
    if cache is None and needed > CACHE_LIMIT:
        print(f"Too large to cache are {what}. They are computed in every step.")
        return Images(data, precision)
    print(f"Caching {what}.")
    return Features(model, data, flip, precision)


def batches(
    source: Images | Features, count: int, batch_size: int, flip: bool, seed: int, epoch: int
) -> Iterator[Batch]:
    """Yield one epoch: every image once, in an order drawn from (seed, epoch), half of it mirrored.

    The draw does not depend on where the batches come from.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5 * flip
    for chosen, sides in zip(order.split(batch_size), mirrored.split(batch_size), strict=True):
        yield source.batch(chosen.tolist(), sides)


def is_frozen(encoder: nn.Module) -> bool:
    """Tell whether training leaves the encoder as it is: no gradients, and all parts in eval."""
    with evaluating(encoder):
        encoder.train()
        still = not any(part.training for part in encoder.modules())
    return still and not any(p.requires_grad for p in encoder.parameters())


def check_counts(**counts: int) -> None:
    """Raise `ValueError` for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"Expected {name} ≥ 1, got {count}.")


def _check_frozen(encoder: nn.Module, what: str) -> None:
    if not is_frozen(encoder):
        raise ValueError(
            f"{what} needs a frozen encoder: maps of one that learns change with every step. "
            "Use ResNet18Encoder(frozen=True), or cache=None."
        )


def _settings(model: Segmenter, count: int, flip: bool, precision: Precision) -> dict[str, object]:
    settings = dict(images=count, flip=flip, mixed=precision.mixed, device=precision.device.type)
    return {**settings, "the decoder takes the image": model.takes_image}


def _kept(
    model: Segmenter, images: Images, chosen: list[int], side: bool, precision: Precision
) -> list[Tensor]:
    """Return what `Features` keeps of these images: masks, maps `[B, h, w, C]`, maybe images."""
    batch = images.batch(chosen, torch.full((len(chosen),), side))
    assert batch.images is not None
    with evaluating(model.encoder), torch.no_grad(), precision.autocast():
        maps = [*model.encoder(batch.images), *([batch.images] if model.takes_image else [])]
    return [batch.masks, *(each.half().permute(0, 2, 3, 1).contiguous() for each in maps)]


def mirror(batch: Tensor, which: Tensor) -> Tensor:
    """Return `[B, …, W]`, the items chosen by `which` (`[B]`, boolean) turned left to right."""
    return torch.where(which.view(-1, *[1] * (batch.ndim - 1)), batch.flip(-1), batch)


def read(data: Pairs, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """Return these images `[B, 3, H, W]` and masks `[B, H, W]`; `ValueError` where sizes differ."""
    images, masks = zip(*(data[i] for i in chosen), strict=True)
    for index, image, mask in zip(chosen, images, masks, strict=True):
        if image.shape[-2:] != mask.shape[-2:] or image.shape != images[0].shape:
            raise ValueError(
                f"Item {index} is an image {list(image.shape)} with a mask {list(mask.shape)}; "
                f"expected [3, H, W] and [H, W], the same for all (the first of this batch: "
                f"{list(images[0].shape)}). Resize or crop them in the data set."
            )
    return torch.stack(images), torch.stack(masks)
