"""Are scenes worth teaching with? Measures what skips and a pretrained encoder are worth on them.

`python -m experiments.scenes` writes `results/scenes.json`, one record for each (decoder, seed),
and skips what is there already and not stale. `python -m experiments.scenes --tune` prints
one seed on indices below 10,000, the only ones that scenes were tuned on, and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import time
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from experiments import records
from helpers import scenes
from helpers.encoder import OUT_CHANNELS, Pyramid, ResNet18Encoder, normalize
from helpers.inspection import count_parameters

SOURCES = ("experiments/scenes.py",)
TRAIN, TEST, TUNE_TRAIN, TUNE_TEST = 10_000, 20_000, 0, 5_000  # first indices
TRAIN_COUNT, TEST_COUNT = 600, 200
STEPS, BATCH, RATE, SEEDS = 400, 10, 4e-3, 3
ALL_LEVELS = (0, 1, 2, 3, 4)
# name: weights of the encoder, levels that the decoder sees, its widths (for equal parameters)
WIDE, NARROW = (72, 80, 52, 28), (64, 64, 48, 24)
CONFIGURATIONS = {
    "c5, bundled": ("bundled", (4,), WIDE),
    "c1…c5, bundled": ("bundled", ALL_LEVELS, NARROW),
    "c1…c5, random": (None, ALL_LEVELS, NARROW),
}


class TopDown(nn.Module):
    """From c5 up to c1's grid, ×2 a step; the maps in `levels` are concatenated on the way.

    A U-Net's decoder with 1×1 convolutions on its skips. `forward` takes a pyramid and returns
    logits `[B, 7, H, W]`.
    """

    def __init__(self, levels: tuple[int, ...], widths: tuple[int, ...]) -> None:
        super().__init__()
        self.skips, self.blocks = nn.ModuleList(), nn.ModuleList()
        below = OUT_CHANNELS[4]
        for k, width in zip((3, 2, 1, 0), widths, strict=True):
            skip = width // 2 if k in levels else 0
            self.skips.append(nn.Conv2d(OUT_CHANNELS[k], skip, 1) if skip else nn.Identity())
            self.blocks.append(
                nn.Sequential(
                    nn.BatchNorm2d(below + skip),
                    nn.Conv2d(below + skip, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                )
            )
            below = width
        self.head = nn.Conv2d(below, len(scenes.CLASSES), 1)
        self.levels = levels

    def forward(self, pyramid: Pyramid) -> Tensor:
        p = pyramid.c5
        for k, skip, block in zip((3, 2, 1, 0), self.skips, self.blocks, strict=True):
            p = F.interpolate(p, scale_factor=2, mode="bilinear")
            p = block(torch.cat([p, skip(pyramid[k])], 1) if k in self.levels else p)
        return F.interpolate(self.head(p), scale_factor=2, mode="bilinear")


@lru_cache(maxsize=2)
def features(weights: str | None, seed: int, first: int, count: int) -> tuple[Pyramid, Tensor]:
    """Return the pyramids (float16, to halve the memory) and masks of `count` scenes."""
    torch.manual_seed(seed)
    encoder = ResNet18Encoder(weights)
    maps, masks = [], []
    with torch.inference_mode():
        for start in range(first, first + count, 50):
            images, labels = scenes.batch(range(start, min(start + 50, first + count)))
            maps.append([level.half() for level in encoder(normalize(images))])
            masks.append(labels)
    return Pyramid(*(torch.cat(level) for level in zip(*maps, strict=True))), torch.cat(masks)


def measure(
    name: str, seed: int, train: tuple[Pyramid, Tensor], test: tuple[Pyramid, Tensor]
) -> dict:
    """Train one decoder and return its record."""
    started = time.perf_counter()
    encoder, levels, widths = CONFIGURATIONS[name]
    versions = ["scenes", *(["weights"] if encoder else [])]
    torch.manual_seed(seed)
    decoder = TopDown(levels, widths)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=STEPS)
    # Thin things have few pixels: without weights a short training never gets to them.
    pixels = torch.bincount(train[1].flatten(), minlength=len(scenes.CLASSES))
    weights = pixels.float().rsqrt() / pixels.float().rsqrt().mean()
    for _ in range(STEPS):
        chosen = torch.randint(len(train[1]), (BATCH,))
        logits = decoder(pick(train[0], chosen))
        loss = F.cross_entropy(logits, train[1][chosen], weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    decoder.eval()
    iou = MulticlassJaccardIndex(len(scenes.CLASSES), average=None)
    with torch.inference_mode():
        for chosen in torch.arange(len(test[1])).split(50):
            iou.update(decoder(pick(test[0], chosen)).argmax(1), test[1][chosen])
    each = iou.compute()
    return {
        "what": name,
        "seed": seed,
        "miou": round(100 * each.mean().item(), 2),
        "iou": {c: round(100 * v.item(), 2) for c, v in zip(scenes.CLASSES, each, strict=True)},
        "steps": STEPS,
        "batch": BATCH,
        "parameters": count_parameters(decoder),
        "seconds": round(time.perf_counter() - started, 1),
        "provenance": records.provenance(*SOURCES, versions=versions),
    }


def pick(pyramid: Pyramid, chosen: Tensor) -> Pyramid:
    """Return the chosen scenes' maps in float32."""
    return Pyramid(*(level[chosen].float() for level in pyramid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="one seed below 10,000; only print")
    tune = parser.parse_args().tune
    torch.set_num_threads(1)
    wanted = itertools.product(CONFIGURATIONS, range(1 if tune else SEEDS))
    for name, seed in wanted:
        if not tune and records.is_done("scenes", what=name, seed=seed):
            continue
        weights = CONFIGURATIONS[name][0]
        drawn = seed if weights is None else 0  # the bundled encoder is the same for every seed
        train = features(weights, drawn, TUNE_TRAIN if tune else TRAIN, TRAIN_COUNT)
        test = features(weights, drawn, TUNE_TEST if tune else TEST, TEST_COUNT)
        record = measure(name, seed, train, test)
        print(f"{name:16} seed {seed}: mIoU {record['miou']:.1f}", record["iou"])
        if not tune:
            records.append("scenes", record, key=("what", "seed"))


if __name__ == "__main__":
    main()
