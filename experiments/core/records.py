"""Writes measured records: one JSON list for each experiment, appended to atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from filelock import FileLock

from experiments.core import provenance
from experiments.core.provenance import Tree
from helpers import records as stored

Record = dict[str, Any]


def _camvid(tree: Tree) -> str:
    lines = (tree.root / "helpers" / "camvid.csv").read_text(encoding="utf-8").splitlines()
    return hashlib.sha256("\n".join(lines[1:]).encode()).hexdigest()[:16]


# What a measurement may rest on beside code.
VERSIONS: dict[str, Callable[[Tree], object]] = {
    "weights": lambda tree: tree.constant("helpers/encoder.py::BUNDLED_SHA256")[:16],
    "scenes": lambda tree: tree.constant("helpers/scenes.py::VERSION"),
    "camvid": _camvid,
}


def made_by(entries: Iterable[str], versions: Iterable[str], tree: Tree | None = None) -> Record:
    """Return a record's provenance: the code behind some entries, `VERSIONS`, torch."""
    tree, entries = tree or Tree(), sorted(set(entries))
    return {
        "entries": entries,
        "code": tree.digests(entries),
        **{name: VERSIONS[name](tree) for name in versions},
        "torch": installed("torch").split("+")[0],
    }


def stale(record: Record, tree: Tree) -> list[str]:
    """Return what has changed since the record was written: files, or names of `VERSIONS`."""
    then = record["provenance"]
    try:
        now = tree.digests(then["entries"])
    except (FileNotFoundError, LookupError) as error:
        return [f"{error} (an entry of the record)"]
    files = sorted({*then["code"], *now})
    changed = [path for path in files if then["code"].get(path) != now.get(path)]
    named = [name for name in VERSIONS if name in then]
    return changed + [name for name in named if then[name] != VERSIONS[name](tree)]


def all_of(name: str) -> list[Record]:
    """Return all records of a name, stale ones too; none where there is no file."""
    try:
        return stored.load(name)
    except FileNotFoundError:
        return []


def find(name: str, tree: Tree, **fields: object) -> Record | None:
    """Return the record with these fields, or `None`; a stale one does not count."""
    for record in all_of(name):
        if all(record.get(k) == plain(v) for k, v in fields.items()) and not stale(record, tree):
            return record
    return None


def append(name: str, record: Record, key: Iterable[str]) -> None:
    """Write the record to `results/<name>.json`, in place of an older one with the same `key`."""
    key = list(key)
    with lock(name):  # another process may be about to append, too
        kept = [r for r in all_of(name) if any(r.get(k) != plain(record[k]) for k in key)]
        write(name, [*kept, record])


def write(name: str, records: list[Record], root: Path | None = None) -> None:
    """Write all records of a name; an interruption leaves the old file or the new one."""
    path = (root or provenance.ROOT) / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def lock(name: str, timeout: float = -1) -> FileLock:
    """Return a lock between processes; with `timeout=0`, taking it raises `Timeout` at once."""
    path = provenance.ROOT / ".cache" / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout)


def plain(value: object) -> object:
    """Return a value as it comes back from JSON."""
    return json.loads(json.dumps(value))
