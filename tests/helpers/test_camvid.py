"""CamVid: splits by drive, pixels at both sizes, and a download that survives what can go wrong."""

import hashlib
import io
import multiprocessing
import re
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZIP_LZMA, ZipFile, ZipInfo

import numpy as np
import pytest
import torch
from PIL import Image
from test_plotting import VISION, least_difference

from helpers import camvid, plotting
from helpers.camvid import CamVid

NAMES = {
    "test": ["Seq05VD_f00000.png"],
    "train": ["0001TP_006690.png", "0006R0_f00930.png", "0016E5_00390.png"],
    "val": ["0016E5_07959.png"],
}
ROOT = camvid.find_root()
here_is_camvid = pytest.mark.skipif(not ROOT.is_dir(), reason=f"there is no CamVid in {ROOT}")
full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def png(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "png", compress_level=1)
    return file.getvalue()


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, which no compression makes small, and labels, with 11 and all the others."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (360, 480, 3), np.uint8)
    return image, random.integers(0, 12, (360, 480), np.uint8)


def halve(image: np.ndarray) -> np.ndarray:
    return ((image.reshape(180, 2, 240, 2, 3).sum((1, 3)) + 2) // 4).astype(np.uint8)


@pytest.fixture
def originals(monkeypatch) -> dict[str, bytes]:
    """The files of a small CamVid of our own, which the manifest then names."""
    monkeypatch.setenv("no_proxy", "*")
    files, manifest = {}, {}
    for folder, names in NAMES.items():
        for name in names:
            image, label = draw(len(files))
            small = {folder: halve(image), f"{folder}annot": label[::2, ::2]}
            for place, pixels in ((folder, image), (f"{folder}annot", label)):
                path = f"{place}/{name}"
                files[path] = png(pixels)
                manifest[path] = (digest(files[path]), digest(small[place].tobytes()))
    monkeypatch.setattr(camvid, "FILES", manifest)
    return files


def write(root: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def read_all(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def pack(files: dict[str, bytes], method: int = ZIP_DEFLATED) -> bytes:
    with ZipFile(file := io.BytesIO(), "w", method) as archive:
        for path, content in {"../README.md": b"x", **files}.items():
            archive.writestr(camvid.INSIDE + path, content)
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site, asked = self.server.site, self.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and site.ranges else 0
        whole = len(site.content)
        site.requests.append(asked)
        if self.path == "/missing":
            self.send_error(404)
        elif start >= whole:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{whole}")
            self.end_headers()
        else:
            self.send_response(206 if asked and site.ranges else 200)
            if site.says_length:
                self.send_header("Content-Length", str(whole - start))
            self.end_headers()
            sent = site.content[start : site.cut]
            self.wfile.write(sent)
            site.served.append(len(sent))
            site.stall.wait()

    def log_message(self, *_):
        pass


@pytest.fixture
def site(originals):
    """A server on this machine: what it sends (as far as `cut`), how, and what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = SimpleNamespace(content=pack(originals), ranges=True, says_length=True, cut=None)
    site.requests, site.served, site.stall = [], [], threading.Event()
    site.url, site.half = f"http://127.0.0.1:{server.server_port}", len(site.content) // 2
    site.stall.set()
    server.site = site
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield site
    site.stall.set()
    server.shutdown()
    thread.join()
    server.server_close()


# Reading


def test_each_split_has_its_drives_and_its_number_of_images(tmp_path):
    write(tmp_path, dict.fromkeys(camvid.FILES, b""))
    splits = {name: CamVid(name, tmp_path) for name in camvid.SPLITS}
    sizes = {"train": 266, "tune": 101, "report": 101, "official_train": 367, "official_val": 101}
    assert {name: len(split) for name, split in splits.items()} == sizes
    drives = {name: {file[:6] for file in split.names} for name, split in splits.items()}
    assert drives["train"] == {"0001TP", "0016E5"} and drives["report"] == {"0006R0"}
    train, tune, report = (set(splits[name].names) for name in ("train", "tune", "report"))
    assert not (train & tune or train & report or tune & report)
    assert train | report == set(splits["official_train"].names)


def test_the_manifest_holds_hashes_and_no_picture_twice():
    rows = camvid.MANIFEST.splitlines()[1:]
    assert len(rows) == 701
    assert all(re.fullmatch(r"(test|train|val),\w+\.png(,[0-9a-f]{32}){4}", row) for row in rows)
    images = [hashes for path, hashes in camvid.FILES.items() if "annot" not in path]
    assert len({file for file, _ in images}) == len({array for _, array in images}) == 701
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16] == camvid.VERSION


def test_both_sizes_give_the_same_pixels(originals, tmp_path):
    large = write(tmp_path / "large", originals)
    small = {path: png(camvid.read_pixels(large / path)) for path in originals}
    small = write(tmp_path / "small", small)
    assert camvid.check(large) == camvid.check(small) == []
    for split in camvid.SPLITS:
        for one, other in zip(CamVid(split, large), CamVid(split, small), strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_an_image_is_averaged_and_a_label_taken(originals, tmp_path):
    image, mask = CamVid("tune", write(tmp_path, originals))[0]
    assert image.shape == (3, *camvid.SIZE) and image.dtype == torch.float32
    assert mask.shape == camvid.SIZE and mask.dtype == torch.int64
    drawn, label = draw(8)  # the last one that was drawn
    assert np.array_equal(image.permute(1, 2, 0), halve(drawn) / np.float32(255))
    assert np.array_equal(mask, label[::2, ::2]) and mask.max() == camvid.IGNORE


def test_a_folder_is_named_or_found(monkeypatch, tmp_path):
    monkeypatch.setenv("BOOK_DATA", str(tmp_path))
    assert camvid.find_root() == tmp_path / "CamVid"
    assert camvid.find_root("~/data") == Path.home() / "data"
    monkeypatch.delenv("BOOK_DATA")
    assert camvid.find_root() == Path.home() / ".cache" / "decoder-book" / "CamVid"


def test_what_is_missing_is_named_with_the_cure(originals, tmp_path):
    with pytest.raises(ValueError, match=r"'valid': expected one of train, tune, report"):
        CamVid("valid", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"4 of 4 files .*train/0001TP.* and 1 more\. Get"):
        CamVid("train", tmp_path)
    write(tmp_path, originals)
    (tmp_path / "trainannot" / NAMES["train"][1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files .*trainannot/0006R0_f00930\.png"):
        CamVid("report", tmp_path)
    assert len(CamVid("train", tmp_path)) == 2
    assert camvid.check(tmp_path) == ["trainannot/0006R0_f00930.png"]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("val", png(np.zeros((360, 481, 3), np.uint8)), r"pixels in .*07959\.png, got 481 × 360"),
        ("val", b"no picture", r"07959\.png is damaged"),
        ("val", png(draw(0)[0])[:-1000], r"07959\.png is damaged"),
        ("valannot", png(np.full((180, 240), 12, np.uint8)), r"0…11 in .*07959\.png, got 12"),
        ("valannot", png(np.zeros((180, 240, 3), np.uint8)), r"0…11 in .*07959\.png, got colours"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(originals, tmp_path, path, content, message):
    write(tmp_path, {**originals, f"{path}/{NAMES['val'][0]}": content})
    assert camvid.check(tmp_path) == [f"{path}/{NAMES['val'][0]}"]
    with pytest.raises(ValueError, match=message):
        CamVid("tune", tmp_path)[0]


@pytest.mark.parametrize("vision", VISION)
def test_classes_are_told_apart(vision):
    assert least_difference(list(camvid.PALETTE.values()), vision) >= 17


def test_there_is_a_colour_for_every_index():
    assert len(camvid.CLASSES) == camvid.IGNORE == len(camvid.PALETTE) - 1
    assert len(np.unique(plotting.colorize(np.arange(12)[None], camvid.PALETTE)[0], axis=0)) == 12


@here_is_camvid
def test_camvid_itself_is_right():
    assert camvid.check() == []
    report = CamVid("report")
    image, mask = report[50]
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    assert digest(pixels.tobytes()) == camvid.FILES[f"train/{report.names[50]}"][1]
    assert (
        digest(mask.byte().numpy().tobytes()) == camvid.FILES[f"trainannot/{report.names[50]}"][1]
    )


# Downloading


def test_a_download_is_whole_and_made_once(originals, site, tmp_path):
    root = tmp_path / "new" / "CamVid"
    assert camvid.download(root, site.url) == root
    assert read_all(root) == originals and camvid.check(root) == []
    assert len(CamVid("train", root)) == 2
    (root / "val" / NAMES["val"][0]).write_bytes(b"damaged")
    right = [root / path for path in originals if not path.startswith("val/")]
    before = [path.stat().st_ino for path in right]
    camvid.download(root, site.url)
    assert read_all(root) == originals and [path.stat().st_ino for path in right] == before
    camvid.download(root, "http://127.0.0.1:1")
    assert site.requests == [None, None]


def test_files_at_240_by_180_are_not_downloaded_again(originals, tmp_path):
    large = write(tmp_path / "large", originals)
    small = {path: png(camvid.read_pixels(large / path)) for path in originals}
    root = write(tmp_path, {path: small[path] for path in small if not path.startswith("test")})
    assert camvid.download(root, "http://127.0.0.1:1") == root


def test_a_cut_download_asks_only_for_the_rest(originals, site, tmp_path):
    site.cut = site.half
    with pytest.raises(ConnectionError, match=rf"ended after {site.half} of .* again: it goes on"):
        camvid.download(tmp_path, site.url)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    site.cut = None
    camvid.download(tmp_path, site.url)
    assert site.requests == [None, f"bytes={site.half}-"]
    assert site.served == [site.half, len(site.content) - site.half]
    assert read_all(tmp_path) == originals


def test_a_killed_download_asks_only_for_the_rest(originals, site, tmp_path):
    site.cut = site.half
    site.stall.clear()
    fork = multiprocessing.get_context("fork")  # so that it knows the small manifest
    process = fork.Process(target=camvid.download, args=(tmp_path, site.url))
    process.start()
    part = tmp_path / f"{camvid.COMMIT}.zip.part"
    while not (part.exists() and part.stat().st_size) and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    have, site.cut = part.stat().st_size, None
    site.stall.set()
    camvid.download(tmp_path, site.url)
    assert process.exitcode == -9 and 0 < have <= site.half
    assert site.requests == [None, f"bytes={have}-"]
    assert site.served[1] == len(site.content) - have
    assert read_all(tmp_path) == originals


def test_a_server_without_ranges_sends_everything_again(originals, site, tmp_path):
    site.cut, site.ranges = site.half, False
    for _ in range(2):
        with pytest.raises(ConnectionError):
            camvid.download(tmp_path, site.url)
        assert (tmp_path / f"{camvid.COMMIT}.zip.part").stat().st_size == site.half
    site.cut = None
    camvid.download(tmp_path, site.url)
    assert site.requests[1:] == 2 * [f"bytes={site.half}-"]
    assert site.served == [site.half, site.half, len(site.content)]
    assert read_all(tmp_path) == originals


@pytest.mark.parametrize(("extra", "requests"), [(b"", 1), (b"more", 2)])
def test_nothing_is_left_to_send(originals, site, tmp_path, extra, requests):
    (tmp_path / f"{camvid.COMMIT}.zip.part").write_bytes(site.content + extra)
    camvid.download(tmp_path, site.url)
    assert site.requests == [f"bytes={len(site.content + extra)}-", None][:requests]
    assert read_all(tmp_path) == originals


def test_a_wrong_file_is_named_and_the_others_are_in_place(originals, site, tmp_path):
    wrong = f"train/{NAMES['train'][1]}"
    whole, site.content = site.content, pack({**originals, wrong: png(draw(99)[0])})
    with pytest.raises(ValueError, match=rf"damaged: {re.escape(wrong)}\. What .* again"):
        camvid.download(tmp_path, site.url)
    assert read_all(tmp_path) == {path: originals[path] for path in originals if path != wrong}
    site.content = whole
    camvid.download(tmp_path, site.url)
    assert read_all(tmp_path) == originals


def test_a_truncated_archive_is_deleted(originals, site, tmp_path):
    site.says_length, site.cut = False, site.half
    with pytest.raises(ValueError, match=r"everything \(File is not a zip.* deleted: .* again"):
        camvid.download(tmp_path, site.url)
    assert read_all(tmp_path) == {}
    site.cut = None
    camvid.download(tmp_path, site.url)
    assert read_all(tmp_path) == originals


def test_hostile_entries_are_written_nowhere(originals, site, tmp_path, monkeypatch):
    outside, root = tmp_path / "outside", tmp_path / "deep" / "CamVid"
    link, bomb, lzma, *right = originals
    with ZipFile(file := io.BytesIO(), "w", ZIP_DEFLATED) as archive:
        for name in ("../evil.png", str(outside), "train/../../evil.png", "train/evil.png"):
            archive.writestr(name, b"evil")
            archive.writestr(camvid.INSIDE + name, b"evil")
        entry = ZipInfo(camvid.INSIDE + link)
        entry.external_attr = 0o120777 << 16  # a symbolic link
        archive.writestr(entry, str(outside))
        archive.writestr(camvid.INSIDE + bomb, bytes(100_000_000))
        archive.writestr(camvid.INSIDE + lzma, originals[lzma], ZIP_LZMA)
        for path in right:
            archive.writestr(camvid.INSIDE + path, originals[path])
    site.content = file.getvalue()
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"damaged: {link}, {bomb}, {lzma}. "):
        camvid.download(root, site.url)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert read_all(tmp_path) == {f"deep/CamVid/{path}": originals[path] for path in right}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@full_disk
@pytest.mark.parametrize("full", [f"{camvid.COMMIT}.zip.part", f"val/{NAMES['val'][0]}.part"])
def test_a_full_disk_is_reported_and_leaves_nothing_half_written(originals, site, tmp_path, full):
    (tmp_path / full).parent.mkdir(exist_ok=True)
    (tmp_path / full).symlink_to("/dev/full")
    message = rf"No space left on device: CamVid needs 500 MB in {tmp_path} .* again"
    with pytest.raises(OSError, match=message):
        camvid.download(tmp_path, site.url)
    written = {path: content for path, content in read_all(tmp_path).items() if ".zip" not in path}
    assert written.items() <= originals.items()
    assert [path.name for path in tmp_path.rglob("*.png.part")] == []
    (tmp_path / full).unlink(missing_ok=True)
    camvid.download(tmp_path, site.url)
    assert read_all(tmp_path) == originals
    assert len(site.requests) == (2 if ".zip" in full else 1)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "{}/missing"])
def test_a_failing_network_is_reported_with_the_cure(site, tmp_path, address):
    with pytest.raises(ConnectionError, match=r"Check the connection and run .*download\(\) again"):
        camvid.download(tmp_path, address.format(site.url))
    assert read_all(tmp_path) == {}
