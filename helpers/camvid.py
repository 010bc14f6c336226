"""CamVid: streets seen from a car, each pixel with one of 11 classes, at 240 × 180 pixels.

The selection is that of the SegNet tutorial, which has the pictures at 480 × 360. Neighbouring
frames are nearly the same, so the splits to learn and to report on are taken by drive.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

__all__ = [
    "CLASSES",
    "IGNORE",
    "PALETTE",
    "SIZE",
    "SPLITS",
    "VERSION",
    "CamVid",
    "check",
    "find_root",
]

PALETTE = {
    "sky": "#649bc0",
    "building": "#654338",
    "pole": "#f7f4ec",
    "road": "#013a6d",
    "pavement": "#a09794",
    "tree": "#10736e",
    "sign": "#feda00",
    "fence": "#d59345",
    "car": "#715ccc",
    "pedestrian": "#c33a00",
    "bicyclist": "#1beaff",
    "unlabelled": "#1a1a1a",
}
"""A colour for every index of a mask, for `plotting.show_scenes(…, colors=PALETTE)`.

Any two differ by at least 16 (CIEDE2000), also to those who see no red, no green or no blue.
"""

CLASSES = tuple(PALETTE)[:-1]
IGNORE = 11  # the index of "unlabelled"
SIZE = (180, 240)  # H, W

SPLITS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("train", ("0001TP", "0016E5")),
    "tune": ("val", ("0016E5",)),
    "report": ("train", ("0006R0",)),
    "official_train": ("train", ("0001TP", "0006R0", "0016E5")),
    "official_val": ("val", ("0016E5",)),
}
"""Each split's folder and drives; a file's name begins with its drive."""

MANIFEST = Path(__file__).with_name("camvid.csv")
DIGITS = 32  # of each SHA-256 in the manifest: 128 bits are enough


def read_manifest() -> dict[str, tuple[str, str]]:
    """Return `{"train/NAME.png": (hash of the file at 480 × 360, hash of the array at 240 × 180)}`.

    A hash is the first 32 hexadecimal digits of the SHA-256 of the file, or of the array's bytes:
    images `[180, 240, 3]` and labels `[180, 240]` (in the folder `trainannot`), uint8.
    """
    files = {}
    with MANIFEST.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            folder, name = row["folder"], row["name"]
            files[f"{folder}/{name}"] = (row["image_file"], row["image"])
            files[f"{folder}annot/{name}"] = (row["label_file"], row["label"])
    return files


FILES = read_manifest()
ROWS = "\n".join(MANIFEST.read_text("utf-8").splitlines()[1:])
VERSION = hashlib.sha256(ROWS.encode()).hexdigest()[:16]


class CamVid(Dataset[tuple[Tensor, Tensor]]):
    """One split of CamVid as pairs (image, mask), read from the folder `root`.

    `split` is one of
    `"train"` (266 images of two drives), `"tune"` (101, a clip of 7 seconds out of one of them),
    `"report"` (101 of a third drive, which no training sees), or, to compare with published
    figures only, `"official_train"` (367, all three drives) and `"official_val"` (the clip).
    `root` is `$BOOK_DATA/CamVid` unless given, see `find_root`. `names` lists the files.

    Image float32 `[3, 180, 240]`, 0…1 (see `helpers.encoder.normalize`); mask int64 `[180, 240]`,
    indices of `CLASSES`, or 11 (`IGNORE`) where nobody said what it is.

    Raises `ValueError` for an unknown split or a file that is not what it should be, and
    `FileNotFoundError` where files are missing.

    Source: Brostow et al., Semantic Object Classes in Video, Pattern Recognition Letters 2009;
    the selection is that of Badrinarayanan et al., SegNet, PAMI 2017.
    """

    def __init__(self, split: str, root: str | Path | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}: expected one of {', '.join(SPLITS)}.")
        folder, drives = SPLITS[split]
        paths = [path.split("/") for path in FILES]
        self.names = [name for at, name in paths if at == folder and name.startswith(drives)]
        self.split, self.root = split, find_root(root)
        self.images, self.labels = self.root / folder, self.root / f"{folder}annot"
        self._check_presence()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        name = self.names[item]
        image = read_image(self.images / name)
        pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return pixels.float() / 255, torch.from_numpy(read_label(self.labels / name)).long()

    def _check_presence(self) -> None:
        wanted = [place / name for place in (self.images, self.labels) for name in self.names]
        missing = [path for path in wanted if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(wanted)} files of CamVid's split {self.split!r} are "
                f"missing in {self.root}: {_some(missing, self.root)}. Get them with "
                "helpers.camvid.download(), or set the environment variable BOOK_DATA to the "
                "folder that contains CamVid."
            )


def find_root(root: str | Path | None = None) -> Path:
    """Return `root`, else `$BOOK_DATA/CamVid`, else `~/.cache/decoder-book/CamVid`.

    In it are the folders `train` and `trainannot`, `val` and `valannot`. Nothing need be there.
    """
    if root is not None:
        return Path(root).expanduser()
    data = os.environ.get("BOOK_DATA") or Path.home() / ".cache" / "decoder-book"
    return Path(data).expanduser() / "CamVid"


def check(root: str | Path | None = None) -> list[str]:
    """Return the files that are missing or not what the manifest says, such as `train/NAME.png`.

    A file is right as the tutorial has it (480 × 360), or at 240 × 180 with the pixels that the
    former gives. The official test images, which no split reads, are looked at only where there is
    a folder `test`. Takes some seconds.
    """
    root = find_root(root)
    unread = () if (root / "test").is_dir() else ("test/", "testannot/")
    wanted = [path for path in FILES if not path.startswith(unread)]
    return [path for path in wanted if not _is_right(root / path, *FILES[path])]


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return an RGB image `[180, 240, 3]`, uint8; one of 480 × 360 is averaged over 2 × 2 pixels.

    Raises `ValueError` for any other size and for a damaged file.
    """
    picture = _open(path)
    reduced = picture.reduce(2) if _is_original(picture, path) else picture
    return np.array(reduced.convert("RGB"))


def read_label(path: Path) -> NDArray[np.uint8]:
    """Return class indices `[180, 240]`, uint8, 0…11; of 480 × 360, every second pixel.

    Raises `ValueError` for any other size, an index above 11, and for a damaged file.
    """
    picture = _open(path)
    label = np.array(picture)
    if label.ndim != 2 or label.max() > IGNORE:
        found = f"{label.max()}" if label.ndim == 2 else f"the colours of {picture.mode}"
        raise ValueError(
            f"Expected class indices 0…{IGNORE} in {path}, got {found}. Is it CamVid with 32 "
            "classes? This is the SegNet tutorial's: helpers.camvid.download()."
        )
    step = 2 if _is_original(picture, path) else 1
    return np.ascontiguousarray(label[::step, ::step], np.uint8)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). helpers.camvid.download() replaces what is damaged."
        ) from error


def _is_original(picture: Image.Image, path: Path) -> bool:
    height, width = SIZE
    if picture.size not in ((width, height), (2 * width, 2 * height)):
        raise ValueError(
            f"Expected {2 * width} × {2 * height} or {width} × {height} pixels in {path}, got "
            f"{picture.size[0]} × {picture.size[1]}."
        )
    return picture.size != (width, height)


def _is_right(path: Path, file_hash: str, array_hash: str) -> bool:
    if not path.is_file():
        return False
    if _hash(path.read_bytes()) == file_hash:
        return True
    try:
        read = read_label if path.parent.name.endswith("annot") else read_image
        return _hash(read(path).tobytes()) == array_hash
    except ValueError:
        return False


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _some(paths: list[Path], root: Path) -> str:
    shown = [path.relative_to(root).as_posix() for path in paths[:3]]
    return ", ".join(shown) + (", …" if len(paths) > 3 else "")
