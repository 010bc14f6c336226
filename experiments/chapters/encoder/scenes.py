"""Are scenes worth teaching with? Measures what skips and a pretrained encoder are worth on them.

`python -m experiments.chapters.encoder.scenes` writes `results/scenes.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from helpers import scenes
from helpers.encoder import OUT_CHANNELS, Pyramid, ResNet18Encoder, normalize
from helpers.inspection import count_parameters
from helpers.training import minimise, one_cycle

TRAIN, TEST = 10_000, 20_000  # first indices; below them lie the scenes that were tuned on
TRAIN_COUNT, TEST_COUNT = 600, 200
STEPS, BATCH, LR = 400, 10, 4e-3
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


def measure(what: str, seed: int) -> Record:
    """Train one decoder, and score it on scenes that it has not seen."""
    encoder, levels, widths = CONFIGURATIONS[what]
    drawn = seed if encoder is None else 0  # the bundled encoder is the same for every seed
    maps, masks = features(encoder, drawn, TRAIN, TRAIN_COUNT)
    unseen, truth = features(encoder, drawn, TEST, TEST_COUNT)
    torch.manual_seed(seed)
    decoder = TopDown(levels, widths)
    # Thin things have few pixels: without weights a short training never gets to them.
    pixels = torch.bincount(masks.flatten(), minlength=len(scenes.CLASSES))
    weights = pixels.float().rsqrt() / pixels.float().rsqrt().mean()

    def loss_of(_: Tensor, __: int) -> Tensor:
        chosen = torch.randint(len(masks), (BATCH,))
        return F.cross_entropy(decoder(pick(maps, chosen)), masks[chosen], weights)

    cycle = partial(one_cycle, warm_up=0.3)
    minimise(decoder, loss_of, STEPS, epochs=1, batch_size=1, lr=LR, schedule=cycle)
    iou = MulticlassJaccardIndex(len(scenes.CLASSES), average=None)
    with torch.inference_mode():
        for chosen in torch.arange(len(truth)).split(50):
            iou.update(decoder(pick(unseen, chosen)).argmax(1), truth[chosen])
    each = iou.compute()
    return {
        "miou": round(100 * each.mean().item(), 2),
        "iou": {c: round(100 * v.item(), 2) for c, v in zip(scenes.CLASSES, each, strict=True)},
        "steps": STEPS,
        "batch": BATCH,
        "parameters": count_parameters(decoder),
    }


def pick(pyramid: Pyramid, chosen: Tensor) -> Pyramid:
    """Return the chosen scenes' maps in float32."""
    return Pyramid(*(level[chosen].float() for level in pyramid))


def versions(what: str, seed: int) -> list[str]:
    return ["scenes", *(["weights"] if CONFIGURATIONS[what][0] else [])]


SWEEPS = {"scenes": Sweep("scenes", measure, key=("what", "seed"), versions=versions)}


def main(given: Sequence[str] | None = None) -> None:
    said = arguments(__doc__, CONFIGURATIONS, given=given)
    tasks = [{"what": what, "seed": seed} for what in said.only for seed in range(said.seeds)]
    SWEEPS["scenes"].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
