"""Measures what captioners gain by seeing positions: `results/sequences.json`.

Each of `TRIALS` learns by teacher forcing, from maps of the frozen encoder, to say which two
objects of a scene are the most visible, and how they lie; see `asked` for the scenes that are
taken. It is reported on scenes that no training saw: whole sentences, phrases, words by their kind,
by the number of objects and by relation; greedy against beam search; how much attention lies on the
object that is named. 3 seeds. `--choose` measures, on scenes below 10,000, which learning rate
suits the GRU and the Transformer.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from helpers import scenes
from helpers.bridges.sequences import (
    END,
    PAD,
    START,
    AverageTokens,
    CaptionTransformer,
    PositionTokens,
    StateGRU,
    Vocabulary,
    beam_search,
    caption_loss,
    greedy,
    log_likelihood,
)
from helpers.encoder import OUT_CHANNELS, Pyramid, ResNet18Encoder, normalize
from helpers.inspection import count_parameters
from helpers.training import minimise, one_cycle

NAME = "sequences"
WORDS = Vocabulary(scenes.VOCABULARY)
TRAIN = (range(10_000, 37_000), range(46_000, 73_000))
REPORT, TUNE = range(40_000, 45_500), range(5_000, 9_000)
VISIBLE = 150  # pixels that both objects show
BEAMS, LONGEST = 4, 16
BATCH, CLIP, PORTION = 32, 1.0, 50
LRS, TRIED_EPOCHS, TRIED_SEED = (1e-3, 2e-3, 4e-3), 12, 100  # on half of the scenes
LR, EPOCHS = 2e-3, 6  # chosen; as many steps
KINDS = {
    "size": ("small", "large", "short", "long"),
    "colour": tuple(scenes.COLORS),
    "shape": scenes.SHAPES,
    "relation": ("above", "below", "left", "right", "in"),
}
JOINTS = r" (?:in front of|above|below|left of|right of|and) "


# --- scenes and what is asked of them


def singles(scene: scenes.Scene) -> list[scenes.Object]:
    """Return the objects that are the only ones of their shape, the most visible first."""
    shapes = Counter(each.shape for each in scene.objects)
    alone = [each for each in scene.objects if shapes[each.shape] == 1]
    return sorted(alone, key=lambda each: -each.pixels)


def asked(scene: scenes.Scene) -> str | None:
    """Return how the two most visible single objects lie, or None where one is hard to see."""
    two = singles(scene)[:2]
    if len(two) < 2 or min(each.pixels for each in two) < VISIBLE:
        return None
    return scene.caption.split(" with ")[0]


def is_close(scene: scenes.Scene) -> bool:
    """Tell whether a hair decides who is named, who first, or how they lie."""
    first, second, *others = singles(scene)
    if any(other.pixels > 0.8 * second.pixels for other in others):
        return True
    in_front = " in front of " in scene.caption
    across = abs(abs(first.x - second.x) - abs(first.y - second.y))
    return not in_front and (second.pixels > 0.8 * first.pixels or across < 6)


def cover(mask: Tensor, sentence: str) -> Tensor:
    """Return how much of each token's cell the two named objects cover, `[2, 64 + 16]`."""
    named = [word for word in sentence.split() if word in scenes.SHAPES]
    pixels = torch.stack([(mask == scenes.CLASSES.index(shape)).float() for shape in named])
    return torch.cat([F.avg_pool2d(pixels, stride).flatten(1) for stride in (16, 32)], dim=1)


class Part(NamedTuple):
    """Scenes as captioners need them; the maps in float16, `[N, 256, 8, 8]`, `[N, 512, 4, 4]`."""

    c4: Tensor
    c5: Tensor
    sentences: list[str]
    counts: list[int]  # of objects
    close: list[bool]
    covers: Tensor  # [N, 2, 80]

    @property
    def words(self) -> Tensor:
        return WORDS.encode(self.sentences)

    def pyramid(self, chosen: Tensor | slice, blind: bool) -> Pyramid:
        """Return maps of the chosen scenes; the finer ones, which nobody reads, are empty.

        For the blind they are zeros, one position each.
        """
        c4, c5 = self.c4[chosen].float(), self.c5[chosen].float()
        if blind:
            c4, c5 = (0 * map_[..., :1, :1] for map_ in (c4, c5))
        return Pyramid(*(c4.new_zeros(len(c4), c, 1, 1) for c in OUT_CHANNELS[:3]), c4, c5)


@lru_cache(maxsize=2)
@torch.no_grad()
def part(*ranges: range) -> Part:
    """Return the scenes that are taken from these."""
    encoder, maps, found = ResNet18Encoder(), [], []
    for indices in ranges:
        taken = (scene for index in indices if asked(scene := scenes.scene(index)))
        while some := list(itertools.islice(taken, PORTION)):
            pyramid = encoder(normalize(torch.stack([torch.from_numpy(s.image) for s in some])))
            maps.append((pyramid.c4.half(), pyramid.c5.half()))
            for scene in some:
                sentence = str(asked(scene))
                covers = cover(torch.from_numpy(scene.mask), sentence)
                found.append((sentence, len(scene.objects), is_close(scene), covers))
    c4, c5 = (torch.cat(each) for each in zip(*maps, strict=True))
    sentences, counts, close, covers = map(list, zip(*found, strict=True))
    return Part(c4, c5, sentences, counts, close, torch.stack(covers))


# --- captioners


class NoPlaces(PositionTokens):
    """As `PositionTokens`, but without the code of places."""

    def levels(self, pyramid: Pyramid) -> list[Tensor]:
        return [
            self.norm(project(map_.flatten(2).transpose(1, 2)))
            for map_, project in zip(pyramid[3:], self.project, strict=True)
        ]


@dataclass(frozen=True)
class Variant:
    """A captioner's builder, `(channels, words) -> decoder`, and its training.

    A blind one is given zeros; `search` also measures beams; `ranges` are the scenes to learn.
    """

    decoder: Callable[[Sequence[int], int], nn.Module]
    blind: bool = False
    search: bool = False
    lr: float = LR
    epochs: int = EPOCHS
    ranges: tuple[range, ...] = TRAIN

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.decoder(OUT_CHANNELS, len(WORDS))

    def learn(self, seed: int) -> tuple[nn.Module, Record]:
        """Return a captioner that was trained by teacher forcing, and how it was."""
        decoder, data = self.build(seed), part(*self.ranges)
        words = data.words

        def loss_of(chosen: Tensor, epoch: int) -> Tensor:
            rows = words[chosen]
            rows = rows[:, : int((rows != PAD).sum(1).max())]
            return caption_loss(
                decoder(data.pyramid(chosen, self.blind), rows[:, :-1]), rows[:, 1:]
            )

        started = time.perf_counter()
        torch.manual_seed(seed)
        loss = minimise(
            decoder,
            loss_of,
            len(words),
            epochs=self.epochs,
            lr=self.lr,
            batch_size=BATCH,
            seed=None,
            schedule=partial(one_cycle, warm_up=0.1),
            clip=CLIP,
        )
        return decoder, {
            "rate": self.lr,
            "epochs": self.epochs,
            "blind": self.blind,
            "learns": [[each.start, each.stop] for each in self.ranges],
            "loss": [round(value, 4) for value in loss],
            "seconds": round(time.perf_counter() - started, 1),
        }


TRIALS = {
    "GRU, first state": Variant(StateGRU, search=True),
    "Transformer, positions": Variant(CaptionTransformer, search=True),
    "Transformer, averages": Variant(partial(CaptionTransformer, tokens=AverageTokens)),
    "GRU, blind": Variant(StateGRU, blind=True),
    "Transformer, blind": Variant(CaptionTransformer, blind=True),
    "Transformer, no places": Variant(partial(CaptionTransformer, tokens=NoPlaces)),
}


# --- scores, all in %


def percent(right: Sequence[bool] | Tensor) -> float:
    return round(100 * torch.as_tensor(right).float().mean().item(), 2)


def same(said: Sequence[str], true: Sequence[str]) -> list[bool]:
    return [one == other for one, other in zip(said, true, strict=True)]


def bits(right: Sequence[bool]) -> str:
    """Return one sign a scene, so that any two captioners can be compared scene by scene."""
    return "".join("01"[one] for one in right)


def phrases(sentence: str) -> Counter[str]:
    """Return what is said to be there: "a long teal pole", "a disc"."""
    return Counter(re.split(JOINTS, sentence))


def overlap(said: Sequence[str], true: Sequence[str]) -> float:
    """Return F1 of the phrases, counted over all sentences before it is divided."""
    pairs = [(phrases(one), phrases(other)) for one, other in zip(said, true, strict=True)]
    both = sum((one & other).total() for one, other in pairs)
    return round(200 * both / sum(one.total() + other.total() for one, other in pairs), 2)


def relation(sentence: str) -> str:
    return next(word for word in sentence.split() if word in KINDS["relation"])


def numbers(words: Iterable[str]) -> Tensor:
    return torch.tensor([WORDS.numbers[word] for word in words])


@torch.no_grad()
def in_parts(call: Callable[[Pyramid, Tensor], Tensor], data: Part, blind: bool) -> list[Tensor]:
    """Return `call(pyramid, words)` for `PORTION` scenes at a time."""
    words = data.words
    slices = [slice(start, start + PORTION) for start in range(0, len(words), PORTION)]
    return [call(data.pyramid(chosen, blind), words[chosen]) for chosen in slices]


def written(search: Callable[[Pyramid], Tensor], data: Part, blind: bool) -> list[str]:
    """Return what it says of each scene."""
    rows = in_parts(lambda pyramid, _: search(pyramid), data, blind)
    return [sentence for some in rows for sentence in WORDS.decode(some)]


def spoken(decoder: nn.Module, data: Part, blind: bool) -> Record:
    """Score what it writes alone."""
    said = written(partial(greedy, decoder, longest=LONGEST), data, blind)
    right = same(said, data.sentences)
    groups = {
        "by_objects": list(map(str, data.counts)),
        "by_relation": list(map(relation, data.sentences)),
        "by_decision": ["close" if close else "clear" for close in data.close],
    }
    return {
        "exact": percent(right),
        "phrases": overlap(said, data.sentences),
        "right": bits(right),
        **{name: grouped(right, group) for name, group in groups.items()},
    }


def grouped(right: Sequence[bool], group: Sequence[str]) -> dict[str, dict[str, float]]:
    found = {}
    for name in sorted(set(group)):
        own = [one for one, other in zip(right, group, strict=True) if other == name]
        found[name] = {"number": len(own), "exact": percent(own)}
    return found


def forced(decoder: nn.Module, data: Part, blind: bool) -> Record:
    """Score each next word when those before are true."""
    logits = torch.cat(in_parts(lambda p, words: decoder(p, words[:, :-1]), data, blind))
    targets = data.words[:, 1:]
    real, said = targets != PAD, logits.argmax(2)
    found = {
        "unseen_loss": round(caption_loss(logits, targets).item(), 4),
        "accuracy": percent((said == targets)[real]),
        "by_kind": {},
    }
    for kind, words in KINDS.items():  # over-claiming costs: right of all that are true or said
        true, claimed = (torch.isin(part, numbers(words)) & real for part in (targets, said))
        found["by_kind"][kind] = percent((said == targets)[true | claimed])
    names = numbers(KINDS["relation"])
    here = torch.isin(targets, names)
    true, claimed = targets[here], said[here]
    table = [[int(((true == a) & (claimed == b)).sum()) for b in names] for a in names]
    totals = [int((true == a).sum()) for a in names]
    rows = list(zip(table, totals, strict=True))
    found["relations"] = [[*row, total - sum(row)] for row, total in rows]  # last: another word
    recalls = [row[k] / max(total, 1) for k, (row, total) in enumerate(rows)]
    found["relation"] = round(100 * sum(recalls) / len(recalls), 2)  # balanced: chance is 20
    return found


def followed(
    decoder: nn.Module, search: Callable[..., Tensor], pyramid: Pyramid, words: Tensor
) -> Tensor:
    """Return log-likelihood, number of words, whether it ended and whether it is right, [B, 4]."""
    said = search(decoder, pyramid, longest=LONGEST)
    rows = torch.cat([said.new_full((len(said), 1), START), said], dim=1)
    likely = log_likelihood(decoder, pyramid, rows)  # type: ignore
    right = torch.tensor(same(WORDS.decode(said), WORDS.decode(words)))
    return torch.stack([likely, (said > END).sum(1), (said == END).any(1), right], dim=1)


def searched(decoder: nn.Module, data: Part, blind: bool) -> Record:
    """Compare beam search with greedy search."""
    found = {}
    for name, search in {"greedy": greedy, "beam": partial(beam_search, beams=BEAMS)}.items():
        rows = in_parts(partial(followed, decoder, search), data, blind)
        likely, length, ended, right = torch.cat(rows).T
        found[name] = {
            "exact": percent(right),
            "likely": round(likely.mean().item(), 4),
            "words": round(length.mean().item(), 3),
            "ended": percent(ended),
            "right": bits(right.int().tolist()),
        }
    return found


# --- where it looks


def named(sentence: str) -> list[tuple[int, str, int]]:
    """Return (step, kind of word, which of the two objects) for the words that describe one."""
    kinds = {word: kind for kind, words in KINDS.items() for word in words}
    found, which = [], 0
    for step, word in enumerate(sentence.split()):
        kind = kinds.get(word)
        if kind == "relation":
            which = 1
        elif kind:
            found.append((step, kind, which))
    return found


SHARES = ("named", "elsewhere", "other_scene", "chance", "best")


def on_objects(looks: Tensor, data: Part) -> dict[str, dict[str, float]]:
    """Return the share of the attention on an object's pixels, by the kind of word, in %.

    `looks` is `[N, T, 80]`. `named`: while this word describes it; `elsewhere`: the same pixels
    while the other object is described; `other_scene`: the same pixels and the same step, of the
    look at the scene before; `chance`: of even attention; `best`: of all on a single token.
    """
    sums: dict[str, list[list[float]]] = {}
    steps = list(map(named, data.sentences))
    for index, (row, before) in enumerate(zip(steps, [steps[-1], *steps[:-1]], strict=True)):
        for step, kind, which in row:
            at = data.covers[index, which]
            others = [other for other, _, each in row if each != which]
            if step <= before[-1][0]:
                values = (
                    looks[index, step] @ at,
                    looks[index, others].mean(0) @ at,
                    looks[index - 1, step] @ at,
                    at.mean(),
                    at.max(),
                )
                sums.setdefault(kind, []).append([float(value) for value in values])
    found = {}
    for kind, rows in sums.items():
        means = (100 * torch.tensor(rows).mean(0)).tolist()
        shares = {name: round(value, 2) for name, value in zip(SHARES, means, strict=True)}
        found[kind] = {"number": len(rows)} | shares
    return found


def attention(decoder: nn.Module, data: Part) -> Record:
    """Return `on_objects` for each layer; the words before are true."""

    def looking(pyramid: Pyramid, words: Tensor) -> Tensor:
        return decoder.attention_weights(decoder.encode(pyramid), words[:, :-1])  # type: ignore

    looks = torch.cat(in_parts(looking, data, blind=False))  # [N, layers, T, 80]
    return {f"layer {k + 1}": on_objects(each, data) for k, each in enumerate(looks.unbind(1))}


# --- what is measured


def constants() -> Record:
    """Return what the best constants of the training say of the scenes reported on."""
    data, report = part(*TRAIN), part(REPORT)
    whole = Counter(data.sentences).most_common(200)
    parts = Counter(phrase for sentence in data.sentences for phrase in phrases(sentence))
    common = [phrase for phrase, _ in parts.most_common(12)]
    pairs = [f"{one} and {other}" for one, other in itertools.combinations(common, 2)]
    some = data.sentences[:2000]
    best = max(
        [*(sentence for sentence, _ in whole), *pairs], key=lambda c: overlap([c] * len(some), some)
    )
    at_each = torch.stack([column[column != PAD].mode().values for column in data.words.T[1:]])
    targets = report.words[:, 1:]
    guessed = at_each[: targets.shape[1]].expand_as(targets)
    said = report.sentences
    return {
        "exact": percent(same([whole[0][0]] * len(said), said)),
        "phrases": overlap([best] * len(said), said),
        "accuracy": percent((guessed == targets)[targets != PAD]),
        "trained": len(data.sentences),
        "reported": len(said),
        "words": round(sum(len(sentence.split()) for sentence in said) / len(said), 2),
        "close": percent(report.close),
        "objects": dict(sorted(Counter(map(str, report.counts)).items())),
    }


def captions(variant: Variant, seed: int) -> Record:
    """Train one captioner and score it."""
    decoder, history = variant.learn(seed)
    report, blind = part(REPORT), variant.blind
    found = spoken(decoder, report, blind) | forced(decoder, report, blind)
    if variant.search:
        found["search"] = searched(decoder, report, blind)
    if hasattr(decoder, "attention_weights") and not blind:
        found["attention"] = attention(decoder, report)
        found["untrained"] = attention(variant.build(seed).eval(), report)
    return {**found, **history, "parameters": count_parameters(decoder)}


def tried(variant: Variant, lr: float) -> Record:
    """Score one learning rate on other scenes than those reported on, with a seed of its own."""
    variant = replace(variant, lr=lr, epochs=TRIED_EPOCHS, ranges=TRAIN[:1])
    decoder, history = variant.learn(TRIED_SEED)
    found = spoken(decoder, part(TUNE), False) | forced(decoder, part(TUNE), False)
    kept = {key: found[key] for key in ("exact", "accuracy", "unseen_loss")}
    return {"seed": TRIED_SEED, **kept, **history}


def shown(what: str) -> Record:
    """Return where it looks in the first scene of five or more objects that it describes right."""
    decoder, _ = TRIALS["Transformer, positions"].learn(seed=0)
    data = part(REPORT)
    right = same(written(partial(greedy, decoder, longest=LONGEST), data, False), data.sentences)
    first = next(k for k, count in enumerate(data.counts) if right[k] and count >= 5)
    taken = (index for index in REPORT if asked(scenes.scene(index)))
    one, words = slice(first, first + 1), data.words[first : first + 1, :-1]
    with torch.no_grad():
        looks = decoder.attention_weights(decoder.encode(data.pyramid(one, False)), words)[0]  # type: ignore
    return {
        "scene": next(itertools.islice(taken, first, None)),
        "sentence": data.sentences[first],
        "tried": first,
        "looks": [[" ".join(f"{1000 * v:.0f}" for v in step) for step in layer] for layer in looks],
    }


def measure(what: str, seed: int) -> Record:
    return constants() if what == "constant" else captions(TRIALS[what], seed)


def measure_choice(what: str, rate: float) -> Record:
    return tried(TRIALS[what], rate)


def entries(what: str, rate: float | None = None, **task: object) -> Iterator[str]:
    code = "experiments/chapters/sequences/trials.py"
    if what == "constant":
        yield f"{code}::constants"
    else:
        yield f"{code}::{'captions' if rate is None else 'tried'}"
        yield f'{code}::TRIALS["{what}"]'


CHOICE, LOOKS = f"{NAME}_choice", f"{NAME}_looks"
SWEEPS = {
    NAME: Sweep(NAME, partial(measure), key=("what", "seed"), entries=entries),
    CHOICE: Sweep(CHOICE, partial(measure_choice), key=("what", "rate"), entries=entries),
    LOOKS: Sweep(LOOKS, shown, key=("what",)),
}


def main(given: Sequence[str] | None = None) -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--choose", action="store_true", help="try learning rates instead")

    said = arguments(__doc__, ["constant", *TRIALS, "looks"], given=given, more=more)
    if said.choose:
        wanted = [
            (what, rate) for what, variant in TRIALS.items() if variant.search for rate in LRS
        ]
        tasks = [{"what": what, "rate": rate} for what, rate in wanted if what in said.only]
        SWEEPS[CHOICE].run(tasks, plan=said.plan, again=said.again)
        return
    wanted = [(0, "constant"), *itertools.product(range(said.seeds), TRIALS)]
    tasks = [{"what": what, "seed": seed} for seed, what in wanted if what in said.only]
    SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)
    looks = [{"what": "looks"}] if "looks" in said.only else []
    SWEEPS[LOOKS].run(looks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
