"""The trials of the chapter on many paths: one, five, all through one grid, and their cousins."""

from __future__ import annotations

from experiments.core.trials import Trial, without
from helpers.bridges.multi_path import (
    FPNDecoder,
    MultiPathDecoder,
    OnePathDecoder,
    SegFormerDecoder,
    SummedPathDecoder,
    ThroughGrid,
)


def through(in_channels: tuple[int, ...], classes: int, *, level: str) -> ThroughGrid:
    return ThroughGrid(MultiPathDecoder(in_channels, classes), level)


TRIALS = {
    "one path": Trial(OnePathDecoder),
    "many paths": Trial(MultiPathDecoder),
    "through c5's grid": Trial(through, level="c5"),
    "through c4's grid": Trial(through, level="c4"),
    "through c3's grid": Trial(through, level="c3"),
    "through c2's grid": Trial(through, level="c2"),
    "sum": Trial(SummedPathDecoder),
    "FPN": Trial(FPNDecoder),
    "SegFormer head": Trial(SegFormerDecoder),
    "without c1": Trial(without, of=MultiPathDecoder, levels=["c1"]),
    "without c2": Trial(without, of=MultiPathDecoder, levels=["c2"]),
    "without c3": Trial(without, of=MultiPathDecoder, levels=["c3"]),
    "without c4": Trial(without, of=MultiPathDecoder, levels=["c4"]),
    "without c5": Trial(without, of=MultiPathDecoder, levels=["c5"]),
}
