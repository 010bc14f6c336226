"""Measured records: written whole, replaced by key, stale when what made them has changed."""

import json

import pytest

from experiments import records as writer
from helpers import records

ALL = sorted(path.stem for path in (writer.ROOT / "results").glob("*.json"))


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROOT", tmp_path)
    monkeypatch.setattr(records, "PLACES", (tmp_path / "results",))
    (tmp_path / "module.py").write_text('"""Text."""\n\n\ndef f():\n    return 1  # why\n')
    return tmp_path


def test_there_are_records_to_check():
    assert {"encoder", "scenes"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_no_record_is_stale(name):
    for record in records.load(name):
        changed = writer.stale(record)
        cure = f"python -m experiments.{name}"
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


@pytest.mark.parametrize("name", ["weights", "scenes"])
def test_other_weights_or_scenes_age_a_record(results, name):
    record = {"provenance": {**writer.provenance("module.py"), name: "another"}}
    assert writer.stale(record) == [name]
