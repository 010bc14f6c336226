"""Makes `book/error_index.md` of `helpers.errors`, with the messages that its examples raise.

`make sync` writes the page; `tools/pages/error_index.md` is its frame.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from string import Template

from helpers.errors import ROWS, UNKNOWN, Row, find
from tools.project import ROOT

PAGE = ROOT / "book" / "error_index.md"
FRAME = ROOT / "tools" / "pages" / "error_index.md"
ORIGIN = "<!-- Made of tools/pages/error_index.md and helpers/errors/rows.toml: edit there. -->\n\n"

SECTION = """\
(error-{slug})=
## {title}

```{{code-block}} text
:class: error-message
{message}
```

**Why.** {cause}

These lines raise it:

{example}

**Cure.** {cure}

{fixed}

Read on: [{chapter}](../notebooks/{chapter.name}.ipynb).
"""


def make_page() -> str:
    """Return the page as MyST Markdown; runs every example, and raises if one does not fail."""
    frame = Template(FRAME.read_text(encoding="utf-8"))
    # "</script>" in a text would end the block early.
    data = json.dumps(index_data(), ensure_ascii=False).replace("<", "\\u003c")
    return ORIGIN + frame.substitute(data=data, sections="\n".join(map(_section, ROWS)))


def index_data() -> dict[str, object]:
    """Return what the paste box needs: the rows, and what to say where none fits."""
    rows = [
        {
            "slug": row.slug,
            "pattern": row.pattern,
            "title": row.title,
            "numbers": row.numbers,
            "cause": row.cause,
            "cure": row.cure,
            "change": "\n".join(row.change()),
            "chapter": str(row.chapter),
            "href": f"../notebooks/{row.chapter.name}.html",
        }
        for row in ROWS
    ]
    return {"unknown": UNKNOWN, "rows": rows}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings, and what is printed, by libraries below Python as well."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)


def raised_by(row: Row) -> str:
    """Run a row's example and return the last line of its traceback."""
    try:
        with quiet():
            exec(compile(row.example, f"<{row.slug}>", "exec"), {})
    except Exception as error:
        message = "".join(traceback.format_exception_only(error)).strip()
        found = find(message)
        if found is None or found[0] is not row:
            raise AssertionError(f"{row.slug}: the example raised another error") from error
        # From 2.15 on, torch begins with the operator's name; the page shows what all versions say.
        return message.replace(": addmm: ", ": ")
    raise AssertionError(f"{row.slug}: the example raised nothing")


def _section(row: Row) -> str:
    left, right = row.example.splitlines(), row.fixed.splitlines()
    changes = difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
    broken = [n for tag, a, b, _, _ in changes if tag != "equal" for n in range(a, b)]
    cured = [n for tag, _, _, a, b in changes if tag != "equal" for n in range(a, b)]
    return SECTION.format(
        slug=row.slug,
        title=row.title,
        message=raised_by(row).splitlines()[0],  # an exporter adds its graph
        cause=row.cause,
        cure=row.cure,
        example=_code(left, broken),
        fixed=_code(right, cured),
        chapter=row.chapter,
    )


def _code(lines: list[str], emphasized: list[int]) -> str:
    numbers = ",".join(str(n + 1) for n in emphasized)
    option = [f":emphasize-lines: {numbers}"] if numbers else []
    return "\n".join(["```{code-block} python", *option, *lines, "```"])
