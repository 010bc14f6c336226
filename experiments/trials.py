"""Runs trials: one model, one data set, one seed; trained, measured, recorded."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from experiments import records
from helpers import camvid, scenes
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.inspection import count_macs, count_parameters
from helpers.metrics import NOTHING_IGNORED, SegmentationLoss, class_weights
from helpers.training import evaluate, fit, predict

ROOT = Path(__file__).parent.parent
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Trial:
    """What to train: a decoder's builder, `(encoder, number of classes) -> decoder`, an encoder.

    `weights` is "bundled", `None` for random ones, or a function that returns a file's path.
    """

    decoder: Callable[[ResNet18Encoder, int], nn.Module]
    weights: str | Callable[[], Path] | None = "bundled"
    frozen: bool = True

    def model(self, seed: int, classes: int) -> Segmenter:
        torch.manual_seed(seed)
        weights = self.weights() if callable(self.weights) else self.weights
        encoder = ResNet18Encoder(weights, frozen=self.frozen)
        torch.manual_seed(seed)  # the decoder starts alike on every encoder
        return Segmenter(encoder, self.decoder(encoder, classes))

    def sources(self, model: Segmenter) -> list[str]:
        """Return the code that the model is made of, for `records.provenance`."""
        kinds = {kind for part in model.decoder.modules() for kind in type(part).__mro__}
        objects = [self.decoder, *kinds]
        places = {each: each.__module__.replace(".", "/") + ".py" for each in objects}
        return sorted(
            f"{path}::{each.__name__}"
            for each, path in places.items()
            if path.startswith(("helpers/", "experiments/"))
        )


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
    rate: float
    pretrained_rate: float  # of an encoder that is fine-tuned
    mixed: bool


SCENES = Setting(
    data=scenes.Scenes,
    train=(400, 0, 10_000),  # count, seed, first
    report=(200, 0, 20_000),
    classes=scenes.CLASSES,
    ignore_index=NOTHING_IGNORED,
    epochs=6,
    batch_size=8,
    rate=4e-3,
    pretrained_rate=5e-4,
    mixed=False,
)
STREETS = Setting(
    data=camvid.CamVid,
    train=("train",),
    report=("report",),
    classes=camvid.CLASSES,
    ignore_index=camvid.IGNORE,
    epochs=20,
    batch_size=8,
    rate=2e-3,
    pretrained_rate=5e-4,
    mixed=True,
)
SETTINGS = {"scenes": SCENES, "streets": STREETS}
SHOWN = (10, 35, 60, 85)  # of the streets to report on; chosen before anything was trained


@lru_cache(maxsize=1)
def data(name: str) -> tuple[Pairs, Pairs]:
    """Return the pairs to train and to report on, in memory."""
    setting = SETTINGS[name]
    parts = [setting.data(*which) for which in (setting.train, setting.report)]
    train, report = ([part[i] for i in range(len(part))] for part in parts)
    return train, report


def run(slug: str, where: str, what: str, trial: Trial, seed: int) -> records.Record:
    """Train and measure one trial; write its record and, on streets, a few predictions."""
    setting = SETTINGS[where]
    train, report = data(where)
    model = trial.model(seed, len(setting.classes))
    weights = class_weights((m for _, m in train), len(setting.classes), setting.ignore_index)
    loss = SegmentationLoss(setting.ignore_index, weights)
    versions = ["training", "metrics", {"scenes": "scenes", "streets": "camvid"}[where]]
    versions += ["weights"] if trial.weights == "bundled" else []
    sources = [*trial.sources(model), f"experiments/trials.py::{where.upper()}"]
    provenance = records.provenance(*sources, versions=versions)  # before the code can change
    state = _state(slug, where, what, seed, provenance)
    started = time.perf_counter()
    history = fit(
        model,
        train,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        rate=setting.rate,
        encoder_rate=setting.pretrained_rate if trial.weights else setting.rate,
        loss=loss,
        ignore_index=setting.ignore_index,
        seed=seed,
        mixed=setting.mixed,
        checkpoint=state,
        resume=state if state.exists() else None,
    )
    seconds = time.perf_counter() - started
    scores = evaluate(model, report, ignore_index=setting.ignore_index, mixed=setting.mixed)
    image = normalize(report[0][0][None]).to(next(model.parameters()).device)
    record = {
        "data": where,
        "what": what,
        "seed": seed,
        "miou": round(scores.miou, 2),
        "boundary_miou": round(scores.boundary_miou, 2),
        "accuracy": round(scores.accuracy, 2),
        "iou": _named(setting.classes, scores.iou),
        "boundary_iou": _named(setting.classes, scores.boundary_iou),
        "loss": [round(value, 4) for value in history.loss],
        "setting": {k: v for k, v in asdict(setting).items() if k not in ("data", "classes")},
        "images": len(train),
        "reported": len(report),
        "parameters": count_parameters(model.decoder),
        "macs": count_macs(model, image),
        "seconds": round(seconds, 1),
        "device": next(model.parameters()).device.type,
        "command": f"python -m experiments.claims {slug} --on {where}",
        "provenance": provenance,
    }
    if where == "streets" and seed == 0:
        _draw(model, report, ROOT / "results" / slug, what)
    records.append(slug, record, key=("data", "what", "seed"))
    state.unlink(missing_ok=True)
    return record


def _state(slug: str, where: str, what: str, seed: int, provenance: records.Record) -> Path:
    """Return where an interrupted trial is kept: somewhere else when its code has changed."""
    of = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:8]
    return ROOT / ".cache" / "trials" / f"{slug} {where} {what} {seed} {of}.safetensors"


def _named(classes: tuple[str, ...], values: tuple[float, ...]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in zip(classes, values, strict=True)}


def _draw(model: Segmenter, report: Pairs, folder: Path, what: str) -> None:
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
