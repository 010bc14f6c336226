"""State of an interrupted training on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, texts, lists and dicts; an older file stays until it is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        tensors: dict[str, Tensor] = {}
        notes = json.dumps(_packed(state, tensors))
        save_file(tensors, part, metadata={"state": notes})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Return what `save` wrote, with tensors on the CPU and tuples as lists.

    Raises `FileNotFoundError` where there is no file and `ValueError` for one of another kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no checkpoint {path}. Start without resume=.")
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {})["state"])
            return _unpacked(notes, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of this book ({error}). Delete it and train again."
        ) from error


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `value` for JSON, which has no tensors and takes texts for keys only."""
    match value:
        case Tensor():
            own = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[name := str(len(tensors))] = own
            return {"tensor": name}
        case dict():
            return {"dict": [[key, _packed(each, tensors)] for key, each in value.items()]}
        case list() | tuple():
            return [_packed(each, tensors) for each in value]
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": pairs}:
            return {key: _unpacked(each, tensors) for key, each in pairs}
        case list():
            return [_unpacked(each, tensors) for each in value]
    return value


class Run:
    """All that changes while training goes on: whatever has a `state_dict`, and random numbers."""

    def __init__(self, settings: dict[str, Any], **parts: Any) -> None:
        self.settings, self.parts = settings, parts

    def save(self, path: str | Path, history: dict[str, Any]) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"settings": self.settings, "history": history, "random": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["random.cuda"] = torch.cuda.get_rng_state()
        save(path, state)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Go on from `path`; return the history. Raises `ValueError` for another training's."""
        state = load(path)
        then = state["settings"]
        changed = {k: (then.get(k), v) for k, v in self.settings.items() if then.get(k) != v}
        if changed:
            said = ", ".join(f"{k} was {old}, is {new}" for k, (old, new) in changed.items())
            raise ValueError(f"{path} belongs to another training: {said}. Use the same settings.")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} belongs to another model: {error}") from error
        torch.set_rng_state(state["random"])
        if "random.cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random.cuda"])
        return state["history"]
