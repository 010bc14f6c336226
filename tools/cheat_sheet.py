"""Write `book/cheat_sheet.md` from the table of `helpers.choosing`, and its questions.

python -m tools.cheat_sheet            writes the page
python -m tools.cheat_sheet --check    fails where the page is not what would be written
"""

from __future__ import annotations

import argparse
from pathlib import Path

from helpers.chooser import widget
from helpers.choosing import BRIDGES, Bridge
from helpers.errors import Chapter

PAGE = Path(__file__).parent.parent / "book" / "cheat_sheet.md"

INTRODUCTION = """\
<!-- Written by tools/cheat_sheet.py from helpers/choosing.py: edit there. -->

# Cheat sheet: shape → bridge

An image `[B, 3, H, W]`, normalised, any H and W from 32 on, leaves the encoder as five maps:
`c1 [B, 64, ⌈H/2⌉, ⌈W/2⌉]`, `c2 [B, 64, ⌈H/4⌉, ⌈W/4⌉]`, `c3 [B, 128, ⌈H/8⌉, ⌈W/8⌉]`,
`c4 [B, 256, ⌈H/16⌉, ⌈W/16⌉]`, `c5 [B, 512, ⌈H/32⌉, ⌈W/32⌉]`. All decoders below are meant to stand
in a `Segmenter`, which brings their output to H × W. Below the table you can
[answer four questions](or-answer-four-questions) instead.

```{raw} html
<style>
.bd-article table.cheat-sheet { display: table; width: 100%; font-size: .9rem; }
.bd-article table.cheat-sheet :is(th, td) { padding: .25rem .5rem; vertical-align: top; }
.bd-article table.cheat-sheet p { margin: 0; line-height: 1.4; max-width: none; }
.bd-article table.cheat-sheet code.literal { background: none; padding: 0; }
@media (max-width: 700px) {
  .bd-article table.cheat-sheet, .cheat-sheet :is(tbody, tr, td) { display: block; }
  .bd-article table.cheat-sheet thead { display: none; }
  .bd-article table.cheat-sheet tr { border-bottom: 1px solid var(--pst-color-border);
    padding: .5rem .6rem; }
  .bd-article table.cheat-sheet td { border: 0; padding: .1rem 0; display: flex;
    gap: .6rem; align-items: baseline; }
  .cheat-sheet td::before { flex: none; width: 4.6rem; color: var(--pst-color-text-muted); }
  .cheat-sheet td:nth-child(1)::before { content: "You have"; }
  .cheat-sheet td:nth-child(2)::before { content: "You need"; }
  .cheat-sheet td:nth-child(3)::before { content: "For"; }
  .cheat-sheet td:nth-child(4)::before { content: "Take"; }
}
@media print {
  @page { size: A4; margin: 12mm; }
  .bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, .bd-footer-article,
  .bd-footer-content, .headerlink { display: none !important; }
  html { font-size: 11.5px !important; }
  .bd-article section > p { max-width: none !important; }
  html[data-theme="dark"] { --pst-color-text-base: #000; --pst-color-background: #fff;
    --pst-color-heading: #000; --pst-color-inline-code: #000; --pst-color-on-background: #fff;
    --pst-color-surface: #eee; --book-panel: #eee; }
  html .bd-article table.cheat-sheet a { color: #000 !important; }
  .bd-main .bd-content .bd-article-container { max-width: 100% !important; padding: 0 !important; }
  .bd-article table.cheat-sheet tr { break-inside: avoid; }
  #or-answer-four-questions { display: none; }
}
</style>
```
"""

TABLE = """\
```{{list-table}}
:header-rows: 1
:class: cheat-sheet

* - You have
  - You need
  - For
  - Take, from chapter
{rows}
```
"""

QUESTIONS = """\
(or-answer-four-questions)=
## Or answer four questions

It works in this page; no kernel has to run.

```{{raw}} html
{widget}
```

"""

END = """\
In code, `helpers.suggest(out="mask", need="thin")` answers with a bridge, the reasons and a program
to paste; `helpers.choosing.QUESTIONS` lists what you may ask for.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    page = make_page()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(f"{PAGE.name} is out of date: run python -m tools.cheat_sheet")


def make_page() -> str:
    """Return the page as MyST Markdown."""
    rows = "\n".join(map(_row, BRIDGES.values()))
    questions = QUESTIONS.format(widget=widget().html)
    return "\n".join([INTRODUCTION, TABLE.format(rows=rows), questions + END])


def _row(bridge: Bridge) -> str:
    cells = (
        _shapes(bridge.takes),
        _shapes(bridge.gives),
        bridge.purpose,
        f"`{bridge.name}`, {_link(bridge.chapter)}",
    )
    return "* - " + "\n  - ".join(cells)


def _shapes(text: str) -> str:
    """Return a side of a contract with each shape as code."""
    return text.replace("[", "`[").replace("]", "]`")


def _link(chapter: Chapter) -> str:
    if not chapter.notebook.exists():
        return chapter.number
    return f"[{chapter.number}](../notebooks/{chapter.notebook.name})"


if __name__ == "__main__":
    main()
