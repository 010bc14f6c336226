# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 · Which bridge should I use?
#
# You know what should come out, you have an afternoon, and twelve chapters are a lot. Answer four questions and
# take the ten lines below them. Then see what the answer rests on: the book's decoders beside those of the library
# that you would otherwise install, on one encoder, trained and scored alike. And see how to doubt such a comparison,
# this one or any other.

# %% [markdown]
# ## What you will see
#
# - four questions, and the bridge to take, with its shapes and a program to paste;
# - each need beside what was measured for it, and beside the best of the library;
# - three leaderboards that differ in nothing but the random seed;
# - which differences survive that, and which decoders nobody beats at their price;
# - another winner for another need;
# - whether painted scenes, streets, and somebody else's streets put decoders in the same order;
# - and whether the order stays when the encoder learns along.

# %% tags=["setup", "hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Set-up", "code_prompt_hide": "Set-up"}
import os
import sys
from importlib.util import find_spec
from subprocess import check_call

if os.path.isdir("../helpers"):  # this notebook lies in a clone of the book
    sys.path.insert(0, os.path.abspath(".."))
elif not find_spec("helpers"):
    url = "https://github.com/your-name/decoder-book"
    url = os.environ.get("BOOK_REPOSITORY", url)
    check_call([sys.executable, "-m", "pip", "install", "-q", f"git+{url}"])
import torch

cpu = f"the CPU, threads: {torch.get_num_threads()}"
if "google.colab" in sys.modules:
    cpu += ". For a GPU: Runtime → Change runtime type"
gpu = torch.cuda.is_available()
device = torch.cuda.get_device_name() if gpu else cpu
print(f"torch {torch.__version__} on {device}")

# %%
from collections import Counter
from itertools import combinations, pairwise
from statistics import fmean
from textwrap import fill

import numpy as np
import torch
from IPython.display import HTML
from scipy import stats

from helpers import plotting, records, suggest
from helpers.advice import BRIDGES
from helpers.advice.widget import widget
from helpers.encoder import ResNet18Encoder, ShortEncoder
from helpers.inspection import count_macs

# %% [markdown]
# ## The answer first

# %%
widget()

# %% [markdown]
# In Python the same answers come from `suggest`. Its four arguments are the four questions, and `help(suggest)` lists
# the answers that it takes:

# %%
suggest(out="mask", need="budget")

# %% [markdown]
# For the wall there is a [cheat sheet](../book/cheat_sheet.md), all bridges on one page.
#
# ## The shapes
#
# There are five kinds of answers. Here the first suggestion of each kind runs as you would paste it; its last line
# prints a shape.

# %%
for out in ("mask", "vector", "tokens", "words", "map"):
    answer = suggest(out)
    print(f"{out}: {answer.bridge}, {answer.contract}")
    exec(answer.code, {})

# %% [markdown]
# Your task decides which kind you need: a decoder that wants one vector gets one vector. The choice begins *within* a
# kind. For masks it is largest, so that is where most was measured.
#
# ## What was measured
#
# `python -m experiments.benchmark` trains decoders on the bundled encoder, frozen, on 400 scenes (12 epochs) and on 266
# streets of CamVid (10 epochs): same images, augmentation, loss and schedule for all. With seed 0 each tries two learning
# rates; the one that is better on images kept for that goes on with more seeds. It reports on 200 scenes and on a drive
# of 101 frames that no training saw. `python -m experiments.benchmark.costs` counts and times.
#
# *smp* is segmentation-models-pytorch 0.6: its decoders as they come, with the book's weights in its ResNet-18. Three of
# them, `PAN`, `DeepLabV3` and `DeepLabV3Plus`, change the encoder: they stretch its last stages (dilation) in place of
# striding. That makes it dearer, and a frozen encoder was never trained for it.
#
# Of the book there is the best decoder of each chapter and, where it differs, the best cheap one: `c5 alone` (02), two
# with `1×1` convolutions (03), `queries` (04), two `U-Net`s (05), `many paths` (06), context on `c3` (07), the `image
# beside` features (08 and 09), and chapter 12's default, the `book decoder`.


# %%
benchmark = records.of("benchmark", device="cpu")
bench, tuned = (benchmark.where(chosen=True, frozen=f) for f in (True, False))
costs = {r["what"]: r for r in records.of("costs", device="cpu")}
LARGE = ("sky", "building", "road")  # they fill most of a street


def scores(where, what, field="miou"):
    """One value for each seed, in per cent."""
    if field == "large":
        found = [bench.values(where, what, "iou", name) for name in LARGE]
        return [fmean(values) for values in zip(*found, strict=True)]
    return bench.values(where, what, field)


def mean(where, what, field="miou"):
    return fmean(scores(where, what, field))


def say(text):
    print(fill(text, 66, subsequent_indent="    "))


# %% [markdown]
# How many seeds there are (chapter 12's variants of its decoder are left to chapter 12, and of smp's three dearest one
# seed had to do on streets):

# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The code", "code_prompt_hide": "The code"}
places = ("scenes", "streets")
names = [what for what in costs if not what.startswith("book, ")]
seeds = {
    where: Counter(r["what"] for r in bench.where(data=where)) for where in places
}
judged = {where: [w for w in names if seeds[where][w] == 3] for where in places}
peers = [what for what in names if what.startswith("smp ")]
ours = [what for what in names if what not in peers]
for where in places:
    for what, count in seeds[where].items():
        assert scores(where, what, "seed") == [*range(count)]
settings = {
    (r["data"], r["epochs"], r["images"]["train"], r["images"]["report"])
    for r in bench
}
assert settings == {("scenes", 12, 400, 200), ("streets", 10, 266, 101)}
stretched = [f"smp {what}" for what in ("PAN", "DeepLabV3", "DeepLabV3Plus")]
plain = costs["book decoder"]["encoder_macs"]
dearer = [what for what in names if costs[what]["encoder_macs"] > plain]
assert sorted(dearer) == sorted(stretched)
for where in places:
    print(f"{where}, three seeds:", len(judged[where]), "decoders")
    for count in (2, 1, 0):
        some = [what for what in names if seeds[where][what] == count]
        if some:
            say(f"  {count or 'no'} seed{'s' * (count != 1)}: {', '.join(some)}")

# %% [markdown]
# **Your need, the bridge, the number.** For each need the suggestion, what it reached, and the best decoder of smp for
# the same, both on images that no training saw. In brackets are the lowest and the highest of three seeds.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The code", "code_prompt_hide": "The code"}
def price(what):
    macs, time, weights = (
        costs[what][k] for k in ("macs", "latency", "parameters")
    )
    return f"{macs / 1e9:.2f}", f"{time[0]:.2f}", f"{weights / 1e6:.2f}"


def one_line(text):
    return f'<span style="white-space: nowrap">{text}</span>'


def show_table(head, rows):
    def line(cells, tag):
        return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    table = f"<thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody>"
    looks = 'class="table" style="font-size: 0.85rem"'
    return HTML(
        f'<div style="overflow-x: auto"><table {looks}>{table}</table></div>'
    )


def best_peer(where, key, most=None):
    """The best of smp's decoders with three seeds, at `most` this work."""
    rivals = [what for what in peers if what in judged[where]]
    rivals = [what for what in rivals if not most or costs[what]["macs"] <= most]
    return max(rivals, key=lambda what: mean(where, what, key))


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The code", "code_prompt_hide": "The code"}
RECORD = {bridge.name: bridge.record for bridge in BRIDGES.values()}
NEEDS = {  # the answer to "What counts most?", and the score by data
    "all round": ("default", {"scenes": "miou", "streets": "miou"}),
    "thin things": ("thin", {"scenes": "thin_iou", "streets": "thin_iou"}),
    "outlines": ("thin", {"scenes": "boundary_miou", "streets": "boundary_miou"}),
    "large things": ("large", {"streets": "large"}),
    "least work": ("budget", {"scenes": "miou", "streets": "miou"}),
}

rows, priced = [], {}
for need, (answer, keys) in NEEDS.items():
    take = suggest(need=answer)
    what = RECORD[take.bridge]
    most = 1.1 * costs[what]["macs"] if answer == "budget" else None
    found, rivals = [], []
    for where, key in keys.items():
        rival = best_peer(where, key, most)
        named = rival.removeprefix("smp ")
        own, best = (records.spread(scores(where, w, key)) for w in (what, rival))
        found.append(one_line(f"{where} {own}"))
        rivals.append(one_line(f"{named} {best}"))
        priced |= {take.bridge: what, named: rival}
    cell = f"<b>{need}</b><br><code>{take.bridge}</code> ({take.chapter.number})"
    rows.append([cell, *("<br>".join(each) for each in (found, rivals))])
show_table(["take (chapter)", "IoU, %", "best of smp"], rows)

# %% [markdown]
# And what these cost, encoder and decoder together, for one street of 192 × 256 pixels: work in GMAC (10⁹
# multiply-accumulates), time as a multiple of the bare encoder's on one thread of a CPU (GPUs were not measured), and
# millions of weights of the decoder.

# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The code", "code_prompt_hide": "The code"}
order = sorted(priced, key=lambda name: costs[priced[name]]["macs"])
show_table(
    ["decoder", "work", "time", "weights"],
    [[name, *price(priced[name])] for name in order],
)

# %% [markdown]
# (*Thin* are rings and poles, on streets poles, pedestrians and signs; *outlines* is boundary IoU at two pixels; *large*
# are sky, buildings and road. For the least work the rival is the best of smp that asks for about as little. And a
# caution: each rival is the best of all, picked from these very numbers, and our answers were held against them, too.
# Both would look a little worse on new images.)
#
# The other kinds were measured in their chapters, three times each; the range is from the lowest to the highest seed:


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The code", "code_prompt_hide": "The code"}
def between(values):
    """From the lowest to the highest, as text."""
    low, high = (f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


vectors = records.of("pooling_linear_probe")
off = {  # the last ones are over objects of all sizes
    what: between(
        [each[-1] for each in vectors.values("scenes", "zeros", "position", what)]
    )
    for what in ("grid 2×2", "average", "guessing")
}
presence = vectors.values("scenes", "zeros", "presence", "average")
there = between([100 * each[-1] for each in presence])
right, blind = (
    between(records.of("input_mapping").values("scenes", what, "right"))
    for what in ("words", "no query")
)
whole, from_vector = (
    between(records.of("sequences").values("scenes", what, "exact"))
    for what in ("Transformer, positions", "GRU, first state")
)
holes = records.of("image_to_image").values("scenes", "holes", "error")
left = between([100 * each["book decoder"] / each["blurred"] for each in holes])

# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The code", "code_prompt_hide": "The code"}
elsewhere = {
    "the mask of what a query asks for": (
        suggest("mask", "vector"),
        f"the right object for {right} % of questions; without the query {blind} %",
    ),
    "a vector: what is there": (
        suggest("vector"),
        f"a picture with the shape is ranked before one without in {there} % of "
        "pairs; by guessing 50 %",
    ),
    "a vector: roughly where": (
        suggest("vector", need="thin"),
        f"places off by {off['grid 2×2']} of 128 pixels; by one mean over the map "
        f"{off['average']}, by guessing {off['guessing']}",
    ),
    "words": (
        suggest("words"),
        f"{whole} % of sentences without a mistake; from one vector "
        f"{from_vector} %",
    ),
    "a picture: holes filled": (
        suggest("image"),
        f"{left} % of the error of a blur is left",
    ),
}
show_table(
    ["you need", "take (chapter)", "measured on scenes"],
    [
        [need, f"<code>{take.bridge}</code> ({take.chapter.number})", number]
        for need, (take, number) in elsewhere.items()
    ],
)

# %% [markdown]
# *Any size?* Every bridge of the book takes any height and width from 32 on, divisible by 32 or not; a test asks it of
# each. (Most of smp's models want sides that 8, 16 or 32 divides: here everybody got images padded to multiples of 32.)
#
# ## The problem as a picture
#
# Now for doubts. Here are three leaderboards on scenes. Images, code, schedule: all is the same but the seed, from
# which the first weights and the order of the images are drawn.

# %%
boards = {
    f"seed {seed}": {
        what: scores("scenes", what)[seed] for what in judged["scenes"]
    }
    for seed in range(3)
}
plotting.show_ranks(
    boards,
    highlight=["book decoder"],
    alt="Three rankings of the decoders by mIoU on scenes, one for each seed. The "
    "last places stay; the first two change places, and in between lines cross.",
)


# %%
def turns(a, b, where="scenes"):
    """Does the order of the two change with the seed?"""
    gaps = bench.differences(where, a, b)
    return min(gaps) < 0 < max(gaps)


pairs = list(combinations(judged["scenes"], 2))
orders = [sorted(board, key=board.get) for board in boards.values()]
close = {tuple(sorted(pair)) for order in orders for pair in pairwise(order)}
torn, next_to = ([pair for pair in each if turns(*pair)] for each in (pairs, close))
print(f"{len(torn)} of {len(pairs)} pairs change their order,")
print(f"{len(next_to)} of {len(close)} pairs of neighbours")
assert len(torn) < 0.1 * len(pairs) and 0.2 < len(next_to) / len(close) < 0.4
leaders = [max(board, key=board.get) for board in boards.values()]
assert leaders == ["smp UnetPlusPlus", "book decoder", "book decoder"]

# %% [markdown]
# Of all pairs few change their order; of those who stand next to each other, three in ten. A seed does not make a
# bad decoder good. But a place or two in a table says nothing: with seed 0 alone, `UnetPlusPlus` would lead here.
#
# ## The obvious attempt, and what it does wrong
#
# Somebody publishes a table, one number a line, sorted. You take the first line. Four things can be wrong with that, and
# none raises an error:
#
# 1. **It was luck.** Another seed, another order among neighbours.
# 2. **It forgets the price.** A decoder with twice the work may owe its place to the work.
# 3. **It is an average of what you do not need.** mIoU weighs the sky like a pole.
# 4. **It is about other images.**
#
# So there are four questions to ask of any table.
#
# ## Is it more than luck?
#
# Take two decoders, subtract seed by seed, and ask how well three differences pin down their mean. Student's interval
# would hold the mean of *all* seeds in 95 of 100 such experiments, if differences scatter normally:


# %%
def paired(what, other, where, field="miou"):
    """The differences of the seeds that both have: the first ones."""
    pairs = zip(*(scores(where, w, field) for w in (what, other)), strict=False)
    return [one - two for one, two in pairs]


def interval(values, sure=0.95):
    """Student's interval for the mean: (low, mean, high)."""
    middle, count = np.mean(values), len(values)
    half = stats.t.ppf((1 + sure) / 2, count - 1) * stats.sem(values)
    return middle - half, middle, middle + half


gaps = paired("smp MAnet", "smp Unet", "scenes")
low, middle, high = interval(gaps)
print("smp MAnet − smp Unet:", ", ".join(f"{gap:+.1f}" for gap in gaps))
print(f"mean {middle:+.1f}, between {low:+.1f} and {high:+.1f}")

# %% [markdown]
# Behind with every seed, by more than two points on average, and still the interval holds zero: *no difference seen*.
# That is not *they are equal*. It says that three seeds could not tell, and how large a difference could hide. Nor is one
# sign three times a proof: of two equals, one in four pairs does that.
#
# Here are all decoders against the book's default. Grey: no difference seen. A ring: fewer than three seeds, about which
# nothing can be said.


# %%
def against_default(where):
    """Each decoder minus the default: intervals, or a number where seeds lack."""
    found = {}
    for what in names:
        if what != "book decoder" and seeds[where][what]:
            gaps = paired(what, "book decoder", where)
            found[what] = interval(gaps) if len(gaps) > 2 else fmean(gaps)
    return dict(sorted(found.items(), key=lambda item: -np.median(item[1])))


def show_against_default(where):
    return plotting.show_intervals(
        against_default(where),
        f"points of mIoU above the book decoder, {where}",
        alt=f"Intervals of the difference to the book decoder on {where}, for "
        "every decoder; the numbers stand at the right.",
    )


show_against_default("scenes")

# %%
show_against_default("streets")

# %% [markdown]
# On scenes one decoder cannot be told from the default: smp's `UnetPlusPlus`, for six times the work. Its first seed is
# ahead, the other two are behind: with one seed we would have believed it. All other intervals lie below zero, and the
# nearest of them, chapter 09's image beside the features, is more than two points behind on average.
#
# On streets distances are smaller. Chapter 05's U-Net cannot be told from the default there. All others with three seeds
# are behind, smp's by more than a point on average; only the interval of `Segformer` nearly touches zero. Of the rings,
# smp's three dearest with their one seed, `UPerNet` lies at zero, for nearly six times the work; the others lie to the
# left.
#
# Read such a picture with care. Three values give a rough idea of their own spread, so a short bar may be luck, too; and of
# twenty intervals one misses on average.

# %%
gaps = {
    where: {
        what: gap
        for what, gap in against_default(where).items()
        if what in judged[where]
    }
    for where in places
}
for where, found in gaps.items():
    undecided = [what for what, (low, _, high) in found.items() if low < 0 < high]
    print(f"{where}, undecided: {', '.join(undecided) or 'none'}")
    assert all(low < 0 for low, _, _ in found.values())  # nobody is above
reach = {
    where: [what for what, (_, _, high) in found.items() if high > 0]
    for where, found in gaps.items()
}
assert reach == {"scenes": ["smp UnetPlusPlus"], "streets": ["U-Net"]}
assert costs["smp UnetPlusPlus"]["macs"] > 6 * costs["book decoder"]["macs"]
first, *rest = paired("smp UnetPlusPlus", "book decoder", "scenes")
assert first > 0 > max(rest)
order = sorted(gaps["scenes"], key=lambda what: -gaps["scenes"][what][1])
assert order[:2] == ["smp UnetPlusPlus", "image beside c3…c5"]
assert gaps["scenes"][order[1]][1] < -2
assert max(gap[1] for what, gap in gaps["streets"].items() if what in peers) < -1
assert -0.3 < gaps["streets"]["smp Segformer"][2] < 0
rings = {
    what: gap
    for what, gap in against_default("streets").items()
    if what not in judged["streets"]
}
assert len(rings) == 3 and abs(rings.pop("smp UPerNet")) < 0.5
assert max(rings.values()) < -1

# %% [markdown]
# ## At what price?
#
# One decoder *beats* another at its price if it costs no more and its worst seed is above the other's best (chapter 12).
# Of two equals, picked beforehand, the one does that to the other in one of 20 cases. Who is beaten by nobody is on the
# **front**: full points and bold names. (Noise keeps some on the front, too: *not beaten* is not *best*.) A bar reaches
# from the worst seed to the best, a triangle stands for somebody below the picture.


# %%
def work(what):
    return costs[what]["macs"] / 1e9


def time(what):
    return round(costs[what]["latency"][0], 2)  # a hundredth more or less is noise


def beaten(what, where, cost=work):
    """Who costs no more and is better, beyond the seeds."""
    return [
        other
        for other in judged[where]
        if cost(other) <= cost(what) and bench.margin(where, other, what) > 0
    ]


def front(where, cost=work):
    """The decoders that nobody beats at their price, of those with three seeds."""
    return [what for what in judged[where] if not beaten(what, where, cost)]


def tradeoff(where, cost, label, floor):
    """The picture of a front, each decoder with its name."""
    shown = [what for what in names if seeds[where][what]]
    best = front(where, cost)
    return plotting.show_tradeoff(
        {what: (cost(what), scores(where, what)) for what in shown},
        label,
        f"mIoU on {where}, %",
        groups={
            each: [w for w in shown if w in of]
            for each, of in (("the book", ours), ("smp", peers))
        },
        front=best,
        floor=floor,
        alt=f"mIoU on {where} over {label} for {len(shown)} decoders. On the "
        f"front: {', '.join(best)}.",
    )


# %%
WORK = "work for one street, encoder and decoder, GMAC"
tradeoff("scenes", work, WORK, floor=39)

# %%
tradeoff("streets", work, WORK, floor=34)

# %% [markdown]
# Work is not time. On one thread of a CPU, in units of the bare encoder:

# %%
TIME = "time for one street, × that of the bare encoder"
tradeoff("streets", time, TIME, floor=34)


# %%
def below(what, where, cost=work):
    """Points that the best of no higher price is ahead on average; 0: nobody is."""
    rivals = [o for o in judged[where] if cost(o) <= cost(what)]
    return max(mean(where, rival) for rival in rivals) - mean(where, what)


for where in places:
    for cost in (work, time):
        on = sorted(front(where, cost), key=cost)
        say(f"{where}, by {cost.__name__}: {', '.join(on)}")
        say(
            f"  the book decoder: {below('book decoder', where, cost):.1f} below it"
        )

# %% [markdown]
# The front runs the same way on both. It begins with decoders that read no map beyond `c3`, at two thirds of the bare
# encoder's time. It leads to the book decoder, which takes less than a fifth more than the bare encoder and which nobody
# beats. Of smp `PSPNet` of depth 3 is on it, at the cheap end, and on scenes `UnetPlusPlus` at the dear one. And of those
# who cost more than the book decoder and have three seeds, nobody is better on average: on scenes all but `UnetPlusPlus`
# are beaten, on streets all but chapter 05's two U-Nets, whose best seeds are above the default's worst.
#
# So for *as little work as possible* it is not enough to make the decoder cheap. `1×1, summed` is hardly any work behind
# the encoder; on scenes `c3, ASPP` beats it for far less, since the encoder makes no `c4` and `c5` for it.

# %%
for where in places:
    on = {cost.__name__: set(front(where, cost)) for cost in (work, time)}
    smps = {"smp PSPNet, depth 3"}
    smps |= {"smp UnetPlusPlus"} if where == "scenes" else set()
    assert all(each & set(peers) == smps for each in on.values())
    assert all(
        {"c3, PPM", "c3, ASPP", "book decoder"} <= each for each in on.values()
    )
    assert all(below("book decoder", where, cost) < 0.1 for cost in (work, time))
    dearer = [w for w in judged[where] if work(w) > 1.01 * work("book decoder")]
    undecided = [w for w in dearer if not beaten(w, where)]
    expected = {
        "scenes": ["smp UnetPlusPlus"],
        "streets": ["U-Net", "U-Net, adding"],
    }
    assert undecided == expected[where]
    assert all(mean(where, w) < mean(where, "book decoder") for w in dearer)
assert time("c3, ASPP") < 0.7 and 1.1 < time("book decoder") < 1.2
assert beaten("1×1, summed", "scenes") == ["c3, ASPP"]

# %% [markdown]
# **End the encoder early.** The cheapest decoders read `c3`, and at most `c2` beside it. They owe their price to an
# encoder that stops there: `ShortEncoder` shares the weights, makes the first maps, and leaves the others empty.

# %%
encoder = ResNet18Encoder()
x = torch.rand(1, 3, 192, 256)
for levels in (5, 4, 3):
    short = ShortEncoder(encoder, levels)
    maps = ", ".join(str(list(map_.shape[1:])) for map_ in short(x)[levels - 1 :])
    macs = count_macs(short, x) / 1e9
    print(f"{levels} levels: {macs:.2f} GMAC; from c{levels} on {maps}")
assert torch.equal(short(x).c3, encoder(x).c3)

# %% [markdown]
# ## Best at what?
#
# Points behind the best of each column, of the decoders with three seeds on both. *Small* is the mean over things that
# fit into less than 16 × 16 pixels, each by itself; the others as above.

# %%
KEYS = {
    "all": "miou",
    "outlines": "boundary_miou",
    "thin": "thin_iou",
    "small": "small_iou",
}
columns = {
    f"{name}\n{where}": (where, key)
    for where in places
    for name, key in KEYS.items()
}
columns["large\nstreets"] = "streets", "large"
both = [what for what in judged["scenes"] if what in judged["streets"]]
both.sort(key=lambda what: -mean("scenes", what))
table = np.array(
    [[mean(where, what, k) for where, k in columns.values()] for what in both]
)
plotting.show_matrix(
    table - table.max(0),
    both,
    list(columns),
    "points behind the best of the column",
    alt="For every decoder and each of nine scores, the points behind the best.",
)


# %%
def winner(where, key):
    """The best on average, and those whose difference to it may be zero."""
    best = max(judged[where], key=lambda what: mean(where, what, key))
    others = [what for what in judged[where] if what != best]
    return best, [w for w in others if interval(paired(w, best, where, key))[2] > 0]


for name, (where, key) in columns.items():
    best, undecided = winner(where, key)
    title = name.replace("\n", ", ")
    more = f"; no difference seen: {', '.join(undecided)}" if undecided else ""
    say(f"{title}: {best} {mean(where, best, key):.1f}{more}")

# %% [markdown]
# In eight of the nine columns the default is first or cannot be told from the first. Nobody else comes near that, and
# yet:
#
# - *Outlines of drawn things* are sharper with the image beside the features. On streets the same kind of decoder
#   is far behind at thin things, though it learnt on streets.
# - *Everything drawn*: in the four columns of scenes `UnetPlusPlus` is level, too, or ahead on average (thin things), for
#   six times the work. On streets its single seed is behind.
# - *Small things*: chapter 05's U-Net is level.
# - *Large things*: smp's `DeepLabV3Plus` and `FPN` are ahead on average, and many cannot be told from them, the default
#   among them. (That list is no list of equals: `c3, PPM` is more than five points behind and on it, because its seeds
#   differ so much.)

# %%
firsts = {name: winner(where, key) for name, (where, key) in columns.items()}
level = [n for n, (best, rest) in firsts.items() if "book decoder" in (best, *rest)]
assert [name for name in columns if name not in level] == ["outlines\nscenes"]
others = [
    sum(what in (best, *rest) for best, rest in firsts.values())
    for what in both
    if what != "book decoder"
]
assert max(others) <= 6
beside = "image beside c3…c5"
assert firsts["outlines\nscenes"][0] == beside
assert bench.margin("streets", "book decoder", beside, "thin_iou") > 6
for name, (best, undecided) in firsts.items():
    if "scenes" in name:
        assert "smp UnetPlusPlus" in (best, *undecided)
assert firsts["thin\nscenes"][0] == "smp UnetPlusPlus"
for name in ("small\nscenes", "small\nstreets"):
    best, undecided = firsts[name]
    assert "U-Net" in (best, *undecided)

# %% [markdown]
# ## Do other images say the same?
#
# Sort the decoders by what they reach on scenes, and again by what they reach on streets. If every line were level,
# painted scenes could tell you everything about streets.

# %%
means = {
    where: {what: mean(where, what) for what in names if seeds[where][what]}
    for where in places
}
shown = [what for what in names if all(what in means[where] for where in places)]
plotting.show_ranks(
    {where: {what: means[where][what] for what in shown} for where in places},
    highlight=["book decoder", "image beside c3…c5"],
    alt="The ranking of the decoders on scenes beside that on streets.",
)

# %% [markdown]
# *Spearman's rank correlation* puts that into a number: 1 for the same order, 0 for no relation, −1 for the reverse. It
# has a wide interval of its own. (Fisher's, with the standard error of Bonett and Wright. It takes the decoders for
# independent; ours are relatives, so it is wider still.)
#
# The third opinion is somebody else's: nine decoders of smp on a ResNet-18, mIoU on Cityscapes after 200 epochs, one run
# each, from the README of zh320/realtime-semantic-segmentation-pytorch. Its PSPNet is smp's default, of depth 3.


# %%
def ranks_agree(one, other, sure=0.95):
    """Spearman's correlation of two tables of scores: (low, correlation, high)."""
    common = [name for name in one if name in other]
    values = [[table[name] for name in common] for table in (one, other)]
    rho = stats.spearmanr(*values).statistic
    error = ((1 + rho**2 / 2) / (len(common) - 3)) ** 0.5
    half = stats.norm.ppf((1 + sure) / 2) * error
    low, high = np.tanh(np.arctanh(rho) + np.array([-half, half]))
    return low, rho, high


cityscapes = {
    "smp DeepLabV3": 75.22,
    "smp MAnet": 74.59,
    "smp UnetPlusPlus": 74.31,
    "smp DeepLabV3Plus": 73.97,
    "smp FPN": 73.44,
    "smp Unet": 72.99,
    "smp Linknet": 71.17,
    "smp PAN": 70.25,
    "smp PSPNet, depth 3": 61.63,
}


# %%
def without(table, *dropped):
    return {what: value for what, value in table.items() if what not in dropped}


worst = "c5 alone", "smp PSPNet, depth 5"
compared = {
    "scenes, streets": (means["scenes"], means["streets"]),
    "  without the two of c5 alone": (
        without(means["scenes"], *worst),
        means["streets"],
    ),
    "scenes, Cityscapes": (means["scenes"], cityscapes),
    "streets, Cityscapes": (means["streets"], cityscapes),
    "  without PSPNet": (
        means["streets"],
        without(cityscapes, "smp PSPNet, depth 3"),
    ),
}
agreement = {what: ranks_agree(*pair) for what, pair in compared.items()}
for what, (low, rho, high) in agreement.items():
    count = len(compared[what][0].keys() & compared[what][1].keys())
    print(f"{what}: {rho:.2f}, between {low:.2f} and {high:.2f} ({count} decoders)")

# %%
third = [what for what in cityscapes if what in means["scenes"]]
plotting.show_ranks(
    {
        where: {what.removeprefix("smp "): table[what] for what in third}
        for where, table in (
            ("scenes", means["scenes"]),
            ("Cityscapes", cityscapes),
        )
    },
    highlight=["DeepLabV3"],
    alt="Rankings of smp's decoders on scenes and on Cityscapes.",
)

# %% [markdown]
# Scenes and streets agree in the rough and not in detail. The default is first on both (but for `UPerNet`'s single seed,
# a tenth of a point above it), the same two are last, and much in between is not the same. The image beside the features
# falls from the third place to one of the last; smp's `FPN`, `Segformer` and `DeepLabV3Plus` gain most on streets.
# Without the two that read `c5` alone the agreement is less: they are last everywhere.
#
# With Cityscapes all intervals hold zero: so few decoders, most of them within two points there, can say nothing of each
# other. Look at `DeepLabV3`, though: first of the nine on Cityscapes, last of them on scenes. There the encoder learnt
# along, for 200 epochs; here it is frozen, and its last stages are stretched in a way that it never learned. A table
# tells you about its own setting. Do not take a decoder because it led one on other images, ours included.

# %%
low, rho, high = agreement["scenes, streets"]
assert low > 0 and 0.4 < rho < 0.8
assert agreement["  without the two of c5 alone"][1] < rho
orders = {w: sorted(shown, key=lambda what: -means[w][what]) for w in places}
assert (
    orders["scenes"][0]
    == "book decoder"
    == min(judged["streets"], key=orders["streets"].index)
)
assert {*orders["streets"][:2]} == {"book decoder", "smp UPerNet"}
assert {*orders["scenes"][-2:]} == {*orders["streets"][-2:]} == {*worst}
fell = [orders[w].index("image beside c3…c5") for w in places]
assert fell[0] == 2 and fell[1] > 13
gains = {w: orders["scenes"].index(w) - orders["streets"].index(w) for w in shown}
most = sorted(gains, key=gains.get)[-3:]
assert {*most} == {"smp FPN", "smp Segformer", "smp DeepLabV3Plus"}
for what, (low, _, high) in agreement.items():
    assert low < 0 < high or "Cityscapes" not in what
assert max(cityscapes, key=cityscapes.get) == "smp DeepLabV3"
assert sorted(third, key=means["scenes"].get).index("smp DeepLabV3") == 0

# %% [markdown]
# ## And if the encoder learns along?
#
# So far it was frozen. The default and three decoders of smp were trained on streets once more, with an encoder that
# learns along, at a smaller rate of its own. All else is as before, and the decoder's rate was chosen anew.

# %%
four = tuned.names("streets")
plotting.show_ranks(
    {
        title: {what: runs.mean("streets", what) for what in four}
        for title, runs in {"frozen": bench, "fine-tuned": tuned}.items()
    },
    highlight=["book decoder"],
    alt="The ranking of four decoders on streets, frozen and fine-tuned.",
)


# %%
def gained(what):
    """What fine-tuning adds, seed by seed."""
    frozen, learnt = (runs.values("streets", what) for runs in (bench, tuned))
    return [two - one for one, two in zip(frozen, learnt, strict=True)]


longer = {  # CPU time of a training at the chosen rate, in the mean
    what: tuned.mean("streets", what, "seconds")
    / bench.mean("streets", what, "seconds")
    for what in four
}
for what in four:
    low, middle, high = interval(gained(what))
    print(
        f"{what}: {middle:+.1f} by fine-tuning, between {low:+.1f} and "
        f"{high:+.1f}; {longer[what]:.1f} × the time"
    )
behind = {
    what: interval(tuned.differences("streets", what, "book decoder"))
    for what in four
    if what != "book decoder"
}
for what, (low, middle, high) in behind.items():
    print(
        f"{what} − book decoder, both fine-tuned: {middle:+.1f}, between "
        f"{low:+.1f} and {high:+.1f}"
    )

# %% [markdown]
# The order of the four is the same. But no gain and no loss is beyond what three seeds can tell: where all weights may
# move, seeds differ more. So only `Unet` is clearly behind the default; `FPN` and `Linknet` are on average, and no longer
# beyond doubt. And a training takes up to three times as long, since the maps cannot be computed once and kept. (These
# trainings were short, 10 epochs. Chapters 01 and 05 gave their decoders 20, and there fine-tuning paid.)

# %%
ranked = [
    sorted(four, key=lambda what: -runs.mean("streets", what))
    for runs in (bench, tuned)
]
assert ranked[0] == ranked[1]
assert ranked[0] == ["book decoder", "smp FPN", "smp Unet", "smp Linknet"]
for what in ranked[0]:
    assert 1.5 < longer[what] < 3 and len(gained(what)) == 3
    low, _, high = interval(gained(what))
    assert low < 0 < high
clear = {what: high < 0 for what, (_, _, high) in behind.items()}
assert clear == {"smp Unet": True, "smp FPN": False, "smp Linknet": False}
assert all(middle < -1 for _, middle, _ in behind.values())

# %% [markdown]
# ## Limits: what a small setting cannot tell
#
# - **One encoder, and mostly frozen.** It is small and was trained on small images. Fine-tuned, four decoders were
#   compared, and on streets only.
# - **Small images, few of them, short trainings.** A decoder with millions of weights may need more of all three before
#   it shows what it can do.
# - **Peers as they come.** smp's settings suit larger images, longer trainings, and encoders that learn along.
# - **The intervals know of seeds only.** Of no other images: 101 frames of one drive resemble each other, and another
#   drive may move more than any seed does. And not of the learning rate. Two were tried, with seed 0, and the images kept
#   for choosing had the last word. What would the other one have reported?


# %%
def other_rate(where, what):
    """What the rate that was not chosen reported, minus what the chosen one did."""
    tried = benchmark.where(data=where, what=what, seed=0, frozen=True)
    (best,), (rest,) = (tried.where(chosen=chosen) for chosen in (True, False))
    return rest["miou"] - best["miou"]


for where in places:
    change = {what: other_rate(where, what) for what in judged[where]}
    better = sorted((w for w in change if change[w] > 0), key=lambda w: -change[w])
    ranges = [max(scores(where, w)) - min(scores(where, w)) for w in judged[where]]
    most = ", ".join(f"{change[what]:.1f} ({what})" for what in better[:3])
    say(
        f"{where}: seeds differ by {fmean(ranges):.1f} points on average; the "
        f"other rate was better {len(better)} times of {len(change)}, by {most} "
        "at most"
    )

# %% [markdown]
# ## Exercises

# %% [markdown]
# **Exercise 1.** Return the set of all decoders with three seeds that cannot be told from smp's `Unet` on scenes: those
# whose interval of paired differences holds zero.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_same(answer):
    what = "smp Unet"
    others = [name for name in judged["scenes"] if name != what]
    spans = {name: interval(paired(what, name, "scenes")) for name in others}
    expected = {name for name, (low, _, high) in spans.items() if low < 0 < high}
    try:
        same = answer()
    except (KeyError, NameError, TypeError, ValueError) as error:
        return print(f"It stops with {type(error).__name__}: {error}")
    if same is None:
        return print("Nothing returned yet: return a set of names.")
    if not isinstance(same, (set, frozenset, list, tuple)):
        return print("Return a set of names, such as {'U-Net', 'smp FPN'}.")
    same = set(same)
    if what in same:
        return print(f"{what} itself is in it: compare it with the others only.")
    if same - set(others):
        unknown = ", ".join(sorted(map(str, same - set(others))))
        return print(f"Not a decoder with three seeds on scenes: {unknown}.")
    if same - expected:
        name = sorted(same - expected)[0]
        low, _, high = spans[name]
        return print(f"{name} can be told from it: {low:+.1f} to {high:+.1f}.")
    if expected - same:
        return print(
            f"{len(expected - same)} are missing: zero is in their interval."
        )
    print("Right:", ", ".join(sorted(expected)))


# %%
def same_as_unet():
    """Return the names."""


check_same(same_as_unet)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def same_as_unet_solution():
    found = set()
    for other in judged["scenes"]:
        if other != "smp Unet":
            low, _, high = interval(paired("smp Unet", other, "scenes"))
            if low < 0 < high:
                found.add(other)
    return found


check_same(same_as_unet_solution)

# %% [markdown]
# **Exercise 2.** Your device has a budget, and a customer who accepts a little less. Write the rule: of the decoders with
# three seeds, the one of least `cost` whose mean mIoU is at most `loss` points behind the best mean. `cost` is a function
# of the name: `time`, say, or the memory of a training step.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def memory(what):
    return costs[what]["peak_mb"]


def check_cheapest(answer):
    cases = [("scenes", 0.0, time), ("scenes", 7.0, time), ("streets", 4.0, time)]
    for where, loss, cost in [*cases, ("scenes", 4.0, memory)]:
        case = f"{where}, at most {loss:.0f} points behind, by {cost.__name__}"
        average = {what: mean(where, what) for what in judged[where]}
        best = max(average.values())
        least = min(cost(w) for w in average if average[w] >= best - loss)
        try:
            name = answer(where, loss, cost)
        except (KeyError, NameError, TypeError, ValueError) as error:
            return print(f"It stops with {type(error).__name__}: {error}")
        if name is None:
            return print("Nothing returned yet: return a name.")
        if name not in average:
            return print(f"{name!r} is no decoder with three seeds on {where}.")
        if average[name] < best - loss:
            return print(f"{case}: {name} is {best - average[name]:.1f} behind.")
        if cost(name) > least:
            return print(f"{case}: {name} costs {cost(name)}; {least} will do.")
        print(f"{case}: {name}, {cost(name)}")
    print("Right, four times.")


# %%
def cheapest(where, loss, cost):
    """Return a name."""


check_cheapest(cheapest)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def cheapest_solution(where, loss, cost):
    average = {what: mean(where, what) for what in judged[where]}
    best = max(average.values())
    return min((w for w in average if average[w] >= best - loss), key=cost)


check_cheapest(cheapest_solution)

# %% [markdown]
# **Exercise 3.** Spearman's correlation is Pearson's, of ranks. Compute it with numpy, for two arrays without equal
# values; `argsort` gives an order, and the ranks are the order of that order.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_spearman(answer):
    dice = np.random.default_rng(0)
    cases = [
        (np.arange(5.0), np.arange(5.0) ** 3),
        (np.arange(5.0), -np.arange(5.0)),
    ]
    cases += [dice.normal(size=(2, 9)) for _ in range(3)]
    for one, other in cases:
        expected = stats.spearmanr(one, other).statistic
        try:
            found = answer(one.copy(), other.copy())
        except (
            AttributeError,
            IndexError,
            NameError,
            TypeError,
            ValueError,
        ) as error:
            return print(f"It stops with {type(error).__name__}: {error}")
        if found is None:
            return print("Nothing returned yet: return a number.")
        if not isinstance(found, (int, float, np.number)) or not np.isfinite(found):
            return print(f"One finite number, please; got {found!r}.")
        off, pearson = abs(found - expected), np.corrcoef(one, other)[0, 1]
        if abs(found - pearson) < 1e-9 < off:
            return print("That is Pearson's of the values: rank them first.")
        if off > 1e-9:
            return print(f"{found:.3f}, expected {expected:.3f}: are those ranks?")
    print("Right, in five cases.")


# %%
def spearman(one, other):
    """Return the correlation of the ranks of two arrays."""


check_spearman(spearman)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def spearman_solution(one, other):
    ranks = [values.argsort().argsort() for values in (one, other)]
    return np.corrcoef(*ranks)[0, 1]


check_spearman(spearman_solution)

# %% [markdown]
# ## Recap
#
# - What should come out decides the kind of bridge; `suggest` names one, with a program.
# - Of any comparison ask: more than luck? at which price? best at *what*? on images like mine?
# - Three seeds tell large differences. Where they tell none, take what is cheaper, or simpler.
# - Nobody is best everywhere. Train the two or three that you like on *your* images, three seeds each, and score what you
#   need.
#
# | shape contract | |
# |---|---|
# | in | images `[B, 3, H, W]`, normalised, H and W from 32 on |
# | `mask`, `image` | → `[B, out_channels, H, W]`, in a `Segmenter` |
# | `vector` | → `[B, D]` |
# | `tokens` | → `[B, N, D]` |
# | `words` | words `[B, T]` → `[B, T, words]` |
# | `map` | → `[B, C, h, w]` |
# | `ShortEncoder(encoder, levels=3)` | → `c1…c3` as before, `c4` and `c5` empty |
# | an answer that nobody offers | raises `ValueError`, with those that are |
#
# In your own project:
#
# ```python
# from helpers import suggest
#
# print(suggest(out="mask", need="thin"))  # why, the shapes, a program to paste
# ```
