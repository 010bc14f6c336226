"""What holds for the repository as a whole: pins, workflows, addresses, nothing of one machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from tools.project import repository_url

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.split("\0")
FILES = sorted({ROOT / name for name in TRACKED if name and (ROOT / name).is_file()})
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def text_of(path: Path) -> str | None:
    """Return a file's text, or None for a picture and other binary files."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def requirements(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text("utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-actions", ".github/actions/*/action.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/*_form.yml"),
        ("dependabot", ".github/dependabot.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_what_other_programs_read_is_valid(schema, files):
    found = sorted(ROOT.glob(files))
    assert found
    command = ["check_jsonschema", "--builtin-schema", f"vendor.{schema}", *found]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_and_ci_call_only_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    called = set()
    for path in [*WORKFLOWS, ROOT / ".ci" / "run"]:
        called |= set(re.findall(r"^(?: *- run: )?make ([a-z-]+)", path.read_text("utf-8"), re.M))
    assert called and called <= targets
    assert {path.stem for path in WORKFLOWS} == {"test", "publish", "weekly"}


def test_every_version_is_pinned_for_every_python():
    pinned = requirements("requirements.txt")
    assert all(str(one.specifier).startswith("==") for one in pinned)
    for version in ("3.11.7", "3.12.1", "3.13.0", "3.14.0"):
        python = {"python_full_version": version, "python_version": version.rsplit(".", 1)[0]}
        chosen = [
            one.name.lower().replace("_", "-")
            for one in pinned
            if not one.marker or one.marker.evaluate({**python, "sys_platform": "linux"})
        ]
        assert len(chosen) == len(set(chosen)), f"Python {version}: pinned twice"
        for wanted in requirements("requirements.in"):
            if not wanted.marker or wanted.marker.evaluate(python):
                assert wanted.name.lower().replace("_", "-") in chosen, (version, wanted.name)


def test_the_pins_fulfil_what_is_required():
    pinned = {}
    for one in requirements("requirements.txt"):
        version = str(one.specifier).removeprefix("==")
        pinned.setdefault(one.name.lower(), []).append(version)
    for wanted in requirements("requirements.in"):
        assert all(wanted.specifier.contains(version) for version in pinned[wanted.name.lower()])


def test_nothing_of_one_machine_is_stored():
    # A home or a build folder of whoever ran it, and registries that not everybody can reach.
    places = re.compile(r"(?<![\w.])/(?:root|home|Users|work)/\w|--(?:extra-)?index-url|find-links")
    found = [
        f"{path.relative_to(ROOT)}: {hit}"
        for path in FILES
        if path != Path(__file__) and (text := text_of(path)) is not None
        for hit in places.findall(text)
    ]
    assert found == []


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f"{'.' * node.level}{node.module or ''}")
    return found


def test_no_room_imports_from_one_that_it_must_not_know():
    """Readers install `helpers` alone, and take a bridge with the encoder only."""
    allowed = {"torch", *sys.stdlib_module_names}
    for path in sorted((ROOT / "helpers").rglob("*.py")):
        modules = imported(path)
        firsts = {module.split(".")[0] for module in modules}
        assert not firsts & {"experiments", "tools", "tests", "notebooks"}, path.name
        if path.parent.name == "bridges":
            ours = {module for module in modules if module.startswith(("helpers", "."))}
            assert ours <= {"helpers.encoder"} and firsts - {"helpers"} <= allowed, path.name
    for path in sorted((ROOT / "notebooks").glob("*.py")):
        firsts = {module.split(".")[0] for module in imported(path)}
        assert not firsts & {"experiments", "tools", "tests"}, path.name


def test_no_file_is_too_large():
    large = {path.relative_to(ROOT): path.stat().st_size for path in FILES}
    assert {path: size for path, size in large.items() if size > 30e6} == {}
    notebooks = [size for path, size in large.items() if path.suffix == ".ipynb"]
    assert all(size < 1.5e6 for size in notebooks) and sum(notebooks) < 15e6


def test_the_configured_address_is_the_one_that_the_book_names():
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    assert config["repository"]["url"] == repository_url()
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        (setup,) = [cell for cell in cells if "setup" in cell.metadata.get("tags", [])]
        assert f'"{repository_url()}"' in setup.source


def test_the_address_stands_only_where_sync_carries_it():
    owner_and_name = repository_url().removeprefix("https://github.com/")
    carried = {"pyproject.toml", "_config.yml", "README.md", "CITATION.cff"}
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if name in carried or re.match(r"(notebooks/\d\d_\w+\.(py|ipynb)|book/\w+\.md)$", name):
            continue
        assert owner_and_name not in (text_of(path) or ""), name
