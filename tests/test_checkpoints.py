"""A checkpoint returns what was written, is whole or not there, and nothing else passes for one."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import checkpoints

TENSORS = {
    "half": torch.randn(3, 4).half(),
    "step": torch.tensor(7.0),
    "random": torch.arange(5, dtype=torch.uint8),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
}
NOTES = {"epoch": 3, "rate": 0.1 + 0.2, "loss": [1.5, float("nan")], "name": "“ü”"}


def test_tensors_and_notes_return_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "state.safetensors"
    checkpoints.save(path, TENSORS, NOTES)
    tensors, notes = checkpoints.load(path)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert repr(notes) == repr(NOTES)  # NaN equals nothing, not even itself
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_parameters_that_share_memory_or_learn_can_be_saved(tmp_path: Path) -> None:
    shared = torch.nn.Parameter(torch.randn(4, 4))
    checkpoints.save(tmp_path / "state", {"a": shared, "b": shared, "row": shared[1]}, {})
    tensors, _ = checkpoints.load(str(tmp_path / "state"))
    assert torch.equal(tensors["a"], tensors["b"]) and torch.equal(tensors["row"], shared[1])
    assert not tensors["a"].requires_grad


@pytest.mark.parametrize("where", ["save_file", "os.replace"])
def test_a_crash_while_writing_leaves_the_older_file_whole(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    checkpoints.save(path, TENSORS, {"epoch": 1})
    before = path.read_bytes()

    def crash(_: object, part: Path, **__: object) -> None:
        if where == "save_file":
            Path(part).write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(f"helpers.checkpoints.{where}", crash)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(path, {"other": torch.ones(3)}, {"epoch": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_checkpoint_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\. Start without resume="):
        checkpoints.load(tmp_path / "none")


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "header cut", "other safetensors"])
def test_what_is_no_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    checkpoints.save(path, TENSORS, NOTES)
    whole = path.read_bytes()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("epoch,loss\n1,0.5\n" * 9)
        case "truncated":
            path.write_bytes(whole[:-1])
        case "header cut":
            path.write_bytes(whole[:40])
        case _:
            save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a checkpoint of this book")):
        checkpoints.load(path)


def test_without_prefix_keeps_what_begins_with_it_only() -> None:
    tensors = {"model.a": torch.ones(1), "a.model.": torch.ones(1), "model.model.b": torch.ones(1)}
    assert list(checkpoints.without_prefix(tensors, "model.")) == ["a", "model.b"]
