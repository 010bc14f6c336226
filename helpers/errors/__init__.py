"""The error index: what common messages mean, why they come and which line to change.

The rows are data, in `rows.toml`.
"""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from helpers.chapters import CHAPTERS, Chapter


@dataclass(frozen=True)
class Row:
    """One row of the error index; the head of `rows.toml` says what each field holds."""

    slug: str
    chapter: Chapter
    pattern: str
    title: str
    numbers: str
    cause: str
    cure: str
    example: str
    fixed: str

    def read_numbers(self, match: re.Match[str]) -> str:
        """Return `numbers` with those of the message, or nothing where the message has none."""
        if not self.numbers or None in match.groups():
            return ""
        return self.numbers.format(match.group(0), *match.groups())

    def change(self) -> list[str]:
        """Return the lines that leave (`- `) and enter (`+ `) the example when it is cured."""
        lines = difflib.ndiff(self.example.splitlines(), self.fixed.splitlines())
        return [line for line in lines if line[0] in "+-"]


def _load() -> tuple[str, tuple[Row, ...]]:
    def prose(text: str) -> str:
        return " ".join(text.split())

    data = tomllib.loads(Path(__file__).with_name("rows.toml").read_text(encoding="utf-8"))
    for row in data["row"]:
        row["chapter"] = CHAPTERS[row["chapter"]]
        row |= {name: prose(row.get(name, "")) for name in ("title", "numbers", "cause", "cure")}
    return prose(data["unknown"]), tuple(Row(**row) for row in data["row"])


UNKNOWN, ROWS = _load()


def find(text: str) -> tuple[Row, re.Match[str]] | None:
    """Return the row that a message belongs to, with its match, or `None`.

    In a whole traceback the row that matches last counts: the last error is the one that stopped
    the program.
    """
    text = re.sub(r"\s+", " ", text)
    found = [(row, match) for row in ROWS if (match := re.search(row.pattern, text))]
    return max(found, key=lambda pair: pair[1].start(), default=None)


def explain(error: BaseException | str) -> str:
    """Return what an error means, why it came and which line to change.

    `error` is an exception, its message, or a whole traceback as text. What the error index does
    not know gets a text that begins with "This is not one of ours". Raises `TypeError` for
    anything else.
    """
    if not isinstance(error, BaseException | str):
        raise TypeError(
            f"Expected an exception or its message, got {type(error).__name__}. "
            "Pass what `except Exception as error` caught, or paste the message as a string."
        )
    found = find(str(error))
    if found is None:
        return _wrap(UNKNOWN)
    row, match = found
    numbers = row.read_numbers(match)
    return "\n".join(
        [
            _wrap(f"{row.title}."),
            *([_wrap(f"Your numbers: {numbers}")] if numbers else []),
            _wrap(f"Why: {row.cause}"),
            _wrap(f"Cure: {row.cure} For example:"),
            *(f"    {line}" for line in row.change()),
            _wrap(f"Read on: {row.chapter}"),
        ]
    )


class explaining:
    """Print an explanation under the traceback of whatever goes wrong inside the `with` block.

    The exception goes on unchanged. In a notebook the explanation follows the cell's traceback; in
    a script it is the traceback's last lines. `KeyboardInterrupt` and `SystemExit` pass without a
    word.
    """

    def __enter__(self) -> explaining:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            _print_under_traceback(error, "\n" + explain(error))


def _print_under_traceback(error: Exception, text: str) -> None:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:
        _print_after_cell(shell, error, text)
    elif text not in getattr(error, "__notes__", ()):
        error.add_note(text)


def _print_after_cell(shell: Any, error: Exception, text: str) -> None:
    # Not a note: IPython 7, which Colab brings, leaves notes out of its tracebacks.
    def print_once(cell: Any) -> None:
        shell.events.unregister("post_run_cell", print_once)
        uncaught = getattr(sys, "last_value", None) is error
        if uncaught and not hasattr(cell, "explained"):
            cell.explained = True
            print(text)

    shell.events.register("post_run_cell", print_once)


def _wrap(text: str) -> str:
    # Code between backticks stays on one line.
    text = re.sub("`[^`]*`", lambda code: code.group().replace(" ", "\0"), text)
    lines = textwrap.fill(text, width=80, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")
