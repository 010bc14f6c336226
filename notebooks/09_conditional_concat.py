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
# # 09 · Can the features decide what enters?
#
# You hand the image itself to the decoder, beside the encoder's output, because the outlines are in
# there. So is every blade of grass. The features know what is an outline and what is grass; so let
# *them* predict a mask that says, pixel by pixel, how much of the image enters and how much of the
# features. The first thing you get is `The size of tensor a (16) must match the size of tensor b (256)`.
# The second is harder to notice: a mask that decides nothing.

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
# - how many of an image's strong edges are outlines of anything;
# - the published size error, and a silent one behind it that waits for batches of three;
# - a soft mask, a hard one, and why a plain threshold never learns;
# - FiLM and SPADE: the same idea with more numbers;
# - three trainings while you wait, and what the masks open for, step by step;
# - masks that decide nothing, the liveliest among them: how they come about, and what gives them away;
# - measured with three seeds: what the image is worth, and soft mask, hard mask, gate, FiLM and SPADE against
#   plain concatenation.

# %%
import torch
import torch.nn.functional as F
from torch import nn

from helpers import plotting, records, scenes
from helpers.bridges.attention import SpatialGate
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.errors import explaining
from helpers.inspection import count_parameters, pyramid_levels, shapes
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import budget, evaluate, fit

# %% [markdown]
# ## The problem as a picture
#
# Mark the tenth of an image's pixels where the colour changes most: that is what a first convolution on
# the image responds to. Then keep those among them that lie within two pixels of a true outline.
# No network has run yet:


# %% tags=["nbval-ignore-output"]
def edges(images):
    """How much the colour changes at each pixel, [B, H, W]."""
    x = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across = x[..., 1:-1, 2:] - x[..., 1:-1, :-2]
    down = x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    return (across.square() + down.square()).sum(1).sqrt()


def near_outlines(masks, width=2):
    """Whether an outline lies within `width` pixels, [B, H, W]."""
    one_hot = F.one_hot(masks, classes).movedim(-1, 1).float()
    return F.max_pool2d(one_hot, 2 * width + 1, 1, width).sum(1) > 1


classes = len(scenes.CLASSES)
images, masks = scenes.batch(range(5_000, 5_060))
changes, outlines = edges(images).flatten(1), near_outlines(masks)
strong = (changes > changes.quantile(0.9, dim=1, keepdim=True)).view_as(outlines)
share = (strong & outlines).sum((1, 2)) / strong.sum((1, 2))
chosen = 29
print(f"at an outline: {share.mean():.0%}; in scene {chosen}: {share[chosen]:.0%}")

# %%
plotting.show_images(
    [images[chosen], strong[chosen], strong[chosen] & outlines[chosen]],
    titles=["image", "strong edges", "of these, at an outline"],
    columns=3,
    alt="A scene, its strong edges, and the few of them that belong to outlines.",
)

# %%
assert 0.67 < share.mean() < 0.75 and share[chosen] < 0.25

# %% [markdown]
# In most scenes most of them are outlines. But three in ten are texture, grain and shadow, and here it is
# more than three in four. Whatever comes after has to tell them apart, and a few pixels of the image do not
# say which is which. The encoder's deep maps do, coarsely. Concatenation leaves it to the next layer to
# find out; a mask says it outright.
#
# ## The shapes
#
# The features know *what* on a coarse grid; the image is on the finest there is:

# %%
for height, width in [(128, 128), (180, 240)]:
    coarse = pyramid_levels(height, width)[2:]
    maps = [f"{v.name}: {v.channels} × {v.height} × {v.width}" for v in coarse]
    print(f"image: 3 × {height} × {width}", *maps, sep="   ")

# %% [markdown]
# ## The obvious attempt, and what it does wrong
#
# A 1×1 convolution and a sigmoid make a mask from the features. The mask weighs the image, and what is
# left to 1 weighs the features. Then both are concatenated. This is how it is often posted:


# %%
class FirstAttempt(nn.Module):
    """A mask from c4 weighs the image; its rest to 1 weighs c4."""

    def __init__(self):
        super().__init__()
        self.score = nn.Conv2d(256, 1, 1)

    def forward(self, c4, image):
        mask = self.score(c4).sigmoid()
        return torch.cat([(1 - mask) * c4, mask * image], dim=1)


torch.manual_seed(0)
encoder = ResNet18Encoder()
attempt = FirstAttempt()

# %% tags=["raises-exception"]
large = torch.rand(2, 3, 256, 256)
with explaining():
    attempt(encoder(normalize(large)).c4, large)

# %% [markdown]
# The mask has the size of what it was made from, 16 × 16, and the image 256 × 256. Shrinking the image
# would silence the error and throw away what the image was wanted for. The mask has to grow, and the
# features with it.
#
# A warning before you do. A mask has one channel, and people drop it, because a mask "is" `[B, H, W]`.
# Multiply that by an image `[B, 3, H, W]`, and PyTorch lines the shapes up from the *right*: the mask's
# batch meets the image's channels.

# %%
for count in (1, 2, 3):
    levels = torch.linspace(0, 1, count).view(count, 1, 1, 1)
    mask = levels.expand(count, 1, 8, 8).squeeze(1)  # one level for each image
    try:
        weighed = mask * torch.ones(count, 3, 8, 8)
    except RuntimeError:
        print(f"batch of {count}: an error")
        continue
    got = [f"{value:g}" for value in weighed[0, :, 0, 0]]
    print(f"batch of {count}: the three channels of image 0 got", ", ".join(got))

# %% [markdown]
# One image: right, by luck. Two: an error, at least. Three: no error, and red is weighed by the mask of
# image 0, green by that of image 1, blue by that of image 2. Keep the channel: `[B, 1, H, W]`.
#
# ## The technique
#
# ### Bring everything to one size
#
# First the plain join, without a mask, for any coarse map and any fine one: the image, a map made from
# it, or `c1`. It learns nothing, and it is what any mask has to beat.

# %% tags=["export"]
from collections.abc import Sequence
from copy import deepcopy
from math import log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.encoder import Pyramid, check_image, check_map, check_pyramid


# %% tags=["export"]
def check_pair(features: Tensor, fine: Tensor, channels: Sequence[int]) -> None:
    """Raise a clear error unless both have these channels and one batch size."""
    check_map("features", features, channels[0])
    check_map("fine", fine, channels[1])
    count, other = features.shape[0], fine.shape[0]
    if count != other:
        raise ValueError(
            f"Expected maps of one batch, got features of {count} images and fine "
            f"of {other}. Pass maps of the same images."
        )


def enlarge(map_: Tensor, size: Sequence[int]) -> Tensor:
    """Return `[B, C, *size]` from a map `[B, C, h, w]`, bilinearly."""
    return F.interpolate(map_, size=tuple(size), mode="bilinear")


# %% tags=["export"]
class Concat(nn.Module):
    """All of both: bring the features to the fine map's size and concatenate.

    `forward(features, fine)` takes `[B, in_channels, h, w]` and
    `[B, fine_channels, H, W]`, any sizes, and returns
    `[B, in_channels + fine_channels, H, W]`, features first. Learns nothing. Raises
    `ValueError` for other channels, ranks or batches, `TypeError` for integers.
    """

    def __init__(self, in_channels: int, fine_channels: int):
        super().__init__()
        self.channels = in_channels, fine_channels

    def forward(self, features: Tensor, fine: Tensor) -> Tensor:
        check_pair(features, fine, self.channels)
        return torch.cat([enlarge(features, fine.shape[-2:]), fine], dim=1)


# %% [markdown]
# ### A soft mask
#
# One number between 0 and 1 for each pixel, the mask *m*: the image's side enters *m* times, the features
# 1 − *m* times. The score is computed on the features' own small grid and enlarged *before* the sigmoid;
# so the work is small, and the mask can be steep between two positions.


# %% tags=["export"]
class SoftConcat(nn.Module):
    """A mask from the features says how much of them and of the fine map enters.

    `forward(features, fine)` takes `[B, in_channels, h, w]` and
    `[B, fine_channels, H, W]`, any sizes, and returns
    `[B, in_channels + fine_channels, H, W]`: (1 − m) · features, then m · fine.
    `mask(features, size)` is m, `[B, 1, *size]`, values 0…1. Raises `ValueError`
    for other channels, ranks or batches, `TypeError` for integers.
    """

    def __init__(self, in_channels: int, fine_channels: int):
        super().__init__()
        self.channels = in_channels, fine_channels
        self.score = nn.Conv2d(in_channels, 1, kernel_size=1)

    def mask(self, features: Tensor, size: Sequence[int]) -> Tensor:
        return enlarge(self.score(features), size).sigmoid()

    def forward(self, features: Tensor, fine: Tensor) -> Tensor:
        check_pair(features, fine, self.channels)
        size = fine.shape[-2:]
        m = self.mask(features, size)
        return torch.cat([(1 - m) * enlarge(features, size), m * fine], dim=1)


# %%
torch.manual_seed(0)
features, fine = torch.rand(2, 16, 23, 30), torch.rand(2, 8, 180, 240)
soft = SoftConcat(in_channels=16, fine_channels=8)
print(list(features.shape), "and", list(fine.shape), "→", end=" ")
print(
    list(shapes(soft, features, fine)),
    "mask",
    list(soft.mask(features, (180, 240)).shape),
)

# %% [markdown]
# Three masks that you know the answer for are worth more than a look at the shape:

# %%
nn.init.zeros_(soft.score.weight)
everything = Concat(16, 8)(features, fine)
for bias, from_features, from_fine in [(-30, 1, 0), (0, 0.5, 0.5), (30, 0, 1)]:
    nn.init.constant_(soft.score.bias, bias)
    joined = soft(features, fine)
    assert torch.allclose(joined[:, :16], from_features * everything[:, :16])
    assert torch.allclose(joined[:, 16:], from_fine * everything[:, 16:])

# %% [markdown]
# ### A hard mask, and why it does not learn
#
# "Enters or does not enter" is a threshold: *m* > 0.5. Here are three ways to write it, one of them a trick.
# All three return the same zeros and ones. Not the same thing arrives at the mask's weights:


# %% tags=["export"]
def harden(mask: Tensor) -> Tensor:
    """Return 1 where the mask is above ½, else 0, with the gradient of the mask.

    Any shape. Source: the straight-through estimator of Bengio et al., 2013.
    """
    return (mask > 0.5).to(mask.dtype) + (mask - mask.detach())


# %%
def gradient(harden):
    """What arrives at the mask's weights when `harden` makes it hard."""
    torch.manual_seed(0)
    score, side = nn.Conv2d(16, 1, 1), fine[..., :23, :30].clone().requires_grad_()
    mask = harden(score(features).sigmoid())
    (mask * side).square().sum().backward()
    return score.weight.grad


for name, way in {
    "m > 0.5": lambda m: (m > 0.5).float(),
    "m.round()": torch.round,
    "straight through": harden,
}.items():
    arrived = gradient(way)
    learns = (
        "nothing" if arrived is None else "a gradient" if arrived.any() else "zeros"
    )
    print(f"{name:17}", learns)

# %% [markdown]
# A comparison has no derivative, so PyTorch hands nothing back; `round` has one, and it is 0 everywhere. No
# error in either case, as the rest of the network goes on learning: the mask stays what it was when the
# training started, forever. The **straight-through** trick goes forward with 0 and 1, and backward as if
# the threshold were not there: `hard + (m - m.detach())` adds nothing to the value and everything to
# the gradient. That gradient belongs to a different function than the one that runs. It is a
# useful lie.


# %% tags=["export"]
class HardConcat(SoftConcat):
    """As `SoftConcat`, but the mask is 0 or 1; it learns straight through.

    Takes, returns and raises what `SoftConcat` does.

    Source of the gradient: Bengio et al., Estimating or Propagating Gradients
    Through Stochastic Neurons, 2013.
    """

    def mask(self, features: Tensor, size: Sequence[int]) -> Tensor:
        return harden(super().mask(features, size))


# %%
hard = HardConcat(in_channels=16, fine_channels=8)
m = hard.mask(torch.randn(2, 16, 23, 30), (180, 240))
print(list(m.shape), "values:", m.unique().tolist())

# %% [markdown]
# ### The decoder around it
#
# The coarse side is `c3`, `c4` and `c5`, each through a 1×1 convolution to `c3`'s grid, summed (chapter 03),
# and a 3×3 that leaves 16 channels. The fine side is a shallow stem on the image: two 3×3
# convolutions at full resolution. It sees five pixels across, enough for an outline and too little to
# know whose.


# %% tags=["export"]
class CoarseFeatures(nn.Module):
    """c3, c4 and c5 as one map of few channels, on the grid of c3.

    `forward(pyramid)` takes the encoder's five maps, from images of any H, W ≥ 32,
    and returns `[B, out_channels, ⌈H/8⌉, ⌈W/8⌉]`, no value negative; c1 and c2 are
    not read. Raises `ValueError` for maps with other channels than `in_channels`,
    `TypeError` for integers.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, width: int = 32
    ):
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.project = nn.ModuleList(
            nn.Conv2d(c, width, 1, bias=False) for c in self.in_channels[2:]
        )
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        self.out = nn.BatchNorm2d(out_channels)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        size = pyramid.c3.shape[-2:]
        maps = [p(map_) for p, map_ in zip(self.project, pyramid[2:], strict=True)]
        x = self.norm(sum(enlarge(map_, size) for map_ in maps)).relu()
        return self.out(self.conv(x)).relu()


# %% tags=["export"]
class ImageStem(nn.Module):
    """A shallow map of the image itself, at full resolution.

    `forward(image)` takes normalised images `[B, 3, H, W]`, H and W at least 32,
    and returns `[B, out_channels, H, W]`, no value negative. Raises `ValueError`
    for other shapes, `TypeError` for integers.
    """

    def __init__(self, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, image: Tensor) -> Tensor:
        check_image(image)
        x = self.norm1(self.conv1(image)).relu()
        return self.norm2(self.conv2(x)).relu()


# %% [markdown]
# The join in the middle is exchangeable, and nothing after it looks at a neighbour: what a pixel becomes is
# decided by what was let in *there*. A `forward` with a parameter `image` tells `Segmenter` to hand the
# image over.


# %% tags=["export"]
class ConditionalDecoder(nn.Module):
    """Coarse features and the image, joined pixel by pixel; a 1×1 network decides.

    `forward(pyramid, image)` takes the encoder's five maps and the normalised
    images `[B, 3, H, W]` that they came from, any H, W ≥ 32, and returns
    `[B, out_channels, H, W]`; c1 and c2 are not read. `join` is built as
    `join(width, fine)`: `SoftConcat`, `HardConcat` or `Concat`. Raises `ValueError`
    for other channels, ranks, sizes or batches, `TypeError` for integers.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        width: int = 16,
        fine: int = 8,
        join: type[nn.Module] = SoftConcat,
    ):
        super().__init__()
        self.coarse = CoarseFeatures(in_channels, width)
        self.stem = ImageStem(fine)
        self.join = join(width, fine)
        self.mix = nn.Conv2d(width + fine, 2 * fine, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * fine)
        self.head = nn.Conv2d(2 * fine, out_channels, 1)

    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
        features = self.coarse(pyramid)  # [B, width, ⌈H/8⌉, ⌈W/8⌉]
        fine = self.stem(image)  # [B, fine, H, W]
        joined = self.join(features, fine)
        return self.head(self.norm(self.mix(joined)).relu())


# %%
for join in (Concat, SoftConcat, HardConcat):
    decoder = ConditionalDecoder(encoder.out_channels, classes, join=join)
    model = Segmenter(encoder, decoder)
    sizes = [
        list(model(torch.rand(2, 3, *s)).shape[2:]) for s in [(64, 96), (33, 97)]
    ]
    print(f"{join.__name__:11} {count_parameters(decoder):,} parameters", *sizes)

# %% [markdown]
# Any size, and the mask costs 17 parameters: 16 weights and a bias. So whatever it gains or loses below is not
# due to a larger network.
#
# ### The general idea: FiLM and SPADE
#
# A mask multiplies all channels of a pixel by one number. That is one member of a family: let one input
# predict a *scale* γ and a *shift* β for the other, *γ · fine + β*. **FiLM** predicts them once for each
# image and channel; **SPADE** for each pixel and channel.


# %% tags=["export"]
class FiLM(nn.Module):
    """Scale and shift each channel of the fine map, as the features' mean says.

    `forward(features, fine)` takes `[B, in_channels, h, w]` and
    `[B, fine_channels, H, W]` and returns the shape of `fine`: γ · fine + β, one γ
    and one β for each image and channel. Raises `ValueError` for other channels,
    ranks or batches, `TypeError` for integers.

    Source: Perez et al., FiLM, AAAI 2018.
    """

    def __init__(self, in_channels: int, fine_channels: int):
        super().__init__()
        self.channels = in_channels, fine_channels
        self.predict = nn.Linear(in_channels, 2 * fine_channels)

    def forward(self, features: Tensor, fine: Tensor) -> Tensor:
        check_pair(features, fine, self.channels)
        predicted = self.predict(features.mean((2, 3)))[:, :, None, None]
        change, beta = predicted.chunk(2, dim=1)  # [B, fine_channels, 1, 1] each
        return (1 + change) * fine + beta


# %% tags=["export"]
class SPADE(nn.Module):
    """As `FiLM`, but with a scale and a shift of its own for each pixel.

    Takes, returns and raises what `FiLM` does. Normalise `fine` before, as the
    paper does: it is left out here.

    Source: Park et al., Semantic Image Synthesis with Spatially-Adaptive
    Normalization, CVPR 2019.
    """

    def __init__(self, in_channels: int, fine_channels: int):
        super().__init__()
        self.channels = in_channels, fine_channels
        self.predict = nn.Conv2d(in_channels, 2 * fine_channels, 1)

    def forward(self, features: Tensor, fine: Tensor) -> Tensor:
        check_pair(features, fine, self.channels)
        predicted = enlarge(self.predict(features), fine.shape[-2:])
        change, beta = predicted.chunk(2, dim=1)  # [B, fine_channels, H, W] each
        return (1 + change) * fine + beta


# %% [markdown]
# The layers predict γ − 1, so that a layer that says nothing changes nothing: γ = 1 and β = 0 is the identity.
# And what a mask does to the *fine* half of the concatenation is a SPADE whose γ is *m* for all channels and
# whose β is 0. (That the features get 1 − *m* comes on top of it.)

# %%
for kind in (FiLM, SPADE):
    modulate = kind(in_channels=16, fine_channels=8)
    print(f"{kind.__name__:6}", list(shapes(modulate, features, fine)))
    nn.init.zeros_(modulate.predict.weight), nn.init.zeros_(modulate.predict.bias)
    assert torch.equal(modulate(features, fine), fine)
nn.init.constant_(soft.score.bias, torch.tensor(0.3).logit())  # m = 0.3 everywhere
nn.init.constant_(modulate.predict.bias[:8], 0.3 - 1)  # γ = 0.3, β = 0
joined = soft(features, fine)
assert torch.allclose(modulate(features, fine), joined[:, 16:], atol=1e-5)

# %% [markdown]
# Both return the fine map alone, with its 8 channels. So they are no join: as `join=FiLM` in the decoder, the
# `mix` behind would miss the features' 16. Modulate the fine map first, then concatenate:


# %%
class FiLMConcat(nn.Module):
    """`Concat`, with a fine map that the features have modulated before."""

    def __init__(self, in_channels, fine_channels):
        super().__init__()
        self.film = FiLM(in_channels, fine_channels)
        self.concat = Concat(in_channels, fine_channels)

    def forward(self, features, fine):
        return self.concat(features, self.film(features, fine))


decoder = ConditionalDecoder(encoder.out_channels, classes, join=FiLMConcat)
logits = Segmenter(encoder, decoder)(torch.rand(2, 3, 64, 96))
print("joined", list(shapes(FiLMConcat(16, 8), features, fine)), end=", ")
print("logits", list(logits.shape))

# %% [markdown]
# Chapter 04's gate belongs here, too. It is made from the concatenation, so it sees both sides, and it
# weighs both by the same number:

# %%
gate, joined = SpatialGate(16 + 8), Concat(16, 8)(features, fine)
print("gate  ", list(shapes(gate, joined)), f"{count_parameters(gate)} parameters")

# %% [markdown]
# | | predicted for each image | can say |
# |---|---|---|
# | mask | h · w, enlarged | *where* the fine map counts, and where the features do |
# | gate | H · W | *where* anything counts |
# | FiLM | 2 · F | *which channels* of the fine map count, in this image |
# | SPADE | 2 · F · h · w, enlarged | both, and add something, too |
#
# Here h · w is the features' grid, ⌈H/8⌉ · ⌈W/8⌉: only the gate decides at full resolution. The rest of the
# chapter asks what the smallest of them, the mask, is worth.
#
# ## Train it
#
# A soft mask, a hard one, and a soft one that starts all but shut: its bias is −8, so that *m* begins at
# 0.0003. After each epoch we keep the masks of two scenes that no training sees.


# %%
@torch.no_grad()
def masks_of(model, images):
    """How far the mask opens for the image at each pixel, [B, 1, H, W]."""
    images = images.to(next(model.parameters()).device)
    features = model.eval().decoder.coarse(model.encoder(normalize(images)))
    return model.decoder.join.mask(features, images.shape[-2:]).cpu()


epochs = budget(short=5, full=40)
train = scenes.Scenes(96)
train = [train[i] for i in range(len(train))]  # draw each scene once
unseen = list(zip(images[:30], masks[:30], strict=True))
loss = SegmentationLoss(class_weights=class_weights((m for _, m in train), classes))
shown = images[[3, 7]]


def train_and_watch(join, bias=None):
    """Train a decoder with this join: model, history, masks on the way."""
    torch.manual_seed(0)
    decoder = ConditionalDecoder(encoder.out_channels, classes, join=join)
    if bias is not None:
        nn.init.constant_(decoder.join.score.bias, bias)
    model = Segmenter(encoder, decoder)
    watched = [masks_of(model, shown)]
    history = fit(
        model,
        train,
        epochs=epochs,
        lr=1e-2,
        loss=loss,
        flip=False,
        after_epoch=lambda epoch: watched.append(masks_of(model, shown)),
    )
    return model, history, watched


# %%
runs = {
    "soft mask": train_and_watch(SoftConcat),
    "hard mask": train_and_watch(HardConcat),
    "soft, starts shut": train_and_watch(SoftConcat, bias=-8),
}

# %% tags=["nbval-ignore-output"]
plotting.show_histories(
    {name: history for name, (_, history, _) in runs.items()},
    alt="Loss falls and mIoU climbs for all three.",
)

# %% tags=["nbval-ignore-output"]
scored = {name: evaluate(model, unseen) for name, (model, _, _) in runs.items()}
for name, score in scored.items():
    boundary = score.boundary_miou
    print(f"{name:18} mIoU {score.miou:.1f} %, boundary IoU {boundary:.1f} %")

# %%
for _, history, _ in runs.values():
    assert history.loss[-1] < 0.7 * history.loss[0]
first, *_, last = runs["soft mask"][1].loss
assert last < 0.5 * first
assert min(score.miou for score in scored.values()) > 1.2 * 100 / classes

# %% [markdown]
# One seed and a short run: take no ranking from this. The masks are what to look at now.
#
# ## Look inside: what does the mask open for?
#
# In the hard mask white is 1, the image enters; black is 0, the features do. A soft mask uses less of that scale,
# so its column is stretched, from the lowest to the highest value that it takes in these two scenes at the end;
# the title says which. Pull the slider from the untrained mask to the last epoch:

# %% tags=["nbval-ignore-output"]
steps = len(train) // 8
every = max(1, epochs // 5)
soft_watched, hard_watched = runs["soft mask"][2], runs["hard mask"][2]
low, high = soft_watched[-1].min(), soft_watched[-1].max()


def frame(i):
    """Two rows: a scene, its soft mask and its hard mask after i epochs."""
    stretched = ((soft_watched[i] - low) / (high - low)).clamp(0, 1)
    rows = zip(shown, stretched[:, 0], hard_watched[i][:, 0], strict=True)
    return plotting.show_images(
        [each for row in rows for each in row],
        titles=["image", f"soft, {low:.2f}…{high:.2f}", "hard, 0 or 1", "", "", ""],
        columns=3,
        alt="Two scenes, and for each the soft and the hard mask.",
    )


moments = range(0, epochs + 1, every)
plotting.flipbook(
    [frame(i) for i in moments],
    [f"after {i * steps} steps" for i in moments],
    alt="Two scenes, their soft masks, stretched, and their hard masks",
)

# %% [markdown]
# Perhaps you expected light outlines. Features on a grid of eight pixels cannot draw them. What the masks have
# found in the run stored here is rougher: *thing* or *no thing*, one bit that coarse features can tell. Does
# that mean that the image is let in where there is nothing? Or that the features are shut out there? A mask
# does both at once, and no picture of it can say which of the two it is for. Further below it is held
# against a mask that has nothing to let in.
#
# ### Masks that decide nothing
#
# A mask can end up shut (0 everywhere), open (1 everywhere) or constant (the same somewhere between). The
# network trains, the loss falls, the shapes are right, and the module decides nothing. Three numbers make you
# suspicious:


# %% tags=["export"]
class MaskReport(NamedTuple):
    """What gives a mask away that decides nothing; see `mask_report`."""

    mean: float
    within: float
    entropy: float


def mask_report(mask: Tensor) -> MaskReport:
    """Return mean, spread within an image and entropy of masks `[B, 1, H, W]`, 0…1.

    `mean` is how far they open: near 0 the fine map enters faintly, near 1 the
    features do; a layer behind may amplify what is left. `within` is the standard
    deviation over an image's pixels, averaged over images, 0…0.5: near 0 all pixels
    are treated alike. `entropy` is in bits, 0 (every pixel decided) … 1 (every
    pixel at ½). Raises `ValueError` for another shape or values outside of 0…1.
    """
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"Expected masks [B, 1, H, W], got {list(mask.shape)}. "
            "Keep the channel: mask[:, None]."
        )
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(
            f"Expected values in 0…1, got {mask.min():.3g}…{mask.max():.3g}. "
            "Scores become a mask with .sigmoid()."
        )
    m = mask.double()
    nats = torch.special.entr(m) + torch.special.entr(1 - m)
    within = m.flatten(1).std(1, correction=0).mean()
    return MaskReport(*(float(v) for v in (m.mean(), within, nats.mean() / log(2))))


# %% tags=["nbval-ignore-output"]
reports = {
    name: mask_report(masks_of(model, images))
    for name, (model, _, _) in runs.items()
}
for name, report in reports.items():
    print(f"{name:18}", *(f"{k} {v:.3f}" for k, v in report._asdict().items()))

# %%
stuck, alive = reports["soft, starts shut"], reports["soft mask"]
bias = runs["soft, starts shut"][0].decoder.join.score.bias.item()
assert epochs > 5 or (stuck.mean < 0.05 and stuck.within < 0.02 and bias < -7)
assert epochs > 5 or min(alive.within, reports["hard mask"].within / 10) > 0.02
assert reports["hard mask"].entropy == 0

# %% [markdown]
# In the short run stored here, the mask that started shut is still all but shut, everywhere, while its loss fell
# with the others'. (A hard mask has no entropy, however it is made: look at its spread.) Why does it not
# open? The sigmoid's slope is *m*(1 − *m*): a quarter in the middle, and at *m* = 0.0003 about a thousandth of
# that. Here is the gradient that reaches the mask's weights, by the bias that it starts from:

# %%
encoder.cpu()
x, y = images[:4], masks[:4]
with torch.no_grad():
    pyramid = encoder(normalize(x))


def reaches_mask(bias):
    """The gradient at the mask's weights, before any training."""
    torch.manual_seed(0)
    decoder = ConditionalDecoder(encoder.out_channels, classes)
    nn.init.constant_(decoder.join.score.bias, bias)
    F.cross_entropy(decoder(pyramid, normalize(x)), y).backward()
    return decoder.join.score.weight.grad.norm().item()


biases = (-8, -6, -4, -2, 0, 2, 4, 6, 8)
slopes = [reaches_mask(bias) for bias in biases]

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    {"soft mask": slopes},
    xlabel="bias that the mask starts from",
    ylabel="gradient at the mask's weights",
    x=biases,
    log=True,
    alt="The gradient is largest around a bias of 0; a thousandth is left at ±8.",
)

# %%
assert max(slopes[0], slopes[-1]) < max(slopes) / 500

# %% [markdown]
# Out there, the first steps of plain gradient descent are a thousandth of those in the middle, or so. Adam,
# which `fit` uses, evens out the size of gradients, but each of its steps moves each of the mask's 17
# parameters by about the learning rate, 0.01 at most. The score is a sum over all of them; it gets a little way
# from −8 in the dozens of steps of a short run, and in the hundreds below not always much farther.
#
# So: **start in the middle** (PyTorch's default bias is near 0; leave it), and bring both sides to one
# scale before they meet, as the BatchNorm at the end of stem and features does, so that neither is
# louder from the start. (The second is advice; there is no control for it here.)
#
# A lively picture is still no proof that the mask *matters*. The test is to take its decision away: fix it at
# one number for all pixels, and look what the score loses.


# %% tags=["export"]
def fix_mask(join: SoftConcat, level: float) -> SoftConcat:
    """Return a copy of a join whose mask is `level` everywhere, whatever it sees.

    `level` is 0…1, met to within a millionth; a hard join rounds it, as it does its
    masks. Raises `ValueError` beyond.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"Expected a level in 0…1, got {level}: it is a mask.")
    fixed = deepcopy(join)
    bias = torch.tensor(level).logit(eps=1e-6).item()
    for name, parameter in fixed.score.named_parameters():
        nn.init.constant_(parameter, bias if name == "bias" else 0.0)
    return fixed


# %% [markdown]
# The BatchNorm behind the join has stored how strongly the two sides used to come in, together. With one of them
# shut out these averages no longer fit; but new ones need not fit the weights behind, either. So it is measured
# both ways: as it is, and, here, with averages taken anew on training images. No weight changes:


# %%
@torch.no_grad()
def recalibrate(model, known):
    """Let the BatchNorm behind the join take its averages anew."""
    norm = model.decoder.norm
    norm.reset_running_stats()
    norm.momentum = None  # the plain average of all batches
    model.eval()
    norm.train()
    for part in known.split(8):
        model(normalize(part))
    model.eval()


# %% tags=["nbval-ignore-output"]
model, known = runs["soft mask"][0].cpu(), torch.stack([x for x, _ in train[:32]])
for name, level in {"its mean": alive.mean, "shut": 0.0, "open": 1.0}.items():
    fixed = deepcopy(model)
    fixed.decoder.join = fix_mask(model.decoder.join, level)
    recalibrate(fixed, known)
    cost = scored["soft mask"].miou - evaluate(fixed, unseen).miou
    print(f"{name:9} costs {cost:5.1f} points of mIoU")

# %% [markdown]
# The first line is the one to read: the difference between the mask and its mean is all that *deciding per
# pixel* is worth to this network. *Shut* and *open* say what it loses with one side, and a network that was
# trained without that side would lose less. All that is measured with three seeds next, and a network that was
# trained without the image beside it.
#
# ## Measure the claims
#
# `python -m experiments.chapters.conditional_concat.analysis` trains every variant on 400 scenes with three
# seeds, reports on 200 that no training saw, and looks at the masks. `python -m experiments.claims
# conditional_concat --on streets` trains four of them on CamVid, as chapter 05 does. All around the join
# starts from the same weights, whatever the join, so that seeds can be compared one by one. (With `c1`, the
# layers behind the join do not.)
#
# - *No image*: concatenation with zeros from the stem.
# - *No image, soft mask*: the same zeros; the mask can only weigh the features.
# - *Gate*: chapter 04's `SpatialGate` on the concatenation.
# - *FiLM*, *SPADE*: the concatenation, with a stem that was modulated before.

# %%
evidence = records.of("conditional_concat_probe", "conditional_concat")


def gain(where, better, worse, field="miou"):
    """One difference for each seed."""
    return torch.tensor(evidence.differences(where, better, worse, field))


def scores_of(where, names):
    """mIoU and boundary IoU of some trials, one value for each seed."""
    fields = {"mIoU": "miou", "boundary IoU": "boundary_miou"}
    return {
        f"{name}: {score}": evidence.values(where, name, field)
        for score, field in fields.items()
        for name in names
    }


joins = ["no image", "no image, soft mask", "concatenate", "gate"]
joins += ["soft mask", "hard mask", "FiLM", "SPADE"]
assert all(len(evidence.values("scenes", join)) >= 3 for join in joins)

# %% [markdown]
# First, fairness: the number of parameters is the same within a percent, that of multiplications within two.

# %%
for key, factor in {"parameters": 1.01, "macs": 1.02}.items():
    sizes = {join: evidence.values("scenes", join, key)[0] for join in joins}
    print(
        f"{key}:", *[f"{join} {count:,}" for join, count in sizes.items()], sep="  "
    )
    assert max(sizes.values()) < factor * min(sizes.values())

# %% [markdown]
# **What is the image worth, and does a mask add to it?** mIoU on scenes, then boundary IoU, where the image tells
# most:

# %% tags=["nbval-ignore-output"]
for key, name in {"miou": "mIoU", "boundary_miou": "boundary IoU"}.items():
    display(
        plotting.show_bars(
            {join: evidence.values("scenes", join, key) for join in joins},
            ylabel=f"{name} on unseen scenes, %",
            highlight="soft mask",
            alt=f"{name} of eight joins on scenes; the numbers are at the bars.",
        )
    )

# %%
assert gain("scenes", "concatenate", "no image").min() > 6
assert gain("scenes", "concatenate", "no image", "boundary_miou").min() > 12
for join in ("gate", "soft mask", "FiLM", "SPADE"):
    ahead = gain("scenes", join, "concatenate")
    assert ahead.mean() < 0.5 and ahead.abs().max() < 1.5
ahead = gain("scenes", "gate", "concatenate", "boundary_miou")
assert 0.5 < ahead.mean() < 1 and ahead.min() < 0
for key, points in {"miou": 6, "boundary_miou": 12}.items():
    assert gain("scenes", "soft mask", "hard mask", key).min() > points
    assert gain("scenes", "hard mask", "no image", key).abs().max() < 1.5

# %% [markdown]
# The image is worth more than 6 points of mIoU and more than 12 at the rims. Plain concatenation collects them:
# soft mask, gate, FiLM and SPADE end within a point and a half of its mIoU, and on average none is ahead by as much
# as half a point. (At the rims the gate is, by less than a point on average, and not with every seed.) The next layer
# can find out by itself what counts where.
#
# And the claim, *a soft mask beats hard concatenation*? Not if hard means *without a mask*: there is no gain. Against a
# *hard mask* it does, by more than 6 points, and more than 12 at the rims. But look where the hard mask ends: within a
# point and a half of the decoder that has *no image*. More on that in a moment.
#
# **On streets:**

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    scores_of("streets", ("no image", "concatenate", "soft mask", "hard mask")),
    ylabel="on unseen streets, %",
    alt="mIoU and boundary IoU on streets of four joins; numbers at the bars.",
)

# %%
assert gain("streets", "concatenate", "no image").min() > 0.2
assert gain("streets", "concatenate", "no image", "boundary_miou").min() > 2
assert gain("streets", "soft mask", "concatenate").abs().max() < 1
assert gain("streets", "soft mask", "hard mask").min() > 1
assert gain("streets", "soft mask", "hard mask", "boundary_miou").min() > 2
assert gain("streets", "hard mask", "no image").max() < 0.5
assert gain("streets", "hard mask", "no image", "boundary_miou").abs().max() < 1

# %% [markdown]
# Similar there, and smaller: the image is worth more than 2 points at the rims and little in mIoU, and soft mask and
# concatenation differ by less than a point of mIoU either way. The hard mask is more than a point of mIoU behind the
# soft one, and more than 2 at the rims. In mIoU it is not ahead of *no image*; at the rims it gains or loses less
# than a point against it: on streets it has not thrown the image away with every seed.
#
# **With `c1` in place of the image?** It comes from the encoder, pretrained, through a 1×1 to the stem's 8
# channels, joined in the same two ways:

# %% tags=["nbval-ignore-output"]
both = ("concatenate", "soft mask")
plotting.show_bars(
    {
        what: evidence.values("scenes", what)
        for what in (*both, *(f"c1: {what}" for what in both))
    },
    ylabel="mIoU on unseen scenes, %",
    alt="mIoU with the image and with c1 as the fine map, both joined in two ways.",
)

# %%
for what in both:
    assert gain("scenes", what, f"c1: {what}").min() > 1
assert gain("scenes", "c1: soft mask", "c1: concatenate").max() < 1

# %% [markdown]
# It is worth less than the image, by more than a point, although the image's stem had to be learned. Do not
# blame the pretraining: this `c1` also has half the resolution, and a 1×1 where the image has two 3×3, and
# the comparison does not separate the three. A mask gains nothing here, either.
#
# **What do the masks open for?** The mean mask by place. The first three bars are those of the mask that has
# *nothing to let in*:


# %% tags=["nbval-ignore-output"]
def by_entry(what, field):
    """Of a field that is a dictionary, the values by seed of each entry."""
    first, *_ = evidence.values("scenes", what, field)
    return {name: evidence.values("scenes", what, field, name) for name in first}


opens = {
    what: by_entry(what, "opens")
    for what in ("no image, soft mask", "soft mask", "hard mask")
}
plotting.show_bars(
    {f"{what}: {k}": v for what, by in opens.items() for k, v in by.items()},
    ylabel="how far the mask opens for the image",
    digits=2,
    alt="The mean mask at outlines, on objects and on background, for three masks.",
)


# %%
def further_open(what):
    """How much further a mask opens for background than for objects, by seed."""
    by = opens[what]
    return torch.tensor(by["background"]) - torch.tensor(by["objects"])


blind, seeing, hard = map(further_open, opens)
assert blind.min() > 0.01 and blind.mean() > 0.05 and hard.min() > 0.1
assert seeing.min() < 0 < seeing.max()

# %% [markdown]
# With no image at all, the soft mask opens further for the background than for objects nevertheless, with every
# seed. That cannot mean *the image is let in there*. It is the other half of the mask that works: there the
# *features are damped*. The hard mask opens for the background, too, and much more; which way the soft one leans
# that has an image depends on the seed. Read every picture of a mask with that in mind, the slider included.
#
# **Does the decision matter?** What fixing the masks costs the trained networks, with the BatchNorm behind them
# recalibrated and as it is:

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        f"{what}, {name}{ending}": values
        for what in ("soft mask", "hard mask")
        for key, ending in {"fixed": "", "fixed_as_is": ", as is"}.items()
        for name, values in by_entry(what, key).items()
    },
    ylabel="mIoU lost with a fixed mask, points",
    alt="What 0 and 1 in place of two masks cost, and for the soft one its mean.",
)

# %%
fixed = {what: by_entry(what, "fixed") for what in ("soft mask", "hard mask")}
assert max(map(abs, fixed["soft mask"]["mean"])) < 1
assert min(fixed["soft mask"]["shut"]) > 8 and min(fixed["soft mask"]["open"]) > 20
assert max(fixed["hard mask"]["shut"]) < 5 and min(fixed["hard mask"]["open"]) > 15
assert max(by_entry("hard mask", "fixed_as_is")["shut"]) < 1.5
assert min(by_entry("soft mask", "fixed_as_is")["shut"]) > 8
soft, hard = (evidence.values("scenes", what, "report", "within") for what in fixed)
assert min(hard) > 4 * max(soft)

# %% [markdown]
# With a soft mask the network needs both sides, and its *decisions* are worth less than a point: its mean does
# as well. The network lives on what comes in, not on how it is weighed.
#
# The hard mask is the lesson of this chapter. It is the liveliest of all, with more than four times the soft one's
# spread (as any mask of 0 and 1 must be that opens on more than a few pixels). Shut it everywhere, so that no pixel
# of any image enters: as it is, less than 1.5 points are gone, and less than 5 with new averages, which make it
# worse; the soft one loses more than 8 both ways. **On scenes it has thrown the image away**, and no picture and no
# report shows it. A likely reason can be read from its definition: a mask of 0 and 1 never lets both sides into
# *one* pixel, so that *a thing* and *its edge* meet nowhere, and the features alone are the better half. A soft
# mask near the middle is a concatenation, a bit fainter.
#
# **Do masks get stuck?** The same soft mask, started from a bias of −8 and of +8:

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    scores_of(
        "scenes",
        ("no image", "starts shut", "soft mask", "starts open", "concatenate"),
    ),
    ylabel="on unseen scenes, %",
    alt="mIoU and boundary IoU by where the mask started, and without a mask.",
)

# %%
shut, opened = (
    evidence.values("scenes", what, "report", "mean")
    for what in ("starts shut", "starts open")
)
assert min(shut) > 0.0025 and max(shut) < 0.05 and min(opened) > 0.9
ahead = gain("scenes", "starts shut", "no image").sort().values
behind = gain("scenes", "concatenate", "starts shut").sort().values
assert ahead[0] < 1 and behind[0] < 1 and min(ahead[1], behind[1]) > 2
scores = evidence.values("scenes", "starts shut")
assert torch.equal(torch.tensor(scores).argsort(), torch.tensor(shut).argsort())
assert gain("scenes", "soft mask", "starts open").min() > 15
by = {k: torch.tensor(v) for k, v in by_entry("starts shut", "opens").items()}
assert (by["outlines"] / by["background"]).min() > 2
assert (by["objects"] / by["background"]).min() > 1.2

# %% [markdown]
# After 300 steps both are still near the end where they started; the shut masks have means between 0.0025 and 0.05,
# where they began at 0.0003. The mask that starts *open* leaves less than a tenth of the features on average, and
# more than 15 points of mIoU are gone. To start *shut* is a lottery: one seed ends level with concatenation,
# one with no image at all, one between. All three have means below 0.05, and rank as their means do. Nearly
# shut is not shut: the layers behind can amplify what little enters.
#
# And, by the way: where the features come in almost whole whatever the mask says, what it changes is mostly the
# image. This one opens more than twice as far at outlines as on background, but inside objects it opens farther than
# on background, too: *thing or no thing* again.
#
# ## Limits
#
# - The mask is made from `c3` to `c5`, so it varies over eight pixels and more; it can say *around here*, and
#   not *this pixel*. A mask from the concatenation would see finer, and is a gate (chapter 04).
# - A ReLU after the concatenation can shut the image out, too: the features only have to push its input
#   below zero. So the mask adds a shortcut and little ability. A decoder without such a ReLU may need it more.
# - The stem is shallow on purpose, and trained from scratch on 400 scenes or 266 streets.
# - Gate, FiLM, SPADE, `c1`, the starts, fixed masks and what masks open for were measured on scenes only.
# - Temperatures, annealed from soft to hard, and noise (Gumbel) are the next things to try for hard masks;
#   here is only the plain straight-through gradient.
#
# ## Exercises


# %% [markdown]
# **Exercise 1.** Repair `FirstAttempt` as a function: weigh, bring to one size, concatenate. The score is
# given, `[B, 1, h, w]`, before the sigmoid.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Answers that the check knows", "code_prompt_hide": "Answers that the check knows"}
def plausible_joins(score, c4, image):
    """Yield (left, right, what to say): right answers and likely wrong ones."""

    def grown(x, mode="bilinear"):
        return F.interpolate(x, size=image.shape[-2:], mode=mode)

    large, coarse, raw = grown(c4), grown(c4, "nearest"), grown(score)
    n = grown(score, "nearest").sigmoid()
    blocks = "Blocks, for nearest repeats its values: mode='bilinear', for both."
    channel = "Keep the mask's channel: [B, 1, H, W]."
    for m in (raw.sigmoid(), grown(score.sigmoid())):  # enlarged first or later
        rest = 1 - m
        yield rest * large, m * image, "Right, and for a batch of three, too."
        yield large, image, "Everything enters whole: multiply by 1 − m and by m."
        yield large, m * image, "The features enter whole: they get 1 − m."
        yield rest * large, image, "The image enters whole: it gets m."
        yield m * large, m * image, "Both get m: the features get 1 − m."
        yield m * large, rest * image, "The wrong way round: the image gets m."
        yield m * image, rest * large, "The wrong order: the features come first."
        yield (1 - raw) * large, raw * image, "A score is no share: .sigmoid()."
        yield rest * large, m[:, 0] * image, channel
        yield (1 - n) * large, n * image, blocks
        yield rest * coarse, m * image, blocks
        yield (1 - n) * coarse, n * image, blocks


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_join(answer):
    torch.manual_seed(0)
    score, c4 = 3 * torch.randn(3, 1, 3, 4), torch.rand(3, 5, 3, 4)
    image = torch.rand(3, 3, 45, 60)
    try:
        joined = answer(score, c4, image)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        text = str(error).splitlines()[0]
        if "(3)" in text and "(5)" in text:
            return print(f"{text}. Keep the mask's channel: [B, 1, H, W].")
        return print(f"{text}. Bring mask and features to the image's size.")
    if joined is None:
        return print("Nothing returned yet: return features and image, weighed.")
    if not isinstance(joined, torch.Tensor):
        return print(f"That is a {type(joined).__name__}: concatenate, torch.cat.")
    if list(joined.shape) != [3, 8, 45, 60]:
        found = list(joined.shape)
        return print(f"Expected [3, 8, 45, 60], features first; yours is {found}.")
    for left, right, says in plausible_joins(score, c4, image):
        both = torch.cat([left, right], dim=1)
        if torch.allclose(joined.float(), both, atol=1e-4):
            return print(says)
    print("Not yet (1 − m) · features and m · image: enlarge, weigh by pixel.")


# %%
def join_by_mask(score, c4, image):
    """Return (1 − m) · c4 and m · image, [B, C + 3, H, W]."""


check_join(join_by_mask)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def join_by_mask_solution(score, c4, image):
    score, c4 = (
        F.interpolate(x, size=image.shape[-2:], mode="bilinear")
        for x in (score, c4)
    )
    m = score.sigmoid()
    return torch.cat([(1 - m) * c4, m * image], dim=1)


check_join(join_by_mask_solution)

# %% [markdown]
# **Exercise 2.** Sometimes two sources are not enough. Make a *hard choice* among K: from scores
# `[B, K, h, w]` return weights of the same shape, 1 for the largest and 0 for the others at each position,
# with the gradient of the softmax.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_choice(answer):
    torch.manual_seed(0)
    scores = torch.randn(2, 4, 3, 5, requires_grad=True)
    chosen = answer(scores)
    if chosen is None:
        return print("Nothing returned yet: return the weights.")
    if not isinstance(chosen, torch.Tensor):
        return print(f"That is a {type(chosen).__name__}: return the weights only.")
    if chosen.shape != scores.shape:
        found = list(chosen.shape)
        return print(
            f"Expected one weight for each score, [2, 4, 3, 5], got {found}."
        )
    if not chosen.is_floating_point():
        return print("Weights are floating point: .to(scores.dtype).")
    wanted = F.one_hot(scores.argmax(1), 4).movedim(-1, 1).float()
    chosen = chosen.float()
    if not torch.allclose(chosen, wanted, atol=1e-5):
        soft = torch.allclose(chosen, scores.softmax(1))
        cure = "make them hard" if soft else "1 for the largest, 0 for the others"
        return print(f"The values are not right yet: {cure}.")
    if not chosen.requires_grad:
        return print(
            "The values are right, and nothing can learn: add s − s.detach()."
        )
    pull = torch.randn(2, 4, 3, 5)
    (arrived,) = torch.autograd.grad(
        (chosen * pull).sum(), scores, allow_unused=True
    )
    if arrived is None:
        return print("A gradient, but not to the scores: s is *their* softmax.")
    (expected,) = torch.autograd.grad((scores.softmax(1) * pull).sum(), scores)
    if not torch.allclose(arrived, expected, atol=1e-5):
        return print("A gradient arrives, but not the one of softmax over dim 1.")
    print("Right: hard on the way forward, soft on the way back.")


# %%
def hard_choice(scores):
    """Return 1 for the largest of K scores at each position, else 0."""


check_choice(hard_choice)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def hard_choice_solution(scores):
    soft = scores.softmax(1)
    largest = F.one_hot(scores.argmax(1), scores.shape[1]).movedim(-1, 1)
    return largest.to(soft.dtype) + (soft - soft.detach())


check_choice(hard_choice_solution)

# %% [markdown]
# **Exercise 3.** Write the watchman: from masks `[B, 1, H, W]` return `"shut"` where their mean is below 0.05,
# else `"open"` where it is above 0.95, else `"constant"` where the pixels *of one image* are treated alike (a
# spread below 0.02), else `"alive"`. Shut and open mean *nearly*: a hard mask that opens on 3 % of the pixels
# counts as shut, too.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_watchman(answer):
    torch.manual_seed(0)
    noise = 0.01 * torch.rand(4, 1, 16, 16)
    ramp = torch.linspace(0, 1, 16).expand(4, 1, 16, 16)
    by_image = torch.tensor([0.2, 0.4, 0.6, 0.8]).view(4, 1, 1, 1)
    hard = torch.arange(256).view(16, 16).expand(4, 1, 16, 16) < 8
    each = "0.2 in one image, 0.8 in another, flat in each"
    nearly = torch.where(ramp > 0.95, 0.85, 0.99)  # spread, and yet open
    cases = [
        ("shut", noise, "almost 0 everywhere"),
        ("open", 1 - noise, "almost 1 everywhere"),
        ("constant", 0.5 + noise, "about a half everywhere"),
        ("alive", ramp, "from 0 at the left to 1 at the right"),
        (
            "alive",
            (ramp > 0.9).float(),
            "hard, and open on an eighth of the pixels",
        ),
        ("shut", hard.float(), "hard, and open on 3 % of the pixels"),
        ("open", nearly, "0.99, and 0.85 at the right edge"),
        ("constant", by_image + noise, each),
        ("alive", ramp.mT, "from 0 at the top to 1 at the bottom"),
        ("alive", 0.4 + 0.2 * ramp, "from 0.4 to 0.6, a spread of 0.06"),
        ("constant", 0.5 + 0.05 * ramp, "from 0.50 to 0.55, a spread of 0.015"),
        (
            "alive",
            torch.cat([0.5 + 0 * ramp[:1], ramp[1:]]),
            "flat in the first image only",
        ),
        ("alive", 0.12 * ramp, "from 0 to 0.12, a mean of 0.06"),
        ("alive", 1 - 0.12 * ramp, "from 1 to 0.88, a mean of 0.94"),
    ]
    for right, masks, looks in cases:
        word = answer(masks)
        if word is None:
            return print("Nothing returned yet: return one of the four words.")
        if not isinstance(word, str):
            return print(f"That is a {type(word).__name__}: return a word.")
        if word != right:
            return print(
                f"A mask that is {looks}: you say {word!r}, it is {right!r}."
            )
    print("Right. Call it after the first epoch; and before you trust an")
    print("'alive', fix the mask.")


# %%
def watchman(masks):
    """Return "shut", "open", "constant" or "alive"."""


check_watchman(watchman)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def watchman_solution(masks):
    report = mask_report(masks)
    if report.mean < 0.05:
        return "shut"
    if report.mean > 0.95:
        return "open"
    return "constant" if report.within < 0.02 else "alive"


check_watchman(watchman_solution)

# %% [markdown]
# The watchman only looks. It would call two measured masks alive, the soft one, whose mean does as well, and the
# hard one, which has thrown the image away; and *shut* the one that started there, though one of its
# three networks makes full use of the image. What a mask decides, only fixing it proves.

# %% [markdown]
# ## Recap
#
# - Bring mask and features to the fine map's size; keep the mask's channel, `[B, 1, H, W]`.
# - A threshold gives no gradient. `hard + (m - m.detach())` does.
# - Start the mask in the middle. (And bring both sides to one scale before it: advice, not measured.)
# - Mean and spread within an image make you suspicious. Only fixing the mask is proof: at its mean, shut, open.
#   The liveliest mask here had thrown the image away.
# - A picture of a mask shows where features are damped as much as where the image is let in.
# - FiLM and SPADE are the same idea with more numbers. Start with plain concatenation: on average none of them is
#   ahead of it here by as much as half a point.
#
# | shape contract | |
# |---|---|
# | `Concat`, `SoftConcat`, `HardConcat` | `[B, C, h, w]` and `[B, F, H, W]` → `[B, C + F, H, W]` |
# | their `mask` | `[B, 1, H, W]`, 0…1 |
# | `FiLM`, `SPADE` | `[B, C, h, w]` and `[B, F, H, W]` → `[B, F, H, W]` |
# | `CoarseFeatures` | a `Pyramid` → `[B, C, ⌈H/8⌉, ⌈W/8⌉]` |
# | `ImageStem` | `[B, 3, H, W]` → `[B, F, H, W]` |
# | `ConditionalDecoder` | a `Pyramid` and the image → `[B, out_channels, H, W]` |
#
# In your own project:
#
# ```python
# from helpers.bridges.conditional_concat import Concat, ConditionalDecoder, mask_report
# from helpers.encoder import ResNet18Encoder, Segmenter, normalize
# from helpers.training import fit
#
# encoder = ResNet18Encoder()
# decoder = ConditionalDecoder(encoder.out_channels, out_channels=7, join=Concat)
# model = Segmenter(encoder, decoder)
# history = fit(model, train, epochs=20)  # pairs of image [3, H, W] and mask [H, W]
#
# # with a mask, join=SoftConcat: look at it, then fix it
# model.cpu().eval()  # fit may have taken it to a GPU
# features = decoder.coarse(encoder(normalize(images)))
# print(mask_report(decoder.join.mask(features, images.shape[-2:])))
# ```
