"""Which bridge to take: four questions, their answers, and the code to paste.

Bridges and answers are data, in `bridges.toml` and `answers.toml`.
"""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.chapters import CHAPTERS, Chapter


@dataclass(frozen=True)
class Bridge:
    """One bridge of the book; the head of `bridges.toml` says what each field holds."""

    name: str
    module: str
    takes: str
    gives: str
    purpose: str
    imports: Mapping[str, list[str]]
    lines: str
    record: str = ""

    @property
    def contract(self) -> str:
        return f"{self.takes} → {self.gives}"

    @property
    def chapter(self) -> Chapter:
        return CHAPTERS[self.module]


@dataclass(frozen=True)
class Answer:
    """The bridge for some answers to the first three questions; without `need`, for any need."""

    out: list[str]
    own_input: list[str]
    bridge: str
    why: str
    need: str | None = None

    def fits(self, out: str, own_input: str, need: str) -> bool:
        return out in self.out and own_input in self.own_input and self.need in (None, need)


@dataclass(frozen=True)
class Suggestion:
    """A bridge, its module and chapter, its shape contract, why, and a program to paste."""

    bridge: str
    module: str
    chapter: Chapter
    contract: str
    why: str
    code: str = field(repr=False)

    def __str__(self) -> str:
        why = textwrap.fill(self.why, 80, break_long_words=False, break_on_hyphens=False)
        return f"{self.bridge}, {self.chapter}\n{self.contract}\n\n{why}\n\n{self.code}"

    def _repr_markdown_(self) -> str:
        head = f"**`{self.bridge}`**, {self.chapter}"
        return f"{head}\n\n`{self.contract}`\n\n{self.why}\n\n```python\n{self.code}```\n"


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _prose(text: str) -> str:
    return " ".join(text.split())


_DATA = _read("answers.toml")
BRIDGES = {name: Bridge(name, **fields) for name, fields in _read("bridges.toml").items()}
QUESTIONS: dict[str, tuple[str, dict[str, str]]] = {
    name: (question["text"], question["options"]) for name, question in _DATA["question"].items()
}
ANSWERS = [Answer(**{**answer, "why": _prose(answer["why"])}) for answer in _DATA["answer"]]


def suggest(
    out: str = "mask",
    own_input: str = "none",
    need: str = "default",
    encoder: str = "frozen",
) -> Suggestion:
    """Return the bridge to take, with the code to paste; the four answers are keys of `QUESTIONS`.

    `out` is what should come out: "mask", "image", "vector", "tokens", "words" or "map".
    `own_input` is what goes in beside the encoder's maps: "none", "image", "vector", "picture" or
    "map". `need` is what counts most: "default", "thin", "large", "budget" or "size". `encoder` is
    "frozen" or "tuned". Raises `ValueError` for anything else.
    """
    _check({"out": out, "own_input": own_input, "need": need, "encoder": encoder})
    answer = next(answer for answer in ANSWERS if answer.fits(out, own_input, need))
    bridge = BRIDGES[answer.bridge]
    tuned = encoder == "tuned"
    return Suggestion(
        bridge.name,
        f"helpers.bridges.{bridge.module}",
        bridge.chapter,
        bridge.contract,
        f"{answer.why} {_prose(_DATA['tuned'])}" if tuned else answer.why,
        _code(bridge, out, own_input, tuned),
    )


def _check(given: Mapping[str, str]) -> None:
    wrong = [
        f"Expected {name} to be one of {', '.join(map(repr, QUESTIONS[name][1]))}; got {value!r}."
        for name, value in given.items()
        if value not in tuple(QUESTIONS[name][1])
    ]
    if wrong:
        raise ValueError(f"{' '.join(wrong)} For example: suggest(out='mask', need='thin').")


def _code(bridge: Bridge, out: str, own_input: str, tuned: bool) -> str:
    """Return a complete program: imports, an encoder, images, the bridge, the shape."""
    imports = {module: set(names) for module, names in bridge.imports.items()}
    channels = {"mask": 1 if bridge.name == "PointingDecoder" else 7, "image": 3}.get(out, 64)
    lines = bridge.lines.replace("{channels}", str(channels))
    if "{own_input}" in lines:
        own = _DATA["own_input"][own_input]
        lines = lines.replace("{own_input}\n", own["lines"])
        for module, names in own["imports"].items():
            imports.setdefault(module, set()).update(names)
    parts = [name for name in ("Segmenter", "ShortEncoder") if f"{name}(" in lines]
    return "\n".join(
        [
            "import torch",
            *(
                f"from helpers.bridges.{module} import {', '.join(sorted(imports[module]))}"
                for module in sorted(imports)
            ),
            f"from helpers.encoder import {', '.join(['ResNet18Encoder', *parts, 'normalize'])}",
            "",
            f"encoder = ResNet18Encoder({'frozen=False' if tuned else ''})",
            "images = torch.rand(2, 3, 180, 240)  # yours: RGB, values in 0…1",
            lines,
        ]
    )
