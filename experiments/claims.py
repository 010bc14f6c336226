"""Measures what the chapters claim, on scenes and on streets, and writes `results/<slug>.json`.

`python -m experiments.claims unet` runs every trial of the chapter `unet` that has no fresh
record; `--plan` only lists them, with the time that they are likely to take. Stopped and started
again it goes on where it was; started twice, the two share the work.
Streets need CamVid (`helpers.camvid.download()`).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import SETTINGS, VERSIONS, Trial, measure_trial, results

CHAPTERS = (
    "encoder",
    "pooling_linear",
    "conv_projection",
    "attention",
    "unet",
    "multi_path",
    "spatial_pyramid",
    "upsampling",
    "conditional_concat",
)


def trials(slug: str) -> dict[str, Trial]:
    return import_module(f"experiments.chapters.{slug}.trials").TRIALS


def measure(slug: str, data: str, what: str, seed: int, state: Path) -> Record:
    """Train and score one trial; on streets, keep a few predictions of the first seed."""
    folder = results(slug) if data == "streets" and seed == 0 else None
    return measure_trial(trials(slug)[what], SETTINGS[data], seed, state, folder, what)


def entries(slug: str, data: str, what: str, seed: int) -> Iterator[str]:
    yield "experiments/core/trials.py::measure_trial"
    yield f'experiments/core/trials.py::SETTINGS["{data}"]'
    yield f'experiments/chapters/{slug}/trials.py::TRIALS["{what}"]'


def versions(slug: str, data: str, what: str, seed: int) -> Iterator[str]:
    yield VERSIONS[data]
    if trials(slug)[what].weights == "bundled":
        yield "weights"


SWEEPS = {
    slug: Sweep(
        slug,
        partial(measure, slug),
        key=("data", "what", "seed"),
        entries=partial(entries, slug),
        versions=partial(versions, slug),
    )
    for slug in CHAPTERS
}


def tasks(on: Sequence[str], only: Sequence[str], seeds: int) -> list[Record]:
    """Return all trainings, seed by seed."""
    wanted = itertools.product(range(seeds), on, only)
    return [{"data": data, "what": what, "seed": seed} for seed, data, what in wanted]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("slug", nargs="?")
    slug = parser.parse_known_args(given)[0].slug

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("slug", choices=CHAPTERS)
        parser.add_argument("--on", nargs="+", choices=SETTINGS, default=list(SETTINGS))

    said = arguments(__doc__, trials(slug) if slug in CHAPTERS else (), given=given, more=more)
    SWEEPS[slug].run(tasks(said.on, said.only, said.seeds), plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
