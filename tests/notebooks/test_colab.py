"""Each chapter alone, as in Colab: an empty folder, ipywidgets 7, and no `helpers` yet.

`make test` runs two of them whole and the others up to their first picture, `make test-all` all
whole. Each gets a new environment, which sees the packages of the one that runs it, so that it
costs seconds; what the chapter's first cell installs lands in it alone.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from support import ROOT, printed

CHAPTERS = sorted(ROOT.glob("notebooks/*.ipynb"))
WHOLE = ("01_encoder", "05_unet")
PACKAGES = Path(sysconfig.get_path("purelib"))

BEFORE = """
from importlib.util import find_spec

import google.colab

assert find_spec("helpers") is None, find_spec("helpers")
"""
AFTER = """
import json

import helpers
import ipywidgets
import torch

files = {module.__name__: module.__file__ for module in (helpers, ipywidgets, torch)}
print(json.dumps({**files, "widgets": ipywidgets.__version__, "gpu": torch.cuda.is_available()}))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> str:
    """Return the address of a repository that holds what this one tracks of the package."""
    folder = tmp_path_factory.mktemp("repository")
    listing = ["git", "ls-files", "-z", "--", "helpers", "results", "pyproject.toml", "README.md"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder.as_uri()


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """Return a folder with the old packages that Colab brings."""
    folder = tmp_path_factory.mktemp("old")
    names = ["ipywidgets==7.7.1", "ipython_genutils==0.2.0"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    subprocess.run([*pip, *names], check=True)
    return folder


@pytest.fixture
def environment(old, tmp_path_factory) -> Path:
    """Make a fresh environment like Colab's and return its folder of packages."""
    folder = tmp_path_factory.mktemp("colab") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    shutil.copytree(old, packages, dirs_exist_ok=True)
    (packages / "seen.pth").write_text(f"{PACKAGES}\n")
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").touch()
    kernel = folder / "share" / "jupyter" / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))
    return packages


def beginning(cells: list[NotebookNode]) -> list[NotebookNode]:
    """Return the cells up to the first picture, and what later cells only import."""
    end = next(i for i, cell in enumerate(cells) if "image/png" in str(cell.get("outputs"))) + 1
    return cells[:end] + [cell for cell in cells[end:] if only_imports(cell)]


def only_imports(cell: NotebookNode) -> bool:
    words = {line.split()[0] for line in cell.source.splitlines() if line[:1].isalpha()}
    return cell.cell_type == "code" and bool(words) and words <= {"from", "import"}


def trials() -> list:
    every = [(chapter, whole) for whole in (True, False) for chapter in CHAPTERS]
    return [
        pytest.param(
            chapter,
            whole,
            id=f"{chapter.stem}-{'whole' if whole else 'beginning'}",
            marks=[pytest.mark.full] if whole and chapter.stem not in WHOLE else [],
        )
        for chapter, whole in every
        if whole or chapter.stem not in WHOLE
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("chapter", "whole"), trials())
def test_a_chapter_runs_alone(chapter, whole, repository, environment, tmp_path, monkeypatch):
    folder = tmp_path / "content"
    folder.mkdir()
    notebook = nbformat.read(chapter, as_version=4)
    cells = notebook.cells if whole else beginning(notebook.cells)
    last = nbformat.v4.new_code_cell(AFTER)
    notebook.cells = [nbformat.v4.new_code_cell(BEFORE), *cells, last]
    monkeypatch.setenv("JUPYTER_PATH", str(environment.parents[2] / "share" / "jupyter"))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    client = NotebookClient(
        notebook,
        kernel_name="colab",
        timeout=None,  # pytest's own is enough
        startup_timeout=600,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=clean | {"BOOK_REPOSITORY": repository})  # raises where a cell fails

    found = json.loads(printed(last))
    assert environment in Path(found["helpers"]).parents
    assert environment in Path(found["ipywidgets"]).parents
    assert found["widgets"].startswith("7.7")
    assert PACKAGES in Path(found["torch"]).parents
    assert not list(environment.glob("torch*")), "the first cell installed another torch"
    setup = next(cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", []))
    (line,) = printed(setup).splitlines()
    assert found["gpu"] or "Runtime → Change runtime type" in line
