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
# # 04 · Which positions matter?
#
# A feature map has many positions, and for any one question most of them are beside the point.
# Averaging treats them all alike; a linear layer after a flatten fixes one weight for each place, for
# every image. *Attention* computes the weights anew for each image. It also comes with more ways to
# go wrong without an error message than any other bridge, and with heat maps that are easy to
# believe. Build it, then check it.

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
# - self-attention as it is often posted: one error that PyTorch reports, and two that it does not;
# - three kinds of attention: a gate, positions that look at each other, queries that look at positions;
# - what a positional encoding is worth, on a task that asks *where*;
# - what attention costs, counted, and how to keep the (H·W)² out of memory;
# - one learned query per class, trained while you wait, once to find things, once to draw masks;
# - whether a query looks where its heat map says, against chance, and by covering the place up;
# - whether all that helps most in crowded scenes, and what it is worth on streets.

# %%
import skimage.data
import torch
import torch.nn.functional as F
from torch import nn

from helpers import plotting, records, scenes
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.errors import explaining
from helpers.inspection import count_macs, pyramid_levels, shapes
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import budget, evaluate, fit, minimise

# %% [markdown]
# ## The problem as a picture
#
# Take one position of `c4`, a vector of 256 numbers, and ask all the others how much they resemble it.
# A softmax turns the answers into weights that sum to 1. Nothing has been trained for this question:


# %%
def resembling(map_, row, column):
    """How much each position of a map [C, h, w] is like one of them, [h, w]."""
    tokens = F.normalize(map_.flatten(1), dim=0)  # [C, h·w], each of length 1
    asked = tokens[:, row * map_.shape[2] + column]
    return (5 * asked @ tokens).softmax(0).view(map_.shape[1:])


encoder = ResNet18Encoder()
photo = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None] / 255
c4 = encoder(normalize(photo)).c4[0]
asked = {"an eye": (7, 11), "the stripes": (2, 14), "the background": (3, 27)}
plotting.show_heatmaps(
    photo[0],
    [resembling(c4, *place) for place in asked.values()],
    titles=[f"like {name}?" for name in asked],
    alt="A cat, three times: warm at the eyes, on stripes, on the background.",
)

# %% [markdown]
# (Photograph of Chelsea: Stéfan van der Walt, from scikit-image.) Three questions, three sets of
# positions that matter. An average over the map would give all of them
# the same answer. Weighing positions by how well they fit a question is all that attention does; what
# remains is to *learn* the questions, and what counts as fitting.
#
# ## The shapes
#
# Attention does not know maps. It works on **tokens**: a list of vectors `[B, N, C]`, one for each
# position, N = h·w. Two steps lead there, and they must be these two: `flatten(2)` lines the positions
# up, `transpose(1, 2)` puts the channels last.

# %%
c5 = encoder(normalize(torch.rand(2, 3, 224, 224))).c5
tokens = c5.flatten(2).transpose(1, 2)
print("map   ", list(c5.shape), "     B, C, h, w")
print("tokens", list(tokens.shape), "       B, h·w, C")
print(
    "scores", list((tokens @ tokens.transpose(1, 2)).shape), "        B, h·w, h·w"
)

# %% [markdown]
# The last line is where the price comes from: each position has a score for every other one.
#
# ## The obvious attempt, and what it does wrong
#
# Self-attention over the 7 × 7 = 49 positions of `c5`, then flatten, then a linear layer. This is how it
# is often posted:


# %%
class FirstAttempt(nn.Module):
    """Self-attention over the 49 positions of c5, flattened to a vector."""

    def __init__(self, out_features):
        super().__init__()
        self.attention = nn.MultiheadAttention(512, num_heads=8)
        self.linear = nn.Linear(49 * 512, out_features)

    def forward(self, c5):
        tokens = c5.flatten(2).permute(2, 0, 1)  # [49, B, 512]
        found, _ = self.attention(tokens, tokens, tokens)
        return self.linear(found.transpose(0, 1).view(len(c5), -1))


torch.manual_seed(0)
attempt = FirstAttempt(10).eval()

# %% tags=["raises-exception"]
with explaining():
    attempt(c5)

# %% [markdown]
# `view` renames dimensions and moves nothing, but after the `transpose` the numbers lie in another order
# than the new name asks for. `reshape` copies them where it must, and cures the error. (The linear layer
# still fits one image size only, chapters 02 and 03, and nothing told the positions where they are: that
# comes below.)
#
# That was the error you are told about. The same slip where the tokens are *made*, `view` in place of
# flatten and transpose, raises nothing. To see it, let each value say where it lies: position 0 to 48.

# %%
place = torch.arange(49).view(1, 1, 7, 7).expand(2, 512, 7, 7).contiguous()
right = place.flatten(2).transpose(1, 2)
wrong = place.view(2, 49, 512)
print("positions mixed in one token, right:", len(right[0, 3].unique()))
print("positions mixed in one token, wrong:", len(wrong[0, 3].unique()))
assert right.shape == wrong.shape

# %% [markdown]
# Same shape, no complaint, and every token is a stew of all the positions and a few channels.
#
# The second silent one: `nn.MultiheadAttention` expects `[N, B, C]` unless you say `batch_first=True`.
# Hand it `[B, N, C]` and it takes the images for positions. Then image 0 attends to image 1. Change
# image 1 and see whether the output of image 0 moves:

# %%
torch.manual_seed(0)
changed = tokens.clone()
changed[1] = torch.rand(49, 512)
moved = {}
for batch_first in (False, True):
    layer = nn.MultiheadAttention(512, num_heads=8, batch_first=batch_first).eval()
    before, after = (layer(x, x, x)[0][0] for x in (tokens, changed))
    moved[batch_first] = not torch.allclose(before, after, atol=1e-6)
    print(
        f"batch_first={batch_first!s:5} image 0 moves with image 1:",
        moved[batch_first],
    )

# %%
assert moved == {False: True, True: False}

# %% [markdown]
# And when an image comes alone, each of its positions attends to nothing but itself. The test is worth a
# line in your own project: in evaluation mode, change one image, and only its own output may change.
#
# ## The technique
#
# ### A gate: one weight for each position
#
# The smallest attention: a 1×1 convolution to a single channel, a sigmoid, a multiplication.

# %% tags=["export"]
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.encoder import Pyramid, check_map, check_pyramid


# %% tags=["export"]
class SpatialGate(nn.Module):
    """Weigh each position of a map by one number between 0 and 1.

    `forward(x)` takes `[B, in_channels, h, w]` and returns the same shape;
    `gate(x)` are the weights, `[B, 1, h, w]`. Raises `ValueError` for maps of other
    channels or ranks, `TypeError` for integers.

    Source: the spatial half of Woo et al., CBAM, ECCV 2018, without its pooling.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.conv = nn.Conv2d(in_channels, 1, kernel_size=1)

    def gate(self, x: Tensor) -> Tensor:
        check_map("x", x, self.in_channels)
        return self.conv(x).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


# %%
gate = SpatialGate(512)
print(list(c5.shape), "→", list(shapes(gate, c5)))
nn.init.zeros_(gate.conv.weight), nn.init.zeros_(gate.conv.bias)
assert torch.equal(gate(c5), c5 / 2), "sigmoid(0) is a half, everywhere"

# %% [markdown]
# A gate looks at each position by itself. It can mute what is never of use, but it cannot compare: "the
# largest", "the other one like this" are beyond it. And it starts at one half, so it first of all halves
# the map.
#
# ### Attention, written out
#
# A **query** is compared with the **key** of each position, by a dot product. A softmax turns the scores
# into weights, and the answer is the weighted mean of the positions' **values**. That is one line:
# softmax(QKᵀ/√d)·V.


# %%
def attend(query, key, value):
    """Values [.., N, D] mixed for each query [.., M, D], by likeness to keys."""
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ value  # [.., M, N] @ [.., N, D] → [.., M, D]


torch.manual_seed(0)
q, k, v = torch.randn(2, 5, 64), torch.randn(2, 49, 64), torch.randn(2, 49, 64)
assert torch.allclose(
    attend(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6
)
print("5 queries, 49 positions:", list(attend(q, k, v).shape))

# %% [markdown]
# Without the √d, scores of long vectors get so large that the softmax puts nearly all weight on one
# position, and hardly any gradient is left.
# `F.scaled_dot_product_attention` computes the same; why to prefer it, you will see below.
#
# ### Where am I? Positional encoding
#
# In that formula nothing says where a position *is*. Shuffle them, and each query gets the answer it got before.
# So the place has to be written into the vectors: sines and cosines of the row in one half of the
# channels, of the column in the other, from a wavelength of 6 positions up to one of 600.

# %% tags=["export"]
SLOWEST = 0.01  # radians a position; the fastest wave has 1


def waves(channels: int, length: int, device: torch.device) -> Tensor:
    """Return sines, then cosines, of positions 0, 1, …: `[channels, length]`."""
    steps = torch.arange(length, device=device, dtype=torch.float32)
    speeds = SLOWEST ** torch.linspace(0, 1, channels // 2, device=device)
    angles = speeds[:, None] * steps
    return torch.cat([angles.sin(), angles.cos()])


class PositionalEncoding2d(nn.Module):
    """Add to each position of a map what says where it is: waves, nothing learned.

    `forward(x)` takes `[B, channels, h, w]`, any h, w, and returns the same shape.
    The first half of the channels gets the row, the second half the column, values
    in −1…1. Raises `ValueError` for channels that 4 does not divide, for other
    channels or ranks, `TypeError` for integers.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017; in two
    dimensions as in Carion et al., DETR, ECCV 2020.
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels % 4:
            raise ValueError(
                f"Expected channels that 4 divides, got {channels}: row and column "
                "take sines and cosines each. Project the map first."
            )
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.channels)
        h, w = x.shape[-2:]
        rows = waves(self.channels // 2, h, x.device)[:, :, None].expand(-1, h, w)
        columns = waves(self.channels // 2, w, x.device)[:, None].expand(-1, h, w)
        return x + torch.cat([rows, columns]).to(x.dtype)


# %%
position = PositionalEncoding2d(64)
code = position(torch.zeros(1, 64, 15, 20))[0]
chosen = {"row, fast": 1, "row, slow": 7, "column, fast": 33, "column, slow": 39}
plotting.show_images(
    [(code[c] + 1) / 2 for c in chosen.values()],
    titles=list(chosen),
    alt="Four channels: stripes across, then stripes along, ever wider.",
)

# %% [markdown]
# Nothing in it depends on the size of the map, so nothing has to be built anew for another size.
#
# ### Self-attention: positions look at each other
#
# Every position is a query, a key and a value at once, each made by a linear layer. Several **heads** do
# it side by side, each on its share of the channels, so that a position can look at several things. What
# it finds is *added* to what it was: a layer that has not learned yet does little harm.


# %% tags=["export"]
class SelfAttention(nn.Module):
    """Each position of a map looks at all others, and adds what it finds.

    `forward(x)` takes `[B, channels, h, w]`, any h, w, and returns the same shape.
    Positions have no order here: put a `PositionalEncoding2d` before it where place
    matters. Work grows with (h·w)². Raises `ValueError` for channels that `heads`
    does not divide, for other channels or ranks, `TypeError` for integers.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017.
    """

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"Expected channels that {heads} heads divide, got {channels}. "
                "Choose another number of heads."
            )
        self.channels, self.heads = channels, heads
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.channels)
        tokens = x.flatten(2).transpose(1, 2)  # [B, h·w, C]
        qkv = self.to_qkv(self.norm(tokens)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, h·w, C / heads]
        found = F.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.out(found.transpose(1, 2).flatten(2))
        return tokens.transpose(1, 2).unflatten(2, x.shape[-2:])


# %%
torch.manual_seed(0)
looking = SelfAttention(512)
placed = nn.Sequential(PositionalEncoding2d(512), looking)
for size in [(224, 224), (180, 240), (33, 97)]:
    c5 = encoder(normalize(torch.rand(2, 3, *size))).c5
    print(list(c5.shape), "→", list(shapes(looking, c5)))

# %% [markdown]
# Does it know places? Turn the map upside down. If the output is only turned, too, the layer is blind to
# order: what was above is now below, and nobody noticed.

# %%
for name, layer in {"without encoding": looking, "with": placed}.items():
    turned = torch.allclose(layer(c5.flip(2)), layer(c5).flip(2), atol=1e-5)
    print(f"{name:16} upside down in, the same upside down out: {turned}")
    assert turned == (layer is looking)

# %% [markdown]
# ### Queries: the decoder asks, the encoder's positions answer
#
# The queries need not come from the map. In **cross-attention** they are the decoder's own input, and the
# encoder's positions are keys and values. Here the input is a table of learned vectors, one per class.
# PyTorch brings the layer; `batch_first=True` is not the default there, either.


# %% tags=["export"]
class QueryReader(nn.Module):
    """Learned queries; each gathers from all positions of a map what it needs.

    `forward(x)` takes `[B, in_channels, h, w]`, any h, w, and returns one vector
    for each query, `[B, queries, width]`. Raises `ValueError` for a `width` that 4
    or `heads` does not divide, other channels or ranks, `TypeError` for integers.

    Source: the decoder of Carion et al., DETR, ECCV 2020, with a single layer.
    """

    def __init__(
        self, in_channels: int, queries: int, width: int = 64, heads: int = 4
    ):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"Expected a width that {heads} heads divide, got {width}. "
                "Choose another number of heads."
            )
        self.in_channels, self.width = in_channels, width
        self.project = nn.Conv2d(in_channels, width, 1)
        self.position = PositionalEncoding2d(width)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(queries, width))
        layer = nn.TransformerDecoderLayer(
            width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, 1, norm=nn.LayerNorm(width))

    def tokens(self, x: Tensor) -> Tensor:
        check_map("x", x, self.in_channels)
        x = self.position(self.project(x))
        return self.norm(x.flatten(2).transpose(1, 2))  # [B, h·w, width]

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(x.shape[0], -1, -1)
        return self.layers(queries, self.tokens(x))


# %%
torch.manual_seed(0)
reader = QueryReader(256, queries=6)
for size in [(128, 128), (180, 240)]:
    c4 = encoder(normalize(torch.rand(2, 3, *size))).c4
    print(list(c4.shape), "→", list(shapes(reader, c4)))

# %% [markdown]
# For a fair comparison there has to be the same thing *without* attention. In `AveragingReader` every
# position counts alike: its queries get the mean. Layers, parameters and starting values stay.


# %% tags=["export"]
class AveragingReader(QueryReader):
    """As `QueryReader`, but every position counts alike: its queries get the mean.

    Takes, returns and raises what `QueryReader` does. Built for comparisons.
    """

    def tokens(self, x: Tensor) -> Tensor:
        tokens = super().tokens(x)
        return tokens.mean(1, keepdim=True).expand_as(tokens)


# %% tags=["export"]
@torch.no_grad()
def attention_maps(reader: QueryReader, x: Tensor) -> Tensor:
    """Return where each query of a reader looks in `x`, `[B, queries, h, w]`.

    `x` is `[B, in_channels, h, w]`. Weights are ≥ 0, sum to 1 over the positions
    and are means over the heads. Raises what `reader` does.
    """
    asked: list[tuple[Tensor, ...]] = []
    attention = reader.layers.layers[-1].multihead_attn
    handle = attention.register_forward_pre_hook(
        lambda _, given: asked.append(given)
    )
    try:
        reader(x)
    finally:
        handle.remove()
    _, weights = attention(*asked.pop(), need_weights=True)
    return weights.unflatten(2, x.shape[-2:])


# %%
looks = attention_maps(reader, c4)
print("one map for each image and query:", list(looks.shape))
assert torch.allclose(looks.sum((2, 3)), torch.ones(2, 6))

# %% [markdown]
# ### From queries to masks
#
# A vector per class is not a mask. The step to one is short: give each *pixel* a vector of the same
# width, too, and let a pixel belong to a class as far as the two agree: a dot product. (This is
# MaskFormer's idea. Its queries are not tied to classes and must be matched to the objects; one query per
# class needs no matching.) The pixels' vectors come from `c2` to `c5`, each projected, enlarged to `c2`'s
# grid and added up:


# %% tags=["export"]
class PixelEmbedding(nn.Module):
    """One vector for each position of c2's grid, from c2 to c5.

    `forward(pyramid)` takes the encoder's five maps, from images of any H, W ≥ 32,
    and returns `[B, width, ⌈H/4⌉, ⌈W/4⌉]`. Raises `ValueError` for maps with other
    channels than `in_channels`, `TypeError` for integers.
    """

    def __init__(self, in_channels: Sequence[int], width: int = 64):
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.project = nn.ModuleList(
            nn.Conv2d(c, width, 1, bias=False) for c in self.in_channels[1:]
        )
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        size = pyramid.c2.shape[-2:]
        maps = [p(map_) for p, map_ in zip(self.project, pyramid[1:], strict=True)]
        x = sum(F.interpolate(map_, size=size, mode="bilinear") for map_ in maps)
        return self.conv(self.relu(self.norm(x)))


# %% tags=["export"]
class QueryDecoder(nn.Module):
    """A learned query per class reads c4; its agreement with a pixel is the logit.

    `forward(pyramid)` takes the encoder's five maps, from images of any H, W ≥ 32,
    and returns `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]`; `Segmenter` brings it to H × W.
    `reader` is `QueryReader` or `AveragingReader`. Raises `ValueError` for a width
    that 4 does not divide and for maps of other channels than `in_channels`,
    `TypeError` for integers.

    Source: Cheng et al., MaskFormer, NeurIPS 2021, with a query for each class.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        width: int = 64,
        reader: type[QueryReader] = QueryReader,
    ):
        super().__init__()
        self.pixels = PixelEmbedding(in_channels, width)
        self.reader = reader(in_channels[3], out_channels, width)
        self.head = nn.Linear(width, width)

    def forward(self, pyramid: Pyramid) -> Tensor:
        pixels = self.pixels(pyramid)  # [B, width, h, w]
        classes = self.head(self.reader(pyramid.c4))  # [B, out_channels, width]
        logits = torch.einsum("bkd,bdhw->bkhw", classes, pixels)
        return logits / pixels.shape[1] ** 0.5


# %%
torch.manual_seed(0)
model = Segmenter(encoder, QueryDecoder(encoder.out_channels, out_channels=7))
for height, width in [(128, 128), (180, 240), (33, 97)]:
    logits = model(normalize(torch.rand(2, 3, height, width)))
    print(f"{height} × {width} → {list(logits.shape)}")

# %% [markdown]
# Take the attention away, let the classes' vectors be the same for all images, and what is left is a 1×1
# convolution over the pixels' vectors: an ordinary segmentation head. So the question for the
# measurement is exact: what is it worth that the head's weights *look at the image* first?

# %% [markdown]
# ### What it costs
#
# One number for each pair of positions: the matrix of weights has (h·w)² entries, for each head and each
# image. Twice the side, sixteen times the matrix. For one head and one image of 224 × 224, in float32:

# %%
for level in pyramid_levels(224, 224)[::-1]:
    positions = level.height * level.width
    megabytes = 4 * positions**2 / 1e6
    print(
        f"{level.name}: {positions:6,} positions, {megabytes:8,.2f} MB of weights"
    )

# %% [markdown]
# On `c5` that is nothing. With 8 heads and 32 images, `c2` asks for 10 GB and `c1` for 160. But the matrix
# need not exist all at once: `F.scaled_dot_product_attention` works through it piece by piece, where it has
# a kernel for that (on CPUs and most GPUs it has). Count what each of the two ways keeps for the backward
# pass, at the sides of `c5`, `c4`, `c3` and `c2`:


# %%
def kept_for_backward(attention, side):
    """Megabytes that the backward pass needs, with side × side positions."""
    q, k, v = (torch.randn(1, 1, side**2, 64, requires_grad=True) for _ in "qkv")
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = attention(q, k, v)  # noqa: F841, it holds what is kept
    return sum(kept.values()) / 1e6


ways = {"written out": attend, "in one call": F.scaled_dot_product_attention}
sides = (7, 14, 28, 56)
memory = {
    name: [kept_for_backward(way, side) for side in sides]
    for name, way in ways.items()
}

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    memory,
    xlabel="positions of the map",
    ylabel="MB kept for the backward pass",
    x=[f"{side} × {side}" for side in sides],
    log=True,
    alt="Written out, memory rises ever faster, at last fourteenfold a step; in "
    "one call, fourfold.",
)

# %%
written, fused = memory.values()
assert written[3] / written[2] > 12 and fused[3] / fused[2] < 6
maps = [torch.rand(1, 64, side, side) for side in (28, 56)]
work = [count_macs(SelfAttention(64), x) for x in maps]
print(f"Twice the side: {work[1] / work[0]:.1f} times the MACs.")

# %% [markdown]
# The memory is cured, the work is not: it still grows nearly sixteenfold. So attend where the map is
# coarse, `c5` or `c4`, and leave the fine maps to convolutions. That is what `QueryDecoder` does.
#
# ## Train it
#
# First a task in which everything has to pass through the queries. One query per shape reads `c4` and
# answers two questions: is your shape in the scene, and where is the middle of its pixels?


# %% tags=["export"]
class Finder(nn.Module):
    """Two answers for each query of a reader: is its class there, and where?

    `forward(x)` takes what `reader` takes, `[B, in_channels, h, w]`, and returns
    `[B, queries, 3]`: a logit for *it is there*, then x and y of its middle, 0…1
    from the left and upper edge. Raises what `reader` does.
    """

    def __init__(self, reader: QueryReader):
        super().__init__()
        self.reader = reader
        self.answer = nn.Linear(reader.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.answer(self.reader(x))
        return torch.cat([answer[..., :1], answer[..., 1:].sigmoid()], dim=2)


# %% [markdown]
# What it should answer comes from the mask, and the loss is the sum of the two mistakes. A shape that is
# not there has no middle, so nothing is asked about it.


# %% tags=["export"]
def presence_and_middle(masks: Tensor, num_classes: int) -> Tensor:
    """Return what a `Finder` should answer, `[B, num_classes − 1, 3]`.

    `masks` are class indices `[B, H, W]`; class 0, the background, is left out. For
    *it is there* 1 or 0, then x and y, 0…1, of its pixels' mean (0 where absent).
    """
    pixels = F.one_hot(masks, num_classes)[..., 1:].movedim(-1, 1).float()
    count = pixels.sum((2, 3))
    middles = []
    for dim in (2, 3):  # summed over rows: by x; over columns: by y
        line = pixels.sum(dim)  # [B, classes, W] or [B, classes, H]
        steps = torch.arange(line.shape[2], device=masks.device) + 0.5
        middles.append(line @ (steps / line.shape[2]) / count.clamp(min=1))
    return torch.stack([(count > 0).float(), *middles], dim=2)


def finder_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of *it is there*, and 3 times the distance where it is.

    Both `[B, queries, 3]`, from a `Finder` and from `presence_and_middle`.
    """
    there = F.binary_cross_entropy_with_logits(predicted[..., 0], truth[..., 0])
    off = (predicted[..., 1:] - truth[..., 1:]).abs().sum(2) * truth[..., 0]
    return there + 3 * off.sum() / truth[..., 0].sum().clamp(min=1)


# %%
_, mask = scenes.batch([5_003])
answers = presence_and_middle(mask, num_classes=7)[0]
for name, (there, x, y) in zip(scenes.SHAPES, answers.tolist(), strict=True):
    print(f"{name:9}", f"at {128 * x:3.0f}, {128 * y:3.0f}" if there else "–")
print("a finder says", shapes(Finder(QueryReader(256, queries=6)), c4))

# %% [markdown]
# The encoder is frozen, so `c4` is computed once. Two readers learn: one that attends, one that averages.

# %%
count, epochs = 400, 14
images, masks = (
    torch.cat([part, part.flip(-1)])  # and their mirror images
    for part in scenes.batch(range(count))
)
unseen, unseen_masks = scenes.batch(range(5_000, 5_100))
with torch.no_grad():
    c4, unseen_c4 = (
        torch.cat([encoder(normalize(part)).c4 for part in each.split(50)])
        for each in (images, unseen)
    )
truth = presence_and_middle(masks, 7)
unseen_truth = presence_and_middle(unseen_masks, 7)


def train_finder(reader, after_epoch=None):
    """A finder that learned on c4: the finder and its loss after each epoch."""
    finder = Finder(reader)
    losses = minimise(
        finder,
        lambda chosen, epoch: finder_loss(finder(c4[chosen]), truth[chosen]),
        len(c4),
        epochs=epochs,
        batch_size=32,
        after_epoch=after_epoch,
    )
    return finder, losses


# %%
shown, watched = 12, []  # a scene, and what the queries look at in it


def make_reader(kind):
    torch.manual_seed(0)
    return kind(256, queries=6)


def watch(epoch):
    watched.append(attention_maps(attending, unseen_c4[shown : shown + 1])[0])


attending = make_reader(QueryReader)
watch(0)
finders = {
    "attending": train_finder(attending, watch),
    "averaging": train_finder(make_reader(AveragingReader)),
}

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    {name: losses for name, (_, losses) in finders.items()},
    xlabel="epoch",
    ylabel="loss",
    alt="The loss of the attending finder falls lowest.",
)


# %% tags=["nbval-ignore-output"]
@torch.no_grad()
def off_by(finder):
    """Mean distance in pixels of predicted and true middles, on unseen scenes."""
    predicted = finder(unseen_c4)[..., 1:]
    distance = 128 * (predicted - unseen_truth[..., 1:]).norm(dim=2)
    return distance[unseen_truth[..., 0] > 0].mean().item()


off = {name: off_by(finder) for name, (finder, _) in finders.items()}
for name, pixels in off.items():
    print(f"{name:13} off by {pixels:.0f} pixels")

# %%
learned = {name: losses[-1] / losses[0] for name, (_, losses) in finders.items()}
assert learned["attending"] < 0.5 and learned["averaging"] > 0.7
assert off["attending"] < 0.85 * off["averaging"]

# %% [markdown]
# The finder that averages hardly learns: the mean of 64 positions says little about one shape among
# others.
#
# Now the masks: `QueryDecoder` beside the ordinary head on the same pixel vectors.

# %%
few = [(images[i], masks[i]) for i in range(128)]  # fit mirrors by itself
later = list(zip(unseen[:40], unseen_masks[:40], strict=True))
loss = SegmentationLoss(class_weights=class_weights((m for _, m in few), 7))


def train_masks(decoder):
    model = Segmenter(encoder, decoder)
    return model, fit(model, few, epochs=budget(4, 30), lr=4e-3, loss=loss)


torch.manual_seed(0)
queries, query_history = train_masks(QueryDecoder(encoder.out_channels, 7))
torch.manual_seed(0)
head = nn.Sequential(PixelEmbedding(encoder.out_channels), nn.Conv2d(64, 7, 1))
plain, plain_history = train_masks(head)

# %% tags=["nbval-ignore-output"]
pair = {"fixed head": plain, "queries": queries}
scored = {name: evaluate(trained, later).miou for name, trained in pair.items()}
print({name: f"{miou:.1f} % mIoU" for name, miou in scored.items()})

# %%
for history in (plain_history, query_history):
    assert history.loss[-1] < 0.7 * history.loss[0]
assert abs(scored["queries"] - scored["fixed head"]) < 5

# %% [markdown]
# Two tasks, the same reader, the same map. In one, attention makes a large difference; in the other you
# have to look closely to see any.
#
# ## Look inside: does a query look where we say?
#
# Here is where the finder's queries look in a scene that none of them was trained on, from the first
# epoch to the last. Only the queries whose shape is in the scene are shown:

# %% tags=["nbval-ignore-output"]
there = [k for k in range(6) if unseen_truth[shown, k, 0]][:4]
names = ["the scene", *(scenes.SHAPES[k] for k in there)]
no_heat = torch.zeros(1, *unseen_c4.shape[2:])
after = [0, 1, 2, 3, 5, 8, epochs]
plotting.flipbook(
    [
        plotting.show_heatmaps(
            unseen[shown],
            torch.cat([no_heat, watched[i][there]]),
            titles=names,
            columns=5,
            alt="Where queries look.",
        )
        for i in after
    ],
    ["untrained", *(f"after {i} epochs" for i in after[1:])],
    alt="Where the queries of the shapes in this scene look, while they learn",
)

# %% [markdown]
# And this is the mask decoder, on the same scene. Its masks are about as good as those of the fixed head,
# so these heat maps would do for a figure. But are they about the objects?

# %% tags=["nbval-ignore-output"]
reader = queries.cpu().decoder.reader.eval()  # fit may have taken it to a GPU
mask_looks = attention_maps(reader, unseen_c4)[:, 1:]
plotting.show_heatmaps(
    unseen[shown],
    torch.cat([no_heat, mask_looks[shown][there]]),
    titles=names,
    columns=5,
    alt="The mask decoder's queries look at no object in particular.",
)

# %% [markdown]
# Do not judge it by eye: count. How much of a query's attention lies on pixels of its own shape? And how
# much would, if it looked everywhere alike? That is **chance**: the share of the image that the shape
# covers.


# %% tags=["nbval-ignore-output"]
def on_own_shape(looks):
    """Per cent of the attention that lies on the query's shape, and by chance."""
    pixels = F.one_hot(unseen_masks, 7)[..., 1:].movedim(-1, 1).float()
    cells = F.adaptive_avg_pool2d(pixels, looks.shape[-2:])
    present = cells.sum((2, 3)) > 0
    on, chance = (looks * cells).sum((2, 3)), cells.mean((2, 3))
    return [100 * share[present].mean().item() for share in (on, chance)]


finder_looks = attention_maps(finders["attending"][0].reader, unseen_c4)
looked = {"finding": on_own_shape(finder_looks), "masks": on_own_shape(mask_looks)}
for name, (on, chance) in looked.items():
    print(f"{name:8} {on:4.1f} % on the own shape, by chance {chance:.1f} %")

# %%
assert looked["finding"][0] > 1.3 * looked["finding"][1]
assert looked["masks"][0] < 1.3 * looked["masks"][1]

# %% [markdown]
# On average the finder's queries look at their shapes far more than chance would, though not each of them: above,
# the star's looks mostly elsewhere. In that task everything has to pass through the queries. The mask decoder's
# look at their shapes no more than chance would. They have no need to: each pixel's vector already says what lies
# there, and a fixed vector per class is enough to read it. **Attention learns to look where the answer has to come
# through it.** A smooth heat map is no proof that it did.
#
# ## Measure the claims
#
# `python -m experiments.chapters.attention.analysis` trains finders on 2,000 scenes and mask decoders on
# 400, three seeds each, and looks at 600 scenes that none of them has seen. `python -m experiments.claims
# attention --on streets` trains the mask decoders on CamVid, as chapter 05 does.

# %%
evidence = records.of("attention_probe", "attention")


def looks_at(kind, what="attending", of=scenes.SHAPES):
    """Per cent of the attention on the own shape, mean over shapes, by seed."""
    runs = evidence.values("scenes", what, "on_objects", kind)
    return [sum(run[shape] for shape in of) / len(of) for run in runs]


for what in ("attending", "averaging"):
    assert len(evidence.values("scenes", what, "presence")) >= 3

# %% [markdown]
# **Does attention look at the relevant places?** *Best* is what all weight on the best single position of
# `c4` would give: positions of 16 × 16 pixels are larger than many a shape.

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        "best": looks_at("best"),
        "finder": looks_at("attention"),
        "mask decoder": looks_at("attention", "attending queries"),
        "chance": looks_at("chance"),
    },
    ylabel="attention on the own shape, %",
    alt="The finder's attention is far above chance, the mask decoder's is not.",
)

# %%
chance = max(looks_at("chance"))
assert 2 * chance < min(looks_at("attention"))
assert max(looks_at("attention")) < 0.5 * min(looks_at("best"))
assert max(looks_at("attention", "attending queries")) < 1.3 * chance

# %% [markdown]
# The finder puts more than twice as much attention on its shapes as chance would, though less than half of
# the best; the mask decoder puts hardly more than chance, less than 1.3 times as much.
#
# **And does it matter?** Ask the network, not the map. Take four of the 64 positions away from a query: those
# that it looks at most; those that the query of another shape in the scene looks at most; or any other
# four. The image stays as it is. How many of its right answers, *it is there*, turn into *no*?


# %%
def turned(test, kind):
    """Answers lost with something taken away, in %, one value for each seed."""
    return evidence.values("scenes", "attending", test, kind, "lost")


kinds = {
    "what it looks at": "own",
    "what another looks at": "another",
    "anything else": "anywhere",
}

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {name: turned("dropped", kind) for name, kind in kinds.items()},
    ylabel="answers lost without four positions, %",
    highlight="what it looks at",
    alt="Losing the positions that it looks at costs a query by far the most.",
)

# %% [markdown]
# The same with the image itself: fade a spot of about 32 pixels to the image's mean colour, softly, because
# a sharp square would be a shape of its own.

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {name: turned("covered", kind) for name, kind in kinds.items()},
    ylabel="answers lost with a spot covered, %",
    highlight="what it looks at",
    alt="Covering what a query looks at costs it by far the most answers.",
)

# %%
for test in ("dropped", "covered"):
    most = min(turned(test, "own"))
    for other in ("another", "anywhere"):
        assert max(turned(test, other)) < 0.2 * most
assert min(turned("dropped", "own")) > 100 / 3
assert max(turned("dropped", "another") + turned("dropped", "anywhere")) < 2

# %% [markdown]
# Without the four positions that it looks at most, a query loses more than a third of its right answers;
# without four others, even those that another query looks at, hardly any. So here the heat maps tell
# through which positions the answer comes. Covering says the same, less sharply; and it would harm any
# model that uses the object, whether it attends or not.
#
# **Does it help most in complex scenes?** The finders, by the number of objects in the scene:

# %%
crowd = [str(n) for n in range(2, 8)]


def by_crowd(what, key):
    """One row for each seed, one column for each number of objects."""
    runs = evidence.values("scenes", what, "by_objects")
    return [[run[number][key] for number in crowd] for run in runs]


# %% tags=["nbval-ignore-output"]
plotting.show_panels(
    {
        title: {what: by_crowd(what, key) for what in ("attending", "averaging")}
        for title, key in {
            "is it there? right, % (guessing: 50)": "presence",
            "where? off by, pixels": "middle",
        }.items()
    },
    x=crowd,
    xlabel="objects in the scene",
    alt="By number of objects: attending is better than averaging everywhere.",
)

# %%
present, off = (
    torch.tensor(by_crowd("attending", key))
    - torch.tensor(by_crowd("averaging", key))
    for key in ("presence", "middle")
)
added = torch.stack([present, -off]).mean(1)  # [2 questions, 6 numbers of objects]
assert added.min() > 0
few, many = added[:, :2].mean(1), added[:, 4:].mean(1)  # of 2–3 objects, of 6–7
assert abs(few[0] - many[0]) < 5 and few[1] > 1.3 * many[1]
lost = torch.tensor(by_crowd("averaging", "middle"))[:, 1:]  # with 3–7 objects
assert lost.min() > 35 and (lost[:, -1] - lost[:, 0]).abs().max() < 1

# %% [markdown]
# Attention wins at every number of objects, and the claim does not hold: to *is it there?* it adds about as
# much in the fullest scenes as in the emptiest, less than 5 points apart; to *where?* it adds most in the
# *emptier* ones. There the average, too, can still say something: from three objects on, its *where?* is off by more
# than 35 pixels, and no further in the fullest scenes.
#
# For masks the scenes are taken in three groups:

# %% tags=["nbval-ignore-output"]
groups = ("2–3", "4–5", "6–7")
plotting.show_curves(
    {
        what: [
            [run[group] for group in groups]
            for run in evidence.values("scenes", what, "by_objects")
        ]
        for what in (
            "fixed head",
            "gates",
            "averaging queries",
            "attending queries",
        )
    },
    xlabel="objects in the scene",
    ylabel="mIoU on unseen scenes, %",
    x=groups,
    alt="Four curves fall with the number of objects, close together.",
)

# %%
for group in groups:
    by_head = evidence.mean("scenes", "fixed head", "by_objects", group)
    for what in ("gates", "attending queries"):
        other = evidence.mean("scenes", what, "by_objects", group)
        assert abs(other - by_head) < 1.5

# %% [markdown]
# Masks, too, get worse in a crowd, and by the same amount whichever way they were made: in no group is a
# decoder with attention 1.5 points away from the fixed head.
#
# **What is attention worth for masks?** *Gates* weigh each of `c2` to `c5` before it is projected;
# *self-attention* lets the positions of the projected `c5` look at each other, with positional encoding.

# %% tags=["nbval-ignore-output"]
variants = (
    "fixed head",
    "gates",
    "self-attention on c5",
    "averaging queries",
    "attending queries",
)
places = ("scenes", "streets")
for where in places:
    display(
        plotting.show_bars(
            {what: evidence.values(where, what) for what in variants},
            ylabel=f"mIoU on unseen {where}, %",
            highlight="fixed head",
            alt=f"mIoU on {where}: all the decoders lie within a point or two.",
        )
    )


# %%
def gain(where, what, over="fixed head"):
    """What one decoder adds to another, seed by seed."""
    return torch.tensor(evidence.differences(where, what, over))


assert all(len(evidence.values(w, what)) >= 3 for w in places for what in variants)
for where in places:
    for what in ("attending queries", "gates", "self-attention on c5"):
        assert gain(where, what).abs().max() < 1.5
    assert gain(where, "attending queries", "averaging queries").abs().max() < 1
assert gain("scenes", "gates").min() > 0 > gain("streets", "gates").min()
assert gain("scenes", "self-attention on c5").max() < 0
assert gain("streets", "self-attention on c5").abs().max() < 1

# %% [markdown]
# Little. Against a head whose weights are the same for every image nothing here adds or costs as much as
# 1.5 points. Queries that average do as well as those that attend, within a point: it is not the choice
# of positions that matters. Gates are ahead of the plain head in every seed on scenes, but not on streets.
# Self-attention over the projected `c5` loses a little on scenes, and on streets it is within a point.
#
# And do the gates open *for objects*? From 0, shut, to 1, open: how much further they are open, on average, at
# positions of objects than at those of background:

# %% tags=["nbval-ignore-output"]
levels = ("c2", "c3", "c4", "c5")
runs = evidence.values("scenes", "gates", "gates")
opened = torch.tensor([[run[level] for level in levels] for run in runs])
leaning = opened[..., 0] - opened[..., 1]  # [3 seeds, 4 levels]
plotting.show_curves(
    {"gates": leaning, "no difference": [0] * 4},
    xlabel="gate at",
    ylabel="further open on objects",
    x=levels,
    alt="Near zero at c2 and c3, little more at c4, and a tenth at c5.",
)

# %%
assert leaning[:, 3].min() > 0.05 and leaning[:, 3].max() < 0.2
assert leaning[:, :3].abs().max() < 0.05

# %% [markdown]
# At `c5` they lean to objects, with every seed, by about a tenth of their range. On the finer maps they hardly tell
# objects from background: there a gate is a volume control, and no spotlight.
#
# **What is a positional encoding worth?** The finder's second question asks *where*. Without encoding,
# the query gets a mixture of vectors none of which was told its place:

# %% tags=["nbval-ignore-output"]
middles = {
    name: evidence.values("scenes", what, field)
    for name, what, field in [
        ("the same answer for all", "attending", "middle_by_chance"),
        ("without encoding", "attending, no positions", "middle"),
        ("with encoding", "attending", "middle"),
    ]
}
plotting.show_bars(
    middles,
    ylabel="middle of the shape: off by, pixels",
    alt="With the encoding the error is smallest, without it, it lies between.",
)

# %%
constant, without, encoded = middles.values()
assert min(without) > 1.2 * max(encoded) and max(without) < 0.95 * min(constant)

# %% [markdown]
# Without encoding it is off by more than 1.2 times as much, and still better than one answer for all: the
# encoder gives some of the place away. Its padding is known to do that (chapter 02); which cue it is here
# we did not test. Do not count on it.

# %% [markdown]
# ## Limits
#
# - Trainings are short: 300 steps for masks, a thousand for finding. Attention is known to want more, and
#   more data; what is small here need not stay small. Learning rates were set once, for all variants.
# - The queries read `c4` alone, through a single layer. MaskFormer has six, and a stronger pixel decoder.
# - The encoder is frozen throughout, and finding was not measured on streets.
# - Attention says which *positions* were read. A position of `c4` has seen far more than its 16 × 16 pixels,
#   so what it tells may come from elsewhere. And where a query looks says nothing about whether it is right.
# - Covering up changes the image in a way that no training saw. Both tests ask only where a second query
#   of the scene looks elsewhere.
# - Maps are averaged over the heads. A single head can look at something else.
#
# ## Exercises


# %% [markdown]
# **Exercise 1.** After attention, a convolution wants a map again. Turn tokens `[B, h·w, C]` back into
# `[B, C, h, w]`. Mind the order.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_map_again(answer):
    for size in [(2, 5, 3, 4), (1, 3, 4, 4), (2, 6, 6, 1)]:
        x = torch.arange(torch.tensor(size).prod()).view(size)
        back = answer(x.flatten(2).transpose(1, 2), *size[2:])
        if back is None:
            return print("Nothing returned yet: return the map.")
        if list(back.shape) != list(size):
            return print(f"Expected {list(size)}, yours is {list(back.shape)}.")
        if not torch.equal(back, x):
            return print(
                "The shape is right, but pixels and channels are mixed: view and "
                "reshape swap no dimensions. Put the channels first, then reshape."
            )
    print("Right: transpose, then give the positions their two sides back.")


# %%
def to_map(tokens, height, width):
    """Return the map [B, C, height, width] of tokens [B, height·width, C]."""


check_map_again(to_map)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def to_map_solution(tokens, height, width):
    return tokens.transpose(1, 2).unflatten(2, (height, width))


check_map_again(to_map_solution)

# %% [markdown]
# **Exercise 2.** Let each position look at its neighbours only, at most `reach` rows and columns away.
# Return a mask `[h·w, h·w]`, True where a query (row) may look at a position (column), for
# `F.scaled_dot_product_attention(q, k, v, attn_mask=mask)`. (For `nn.MultiheadAttention` True means the
# opposite, *may not look*: one more fault that raises nothing.)


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_window(answer):
    height, width, reach = 4, 6, 1
    allowed = answer(height, width, reach)
    if allowed is None:
        return print("Nothing returned yet: return a tensor of True and False.")
    if list(allowed.shape) != [24, 24] or allowed.dtype != torch.bool:
        found = f"{list(allowed.shape)}, {allowed.dtype}"
        return print(f"Expected [24, 24] of torch.bool, got {found}.")
    if not allowed.diagonal().all():
        return print("A position may look at itself, too: its own distance is 0.")
    if allowed[5, 6]:
        return print(
            "Position 5 ends a row of six and 6 begins the next: neighbours in the "
            "list, not in the map. Compare rows and columns."
        )
    if not allowed[0, 7]:
        return print("Diagonal neighbours count: one row and one column away.")
    if allowed.sum() != (3 * height - 2) * (3 * width - 2):
        return print(f"{allowed.sum()} pairs are allowed; expected 160.")
    for h, w, far in [(4, 6, 2), (5, 3, 1), (3, 3, 0)]:
        row, column = (
            torch.arange(h).repeat_interleave(w),
            torch.arange(w).repeat(h),
        )
        truth = ((row[:, None] - row).abs() <= far) & (
            (column[:, None] - column).abs() <= far
        )
        if not torch.equal(answer(h, w, far), truth):
            return print(f"Right for 4 × 6 and 1, wrong for {h} × {w} and {far}.")
    print("Right: 160 of 576 pairs. That is attention with the reach of a 3×3.")


# %%
def window(height, width, reach):
    """Return who may look at whom, [height·width, height·width]."""


check_window(window)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def window_solution(height, width, reach):
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return (places[:, None] - places[None]).abs().amax(2) <= reach


check_window(window_solution)

# %% [markdown]
# **Exercise 3.** From the records: at which shape does the finder's attention exceed chance by the largest
# *factor*?


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_factor(answer):
    def total(kind, shape):
        return sum(looks_at(kind, of=[shape]))

    factor = {s: total("attention", s) / total("chance", s) for s in scenes.SHAPES}
    shape = answer()
    if shape is None:
        return print("Nothing returned yet: return the name of a shape.")
    if shape not in factor:
        return print(f"{shape!r} is no shape: {', '.join(factor)}.")
    best = max(factor, key=factor.get)
    if shape == max(factor, key=lambda s: total("attention", s)) != best:
        share = total("chance", shape) / len(looks_at("chance"))
        return print(
            f"{shape} has most attention, and by chance it had {share:.0f} %."
        )
    if shape != best:
        return print(f"{shape}: {factor[shape]:.1f} times chance; one has more.")
    print(f"Right: {shape}, {factor[shape]:.1f} times chance.")


# %%
def largest_factor():
    """Return the name of the shape."""


check_factor(largest_factor)


# %% tags=["hide-cell", "nbval-ignore-output"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def largest_factor_solution():
    def factor(shape):
        on, chance = (sum(looks_at(k, of=[shape])) for k in ("attention", "chance"))
        return on / chance

    return max(scenes.SHAPES, key=factor)


check_factor(largest_factor_solution)

# %% [markdown]
# ## Recap
#
# - From a map to tokens: `flatten(2).transpose(1, 2)`. Back: `transpose(1, 2)`, then the two sides.
# - `batch_first=True`, always; then change one image and see that no other output moves.
# - Attention knows no places. Add a positional encoding where the task asks *where*.
# - Attend on `c5` or `c4`, with `F.scaled_dot_product_attention`: the work grows with (h·w)².
# - Queries learn to look where looking is the only way to the answer. Measure against chance, and
#   cover up, before you show a heat map.
#
# | shape contract | |
# |---|---|
# | `SpatialGate`, `PositionalEncoding2d`, `SelfAttention` | `[B, C, h, w]` → `[B, C, h, w]` |
# | `QueryReader`, `AveragingReader` | `[B, C, h, w]` → `[B, queries, width]` |
# | `attention_maps` | → `[B, queries, h, w]`, sums to 1 |
# | `Finder` | → `[B, queries, 3]`: logit, x, y |
# | `PixelEmbedding` | a `Pyramid` → `[B, width, ⌈H/4⌉, ⌈W/4⌉]` |
# | `QueryDecoder` | a `Pyramid` → `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]` |
# | in a `Segmenter` | → `[B, out_channels, H, W]` |
#
# In your own project:
#
# ```python
# from helpers.bridges.attention import QueryDecoder, attention_maps
# from helpers.encoder import ResNet18Encoder, Segmenter, normalize
# from helpers.training import fit
#
# encoder = ResNet18Encoder()
# model = Segmenter(encoder, QueryDecoder(encoder.out_channels, out_channels=7))
# history = fit(model, train, epochs=20)  # pairs of image [3, H, W] and mask [H, W]
# model.cpu().eval()  # fit may have taken it to a GPU
# c4 = encoder(normalize(images)).c4
# where = attention_maps(model.decoder.reader, c4)  # [B, 7, h, w]: then count
# ```
