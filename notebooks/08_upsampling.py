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
# # 08 · How do I get back to the image's size, beside the image?
#
# Your map has 16 × 16 positions, your image 256 × 256 pixels. You put an upsampling layer in between, lay the
# result beside the image, and read `Sizes of tensors must match`. Once the sizes fit, the questions begin:
# transposed convolution or bilinear? Why is there a checkerboard on my mask? And is the image worth having
# there at all?

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
# - the recipe that is often posted: one ×2 step where ×16 is needed, and two rules that are no rules;
# - which sizes a step of ×2 can reach, and what `output_padding` is for;
# - four ways up, built in a few lines each, and what each paints where there is nothing to see;
# - the half pixel that `align_corners` moves, as a number: up to 15.5 pixels;
# - three trainings while you wait, and an edge of each under the microscope: how wide, and how far off;
# - measured with three seeds: are transposed convolutions sharper, and are their masks any better? And what
#   does the image add, at what cost?

# %%
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from helpers import plotting, records, scenes
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.errors import explaining
from helpers.inspection import count_macs, count_parameters, pyramid_levels, shapes
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import budget, evaluate, fit

# %% [markdown]
# ## The problem as a picture
#
# Let a map at stride 16 know *exactly* how much of each of its squares is covered by objects. No network
# could do better. What lies between two positions, the way up has to invent:

# %%
image, mask = scenes.batch([5_018])
objects = (mask > 0).float()[None]
share = F.avg_pool2d(objects, 16)
ways = {
    "nearest": F.interpolate(share, scale_factor=16),
    "bilinear": F.interpolate(share, scale_factor=16, mode="bilinear"),
}
plotting.show_images(
    [image[0], objects[0], *(way[0] for way in ways.values())],
    titles=["image", "objects", *ways],
    alt="A scene, its objects, and their share in squares of 16 pixels, enlarged "
    "as squares and as clouds.",
)

# %% [markdown]
# Squares or clouds; neither is an outline. A way up that *learns* has two more chances: it can know what
# outlines usually look like, and it can look at the image, where the outline stands in plain sight.
#
# ## The shapes
#
# How far is it from each map to the image? For an image that 32 divides, and for one that it does not:

# %%
for height, width in [(256, 256), (180, 240)]:
    for name, _, h, w, stride in pyramid_levels(height, width)[1:]:
        print(f"{name}: {h:2} × {w:2}, × {stride:2} = {h * stride} × {w * stride}")
    print(f"image: {height} × {width}\n")

# %% [markdown]
# In the second table `c3`, `c4` and `c5` come back too large, because the encoder rounds up. What is too much
# lies at the lower and right rim. So: enlarge, then **cut**, and nothing is squeezed. (Whether it then lies where it
# belongs is another question: *half a pixel*, below.)
#
# ## The obvious attempt, and what it does wrong
#
# The recipe in a nutshell: take the encoder's 16 × 16 positions, bring them to the image's size and to its 3
# channels by a transposed convolution, add a ReLU, concatenate. It claims to return `[1, 3, 256, 256]`:

# %%
torch.manual_seed(0)
encoder = ResNet18Encoder()
up = nn.Sequential(nn.ConvTranspose2d(256, 3, 4, stride=2, padding=1), nn.ReLU())
photo = torch.rand(1, 3, 256, 256)
c4 = encoder(normalize(photo)).c4
print(list(c4.shape), "→", list(shapes(up, c4)))

# %% tags=["raises-exception"]
with explaining():
    torch.cat([up(c4), photo], dim=1)

# %% [markdown]
# One step of stride 2 doubles. From 16 to 256 it takes four of them:

# %%
torch.manual_seed(0)
widths = (256, 64, 32, 16, 16)
four = nn.Sequential(
    *(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
)
beside = torch.cat([four(c4), photo], dim=1)
print(list(shapes(four, c4)), "and", list(photo.shape), "→", list(beside.shape))

# %% [markdown]
# Look at the channels: 16 beside 3. **"It must have the image's 3 channels"** is no rule: `torch.cat` along
# the channels asks for equal height and width, and the next convolution takes 19 channels as gladly as 6.
#
# And **the ReLU at the end**? It sets everything below zero to zero. Of three channels that are to carry all
# that the encoder knows, how much is left? Twenty fresh layers on one scene:

# %%
scene_c4 = encoder(normalize(image)).c4
lost = []
for seed in range(20):
    torch.manual_seed(seed)
    three = nn.ConvTranspose2d(256, 3, 4, stride=2, padding=1)
    lost.append(100 * (three(scene_c4) < 0).float().mean().item())
below = 100 * (normalize(image) < 0).float().mean().item()

# %% tags=["nbval-ignore-output"]
print(f"set to zero: {sum(lost) / 20:.0f} % ({min(lost):.0f} to {max(lost):.0f} %)")
print(f"of this normalised image, below zero: {below:.0f} %")

# %%
assert 35 < sum(lost) / 20 < 65 and 25 < min(lost) < max(lost) < 75 and below > 10

# %% [markdown]
# Half of the values, with every start between a quarter and three quarters. That is before training, when half
# of what a layer says is negative by construction; training may find a way round. How much a *trained* decoder
# zeroes there, and what 3 channels and the ReLU cost, each by itself, is measured below. That a ReLU would be
# needed is no rule in any case: the normalised image beside it has negative values, too, and nobody would
# think of cutting those off.
#
# ## The technique
#
# ### Which sizes can a step reach?
#
# A convolution of stride 2 rounds up: 15 and 16 positions both become 8. On the way back, 8 does not know
# what it was. A transposed convolution takes the smaller guess, and `output_padding=1` the larger:

# %%
shrink = nn.Conv2d(1, 1, 3, stride=2, padding=1)
enlarge = [
    nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, output_padding=extra)
    for extra in (0, 1)
]
for side in range(13, 19):
    small = shrink(torch.rand(1, 1, side, side))
    back = [up(small).shape[-1] for up in enlarge]
    print(
        f"{side} → {small.shape[-1]} → {back[0]}, with output_padding=1: {back[1]}"
    )

# %% [markdown]
# In a column of pairs: 2*n* − 1 and 2*n* both become *n*. `output_padding` does not pad the output with
# anything. It only lets the layer compute one more row and column. You need not do that sum: pass the size that
# you want, and the layer chooses, if it can:

# %%
small = torch.rand(1, 1, 8, 8)
print(list(enlarge[0](small, output_size=(15, 16)).shape))

# %% tags=["raises-exception"]
with explaining():
    enlarge[0](small, output_size=(18, 18))

# %% [markdown]
# Sizes for a kernel *k*, stride *s* and padding *p*: (*n* − 1) *s* − 2*p* + *k*. With *k* = 2*s* and
# *p* = *s* / 2 that is exactly *n* · *s*, for every even stride, without output padding. This chapter's
# layers all return *n* · *s*, so that one can take the other's place.
#
# ### Four ways up
#
# **Repeat, then convolve.** Nothing is learned about the enlarging; a 3×3 convolution on the fine grid sees
# to the rest:

# %% tags=["export"]
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.encoder import STRIDES, Pyramid, check_image, check_map, check_pyramid


# %% tags=["export"]
class NearestConv(nn.Module):
    """Enlarge by repeating every value, then a 3×3 convolution.

    `forward` takes `[B, in_channels, h, w]` and returns
    `[B, out_channels, factor·h, factor·w]`, any real numbers. Raises `ValueError`
    for other channels or ranks, `TypeError` for integers.

    Source: Odena et al., Deconvolution and Checkerboard Artifacts, Distill 2016.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        self.in_channels, self.factor = in_channels, factor
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.in_channels)
        return self.conv(F.interpolate(x, scale_factor=self.factor))


# %% [markdown]
# **Blend, then convolve.** The same, but with a straight line from each position to the next:


# %% tags=["export"]
class BilinearConv(nn.Module):
    """As `NearestConv`, but the map is enlarged bilinearly.

    Takes, returns and raises what `NearestConv` does.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        self.in_channels, self.factor = in_channels, factor
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.in_channels)
        return self.conv(
            F.interpolate(x, scale_factor=self.factor, mode="bilinear")
        )


# %% [markdown]
# **Paint.** A transposed convolution learns the enlarging itself: each position paints a copy of the kernel,
# times its value, and copies that overlap add up.


# %% tags=["export"]
class TransposedConv(nn.Module):
    """Enlarge by a transposed convolution whose kernel is twice its stride.

    Takes and returns what `NearestConv` does. Raises `ValueError` for other
    channels or ranks, and for a factor that is odd; `TypeError` for integers.

    Source: Long et al., Fully Convolutional Networks, CVPR 2015.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        if factor < 2 or factor % 2:
            raise ValueError(
                f"Expected an even factor, got {factor}: half of it is padding. "
                "For an odd one use BilinearConv."
            )
        self.in_channels = in_channels
        self.conv = nn.ConvTranspose2d(
            in_channels, out_channels, 2 * factor, factor, factor // 2, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.in_channels)
        return self.conv(x)


# %% [markdown]
# **Deal out.** Compute four times the channels on the coarse grid, and deal them out as 2 × 2 pixels:
#
# > *pixel shuffle*: channel 4*c* + 2*i* + *j* goes to row *i* and column *j* of channel *c*'s little squares.
#
# Four neighbouring pixels then come from four kernels that know nothing of each other. **ICNR** lets all
# four start alike, so that the layer begins as "repeat" and parts from it only where that pays:


# %% tags=["export"]
@torch.no_grad()
def icnr_(weight: Tensor, factor: int) -> Tensor:
    """Let a convolution before a pixel shuffle start as one before "nearest".

    `weight` is `[out_channels · factor², in_channels, k, k]`; in place, each group
    of factor² kernels becomes a copy of its first. Returns it. Raises `ValueError`
    where factor² does not divide the number of kernels.

    Source: Aitken et al., Checkerboard Artifact Free Sub-Pixel Convolution, 2017.
    """
    if len(weight) % factor**2:
        raise ValueError(
            f"Expected a number of kernels that {factor**2} divides, got "
            f"{len(weight)}. A pixel shuffle deals out {factor**2} at a time."
        )
    first = weight[:: factor**2].clone()
    return weight.copy_(first.repeat_interleave(factor**2, dim=0))


# %% tags=["export"]
class ShuffleConv(nn.Module):
    """A 3×3 convolution to factor² times the channels, dealt out as pixels.

    Starts as `NearestConv` would, inside (`icnr_`). Takes, returns and raises what
    `NearestConv` does.

    Source: Shi et al., Real-Time Single Image and Video Super-Resolution Using an
    Efficient Sub-Pixel Convolutional Neural Network, CVPR 2016.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        self.in_channels = in_channels
        dealt = out_channels * factor**2
        self.conv = nn.Conv2d(in_channels, dealt, 3, padding=1, bias=False)
        icnr_(self.conv.weight, factor)
        self.shuffle = nn.PixelShuffle(factor)

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.in_channels)
        return self.shuffle(self.conv(x))


# %%
ups = {
    "nearest": NearestConv,
    "bilinear": BilinearConv,
    "transposed": TransposedConv,
    "pixel shuffle": ShuffleConv,
}
x = torch.rand(2, 48, 12, 15)
for name, up in ups.items():
    layer = up(48, 32)
    weights, macs = count_parameters(layer), count_macs(layer, x[:1])
    print(f"{name:14} {list(shapes(layer, x))}, {weights:,} weights, {macs:,} MACs")
    assert shapes(layer, x) == (2, 32, 24, 30)

# %% [markdown]
# Same in, same out. The pixel shuffle has four times the weights of a 3×3 for the same work, and the
# transposed convolution is the cheapest: it multiplies on the coarse grid. It needs the right kernel,
# though.
#
# ### Checkerboards
#
# How many copies of the kernel reach an output pixel? Ones in, a kernel of ones, and the output *is* the
# count:

# %%
flat = torch.ones(1, 1, 12, 12)
for kernel in (2, 3, 4, 5, 6):
    count = F.conv_transpose2d(flat, torch.ones(1, 1, kernel, kernel), stride=2)
    reached = count[0, 0, 8:-8, 8:-8].unique().int().tolist()
    print(f"kernel {kernel}: a pixel is reached", *reached, "times")

# %% [markdown]
# With a kernel of 3, some pixels are reached once, their neighbours twice or four times. That is the
# **checkerboard**, and the first cure: the kernel must be a *multiple of the stride*. It is necessary. Is it
# enough? Nobody starts with ones. Feed a map that is 1 everywhere to layers with fresh random weights; a
# layer without prejudice should answer with a flat grey. (Why a constant *map*, and not a constant image? The
# encoder pads with zeros, so that even a grey image comes out of it uneven at the rims, and you would not know
# whose pattern you see.)


# %% tags=["export"]
@torch.no_grad()
def start_bilinear(conv: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """Let a transposed convolution start as bilinear interpolation; returns it.

    In place: every kernel becomes the bilinear one times its own first weight, so
    that the layer starts as a 1×1 convolution with those weights and
    `F.interpolate(…, mode="bilinear")`, away from the borders. A bias stays.
    Raises `ValueError` unless the kernel is twice the stride, and groups are 1.

    Source: Long et al., Fully Convolutional Networks, CVPR 2015.
    """
    factor = conv.stride[0]
    if (conv.kernel_size, conv.groups) != ((2 * factor,) * 2, 1):
        raise ValueError(
            f"Expected a kernel of twice the stride, {2 * factor}, and one group, "
            f"got {conv.kernel_size} and {conv.groups}. Build a TransposedConv."
        )
    place = torch.arange(2 * factor).to(conv.weight) + 0.5
    slope = 1 - (place / factor - 1).abs()
    first = conv.weight[:, :, :1, :1].clone()
    conv.weight.copy_(first * torch.outer(slope, slope))
    return conv


# %% tags=["export"]
class EvenTransposedConv(TransposedConv):
    """As `TransposedConv`, but it starts as a 1×1 convolution and "bilinear".

    Takes, returns and raises what `TransposedConv` does.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__(in_channels, out_channels, factor)
        start_bilinear(self.conv)


# %%
torch.manual_seed(3)
uneven = nn.ConvTranspose2d(4, 4, 3, 2, padding=1, output_padding=1, bias=False)
shuffled = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2))
starts = {
    "transposed, 3×3": uneven,
    "transposed, 4×4": TransposedConv(4, 4),
    "pixel shuffle": shuffled,
    "4×4, even start": EvenTransposedConv(4, 4),
    "shuffle, ICNR": ShuffleConv(4, 4),
    "nearest, 3×3": NearestConv(4, 4),
}


@torch.no_grad()
def on_constant(layer):
    """What a layer makes of ones, away from the borders, [channels, 12, 12]."""
    return layer(torch.ones(1, 4, 12, 12))[0, :, 6:-6, 6:-6]


def unevenness(values):
    """How far the values vary over the positions, in % of their size."""
    spread = values - values.mean(dim=(-2, -1), keepdim=True)
    return 100 * float(spread.norm() / values.norm())


# %%
answers = {name: on_constant(layer) for name, layer in starts.items()}
boards = torch.stack([answer[0] - answer[0].mean() for answer in answers.values()])
plotting.show_images(
    0.5 + boards / boards.abs().max() / 2,  # one scale for all six
    titles=list(starts),
    columns=3,
    alt="Three checkered squares, and below them three that are evenly grey.",
)

# %%
for name, answer in answers.items():
    print(f"{name:20}", "even" if unevenness(answer) < 0.01 else "checkered")
    assert (unevenness(answer) < 0.01) == (name in list(starts)[3:])
assert min(unevenness(a) for a in list(answers.values())[:3]) > 10
grey = encoder(normalize(torch.full((1, 3, 256, 256), 0.5))).c4
assert unevenness(grey[0]) > 5

# %% [markdown]
# So the kernel of 4 is checkered, too, at the start: the four phases of its output are sums over four
# different quarters of its weights. What starts even is a kernel that *is* an interpolation, a shuffle
# with ICNR, or a resize-convolution. Only the last one stays even whatever it learns. What the others have
# on the board after training is measured below.
#
# ### Half a pixel: align_corners
#
# One argument of `F.interpolate` moves your whole mask. A pixel is a little square; does a position of the
# coarse map stand for the *middle* of its square, or are the corners of both maps nailed together? Take an
# image whose value *is* its column, average it over squares of 32, and enlarge it again. Where it comes
# back, the value should equal the column; the difference is a shift in pixels:


# %%
def shift(coarse, side, align):
    """Columns after enlarging, minus the columns where they should be."""
    back = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=align)
    return (back[0, 0, 0] - torch.arange(float(side))).numpy()


def centred(columns):
    """Halved five times as a ResNet does it: a window around every second pixel."""
    for _ in range(5):
        columns = F.avg_pool2d(columns, 3, 2, padding=1, count_include_pad=False)
    return columns


columns = torch.arange(256.0).expand(1, 1, 256, 256)
shifts = {
    "squares, False": shift(F.avg_pool2d(columns, 32), 256, False),
    "squares, True": shift(F.avg_pool2d(columns, 32), 256, True),
    "ResNet, False": shift(centred(columns), 256, False),
}
plotting.show_curves(
    {name: values[48:-48] for name, values in shifts.items()},
    xlabel="column of the image",
    ylabel="shift, pixels",
    x=range(48, 208),
    alt="One line lies on zero, one falls through zero, one lies at minus 15.5.",
)

# %%
inner = {name: values[48:-48] for name, values in shifts.items()}
assert abs(inner["squares, False"]).max() < 1e-3
assert abs(shifts["squares, True"][0] - 15.5) < 1e-3
assert abs(shifts["squares, True"][-1] + 15.5) < 1e-3
assert abs(inner["ResNet, False"] + 15.5).max() < 1e-3
doubled = shift(F.avg_pool2d(columns, 2), 256, True)
assert abs(abs(doubled[[0, -1]]) - 0.5).max() < 1e-3

# %% [markdown]
# With `align_corners=False`, PyTorch's default, squares come back to their place. With `True` they are pulled
# apart, the more the further out: 15.5 pixels at the rims (beyond the picture, which leaves out the outer 48
# columns), half of a square minus half a pixel, and none in the middle. At ×2 it is half a pixel. Say `False`, or
# say nothing, and do not mix the two in one network.
#
# The third line is a surprise. A ResNet does not average over squares. All its strided layers look *around*
# every second pixel, so position *i* of `c5` is centred on pixel 32*i*, and any way up that thinks in squares
# draws it 15.5 pixels further to the right. A decoder with convolutions after it may learn that away; the book has
# not measured it.
#
# ### A decoder to try them in
#
# One step is a way up, BatchNorm and ReLU. The decoder projects one map of the encoder to few channels, takes
# its steps, and cuts off what the encoder's rounding had added. Everything but `up` stays the same:


# %% tags=["export"]
def step(
    up: type[nn.Module], in_channels: int, out_channels: int, factor: int
) -> nn.Sequential:
    """Return one step: the way up, BatchNorm and ReLU; no value negative.

    It takes `[B, in_channels, h, w]` and returns
    `[B, out_channels, factor·h, factor·w]`; `up` is `BilinearConv` or a class with
    the same arguments, and raises what that raises.
    """
    return nn.Sequential(
        up(in_channels, out_channels, factor),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


# %% tags=["export"]
class UpsamplingDecoder(nn.Module):
    """One map of the encoder, taken up to the image's size; no skips.

    `forward(pyramid)` takes the encoder's five maps, from images of any H, W ≥ 32,
    and returns `[B, out_channels, 2⌈H/2⌉, 2⌈W/2⌉]`, one row or column more than
    the image where that has an odd number. `factors` are those of the steps; their
    product is the stride of the map that is read: 16 for c4, 32 for c5. `widths`
    are the channels before, between and after the steps; `up` is `BilinearConv` or
    a class with the same arguments. Raises `ValueError` for maps with other
    channels than `in_channels`, or factors that fit no map or not the widths;
    `TypeError` for integers.

    Source: cf. FCN-32s of Long et al., Fully Convolutional Networks, CVPR 2015.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        up: type[nn.Module] = BilinearConv,
        widths: Sequence[int] = (48, 32, 24, 16, 16),
        factors: Sequence[int] = (2, 2, 2, 2),
    ):
        super().__init__()
        if math.prod(factors) not in STRIDES or len(widths) != len(factors) + 1:
            raise ValueError(
                f"Expected factors whose product is one of {STRIDES} and one width "
                f"more, got {tuple(factors)} and {tuple(widths)}. For c5: (2,) * 5."
            )
        self.in_channels = tuple(in_channels)
        self.level = STRIDES.index(math.prod(factors))
        channels = self.in_channels[self.level]
        self.project = nn.Sequential(nn.Conv2d(channels, widths[0], 1), nn.ReLU())
        pairs = zip(widths[:-1], widths[1:], factors, strict=True)
        self.steps = nn.Sequential(
            *(step(up, a, b, factor) for a, b, factor in pairs)
        )
        self.head = nn.Conv2d(widths[-1], out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        x = self.steps(self.project(pyramid[self.level]))
        height, width = pyramid[0].shape[-2:]
        return self.head(x[..., : 2 * height, : 2 * width])


# %%
classes = len(scenes.CLASSES)
for height, width in [(128, 128), (180, 240), (33, 97)]:
    maps = encoder(normalize(torch.rand(2, 3, height, width)))
    for up in ups.values():
        decoder = UpsamplingDecoder(encoder.out_channels, classes, up)
        logits = Segmenter(encoder, decoder).decode(maps, (height, width))
        assert logits.shape == (2, classes, height, width)
    print(f"{height} × {width} → {list(shapes(decoder, maps))}, 4 ways")

# %% [markdown]
# Why two at a time, and not once by 32? Both are one line in this decoder. Compare them on `c5`:

# %%
maps = encoder(normalize(image))
for name, widths, factors in [
    ("five times ×2", (64, 48, 32, 24, 16, 16), (2, 2, 2, 2, 2)),
    ("once ×32", (32, 16), (32,)),
]:
    for kind in ("bilinear", "transposed"):
        decoder = UpsamplingDecoder(
            encoder.out_channels, classes, ups[kind], widths, factors
        )
        weights, macs = count_parameters(decoder), count_macs(decoder, maps)
        print(f"{name:14} {kind:11} {weights:9,} weights, {macs:,} MACs")

# %% [markdown]
# Once by 32, a transposed convolution needs a kernel of 64 × 64, two million weights even at few channels. A
# bilinear step draws straight lines over 32 pixels, from one position to the next, and has a single 3×3 to
# correct them. Five steps can decide again at every size, for about the same work. Whether that is worth
# anything is measured below.
#
# ### Beside the image
#
# Now the image comes in. It is concatenated to the enlarged features at full size, one 3×3 convolution looks at
# both, and the size is the image's, cut to the pixel:


# %% tags=["export"]
class BesideImageDecoder(nn.Module):
    """One map of the encoder, enlarged, beside the image itself; then a 3×3.

    `forward(pyramid, image)` takes the encoder's five maps and the normalised
    images `[B, 3, H, W]` that they came from, any H, W ≥ 32, and returns
    `[B, out_channels, H, W]`. `beside` channels of features lie beside the image's
    3; `up` and `widths` are those of `UpsamplingDecoder`. Raises `ValueError` for
    maps of other channels, or an image of another size or batch; `TypeError` for
    integers.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        up: type[nn.Module] = BilinearConv,
        beside: int = 16,
        widths: Sequence[int] = (48, 32, 24, 16, 16),
    ):
        super().__init__()
        self.climb = UpsamplingDecoder(in_channels, beside, up, widths)
        self.mix = nn.Conv2d(beside + 3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.head = nn.Conv2d(16, out_channels, 1)

    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
        check_beside(pyramid, image)
        height, width = image.shape[-2:]
        x = self.climb(pyramid)[..., :height, :width]
        x = torch.cat([x, image], dim=1)
        return self.head(self.relu(self.norm(self.mix(x))))


# %% tags=["export"]
def check_beside(pyramid: Pyramid, image: Tensor) -> None:
    """Raise a clear error unless these are maps of this image `[B, 3, H, W]`."""
    check_image(image)
    batch, _, height, width = image.shape
    made = batch, (height + 1) // 2, (width + 1) // 2
    c1 = pyramid[0]
    if (c1.shape[0], *c1.shape[-2:]) != made:
        raise ValueError(
            f"Expected the image that the maps came from, got {list(image.shape)} "
            f"beside a c1 of {list(c1.shape)}. Pass what the encoder was given."
        )


# %%
model = Segmenter(encoder, BesideImageDecoder(encoder.out_channels, classes))
for height, width in [(128, 128), (180, 240), (33, 97)]:
    logits = model(normalize(torch.rand(2, 3, height, width)))
    print(f"{height} × {width} → {list(logits.shape)}")
    assert logits.shape == (2, classes, height, width)

# %% [markdown]
# `Segmenter` hands the image on because `forward` asks for it by name, and `fit` keeps it in memory beside the
# cached maps. One 3×3 of few weights, but it works at every pixel; what that costs stands below, beside what it
# brings.
#
# ## Train it
#
# Three decoders on 80 scenes, a few seconds each: bilinear, transposed, and transposed with an even start. All
# see `c4`, and `c4` only.

# %%
epochs = budget(short=8, full=40)
train, unseen = scenes.Scenes(80), scenes.Scenes(40, first=5_000)
train = [train[i] for i in range(len(train))]  # draw each scene once
loss = SegmentationLoss(class_weights=class_weights((m for _, m in train), classes))
chosen = scenes.batch([5_018, 5_009])
three = {
    "bilinear": BilinearConv,
    "transposed": TransposedConv,
    "even start": EvenTransposedConv,
}


@torch.no_grad()
def object_probability(model, images):
    """How sure the model is of an object at every pixel, [B, H, W]."""
    device = next(model.parameters()).device
    logits = model.eval()(normalize(images.to(device)))
    return 1 - logits.softmax(dim=1)[:, 0].cpu()


# %%
def train_and_watch(up):
    """A trained model, its history, and what it drew after every epoch."""
    torch.manual_seed(0)
    decoder = UpsamplingDecoder(encoder.out_channels, classes, up)
    model = Segmenter(ResNet18Encoder(), decoder)
    drawn = [object_probability(model, chosen[0])]
    history = fit(
        model,
        train,
        epochs=epochs,
        lr=1e-2,
        loss=loss,
        flip=False,
        after_epoch=lambda _: drawn.append(object_probability(model, chosen[0])),
    )
    return model, history, drawn


trained = {name: train_and_watch(up) for name, up in three.items()}

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    {name: history.loss for name, (_, history, _) in trained.items()},
    xlabel="epoch",
    ylabel="loss",
    alt="The loss of three decoders over the epochs: three falling curves.",
)

# %% [markdown]
# Pull the slider, and watch the outlines: bright is *object*, dark is *background*. Two scenes that none of
# the three has seen. Look for the grid that the transposed one shows at first, after two epochs, say, and see what
# becomes of it.

# %% tags=["nbval-ignore-output"]
every = max(1, epochs // 3)
frames = [
    plotting.show_images(
        [
            picture
            for k in range(2)
            for picture in (
                chosen[0][k],
                *(drawn[i][k] for *_, drawn in trained.values()),
            )
        ],
        titles=["image", *trained] * 2,
        alt="An image, and where three decoders see objects.",
    )
    for i in range(0, epochs + 1, every)
]
labels = [f"after {i} epochs" for i in range(0, epochs + 1, every)]
plotting.flipbook(
    frames, ["untrained", *labels[1:]], alt="Object probabilities of three decoders"
)

# %% tags=["nbval-ignore-output"]
scored = {name: evaluate(model, unseen) for name, (model, *_) in trained.items()}
for name, score in scored.items():
    boundary = score.boundary_miou
    print(f"{name:11} mIoU {score.miou:.1f} %, boundary IoU {boundary:.1f} %")

# %%
for _, history, _ in trained.values():
    assert history.loss[-1] < 0.65 * history.loss[0]
assert all(score.miou > 1.2 * 100 / classes for score in scored.values())

# %% [markdown]
# ## Look inside: an edge under the microscope
#
# "Sharper" can be measured. Go across the true edges, along rows and columns, from 8 pixels outside to 8 pixels
# inside, and look at how the probability of *object* rises. A sharp decoder jumps from one pixel to the next; a
# blurred one climbs slowly. To each such profile the S-curve is fitted that comes nearest: how wide it is says
# how sharp the edge is, and where its middle lies says whether it is sharp in the *right place*.


# %% tags=["export"]
def edge_profiles(inside: Tensor, mask: Tensor, reach: int = 8) -> Tensor:
    """Return how a probability runs across the edges of a mask, `[N, 2·reach]`.

    `inside` is `[B, H, W]`, 0…1; `mask` is boolean, `[B, H, W]`. A profile is a
    piece of a row or column whose first half lies outside of the mask and whose
    second half lies inside, turned round where it has to be. Raises `ValueError`
    for other shapes.
    """
    if inside.ndim != 3 or inside.shape != mask.shape:
        raise ValueError(
            f"Expected two [B, H, W] of one size, got {list(inside.shape)} and "
            f"{list(mask.shape)}. From logits: 1 - logits.softmax(1)[:, 0]."
        )
    found = []
    for values, truth in ((inside, mask), (inside.mT, mask.mT)):
        pieces = values.unfold(2, 2 * reach, 1)
        first, second = truth.unfold(2, 2 * reach, 1).split(reach, dim=-1)
        rising = ~first.any(-1) & second.all(-1)
        falling = first.all(-1) & ~second.any(-1)
        found += [pieces[rising], pieces[falling].flip(-1)]
    return torch.cat(found)


# %% tags=["export"]
class Edges(NamedTuple):
    """How edges look: `found` in % of all, `width` and `offset` in pixels.

    An edge counts as found if its profile rises by more than ½ from end to end. Its
    width is that of the S-curve that fits it best: the whole rise divided by the
    steepest slope, 1 for a jump from one pixel to the next. Its offset is how far
    the curve's middle is from the true edge. Width and offset are means over the
    edges found, NaN where there are none.
    """

    found: float
    width: float
    offset: float


# %% tags=["export"]
def measure_edges(profiles: Tensor) -> Edges:
    """Measure profiles `[N, 2·reach]` as `edge_profiles` returns them, reach ≥ 3.

    Curves are fitted, because the steepest step of a profile would also be that of
    a checkerboard on top of it. Their widths are 1 … 2·reach, their middles at most
    reach − 2 pixels from the true edge.
    """
    reach = profiles.shape[1] // 2
    places = torch.arange(-reach, reach) + 0.5
    middles = torch.arange(2 - reach, reach - 1.5, 0.5)
    widths = torch.logspace(0, math.log10(2 * reach), 25)
    slopes = (places - middles[:, None, None]) / widths[:, None]
    curves = torch.erf(math.pi**0.5 * slopes)  # [middles, widths, 2·reach]
    curves = F.normalize(curves - curves.mean(2, keepdim=True), dim=2).flatten(0, 1)
    good = profiles[profiles[:, -1] - profiles[:, 0] > 0.5]
    level = good - good.mean(1, keepdim=True)
    best = torch.cat([(part @ curves.T).argmax(1) for part in level.split(4096)])
    width = widths[best % len(widths)].mean().item()
    offset = middles[best // len(widths)].abs().mean().item()
    return Edges(100 * len(good) / max(1, len(profiles)), width, offset)


# %%
jump = torch.zeros(1, 40, 40)
jump[:, 10:30, 10:30] = 1
blur = nn.Sequential(nn.AvgPool2d(3, 1, padding=1), nn.AvgPool2d(3, 1, padding=1))
moved = jump.roll((2, 2), dims=(1, 2))
for name, values in {"jump": jump, "blurred": blur(jump), "moved": moved}.items():
    found = measure_edges(edge_profiles(values, jump > 0))
    print(f"{name:8} width {found.width:.1f}, offset {found.offset:.1f}")

# %% [markdown]
# Now the three decoders, first with your own eyes, 48 × 48 pixels of the second scene, every pixel a square; then
# in numbers, on 60 scenes that none of the three has seen. An edge counts as *found* if the probability rises by
# more than ½ across it.

# %% tags=["nbval-ignore-output"]
close_up = (1, slice(40, 88), slice(24, 72))
plotting.show_images(
    [
        chosen[0][1, :, 40:88, 24:72],
        *(drawn[-1][close_up] for *_, drawn in trained.values()),
    ],
    titles=["image", *trained],
    alt="A corner of a triangle, close up: the image, and where three decoders see "
    "an object, from dark to bright.",
)

# %%
watched, truth = scenes.batch(range(5_100, 5_160))
seen = {
    name: measure_edges(
        edge_profiles(object_probability(model, watched), truth > 0)
    )
    for name, (model, *_) in trained.items()
}

chance = torch.arange(-6, 6.5, 0.5).abs().mean().item()  # of a middle, anywhere

# %% tags=["nbval-ignore-output"]
for name, found in seen.items():
    print(f"{name:11} {found.found:.0f} % of the edges found", end=", ")
    print(f"width {found.width:.1f} px, offset {found.offset:.1f} px")
print(f"a middle within 6 pixels at random: offset {chance:.1f} px")

# %%
transposed = seen.pop("transposed")
if epochs == 8:  # longer runs end elsewhere
    assert transposed.width < seen["bilinear"].width - 0.3
    assert transposed.found > 20 and seen["bilinear"].found > 20
    nearest = min(transposed.offset, *(s.offset for s in seen.values()))
    assert nearest > chance - 0.3
    others = min(scored[name].miou for name in seen)
    assert scored["transposed"].miou < others - 2.5
    losses = {name: history.loss[-1] for name, (_, history, _) in trained.items()}
    assert losses["transposed"] > max(losses[name] for name in seen) + 0.05

# %% [markdown]
# Read three things, one at a time, in the short run stored here. *Sharpness*: the transposed decoder's edges are narrower than the bilinear
# one's. *Place*: the middle of an edge that was found is no nearer to the true one than chance would have it, in
# all three: with one position in 16 pixels that is no surprise. *Masks*: the same transposed decoder has the
# highest loss, and the lowest mIoU by more than two points. Do more scenes, more training and more seeds say so, too?
# %% [markdown]
# ## Measure the claims
#
# One seed and a few seconds prove little. `python -m experiments.chapters.upsampling.analysis` trains each
# variant three times, with three seeds, on 400 scenes, and reports on 200 scenes that no training saw: mIoU, boundary IoU, and the
# edges as above. Four of the decoders were also trained on **CamVid**, 266 street photographs from two drives, and
# reported on 101 frames of a third, and two U-Nets on scenes (`python -m experiments.claims upsampling`). What
# follows is read from these records.

# %%
unets = records.of("unet", what="U-Net")
chapter_05 = [record | {"what": "chapter 05"} for record in unets]
evidence = records.Evidence(
    [*records.of("upsampling_edges", "upsampling"), *chapter_05]
)
mean, margin, ahead = (
    partial(method, "scenes")
    for method in (evidence.mean, evidence.margin, evidence.differences)
)
for where in ("scenes", "streets"):
    for what in evidence.names(where):
        assert len(evidence.values(where, what)) >= 3


# %%
labels = {
    "width": "width of the edges found, pixels",
    "calibrated_width": "calibrated width of the edges found, pixels",
    "miou": "mIoU on unseen images, %",
    "boundary_miou": "boundary IoU on unseen images, %",
}
sharpness, scores = list(labels)[:2], list(labels)[2:]


def show(names, fields, of, where="scenes"):
    """Bars; beside a width the % of edges found, and no width below 20 %."""
    for field in fields:
        bars = {what: evidence.values(where, what, field) for what in names}
        if field in sharpness:
            known = {what: mean(what, "found") for what in names}
            bars = {
                f"{w} ({n:.0f} %)": bars[w] for w, n in known.items() if n >= 20
            }
        alt = f"Bars: {labels[field]}, {of}."
        display(plotting.show_bars(bars, labels[field], alt=alt))

# %% [markdown]
# **Are transposed convolutions sharper than bilinear?** Same decoder, same widths, same training. Two things can
# pass for sharpness, and must not. *Choice*: widths are means over the edges that a decoder finds, so that one that
# blurs is judged on its best ones; the share it finds stands beside its name. And *confidence*: a decoder that is
# surer of the same outline draws it steeper. So in the second chart each decoder's logits were first divided by the
# one number, its **temperature**, that fits best on 60 other scenes.
#
# Beside the four ways there are five controls. Two bilinear decoders are wider, with as many weights as the
# transposed one and as the shuffle. *Even start* begins as bilinear interpolation; *small start* with random weights
# as small as those, but not as even. The last is a shuffle without ICNR.

# %% tags=["nbval-ignore-output"]
controls = (
    "nearest",
    "bilinear",
    "bilinear, wider",
    "bilinear, widest",
    "transposed",
    "transposed, small start",
    "transposed, even start",
    "pixel shuffle",
    "shuffle, default start",
)
show(controls, sharpness, "for four ways up and five controls")

# %% [markdown]
# Less is sharper. And are the rims *right*? The boundary IoU counts only those that lie where the true ones do;
# mIoU counts all that is inside them:

# %% tags=["nbval-ignore-output"]
show(controls, scores, "for four ways up and five controls")

# %%
for field in sharpness:
    assert margin("bilinear", "transposed", field) > 0.5
assert min(ahead("transposed", "bilinear", "found")) > 5
low, high = evidence.span("scenes", "transposed", "boundary_miou")
assert high - low > 3
assert margin("transposed, even start", "bilinear", "boundary_miou") > 0.3
assert margin("bilinear", "transposed") > 1
assert min(ahead("transposed, even start", "bilinear")) > 0.2
assert mean("transposed, even start") > mean("transposed, small start") + 3
assert 0 < mean("transposed, small start") - mean("transposed") < 2
for what in ("bilinear, wider", "bilinear, widest"):
    assert abs(mean(what) - mean("bilinear")) < 1
    assert margin("pixel shuffle", what) > 0.2
assert min(ahead("transposed, even start", "bilinear, wider")) > 0
assert margin("pixel shuffle", "shuffle, default start") > 2
assert margin("pixel shuffle", "transposed, even start") > 0.3
assert all(3 < mean(what, "offset") < 4 for what in ups) and 3 < chance < 3.2

# %% [markdown]
# Three questions, three answers.
#
# - **Sharpness**: yes. The transposed convolution's edges are narrower by more than half a pixel in every seed, with
#   and without its confidence, and it finds more of them.
# - **Rims**: with the default start that depends on the seed, by more than 3 points. With the even start the rims
#   are better than with bilinear steps in every seed.
# - **mIoU**: no. With the default start it is lower by more than a point in every seed; with the even start it is
#   higher in every seed, by a little.
#
# So how much of that is the layer, and how much its start? On average, weights as small as those of the even start,
# but not as even, win back less than 2 points; the even start has more than 3 on top of them. It is being even, and
# smooth, that helps. The shuffle, to which ICNR is worth more than 2 points in every seed, has the best mIoU of the
# four. The number of weights explains little of this: the wider bilinear decoders gain less than a point on average.
#
# And the middles of the edges? None of the four ways places them better than chance would: they are off by more than
# 3 pixels on average, as if they had been thrown somewhere within 6. That fits a map with one position in 16 pixels;
# a shift left over from the encoder (see above) would look the same, and was not separated.
#
# On streets:

# %% tags=["nbval-ignore-output"]
street_ways = ("bilinear", "transposed", "transposed, even start", "pixel shuffle")
show(street_ways, scores, "for four decoders on streets", where="streets")

# %%
for what in street_ways[1:]:
    pair = "streets", what, "bilinear"
    assert 0.2 < evidence.margin(*pair, "boundary_miou") < 1
    gaps = evidence.differences(*pair)
    assert abs(sum(gaps) / len(gaps)) < 1.5

# %% [markdown]
# There all three learned ways have the better rims, in every seed, by less than a point; and mIoU differs by
# less than one and a half points, for better or worse.
#
# **Does the checkerboard go away by itself?** After training, every decoder is fed maps that are the same at
# every position. What varies in its logits, it has put there itself; shown in per cent of what the logits
# vary on real scenes.

# %% tags=["nbval-ignore-output"]
painters = ("nearest", "bilinear", "transposed, 3×3", *controls[4:])
plotting.show_bars(
    {what: evidence.values("scenes", what, "grid") for what in painters},
    ylabel="pattern on constant maps, % of the logits' spread",
    alt="Bars: what eight trained decoders paint on constant maps. The two that "
    "resize paint nothing, all others a pattern.",
)

# %%
for what in painters:
    low, high = evidence.span("scenes", what, "grid")
    assert high < 0.1 if what in ("nearest", "bilinear") else low > 0.5
assert mean("transposed", "grid") > mean("transposed, even start", "grid") + 1
assert mean("transposed, even start", "grid") > 0.5 * mean("transposed", "grid")
assert max(painters, key=lambda what: mean(what, "grid")) == "transposed, 3×3"
assert mean("transposed") > mean("transposed, 3×3") + 1
assert mean("pixel shuffle", "grid") < 0.7 * mean("shuffle, default start", "grid")

# %% [markdown]
# It does not. An even start removes the pattern at the start, and training paints one again: for the transposed
# convolution more than half as strong as what the default start ends with. Only resizing cannot paint one, whatever
# it learns. The kernel of 3 paints the strongest pattern on average, and scores more than a point of mIoU lower than
# that of 4.
#
# **Once ×32, or five times ×2?** From `c5`, bilinear; the work is about the same, the weights are not: the single
# step has a quarter of them. Five steps may need longer to learn, so both were also trained for 18 epochs instead
# of 6. For comparison, the four steps from `c4`, 6 epochs:

# %% tags=["nbval-ignore-output"]
climbs = ("once ×32", "five times ×2")
climbs = [what + more for more in ("", ", 18 epochs") for what in climbs]
show(
    [*climbs, "bilinear"],
    scores,
    "for climbs from c5, and for one from c4 (bilinear)",
)

# %%
once, five = "once ×32", "five times ×2"
assert 1 < mean(once, "macs") / mean(five, "macs") < 1.25
assert mean(five, "parameters") > 3.5 * mean(once, "parameters")
for what in (once, five):
    assert margin("bilinear", what) > 5 and mean(what, "found") < 20
assert abs(mean(once) - mean(five)) < 1
last = {
    what: [loss[-1] for loss in evidence.values("scenes", what, "loss")]
    for what in climbs
}
assert min(last[five]) > max(last[once])
longer = [f"{what}, 18 epochs" for what in (five, once)]
assert min(ahead(*longer)) > 1 and min(ahead(*longer, "boundary_miou")) > 0.2
assert min(margin("bilinear", what) for what in longer) > 4

# %% [markdown]
# At the short budget the two are equal within a point on average, although the five steps have the higher
# training loss: they have not learned yet what they could. After 18 epochs they are ahead, by more than a point in
# every seed, with four times the weights. But four steps from `c4` score more than 4 points better than that, after 6:
# in these runs it matters more which map you climb from than how. (No widths here: from `c5`, fewer than 20 % of the
# edges are found.)
#
# **What does the image add?** The same decoder beside the image, and beside zeros in its place; each with one 3×3
# where the two meet, and with two:

# %% tags=["nbval-ignore-output"]
beside_what = (
    "image hidden",
    "image",
    "image hidden, two layers",
    "image, two layers",
)
show(beside_what, [*scores, *sharpness], "beside the image or beside zeros")

# %%
bare = mean("bilinear", "macs")
for what in ("bilinear", "image", "image, two layers"):
    macs = mean(what, "macs")
    print(
        f"{what:17} {macs:,.0f} MACs, {macs / bare:.2f} × those without the image"
    )

# %%
assert mean("image", "macs") > 1.7 * bare
assert mean("image, two layers", "macs") > 2.3 * bare
one = "image", "image hidden"
assert mean(one[0]) < mean(one[1]) + 1
gaps = ahead(*one, "boundary_miou")
assert 0.2 < min(gaps) < max(gaps) < 4
two = "image, two layers", "image hidden, two layers"
assert min(ahead(*two)) > 1 and min(ahead(*two, "boundary_miou")) > 4
assert sorted(ahead(*two))[1] > 6 and sorted(ahead(*two, "boundary_miou"))[1] > 12
assert mean(two[0], "offset") < chance - 1 and mean(one[0], "offset") > chance - 0.3
final = [loss[-1] for loss in evidence.values("scenes", two[0], "loss")]
miou = evidence.values("scenes", two[0])
assert max(final) == final[0] and min(miou) == miou[0]
assert margin("chapter 05", two[0]) > 4
assert max(ahead("image hidden, two layers", "image hidden")) < 0

# %% [markdown]
# One layer costs 1.75 times the work and betters the rims by a little; mIoU gains nothing. Raw pixels say which
# colour is where; to make an outline of that takes more than one layer. With a second 3×3, for 2.3 times the work,
# the rims gain more than 4 points in every seed. In two of the three seeds the decoder has really learned to look:
# more than 12 points at the rims and more than 6 of mIoU, and for the first time in this chapter the middles of
# the edges lie much nearer than by chance. In seed 0 it has not, and its training loss stayed the highest. The depth
# alone, beside zeros, brings none of this. (The U-Net of chapter 05, whose skips hand over what the *encoder* has
# made of the image, scores more than 4 points above the best of these seeds. Chapter 09 asks how image and features
# should meet. And chapter 13
# trained the two layers for 12 epochs on scenes, and there all three seeds learnt to look; on streets their decoder is
# among the last.)
#
# **Three channels, and a ReLU?** The advice of the beginning, taken apart: 16 channels beside the image, or 3; with a
# ReLU before they meet, or without.

# %% tags=["nbval-ignore-output"]
advised = ("image", "image, ReLU", "image, 3 channels", "image, 3 channels, ReLU")
show(advised, scores, "beside the image, by channels and ReLU")
for what in advised:
    if "ReLU" in what:
        shares = evidence.values("scenes", what, "zeroed")
        shares = [f"{share:.0f}" for share in shares]
        print(f"{what:24} zeros after training: {', '.join(shares)} %")

# %%
assert abs(mean("image") - mean("image, ReLU")) < 1
assert 0.5 < mean("image") - mean("image, 3 channels") < 3
assert min(ahead("image, 3 channels", "image, 3 channels, ReLU")) > 1
assert margin("image", "image, 3 channels, ReLU") > 2
low, _ = evidence.span("scenes", "image, ReLU", "zeroed")
assert low > 25
low, high = evidence.span("scenes", "image, 3 channels, ReLU", "zeroed")
assert low < 10 and high > 50

# %% [markdown]
# Neither helps. On 16 channels the ReLU moves the mean score by less than a point, although it zeroes more than a
# quarter of what lies beside the image. Three channels cost half a point and more on average. On three channels the
# ReLU costs more than a point in every seed, and not in step with what it zeroes: that is anything from less than a
# tenth to more than half. Both together, the advice as it is posted, cost more than 2.
#
# **And in a U-Net?** There, at every step, a skip brings the outlines. Chapter 05's decoder resizes, without a layer
# of its own, before it meets the skip. Here each block first enlarges by `BilinearConv` or by `TransposedConv` (with
# the default start):

# %% tags=["nbval-ignore-output"]
unets = ("U-Net, bilinear", "U-Net, transposed", "chapter 05")
show(unets, scores, "for three U-Nets with different steps")

# %%
assert 4 / 3 < mean(unets[1], "parameters") / mean(unets[0], "parameters") < 1.5
assert min(ahead(unets[1], unets[0])) > 0.2
assert min(margin("chapter 05", what) for what in unets[:2]) > 1
assert mean("chapter 05", "parameters") < mean(unets[0], "parameters")
assert min(ahead(unets[1], unets[0], "boundary_miou")) > 1.5

# %% [markdown]
# Of the two, the transposed steps are ahead in every seed, by more than 1.5 points at the rims, unlike in the decoder
# from `c4`. (They have more than a third more weights, without a control.) But chapter 05's own step, a plain
# resize with no weights at all, scores more than a point of mIoU more than either in every seed: neither layer pays
# here. (All three end on the grid of `c1`, so that their last ×2 is a bilinear resize.)
#
# ## Limits
#
# - All but the U-Nets read a single map, so that the way up is all there is. A U-Net ends on the grid of `c1`, and
#   its last factor of 2 is a bilinear resize, whatever its steps are.
# - Only four decoders were trained on streets for this chapter, none of them beside the image (chapter 13 has one), and
#   those streets are one drive in one town by daylight.
# - The ways up have the same widths, not the same number of weights: 9 (resize), 16 (transposed) and 36
#   (shuffle) for each pair of channels. The two wider controls have as many weights, and more work.
# - Learning rate and epochs were set once, for all alike: 300 steps on scenes. Only the climbs from `c5` were
#   also trained longer; a longer training may forgive a bad start.
# - Edges are counted where a row or a column crosses from 8 pixels of background to 8 pixels of a thing. So thin
#   things have fewer, and a slanted rim looks wider than it is, for all decoders alike.
# - A width is that of an edge found, and decoders find different ones. The share beside it says how many, not
#   which.
# - In scenes a thing's colour says nothing about its class. Where it does, as with sky or grass, the image may
#   add more.
#
# ## Exercises


# %% [markdown]
# **Exercise 1.** An encoder of stride-2 convolutions (kernel 3, padding 1) has halved a side of `side` pixels
# `steps` times. Return the `output_padding` of every transposed step on the way back, coarsest first.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_paddings(answer):
    for side, steps in [(128, 5), (180, 5), (225, 4), (33, 5)]:
        extras = answer(side, steps)
        if extras is None:
            return print("Nothing returned yet: return a list of 0 and 1.")
        if not isinstance(extras, list | tuple):
            return print(f"That is of type {type(extras).__name__}: return a list.")
        if not all(isinstance(extra, int) for extra in extras):
            return print("Return a list of plain numbers, 0 and 1.")
        if len(extras) != steps or not all(extra in (0, 1) for extra in extras):
            return print(f"Expected {steps} values, each 0 or 1, got {extras}.")
        sides = [side]
        for _ in range(steps):
            sides.append((sides[-1] + 1) // 2)
        back = [sides[-1]]
        for extra in extras:
            back.append(2 * back[-1] - 1 + extra)
        if back != sides[::-1]:
            turned = extras[::-1] == [1 - s % 2 for s in sides[-2::-1]]
            hint = " Your list is the finest first." if turned else ""
            return print(f"Down: {sides}, up again: {back}.{hint}")
    print("Right: 1 wherever the side was even on the way down.")


# %%
def paddings(side, steps):
    """Return the output_padding of every step up, coarsest first."""


check_paddings(paddings)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def paddings_solution(side, steps):
    found = []
    for _ in range(steps):
        found.append(1 - side % 2)
        side = (side + 1) // 2
    return found[::-1]


check_paddings(paddings_solution)

# %% [markdown]
# **Exercise 2.** A 1×1 convolution followed by a pixel shuffle is a transposed convolution in disguise. Take
# the disguise off: return the `nn.ConvTranspose2d` with kernel 2 and stride 2 that computes the same.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
@torch.no_grad()
def check_disguise(answer):
    torch.manual_seed(5)
    conv, x = nn.Conv2d(3, 5 * 4, 1, bias=False), torch.randn(2, 3, 4, 6)
    wanted, turned = (F.pixel_shuffle(conv(y), 2) for y in (x, x.mT))
    try:
        found = answer(conv)
    except (RuntimeError, TypeError) as error:
        return print(f"It raises: {str(error).splitlines()[0]}")
    if found is None:
        return print("Nothing returned yet: return an nn.ConvTranspose2d.")
    if not isinstance(found, nn.ConvTranspose2d):
        return print(f"That is of type {type(found).__name__}.")
    if found.weight.shape != (3, 5, 2, 2):
        return print(
            f"The weight is {list(found.weight.shape)}, not [3, 5, 2, 2]: in, out, "
            "row, column, with a quarter of the convolution's 20 channels out."
        )
    result = found(x)
    if result.shape != wanted.shape:
        return print(
            f"{list(result.shape)} came out, not {list(wanted.shape)}: stride 2, "
            "no padding."
        )
    if torch.allclose(result, wanted, atol=1e-5):
        return print("Right: the same sixty weights, sorted otherwise.")
    if torch.allclose(result.mT, turned, atol=1e-5):
        return print("Rows and columns of the little squares are swapped.")
    print(
        "The numbers differ. Kernel 4c + 2i + j of the convolution belongs to "
        "output channel c, row i, column j; a transposed convolution's weight is "
        "[in, out, row, column]. Is there a bias left?"
    )


# %%
def undisguise(conv):
    """Return the transposed convolution for a 1×1 `conv` and PixelShuffle(2)."""


check_disguise(undisguise)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def undisguise_solution(conv):
    out, into = conv.out_channels // 4, conv.in_channels
    up = nn.ConvTranspose2d(into, out, 2, stride=2, bias=False)
    weight = conv.weight.view(out, 2, 2, into).permute(3, 0, 1, 2)
    up.load_state_dict({"weight": weight})
    return up


check_disguise(undisguise_solution)

# %% [markdown]
# **Exercise 3.** From the records on scenes: which of the four ways up has the narrowest edges on average, which the
# best boundary IoU, and which the best mIoU? Return three names. (Where one is ahead with one seed and another with
# another, either is right.)


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def behind(what, key, sign):
    """How far a way up is behind the best; 0 if some seed says otherwise."""
    best = max(ups, key=lambda name: sign * mean(name, key))
    gaps = [sign * gap for gap in ahead(best, what, key)]
    return sum(gaps) / len(gaps) if min(gaps) > 0 else 0


def check_three(answer):
    chosen = answer()
    if chosen is None:
        return print("Nothing returned yet: return three names.")
    if not isinstance(chosen, list | tuple) or len(chosen) != 3:
        return print(f"Expected three names, got {chosen!r}.")
    if not all(name in tuple(ups) for name in chosen):
        return print(f"Expected three of {', '.join(ups)}; got {chosen!r}.")
    wanted = {"width": -1, "boundary_miou": 1, "miou": 1}
    for name, (key, sign) in zip(chosen, wanted.items(), strict=True):
        if gap := behind(name, key, sign):
            hint = " A small width is sharp." if key == "width" else ""
            return print(
                f"{name}, {key} {mean(name, key):.1f}: another one is better by "
                f"{gap:.1f}, with every seed.{hint}"
            )
    print(
        "Right: narrowest {}, best boundary IoU {}, best mIoU {}.".format(*chosen)
    )


# %%
def three_names():
    """Return three names: narrowest edges, best boundary IoU, best mIoU."""


check_three(three_names)


# %% tags=["hide-cell", "nbval-ignore-output"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def three_names_solution():
    return (
        min(ups, key=lambda what: mean(what, "width")),
        max(ups, key=lambda what: mean(what, "boundary_miou")),
        max(ups, key=lambda what: mean(what, "miou")),
    )


check_three(three_names_solution)

# %% [markdown]
# ## Recap
#
# - Count the steps: stride 16 needs four doublings. Enlarge, then cut to the size.
# - Neither 3 channels nor a ReLU is needed before you concatenate with the image.
# - A kernel that the stride does not divide paints checkerboards; one that it divides may still, and may learn
#   to again after an even start. A resize-convolution cannot.
# - Leave `align_corners` alone, everywhere.
# - Start a transposed convolution as bilinear interpolation, and a pixel shuffle by ICNR. Both are one line.
# - How sharp edges are, how many rims are right, and mIoU are three questions. Report all three, and beside a
#   width the share of edges found.
#
# | shape contract | |
# |---|---|
# | `NearestConv` and its kin | `[B, C, h, w]` → `[B, out_channels, factor·h, factor·w]` |
# | `UpsamplingDecoder` | a `Pyramid` → `[B, out_channels, 2⌈H/2⌉, 2⌈W/2⌉]` |
# | `BesideImageDecoder` | a `Pyramid` and its image `[B, 3, H, W]` → `[B, out_channels, H, W]` |
# | in a `Segmenter` | → `[B, out_channels, H, W]`, any H, W ≥ 32, a batch of one too |
#
# In your own project:
#
# ```python
# from torch import nn
#
# from helpers.bridges.upsampling import BesideImageDecoder, EvenTransposedConv
# from helpers.encoder import ResNet18Encoder, Segmenter
#
# encoder = ResNet18Encoder()
# decoder = BesideImageDecoder(encoder.out_channels, out_channels=7)
# second = nn.Conv2d(16, 16, 3, padding=1, bias=False)  # one 3×3 beside the image is not enough
# decoder.mix = nn.Sequential(decoder.mix, nn.BatchNorm2d(16), nn.ReLU(), second)
# model = Segmenter(encoder, decoder)
#
# # or in a decoder of your own, if it has no skips: x [B, 48, h, w]
# up = EvenTransposedConv(in_channels=48, out_channels=32, factor=2)
# x = up(x)  # [B, 32, 2h, 2w]
# ```
