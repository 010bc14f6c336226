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


def save(path: str | Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Write named tensors and JSON notes to `path`; an older file stays until the new is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(own, part, metadata={"notes": json.dumps(notes)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save` wrote: tensors on the CPU and notes.

    Raises `FileNotFoundError` where there is no file and `ValueError` for one of another kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no checkpoint {path}. Start without resume=.")
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {})["notes"])
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of this book ({error}). Delete it and train again."
        ) from error


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, under the rest of their names."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
