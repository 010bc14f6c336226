"""A chapter's trials: planned, run once, gone on with, shared; and no photograph is stored."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torchvision.models import resnet18

from experiments import claims
from experiments.chapters.encoder import trials as encoder_trials
from experiments.chapters.unet import caching
from experiments.core import provenance, records, registry, trials
from experiments.core.provenance import Tree
from experiments.pretrain import __main__ as pretrain
from experiments.pretrain import choose
from helpers import camvid, scenes
from helpers import records as stored
from helpers.bridges.unet import AddBlock, UNetDecoder
from helpers.encoder import OUT_CHANNELS, Pyramid, load_file

REPOSITORY = provenance.ROOT
SIDE = (48, 64)
TRIALS = {
    "U-Net": trials.Trial(UNetDecoder, weights=None),
    "adding": trials.Trial(UNetDecoder, weights=None, block=AddBlock),
}


def pairs(count: int, first: int, classes: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Vertical bands, a class each, of one grey each, and some noise."""
    generator = torch.Generator().manual_seed(first)
    bands = torch.arange(SIDE[1]) * classes // SIDE[1]
    masks = [bands.roll(7 * i + first).expand(SIDE) for i in range(count)]
    noise = [0.1 * torch.rand(3, *SIDE, generator=generator) for _ in masks]
    return [((m / classes * 0.9 + n), m.contiguous()) for m, n in zip(masks, noise, strict=True)]


def streets_like(count: int, first: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return pairs(count, first, 12)  # the last of them is not to be counted


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small repository: the code that trials are made of, no records yet, tiny data."""
    ignore = shutil.ignore_patterns("weights", "__pycache__")
    for folder in provenance.OURS:
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignore)
    monkeypatch.delenv("BOOK_WEIGHTS", raising=False)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(stored, "PLACES", (tmp_path / "results",))
    monkeypatch.setattr(trials, "SHOWN", (0, 2))
    monkeypatch.setattr(claims, "trials", lambda slug: TRIALS)
    tiny = dict(train=(4, 0), report=(3, 9), epochs=2, batch_size=2)
    for name, data in (("scenes", pairs), ("streets", streets_like)):
        setting = replace(trials.SETTINGS[name], data=data, **tiny)
        monkeypatch.setitem(trials.SETTINGS, name, setting)
    return tmp_path


@pytest.fixture
def started(monkeypatch):
    """Trains nothing, but finds figures; lists what was run."""
    done = []

    def measure(data, what, seed):
        done.append((data, what, seed))
        return {"miou": 50.0, "seconds": 90.0}

    def entries(data, what, seed):
        return ["helpers/bridges/unet.py::" + {"U-Net": "UpBlock", "adding": "AddBlock"}[what]]

    sweep = claims.SWEEPS["unet"]
    sweep = replace(sweep, measure=partial(measure), entries=entries, versions=())
    monkeypatch.setitem(claims.SWEEPS, "unet", sweep)
    return done


ALL = [(data, what, seed) for seed in range(3) for data in trials.SETTINGS for what in TRIALS]


# The command line


COMMANDS = sorted({*registry.MODULES.values(), "experiments.pretrain.__main__"})
COMMANDS += ["experiments.pretrain.adopt", "experiments.restamp"]


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_explains_itself_and_refuses_what_it_does_not_know(module, capsys):
    command = import_module(module)
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "usage: " in said and command.__doc__.split()[:6] == said_about(said)[:6]
    with pytest.raises(SystemExit) as done:
        command.main(["--no-such-option"])
    assert done.value.code == 2


def said_about(help_: str) -> list[str]:
    """Return the words after the usage."""
    return help_.split("\n\n", 1)[1].split()


@pytest.mark.parametrize("module", sorted(set(registry.MODULES.values())))
def test_another_encoder_is_refused(module, capsys, monkeypatch):
    monkeypatch.setenv("BOOK_WEIGHTS", "random")
    with pytest.raises(SystemExit) as done:
        import_module(module).main(["unet"] if module == registry.CLAIMS else [])
    assert done.value.code == 2
    assert "unset it" in capsys.readouterr().err


# Which trials are run


def test_a_second_start_runs_nothing(root, started):
    claims.main(["unet"])
    assert started == ALL
    claims.main(["unet"])
    assert started == ALL


def test_some_may_be_chosen(root, started):
    claims.main(["unet", "--on", "scenes", "--only", "adding", "--seeds", "2"])
    assert started == [("scenes", "adding", 0), ("scenes", "adding", 1)]
    claims.main(["unet", "--on", "scenes", "--seeds", "2"])
    assert started[2:] == [("scenes", "U-Net", 0), ("scenes", "U-Net", 1)]


def test_a_stale_record_is_run_again(root, started):
    claims.main(["unet", "--seeds", "1"])
    started.clear()
    module = root / "helpers" / "bridges" / "unet.py"
    code = module.read_text(encoding="utf-8")
    assert code.count("x = x + self.project(skip)") == 1  # AddBlock's
    module.write_text(code.replace("x = x + self.project", "x = x - self.project"), "utf-8")
    claims.main(["unet", "--seeds", "1"])
    assert started == [("scenes", "adding", 0), ("streets", "adding", 0)]
    assert len(stored.load("unet")) == 4


def test_an_unknown_trial_or_chapter_names_those_that_there_are(root, started, capsys):
    with pytest.raises(SystemExit):
        claims.main(["unet", "--only", "U-Net", "adding twice"])
    said = capsys.readouterr().err
    assert "adding twice" in said and all(f"'{name}'" in said for name in TRIALS)
    with pytest.raises(SystemExit):
        claims.main(["vnet"])
    assert "unet" in capsys.readouterr().err.rsplit("vnet", 1)[1]
    assert started == []


def test_a_trial_is_repeated_and_compared_and_nothing_is_written(root, started, capsys):
    command = ["unet", "--on", "scenes", "--only", "U-Net"]
    claims.main([*command, "--seeds", "2"])
    (first, other), path = stored.load("unet"), root / "results" / "unet.json"
    path.write_text(json.dumps([first, {**other, "miou": 49.0, "seconds": 1.0}]))
    before = path.read_bytes()
    started.clear()
    capsys.readouterr()
    claims.main([*command, "--again"])  # seed 2 has no record
    assert started == [("scenes", "U-Net", 0), ("scenes", "U-Net", 1)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("the same to the last digit")
    assert lines[1].endswith("{'miou': '49.0 → 50.0'}") and len(lines) == 2
    assert path.read_bytes() == before


# The plan


def test_a_plan_runs_nothing_and_says_how_long(root, started, capsys):
    claims.main(["unet", "--on", "scenes", "--plan"])
    said = capsys.readouterr().out
    assert len(re.findall(r"^scenes, .* \?$", said, re.M)) == 6
    assert "6 are missing" in said and "6 of unknown length" in said
    assert started == [] and not (root / "results").exists()

    claims.main(["unet", "--on", "scenes", "--only", "U-Net", "--seeds", "1"])  # 90 s
    capsys.readouterr()
    claims.main(["unet", "--plan", "--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    found = [line.rsplit("  ", 1)[1].strip() for line in lines[:-1]]
    like_others = ["1.5 min", "?", "?", "1.5 min", "1.5 min", "?", "?"]
    assert found == like_others
    assert "7 are missing: about 4 min, and 4 of unknown length" in lines[-1]
    assert len(started) == 1


# Two processes

SHARES = """
import sys
import time
from functools import partial
from pathlib import Path

from experiments.core import provenance
from experiments.core.sweep import Sweep
from helpers import records as stored

root, me = Path(sys.argv[1]), sys.argv[2]
provenance.ROOT, stored.PLACES = root, (root / "results",)


def measure(what, seed):
    with open(root / "log", "a") as log:
        log.write(f"{me} {what} {seed}\\n")
    while len({line.split()[0] for line in open(root / "log")}) < 2:
        time.sleep(0.01)  # until the other one has begun, too
    return {"miou": 50.0}


def start():
    sweep = Sweep("toy", partial(measure), key=("what", "seed"), versions=())
    sweep.run([{"what": what, "seed": seed} for what in "abcd" for seed in range(3)])
"""


@pytest.mark.slow
def test_two_processes_share_the_trials(root, monkeypatch):
    ready = 'Path(root, "ready").touch()\nwhile not Path(root, "go").exists(): time.sleep(0.001)\n'
    command = [sys.executable, "-c", SHARES + ready + "start()", str(root), "other"]
    monkeypatch.setattr(sys, "argv", ["", str(root), "this"])
    namespace: dict = {}
    exec(SHARES, namespace)
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as other:
        while not (root / "ready").exists():
            assert other.poll() is None
            time.sleep(0.01)
        (root / "go").touch()
        namespace["start"]()
    assert other.returncode == 0
    log = [line.split(" ", 1) for line in (root / "log").read_text().splitlines()]
    assert sorted(task for _, task in log) == [f"{w} {s}" for w in "abcd" for s in range(3)]
    assert {who for who, _ in log} == {"this", "other"}
    assert len(stored.load("toy")) == len(log)


def test_a_trial_that_another_process_runs_is_left_to_it(root, started, capsys):
    lock = records.lock("unet scenes, U-Net, seed 0")
    with FileLock(lock.lock_file):
        claims.main(["unet", "--on", "scenes", "--seeds", "1"])
    assert "scenes, U-Net, seed 0: another process is at it" in capsys.readouterr().out
    assert started == [("scenes", "adding", 0)]
    claims.main(["unet", "--on", "scenes", "--seeds", "1"])
    assert started == [("scenes", "adding", 0), ("scenes", "U-Net", 0)]


# What a trial writes


@pytest.mark.slow
def test_a_record_says_what_was_measured_and_what_it_rests_on(root):
    claims.main(["unet", "--on", "streets", "--only", "U-Net", "--seeds", "2"])
    record, second = stored.load("unet")
    assert (record["data"], record["what"], record["seed"], second["seed"]) == (
        "streets", "U-Net", 0, 1
    )  # fmt: skip
    for name in ("iou", "boundary_iou"):
        assert tuple(record[name]) == camvid.CLASSES
    assert record["miou"] == pytest.approx(np.nanmean(list(record["iou"].values())), abs=0.01)
    for name in ("miou", "boundary_miou", "accuracy"):
        assert 0 <= record[name] <= 100
    assert len(record["loss"]) == 2 and all(map(math.isfinite, record["loss"]))
    assert (record["images"], record["reported"]) == (4, 3)
    assert record["setting"]["epochs"] == 2 and record["setting"]["ignore_index"] == camvid.IGNORE
    decoder = UNetDecoder(OUT_CHANNELS, len(camvid.CLASSES))
    assert record["parameters"] == sum(p.numel() for p in decoder.parameters())
    assert record["macs"] > 0 and record["seconds"] > 0
    assert record["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    rests_on = record["provenance"]
    for path in ("core/trials.py", "chapters/unet/trials.py"):
        assert f"experiments/{path}" in rests_on["code"]
    for path in ("encoder", "metrics", "bridges/unet", "training/loop", "training/feeding"):
        assert f"helpers/{path}.py" in rests_on["code"]
    assert rests_on["camvid"] == records.VERSIONS["camvid"](Tree())
    assert "scenes" not in rests_on and "weights" not in rests_on  # random ones
    assert records.stale(record, Tree()) == []
    assert str(root) not in json.dumps(record)
    check_pictures(root)


def check_pictures(root):
    """Of the first seed only; they hold classes, and nothing of the images."""
    pictures = sorted((root / "results" / "unet").iterdir())
    assert [path.name for path in pictures] == ["u-net_0.png", "u-net_2.png"]
    newest = max(path.stat().st_mtime for path in pictures)
    assert newest < (root / "results" / "unet.json").stat().st_mtime
    for path in pictures:
        classes = stored.picture("unet", path.stem)
        assert classes.shape == SIDE and classes.max() < len(camvid.CLASSES)
        with Image.open(path) as image:
            assert image.mode == "P" and not image.text
            shown = np.asarray(image.convert("RGB"))
        colors = np.array([list(bytes.fromhex(c[1:])) for c in camvid.PALETTE.values()])
        assert np.array_equal(shown, colors[classes])


def test_only_the_first_seed_on_streets_is_drawn(root, monkeypatch):
    folders = []
    monkeypatch.setattr(claims, "measure_trial", lambda *given: folders.append(given[4]))
    for data, seed in (("scenes", 0), ("streets", 1), ("streets", 0)):
        claims.measure("unet", data, "U-Net", seed, Path("state"))
    assert folders == [None, None, root / "results" / "unet"]


def test_a_trial_whose_code_has_changed_does_not_go_on_from_the_old_one():
    then, now = ({"code": {"helpers/bridges/unet.py": digest * 12}} for digest in "01")
    sweep, task = claims.SWEEPS["unet"], {"data": "scenes", "what": "U-Net", "seed": 0}
    paths = [sweep._state(task, each) for each in (then, now, now)]
    assert paths[0] != paths[1] == paths[2]


@pytest.mark.slow
def test_an_interrupted_trial_goes_on(root, monkeypatch):
    epochs = []
    whole = trials.fit

    def interrupted(*given, **keywords):
        def stop(epoch):
            epochs.append(epoch)
            raise KeyboardInterrupt

        return whole(*given, **keywords, after_epoch=stop)

    command = ["unet", "--on", "scenes", "--only", "U-Net", "--seeds", "1"]
    monkeypatch.setattr(trials, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        claims.main(command)
    kept = root / ".cache" / "interrupted" / "unet"
    assert [path.suffix for path in kept.iterdir()] == [".safetensors"]
    assert not (root / "results").exists()

    def counted(*given, **keywords):
        return whole(*given, **keywords, after_epoch=epochs.append)

    monkeypatch.setattr(trials, "fit", counted)
    claims.main(command)
    assert epochs == [1, 2]
    assert not list(kept.iterdir())
    (resumed,) = stored.load("unet")
    (root / "results" / "unet.json").unlink()
    claims.main(command)
    assert epochs == [1, 2, 1, 2]
    (uninterrupted,) = stored.load("unet")
    for name in ("loss", "miou", "iou", "boundary_iou"):
        assert resumed[name] == pytest.approx(uninterrupted[name], nan_ok=True)


# With cached features


@pytest.mark.slow
def test_what_is_predicted_follows_from_the_macs():
    record = caching.measure("U-Net, a quarter as wide", count=8, repeats=3)
    # Convolutions, by hand: k² · in · out · positions; at 128 × 128 c1 has 64² positions.
    stages = [(512 + 256, 32, 8), (32 + 128, 16, 16), (16 + 64, 12, 32), (12 + 64, 8, 64)]
    decoder = sum(9 * a * b * side**2 for a, b, side in stages) + 8 * 7 * 64**2
    assert record["decoder_macs"] == decoder
    # ResNet-18 takes 1.814 GMACs at 224 × 224, 0.5 M of them in the classifier.
    encoder = record["encoder_macs"]
    assert encoder == pytest.approx(1.8135e9 * (128 / 224) ** 2, rel=0.01)
    assert record["predicted"] == pytest.approx(1 + encoder / (3 * decoder), abs=1e-3)
    work = record["step_macs"]
    assert work["uncached"] - work["cached"] == encoder
    assert 2 * decoder < work["cached"] < 3 * decoder  # c5 and the skips need no gradient
    assert record["counted"] == pytest.approx(work["uncached"] / work["cached"], abs=1e-3)
    assert 1 < record["lower"] <= record["ratio"] <= record["upper"]
    assert (record["side"], record["repeats"]) == (scenes.SIZE, 3)


# The repository


def faults(path: Path) -> list[str]:
    """Return why a file should not lie under `results/`: it may show a photograph."""
    if path.suffix != ".png":
        return ["no PNG"]
    with Image.open(path) as image:
        found = [] if image.mode == "P" else [f"mode {image.mode}, not indexed"]
        found += [] if image.size == camvid.SIZE[::-1] else [f"size {image.size}"]
        colors = image.convert("RGB").getcolors(12)
        found += ["more than 12 colours"] if colors is None else []
    return found + (["more than 10 kB"] if path.stat().st_size > 10_000 else [])


def test_no_stored_picture_is_a_photograph():
    files = [path for path in (REPOSITORY / "results").rglob("*") if path.is_file()]
    pictures = [path for path in files if path.suffix not in (".json", ".part")]
    assert {path.name: wrong for path in pictures if (wrong := faults(path))} == {}


def test_a_photograph_would_be_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (*camvid.SIZE, 3), dtype=np.uint8)
    photograph = Image.fromarray(noise)
    bands = Image.fromarray(np.repeat(np.arange(12, dtype=np.uint8), 15)[:, None].repeat(240, 1))
    for name, image, expected in (
        ("a.png", photograph, "mode RGB"),
        ("b.png", photograph.quantize(64), "12 colours"),
        ("c.png", photograph.quantize(12).resize((480, 360)), "size"),
        ("d.png", photograph.quantize(12), "10 kB"),
        ("e.jpg", photograph, "no PNG"),
    ):
        image.save(tmp_path / name)
        assert any(expected in fault for fault in faults(tmp_path / name)), name
    bands.convert("P").save(tmp_path / "f.png")
    assert faults(tmp_path / "f.png") == []


@pytest.mark.parametrize("slug", claims.CHAPTERS)
def test_every_trial_that_a_record_names_still_exists(slug):
    named = {(record["data"], record["what"]) for record in stored.load(slug)}
    assert named <= {(data, what) for data in trials.SETTINGS for what in claims.trials(slug)}


# --- encoders compared


def test_the_light_decoder_is_linear_in_each_map_and_sees_no_neighbour():
    torch.manual_seed(0)
    decoder = encoder_trials.LightDecoder((64, 64, 128, 256, 512), 5).eval()
    decoder.norm = torch.nn.Identity()
    maps = [
        torch.rand(2, c, s, s) for c, s in zip(decoder.in_channels, (16, 8, 8, 8, 8), strict=True)
    ]
    with torch.no_grad():
        logits = decoder(Pyramid(*maps))
        columns = torch.cat(maps[1:], 1).flatten(2)  # all on one grid: a pixel is one column
        weight = torch.cat([each.weight.flatten(1) for each in decoder.project], 1)
        head = decoder.head.weight.flatten(1)
        expected = head @ torch.relu(weight @ columns) + decoder.head.bias[:, None]
    assert logits.shape == (2, 5, 8, 8)
    torch.testing.assert_close(logits.flatten(2), expected)
    with pytest.raises(ValueError, match=r"in_channels=encoder\.out_channels"):
        decoder(Pyramid(*maps[:4], maps[3]))


def test_the_first_weights_come_from_history_or_say_how(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_trials, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="git fetch --unshallow"):
        encoder_trials.first()
    assert not list(tmp_path.rglob("*.part"))
    command = ["git", "cat-file", "-e", encoder_trials.FIRST_BLOB]
    if subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False).returncode:
        pytest.skip("this clone does not have the whole history")
    shown = ["git", "rev-parse", "--absolute-git-dir"]
    git = subprocess.run(shown, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    (tmp_path / ".git").write_text(f"gitdir: {git.stdout}")
    path = encoder_trials.first()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == encoder_trials.FIRST_SHA256
    assert len(load_file(path)["fc.bias"]) == 200
    path.write_bytes(b"damaged")
    assert (
        hashlib.sha256(encoder_trials.first().read_bytes()).hexdigest()
        == encoder_trials.FIRST_SHA256
    )


@pytest.mark.slow
def test_encoders_are_chosen_on_the_clip_for_it_only(root, tmp_path, monkeypatch, capsys):
    asked = []

    def split(part):
        asked.append(part)
        return streets_like(3, {"train": 0, "tune": 5}[part])

    setting = replace(trials.SETTINGS["streets"], data=split, train=("train",), report=("report",))
    monkeypatch.setitem(trials.SETTINGS, "streets", setting)
    monkeypatch.setattr(choose, "FILES", {"random": None})
    own = tmp_path / "own.safetensors"
    torch.manual_seed(0)
    pretrain.write(resnet18(num_classes=3), own)
    choose.main([f"own={own}", "--seeds", "2"])
    assert asked == ["train", "tune"]
    measured = stored.load("choice")
    assert [(r["encoder"], r["seed"]) for r in measured] == [
        ("random", 0), ("random", 1), ("own", 0), ("own", 1)
    ]  # fmt: skip
    assert measured[2]["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()
    assert all(0 <= r["miou"] <= 100 and r["images"] == 3 for r in measured)
    monkeypatch.setattr(choose, "score", None)  # a second time nothing is measured
    choose.main([f"own={own}", "--seeds", "2"])
    for wrong in ("own", f"random={own}", "own=nothing"):
        with pytest.raises(SystemExit, match="expected NAME=FILE"):
            choose.main([wrong])
    pretrain.write(resnet18(num_classes=3), own)
    with pytest.raises(SystemExit, match="'own' was measured with another file"):
        choose.main([f"own={own}"])
