"""Makes an encoder of `experiments.pretrain` the bundled one: `… experiments.pretrain.adopt FILE`.

Copies the weights, pins their SHA-256 and keeps the report as `results/pretrain.json`. Every record
that rests on the old weights is stale from then on, and so is the model card: CONTRIBUTING.md says
what to run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.core.provenance import ROOT
from helpers.encoder import load_file

LARGEST = 23.5e6  # bytes
CLASSES = 200
PIN = re.compile(r'^(BUNDLED_SHA256 = ")[0-9a-f]{64}(")', re.MULTILINE)
BUNDLED = Path("helpers", "weights", "resnet18-tiny-imagenet-fp16.safetensors")
PINNED = Path("helpers", "encoder.py")


def adopt(file: Path, root: Path = ROOT) -> None:
    """Copy, pin, record; raises `ValueError` for a file that cannot be bundled."""
    state, content = load_file(file), file.read_bytes()
    new = hashlib.sha256(content).hexdigest()
    report = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    if len(state["fc.bias"]) != CLASSES or not all(t.isfinite().all() for t in state.values()):
        raise ValueError(f"{file.name}: expected {CLASSES} classes and finite numbers.")
    if report["sha256"] != new:
        raise ValueError(
            f"The report beside {file.name} is about another file: {report['sha256']}."
        )
    if len(content) > LARGEST:
        raise ValueError(
            f"{file.name} has {len(content):,} bytes; expected {LARGEST:,.0f} at most."
        )
    provenance = {"entries": [], "code": {}, "weights": new[:16], "torch": report.pop("torch")}
    source = (root / PINNED).read_text(encoding="utf-8")
    pinned, places = PIN.subn(rf"\g<1>{new}\g<2>", source)
    if places != 1:
        raise ValueError(f"{PINNED} pins {places} hashes; expected the one of {BUNDLED.name}.")
    record = {**report, "provenance": provenance}
    _write(root / "results" / "pretrain.json", (json.dumps([record], indent=1) + "\n").encode())
    _write(root / BUNDLED, content)
    _write(root / PINNED, pinned.encode())


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="what experiments.pretrain wrote")
    adopt(parser.parse_args(given).file)


if __name__ == "__main__":
    main()
