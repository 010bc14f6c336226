"""Writes measured records: one JSON list for each experiment, appended to atomically."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from helpers import records, scenes
from helpers.encoder import BUNDLED_SHA256

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]


def code_hash(path: str) -> str:
    """Return a hash of a module's syntax tree: comments, docstrings and layout do not count.

    `path` is relative to the repository.
    """
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            body[0] = ast.Pass()
    return hashlib.sha256(_written(tree).encode()).hexdigest()[:16]


def _written(node: object) -> str:
    # ast.dump differs from one Python to the next in the empty fields that it writes.
    if isinstance(node, list):
        return f"[{','.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({','.join(f'{n}={_written(v)}' for n, v in fields)})"


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def provenance(*sources: str) -> Record:
    """Return what a measurement depends on: code (files), weights, version of scenes, torch."""
    return {
        "code": {path: code_hash(path) for path in sources},
        "weights": BUNDLED_SHA256[:16],
        "scenes": scenes.VERSION,
        "torch": torch.__version__.split("+")[0],
    }


def stale(record: Record) -> list[str]:
    """Return what has changed since the record was written: names of files, weights, scenes."""
    then = record["provenance"]
    changed = [path for path, old in then["code"].items() if code_hash(path) != old]
    now = provenance()
    return changed + [name for name in ("weights", "scenes") if then[name] != now[name]]


def is_done(name: str, **key: object) -> bool:
    """Tell whether a fresh record with these values exists already; stale ones do not count."""
    return any(
        all(record[k] == value for k, value in key.items()) and not stale(record)
        for record in _read(name)
    )


def append(name: str, record: Record, key: Iterable[str]) -> None:
    """Write the record to `results/<name>.json`, in place of an older one with the same `key`."""
    key = list(key)
    kept = [r for r in _read(name) if any(r[k] != record[k] for k in key)]
    path = ROOT / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps([*kept, record], indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _read(name: str) -> list[Record]:
    try:
        return records.load(name)
    except FileNotFoundError:
        return []
