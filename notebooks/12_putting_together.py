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
# # 12 · So which decoder should I use?
#
# Eleven chapters, some forty decoders, and you have an afternoon. Here is one decoder to start with: small
# enough to read in a minute, assembled from parts that earlier chapters measured. Each part has to earn its
# place: take it away, train again, and look at what is lost. The same class then paints colours into a grey
# scene and fills holes in another, with nothing changed but `out_channels` and the loss.

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
# - what the decoders of this book reach, and what work they take for it;
# - what happens when you stack everybody's best part: an error first, then a bill;
# - a decoder of three small pieces, and the chapter that each comes from;
# - one training with it, while you wait;
# - the same class with `out_channels=3`: a grey scene in colour, holes filled, and the loss that suits;
# - measured: each part taken away, the peers from a well-known library beside it, and what is left open.

# %%
from statistics import fmean
from textwrap import fill

import torch
import torch.nn.functional as F
from torch import nn

from helpers import plotting, records, scenes
from helpers.bridges.spatial_pyramid import PyramidPooling
from helpers.bridges.unet import UNetDecoder, UpBlock
from helpers.encoder import ResNet18Encoder, Segmenter, normalize
from helpers.errors import explaining
from helpers.inspection import count_macs, count_parameters, pyramid_levels, shapes
from helpers.metrics import SegmentationLoss, class_weights
from helpers.training import budget, evaluate, fit, predict

# %% [markdown]
# ## The problem as a picture
#
# The chapters on masks measured alike: three seeds, a frozen encoder, 400 scenes, 6 epochs. So their records can
# stand in one picture. To the right is more work, in millions of multiply-accumulates (MMAC) for one scene
# without the encoder; upwards is a better mask. A line at a point reaches from the worst seed to the best.

# %% tags=["nbval-ignore-output"]
encoder = ResNet18Encoder()
classes = len(scenes.CLASSES)
base = count_macs(encoder, torch.zeros(1, 3, 128, 128))
earlier = {
    "c5 alone": ("pooling_linear", "map"),
    "1×1, summed": ("conv_projection", "sum"),
    "concatenated, 3×3": ("conv_projection", "concatenate, 3×3"),
    "U-Net": ("unet", "U-Net"),
    "U-Net, adding": ("unet", "adding"),
    "many paths": ("multi_path", "many paths"),
    "FPN": ("multi_path", "FPN"),
}
work, known = {}, {}
for name, (slug, what) in earlier.items():
    evidence = records.of(slug)
    work[name] = (evidence.mean("scenes", what, "macs") - base) / 1e6
    known[name] = work[name], evidence.values("scenes", what)
plotting.show_tradeoff(
    known,
    "work of the decoder, MMAC",
    "mIoU on unseen scenes, %",
    alt="Seven decoders: mIoU over their work. Many paths reach what the U-Net "
    "reaches, with far less work.",
)

# %% [markdown]
# In the picture, five separate paths with 1×1 convolutions stand out: level with the U-Net, at an eighth of its work.
# Two scores that it does not show: on streets the U-Net is ahead, and on scenes the paths draw finer outlines, after
# so short a training. They have opposite habits: the U-Net convolves wide maps, 3×3, on every grid; the paths never
# look at a neighbour. There should be something between them.

# %%
both = records.of("unet", "multi_path")
assert both.margin("scenes", "many paths", "U-Net", "boundary_miou") > 2
assert work["many paths"] < 0.13 * work["U-Net"]
assert both.margin("streets", "U-Net", "many paths") > 1

# %% [markdown]
# ## The shapes
#
# Where does work come from? A 3×3 convolution costs *positions × channels in × channels out × 9*. Here is what
# one to 32 channels would cost at each level of a street of 192 × 256 pixels, and how many weights it has:

# %%
for level in pyramid_levels(192, 256):
    weights = level.channels * 32 * 9
    cost = weights * level.height * level.width / 1e6
    grid = f"{level.channels} × {level.height} × {level.width}"
    print(f"{level.name}: {grid:14} {cost:4.0f} MMAC {weights:8,} weights")

# %% [markdown]
# *Work* piles up at `c1`, *weights* pile up at `c5`. A decoder that should be cheap has to be careful with
# channels at both ends, and with 3×3 at the fine one.
#
# ## The obvious attempt, and what it does wrong
#
# Take what won in each chapter and stack it: context on `c5` (chapter 07), the U-Net's four steps
# (chapter 05), and a head that reads every level (chapter 06).


# %%
class FirstAttempt(nn.Module):
    """Everybody's best part: context, four steps up, a head that reads all."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        c1, c2, c3, c4, c5 = in_channels
        self.context = PyramidPooling(c5, 128)
        self.up4 = UpBlock(128, c4, 128)
        self.up3 = UpBlock(128, c3, 64)
        self.up2 = UpBlock(64, c2, 48)
        self.up1 = UpBlock(48, c1, 32)
        self.head = nn.Conv2d(32, out_channels, 1)

    def forward(self, pyramid):
        c1, c2, c3, c4, c5 = pyramid
        p5 = self.context(c5)
        p4 = self.up4(p5, c4)
        p3 = self.up3(p4, c3)
        p2 = self.up2(p3, c2)
        p1 = self.up1(p2, c1)
        size = p1.shape[-2:]
        maps = [F.interpolate(p, size, mode="bilinear") for p in (p5, p4, p3, p2)]
        return self.head(torch.cat([p1, *maps], dim=1))


torch.manual_seed(0)
attempt = FirstAttempt(encoder.out_channels, classes).eval()

# %% tags=["raises-exception"]
street = torch.rand(1, 3, 192, 256)
with explaining():
    attempt(encoder(normalize(street)))

# %% [markdown]
# **Fault one** is book-keeping: the head was built for `p1` alone, and now five maps arrive, 400 channels.
# Whoever joins parts has to carry the channel counts through. The cure is one line. **Fault two** raises
# nothing. Ask where the work is:


# %%
def work_by_part(decoder, height=192, width=256):
    """MMAC of the convolutions of each part, by its name in the decoder."""
    found = {}

    def counting(name):
        def count(conv, _, output):
            macs = output[0].numel() * conv.weight[0].numel() / 1e6
            found[name] = found.get(name, 0) + macs

        return count

    hooks = [
        part.register_forward_hook(counting(name.split(".")[0]))
        for name, part in decoder.named_modules()
        if isinstance(part, nn.Conv2d)
    ]
    with torch.no_grad():
        decoder.eval()(encoder(torch.zeros(1, 3, height, width)))
    for hook in hooks:
        hook.remove()
    return found


attempt.head = nn.Conv2d(32 + 48 + 64 + 128 + 128, classes, 1)
bill = work_by_part(attempt)
plotting.show_bars(
    bill,
    ylabel="work, MMAC",
    digits=0,
    highlight="up1",
    alt="Of the parts of the first attempt, up1 takes by far the most work.",
)

# %%
encoder_work = count_macs(encoder, torch.zeros(1, 3, 192, 256)) / 1e6
print(
    f"the encoder: {encoder_work:,.0f} MMAC, the attempt: {sum(bill.values()):,.0f}"
)
assert bill["up1"] > 0.4 * sum(bill.values()) and max(bill, key=bill.get) == "up1"

# %% [markdown]
# More than four tenths go into a single convolution, at the finest grid, on a map that knows least. And
# whether any of the parts is worth its work *beside the others*, nobody has asked. A part that helps a
# poor decoder may have nothing left to do in a good one.
#
# ## The technique
#
# Three ideas are left when one asks for each part: what does it cost, and what did its chapter measure?
#
# **Laterals** (chapters 03 and 06). Each map passes a 1×1 convolution first, down to few channels. Chapter 03
# showed how little that costs if done before any resizing. With BatchNorm and ReLU behind it, as in
# chapter 06, it does more than compress: it makes features of its own, before anything is mixed.
#
# **Merges** (chapter 05). From `c5` on, enlarge to the next lateral's size, concatenate, convolve. A skip
# joins where it belongs, on its own grid. Concatenating beat adding where a 3×3 followed (chapter 03);
# without ReLUs the U-Net lost 2 points and more (chapter 05).
#
# **A 1×1 at c1.** Chapter 06 showed that `c1` is needed for outlines, and that paths with 1×1 convolutions can
# use it. So the merge at `c1` gets a 1×1, and the most expensive convolution is gone.

# %%
sums = records.of("conv_projection")
assert sums.margin("scenes", "concatenate, 3×3", "sum, 3×3") > 0.5
assert records.of("unet").margin("scenes", "U-Net", "no ReLU") > 2
outlines = "many paths", "without c1", "boundary_miou"
assert records.of("multi_path").margin("scenes", *outlines) > 5

# %% [markdown]
# **What stays out, for now.** Pyramid pooling gave 1 point and more to a decoder that read `c2` and `c3` only
# (chapter 07); the image itself gave sharper rims to one without `c1` and `c2` (chapter 09). This one reads
# all five. On streets, a transposed convolution gave no more than bilinear resizing (chapter 08), and
# attending queries no more than averaging ones (chapter 04).

# %%
evidence = records.of("spatial_pyramid", "conditional_concat")
assert evidence.margin("streets", "c3, PPM", "c3") > 1
assert evidence.margin("streets", "soft mask", "no image", "boundary_miou") > 2
evidence = records.of("upsampling", "attention")
for pair in (
    ("transposed", "bilinear"),
    ("attending queries", "averaging queries"),
):
    one, other = (evidence.mean("streets", what) for what in pair)
    assert abs(one - other) < 1

# %% [markdown]
# Now in code: a function, a block, a decoder.

# %% tags=["export"]
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.encoder import Pyramid, check_map, check_pyramid


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Return a convolution, BatchNorm and ReLU that keep the map's size.

    `[B, in_channels, h, w]` becomes `[B, out_channels, h, w]`, no value negative;
    `kernel` is odd.
    """
    padding = kernel // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


# %% tags=["export"]
class Merge(nn.Module):
    """Bring a coarse map to a skip's size, concatenate both, convolve.

    `forward(x, skip)` takes `[B, in_channels, h, w]` and
    `[B, skip_channels, H, W]`, any sizes, and returns `[B, out_channels, H, W]`,
    no value negative. Raises `ValueError` for other channels or ranks, `TypeError`
    for integers, and, in training, `ValueError` for one image whose skip is a
    single position: BatchNorm needs two values.

    Source: cf. Ronneberger et al., U-Net, MICCAI 2015.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        kernel: int = 3,
    ):
        super().__init__()
        self.channels = in_channels, skip_channels
        self.conv = conv_bn_relu(in_channels + skip_channels, out_channels, kernel)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_map("x", x, self.channels[0])
        check_map("skip", skip, self.channels[1])
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
        return self.conv(torch.cat([x, skip], dim=1))


# %%
torch.manual_seed(0)
lateral = conv_bn_relu(256, 64, kernel=1)
c5, c4 = torch.rand(1, 64, 6, 8), torch.rand(1, 256, 12, 15)
print("lateral", list(c4.shape), "→", list(shapes(lateral, c4)))
merge = Merge(in_channels=64, skip_channels=64, out_channels=48)
print("merge  ", list(c5.shape), "→", list(shapes(merge, c5, lateral(c4))))

# %% [markdown]
# Five laterals, four merges, a head. Widths shrink as grids grow:


# %% tags=["export"]
class BookDecoder(nn.Module):
    """The book's default: five maps made slim, merged one by one up to c1's grid.

    `forward(pyramid)` takes the encoder's five maps, from images of any H, W ≥ 32,
    and returns `[B, out_channels, ⌈H/2⌉, ⌈W/2⌉]`; `Segmenter` brings it to H × W.
    `laterals` are the channels that c1…c5 are brought to, `widths` those after the
    merges at c4, c3, c2, c1. Raises `ValueError` for maps with other channels than
    `in_channels`, `TypeError` for integers, and, in training, `ValueError` for one
    image of 32 × 32 pixels: BatchNorm needs two values.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        laterals: Sequence[int] = (32, 32, 48, 64, 64),
        widths: Sequence[int] = (64, 48, 32, 32),
    ):
        super().__init__()
        self.in_channels = tuple(in_channels)
        sides = zip(self.in_channels, laterals, strict=True)
        self.laterals = nn.ModuleList(conv_bn_relu(c, side, 1) for c, side in sides)
        s1, s2, s3, s4, s5 = laterals
        w4, w3, w2, w1 = widths
        self.merge4 = Merge(s5, s4, w4)
        self.merge3 = Merge(w4, s3, w3)
        self.merge2 = Merge(w3, s2, w2)
        self.merge1 = Merge(w2, s1, w1, kernel=1)
        self.head = nn.Conv2d(w1, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        levels = zip(self.laterals, pyramid, strict=True)
        c1, c2, c3, c4, c5 = [lateral(c) for lateral, c in levels]
        p4 = self.merge4(c5, c4)
        p3 = self.merge3(p4, c3)
        p2 = self.merge2(p3, c2)
        p1 = self.merge1(p2, c1)
        return self.head(p1)


# %%
torch.manual_seed(0)
decoder = BookDecoder(encoder.out_channels, out_channels=classes)
model = Segmenter(encoder, decoder)
for height, width in [(128, 128), (180, 240), (33, 97)]:
    logits = model(normalize(torch.rand(2, 3, height, width)))
    print(f"{height} × {width} → {list(logits.shape)}")
    assert logits.shape == (2, classes, height, width)
one = model.train()(
    normalize(torch.rand(1, 3, 40, 40))
)  # a batch of one, in training
assert one.shape == (1, classes, 40, 40)

# %%
image, _ = scenes.batch([5_000])
plotting.pyramid_diagram(
    encoder,
    image[0],
    decoder,
    bridge="lateral",
    parts=["merge4", "merge3", "merge2", "merge1", "head"],
    alt="The encoder's maps descend at the left, the decoder's climb at the right, "
    "and an arrow joins each pair on the way.",
)

# %% [markdown]
# And the bill, beside that of chapter 05's U-Net:

# %%
unet = UNetDecoder(encoder.out_channels, classes)
for name, each in {"U-Net": unet, "book decoder": decoder}.items():
    parts = work_by_part(each)
    print(f"{name}: {sum(parts.values()):.0f} MMAC,", end=" ")
    print(f"{count_parameters(each):,} parameters")
    print("  ", ", ".join(f"{part} {macs:.0f}" for part, macs in parts.items()))
assert sum(work_by_part(decoder).values()) < 0.25 * sum(work_by_part(unet).values())
assert count_parameters(decoder) < 0.2 * count_parameters(unet)
assert work_by_part(decoder)["merge1"] < 0.15 * sum(work_by_part(decoder).values())

# %% [markdown]
# Less than a quarter of the work and less than a fifth of the weights. The merge at `c1`, the U-Net's most expensive
# part, takes less than a sixth of the bill.
#
# ## Train it
#
# 96 scenes, a few epochs, and a look at four scenes that it never trains on:

# %%
epochs = budget(short=5, full=40)
train, unseen = scenes.Scenes(96), scenes.Scenes(40, first=5_000)
train = [train[i] for i in range(len(train))]  # draw each scene once
loss = SegmentationLoss(class_weights=class_weights((m for _, m in train), classes))
shown = scenes.batch(range(5_000, 5_004))

torch.manual_seed(0)
model = Segmenter(encoder, BookDecoder(encoder.out_channels, classes))
before = predict(model, shown[0])
history = fit(model, train, epochs=epochs, lr=5e-3, loss=loss)
after = predict(model, shown[0])

# %% tags=["nbval-ignore-output"]
plotting.show_histories(
    {"book decoder": history},
    alt="Loss and mIoU on the training scenes over the epochs.",
)

# %% tags=["nbval-ignore-output"]
score = evaluate(model, unseen)
boundary = score.boundary_miou
print(f"unseen: mIoU {score.miou:.1f} %, boundary IoU {boundary:.1f} %")
plotting.show_masks(
    {"mask": shown[1], "untrained": before, "trained": after},
    alt="Four unseen scenes: their masks, and what the decoder predicts before "
    "and after the training.",
)

# %%
assert history.loss[-1] < 0.5 * history.loss[0]
assert score.miou > 1.5 * 100 / classes

# %% [markdown]
# It learns. How good it gets, and whether its parts are worth having, the records below tell.
#
# ## Image to image
#
# A decoder returns numbers for each pixel. Nothing says that they are classes. With `out_channels=3` they can
# be colours. Three things change, none of them in the decoder:
#
# - **The target** is an image. Ask only for *what the cheap answer lacks*. For a grey scene the cheap
#   answer is the grey itself; the target is the colour minus the grey. So all the fine detail passes
#   by the decoder, whose grid is half as fine.
# - **The loss** compares colours. Squared error asks for the *mean* of all colours that are possible,
#   absolute error (L1) for their *median*. If a thing is red seven times in ten and else teal:

# %%
red, teal = torch.tensor([0.73, 0.24, 0.19]), torch.tensor([0.20, 0.50, 0.49])
seen = torch.stack([red] * 7 + [teal] * 3)
squared, absolute = seen.mean(0), seen.median(0).values
plotting.show_images(
    [c.view(3, 1, 1).expand(3, 24, 48) for c in (red, teal, squared, absolute)],
    titles=["7 times", "3 times", "best by squares", "best by L1"],
    alt="A red, a teal, a brown between the two, and the red again.",
)

# %% [markdown]
# The mean is a brown that nobody painted. The median is one of the two colours that exist. (Of more than two, each
# channel has a median of its own.) It is not a cure for everything: where the guesses are even, L1 is undecided, and
# most images that L1 learns look paler than real ones.
#
# - **Where it counts** differs: everywhere for colours, but for holes only in the holes. The target carries
#   that as a fourth channel, which needs no change in the training loop either.


# %% tags=["export"]
def l1_where(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error where it counts, a scalar.

    `prediction` is `[B, C, H, W]`; `target` is `[B, C + 1, H, W]`, its last channel
    1 where an error counts and 0 where not. Nothing counted gives 0. Raises
    `ValueError` for other shapes.
    """
    batch, channels, *size = prediction.shape
    if list(target.shape) != [batch, channels + 1, *size]:
        raise ValueError(
            f"Expected a target {[batch, channels + 1, *size]}, got "
            f"{list(target.shape)}. Its last channel says where an error counts: "
            "torch.cat([target, counts], dim=1)."
        )
    goal, counts = target[:, :-1], target[:, -1:]
    off = ((prediction - goal).abs() * counts).sum()
    return off / (channels * counts.sum()).clamp_min(1)


# %%
black = torch.zeros(1, 3, 4, 4)
half = torch.zeros(1, 1, 4, 4)
half[..., :2] = 1  # only the left half counts
white_left = torch.cat([half.expand(1, 3, 4, 4), half], dim=1)
white_right = torch.cat([(1 - half).expand(1, 3, 4, 4), half], dim=1)
print(l1_where(black, white_left).item(), l1_where(black, white_right).item())

# %% [markdown]
# Two tasks. `grey_of` throws the colour away. `punch` cuts a quarter of all 16 × 16 squares out and fills them
# with what the surroundings suggest: a blurred average of the pixels that are left, the cheap answer there.


# %% tags=["export"]
def grey_of(images: Tensor) -> Tensor:
    """Return the brightness of images `[B, 3, H, W]`, three times."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (images * weights).sum(1, keepdim=True).expand_as(images)


def punch(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return images whose holes are filled from around, and where the holes are.

    `images` are `[B, 3, H, W]`, 0…1, H and W > 16. A quarter of the squares of
    16 × 16 pixels become holes, drawn from `seed`; each pixel in them gets the mean
    of the pixels left near it. The second result is `[B, 1, H, W]`, 1 in holes, 0
    elsewhere.
    """
    batch, _, height, width = images.shape
    rows, columns = -(-height // 16), -(-width // 16)
    dice = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, rows * columns, generator=dice).argsort(1)
    squares = (order < rows * columns // 4).view(batch, 1, rows, columns).float()
    holes = F.interpolate(squares, scale_factor=16)[..., :height, :width]
    holes = holes.to(images.device)
    near, count = images * (1 - holes), 1 - holes
    for window in [(17, 1), (1, 17)] * 3:  # three means each way: a smooth blur
        pad = window[0] // 2, window[1] // 2
        near, count = (F.avg_pool2d(x, window, 1, pad) for x in (near, count))
    fill = (near / count.clamp_min(1e-6)).clamp(0, 1)
    return torch.where(holes > 0, fill, images), holes


# %%
truth = {
    "train": torch.stack([image for image, _ in train]),
    "unseen": torch.stack([unseen[i][0] for i in range(40)]),
}
grey = {part: grey_of(images) for part, images in truth.items()}
patched, holes = {}, {}
for seed, (part, images) in enumerate(truth.items()):
    patched[part], holes[part] = punch(images, seed)
everywhere = {part: torch.ones_like(each) for part, each in holes.items()}
for part, images in holes.items():
    print(f"{part}: {images.mean():.0%} of all pixels lie in holes")

# %% [markdown]
# The same function trains both. Its pairs are an image to look at and four channels to learn from:


# %%
def finish(model, given):
    """The cheap answer plus what the decoder adds, [B, 3, H, W], 0…1."""
    device = next(model.parameters()).device
    with torch.no_grad():
        added = model.eval()(normalize(given.to(device))).cpu()
    return (given + added).clamp(0, 1)


def learn(given, counts, after_epoch=None):
    """A book decoder with three output channels, trained on what is missing."""
    goal = torch.cat([truth["train"] - given["train"], counts["train"]], dim=1)
    torch.manual_seed(0)
    decoder = BookDecoder(encoder.out_channels, out_channels=3)
    nn.init.zeros_(decoder.head.weight)  # it starts with the cheap answer
    nn.init.zeros_(decoder.head.bias)
    model = Segmenter(encoder, decoder)
    fit(
        model,
        list(zip(given["train"], goal, strict=True)),
        epochs=epochs,
        lr=1e-2,
        loss=l1_where,
        after_epoch=after_epoch and (lambda epoch: after_epoch(model)),
    )
    return model


few = slice(0, 3)
painted = [grey["unseen"][few]]
painter = learn(
    grey, everywhere, lambda model: painted.append(finish(model, painted[0]))
)
filler = learn(patched, holes)

# %% [markdown]
# Three unseen scenes in grey, and the painter's colours after each epoch; the last frame is the truth. Pull
# the slider. It learns usual tints: light grounds become warm, dark things bluish, much alike in every scene. That
# suits one ground and not another. A thing hardly gets its own colour: in scenes, colour is drawn apart from shape,
# and no grey value says whether a star is teal or pink.

# %% tags=["nbval-ignore-output"]
steps = range(0, epochs + 1, max(1, epochs // 5))
frames = [
    plotting.show_images(each, alt="Three scenes in the painter's colours.")
    for each in [*(painted[i] for i in steps), truth["unseen"][few]]
]
after = [f"after {i} epoch{'s' * (i > 1)}" for i in steps[1:]]
labels = ["grey", *after, "the truth"]
plotting.flipbook(frames, labels, alt="Three scenes while colours are learnt")

# %% [markdown]
# The filler draws edges into the holes, where the blur had none. Where little of a thing is left it stays a
# smear: L1 asks for the median, pixel by pixel and channel by channel, and does not mind a smear.

# %% tags=["nbval-ignore-output"]
given, where = patched["unseen"][few], holes["unseen"][few]
filled = torch.where(where > 0, finish(filler, given), given)
plotting.show_images(
    [*given, *filled, *truth["unseen"][few]],
    titles=["cheap answer"] * 3 + ["book decoder"] * 3 + ["truth"] * 3,
    columns=3,
    alt="Three scenes with blurred squares, with the squares repainted, and whole.",
)

# %% [markdown]
# A number needs something to be compared with. For colours there is a good cheap answer: look up the usual tint
# of each level of brightness, in a table of 32 rows that knows neither shapes nor places.


# %% tags=["export"]
def tinted(grey: Tensor, seen_grey: Tensor, seen: Tensor, levels: int) -> Tensor:
    """Return grey images, each pixel in the usual tint of its brightness.

    All are `[B, 3, H, W]`, 0…1, B and sizes as they like. A tint is colour minus
    grey; the usual one is the median, channel by channel, over the pixels of
    `seen` whose brightness falls into the same of `levels` equal steps.
    """
    tint = (seen - seen_grey).movedim(1, 0).flatten(1)

    def step(brightness: Tensor) -> Tensor:
        return (brightness * levels).long().clamp(0, levels - 1)

    table, steps = tint.new_zeros(3, levels), step(seen_grey[:, 0]).flatten()
    for k in steps.unique():
        table[:, k] = tint[:, steps == k].median(1).values
    return grey + table[:, step(grey[:, 0])].movedim(0, 1)


# %%
def error(answer, counts):
    """The mean absolute error where it counts, in per cent of the full range."""
    goal = torch.cat([truth["unseen"], counts["unseen"]], dim=1)
    return 100 * l1_where(answer.clamp(0, 1), goal).item()


colours = {
    "grey": grey["unseen"],
    "tint by brightness": tinted(grey["unseen"], grey["train"], truth["train"], 32),
    "book decoder": finish(painter, grey["unseen"]),
}
wholes = {
    "blurred": patched["unseen"],
    "book decoder": finish(filler, patched["unseen"]),
}
errors = {
    "colours": {name: error(each, everywhere) for name, each in colours.items()},
    "holes": {name: error(each, holes) for name, each in wholes.items()},
}
for found in errors.values():
    assert found["book decoder"] < 0.95 * next(iter(found.values()))
assert errors["colours"]["tint by brightness"] < errors["colours"]["book decoder"]

# %% tags=["nbval-ignore-output"]
for task, found in errors.items():
    values = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    print(f"{task}, error in %: {values}")

# %% [markdown]
# In this short training the table of brightness wins. Would more training help, or other images?
# `python -m experiments.chapters.putting_together.analysis` trains on 400 scenes and on streets, with three seeds. How much of the
# cheap answer's error is left, in per cent; at 100 nothing is gained, above it something is spoilt:

# %% tags=["nbval-ignore-output"]
repairs = records.of("image_to_image")


def left_over(where, what, answer="book decoder"):
    """Per cent of the cheap answer's error, for each seed."""
    cheap = {"colours": "grey", "holes": "blurred"}[what]
    errors = repairs.values(where, what, "error")
    return [100 * error[answer] / error[cheap] for error in errors]


plotting.show_bars(
    {
        f"{what}, {where}: {answer}": left_over(where, what, answer)
        for what, where, answer in (
            ("colours", "scenes", "tint by brightness"),
            ("colours", "scenes", "book decoder"),
            ("colours", "streets", "tint by brightness"),
            ("colours", "streets", "book decoder"),
            ("holes", "scenes", "book decoder"),
            ("holes", "streets", "book decoder"),
        )
    },
    ylabel="error left, % of the cheap answer's",
    digits=0,
    alt="What is left of the cheap answer's error on unseen images, for two tasks "
    "on scenes and on streets.",
)

# %% [markdown]
# **Holes**: a fifth and more of the blur's error goes away, on scenes and on streets. **Colours** are a
# lesson in comparing. On scenes the decoder is no better than the table: things are painted in any colour, so
# brightness is all that tells. On streets, whoever learns colours does worse than *leaving it grey*, and the table
# too: these photographs have little colour, and the drive to report on has another tint than those to learn from.
# The pictures alone would not have told you. Where a cheap answer is good, start from it, and count what is gained.

# %%
for where in ("scenes", "streets"):
    assert max(left_over(where, "holes")) < 80
assert len(repairs) == 12
by_brightness = left_over("scenes", "colours", "tint by brightness")
assert min(left_over("scenes", "colours")) > max(by_brightness)
for who in ("one tint", "tint by brightness", "book decoder"):
    assert min(left_over("streets", "colours", who)) > 105
assert max(left_over("scenes", "colours")) < 75
assert max(r["error"].get("grey", 0) for r in repairs if r["data"] == "streets") < 2

# %% [markdown]
# ## Look inside: what comes from which level?
#
# A merge sees two sources side by side, so its weights can be compared: how large are those that read what
# comes from below, and those that read the level's own lateral? The share of the second:


# %%
def own_share(decoder):
    """Per cent of each merge's weights (mean squares) that read the skip."""
    shares = []
    for merge in (decoder.merge4, decoder.merge3, decoder.merge2, decoder.merge1):
        weight, (below, _) = merge.conv[0].weight.detach(), merge.channels
        squares = weight.square().mean((0, 2, 3))
        under, own = squares[:below].mean(), squares[below:].mean()
        shares.append(100 * (own / (under + own)).item())
    return shares


shares = {
    "masks": own_share(model.decoder),
    "colours": own_share(painter.decoder),
    "holes": own_share(filler.decoder),
}


# %% tags=["nbval-ignore-output"]
plotting.show_panels(
    {"weight per channel on the level's own map, %": shares},
    x=("at c4", "at c3", "at c2", "at c1"),
    alt="For three tasks: how much each merge weighs its own level's map.",
)

# %% [markdown]
# At 50 % a merge weighs both sides alike. To fill holes, the merges at `c3` and `c2` listen more to their own level
# than those that draw masks: an edge has to be carried on, and it does not matter what it is the edge of.
# (BatchNorm behind every lateral and every merge brings the channels to like sizes, so that weights may be compared
# at all. It remains a rough look: a channel with a large weight need not decide anything.)

# %%
for at in (1, 2):  # c3 and c2
    assert shares["holes"][at] > shares["masks"][at] + 3
assert shares["holes"][2] > shares["masks"][2] + 10

# %% [markdown]
# ## Measure the claims
#
# `python -m experiments.benchmark` trains the book's decoders, this one with each part taken away, and the
# decoders of segmentation-models-pytorch (*smp*, the library that you would otherwise install) in one loop: the same
# frozen encoder, the same images, two learning rates each, of which the one that is better on images kept for
# that goes on with more seeds. It reports on 200 unseen scenes and on an unseen drive through streets.
# `python -m experiments.benchmark.costs` counts and times.
#
# It trains for 12 epochs on scenes and 10 on streets. So a decoder has another number here than in the first picture,
# and another order is possible, too: the paths' lead at the outlines of scenes is no longer beyond the seeds.

# %%
bench = records.of("benchmark", chosen=True, frozen=True, device="cpu")
costs = {r["what"]: r for r in records.of("costs", device="cpu")}
scores, mean, margin = bench.values, bench.mean, bench.margin


def work_of(what):
    """MMAC for a street, the encoder included, as far as the decoder needs it."""
    return costs[what]["macs"] / 1e6


assert margin("scenes", "many paths", "U-Net", "boundary_miou") < 0
variants = [what for what in bench.names() if "book, " in what]
changes = {
    what.removeprefix("book, "): bench.differences("scenes", what, "book decoder")
    for what in variants
}

# %% [markdown]
# **Each part, taken away or changed**, and what more there is to add. The points are seeds, each minus the book
# decoder with the same seed:

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    changes,
    ylabel="change of mIoU on unseen scenes, points",
    alt="What each change of a part does to mIoU on scenes.",
)

# %% [markdown]
# And what it does to the work for one street:

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        what.removeprefix("book, "): work_of(what) - work_of("book decoder")
        for what in variants
    },
    ylabel="change of work, MMAC",
    digits=0,
    alt="What each change of a part does to the work.",
)

# %% [markdown]
# **What is in it pays.** Leave the laterals linear (no BatchNorm, no ReLU), take only their ReLU out, or all laterals
# away, or add in place of concatenating: each costs more than a point, with every seed. Without `c1` more than two
# points go, and more than four at the outlines. A decoder
# that is *blind to c1*, with all its layers and zeros for the map, does no better than one that ends at `c2`: it is
# the values of `c1` that count, not the finer grid. Least comes from the BatchNorm of the laterals, some half a
# point, though with every seed.
#
# **What is not in it would not pay.** A 3×3 at `c1` takes more work than the whole decoder has now and brings
# nothing. Pyramid pooling on `c5`, or a head that reads all levels, now above the one seed and now below the other:
# no difference seen. Width does pay, at its price: twice the channels bring at most about a point and need a
# quarter more work, encoder included; half of them cost a point and more on average. `laterals` and `widths` are
# arguments.

# %%
for part in ("linear laterals", "laterals without ReLU", "no laterals", "summed"):
    assert max(changes[part]) < -1
for part in ("ends at c2", "blind to c1"):
    assert max(changes[part]) < -2
    pair = "book decoder", f"book, {part}"
    assert min(bench.differences("scenes", *pair, "boundary_miou")) > 4
assert abs(fmean(changes["ends at c2"]) - fmean(changes["blind to c1"])) < 0.5
assert min(changes["laterals without BatchNorm"]) > -1
assert max(changes["laterals without BatchNorm"]) < 0
assert max(changes["3×3 at c1"]) < 0.3
for part in ("PPM on c5", "head on all levels"):
    assert min(changes[part]) < 0 < max(changes[part]) < 1
assert min(changes["twice as wide"]) > 0 and max(changes["twice as wide"]) < 1.5
assert fmean(changes["half as wide"]) < -1
assert all(len(seeds) == 3 for seeds in changes.values())
whole = work_of("book decoder")
own_work = costs["book decoder"]["decoder_macs"] / 1e6
assert work_of("book, 3×3 at c1") - whole > own_work
assert 1.2 < work_of("book, twice as wide") / whole < 1.3

# %% [markdown]
# **Beside the peers.** One decoder *dominates* another if it takes no more work and its worst seed is better than the
# other's best. By that rule noise dominates nobody.


# %%
peers = sorted({r["what"] for r in bench if r["what"].startswith("smp ")})
compared = {
    where: [n for n in ("book decoder", "U-Net", *peers) if n in bench.names(where)]
    for where in ("scenes", "streets")
}
for where, names in compared.items():
    counted = {name: len(scores(where, name)) for name in names}
    for count in sorted(set(counted.values()), reverse=True):
        some = [n.removeprefix("smp ") for n in names if counted[n] == count]
        print(fill(f"{where}, {count} of 3 seeds: {', '.join(some)}", 66))


def dominating(where, what, cost=work_of):
    """The peers that cost no more and are better, beyond the seeds' noise."""
    return [
        peer
        for peer in peers
        if peer in compared[where]
        and cost(peer) <= cost(what)
        and margin(where, peer, what) > 0
    ]


def latency(what):
    return costs[what]["latency"][0]


# %% tags=["nbval-ignore-output"]
for where, names in compared.items():
    names.sort(key=lambda name: -mean(where, name))
    named = {name: f"{name}, {work_of(name) / 1e3:.2f} GMAC" for name in names}
    display(
        plotting.show_bars(
            {named[name]: scores(where, name) for name in names},
            ylabel=f"mIoU on unseen {where}, %",
            highlight=named["book decoder"],
            alt=f"mIoU on {where} of the book decoder, chapter 05's U-Net and "
            "smp's decoders, sorted, with the work of each.",
        )
    )

# %% [markdown]
# On scenes, the worst seed of the book decoder is more than a point and a half above the best seed of any peer but one.
# Only the two PSPNets take less work, and they are more than ten points behind. At Linknet's work, with less than half
# of its weights, it gains more than five points on Linknet. The one is `UnetPlusPlus`, for six times the work and more
# than four times the time: its best seed is ahead, its mean behind by less than a point. Three seeds cannot tell the
# two apart.
#
# On streets its mean is more than a point above that of any peer with three seeds. The nearest is smp's `Segformer`,
# for half as much work again; its best seed stays a hair below the book decoder's worst. Linknet is more than three
# points behind. Two are level: its big relative of chapter 05, which these seeds cannot tell from it, and, as far as a
# single seed tells, `UPerNet`, for nearly six times the work. (The two other dear ones, with one seed there, too, are
# behind.)
#
# Nobody dominates it, by work or by time: for one image on one thread of a CPU, encoder and decoder take less than a
# quarter longer than the encoder alone. Chapter 13 has all decoders, other scores than mIoU, and reasons for doubt.

# %%
encoder.cpu()  # fit may have taken it to a GPU
street_model = Segmenter(encoder, BookDecoder(encoder.out_channels, 11)).eval()
total = count_macs(street_model, torch.zeros(1, 3, 192, 256))
linknet = costs["smp Linknet"]
assert total == costs["book decoder"]["macs"] < linknet["macs"] < 1.99e9
assert count_parameters(street_model.decoder) < 0.5 * linknet["parameters"]
assert latency("book decoder") < 1.25
for where in ("scenes", "streets"):
    for cost in (work_of, latency):
        assert not dominating(where, "book decoder", cost)

# %%
assert all(len(scores("scenes", peer)) == 3 for peer in peers)
default, level = ("scenes", "book decoder"), "smp UnetPlusPlus"
assert all(margin(*default, peer) > 1.5 for peer in peers if peer != level)
cheaper = [peer for peer in peers if work_of(peer) < work_of("book decoder")]
assert all("PSPNet" in peer for peer in cheaper) and len(cheaper) == 2
assert all(margin(*default, peer) > 10 for peer in cheaper)
assert margin(*default, "smp Linknet") > 5
assert max(scores("scenes", level)) > max(scores(*default))
assert mean(*default) - 1 < mean("scenes", level) < mean(*default)
assert work_of(level) > 6 * work_of("book decoder")
assert latency(level) > 4 * latency("book decoder")

# %%
default = "streets", "book decoder"
judged = [peer for peer in peers if len(scores("streets", peer)) == 3]
once = {*peers} - {*judged}
assert once == {peer for peer in peers if work_of(peer) > 11e3} and len(once) == 3
behind = {peer: mean(*default) - mean("streets", peer) for peer in peers}
assert abs(behind.pop("smp UPerNet")) < 0.5
assert 5.5 < work_of("smp UPerNet") / work_of("book decoder") < 6
assert min(behind.values()) > 1
nearest = min(judged, key=behind.get)
assert nearest == "smp Segformer" and 0 < margin(*default, nearest) < 0.2
assert 1.5 < work_of(nearest) / work_of("book decoder") < 1.6
assert margin(*default, "smp Linknet") > 3
assert abs(mean(*default) - mean("streets", "U-Net")) < 1

# %% [markdown]
# ## Limits
#
# - One encoder, a small one, trained on small images. With a larger encoder and more training data, wider
#   decoders may pay; the widths are two arguments.
# - The parts and widths were chosen on development scenes and on the clip for choosing, with one seed: a choice
#   among a dozen, not a search. The peers were taken as they come, with smp's own settings.
# - What its parts are worth was measured on scenes only, on streets the whole decoder; each training is short (12
#   epochs on 400 scenes, 10 on 266 streets), and the encoder frozen.
# - Work is not time. Resizing and concatenating take time that no MAC counts, and a GPU hardly notices
#   what a CPU has to wait for. The records hold both.
# - The logits lie at half the image's resolution. What is thinner than two pixels stays hard (chapter 08).
# - L1 prefers a pale safe guess to a sharp one. Losses that do not are outside of this book.
# - It has no input of its own. For a query or a vector, chapter 10 brings one in.
#
# ## Exercises


# %% [markdown]
# **Exercise 1.** At `c1` the merge enlarges `p2`, concatenates the lateral, and convolves 1×1. A 1×1 convolution
# and bilinear resizing can change places (chapter 03). Compute the same output with the part of the weights that
# belongs to `x` applied on the coarse grid: the same numbers, for less work. (Use `F.conv2d`: the check watches on
# which grids it is called.)


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_order(answer):
    torch.manual_seed(3)
    merge = Merge(6, 5, 4, kernel=1).eval()
    nn.init.uniform_(merge.conv[1].running_mean, -1, 1)
    x, skip = torch.rand(2, 6, 5, 7), torch.rand(2, 5, 12, 15)
    grids = []
    whole = F.conv2d

    def watched(x, *rest, **named):
        grids.append((x.shape[1], tuple(x.shape[-2:])))
        return whole(x, *rest, **named)

    F.conv2d = watched
    try:
        with torch.no_grad():
            found, expected = answer(merge, x, skip), merge(x, skip)
    except (RuntimeError, TypeError, ValueError) as error:
        return print(f"It stops with: {str(error).splitlines()[0]}")
    finally:
        F.conv2d = whole
    if not isinstance(found, torch.Tensor):
        return print("Nothing returned yet: return a map [B, out_channels, H, W].")
    if found.shape != expected.shape:
        return print(f"Expected {list(expected.shape)}, got {list(found.shape)}.")
    if not torch.allclose(found, expected, atol=1e-5):
        return print(
            "Other numbers. The weights are those of x, then those of the skip; "
            "BatchNorm and ReLU come once, after the sum."
        )
    if (6, (5, 7)) not in grids:
        return print(
            "Right numbers, but no F.conv2d has seen x on its own 5 × 7 grid."
        )
    print("Right: the same map, and x is conv_bn_relu where it is small.")


# %%
def merge_cheaply(merge, x, skip):
    """Return merge(x, skip); merge.conv is (1×1 convolution, BatchNorm, ReLU)."""


check_order(merge_cheaply)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def merge_cheaply_solution(merge, x, skip):
    conv, norm, relu = merge.conv
    below = x.shape[1]
    small = F.conv2d(x, conv.weight[:, :below])
    side = F.conv2d(skip, conv.weight[:, below:])
    large = F.interpolate(small, size=skip.shape[-2:], mode="bilinear")
    return relu(norm(large + side))


check_order(merge_cheaply_solution)

# %% [markdown]
# **Exercise 2.** Change a decoder for masks into one for images, in place: new head, three channels, and it has to
# start by adding nothing. All other weights stay.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_head(answer):
    torch.manual_seed(4)
    decoder = BookDecoder(encoder.out_channels, classes).eval()
    before = {name: w.clone() for name, w in decoder.named_parameters()}
    try:
        answer(decoder)
        with torch.no_grad():
            found = decoder.eval()(encoder(normalize(image)))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return print(f"It stops with: {str(error).splitlines()[0]}")
    if found.shape[1] == classes:
        return print(f"Still {classes} channels: replace decoder.head.")
    if found.shape[1] != 3:
        return print(f"Three channels are colours; yours has {found.shape[1]}.")
    for name, w in decoder.named_parameters():
        if not name.startswith("head") and not torch.equal(before.get(name, w), w):
            return print(f"{name} has changed, too. Leave all but the head.")
    if found.abs().max() > 0:
        return print("It adds something already: weight *and* bias start at zero.")
    if not any(w.requires_grad for w in decoder.head.parameters()):
        return print("The head cannot learn: has it parameters with gradients?")
    print("Right: three channels, and the first answer is the cheap one.")


# %%
def make_painter(decoder):
    """Give a BookDecoder a head for images, in place."""


check_head(make_painter)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def make_painter_solution(decoder):
    decoder.head = nn.Conv2d(decoder.head.in_channels, 3, 1)
    nn.init.zeros_(decoder.head.weight)
    nn.init.zeros_(decoder.head.bias)


check_head(make_painter_solution)

# %% [markdown]
# **Exercise 3.** From the first picture's `known` (name → work, scores): which decoders does no other one
# *dominate*, by the rule above? Return the set of their names. (By the numbers: FPN takes a thousandth less work than
# *1×1, summed*, too little to see.)


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_front(answer):
    def beaten(name):
        cost, own = known[name]
        others = [known[other] for other in known if other != name]
        return any(c <= cost and min(s) > max(own) for c, s in others)

    front = {name for name in known if not beaten(name)}
    names = answer()
    if names is None:
        return print("Nothing returned yet: return a set of names.")
    if not isinstance(names, (set, frozenset, list, tuple)):
        return print("Return a set of names, such as {'U-Net', 'FPN'}.")
    names = set(names)
    if names - set(known):
        unknown = ", ".join(sorted(names - set(known)))
        return print(f"Not in the picture: {unknown}.")
    if names - front:
        name = sorted(names - front)[0]
        return print(
            f"{name} is dominated: cheaper ones' worst seeds beat its best."
        )
    if front - names:
        return print(
            f"{len(front - names)} are missing: nobody is both cheaper than they "
            "are and better, beyond the seeds."
        )
    print("Right:", ", ".join(sorted(front)))


# %%
def undominated():
    """Return the names."""


check_front(undominated)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def undominated_solution():
    return {
        name
        for name, (cost, own) in known.items()
        if not any(c <= cost and min(s) > max(own) for c, s in known.values())
    }


check_front(undominated_solution)

# %% [markdown]
# ## Recap
#
# - Start with `BookDecoder`. Slim every map first, merge from coarse to fine, 1×1 at the finest grid.
# - Before you add a part, count its work; after you have added it, take it away again and look.
# - `out_channels` is the number of values that a pixel needs: classes for masks, 3 for colours.
# - For images, learn what the cheap answer lacks, with L1, where it counts, and compare with the cheap answer.
#
# | shape contract | |
# |---|---|
# | in | a `Pyramid` `c1…c5`, from any H, W ≥ 32 |
# | `conv_bn_relu` | `[B, C, h, w]` → `[B, out_channels, h, w]` |
# | `Merge` | `[B, C, h, w]` and `[B, S, H, W]` → `[B, out_channels, H, W]` |
# | `BookDecoder` | → `[B, out_channels, ⌈H/2⌉, ⌈W/2⌉]` |
# | in a `Segmenter` | → `[B, out_channels, H, W]` |
# | `l1_where` | `[B, C, H, W]` and `[B, C + 1, H, W]` → one number |
# | one image of 32 × 32 in training | raises: BatchNorm needs two values |
#
# In your own project:
#
# ```python
# from helpers.bridges.putting_together import BookDecoder
# from helpers.encoder import ResNet18Encoder, Segmenter
# from helpers.training import evaluate, fit
#
# encoder = ResNet18Encoder()
# model = Segmenter(encoder, BookDecoder(encoder.out_channels, out_channels=7))
# history = fit(model, train, epochs=20)  # pairs of image [3, H, W] and mask [H, W]
# print(evaluate(model, unseen))
# ```
