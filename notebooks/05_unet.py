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
# # 05 · My masks are blobs
#
# The network finds every object, the loss goes down, and the masks look as if somebody had breathed
# on the lens: no corners, no thin parts. Nothing is broken. The decoder was only given `c5`, and
# `c5` does not know where an outline runs. The cure takes one more line: hand over the earlier maps,
# too.

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
# - why a mask decoded from `c5` alone tends to a blob, before any training;
# - a U-Net decoder as it is often posted, and its three faults: half resolution, sizes, no activation;
# - the decoder that works at any size, built from one block;
# - two trainings on this machine, while you wait: `c5` alone against all five maps;
# - what skips, pretraining and fine-tuning are worth, on drawn scenes and on real streets;
# - which skip serves which class, and what one ReLU is worth.

# %%
import torch
import torch.nn.functional as F
from torch import nn

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
# Take a *perfect* mask and let each position of a map keep only one class, the one that covers most
# of its square. That is all that a decoder can draw if it decides once per position. No network has
# run yet: this is geometry.

# %%
image, mask = scenes.batch([5_000])
classes = len(scenes.CLASSES)


def as_kept_by(stride):
    """The mask [H, W] if each square of stride × stride pixels had one class."""
    shares = F.avg_pool2d(F.one_hot(mask, classes).movedim(-1, 1).float(), stride)
    return F.interpolate(shares.argmax(1)[None].float(), scale_factor=stride)[0, 0]


kept = {f"c{k}: stride {2**k}": as_kept_by(2**k).long() for k in (5, 4, 3, 2, 1)}
plotting.show_images(
    [image[0], *(plotting.colorize(each) for each in kept.values())],
    titles=["image", *kept],
    columns=3,
    alt="A scene, then its mask with one class per position of c5, c4, c3, c2, c1.",
)

# %% [markdown]
# At stride 32 a 128-pixel image has sixteen squares. Whatever is smaller than a square is gone, and
# what is left has the outline of squares. A decoder may read more than one class out of the 512
# numbers at a position, so this is no hard limit. But it is the direction in which everything pulls.
#
# The outlines still exist, in `c1` and `c2`. Those maps know *where* an edge is, but not *of what*;
# `c5` knows what, but not where. Chapter 01 measured both. A **skip connection** carries a map past the
# deeper layers, straight to the decoder.
#
# > **Not to be confused with** the residual connections *inside* a ResNet. Those add a block's input to
# > its output, and stay in the encoder. Skips leave it, towards the decoder.
#
# ## The shapes
#
# A decoder climbs from `c5` to `c1` and meets a skip at every step. Here are the grids it passes, for a
# size that is a power of two and for the size of the street images below:

# %%
for height, width in [(128, 128), (180, 240)]:
    levels = pyramid_levels(height, width)[::-1]
    print(
        *[f"{level.name}: {level.height} × {level.width}" for level in levels],
        sep="   ",
    )

# %% [markdown]
# Doubling takes 6 × 8 to 12 × 16. The `c4` that waits there has 12 × **15** positions. Keep that in mind.
#
# ## The obvious attempt, and what it does wrong
#
# This is the decoder that search results show, rebuilt in a few lines: double with a transposed
# convolution, concatenate the skip, convolve, up to `c1`.


# %%
class FirstAttempt(nn.Module):
    """c5 doubled four times; c4, c3, c2, c1 concatenated on the way."""

    def __init__(self, out_channels):
        super().__init__()
        steps = [(512, 256), (256, 128), (128, 64), (64, 64)]
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in steps
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(2 * b, b, 3, padding=1) for _, b in steps
        )
        self.head = nn.Conv2d(64, out_channels, 1)

    def forward(self, pyramid):
        x = pyramid.c5
        for up, conv, skip in zip(
            self.ups, self.convs, pyramid[3::-1], strict=True
        ):
            x = conv(torch.cat([up(x), skip], dim=1))
        return self.head(x)


torch.manual_seed(0)
encoder = ResNet18Encoder()
attempt = FirstAttempt(classes).eval()
print("image ", list(image.shape))
print("logits", list(shapes(attempt, encoder(normalize(image)))))

# %% [markdown]
# It runs. **Fault one**: the logits have half the image's height and width, because `c1` has. Compare
# them with a mask and you get a shape error; shrink the mask to fit, and half of a pole
# that is one pixel wide may be lost before training starts. Now the street size:

# %% tags=["raises-exception"]
with explaining():
    attempt(encoder(normalize(torch.rand(1, 3, 180, 240))))

# %% [markdown]
# **Fault two**: a factor of two lands on 16 columns where 15 wait. The usual advice is to feed only
# sizes that 32 divides. You will not need it.
#
# **Fault three** raises no error at all. There is nothing between the convolutions: no ReLU. A chain of
# linear maps is one linear map, so all those layers can do no more than a single one could. The test
# for that needs no theory: for a linear map plus a constant, *f(a + b) = f(a) + f(b) − f(0)*.


# %%
@torch.no_grad()
def is_linear(decoder):
    """Whether f(a + b) = f(a) + f(b) − f(0), on random maps."""
    torch.manual_seed(1)
    maps = [torch.rand(2, c, 64 >> k, 64 >> k) for k, c in enumerate(OUT_CHANNELS)]
    a, b = (Pyramid(*(m[i : i + 1] for m in maps)) for i in (0, 1))
    total = decoder(Pyramid(*(x + y for x, y in zip(a, b, strict=True))))
    nothing = decoder(Pyramid(*(torch.zeros_like(x) for x in a)))
    return torch.allclose(total, decoder(a) + decoder(b) - nothing, atol=1e-4)


print(
    f"nine layers, {count_parameters(attempt):,} parameters. Linear?",
    is_linear(attempt),
)
assert is_linear(attempt)

# %% [markdown]
# ## The technique
#
# One block, four times. It takes the coarse map *to the size of the skip*, whatever that is, instead of
# doubling it: fault two is gone. Then it concatenates, convolves, normalises, and bends: fault three
# is gone.

# %% tags=["export"]
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.encoder import Pyramid, check_map, check_pyramid


# %% tags=["export"]
class UpBlock(nn.Module):
    """One step up: bring a coarse map to a skip's size, concatenate, convolve.

    `forward(x, skip)` takes `[B, in_channels, h, w]` and
    `[B, skip_channels, H, W]`, any sizes, and returns `[B, out_channels, H, W]`,
    no value negative. Raises `ValueError` for other channels or ranks, `TypeError`
    for integers, and, in training mode, `ValueError` for a batch of one whose skip
    is a single position: BatchNorm has no statistics of one value.

    Source: Ronneberger et al., U-Net, MICCAI 2015.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.channels = in_channels, skip_channels
        self.conv = nn.Conv2d(
            in_channels + skip_channels, out_channels, 3, padding=1, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_map("x", x, self.channels[0])
        check_map("skip", skip, self.channels[1])
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
        x = torch.cat([x, skip], dim=1)
        return self.relu(self.norm(self.conv(x)))


# %%
torch.manual_seed(0)
block = UpBlock(in_channels=512, skip_channels=256, out_channels=128)
c5, c4 = torch.rand(1, 512, 6, 8), torch.rand(1, 256, 12, 15)
print(list(c5.shape), "and", list(c4.shape), "→", list(shapes(block, c5, c4)))

# %% [markdown]
# Four blocks and a 1×1 convolution are a U-Net's decoder. Read `forward` from top to bottom and you
# have the drawing:


# %% tags=["export"]
class UNetDecoder(nn.Module):
    """A U-Net's decoder: from c5 up to c1's grid, one skip joined at every step.

    `forward(pyramid)` takes the encoder's five maps, from images of any H, W ≥ 32,
    and returns `[B, out_channels, ⌈H/2⌉, ⌈W/2⌉]`; `Segmenter` brings it to H × W.
    `widths` are the channels after the blocks at c4, c3, c2, c1; `block` is
    `UpBlock` or `AddBlock`. Raises `ValueError` for maps with other channels than
    `in_channels`, `TypeError` for integers, and what its blocks raise.

    Source: Ronneberger et al., U-Net, MICCAI 2015.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        widths: Sequence[int] = (128, 64, 48, 32),
        block: type[nn.Module] = UpBlock,
    ):
        super().__init__()
        self.in_channels = tuple(in_channels)
        c1, c2, c3, c4, c5 = self.in_channels
        w4, w3, w2, w1 = widths
        self.up4 = block(c5, c4, w4)
        self.up3 = block(w4, c3, w3)
        self.up2 = block(w3, c2, w2)
        self.up1 = block(w2, c1, w1)
        self.head = nn.Conv2d(w1, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        c1, c2, c3, c4, c5 = pyramid
        p4 = self.up4(c5, c4)
        p3 = self.up3(p4, c3)
        p2 = self.up2(p3, c2)
        p1 = self.up1(p2, c1)
        return self.head(p1)


# %%
decoder = UNetDecoder(encoder.out_channels, out_channels=classes)
model = Segmenter(encoder, decoder)
plotting.pyramid_diagram(
    encoder,
    image[0],
    decoder,
    bridge="concatenate",
    alt="The encoder's maps descend at the left, the decoder's climb at the right, "
    "and an arrow joins each pair on the way.",
)

# %% [markdown]
# (Nobody has trained it yet, so the classes of the mask at its end mean nothing. The outline of the star is there all
# the same: the skips bring it.) And fault one? The decoder's logits still lie on `c1`'s grid. `Segmenter` takes them to the image's size, bilinearly, and the loss compares them
# *there*, with the full mask. (Chapter 08 looks at other ways to make this last step.) Any size goes:

# %%
for height, width in [(128, 128), (180, 240), (33, 97)]:
    logits = model(normalize(torch.rand(2, 3, height, width)))
    print(f"{height} × {width} → {list(logits.shape)}")
    assert logits.shape == (2, classes, height, width)

# %% [markdown]
# A skip can also be **added**, after a 1×1 convolution that gives it as many channels as it meets:


# %% tags=["export"]
class AddBlock(nn.Module):
    """As `UpBlock`, but the skip, projected by a 1×1 convolution, is added.

    Takes, returns and raises what `UpBlock` does.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.channels = in_channels, skip_channels
        self.project = nn.Conv2d(skip_channels, in_channels, 1, bias=False)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_map("x", x, self.channels[0])
        check_map("skip", skip, self.channels[1])
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
        x = x + self.project(skip)
        return self.relu(self.norm(self.conv(x)))


# %%
x = normalize(image)
for name, block in {"concatenate": UpBlock, "add": AddBlock}.items():
    variant = UNetDecoder(encoder.out_channels, classes, block=block)
    macs = count_macs(Segmenter(encoder, variant), x) - count_macs(encoder, x)
    print(f"{name:12} {count_parameters(variant):,} parameters, {macs:,} MACs")

# %% [markdown]
# Concatenation lets the convolution weigh both sources freely. Addition has decided that the skip's
# channels correspond to the decoder's. Which of them wins is measured below.
#
# ## Train it
#
# For a fair comparison both decoders have the same layers. One of them is made blind: `Without` hands
# it zeros instead of `c1` to `c4`.


# %% tags=["export"]
class Without(nn.Module):
    """A decoder that does not see some of the maps: they arrive as zeros.

    `Without(decoder, "c4", "c3")` takes and returns what `decoder` does. Built for
    comparisons: layers and parameters stay the same, only the information is gone.
    Raises `ValueError` for a name that is no map's, and what `decoder` raises.
    """

    def __init__(self, decoder: nn.Module, *missing: str):
        super().__init__()
        unknown = set(missing) - set(Pyramid._fields)
        if unknown:
            raise ValueError(f"Expected names among c1…c5, got {sorted(unknown)}.")
        self.decoder = decoder
        self.missing = missing

    def forward(self, pyramid: Pyramid) -> Tensor:
        zeros = {
            name: torch.zeros_like(getattr(pyramid, name)) for name in self.missing
        }
        return self.decoder(pyramid._replace(**zeros))


# %% [markdown]
# The loss compares logits `[B, classes, H, W]` with masks of *indices*: one integer for each pixel, `[B, H, W]`, no
# channel. Masks that come from a file often have one:

# %% tags=["raises-exception", "nbval-ignore-output"]
from_file = torch.from_numpy(scenes.scene(0).mask)[
    None, None
].long()  # [1, 1, H, W]
with explaining():
    F.cross_entropy(torch.zeros(1, classes, *from_file.shape[-2:]), from_file)

# %% [markdown]
# `fit` is the book's training loop: AdamW, one learning-rate cycle, cross-entropy. Rare classes weigh more in it
# (`class_weights`: by 1/√pixels), or a short training would never get to the thin things. The
# encoder is frozen, so its maps are computed once and kept; after that, only the decoder costs time.

# %%
epochs = budget(short=5, full=40)
train, unseen = scenes.Scenes(128), scenes.Scenes(50, first=5_000)
train = [train[i] for i in range(len(train))]  # draw each scene once
loss = SegmentationLoss(class_weights=class_weights((m for _, m in train), classes))
shown = scenes.batch(range(5_000, 5_004))


def light_unet(*missing):
    torch.manual_seed(0)
    decoder = UNetDecoder(encoder.out_channels, classes, widths=(64, 48, 32, 24))
    return Segmenter(encoder, Without(decoder, *missing))


def train_and_watch(*missing):
    """A U-Net that does not see the maps `missing`: model, history, frames."""
    model = light_unet(*missing)
    frames = [predict(model, shown[0])]
    history = fit(
        model,
        train,
        epochs=epochs,
        lr=5e-3,
        loss=loss,
        after_epoch=lambda epoch: frames.append(predict(model, shown[0])),
    )
    return model, history, frames


blind, blind_history, blind_frames = train_and_watch("c1", "c2", "c3", "c4")
seeing, seeing_history, seeing_frames = train_and_watch()

# %% tags=["nbval-ignore-output"]
plotting.show_histories(
    {"c5 only": blind_history, "U-Net": seeing_history},
    alt="Over the epochs the U-Net's loss falls lower and its mIoU climbs higher.",
)

# %% [markdown]
# Below, the same two on four scenes that neither has seen. Pull the slider from the untrained decoder
# to the last epoch. In the lower row outlines are there from the start, of this and that. Training learns *where
# something is*, and in that row soon *up to which pixel*. *What* it is stays uncertain for longest: after so few
# epochs half a star may be called a triangle.

# %% tags=["nbval-ignore-output"]
every = max(1, epochs // 5)
frames = [
    plotting.show_masks(
        {"mask": shown[1], "c5 only": blind_frames[i], "U-Net": seeing_frames[i]},
        alt="Masks, and what both decoders predict.",
    )
    for i in range(0, epochs + 1, every)
]
labels = [f"after {i} epochs" for i in range(0, epochs + 1, every)]
plotting.flipbook(
    frames,
    ["untrained", *labels[1:]],
    alt="Predictions of both decoders while they learn",
)

# %% tags=["nbval-ignore-output"]
scored = {
    name: evaluate(m, unseen)
    for name, m in {"c5 only": blind, "U-Net": seeing}.items()
}
for name, score in scored.items():
    boundary = score.boundary_miou
    print(f"{name:8} mIoU {score.miou:.1f} %, boundary IoU {boundary:.1f} %")

# %%
for history in (blind_history, seeing_history):
    assert history.loss[-1] < 0.7 * history.loss[0]
assert seeing_history.loss[-1] < 0.5 * seeing_history.loss[0]
assert scored["U-Net"].miou > scored["c5 only"].miou + 3
assert scored["U-Net"].miou > 1.2 * 100 / classes

# %% [markdown]
# *mIoU* is the overlap of prediction and mask, averaged over the classes. *Boundary IoU* counts only the
# pixels within two pixels of an outline, predicted or true. It is the number to look at when masks are
# blobs.

# %% [markdown]
# ## Look inside: two ways back into the encoder
#
# Skips are also said to help the *gradient* reach the encoder's early layers. It has two ways to a map:
# along the skip, or back through all the deeper stages. Cut the maps loose from each other, and only the
# skip's part arrives; the rest of the full gradient came the long way.


# %%
def gradients(model, joined):
    """The loss's gradient at c1 to c5 and at the encoder's first layer."""
    learner = ResNet18Encoder(frozen=False).eval()
    maps = learner(normalize(shown[0]))
    if not joined:
        maps = Pyramid(*(map_.detach().requires_grad_() for map_ in maps))
    for map_ in maps:
        map_.retain_grad()
    model.cpu().eval(), loss.cpu()  # fit may have taken both to a GPU
    logits = model.decode(maps, shown[1].shape[-2:])
    loss(logits, shown[1]).backward()
    return [map_.grad for map_ in maps], learner.features.conv1.weight.grad


def by_skip(model):
    """Per cent of the gradient at c1 to c4 that came along the skip."""
    whole, short = (gradients(model, joined)[0] for joined in (True, False))
    return [
        100 * (s.norm() / (s.norm() + (w - s).norm())).item()
        for w, s in zip(whole[:4], short[:4], strict=True)
    ]


share = {"untrained decoder": by_skip(light_unet()), "trained": by_skip(seeing)}

# %% tags=["nbval-ignore-output"]
plotting.show_panels(
    {"gradient that came along the skip, %": share},
    x=Pyramid._fields[:4],
    xlabel="level",
    alt="Untrained, about half of the gradient or more comes by the skips.",
)

# %% [markdown]
# Before training most of the signal takes the short way. A trained decoder has learnt to use `c5`, and
# the long way has grown. The encoder's very first layer shows the same:


# %% tags=["nbval-ignore-output"]
def at_first_layer(model):
    return gradients(model, joined=True)[1].norm().item()


skipless = ("c1", "c2", "c3", "c4")
untrained = at_first_layer(light_unet()) / at_first_layer(light_unet(*skipless))
trained = at_first_layer(seeing) / at_first_layer(blind)
print("gradient at the first layer, with skips against without:")
print(f"untrained {untrained:.0f} ×, trained {trained:.1f} ×")

# %%
assert all(part > 40 for part in share["untrained decoder"])
assert all(part < 60 for part in share["trained"])
assert untrained > 20 and trained < untrained / 5

# %% [markdown]
# So the claim is true for the first steps of a training, and fades. (One decoder, one batch: a look, not a
# measurement.) It says nothing about masks either. Whether an encoder that learns along ends better *because of* the
# skips, the book has not measured; what fine-tuning is worth with them is measured below.

# %% [markdown]
# ## Measure the claims
#
# One seed and a few seconds prove little. `python -m experiments.claims unet` trains each variant
# three times, with three seeds, on 400 scenes and on **CamVid**: 266 street photographs from two drives.
# It reports on scenes and streets that no training saw; the streets are 101 frames of a third drive,
# 0006R0. (Single skips, adding and ReLUs were trained on scenes only.) What follows is read from its
# records.

# %%
evidence = records.of("unet")
places = ("scenes", "streets")
assert all(len(evidence.values(where, "U-Net")) >= 3 for where in places)

# %% [markdown]
# **Skips cure blobs.** First the rims, that is, boundary IoU at two pixels. The bars are means, the points
# single seeds:

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        f"{where}: {what}": evidence.values(where, what, "boundary_miou")
        for where in places
        for what in ("c5 only", "U-Net")
    },
    ylabel="boundary IoU, mean over classes, %",
    alt="On scenes and on streets the U-Net's rims overlap several times better.",
)

# %%
for where in places:
    assert evidence.margin(where, "U-Net", "c5 only", "boundary_miou") > 5
    assert evidence.margin(where, "U-Net", "c5 only") > 5

# %% [markdown]
# Same encoder, same layers, same steps; only the maps differ. This is what the two draw on four frames of the unseen
# drive, and in the third row a U-Net whose encoder learned along (more on that below). (The photographs are not ours
# to show; the cell below the picture brings them to your screen.)

# %% tags=["nbval-ignore-output"]
frames_shown = (10, 35, 60, 85)  # evenly spaced, chosen before the first training
drawn = {
    "c5 only": "c5_only",
    "U-Net": "u-net",
    "fine-tuned": "u-net_fine-tuned",
}
plotting.show_masks(
    {
        name: [records.picture("unet", f"{file}_{k}") for k in frames_shown]
        for name, file in drawn.items()
    },
    colors=camvid.PALETTE,
    alt="Predictions on four streets: blobs from c5, outlines from the U-Net.",
)

# %%
photographs = False  # True downloads CamVid (about 200 MB) unless BOOK_DATA has it
if photographs:
    camvid.download()
    drive = camvid.CamVid("report")
    street, truth = zip(*(drive[k] for k in frames_shown), strict=True)
    display(
        plotting.show_scenes(
            street,
            truth,
            [records.picture("unet", f"u-net_{k}") for k in frames_shown],
            colors=camvid.PALETTE,
            alt="Street photographs, their masks and the U-Net's predictions.",
        )
    )

# %% [markdown]
# **Pretrained or random, frozen or fine-tuned?** Fine-tuning lets the encoder learn along, at a quarter
# (streets) or an eighth (scenes) of the decoder's learning rate. The random encoder was never trained,
# and is frozen like the pretrained one.

# %% tags=["nbval-ignore-output"]
variants = (
    "c5 only",
    "U-Net, random encoder",
    "U-Net",
    "U-Net, fine-tuned",
)
for where in places:
    display(
        plotting.show_bars(
            {what: evidence.values(where, what) for what in variants},
            ylabel=f"mIoU on unseen {where}, %",
            highlight="U-Net",
            alt=f"mIoU of four variants on {where}; the numbers are at the bars.",
        )
    )

# %%
for where in places:
    assert evidence.margin(where, "U-Net", "U-Net, random encoder") > 5
assert evidence.margin("scenes", "c5 only", "U-Net, random encoder") > 0
assert abs(evidence.margin("streets", "c5 only", "U-Net, random encoder")) < 3
assert evidence.margin("scenes", "U-Net, fine-tuned", "U-Net") > 3
assert evidence.margin("streets", "U-Net, fine-tuned", "U-Net") > 0
for where in places:
    worst, _ = evidence.span(where, "U-Net, random encoder", "boundary_miou")
    _, best = evidence.span(where, "c5 only", "boundary_miou")
    assert worst > 1.9 * best

# %% [markdown]
# Skips do not replace pretraining: with a random encoder, all five maps together reach no more mIoU than the
# pretrained `c5` alone. Their rims are about twice as good, though, or better, with every seed: outlines come
# with the skips, classes with the weights. Fine-tuning pays more on scenes, which look like nothing in the
# encoder's training, than on streets. And it costs more, because nothing can be cached (see the end of this
# section).
#
# **Which skip matters for which class?** Drop one skip at a time, train anew, and see what each class
# loses. Red is a loss in percentage points of IoU, blue a gain:


# %% tags=["nbval-ignore-output"]
def lost(level, label):
    """IoU of a class that is lost without a level, mean over seeds."""
    pair = "U-Net", f"without {level}"
    full, less = (evidence.mean("scenes", what, "iou", label) for what in pair)
    return full - less


losses = torch.tensor(
    [[lost(level, label) for level in skipless] for label in scenes.CLASSES]
)
plotting.show_matrix(
    losses,
    rows=scenes.CLASSES,
    columns=skipless,
    label="IoU lost on scenes without …, points",
    digits=1,
    alt="A matrix: rows are classes, columns the missing skip, numbers the loss.",
)

# %% [markdown]
# No single skip carries the cure. The four together are worth more than 18 points of mIoU, but take one
# away, and its neighbours step in. What remains is each map's own share: thin things, rings and poles,
# miss `c2` most; the filled shapes, discs, squares, triangles and stars, miss `c3` and `c4`.
# For the rims alone, averaged over the classes, the fine maps count most. The differences are small, and
# from seed to seed the points of `c1` and `c3` overlap:

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        what: evidence.values("scenes", what, "boundary_miou")
        for what in ("U-Net", *(f"without {name}" for name in skipless))
    },
    ylabel="boundary IoU on unseen scenes, %",
    highlight="U-Net",
    alt="Without c1 or c2 the rims suffer more than without c3 or c4.",
)

# %%
assert evidence.margin("scenes", "U-Net", "c5 only") > 18
assert all(losses.mean(0) < 4)
by_class = dict(zip(scenes.CLASSES, losses, strict=True))
for thin in ("ring", "pole"):
    assert by_class[thin].argmax() == 1  # c2
for large in ("disc", "square", "triangle", "star"):
    fine, coarse = by_class[large].split(2)  # c1, c2 against c3, c4
    assert coarse.min() > fine.max()

for coarse in ("without c3", "without c4"):
    for fine in ("without c1", "without c2"):
        more = evidence.differences("scenes", coarse, fine, "boundary_miou")
        assert sum(more) / len(more) > 0.3
    assert min(more) > 0  # c2, with every seed

# %% [markdown]
# **Concatenate or add?**

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        name: evidence.values("scenes", what)
        for name, what in {"concatenate": "U-Net", "add": "adding"}.items()
    },
    ylabel="mIoU on unseen scenes, %",
    alt="Concatenating and adding give nearly the same mIoU.",
)

# %%
assert -2 < evidence.margin("scenes", "adding", "U-Net") < 2
behind = evidence.differences("scenes", "U-Net", "adding", "boundary_miou")
assert min(behind) > 0.3 and 1 < sum(behind) / len(behind) < 3

# %% [markdown]
# Nearly the same, for three fifths of the decoder's work (the counts stand above). At the rims adding is behind
# with every seed, by more than a point on average. If you are short of time, add; if outlines count,
# concatenate. (In chapter 12's decoder, adding costs more than a point of mIoU, too.)

# %% [markdown]
# **What is one ReLU worth?** The same decoder, BatchNorm and all, without any activation; with a single
# one, in the last block; with all four.

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    {
        name: evidence.values("scenes", what)
        for name, what in {
            "no ReLU": "no ReLU",
            "one": "one ReLU",
            "all four": "U-Net",
        }.items()
    },
    ylabel="mIoU on unseen scenes, %",
    alt="Bars: the decoder without any ReLU, with one, and with four.",
)

# %%
assert evidence.margin("scenes", "U-Net", "no ReLU") > 2
gains = evidence.differences("scenes", "one ReLU", "no ReLU")
assert all(-2 < gain < 0 for gain in gains)

# %% [markdown]
# One, in the last block, is worth nothing (it is even a little behind); all four are worth two points and more. The
# linear decoder is far from useless: the encoder before it has bent everything already, so that even one linear map
# of *five* levels beats a whole decoder that only sees `c5`. Posted code without a ReLU looks as if it worked.

# %%
assert evidence.margin("scenes", "no ReLU", "c5 only") > 5

# %% [markdown]
# **What is caching worth?** With a frozen encoder, a step costs the decoder alone, forward and backward:
# about three times its MACs. Without the cache the encoder's MACs come on top. `python -m
# experiments.chapters.unet.caching` lets both take turns:

# %% tags=["nbval-ignore-output"]
caching = records.of("caching")
plotting.show_bars(
    {
        f"{r['what']}: {name}": r[key]
        for r in caching
        for name, key in {"by MACs": "predicted", "measured": "ratio"}.items()
    },
    ylabel="times faster than without the cache",
    digits=2,
    alt="For each decoder, how much faster training is with cached maps.",
)

# %%
for record in caching:
    agree = record["ratio"] / record["predicted"]
    narrow = record["what"] == "U-Net, a quarter as wide"
    assert agree < 0.75 if narrow else 0.7 < agree < 1.3
costs = {r["what"]: 1 + r["encoder_macs"] / r["decoder_macs"] for r in caching}
print(
    f"A fine-tuning step has {costs['U-Net']:.1f} times the MACs of a cached one."
)

# %% [markdown]
# For the decoders of this page MACs predict it well. A decoder a quarter as wide gains more, but far less
# than its MACs promise: resizing, the loss at full size and the optimiser take time that no MAC counts.

# %% [markdown]
# ## Limits
#
# - The streets are one drive in one town by daylight, 101 frames, many of them alike. Small classes are
#   still poor: 20 epochs on 266 images are a short training for a small encoder.
# - On streets, unlabelled areas are not counted, and neither are the edges that border on them.
# - Learning rates and epochs were set once, for all variants alike, and not tuned. Each variant could
#   gain from its own.
# - Single skips, adding and ReLUs were measured on scenes only. (Chapter 13's records have adding on streets, too: behind
#   concatenating with every seed, in mIoU and at the rims.)
# - Blind decoders keep parameters that they cannot use. Chapter 01 compares `c5` with all five maps at
#   equal parameters, with the same outcome.
# - A skip from `c1` still is at half the image's resolution. What is thinner than two pixels stays hard;
#   chapter 08 looks at the last step up.
#
# ## Exercises


# %% [markdown]
# **Exercise 1.** Cure fault two of `FirstAttempt` without touching its layers: bring the doubled map to
# the skip's size.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_fit(answer):
    for height, width in [(12, 15), (23, 30), (16, 16)]:
        x = torch.rand(2, 5, -(-height // 2) * 2, -(-width // 2) * 2)
        skip = torch.rand(2, 7, height, width)
        fitted = answer(x, skip)
        if fitted is None:
            return print("Nothing returned yet: return x, as large as skip.")
        if fitted.shape[1] != 5:
            return print(f"x has 5 channels, yours {fitted.shape[1]}: leave them.")
        if fitted.shape[-2:] != skip.shape[-2:]:
            here, there = list(fitted.shape[-2:]), list(skip.shape[-2:])
            return print(f"The skip is {there}, yours is {here}.")
        if x.shape == skip.shape and not torch.equal(fitted, x):
            return print("The sizes agreed already, yet you changed x.")
    print("Right. Cropping shifts nothing; resizing spreads the error.")


# %%
def fit_to(x, skip):
    """Return x [B, C, h, w] with the height and width of skip."""


check_fit(fit_to)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def fit_to_solution(x, skip):
    return x[..., : skip.shape[-2], : skip.shape[-1]]


check_fit(fit_to_solution)

# %% [markdown]
# **Exercise 2.** Change `attempt` in place, with a single ReLU, so that it is no longer linear. Where does the ReLU
# have to go, and where would it do nothing for the decision? (That passes the test of linearity. It cures little: one
# before the head was worth nothing above.)


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_relu(answer):
    torch.manual_seed(2)
    decoder = FirstAttempt(classes).eval()
    answer(decoder)
    count = sum(isinstance(part, nn.ReLU) for part in decoder.modules())
    if count == 0:
        return print("There is no nn.ReLU in the decoder yet.")
    if count > 1:
        return print(f"One is enough; there are {count}.")
    if is_linear(decoder):
        return print("Still linear: does forward run through your ReLU?")
    maps = encoder(normalize(image))
    if decoder(maps).min() >= 0:
        return print(
            "The ReLU is last: it clips the logits, and the classes stay those of "
            "a linear map wherever one is positive. Put it before the head."
        )
    print("Right: one ReLU between two layers, and they stay two.")


# %%
def add_relu(decoder):
    """Put one nn.ReLU into a FirstAttempt, in place."""


check_relu(add_relu)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def add_relu_solution(decoder):
    decoder.head = nn.Sequential(nn.ReLU(), decoder.head)


check_relu(add_relu_solution)

# %% [markdown]
# **Exercise 3.** From the records: which class on streets gains the most from skips, relative to what it
# had with `c5` alone, if it had at least 10 %?


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_gain(answer):
    before, after = (
        {c: evidence.mean("streets", what, "iou", c) for c in camvid.CLASSES}
        for what in ("c5 only", "U-Net")
    )
    ratio = {c: after[c] / before[c] for c in before if before[c] >= 10}
    label = answer()
    if label is None:
        return print("Nothing returned yet: return the name of a class.")
    if label not in before:
        return print(f"{label!r} is no class of the streets: {', '.join(before)}.")
    if label not in ratio:
        return print(
            f"{label} had {before[label]:.1f} % with c5 alone: below 10 %."
        )
    best = max(ratio, key=ratio.get)
    if label == max(before, key=lambda c: after[c] - before[c]) != best:
        return print(f"{label} gains most points, but relative to what it had?")
    if label != best:
        return print(f"{label} is {ratio[label]:.2f} times better; one is more.")
    print(f"Right: {label} overlaps {ratio[label]:.1f} times better with skips.")


# %%
def largest_gain():
    """Return the name of the class."""


check_gain(largest_gain)


# %% tags=["hide-cell", "nbval-ignore-output"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def largest_gain_solution():
    def iou(what, c):
        return evidence.mean("streets", what, "iou", c)

    had = {c: iou("c5 only", c) for c in camvid.CLASSES}
    return max(
        (c for c in had if had[c] >= 10), key=lambda c: iou("U-Net", c) / had[c]
    )


check_gain(largest_gain_solution)

# %% [markdown]
# ## Recap
#
# - Blobs are not a training problem: `c5` has one position for 32 × 32 pixels. Hand over `c1` to `c4`.
# - Resize *to the skip*, never by a factor, and any H, W works.
# - Put a ReLU between convolutions, or they are one.
# - Compare logits and mask at the mask's resolution, and look at the rims, not only at mIoU.
#
# | shape contract | |
# |---|---|
# | in | a `Pyramid` `c1…c5`, from any H, W ≥ 32 |
# | `UpBlock` | `[B, C, h, w]` and `[B, S, H, W]` → `[B, out_channels, H, W]` |
# | `UNetDecoder` | → `[B, out_channels, ⌈H/2⌉, ⌈W/2⌉]` |
# | in a `Segmenter` | → `[B, out_channels, H, W]` |
# | one image of 32 × 32 in training | raises: BatchNorm needs two values |
#
# In your own project:
#
# ```python
# from helpers.bridges.unet import UNetDecoder
# from helpers.encoder import ResNet18Encoder, Segmenter
# from helpers.training import evaluate, fit
#
# encoder = ResNet18Encoder()
# model = Segmenter(encoder, UNetDecoder(encoder.out_channels, out_channels=7))
# history = fit(model, train, epochs=20)  # pairs of image [3, H, W] and mask [H, W]
# print(evaluate(model, unseen))
# ```
