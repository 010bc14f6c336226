"""Compares encoders on the streets kept for choosing: `python -m experiments.choose NAME=FILE …`.

The files are what `experiments.pretrain` writes. Each encoder is frozen under the light decoder of
`experiments.transfer`, three seeds; the mIoU is that of the clip `tune`, never of the drive that
the book reports on. Needs CamVid; writes `results/choice.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from pathlib import Path

from experiments import records, transfer, trials
from helpers import camvid
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import evaluate, fit

SOURCES = (
    "experiments/choose.py::measure",
    "experiments/transfer.py::light",
    "experiments/trials.py::STREETS",
)

COMMAND = "python -m experiments.choose NAME=FILE"


def measure(file: Path | None, seed: int, train: trials.Pairs, tune: trials.Pairs) -> float:
    """Return the mIoU, in percent, of the light decoder on this encoder, frozen."""
    setting = trials.STREETS
    trial = trials.Trial(transfer.light, (lambda: file) if file else None)
    model = trial.model(seed, len(setting.classes))
    balance = class_weights((m for _, m in train), len(setting.classes), setting.ignore_index)
    fit(
        model,
        train,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        rate=setting.rate,
        loss=SegmentationLoss(setting.ignore_index, balance),
        ignore_index=setting.ignore_index,
        seed=seed,
        mixed=setting.mixed,
    )
    return evaluate(model, tune, ignore_index=setting.ignore_index, mixed=setting.mixed).miou


def _digest(file: Path | None) -> str | None:
    return file and hashlib.sha256(file.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoders", nargs="*", metavar="NAME=FILE", help="besides random ones")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    files: dict[str, Path | None] = {"random": None}
    for each in given.encoders:
        name, sign, file = each.partition("=")
        if not sign or name == "random" or not Path(file).is_file():
            parser.error(f"expected NAME=FILE, another name and a file that exists, got {each!r}")
        files[name] = Path(file)
        digest = _digest(files[name])
        if any(r["encoder"] == name and r["sha256"] != digest for r in records.all_of("choice")):
            parser.error(f"{name!r} is already measured with another file: choose another name")
    train, tune = (
        [part[i] for i in range(len(part))]
        for part in (camvid.CamVid(*trials.STREETS.train), camvid.CamVid("tune"))
    )
    for name, path in files.items():
        digest = _digest(path)
        found = []
        for seed in range(given.seeds):
            key = {"encoder": name, "sha256": digest, "seed": seed}
            record = records.find("choice", **key)
            if not record:
                provenance = records.provenance(
                    *SOURCES, versions=("camvid", "training", "metrics")
                )
                miou = round(measure(path, seed, train, tune), 2)
                record = {**key, "miou": miou, "images": len(tune), "command": COMMAND}
                record["provenance"] = provenance
                records.append("choice", record, key=("encoder", "seed"))
            found.append(record["miou"])
        print(f"{name:12} {statistics.mean(found):.2f}  {found}", flush=True)


if __name__ == "__main__":
    main()
