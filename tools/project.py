"""Where things are, which chapters there are, and what is said of the project in one place only."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A part of a page that `make sync` writes, between comments of Markdown or YAML.
BLOCK = re.compile(
    r"(?P<start>^ *(?:<!--|#) (?P<name>\w+): written by make sync[^\n]*\n)"
    r".*?(?P<end>^ *(?:<!--|#) end\b)",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Chapter:
    """One entry of `chapters.toml`, whose first lines say what each field means."""

    number: int
    slug: str
    question: str
    answer: str
    minutes: int
    status: str

    @property
    def name(self) -> str:
        return f"{self.number:02}_{self.slug}"

    @property
    def planned(self) -> bool:
        return self.status == "planned"


def contents(root: Path = ROOT) -> list[Chapter]:
    """Return all chapters of `chapters.toml`, the planned ones too, in order."""
    return [Chapter(**entry) for entry in _toml(root / "chapters.toml")["chapter"]]


def chapters(root: Path = ROOT) -> list[Path]:
    """Return the text sources of the chapters that are there, in order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.py"))


def repository_url(root: Path = ROOT) -> str:
    """Return the address that `pyproject.toml` names."""
    project = _toml(root / "pyproject.toml")["project"]
    return project["urls"]["Repository"].rstrip("/").removesuffix(".git")


def version(root: Path = ROOT) -> str:
    """Return the version that `helpers/__init__.py` names."""
    text = (root / "helpers" / "__init__.py").read_text(encoding="utf-8")
    return _only(r'^__version__ = "(.+)"$', text, "helpers/__init__.py has no __version__")


def release_date(root: Path = ROOT) -> str:
    """Return the date that CHANGELOG.md gives for the version."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = rf"^## \[{re.escape(version(root))}\] - (\d{{4}}-\d\d-\d\d)$"
    return _only(heading, text, f"CHANGELOG.md has no dated heading for {version(root)}")


def fill(text: str, blocks: dict[str, str]) -> str:
    """Return a page with each marked block replaced by the text of its name."""
    return BLOCK.sub(lambda found: found["start"] + blocks[found["name"]] + found["end"], text)


def write(path: Path, text: str) -> None:
    """Write a file in one step, so that an interruption leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _toml(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _only(pattern: str, text: str, complaint: str) -> str:
    found = re.search(pattern, text, flags=re.MULTILINE)
    if not found:
        raise SystemExit(complaint)
    return found[1]
