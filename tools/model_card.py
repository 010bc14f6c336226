"""Writes what was measured into the bundled encoder's model card, from `results/`.

The card is `helpers/weights/README.md`; `make sync` makes what stands between its markers.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from tools.project import fill

CARD = Path("helpers", "weights", "README.md")
WEIGHTS = CARD.with_name("resnet18-tiny-imagenet-fp16.safetensors")
Record = dict[str, Any]


def make_card(root: Path) -> str:
    """Return the card with every marked block made anew."""
    makers = {"file": file, "top1": top1, "training": training}
    makers |= {"transfer": transfer, "chosen": chosen}
    text = (root / CARD).read_text(encoding="utf-8")
    return fill(text, {name: f"\n{make(root)}\n\n" for name, make in makers.items()})


def file(root: Path) -> str:
    """Size and hash."""
    content = (root / WEIGHTS).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return _table(["size", "SHA-256"], [[f"{len(content):,} bytes", f"`{digest}`"]])


def top1(root: Path) -> str:
    """Accuracy by the side that the validation images were resized to."""
    (report,) = _load(root, "pretrain")
    return _table(
        ["side", *report["top1"]], [["top-1", *(f"{v:.1f} %" for v in report["top1"].values())]]
    )


def training(root: Path) -> str:
    """What was asked for, and what it took."""
    (report,) = _load(root, "pretrain")
    recipe = report["settings"]
    epochs = report["images_seen"] / recipe["images"]
    sides = f"{recipe['sides'][0]}…{recipe['sides'][-1]}, at most {recipe['first']} at the start"
    last = " and ".join(map(str, recipe["last"]))
    start = (
        f"the weights with SHA-256 {recipe['start'][:12]}…" if recipe["start"] else "random weights"
    )
    rows = [
        ["started from", start],
        ["time", f"{report['minutes']:.0f} minutes, {report['device'].upper()}"],
        ["images seen", f"{report['images_seen']:,} ({epochs:.1f} epochs); seed {recipe['seed']}"],
        [
            "optimiser",
            f"SGD with Nesterov momentum {recipe['momentum']}, batch {recipe['batch']}; rate up "
            f"to {recipe['rate']}, then linearly to 0; weight decay {recipe['decay']}, not on "
            f"vectors; label smoothing {recipe['smoothing']}",
        ],
        [
            "image side",
            f"drawn for each batch: {sides}; {last} in the last "
            f"{100 * (1 - recipe['last_from']):.0f} %",
        ],
        [
            "augmentation",
            f"a random resized crop of its own for each image (area {recipe['smallest_crop']}…1), "
            f"flip, brightness, contrast and saturation by ±{recipe['colors']}, CutMix on "
            f"{100 * recipe['cutmix']:.0f} % of the batches",
        ],
        [
            "weights",
            f"running average ({recipe['average']} a step), BatchNorm's statistics taken anew",
        ],
    ]
    return _table(["", ""], rows)


def transfer(root: Path) -> str:
    """MIoU of the light decoder: mean and, in brackets, the lowest and the highest seed."""
    measured = _load(root, "encoder")
    rows = []
    for where in ("scenes", "streets"):
        for how in ("frozen", "fine-tuned"):
            runs = [
                [r["miou"] for r in measured if (r["data"], r["what"]) == (where, f"{name}, {how}")]
                for name in ("random", "first", "bundled")
            ]
            rows.append([f"{where}, {how}", *map(_spread, runs)])
    return _table(["mIoU, %", "random", "the first weights", "these weights"], rows)


def chosen(root: Path) -> str:
    """MIoU on the clip that encoders are chosen on."""
    measured = _load(root, "choice")
    names = list(dict.fromkeys(r["encoder"] for r in measured))
    runs = [[r["miou"] for r in measured if r["encoder"] == name] for name in names]
    return _table(["mIoU, %", *names], [["streets to choose on, frozen", *map(_spread, runs)]])


def _spread(values: list[float]) -> str:
    if not values:
        return "not measured"
    return f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _load(root: Path, name: str) -> list[Record]:
    return json.loads((root / "results" / f"{name}.json").read_text(encoding="utf-8"))
