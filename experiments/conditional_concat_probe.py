"""Asks what masks open for: `python -m experiments.conditional_concat_probe`.

The trials of `experiments.conditional_concat` on scenes, reported on scenes that no training saw;
of each mask also how far it opens near outlines, inside objects and on background, and what the
trained network loses when its mask is fixed (with the BatchNorm behind it recalibrated, and as it
is). 3 seeds. Started twice, they share the work.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from filelock import Timeout
from torch import Tensor

from experiments import records
from experiments.conditional_concat import TRIALS
from experiments.trials import SCENES, data
from helpers.bridges.conditional_concat import SoftConcat, fix_mask, mask_report
from helpers.encoder import Segmenter, normalize
from helpers.inspection import count_macs, count_parameters, evaluating
from helpers.metrics import SegmentationLoss, class_weights
from helpers.scenes import CLASSES
from helpers.training import evaluate, fit

NAME = "conditional_concat_probe"
CODE = "experiments/conditional_concat_probe.py"
BRIDGES = "helpers/bridges/conditional_concat.py"
FIXED = {"soft mask": ("mean", "shut", "open"), "hard mask": ("shut", "open")}
NEAR = 2  # pixels


@torch.no_grad()
def masks_of(model: Segmenter, images: Tensor) -> Tensor:
    """Return how far the mask opens for the fine map, `[B, 1, H, W]`."""
    with evaluating(model):
        found = [
            model.decoder.join.mask(  # type: ignore[union-attr, operator]
                model.decoder.coarse(model.encoder(normalize(part))),  # type: ignore[union-attr, operator]
                part.shape[-2:],
            )
            for part in images.split(20)
        ]
    return torch.cat(found)


def opens(mask: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the mean of masks `[B, 1, H, W]` by place; `truth` is `[B, H, W]`."""
    one_hot = F.one_hot(truth, len(CLASSES)).movedim(-1, 1).float()
    rims = F.max_pool2d(one_hot, 2 * NEAR + 1, 1, NEAR).sum(1) > 1
    places = {
        "outlines": rims,
        "objects": (truth > 0) & ~rims,
        "background": (truth == 0) & ~rims,
    }
    return {place: round(mask[:, 0][where].mean().item(), 4) for place, where in places.items()}


@torch.no_grad()
def recalibrate(model: Segmenter, images: Tensor) -> None:
    """Let the BatchNorm behind the join take its statistics anew, and learn nothing."""
    norm = model.decoder.norm
    norm.reset_running_stats()  # type: ignore[union-attr, operator]
    norm.momentum = None  # type: ignore[union-attr, assignment]
    model.eval()
    norm.train()  # type: ignore[union-attr, operator]
    for part in images.split(20):
        model(normalize(part))
    model.eval()


def measure(what: str, seed: int) -> None:
    start = time.perf_counter()
    training, report = data("scenes")
    model = TRIALS[what].model(seed, len(CLASSES))
    sources = [f"{CODE}::measure", f"{BRIDGES}::fix_mask", f"{BRIDGES}::mask_report"]
    sources += ["experiments/trials.py::SCENES", *TRIALS[what].sources(model)]
    versions = ["weights", "scenes", "training", "metrics"]
    provenance = records.provenance(*sources, versions=versions)  # before the code can change
    history = fit(
        model,
        training,
        epochs=SCENES.epochs,
        batch_size=SCENES.batch_size,
        rate=SCENES.rate,
        loss=SegmentationLoss(class_weights=class_weights((m for _, m in training), len(CLASSES))),
        seed=seed,
        mixed=SCENES.mixed,
    )
    model.cpu()
    scores = evaluate(model, report)
    x = normalize(report[0][0][None])
    record: dict[str, Any] = {
        "what": what,
        "seed": seed,
        "miou": round(scores.miou, 2),
        "boundary_miou": round(scores.boundary_miou, 2),
        "iou": {c: round(v, 2) for c, v in zip(CLASSES, scores.iou, strict=True)},
        "loss": [round(value, 4) for value in history.loss],
        "parameters": count_parameters(model.decoder),
        "macs": count_macs(model, x) - count_macs(model.encoder, x),
    }
    join = model.decoder.join
    if isinstance(join, SoftConcat):
        images, truth = (torch.stack(part) for part in zip(*report, strict=True))
        mask = masks_of(model, images)
        found = mask_report(mask)
        record["report"] = {key: round(value, 4) for key, value in found._asdict().items()}
        record["opens"] = opens(mask, truth)
        if what in FIXED:
            known = torch.stack([image for image, _ in training])
            levels = {"mean": masks_of(model, known).mean().item(), "shut": 0.0, "open": 1.0}
            record["fixed"], record["fixed_as_is"] = {}, {}
            for name in FIXED[what]:
                fixed = deepcopy(model)
                fixed.decoder.join = fix_mask(join, levels[name])
                record["fixed_as_is"][name] = round(scores.miou - evaluate(fixed, report).miou, 2)
                recalibrate(fixed, known)
                record["fixed"][name] = round(scores.miou - evaluate(fixed, report).miou, 2)
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["command"] = f"python -m experiments.{NAME}"
    record["provenance"] = provenance
    records.append(NAME, record, key=("what", "seed"))
    print(what, seed, record["miou"], record.get("report", ""), flush=True)


def main() -> None:
    if os.environ.get("BOOK_WEIGHTS"):
        sys.exit("BOOK_WEIGHTS is set, and would measure another encoder: unset it.")
    for seed, what in itertools.product(range(3), TRIALS):
        try:
            with records.lock(f"{NAME} {what} {seed}", timeout=0):
                if not records.is_done(NAME, what=what, seed=seed):
                    measure(what, seed)
        except Timeout:
            print(what, seed, "is being measured elsewhere", flush=True)


if __name__ == "__main__":
    main()
