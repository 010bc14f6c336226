"""Reads the measured results that the chapters plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLACES = (Path(__file__).parent.parent / "results", Path(__file__).parent / "results")


def load(name: str) -> list[dict[str, Any]]:
    """Return the records of `results/<name>.json`, one dictionary for each measurement.

    In a clone they lie in `results/`, in an installed package inside `helpers`. Raises
    `FileNotFoundError` where there are none, with the command that measures them.
    """
    for place in PLACES:
        path = place / f"{name}.json"
        if path.exists():
            records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            return records
    raise FileNotFoundError(
        f"There is no record {name!r}. Measure it in a clone: python -m experiments.{name}."
    )
