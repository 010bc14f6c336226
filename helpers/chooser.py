"""The four questions of `helpers.choosing` as a page's own widget, which needs no kernel."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from itertools import product
from typing import Any

from helpers.choosing import BRIDGES, QUESTIONS, suggest


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
    # "</script>" in a text would end the block early.
    data = json.dumps(answers(), ensure_ascii=False).replace("<", "\\u003c")
    parts = {"QUESTIONS": questions, "ROWS": rows, "DATA": data, "STYLE": STYLE, "SCRIPT": SCRIPT}
    page = PAGE
    for name, text in parts.items():
        page = page.replace(f"@{name}@", text)
    return Widget(page)


def answers() -> dict[str, Any]:
    """Return the answer to every combination, in the order of `QUESTIONS`, the last one fastest.

    Each is a list of places in `texts`: bridge, chapter, its file's name, contract, why, code.
    """
    texts: dict[str, int] = {}
    found = []
    for chosen in product(*(options for _, options in QUESTIONS.values())):
        said = suggest(*chosen)
        where = str(said.chapter), said.chapter.notebook.stem
        parts = said.bridge, *where, said.contract, said.why, said.code
        found.append([texts.setdefault(part, len(texts)) for part in parts])
    return {"texts": list(texts), "answers": found}


PAGE = """\
<div class="bridge-chooser">
<style>@STYLE@</style>
<template>
<form onsubmit="return false">
@QUESTIONS@</form>
<p role="status"><strong>Take <code data-part="bridge"></code></strong>,
<a data-part="chapter"></a>. <span data-part="why"></span></p>
<p>Shapes: <code data-part="contract"></code></p>
<pre tabindex="0" aria-label="Code to paste"><code data-part="code"></code></pre>
<button type="button">Copy the code</button>
</template>
<table>
<thead><tr><th>For, with shapes</th><th>Take</th></tr></thead>
<tbody>
@ROWS@</tbody>
</table>
<script type="application/json">@DATA@</script>
<script>@SCRIPT@</script>
</div>"""

# The book's colours, else Jupyter's, else paper and ink.
STYLE = """
.bridge-chooser { --ink: var(--pst-color-text-base, var(--jp-content-font-color1, #26354a));
  --panel: var(--book-panel, var(--jp-layout-color2, #f4efe6));
  --field: var(--pst-color-background, var(--jp-layout-color1, #fdfbf7));
  --line: var(--pst-color-text-muted, var(--jp-content-font-color2, #5b6676));
  --accent: var(--pst-color-link, var(--jp-content-link-color, #256b58));
  background: var(--panel); color: var(--ink); border-radius: 0.6rem; box-sizing: border-box;
  padding: 1rem; margin: 0.5rem 0; max-width: 52rem; line-height: 1.5; overflow-x: auto; }
.bridge-chooser form { display: grid; gap: 0.8rem 1.2rem; margin: 0 0 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.bridge-chooser label { display: block; font-weight: 600; margin: 0; }
.bridge-chooser select { display: block; box-sizing: border-box; width: 100%; min-height: 2.6rem;
  margin-top: 0.25rem; padding: 0.3rem 0.5rem; font: inherit; font-size: 16px; font-weight: 400;
  background: var(--field); color: var(--ink); border: 1px solid var(--line);
  border-radius: 0.4rem; text-overflow: ellipsis; }
.bridge-chooser :is(th, td) { padding: 0.3rem 0.8rem 0.3rem 0; text-align: left;
  vertical-align: top; }
.bridge-chooser :is(td:last-child, td:last-child code) { white-space: nowrap;
  overflow-wrap: normal; }
.bridge-chooser p { margin: 0 0 0.7rem; max-width: none; }
.bridge-chooser a[href] { color: var(--accent); }
.bridge-chooser a:not([href]) { color: inherit; }
.bridge-chooser code { background: none; border: 0; padding: 0; color: inherit;
  font-family: var(--pst-font-family-monospace, monospace); font-size: 0.9em;
  overflow-wrap: anywhere; }
.bridge-chooser.bridge-chooser pre { background: var(--field); color: var(--ink); overflow-x: auto;
  border: 1px solid var(--line); border-radius: 0.4rem; padding: 0.7rem 0.8rem;
  margin: 0; line-height: 1.45; }
.bridge-chooser pre code { white-space: pre; font-size: 13px; overflow-wrap: normal; }
.bridge-chooser button { font: inherit; min-height: 2.6rem; padding: 0.3rem 1rem;
  margin-top: 0.7rem; cursor: pointer;
  background: var(--field); color: var(--ink); border: 1.5px solid var(--ink);
  border-radius: 0.4rem; }
.bridge-chooser button:hover { background: var(--ink); color: var(--field); }
.bridge-chooser :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
"""

SCRIPT = """
(function () {
  function setUp(root) {
    const { texts, answers } = JSON.parse(
      root.querySelector('script[type="application/json"]').textContent);
    root.querySelector("table").replaceWith(root.querySelector("template").content);
    const selects = [...root.querySelectorAll("select")];
    const part = (name) => root.querySelector('[data-part="' + name + '"]');
    const button = root.querySelector("button");

    function show() {
      const place = selects.reduce((sum, s) => sum * s.options.length + s.selectedIndex, 0);
      const [bridge, chapter, file, contract, why, code] = answers[place].map((i) => texts[i]);
      for (const [name, text] of Object.entries({ bridge, chapter, contract, code }))
        part(name).textContent = text;
      // Only the built book has a page for each chapter. (Colab's outputs are pages, too.)
      const inBook = /\\/(notebooks|book)\\/\\w+\\.html$/.test(location.pathname);
      if (inBook) part("chapter").href = "../notebooks/" + file + ".html";
      part("why").replaceChildren(...why.split("`").map((text, i) => {
        if (i % 2 === 0) return text;
        const made = document.createElement("code");
        made.textContent = text;
        return made;
      }));
      button.textContent = "Copy the code";
    }

    async function copy() {
      try {
        await navigator.clipboard.writeText(part("code").textContent);
      } catch {  // not allowed here: at least mark what is to be copied
        getSelection().selectAllChildren(part("code"));
        if (!document.execCommand("copy")) return;
      }
      button.textContent = "Copied";
    }

    selects.forEach((select) => select.addEventListener("change", show));
    button.addEventListener("click", copy);
    show();  // A browser that goes back to the page restores what was chosen.
  }

  for (const root of document.querySelectorAll(".bridge-chooser:not([data-ready])")) {
    root.dataset.ready = "";
    setUp(root);
  }
})();
"""
