"""A chapter as text and as a notebook: the first cell, the pairing, the exported code."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

FIRST_CELL = Path(__file__).with_name("first_cell.txt")
# The book folds its code away; what it prints depends on the machine, so nothing compares it.
FIRST_TAGS = (
    '# %% tags=["setup", "hide-input", "nbval-ignore-output"] '
    'mystnb={"code_prompt_show": "Set-up", "code_prompt_hide": "Set-up"}\n'
)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def stamp(text: str, url: str) -> str:
    """Return a chapter's text with the common first code cell, filled in with the address."""
    cell = FIRST_TAGS + FIRST_CELL.read_text(encoding="utf-8").replace("<url>", url) + "\n"
    old = re.search(r'^# %% tags=\["setup".*\n(?:(?!# %%).*\n)*', text, flags=re.MULTILINE)
    if old:
        return text[: old.start()] + cell + text[old.end() :]
    first = re.search(r"^# %%(?! \[markdown\])", text, flags=re.MULTILINE)
    place = first.start() if first else len(text)
    return text[:place] + cell + text[place:]


def load(path: Path) -> NotebookNode:
    """Return a stored notebook, or an empty one where there is none yet."""
    if not path.exists():
        return nbformat.v4.new_notebook()
    return nbformat.read(path, as_version=4)


def dumps(notebook: NotebookNode) -> str:
    """Return a notebook as it is stored: the same content always gives the same bytes."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pair(text: str, stored: NotebookNode) -> NotebookNode:
    """Return the notebook of a chapter's text; unchanged code cells keep their stored outputs."""
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    kept = defaultdict(list)
    for cell in code_cells(stored):
        kept[_identity(cell)].append(cell)
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        identity = _identity(cell)
        seen[identity] += 1
        cell.id = hashlib.sha256(f"{identity} {seen[identity]}".encode()).hexdigest()[:12]
        if cell.cell_type == "code" and kept[identity]:
            old = kept[identity].pop(0)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
    return notebook


def exported(text: str) -> str:
    """Return the cells tagged `export`, in order; nothing where there are none."""
    cells = code_cells(jupytext.reads(text, fmt="py:percent"))
    tagged = [cell.source for cell in cells if "export" in cell.metadata.get("tags", [])]
    return "\n\n\n".join(tagged) + "\n" if tagged else ""


def _identity(cell: NotebookNode) -> str:
    # The first cell's output does not depend on the address in it: a new one keeps the output.
    setup = "setup" in cell.metadata.get("tags", [])
    return "setup" if setup else f"{cell.cell_type} {cell.source}"
