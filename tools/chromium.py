"""Print the path of a Chromium for the browser tests, or nothing where none can be had.

Looked for in this order: the system's, Playwright's (downloaded), Debian's package (installed).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
# Chromium keeps quiet, needs no display, and may run as root.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def main() -> None:
    found = system() or playwright() or debian()
    print(f"Chromium: {found or 'none'}", file=sys.stderr)
    print(found or "")


def system() -> str | None:
    """Return a Chromium of this system that starts."""
    chosen = os.environ.get("BOOK_CHROMIUM")
    for path in filter(None, [chosen, *map(shutil.which, NAMES)]):
        if _run([path, *FLAGS, "--version"], seconds=30):
            return path
    return None


def playwright() -> str | None:
    """Return Playwright's own Chromium, downloaded where it is missing and that is possible."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        path = driver.chromium.executable_path
    if not Path(path).exists():
        print("Chromium: asking Playwright for one", file=sys.stderr)
        _run([sys.executable, "-m", "playwright", "install", "chromium"], seconds=300)
    # A downloaded browser may still lack system libraries.
    return path if Path(path).exists() and _run([path, "--version"], seconds=30) else None


def debian() -> str | None:
    """Return Debian's Chromium, installed where this is root on a system that has apt-get."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return None
    print("Chromium: installing Debian's package", file=sys.stderr)
    _run(["apt-get", "update"], seconds=300)
    _run(["apt-get", "install", "-y", "--no-install-recommends", "chromium"], seconds=600)
    return system()


def _run(command: list[str], seconds: int) -> bool:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


if __name__ == "__main__":
    main()
