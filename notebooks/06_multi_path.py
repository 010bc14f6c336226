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
# # 06 · How do I use every stage at once?
#
# Five maps leave the encoder, and you would like your decoder to see all of them together, not one after
# the other. So each gets a path of its own up to a common size, and at the end the paths are stacked.
# PyTorch answers `Sizes of tensors must match except in dimension 1`. The cure is one argument. The
# question behind it is worth a chapter: what do many paths keep that one large upsampling loses?

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

# %% [markdown]
# ## What you will see
#
# - what one enlargement can draw, before any network: discs survive ×32, rings do not;
# - the decoder as it is often posted, whose paths all double, so that no two of them fit together;
# - paths with the right factors, which work at some sizes only, and paths that work at all of them;
# - late fusion, by concatenation and by sum, and how the two are related;
# - its two modern cousins, the feature pyramid network and SegFormer's head;
# - three trainings while you wait, and a mask that is put together level by level;
# - measured with three seeds: what each factor of enlargement loses, and which class needs which level.

# %%
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional import jaccard_index

from helpers import camvid, plotting, records, scenes
from helpers.encoder import (
    OUT_CHANNELS,
    Pyramid,
    ResNet18Encoder,
    Segmenter,
    normalize,
)
from helpers.errors import explaining
from helpers.inspection import count_macs, count_parameters, pyramid_levels, shapes
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import budget, evaluate, fit, predict

# %% [markdown]
# ## The problem as a picture
#
# One large upsampling: a decoder decides on a coarse grid, how much each position looks like each class,
# and enlarges these scores to the size of the image. Leave the network out, and choose the scores as
# well as they can be chosen: such that, enlarged bilinearly, they come closest to the true mask. Enlarging
# is a matrix, so the closest scores are a matter of its pseudo-inverse.

# %%
images, masks = scenes.batch(range(5_000, 5_064))
classes = len(scenes.CLASSES)


def enlarged_once(masks, factor):
    """Scores [B, classes, H, W] from a grid `factor` coarser, fitted to masks."""
    units = torch.eye(masks.shape[-1] // factor)[None]  # each score, to be enlarged
    enlarge = F.interpolate(units, masks.shape[-1], mode="linear")[0].T
    fit = torch.linalg.pinv(enlarge)
    wanted = F.one_hot(masks, classes).movedim(-1, 1).float()
    scores = fit @ wanted @ fit.T  # [B, classes, H / factor, W / factor]
    return enlarge @ scores @ enlarge.T


factors = (32, 16, 8, 4, 2)
enlarged = {factor: enlarged_once(masks, factor) for factor in factors}
example = 21
drawn = [scores[example].argmax(0) for scores in enlarged.values()]
plotting.show_images(
    [images[example], *(plotting.colorize(mask) for mask in drawn)],
    titles=["image", *(f"×{factor}" for factor in factors)],
    columns=3,
    alt="A disc, a star, a ring, a square; enlarged by 32, two blobs are left.",
)

# %% [markdown]
# At ×32 a star has become a lens and the ring is gone; at ×8 the star has arms again; the ring comes back
# at ×4, in pieces. The same for 64 scenes, class by class. So that thin classes are not simply outvoted,
# each is drawn where its score passes the threshold that suits it best:


# %%
def ceiling(scores, masks, k):
    """The IoU of class k, %, at the threshold of its scores that suits it best."""
    true = masks == k
    found = [scores[:, k] > t for t in torch.linspace(0.05, 0.6, 9)]
    return max(100 * float((f & true).sum() / (f | true).sum()) for f in found)


kinds = {
    name: scenes.CLASSES.index(name) for name in ("disc", "star", "ring", "pole")
}
best = {
    name: [ceiling(enlarged[factor], masks, k) for factor in factors]
    for name, k in kinds.items()
}
plotting.show_curves(
    best,
    x=[f"×{factor}" for factor in factors],
    xlabel="one enlargement, by",
    ylabel="IoU with the true mask, %",
    alt="Discs begin at three quarters, stars at a half, thin things near nothing.",
)

# %%
assert best["disc"][0] > 70 and 40 < best["star"][0] < 60
for thin in ("ring", "pole"):
    assert 5 < best[thin][0] < 15 and best[thin][2] < 45 and best[thin][4] > 75

# %% [markdown]
# This is what the *enlargement* loses, with perfect knowledge of the scene. A disc keeps three quarters of its
# overlap at ×32, a star half of it. Of a ring or a pole about a tenth is left, and that tenth is a blob
# where a ring should be; even at ×8 it is less than half. (Closest means least squares here. And a decoder
# that goes on computing *after* it has enlarged, as all that are trained below, may do a little better.)
#
# The finer maps are there, but `c1` does not know what a star is. No single grid both knows what and
# knows where. Hence the idea: take all five, and enlarge each by what *it* needs.
#
# ## The shapes
#
# All paths are to end on the grid of `c1`. By which factor does each level have to grow?

# %%
for height, width in [(224, 224), (180, 240)]:
    c1, *others = pyramid_levels(height, width)
    print(f"{height} × {width}: c1 is {c1.height} × {c1.width}")
    for level in others:
        rows, columns = c1.height / level.height, c1.width / level.width
        side = f"{level.height} × {level.width}"
        print(f"  {level.name}  {side:8} rows ×{rows:.4g}, columns ×{columns:.4g}")

# %% [markdown]
# For 224 pixels, a power of two each. For the street images of 180 × 240, `c3` and `c4` have to grow by
# different factors in rows and columns, some of which are no whole numbers, and `c5` needs 15, not 16.
# Keep that in mind.
#
# ## The obvious attempt, and what it does wrong
#
# One transposed convolution for each of `c2` to `c5`, stacked, and a 1×1 convolution: this is how the idea
# is often posted, rebuilt in a few lines. Each path doubles its map.


# %%
class FirstAttempt(nn.Module):
    """c2…c5, each enlarged by its factor, concatenated, mixed by a 1×1."""

    def __init__(self, out_channels, factors):
        super().__init__()
        self.paths = nn.ModuleList(
            nn.ConvTranspose2d(channels, 32, kernel_size=factor, stride=factor)
            for channels, factor in zip(OUT_CHANNELS[1:], factors, strict=True)
        )
        self.head = nn.Conv2d(4 * 32, out_channels, kernel_size=1)

    def forward(self, pyramid):
        maps = [path(c) for path, c in zip(self.paths, pyramid[1:], strict=True)]
        return self.head(torch.cat(maps, dim=1))


torch.manual_seed(0)
encoder = ResNet18Encoder()
doubling = FirstAttempt(classes, factors=(2, 2, 2, 2))

# %% tags=["raises-exception"]
with explaining():
    doubling(encoder(torch.rand(1, 3, 224, 224)))

# %% [markdown]
# Doubled, the four maps have 112, 56, 28 and 14 columns. They stood a factor of two apart, and so they still
# do: doubling moves the whole pyramid up by one step and brings no two levels together. What each path
# needs is a factor of its own, 2, 4, 8, 16:

# %%
powers = FirstAttempt(classes, factors=(2, 4, 8, 16))
print("logits", list(shapes(powers, encoder(torch.rand(1, 3, 224, 224)))))
for name, path in zip(("c2", "c3", "c4", "c5"), powers.paths, strict=True):
    print(f"path of {name}: {count_parameters(path):,} parameters")

# %% [markdown]
# It runs. It has become expensive, because a transposed convolution that enlarges by 16 has 16 × 16 weights
# for each pair of channels. And then somebody sends an image from the street:

# %% tags=["raises-exception"]
with explaining():
    powers(encoder(torch.rand(1, 3, 180, 240)))

# %% [markdown]
# 45 rows, halved and rounded up, are 23, and four times 23 is 92 where 90 wait. **A factor is the wrong
# thing to fix.** What is known at every size is the *goal*: the height and width of `c1`. So neither a
# stride nor `scale_factor=4`, but `F.interpolate(x, size=c1.shape[-2:], mode="bilinear")`: that `size` is
# the one argument.
#
# ## The technique
#
# ### A path that ends where it should
#
# A path has two parts. The first makes the levels comparable, with as many channels each, normalised, and
# bent by a ReLU. It works on the level's own grid, where it is cheap (chapter 03). The second enlarges, to
# the size of another map.

# %% tags=["export"]
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.encoder import Pyramid, check_pyramid


# %% tags=["export"]
def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 1×1 convolution, BatchNorm and ReLU, in this order.

    They take `[B, in_channels, h, w]`, any h, w, and return
    `[B, out_channels, h, w]`, no value negative. In training mode they raise
    `ValueError` for one image with a single position: BatchNorm needs two values.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def resize_to(goal: Tensor, map_: Tensor) -> Tensor:
    """Return `map_` `[B, C, h, w]` in the size of `goal` `[B, D, H, W]`.

    Bilinearly; the result is `[B, C, H, W]`, for any sizes. Raises `ValueError`
    where `map_` is no map of four dimensions.
    """
    if map_.ndim != 4:
        raise ValueError(
            f"Expected a map [B, C, h, w], got {list(map_.shape)}. One image needs "
            "a batch, too: map_[None]."
        )
    return F.interpolate(map_, size=goal.shape[-2:], mode="bilinear")


# %%
pyramid = encoder(normalize(torch.rand(2, 3, 180, 240)))
for name, map_ in pyramid._asdict().items():
    path = projection(map_.shape[1], 32)
    ended = resize_to(pyramid.c1, path(map_))
    print(f"{name} {list(map_.shape)} → {list(ended.shape)}")
    assert ended.shape == (2, 32, 90, 120)

# %% [markdown]
# Five levels, one size. Enlarging has nothing to learn here, which saves the millions of weights above.
# (Whether a learned enlargement draws better is the question of chapter 08.)
#
# ### Late fusion by concatenation
#
# Now the decoder. The levels do not meet before the end, where a 1×1 convolution sees what all five say
# about a pixel. Nothing else is in it:


# %% tags=["export"]
class MultiPathDecoder(nn.Module):
    """Every level on a path of its own to c1's grid, concatenated, then mixed.

    `forward(pyramid)` takes the encoder's five maps, from images of any H, W ≥ 32,
    and returns `[B, out_channels, ⌈H/2⌉, ⌈W/2⌉]`; `Segmenter` brings it to H × W.
    `width` is the number of channels of each path. Raises `ValueError` for maps
    with other channels than `in_channels`, `TypeError` for integers, and, in
    training mode, `ValueError` for one image of 32 × 32 pixels: its c5 is a single
    position, and BatchNorm needs two values.

    Source: cf. Hariharan et al., Hypercolumns, CVPR 2015.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, width: int = 32
    ):
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.paths = nn.ModuleList(projection(c, width) for c in self.in_channels)
        self.mix = projection(len(self.paths) * width, width)
        self.head = nn.Conv2d(width, out_channels, kernel_size=1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        levels = zip(self.paths, pyramid, strict=True)
        maps = [resize_to(pyramid.c1, path(c)) for path, c in levels]
        return self.head(self.mix(torch.cat(maps, dim=1)))


# %%
model = Segmenter(encoder, MultiPathDecoder(encoder.out_channels, classes))
for height, width in [(224, 224), (180, 240), (33, 97)]:
    logits = model(normalize(torch.rand(2, 3, height, width)))
    print(f"{height} × {width} → {list(logits.shape)}")
    assert logits.shape == (2, classes, height, width)

# %%
plotting.pyramid_diagram(
    encoder,
    images[example],
    model.decoder,
    alt="From each of the encoder's maps an arrow leads to a path of the decoder.",
)

# %% [markdown]
# Compare this drawing with the one in chapter 05. There the information climbs a staircase, and every
# step adds a map. Here each level has its own lift to the top floor.
#
# ### Late fusion by sum
#
# If all paths have the same channels, they can be added instead. Forget to resize here, and the complaint
# has other words:

# %% tags=["raises-exception"]
paths = model.decoder.paths
with explaining():
    sum(path(c) for path, c in zip(paths, pyramid, strict=True))


# %% tags=["export"]
class SummedPathDecoder(nn.Module):
    """As `MultiPathDecoder`, but the paths are added, and all are mixed alike.

    Takes, returns and raises what `MultiPathDecoder` does.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, width: int = 32
    ):
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.paths = nn.ModuleList(projection(c, width) for c in self.in_channels)
        self.mix = projection(width, width)
        self.head = nn.Conv2d(width, out_channels, kernel_size=1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        levels = zip(self.paths, pyramid, strict=True)
        maps = [resize_to(pyramid.c1, path(c)) for path, c in levels]
        return self.head(self.mix(sum(maps)))


# %% [markdown]
# How are the two related? The concatenation's 1×1 has a block of weights for each level. Give all five blocks
# the weights of the sum's, and both compute the same:

# %%
summed = SummedPathDecoder(encoder.out_channels, classes).eval()
stacked = MultiPathDecoder(encoder.out_channels, classes).eval()
state = summed.state_dict()
state["mix.0.weight"] = state["mix.0.weight"].repeat(1, 5, 1, 1)
stacked.load_state_dict(state)
with torch.no_grad():
    same = torch.allclose(stacked(pyramid), summed(pyramid), atol=1e-4)
print("a sum is a concatenation with equal blocks:", same)
assert same

# %% [markdown]
# With paths of the same width there is no way back. In chapter 03 a concatenation was no more than a sum,
# because nothing stood between the projection and the join. Here each path ends in a ReLU, past which a
# weight cannot be moved. (A sum of paths five times as wide could do it, each path keeping to channels of
# its own.) Whether it matters is measured below.
#
# ### One path, for comparison
#
# What would be a fair opponent with a single large upsampling? One path from `c5`, as wide as the five are
# together, so that everything after it stays the same:


# %% tags=["export"]
class OnePathDecoder(nn.Module):
    """c5 alone, on one path with as many channels as five have together.

    Reads the values of c5 only, and from c1 the size. Otherwise takes, returns and
    raises what `MultiPathDecoder` does. Built for comparisons.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, width: int = 32
    ):
        super().__init__()
        self.in_channels = tuple(in_channels)
        wide = len(self.in_channels) * width
        self.path = projection(self.in_channels[-1], wide)
        self.mix = projection(wide, width)
        self.head = nn.Conv2d(width, out_channels, kernel_size=1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        x = resize_to(pyramid.c1, self.path(pyramid.c5))
        return self.head(self.mix(x))


# %% [markdown]
# It has fewer maps *and* a coarser grid. If it loses, was it the upsampling, or what `c1` to `c4` know and
# `c5` does not? To get nearer to an answer, there is a third decoder: it sees all five levels, but each has
# gone through the grid of `c5`, averaged down, enlarged again. It knows the *average* of what every stage
# says, over cells of 32 × 32 pixels.


# %% tags=["export"]
class ThroughGrid(nn.Module):
    """A decoder whose finer maps have all passed through the grid of one level.

    `ThroughGrid(decoder, "c5")` takes and returns what `decoder` does. Each map
    that is finer than the level is averaged down to its grid and enlarged to its
    own size again, bilinearly: what varies within a cell is gone. Built for
    comparisons. Raises `ValueError` for a name that is no map's, `TypeError` for a
    decoder that does not say its `in_channels`, and what `decoder` raises.
    """

    def __init__(self, decoder: nn.Module, level: str):
        super().__init__()
        if level not in Pyramid._fields:
            raise ValueError(f"Expected a name among c1…c5, got {level!r}.")
        in_channels = getattr(decoder, "in_channels", None)
        if in_channels is None:
            raise TypeError(
                "Expected a decoder with in_channels, got "
                f"{type(decoder).__name__}. Wrap the decoder itself, or set its "
                "in_channels."
            )
        self.decoder = decoder
        self.in_channels = tuple(in_channels)
        self.place = Pyramid._fields.index(level)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        finer, coarser = pyramid[: self.place], pyramid[self.place :]
        height, width = coarser[0].shape[-2:]
        averaged = [F.adaptive_avg_pool2d(c, (height, width)) for c in finer]
        passed = [resize_to(c, a) for c, a in zip(finer, averaged, strict=True)]
        return self.decoder(Pyramid(*passed, *coarser))


# %%
sizes = {"in_channels": encoder.out_channels, "out_channels": classes}


def through_c5(**sizes):
    return ThroughGrid(MultiPathDecoder(**sizes), "c5")


compared = {
    "one path": OnePathDecoder,
    "through c5's grid": through_c5,
    "many paths": MultiPathDecoder,
}
parameters = {
    name: count_parameters(make(**sizes)) for name, make in compared.items()
}
for name, make in compared.items():
    shape = list(shapes(make(**sizes), pyramid))
    print(f"{name:18} {parameters[name]:,} parameters → {shape}")
assert parameters["one path"] > 2 * parameters["many paths"]

# %% [markdown]
# The single path has more than twice the parameters: if it scores lower, too few of them are not the reason.
#
# ### Two cousins
#
# The idea is alive. A **feature pyramid network** leaves `c1` out and lets each level hear what the coarser
# ones have said before it speaks: a *top-down* path, `p5` down to `p2`, then a 3×3 convolution for each
# level, then late fusion, by sum. (In detection each of `p2` to `p5` gets a head of its own; the sum makes a
# mask of them.)


# %% tags=["export"]
class FPNDecoder(nn.Module):
    """A feature pyramid network's p2…p5, each enlarged to c2's grid, and summed.

    `forward(pyramid)` takes the encoder's five maps and returns
    `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]`; c1 is not read. Otherwise it takes and raises
    what `MultiPathDecoder` does.

    Source: Lin et al., FPN, CVPR 2017; the sum cf. Kirillov et al., Panoptic FPN,
    CVPR 2019.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, width: int = 32
    ):
        super().__init__()
        self.in_channels = tuple(in_channels)
        levels = self.in_channels[1:]
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in levels)
        self.smooths = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for _ in levels
        )
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        levels = zip(self.laterals, pyramid[1:], strict=True)
        p2, p3, p4, p5 = [lateral(c) for lateral, c in levels]
        p4 = p4 + resize_to(p4, p5)
        p3 = p3 + resize_to(p3, p4)
        p2 = p2 + resize_to(p2, p3)
        levels = zip(self.smooths, (p2, p3, p4, p5), strict=True)
        maps = [resize_to(p2, smooth(p)) for smooth, p in levels]
        return self.head(sum(maps))


# %% [markdown]
# **SegFormer's head** goes the other way and leaves out all that can be left out: for each of `c2` to `c5` one
# linear layer per position, no activation; enlarge, concatenate, one more linear layer, now with BatchNorm
# and ReLU. (Its authors argue that this suffices behind a transformer, whose maps look far. Here it stands
# behind a ResNet.)


# %% tags=["export"]
class SegFormerDecoder(nn.Module):
    """SegFormer's head: each of c2…c5 through one linear layer, then fused.

    `forward(pyramid)` takes the encoder's five maps and returns
    `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]`; c1 is not read. Raises `ValueError` for maps
    with other channels than `in_channels`, `TypeError` for integers.

    Source: Xie et al., SegFormer, NeurIPS 2021, without its dropout.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, width: int = 32
    ):
        super().__init__()
        self.in_channels = tuple(in_channels)
        levels = self.in_channels[1:]
        self.linears = nn.ModuleList(nn.Conv2d(c, width, 1) for c in levels)
        self.fuse = projection(len(levels) * width, width)
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        levels = zip(self.linears, pyramid[1:], strict=True)
        maps = [resize_to(pyramid.c2, linear(c)) for linear, c in levels]
        return self.head(self.fuse(torch.cat(maps, dim=1)))


# %%
cousins = {
    "many paths": MultiPathDecoder(**sizes),
    "sum": SummedPathDecoder(**sizes),
    "FPN": FPNDecoder(**sizes),
    "SegFormer head": SegFormerDecoder(**sizes),
}
scene = encoder(normalize(images[:1]))
macs = {name: count_macs(decoder, scene) for name, decoder in cousins.items()}
for name, decoder in cousins.items():
    count = f"{count_parameters(decoder):,} parameters"
    print(
        f"{name:15} {count}, {macs[name]:,} MACs → {list(shapes(decoder, scene))}"
    )
assert macs["SegFormer head"] < 0.4 * macs["many paths"]

# %% [markdown]
# Both cousins stop on the grid of `c2`, with a quarter of the positions. Enlarging by four at the end is left
# to `Segmenter`.
#
# ## Train it
#
# The three decoders of the comparison, on 128 scenes for a few seconds each. `fit` is the book's training
# loop; the encoder is frozen, so its maps are computed once and kept.

# %%
epochs = budget(short=5, full=40)
train, unseen = scenes.Scenes(128), scenes.Scenes(40, first=5_000)
train = [train[i] for i in range(len(train))]  # draw each scene once
loss = SegmentationLoss(class_weights=class_weights((m for _, m in train), classes))


def train_with(make):
    """A `Segmenter` with a new decoder, trained, and its history."""
    torch.manual_seed(0)
    model = Segmenter(encoder, make(**sizes))
    history = fit(model, train, epochs=epochs, lr=5e-3, loss=loss, flip=False)
    return model, history


trained = {name: train_with(make) for name, make in compared.items()}

# %% tags=["nbval-ignore-output"]
plotting.show_histories(
    {name: history for name, (_, history) in trained.items()},
    alt="Many paths end with the lowest loss and the highest mIoU.",
)

# %% tags=["nbval-ignore-output"]
shown = [4, 21, 26, 61]
plotting.show_masks(
    {
        "mask": masks[shown],
        **{name: predict(m, images[shown]) for name, (m, _) in trained.items()},
    },
    alt="Four scenes: blobs from one path or one grid, outlines from many paths.",
)

# %% tags=["nbval-ignore-output"]
scored = {name: evaluate(model, unseen) for name, (model, _) in trained.items()}
for name, score in scored.items():
    boundary = score.boundary_miou
    print(f"{name:18} mIoU {score.miou:.1f} %, boundary IoU {boundary:.1f} %")

# %%
for _, history in trained.values():
    assert history.loss[-1] < 0.75 * history.loss[0]
many, one, coarse = (
    scored[n] for n in ("many paths", "one path", "through c5's grid")
)
assert trained["many paths"][1].loss[-1] < 0.5 * trained["many paths"][1].loss[0]
assert many.miou > one.miou + 5 and many.miou > coarse.miou + 4
assert many.boundary_miou > 2 * max(one.boundary_miou, coarse.boundary_miou)
assert coarse.miou - one.miou < many.miou - coarse.miou

# %% [markdown]
# *mIoU* is the overlap of prediction and mask, averaged over the classes; *boundary IoU*
# counts only pixels within two pixels of an outline. In the picture, compare *one path* with *through c5's
# grid*: hearing all five stages, while it comes through one coarse grid, gains less than the last step, to
# *many paths*.
#
# ## Look inside: a mask, level by level
#
# Late fusion can be taken apart. Let a path say at every position what it says *on average*: then it carries
# no information, and all the weights after it still get what they are used to. Mute all paths but that
# of `c5`, and let the others join one by one.


# %%
@torch.no_grad()
def with_levels(decoder, pyramid, kept):
    """The decoder's logits when all levels but those named in `kept` are muted."""
    maps = []
    for name, path, c in zip(Pyramid._fields, decoder.paths, pyramid, strict=True):
        ended = resize_to(pyramid.c1, path(c))
        average = ended.mean(dim=(0, 2, 3), keepdim=True)
        maps.append(ended if name in kept else average.expand_as(ended))
    return decoder.head(decoder.mix(torch.cat(maps, dim=1)))


model = trained["many paths"][0].cpu()  # fit may have taken it to a GPU
decoder = model.decoder.eval()
pyramid = encoder(normalize(images))
predicted, kept = {}, []
for name in reversed(Pyramid._fields):
    kept.append(name)
    logits = with_levels(decoder, pyramid, kept)
    predicted[" + ".join(kept)] = resize_to(images, logits).argmax(1)

# %% tags=["nbval-ignore-output"]
frames = [
    plotting.show_masks(
        {"mask": masks[shown], "predicted": found[shown]},
        alt="Masks, and what the decoder draws from some of its levels.",
    )
    for found in predicted.values()
]
plotting.flipbook(
    frames,
    list(predicted),
    alt="Predictions as the levels join, the coarsest first",
)


# %%
def iou(found, masks):
    """The IoU of each class over masks [B, H, W], in per cent."""
    options = {"task": "multiclass", "num_classes": classes, "average": "none"}
    return 100 * jaccard_index(found, masks, **options)


overlap = torch.stack([iou(found, masks) for found in predicted.values()])
after = dict(
    zip(("c5", "c4", "c3", "c2", "c1"), overlap.mean(1).tolist(), strict=True)
)
assert after["c5"] == min(after.values()) and after["c1"] > after["c4"] + 8
for thin in ("ring", "pole"):
    from_c5, from_c4, from_c3, from_c2, _ = overlap[:, kinds[thin]]
    assert from_c2 > max(from_c4, from_c3) + 3

# %% [markdown]
# Pull the slider. By itself `c5` draws next to nothing: its word counts only together with others. With `c4`
# the large things are there, as blobs. `c3` gives them shapes, `c2` brings the thin ones, rings and
# poles, and `c1` tidies the outlines. (In this order. Another order would give other shares.)
#
# This network was *trained* with all five, so you see what it listens to, not what it could do without. To
# know that, train it without.
#
# ## Measure the claims
#
# One seed and a few seconds prove little. `python -m experiments.claims multi_path --on scenes` trains each
# variant three times, with three seeds, on 400 scenes, and reports on 200 scenes that no training saw; with
# `--on streets --only "one path" "many paths"` these two are trained on **CamVid**, 266 street photographs
# from two drives, and reported on 101 frames of a third. What follows is read from its records. (The U-Net's are those of chapter 05, from the same
# budget.)

# %%
unets = records.of("unet", what="U-Net")
evidence = records.Evidence([*records.of("multi_path"), *unets])


def gain(what, over, *field):
    """Points on scenes that one decoder adds to another, mean over seeds."""
    one, other = (evidence.mean("scenes", name, *field) for name in (what, over))
    return one - other


assert len(evidence.values("streets", "many paths")) >= 3
for what in evidence.names("scenes"):
    assert len(evidence.values("scenes", what)) >= 3

# %% [markdown]
# **Many paths avoid what one large upsampling loses.** First on scenes, all three decoders. The bars are means,
# the points single seeds:

# %% tags=["nbval-ignore-output"]
for field, label in {"miou": "mIoU", "boundary_miou": "boundary IoU"}.items():
    display(
        plotting.show_bars(
            {what: evidence.values("scenes", what, field) for what in compared},
            ylabel=f"{label} on unseen scenes, %",
            highlight="many paths",
            alt=f"{label}: many paths are far ahead of the other two.",
        )
    )

# %%
for other, points in {"one path": 18, "through c5's grid": 13}.items():
    assert evidence.margin("scenes", "many paths", other) > points
    assert evidence.margin("scenes", "many paths", other, "boundary_miou") > 15
known = gain("through c5's grid", "one path")
assert 0.15 < known / gain("many paths", "one path") < 0.35

# %% [markdown]
# The claim holds: more than 18 points of mIoU lie between one path and many. About a quarter of that comes back
# when `c5` is joined by the *averages* of the finer stages. The rest is what averaging over the cells took:
# above all, where.
#
# And on streets, beside the U-Net of chapter 05, which has about thirty times as many parameters:

# %% tags=["nbval-ignore-output"]
on_streets = ("one path", "many paths", "U-Net")
for field, label in {"miou": "mIoU", "boundary_miou": "boundary IoU"}.items():
    display(
        plotting.show_bars(
            {what: evidence.values("streets", what, field) for what in on_streets},
            ylabel=f"{label} on unseen streets, %",
            highlight="many paths",
            alt=f"{label} on streets of one path, many paths and the U-Net.",
        )
    )

# %%
for field in ("miou", "boundary_miou"):
    assert evidence.margin("streets", "many paths", "one path", field) > 6
    assert evidence.margin("streets", "U-Net", "many paths", field) > 1
large, small = (
    evidence.mean("scenes", what, "parameters") for what in ("U-Net", "many paths")
)
assert large > 25 * small

# %% tags=["nbval-ignore-output"]
frames_shown = (10, 35, 60, 85)  # evenly spaced, chosen before the first training
files = {
    "one path": ("multi_path", "one_path"),
    "many paths": ("multi_path", "many_paths"),
    "U-Net": ("unet", "u-net"),
}
plotting.show_masks(
    {
        name: [records.picture(slug, f"{file}_{k}") for k in frames_shown]
        for name, (slug, file) in files.items()
    },
    colors=camvid.PALETTE,
    alt="Predictions on four streets: blobs from one path, outlines from many.",
)

# %% [markdown]
# Here, too, many paths are more than 6 points ahead of one; the U-Net, with so many more parameters, is ahead
# of them by a point or more. (These are the frames of chapter 05, which has a cell that brings the
# photographs to your screen.)
#
# **How large may the one enlargement be?** All five levels through the grid of `c5`, of `c4`, and so on; on the
# grid of `c1` nothing is lost any more:

# %% tags=["nbval-ignore-output"]
by_grid = [f"through {name}'s grid" for name in ("c5", "c4", "c3", "c2")]
by_grid = [*by_grid, "many paths"]  # c1's grid
curves = {
    label: torch.tensor(
        [evidence.values("scenes", what, field) for what in by_grid]
    ).T
    for field, label in {"miou": "mIoU", "boundary_miou": "boundary IoU"}.items()
}
plotting.show_curves(
    curves,
    x=[f"×{factor}" for factor in factors],
    xlabel="all five levels, enlarged together by",
    ylabel="on unseen scenes, %",
    alt="Both scores climb with each halving; mIoU flattens, boundary IoU goes on.",
)

# %%
miou, boundary = (
    [evidence.mean("scenes", what, field) for what in by_grid]
    for field in ("miou", "boundary_miou")
)
assert miou == sorted(miou) and boundary == sorted(boundary)
assert miou[2] - miou[0] > 2 * (miou[4] - miou[2])
assert boundary[4] - boundary[3] > 2

# %% [markdown]
# Every halving of the factor pays. mIoU gains most by the first two, from ×32 to ×8, and then flattens; the rims
# go on gaining to the end. Where the outline matters, the last ×2 is worth having, and no mIoU will tell you
# so.
#
# **Concatenate or add? And the cousins?** All of width 32, and the U-Net once more:

# %% tags=["nbval-ignore-output"]
fusions = ("many paths", "sum", "FPN", "SegFormer head", "U-Net")
for field, label in {"miou": "mIoU", "boundary_miou": "boundary IoU"}.items():
    display(
        plotting.show_bars(
            {what: evidence.values("scenes", what, field) for what in fusions},
            ylabel=f"{label} on unseen scenes, %",
            highlight="many paths",
            alt=f"{label} on scenes of five ways to use all levels.",
        )
    )

# %%
assert 1 < gain("many paths", "sum") < 3
assert macs["many paths"] > 1.9 * macs["sum"]
for what in ("FPN", "SegFormer head"):
    assert 4 < gain("many paths", what) < 8
    assert 1 < gain("without c1", what) < 4
assert abs(gain("U-Net", "many paths")) < 1
assert evidence.margin("scenes", "many paths", "U-Net", "boundary_miou") > 2

# %% [markdown]
# At equal width per path the two ways of fusing are not interchangeable: a block of weights for each level is
# worth one to three points, for twice the MACs (exercise 2 gets most of them back). The cousins lose more than
# 4. They never see `c1`, and end below what the many paths reach without it; a 3×3 on a coarser grid does not
# make up for that here. And the U-Net? On scenes, with about thirty times the parameters, it is no better
# in mIoU, and more than 2 points worse at the rims, with every seed. On streets, above, it was the other way round.
#
# **Which class needs which level?** Drop one path at a time, train anew, and see what each class loses. Chapter
# 05 asked the U-Net the same about its four skips, and none of them was costly. Red is a loss in
# percentage points of IoU, blue a gain:


# %% tags=["nbval-ignore-output"]
def lost(level, *field):
    """Points that are lost without a level, mean over seeds."""
    return gain("many paths", f"without {level}", *field)


losses = torch.tensor(
    [[lost(level, "iou", c) for level in Pyramid._fields] for c in scenes.CLASSES]
)
plotting.show_matrix(
    losses,
    rows=scenes.CLASSES,
    columns=Pyramid._fields,
    label="IoU lost on scenes without …, points",
    digits=1,
    alt="A matrix: rows are classes, columns the missing path, numbers the loss.",
)

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        what: evidence.values("scenes", what, "boundary_miou")
        for what in ("many paths", *(f"without {name}" for name in Pyramid._fields))
    },
    ylabel="boundary IoU on unseen scenes, %",
    highlight="many paths",
    alt="Without c1 the rims lose most; without any other level, little.",
)


# %%
assert lost("c1") > 2 and lost("c1", "boundary_miou") > 6
for level in ("c2", "c3", "c4", "c5"):
    assert 0 < lost(level) < 2.5 and lost(level, "boundary_miou") < 2
assert (losses[:, 0] > 0).all()
for filled in ("disc", "square", "triangle", "star"):
    assert lost("c4", "iou", filled) > 2
assert lost("c4", "iou", "ring") < 1.5
assert losses[:, 4].argmax() == scenes.CLASSES.index("disc")

# %% [markdown]
# One path is costly to lose: `c1`. Every class misses it, and at the rims it is worth more than 6 points.
# No path looks around here, so nobody else can stand in for it on that grid. The other four cost less than 2.5
# points each, and not the same classes: discs, squares, triangles and stars miss `c4`, which rings hardly do; `c5` is
# missed most by the discs. No level is superfluous on average. Ask your own task before you cut one off: a
# street, with its larger context, may answer otherwise.
#
# ## Limits
#
# - Only one path and many paths were trained on streets, and those are one drive in one town by daylight.
#   Grids, fusions and dropped paths were measured on scenes alone, which are 128 pixels wide: their `c5` has 16
#   positions.
# - The bundled encoder learned from pictures of 64 to 128 pixels, where its `c5` has 2 × 2 to 4 × 4 positions.
#   An encoder that learned from larger ones may make more of `c5`.
# - "Through a grid" means averaged. A layer that packs 32 × 32 positions into many channels before the grid,
#   and unpacks them after it, would lose less, and would need a great many channels.
# - The cousins have width 32 here, to be compared; their papers use 128 to 768 channels. Learning rate and
#   epochs were set once, for all variants alike.
# - A muted path says its average. The mask that remains shows what this network listens to. It is no proof
#   of what a level knows.
# - No path sees a neighbour: all convolutions but the FPN's are 1×1. What a 3×3 adds is in chapter 03 and, on the grid
#   of `c1`, in chapter 12.
# - The paths end on the grid of `c1`, at half the image's resolution. Chapter 08 looks at the last step up.
#
# ## Exercises


# %% [markdown]
# **Exercise 1.** Write the join for *any* list of maps: in whatever order they come, stack them in that
# order, on the grid of the finest.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def ramp(k, height, width):
    """A map [2, k + 1, height, width] that rises to the right, from k + 1."""
    across = 0.5 * torch.arange(width) / width
    return (k + 1 + across).expand(2, k + 1, height, width)


def check_stack(answer):
    for order in ([(23, 30), (90, 120), (6, 8)], [(7, 5), (2, 2)], [(9, 9)]):
        maps = [ramp(k, *size) for k, size in enumerate(order)]
        finest = max(order)
        try:
            found = answer(list(maps))
        except RuntimeError as error:
            sizes = ", ".join(f"{h} × {w}" for h, w in order)
            return print(f"Maps of {sizes}:", str(error).splitlines()[0])
        if found is None:
            return print("Nothing returned yet: return one map.")
        if (
            not isinstance(found, torch.Tensor)
            or found.ndim != 4
            or len(found) != 2
        ):
            return print("Return one map of both images, [2, C, H, W].")
        if found.shape[-2:] != finest:
            side = " × ".join(map(str, found.shape[-2:]))
            return print(f"{side}: the finest map has {finest[0]} × {finest[1]}.")
        if found.shape[1] != sum(m.shape[1] for m in maps):
            return print(
                f"{found.shape[1]} channels: every map brings all of its own."
            )
        groups = [
            round(float(found[:, c].floor().mean())) for c in range(found.shape[1])
        ]
        if groups != [m.shape[1] for m in maps for _ in range(m.shape[1])]:
            return print("The maps changed places: keep the order of the list.")
        first, last = (
            found[..., 0].mean(dim=(1, 2)),
            found[..., -1].mean(dim=(1, 2)),
        )
        if not (last > first).all():
            return print("The maps came out flat or mirrored: only enlarge them.")
    print("Right: sizes from the maps themselves, and no factor anywhere.")


# %%
def stack(maps):
    """Return maps [B, C_k, h_k, w_k] as one, [B, C_1 + … + C_n, H, W]."""


check_stack(stack)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def stack_solution(maps):
    finest = max(maps, key=lambda m: m.shape[-2] * m.shape[-1])
    return torch.cat([resize_to(finest, m) for m in maps], dim=1)


check_stack(stack_solution)

# %% [markdown]
# **Exercise 2.** Most of `MultiPathDecoder`'s work is the convolution of its `mix`, on the fine grid. A 1×1
# convolution and a resize may change places (chapter 03), and a convolution over a concatenation is a sum
# (above). Use both: compute the same logits, in evaluation, with little more than half the MACs.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_cheaper(answer):
    class Answer(nn.Module):
        def forward(self, pyramid):
            return answer(decoder, pyramid)

    decoder = trained["many paths"][0].decoder.eval()
    with torch.no_grad():
        wanted, found = decoder(scene), answer(decoder, scene)
    if found is None:
        return print("Nothing returned yet: return logits.")
    if found.shape != wanted.shape:
        return print(f"Expected {list(wanted.shape)}, got {list(found.shape)}.")
    if not torch.allclose(found, wanted, atol=1e-3):
        off = float((found - wanted).abs().max())
        return print(
            f"The logits differ by up to {off:.2g}. Did BatchNorm and ReLU stay "
            "behind the sum? They are not linear, and may not change places."
        )
    share = count_macs(Answer(), scene) / count_macs(decoder, scene)
    if share > 0.6:
        return print(
            f"Right logits, at {share:.0%} of the MACs: convolve each level with "
            "its block of weights before you enlarge it."
        )
    print(f"Right: the same logits for {share:.0%} of the MACs.")


# %%
def cheaper(decoder, pyramid):
    """Return what `decoder(pyramid)` does; decoder.mix is (conv, norm, relu)."""


check_cheaper(cheaper)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def cheaper_solution(decoder, pyramid):
    conv, norm, relu = decoder.mix
    blocks = conv.weight.split(conv.in_channels // 5, dim=1)  # one for each level
    parts = [
        resize_to(pyramid.c1, F.conv2d(path(c), block))
        for path, c, block in zip(decoder.paths, pyramid, blocks, strict=True)
    ]
    return decoder.head(relu(norm(sum(parts))))


check_cheaper(cheaper_solution)

# %% [markdown]
# **Exercise 3.** Rings are thin. From the records: by which step to a finer grid do they gain most, and is it
# the step that the very first curves would have foretold?


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_step(answer):
    levels, rings = Pyramid._fields[::-1], []
    for what in by_grid:
        rings.append(evidence.mean("scenes", what, "iou", "ring"))
    gains = {(levels[k], levels[k + 1]): rings[k + 1] - rings[k] for k in range(4)}
    step = answer()
    if step is None:
        return print('Nothing returned yet: return two levels, as in ("c5", "c4").')
    if not isinstance(step, (tuple, list)) or tuple(step) not in gains:
        steps = ", ".join(" to ".join(step) for step in gains)
        return print(f"{step} is no step to the next finer grid: {steps}.")
    points, most = gains[tuple(step)], max(gains, key=gains.get)
    if tuple(step) != most:
        return print(
            f"That step gives rings {points:.1f} points; another gives more."
        )
    ahead = max(range(4), key=lambda k: best["ring"][k + 1] - best["ring"][k])
    foretold = " to ".join((levels[ahead], levels[ahead + 1]))
    print(
        f"Right: {points:.1f} points. The first curves climb most from {foretold}."
    )


# %%
def step_for_rings():
    """Return the two levels, the coarser one first."""


check_step(step_for_rings)


# %% tags=["hide-cell", "nbval-ignore-output"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def step_for_rings_solution():
    steps = zip(Pyramid._fields[:0:-1], Pyramid._fields[-2::-1], strict=True)
    rings = [evidence.mean("scenes", what, "iou", "ring") for what in by_grid]
    gains = torch.tensor(rings).diff()
    return list(steps)[int(gains.argmax())]


check_step(step_for_rings_solution)

# %% [markdown]
# ## Recap
#
# - One large enlargement of one grid draws blobs, whatever the grid knows. Give each level its own path.
# - A path ends at a *size*, that of another map. Factors fit some images only.
# - Project on the level's own grid, then enlarge, then fuse: concatenate if you can, add if you must save.
# - Late fusion needs no staircase: a path can be left out, or muted, to see what it is worth. Keep `c1` if
#   outlines count.
#
# | shape contract | |
# |---|---|
# | in | a `Pyramid` `c1…c5`, from any H, W ≥ 32 |
# | `resize_to(goal, map_)` | `[B, C, h, w]` → `[B, C, H, W]`, the size of `goal` |
# | `MultiPathDecoder`, `SummedPathDecoder` | → `[B, out_channels, ⌈H/2⌉, ⌈W/2⌉]` |
# | `FPNDecoder`, `SegFormerDecoder` | → `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]` |
# | in a `Segmenter` | → `[B, out_channels, H, W]` |
# | one image of 32 × 32 in training | raises, except in SegFormer's head: BatchNorm needs two values |
#
# In your own project:
#
# ```python
# from helpers.bridges.multi_path import MultiPathDecoder
# from helpers.encoder import ResNet18Encoder, Segmenter
# from helpers.training import evaluate, fit
#
# encoder = ResNet18Encoder()
# model = Segmenter(encoder, MultiPathDecoder(encoder.out_channels, out_channels=7))
# history = fit(model, train, epochs=20)  # pairs of image [3, H, W] and mask [H, W]
# print(evaluate(model, unseen))
# ```
