"""Measures what the chapters claim, on scenes and on streets, and writes `results/<slug>.json`.

`python -m experiments.claims unet` runs every trial of the chapter `unet` that has no fresh
record; `--plan` only lists them, with the time that they are likely to take. Stopped and started
again it goes on where it was; started twice, the two share the work (`OMP_NUM_THREADS=1` each).
Streets need CamVid (`helpers.camvid.download()`).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics

from filelock import Timeout

from experiments import (
    attention,
    conditional_concat,
    conv_projection,
    multi_path,
    pooling_linear,
    records,
    spatial_pyramid,
    transfer,
    unet,
    upsampling,
)
from experiments.trials import SETTINGS, run
from helpers import records as stored

CHAPTERS = {
    "encoder": transfer.TRIALS,
    "pooling_linear": pooling_linear.TRIALS,
    "conv_projection": conv_projection.TRIALS,
    "attention": attention.TRIALS,
    "unet": unet.TRIALS,
    "multi_path": multi_path.TRIALS,
    "spatial_pyramid": spatial_pyramid.TRIALS,
    "upsampling": upsampling.TRIALS,
    "conditional_concat": conditional_concat.TRIALS,
}
Task = tuple[str, str, int]  # data set, trial, seed


def missing(slug: str, where: list[str], only: list[str], seeds: int) -> list[Task]:
    """Return what has no fresh record yet, seed by seed."""
    wanted = itertools.product(range(seeds), where, only)
    return [
        (data, what, seed)
        for seed, data, what in wanted
        if not records.is_done(slug, data=data, what=what, seed=seed)
    ]


def minutes(slug: str, task: Task) -> float | None:
    """Return how long such a trial took before: this one, or else one with the same encoder."""
    data, what, _ = task
    trials = CHAPTERS[slug]
    try:
        past = [r for r in stored.load(slug) if r["data"] == data and r["what"] in trials]
    except FileNotFoundError:
        return None
    same = [r for r in past if r["what"] == what]
    kin = [r for r in past if trials[r["what"]].frozen == trials[what].frozen]
    return statistics.mean(r["seconds"] for r in same or kin) / 60 if same or kin else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slug", choices=CHAPTERS)
    parser.add_argument("--on", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", metavar="TRIAL", help="names of trials")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="list what is missing; run nothing")
    given = parser.parse_args(arguments)
    trials = CHAPTERS[given.slug]
    unknown = set(given.only or ()) - set(trials)
    if unknown:
        parser.error(f"no trial {sorted(unknown)}; there are {sorted(trials)}")
    if os.environ.get("BOOK_WEIGHTS"):
        parser.error("BOOK_WEIGHTS is set, and would measure another encoder: unset it")
    tasks = missing(given.slug, given.on, given.only or list(trials), given.seeds)
    if given.plan:
        plan(given.slug, tasks)
        return
    for data, what, seed in tasks:
        try:
            with records.lock(f"{given.slug} {data} {what} {seed}", timeout=0):
                if records.is_done(given.slug, data=data, what=what, seed=seed):
                    continue
                record = run(given.slug, data, what, trials[what], seed)
        except Timeout:
            continue  # another process is at it
        print(f"{data}, {what}, seed {seed}: mIoU {record['miou']:.1f}", flush=True)


def plan(slug: str, tasks: list[Task]) -> None:
    """Print each missing trial and how long it may take."""
    known = [minutes(slug, task) for task in tasks]
    for (data, what, seed), time in zip(tasks, known, strict=True):
        print(f"{data:8} {what:24} seed {seed}  {'?' if time is None else f'{time:.1f} min'}")
    total = sum(time for time in known if time is not None)
    guessed = f", and {known.count(None)} of unknown length" if None in known else ""
    print(f"{len(tasks)} trials are missing: about {total:.0f} min{guessed}.")


if __name__ == "__main__":
    main()
