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
# # 07 · Any input size, and more context?
#
# Your head was built for one image size and breaks at the next. Or nothing breaks, and the network calls a
# piece of a large square a triangle, because the piece is all that it saw. Both problems are treated with
# the same tool: averages over a few coarse grids. As a vector they have one length for every image. As a
# map they tell each position what else there is. How far each of the two carries is measured below.

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
# - an undefined name, a linear layer of the wrong width, and windows that leave the last column out;
# - spatial pyramid pooling: one length for fifty sizes, by mean, by maximum, by both;
# - that vector set beside the image, and what it cannot say there;
# - context for a map: PSPNet's grids and DeepLab's dilated convolutions;
# - two failures without an error: a branch that dies in a batch of one, and a 3×3 that is a 1×1;
# - how far one position sees, before and after, measured by gradient;
# - why adaptive pooling stops an ONNX export, and two matrix products that do not;
# - measured with three seeds: who gains from context, and what another image size costs.

# %%
import subprocess
import sys
import textwrap
from functools import partial

import skimage.data
import torch
import torch.nn.functional as F
from torch import nn

from helpers import camvid, plotting, records, scenes
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.errors import explain, explaining
from helpers.inspection import count_macs, count_parameters, pyramid_levels, shapes
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import budget, evaluate, fit, predict

# %% [markdown]
# ## The problem as a picture
#
# A photograph in two formats, and beside each its mean colours over 1 × 1, 2 × 2 and 4 × 4 cells. Whatever
# the format, that makes 1 + 4 + 16 = 21 cells. No network yet:

# %%
cup = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1)[None].float() / 255
pictures, titles = [], []
for photo in (cup, cup[..., 100:340, :]):
    cells = [F.adaptive_avg_pool2d(photo, grid) for grid in (1, 2, 4)]
    pictures += [photo, *(F.interpolate(each, photo.shape[-2:]) for each in cells)]
    titles += [f"{photo.shape[-2]} × {photo.shape[-1]}", "1 cell", "4 cells", "16"]
plotting.show_images(
    [picture[0] for picture in pictures],
    titles,
    alt="A coffee cup in two formats, each reduced to 1, 4 and 16 coloured cells.",
)

# %% [markdown]
# The cells stretch with the picture. That is the whole idea of a **spatial pyramid**: a fixed number of
# cells, not a fixed size of cells. The single cell knows what kind of picture it is, the sixteen know
# roughly what is where. (Photograph: Rachel Michetti, from scikit-image.)
#
# ## The shapes
#
# A linear layer has its width built in. This is how many numbers it would be handed, if `c5` were
# flattened:

# %%
for height, width in [(224, 224), (256, 256), (180, 240), (128, 128)]:
    c5 = pyramid_levels(height, width)[-1]
    cells = f"{c5.height} × {c5.width}"
    print(f"{height} × {width}: {cells} positions, {512 * c5.height * c5.width:,}")

# %% [markdown]
# Four images, four widths. Chapter 02 pooled to one cell, or to one grid. Here, several grids at once.
#
# ## The obvious attempt, and what it does wrong
#
# To get 4 × 4 cells, pool with windows a quarter as long as the map. So the window depends on the size of the
# input, and this is how it is often posted, rebuilt in a few lines:


# %%
class FirstAttempt(nn.Module):
    """Means over windows, each a share of the input's size; then a linear layer."""

    def __init__(self, grids=(1, 2, 4)):
        super().__init__()
        self.grids = grids
        self.linear = nn.Linear(512, 256)

    def forward(self, x):
        cells = []
        for grid in self.grids:
            window = input_size // grid  # noqa: F821
            cells.append(F.avg_pool2d(x, window).flatten(1))
        return self.linear(torch.cat(cells, dim=1))


torch.manual_seed(0)
encoder = ResNet18Encoder()
images, masks = scenes.batch(range(5_000, 5_016))
with torch.no_grad():
    pyramid = encoder(normalize(images))
print("c5:", list(pyramid.c5.shape))

# %% tags=["raises-exception"]
FirstAttempt()(pyramid.c5)

# %% [markdown]
# Nobody has said what `input_size` is. The constructor cannot know it and `forward` was never told, so it
# has to come from the map itself. Put that in, and look at the next line of the same code:


# %%
def by_windows(x, grids=(1, 2, 4)):
    """Means over windows of a grid-th of the map's side, one after the other."""
    side = x.shape[-1]
    return torch.cat([F.avg_pool2d(x, side // g).flatten(1) for g in grids], dim=1)


# %% tags=["raises-exception", "nbval-ignore-output"]
with explaining():
    FirstAttempt().linear(by_windows(pyramid.c5))

# %% [markdown]
# The layer was sized by the channels. But each of 21 cells has 512 of them. So write 21 · 512, and
# try some other images:

# %%
lengths = {}
for side in (256, 288, 224, 320, 192):
    c5 = torch.rand(1, 512, -(-side // 32), -(-side // 32))
    lengths[side] = by_windows(c5).shape[1]
    print(
        f"{side} px: c5 {c5.shape[-1]} × {c5.shape[-1]}, length {lengths[side]:,}"
    )

# %% [markdown]
# At 224 pixels `c5` is 7 wide. A quarter, rounded down, is a window of 1, and that gives not 4 × 4 cells
# but 7 × 7. At 288 pixels the length happens to be right. Look where the cells are, though: which positions
# of the 9 × 9 map change the sixteen cells of the finest grid?

# %%
c5 = torch.rand(1, 1, 9, 9, requires_grad=True)
(seen,) = torch.autograd.grad(F.avg_pool2d(c5, 9 // 4).sum(), c5)
print("columns that are read:", int((seen[0, 0].sum(dim=0) > 0).sum()), "of 9")
assert lengths[256] == lengths[288] == 21 * 512 and lengths[224] == 54 * 512
assert not seen[..., -1].any() and not seen[..., -1, :].any()

# %% [markdown]
# Four windows of two end at eight. The last row and column are left out, without an error. You could search a
# window and a stride for every size. It is simpler to let the *cells* adapt.
#
# ## The technique
#
# ### A grid that adapts
#
# Cell *i* of *n* on a side of *s* positions begins at ⌊*i·s/n*⌋ and ends before ⌈(*i*+1)·*s/n*⌉. Begin
# rounded down, end rounded up: every position is in a cell, no cell is empty, and where *n* does not
# divide *s*, neighbours may share a position. The mean over a cell is a weighted sum, so a side's weights
# are a matrix:

# %% tags=["export"]
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.encoder import Pyramid, check_map, check_pyramid


# %% tags=["export"]
def bin_weights(size: int, grid: int, like: Tensor) -> Tensor:
    """Return how adaptive average pooling weighs `size` positions for `grid` cells.

    `[grid, size]`, each row sums to 1; dtype and device are those of `like`. Cell i
    takes the positions from ⌊i·size/grid⌋ up to ⌈(i+1)·size/grid⌉, the last one
    excluded: neighbours may share a position, and a small map repeats its own.
    """
    cells = torch.arange(grid, device=like.device)[:, None]
    places = torch.arange(size, device=like.device)
    first = cells * size // grid
    beyond = ((cells + 1) * size + grid - 1) // grid
    inside = ((places >= first) & (places < beyond)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


# %%
cells = bin_weights(7, 4, like=torch.ones(1))
plotting.show_matrix(
    cells,
    rows=[f"cell {i}" for i in range(4)],
    columns=[str(i) for i in range(7)],
    label="position on a side of 7",
    digits=2,
    alt="Four cells of two or three positions; neighbours share one of them.",
)

# %%
assert ((cells > 0).sum(dim=0) == torch.tensor([1, 2, 1, 2, 1, 2, 1])).all()

# %% [markdown]
# Seven positions make two cells of two and two of three, and positions 1, 3 and 5 are in two cells. Rows are
# averaged by one such matrix and columns by another, *A x Bᵀ*. That is all of adaptive average pooling:


# %% tags=["export"]
def average_grid(x: Tensor, grid: int) -> Tensor:
    """Return the means over cells of `[B, C, h, w]`, `[B, C, grid, grid]`.

    The same as `F.adaptive_avg_pool2d(x, grid)` up to rounding, for any h and w, as
    two matrix products: they export to formats that have no adaptive pooling.
    """
    height, width = x.shape[-2:]
    return bin_weights(height, grid, x) @ x @ bin_weights(width, grid, x).T


# %%
torch.manual_seed(0)
sizes = [tuple(torch.randint(1, 20, (2,)).tolist()) for _ in range(50)]
for height, width in sizes:
    x = torch.rand(1, 3, height, width)
    for grid in (1, 2, 3, 4, 6):
        expected = F.adaptive_avg_pool2d(x, grid)
        assert torch.allclose(average_grid(x, grid), expected, atol=1e-5)
print(len(sizes), "maps, five grids: equal to F.adaptive_avg_pool2d")

# %% [markdown]
# Why not call PyTorch's? You may. The matrices are here because they show what happens, and because they
# can be exported; that is a section of its own below.
#
# ### Any map as one vector
#
# **Spatial pyramid pooling** (SPP) flattens the cells of several grids and puts them one after the
# other. Now the width is known when the layer is built:


# %% tags=["export"]
class SpatialPyramid(nn.Module):
    """Spatial pyramid pooling (SPP): a map of any size as a vector of one length.

    `forward(x)` takes `[B, in_channels, h, w]`, any h and w, and returns
    `[B, out_features]`: the means over the cells of each grid, one grid after the
    other, out_features = in_channels · (sum of grid²). Raises `ValueError` for a
    grid below 1 and for other channels or ranks, `TypeError` for integers.

    Source: He et al., Spatial Pyramid Pooling, ECCV 2014.
    """

    pool = staticmethod(average_grid)

    def __init__(self, in_channels: int, grids: Sequence[int] = (1, 2, 4)):
        super().__init__()
        if min(grids, default=0) < 1:
            raise ValueError(f"Expected grids of 1 × 1 or more, got {list(grids)}.")
        self.in_channels, self.grids = in_channels, tuple(grids)
        self.out_features = in_channels * sum(grid**2 for grid in self.grids)

    def forward(self, x: Tensor) -> Tensor:
        check_map("the map", x, self.in_channels)
        return torch.cat([self.pool(x, g).flatten(1) for g in self.grids], dim=1)


# %% [markdown]
# The mean answers *how much of it*; the maximum answers *whether it is there at all*, however small.
# Both are used, and both together:


# %% tags=["export"]
def max_grid(x: Tensor, grid: int) -> Tensor:
    """Return the maxima over grid × grid cells of `[B, C, h, w]`."""
    return F.adaptive_max_pool2d(x, grid)


class MaxSpatialPyramid(SpatialPyramid):
    """As `SpatialPyramid`, with the maximum of each cell in place of its mean.

    Takes, returns and raises what `SpatialPyramid` does.
    """

    pool = staticmethod(max_grid)


# %% tags=["export"]
class BothSpatialPyramid(nn.Module):
    """The means of all cells, then their maxima: twice as long as either.

    Takes and raises what `SpatialPyramid` does.
    """

    def __init__(self, in_channels: int, grids: Sequence[int] = (1, 2, 4)):
        super().__init__()
        self.mean = SpatialPyramid(in_channels, grids)
        self.max = MaxSpatialPyramid(in_channels, grids)
        self.out_features = self.mean.out_features + self.max.out_features

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mean(x), self.max(x)], dim=1)


# %%
for vector in (
    SpatialPyramid(512),
    MaxSpatialPyramid(512),
    BothSpatialPyramid(512),
):
    found = set()
    for height, width in sizes:
        found.add(shapes(vector, torch.rand(2, 512, height, width)))
    print(
        f"{type(vector).__name__:18}", *found, f"promised {vector.out_features:,}"
    )
    assert found == {(2, vector.out_features)}

# %% [markdown]
# Fifty sizes, up to 19 positions on a side, which is an image of 608 pixels: one length. A map that is
# smaller than the grid repeats its positions. The shape is settled. Whether the *numbers* still mean the
# same at another size is a second question, and it is measured below.
#
# ### The vector beside the image
#
# You may have read on: reduce the vector by a linear layer, "upsample" it to the image's size, concatenate
# the two. Upsampling a single position only repeats it. `expand` says so, and copies nothing:

# %%
vector = SpatialPyramid(512)(pyramid.c5)[:, :16]
spread = vector[:, :, None, None].expand(-1, -1, 128, 128)
upsampled = F.interpolate(vector[:, :, None, None], (128, 128), mode="bilinear")
assert torch.allclose(spread, upsampled) and spread.data_ptr() == vector.data_ptr()
print(list(vector.shape), "→", list(spread.shape))


# %% tags=["export"]
class BesideImage(nn.Module):
    """c5 as an SPP vector, spread over all pixels and set beside the image.

    `forward(pyramid, image)` takes the encoder's maps (only c5 is read) and the
    normalised images `[B, 3, H, W]`, and returns `[B, out_channels, H, W]`. `width`
    is the length of the vector beside each pixel. Raises `ValueError` for other
    channels, ranks or batches, `TypeError` for integers.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, width: int = 16
    ):
        super().__init__()
        self.pyramid = SpatialPyramid(in_channels[-1])
        self.linear = nn.Linear(self.pyramid.out_features, width)
        self.conv = nn.Conv2d(width + 3, 16, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Conv2d(16, out_channels, 1)

    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
        check_map("the image", image, 3)
        vector = self.linear(self.pyramid(pyramid.c5))
        if vector.shape[0] != image.shape[0]:
            raise ValueError(
                f"Expected maps and images of one batch, got {vector.shape[0]} and "
                f"{image.shape[0]}. Pass the maps of these images."
            )
        everywhere = vector[:, :, None, None].expand(-1, -1, *image.shape[-2:])
        x = torch.cat([image, everywhere], dim=1)
        return self.head(self.relu(self.conv(x)))


# %%
classes = len(scenes.CLASSES)
beside = BesideImage(encoder.out_channels, classes)
for height, width in [(128, 128), (180, 240), (33, 97)]:
    x = normalize(torch.rand(2, 3, height, width))
    print(f"{height} × {width} →", list(shapes(beside, encoder(x), x)))

# %% [markdown]
# It runs at any size, and every pixel gets the *same* sixteen numbers. They may say that there is a star at
# the upper left. But no pixel can tell whether it lies there itself: beside the numbers it has only its own
# colour and that of its neighbours. For a classifier the vector is enough. A mask needs its other form:
#
# ### Context for a map
#
# Keep the map, and lay beside each position the means of the cells about it: the whole picture, its
# quarter, its ninth, its 36th, blended where cells meet. For that, each grid goes through a 1×1 convolution to
# fewer channels, a normalisation, a ReLU, and back to the map's size. Written as usual, with BatchNorm, and
# trained on one image:

# %% tags=["raises-exception"]
branch = nn.Sequential(
    nn.AdaptiveAvgPool2d(1),
    nn.Conv2d(512, 16, kernel_size=1, bias=False),
    nn.BatchNorm2d(16),
)
with explaining():
    branch(pyramid.c5[:1])

# %% [markdown]
# After the pool each channel has one value. BatchNorm in training subtracts the mean over the batch and
# divides by the deviation; a single value has none. A last batch of one image is enough to stop an
# epoch here. Now a cure that suggests itself: enlarge first, then there are sixteen values.

# %%
silenced = nn.Sequential(*branch[:2], nn.Upsample(size=(4, 4)), branch[2])
outputs = torch.cat([silenced(pyramid.c5[i : i + 1]) for i in range(16)])
print("largest output for sixteen images:", f"{outputs.abs().max():.0f}")
assert outputs.abs().max() < 0.01 < branch[1](branch[0](pyramid.c5)).abs().max()

# %% [markdown]
# No error, and nothing else either: sixteen *equal* values minus their mean are zero, whatever the image
# shows. The branch is dead as long as batches hold one image, and nobody tells you. What
# helps is a normalisation that looks at one image at a time and at several channels: **GroupNorm**, here with
# one group. (Leaving the norm out helps, too.)


# %% tags=["export"]
def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int = 1, rate: int = 1
) -> nn.Sequential:
    """Return a convolution, BatchNorm and ReLU that keep the map's size.

    `[B, in_channels, h, w]` becomes `[B, out_channels, h, w]`; `kernel` is odd,
    `rate` is the distance of its taps (dilation).
    """
    padding = rate * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            padding=padding,
            dilation=rate,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


# %% tags=["export"]
class PooledContext(nn.Module):
    """The means over grid × grid cells, through a 1×1, spread over the map again.

    `forward(x)` takes `[B, in_channels, h, w]`, any h and w, and returns
    `[B, out_channels, h, w]`, no value negative. GroupNorm looks at one image at a
    time. For a batch of one that is not enough: put no BatchNorm right behind it,
    which would subtract what is the same everywhere. Raises `ValueError` below 2
    output channels (GroupNorm needs two values), for a grid below 1 and for other
    channels or ranks, `TypeError` for integers.
    """

    def __init__(self, in_channels: int, out_channels: int, grid: int):
        super().__init__()
        if out_channels < 2 or grid < 1:
            raise ValueError(
                "Expected at least 2 output channels and a grid of 1 or more, got "
                f"{out_channels} and {grid}."
            )
        self.in_channels, self.grid = in_channels, grid
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.GroupNorm(1, out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        check_map("the map", x, self.in_channels)
        cells = self.relu(self.norm(self.conv(average_grid(x, self.grid))))
        return F.interpolate(cells, size=x.shape[-2:], mode="bilinear")


# %%
torch.manual_seed(0)
whole = PooledContext(512, 16, grid=1).train()
next_layer = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
outputs = [whole(pyramid.c5[i : i + 1]) for i in range(16)]
silent = torch.cat([next_layer(each) for each in outputs])
print("a batch of one, in training:", list(outputs[0].shape))
print("largest output behind another BatchNorm:", f"{silent.abs().max():.0f}")
assert not torch.allclose(outputs[0], outputs[1], atol=0.1)
assert silent.abs().max() < 0.01

# %% [markdown]
# Two images, two outputs, one at a time. The last line is the trap behind the trap. The mean of the whole
# map is the same at every position, so the *next* BatchNorm subtracts it just as well, if nothing but a
# convolution lies between. It has to pass a ReLU first, mixed with what varies. PSPNet's **pyramid pooling
# module** (PPM) is four of these branches beside the map itself; here they are mixed by a 1×1 and a
# ReLU, without BatchNorm. `NoContext` is the control, the same without the grids:


# %% tags=["export"]
class NoContext(nn.Module):
    """The control: a 1×1 convolution and ReLU; no position sees another.

    `forward(x)` takes `[B, in_channels, h, w]` and returns
    `[B, out_channels, h, w]`, no value negative. Raises `ValueError` for other
    channels or ranks, `TypeError` for integers.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.mix = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        check_map("the map", x, self.in_channels)
        return self.mix(x)


# %% tags=["export"]
class PyramidPooling(nn.Module):
    """PSPNet's context (PPM): the map beside its means over ever finer grids.

    Takes, returns and raises what `NoContext` does, and `ValueError` for no grids
    or fewer output channels than twice their number. No BatchNorm comes behind the
    means, so that a batch of one trains the coarsest grid, too.

    Source: Zhao et al., Pyramid Scene Parsing Network, CVPR 2017.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grids: Sequence[int] = (1, 2, 3, 6),
    ):
        super().__init__()
        if not grids:
            raise ValueError("Expected at least one grid, got none. Use NoContext.")
        self.in_channels = in_channels
        width = out_channels // len(grids)
        self.grids = nn.ModuleList(
            PooledContext(in_channels, width, grid) for grid in grids
        )
        both = in_channels + len(grids) * width
        self.mix = nn.Sequential(nn.Conv2d(both, out_channels, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        check_map("the map", x, self.in_channels)
        return self.mix(torch.cat([x, *(grid(x) for grid in self.grids)], dim=1))


# %% [markdown]
# DeepLab looks around without pooling. A 3×3 convolution whose taps stand *r* positions apart
# (**dilation**, its *rate*) spans 2*r* + 1 positions with nine weights. Several rates side by side, a
# 1×1 and the mean of the whole map make **ASPP**, atrous spatial pyramid pooling:


# %% tags=["export"]
class ASPP(nn.Module):
    """DeepLab's context: 3×3 convolutions of several rates, a 1×1, and the mean.

    Takes and returns what `NoContext` does, and raises what that and
    `PooledContext` raise; in training, `ValueError` too for one image whose map is
    a single position: BatchNorm has no statistics of one value. `rates` are 1 or
    more and should stay below the map's sides: at a rate as large as the map, only
    the middle tap is left.

    Source: Chen et al., Rethinking Atrous Convolution, arXiv 1706.05587, 2017.
    """

    def __init__(
        self, in_channels: int, out_channels: int, rates: Sequence[int] = (1, 2, 3)
    ):
        super().__init__()
        self.in_channels = in_channels
        self.point = conv_bn_relu(in_channels, out_channels)
        self.dilated = nn.ModuleList(
            conv_bn_relu(in_channels, out_channels, kernel=3, rate=rate)
            for rate in rates
        )
        self.whole = PooledContext(in_channels, out_channels, grid=1)
        all_of_them = (len(rates) + 2) * out_channels
        self.mix = nn.Sequential(nn.Conv2d(all_of_them, out_channels, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        check_map("the map", x, self.in_channels)
        parts = [self.point(x), *(conv(x) for conv in self.dilated), self.whole(x)]
        return self.mix(torch.cat(parts, dim=1))


# %%
c3 = pyramid.c3
contexts = {"no context": NoContext, "PPM": PyramidPooling, "ASPP": ASPP}
for name, context in contexts.items():
    module = context(128, 64)
    macs = f"{count_macs(module, c3[:1]):,} MACs"
    parameters = f"{count_parameters(module):,} parameters"
    print(f"{name:10} {list(shapes(module, c3))}, {parameters}, {macs}")

# %% [markdown]
# > **Rates belong to a map.** DeepLab's published rates are 6, 12 and 18, for maps 33 positions wide and
# > more. A `c5` of a 128-pixel image is 4 wide. There, eight of nine taps always lie in the padding:

# %%
dilated = nn.Conv2d(512, 64, 3, padding=6, dilation=6, bias=False)
middle = dilated.weight[:, :, 1:2, 1:2]
x = pyramid.c5
assert torch.allclose(dilated(x), F.conv2d(x, middle), atol=1e-5)
print(f"{count_parameters(dilated):,} weights, {middle.numel():,} in use")


# %%
def taps_inside(side, rate):
    """Share of the nine taps that lie on the map, averaged over its positions."""
    along = 1 + 2 * max(0, side - rate) / side
    return 100 * (along / 3) ** 2


rates = range(1, 19)
plotting.show_curves(
    {
        f"map {side} wide": [taps_inside(side, rate) for rate in rates]
        for side in (4, 8, 16, 33)
    },
    xlabel="rate",
    ylabel="taps on the map, %",
    x=rates,
    alt="The smaller the map, the sooner the taps fall off it as the rate grows.",
)

# %% [markdown]
# At a rate as large as the map, a 3×3 is a 1×1 that carries eight idle weights. No error says so. `ASPP`
# above takes 1, 2 and 3 unless you tell it otherwise; for the 16 × 16 positions of `c3` we will tell it 2, 4
# and 8.
#
# ### A decoder to try them in
#
# Context on one map, enlarged to `c2`'s grid, joined there with `c2` for the outlines. The map is
# exchangeable, too, and you will see why:


# %% tags=["export"]
class ContextDecoder(nn.Module):
    """Context on one map, enlarged to c2's grid, joined there with c2.

    `forward(pyramid)` takes the encoder's five maps, from images of any H, W ≥ 32,
    and returns `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]`; it reads c2 and `c<level>`.
    `context` makes a module `(in_channels, out_channels) → map`: `NoContext`,
    `PyramidPooling`, `ASPP` or your own. Raises `ValueError` for a level other than
    3, 4, 5 and for maps with other channels, `TypeError` for integers, and what the
    context raises.

    Source: Chen et al., DeepLabv3+, ECCV 2018.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        context: Callable[[int, int], nn.Module] = PyramidPooling,
        level: int = 5,
        width: int = 64,
    ):
        super().__init__()
        if level not in (3, 4, 5):
            raise ValueError(f"Expected level 3, 4 or 5, got {level}.")
        self.in_channels, self.level = tuple(in_channels), level
        self.context = context(in_channels[level - 1], width)
        self.detail = nn.Conv2d(in_channels[1], width // 2, 1, bias=False)
        self.join = conv_bn_relu(width + width // 2, width, kernel=3)
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        x = self.context(pyramid[self.level - 1])
        x = F.interpolate(x, size=pyramid.c2.shape[-2:], mode="bilinear")
        x = torch.cat([x, self.detail(pyramid.c2)], dim=1)
        return self.head(self.join(x))


# %%
model = Segmenter(encoder, ContextDecoder(encoder.out_channels, classes))
for height, width in [(128, 128), (180, 240), (33, 97)]:
    logits = model(normalize(torch.rand(2, 3, height, width)))
    print(f"{height} × {width} → {list(logits.shape)}")
    assert logits.shape == (2, classes, height, width)

# %% [markdown]
# ## Train it
#
# Three times the same decoder, on `c3`, whose positions see 99 pixels of the image at most (chapter 01): without
# context, with the four grids, and with dilated convolutions.

# %%
epochs = budget(short=6, full=40)
train, unseen = scenes.Scenes(128), scenes.Scenes(40, first=5_000)
train = [train[i] for i in range(len(train))]  # draw each scene once
loss = SegmentationLoss(class_weights=class_weights((m for _, m in train), classes))


def train_with(context):
    """A trained `Segmenter` with this context on c3, and its history."""
    torch.manual_seed(0)
    decoder = ContextDecoder(encoder.out_channels, classes, context, level=3)
    model = Segmenter(encoder, decoder)
    history = fit(model, train, epochs=epochs, lr=4e-3, loss=loss, flip=False)
    return model, history


contexts["ASPP"] = partial(ASPP, rates=(2, 4, 8))
trained = {name: train_with(context) for name, context in contexts.items()}
models = {name: model for name, (model, _) in trained.items()}

# %% tags=["nbval-ignore-output"]
plotting.show_histories(
    {name: history for name, (_, history) in trained.items()},
    alt="Loss and mIoU over the epochs, without context, with PPM and with ASPP.",
)

# %% tags=["nbval-ignore-output"]
chosen = [1, 4, 8, 13]
plotting.show_masks(
    {
        "mask": masks[chosen],
        **{name: predict(model, images[chosen]) for name, model in models.items()},
    },
    alt="Masks of four scenes, and what the three decoders predict.",
)


# %% tags=["nbval-ignore-output"]
def torn(model):
    """% of neighbours on one thing, both seen as things, of different classes."""
    guess = predict(model, images)
    one, other = guess[..., 1:], guess[..., :-1]
    inside = (masks[..., 1:] == masks[..., :-1]) & (masks[..., 1:] > 0)
    return 100 * float(
        (one != other)[inside & (one > 0) & (other > 0)].float().mean()
    )


scored = {name: evaluate(model, unseen) for name, model in models.items()}
for name, score in scored.items():
    print(f"{name:10} mIoU {score.miou:.1f} %, torn {torn(models[name]):.1f} %")

# %%
for _, history in trained.values():
    assert history.loss[-1] < 0.6 * history.loss[0]
assert all(score.miou > 1.3 * 100 / classes for score in scored.values())

# %% [markdown]
# Large things may fall apart into patches of several classes, as in the third scene. *Torn* counts that, for
# things of all sizes: neighbouring pixels on one thing, both seen as things, but as different ones. One seed and a
# few epochs rank nothing; three seeds come below.
#
# ## Look inside: how far one position sees
#
# Chapter 01 measured by gradient which pixels a position reacts to. The same for `c3` with a layer on top:
# nothing but a 1×1, one 3×3 at four rates, and both context modules. They are untrained. How far a layer
# *can* see does not depend on its weights.


# %%
astronaut = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None]
astronaut = F.interpolate(astronaut.float() / 255, size=(256, 256), mode="area")
x = normalize(astronaut).requires_grad_()
c3 = ResNet18Encoder()(x).c3
torch.manual_seed(0)
looks = {
    "c3 alone": NoContext(128, 16),
    **{f"3×3, rate {r}": conv_bn_relu(128, 16, 3, r) for r in (1, 2, 4, 8)},
    "ASPP": ASPP(128, 16, rates=(2, 4, 8)),
    "PPM": PyramidPooling(128, 16),
}


def sight(look):
    """How strongly the middle of the map reacts to each pixel, [H, W]."""
    map_ = look.eval()(c3)
    middle = map_[0, :, map_.shape[2] // 2, map_.shape[3] // 2]
    (gradient,) = torch.autograd.grad(middle.sum(), x, retain_graph=True)
    return gradient[0].abs().sum(dim=0)


sights = {name: sight(look) for name, look in looks.items()}

# %%
windows = {}
for name, seen in sights.items():
    rows = torch.nonzero(seen.sum(dim=1)).flatten()
    windows[name] = int(rows.max() - rows.min() + 1)
    print(f"{name:12} {windows[name]} pixels")
for rate in (1, 2, 4, 8):
    assert windows[f"3×3, rate {rate}"] == windows["c3 alone"] + 2 * rate * 8
assert windows["c3 alone"] == 99 and windows["ASPP"] == windows["PPM"] == 256

# %% [markdown]
# A rate *r* widens the window by 2*r* steps of the map, and a step of `c3` is 8 pixels. The two modules see
# the whole photograph, because both hold a mean over the map. Pull the slider:

# %% tags=["nbval-ignore-output"]
plotting.flipbook(
    [
        plotting.show_heatmaps(
            astronaut[0], [seen.sqrt()], alt=f"What one position sees: {name}."
        )
        for name, seen in sights.items()
    ],
    [f"{name}: {windows[name]} pixels" for name in sights],
    alt="The part of a photograph that one position reacts to",
)

# %% [markdown]
# (Photograph: NASA, from scikit-image. Colours show the square root of the gradient, so that weak
# influences can be seen.) At rate 8 the nine taps look at nine separate places and skip what lies between
# them; ASPP fills the gaps with its smaller rates. PPM reaches as far and is hardly to be seen doing it: the far
# part of the picture arrives as a few means, to which each pixel adds little.
#
# ## Ship it: the ONNX trap
#
# It trains, it runs at any size, and then the export stops. This is PyTorch's older ONNX exporter
# (`dynamo=False`), on a 7 × 7 map and a grid of 3; in a process of its own, because it prints all it knows:

# %%
program = """
import io, torch
pool, example = torch.nn.AdaptiveAvgPool2d(3), (torch.rand(1, 512, 7, 7),)
torch.onnx.export(pool, example, io.BytesIO(), dynamo=False)
"""
ran = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True
)
error = next(line for line in ran.stderr.splitlines() if "ONNX export of" in line)
print(textwrap.fill(error.split(". ")[0].removeprefix("torch.onnx.errors.")))
print(explain(error))

# %% [markdown]
# *Output size that are not factor of input size.* ONNX has no adaptive pooling, only pooling with fixed
# windows. Where the grid divides the side, the exporter computes such windows; a grid of 1 becomes a global
# mean. Everything else stops. The newer exporters start from `torch.export`. There the pooling goes through,
# as *one* operator, and whatever comes next has to know it:


# %%
class Cells(nn.Module):
    """A map's 3 × 3 cells, by one of the two functions."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x, 3)


any_size = {i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)}  # not the channels
programs = {}
for pool in (F.adaptive_avg_pool2d, average_grid):
    example = (torch.rand(2, 8, 7, 9),)
    programs[pool.__name__] = torch.export.export(
        Cells(pool), example, dynamic_shapes=(any_size,)
    )

# %% tags=["nbval-ignore-output"]
for name, program in programs.items():
    called = [n for n in program.graph.nodes if n.op == "call_function"]
    parts = {str(n.target).removeprefix("aten.").split(".")[0] for n in called}
    print(textwrap.fill(f"{name}: {', '.join(sorted(parts))}"))

# %% [markdown]
# On top a single operator, below it ranges of integers, comparisons and two matrix products. The exporter that
# just refused translates each of them (a test of this book sees to that, for PPM and ASPP at one size), which
# is why this chapter's modules average by `average_grid`. What `torch.export` wrote is right at sizes and
# batches that it has never seen, too, from two upwards (it treats a length of one as a case of its own):

# %%
for count, height, width in [(3, 4, 4), (2, 6, 8), (5, 12, 5), (2, 2, 19)]:
    x = torch.rand(count, 8, height, width)
    found = programs["average_grid"].module()(x)
    assert torch.allclose(found, F.adaptive_avg_pool2d(x, 3), atol=1e-5)

# %% [markdown]
# A maximum is no matrix product. `MaxSpatialPyramid` exports for one image size, in which its grids divide the
# map. If you ship to ONNX, take the means.
#
# ## Measure the claims
#
# Everything so far was one seed, or none. `python -m experiments.chapters.spatial_pyramid.analysis`
# asks its questions three times, with three seeds, and `python -m experiments.claims spatial_pyramid` trains on
# **CamVid**, 266 street photographs of two drives, and reports on 101 of a third.

# %%
evidence = records.of("spatial_pyramid_probe", "spatial_pyramid")
assert len(evidence.values("scenes", "sizes", "auc")) >= 3
for where in ("scenes", "streets"):
    assert len(evidence.values(where, "c3, PPM")) >= 3

# %% [markdown]
# **SPP makes the head independent of input size.** Of its shape, yes: fifty sizes, one length. Of its
# meaning? A linear readout says from the vector which of the six shapes are in a scene. It was fitted on
# 600 scenes of 128 pixels, and is asked about 200 others at eight sizes. A second one was fitted on the same
# 600 scenes, a fifth of them at each of 64, 96, 128, 192 and 256 pixels. (The number is the area under the curve,
# averaged over the shapes: ½ is guessing, 1 is perfect.)


# %%
def areas(name):
    """The area under the curve at each size of the image, [seeds, sizes]."""
    return torch.tensor(evidence.values("scenes", "sizes", "auc", name))


sides = evidence.values("scenes", "sizes", "sides")[0]
at = {side: i for i, side in enumerate(sides)}

# %% tags=["nbval-ignore-output"]
plotting.show_panels(
    {
        title: {
            "fitted at 128": areas(name),
            "fitted at several sizes": areas(f"{name}, several sizes"),
        }
        for title, name in {
            "area under the curve: means": "SPP, mean",
            "area under the curve: maxima": "SPP, max",
        }.items()
    },
    x=[str(side) for side in sides],
    xlabel="side of the image, pixels",
    alt="Shapes told at eight sizes, by readouts fitted at one and at several.",
)

# %%
helped = {}
for name in ("average", "SPP, mean", "SPP, max"):
    fixed, several = areas(name), areas(f"{name}, several sizes")
    assert (fixed[:, at[64]] < fixed[:, at[128]] - 0.03).all()
    assert fixed[:, at[256]].mean() < fixed[:, at[128]].mean() - 0.02
    assert (several[:, at[128]] < fixed[:, at[128]] + 0.005).all()
    assert (several[:, at[64]] < fixed[:, at[128]] - 0.03).all()
    helped[name] = several - fixed
assert helped["SPP, mean"].mean(0).max() < 0.01
assert helped["SPP, mean"][:, at[128]].max() < -0.004
assert helped["SPP, max"][:, at[256]].min() > 0.005
assert max(change.max() for change in helped.values()) < 0.04

# %% [markdown]
# So the claim is half true. The head *runs* at every size; what it *reads* there is another matter. At 64 pixels
# every readout loses more than 0.03, and so does one that was fitted at 64, too: there the features say less. At 256
# the loss is more than 0.02 on average. SPP's authors trained at several sizes, which the fixed length makes
# possible. Here, with no more images than before and a frozen encoder, that helps the maxima at 256 pixels in every
# seed, by less than 0.04. The means gain next to nothing anywhere, and at 128 they lose, with every seed.
#
# And three grids tell less than one cell does:

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        name: areas(name)[:, at[128]]
        for name in ("average", "SPP, mean", "SPP, max", "SPP, both")
    },
    ylabel="area under the curve at 128 pixels",
    digits=3,
    alt="Four bars: one mean is a little higher than the pyramid in three ways.",
)

# %%
for name in ("SPP, mean", "SPP, max", "SPP, both"):
    assert (areas(name)[:, at[128]] < areas("average")[:, at[128]] - 0.002).all()

# %% [markdown]
# *Is there a star?* does not ask where, and 21 times as many numbers for 600 scenes may be too many. Where the
# place matters, a grid pays: chapter 02 fed decoders from both.
#
# **Context helps large things.** The decoder of this chapter on `c3`, trained on 400 scenes. More layers alone
# may help, too, so each kind of context has a control with *as many weights*: in *PPM unpooled* the four branches
# look at single positions, and *close 3×3s* are ASPP with all rates 1 and a 1×1 in place of the mean. First
# all variants at once:

# %% tags=["nbval-ignore-output"]
names = {
    "c3": "c3",
    "c3, PPM unpooled": "c3, PPM unpooled",
    "c3, PPM": "c3, PPM",
    "c3, close 3×3s": "c3, rates 1 1 1, no mean",
    "c3, close 3×3s and mean": "c3, rates 1 1 1",
    "c3, ASPP": "c3, ASPP",
    "c5": "c5",
    "c5, PPM": "c5, PPM",
    "c5, ASPP": "c5, ASPP",
    "c5, rates 6 12 18": "c5, rates 6 12 18",
    "map beside the image": "map beside the image",
    "vector beside the image": "vector beside the image",
}
plotting.show_bars(
    {name: evidence.values("scenes", what) for name, what in names.items()},
    ylabel="mIoU on unseen scenes, %",
    highlight="c3, PPM",
    alt="mIoU of twelve variants; ASPP on c3 is best, the vector is last.",
)

# %%
others = [name for name in names.values() if name != "c3, ASPP"]
margin = partial(evidence.margin, "scenes")
assert min(margin("c3, ASPP", name) for name in others) > 0.3
assert margin("c3, ASPP", "c3") > 5
assert margin("c3, PPM", "c3, PPM unpooled") > 0.5
assert margin("c3, rates 1 1 1, no mean", "c3") > 4
close = "c3, rates 1 1 1", "c3, rates 1 1 1, no mean"
with_mean, without = (evidence.mean("scenes", what) for what in close)
assert abs(with_mean - without) < 0.5
for what in close:
    assert margin("c3, ASPP", what) > 0.5
    assert margin(what, "c3, ASPP") > -2.5
for name in ("c5, PPM", "c5, ASPP", "c5, rates 6 12 18"):
    gained = evidence.mean("scenes", name) - evidence.mean("scenes", "c5")
    assert abs(gained) < 1.5
vector, map_ = (f"{kind} beside the image" for kind in ("vector", "map"))
weights = [evidence.mean("scenes", what, "parameters") for what in (vector, map_)]
assert weights[0] > 15 * weights[1]
assert margin(map_, vector) > 10

# %% [markdown]
# Look at the controls before you believe in a name. PPM on `c3` (in red) gains more than half a point over its
# unpooled control, with every seed. ASPP gains more than 5 points over no context, and three
# plain 3×3 convolutions with the same number of weights gain more than 4 of them. The mean of the map adds
# nothing to these; the distance of the taps adds the rest, between half a point and 2.5. On `c5` no context changes much: each of its 4 × 4 positions can see the whole
# scene already, and DeepLab's rates leave eight of nine taps in the padding. The vector beside the image is the
# poorest by far. Its control, `c5` as a *map* beside the image, with less than a 15th of the weights, has more
# than 10 points more: what the vector lacks is the place.
#
# And whom does context help? For each thing in the 200 scenes: its own IoU, in and about its box, minus that of
# the control. Things are sorted by the longer side of their box, in pixels:


# %%
def gains(what, control, key="iou"):
    """Points of IoU more than the control, [seeds, extents]."""
    with_, without = (
        torch.tensor(evidence.values("scenes", name, "by_extent", key))
        for name in (what, control)
    )
    return with_ - without


lows = evidence.values("scenes", "c3", "extents")[0][:-1]
contests = {
    "PPM": ("c3, PPM", "c3, PPM unpooled"),
    "ASPP": ("c3, ASPP", "c3, rates 1 1 1, no mean"),
}

# %% tags=["nbval-ignore-output"]
plotting.show_panels(
    {
        title: {name: gains(*pair, key) for name, pair in contests.items()}
        | {"their controls": [0] * len(lows)}
        for title, key in {
            "all things, points": "iou",
            "compact shapes, points": "compact",
        }.items()
    },
    x=[f"{low}+" for low in lows],
    xlabel="longer side of the box, pixels",
    alt="What PPM and ASPP gain over their controls: most for the largest things.",
)

# %%
for pair in contests.values():
    for key in ("iou", "compact"):
        by_size = gains(*pair, key)
        assert by_size[:, -1].min() > 1
        assert (by_size[:, -1] > by_size[:, :-1].max(dim=1).values).all()
    assert gains(*pair).mean(dim=0)[:-1].max() < 0.5
at_32 = gains(*contests["ASPP"])[:, lows.index(32)]
assert at_32.max() < -1

# %% [markdown]
# The claim holds, against controls of equal size and in every seed: the largest things gain, by more than a
# point, and more than any smaller ones. Those gain next to nothing on average, or lose: from 32 to 63 pixels ASPP
# costs more than a point, in every seed. (Compact are disc, square, triangle and star. A long pole is thin, and a
# large ring hollow: of them, size says less.)
#
# **And on streets?** There are large things, sky and road, and thin ones, poles and signs. What each class gains
# from the pooling, PPM minus its unpooled control:

# %% tags=["nbval-ignore-output"]
street_pair = "streets", "c3, PPM", "c3, PPM unpooled"
gained = {
    name: evidence.differences(*street_pair, "iou", name) for name in camvid.CLASSES
}
plotting.show_bars(
    dict(sorted(gained.items(), key=lambda item: -sum(item[1]))),
    ylabel="gained from the pooling on c3, points of IoU",
    alt="What each class of the streets gains from context.",
)

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        what: evidence.values("streets", what)
        for what in ("c3", "c3, PPM unpooled", "c3, PPM")
    },
    ylabel="mIoU on unseen streets, %",
    alt="mIoU on streets: without context, with the unpooled control, with PPM.",
)

# %%
assert evidence.margin(*street_pair) > 1.5
assert abs(evidence.margin("streets", "c3, PPM unpooled", "c3")) < 1.5
for name in ("road", "pavement", "car"):
    assert min(gained[name]) > 4
assert max(gained["tree"]) < 1 < min(gained["bicyclist"])
assert max(gained["pedestrian"]) < -3 and sum(gained["sign"]) / 3 < -1

# %% [markdown]
# The pooling is worth more than 1.5 points of mIoU in every seed. Road, pavement and car gain more than 4 points
# each; pedestrians lose more than 3, signs more than 1 on average. But size is not the whole story: trees gain
# nothing, bicyclists do gain. Here the classes speak; the things on streets were not sorted by size.
#
# ## Limits
#
# - The images of other sizes were made by enlarging and shrinking the same scenes. An image that is larger
#   because it *shows more* keeps the size of its things, and was not tried.
# - Learning rates and epochs are the book's, the same for all variants, and not tuned for any.
# - The encoder was frozen. DeepLab also replaces the encoder's last strides by dilation, so that `c5` keeps
#   a finer grid; that needs fine-tuning and is not measured here.
# - Streets were run for `c3`, PPM on it and PPM's control only; all else on scenes, whose largest things span
#   most of 128 pixels.
# - A thing that another one cuts in two counts as two, two of one class that touch count as one, and what is
#   left of a thing in fewer than 12 pixels does not count.
#
# ## Exercises


# %% [markdown]
# **Exercise 1.** How long is the vector of a spatial pyramid? Say it without running one.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_length(answer):
    for channels, grids in [(512, (1, 2, 4)), (64, (1, 2, 3, 6)), (8, (5,))]:
        truth = SpatialPyramid(channels, grids).out_features
        length = answer(channels, grids)
        case = f"{channels} channels, grids {grids}"
        if length is None:
            return print("Nothing returned yet: return a number.")
        if not isinstance(length, int | float):
            return print(f"That is a {type(length).__name__}: return a number.")
        if length == channels:
            return print(f"{case}: that is the length of a single cell.")
        if length == channels * sum(grids) != truth:
            return print(f"{case}: a grid of n has n × n cells, you count n.")
        if length == sum(grid**2 for grid in grids) != truth:
            return print(
                f"{case}: those are the cells; each has {channels} numbers."
            )
        if length != truth:
            return print(f"{case}: {truth:,}, you say {length:,}.")
    print("Right: no height and no width in it.")


# %%
def length(channels, grids):
    """Return the length of the vector."""


check_length(length)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def length_solution(channels, grids):
    return channels * sum(grid * grid for grid in grids)


check_length(length_solution)

# %% [markdown]
# **Exercise 2.** Mend the branch from above, so that it can be trained on single images and still tells
# them apart. Return a module that takes `c5` `[B, 512, h, w]` and returns `[B, 16, 1, 1]`.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_branch(answer):
    torch.manual_seed(0)
    module = answer()
    if module is None:
        return print("Nothing returned yet: return an nn.Module.")
    if not isinstance(module, nn.Module):
        return print(f"Expected an nn.Module, got {module}. Built, not only named?")
    try:
        alone = [module.train()(pyramid.c5[i : i + 1]) for i in range(16)]
        together = module(pyramid.c5)
        found = list(alone[0].shape)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return print(f"It raises: {str(error).split(',')[0]}.")
    if found != [1, 16, 1, 1]:
        return print(f"Expected [1, 16, 1, 1] for one image, got {found}.")
    alone = torch.cat(alone).flatten(1)
    if torch.pdist(alone).min() < 1e-2:
        return print("It runs, but two images get the same: a norm takes it all.")
    if not torch.allclose(alone, together.flatten(1), atol=1e-4):
        return print("In training, an image's output depends on its neighbours.")
    if alone.abs().std() < 0.01:
        return print("Only signs are left, +1 and −1: fewer groups, and larger.")
    print("Right: one image at a time, and no two alike.")


# %%
def mended():
    """Return the branch, cured."""


check_branch(mended)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def mended_solution():
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(512, 16, kernel_size=1, bias=False),
        nn.GroupNorm(1, 16),
    )


check_branch(mended_solution)

# %% [markdown]
# **Exercise 3.** A position of a map sees `before` pixels of the image, and neighbours on the map are
# `stride` pixels apart. How many pixels are seen after a 3×3 convolution with this rate, and then a second
# one like it?


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_window(answer):
    for before, stride, rate in [(99, 8, 1), (99, 8, 4), (211, 16, 6)]:
        truth = before + 4 * rate * stride
        side = answer(before, stride, rate)
        case = f"{before} pixels, stride {stride}, rate {rate}"
        if side is None:
            return print("Nothing returned yet: return a number of pixels.")
        if side == truth:
            continue
        if side == before + 2 * rate * stride:
            return print(f"{case}: that is after the first one; there are two.")
        if side == before + 4 * rate:
            return print(f"{case}: a step on the map is {stride} pixels, not 1.")
        if side == before + 4 * stride:
            return print(f"{case}: the taps are {rate} steps apart, not 1.")
        return print(f"{case}: {truth} pixels, you say {side}.")
    print("Right: each layer adds twice its rate, in steps of the map.")


# %%
def window(before, stride, rate):
    """Return the side of the window after two 3×3 convolutions."""


check_window(window)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def window_solution(before, stride, rate):
    return before + 2 * (2 * rate * stride)


check_window(window_solution)

# %% [markdown]
# ## Recap
#
# - Pool to a number of cells, not by a size of windows; size the linear layer by channels × cells.
# - A fixed length is not a fixed meaning: test at every size that you mean to use.
# - For masks, spread the means over the map; a vector beside the image has lost where.
# - No BatchNorm on a 1×1 map, nor right behind it: GroupNorm or none, then a ReLU. Keep rates below the
#   map's side.
# - Context helps the large things most, where the decoder lacks it: on `c3`. On `c5`, or in a decoder that reads all
#   five maps (chapter 12), it brought nothing. Compare it with as many weights without it.
#
# | shape contract | |
# |---|---|
# | `SpatialPyramid`, `MaxSpatialPyramid` | `[B, C, h, w]`, any h, w → `[B, C · Σ grid²]` |
# | `BothSpatialPyramid` | → twice that |
# | `BesideImage` | `Pyramid` and `image` `[B, 3, H, W]` → `[B, out_channels, H, W]` |
# | `PyramidPooling`, `ASPP` | `[B, C, h, w]` → `[B, out_channels, h, w]` |
# | `ContextDecoder` | `Pyramid` → `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]` |
# | `ASPP` on one image whose map is 1 × 1, in training | raises: BatchNorm needs two values |
#
# In your own project:
#
# ```python
# from functools import partial
#
# from helpers.bridges.spatial_pyramid import ASPP, ContextDecoder
# from helpers.encoder import ResNet18Encoder, Segmenter
#
# encoder = ResNet18Encoder()
# context = partial(ASPP, rates=(2, 4, 8))
# decoder = ContextDecoder(encoder.out_channels, 7, context, level=3)
# logits = Segmenter(encoder, decoder)(images)  # normalised, any H, W ≥ 32
# ```
