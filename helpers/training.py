"""A plain training loop for any Segmenter, and its evaluation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from helpers import charts, checkpoints
from helpers.encoder import Segmenter, normalize
from helpers.feeding import Batch, Images, Pairs, Precision, batches, source
from helpers.inspection import evaluating
from helpers.metrics import NOTHING_IGNORED, BoundaryIoU, Scores, SegmentationLoss
from helpers.pictures import Picture
from helpers.progress import tqdm

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

    def plot(self, alt: str = "Loss and mIoU of each epoch of the training.") -> Picture:
        """Draw both, side by side, over the epochs."""
        return plot_histories({"training": self}, alt=alt)


def plot_histories(histories: Mapping[str, History], *, alt: str) -> Picture:
    """Draw loss and mIoU of several trainings of the same length, one line each."""
    kinds = {history.validated for history in histories.values()}
    of = "" if len(kinds) != 1 else " in validation" if True in kinds else " in training"
    panels = {
        "loss in training": {name: history.loss for name, history in histories.items()},
        f"mIoU{of}, %": {name: history.miou for name, history in histories.items()},
    }
    panels = {title: lines for title, lines in panels.items() if all(lines.values())}
    longest = max((len(history.loss) for history in histories.values()), default=0)
    return charts.show_panels(panels, x=range(1, longest + 1), xlabel="epoch", alt=alt)


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


def fit(
    model: Segmenter,
    data: Pairs,
    *,
    epochs: int = 10,
    batch_size: int = 8,
    rate: float = 2e-3,
    encoder_rate: float | None = None,
    loss: Loss | None = None,
    ignore_index: int = NOTHING_IGNORED,
    flip: bool = True,
    validation: Pairs | None = None,
    seed: int = 0,
    cache: bool | None = None,
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
        rate, encoder_rate: highest learning rates of the decoder and the encoder (`rate / 10`).
        loss: called as `loss(logits, masks)`; otherwise `SegmentationLoss(ignore_index)`.
        flip: mirror each image, left to right, with probability ½.
        cache: where the encoder is frozen, compute its maps once and keep them in float16; says
            how much memory they take. `None` caches up to 4 GB.
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
    _check_counts(epochs=epochs, batch_size=batch_size, images=count)
    encoder_rate = rate / 10 if encoder_rate is None else encoder_rate
    settings: dict[str, Any] = dict(epochs=epochs, batch_size=batch_size, rate=rate)
    settings |= dict(encoder_rate=encoder_rate, flip=flip, seed=seed, images=count)
    settings |= dict(cache=cache, mixed=mixed, ignore_index=ignore_index)
    precision = Precision(device, mixed)
    loss = loss or SegmentationLoss(ignore_index)
    for part in (model, loss):
        if isinstance(part, nn.Module):
            part.to(precision.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    torch.manual_seed(seed)
    feed = source(model, data, flip, cache, precision)
    optimizer = torch.optim.AdamW(_groups(model, rate, encoder_rate), weight_decay=WEIGHT_DECAY)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = math.ceil(count / batch_size)
    # A way up of exactly one step makes OneCycleLR divide by zero.
    warm_up = 0.25 if epochs * steps * WARM_UP == 1 else WARM_UP
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=epochs * steps, pct_start=warm_up
    )
    run = _Run(model, optimizer, schedule, precision.scaler, settings)
    history = History() if resume is None else run.load(resume)
    history.validated = validation is not None

    done = len(history.loss)
    with tqdm(total=epochs * steps, initial=done * steps, unit="step") as bar:
        for epoch in range(done, epochs):
            model.train()
            losses = 0.0
            score = _Score(ignore_index)
            for batch in batches(feed, count, batch_size, flip, seed, epoch):
                with precision.autocast():
                    logits = batch.logits(model)
                _check_masks(logits, batch, ignore_index)
                value = loss(logits, batch.masks)
                losses += _finite(value, epoch, rates)
                optimizer.zero_grad()
                precision.scaler.scale(value).backward()
                precision.scaler.step(optimizer)
                precision.scaler.update()
                schedule.step()
                if validation is None:
                    score.update(logits, batch.masks)
                bar.update()
                bar.set_postfix(loss=f"{value.item():.3f}", mIoU=_last(history), refresh=False)
            history.loss.append(losses / steps)
            if validation is not None:
                scores = evaluate(model, validation, ignore_index=ignore_index, mixed=mixed)
                history.miou.append(scores.miou)
            elif score.metric is not None:
                history.miou.append(score.miou())
            bar.set_postfix(loss=f"{history.loss[-1]:.3f}", mIoU=_last(history))
            if checkpoint is not None:
                run.save(checkpoint, history)
            if after_epoch is not None:
                with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                    after_epoch(epoch + 1)
    return history


def evaluate(
    model: Segmenter,
    data: Pairs,
    *,
    ignore_index: int = NOTHING_IGNORED,
    width: int = 2,
    batch_size: int = 8,
    mixed: bool | None = None,
) -> Scores:
    """Compare predictions with masks over a whole data set, where the model's parameters are.

    Counts are accumulated over all images before they are divided: the mean of each batch's IoU
    would depend on the batches. `width` (pixels) is the boundary IoU's. Data as for `fit`. The
    model is left as it was. Raises `ValueError` for data that do not fit.
    """
    count = len(data)  # type: ignore[arg-type]
    _check_counts(images=count, batch_size=batch_size)
    precision = Precision(next(model.parameters()).device, mixed)
    images = Images(data, precision)
    score = _Score(ignore_index)
    rims: BoundaryIoU | None = None
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
            _check_masks(logits, batch, ignore_index)
            score.update(logits, batch.masks)
            rims = rims or BoundaryIoU(logits.shape[1], width, ignore_index).to(logits.device)
            rims.update(logits.argmax(1), batch.masks)
    assert score.metric is not None and rims is not None
    iou, boundary = score.iou(), _without(100 * rims.compute(), ignore_index)
    counts = score.metric.confmat
    return Scores(
        miou=iou.nanmean().item(),
        boundary_miou=boundary.nanmean().item(),
        iou=tuple(iou.tolist()),
        boundary_iou=tuple(boundary.tolist()),
        accuracy=(100 * counts.trace() / counts.sum()).item(),
    )


def predict(model: Segmenter, images: Tensor) -> Tensor:
    """Return the class of each pixel, `[B, H, W]`, for images `[B, 3, H, W]` in 0…1, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        return model(normalize(images.to(device))).argmax(1).cpu()


class _Score:
    """The mIoU of what was seen so far; targets that are no classes are not counted."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.metric: MulticlassJaccardIndex | None = None

    def update(self, logits: Tensor, masks: Tensor) -> None:
        if masks.is_floating_point():
            return
        if self.metric is None:
            self.metric = MulticlassJaccardIndex(
                logits.shape[1],
                average=None,
                ignore_index=self.ignore_index,
                validate_args=False,
                zero_division=math.nan,
            ).to(logits.device)
        self.metric.update(logits.detach().argmax(1), masks)

    def iou(self) -> Tensor:
        assert self.metric is not None
        return _without(100 * self.metric.compute(), self.ignore_index)

    def miou(self) -> float:
        return float(self.iou().nanmean())


def _without(values: Tensor, ignore_index: int) -> Tensor:
    """Give a class that is ignored no value: it would be 0, whatever was predicted."""
    if 0 <= ignore_index < len(values):
        values[ignore_index] = math.nan
    return values


class _Run:
    """All that changes while training goes on, to be saved and loaded together."""

    def __init__(
        self, model: nn.Module, optimizer: Any, schedule: Any, scaler: Any, settings: dict[str, Any]
    ) -> None:
        self.model, self.optimizer, self.settings = model, optimizer, settings
        self.others = {"schedule": schedule, "scaler": scaler}

    def save(self, path: str | Path, history: History) -> None:
        state = self.optimizer.state_dict()
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for index, values in state["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        notes = {name: part.state_dict() for name, part in self.others.items()}
        notes |= {"groups": state["param_groups"], "settings": self.settings}
        checkpoints.save(path, tensors, {**notes, "history": asdict(history)})

    def load(self, path: str | Path) -> History:
        tensors, notes = checkpoints.load(path)
        then = notes["settings"]
        changed = {k: (then.get(k), v) for k, v in self.settings.items() if then.get(k) != v}
        if changed:
            said = ", ".join(f"{k} was {old}, is {new}" for k, (old, new) in changed.items())
            raise ValueError(f"{path} belongs to another training: {said}. Use the same settings.")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in checkpoints.without_prefix(tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        try:
            self.model.load_state_dict(checkpoints.without_prefix(tensors, "model."))
            self.optimizer.load_state_dict({"state": state, "param_groups": notes["groups"]})
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} belongs to another model: {error}") from error
        for name, part in self.others.items():
            part.load_state_dict(notes[name])
        torch.set_rng_state(tensors["random"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return History(**notes["history"])


def _groups(model: Segmenter, rate: float, encoder_rate: float) -> list[dict[str, Any]]:
    """Vectors (biases, BatchNorm) are not decayed: small ones of them are no simpler model."""
    inside = {id(p) for p in model.encoder.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            key = encoder_rate if id(p) in inside else rate, WEIGHT_DECAY if p.ndim > 1 else 0.0
            groups.setdefault(key, []).append(p)
    if not groups:
        raise ValueError("Nothing to train: no parameter of the model needs a gradient.")
    return [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()]


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"Expected {name} ≥ 1, got {count}.")


def _check_masks(logits: Tensor, batch: Batch, ignore_index: int) -> None:
    masks, classes = batch.masks, logits.shape[1]
    if masks.is_floating_point():
        return  # an image to reconstruct: its loss knows what fits
    if masks.ndim != 3:
        raise ValueError(
            f"Expected masks [B, H, W] of class indices, got {list(masks.shape)}. "
            f"{_mask_cure(masks)}"
        )
    wrong = masks[(masks < 0) | (masks >= classes)]
    wrong = wrong[wrong != ignore_index]
    if len(wrong):
        raise ValueError(
            f"The masks contain {wrong[0].item()}, but the model has {classes} classes "
            f"(0…{classes - 1}). If that value means “do not count”, pass "
            f"ignore_index={wrong[0].item()}; if not, give the decoder more out_channels."
        )


def _mask_cure(masks: Tensor) -> str:
    if masks.shape[1] == 1:
        return "Drop the channel in the data set: mask[0]."
    return "One-hot masks become indices in the data set: mask.argmax(0)."


def _finite(loss: Tensor, epoch: int, rates: list[float]) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The loss became {value} in epoch {epoch + 1}. Most often the learning rate is too "
            f"high (it is {max(rates):g}: try a tenth), or a batch has no pixel that counts."
        )
    return value


def _last(history: History) -> str:
    return f"{history.miou[-1]:.1f}" if history.miou else "–"
