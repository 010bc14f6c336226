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
# # 03 · My decoder wants other channels
#
# Your decoder was built for maps of 64 channels. The encoder hands over 512, and PyTorch answers
# `Given groups=1, weight of size …`. The cure is the smallest layer there is, a 1×1 convolution. What is
# left to decide is where to put it, how to join its output to what the decoder already has, and how
# many channels are enough.

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
# - how much of 512 channels fits into 64, before anything is trained;
# - the channel error, and a reshape that silences it and scrambles the map;
# - that a 1×1 convolution is a linear layer at every position, and why no image size can break it;
# - resizing before or after it: the same numbers, up to 64 times the multiplications;
# - when summing and concatenating are the same thing, and when they are not;
# - six trainings, from 4 to 128 channels, while you wait;
# - measured with three seeds: sum, concatenation, a 3×3 after the 1×1, and the width.

# %%
import copy

import skimage.data
import torch
import torch.nn.functional as F
from torch import nn

from helpers import plotting, records, scenes
from helpers.encoder import (
    ResNet18Encoder,
    Segmenter,
    load_bundled,
    normalize,
)
from helpers.errors import explaining
from helpers.inspection import count_macs, count_parameters, pyramid_levels, shapes
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import budget, evaluate, fit, predict

# %% [markdown]
# ## The problem as a picture
#
# Must you lose most of the information when 512 channels become 64? Look at how the channels vary
# together: at each position of a map stand 512 numbers, a point in a space of 512 directions. Sort the
# directions by how much the points spread along them, and count how much of the spread the first few
# hold. No decoder yet, only statistics of the encoder's maps on 100 scenes:

# %%
encoder = ResNet18Encoder()
images, masks = scenes.batch(range(5_000, 5_100))
with torch.no_grad():
    pyramid = encoder(normalize(images))
widths = (4, 8, 16, 32, 64, 128)


def held(map_):
    """Per cent of a map's variance along its strongest 4, 8, … directions."""
    spread = torch.linalg.eigvalsh(map_.transpose(0, 1).flatten(1).cov()).flip(0)
    share = 100 * spread.cumsum(0) / spread.sum()
    return [float(share[min(width, len(share)) - 1]) for width in widths]


variance = {name: held(map_) for name, map_ in pyramid._asdict().items()}

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    {name: variance[name] for name in ("c2", "c3", "c4", "c5")},
    xlabel="directions kept",
    ylabel="variance held, %",
    x=[str(width) for width in widths],
    alt="Four rising curves; at 64 directions c4 and c5 hold four fifths.",
)

# %%
assert variance["c5"][4] > 75 and variance["c5"][5] > 85  # 64, 128 of 512
assert variance["c4"][4] > 75 and variance["c3"][4] > 85

# %% [markdown]
# The channels repeat each other: with 64 directions you keep more than three quarters of all that varies
# in `c5`'s 512 channels and in `c4`'s 256. So a decoder that wants 64 channels asks for nothing absurd. It
# does not have to be *these* directions, though: what tells two classes apart may lie in one of little
# spread. Training will pick the ones that the task needs.
#
# ## The shapes
#
# Say that the decoder works on the grid of `c2`, with 64 channels. This is what it is offered:

# %%
for height, width in [(128, 128), (180, 240)]:
    offered = pyramid_levels(height, width)[1:]
    print(
        *[f"{m.name}: {m.channels} × {m.height} × {m.width}" for m in offered],
        sep="   ",
    )

# %% [markdown]
# Two things do not fit, channels and size. *Resizing* changes the size and leaves the channels. The layer
# of this chapter changes the channels and leaves the size.
#
# ## The obvious attempt, and what it does wrong
#
# Take the decoder's first layer, made for 64 channels, and hand it `c3`:

# %% tags=["raises-exception"]
first_layer = nn.Conv2d(64, 64, 3, padding=1)
with explaining():
    first_layer(pyramid.c3[:1])

# %% [markdown]
# The weight has four sides: 64 out, **64 in**, a kernel of 3 × 3. The map has 128. Now the tempting
# cure: all the numbers are there, so make 64 channels out of 128 by `reshape`, and a map that is twice
# as high.

# %%
reshaped = pyramid.c3.reshape(len(images), 64, 32, 16)
print(list(shapes(first_layer, reshaped)))

# %% [markdown]
# No error. But `reshape` moves nothing; it only counts the numbers anew. Each new channel has 32 rows:
# the upper 16 are one old channel, the lower 16 are the next one.

# %%
chosen = 26
plotting.show_features_as_color(
    images[chosen],
    {"c3": pyramid.c3[chosen], "reshaped": reshaped[chosen]},
    alt="A scene, its c3, and the reshaped map: two different pictures, stacked.",
)

# %%
assert torch.equal(reshaped[:, :, :16], pyramid.c3[:, 0::2])
assert torch.equal(reshaped[:, :, 16:], pyramid.c3[:, 1::2])

# %% [markdown]
# Rows 0 to 15 hold the whole scene, as channels 0, 2, 4 … of `c3` saw it; rows 16 to 31 hold it once
# more, from channels 1, 3, 5 …. Row 20 no longer means *in the lower half*. Such a decoder trains, its
# loss falls, and nothing tells you what you have lost; the number stands below.
#
# ## The technique
#
# ### A linear layer at every position
#
# What you want is known from vectors: `nn.Linear(512, 64)` turns 512 numbers into 64, each one a weighted
# sum of all of them. A **1×1 convolution** does that at each position, with the same weights
# everywhere. To see that this is meant literally, copy the weights:

# %% tags=["export"]
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.encoder import Pyramid, check_map, check_pyramid


# %% tags=["export"]
def as_conv(linear: nn.Linear) -> nn.Conv2d:
    """Return a 1×1 convolution that does at every position what `linear` does.

    `linear` takes `[B, in_features]`; the convolution takes any h, w,
    `[B, in_features, h, w]`, and returns `[B, out_features, h, w]`. Its weights are
    a copy.
    Raises `TypeError` for anything but an `nn.Linear`.

    Source: Long et al., Fully Convolutional Networks, CVPR 2015.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(
            f"Expected an nn.Linear, got {type(linear).__name__}. Pass the layer "
            "itself, not the model around it."
        )
    weight, bias = linear.weight.detach(), linear.bias
    sides = linear.in_features, linear.out_features
    conv = nn.Conv2d(*sides, kernel_size=1, bias=bias is not None)
    conv.weight = nn.Parameter(weight[:, :, None, None].clone())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv


# %%
torch.manual_seed(0)
linear = nn.Linear(512, 64)
c5 = pyramid.c5
by_position = linear(c5.movedim(1, -1)).movedim(-1, 1)  # channels last, and back
by_conv = as_conv(linear)(c5)
print(list(c5.shape), "→", list(by_conv.shape))
assert torch.allclose(by_position, by_conv, atol=1e-5)

# %% [markdown]
# Same weights, same results. A 1×1 convolution has no idea of height and width, so it cannot be wrong
# about them.
#
# That works on trained layers, too. The bundled ResNet-18 once ended in a classifier: average `c5` over
# its positions, then one linear layer to 200 classes. Do not average, ask every position:

# %%
classifier = nn.Linear(512, 200)
state = load_bundled()
classifier.load_state_dict({k: state[f"fc.{k}"] for k in ("weight", "bias")})
everywhere = as_conv(classifier)

cup = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1)[None].float() / 255
sizes = [(128, 192), (192, 288), (320, 480)]
cups = [F.interpolate(cup, size=size, mode="area") for size in sizes]
with torch.no_grad():
    maps = [everywhere(encoder(normalize(x)).c5) for x in cups]
    pooled = classifier(encoder(normalize(cups[1])).c5.mean(dim=(2, 3)))
espresso = 193  # of the 200 classes, in the order of their WordNet ids
assert pooled.argmax() == espresso

# %% tags=["nbval-ignore-output"]
plotting.show_heatmaps(
    cups[2][0],
    [m[0, espresso].clamp(min=0) for m in maps],
    titles=[f"{h} × {w}" for h, w in sizes],
    alt="A coffee cup: at three image sizes the score is high around the cup.",
)

# %%
print(*[list(m.shape) for m in maps], sep="\n")
assert torch.allclose(maps[1].mean(dim=(2, 3)), pooled, atol=1e-4)

# %% [markdown]
# One layer, three image sizes, and the warm squares are those that speak for *espresso*, the class that
# wins for the middle size. (Photograph: Rachel Michetti, from scikit-image.) The assertion says more: the
# mean of the *map* of scores is the score of the *mean*. A linear layer and an average may change places.
# Keep that in mind for the next section.
#
# ### If the decoder wants a vector
#
# You will meet the 1×1 convolution as the first half of another recipe: shrink the channels, flatten,
# linear layer. It was written for images of 224 pixels, and there it works.

# %%
to_vector = nn.Sequential(
    nn.Conv2d(512, 128, 1), nn.Flatten(), nn.Linear(128 * 7 * 7, 256)
)
print("224 px:", list(shapes(to_vector, encoder(torch.rand(2, 3, 224, 224)).c5)))
for name, layer in (("1×1", to_vector[0]), ("linear", to_vector[2])):
    print(f"{name:6} {count_parameters(layer):,} parameters")

# %% tags=["raises-exception"]
with explaining():
    to_vector(encoder(torch.rand(2, 3, 256, 256)).c5)

# %% [markdown]
# Flattening has nailed the 7 × 7 positions into the layer's width, and multiplied its weights by 49. So do
# not flatten. A second 1×1 convolution gives a vector *per position*, at any size; if you need one vector
# for the image, average. (Chapter 02 keeps a small grid of positions, for decoders that need to know
# where.)

# %%
dense = nn.Sequential(nn.Conv2d(512, 128, 1), nn.ReLU(), nn.Conv2d(128, 256, 1))
for side in (224, 256, 300):
    map_ = dense(encoder(torch.rand(2, 3, side, side)).c5)
    vector = map_.mean(dim=(2, 3))
    print(f"{side} px: {list(map_.shape)}, averaged {list(vector.shape)}")
print(f"{count_parameters(dense):,} parameters")

# %% [markdown]
# ### Project first, or resize first?
#
# Back to the decoder on `c2`'s grid. `c5` needs both, 64 channels instead of 512 and 32 × 32 positions
# instead of 4 × 4. In which order? Often you see the map enlarged first, "to make it fit", and then
# projected. Compare the two for several ways to change a size:

# %%
conv = nn.Conv2d(512, 64, 1)
grid = (32, 32)
resizers = {
    "nearest": nn.Upsample(grid),
    "bilinear": nn.Upsample(grid, mode="bilinear"),
    "bicubic": nn.Upsample(grid, mode="bicubic"),
    "average pooling": nn.AdaptiveAvgPool2d(2),
    "max pooling": nn.AdaptiveMaxPool2d(2),
    "zeros around": nn.ZeroPad2d(1),
}


@torch.no_grad()
def commute(layer, resize):
    """Whether both orders give the same, but for rounding."""
    one, other = resize(layer(c5[:8])), layer(resize(c5[:8]))
    return torch.allclose(one, other, atol=1e-4)


for name, resize in resizers.items():
    print(f"{name:16}", "equal" if commute(conv, resize) else "different")

# %% [markdown]
# The reason is the one of above. Each new position is a weighted sum of old ones. A linear layer applied
# to such a sum gives the same sum of its outputs; and because the weights add up to one, the bias comes
# through unchanged. That holds at the border, too: there PyTorch repeats the last row, it does not fade
# to zero. Where zeros *are* put around a map, their place is taken by the bias in one order and not in the
# other. And a maximum is no sum.
#
# What follows the 1×1 must be linear *and* keep to its position, or the order matters again:

# %%
others = {
    "1×1 without bias, zeros": (nn.Conv2d(512, 64, 1, bias=False), "zeros around"),
    "1×1 and ReLU": (nn.Sequential(conv, nn.ReLU()), "bilinear"),
    "1×1 and BatchNorm, training": (
        nn.Sequential(conv, nn.BatchNorm2d(64)),
        "bilinear",
    ),
    "3×3": (nn.Conv2d(512, 64, 3, padding=1), "bilinear"),
}
for name, (layer, how) in others.items():
    print(f"{name:28}", "equal" if commute(layer, resizers[how]) else "different")

# %% [markdown]
# Without a bias, zeros stay zeros. A ReLU bends, a 3×3 looks at neighbours, which lie closer together
# after enlarging, and BatchNorm in training takes its mean and variance over other positions. (In
# evaluation it is one more scale and shift per channel, and changes nothing.)
#
# So with a 1×1 alone the order is yours to choose, and it is not the same *work*. A convolution works once
# per position. Written as `nn.Sequential`, the two orders look like this:


# %%
def orders(map_, size):
    """Two modules: resize first, project first."""
    conv = nn.Conv2d(map_.shape[1], 64, 1)
    smaller = map_.shape[-2] * map_.shape[-1] > size[0] * size[1]
    enlarge = nn.Upsample(tuple(size), mode="bilinear")
    resize = nn.AdaptiveAvgPool2d(tuple(size)) if smaller else enlarge
    return nn.Sequential(resize, conv), nn.Sequential(conv, resize)


ways = {f"{name} to c2's grid": (name, "c2") for name in ("c3", "c4", "c5")}
ways["c2 to c5's grid"] = ("c2", "c5")
for way, (start, end) in ways.items():
    map_, size = getattr(pyramid, start)[:1], getattr(pyramid, end).shape[-2:]
    resize_first, project_first = (count_macs(m, map_) for m in orders(map_, size))
    print(f"{way}: {resize_first:,} MACs if resized first, else {project_first:,}")

# %% [markdown]
# Enlarging `c5` first costs 64 times as many multiplications, and a map of 512 channels on the fine
# grid has to be stored on top. The other way round, from a fine map to a coarse grid, resizing comes
# first. The rule is: **project on the smaller of the two grids.**
#
# MACs leave out the resizing itself. `python -m experiments.chapters.conv_projection.analysis` lets both
# orders take turns on one CPU core, three seeds, and records how many times longer resizing first takes. The
# bars are for single steps, the line below them for a whole decoder, the one that you build below:

# %%
timings = records.of("conv_projection_order")


def times(what, field="latency"):
    """How many times longer it takes to resize first; one value for each seed."""
    return timings.values("scenes", what, field)


assert all(len(times(way)) >= 3 for way in (*ways, "whole decoder"))

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        f"{what}: {name}": times(what, key)[:most]
        for what in ("c3 to c2's grid", "c4 to c2's grid", "c5 to c2's grid")
        for name, key, most in [("by MACs", "macs", 1), ("measured", "latency", 3)]
    },
    ylabel="times the work, or the time, if resized first",
    alt="The coarser the map, the more it costs to resize first.",
)

# %%
for way, least in zip(ways, (1.8, 4, 9), strict=False):
    assert least < min(times(way)) < max(times(way)) < min(times(way, "macs"))
assert max(times("c2 to c5's grid")) < 0.6
assert all(max(times(way, "difference")) < 1e-5 for way in ways)
whole = times("whole decoder")
print(f"A whole decoder takes {sum(whole) / len(whole):.1f} times as long.")
assert min(whole) > 3

# %% [markdown]
# For a single step the clock gains less than the MACs promise, and it points the same way. (From `c2`
# down to `c5`'s grid the right order is the other one, and it, too, takes less than 0.6 of the time.)
# Here is the rule as a function; where it makes a map smaller it averages, so that no position is skipped:


# %% tags=["export"]
def project_to(conv: nn.Module, map_: Tensor, size: Sequence[int]) -> Tensor:
    """Project a map by a 1×1 convolution and resize it, in the cheaper order.

    `map_` is `[B, C, h, w]`, the result `[B, out_channels, *size]`. Where the new
    grid has fewer positions, the map is averaged first; else it is enlarged last,
    bilinearly. `conv` has to be linear and to keep to its position: only then do
    both orders agree. It raises what `conv` raises.
    """
    size = tuple(size)
    if map_.shape[-2] * map_.shape[-1] > size[0] * size[1]:
        return conv(F.adaptive_avg_pool2d(map_, size))  # type: ignore[arg-type]
    return F.interpolate(conv(map_), size=size, mode="bilinear")


# %%
for start, size in [(pyramid.c5, (32, 32)), (pyramid.c5, (3, 7)), (c5, (4, 4))]:
    projected = project_to(conv, start, size)
    print(list(start.shape), "→", list(projected.shape))

# %% [markdown]
# ### Join by summing
#
# Now the decoder's own map comes in: `x`, in the right size, with channels of its own. **Feature
# adaptation** gives both maps the same channels, one 1×1 convolution each, brings the encoder's to the
# decoder's size and adds. BatchNorm follows, to keep the sum in a range that trains well, and a ReLU,
# because two linear layers in a row would be one (chapter 05 shows what that costs).


# %% tags=["export"]
def check_pair(x: Tensor, skip: Tensor, channels: Sequence[int]) -> None:
    """Raise a clear error unless both have these channels and one batch size."""
    check_map("x", x, channels[0])
    check_map("skip", skip, channels[1])
    if x.shape[0] != skip.shape[0]:
        raise ValueError(
            f"Expected maps of one batch, got x of {x.shape[0]} images and skip of "
            f"{skip.shape[0]}. Pass maps of the same images."
        )


# %% tags=["export"]
class FeatureAdaptation(nn.Module):
    """Join an encoder's map to a decoder's by summing: a 1×1 convolution on each.

    `forward(x, skip)` takes the decoder's map `[B, in_channels, h, w]` and the
    encoder's `[B, skip_channels, H, W]`, any sizes, and returns
    `[B, out_channels, h, w]`, no value negative. Raises `ValueError` for other
    channels, ranks or batches, `TypeError` for integers, and, in training mode,
    `ValueError` for one image with a single position: BatchNorm needs two values.

    Source: the lateral connections of Lin et al., FPN, CVPR 2017.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.channels = in_channels, skip_channels
        self.project_x = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.project_skip = nn.Conv2d(skip_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_pair(x, skip, self.channels)
        skip = project_to(self.project_skip, skip, x.shape[-2:])
        return self.relu(self.norm(self.project_x(x) + skip))


# %%
x, skip = torch.rand(2, 48, 23, 30), torch.rand(2, 512, 6, 8)
by_sum = FeatureAdaptation(in_channels=48, skip_channels=512, out_channels=64)
print(list(x.shape), "and", list(skip.shape), "→", list(shapes(by_sum, x, skip)))

# %% [markdown]
# ### Join by concatenating
#
# The other school lays the two maps on top of each other and lets a convolution mix them. It looks
# more general: nobody has decided that channel 7 of the one goes with channel 7 of the other.


# %% tags=["export"]
class ConcatAdaptation(nn.Module):
    """As `FeatureAdaptation`, but the maps are concatenated, and a 1×1 mixes them.

    Takes, returns and raises what `FeatureAdaptation` does.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.channels = in_channels, skip_channels
        both = in_channels + out_channels
        self.project_skip = nn.Conv2d(skip_channels, out_channels, 1, bias=False)
        self.mix = nn.Conv2d(both, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_pair(x, skip, self.channels)
        skip = project_to(self.project_skip, skip, x.shape[-2:])
        return self.relu(self.norm(self.mix(torch.cat([x, skip], dim=1))))


# %% [markdown]
# It is not more general. Cut the mixing weights where the two maps meet: the left block only ever meets
# `x`, the right block only `skip`, and the convolution adds what the two give. That is a sum of two 1×1
# convolutions, *W [x; s] = W₁ x + W₂ s*. And W₂ after the skip's own projection is again one matrix. So
# every `ConcatAdaptation` *is* a `FeatureAdaptation` with these weights:

# %%
by_concat = ConcatAdaptation(in_channels=48, skip_channels=512, out_channels=64)
left, right = by_concat.mix.weight[:, :48], by_concat.mix.weight[:, 48:]
merged = right.flatten(1) @ by_concat.project_skip.weight.flatten(1)
by_sum.load_state_dict(
    {
        "project_x.weight": left,
        "project_skip.weight": merged[:, :, None, None],
        **{f"norm.{k}": v for k, v in by_concat.norm.state_dict().items()},
    }
)
with torch.no_grad():
    one, other = by_sum.eval()(x, skip), by_concat.eval()(x, skip)
same = torch.allclose(one, other, atol=1e-5)
print("sum = concatenation:", same)
assert same

# %% [markdown]
# What differs is how training *starts* (other random weights, one layer more to learn) and what it
# costs. The identity breaks as soon as something that is not linear stands between the projection and
# the join, a ReLU or a BatchNorm of its own; or when what follows the join looks at neighbours.
#
# ### A look at the neighbours
#
# No 1×1 convolution sees more than its own position. A 3×3 after the join does, on the fine grid, where
# the outlines are. Again by sum and by concatenation:


# %% tags=["export"]
class ConvAdaptation(nn.Module):
    """As `FeatureAdaptation`, with a 3×3 convolution after the sum.

    Takes, returns and raises what `FeatureAdaptation` does.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.channels = in_channels, skip_channels
        self.project_x = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.project_skip = nn.Conv2d(skip_channels, out_channels, 1, bias=False)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_pair(x, skip, self.channels)
        skip = project_to(self.project_skip, skip, x.shape[-2:])
        return self.relu(self.norm(self.conv(self.project_x(x) + skip)))


# %% tags=["export"]
class ConcatConvAdaptation(nn.Module):
    """As `ConcatAdaptation`, but what mixes the maps is a 3×3 convolution.

    Takes, returns and raises what `FeatureAdaptation` does.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.channels = in_channels, skip_channels
        both = in_channels + out_channels
        self.project_skip = nn.Conv2d(skip_channels, out_channels, 1, bias=False)
        self.mix = nn.Conv2d(both, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_pair(x, skip, self.channels)
        skip = project_to(self.project_skip, skip, x.shape[-2:])
        return self.relu(self.norm(self.mix(torch.cat([x, skip], dim=1))))


# %%
adapters = {
    "sum": FeatureAdaptation,
    "concatenate": ConcatAdaptation,
    "sum, 3×3": ConvAdaptation,
    "concatenate, 3×3": ConcatConvAdaptation,
}
for name, adapter in adapters.items():
    print(f"{name:16}", list(shapes(adapter(48, 512, 64), x, skip)))

# %% [markdown]
# Here the two schools part. A 3×3 over concatenated maps is again a sum, *K₁ ∗ x + K₂ ∗ s*, with kernels
# of its own for each source. The 3×3 after a sum has one set for both; to smooth the coarse map and
# sharpen the fine one it would have to reserve some channels for each. Concatenation is more general
# now, and more work.
#
# ### A decoder to try them in
#
# The lightest decoder that makes sense: it starts from `c2`, and takes in `c3`, `c4` and `c5`, each
# brought to `c2`'s grid. The join is exchangeable:


# %% tags=["export"]
class AdaptedDecoder(nn.Module):
    """All of c2…c5 on the grid of c2, joined one after another.

    `forward(pyramid)` takes the encoder's five maps, from images of any H, W ≥ 32,
    and returns `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]`; c1 is not read. `width` is the
    number of channels that every join returns; `adapt` is `FeatureAdaptation` or
    a class with the same arguments. Raises `ValueError` for maps with other
    channels than `in_channels`, `TypeError` for integers.

    Source: cf. the head of Xie et al., SegFormer, NeurIPS 2021.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        width: int = 64,
        adapt: type[nn.Module] = FeatureAdaptation,
    ):
        super().__init__()
        self.in_channels = tuple(in_channels)
        _, c2, c3, c4, c5 = self.in_channels
        self.adapt3 = adapt(c2, c3, width)
        self.adapt4 = adapt(width, c4, width)
        self.adapt5 = adapt(width, c5, width)
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        _, c2, c3, c4, c5 = pyramid
        p = self.adapt3(c2, c3)
        p = self.adapt4(p, c4)
        p = self.adapt5(p, c5)
        return self.head(p)


# %%
classes = len(scenes.CLASSES)
model = Segmenter(encoder, AdaptedDecoder(encoder.out_channels, classes))
for height, width in [(128, 128), (180, 240), (33, 97)]:
    logits = model(normalize(torch.rand(2, 3, height, width)))
    print(f"{height} × {width} → {list(logits.shape)}")
    assert logits.shape == (2, classes, height, width)

# %%
one = normalize(images[:1])
macs = {"encoder": count_macs(encoder, one)}
print(f"{'encoder':16} {macs['encoder']:,} MACs")
for name, adapter in adapters.items():
    variant = AdaptedDecoder(encoder.out_channels, classes, adapt=adapter)
    macs[name] = count_macs(variant, encoder(one))
    print(f"{name:16} {macs[name]:,}, {count_parameters(variant):,} parameters")
assert macs["sum"] < 0.03 * macs["encoder"]
assert macs["concatenate"] < 0.05 * macs["encoder"]
assert 7 < macs["sum, 3×3"] / macs["sum"] < 9
assert 1.7 < macs["concatenate, 3×3"] / macs["sum, 3×3"] < 1.9

# %% [markdown]
# With 1×1 joins the whole decoder costs less than 3 % (sum) or 5 % (concatenation) of the encoder's MACs. A
# 3×3 after each sum makes that about eight times as much; over a concatenation it costs 1.8 times that.

# %% [markdown]
# ## Train it
#
# How many channels are enough? Six decoders, alike but for the width, on 96 scenes for a few seconds
# each. `fit` is the book's training loop; the encoder is frozen, so its maps are computed once and
# kept.

# %%
epochs = budget(short=6, full=40)
train, unseen = scenes.Scenes(96), scenes.Scenes(40, first=5_000)
train = [train[i] for i in range(len(train))]  # draw each scene once
loss = SegmentationLoss(class_weights=class_weights((m for _, m in train), classes))
shown = [4, 21, 26, 61]


def train_with(width):
    """A trained `Segmenter` with a decoder of this width, and its history."""
    torch.manual_seed(0)
    decoder = AdaptedDecoder(encoder.out_channels, classes, width)
    model = Segmenter(encoder, decoder)
    history = fit(model, train, epochs=epochs, lr=1e-2, loss=loss, flip=False)
    return model, history


trained = {width: train_with(width) for width in widths}

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    {f"{w} channels": history.loss for w, (_, history) in trained.items()},
    xlabel="epoch",
    ylabel="loss",
    alt="Six falling curves: the wider the decoder, the lower it ends.",
)

# %% [markdown]
# Pull the slider and watch what the channels buy, on four scenes that none of them has seen. Four channels
# find large things, and leave whole classes out. (Four numbers would be enough to tell seven classes
# apart; to *learn* to is another matter.) More channels bring thin things and more shapes, and the last
# doubling changes little:

# %% tags=["nbval-ignore-output"]
frames = [
    plotting.show_masks(
        {"mask": masks[shown], "predicted": predict(model, images[shown])},
        alt="Masks, and what the decoder predicts.",
    )
    for model, _ in trained.values()
]
plotting.flipbook(
    frames,
    [f"{width} channels" for width in widths],
    alt="Predictions of six decoders, from 4 to 128 channels",
)

# %% tags=["nbval-ignore-output"]
scored = {width: evaluate(trained[width][0], unseen) for width in widths}
for width, score in scored.items():
    found = sum(iou > 5 for iou in score.iou)
    print(f"{width:3} channels: mIoU {score.miou:.1f} %, classes over 5 %: {found}")

# %%
for width in (16, 32, 64, 128):
    history = trained[width][1]
    assert history.loss[-1] < 0.5 * history.loss[0]
assert scored[64].miou > scored[4].miou + 5
assert scored[64].miou > 1.2 * 100 / classes
assert min(scored[4].iou) < min(scored[64].iou)
assert abs(scored[128].miou - scored[64].miou) < 5

# %% [markdown]
# ## Look inside: who speaks where
#
# A sum can be taken apart again. At each join, two projected maps were added. Subtract from the encoder's
# one its average over all positions: how long is what remains, at each position? There this level tells
# the decoder something that it does not say everywhere. Above as trained; below, as a control, from a
# decoder that nobody has trained:


# %%
@torch.no_grad()
def deviations(decoder, maps):
    """How far each skip's projection is from its average, [h, w] each, by name."""
    joins = {"c3": decoder.adapt3, "c4": decoder.adapt4, "c5": decoder.adapt5}
    found = {}
    for name, join in joins.items():
        size = maps.c2.shape[-2:]
        added = project_to(join.project_skip, getattr(maps, name), size)
        found[name] = (added - added.mean(dim=(2, 3), keepdim=True)).norm(dim=1)[0]
    return found


decoder = trained[64][0].cpu().decoder.eval()  # fit may have taken it to a GPU
torch.manual_seed(0)
random = AdaptedDecoder(encoder.out_channels, classes).eval()
with torch.no_grad():
    maps = encoder(normalize(images[[chosen]]))
found = deviations(decoder, maps), deviations(random, maps)

# %% tags=["nbval-ignore-output"]
plotting.show_heatmaps(
    images[chosen],
    [deviation for each in found for deviation in each.values()],
    titles=[
        f"{name}, {how}"
        for how in ("trained", "random")
        for name in maps._fields[2:]
    ],
    columns=3,
    alt="All are warm on the objects, c5 in broad patches; trained or not.",
)

# %%
objects = masks[chosen] > 0
for deviation in (*found[0].values(), *found[1].values()):
    large = F.interpolate(deviation[None, None], objects.shape, mode="bilinear")
    inside, outside = large[0, 0][objects], large[0, 0][~objects]
    assert inside.mean() > 1.2 * outside.mean()

# %% [markdown]
# All three speak up where the objects are, each in its own grain: `c3` in small spots, `c5` in patches that
# are larger than most objects. So does the decoder with random weights. This picture would look well in a
# report on what the decoder *learned*, and it shows nothing of the kind: it is the encoder's maps that
# stand out there, and any projection passes that on. Draw the untrained network beside the trained one
# before you explain a heat map.

# %% [markdown]
# ## Measure the claims
#
# One seed and a few seconds prove little. `python -m experiments.claims conv_projection` trains each variant
# three times, with three seeds, on 400 scenes, and reports on 200 scenes that no training saw. Five of them
# were also trained on **CamVid**, 266 street photographs from two drives, and reported on 101 frames of
# a third. What follows is read from its records.

# %%
evidence = records.of("conv_projection")
places = ("scenes", "streets")
assert all(len(evidence.values(w, what)) >= 3 for w in places for what in adapters)

# %% [markdown]
# **Naive reshaping fails.** The same decoder, once with `reshape` in place of the projections (and a 1×1 on
# what it returns, so that no layer is missing), once with the first 64 channels of every map and the rest
# thrown away, once as it should be:

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        name: evidence.values("scenes", what)
        for name, what in {
            "reshape": "reshaped",
            "first 64 channels": "first 64 channels",
            "1×1 convolution": "sum",
        }.items()
    },
    ylabel="mIoU on unseen scenes, %",
    highlight="1×1 convolution",
    alt="Reshaping scores lowest, a 1×1 convolution highest.",
)

# %%
assert evidence.margin("scenes", "sum", "reshaped") > 12
assert 1.5 < evidence.margin("scenes", "sum", "first 64 channels") < 4
assert evidence.margin("scenes", "first 64 channels", "reshaped") > 10
assert evidence.margin("scenes", "first 64 channels", "reshaped", "parameters") == 0

# %% [markdown]
# Reshaping costs more than 12 points, with as many layers, and without a word. Throwing 64 to 448 channels
# away, with exactly as many weights as reshaping, costs two or three: what is kept still lies where it
# belongs.
#
# **Are summing and concatenating interchangeable?** And **does a 3×3 after the 1×1 help?** Four joins, all
# of 64 channels, and as a control the plain sum with 128:

# %% tags=["nbval-ignore-output"]
compared = {what: what for what in adapters} | {"sum, 128 channels": "128 channels"}
for field, label in {"miou": "mIoU", "boundary_miou": "boundary IoU"}.items():
    display(
        plotting.show_bars(
            {n: evidence.values("scenes", w, field) for n, w in compared.items()},
            ylabel=f"{label} on unseen scenes, %",
            highlight="sum",
            alt=f"{label} of five joins on scenes: 3×3 on a concatenation and 128 "
            "channels are a little ahead.",
        )
    )


# %%
def gain(what, over="sum", where="scenes"):
    """Points of mIoU that one join adds to another, mean over seeds."""
    return evidence.mean(where, what) - evidence.mean(where, over)


assert abs(gain("concatenate")) < 1
assert -1 < gain("sum, 3×3") < 0.5
assert 0.5 < gain("concatenate, 3×3") < 2
assert evidence.margin("scenes", "concatenate, 3×3", "sum, 3×3") > 0
assert abs(gain("128 channels", over="concatenate, 3×3")) < 1
work = {
    what: evidence.mean("scenes", what, "macs") - macs["encoder"]
    for what in compared.values()
}
assert work["concatenate, 3×3"] > 13 * work["sum"]
assert work["concatenate, 3×3"] > 4 * work["128 channels"]

longer = records.of("benchmark", chosen=True)  # chapter 13's: 12 epochs, not 6
assert longer.margin("scenes", "1×1, concatenated, 3×3", "1×1, summed") > 1.5

# %% [markdown]
# With a 1×1, sum and concatenation are less than a point apart. They can compute the same functions; what is
# left comes from how they start and learn. With a 3×3 they part, and every seed of the concatenation is
# ahead.
#
# And the 3×3 as such? After a sum it gains nothing here. Over a concatenation it gains about a point, for
# more than 13 times the multiplications. The control gains as much without looking at any neighbour:
# twice as many channels, for less than a quarter of that work. The encoder has looked at neighbours in
# nearly every layer; in a training as short as this one, a light decoder need not do it again. (Chapter 13 trains twice
# as long. There the 3×3 over a concatenation is more than 1.5 points ahead of the plain sum, with every seed.)

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {name: evidence.values("streets", what) for name, what in compared.items()},
    ylabel="mIoU on unseen streets, %",
    highlight="sum",
    alt="mIoU of five joins on streets: 3×3 on a concatenation is ahead.",
)

# %%
assert abs(gain("concatenate", where="streets")) < 1
assert 0 < gain("sum, 3×3", where="streets") < 0.7
for what in ("sum", "sum, 3×3", "128 channels"):
    assert evidence.margin("streets", "concatenate, 3×3", what) > 0.3
assert abs(gain("128 channels", where="streets")) < 0.5

# %% [markdown]
# On streets, too, sum and concatenation are less than a point apart, and a 3×3 after the sum is worth less
# than a point. The 3×3 over a concatenation is ahead of all the others in every seed, and here twice as
# many channels are no substitute: they gain nothing. So what a decoder still wants from the neighbours
# depends on the images. (In chapter 05's U-Net adding and concatenating score alike: do not expect that
# point everywhere.)
#
# **How many channels are enough?** The width of the plain sum, from 4 to 128:

# %% tags=["nbval-ignore-output"]
by_width = {w: "sum" if w == 64 else f"{w} channels" for w in widths}
curves = {
    label: torch.tensor(
        [evidence.values("scenes", by_width[w], field) for w in widths]
    ).T
    for field, label in {"miou": "mIoU", "boundary_miou": "boundary IoU"}.items()
}
plotting.show_curves(
    curves,
    xlabel="channels",
    ylabel="on unseen scenes, %",
    x=[str(width) for width in widths],
    alt="Both scores rise steeply up to 16 channels, then less and less.",
)

# %%
assert evidence.margin("scenes", "16 channels", "4 channels") > 10
assert 1 < evidence.margin("scenes", "sum", "16 channels") < 4
assert 0 < gain("128 channels") < 2
assert 2.9 < work["128 channels"] / work["sum"] < 3.1
assert 0 < gain("sum", over="32 channels") < 2

# %% [markdown]
# From 4 to 16 channels, more than 10 points; from 16 to 64, two or three; from 64 to 128, one more, for three
# times the work. The steep part ends at 16; after that each doubling brings a point or two, and none that
# was measured is the last, so let the time that you have decide. Seven classes are few: with more of them,
# expect to need more channels.

# %% [markdown]
# ## Limits
#
# - Streets are three drives in one town by daylight, with the four joins and 128 channels only. Other widths,
#   reshaping and the first 64 channels were measured on scenes alone.
# - Learning rate and epochs were set once, for all variants alike. A 3×3 has nine times the weights of a
#   1×1 and might gain from a longer training, or from a ReLU before it.
# - The encoder was frozen. One that is fine-tuned can itself arrange its channels for the decoder.
# - The decoder does not read `c1`. What thin things gain from it is in chapter 05.
# - The times hold for one core of one CPU. Elsewhere, measure: `relative_latency` in `helpers.inspection`.
#
# ## Exercises


# %% [markdown]
# **Exercise 1.** Somebody left you a trained 1×1 convolution over two concatenated maps. Cut it into two
# convolutions whose *sum* is the same, bias included.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_cut(answer):
    for channels, rest in [(5, 7), (3, 4)]:
        wrong = found_in_cut(answer, channels, rest)
        if wrong:
            return print(wrong)
    print("Right: a concatenation and a 1×1 were a sum all along.")


def found_in_cut(answer, channels, rest):
    """What is wrong with an answer for so many channels, or None."""
    torch.manual_seed(1)
    mix = nn.Conv2d(channels + rest, 6, 1)
    x, skip = torch.randn(2, channels, 4, 3), torch.randn(2, rest, 4, 3)
    cut = answer(mix, channels)
    if cut is None:
        return "Nothing returned yet: return two convolutions."
    if not isinstance(cut, (tuple, list)) or len(cut) != 2:
        return "Return two convolutions: `return first, second`."
    if not all(isinstance(conv, nn.Conv2d) for conv in cut):
        return f"Expected two nn.Conv2d, got {[type(c).__name__ for c in cut]}."
    for conv, map_, name in zip(cut, (x, skip), ("first", "second"), strict=True):
        if conv.in_channels != map_.shape[1]:
            found = conv.in_channels
            return f"The {name} map has {map_.shape[1]} channels, yours {found}."
    with torch.no_grad():
        whole = mix(torch.cat([x, skip], dim=1))
        off = cut[0](x) + cut[1](skip) - whole
        bias = mix.bias[:, None, None].expand_as(off)
    if torch.allclose(off, bias, atol=1e-5):
        return "Too much by one bias: both convolutions add it. Keep one."
    if torch.allclose(off, -bias, atol=1e-5):
        return "The weights are right, the bias is gone: give it to one."
    if not torch.allclose(off, torch.zeros_like(off), atol=1e-5):
        return "The sum differs: did you cut the weights along the inputs?"
    return None


# %%
def cut_mix(mix, channels):
    """Return two convolutions: for the first `channels` maps, for the rest."""


check_cut(cut_mix)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def cut_mix_solution(mix, channels):
    first = nn.Conv2d(channels, mix.out_channels, 1)
    second = nn.Conv2d(mix.in_channels - channels, mix.out_channels, 1, bias=False)
    left, right = mix.weight[:, :channels], mix.weight[:, channels:]
    first.load_state_dict({"weight": left, "bias": mix.bias})
    second.load_state_dict({"weight": right})
    return first, second


check_cut(cut_mix_solution)

# %% [markdown]
# **Exercise 2.** Suppose that `to_vector` above were trained, and you could not train it again. Turn it into two
# convolutions, without pooling, that give the *same* 256 numbers for images of 224 pixels and do not break
# at 256. What shape comes out there, and what do its positions mean?


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_unflatten(answer):
    torch.manual_seed(2)
    small, large = torch.rand(2, 512, 7, 7), torch.rand(2, 512, 8, 8)
    with torch.no_grad():
        wanted, corner = to_vector(small), to_vector(large[..., 1:, 1:])
    network = answer(copy.deepcopy(to_vector))
    if network is None:
        return print("Nothing returned yet: return a network.")
    with torch.no_grad():
        found = network(small)
        if found.shape[:2] != (2, 256) or found[0].numel() != 256:
            return print(f"At 224 pixels yours gives {list(found.shape)}.")
        if not torch.allclose(found.flatten(1), wanted, atol=1e-4):
            return print(
                "The shape is right, the numbers are not. nn.Flatten puts all rows "
                "of channel 0 first: view the weights as [256, 128, 7, 7]."
            )
        try:
            found = network(large)
        except RuntimeError as error:
            return print("At 256 pixels:", str(error).splitlines()[0])
    if found.shape != (2, 256, 2, 2):
        return print(
            f"At 256 pixels yours gives {list(found.shape)}. On 8 × 8 positions a "
            "window of 7 × 7 has 2 × 2 places: no pooling, no Flatten."
        )
    if not torch.allclose(found[..., 1, 1], corner, atol=1e-4):
        return print("The last position should see the last 7 × 7 of the map.")
    print("Right: [2, 256, 2, 2], one vector for each place of a 7 × 7 window.")


# %%
def unflatten(network):
    """Return a network without nn.Flatten that computes the same."""


check_unflatten(unflatten)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def unflatten_solution(network):
    project, _, linear = network
    window = nn.Conv2d(128, 256, kernel_size=7)
    weight = linear.weight.view(256, 128, 7, 7)
    window.load_state_dict({"weight": weight, "bias": linear.bias})
    return nn.Sequential(project, window)


check_unflatten(unflatten_solution)

# %% [markdown]
# **Exercise 3.** From the records: what is the smallest width whose mean mIoU on scenes is within three points of
# the best width's?


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_width(answer):
    means = {width: evidence.mean("scenes", by_width[width]) for width in widths}
    good = [w for w in widths if means[w] > max(means.values()) - 3]
    width = answer()
    if width is None:
        return print("Nothing returned yet: return a number of channels.")
    if width not in means:
        return print(f"{width!r} was not measured: {', '.join(map(str, means))}.")
    if width not in good:
        short = max(means.values()) - means[width]
        return print(f"{width} channels are {short:.1f} points below the best.")
    if width != good[0]:
        return print(f"{width} channels will do, but fewer do as well.")
    print(f"Right: {width} channels, {means[width]:.1f} %.")


# %%
def smallest_width():
    """Return the number of channels."""


check_width(smallest_width)


# %% tags=["hide-cell", "nbval-ignore-output"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def smallest_width_solution():
    means = {width: evidence.mean("scenes", by_width[width]) for width in widths}
    best = max(means.values())
    return next(width for width in widths if means[width] > best - 3)


check_width(smallest_width_solution)

# %% [markdown]
# ## Recap
#
# - Other channels: a 1×1 convolution, a linear layer at every position. Never `reshape`.
# - Project on the smaller of the two grids. The result is the same, the work is not.
# - Concatenating and a 1×1 *is* summing two projections. Sum; before a 3×3, concatenate.
# - Do not flatten what should work at other sizes.
# - Start with 64 channels, and try half: on scenes it costs a point or so.
#
# | shape contract | |
# |---|---|
# | `as_conv(linear)` | `[B, C, h, w]` → `[B, D, h, w]`, any h, w |
# | `project_to` | `[B, C, h, w]` → `[B, D, *size]` |
# | `FeatureAdaptation` and its kin | `[B, C, h, w]` and `[B, S, H, W]` → `[B, out_channels, h, w]` |
# | `AdaptedDecoder` | a `Pyramid` → `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]` |
# | in a `Segmenter` | → `[B, out_channels, H, W]`, any H, W ≥ 32 |
#
# In your own project:
#
# ```python
# from helpers.bridges.conv_projection import AdaptedDecoder, FeatureAdaptation
# from helpers.encoder import ResNet18Encoder, Segmenter
#
# encoder = ResNet18Encoder()
# model = Segmenter(encoder, AdaptedDecoder(encoder.out_channels, out_channels=7))
#
# # or inside a decoder of your own: x [B, 48, h, w], c5 [B, 512, H, W]
# join = FeatureAdaptation(in_channels=48, skip_channels=512, out_channels=64)
# x = join(x, c5)  # [B, 64, h, w]
# ```
