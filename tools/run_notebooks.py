"""Run chapters and store their outputs, byte for byte the same at every run (`make notebooks`).

`python -m tools.run_notebooks` runs all; with names (`01_encoder`), those.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tools import notebook
from tools.project import ROOT, chapters, write

LARGEST = 1_500_000
# What differs between machines or runs and tells a reader nothing. A path is matched from its start
# on only: without that, the long lines of an embedded picture would take minutes. In a traceback it
# begins right after the code of a color, which is to stay.
START = r"(\x1b\[[\d;]*m|(?<![\w./~-]))~?/[\w./-]*"
VARYING = [
    (re.compile(START + r"(?<=/)ipykernel_\d+/\d+\.py"), r"\1<cell>"),
    (re.compile(START + r"/site-packages/"), r"\1"),
    (re.compile(re.escape(sys.base_prefix) + r"/(?=lib/python)"), ""),
    (re.compile(r"\b0x[0-9a-f]{6,}\b"), "0x…"),
]


def main(names: Sequence[str], root: Path = ROOT) -> None:
    known = [path.stem for path in chapters(root)]
    chosen = [Path(name).stem for name in names] or known
    if unknown := set(chosen) - set(known):
        sys.exit(f"No such chapter: {', '.join(sorted(unknown))}. There are: {', '.join(known)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    for name in chosen:
        start = time.monotonic()
        print(f"{name} …", end=" ", flush=True)
        size = run(root / "notebooks" / f"{name}.ipynb", root)
        print(f"{time.monotonic() - start:.0f} s, {size / 1e6:.2f} MB", flush=True)


def run(path: Path, root: Path) -> int:
    """Run one notebook from top to bottom, store its outputs and return the file's size in bytes.

    Exits, leaving the file as it was, where a cell fails that is not tagged `raises-exception`, or
    the outputs are too large.
    """
    stored = notebook.load(path)
    client = NotebookClient(
        stored,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        sys.exit(f"\n{path.name} failed and was left as it was:\n{error}")
    stored.metadata = notebook.load(path).metadata  # without the version of this Python
    for cell in notebook.code_cells(stored):
        cell.outputs = [stable(output, root) for output in cell.outputs]
    text = notebook.dumps(stored)
    size = len(text.encode())
    if size > LARGEST:
        sys.exit(f"\n{path.name} has {size / 1e6:.2f} MB; make its pictures smaller.")
    write(path, text)
    return size


def stable(value: object, root: Path) -> object:
    """Return an output without what varies between machines and runs."""
    match value:
        case str():
            for pattern, replacement in VARYING:
                value = pattern.sub(replacement, value)
            return value.replace(f"{root}/", "").replace(_from_home(root), "")
        case list():
            return [stable(item, root) for item in value]
        case dict():
            kept = {key: value[key] for key in value if key.startswith("image/")}
            return NotebookNode({key: stable(item, root) for key, item in value.items()} | kept)
    return value


def _from_home(root: Path) -> str:
    """Return the folder as IPython writes it in a traceback: `~/…` where it lies at home."""
    home = str(Path.home())
    return f"~{str(root).removeprefix(home)}/" if str(root).startswith(f"{home}/") else f"{root}/"


if __name__ == "__main__":
    main(sys.argv[1:])
