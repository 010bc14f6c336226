"""The four questions as a page's own widget, which needs no kernel.

`widget.html` is its frame; `widget.css`, `widget.js` and the answers go into it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from itertools import product
from pathlib import Path
from string import Template
from typing import Any

from helpers.advice import BRIDGES, QUESTIONS, suggest


@dataclass(frozen=True)
class Widget:
    """The four questions as a page's own widget, self-contained HTML. The notebook displays it."""

    html: str = field(repr=False)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": "Four questions, and the bridge to take"}

    def _repr_html_(self) -> str:
        return self.html


def widget() -> Widget:
    """Return the four questions, answered in the reader's browser; without scripts, a table."""
    questions = "".join(
        f"<label>{escape(question)}<select>"
        + "".join(f'<option value="{key}">{escape(text)}</option>' for key, text in options.items())
        + "</select></label>\n"
        for question, options in QUESTIONS.values()
    )
    rows = "".join(
        f"<tr><td>{escape(bridge.purpose)}<br><code>{escape(bridge.contract)}</code></td>"
        f"<td><code>{bridge.name}</code><br>chapter {bridge.chapter.number}</td></tr>\n"
        for bridge in BRIDGES.values()
    )
    frame, style, script = (
        Path(__file__).with_suffix(suffix).read_text(encoding="utf-8")
        for suffix in (".html", ".css", ".js")
    )
    page = Template(frame.rstrip()).substitute(
        questions=questions,
        rows=rows,
        # "</script>" in a text would end the block early.
        data=json.dumps(answers(), ensure_ascii=False).replace("<", "\\u003c"),
        style=style,
        script=script,
    )
    return Widget(page)


def answers() -> dict[str, Any]:
    """Return the answer to every combination, in the order of `QUESTIONS`, the last one fastest.

    Each is a list of places in `texts`: bridge, chapter, its file's name, contract, why, code.
    """
    texts: dict[str, int] = {}
    found = []
    for chosen in product(*(options for _, options in QUESTIONS.values())):
        said = suggest(*chosen)
        where = str(said.chapter), said.chapter.name
        parts = said.bridge, *where, said.contract, said.why, said.code
        found.append([texts.setdefault(part, len(texts)) for part in parts])
    return {"texts": list(texts), "answers": found}
