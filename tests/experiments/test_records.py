"""Measured records: written whole, replaced by key, stale when what made them has changed."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from experiments.core import provenance, registry
from experiments.core import records as writer
from experiments.core.provenance import Tree
from helpers import records

REPOSITORY = provenance.ROOT
ALL = sorted(path.stem for path in (REPOSITORY / "results").glob("*.json"))
MEASURED = [name for name in ALL if name != "pretrain"]  # which no sweep makes


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(records, "PLACES", (tmp_path / "results",))
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "module.py").write_text(
        '"""Text."""\n\n\ndef f():\n    return 1  # why\n'
    )
    return tmp_path


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree()


def test_every_record_has_a_sweep_that_makes_it():
    assert set(MEASURED) == set(registry.MODULES)


# How many records were measured before the experiments were rebuilt, and are not proved yet to
# have the figures of today's code: `python -m experiments.restamp --prove 03e1795 NAME`.
NOT_PROVED: dict[str, int] = {
    "encoder": 18,
    "conv_projection": 15,
    "attention": 15,
    "unet": 45,
    "multi_path": 48,
    "spatial_pyramid": 9,
    "upsampling": 18,
    "conditional_concat": 12,
    "levels": 9,
    "scenes": 9,
    "pooling_linear_probe": 12,
    "attention_probe": 24,
    "caching": 3,
    "spatial_pyramid_probe": 39,
    "conditional_concat_probe": 36,
    "input_mapping": 1,
    "sequences": 19,
    "sequences_choice": 6,
    "sequences_looks": 1,
    "image_to_image": 12,
}


def followed(name: str) -> list[dict]:
    """Return the records whose provenance names where to begin, as all but `NOT_PROVED` do."""
    return [record for record in records.load(name) if "entries" in record["provenance"]]


@pytest.mark.parametrize("name", MEASURED)
def test_no_record_is_stale(name, tree):
    found = followed(name)
    assert len(records.load(name)) - len(found) == NOT_PROVED.get(name, 0)
    for record in found:
        changed = writer.stale(record, tree)
        cure = registry.command(name)
        assert not changed, f"results/{name}.json is stale: {changed} changed. Cure: {cure}"


@pytest.mark.parametrize("name", MEASURED)
def test_records_rest_on_what_they_would_rest_on_today(name, tree):
    sweep = registry.sweep(name)
    for record in followed(name):
        now = sweep.made_by(sweep.task_of(record), tree)
        assert record["provenance"]["entries"] == now["entries"]


# What lies between image and score

MUTATIONS = {
    "the encoder": ("helpers/encoder.py", "SMALLEST_SIDE = 32", "SMALLEST_SIDE = 33"),
    "normalize": ("helpers/encoder.py", "STD = (0.229,", "STD = (0.228,"),
    "Segmenter": (
        "helpers/encoder.py",
        'size=tuple(size), mode="bilinear", align_corners=False)',
        'size=tuple(size), mode="nearest")',
    ),
    "the loss": (
        "helpers/metrics.py",
        "pixels.clamp(min=1).rsqrt()",
        "pixels.clamp(min=1).rsqrt() ** 2",
    ),
    "feeding": ("helpers/training/feeding.py", "batch.flip(-1)", "batch.flip(-2)"),
    "fit": ("helpers/training/loop.py", "WEIGHT_DECAY = 0.01", "WEIGHT_DECAY = 0.02"),
    "the schedule": ("helpers/training/loop.py", "pct_start=warm_up", "pct_start=1 - warm_up"),
    "the precision": (
        "helpers/training/feeding.py",
        "torch.float16 if old_gpu",
        "torch.float16 if on_gpu",
    ),
    "evaluate": (
        "helpers/training/scoring.py",
        "logits.argmax(1), logits.shape[1]",
        "logits.argmin(1), logits.shape[1]",
    ),
    "metrics": ("helpers/metrics.py", "2 * width + 1, stride=1", "2 * width + 3, stride=1"),
    "what they import": (
        "helpers/inspection.py",
        "part.training = training",
        "part.training = not training",
    ),
    "the decoder": (
        "helpers/bridges/unet.py",
        "torch.cat([x, skip], dim=1)",
        "torch.cat([skip, x], dim=1)",
    ),
    "the setting": ("experiments/core/trials.py", "epochs=20", "epochs=21"),
    "the trial": (
        "experiments/chapters/unet/trials.py",
        '"U-Net": Trial(UNetDecoder)',
        '"U-Net": Trial(UNetDecoder, frozen=False)',
    ),
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the code, to change."""
    root = tmp_path_factory.mktemp("code")
    ignore = shutil.ignore_patterns("weights", "__pycache__")
    for folder in provenance.OURS:
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=ignore)
    return root


def made_now(tree: Tree, name: str, **task) -> dict:
    return {"provenance": registry.sweep(name).made_by(task, tree)}


@pytest.mark.parametrize("what", MUTATIONS)
def test_what_lies_between_image_and_score_ages_the_records(what, copied, tree):
    path, old, new = MUTATIONS[what]
    record = made_now(tree, "unet", data="streets", what="U-Net", seed=0)
    code = (copied / path).read_text("utf-8")
    assert code.count(old) == 1, f"{path} no longer has {old!r}"
    try:
        (copied / path).write_text(code.replace(old, new), "utf-8")
        assert writer.stale(record, Tree(copied)) == [path]
    finally:
        (copied / path).write_text(code, "utf-8")


def test_what_is_read_only_by_another_decoder_does_not_age_a_record(copied, tree):
    path = copied / "helpers" / "bridges" / "upsampling.py"
    code = path.read_text("utf-8")
    try:
        path.write_text("raise SystemExit\n", "utf-8")
        stale = {
            what: writer.stale(
                made_now(tree, name, data="streets", what=what, seed=0), Tree(copied)
            )
            for name, what in (("unet", "U-Net"), ("upsampling", "transposed"))
        }
        assert not stale["U-Net"] and stale["transposed"]
    finally:
        path.write_text(code, "utf-8")


def test_a_missing_record_says_where_to_read_on(results):
    with pytest.raises(FileNotFoundError, match="CONTRIBUTING"):
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


def made_by(*entries, versions=()):
    return writer.made_by(entries, versions)


def test_comments_and_docstrings_do_not_age_a_record_but_code_does(results):
    record = {"seed": 0, "provenance": made_by("helpers/module.py")}
    writer.append("trial", record, key=["seed"])
    module = results / "helpers" / "module.py"
    module.write_text('"""Other text."""\n\n\ndef f():\n    # because\n    return 1\n')
    assert writer.stale(record, Tree()) == []
    assert writer.find("trial", Tree(), seed=0) and not writer.find("trial", Tree(), seed=1)
    module.write_text("def f():\n    return 2\n")
    assert writer.stale(record, Tree()) == ["helpers/module.py"]
    assert not writer.find("trial", Tree(), seed=0)


@pytest.mark.parametrize("name", writer.VERSIONS)
def test_another_version_ages_the_records_that_name_it(results, monkeypatch, name):
    for each in writer.VERSIONS:
        monkeypatch.setitem(writer.VERSIONS, each, lambda tree: "one")
    others = set(writer.VERSIONS) - {name}
    with_it = {"provenance": made_by("helpers/module.py", versions=[name])}
    without = {"provenance": made_by("helpers/module.py", versions=others)}
    assert writer.stale(with_it, Tree()) == writer.stale(without, Tree()) == []
    monkeypatch.setitem(writer.VERSIONS, name, lambda tree: "another")
    assert writer.stale(with_it, Tree()) == [name]
    assert writer.stale(without, Tree()) == []


# A definition and what it uses

OTHER = '''"""A neighbouring module."""


def used(x):
    return x + 1


def unused(x):
    return x
'''
MODULE = '''"""Text."""

import functools

from helpers import other
from helpers.other import unused

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
    return FACTOR * power(other.used(x))  # why


class Base:
    size = TOTAL
    neighbour: int = 0  # a field, called as that function is


class Wanted(Base):
    """What the record names."""

    @twice
    def __call__(self, x):
        if x is None:
            raise ValueError(f"Expected a number, got {neighbour(x)}.")
        inner = functools.partial(scaled, x)
        return inner() + TABLE["a"]


def neighbour(x):
    return x + OTHER
'''


@pytest.fixture
def module(results):
    """Writes `module.py` with one replacement and says what that ages."""
    path, beside = (results / "helpers" / name for name in ("module.py", "other.py"))
    path.write_text(MODULE)
    beside.write_text(OTHER)
    record = {"provenance": made_by("helpers/module.py::Wanted")}

    def change(old: str, new: str) -> list[str]:
        assert (MODULE + OTHER).count(old) == 1
        path.write_text(MODULE.replace(old, new))
        beside.write_text(OTHER.replace(old, new))
        return writer.stale(record, Tree())

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
        ("FACTOR * power(other", "FACTOR  *  power(other"),
        ("Expected a number, got", "A number was expected, not"),  # the text of an error
        ("    return x\n", "    return -x\n"),  # imported, and not used
        ("def scaled(x):", "def scaled(x: float) -> float:"),
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
        ("    return x + 1", "    return x + 2"),  # in another module
        ("if x is None", "if x is not None"),
    ],
)
def test_the_definition_and_all_that_it_uses_may_not(module, old, new):
    assert module(old, new)


def test_what_is_gone_has_changed(results, module):
    assert "no Wanted" in module("class Wanted(Base)", "class Renamed(Base)")[0]
    record = {"provenance": made_by("helpers/module.py")}
    (results / "helpers" / "module.py").unlink()
    assert len(writer.stale(record, Tree())) == 1


def test_a_record_cannot_name_what_is_not_there(results, module):
    with pytest.raises(LookupError, match="no Wented"):
        made_by("helpers/module.py::Wented")
    with pytest.raises(FileNotFoundError):
        made_by("helpers/another.py::Wanted")


TABLES = {
    "first.py": 'from helpers.module import f\n\nFIRST = {"a": f, "b": 2}\n',
    "second.py": 'from helpers.first import FIRST\n\nBOTH = {**FIRST, "c": 3}\n',
    "third.py": 'from helpers import second\n\n\ndef g():\n    return second.BOTH["a"]\n',
}


@pytest.mark.parametrize("entry", ['helpers/second.py::BOTH["a"]', "helpers/third.py::g"])
def test_one_value_of_a_table_is_followed_to_where_it_is_written(results, entry):
    folder = results / "helpers"
    for name, code in TABLES.items():
        (folder / name).write_text(code)
    record = {"provenance": made_by(entry)}
    (folder / "second.py").write_text(TABLES["second.py"].replace("3", "4"))
    (folder / "first.py").write_text(TABLES["first.py"].replace("2", "3"))
    assert writer.stale(record, Tree()) == []
    (folder / "module.py").write_text("def f():\n    return 2\n")
    assert writer.stale(record, Tree()) == ["helpers/module.py"]


# Several processes

APPENDS = """
import sys
import time
from pathlib import Path

from experiments.core import provenance
from experiments.core import records as writer
from helpers import records

root = Path(sys.argv[1])
provenance.ROOT, records.PLACES = root, (root / "results",)
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
    with pytest.raises(FileNotFoundError, match=r"python -m experiments\.claims chapter"):
        records.picture("chapter", "trial_10")
