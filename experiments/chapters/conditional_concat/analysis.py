"""Asks what masks open for: `results/conditional_concat_probe.json`.

The chapter's trials on scenes, reported on scenes that no training saw; of each mask also how far
it opens near outlines, inside objects and on background, and what the trained network loses when
its mask is fixed (with the BatchNorm behind it recalibrated, and as it is). 3 seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.chapters.conditional_concat.trials import TRIALS
from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import SETTINGS, Trial, figures, pairs, train_on
from helpers.bridges.conditional_concat import SoftConcat, fix_mask, mask_report
from helpers.encoder import Segmenter, normalize
from helpers.inspection import evaluating
from helpers.scenes import CLASSES
from helpers.training import evaluate

NAME = "conditional_concat_probe"
FIXED = {"soft mask": ("mean", "shut", "open"), "hard mask": ("shut", "open")}
NEAR = 2  # pixels


@torch.no_grad()
def masks_of(model: Segmenter, images: Tensor) -> Tensor:
    """Return how far the mask opens for the fine map, `[B, 1, H, W]`."""
    with evaluating(model):
        maps = (model.encoder(normalize(part)) for part in images.split(20))
        coarse = (model.decoder.coarse(each) for each in maps)  # type: ignore[operator, union-attr]
        join, size = model.decoder.join, images.shape[-2:]
        return torch.cat([join.mask(each, size) for each in coarse])  # type: ignore


def opens(mask: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the mean of masks `[B, 1, H, W]` by place; `truth` is `[B, H, W]`."""
    one_hot = F.one_hot(truth, len(CLASSES)).movedim(-1, 1).float()
    outlines = F.max_pool2d(one_hot, 2 * NEAR + 1, 1, NEAR).sum(1) > 1
    places = {
        "outlines": outlines,
        "objects": (truth > 0) & ~outlines,
        "background": (truth == 0) & ~outlines,
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


def masks_learnt(what: str, trial: Trial, seed: int) -> Record:
    setting = SETTINGS["scenes"]
    training, report = pairs(setting)
    model = trial.model(seed, len(CLASSES))
    loss = train_on(model, training, setting, seed)
    model.cpu()
    scores = evaluate(model, report)
    found: Record = {**figures(model, scores, setting, report), "loss": loss}
    join = model.decoder.join
    if not isinstance(join, SoftConcat):
        return found
    images, truth = (torch.stack(part) for part in zip(*report, strict=True))
    mask = masks_of(model, images)
    found["report"] = {k: round(value, 4) for k, value in mask_report(mask)._asdict().items()}
    found["opens"] = opens(mask, truth)
    if what in FIXED:
        known = torch.stack([image for image, _ in training])
        levels = {"mean": masks_of(model, known).mean().item(), "shut": 0.0, "open": 1.0}
        found["fixed"], found["fixed_as_is"] = {}, {}
        for name in FIXED[what]:
            fixed = deepcopy(model)
            fixed.decoder.join = fix_mask(join, levels[name])
            found["fixed_as_is"][name] = round(scores.miou - evaluate(fixed, report).miou, 2)
            recalibrate(fixed, known)
            found["fixed"][name] = round(scores.miou - evaluate(fixed, report).miou, 2)
    return found


def measure(what: str, seed: int) -> Record:
    return masks_learnt(what, TRIALS[what], seed)


def entries(what: str, seed: int) -> Iterator[str]:
    yield "experiments/chapters/conditional_concat/analysis.py::masks_learnt"
    yield f'experiments/chapters/conditional_concat/trials.py::TRIALS["{what}"]'


SWEEPS = {NAME: Sweep(NAME, partial(measure), key=("what", "seed"), entries=entries)}


def main(given: Sequence[str] | None = None) -> None:
    said = arguments(__doc__, TRIALS, given=given)
    tasks = [{"what": what, "seed": seed} for seed in range(said.seeds) for what in said.only]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
