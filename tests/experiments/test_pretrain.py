"""The training of the encoder: what it reads, how it augments, and that it can be interrupted."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision.models import resnet18
from torchvision.transforms import v2

from experiments.core import provenance
from experiments.core.provenance import Tree
from experiments.core.records import stale
from experiments.pretrain import __main__ as pretrain
from experiments.pretrain import adopt, augment, tiny_imagenet
from experiments.pretrain.recipe import CPU, SMOKE, Recipe
from helpers import records as stored
from helpers.encoder import BUNDLED_SHA256, ResNet18Encoder, normalize
from helpers.training import Precision, checkpoints
from tools import model_card

IDS = ["n30", "n10", "n20", "n40"]  # not in order, as in the real list
TRAIN, UNSEEN = 40, 10  # of each class


def picture(label: int, index: int) -> Image.Image:
    """Stripes: a class has its own direction and pitch, an image its own colour and noise."""
    rng = np.random.default_rng([label, index])
    y, x = np.mgrid[:64, :64] + rng.integers(64)
    wave = np.sin((x if label % 2 else y) / (2 if label < 2 else 6))[..., None]
    pixels = 128 + 70 * wave * rng.uniform(0.3, 1, 3) + rng.normal(0, 10, (64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slice in the layout of the public zip."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "wnids.txt").write_text("\n".join(IDS) + "\n")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for label, name in enumerate(sorted(IDS)):
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(TRAIN):
            picture(label, i).save(root / "train" / name / "images" / f"{name}_{i}.JPEG")
        for i in range(UNSEEN):
            file = f"val_{UNSEEN * label + i}.JPEG"
            picture(label, TRAIN + i).save(root / "val" / "images" / file)
            lines.append(f"{file}\t{name}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def pack(folder: Path, images: torch.Tensor, labels: torch.Tensor, part: str) -> None:
    """Write what was read as the packed files, in two of them, without loss."""
    for shard, chosen in enumerate(torch.arange(len(labels)).chunk(2)):
        files = []
        for image in images[chosen]:
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "WEBP", lossless=True)
            files.append(file.getvalue())
        np.savez(
            folder / f"{part}-{shard:02}.npz",
            webp=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0, *map(len, files)]).astype(np.int32),
            label=labels[chosen].numpy().astype(np.int16),
        )


# --- the data


def test_both_layouts_are_read_alike(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "wnids.txt").write_text("\n".join(sorted(IDS)))
    for part, count in (("train", TRAIN), ("val", UNSEEN)):
        images, labels = tiny_imagenet.load(folder, part)
        assert images.shape == (4 * count, 3, 64, 64) and images.dtype == torch.uint8
        assert labels.tolist() == [label for label in range(4) for _ in range(count)]
        pack(tmp_path, images, labels, part)
    for part in ("train", "val"):
        for one, other in zip(
            *(tiny_imagenet.load(f, part) for f in (folder, tmp_path)), strict=True
        ):
            assert torch.equal(one, other)


def test_pixels_are_those_of_the_files(folder: Path) -> None:
    images, _ = tiny_imagenet.load(folder, "val")
    first = np.array(Image.open(folder / "val" / "images" / "val_0.JPEG"))
    assert torch.equal(images[0], torch.from_numpy(first).permute(2, 0, 1))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no wnids\.txt.*tiny-imagenet-200\.zip"):
        tiny_imagenet.load(tmp_path, "train")
    (tmp_path / "wnids.txt").write_text("n1\nn2\n")
    for part in ("train", "val"):
        with pytest.raises(FileNotFoundError, match=f"no picture of '{part}'"):
            tiny_imagenet.load(tmp_path, part)


def test_bad_pictures_and_labels_are_named(tmp_path: Path) -> None:
    (tmp_path / "wnids.txt").write_text("n1\n")
    images = tmp_path / "train" / "n1" / "images"
    images.mkdir(parents=True)
    (images / "a.JPEG").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.JPEG cannot be read"):
        tiny_imagenet.load(tmp_path, "train")
    picture(0, 0).resize((32, 64)).save(images / "a.JPEG")
    with pytest.raises(ValueError, match=r"a\.JPEG is \(32, 64\).*64×64"):
        tiny_imagenet.load(tmp_path, "train")
    whole = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    pack(tmp_path, whole, torch.tensor([0, 1]), "val")
    with pytest.raises(ValueError, match=r"labels of 'val' run from 0 to 1, but .* 1 classes"):
        tiny_imagenet.load(tmp_path, "val")


# --- augmentation


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def where_from(crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of crops of a ramp, return left and right ends in 0…1 of the image, by extrapolation."""
    side = crops.shape[-1]
    middle = crops[:, side // 2, side // 4 : -side // 4]  # off the border, where values repeat
    step = (middle[:, -1] - middle[:, 0]) / (middle.shape[1] - 1)
    left = middle[:, 0] - step * (side // 4 + 0.5)
    assert torch.allclose(middle.diff(), step[:, None].expand(-1, middle.shape[1] - 1), atol=1e-4)
    return left, left + side * step


@pytest.mark.parametrize("side", [48, 64, 128])
def test_crops_are_boxes_of_the_allowed_size_one_for_each_image(side: int) -> None:
    ramp = (torch.arange(64) + 0.5) / 64
    x = ramp.expand(500, 64, 64)
    maps = torch.stack([x, x.mT, x], 1).contiguous()
    crops = augment.crop_and_flip(maps, side, 0.25, dice())
    assert crops.shape == (500, 3, side, side)
    left, right = where_from(crops[:, 0])
    top, bottom = where_from(crops[:, 1].mT)
    width, height = (right - left).abs(), bottom - top
    for ends in (left, right, top, bottom):
        assert ends.min() >= -0.001 and ends.max() <= 1.001
    area, ratio = width * height, width / height
    assert 0.2 <= area.min() < 0.3 and 0.9 < area.max() <= 1.001
    assert 3 / 4 - 0.01 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= 4 / 3 + 0.01
    assert len(left.round(decimals=4).unique()) > 400
    assert 200 < int((right < left).sum()) < 300  # mirrored
    assert (top < bottom).all()


def test_a_crop_of_everything_is_cut_off_where_it_is_wider_than_the_image() -> None:
    x = ((torch.arange(64) + 0.5) / 64).expand(200, 64, 64)
    crops = augment.crop_and_flip(torch.stack([x, x.mT, x], 1).contiguous(), 64, 1.0, dice(1))
    (left, right), (top, bottom) = where_from(crops[:, 0]), where_from(crops[:, 1].mT)
    sides = torch.stack([(right - left).abs(), bottom - top]).sort(0).values
    assert sides[1].min() > 0.999 and sides[0].min() > (3 / 4) ** 0.5 - 0.001


def test_colors_stay_in_range_and_keep_what_they_should() -> None:
    images = torch.rand(16, 3, 8, 8, generator=dice())
    assert torch.allclose(augment.change_colors(images, 0.0, dice()), images, atol=1e-6)
    changed = augment.change_colors(images, 0.4, dice())
    assert changed.min() >= 0 and changed.max() <= 1
    assert ((changed - images).abs().mean((1, 2, 3)) > 0.005).all()
    gray = images[:, :1].expand(-1, 3, -1, -1)
    varied = augment.change_colors(gray, 0.4, dice())
    assert torch.allclose(varied[:, 0], varied[:, 2], atol=1e-6)
    flat = torch.full((64, 3, 4, 4), 0.5)  # neither contrast nor saturation: brightness is left
    bright = augment.change_colors(flat, 0.4, dice())
    assert torch.allclose(bright, bright[:, :1, :1, :1].expand_as(bright), atol=1e-6)
    assert 0.3 <= bright.min() < 0.34 and 0.66 < bright.max() <= 0.7


def test_cutmix_pastes_boxes_and_knows_how_much_is_left() -> None:
    images = torch.arange(1.0, 33).view(-1, 1, 1, 1).expand(-1, 3, 24, 40).contiguous()
    mixed, other, kept = augment.cutmix(images, dice())
    own = mixed == images
    pasted = mixed == images[other]
    assert bool((own | pasted).all())
    for index in range(32):
        inside = ~own[index, 0]
        if other[index] != index:
            assert float(own[index, 0].float().mean()) == pytest.approx(float(kept[index]))
        if inside.any():
            rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
            box = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert bool(box.all())
    assert len(kept.unique()) > 16 and kept.min() < 0.5 < kept.max()


@pytest.mark.parametrize("preset", [{}, CPU, SMOKE])
def test_the_schedule_rises_falls_and_ends_large(preset: dict) -> None:
    recipe = Recipe(**preset)
    shares = [i / 200 for i in range(201)]
    rates = [recipe.rate_at(share) for share in shares]
    assert rates[0] == rates[-1] == 0
    assert max(rates) == pytest.approx(recipe.rate)
    assert np.argmax(rates) == pytest.approx(200 * recipe.warm_up, abs=1)
    assert recipe.sides_at(0) == tuple(s for s in recipe.sides if s <= recipe.first)
    largest = [max(recipe.sides_at(share)) for share in shares]
    assert largest == sorted(largest)
    assert recipe.sides_at(1) == recipe.last and min(recipe.last) >= max(recipe.sides)


# --- a whole run


def command(folder: Path, out: Path, *more: str) -> list[str]:
    options = ("--smoke", "--data", str(folder), "--out", str(out))
    return [sys.executable, "-m", "experiments.pretrain", *options, *more]


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=provenance.ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


def environment() -> dict[str, str]:
    here = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(provenance.ROOT)}
    return os.environ | here


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("whole") / "encoder.safetensors"
    done = launch(command(folder, out, "--log-every", "0"))
    assert done.returncode == 0, done.stderr
    return out, json.loads(out.with_suffix(".json").read_text())


@pytest.mark.slow
def test_a_smoke_run_learns(whole: tuple[Path, dict]) -> None:
    _, report = whole
    losses = [line["loss"] for line in report["history"]]
    assert len(losses) == 8 * (4 * TRAIN // SMOKE["batch"])
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert report["top1"]["48"] > 60  # of four classes
    assert report["images_seen"] == len(losses) * SMOKE["batch"]


@pytest.mark.slow
def test_the_weights_fit_torchvision_and_the_encoder(whole: tuple[Path, dict]) -> None:
    out, report = whole
    state = load_file(out)
    assert {t.dtype for t in state.values()} == {torch.float16, torch.int64}
    network = resnet18(num_classes=4)
    network.load_state_dict(state)
    encoder = ResNet18Encoder(out)
    assert torch.equal(encoder.get_parameter("features.conv1.weight"), network.conv1.weight)
    assert report["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(
    whole: tuple[Path, dict], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "encoder.safetensors"
    arguments = command(folder, out)
    process = subprocess.Popen(
        [*arguments, "--save-every", "0"], cwd=provenance.ROOT, env=environment()
    )
    state = out.with_suffix(".state")
    while not state.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < checkpoints.load(state)["step"] < len(whole[1]["history"])
    assert not out.exists()
    done = launch(arguments)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole[0].read_bytes()


@pytest.mark.slow
def test_other_settings_do_not_resume(whole: tuple[Path, dict], folder: Path) -> None:
    done = launch(command(folder, whole[0], "--rate", "0.3"))
    assert done.returncode != 0
    assert "other settings: {'rate': '0.05, now 0.3'}" in done.stderr


TOGETHER = """
import itertools, json, os, sys
from experiments.pretrain import __main__ as pretrain
from experiments.pretrain import tiny_imagenet
from experiments.pretrain.recipe import SMOKE, Recipe

clock = itertools.count(0, 1 + int(os.environ["RANK"]))  # one process's clock runs twice as fast
pretrain.time.perf_counter = lambda: next(clock)
recipe = Recipe(**{**SMOKE, "minutes": 0.2})
run = pretrain.Run(recipe, tiny_imagenet.load(sys.argv[1], "train"), 4)
choose, chosen = run._chosen, []

def noted():
    indices = choose()
    chosen.append(indices.tolist())
    return indices

run._chosen = noted
run.train(pretrain.Path(sys.argv[2], "run.state"), save_every=5, log_every=5)
weights = sum(float(w.double().abs().sum()) for w in run.network.parameters())
told = {"steps": run.step, "seconds": run.seconds, "weights": weights, "chosen": chosen}
pretrain.Path(sys.argv[2], f"rank{run.rank}.json").write_text(json.dumps(told))
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    options = ("--standalone", "--nproc-per-node", "2", *arguments)
    return launch([sys.executable, "-m", "torch.distributed.run", *options])


@pytest.mark.slow
def test_processes_share_the_batch_the_clock_and_the_weights(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    done = torchrun(str(script), str(folder), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
    for name in ("steps", "seconds", "weights"):
        assert first[name] == second[name]
    assert first["steps"] > 5
    for one, other in zip(first["chosen"], second["chosen"], strict=True):
        assert len(one) == len(other) == SMOKE["batch"] // 2
        assert len({*one, *other}) == SMOKE["batch"]
    (state,) = tmp_path.glob("*.state")
    assert checkpoints.load(state)["step"] == first["steps"]


@pytest.mark.slow
def test_two_processes_train_together(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder.safetensors"
    done = torchrun(*command(folder, out, "--epochs", "2")[1:])
    assert done.returncode == 0, done.stderr
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["settings"]["processes"] == 2
    assert report["images_seen"] == 2 * 4 * TRAIN
    assert done.stdout.count("SHA-256") == 1


def test_accuracy_is_that_of_torchmetrics(folder: Path) -> None:
    images, labels = tiny_imagenet.load(folder, "val")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 4, bias=False))
    precision = Precision("cpu", mixed=False)
    resize = v2.Resize((48, 48), antialias=True)
    with torch.no_grad():
        logits = network(normalize(resize(images.float() / 255).clamp(0, 1)))
    assert len(logits.argmax(1).unique()) == 4
    expected = multiclass_accuracy(logits, labels, num_classes=4, average="micro")
    found = pretrain.accuracy(network, (images, labels), 48, precision)
    assert found == pytest.approx(100 * float(expected), abs=0.01)


def test_a_loss_that_is_no_number_stops_and_leaves_the_state(folder: Path, tmp_path: Path) -> None:
    data = tiny_imagenet.load(folder, "val")
    run = pretrain.Run(Recipe(**{**SMOKE, "epochs": 1}), data, 4)
    state = tmp_path / "run.state"
    run.save(state)
    before = state.read_bytes()
    run.network.fc.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"lower --rate"):
        run.train(state, save_every=0, log_every=60)
    assert state.read_bytes() == before
    with pytest.raises(FloatingPointError, match=r"fc\.bias cannot be written as float16"):
        pretrain.write(run.network, tmp_path / "encoder.safetensors")
    assert not list(tmp_path.glob("*.safetensors*"))


@pytest.mark.slow
def test_a_start_is_used_and_remembered(
    whole: tuple[Path, dict], folder: Path, tmp_path: Path
) -> None:
    data = tiny_imagenet.load(folder, "val")
    started = pretrain.Run(Recipe(**SMOKE), data, 4, whole[0])
    assert torch.equal(started.network.conv1.weight.half(), load_file(whole[0])["conv1.weight"])
    started.save(tmp_path / "run.state")
    with pytest.raises(ValueError, match=f"'start': '{whole[1]['sha256']}, now None'"):
        pretrain.Run(Recipe(**SMOKE), data, 4).resume(tmp_path / "run.state")


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"minutes": -1}, {"batch": 0}])
def test_a_recipe_without_a_budget_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="budget and a batch above 0"):
        Recipe(**wrong)


def test_a_batch_that_cannot_be_filled_is_refused(folder: Path) -> None:
    data = tiny_imagenet.load(folder, "val")
    with pytest.raises(ValueError, match="batch of 64 does not fit 40 images"):
        pretrain.Run(Recipe(**{**SMOKE, "batch": 64}), data, 4)


# --- made the bundled one


CARD = """# A card

By hand.

<!-- file: written by make sync -->
<!-- end -->
<!-- top1: written by make sync -->
old
<!-- end -->
<!-- training: written by make sync -->
<!-- end -->
<!-- transfer: written by make sync -->
<!-- end -->
<!-- chosen: written by make sync -->
<!-- end -->

Also by hand.
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What adopting changes, and records to fill a card with."""
    for path in (adopt.BUNDLED, adopt.PINNED):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((provenance.ROOT / path).read_bytes())
    (tmp_path / model_card.CARD).write_text(CARD, encoding="utf-8")
    (tmp_path / "results").mkdir()
    measured = [
        {"data": data, "what": f"{name}, {how}", "miou": 10 * i + j + seed}
        for i, data in enumerate(("scenes", "streets"))
        for j, name in enumerate(("random", "first", "bundled"))
        for how in ("frozen", "fine-tuned")
        for seed in range(3)
    ]
    (tmp_path / "results" / "encoder.json").write_text(json.dumps(measured))
    compared = [{"encoder": name, "miou": 20.0} for name in ("random", "old", "new")]
    (tmp_path / "results" / "choice.json").write_text(json.dumps(compared))
    return tmp_path


@pytest.mark.slow
def test_adopting_copies_pins_and_reports(
    whole: tuple[Path, dict], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = whole
    with pytest.raises(ValueError, match="expected 200 classes"):
        adopt.adopt(out, repository)
    monkeypatch.setattr(adopt, "CLASSES", 4)
    (repository / adopt.BUNDLED).write_bytes(b"of an adoption that was interrupted")
    adopt.adopt(out, repository)
    assert (repository / adopt.BUNDLED).read_bytes() == out.read_bytes()
    pinned = (repository / adopt.PINNED).read_text(encoding="utf-8")
    assert f'BUNDLED_SHA256 = "{report["sha256"]}"' in pinned and BUNDLED_SHA256 not in pinned
    (kept,) = json.loads((repository / "results" / "pretrain.json").read_text(encoding="utf-8"))
    assert kept["top1"] == report["top1"]
    assert stale(kept, Tree()) == ["weights"]  # of the repository that is not the copy
    card = model_card.make_card(repository)
    assert report["sha256"] in card and f"{out.stat().st_size:,} bytes" in card
    assert f"| top-1 | {report['top1']['48']:.1f} % |" in card and "\nold\n" not in card
    assert (
        "| streets, fine-tuned | 11.0 (10.0–12.0) | 12.0 (11.0–13.0) | 13.0 (12.0–14.0) |" in card
    )
    assert "| mIoU, % | random | old | new |" in card
    assert card.startswith("# A card\n\nBy hand.\n") and card.endswith("\nAlso by hand.\n")
    (repository / model_card.CARD).write_text(card, encoding="utf-8")
    assert model_card.make_card(repository) == card


@pytest.mark.slow
def test_what_cannot_be_bundled_is_refused(
    whole: tuple[Path, dict], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    monkeypatch.setattr(adopt, "CLASSES", 4)
    monkeypatch.setattr(adopt, "LARGEST", 1000)
    with pytest.raises(ValueError, match="expected 1,000 at most"):
        adopt.adopt(whole[0], repository)
    other = tmp_path / "other.safetensors"
    pretrain.write(resnet18(num_classes=4), other)
    before[other] = other.read_bytes()
    report = other.with_suffix(".json")
    report.write_text(json.dumps(whole[1]), encoding="utf-8")
    before[report] = report.read_bytes()
    monkeypatch.setattr(adopt, "LARGEST", 1e9)
    with pytest.raises(ValueError, match=r"report beside other\.safetensors is about another file"):
        adopt.adopt(other, repository)
    assert before == {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}


def test_the_card_says_what_the_records_say() -> None:
    card = (provenance.ROOT / model_card.CARD).read_text(encoding="utf-8")
    assert model_card.make_card(provenance.ROOT) == card
    for where in ("scenes", "streets"):
        values = [
            r["miou"]
            for r in stored.load("encoder")
            if (r["data"], r["what"]) == (where, "bundled, frozen")
        ]
        assert len(values) >= 3
        said = f"{np.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"
        assert re.search(rf"{where}, frozen .*{re.escape(said)} \|$", card, re.MULTILINE)
