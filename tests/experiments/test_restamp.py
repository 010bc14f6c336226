"""Records are carried over to changed code only where the figures are certain to be the same."""

import json
import shutil
import subprocess
import sys

import pytest

from experiments import restamp
from experiments.core import provenance
from experiments.core import records as writer
from experiments.core.provenance import Tree
from helpers import records

REGISTRY = """
from importlib import import_module

CLAIMS = "experiments.claims"
MODULES = {"toy": "experiments.toy"}


def sweep(name):
    return import_module(MODULES[name]).SWEEPS[name]


def command(name):
    return f"python -m {MODULES[name]}"
"""
TOY = """
from experiments.core.sweep import Sweep, arguments
from helpers.sums import total

WHATS = {"one": 1, "two": 2}


def measure(data, what, seed):
    return {"sum": total([WHATS[what], seed, len(data)])}


SWEEPS = {"toy": Sweep("toy", measure, key=("data", "what", "seed"), versions=())}


def main(given=None):
    said = arguments("A toy.", WHATS, given=given)
    tasks = [
        {"data": data, "what": what, "seed": seed}
        for data in ("scenes", "streets")
        for what in said.only
        for seed in range(said.seeds)
    ]
    SWEEPS["toy"].run(tasks, plan=said.plan)


if __name__ == "__main__":
    main()
"""
SUMS = """
def total(numbers):
    result = 0.1
    for each in numbers:
        result += each
    return result
"""
SAME = "def total(numbers):\n    return sum(numbers, 0.1)\n"
OTHER = "def total(numbers):\n    return sum(numbers, 0.1) + 1e-9\n"
ON_STREETS = "def total(numbers):\n    return sum(numbers, 0.1) + (numbers[2] == len('streets'))\n"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of its own, with a toy that is measured and committed."""
    root = tmp_path / "repository"
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(
        provenance.ROOT / "experiments" / "core", root / "experiments" / "core", ignore=ignore
    )
    for name in ("__init__.py", "restamp.py"):
        shutil.copy(provenance.ROOT / "experiments" / name, root / "experiments" / name)
    shutil.copytree(provenance.ROOT / "helpers", root / "helpers", ignore=ignore)
    (root / "experiments" / "core" / "registry.py").write_text(REGISTRY)
    (root / "experiments" / "toy.py").write_text(TOY)
    (root / "helpers" / "sums.py").write_text(SUMS)
    (root / ".gitignore").write_text(".cache/\n__pycache__/\n")
    git(root, "init", "-q")
    run(root, "experiments.toy")
    commit(root)
    monkeypatch.setattr(provenance, "ROOT", root)
    monkeypatch.setattr(records, "PLACES", (root / "results",))
    monkeypatch.setattr(restamp.registry, "MODULES", {"toy": "experiments.toy"})
    return root


def git(root, *words):
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "-C", root, *who, *words], check=True, capture_output=True)


def commit(root):
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "a step")


def run(root, module, *words):
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def stale(root):
    rows = json.loads((root / "results" / "toy.json").read_text())
    return {row["data"] for row in rows if writer.stale(row, Tree(root))}


@pytest.mark.slow
def test_a_kind_is_carried_over_only_if_all_its_figures_agree(repository):
    sums = repository / "helpers" / "sums.py"
    assert len(records.load("toy")) == 12 and stale(repository) == set()

    sums.write_text(SAME)
    said = run(repository, "experiments.restamp", "--prove", "HEAD")
    assert said.returncode and "commit" in said.stderr
    assert stale(repository) == {"scenes", "streets"}
    commit(repository)
    said = run(repository, "experiments.restamp", "--prove", "HEAD~1")
    assert said.returncode == 0, said.stdout + said.stderr
    assert stale(repository) == set()
    proved = {row["provenance"]["proved_by"].split(":")[0] for row in records.load("toy")}
    assert len(proved) == 1 and len(proved.pop()) == 12
    commit(repository)

    sums.write_text(ON_STREETS)
    commit(repository)
    said = run(repository, "experiments.restamp", "--prove", "HEAD~1")
    assert said.returncode == 1 and "sum" in said.stdout
    assert stale(repository) == {"streets"}

    sums.write_text(OTHER)
    commit(repository)
    said = run(repository, "experiments.restamp", "--prove", "HEAD~2")
    assert said.returncode == 1
    assert stale(repository) == {"scenes", "streets"}


def test_a_new_name_is_carried_over_and_other_changes_are_not(repository):
    sums, toy = repository / "helpers" / "sums.py", repository / "experiments" / "toy.py"
    sums.write_text(SUMS.replace("total", "added"))
    toy.write_text(TOY.replace("total", "added"))
    assert stale(repository) == {"scenes", "streets"}
    restamp.main(["total", "added"])
    assert stale(repository) == set()

    commit(repository)
    git(repository, "mv", "helpers/sums.py", "helpers/adding.py")
    toy.write_text(TOY.replace("total", "added").replace("helpers.sums", "helpers.adding"))
    restamp.main(["helpers.sums", "helpers.adding"])
    assert stale(repository) == set()

    commit(repository)
    (repository / "helpers" / "adding.py").write_text(OTHER.replace("total", "plus"))
    toy.write_text(TOY.replace("total", "plus").replace("helpers.sums", "helpers.adding"))
    restamp.main(["added", "plus"])
    assert stale(repository) == {"scenes", "streets"}


def test_a_sample_has_each_kind_and_one_in_twenty():
    rows = [
        {"data": data, "what": f"{what}", "seed": seed, "seconds": 10 * what + seed}
        for data in ("scenes", "streets")
        for what in range(14)
        for seed in range(3)
    ]
    rows += [{"data": "scenes", "what": "U-Net, fine-tuned", "seed": 0, "seconds": 900}]
    rows += [{"data": "scenes", "what": "constant", "seed": 0, "guess": 1}]
    chosen = [(row["data"], row["what"], row["seed"]) for row in restamp.sample(rows)]
    assert sorted(chosen) == [
        *(("scenes", f"{what}", 0) for what in range(3)),
        ("scenes", "U-Net, fine-tuned", 0),
        ("scenes", "constant", 0),
        *(("streets", f"{what}", 0) for what in range(3)),
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["total"], "expected OLD NEW"),
        (["--prove", "HEAD", "unheard"], "no results are called"),
        (["--prove", "no-such-commit"], "There is no commit"),
    ],
)
def test_what_cannot_be_done_is_said(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        restamp.main(given)
    assert said in f"{stopped.value} {capsys.readouterr().err}"
