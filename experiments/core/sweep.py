"""Runs what has no fresh record yet: one loop, one command line for every experiment."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import Timeout

from experiments.core import provenance, records
from experiments.core.provenance import Tree
from experiments.core.records import Record

ENCODER_AND_SCENES = ("weights", "scenes")


def entry(thing: Callable[..., object]) -> str:
    """Return the entry (see `provenance`) of a function or class of ours."""
    thing = inspect.unwrap(thing)
    path = Path(inspect.getfile(thing)).relative_to(Path(__file__).parents[2])
    return f"{path.as_posix()}::{thing.__name__}"


@dataclass(frozen=True)
class Sweep:
    """One results file and how its records are made.

    Args:
        name: of the file, `results/<name>.json`.
        measure: called as `measure(**task)`; returns the record's other fields. Where it has a
            parameter `state`, it gets the path at which it may keep what an interruption would
            lose. A `partial` rests on what `entries` says only.
        key: the fields of a task that tell records apart.
        entries: called as `entries(**task)`: what the record rests on beside `measure`.
        versions: of `records.VERSIONS`, or a function of the task that returns them.
        timed: fields that two runs need not share, beside "seconds".
    """

    name: str
    measure: Callable[..., Record]
    key: Sequence[str]
    entries: Callable[..., Iterable[str]] = lambda **task: ()
    versions: Sequence[str] | Callable[..., Iterable[str]] = ENCODER_AND_SCENES
    timed: Sequence[str] = ()

    def made_by(self, task: Record, tree: Tree | None = None) -> Record:
        """Return the provenance that a record of this task has when it is measured now."""
        versions = self.versions(**task) if callable(self.versions) else self.versions
        first = [] if isinstance(self.measure, partial) else [entry(self.measure)]
        return records.made_by([*first, *self.entries(**task)], versions, tree)

    def task_of(self, record: Record) -> Record:
        return {name: record[name] for name in self.key}

    def is_done(self, task: Record, tree: Tree | None = None) -> bool:
        return records.find(self.name, tree or Tree(), **task) is not None

    def missing(self, tasks: Iterable[Record]) -> list[Record]:
        tree = Tree()
        return [task for task in tasks if not self.is_done(task, tree)]

    def run(self, tasks: Iterable[Record], *, plan: bool = False, again: bool = False) -> None:
        """Measure each task that has no fresh record; or only list them (`plan`).

        `again` measures those that have one, says how far off it is, and writes nothing.
        """
        tasks = list(tasks)
        missing = self.missing(tasks)
        if plan:
            self.plan(missing)
        elif again:
            for task in tasks:
                if task not in missing:
                    self.compare(task)
        else:
            for task in missing:
                self.attempt(task)

    def attempt(self, task: Record) -> bool:
        """Measure a task and tell whether it was: not if another process is at it, or was."""
        try:
            with records.lock(f"{self.name} {_said(task)}", timeout=0):
                if self.is_done(task):
                    return False
                record = self.record(task)
                records.append(self.name, record, self.key)
        except Timeout:
            print(f"{_said(task)}: another process is at it", flush=True)
            return False
        print(f"{_said(task)}: {_shown(record, task)}", flush=True)
        return True

    def compare(self, task: Record) -> None:
        """Measure once more, and print the figures that differ from the record's."""
        then, now = records.find(self.name, Tree(), **task), self.record(task)
        other = {
            k: f"{(then or {}).get(k)} → {v}" for k, v in now.items() if self.differs(k, then, v)
        }
        print(f"{_said(task)}: {other or 'the same to the last digit'}", flush=True)

    def differs(self, name: str, then: Record | None, value: object) -> bool:
        aside = {"provenance", "seconds", *self.timed}
        return name not in aside and records.plain(value) != (then or {}).get(name)

    def record(self, task: Record) -> Record:
        """Measure one task, and say what its figures rest on."""
        made_by = self.made_by(task)  # before the code can change
        state = self._state(task, made_by)
        asked = "state" in inspect.signature(self.measure).parameters
        started = time.perf_counter()
        figures = self.measure(**task, **({"state": state} if asked else {}))
        seconds = round(time.perf_counter() - started, 1)
        state.unlink(missing_ok=True)
        return {**task, "seconds": seconds, **figures, "provenance": made_by}

    def _state(self, task: Record, made_by: Record) -> Path:
        """Return where an interrupted task is kept: elsewhere when its code has changed."""
        said = json.dumps([task, made_by], sort_keys=True)
        of = hashlib.sha256(said.encode()).hexdigest()[:16]
        return provenance.ROOT / ".cache" / "interrupted" / self.name / f"{of}.safetensors"

    def plan(self, tasks: list[Record]) -> None:
        """Print each task and how long it may take: as long as before, or as others like it."""
        known = [self.minutes(task) for task in tasks]
        for task, minutes in zip(tasks, known, strict=True):
            print(f"{_said(task):48} {'?' if minutes is None else f'{minutes:.1f} min'}")
        total = sum(minutes for minutes in known if minutes is not None)
        guessed = f", and {known.count(None)} of unknown length" if None in known else ""
        print(f"{len(tasks)} are missing: about {total:.0f} min{guessed}.")

    def minutes(self, task: Record) -> float | None:
        past = [r for r in records.all_of(self.name) if "seconds" in r]
        alike = [r for r in past if r.get("data") == task.get("data")]
        same = [r for r in alike if r.get("what") == task.get("what")]
        times = [record["seconds"] for record in same or alike]
        return statistics.mean(times) / 60 if times else None


def arguments(
    about: str | None,
    names: Iterable[str] = (),
    *,
    seeds: int = 3,
    given: Sequence[str] | None = None,
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> argparse.Namespace:
    """Return what a command line says: `only`, `seeds`, `plan`, `again`, and `more`.

    Computes in one thread from here on, and refuses another encoder than the bundled one.
    """
    names = list(names)
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if names:
        parser.add_argument("--only", nargs="+", metavar="NAME", help="; ".join(names))
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many ({seeds})")
    parser.add_argument("--plan", action="store_true", help="list what is missing; run nothing")
    parser.add_argument("--again", action="store_true", help="compare with what is recorded")
    more(parser)
    found = parser.parse_args(given)
    unknown = set(getattr(found, "only", None) or ()) - set(names)
    if unknown:
        parser.error(f"nothing is called {sorted(unknown)}; there are {names}")
    if os.environ.get("BOOK_WEIGHTS"):
        parser.error("BOOK_WEIGHTS is set, and would measure another encoder: unset it")
    if names:
        found.only = found.only or names
    if "torch" in sys.modules:  # imported by whatever computes
        sys.modules["torch"].set_num_threads(1)
    return found


def _said(task: Record) -> str:
    return ", ".join(f"{k} {v}" if k == "seed" else str(v) for k, v in task.items())


def _shown(record: Record, task: Record) -> str:
    """Return the plain figures of a record as text."""
    plain = {k: v for k, v in record.items() if k not in task and isinstance(v, int | float)}
    return ", ".join(f"{name} {value:g}" for name, value in plain.items())
