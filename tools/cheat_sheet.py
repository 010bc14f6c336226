"""Makes `book/cheat_sheet.md` of the bridges of `helpers.advice`, and its questions.

`make sync` writes the page; `tools/pages/cheat_sheet.md` is its frame.
"""

from __future__ import annotations

from string import Template

from helpers.advice import BRIDGES, Bridge
from helpers.advice.widget import widget
from tools.project import ROOT

PAGE = ROOT / "book" / "cheat_sheet.md"
FRAME = ROOT / "tools" / "pages" / "cheat_sheet.md"
ORIGIN = "<!-- Made of tools/pages/cheat_sheet.md and helpers/advice/: edit there. -->\n\n"


def make_page() -> str:
    """Return the page as MyST Markdown."""
    frame = Template(FRAME.read_text(encoding="utf-8"))
    rows = "\n".join(map(_row, BRIDGES.values()))
    return ORIGIN + frame.substitute(rows=rows, widget=widget().html)


def _row(bridge: Bridge) -> str:
    chapter = bridge.chapter
    cells = (
        _shapes(bridge.takes),
        _shapes(bridge.gives),
        bridge.purpose,
        f"`{bridge.name}`, [{chapter.number}](../notebooks/{chapter.name}.ipynb)",
    )
    return "* - " + "\n  - ".join(cells)


def _shapes(text: str) -> str:
    """Return a side of a contract with each shape as code."""
    return text.replace("[", "`[").replace("]", "]`")
