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
from filelock import FileLock

from helpers import camvid, metrics, records, scenes, training
from helpers.encoder import BUNDLED_SHA256

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]


def code_hash(path: str) -> str:
    """Return a hash of a module's syntax tree: comments, docstrings and layout do not count.

    `path` is relative to the repository. `path::Name` takes only that definition, and what it
    uses of its own module, so that its neighbours may change. Raises `LookupError` where there is
    no such definition and `FileNotFoundError` where there is no such module.
    """
    file, _, name = path.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    if name:
        tree.body = _used_by(name, tree)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            node.body = body[1:] or [ast.Pass()]
    return hashlib.sha256(_written(tree).encode()).hexdigest()[:16]


def _used_by(name: str, tree: ast.Module) -> list[ast.stmt]:
    """Return the top-level statements that define `name` and, in turn, what they mention."""
    defined: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for each in _defines(statement):
            defined.setdefault(each, []).append(statement)
    if name not in defined:
        raise LookupError(f"There is no {name} at the top level of the module.")
    found: list[ast.stmt] = []
    waiting = [*defined[name]]
    while waiting:
        statement = waiting.pop()
        if statement not in found:
            found.append(statement)
            used = [n.id for n in ast.walk(statement) if _is_read(n)]
            waiting += [other for each in used for other in defined.get(each, ())]
    return [statement for statement in tree.body if statement in found]


def _is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def _defines(node: ast.AST) -> set[str]:
    """Return the names that a top-level statement binds or, as in `table[key] = 1`, changes."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Assign(targets=targets):
            return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
            return {name}
        case ast.If() | ast.For() | ast.While() | ast.With() | ast.Try() | ast.ExceptHandler():
            return {name for part in ast.iter_child_nodes(node) for name in _defines(part)}
    return set()


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


VERSIONS = {
    "weights": BUNDLED_SHA256[:16],
    "scenes": scenes.VERSION,
    "camvid": camvid.VERSION,
    "training": training.VERSION,
    "metrics": metrics.VERSION,
}


def provenance(*sources: str, versions: Iterable[str] = ("weights", "scenes")) -> Record:
    """Return what a measurement depends on: code (see `code_hash`), torch, and some `VERSIONS`."""
    return {
        "code": {path: code_hash(path) for path in sources},
        **{name: VERSIONS[name] for name in versions},
        "torch": torch.__version__.split("+")[0],
    }


def stale(record: Record) -> list[str]:
    """Return what has changed since the record was written: names of code and of `VERSIONS`."""
    then = record["provenance"]
    changed = [path for path, old in then["code"].items() if _hash_now(path) != old]
    return changed + [k for k, now in VERSIONS.items() if then.get(k, now) != now]


def _hash_now(path: str) -> str | None:
    try:
        return code_hash(path)
    except (FileNotFoundError, LookupError):
        return None  # it is gone


def find(name: str, **key: object) -> Record | None:
    """Return the record with these values, or `None`; a stale one does not count."""
    for record in all_of(name):
        if all(record[k] == value for k, value in key.items()) and not stale(record):
            return record
    return None


def is_done(name: str, **key: object) -> bool:
    """Tell whether a fresh record with these values exists already; stale ones do not count."""
    return find(name, **key) is not None


def append(name: str, record: Record, key: Iterable[str]) -> None:
    """Write the record to `results/<name>.json`, in place of an older one with the same `key`."""
    key = list(key)
    path = ROOT / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    with lock(name):  # another process may be about to append, too
        kept = [r for r in all_of(name) if any(r[k] != record[k] for k in key)]
        part.write_text(json.dumps([*kept, record], indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)


def lock(name: str, timeout: float = -1) -> FileLock:
    """Return a lock between processes; with `timeout=0`, taking it raises `Timeout` at once."""
    path = ROOT / ".cache" / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout)


def all_of(name: str) -> list[Record]:
    """Return all records of a name, stale ones too; none where there is no file."""
    try:
        return records.load(name)
    except FileNotFoundError:
        return []
