"""Where things are, which chapters there are, and where the repository lives on the web."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def chapters(root: Path = ROOT) -> list[Path]:
    """Return the text sources of all chapters, in order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.py"))


def repository_url(root: Path = ROOT) -> str:
    """Return the address that `pyproject.toml` names."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].rstrip("/").removesuffix(".git")


def write(path: Path, text: str) -> None:
    """Write a file in one step, so that an interruption leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
