"""Reads the measured results that the chapters plot, and the predictions that they show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLACES = (Path(__file__).parent.parent / "results", Path(__file__).parent / "results")
MEASURED_ON = "scenes"  # what a record is about that names no data set


def load(name: str) -> list[dict[str, Any]]:
    """Return the records of `results/<name>.json`, one dictionary for each measurement.

    In a clone they lie in `results/`, in an installed package inside `helpers`. Raises
    `FileNotFoundError` where there are none.
    """
    for place in PLACES:
        path = place / f"{name}.json"
        if path.exists():
            return list(_parsed(path, path.stat().st_mtime_ns))
    raise FileNotFoundError(
        f"There is no record {name!r}. CONTRIBUTING.md says how to measure it in a clone; "
        "an installed package is whole after: pip install --force-reinstall decoder-book."
    )


@lru_cache(maxsize=64)
def _parsed(path: Path, written: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return records


def of(*names: str, **fields: object) -> Evidence:
    """Return the records of some names that have these fields, as `Evidence`.

    `of("unet")`; `of("multi_path", "unet")`; `of("benchmark", chosen=True, frozen=True)`.
    """
    return Evidence(record for name in names for record in load(name)).where(**fields)


class Evidence:
    """Measurements with several seeds each, to be compared.

    What is compared is named by its data set ("scenes", "streets"; records that name none are
    about scenes), by `what` was trained, and by a field of the records; more names lead into
    fields that are dictionaries: `values("scenes", "U-Net", "iou", "ring")`.
    """

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.records = sorted(records, key=lambda record: record.get("seed") or 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def where(self, **fields: object) -> Evidence:
        """Return those records that have these fields."""
        kept = (r for r in self.records if all(r.get(k) == v for k, v in fields.items()))
        return Evidence(kept)

    def names(self, data: str = MEASURED_ON) -> list[str]:
        """Return what was measured on a data set, in the order of the records."""
        found = (r["what"] for r in self.records if r.get("data", MEASURED_ON) == data)
        return list(dict.fromkeys(found))

    def values(self, data: str, what: str, field: str = "miou", *inner: str) -> list[Any]:
        """Return one value for each seed, in their order. Raises `KeyError` where there is none."""
        found = [
            record
            for record in self.records
            if record["what"] == what and record.get("data", MEASURED_ON) == data
        ]
        if not found:
            raise KeyError(f"Nothing of {what!r} on {data}; there are {self.names(data)}.")
        values = [record[field] for record in found]
        for name in inner:
            values = [value[name] for value in values]
        return values

    def mean(self, data: str, what: str, field: str = "miou", *inner: str) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self.values(data, what, field, *inner)))

    def span(self, data: str, what: str, field: str = "miou", *inner: str) -> tuple[float, float]:
        """Return the lowest and the highest seed."""
        values = self.values(data, what, field, *inner)
        return min(values), max(values)

    def margin(self, data: str, better: str, worse: str, field: str = "miou", *inner: str) -> float:
        """Return the worst seed of the one minus the best seed of the other."""
        worst, _ = self.span(data, better, field, *inner)
        _, best = self.span(data, worse, field, *inner)
        return worst - best

    def differences(
        self, data: str, one: str, other: str, field: str = "miou", *inner: str
    ) -> list[float]:
        """Return the one minus the other, seed by seed. Raises `ValueError` for other seeds."""
        pairs = (self.values(data, what, field, *inner) for what in (one, other))
        return [a - b for a, b in zip(*pairs, strict=True)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return a mean with the lowest and the highest value, as text: "47.9 (47.5…48.4)"."""
    low, high = min(values), max(values)
    return f"{np.mean(values):.{digits}f} ({low:.{digits}f}…{high:.{digits}f})"


def picture(slug: str, name: str) -> NDArray[np.uint8]:
    """Return the class indices `[H, W]` of `results/<slug>/<name>.png`, a stored prediction.

    Raises `FileNotFoundError` where there is none, with the command that makes it.
    """
    from PIL import Image

    for place in PLACES:
        path = place / slug / f"{name}.png"
        if path.exists():
            with Image.open(path) as image:  # indexed: a pixel's value is its class
                return np.asarray(image)
    raise FileNotFoundError(
        f"There is no picture {name!r} of {slug!r}. "
        f"Make it in a clone: python -m experiments.claims {slug} --on streets."
    )
