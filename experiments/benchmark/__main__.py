"""Compares the book's decoders with those of segmentation-models-pytorch, trained alike.

`python -m experiments.benchmark` trains what has no fresh record yet and writes
`results/benchmark.json`, what is worth most first: scenes, then streets with a frozen encoder,
then streets fine-tuned. Every decoder starts at both learning rates; the one that is better on
images kept for it (`tune`) goes on with more seeds. Stopped and started again it goes on where it
was; started twice, the two share the work. Peers need `pip install .[bench]`, streets need
CamVid (`helpers.camvid.download()`). What decoders cost, `experiments.benchmark.costs` measures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmark.candidates import CANDIDATES, SLOW, TUNED, VARIANTS
from experiments.benchmark.peers import PEERS, Peer
from experiments.core import records, trials
from experiments.core.provenance import Tree
from experiments.core.records import Record
from experiments.core.scores import WideScores, score
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import Pairs, Setting, Trial, train_on
from helpers.encoder import MEAN, Segmenter
from helpers.training import Features, cache_features

NAME = "benchmark"
SIDE = 32  # what divides the sides of every image
STAGES = (("scenes", True), ("streets", True), ("streets", False))  # data; frozen?
SEEDS = 3
KEY = ("data", "what", "frozen", "seed", "epochs", "device", "rate")


@dataclass(frozen=True)
class Contest:
    """On what decoders are compared, and in which respects.

    Of the classes called thin, two thirds of the pixels or more lie within 2 px of the edge, in
    masks of the kind that is trained on; of the next class, 39 % (star) and 55 % (bicyclist).
    """

    setting: Setting
    tune: tuple[Any, ...]  # the images to choose a rate on
    rates: tuple[float, float]  # what the chapters take, and what suits Linknet better
    thin: tuple[str, ...]
    things: tuple[str, ...]


CONTESTS = {
    "scenes": Contest(
        # After 6 epochs some peers are far from done; bfloat16 halves the hours.
        replace(trials.SETTINGS["scenes"], epochs=12, mixed=True),
        tune=(100, 0, 5_000),
        rates=(4e-3, 1.2e-2),
        thin=("ring", "pole"),
        things=("disc", "square", "triangle", "star", "ring", "pole"),
    ),
    "streets": Contest(
        replace(trials.SETTINGS["streets"], epochs=10),
        tune=("tune",),
        rates=(2e-3, 6e-3),
        thin=("pole", "pedestrian", "sign"),
        things=("pole", "sign", "car", "pedestrian", "bicyclist"),
    ),
}


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
def data(contest: Contest) -> dict[str, Pairs]:
    """Return the pairs to train on, to choose a rate on (`tune`) and to report on, in memory."""
    setting = contest.setting
    parts = {"train": setting.train, "tune": contest.tune, "report": setting.report}
    sets = {part: setting.data(*which) for part, which in parts.items()}
    return {
        part: [pad(*pairs[i], setting.ignore_index) for i in range(len(pairs))]
        for part, pairs in sets.items()
    }


KEPT: dict[Any, tuple[Pairs, Features]] = {}  # with the pairs: as long as they live, no other's id


def features(model: Segmenter, pairs: Pairs, mixed: bool, device: str) -> Features:
    """Return what the frozen encoder makes of the images, kept for the next decoder.

    Frozen encoders have the bundled weights here: their strides tell them apart.
    """
    key = (id(pairs), tuple(model.encoder.strides), model.takes_image, mixed, device)
    if key not in KEPT:
        KEPT.clear()  # before the others are made: there may be no room for both
        KEPT[key] = pairs, cache_features(model, pairs, mixed=mixed, device=device)
    return KEPT[key][1]


# --- one training


def train_and_score(
    candidate: Trial | Peer,
    contest: Contest,
    frozen: bool,
    seed: int,
    epochs: int,
    device: str,
    rate: float,
    state: Path,
) -> Record:
    """Train one decoder at one rate, and score it on the images to choose on and to report on."""
    setting = replace(contest.setting, epochs=epochs, lr=rate)
    pairs, classes = data(contest), setting.classes
    model = candidate.model(seed, len(classes), frozen)
    started = _clock(device)
    loss = train_on(
        model,
        pairs["train"],
        setting,
        seed,
        device=device,
        features=features(model, pairs["train"], setting.mixed, device) if frozen else None,
        checkpoint=state,
        resume=state if state.exists() else None,
    )
    scores = {
        part: score(
            model,
            pairs[part],
            classes=classes,
            thin=contest.thin,
            things=contest.things,
            ignore_index=setting.ignore_index,
            mixed=setting.mixed,
        )
        for part in ("tune", "report")
    }
    return {
        **_rounded(scores["report"]),
        "tune": {k: v for k, v in _rounded(scores["tune"]).items() if k != "iou"},
        "loss": loss,
        "batch_size": setting.batch_size,
        "encoder_rate": None if frozen else setting.pretrained_lr,
        "mixed": setting.mixed,
        "images": {part: len(each) for part, each in pairs.items()},
        "size": list(pairs["train"][0][1].shape),
        "seconds": round(_clock(device) - started, 1),
        "libraries": getattr(candidate, "libraries", {}),
    }


def _clock(device: str) -> float:
    """Count the CPU's seconds, whatever else the machine does; with a GPU, those that pass."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def _rounded(scores: WideScores) -> dict[str, Any]:
    values = scores._asdict()
    iou = {name: round(value, 2) for name, value in values.pop("iou").items()}
    return {**{name: round(value, 2) for name, value in values.items()}, "iou": iou}


def measure(data: str, what: str, state: Path, **task: Any) -> Record:
    return train_and_score(CANDIDATES[what], CONTESTS[data], state=state, **task)


def entries(data: str, what: str, **task: Any) -> Iterator[str]:
    yield "experiments/benchmark/__main__.py::train_and_score"
    yield f'experiments/benchmark/__main__.py::CONTESTS["{data}"]'
    yield f'experiments/benchmark/candidates.py::CANDIDATES["{what}"]'


SWEEP = Sweep(
    NAME,
    partial(measure),
    key=KEY,
    entries=entries,
    versions=lambda data, **task: ("weights", trials.VERSIONS[data]),
)
SWEEPS = {NAME: SWEEP}


# --- which trainings, and in which order


def tasks(
    only: Sequence[str], seeds: int, epochs: int | None, device: str, full: bool
) -> list[Record]:
    """Return every training, what is worth most first: stage by stage, seed by seed, `SLOW` last.

    Those without a rate take the one that is chosen. `full` makes no exceptions: all the seeds for
    `SLOW` ones, all decoders fine-tuned, and `VARIANTS` on streets, too.
    """
    found = []
    for where, frozen in STAGES:
        chosen = [what for what in only if frozen or full or what in TUNED]
        if where == "streets" and not full:
            chosen = [what for what in chosen if what not in VARIANTS]
        length = epochs or CONTESTS[where].setting.epochs
        stage = [
            dict(zip(KEY, (where, what, frozen, seed, length, device, rate), strict=True))
            for seed in range(seeds)
            for what in chosen
            if full or seed == 0 or where != "streets" or what not in SLOW
            for rate in (CONTESTS[where].rates if seed == 0 else (None,))
        ]
        found += sorted(stage, key=lambda task: task["what"] in SLOW)
    return found


def chosen_rate(task: Record, tree: Tree | None = None) -> float | None:
    """Return the rate with the best mIoU on the images to choose on; `None` as long as one lacks.

    Chosen with seed 0, and kept for the others.
    """
    tree, rates = tree or Tree(), CONTESTS[task["data"]].rates
    found = [records.find(NAME, tree, **{**task, "seed": 0, "rate": rate}) for rate in rates]
    if any(record is None for record in found):
        return None
    return max(found, key=lambda record: record["tune"]["miou"])["rate"]


def with_rates(tasks: Sequence[Record]) -> list[Record]:
    """Return the tasks at their rates; those whose rate is not chosen yet as they are."""
    tree = Tree()
    return [{**task, "rate": task["rate"] or chosen_rate(task, tree)} for task in tasks]


def attempt(task: Record) -> bool:
    """Run a task and tell whether it was: not without a rate, nor if another process is at it."""
    (task,) = with_rates([task])
    if task["rate"] is None or not SWEEP.attempt(task):
        return False
    mark(task)
    return True


def mark(task: Record) -> None:
    """Say in the records of a decoder which of them have the rate that was chosen."""
    best = chosen_rate(task)
    same = {k: v for k, v in task.items() if k not in ("seed", "rate")}
    if best is not None:
        for record in records.all_of(NAME):
            chosen = record["rate"] == best
            alike = all(record[k] == v for k, v in same.items())
            if alike and record.get("chosen") != chosen:
                records.append(NAME, {**record, "chosen": chosen}, SWEEP.key)


def main(given: Sequence[str] | None = None) -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--on", choices=CONTESTS, nargs="+", default=list(CONTESTS))
        parser.add_argument("--epochs", type=int, help="otherwise those of the data's setting")
        parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
        parser.add_argument("--full", action="store_true", help="no exceptions for what is slow")

    said = arguments(__doc__, CANDIDATES, seeds=SEEDS, given=given, more=more)
    if any(what in PEERS for what in said.only) and not find_spec("segmentation_models_pytorch"):
        raise SystemExit("peers need smp: pip install .[bench], or name others: --only …")
    wanted = tasks(said.only, said.seeds, said.epochs, said.device, said.full)
    wanted = [task for task in wanted if task["data"] in said.on]
    if said.plan or said.again:
        SWEEP.run(with_rates(wanted), plan=said.plan, again=said.again)
        return
    while any([attempt(task) for task in SWEEP.missing(with_rates(wanted))]):
        pass  # again: what waited for another process's rate


if __name__ == "__main__":
    main()
