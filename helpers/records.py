"""Reads the measured results that the chapters plot, and the predictions that they show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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


def picture(slug: str, name: str) -> NDArray[np.uint8]:
    """Return the class indices `[H, W]` of `results/<slug>/<name>.png`, a stored prediction.

    Raises `FileNotFoundError` where there is none, with the command that makes it.
    """
    for place in PLACES:
        path = place / slug / f"{name}.png"
        if path.exists():
            with Image.open(path) as image:  # indexed: a pixel's value is its class
                return np.asarray(image)
    raise FileNotFoundError(
        f"There is no picture {name!r} of {slug!r}. "
        f"Make it in a clone: python -m experiments.streets {slug}."
    )
