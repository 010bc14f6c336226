"""Carries records over to code that has changed, where it is certain that the figures have not.

`python -m experiments.restamp OLD NEW` is for a new name: a record is re-keyed where the code of
`--commit` (the last one unless said), with the name replaced, hashes as today's does. Names are
identifiers or modules (`helpers.feeding helpers.training.feeding`).

`python -m experiments.restamp --prove COMMIT` is for code that was rebuilt: it measures a sample
again, with that commit's code and with today's (both committed), one record of each kind and
at least one in twenty. The records of a kind are re-keyed if all figures agree to the last digit;
otherwise they stay stale, and have to be measured again. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.core import provenance, records, registry
from experiments.core.provenance import Tree
from experiments.core.records import Record
from experiments.core.sweep import Sweep

# Of a record, what is no figure.
ASIDE = {"provenance", "command", "seconds", "setting", "chosen", "of", "libraries"}
MEASURE = """
import json, sys
from experiments.core import registry
for name, tasks in json.loads(sys.argv[1]).items():
    registry.sweep(name).run(tasks)
"""
# How code measured that has no registry yet; goes with the last of tests' `NOT_PROVED`.
OLDER = {
    "sequences_choice": "sequences --choose",
    "sequences_looks": "sequences",
    "choice": "choose",
}
CODE = (*provenance.OURS, "results", "pyproject.toml")


# --- a new name


def rename(old: str, new: str, commit: str) -> None:
    """Re-key each stale record whose code differs from the commit's in this name only."""
    with tempfile.TemporaryDirectory() as folder:
        before, renamed = Path(folder) / "before", Path(folder) / "renamed"
        for each in (before, renamed):
            export(commit, each)
        replace_name(renamed, old, new)
        was, would_be, now = Tree(before), Tree(renamed), Tree()
        for name in registry.MODULES:
            rows = records.all_of(name)
            kept = [rekeyed(row, (old, new), was, would_be, now) for row in rows]
            report(name, rows, kept, now)


def rekeyed(record: Record, names: tuple[str, str], was: Tree, would_be: Tree, now: Tree) -> Record:
    """Return the record with today's provenance if that is the old one under another name."""
    then = record["provenance"]
    if not records.stale(record, now) or records.stale(record, was):
        return record
    entries = [renamed_in(entry, *names) for entry in then["entries"]]
    try:
        if would_be.digests(entries) != now.digests(entries):
            return record
    except (LookupError, FileNotFoundError):
        return record
    return {**record, "provenance": {**then, "entries": entries, "code": now.digests(entries)}}


def replace_name(root: Path, old: str, new: str) -> None:
    """Replace a name in all code below `root`, and in the names of its files."""
    for folder in provenance.OURS:
        for path in sorted((root / folder).rglob("*.py")):
            path.write_text(renamed_in(path.read_text("utf-8"), old, new), "utf-8")
    here, there = (root / name.replace(".", "/") for name in (old, new))
    for a, b in ((here, there), (here.with_suffix(".py"), there.with_suffix(".py"))):
        if a.exists():
            b.parent.mkdir(parents=True, exist_ok=True)
            a.rename(b)


def renamed_in(text: str, old: str, new: str) -> str:
    for a, b in {old: new, old.replace(".", "/"): new.replace(".", "/")}.items():
        text = re.sub(
            rf"(?<![\w.]){re.escape(a)}(?!\w)" if "." in a else rf"\b{re.escape(a)}\b", b, text
        )
    return text


# --- a proof


def prove(commit: str, names: Iterable[str], jobs: int) -> bool:
    """Measure samples again with both codes; re-key the kinds whose figures agree."""
    old_commit, new_commit = (resolve(each) for each in (commit, "HEAD"))
    if subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", *CODE], cwd=provenance.ROOT
    ).returncode:
        sys.exit("The code has changes that are not committed: commit them, then prove.")
    tree = Tree()
    stale = {n: [r for r in records.all_of(n) if not_fresh(r, tree)] for n in names}
    samples = {name: sample(rows) for name, rows in stale.items() if rows}
    sides = [Side(old_commit, samples), Side(new_commit, samples, stamp=True)]
    groups: dict[str, list[str]] = {}
    for name in samples:  # what one module measures shares what it has in memory
        groups.setdefault(registry.MODULES[name], []).append(name)
    with ThreadPoolExecutor(jobs) as pool:
        work = [(side, names) for names in groups.values() for side in sides]
        list(pool.map(lambda job: job[0].measure(job[1]), work))
    proved, was = True, Tree(sides[0].root)
    for name, chosen in samples.items():
        sweep, agreed, kept = registry.sweep(name), {}, []
        for record in chosen:
            found = [side.found(name, record) for side in sides]
            said = differences(*found, timed=sweep.timed)
            agreed.setdefault(kind(record), []).append(said)
            print(
                f"{name}: {label(sweep, record)}: {said or 'equal to the last digit'}", flush=True
            )
        for record in records.all_of(name):
            said = agreed.get(kind(record))
            if not_fresh(record, tree):
                other = "entries" in record["provenance"] and records.stale(record, was)
                if other or said is None or any(said):  # not that commit's, or not the same
                    proved = False
                else:
                    by = f"{old_commit[:12]}: {len(said)} measured again, equal to the last digit"
                    record = stamped(sweep, record, tree, by)
            kept.append(record)
        report(name, records.all_of(name), kept, tree)
    return proved


class Side:
    """A checkout of one commit in which samples are measured again."""

    def __init__(self, commit: str, samples: dict[str, list[Record]], stamp: bool = False) -> None:
        self.root = provenance.ROOT / ".cache" / "prove" / commit[:12]
        self.noted = self.root / ".git" / "samples.json"
        if not self.noted.exists():
            export(commit, self.root)
            self.noted.write_text("{}")
        self.samples: dict[str, list[Record]] = json.loads(self.noted.read_text())
        tree = Tree(self.root)
        for name, chosen in samples.items():
            self._prepare(name, chosen, tree if stamp else None)
        self.noted.write_text(json.dumps(self.samples))

    def _prepare(self, name: str, chosen: list[Record], stamp: Tree | None) -> None:
        """Take the samples out of the records, and with `stamp` let the others count as fresh."""
        sweep, taken = registry.sweep(name), self.samples.setdefault(name, [])
        new = [sweep.task_of(record) for record in chosen]
        new = [task for task in new if task not in taken]
        if new:
            rows = [row for row in self._rows(name) if sweep.task_of(row) not in new]
            if stamp is not None:
                rows = [stamped(sweep, row, stamp, "not proved") for row in rows]
            records.write(name, rows, self.root)
            taken += new

    def _rows(self, name: str) -> list[Record]:
        path = self.root / "results" / f"{name}.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else []

    def measure(self, names: list[str]) -> None:
        """Measure the samples again, in a process of that code."""
        missing = {
            name: [task for task in self.samples[name] if not self.found(name, task)]
            for name in names
        }
        if any(missing.values()):
            data = Path(os.environ.get("BOOK_DATA", provenance.ROOT / ".cache" / "data")).resolve()
            threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
            with (self.root / ".git" / f"{names[0]}.log").open("w") as log:
                for words in self._commands(missing):
                    subprocess.run(
                        [sys.executable, *words],
                        cwd=self.root,
                        env={**os.environ, **threads, "BOOK_DATA": str(data)},
                        stdout=log,
                        stderr=log,
                    )

    def _commands(self, missing: dict[str, list[Record]]) -> Iterator[list[str]]:
        if (self.root / "experiments" / "core").exists():
            yield ["-c", MEASURE, json.dumps(missing)]
            return
        for name, tasks in missing.items():
            if registry.MODULES[name] != registry.CLAIMS:
                yield ["-m", *f"experiments.{OLDER.get(name, name)}".split()]
                continue
            for task in tasks:
                only = ["--on", task["data"], "--only", task["what"]]
                seeds = ["--seeds", str(task["seed"] + 1)]
                yield ["-m", "experiments.claims", name, *only, *seeds]

    def found(self, name: str, record: Record) -> Record | None:
        key = registry.sweep(name).key
        alike = (r for r in self._rows(name) if all(r.get(k) == record.get(k) for k in key))
        return next(alike, None)


def kind(record: Record) -> tuple[Any, ...]:
    """Return what records have in common that one of them may stand for."""
    what = str(record.get("what"))
    learns = "fine-tuned" in what or "from scratch" in what
    figures = frozenset(record) - ASIDE
    return record.get("data"), record.get("task"), record.get("frozen", not learns), figures


def sample(rows: list[Record]) -> list[Record]:
    """Return one record of each kind, and one in twenty: the shortest, of different names."""
    chosen = []
    for wanted in dict.fromkeys(map(kind, rows)):
        alike = sorted((r for r in rows if kind(r) == wanted), key=lambda r: r.get("seconds") or 0)
        first = {str(row.get("what")): row for row in reversed(alike)}
        spread = sorted(first.values(), key=lambda r: r.get("seconds") or 0)
        count = math.ceil(len(alike) / 20)
        rest = [row for row in alike if row not in spread]
        chosen += [*spread, *rest][:count]
    return chosen


def differences(
    old: Record | None, new: Record | None, timed: Sequence[str] = ()
) -> dict[str, Any] | str:
    """Return the figures that are not equal, or what is missing; nothing where all agree."""
    if old is None or new is None:
        return "the old code measured nothing" if old is None else "the new code measured nothing"
    aside = ASIDE | set(timed)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(({*old, *new}) - aside)
        if plain(old.get(name)) != plain(new.get(name))
    }


def plain(value: object) -> str:
    """Return a figure as text, in which NaN equals NaN."""
    return json.dumps(value, sort_keys=True)


def not_fresh(record: Record, tree: Tree) -> bool:
    return "entries" not in record["provenance"] or bool(records.stale(record, tree))


def stamped(sweep: Sweep, record: Record, tree: Tree, proved_by: str) -> Record:
    """Return the record with the provenance that it would have today, and who vouches for it."""
    now = sweep.made_by(sweep.task_of(record), tree)
    made_by = {**now, "torch": record["provenance"]["torch"], "proved_by": proved_by}
    return {**record, "provenance": made_by}


# --- both


def export(commit: str, folder: Path) -> None:
    """Write a commit's files below `folder`, with a git that knows the history."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    clone = [
        "git",
        "clone",
        "--quiet",
        "--shared",
        "--no-checkout",
        str(provenance.ROOT),
        str(folder),
    ]
    for command in (clone, ["git", "-C", str(folder), "checkout", "--quiet", "--detach", commit]):
        subprocess.run(command, check=True)


def resolve(commit: str) -> str:
    ask = ["git", "rev-parse", "--verify", f"{commit}^{{commit}}"]
    done = subprocess.run(ask, cwd=provenance.ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"There is no commit {commit!r}. `git log` lists those that there are.")
    return done.stdout.strip()


def report(name: str, before: list[Record], after: list[Record], tree: Tree) -> None:
    """Write what has changed, and say how much did."""
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    left = sum(not_fresh(record, tree) for record in after)
    if changed:
        records.write(name, after)
    if changed or left:
        cure = f"; {left} are stale: {registry.command(name)}" if left else ""
        print(f"results/{name}.json: {changed} of {len(before)} re-keyed{cure}", flush=True)


def label(sweep: Sweep, record: Record) -> str:
    return ", ".join(str(record.get(name)) for name in sweep.key)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="OLD NEW; with --prove, of results"
    )
    parser.add_argument("--commit", default="HEAD", help="whose code has the old name")
    parser.add_argument("--prove", metavar="COMMIT", help="whose code made the records")
    parser.add_argument("--jobs", type=int, default=2, help="measurements at once (2)")
    said = parser.parse_args(given)
    if said.prove:
        unknown = set(said.names) - set(registry.MODULES)
        if unknown:
            parser.error(
                f"no results are called {sorted(unknown)}; there are {[*registry.MODULES]}"
            )
        sys.exit(0 if prove(said.prove, said.names or registry.MODULES, said.jobs) else 1)
    if len(said.names) != 2:
        parser.error("expected OLD NEW, or --prove COMMIT")
    rename(*said.names, said.commit)


if __name__ == "__main__":
    main()
