"""Compares encoders on the streets kept for choosing.

`python -m experiments.pretrain.choose NAME=FILE …`: the files are what `experiments.pretrain`
writes. Each encoder is frozen under chapter 01's light decoder, three seeds; the mIoU is that of
the clip `tune`, never of the drive that the book reports on. Needs CamVid; writes
`results/choice.json`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

from experiments.chapters.encoder.trials import LightDecoder
from experiments.core import records
from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import SETTINGS, Pairs, Setting, Trial, train_on
from helpers.training import evaluate


@lru_cache(maxsize=1)
def pairs(setting: Setting) -> tuple[Pairs, Pairs]:
    """Return the streets to train on and those to choose on, in memory."""
    parts = setting.data(*setting.train), setting.data("tune")
    train, tune = ([part[i] for i in range(len(part))] for part in parts)
    return train, tune


def score(file: Path | None, setting: Setting, seed: int) -> Record:
    """Return the mIoU, in per cent, of the light decoder on this encoder, frozen."""
    train, tune = pairs(setting)
    trial = Trial(LightDecoder, weights=(lambda: file) if file else None)
    model = trial.model(seed, len(setting.classes))
    train_on(model, train, setting, seed)
    scores = evaluate(model, tune, ignore_index=setting.ignore_index, mixed=setting.mixed)
    return {"miou": round(scores.miou, 2), "images": len(tune)}


FILES: dict[str, Path | None] = {"random": None}  # and what the command line names


def measure(encoder: str, sha256: str | None, seed: int) -> Record:
    return score(FILES[encoder], SETTINGS["streets"], seed)


def entries(encoder: str, sha256: str | None, seed: int) -> Iterator[str]:
    yield "experiments/pretrain/choose.py::score"
    yield 'experiments/core/trials.py::SETTINGS["streets"]'


SWEEPS = {
    "choice": Sweep(
        "choice",
        partial(measure),
        key=("encoder", "sha256", "seed"),
        entries=entries,
        versions=("camvid",),
    )
}


def digest(file: Path | None) -> str | None:
    return file and hashlib.sha256(file.read_bytes()).hexdigest()


def main(given: Sequence[str] | None = None) -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("encoders", nargs="*", metavar="NAME=FILE", help="besides random ones")

    said = arguments(__doc__, given=given, more=more)
    for each in said.encoders:
        name, sign, file = each.partition("=")
        if not sign or name == "random" or not Path(file).is_file():
            raise SystemExit(f"expected NAME=FILE, a new name and a file that exists, got {each!r}")
        FILES[name] = Path(file)
        of_name = [r["sha256"] for r in records.all_of("choice") if r["encoder"] == name]
        if set(of_name) - {digest(Path(file))}:
            raise SystemExit(f"{name!r} was measured with another file: choose another name")
    tasks = [
        {"encoder": name, "sha256": digest(file), "seed": seed}
        for name, file in FILES.items()
        for seed in range(said.seeds)
    ]
    SWEEPS["choice"].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
