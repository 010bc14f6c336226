"""Measures how sharp edges come back, and where: `results/upsampling_edges.json`.

The chapter's trials that read one map, on scenes. Beside mIoU and boundary IoU, on scenes that no
training saw: the width of an edge's transition in the predicted probabilities, as they are and
calibrated, its distance from the true edge; and what a decoder draws where its map is the same
everywhere. 3 seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.chapters.upsampling.trials import TRIALS
from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import SETTINGS, Trial, figures, pairs, train_on
from helpers import scenes
from helpers.bridges.upsampling import edge_profiles, measure_edges
from helpers.encoder import Pyramid, Segmenter, normalize
from helpers.inspection import pyramid_levels
from helpers.training import evaluate

NAME = "upsampling_edges"
KNOWN = range(15_000, 15_060)  # scenes to choose a temperature on
TEMPERATURES = torch.logspace(-0.5, 0.7, 25)
SIDE, BORDER = 192, 64  # pixels of an image whose maps are constant, and of what is left out
LONG = 18  # epochs


@torch.no_grad()
def logits_of(model: Segmenter, images: Tensor) -> Tensor:
    """Return the logits `[N, classes, H, W]` of images `[N, 3, H, W]` in 0…1."""
    device = next(model.parameters()).device
    parts = [model.eval()(normalize(part.to(device))).cpu() for part in images.split(10)]
    return torch.cat(parts)


@torch.no_grad()
def unevenness(model: Segmenter, images: Tensor, spread: float) -> float:
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
    inside = logits[..., BORDER:-BORDER, BORDER:-BORDER]
    return 100 * float(inside.std((2, 3)).mean()) / spread


@torch.no_grad()
def temperature(model: Segmenter) -> float:
    """Return the number to divide the logits by, so that they are as sure as they may be.

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


def edges_of(what: str, trial: Trial, seed: int) -> Record:
    setting = SETTINGS["scenes"]
    training, report = pairs(setting)
    model = trial.model(seed, len(scenes.CLASSES))
    long = replace(setting, epochs=LONG) if is_long(what) else setting
    loss = train_on(model, training, long, seed)
    scores = evaluate(model, report, mixed=setting.mixed)
    images, masks = (torch.stack(part) for part in zip(*report, strict=True))
    logits, t = logits_of(model, images), temperature(model)
    objects, calibrated = (1 - (logits / by).softmax(1)[:, 0] for by in (1.0, t))
    edges = measure_edges(edge_profiles(objects, masks > 0))
    spread = float(logits.std((0, 2, 3)).mean())
    return {
        **figures(model, scores, setting, report),
        "found": round(edges.found, 2),
        "width": round(edges.width, 3),
        "offset": round(edges.offset, 3),
        "temperature": round(t, 3),
        "calibrated_width": round(measure_edges(edge_profiles(calibrated, masks > 0)).width, 3),
        "grid": round(unevenness(model, images, spread), 3),
        "zeroed": round(zeroed(model, images[:40]), 2) if "ReLU" in what else None,
        "loss": loss,
    }


def is_long(what: str) -> bool:
    return what.endswith("18 epochs")


def measure(what: str, seed: int) -> Record:
    return edges_of(what, TRIALS[what], seed)


def entries(what: str, seed: int) -> Iterator[str]:
    yield "experiments/chapters/upsampling/analysis.py::edges_of"
    yield f'experiments/chapters/upsampling/trials.py::TRIALS["{what}"]'


SWEEPS = {NAME: Sweep(NAME, partial(measure), key=("what", "seed"), entries=entries)}


def main(given: Sequence[str] | None = None) -> None:
    names = [what for what in TRIALS if not what.startswith("U-Net")]
    said = arguments(__doc__, names, given=given)
    tasks = [{"what": what, "seed": seed} for seed in range(said.seeds) for what in said.only]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
