"""Measured records: written whole, replaced by key, stale when what made them has changed."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from experiments import records as writer
from helpers import records

REPOSITORY = writer.ROOT
ALL = sorted(path.stem for path in (writer.ROOT / "results").glob("*.json"))


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROOT", tmp_path)
    monkeypatch.setattr(records, "PLACES", (tmp_path / "results",))
    (tmp_path / "module.py").write_text('"""Text."""\n\n\ndef f():\n    return 1  # why\n')
    return tmp_path


def test_there_are_records_to_check():
    assert {"levels", "scenes"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_no_record_is_stale(name):
    for record in records.load(name):
        changed = writer.stale(record)
        cure = record.get("command", f"python -m experiments.{name}")
        assert not changed, f"results/{name}.json is stale: {changed} changed. Cure: {cure}"


def test_a_missing_record_names_the_command(results):
    with pytest.raises(FileNotFoundError, match=r"python -m experiments\.unknown"):
        records.load("unknown")


def test_a_record_takes_the_place_of_the_one_with_its_key(results):
    for value in (1, 2):
        writer.append("trial", {"seed": 0, "value": value}, key=["seed"])
    writer.append("trial", {"seed": 1, "value": 3}, key=["seed"])
    assert records.load("trial") == [{"seed": 0, "value": 2}, {"seed": 1, "value": 3}]
    assert [path.name for path in (results / "results").iterdir()] == ["trial.json"]


def test_a_failed_write_leaves_the_old_records(results):
    writer.append("trial", {"seed": 0}, key=["seed"])
    with pytest.raises(TypeError):
        writer.append("trial", {"seed": 1, "value": object()}, key=["seed"])
    assert json.loads((results / "results" / "trial.json").read_text()) == [{"seed": 0}]


def test_comments_and_docstrings_do_not_age_a_record_but_code_does(results):
    record = {"seed": 0, "provenance": writer.provenance("module.py")}
    writer.append("trial", record, key=["seed"])
    module = results / "module.py"
    module.write_text('"""Other text."""\n\n\ndef f():\n    # because\n    return 1\n')
    assert writer.stale(record) == []
    assert writer.is_done("trial", seed=0) and not writer.is_done("trial", seed=1)
    module.write_text("def f():\n    return 2\n")
    assert writer.stale(record) == ["module.py"]
    assert not writer.is_done("trial", seed=0)


@pytest.mark.parametrize("name", writer.VERSIONS)
def test_another_version_ages_the_records_that_name_it(results, monkeypatch, name):
    others = set(writer.VERSIONS) - {name}
    with_it = {"provenance": writer.provenance("module.py", versions=[name])}
    without = {"provenance": writer.provenance("module.py", versions=others)}
    assert writer.stale(with_it) == writer.stale(without) == []
    monkeypatch.setitem(writer.VERSIONS, name, "another")
    assert writer.stale(with_it) == [name]
    assert writer.stale(without) == []


# A definition and what it uses

MODULE = '''"""Text."""

import functools

FACTOR = 2
TABLE = {"a": 1}
TABLE["b"] = 2
TOTAL = 1
TOTAL += 1
OTHER: int = 3

try:
    import fast

    def power(x):
        return fast.power(x)

except ImportError:

    def power(x):
        return x * x


def twice(function):
    return lambda *given: 2 * function(*given)


def scaled(x):
    """Doubled."""
    return FACTOR * power(x)  # why


class Base:
    size = TOTAL
    neighbour: int = 0  # a field, called as that function is


class Wanted(Base):
    """What the record names."""

    @twice
    def __call__(self, x):
        inner = functools.partial(scaled, x)
        return inner() + TABLE["a"]


def neighbour(x):
    return x + OTHER
'''


@pytest.fixture
def module(results):
    """Writes `module.py` with one replacement and says what that ages."""
    path = results / "module.py"
    path.write_text(MODULE)
    record = {"provenance": writer.provenance("module.py::Wanted", versions=[])}

    def change(old: str, new: str) -> list[str]:
        assert MODULE.count(old) == 1
        path.write_text(MODULE.replace(old, new))
        return writer.stale(record)

    return change


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    return x + OTHER", "    return x - OTHER"),
        ("def neighbour(x):\n    return x + OTHER\n", ""),
        ("OTHER: int = 3", "OTHER: int = 4"),
        ("OTHER: int = 3", "def added():\n    return neighbour(FACTOR)"),
        ("  # why", "  # because"),
        ('"""Doubled."""', '"""Times two."""'),
        ('    """Doubled."""\n', ""),
        (
            "def power(x):\n        return x * x",
            'def power(x):\n        """A square."""\n        return x * x',
        ),
        ('"""What the record names."""', '"""Another text,\n\n    of two lines."""'),
        ("FACTOR * power(x)", "(\n        FACTOR\n        * power(x)\n    )"),
    ],
)
def test_neighbours_comments_docstrings_and_layout_may_change(module, old, new):
    assert module(old, new) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ TABLE", "- TABLE"),  # the definition itself
        ("(scaled, x)", "(scaled, -x)"),
        ("FACTOR * power", "-FACTOR * power"),  # a function that it calls
        ("FACTOR = 2", "FACTOR = 3"),  # a constant of that function
        ('{"a": 1}', '{"a": 2}'),
        ('TABLE["b"] = 2', 'TABLE["a"] = 2'),  # a constant, changed after it was made
        ("TOTAL += 1", "TOTAL += 2"),
        ("size = TOTAL", "size = 1"),  # its base class
        ("(Base)", "(dict)"),
        ("2 * function", "3 * function"),  # its decorator
        ("    @twice\n", ""),
        ("        return x * x", "        return x**3"),  # defined where an import fails …
        ("return fast.power(x)", "return fast.square(x)"),  # … or does not
    ],
)
def test_the_definition_and_all_that_it_uses_may_not(module, old, new):
    assert module(old, new) == ["module.py::Wanted"]


def test_what_is_gone_has_changed(results, module):
    assert module("class Wanted(Base)", "class Renamed(Base)") == ["module.py::Wanted"]
    record = {"provenance": writer.provenance("module.py", versions=[])}
    (results / "module.py").unlink()
    assert writer.stale(record) == ["module.py"]


def test_a_record_cannot_name_what_is_not_there(results, module):
    with pytest.raises(LookupError, match="no Wented"):
        writer.provenance("module.py::Wented")
    with pytest.raises(FileNotFoundError):
        writer.provenance("another.py::Wanted")


# Several processes

APPENDS = """
import sys
import time
from pathlib import Path

from experiments import records as writer
from helpers import records

root = Path(sys.argv[1])
writer.ROOT, records.PLACES = root, (root / "results",)
(root / "ready").touch()
while not (root / "go").exists():
    time.sleep(0.001)
for seed in range(25):
    writer.append("trial", {"process": 1, "seed": seed}, key=["process", "seed"])
"""


def test_processes_that_append_at_once_lose_nothing(results):
    command = [sys.executable, "-c", APPENDS, str(results)]
    with subprocess.Popen(command, cwd=REPOSITORY) as other:
        while not (results / "ready").exists():
            assert other.poll() is None
            time.sleep(0.01)
        (results / "go").touch()
        for seed in range(25):
            writer.append("trial", {"process": 0, "seed": seed}, key=["process", "seed"])
    assert other.returncode == 0
    found = [(record["process"], record["seed"]) for record in records.load("trial")]
    assert sorted(found) == [(process, seed) for process in range(2) for seed in range(25)]


# Pictures


def test_a_stored_picture_is_read_as_the_classes_of_its_pixels(results):
    classes = np.random.default_rng(0).integers(0, 12, (18, 24), dtype=np.uint8)
    picture = Image.fromarray(classes)
    picture = picture.convert("P")
    picture.putdata(classes.flatten().tolist())
    picture.putpalette(bytes(range(100, 136)))
    (results / "results" / "chapter").mkdir(parents=True)
    picture.save(results / "results" / "chapter" / "trial_10.png", optimize=True)
    assert np.array_equal(records.picture("chapter", "trial_10"), classes)


def test_a_missing_picture_names_the_command(results):
    with pytest.raises(FileNotFoundError, match=r"python -m experiments\.streets chapter"):
        records.picture("chapter", "trial_10")
