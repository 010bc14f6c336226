"""Asks what queries find and where they look: `python -m experiments.attention_probe`.

*Find*: one query per shape says from c4 whether its shape is in the scene and where its middle is.
*Masks*: the trials of `experiments.attention` on scenes. Both are reported by the number of objects
in the scene, with the share of the attention that lies on the query's own objects, on scenes that
no training saw; of the finders' answers it is also asked what covering a place of the image does,
and what taking positions away from a query does. 3 seeds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import records
from experiments.attention import TRIALS
from experiments.trials import SCENES, data
from helpers import scenes
from helpers.bridges.attention import (
    AveragingReader,
    Finder,
    QueryReader,
    attention_maps,
    finder_loss,
    presence_and_middle,
)
from helpers.encoder import Segmenter, normalize
from helpers.inspection import count_macs, count_parameters
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import fit, predict

NAME = "attention_probe"
CODE = "experiments/attention_probe.py"
BRIDGES = "helpers/bridges/attention.py"
REPORT = range(20_000, 20_600)
GROUPS = ((2, 3), (4, 5), (6, 7))  # objects in a scene
CLASSES = scenes.CLASSES
SHAPES = len(scenes.SHAPES)

FIND_ON = range(2_000)
EPOCHS, BATCH, RATE = 15, 32, 2e-3
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
    encoder = TRIALS["fixed head"].model(0, len(CLASSES)).encoder
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


def provenance(*sources: str) -> dict[str, Any]:
    """Return what a record comes from; asked for before the code can change."""
    return records.provenance(*sources, versions=["weights", "scenes", "training", "metrics"])


def save(task: str, what: str, seed: int, found: dict[str, Any]) -> None:
    record = {"task": task, "what": what, "seed": seed, **found}
    record["command"] = f"python -m experiments.{NAME}"
    records.append(NAME, record, key=("task", "what", "seed"))
    print(task, what, seed, record.get("miou", record.get("presence")), flush=True)


# --- find


def find(what: str, seed: int) -> None:
    start = time.perf_counter()
    used = ("QueryReader", "AveragingReader", "Finder", "finder_loss", "presence_and_middle")
    sources = [f"{BRIDGES}::{name}" for name in (*used, "attention_maps")]
    origin = provenance(f"{CODE}::find", f"{CODE}::FINDERS", *sources)
    maps, masks, _ = seen(FIND_ON)
    torch.manual_seed(seed)
    finder = Finder(FINDERS[what]())
    train(finder, maps, presence_and_middle(masks, len(CLASSES)), seed)
    finder.eval()
    maps, masks, counts = seen(REPORT)
    truth = presence_and_middle(masks, len(CLASSES))
    with torch.no_grad():
        said = finder(maps)
    found: dict[str, Any] = scores(said, truth)
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
    found["seconds"] = round(time.perf_counter() - start, 1)
    save("find", what, seed, found | {"provenance": origin})


def train(finder: Finder, maps: Tensor, truth: Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(finder.parameters(), RATE)
    steps = EPOCHS * -(-len(maps) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.2)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(maps)).split(BATCH):
            loss = finder_loss(finder(maps[chosen]), truth[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


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
        for kind, pairs in self.pairs.items():
            before, after = torch.tensor(pairs).T
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
    encoder = TRIALS["fixed head"].model(0, len(CLASSES)).encoder
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


def masks(what: str, seed: int) -> None:
    start = time.perf_counter()
    training, _ = data("scenes")
    model = TRIALS[what].model(seed, len(CLASSES))
    sources = [f"{CODE}::masks", f"{BRIDGES}::attention_maps", "experiments/trials.py::SCENES"]
    origin = provenance(*sources, *TRIALS[what].sources(model))
    pyramid = model.encoder(normalize(training[0][0][None]))
    history = fit(
        model,
        training,
        epochs=SCENES.epochs,
        batch_size=SCENES.batch_size,
        rate=SCENES.rate,
        loss=SegmentationLoss(class_weights=class_weights((m for _, m in training), len(CLASSES))),
        seed=seed,
        mixed=SCENES.mixed,
    )
    counts = [confusion(model, few, many) for few, many in GROUPS]
    found: dict[str, Any] = {
        "miou": miou(torch.stack(counts).sum(0)),
        "by_objects": {
            f"{few}–{many}": miou(count) for (few, many), count in zip(GROUPS, counts, strict=True)
        },
        "loss": [round(value, 4) for value in history.loss],
        "parameters": count_parameters(model.decoder),
        "macs": count_macs(model.cpu().decoder, pyramid),
    }
    if what == "attending queries":
        maps, truth, _ = seen(REPORT)
        reader = model.cpu().decoder.reader.eval()  # type: ignore[union-attr]
        found["on_objects"] = on_objects(attention_maps(reader, maps), truth, first=0)
    if what == "gates":
        found["gates"] = gates(model)
    found["seconds"] = round(time.perf_counter() - start, 1)
    save("masks", what, seed, found | {"provenance": origin})


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


def main() -> None:
    """Run what is missing; with `find` or `masks`, only that."""
    if os.environ.get("BOOK_WEIGHTS"):
        sys.exit("BOOK_WEIGHTS is set, and would measure another encoder: unset it.")
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["find", "masks"]
    tasks: dict[str, tuple[Any, Callable[[str, int], None]]] = {
        "find": (FINDERS, find),
        "masks": (TRIALS, masks),
    }
    for task in wanted:
        names, measure = tasks[task]
        for seed in range(3):
            for what in names:
                if not records.is_done(NAME, task=task, what=what, seed=seed):
                    partial(measure, what, seed)()


if __name__ == "__main__":
    main()
