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
# # 02 · My decoder wants a vector
#
# A sequence model wants a first state, a generator wants a code, a search wants a key: one vector,
# `[B, 256]`. The encoder has `c5`, `[B, 512, h, w]`. There are two common ways from one to the other, and
# each hides a mistake. This chapter makes them, cures them, and then asks what is left: the vector still
# knows *what* is in the image. How much does it know of *where*?

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
# - why an average over the positions forgets their order;
# - the `.squeeze()` that works for every batch but the last one;
# - a linear layer that is larger than the encoder, and fits one image size only;
# - three bridges: `PoolLinear`, `GeM`, `GridLinear`;
# - masks and pictures, decoded from 256 numbers, beside the same decoder on the map;
# - where the average got the little that it knows about places;
# - what a grid, a wider vector and another kind of pooling are worth, on scenes and on streets.

# %%
import skimage.data
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from helpers import camvid, plotting, records, scenes
from helpers.bridges.encoder import TruncatedEncoder
from helpers.encoder import ResNet18Encoder, Segmenter, load_bundled, normalize
from helpers.errors import explaining
from helpers.inspection import count_parameters, pyramid_levels, shapes
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import budget, evaluate, fit, predict

# %% [markdown]
# ## The problem as a picture
#
# Take the `c5` of a photograph and shuffle its positions, as one shuffles the tiles of a puzzle.
# Equal colours mean equal features:

# %%
encoder = ResNet18Encoder()
photo = (
    torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None].float() / 255
)
photo = F.interpolate(photo, size=(192, 288), mode="area")
c5 = encoder(normalize(photo)).c5
torch.manual_seed(0)
order = torch.randperm(c5[0, 0].numel())
shuffled = c5.flatten(2)[..., order].view_as(c5)


def halved(pictures):
    """Half as many rows and columns, so that the stored picture is small."""
    return F.avg_pool2d(pictures, 2)


plotting.show_features_as_color(
    halved(photo)[0],
    {"c5": c5, "shuffled": shuffled},
    alt="A cat, its c5 in false colours, and the same tiles in random order.",
)

# %%
assert torch.allclose(c5.mean(dim=(2, 3)), shuffled.mean(dim=(2, 3)), atol=1e-5)
assert torch.equal(c5.amax(dim=(2, 3)), shuffled.amax(dim=(2, 3)))

# %% [markdown]
# The cat is gone, and the average over the positions is **the same vector**. So is the maximum.
# Whatever reads that vector cannot know which of the two it came from. No training helps: the order of
# the positions is not hidden, it is not there. And all that a decoder learns about the image has to pass
# through these few numbers: a **bottleneck**.
#
# ## The shapes
#
# Two ways lead from a map to a vector. *Flatten* keeps every number in its place; *pool* averages the
# places away.

# %%
for height, width in [(128, 128), (224, 224), (256, 256), (180, 240)]:
    level = pyramid_levels(height, width)[-1]
    numbers = level.channels * level.height * level.width
    print(
        f"{height} × {width}: c5 is 512 × {level.height} × {level.width}.",
        f"Flattened: {numbers:,} numbers. Pooled: 512.",
    )

# %% [markdown]
# Flattened, the number changes with the image, and that will be the trouble. Pooled, it never does.
#
# ## The obvious attempts, and what they do wrong
#
# ### The batch that is not there
#
# Average each channel over all positions, drop the two sides of length one, apply a linear layer.
# Five images, in batches of two:


# %%
class SqueezedPool(nn.Module):
    """Pool, squeeze, linear: right for four images out of five."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(512, 256)

    def forward(self, x):
        return self.linear(F.adaptive_avg_pool2d(x, 1).squeeze())


torch.manual_seed(0)
attempt = SqueezedPool()
for batch in torch.rand(5, 512, 4, 4).split(2):
    print(list(batch.shape), "→", list(shapes(attempt, batch)))

# %% [markdown]
# `squeeze()` drops *every* dimension of length one, and in a batch of one that is the batch itself. There
# is no error yet. It comes later, far from its cause, and only when a single image is left over:

# %% tags=["raises-exception"]
with explaining():
    attempt(torch.rand(1, 512, 4, 4)).softmax(dim=1)

# %% [markdown]
# The cure is to say which dimensions you mean: `flatten(1)` joins all but the first.
#
# ### The layer that fits one size
#
# Flattening keeps the places, so it looks like the better deal. With a 1×1 convolution before it, to
# save parameters, it is often posted like this:

# %%
torch.manual_seed(0)
flat = nn.Sequential(
    nn.Conv2d(512, 128, kernel_size=1), nn.Flatten(), nn.Linear(128 * 7 * 7, 256)
)
print(list(shapes(flat, encoder(normalize(torch.rand(2, 3, 224, 224))).c5)))

# %% tags=["raises-exception"]
with explaining():
    flat(encoder(normalize(torch.rand(2, 3, 256, 256))).c5)

# %% [markdown]
# A linear layer has one weight for each number that arrives, so it is married to 7 × 7 positions: to
# images of 193 to 224 pixels and no others. And flattening is expensive. Here are the
# parameters of that linear layer over the side of the image that it is built for, with the 1×1 convolution
# before it and without (then all 512 channels are flattened):

# %%
sides = list(range(64, 513, 32))


def linear_parameters(positions, channels=512, out_features=256):
    """Weights and biases of a linear layer behind a flattened map, in millions."""
    return (channels * positions + 1) * out_features / 1e6


positions = [(side // 32) ** 2 for side in sides]
flattened = [linear_parameters(n) for n in positions]
whole = count_parameters(encoder) / 1e6
plotting.show_curves(
    {
        "flatten": flattened,
        "1×1, flatten": [linear_parameters(n, channels=128) for n in positions],
        "encoder": [whole for _ in sides],
        "4 × 4 grid": [linear_parameters(4 * 4) for _ in sides],
        "pool": [linear_parameters(1) for _ in sides],
    },
    x=sides,
    xlabel="side of the image, pixels",
    ylabel="million parameters",
    log=True,
    alt="Flattening grows with the image and passes the encoder; pools stay flat.",
)

# %%
assert flattened[sides.index(288)] < whole < flattened[sides.index(320)]
assert linear_parameters(1) < whole / 80

# %% [markdown]
# Over all channels this one layer is larger than the whole ResNet-18 from 10 × 10 positions on, images of
# 289 pixels; a 1×1 convolution only puts that off. Behind a pool it has less than an eightieth of the
# encoder's parameters, whatever the image. Between the two lies a compromise: pool to a *grid* of fixed
# size, and flatten that.
#
# ## The technique
#
# All three bridges take one map and return `[B, D]`. First the workhorse:

# %% tags=["export"]
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.encoder import Pyramid, check_map


# %% tags=["export"]
class PoolLinear(nn.Module):
    """A map as one vector: the mean over all positions, then a linear layer.

    `forward(x)` takes `[B, in_channels, h, w]`, any h and w, and returns
    `[B, out_features]`, for a batch of one, too. Raises `ValueError` for other
    channels or ranks, `TypeError` for integers.

    Source: Lin et al., Network In Network, ICLR 2014 (global average pooling).
    """

    def __init__(self, in_channels: int, out_features: int):
        super().__init__()
        self.in_channels = in_channels
        self.linear = nn.Linear(in_channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        check_map("the map", x, self.in_channels)
        pooled = F.adaptive_avg_pool2d(x, 1)  # [B, C, 1, 1]
        return self.linear(pooled.flatten(1))


# %%
torch.manual_seed(0)
bridge = PoolLinear(512, 256)
for batch, height, width in [(2, 128, 128), (1, 128, 128), (1, 180, 240)]:
    c5 = encoder(normalize(torch.rand(batch, 3, height, width))).c5
    print(list(c5.shape), "→", list(shapes(bridge, c5)))

# %% [markdown]
# You have met this bridge before: it is how a ResNet-18 ends. Give it the classifier's weights, and
# it returns the classifier's logits:

# %%
network = resnet18(num_classes=200)
network.load_state_dict(load_bundled())
network.eval()
head = PoolLinear(512, 200)
head.linear = network.fc
x = normalize(photo)
assert torch.allclose(head(TruncatedEncoder(network)(x)), network(x), atol=1e-5)

# %% [markdown]
# The average asks how much of a feature there is *on the whole*. The maximum asks whether it is there
# *anywhere*. The **generalised mean** lies in between: raise every value to the power *p*, average,
# take the *p*-th root. At *p* = 1 it is the average; the larger *p*, the nearer to the maximum, and
# *p* can be learnt.

# %% tags=["export"]
SMALLEST = 1e-6  # of what is raised to a power: at 0, a root has no slope


class GeM(nn.Module):
    """Generalised-mean pooling: the average at p = 1, near the maximum for large p.

    `forward(x)` takes `[B, in_channels, h, w]`, any h and w, values ≥ 0 as in all
    the encoder's maps (below 1e-6 they count as that), and returns
    `[B, in_channels]`; where p is at least 1, each value lies between the channel's
    mean and its maximum. `p` is learnt, one for all channels, and stays positive.
    Raises `ValueError` for `p` ≤ 0 and for other channels or ranks, `TypeError` for
    integers.

    Source: Radenović et al., Fine-tuning CNN Image Retrieval with No Human
    Annotation, TPAMI 2019.
    """

    def __init__(self, in_channels: int, p: float = 3.0):
        super().__init__()
        if not 0 < p < float("inf"):
            raise ValueError(f"Expected p above 0, got {p}: 1 is the average.")
        self.in_channels = in_channels
        self.log_p = nn.Parameter(torch.tensor(float(p)).log())

    def forward(self, x: Tensor) -> Tensor:
        check_map("the map", x, self.in_channels)
        p = self.log_p.exp()
        x = x.clamp(min=SMALLEST)
        # As shares of the maximum: one of them is 1, and no power is too large.
        largest = x.detach().amax(dim=(2, 3), keepdim=True)
        shares = x / largest
        return largest.flatten(1) * shares.pow(p).mean(dim=(2, 3)).pow(1 / p)


# %%
c5 = encoder(normalize(photo)).c5
average, largest = c5.mean(dim=(2, 3)), c5.amax(dim=(2, 3))
assert torch.allclose(GeM(512, p=1)(c5), average, atol=1e-4)
for p in (2, 3, 10):
    pooled = GeM(512, p)(c5)
    assert (pooled > average - 1e-4).all() and (pooled < largest + 1e-4).all()
print(list(c5.shape), "→", list(shapes(GeM(512), c5)))

# %% [markdown]
# What does *p* do? Here is one channel on the photograph, and how much each position adds to the sum
# under the root:

# %%
channel = c5[0, average[0].argmax()]
powers = {"p = 1, average": 1, "p = 3": 3, "p = 10": 10}
plotting.show_heatmaps(
    halved(photo)[0],
    [channel.detach() ** p for p in powers.values()],
    titles=list(powers),
    columns=3,
    alt="The larger p, the fewer positions of the cat decide what remains.",
)

# %% [markdown]
# The third bridge pools as well, but to a grid. Two by two cells keep apart what is upper left and
# what is lower right, and it is still the same layer for every image size. (Where the grid does not
# divide the map, neighbouring cells share a row or a column.)


# %% tags=["export"]
class GridLinear(nn.Module):
    """A map as one vector that keeps coarse places: grid × grid means, then linear.

    `forward(x)` takes `[B, in_channels, h, w]`, any h and w, and returns
    `[B, out_features]`. The linear layer has in_channels · grid² inputs; in a map
    that is smaller than the grid, cells share positions. Raises `ValueError` for a
    grid below 1 and for other channels or ranks, `TypeError` for integers.
    """

    def __init__(self, in_channels: int, out_features: int, grid: int):
        super().__init__()
        if grid < 1:
            raise ValueError(f"Expected a grid of 1 × 1 or more, got {grid}.")
        self.in_channels, self.grid = in_channels, grid
        self.linear = nn.Linear(in_channels * grid**2, out_features)

    def forward(self, x: Tensor) -> Tensor:
        check_map("the map", x, self.in_channels)
        cells = F.adaptive_avg_pool2d(x, self.grid)  # [B, C, grid, grid]
        return self.linear(cells.flatten(1))


# %%
for grid in (1, 2, 4):
    bridge = GridLinear(512, 256, grid)
    found = [list(shapes(bridge, torch.rand(1, 512, *s))) for s in [(4, 4), (6, 8)]]
    print(f"{grid} × {grid}: {count_parameters(bridge):9,} parameters, {found}")
    assert count_parameters(bridge) == (512 * grid**2 + 1) * 256

# %% [markdown]
# ### Back from the vector
#
# To see what a vector knows, decode it. A linear layer unfolds it to a small map, and three rounds of
# doubling and convolving paint a large one. The painter is a module of its own, because we want to
# put it behind `c5` as well:


# %% tags=["export"]
class Painter(nn.Module):
    """A small map becomes a large one: doubled and convolved, once for each width.

    `forward(x)` takes `[B, in_channels, h, w]` and returns
    `[B, out_channels, 2ⁿ·h, 2ⁿ·w]` for n `widths`. Raises `ValueError` for other
    channels or ranks, `TypeError` for integers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int] = (64, 48, 32),
    ):
        super().__init__()
        self.in_channels = in_channels
        layers: list[nn.Module] = []
        for before, width in zip((in_channels, *widths), widths, strict=False):
            layers += [
                nn.Upsample(scale_factor=2, mode="bilinear"),
                nn.Conv2d(before, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d((in_channels, *widths)[-1], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_map("the map", x, self.in_channels)
        return self.head(self.layers(x))


# %%
print(list(shapes(Painter(128, 7), torch.rand(1, 128, 4, 4))))

# %% [markdown]
# A vector has no height and no width. Whoever starts from one has to *decide* on a grid, and the
# result is stretched to the image. `MapDecoder` is the control: the same painter, straight on `c5`.

# %% tags=["export"]
CHANNELS = 128  # of the small map that is painted from


class VectorDecoder(nn.Module):
    """A mask or a picture from one vector: c5 → bridge → vector → map → painted.

    Args:
        bridge: from c5 to `[B, in_features]`: `PoolLinear`, `GridLinear`, your own.
        in_features: the width of that vector.
        out_channels: classes, or channels of the picture.
        grid: height and width of the small map; the output is 8 times as large.

    `forward(pyramid)` reads c5 only and returns
    `[B, out_channels, 8·grid[0], 8·grid[1]]`, for images of any size; `Segmenter`
    stretches it to the image. Raises `ValueError` where the bridge returns anything
    but `[B, in_features]`, and what the bridge raises.
    """

    def __init__(
        self,
        bridge: nn.Module,
        in_features: int,
        out_channels: int,
        grid: tuple[int, int] = (4, 4),
    ):
        super().__init__()
        self.bridge, self.in_features, self.grid = bridge, in_features, grid
        self.unfold = nn.Linear(in_features, CHANNELS * grid[0] * grid[1])
        self.paint = Painter(CHANNELS, out_channels)

    def forward(self, pyramid: Pyramid) -> Tensor:
        vector = self.bridge(pyramid.c5)
        if vector.ndim != 2 or vector.shape[1] != self.in_features:
            raise ValueError(
                f"Expected a vector [B, {self.in_features}] from the bridge, got "
                f"{list(vector.shape)}. Keep the batch with flatten(1), and build "
                "the decoder with in_features = the width of the vector."
            )
        x = self.unfold(vector).unflatten(1, (CHANNELS, *self.grid))
        return self.paint(x)


# %% tags=["export"]
class MapDecoder(nn.Module):
    """The control: the painter of `VectorDecoder`, straight on c5, nothing pooled.

    `forward(pyramid)` reads c5 only and returns `[B, out_channels, 8h, 8w]`, where
    c5 is h × w. Raises `ValueError` for other channels or ranks, `TypeError` for
    integers.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.project = nn.Conv2d(in_channels, CHANNELS, 1)
        self.paint = Painter(CHANNELS, out_channels)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_map("c5", pyramid.c5, self.in_channels)
        return self.paint(self.project(pyramid.c5))


# %%
classes = len(scenes.CLASSES)


def from_vector(out_channels):
    torch.manual_seed(0)
    return VectorDecoder(PoolLinear(512, 256), 256, out_channels)


def from_map(out_channels):
    torch.manual_seed(0)
    return MapDecoder(512, out_channels)


makers = {"vector": from_vector, "map": from_map}
for name, make in makers.items():
    decoder = make(classes)
    found = [
        list(shapes(decoder, encoder(normalize(torch.rand(1, 3, *size)))))
        for size in [(128, 128), (180, 240)]
    ]
    print(f"{name:6} {count_parameters(decoder):,} parameters,", *found)

# %% [markdown]
# The vector's decoder has four times as many parameters, so if it loses, it is not for want of those. On
# scenes `c5` is 4 × 4, and both paint 32 × 32.

# %% [markdown]
# ## Train it
#
# Both decoders learn twice: masks, and the picture itself (then the target is the image, and the loss
# the mean squared error). The encoder is frozen and its maps are kept, so a training takes seconds.

# %%
epochs = budget(short=6, full=40)
parts = scenes.Scenes(128), scenes.Scenes(50, first=5_000)
train, unseen = ([part[i] for i in range(len(part))] for part in parts)
portraits = [(image, image) for image, _ in train]
loss = SegmentationLoss(class_weights=class_weights((m for _, m in train), classes))


def learn(decoder, data, loss):
    """A model and its history."""
    model = Segmenter(encoder, decoder)
    history = fit(model, data, epochs=epochs, lr=5e-3, loss=loss, flip=False)
    return model.cpu(), history  # fit may have taken it to a GPU


segmenters = {n: learn(make(classes), train, loss) for n, make in makers.items()}
painters = {n: learn(make(3), portraits, F.mse_loss) for n, make in makers.items()}

# %% tags=["nbval-ignore-output"]
plotting.show_histories(
    {name: history for name, (_, history) in segmenters.items()},
    alt="Both losses fall, the map's lower; its mIoU climbs higher.",
)

# %%
images, masks = (torch.stack(each) for each in zip(*unseen, strict=True))


@torch.no_grad()
def paint(model):
    """The pictures that a model returns, [B, 3, 128, 128] in 0…1."""
    return model.eval()(normalize(images)).clamp(0, 1)


painted = {name: paint(model) for name, (model, _) in painters.items()}

# %% tags=["nbval-ignore-output"]
plotting.show_images(
    [small for row in (images, *painted.values()) for small in halved(row[:5])],
    columns=5,
    alt="Five scenes; as painted from the vector; as painted from the map.",
)

# %% [markdown]
# Above five scenes that training never saw, below them what was painted from the vector, and last
# what was painted from the map. From the vector comes nearly the same sheet each time, a little
# lighter or darker, warmer or colder. From the map come blurred patches, now and then of the right colour and
# near the right place. Now the masks:

# %% tags=["nbval-ignore-output"]
plotting.show_masks(
    {
        "mask": masks[:5],
        **{n: predict(model, images[:5]) for n, (model, _) in segmenters.items()},
    },
    alt="Masks of five scenes, and what both decoders predict.",
)

# %% tags=["nbval-ignore-output"]
scored = {name: evaluate(model, unseen) for name, (model, _) in segmenters.items()}
nothing_found = 100 * (masks == 0).float().mean().item() / classes
print(f"mIoU of an empty mask: {nothing_found:.1f} %")


def grey_levels(pictures):
    """Root of the mean squared error, of 255."""
    return 255 * (pictures - images).square().mean().sqrt().item()


error = {name: grey_levels(pictures) for name, pictures in painted.items()}
error["one colour"] = grey_levels(images.mean(dim=(2, 3), keepdim=True))
for name, score in scored.items():
    print(
        f"{name:6} mIoU {score.miou:.1f} %, picture off by {error[name]:.1f} levels"
    )
print(f"The image's mean colour everywhere: off by {error['one colour']:.1f}")

# %%
for name in makers:
    for _, history in (segmenters[name], painters[name]):
        assert history.loss[-1] < 0.75 * history.loss[0]
assert scored["map"].miou > scored["vector"].miou + 2
assert scored["map"].miou > nothing_found + 4
assert scored["vector"].miou < nothing_found + 8
assert error["map"] < min(error["vector"] - 1, error["one colour"])
assert 0.9 < error["vector"] / error["one colour"] < 1.25

# %% [markdown]
# As a picture, the vector is worth about as much as one colour for the whole image; its mask is not
# far from an empty one. The map, through the same painter and after the same steps, does better in
# both, though its pictures, too, are only a little better than one colour.
#
# ## Look inside
#
# ### What the average knows of places, and from where
#
# The average forgets the order of the positions. Yet a readout finds the largest object somewhat better
# from the vector than by guessing, as you will see below. So the features themselves must carry the
# place, before the average. Feed a plain grey image, the same everywhere, and look at how much each
# position of `c5` differs from the middle one. Then do it again with an encoder whose layers continue at
# the other side of the image, where they used to pad:


# %%
def continued(_, given):
    """What a pooling layer gets in place of its padding."""
    return (F.pad(given[0], (1, 1, 1, 1), mode="circular"),)


wrapped = ResNet18Encoder()
for part in wrapped.modules():
    if isinstance(part, nn.Conv2d):
        part.padding_mode = "circular"
    if isinstance(part, nn.MaxPool2d):
        part.padding = 0
        part.register_forward_pre_hook(continued)
grey = torch.full((1, 3, 288, 288), 0.5)


def unlike_the_middle(encoder):
    """How far each position of c5 is from the middle one, [h, w]."""
    with torch.no_grad():
        c5 = encoder(normalize(grey)).c5[0]
    return (c5 - c5[:, 4:5, 4:5]).norm(dim=0).round(decimals=2)


signed = {
    "zeros": unlike_the_middle(encoder),
    "wrapped": unlike_the_middle(wrapped),
}
plotting.show_heatmaps(
    grey[0],
    list(signed.values()),
    titles=["padded with zeros", "wrapped around"],
    alt="With zeros, a grey image's c5 differs at the border; wrapped, nowhere.",
)

# %%
border = torch.ones(9, 9, dtype=torch.bool)
border[2:-2, 2:-2] = False
assert signed["zeros"][border].mean() > 2 * signed["zeros"][~border].mean()
assert signed["wrapped"].max() < 0.05
tile = normalize(F.interpolate(photo, size=(288, 288)))  # 9 × 9 positions
with (
    torch.no_grad()
):  # move the photograph by 32 pixels, and c5 moves by a position
    moved, c5 = wrapped(tile.roll(32, dims=3)).c5, wrapped(tile).c5
assert torch.allclose(moved, c5.roll(1, dims=3), atol=1e-4)

# %% [markdown]
# The convolutions pad with zeros, so a position near the border sees something that is in no image:
# it *signs* its features. Let the layers wrap around instead, and all positions are alike: the assertion
# moves a photograph, and its `c5` just moves along. The average of signed features keeps a trace of the
# signatures. Below we measure how large it is. (That padding tells places, and that pooled vectors still
# carry them, was shown by Islam et al., ICLR 2020 and ICCV 2021.)
#
# ### What the vector is good at
#
# Similar scenes should have similar vectors. Centre the vectors, and for two of 120 unseen scenes
# find the four whose direction is nearest:

# %%
numbers = range(10_000, 10_120)
gallery = scenes.batch(numbers)[0]
has = [{o.shape for o in scenes.scene(i).objects} for i in numbers]
with torch.no_grad():
    vectors = encoder(normalize(gallery)).c5.mean(dim=(2, 3))
unit = F.normalize(vectors - vectors.mean(dim=0), dim=1)
similarity = (unit @ unit.T).fill_diagonal_(-1)
nearest = similarity.topk(4).indices.tolist()

# %% tags=["nbval-ignore-output"]
asked = (1, 4)
order = [i for a in asked for i in (a, *nearest[a])]
titles = [
    "asked"
    if i == a
    else f"shares {len(has[i] & has[a])} of {len(has[i] | has[a])}"
    for a in asked
    for i in (a, *nearest[a])
]
plotting.show_images(
    halved(gallery[order]),
    titles=titles,
    columns=5,
    alt="Two scenes, each followed by its four nearest neighbours by the vector.",
)

# %% [markdown]
# At the left the scene that was asked about; above each neighbour: how many of the shapes that occur in
# either scene occur in both. Some backgrounds are alike at first sight. Whether the shapes are, too,
# needs counting: we do it below.
#
# ## Measure the claims
#
# `python -m experiments.claims pooling_linear --on scenes` trains the decoders with three seeds on 400
# scenes; `--on streets --only nothing vector map` trains three of them on **CamVid**'s 266 street
# photographs. Both report on scenes and streets that no training saw.
# `python -m experiments.chapters.pooling_linear.analysis` asks the vectors themselves, by linear readouts,
# three times with 1,000 scenes to learn from and 500 to report on.

# %%
evidence = records.of("pooling_linear", "pooling_linear_probe")
places = ("scenes", "streets")


def readout(question, what, padding="zeros"):
    """The scores of a pooling's readouts, one row for each seed."""
    return torch.tensor(evidence.values("scenes", padding, question, what))


fed = ("nothing", "vector", "map")
assert all(len(evidence.values(w, what)) >= 3 for w in places for what in fed)
for padding in ("zeros", "circular"):
    assert len(readout("position", "average", padding)) >= 3

# %% [markdown]
# **A bottleneck vector loses position.** Three decoders with the same painter. One has the map, one
# the vector, and one *nothing*: it is fed zeros, and can only learn the mask that suits all images.

# %% tags=["nbval-ignore-output"]
for where in places:
    display(
        plotting.show_bars(
            {what: evidence.values(where, what) for what in fed},
            ylabel=f"mIoU on unseen {where}, %",
            highlight="vector",
            alt=f"mIoU on {where}, fed by nothing, by a vector and by the map.",
        )
    )

# %% tags=["nbval-ignore-output"]
for where in places:
    for what in fed:
        boundary = evidence.mean(where, what, "boundary_miou")
        print(f"{where:8} {what:8} boundary IoU {boundary:.1f} %")

# %%
for where in places:
    assert evidence.margin(where, "map", "vector") > 8
    assert evidence.margin(where, "map", "vector", "boundary_miou") > 0
    assert evidence.margin(where, "vector", "nothing") > 4
nothing, vector = (evidence.span("streets", what) for what in ("nothing", "vector"))
assert min(nothing) > 0.6 * max(vector)
assert evidence.margin("streets", "nothing", "vector", "iou", "road") > 0

# %% [markdown]
# The claim holds in both places: the map is more than 8 points of mIoU ahead. A vector is more than 4
# ahead of nothing, so it is not worthless. But look at *nothing* on streets, which scores more than 60 %
# of what the vector scores, and at the road even more than the vector, in every seed. Sky above, road
# below, houses at both sides: where every image is composed alike, a decoder that sees no image at all
# paints a plausible street, and a vector looks better than it is. Never judge a bottleneck without that
# baseline. (Outlines are poor in all three: from `c5` alone the map's are, too. That is chapter 05.)

# %% tags=["nbval-ignore-output"]
plotting.show_masks(
    {
        what: [
            records.picture("pooling_linear", f"{what}_{k}") for k in (10, 35, 60)
        ]
        for what in fed
    },
    colors=camvid.PALETTE,
    alt="Streets from nothing: always the same one. From the vector, from the map.",
)

# %% [markdown]
# Look how symmetric the vector's streets are. Training showed every photograph mirrored, too, and an
# average can hardly tell which it was.
#
# **How wide, and from how many cells?** Pull the slider: four unseen scenes, from four numbers up to
# the whole map.

# %%
steps = {
    "vector of 4": "4 numbers from the average",
    "vector of 32": "32 numbers from the average",
    "vector": "256 numbers from the average",
    "grid 2×2": "256 numbers from 2 × 2 cells",
    "grid 4×4": "256 numbers from 4 × 4 cells",
    "map": "the map itself, 8,192 numbers",
}
stored = {r["what"]: r for r in evidence if r["what"].startswith("drawn")}


def drawn(what):
    """The stored masks [4, 32, 32] of one decoder."""
    record = stored[f"drawn: {what}"]
    flat = torch.tensor([[int(k) for k in mask] for mask in record["drawn"]])
    return flat.view(-1, *record["shape"])


truth = scenes.batch(stored["drawn: map"]["scenes"])[1][:, ::4, ::4]

# %% tags=["nbval-ignore-output"]
frames = [
    plotting.show_masks(
        {"mask": truth, "decoded": drawn(what)},
        alt="Four masks and what is decoded.",
    )
    for what in steps
]
plotting.flipbook(
    frames,
    list(steps.values()),
    alt="Masks decoded from ever wider vectors, from grids and from the map",
)

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {what: evidence.values("scenes", what) for what in ("nothing", *steps)},
    ylabel="mIoU on unseen scenes, %",
    highlight="vector",
    alt="mIoU climbs little with the width, more with the grid and the map.",
)

# %%
assert evidence.margin("scenes", "vector", "vector of 4") > 0
assert evidence.margin("scenes", "vector of 4", "vector") > -3
assert evidence.margin("scenes", "grid 2×2", "vector") > 3
more = evidence.mean("scenes", "grid 4×4") - evidence.mean("scenes", "grid 2×2")
assert abs(more) < 1
assert evidence.margin("scenes", "map", "grid 4×4") > 5

# %% [markdown]
# From 4 to 256 numbers little is gained: this decoder gets no more from the average. 256 numbers from
# 2 × 2 cells are worth more than 3 points; from 4 × 4 cells hardly more than that. And more than 5 points are still
# missing to the map, though on scenes those 4 × 4 cells *are* `c5`. Two things stand between them: 8,192
# numbers had to fit into 256, and a linear layer must learn for every cell anew what a star looks like,
# where a convolution learns it once. Which of the two costs more, we have not measured.
#
# **Where is the largest object?** A linear readout is asked for its middle. On the horizontal axis, the
# object's size: the side of a square with as many pixels. *Guessing* always says the same place.

# %% tags=["nbval-ignore-output"]
sizes = ["below 24", "24 to 40", "40 to 56", "above 56"]
readouts = ("guessing", "average", "grid 2×2", "grid 4×4")
plotting.show_curves(
    {what: readout("position", what)[:, :4] for what in readouts},
    x=sizes,
    xlabel="side of the object, pixels",
    ylabel="error, pixels",
    alt="Guessing is worst, the average little better, both grids clearly better.",
)

# %%
error = {what: readout("position", what)[:, 4] for what in readouts}
signature = error["guessing"] - error["average"]
guessed, wrapped_error = (
    readout("position", what, "circular")[:, 4] for what in ("guessing", "average")
)
unsigned = guessed - wrapped_error
print("measured in", len(signature), "runs of 500 scenes")
assert signature.min() > 3 and signature.max() < 8
better = readout("position", "guessing") - readout("position", "average")
assert better.mean(dim=0).min() > 0
for what in readouts:
    assert (readout("position", what)[:, 3] < readout("position", what)[:, 0]).all()
assert (error["average"] - error["grid 2×2"] > 0.8 * signature).all()
assert (error["grid 2×2"] - error["grid 4×4"]).abs().max() < 2
assert unsigned.max() < signature.min()
assert (unsigned < 0.5 * signature).all()

# %% [markdown]
# The image is 128 pixels wide. The average is 3 to 8 pixels better than guessing, at any size: a weak
# trace. Two by two cells gain about as much again, and the sixteen cells of 4 × 4 hardly anything on top,
# for a linear readout. Large objects are found better by all, by guessing too: there is less room for
# them to be off the middle.
#
# Most of the trace is the signature of the zeros. With the encoder that wraps around, the average keeps
# less than half of it:

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {"padded with zeros": signature, "wrapped around": unsigned},
    ylabel="pixels better than guessing",
    alt="Padded with zeros, the average finds objects better than wrapped around.",
)

# %%
lost = readout("position", "grid 2×2", "circular")[:, 4] - error["grid 2×2"]
assert lost.min() > 0 and lost.max() < 4

# %% [markdown]
# A part of that is an encoder that was never trained like this: wrapped around, the 2 × 2 cells lose up to
# 4 pixels, too.

# %% [markdown]
# **Average, maximum or in between?** Now the question that a vector is made for: *is there a star?*
# One readout for each shape, scored by how often a scene with the shape gets more than one without it
# (the area under the curve; 50 % is chance), by the radius of the largest such shape:

# %% tags=["nbval-ignore-output"]
pools = ("average", "GeM", "max", "grid 4×4")
plotting.show_panels(
    {
        "area under the curve, %": {
            what: 100 * readout("presence", what)[:, :4] for what in pools
        }
    },
    x=["4 to 8", "8 to 16", "16 to 32", "above 32"],
    xlabel="radius of the largest such shape, pixels",
    alt="All poolings lie close together; large shapes are recognised far better.",
)

# %%
present = {what: 100 * readout("presence", what)[:, 4] for what in pools}
for what in ("GeM", "max"):
    ahead = present[what] - present["average"]
    assert ahead.min() > 0 and ahead.max() < 2
assert max(readout("presence", what)[:, 0].max() for what in pools) < 0.65
assert (present["average"] > present["grid 4×4"]).all()
sized = readout("presence", "average")
assert (sized[:, 3] - sized[:, 0]).min() > 0.15
assert present["average"].min() > 70

# %% [markdown]
# Over all sizes, GeM (*p* = 3, not learnt here) and maximum are ahead in every seed, by less than 2 points:
# on 4 × 4 positions the choice hardly matters. A grid, which told places, does not help here: sixteen
# times the inputs, and with 1,000 scenes to learn from somewhat worse answers. What matters is the size
# of the object. Of a shape with a radius below 8 pixels no readout finds much, at most 65 % where 50 is
# chance. (Poles are longer, and count in the two larger sizes only.)
#
# **Are neighbours similar?** What the four nearest scenes share with the one that was asked about:

# %% tags=["nbval-ignore-output"]
kinds = ("any other", "nearest tint", "average", "GeM", "max")


def shared(kind, key):
    """One value for each seed."""
    kind = {"nearest tint": "mean colour"}.get(kind, kind)
    return evidence.values("scenes", "zeros", "neighbours", kind, key)


plotting.show_bars(
    {kind: shared(kind, "shapes") for kind in kinds},
    ylabel="shapes that both have, % of those that either has",
    highlight="average",
    alt="Neighbours by vector share more shapes than others, by a few points.",
)

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {kind: shared(kind, "color") for kind in kinds},
    ylabel="distance of the mean colours, grey levels",
    highlight="average",
    alt="Neighbours by vector are nearer in colour than scenes at random, though "
    "not as near as the nearest tint.",
)

# %%
for kind in ("average", "GeM", "max"):
    assert min(shared(kind, "shapes")) > max(shared("any other", "shapes")) + 3
    assert min(shared(kind, "shapes")) > max(shared("nearest tint", "shapes"))
    assert max(shared(kind, "color")) < 0.75 * min(shared("any other", "color"))

# %% [markdown]
# (*Nearest tint* looks for the same direction of the mean colour.) Neighbours by the vector share more shapes than
# scenes at random do, by 3 points and more, not by many. Their mean colours are a quarter nearer at
# least, though nobody asked for colour: *similar*, for a pooled vector, is also *looks alike as a whole*.

# %% [markdown]
# ## Limits
#
# - Scenes of 128 pixels give `c5` 4 × 4 positions. On a larger map an average dilutes a small object
#   more, and GeM and maximum may pull ahead.
# - On streets only three decoders were measured; widths, grids, poolings and readouts on scenes only.
# - A readout here is linear. What it cannot find may still be there for something deeper. (The trained
#   decoders are such a thing, and agree that 2 × 2 cells tell more of places than the average.)
# - The encoder is frozen. Trained along, it could write more of the places into the vector.
# - Learning rates and epochs are the same for all, and not tuned.
# - Wrapped around, a photograph has a seam at its border, so a trace of the place remains.
# - A vector that must know places need not be pooled at all: chapter 04 reads the positions as
#   tokens.
#
# ## Exercises


# %% [markdown]
# **Exercise 1.** Images of different size were padded to one batch. Average over the valid positions
# only.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_masked(answer):
    torch.manual_seed(0)
    x, valid = torch.rand(3, 5, 4, 6), torch.zeros(3, 1, 4, 6)
    valid[0], valid[1, :, :3, :4], valid[2, :, :1, :2] = 1, 1, 1
    sizes = [(4, 6), (3, 4), (1, 2)]
    truth = [x[i, :, :h, :w].mean(dim=(1, 2)) for i, (h, w) in enumerate(sizes)]
    found = answer(x, valid)
    if found is None:
        return print("Nothing returned yet: return a vector [B, C].")
    if found.shape != (3, 5):
        return print(f"Expected [3, 5], yours is {list(found.shape)}.")
    if torch.allclose(found, x.mean(dim=(2, 3))):
        return print("You averaged the padding, too: use valid.")
    if torch.allclose(found, (x * valid).mean(dim=(2, 3))):
        return print(
            "The padding is zero now, but you still divide by all 24 positions. "
            "Divide by the number of valid ones."
        )
    if not torch.allclose(found, torch.stack(truth)):
        return print(
            "The first image has no padding: does yours agree with mean()?"
        )
    if answer(x[:1], valid[:1]).shape != (1, 5):
        return print("Right for three images, but a single one loses its batch.")
    print("Right: every image counts its own positions.")


# %%
def masked_average(x, valid):
    """Return [B, C] from x [B, C, h, w] and valid [B, 1, h, w], 1 or 0."""


check_masked(masked_average)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def masked_average_solution(x, valid):
    return (x * valid).sum(dim=(2, 3)) / valid.sum(dim=(2, 3))


check_masked(masked_average_solution)

# %% [markdown]
# **Exercise 2.** Without building it: how many inputs has the linear layer behind a flattened map,
# and how many behind a grid? Let your answer hold for any image.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_inputs(answer):
    asked = [(224, 224, None), (180, 240, None), (225, 97, None), (225, 97, 3)]
    for height, width, grid in asked:
        image = torch.rand(1, 3, height, width)
        c5 = encoder(normalize(image)).c5
        pooled = c5 if grid is None else F.adaptive_avg_pool2d(c5, grid)
        predicted, true = answer(height, width, grid), pooled.numel()
        what = f"{height} × {width}, " + (f"grid {grid}" if grid else "no grid")
        if predicted is None:
            return print("Nothing returned yet: return a number.")
        if predicted == 512 * (height // 32) * (width // 32) != true:
            return print(f"{what}: you round down; the encoder rounds up.")
        if grid and predicted == 512 * grid != true:
            return print(f"{what}: the grid has {grid} rows and {grid} columns.")
        if predicted != true:
            return print(f"{what}: you say {predicted:,}; there are {true:,}.")
    print("Right. With a grid, the image's size does not enter.")


# %%
def linear_inputs(height, width, grid=None):
    """Return the number of inputs, for an image of height × width pixels."""


check_inputs(linear_inputs)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def linear_inputs_solution(height, width, grid=None):
    level = pyramid_levels(height, width)[-1]
    positions = level.height * level.width if grid is None else grid**2
    return level.channels * positions


check_inputs(linear_inputs_solution)

# %% [markdown]
# **Exercise 3.** Turn the puzzle into a test for any bridge: does the vector change when the
# positions are shuffled?


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_places(answer):
    torch.manual_seed(0)
    c5 = torch.rand(2, 512, 4, 6)
    before = c5.clone()
    bridges = {
        "PoolLinear": (PoolLinear(512, 8), False),
        "GeM": (GeM(512), False),
        "GridLinear of 1 × 1": (GridLinear(512, 8, 1), False),
        "GridLinear of 2 × 2": (GridLinear(512, 8, 2), True),
        "flatten": (nn.Sequential(nn.Flatten(), nn.Linear(512 * 24, 8)), True),
    }
    for name, (bridge, truth) in bridges.items():
        predicted = answer(bridge, c5)
        if predicted is None:
            return print("Nothing returned yet: return True or False.")
        if not torch.equal(c5, before):
            return print("You changed the map itself: shuffle a copy.")
        if predicted and not truth:
            return print(
                f"{name} knows no places, yet you say it does. Did you shuffle "
                "positions only, all channels alike? Then it is rounding: sums in "
                "another order. Use torch.allclose(…, atol=1e-4)."
            )
        if truth and not predicted:
            return print(
                f"{name} knows places, yet you say it does not. Did the positions "
                "really move?"
            )
    print("Right: what survives the shuffle knows no places.")


# %%
def knows_places(bridge, x):
    """Return whether shuffled positions of x [B, C, h, w] change the vector."""


check_places(knows_places)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def knows_places_solution(bridge, x):
    order = torch.randperm(x.shape[2] * x.shape[3])
    shuffled = x.flatten(2)[..., order].view_as(x)
    return not torch.allclose(bridge(x), bridge(shuffled), atol=1e-4)


check_places(knows_places_solution)

# %% [markdown]
# ## Recap
#
# - `flatten(1)`, never a bare `squeeze()`: the last batch may hold one image.
# - A linear layer behind a flattened map fits one image size. Pool first, to 1 × 1 or to a grid.
# - A pooled vector knows what and how much; of where it keeps a trace. A 2 × 2 grid gives much of it
#   back.
# - Average, GeM and maximum tell almost equally well whether a shape is there. Start with the average.
# - Compare every bottleneck with a decoder that sees nothing.
# - For masks, do not go through a vector at all.
#
# | shape contract | |
# |---|---|
# | in | a map `[B, C, h, w]`, any h and w; B may be 1 |
# | `PoolLinear`, `GridLinear` | → `[B, out_features]` |
# | `GeM` | → `[B, C]` |
# | `Painter` | `[B, C, h, w]` → `[B, out_channels, 8h, 8w]` |
# | `VectorDecoder` | a `Pyramid` → `[B, out_channels, 8·grid[0], 8·grid[1]]`; in a `Segmenter` the image's size |
#
# In your own project:
#
# ```python
# from helpers.bridges.pooling_linear import PoolLinear
# from helpers.encoder import ResNet18Encoder, normalize
#
# encoder = ResNet18Encoder()
# bridge = PoolLinear(encoder.out_channels[-1], 256)
# vector = bridge(encoder(normalize(images)).c5)  # [B, 256]
# ```
