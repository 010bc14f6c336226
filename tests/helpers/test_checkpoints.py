"""A checkpoint returns what was written, is whole or not there, and nothing else passes for one."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.training import checkpoints

TENSORS = {
    "half": torch.randn(3, 4).half(),
    "step": torch.tensor(7.0),
    "random": torch.arange(5, dtype=torch.uint8),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
}
NOTES = {"epoch": 3, "rate": 0.1 + 0.2, "loss": [1.5, float("nan")], "name": "“ü”", 0: [None]}


def test_what_was_saved_returns_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "state"
    checkpoints.save(path, {"tensors": TENSORS, "notes": NOTES})
    found = checkpoints.load(path)
    assert found["tensors"].keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found["tensors"][name].dtype == tensor.dtype
        assert torch.equal(found["tensors"][name], tensor)
    assert repr(found["notes"]) == repr(NOTES)  # NaN equals nothing, not even itself
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("where", ["save_file", "os.replace"])
def test_a_crash_while_writing_leaves_the_older_file_whole(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    checkpoints.save(path, TENSORS)
    before = path.read_bytes()

    def crash(_: object, part: Path, **more: object) -> None:
        if where == "save_file":
            part.write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(f"helpers.training.checkpoints.{where}", crash)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(path, {"other": torch.ones(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_checkpoint_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\. Start without resume="):
        checkpoints.load(tmp_path / "none")


class Harmful:
    """Unpickled by whoever trusts every file, it would write one."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "header cut", "safetensors", "weights", "code"]
)
def test_what_is_no_checkpoint_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state"
    checkpoints.save(path, TENSORS)
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
        case "safetensors":
            save_file({"weight": torch.ones(2)}, path)
        case "weights":
            torch.save({"weight": torch.ones(2)}, path)
        case _:
            torch.save({"harm": Harmful()}, path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a checkpoint of this book")):
        checkpoints.load(path)
    assert list(tmp_path.iterdir()) == [path]
