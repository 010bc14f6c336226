"""Is training with cached features as much faster as MACs predict?

A frozen encoder's maps can be computed once. What is left of a step is the decoder, forward and
backward: about three times the MACs of its forward pass. Epochs with and without the cache take
turns in one thread, so that whatever else the machine does slows both; making the cache is not
counted. Writes `results/caching.json`, one record for each decoder.

The prediction holds where convolutions take most of the time. The narrower the decoder, the more
of a step is what MACs do not count (resizing and its gradient, the loss at full size, AdamW),
which is why a narrow one is measured, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from helpers import scenes
from helpers.bridges.unet import AddBlock, UNetDecoder
from helpers.encoder import OUT_CHANNELS, ResNet18Encoder, Segmenter, normalize
from helpers.inspection import count_macs
from helpers.metrics import SegmentationLoss
from helpers.training.feeding import Batch, Features, Images, Precision, batches

FIRST, COUNT, BATCH, REPEATS = 10_000, 64, 8, 21
CLASSES = len(scenes.CLASSES)
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "U-Net": lambda: UNetDecoder(OUT_CHANNELS, CLASSES),
    "adding": lambda: UNetDecoder(OUT_CHANNELS, CLASSES, block=AddBlock),
    "U-Net, a quarter as wide": lambda: UNetDecoder(OUT_CHANNELS, CLASSES, (32, 16, 12, 8)),
}


class Steps:
    """A model with what one step of its training needs, as in `fit`."""

    def __init__(self, model: Segmenter) -> None:
        self.model = model.train()
        self.loss = SegmentationLoss()
        self.optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    def take(self, batch: Batch) -> None:
        loss = self.loss(batch.logits(self.model), batch.masks)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def epoch(self, feed: Images | Features, count: int, epoch: int) -> float:
        """Return the seconds that an epoch takes, batches included."""
        started = time.perf_counter()
        for batch in batches(feed, count, BATCH, True, seed=0, epoch=epoch):
            self.take(batch)
        return time.perf_counter() - started

    def macs(self, batch: Batch) -> int:
        """Return the multiply-accumulates of one step, those of the backward pass as they are."""
        with FlopCounterMode(display=False) as counter:
            self.take(batch)
        return counter.get_total_flops() // 2


def measure(what: str, count: int = COUNT, repeats: int = REPEATS) -> Record:
    """Time one decoder's training, `repeats` epochs with the cache and as many without."""
    torch.manual_seed(0)
    model = Segmenter(ResNet18Encoder("bundled"), DECODERS[what]())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    drawn = scenes.Scenes(count, 0, FIRST)
    pairs = [drawn[i] for i in range(count)]  # in memory: drawing them is not what is timed
    precision = Precision("cpu", mixed=False)
    images, features = Images(pairs, precision), Features(model, pairs, True, precision)
    steps = Steps(model)

    seconds: dict[str, list[float]] = {"cached": [], "uncached": []}
    for epoch in range(repeats + 1):
        now = {
            "cached": steps.epoch(features, count, epoch),
            "uncached": steps.epoch(images, count, epoch),
        }
        for name, value in now.items():
            seconds[name] += [value] if epoch else []  # the first one warms up
    pairwise = zip(seconds["uncached"], seconds["cached"], strict=True)
    lower, median, upper = statistics.quantiles(
        [uncached / cached for uncached, cached in pairwise], n=4, method="inclusive"
    )

    batch = normalize(torch.stack([image for image, _ in pairs[:BATCH]]))
    encoder = count_macs(model.encoder, batch)
    decoder = count_macs(model.decoder, model.encoder(batch))
    chosen, sides = list(range(BATCH)), torch.zeros(BATCH, dtype=torch.bool)
    counted = [steps.macs(feed.batch(chosen, sides)) for feed in (images, features)]
    steps_an_epoch = -(-count // BATCH)
    return {
        "ratio": round(median, 3),
        "lower": round(lower, 3),
        "upper": round(upper, 3),
        "predicted": round((encoder + 3 * decoder) / (3 * decoder), 3),
        "counted": round(counted[0] / counted[1], 3),
        "encoder_macs": encoder // BATCH,
        "decoder_macs": decoder // BATCH,
        "step_macs": {"uncached": counted[0] // BATCH, "cached": counted[1] // BATCH},
        "step_ms": {
            name: round(1000 * statistics.median(values) / steps_an_epoch, 1)
            for name, values in seconds.items()
        },
        "images": count,
        "side": scenes.SIZE,
        "batch": BATCH,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }


TIMED = ("ratio", "lower", "upper", "step_ms")
SWEEPS = {"caching": Sweep("caching", measure, key=("what",), timed=TIMED)}


def main(given: Sequence[str] | None = None) -> None:
    said = arguments(__doc__, DECODERS, given=given)
    SWEEPS["caching"].run([{"what": what} for what in said.only], plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
