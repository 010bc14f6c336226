"""Trains the book's decoder to make images: `python -m experiments.image_to_image`.

Colours for grey images, and what was in holes; on scenes and on streets, 3 seeds. Beside its error
stand those of answers that need no network. Started twice, the two share the work.
"""

from __future__ import annotations

import os
import sys
import time
from functools import cache
from itertools import product

import torch
from filelock import Timeout
from torch import Tensor, nn

from experiments import records, trials
from helpers.bridges.putting_together import BookDecoder, grey_of, l1_where, punch, tinted
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.training import fit

NAME = "image_to_image"
EPOCHS, RATE = 12, 1e-2
LEVELS = 32  # of brightness
PARTS = ("train", "report")


@cache
def images(where: str) -> tuple[Tensor, ...]:
    """Return the images to train on and those to report on, each `[B, 3, H, W]`."""
    return tuple(torch.stack([image for image, _ in part]) for part in trials.data(where))


@cache
def task(where: str, what: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return, of both parts, what is given, and where an error counts `[B, 1, H, W]`."""
    if what == "colours":
        given = {part: grey_of(each) for part, each in zip(PARTS, images(where), strict=True)}
        return given, {part: torch.ones_like(each[:, :1]) for part, each in given.items()}
    both = {
        part: punch(each, seed)
        for seed, (part, each) in enumerate(zip(PARTS, images(where), strict=True))
    }
    return {part: b[0] for part, b in both.items()}, {part: b[1] for part, b in both.items()}


def simple(where: str, what: str) -> dict[str, Tensor]:
    """Return answers for the images to report on that need no network."""
    given, counts = task(where, what)
    if what == "colours":
        seen = given["train"], images(where)[0]
        return {
            "grey": given["report"],
            "one tint": tinted(given["report"], *seen, levels=1),
            "tint by brightness": tinted(given["report"], *seen, levels=LEVELS),
        }
    kept = 1 - counts["report"]
    mean = (given["report"] * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)
    return {"mean colour": mean.expand_as(kept * given["report"]), "blurred": given["report"]}


def error(where: str, what: str, answer: Tensor) -> float:
    """Return the mean absolute error where it counts, in per cent of the range."""
    goal = torch.cat([images(where)[1], task(where, what)[1]["report"]], dim=1)
    return round(100 * l1_where(answer.clamp(0, 1), goal).item(), 3)


def learnt(where: str, what: str, seed: int) -> Tensor:
    """Train a decoder on what the given images lack; return its answers."""
    given, counts = task(where, what)
    goal = torch.cat([images(where)[0] - given["train"], counts["train"]], dim=1)
    torch.manual_seed(seed)
    encoder = ResNet18Encoder()
    decoder = BookDecoder(encoder.out_channels, out_channels=3)
    nn.init.zeros_(decoder.head.weight)  # it starts with what is given
    nn.init.zeros_(decoder.head.bias)
    model = Segmenter(encoder, decoder)
    pairs = list(zip(given["train"], goal, strict=True))
    setting = trials.SETTINGS[where]
    fit(
        model,
        pairs,
        epochs=EPOCHS,
        batch_size=setting.batch_size,
        rate=RATE,
        loss=l1_where,
        seed=seed,
        mixed=setting.mixed,
    )
    device = next(model.parameters()).device
    with torch.no_grad():
        model.eval()
        added = [model(normalize(x.to(device))).float().cpu() for x in given["report"].split(8)]
    return given["report"] + torch.cat(added)


def run(where: str, what: str, seed: int) -> None:
    versions = ["weights", "training", {"streets": "camvid"}.get(where, where)]
    parts = ("BookDecoder", "grey_of", "l1_where", "punch", "tinted")
    sources = [f"helpers/bridges/putting_together.py::{part}" for part in parts]
    sources += [f"experiments/{NAME}.py::run", f"experiments/trials.py::{where.upper()}"]
    provenance = records.provenance(*sources, versions=versions)
    started = time.perf_counter()
    errors = {name: error(where, what, each) for name, each in simple(where, what).items()}
    errors["book decoder"] = error(where, what, learnt(where, what, seed))
    record = {
        "data": where,
        "what": what,
        "seed": seed,
        "error": errors,
        "images": [len(each) for each in images(where)],
        "epochs": EPOCHS,
        "rate": RATE,
        "seconds": round(time.perf_counter() - started, 1),
        "command": f"python -m experiments.{NAME}",
        "provenance": provenance,
    }
    records.append(NAME, record, key=("data", "what", "seed"))
    print(where, what, seed, errors, flush=True)


def main() -> None:
    if os.environ.get("BOOK_WEIGHTS"):
        sys.exit("BOOK_WEIGHTS is set, and would measure another encoder: unset it")
    for seed, where, what in product(range(3), ("scenes", "streets"), ("colours", "holes")):
        try:
            with records.lock(f"{NAME} {where} {what} {seed}", timeout=0):
                if not records.is_done(NAME, data=where, what=what, seed=seed):
                    run(where, what, seed)
        except Timeout:
            continue  # another process is at it


if __name__ == "__main__":
    main()
