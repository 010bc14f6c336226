"""Two loops that train: `fit` a Segmenter, and `minimise` the loss of anything else."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from helpers._deprecated import renamed
from helpers.encoder import Segmenter
from helpers.metrics import NOTHING_IGNORED, SegmentationLoss
from helpers.progress import tqdm
from helpers.training.checkpoints import Run
from helpers.training.feeding import Features, Pairs, Precision, batches, check_counts, source
from helpers.training.scoring import check_masks, evaluate, new_iou, per_cent

VERSION = 1  # raised when the same call would end with other weights: records rest on it
WARM_UP = 0.2  # of the steps, up to the full rate
WEIGHT_DECAY = 0.01  # of matrices and kernels only

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class History:
    """What a training went through, one value for each epoch.

    `loss` is the mean over the epoch; `miou` (per cent) that of the `validation` data where there
    are some (`validated`), else that of the training images as they passed. Empty for targets
    without classes.
    """

    loss: list[float] = field(default_factory=list)
    miou: list[float] = field(default_factory=list)
    validated: bool = False


def budget(short: int, full: int, *, gpu: bool = True) -> int:
    """Return `full` on a GPU or where the environment says `BOOK_BUDGET=full`, else `short`.

    For the number of epochs in a chapter: `short` ones are over in seconds on one CPU core. `gpu`
    says whether the training moves to a GPU where there is one; `fit` does.
    """
    wanted = os.environ.get("BOOK_BUDGET", "")
    if wanted not in ("", "short", "full"):
        raise ValueError(f"Unknown BOOK_BUDGET {wanted!r}: expected short or full.")
    there = gpu and torch.cuda.is_available()
    return full if wanted == "full" or (not wanted and there) else short


@renamed(rate="lr", encoder_rate="encoder_lr")
def fit(
    model: Segmenter,
    data: Pairs,
    *,
    epochs: int = 10,
    batch_size: int = 8,
    lr: float = 2e-3,
    encoder_lr: float | None = None,
    loss: Loss | None = None,
    ignore_index: int = NOTHING_IGNORED,
    flip: bool = True,
    validation: Pairs | None = None,
    seed: int = 0,
    cache: bool | None = None,
    features: Features | None = None,
    mixed: bool | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    resume: str | Path | None = None,
    after_epoch: Callable[[int], object] | None = None,
) -> History:
    """Train `model` on pairs of images and masks, with AdamW and a one-cycle learning rate.

    Args:
        model: trained in place; ends on `device`. What needs no gradient stays as it is.
        data: pairs of an image `[3, H, W]` (0…1) and a mask `[H, W]` (integers), all of one size.
        lr, encoder_lr: highest learning rates of the decoder and the encoder (`lr / 10`).
        loss: called as `loss(logits, masks)`; otherwise `SegmentationLoss(ignore_index)`.
        flip: mirror each image, left to right, with probability ½.
        cache: where the encoder is frozen, compute its maps once and keep them in float16; says
            how much memory they take. `None` caches up to 4 GB.
        features: what `cache_features` made of `data`, in place of `cache`.
        mixed: compute in bfloat16 (float16 on older GPUs); `None` does so on a GPU.
        device: `None` takes a GPU where there is one.
        checkpoint: a file that is written after each epoch.
        resume: a checkpoint to go on from; with the same settings, the weights end as they would
            have without the interruption (on a CPU, bit for bit).
        after_epoch: called with the number of epochs done, for pictures on the way; what it draws
            from torch's random numbers does not change the training.

    Equal seeds give equal weights on one CPU; a GPU adds in no fixed order. Raises `ValueError`
    for data or settings that do not fit, and `FloatingPointError` when the loss is not finite.
    """
    count = len(data)  # type: ignore[arg-type]
    check_counts(epochs=epochs, batch_size=batch_size, images=count)
    encoder_lr = lr / 10 if encoder_lr is None else encoder_lr
    settings: dict[str, Any] = dict(epochs=epochs, batch_size=batch_size, lr=lr)
    settings |= dict(encoder_lr=encoder_lr, flip=flip, seed=seed, images=count)
    settings |= dict(cache=cache, mixed=mixed, ignore_index=ignore_index)
    precision = Precision(device, mixed)
    loss = loss or SegmentationLoss(ignore_index)
    for part in (model, loss):
        if isinstance(part, nn.Module):
            part.to(precision.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    torch.manual_seed(seed)
    if features is not None:
        features.check(model, count, flip, precision)
    feed = features or source(model, data, flip, cache, precision)
    optimizer = AdamW(_groups(model, lr, encoder_lr), weight_decay=WEIGHT_DECAY)
    highest = max(group["lr"] for group in optimizer.param_groups)
    steps = math.ceil(count / batch_size)
    schedule = one_cycle(optimizer, epochs * steps)
    run = Run(
        settings, model=model, optimizer=optimizer, schedule=schedule, scaler=precision.scaler
    )
    history = History() if resume is None else History(**run.load(resume))
    history.validated = validation is not None

    done = len(history.loss)
    with tqdm(total=epochs * steps, initial=done * steps, unit="step") as bar:
        for epoch in range(done, epochs):
            model.train()
            losses, seen = 0.0, None
            for batch in batches(feed, count, batch_size, flip, seed, epoch):
                with precision.autocast():
                    logits = batch.logits(model)
                check_masks(logits, batch.masks, ignore_index)
                value = loss(logits, batch.masks)
                losses += _finite(value, epoch, highest, "pixel that counts")
                precision.step(value, optimizer)
                schedule.step()
                if validation is None and not batch.masks.is_floating_point():
                    seen = seen or new_iou(logits.shape[1], ignore_index, logits.device)
                    seen.update(logits.detach().argmax(1), batch.masks)
                bar.update()
                bar.set_postfix(loss=f"{value.item():.3f}", mIoU=_last(history), refresh=False)
            history.loss.append(losses / steps)
            if validation is not None:
                scores = evaluate(model, validation, ignore_index=ignore_index, mixed=mixed)
                history.miou.append(scores.miou)
            elif seen is not None:
                history.miou.append(per_cent(seen.compute(), ignore_index).nanmean().item())
            bar.set_postfix(loss=f"{history.loss[-1]:.3f}", mIoU=_last(history))
            if checkpoint is not None:
                run.save(checkpoint, asdict(history))
            _look(after_epoch, epoch)
    return history


def one_cycle(optimizer: Optimizer, steps: int, warm_up: float = WARM_UP) -> OneCycleLR:
    """Let each group's learning rate rise to what it is now, and fall to almost nothing.

    Over `steps` steps; `warm_up` (0…1) of them is the way up.
    """
    # A way up of exactly one step makes OneCycleLR divide by zero.
    warm_up *= 1.25 if steps * warm_up == 1 else 1
    highest = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, highest, total_steps=steps, pct_start=warm_up)


def minimise(
    module: nn.Module,
    loss_of: Callable[[Tensor, int], Tensor],
    count: int,
    *,
    epochs: int,
    lr: float = 2e-3,
    batch_size: int = 16,
    seed: int | None = 0,
    schedule: Callable[[Optimizer, int], LRScheduler] | None = one_cycle,
    clip: float | None = None,
    after_epoch: Callable[[int], object] | None = None,
) -> list[float]:
    """Train `module`, whatever it is, with AdamW; return the mean loss of each epoch.

    Args:
        loss_of: called as `loss_of(chosen, epoch)` with the indices `[batch_size]` or fewer of
            some of the `count` examples; returns their loss.
        seed: of their order, a new one each epoch; `None` draws it from torch's random numbers.
        schedule: called with the optimiser and the number of steps, as `one_cycle`; `None` keeps
            `lr` as it is.
        clip: the longest that the gradient, of all parameters together, may be.
        after_epoch: as for `fit`.

    In evaluation mode afterwards. Raises `ValueError` for nothing to train or to train on, and
    `FloatingPointError` when the loss is not finite.
    """
    check_counts(epochs=epochs, batch_size=batch_size, examples=count)
    learnt = [p for p in module.parameters() if p.requires_grad]
    optimizer = AdamW(learnt, lr)
    cycle = schedule and schedule(optimizer, epochs * math.ceil(count / batch_size))
    order = None if seed is None else torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        module.train()
        total = 0.0
        for chosen in torch.randperm(count, generator=order).split(batch_size):
            loss = loss_of(chosen, epoch)
            total += _finite(loss, epoch, lr, "example that counts") * len(chosen) / count
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(learnt, clip)
            optimizer.step()
            if cycle is not None:
                cycle.step()
        losses.append(total)
        _look(after_epoch, epoch)
    module.eval()
    return losses


def _groups(model: Segmenter, lr: float, encoder_lr: float) -> list[dict[str, Any]]:
    """Vectors (biases, BatchNorm) are not decayed: small ones of them are no simpler model."""
    inside = {id(p) for p in model.encoder.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            key = encoder_lr if id(p) in inside else lr, WEIGHT_DECAY if p.ndim > 1 else 0.0
            groups.setdefault(key, []).append(p)
    if not groups:
        raise ValueError("Nothing to train: no parameter of the model needs a gradient.")
    return [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()]


def _finite(loss: Tensor, epoch: int, lr: float, what: str) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The loss became {value} in epoch {epoch + 1}. Most often the learning rate is too "
            f"high (it is {lr:g}: try a tenth), or a batch has no {what}."
        )
    return value


def _look(after_epoch: Callable[[int], object] | None, epoch: int) -> None:
    if after_epoch is not None:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            after_epoch(epoch + 1)


def _last(history: History) -> str:
    return f"{history.miou[-1]:.1f}" if history.miou else "–"
