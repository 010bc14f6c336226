"""What the wrong order of resizing and projecting costs.

A 1×1 convolution and a resize give the same in either order; the work differs. Both orders take
turns in one thread, so that whatever else the machine does slows both. Writes
`results/conv_projection_order.json`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from helpers import scenes
from helpers.bridges.conv_projection import AdaptedDecoder, FeatureAdaptation, check_pair
from helpers.encoder import OUT_CHANNELS, Pyramid
from helpers.inspection import count_macs, pyramid_levels, relative_latency

SIDE, WIDTH, REPEATS = scenes.SIZE, 64, 41
WAYS = {f"{name} to c2's grid": (name, "c2") for name in ("c3", "c4", "c5")}
WAYS["c2 to c5's grid"] = ("c2", "c5")
WHOLE = "whole decoder"


class ResizeFirst(FeatureAdaptation):
    """`FeatureAdaptation` in the wrong order: equal results, more work."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_pair(x, skip, self.channels)
        skip = F.interpolate(skip, size=x.shape[-2:], mode="bilinear")
        return self.relu(self.norm(self.project_x(x) + self.project_skip(skip)))


def pair(what: str) -> tuple[nn.Module, nn.Module, Tensor | Pyramid]:
    """Return the module that resizes first, the one that projects first, and their input."""
    levels = {level.name: level for level in pyramid_levels(SIDE, SIDE)}
    maps = Pyramid(*(torch.rand(1, *level[1:4]) for level in levels.values()))
    if what == WHOLE:
        wrong = AdaptedDecoder(OUT_CHANNELS, len(scenes.CLASSES), WIDTH, ResizeFirst)
        right = AdaptedDecoder(OUT_CHANNELS, len(scenes.CLASSES), WIDTH)
        right.load_state_dict(wrong.state_dict())
        return wrong, right, maps
    start, end = WAYS[what]
    conv = nn.Conv2d(levels[start].channels, WIDTH, 1)
    size = levels[end].height, levels[end].width
    smaller = size[0] * size[1] < levels[start].height * levels[start].width
    resize = nn.AdaptiveAvgPool2d(size) if smaller else nn.Upsample(size, mode="bilinear")
    return nn.Sequential(resize, conv), nn.Sequential(conv, resize), getattr(maps, start)


@torch.no_grad()
def measure(what: str, seed: int, repeats: int = REPEATS) -> Record:
    """Compare both orders: the largest difference, their MACs, their time."""
    torch.manual_seed(seed)
    resize_first, project_first, inputs = pair(what)
    one, other = resize_first.eval()(inputs), project_first.eval()(inputs)
    ratio = relative_latency(resize_first, project_first, inputs, repeats=repeats)
    return {
        "macs": count_macs(resize_first, inputs) / count_macs(project_first, inputs),
        "latency": round(ratio.median, 3),
        "lower": round(ratio.lower, 3),
        "upper": round(ratio.upper, 3),
        "difference": float((one - other).abs().max() / other.abs().max()),
        "side": SIDE,
        "width": WIDTH,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }


NAME = "conv_projection_order"
SWEEPS = {
    NAME: Sweep(
        NAME, measure, key=("what", "seed"), versions=(), timed=("latency", "lower", "upper")
    )
}


def main(given: Sequence[str] | None = None) -> None:
    said = arguments(__doc__, [*WAYS, WHOLE], given=given)
    tasks = [{"what": what, "seed": seed} for seed in range(said.seeds) for what in said.only]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
