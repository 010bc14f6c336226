"""Trains the book's decoder to make images: `results/image_to_image.json`.

Colours for grey images, and what was in holes; on scenes and on streets, 3 seeds. Beside its error
stand those of answers that need no network.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import SETTINGS, VERSIONS, Setting, pairs
from helpers.bridges.putting_together import BookDecoder, grey_of, l1_where, punch, tinted
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.training import fit

NAME = "image_to_image"
EPOCHS, LR = 12, 1e-2
LEVELS = 32  # of brightness
WHATS = ("colours", "holes")


class Part(NamedTuple):
    """Images `[B, 3, H, W]`, what is given of them, and where an error counts `[B, 1, H, W]`."""

    images: Tensor
    given: Tensor
    counts: Tensor

    def error(self, answer: Tensor) -> float:
        """Return the mean absolute error where it counts, in per cent of the range."""
        goal = torch.cat([self.images, self.counts], dim=1)
        return round(100 * l1_where(answer.clamp(0, 1), goal).item(), 3)


@lru_cache(maxsize=2)
def parts(setting: Setting, what: str) -> list[Part]:
    """Return the parts to train and to report on."""
    found = []
    for seed, part in enumerate(pairs(setting)):
        images = torch.stack([image for image, _ in part])
        if what == "colours":
            given = grey_of(images)
            found.append(Part(images, given, torch.ones_like(given[:, :1])))
        else:
            found.append(Part(images, *punch(images, seed)))
    return found


def simple(train: Part, report: Part, what: str) -> dict[str, Tensor]:
    """Return answers for the images to report on that need no network."""
    given = report.given
    if what == "colours":
        return {
            "grey": given,
            "one tint": tinted(given, train.given, train.images, levels=1),
            "tint by brightness": tinted(given, train.given, train.images, levels=LEVELS),
        }
    kept = 1 - report.counts
    mean = (given * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)
    return {"mean colour": mean.expand_as(kept * given), "blurred": given}


def learnt(train: Part, given: Tensor, setting: Setting, seed: int) -> Tensor:
    """Train a decoder on what the given images lack; return its answers to others."""
    goal = torch.cat([train.images - train.given, train.counts], dim=1)
    torch.manual_seed(seed)
    encoder = ResNet18Encoder()
    decoder = BookDecoder(encoder.out_channels, out_channels=3)
    nn.init.zeros_(decoder.head.weight)  # it starts with what is given
    nn.init.zeros_(decoder.head.bias)
    model = Segmenter(encoder, decoder)
    fit(
        model,
        list(zip(train.given, goal, strict=True)),
        epochs=EPOCHS,
        batch_size=setting.batch_size,
        lr=LR,
        loss=l1_where,
        seed=seed,
        mixed=setting.mixed,
    )
    device = next(model.parameters()).device
    with torch.no_grad():
        model.eval()
        added = [model(normalize(x.to(device))).float().cpu() for x in given.split(8)]
    return given + torch.cat(added)


def errors(setting: Setting, what: str, seed: int) -> Record:
    train, report = parts(setting, what)
    answers = simple(train, report, what)
    answers["book decoder"] = learnt(train, report.given, setting, seed)
    return {
        "error": {name: report.error(answer) for name, answer in answers.items()},
        "images": [len(train.images), len(report.images)],
        "epochs": EPOCHS,
        "rate": LR,
    }


def measure(data: str, what: str, seed: int) -> Record:
    return errors(SETTINGS[data], what, seed)


def entries(data: str, what: str, seed: int) -> Iterator[str]:
    yield "experiments/chapters/putting_together/analysis.py::errors"
    yield f'experiments/core/trials.py::SETTINGS["{data}"]'


def versions(data: str, what: str, seed: int) -> tuple[str, ...]:
    return "weights", VERSIONS[data]


KEY = ("data", "what", "seed")
SWEEPS = {NAME: Sweep(NAME, partial(measure), key=KEY, entries=entries, versions=versions)}


def main(given: Sequence[str] | None = None) -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--on", nargs="+", choices=SETTINGS, default=list(SETTINGS))

    said = arguments(__doc__, WHATS, given=given, more=more)
    wanted = itertools.product(range(said.seeds), said.on, said.only)
    tasks = [{"data": data, "what": what, "seed": seed} for seed, data, what in wanted]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
