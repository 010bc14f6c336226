"""What tests of several rooms share."""

from copy import deepcopy
from pathlib import Path

from nbformat import NotebookNode
from nbval.plugin import coalesce_streams

ROOT = Path(__file__).parents[1]


def outputs(cell: NotebookNode) -> list[NotebookNode]:
    """Return a cell's outputs; what went to one stream is one output, its text joined.

    A kernel that has little time sends a printed line and its line break as two.
    """
    return coalesce_streams(deepcopy(cell.outputs))  # it writes into what it is given


def printed(cell: NotebookNode) -> str:
    """Return what a cell wrote to its standard output."""
    return "".join(output.text for output in outputs(cell) if output.get("name") == "stdout")
