"""Trials: one decoder, one data set, one seed; trained and scored alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from experiments.core import provenance
from experiments.core.records import Record
from helpers import camvid, scenes
from helpers.bridges.unet import Without
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.inspection import count_macs, count_parameters
from helpers.metrics import NOTHING_IGNORED, Scores, SegmentationLoss, class_weights
from helpers.training import evaluate, fit, predict

Pairs = list[tuple[Tensor, Tensor]]


class Trial:
    """What to train: a decoder on an encoder.

    `decoder(in_channels, classes, **settings)` builds the decoder. `weights` of the encoder are
    "bundled", `None` for random ones, or a function that returns a file's path.
    """

    def __init__(
        self,
        decoder: Callable[..., nn.Module],
        /,
        *,
        weights: str | Callable[[], Path] | None = "bundled",
        frozen: bool = True,
        **settings: Any,
    ) -> None:
        self.decoder, self.settings = decoder, settings
        self.weights, self.frozen = weights, frozen

    def model(self, seed: int, classes: int, frozen: bool | None = None) -> Segmenter:
        torch.manual_seed(seed)
        weights = self.weights() if callable(self.weights) else self.weights
        encoder = ResNet18Encoder(weights, frozen=self.frozen if frozen is None else frozen)
        torch.manual_seed(seed)  # the decoder starts alike on every encoder
        return Segmenter(encoder, self.decoder(encoder.out_channels, classes, **self.settings))


def without(
    in_channels: tuple[int, ...],
    classes: int,
    *,
    of: Callable[..., nn.Module],
    levels: Sequence[str],
) -> nn.Module:
    """Return a decoder that is built by `of` and gets zeros in place of some levels."""
    return Without(of(in_channels, classes), *levels)


@dataclass(frozen=True)
class Setting:
    """How to train on one data set; one budget and one schedule for every trial."""

    data: Callable[..., Any]
    train: tuple[Any, ...]  # what `data` is called with
    report: tuple[Any, ...]
    classes: tuple[str, ...]
    ignore_index: int
    epochs: int
    batch_size: int
    lr: float
    pretrained_lr: float  # of an encoder that is fine-tuned
    mixed: bool


SETTINGS = {
    "scenes": Setting(
        data=scenes.Scenes,
        train=(400, 0, 10_000),  # count, seed, first
        report=(200, 0, 20_000),
        classes=scenes.CLASSES,
        ignore_index=NOTHING_IGNORED,
        epochs=6,
        batch_size=8,
        lr=4e-3,
        pretrained_lr=5e-4,
        mixed=False,
    ),
    "streets": Setting(
        data=camvid.CamVid,
        train=("train",),
        report=("report",),
        classes=camvid.CLASSES,
        ignore_index=camvid.IGNORE,
        epochs=20,
        batch_size=8,
        lr=2e-3,
        pretrained_lr=5e-4,
        mixed=True,
    ),
}
VERSIONS = {"scenes": "scenes", "streets": "camvid"}  # of the data, see `records.VERSIONS`
SHOWN = (10, 35, 60, 85)  # of the streets to report on; chosen before anything was trained


@lru_cache(maxsize=1)
def pairs(setting: Setting) -> tuple[Pairs, Pairs]:
    """Return the pairs to train and to report on, in memory."""
    parts = [setting.data(*which) for which in (setting.train, setting.report)]
    train, report = ([part[i] for i in range(len(part))] for part in parts)
    return train, report


def train_on(
    model: Segmenter,
    train: Pairs,
    setting: Setting,
    seed: int,
    *,
    pretrained: bool = True,
    **more: Any,
) -> list[float]:
    """Train as a setting says, classes weighed; return the loss of each epoch."""
    weights = class_weights((m for _, m in train), len(setting.classes), setting.ignore_index)
    history = fit(
        model,
        train,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        lr=setting.lr,
        encoder_lr=setting.pretrained_lr if pretrained else setting.lr,
        loss=SegmentationLoss(setting.ignore_index, weights),
        ignore_index=setting.ignore_index,
        seed=seed,
        mixed=setting.mixed,
        **more,
    )
    return [round(value, 4) for value in history.loss]


def measure_trial(
    trial: Trial,
    setting: Setting,
    seed: int,
    state: Path,
    folder: Path | None = None,
    what: str = "",
) -> Record:
    """Train one trial and score it; with a `folder`, draw a few of its predictions."""
    train, report = pairs(setting)
    model = trial.model(seed, len(setting.classes))
    started = time.perf_counter()
    loss = train_on(
        model,
        train,
        setting,
        seed,
        pretrained=trial.weights is not None,
        checkpoint=state,
        resume=state if state.exists() else None,
    )
    seconds = time.perf_counter() - started
    scores = evaluate(model, report, ignore_index=setting.ignore_index, mixed=setting.mixed)
    device = next(model.parameters()).device
    if folder is not None:
        draw(model, report, folder, what)
    return {
        "miou": round(scores.miou, 2),
        "boundary_miou": round(scores.boundary_miou, 2),
        "accuracy": round(scores.accuracy, 2),
        "iou": named(setting.classes, scores.iou),
        "boundary_iou": named(setting.classes, scores.boundary_iou),
        "loss": loss,
        "setting": {k: v for k, v in asdict(setting).items() if k not in ("data", "classes")},
        "images": len(train),
        "reported": len(report),
        "parameters": count_parameters(model.decoder),
        "macs": count_macs(model, normalize(report[0][0][None]).to(device)),
        "seconds": round(seconds, 1),
        "device": device.type,
    }


def figures(model: Segmenter, scores: Scores, setting: Setting, report: Pairs) -> Record:
    """Return what every record of a trained decoder says; the MACs are the decoder's alone."""
    image = normalize(report[0][0][None]).to(next(model.parameters()).device)
    return {
        "miou": round(scores.miou, 2),
        "boundary_miou": round(scores.boundary_miou, 2),
        "iou": named(setting.classes, scores.iou),
        "parameters": count_parameters(model.decoder),
        "macs": count_macs(model, image) - count_macs(model.encoder, image),
    }


def named(classes: tuple[str, ...], values: tuple[float, ...]) -> dict[str, float]:
    """Return values in per cent by the names of their classes."""
    return {name: round(value, 2) for name, value in zip(classes, values, strict=True)}


def draw(model: Segmenter, report: Pairs, folder: Path, what: str) -> None:
    """Store predictions as small indexed pictures: classes only, nothing of the photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    colors = [bytes.fromhex(color[1:]) for color in camvid.PALETTE.values()]
    for index in SHOWN:
        labels = predict(model, report[index][0][None])[0]
        picture = Image.fromarray(labels.byte().numpy(), "P")
        picture.putpalette(b"".join(colors))
        name = what.lower().replace(",", "").replace(" ", "_")
        part = folder / f"{name}_{index}.{os.getpid()}.part"
        picture.save(part, "PNG", optimize=True)
        os.replace(part, folder / f"{name}_{index}.png")


def results(slug: str) -> Path:
    return provenance.ROOT / "results" / slug
