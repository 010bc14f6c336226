"""Reads Tiny ImageNet into memory: the public zip's folders, or packed `.npz` files."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SIDE = 64
SOURCE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def load(folder: str | Path, part: str) -> tuple[Tensor, Tensor]:
    """Return one part's images, `[N, 3, 64, 64]` bytes, and labels `[N]`, int64.

    `part` is `"train"` or `"val"`. A label is the class's place among the sorted WordNet ids of
    `wnids.txt`. Two layouts are read: that of the public zip (`train/<id>/images/*.JPEG`,
    `val/val_annotations.txt`), and `train-*.npz`, `val-*.npz` with the arrays `webp` (all files,
    joined), `offsets` (n + 1 of them) and `label`.

    Raises `FileNotFoundError` where there is neither, and `ValueError` for a broken picture, one
    that is not 64×64, or a label without a class.
    """
    folder = Path(folder)
    ids = classes(folder)
    files, labels = _packed(folder, part) if any(folder.glob("*.npz")) else _unpacked(folder, part)
    if not files:
        raise FileNotFoundError(f"{folder} holds no picture of {part!r}. Unpack {SOURCE} there.")
    if not 0 <= min(labels) <= max(labels) < len(ids):
        raise ValueError(
            f"{folder}: labels of {part!r} run from {min(labels)} to {max(labels)}, "
            f"but wnids.txt names {len(ids)} classes. Are the files from one download?"
        )
    images = torch.empty((len(files), 3, SIDE, SIDE), dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for index, picture in enumerate(pool.map(_decode, *zip(*files, strict=True))):
            images[index] = picture
    return images, torch.tensor(labels, dtype=torch.int64)


def classes(folder: str | Path) -> list[str]:
    """Return the WordNet ids of `wnids.txt`, sorted: a label is a place in this list."""
    path = Path(folder) / "wnids.txt"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no wnids.txt, so it is not Tiny ImageNet. Unpack {SOURCE} and give "
            "the folder that holds wnids.txt."
        )
    return sorted(path.read_text(encoding="utf-8").split())


Read = Callable[[], bytes]
Files = list[tuple[str, Read]]  # where a picture is, and what reads its bytes


def _unpacked(folder: Path, part: str) -> tuple[Files, list[int]]:
    ids = classes(folder)
    if part == "train":
        found: Iterable[tuple[Path, str]] = (
            (path, name)
            for name in ids
            for path in sorted((folder / "train" / name / "images").glob("*.JPEG"))
        )
    else:
        listed = folder / "val" / "val_annotations.txt"
        lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
        found = (
            (folder / "val" / "images" / name, wnid)
            for name, wnid, *_ in (line.split("\t") for line in lines)
        )
    place = {name: index for index, name in enumerate(ids)}
    pairs = list(found)
    files = [(str(path), path.read_bytes) for path, _ in pairs]
    return files, [place.get(name, -1) for _, name in pairs]


def _packed(folder: Path, part: str) -> tuple[Files, list[int]]:
    files: Files = []
    labels: list[int] = []
    for path in sorted(folder.glob(f"{part}-*.npz")):
        with np.load(path) as arrays:
            joined, ends = arrays["webp"].tobytes(), arrays["offsets"].tolist()
            labels += arrays["label"].tolist()
        for index, (start, end) in enumerate(itertools.pairwise(ends)):
            piece = joined[start:end]
            files.append((f"{path}, picture {index}", lambda piece=piece: piece))
    return files, labels


def _decode(place: str, read: Read) -> Tensor:
    try:
        picture = Image.open(io.BytesIO(read())).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{place} cannot be read ({error}). Unpack the data again.") from error
    if picture.size != (SIDE, SIDE):
        raise ValueError(f"{place} is {picture.size}; Tiny ImageNet's are {SIDE}×{SIDE}.")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
