"""Compares the book's decoders with those of segmentation-models-pytorch, trained alike.

`python -m experiments.benchmark` trains what has no fresh record yet and writes
`results/benchmark.json`, what is worth most first: scenes, then streets with a frozen encoder,
then streets fine-tuned. Every decoder starts at both learning rates; the one that is better on
images kept for it (`tune`) goes on with more seeds. `--plan` only lists what is missing, with the
minutes of CPU time it may take. Stopped and started again it goes on where it was; started twice,
the two share the work (`OMP_NUM_THREADS=1` each). `--again` trains what is done once more and only
says how far off the record is. Peers need `pip install .[bench]`, streets need
CamVid (`helpers.camvid.download()`). What the decoders cost, `experiments.costs` measures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from filelock import Timeout
from torch import Tensor

from experiments import records, trials
from experiments.candidates import CANDIDATES, SLOW, TUNED, VARIANTS, Ours
from experiments.costs import macs
from experiments.peers import PEERS, Peer
from experiments.scores import Scores, score
from helpers import feeding, training
from helpers.encoder import MEAN, Segmenter
from helpers.metrics import SegmentationLoss, class_weights

NAME = "benchmark"
# Of the decoder: what the chapters take, and three times that, which suits Linknet better.
# An encoder that is fine-tuned keeps its own.
RATES = {"scenes": (4e-3, 1.2e-2), "streets": (2e-3, 6e-3)}
SIDE = 32  # what divides the sides of every image
SETTINGS = {
    # After 6 epochs some peers are far from done; bfloat16 halves the hours.
    "scenes": replace(trials.SCENES, epochs=12, mixed=True),
    "streets": replace(trials.STREETS, epochs=10),
}
TUNE: dict[str, tuple[Any, ...]] = {"scenes": (100, 0, 5_000), "streets": ("tune",)}
# Of these, two thirds of the pixels or more lie within 2 px of the edge, in masks of the kind
# that is trained on; of the next class, 39 % (star) and 55 % (bicyclist).
THIN = {"scenes": ("ring", "pole"), "streets": ("pole", "pedestrian", "sign")}
THINGS = {
    "scenes": ("disc", "square", "triangle", "star", "ring", "pole"),
    "streets": ("pole", "sign", "car", "pedestrian", "bicyclist"),
}


STAGES = (("scenes", True), ("streets", True), ("streets", False))  # data; frozen?
SEEDS = 3


class Task(NamedTuple):
    """One training; without a `rate`, at the one that was chosen."""

    data: str
    what: str
    frozen: bool
    seed: int
    epochs: int
    device: str
    rate: float | None = None


# --- data


def pad(image: Tensor, mask: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return both with sides that 32 divides, which most of smp's models ask for; the same for all.

    180 × 240 pixels become 192 × 256, in the middle of a frame of the colour that is zero once it
    is normalised, as the zeros that convolutions pad with. No pixel of the frame is counted.
    """
    height, width = mask.shape
    around = [-side % SIDE for side in (height, width)]
    if not any(around):
        return image, mask
    size = height + around[0], width + around[1]
    rows, columns = (
        slice(extra // 2, extra // 2 + side)
        for extra, side in zip(around, (height, width), strict=True)
    )
    frame = torch.tensor(MEAN).view(3, 1, 1).repeat(1, *size)
    labels = mask.new_full(size, ignore_index)
    frame[:, rows, columns], labels[rows, columns] = image, mask
    return frame, labels


@lru_cache(maxsize=1)
def data(name: str) -> dict[str, trials.Pairs]:
    """Return the pairs to train on, to choose a rate on (`tune`) and to report on, in memory."""
    setting = SETTINGS[name]
    parts = {"train": setting.train, "tune": TUNE[name], "report": setting.report}
    sets = {part: setting.data(*which) for part, which in parts.items()}
    return {
        part: [pad(*pairs[i], setting.ignore_index) for i in range(len(pairs))]
        for part, pairs in sets.items()
    }


class Sharing:
    """Stands in for `helpers.feeding.source`: what a frozen encoder makes of data is kept.

    The next decoder on the same encoder gets the same maps. Only the last ones are kept.
    """

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.kept: Any = None

    def __call__(
        self,
        model: Segmenter,
        pairs: trials.Pairs,
        flip: bool,
        cache: bool | None,
        precision: feeding.Precision,
    ) -> Any:
        if not feeding.is_frozen(model.encoder):
            return feeding.source(model, pairs, flip, cache, precision)
        # Frozen encoders have the bundled weights here: their strides tell them apart.
        settings = flip, model.takes_image, cache, precision.mixed, str(precision.device)
        key = (tuple(model.encoder.strides), *settings)
        if self.kept is None or self.key != key or self.kept[0] is not pairs:
            self.kept = None  # before the others are made: there may be no room for both
            self.kept = pairs, feeding.source(model, pairs, flip, cache, precision)
            self.key = key
        return self.kept[1]

    @contextmanager
    def used(self) -> Iterator[None]:
        with mock.patch.object(training, "source", self):
            yield


SHARING = Sharing()

# --- one training


def measure(task: Task, candidate: Ours | Peer) -> records.Record:
    """Train one decoder at one rate, and score it on the images to choose on and to report on."""
    where, setting = task.data, SETTINGS[task.data]
    pairs, classes = data(where), setting.classes
    model = candidate.model(task.seed, len(classes), task.frozen)
    versions = ["weights", "training", "metrics", {"streets": "camvid"}.get(where, where)]
    sources = [*candidate.sources(model), f"experiments/trials.py::{where.upper()}"]
    sources += ["experiments/benchmark.py::measure", "experiments/scores.py::score"]
    provenance = records.provenance(*sources, versions=versions)  # before the code can change
    provenance |= candidate.versions
    state = _state(task, provenance)
    weights = class_weights((m for _, m in pairs["train"]), len(classes), setting.ignore_index)
    started = _clock(task.device)
    with SHARING.used():
        history = training.fit(
            model,
            pairs["train"],
            epochs=task.epochs,
            batch_size=setting.batch_size,
            rate=task.rate,
            encoder_rate=setting.pretrained_rate,
            loss=SegmentationLoss(setting.ignore_index, weights),
            ignore_index=setting.ignore_index,
            seed=task.seed,
            mixed=setting.mixed,
            device=task.device,
            checkpoint=state,
            resume=state if state.exists() else None,
        )
    scores = {
        part: score(
            model,
            pairs[part],
            classes=classes,
            thin=THIN[where],
            things=THINGS[where],
            ignore_index=setting.ignore_index,
            mixed=setting.mixed,
        )
        for part in ("tune", "report")
    }
    seconds = _clock(task.device) - started
    state.unlink(missing_ok=True)
    return {
        **task._asdict(),
        "of": candidate.of,
        **_rounded(scores["report"]),
        "tune": {k: v for k, v in _rounded(scores["tune"]).items() if k != "iou"},
        "loss": [round(value, 4) for value in history.loss],
        "batch_size": setting.batch_size,
        "encoder_rate": None if task.frozen else setting.pretrained_rate,
        "mixed": setting.mixed,
        "images": {part: len(each) for part, each in pairs.items()},
        "size": list(pairs["train"][0][1].shape),
        "seconds": round(seconds, 1),
        "command": f"python -m experiments.{NAME}",
        "provenance": provenance,
    }


def _clock(device: str) -> float:
    """Count the CPU's seconds, whatever else the machine does; with a GPU, those that pass."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def _state(task: Task, provenance: records.Record) -> Path:
    """Return where an interrupted training is kept: somewhere else when its code has changed."""
    said = json.dumps([task, provenance], sort_keys=True)
    of = hashlib.sha256(said.encode()).hexdigest()[:16]
    return records.ROOT / ".cache" / NAME / f"{of}.safetensors"


def _rounded(scores: Scores) -> dict[str, Any]:
    values = scores._asdict()
    iou = {name: round(value, 2) for name, value in values.pop("iou").items()}
    return {**{name: round(value, 2) for name, value in values.items()}, "iou": iou}


# --- which trainings, and in which order


def tasks(
    only: list[str], seeds: int | None, epochs: int | None, device: str, full: bool
) -> list[Task]:
    """Return every training, what is worth most first: stage by stage, seed by seed, `SLOW` last.

    `full` makes no exceptions: all the seeds for `SLOW` ones, all decoders fine-tuned, and
    `VARIANTS` on streets, too.
    """
    found = []
    for where, frozen in STAGES:
        chosen = [what for what in only if frozen or full or what in TUNED]
        if where == "streets" and not full:
            chosen = [what for what in chosen if what not in VARIANTS]
        length = epochs or SETTINGS[where].epochs
        stage = []
        for seed in range(seeds or SEEDS):
            for what in chosen:
                if seed and not full and where == "streets" and what in SLOW:
                    continue
                rates = RATES[where] if seed == 0 else (None,)
                stage += [Task(where, what, frozen, seed, length, device, r) for r in rates]
        found += sorted(stage, key=lambda task: task.what in SLOW)
    return found


def same(task: Task) -> dict[str, Any]:
    """Return what the trainings among which a rate is chosen have in common, as in a record."""
    kept = {k: v for k, v in task._asdict().items() if k not in ("seed", "rate")}
    return {**kept, "of": CANDIDATES[task.what].of}


def chosen_rate(task: Task) -> float | None:
    """Return the rate with the best mIoU on the images to choose on; `None` as long as one lacks.

    Chosen with seed 0, and kept for the others.
    """
    found = [records.find(NAME, **same(task), seed=0, rate=rate) for rate in RATES[task.data]]
    if any(record is None for record in found):
        return None
    return max(found, key=lambda record: record["tune"]["miou"])["rate"]


def is_done(task: Task) -> bool:
    rate = chosen_rate(task) if task.rate is None else task.rate
    return rate is not None and records.is_done(NAME, **same(task), seed=task.seed, rate=rate)


def attempt(task: Task) -> bool:
    """Run a task and tell whether it was: not without a rate, nor if another process is at it."""
    rate = chosen_rate(task) if task.rate is None else task.rate
    if rate is None:
        return False
    task = task._replace(rate=rate)
    name = " ".join(map(str, task))
    try:
        with records.lock(f"{NAME} {name}", timeout=0):
            if is_done(task):
                return False
            record = measure(task, CANDIDATES[task.what])
            records.append(NAME, record, key=Task._fields)
    except Timeout:
        return False
    mark(task)
    said = f"mIoU {record['miou']:.1f}, to choose by {record['tune']['miou']:.1f}"
    print(f"{name}: {said}, {record['seconds']:.0f} s", flush=True)
    return True


def mark(task: Task) -> None:
    """Say in the records of a decoder which of them have the rate that was chosen."""
    best = chosen_rate(task)
    if best is not None:
        for record in records.all_of(NAME):
            chosen = record["rate"] == best
            alike = all(record[k] == v for k, v in same(task).items())
            if alike and record.get("chosen") != chosen:
                records.append(NAME, {**record, "chosen": chosen}, key=Task._fields)


def minutes(wanted: list[Task]) -> list[float | None]:
    """Return how long each may take: as before, or by its work and that of others like it."""
    done = [(Task(**{k: r[k] for k in Task._fields}), r) for r in records.all_of(NAME)]
    done = [(task, record) for task, record in done if task.what in CANDIDATES]
    known: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for task, record in done:
        for key in _kin(task):
            known.setdefault(key, []).append((record["seconds"], work(task)))
    found: list[float | None] = []
    for task in wanted:
        kin = next((known[key] for key in _kin(task) if key in known), None)
        if kin is None:
            found.append(None)
            continue
        seconds, works = (sum(values) for values in zip(*kin, strict=True))
        found.append(seconds / works * work(task) / 60)
    return found


def _kin(task: Task) -> list[tuple[Any, ...]]:
    """Return what trainings may have in common that go at about one speed, the closest first."""
    where, what, frozen, device = task.data, task.what, task.frozen, task.device
    return [(device, where, what, frozen), (device, where, frozen), (device, what), (device,)]


def work(task: Task) -> float:
    """Return the multiply-accumulates of a training and of scoring, estimated."""
    setting = SETTINGS[task.data]
    size, images, looked_at = {
        "scenes": ((128, 128), setting.train[0], 300),
        "streets": ((192, 256), 266, 202),
    }[task.data]
    encoder, decoder = _macs(task.what, len(setting.classes), size)
    learning = decoder if task.frozen else encoder + decoder
    return task.epochs * images * 3 * learning + looked_at * (encoder + decoder)


@cache
def _macs(what: str, classes: int, size: tuple[int, int]) -> tuple[int, int]:
    return macs(CANDIDATES[what].model(0, classes), size)


def plan(wanted: list[Task]) -> None:
    """Print each missing training and how long it may take."""
    known = minutes(wanted)
    totals: dict[str, float] = {}
    for task, time_ in zip(wanted, known, strict=True):
        stage = f"{task.data}, {'frozen' if task.frozen else 'fine-tuned'}"
        rate = "chosen rate" if task.rate is None else f"rate {task.rate:g}"
        said = "?" if time_ is None else f"{time_:.1f} min"
        print(f"{stage:20} {task.what:28} seed {task.seed}  {rate:12}  {said}")
        totals[stage] = totals.get(stage, 0.0) + (time_ or 0.0)
    for stage, total in totals.items():
        print(f"{stage}: about {total:.0f} min")
    guessed = f", and {known.count(None)} of unknown length" if None in known else ""
    print(f"{len(wanted)} trainings are missing: about {sum(totals.values()):.0f} min{guessed}.")


def again(wanted: list[Task]) -> None:
    """Train once more what has a record, write nothing, and print both beside the seeds' range."""
    for task in wanted:
        rate = chosen_rate(task)
        old = records.find(NAME, **same(task), seed=task.seed, rate=rate)
        if old is None or task.rate not in (None, rate):
            continue
        new = measure(task._replace(rate=rate), CANDIDATES[task.what])
        seeds = [
            record["miou"]
            for record in records.all_of(NAME)
            if record.get("chosen") and all(record[k] == v for k, v in same(task).items())
        ]
        said = f"mIoU {new['miou']:.2f}, recorded {old['miou']:.2f}"
        span = f"{len(seeds)} seeds: {min(seeds):.2f} to {max(seeds):.2f}"
        print(f"{task.data} {task.what}, seed {task.seed}: {said}; {span}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of decoders")
    parser.add_argument("--on", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, help=f"how many; otherwise {SEEDS}")
    parser.add_argument("--epochs", type=int, help="otherwise those of the data's setting")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--full", action="store_true", help="no exceptions for what is slow")
    parser.add_argument("--plan", action="store_true", help="list what is missing; run nothing")
    parser.add_argument(
        "--again", action="store_true", help="train what is done once more, and compare"
    )
    given = parser.parse_args(arguments)
    unknown = set(given.only or ()) - set(CANDIDATES)
    if unknown:
        parser.error(f"no decoder {sorted(unknown)}; there are {list(CANDIDATES)}")
    if os.environ.get("BOOK_WEIGHTS"):
        parser.error("BOOK_WEIGHTS is set, and would measure another encoder: unset it")
    names = given.only or list(CANDIDATES)
    if any(name in PEERS for name in names) and not find_spec("segmentation_models_pytorch"):
        parser.error("peers need smp: pip install .[bench], or name others: --only …")
    wanted = tasks(names, given.seeds, given.epochs, given.device, given.full)
    wanted = [task for task in wanted if task.data in given.on]
    if given.plan:
        plan([task for task in wanted if not is_done(task)])
        return
    if given.again:
        again(wanted)
        return
    while any([attempt(task) for task in wanted if not is_done(task)]):
        pass  # again: what waited for another process's rate


if __name__ == "__main__":
    main()
