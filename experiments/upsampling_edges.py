"""Measures how sharp edges come back, and where: `python -m experiments.upsampling_edges`.

The trials of `experiments.upsampling` that read one map, on scenes as in `experiments.trials`.
Beside mIoU and boundary IoU, on scenes that no training saw: the width of an edge's transition in
the predicted probabilities, as they are and calibrated, its distance from the true edge; and what
a decoder draws where its map is the same everywhere. 3 seeds. Started twice, they share the work.
"""

from __future__ import annotations

import itertools
import os
import sys
import time

import torch
import torch.nn.functional as F
from filelock import Timeout
from torch import Tensor

from experiments import records
from experiments.trials import SCENES, data
from experiments.upsampling import TRIALS
from helpers import scenes
from helpers.bridges.upsampling import edge_profiles, measure_edges
from helpers.encoder import Pyramid, Segmenter, normalize
from helpers.inspection import count_macs, count_parameters, pyramid_levels
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import evaluate, fit

NAME = "upsampling_edges"
CODE = "experiments/upsampling_edges.py"
BRIDGES = "helpers/bridges/upsampling.py"
CLASSES = len(scenes.CLASSES)
KNOWN = range(15_000, 15_060)  # scenes to choose a temperature on
TEMPERATURES = torch.logspace(-0.5, 0.7, 25)
SIDE, RIM = 192, 64  # pixels of an image whose maps are constant, and of its rim that is left out


@torch.no_grad()
def logits_of(model: Segmenter, images: Tensor) -> Tensor:
    """Return the logits `[N, classes, H, W]` of images `[N, 3, H, W]` in 0…1."""
    device = next(model.parameters()).device
    parts = [model.eval()(normalize(part.to(device))).cpu() for part in images.split(10)]
    return torch.cat(parts)


@torch.no_grad()
def grid(model: Segmenter, images: Tensor, spread: float) -> float:
    """Return how uneven the logits are where nothing changes, in % of their `spread` on scenes.

    Every map is its own average over images and positions, so that all that varies in the logits,
    away from the borders, was put there by the decoder.
    """
    device = next(model.parameters()).device
    x = normalize(images[:10].to(device))
    means = [map_.mean((0, 2, 3)).view(1, -1, 1, 1) for map_ in model.eval().encoder(x)]
    sides = [(level.height, level.width) for level in pyramid_levels(SIDE, SIDE)]
    maps = [mean.expand(-1, -1, *side) for mean, side in zip(means, sides, strict=True)]
    extra = {"image": x.new_zeros(1, 3, SIDE, SIDE)} if model.takes_image else {}
    logits = model.decode(Pyramid(*maps), (SIDE, SIDE), **extra)
    return 100 * float(logits[..., RIM:-RIM, RIM:-RIM].std((2, 3)).mean()) / spread


@torch.no_grad()
def temperature(model: Segmenter) -> float:
    """Return the number that logits are to be divided by, so that they are as sure as they may be.

    It has the least cross-entropy on scenes that were neither trained nor reported on.
    """
    images, masks = scenes.batch(KNOWN)
    logits = logits_of(model, images)
    losses = {float(t): float(F.cross_entropy(logits / t, masks)) for t in TEMPERATURES}
    return min(losses, key=lambda t: losses[t])


@torch.no_grad()
def zeroed(model: Segmenter, images: Tensor) -> float:
    """Return how many of the values that lie beside the image are zero, in %."""
    device = next(model.parameters()).device
    beside = model.eval().decoder.climb(model.encoder(normalize(images.to(device))))  # type: ignore
    return 100 * float((beside == 0).float().mean())


def measure(what: str, seed: int) -> records.Record:
    start = time.perf_counter()
    train, report = data("scenes")
    model = TRIALS[what].model(seed, CLASSES)
    sources = [f"{CODE}::measure", "experiments/trials.py::SCENES", *TRIALS[what].sources(model)]
    sources += [f"{BRIDGES}::edge_profiles", f"{BRIDGES}::measure_edges"]
    versions = ["weights", "scenes", "training", "metrics"]
    provenance = records.provenance(*sources, versions=versions)  # before the code can change
    history = fit(
        model,
        train,
        epochs=18 if what.endswith("18 epochs") else SCENES.epochs,
        batch_size=SCENES.batch_size,
        rate=SCENES.rate,
        loss=SegmentationLoss(class_weights=class_weights((m for _, m in train), CLASSES)),
        seed=seed,
        mixed=SCENES.mixed,
    )
    scores = evaluate(model, report, mixed=SCENES.mixed)
    images, masks = (torch.stack(part) for part in zip(*report, strict=True))
    logits, t = logits_of(model, images), temperature(model)
    objects, calibrated = (1 - (logits / by).softmax(1)[:, 0] for by in (1.0, t))
    edges = measure_edges(edge_profiles(objects, masks > 0))
    spread = float(logits.std((0, 2, 3)).mean())
    x = normalize(images[:1]).to(next(model.parameters()).device)
    return {
        "what": what,
        "seed": seed,
        "miou": round(scores.miou, 2),
        "boundary_miou": round(scores.boundary_miou, 2),
        "iou": {n: round(v, 2) for n, v in zip(scenes.CLASSES, scores.iou, strict=True)},
        "found": round(edges.found, 2),
        "width": round(edges.width, 3),
        "offset": round(edges.offset, 3),
        "temperature": round(t, 3),
        "calibrated_width": round(measure_edges(edge_profiles(calibrated, masks > 0)).width, 3),
        "grid": round(grid(model, images, spread), 3),
        "zeroed": round(zeroed(model, images[:40]), 2) if "ReLU" in what else None,
        "loss": [round(value, 4) for value in history.loss],
        "parameters": count_parameters(model.decoder),
        "macs": count_macs(model, x) - count_macs(model.encoder, x),
        "seconds": round(time.perf_counter() - start, 1),
        "command": f"python -m experiments.{NAME}",
        "provenance": provenance,
    }


def is_long(what: str) -> bool:
    return what.endswith("18 epochs")


def main() -> None:
    if os.environ.get("BOOK_WEIGHTS"):
        sys.exit("BOOK_WEIGHTS is set, and would measure another encoder: unset it.")
    names = [what for what in TRIALS if not what.startswith("U-Net")]
    tasks = itertools.product(range(3), names)
    for seed, what in sorted(
        tasks, key=lambda task: is_long(task[1])
    ):  # what takes long comes last
        try:
            with records.lock(f"{NAME} {what} {seed}", timeout=0):
                if records.is_done(NAME, what=what, seed=seed):
                    continue
                record = measure(what, seed)
                records.append(NAME, record, key=("what", "seed"))
        except Timeout:
            continue  # another process is at it
        said = {key: record[key] for key in ("miou", "boundary_miou", "found", "width", "offset")}
        print(what, seed, said, flush=True)


if __name__ == "__main__":
    main()
