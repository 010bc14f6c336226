"""Asks what queries find and where they look: `results/attention_probe.json`.

*Find*: one query per shape says from c4 whether its shape is in the scene and where its middle is.
*Masks*: the chapter's trials on scenes. Both are reported by the number of objects
in the scene, with the share of the attention that lies on the query's own objects, on scenes that
no training saw; of the finders' answers it is also asked what covering a place of the image does,
and what taking positions away from a query does. 3 seeds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.chapters.attention.trials import TRIALS
from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import SETTINGS, Trial, pairs, train_on
from helpers import scenes
from helpers.bridges.attention import (
    AveragingReader,
    Finder,
    QueryReader,
    SpatialGate,
    attention_maps,
    finder_loss,
    presence_and_middle,
)
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.inspection import count_macs, count_parameters
from helpers.training import minimise, predict

NAME = "attention_probe"
REPORT = range(20_000, 20_600)
GROUPS = ((2, 3), (4, 5), (6, 7))  # objects in a scene
CLASSES = scenes.CLASSES
SHAPES = len(scenes.SHAPES)

FIND_ON = range(2_000)
EPOCHS, BATCH, LR = 15, 32, 2e-3
COVERED = 120  # of the scenes to report on
SIDE = 32  # pixels: about the width of what is covered
DROPPED = 4  # of the 64 positions


def without_positions(reader: QueryReader) -> QueryReader:
    reader.position = nn.Identity()
    return reader


FINDERS: dict[str, Callable[[], QueryReader]] = {
    "attending": lambda: QueryReader(256, SHAPES),
    "averaging": lambda: AveragingReader(256, SHAPES),
    "attending, no positions": lambda: without_positions(QueryReader(256, SHAPES)),
}


# --- what both tasks share


@lru_cache(maxsize=2)
@torch.no_grad()
def seen(indices: range) -> tuple[Tensor, Tensor, Tensor]:
    """Return c4 `[N, 256, 8, 8]`, masks `[N, H, W]` and numbers of objects `[N]` of scenes."""
    encoder = ResNet18Encoder()
    maps, masks = [], []
    for start in indices[::50]:
        images, some = scenes.batch(range(start, min(start + 50, indices.stop)))
        maps.append(encoder(normalize(images)).c4)
        masks.append(some)
    counts = [len(scenes.scene(index).objects) for index in indices]
    return torch.cat(maps), torch.cat(masks), torch.tensor(counts)


def on_objects(looks: Tensor, masks: Tensor, first: int) -> dict[str, dict[str, float]]:
    """Return the share of the attention that lies on a query's own objects, in %, by class.

    `looks` is `[N, queries, h, w]`, the queries those of the classes from `first` on. Beside it,
    *chance*: that of weights which are all the same; *best*: that of all weight on one position;
    *largest*: the weight of the position that it looks at most.
    """
    one_hot = F.one_hot(masks, len(CLASSES))[..., first:].movedim(-1, 1).float()
    share = F.adaptive_avg_pool2d(one_hot, looks.shape[-2:]).flatten(2)
    present = share.sum(2) > 0
    looks = looks.flatten(2)
    kinds = {
        "attention": (looks * share).sum(2),
        "chance": share.mean(2),
        "best": share.amax(2),
        "largest": looks.amax(2),  # weight of a single position, wherever it lies
    }
    return {
        kind: {
            name: round(100 * values[present[:, k], k].mean().item(), 2)
            for k, name in enumerate(CLASSES[first:])
        }
        for kind, values in kinds.items()
    }


# --- find


def find(what: str, seed: int) -> Record:
    maps, masks, _ = seen(FIND_ON)
    torch.manual_seed(seed)
    finder = Finder(FINDERS[what]())
    truth = presence_and_middle(masks, len(CLASSES))

    def loss_of(chosen: Tensor, epoch: int) -> Tensor:
        return finder_loss(finder(maps[chosen]), truth[chosen])

    minimise(finder, loss_of, len(maps), epochs=EPOCHS, lr=LR, batch_size=BATCH, seed=seed)
    maps, masks, counts = seen(REPORT)
    truth = presence_and_middle(masks, len(CLASSES))
    with torch.no_grad():
        said = finder(maps)
    found: Record = scores(said, truth)
    found["by_objects"] = {
        str(count): scores(said[counts == count], truth[counts == count])
        for count in counts.unique().tolist()
    }
    middles = truth[..., 1:].where(truth[..., :1] > 0, torch.nan).flatten(0, 1).nanmean(0)
    found["middle_by_chance"] = scores(
        middles.new_zeros(said.shape) + F.pad(middles, (1, 0)), truth
    )["middle"]
    if what != "averaging":
        looks = attention_maps(finder.reader, maps)
        found["on_objects"] = on_objects(looks, masks, first=1)
        found["covered"] = covered(finder, looks[:COVERED], truth[:COVERED], seed)
        found["dropped"] = dropped(finder, maps, looks, truth, seed)
    return found


def scores(said: Tensor, truth: Tensor) -> dict[str, float]:
    """Return balanced accuracy of *is it there?* (%) and the middle's mean error (pixels)."""
    there, present = said[..., 0] > 0, truth[..., 0] > 0
    right = 50 * (there[present].float().mean() + (~there[~present]).float().mean())
    off = scenes.SIZE * (said[..., 1:] - truth[..., 1:]).norm(dim=2)
    return {"presence": round(right.item(), 2), "middle": round(off[present].mean().item(), 2)}


class Falls:
    """How *it is there* changes when something is taken away: logits before and after, by kind."""

    KINDS = ("own", "another", "anywhere")

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in self.KINDS}

    def add(self, kind: str, before: Tensor, after: Tensor) -> None:
        self.pairs[kind].append((before.item(), after.item()))

    def summary(self) -> dict[str, Any]:
        """Return by kind the mean fall, its mean size, and how many % of the answers turn to no."""
        found: dict[str, Any] = {"number": len(self.pairs["own"])}
        for kind, logits in self.pairs.items():
            before, after = torch.tensor(logits).T
            values = (before - after, (before - after).abs(), 100.0 * (after < 0))
            found[kind] = {
                name: round(value.mean().item(), 3)
                for name, value in zip(("fall", "size", "lost"), values, strict=True)
            }
        return found


def asked(said: Tensor, truth: Tensor) -> list[int]:
    """Return the queries whose shape is in a scene and that say so. Both are `[queries, 3]`."""
    return ((said[:, 0] > 0) & (truth[:, 0] > 0)).nonzero().flatten().tolist()


@torch.no_grad()
def covered(finder: Finder, looks: Tensor, truth: Tensor, seed: int) -> dict[str, Any]:
    """Cover a place of the image: where the query looks most, where another one does, or any.

    The last two lie at least `SIDE` pixels beside the first; where no other query of the scene
    looks that far away, nothing is asked.
    """
    encoder = ResNet18Encoder()
    generator = torch.Generator().manual_seed(seed)
    cell = scenes.SIZE // looks.shape[-1]
    peaks = looks.flatten(2).argmax(2)  # [N, queries]
    peaks = torch.stack([peaks // looks.shape[-1], peaks % looks.shape[-1]], 2) * cell + cell // 2
    falls = Falls()
    for index in range(len(looks)):
        image = scenes.batch([REPORT.start + index])[0]
        before = finder(encoder(normalize(image)).c4)[0]
        queries = asked(before, truth[index])
        for query in queries:
            here = peaks[index, query]
            others = [peaks[index, k] for k in queries if far(peaks[index, k], here)]
            spots = torch.randint(0, scenes.SIZE, (100, 2), generator=generator)
            spots = spots[[far(spot, here) for spot in spots]]
            if others:
                chosen = int(torch.randint(len(others), (1,), generator=generator))
                places = (here, others[chosen], spots[0])
                pictures = torch.cat([cover(image, place) for place in places])
                after = finder(encoder(normalize(pictures)).c4)[:, query, 0]
                for kind, value in zip(Falls.KINDS, after, strict=True):
                    falls.add(kind, before[query, 0], value)
    return falls.summary()


def far(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() >= SIDE)


def cover(image: Tensor, spot: Tensor) -> Tensor:
    """Fade the image `[1, 3, H, W]` to its mean colour around (row, column), without an edge."""
    rows, columns = (
        torch.exp(-((torch.arange(length) - middle) ** 2) / (2 * (SIDE / 3) ** 2))
        for length, middle in zip(image.shape[-2:], spot, strict=True)
    )
    mean = image.mean((2, 3), keepdim=True)
    return torch.lerp(image, mean.expand_as(image), rows[:, None] * columns)


@torch.no_grad()
def dropped(finder: Finder, maps: Tensor, looks: Tensor, truth: Tensor, seed: int) -> Any:
    """Take `DROPPED` positions away from a query: those it looks at most, another's, or any.

    The image and its map stay as they are. Another's and any are none of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    reader, falls = finder.reader, Falls()
    positions = looks[0, 0].numel()
    most = looks.flatten(2).topk(DROPPED).indices.tolist()  # [N, queries, DROPPED]
    for index in range(len(looks)):
        tokens = reader.tokens(maps[index : index + 1])
        before = finder(maps[index : index + 1])[0]
        queries = asked(before, truth[index])
        for query in queries:
            own = set(most[index][query])
            others = [most[index][k] for k in queries if not own & set(most[index][k])]
            if not others:
                continue
            chosen = int(torch.randint(len(others), (1,), generator=generator))
            order = torch.randperm(positions, generator=generator).tolist()
            anywhere = [place for place in order if place not in own][:DROPPED]
            for kind, gone in zip(Falls.KINDS, (own, others[chosen], anywhere), strict=True):
                kept = [place for place in range(positions) if place not in gone]
                answer = finder.answer(reader.layers(reader.queries[None], tokens[:, kept]))
                falls.add(kind, before[query, 0], answer[0, query, 0])
    return falls.summary()


# --- masks


def masks(trial: Trial, seed: int) -> Record:
    setting = SETTINGS["scenes"]
    training, _ = pairs(setting)
    model = trial.model(seed, len(CLASSES))
    pyramid = model.encoder(normalize(training[0][0][None]))
    loss = train_on(model, training, setting, seed)
    counts = [confusion(model, few, many) for few, many in GROUPS]
    found: Record = {
        "miou": miou(torch.stack(counts).sum(0)),
        "by_objects": {
            f"{few}–{many}": miou(count) for (few, many), count in zip(GROUPS, counts, strict=True)
        },
        "loss": loss,
        "parameters": count_parameters(model.decoder),
        "macs": count_macs(model.cpu().decoder, pyramid),
    }
    reader = getattr(model.decoder, "reader", None)
    if type(reader) is QueryReader:
        maps, truth, _ = seen(REPORT)
        found["on_objects"] = on_objects(attention_maps(reader.eval(), maps), truth, first=0)
    if any(isinstance(part, SpatialGate) for part in model.decoder.modules()):
        found["gates"] = gates(model)
    return found


def confusion(model: Segmenter, few: int, many: int) -> Tensor:
    """Return how often a class (row) was taken for another (column), in scenes of some objects."""
    size = len(CLASSES)
    total = torch.zeros(size**2, dtype=torch.long)
    chosen = [index for index in REPORT if few <= len(scenes.scene(index).objects) <= many]
    for start in range(0, len(chosen), 50):
        images, truth = scenes.batch(chosen[start : start + 50])
        pairs = truth * size + predict(model, images)
        total += torch.bincount(pairs.flatten(), minlength=size**2)
    return total.view(size, size)


def miou(counts: Tensor) -> float:
    right = counts.diagonal()
    return round((100 * right / (counts.sum(0) + counts.sum(1) - right)).mean().item(), 2)


@torch.no_grad()
def gates(model: Segmenter) -> dict[str, list[float]]:
    """Return how far the gates at c2 to c5 are open on objects and on background, means."""
    model.cpu().eval()
    images, truth = scenes.batch(REPORT[:100])
    objects = (truth > 0).float()[:, None]
    found = {}
    maps = model.encoder(normalize(images))
    for name, gated in zip(maps._fields[1:], model.decoder.pixels.project, strict=True):  # type: ignore
        opened = gated[0].gate(getattr(maps, name))
        share = F.adaptive_avg_pool2d(objects, opened.shape[-2:])
        found[name] = [round(((opened * s).sum() / s.sum()).item(), 3) for s in (share, 1 - share)]
    return found


TASKS = {"find": FINDERS, "masks": TRIALS}


def measure(task: str, what: str, seed: int) -> Record:
    return find(what, seed) if task == "find" else masks(TRIALS[what], seed)


def entries(task: str, what: str, seed: int) -> Iterator[str]:
    yield f"experiments/chapters/attention/analysis.py::{task}"
    if task == "masks":
        yield f'experiments/chapters/attention/trials.py::TRIALS["{what}"]'


SWEEPS = {NAME: Sweep(NAME, partial(measure), key=("task", "what", "seed"), entries=entries)}


def main(given: Sequence[str] | None = None) -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))

    said = arguments(__doc__, [*FINDERS, *TRIALS], given=given, more=more)
    tasks = [
        {"task": task, "what": what, "seed": seed}
        for task, seed in itertools.product(said.task, range(said.seeds))
        for what in TASKS[task]
        if what in said.only
    ]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
