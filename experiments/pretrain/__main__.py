"""Trains the bundled encoder on Tiny ImageNet: `python -m experiments.pretrain --data FOLDER`.

The same command again goes on where an interrupted one stood. On several GPUs:
`torchrun --nproc-per-node 4 -m experiments.pretrain --data FOLDER`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.models import resnet18

from experiments.pretrain import augment, tiny_imagenet
from experiments.pretrain.recipe import CPU, SMOKE, Recipe
from helpers.encoder import load_file, normalize
from helpers.training import Precision, checkpoints

OUT = Path(".cache/pretrain/encoder.safetensors")
MEASURED = (64, 96, 112, 128, 160)  # sides, in pixels, to tell the accuracy at
Data = tuple[Tensor, Tensor]  # images as bytes [N, 3, 64, 64], labels [N]


class Run:
    """One training: where it stands, how it is saved, how it goes on.

    Everything random comes from the recipe's seed and the number of the step, so a run that is
    resumed ends with the very weights of one that was not: on a CPU, with a budget in epochs (how
    far minutes reach depends on the machine; a GPU adds in no fixed order). Raises `ValueError`
    for a batch that the data or the processes cannot fill.
    """

    def __init__(self, recipe: Recipe, data: Data, classes: int, start: Path | None = None):
        self.recipe = recipe
        self.rank, self.world = _place()
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.precision = Precision(gpu, recipe.mixed)
        self.device = self.precision.device
        self.images, self.labels = (part.to(self.device) for part in data)
        if recipe.batch > len(self.images) or recipe.batch % self.world:
            raise ValueError(
                f"A batch of {recipe.batch} does not fit {len(self.images)} images and "
                f"{self.world} processes: take one that is smaller, and a multiple of {self.world}."
            )
        self.steps_per_epoch = len(self.images) // recipe.batch
        self.settings = {
            **json.loads(json.dumps(asdict(recipe))),
            "start": start and hashlib.sha256(start.read_bytes()).hexdigest(),
            "images": len(self.images),
            "classes": classes,
            "processes": self.world,
        }
        torch.manual_seed(recipe.seed)
        network = resnet18(num_classes=classes)
        if start:
            network.load_state_dict(load_file(start))
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.model = DistributedDataParallel(network) if self.world > 1 else network
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
        weights = list(network.parameters())
        self.optimizer = torch.optim.SGD(
            [
                {"params": [w for w in weights if w.ndim > 1], "weight_decay": recipe.decay},
                {"params": [w for w in weights if w.ndim <= 1]},
            ],
            lr=recipe.rate,
            momentum=recipe.momentum,
            nesterov=True,
        )
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []

    @property
    def share(self) -> float:
        """How much of the budget is spent, 0…1."""
        if self.recipe.minutes:
            return min(self.seconds / (60 * self.recipe.minutes), 1.0)
        return min(self.step / (self.recipe.epochs * self.steps_per_epoch), 1.0)

    def train(self, state: Path, save_every: float, log_every: float) -> None:
        """Go on until the budget is spent; both intervals are in seconds.

        Raises `FloatingPointError` where the loss is no number any more; `state` stays as it was.
        """
        before = saved = logged = self.seconds
        start = time.perf_counter()
        sums, count = torch.zeros(2, device=self.device), 0
        while self.share < 1:
            sums += self._step()
            count += 1
            self.seconds = self._agreed(before + time.perf_counter() - start)
            logs = self.seconds - logged >= log_every or self.share >= 1
            saves = self.seconds - saved >= save_every or self.share >= 1
            if logs or saves:
                self._check(sums)
            if logs:
                self._log(*(sums / count).tolist())
                sums, count, logged = torch.zeros_like(sums), 0, self.seconds
            if saves:
                self.save(state)
                saved = self.seconds

    def _check(self, sums: Tensor) -> None:
        if not sums.isfinite().all():
            raise FloatingPointError(
                f"The loss is {float(sums[0])} before step {self.step}: the rate of "
                f"{self.recipe.rate} is too high for batches of {self.recipe.batch}. Train anew "
                "with a lower --rate, and another --out or without the old state."
            )

    def _step(self) -> Tensor:
        """Train on one batch; return its loss and its accuracy, 0…1."""
        recipe, share = self.recipe, self.share
        common = random.Random(f"{recipe.seed} {self.step}")  # the same in all processes
        dice = torch.Generator(self.device).manual_seed(common.getrandbits(40) + self.rank)
        side = common.choice(recipe.sides_at(share))
        mixes = common.random() < recipe.cutmix and not recipe.is_last(share)
        chosen = self._chosen()
        labels = others = self.labels[chosen]
        kept = torch.ones(len(labels), device=self.device)
        images = augment.crop_and_flip(self._pixels(chosen), side, recipe.smallest_crop, dice)
        images = augment.change_colors(images, recipe.colors, dice)
        if mixes:
            images, other, kept = augment.cutmix(images, dice)
            others = labels[other]
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(share)
        self.model.train()
        with self.precision.autocast():
            logits = self.model(_ready(images))
        own, pasted = (self._loss(logits.float(), each) for each in (labels, others))
        loss = (kept * own + (1 - kept) * pasted).mean()
        self.precision.step(loss, self.optimizer)
        self.average.update_parameters(self.network)
        self.step += 1
        return torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.recipe.smoothing
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")

    def _chosen(self) -> Tensor:
        """Return the indices of this step's images: each epoch has its own order."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        dice = torch.Generator().manual_seed(1000 * self.recipe.seed + epoch)
        order = torch.randperm(len(self.images), generator=dice)
        mine = self.recipe.batch // self.world
        first = place * self.recipe.batch + self.rank * mine
        return order[first : first + mine].to(self.device)

    def _pixels(self, chosen: Tensor) -> Tensor:
        return self.images[chosen].float() / 255

    def _agreed(self, seconds: float) -> float:
        """Return process 0's time: by their own clocks, processes would train differently."""
        if self.world == 1:
            return seconds
        shared = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def _log(self, loss: float, accuracy: float) -> None:
        line = {
            "minutes": round(self.seconds / 60, 1),
            "epoch": round(self.step / self.steps_per_epoch, 2),
            "largest side": max(self.recipe.sides_at(self.share)),
            "rate": round(self.recipe.rate_at(self.share), 4),
            "loss": round(loss, 4),
            "accuracy": round(100 * accuracy, 2),
        }
        self.history.append(line)
        if self.rank == 0:
            print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)

    def save(self, path: Path) -> None:
        """Write all that `resume` needs; process 0 does it for all."""
        if self.rank:
            return
        state = {name: getattr(self, name) for name in ("step", "seconds", "history", "settings")}
        state |= {name: part.state_dict() for name, part in self._parts().items()}
        checkpoints.save(path, state)

    def _parts(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "average": self.average,
            "optimizer": self.optimizer,
            "scaler": self.precision.scaler,
        }

    def resume(self, path: Path) -> None:
        """Take over where a saved run stood; raises `ValueError` for one of other settings."""
        state = checkpoints.load(path)
        then, now = state["settings"], self.settings
        changed = {k: f"{then.get(k)}, now {now[k]}" for k in now if then.get(k) != now[k]}
        if changed:
            raise ValueError(
                f"{path} belongs to a training with other settings: {changed}. Give the same "
                "options on the same kind of device (a CPU has other defaults than a GPU), or "
                "another --out, or delete the file to start anew."
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds, self.history = (
            state[name] for name in ("step", "seconds", "history")
        )

    def finished(self) -> nn.Module:
        """Return the averaged network with BatchNorm's statistics taken anew, in evaluation."""
        network = resnet18(num_classes=self.network.fc.out_features)
        network.load_state_dict(self.average.module.state_dict())
        network = network.to(self.device, memory_format=torch.channels_last)
        with self.precision.autocast():
            update_bn(self._plain(), network)
        return network.eval()

    def _plain(self) -> Iterator[Tensor]:
        """Yield training images as in the last phase, in their own colours."""
        recipe = self.recipe
        dice = torch.Generator(self.device).manual_seed(recipe.seed)
        for index in range(recipe.recalibrate):
            size = (min(recipe.batch, 256),)
            chosen = torch.randint(len(self.images), size, generator=dice, device=self.device)
            side = recipe.last[index % len(recipe.last)]
            pixels = self._pixels(chosen)
            yield _ready(augment.crop_and_flip(pixels, side, recipe.smallest_crop, dice))


@torch.no_grad()
def accuracy(network: nn.Module, data: Data, side: int, precision: Precision) -> float:
    """Return top-1 in percent on whole images, resized to `side` pixels (bilinear)."""
    right = 0
    for images, labels in zip(*(part.split(250) for part in data), strict=True):
        pixels = images.to(precision.device).float() / 255
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        with precision.autocast():
            logits = network(_ready(pixels.clamp(0, 1)))
        right += int((logits.argmax(1).cpu() == labels).sum())
    return round(100 * right / len(data[0]), 2)


def write(network: nn.Module, path: Path) -> str:
    """Write a float16 state dict for torchvision's `resnet18`, atomically; return its SHA-256.

    Raises `FloatingPointError` for values that float16 cannot hold.
    """
    tensors = {
        name: (each.half() if each.is_floating_point() else each).cpu().contiguous()
        for name, each in network.state_dict().items()
    }
    wrong = [name for name, each in tensors.items() if not each.isfinite().all()]
    if wrong:
        raise FloatingPointError(f"{', '.join(wrong)} cannot be written as float16.")
    # One entry only: safetensors writes several in random order, and the hash would change.
    notes = {"made_by": "experiments.pretrain, a torchvision resnet18"}
    part = path.with_name(f"{path.name}.part")
    save_file(tensors, part, metadata=notes)
    os.replace(part, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _ready(images: Tensor) -> Tensor:
    return normalize(images).contiguous(memory_format=torch.channels_last)


def _place() -> tuple[int, int]:
    """Return this process's rank and how many there are; join them where torchrun says so."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, type=Path, help="Tiny ImageNet's folder")
    parser.add_argument("--out", type=Path, help=f"default {OUT}; state and report lie beside it")
    parser.add_argument("--start", type=Path, help="weights to begin with (safetensors)")
    parser.add_argument("--smoke", action="store_true", help="a small try on a few images")
    parser.add_argument("--mixed", action="store_true", default=None, help="bfloat16 on a CPU")
    parser.add_argument("--save-every", type=float, default=300, help="seconds")
    parser.add_argument("--log-every", type=float, default=60, help="seconds; 0: every step")
    for name in ("epochs", "minutes", "batch", "rate", "first", "seed"):
        parser.add_argument(f"--{name}", type=type(getattr(Recipe, name)))
    given = parser.parse_args(arguments)
    chosen = {k: v for k, v in vars(given).items() if k in asdict(Recipe()) and v is not None}
    preset = SMOKE if given.smoke else {} if torch.cuda.is_available() else CPU
    recipe = Recipe(**preset | chosen)
    train, unseen = (tiny_imagenet.load(given.data, part) for part in ("train", "val"))
    if given.smoke:
        train, unseen = _few(train), _few(unseen)
    run = Run(recipe, train, len(tiny_imagenet.classes(given.data)), given.start)
    given.out = given.out or (OUT.with_stem("smoke") if given.smoke else OUT)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    state = given.out.with_suffix(".state")
    if state.exists():
        run.resume(state)
    run.train(state, given.save_every, given.log_every)
    if run.rank == 0:
        flags = [
            f"--{name}" if value is True else f"--{name} {value}" for name, value in chosen.items()
        ]
        flags += ["--smoke"] * given.smoke + ["--start FILE"] * bool(given.start)
        _report(run, given.out, unseen, " ".join([parser.prog, "--data FOLDER", *flags]))
    if dist.is_initialized():
        dist.destroy_process_group()


def _few(data: Data) -> Data:
    """Return at most 320 images, of the first eight classes."""
    images, labels = (part[data[1] < 8] for part in data)
    step = -(-len(labels) // 320)
    return images[::step], labels[::step]


def _report(run: Run, out: Path, unseen: Data, command: str) -> None:
    """Write the finished weights and, beside them, how they were made and how good they are."""
    digest = write(run.finished(), out)
    network = resnet18(num_classes=run.settings["classes"])  # as the file has it
    network.load_state_dict(load_file(out))
    network = network.to(run.device, memory_format=torch.channels_last).eval()
    exact = Precision(run.device, mixed=False)
    sides = sorted({*MEASURED, *run.recipe.last})
    report = {
        "sha256": digest,
        "top1": {side: accuracy(network, unseen, side, exact) for side in sides},
        "command": command,
        "settings": run.settings,
        "images_seen": run.step * run.recipe.batch,
        "minutes": round(run.seconds / 60, 1),
        "device": run.device.type,
        "torch": torch.__version__.split("+")[0],
        "history": run.history,
    }
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: SHA-256 {digest}, top-1 in % by side {report['top1']}")


if __name__ == "__main__":
    main()
