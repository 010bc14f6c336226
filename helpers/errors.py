"""The error index as data: what common messages mean, why they come and which line to change."""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

UNKNOWN = (
    "This is not one of ours: no row of the book's error index fits it. The last line of the "
    "traceback says what went wrong, the lowest line of your own code says where: print the shape "
    "and the dtype of every tensor on that line. If that does not help, search for the message "
    "without its numbers."
)


@dataclass(frozen=True)
class Chapter:
    """One chapter of the book: its number and slug, and the question that it answers."""

    number: str
    slug: str
    question: str

    @property
    def notebook(self) -> Path:
        """Where its notebook lies in the book's repository, written or not."""
        return NOTEBOOKS / f"{self.number}_{self.slug}.ipynb"

    def __str__(self) -> str:
        # An installed package comes without notebooks, and then cannot tell which are planned.
        planned = " (planned)" if NOTEBOOKS.is_dir() and not self.notebook.exists() else ""
        return f"chapter {self.number} “{self.question}”{planned}"


@dataclass(frozen=True)
class Row:
    """One row of the error index.

    `pattern` is a regular expression that Python and JavaScript read alike, for text whose white
    space is single spaces. `numbers` says what the numbers in a message mean: `{1}` stands for the
    pattern's first group. `example` is a complete program that raises the error, `fixed` the same
    program, cured.
    """

    slug: str
    pattern: str
    title: str
    numbers: str
    cause: str
    cure: str
    chapter: Chapter
    example: str
    fixed: str

    def read_numbers(self, match: re.Match[str]) -> str:
        """Return `numbers` with those of the message, or nothing where the message has none."""
        if not self.numbers or None in match.groups():
            return ""
        return self.numbers.format(match.group(0), *match.groups())

    def change(self) -> list[str]:
        """Return the lines that leave (`- `) and enter (`+ `) the example when it is cured."""
        lines = difflib.ndiff(self.example.splitlines(), self.fixed.splitlines())
        return [line for line in lines if line[0] in "+-"]


ROWS = (
    Row(
        slug="mat1-mat2",
        pattern=(r"mat1 and mat2 shapes cannot be multiplied(?: \((\d+)x(\d+) and (\d+)x(\d+)\))?"),
        title="A linear layer gets another number of values than it was built for",
        numbers="each row that arrives has {2} values; the layer was built for {3}.",
        cause=(
            "`nn.Linear` has one weight per input value, so its width fixes the size of the map "
            "that is flattened before it: 512·7·7 = 25088 values fit images of 193 to 224 pixels "
            "and no others. At 256 pixels c5 is 8×8, and 32768 values arrive. If the number that "
            "arrives is the width of a map (1, 7 or 8), the map was never flattened."
        ),
        cure=(
            "Pool to a fixed grid before you flatten, and size the layer by the channels alone; "
            "then every image size fits. A map that was never flattened needs `nn.Flatten()`."
        ),
        chapter=Chapter("02", "pooling_linear", "my decoder wants a vector"),
        example="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
head = nn.Sequential(
    nn.Flatten(),
    nn.Linear(512 * 7 * 7, 10),
)
head(encoder(torch.rand(2, 3, 224, 224)).c5)
head(encoder(torch.rand(2, 3, 256, 256)).c5)
""",
        fixed="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
head = nn.Sequential(
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(512, 10),
)
head(encoder(torch.rand(2, 3, 224, 224)).c5)
head(encoder(torch.rand(2, 3, 256, 256)).c5)
""",
    ),
    Row(
        slug="dropped-batch",
        pattern=(
            r"Dimension out of range"
            r"(?: \(expected to be in range of \[-?\d+, (-?\d+)\], but got (-?\d+)\))?"
        ),
        title="A tensor has fewer dimensions than the code believes",
        numbers="dimension {2} was asked for, and the last one is {1}.",
        cause=(
            "Most often a bare `squeeze()`, which drops every dimension of length one. After "
            "pooling to 1×1 these are height and width and, where the batch holds a single image, "
            "the batch: `[1, 512, 1, 1]` becomes `[512]`. It strikes at the end of an epoch, when "
            "one image is left over, or with the first single picture."
        ),
        cure=(
            "Say which dimensions you mean: `flatten(1)` joins all but the batch, "
            "`squeeze((2, 3))` drops height and width only. One image without a batch gets one "
            "with `x[None]`."
        ),
        chapter=Chapter("02", "pooling_linear", "my decoder wants a vector"),
        example="""\
import torch
import torch.nn.functional as F
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
pooled = F.adaptive_avg_pool2d(encoder(torch.rand(1, 3, 224, 224)).c5, 1)
vector = pooled.squeeze()
vector.softmax(dim=1)
""",
        fixed="""\
import torch
import torch.nn.functional as F
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
pooled = F.adaptive_avg_pool2d(encoder(torch.rand(1, 3, 224, 224)).c5, 1)
vector = pooled.flatten(1)
vector.softmax(dim=1)
""",
    ),
    Row(
        slug="cat-sizes",
        pattern=(
            r"Sizes of tensors must match except in dimension 1\b"
            r"(?:\. Expected (?:size )?(\d+)(?: in dimension \d+)? but got (?:size )?(\d+))?"
        ),
        title="Two maps of different size cannot be stacked",
        numbers="one tensor is {1} long where another is {2}.",
        cause=(
            "`torch.cat` along the channels needs maps of the same height and width. Sizes that "
            "differ by one come from an image that 32 does not divide: the encoder rounds up (45 "
            "becomes 23), and doubling gives 46. Sizes that differ by a factor belong to two "
            "levels: from c5 to c1 the sides double at every step."
        ),
        cure=(
            "Resize to the size of the map that you stack onto, never by a factor. Keep channels "
            "(`dim=1`) as the dimension of `torch.cat`."
        ),
        chapter=Chapter("05", "unet", "my masks are blobs"),
        example="""\
import torch
import torch.nn.functional as F
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
pyramid = encoder(torch.rand(1, 3, 360, 360))
up = F.interpolate(pyramid.c4, scale_factor=2)
torch.cat([up, pyramid.c3], dim=1)
""",
        fixed="""\
import torch
import torch.nn.functional as F
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
pyramid = encoder(torch.rand(1, 3, 360, 360))
up = F.interpolate(pyramid.c4, size=pyramid.c3.shape[-2:])
torch.cat([up, pyramid.c3], dim=1)
""",
    ),
    Row(
        slug="add-sizes",
        pattern=(
            r"The size of tensor a(?: \((\d+)\) must match the size of tensor b \((\d+)\) "
            r"at non-singleton dimension (\d+))?"
        ),
        title="Two tensors of different size cannot be added or multiplied",
        numbers="in dimension {3} one tensor is {1} long, the other {2}.",
        cause=(
            "Adding, subtracting and multiplying work element by element. In dimensions 2 and 3 "
            "of `[B, C, H, W]` the maps come from two levels, or from an image that 32 does not "
            "divide; in dimension 1 they have different channels. A side of length one raises "
            "nothing: it is repeated. Shapes are lined up from the right: a mask `[B, H, W]` that "
            "has lost its channel meets the image's channels with its batch, so keep "
            "`[B, 1, H, W]`."
        ),
        cure=(
            "Bring one map to the height and width of the other before you add, and give both "
            "the same channels with a 1×1 convolution."
        ),
        chapter=Chapter("06", "multi_path", "use every stage at once"),
        example="""\
import torch
import torch.nn.functional as F
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
pyramid = encoder(torch.rand(1, 3, 180, 240))
coarse = nn.Conv2d(256, 128, kernel_size=1)(pyramid.c4)
up = F.interpolate(coarse, scale_factor=2)
pyramid.c3 + up
""",
        fixed="""\
import torch
import torch.nn.functional as F
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
pyramid = encoder(torch.rand(1, 3, 180, 240))
coarse = nn.Conv2d(256, 128, kernel_size=1)(pyramid.c4)
up = F.interpolate(coarse, size=pyramid.c3.shape[-2:])
pyramid.c3 + up
""",
    ),
    Row(
        slug="mask-size",
        pattern=(
            r"(?:size mismatch \(got input: \[[\d, ]+\] ?, target: \[[\d, ]+\]"
            r"|input and target batch or spatial sizes don't match)"
        ),
        title="The logits are not as large as the mask",
        numbers="",
        cause=(
            "Cross-entropy compares logits `[B, classes, H, W]` with a mask `[B, H, W]` pixel by "
            "pixel. A decoder that ends on the grid of c1 has half the image's height and width, "
            "one that ends on c2 a quarter."
        ),
        cure=(
            "Enlarge the logits to the mask's size, before the loss and before `argmax`. Shrinking "
            "the mask instead deletes what is thinner than the stride."
        ),
        chapter=Chapter("05", "unet", "my masks are blobs"),
        example="""\
import torch
import torch.nn.functional as F
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
masks = torch.zeros(2, 64, 96, dtype=torch.long)
logits = nn.Conv2d(64, 7, 1)(encoder(torch.rand(2, 3, 64, 96)).c1)
F.cross_entropy(logits, masks)
""",
        fixed="""\
import torch
import torch.nn.functional as F
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
masks = torch.zeros(2, 64, 96, dtype=torch.long)
logits = nn.Conv2d(64, 7, 1)(encoder(torch.rand(2, 3, 64, 96)).c1)
enlarged = F.interpolate(logits, size=masks.shape[-2:], mode="bilinear")
F.cross_entropy(enlarged, masks)
""",
    ),
    Row(
        slug="mask-rank",
        pattern=(
            r"(?:only batches of spatial targets supported"
            r"(?: \(3D tensors\) but got targets of dimension: (\d+))?"
            r"|Expected floating point type for target with class probabilities)"
        ),
        title="The mask has a channel dimension",
        numbers="the mask has {1} dimensions; 3 are expected.",
        cause=(
            "Cross-entropy wants the index of the class at every pixel, `[B, H, W]`. A mask that "
            "was read as an image has a channel more, `[B, 1, H, W]`; one channel for each class, "
            "`[B, classes, H, W]`, is taken for probabilities."
        ),
        cure=(
            "Drop the channel with `masks[:, 0]`. A mask with one channel for each class becomes "
            "indices with `masks.argmax(1)`."
        ),
        chapter=Chapter("05", "unet", "my masks are blobs"),
        example="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 7, 64, 96)
masks = torch.zeros(2, 1, 64, 96, dtype=torch.long)
F.cross_entropy(logits, masks)
""",
        fixed="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 7, 64, 96)
masks = torch.zeros(2, 1, 64, 96, dtype=torch.long)
F.cross_entropy(logits, masks[:, 0])
""",
    ),
    Row(
        slug="mask-dtype",
        pattern=(
            r"expected (?:target dtype to be Long or Byte|scalar type Long)"
            r"(?:,? but (?:got|found) (\w+))?"
        ),
        title="The mask holds numbers of another type",
        numbers="the mask is of type {1}; Long (int64) is expected.",
        cause=(
            "Cross-entropy wants the index of the class at every pixel, and an index is an "
            "integer of type int64. A mask that was read like an image comes as uint8, and once it "
            "was divided by 255 or resized with smoothing it is floating point, and spoilt."
        ),
        cure=(
            "Convert with `masks.long()`, before anything divides or smooths it. Resize masks with "
            '`mode="nearest"` only: between class 2 and class 4 there is no class 3.'
        ),
        chapter=Chapter("05", "unet", "my masks are blobs"),
        example="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 7, 64, 96)
masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
F.cross_entropy(logits, masks)
""",
        fixed="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 7, 64, 96)
masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
F.cross_entropy(logits, masks.long())
""",
    ),
    Row(
        slug="mask-range",
        pattern=r"(?:Target (-?\d+) is out of bounds|t >= 0 && t < n_classes)",
        title="The mask names a class that the decoder does not have",
        numbers="the mask holds a {1}.",
        cause=(
            "A decoder with `out_channels=7` has the classes 0 to 6. Masks often mark with 255 "
            "what nobody labelled, and data sets that count from 1 end one higher. On a GPU the "
            "same mistake fails an assertion on `n_classes`: `device-side assert triggered`."
        ),
        cure=(
            "`masks.unique()` shows what is there. `ignore_index=255` leaves pixels out of the "
            "loss (and out of the scores of `evaluate`). Where counting begins at 1, subtract 1."
        ),
        chapter=Chapter("05", "unet", "my masks are blobs"),
        example="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 7, 64, 96)
masks = torch.full((2, 64, 96), 255)
masks[:, 20:40] = 3
F.cross_entropy(logits, masks)
""",
        fixed="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 7, 64, 96)
masks = torch.full((2, 64, 96), 255)
masks[:, 20:40] = 3
F.cross_entropy(logits, masks, ignore_index=255)
""",
    ),
    Row(
        slug="binary-size",
        pattern=(
            r"Target size(?: \(torch\.Size\(\[([\d, ]+)\]\)\))? must be the same as input size"
            r"(?: \(torch\.Size\(\[([\d, ]+)\]\)\))?"
        ),
        title="Binary cross-entropy wants the mask in the shape of the logits",
        numbers="the mask is [{1}], the logits are [{2}].",
        cause=(
            "For one class, *is it there or not*, logits `[B, 1, H, W]` are compared number by "
            "number with the mask, which needs the channel, too, and floating point. "
            "Cross-entropy over several classes is the other way round: no channel, and int64."
        ),
        cure="Give the mask its channel, `masks[:, None].float()`.",
        chapter=Chapter("10", "input_mapping", "my decoder brings an input of its own"),
        example="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 1, 64, 96)
masks = torch.zeros(2, 64, 96, dtype=torch.long)
F.binary_cross_entropy_with_logits(logits, masks)
""",
        fixed="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 1, 64, 96)
masks = torch.zeros(2, 64, 96, dtype=torch.long)
F.binary_cross_entropy_with_logits(logits, masks[:, None].float())
""",
    ),
    Row(
        slug="conv-channels",
        pattern=(
            r"Given (?:groups|transposed)=\d+, weight of size"
            r"(?:.*? to have (\d+) channels?, but got (\d+) channels?)?"
        ),
        title="A convolution gets another number of channels than it was built for",
        numbers="the convolution was built for {1} channels and got {2}.",
        cause=(
            "A convolution fixes its number of input channels when it is built. c1 to c5 have 64, "
            "64, 128, 256 and 512, so a layer made for one level does not fit the next. Where 3 "
            "channels were expected, the images are grayscale (1), carry alpha (4), or have their "
            "channels last."
        ),
        cure=(
            "Ask the encoder for the number instead of writing it down. Images: repeat the gray "
            "channel with `images.expand(-1, 3, -1, -1)`, drop alpha with `images[:, :3]`, move "
            "last channels with `images.permute(0, 3, 1, 2)`."
        ),
        chapter=Chapter("03", "conv_projection", "my decoder wants other channels"),
        example="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
head = nn.Conv2d(256, 10, kernel_size=1)
head(encoder(torch.rand(1, 3, 224, 224)).c5)
""",
        fixed="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
head = nn.Conv2d(encoder.out_channels[-1], 10, kernel_size=1)
head(encoder(torch.rand(1, 3, 224, 224)).c5)
""",
    ),
    Row(
        slug="view-size",
        pattern=r"view size is not compatible",
        title="`view` meets a tensor whose values lie in another order in memory",
        numbers="",
        cause=(
            "`view` only renames dimensions; it moves nothing. After `transpose` or `permute`, as "
            "on the way from a map `[B, C, H, W]` to tokens `[B, H·W, C]`, neighbours in the "
            "tensor are no longer neighbours in memory, and no renaming gives the shape that you "
            "ask for."
        ),
        cure=(
            "Use `reshape`, which copies where it must. Neither of the two swaps dimensions: for "
            "a map again, transpose first and then reshape, or pixels and channels mix without "
            "an error."
        ),
        chapter=Chapter("04", "attention", "which positions matter?"),
        example="""\
import torch
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
c5 = encoder(torch.rand(2, 3, 224, 224)).c5
tokens = c5.flatten(2).transpose(1, 2)  # [2, 49, 512]
vector = tokens.view(2, 49 * 512)
""",
        fixed="""\
import torch
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
c5 = encoder(torch.rand(2, 3, 224, 224)).c5
tokens = c5.flatten(2).transpose(1, 2)  # [2, 49, 512]
vector = tokens.reshape(2, 49 * 512)
""",
    ),
    Row(
        slug="one-value-per-channel",
        pattern=(
            r"Expected more than 1 value per channel when training"
            r"(?:, got input size (?:torch\.Size\()?\[([\d, ]+)\])?"
        ),
        title="BatchNorm cannot learn from a single value",
        numbers="the input is [{1}], one value for each channel.",
        cause=(
            "In training BatchNorm takes mean and variance of each channel over the batch and all "
            "positions. After pooling to 1×1 a batch of one image leaves a single value, which has "
            "no variance. It often strikes at the end of an epoch, when one image is left over."
        ),
        cure=(
            "Where the map is 1×1, normalise with GroupNorm, which looks at one image at a time. "
            "For a left-over image, `DataLoader(…, drop_last=True)`. For predictions, call "
            "`model.eval()` first."
        ),
        chapter=Chapter("07", "spatial_pyramid", "any input size; more context"),
        example="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
context = nn.Sequential(
    nn.AdaptiveAvgPool2d(1),
    nn.Conv2d(512, 64, kernel_size=1),
    nn.BatchNorm2d(64),
)
context(encoder(torch.rand(1, 3, 224, 224)).c5)
""",
        fixed="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
context = nn.Sequential(
    nn.AdaptiveAvgPool2d(1),
    nn.Conv2d(512, 64, kernel_size=1),
    nn.GroupNorm(8, 64),
)
context(encoder(torch.rand(1, 3, 224, 224)).c5)
""",
    ),
    Row(
        slug="onnx-adaptive-pool",
        pattern=r"ONNX export (?:of operator|failed on) adaptive_(?:avg|max)_pool2d",
        title="ONNX has no adaptive pooling",
        numbers="",
        cause=(
            "ONNX pools with windows of a fixed size. Where the grid divides the map, the exporter "
            "computes such windows; a grid of 1×1 becomes a global mean (or maximum). Any other "
            "grid stops the export."
        ),
        cure=(
            "Of an average: compute the means by matrix products, `average_grid`, the same numbers "
            "from operators that this exporter translates (its last step needs the package onnx). "
            "A maximum is no matrix product: choose an image size at which the grid divides the "
            "map, or take means."
        ),
        chapter=Chapter("07", "spatial_pyramid", "any input size; more context"),
        example="""\
import io
import torch
from torch import nn
from helpers.bridges.spatial_pyramid import SpatialPyramid

x = torch.rand(1, 512, 7, 7)
pool = nn.AdaptiveAvgPool2d(3)
torch.onnx.export(pool, (x,), io.BytesIO(), dynamo=False)
""",
        fixed="""\
import io
import torch
from torch import nn
from helpers.bridges.spatial_pyramid import SpatialPyramid

x = torch.rand(1, 512, 7, 7)
pool = SpatialPyramid(512, grids=[3])
torch.export.export(pool, (x,))
""",
    ),
    Row(
        slug="output-size",
        pattern=(
            r"(?:requested an output size of"
            r"|output padding must be smaller than either stride or dilation)"
        ),
        title="A transposed convolution cannot reach this size",
        numbers="",
        cause=(
            "A convolution of stride 2 rounds up: sides of 15 and 16 both become 8. So on the way "
            "back a transposed convolution of stride 2 has two sizes to choose from, and "
            "`output_padding` (0 or 1) or `output_size` says which. All other sizes are out of "
            "reach: `output_padding` does not pad, and one step of stride 2 is not one of 4."
        ),
        cure=(
            "Take as many steps as there are doublings, with a kernel of twice the stride and half "
            "the stride as padding: that gives exactly twice the size. Then cut what is too much, "
            "or resize to the map that you want to meet."
        ),
        chapter=Chapter("08", "upsampling", "back to the image's size, beside the image"),
        example="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
pyramid = encoder(torch.rand(1, 3, 256, 256))
up = nn.ConvTranspose2d(512, 64, 3, stride=2, padding=1)
up(pyramid.c5, output_size=pyramid.c3.shape[-2:])
""",
        fixed="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
pyramid = encoder(torch.rand(1, 3, 256, 256))
up = nn.Sequential(*(nn.ConvTranspose2d(c, 64, 4, stride=2, padding=1) for c in (512, 64)))
assert up(pyramid.c5).shape[-2:] == pyramid.c3.shape[-2:]
""",
    ),
    Row(
        slug="pixel-shuffle",
        pattern=(
            r"pixel_shuffle expects its input's 'channel' dimension to be divisible"
            r"(?:.*? input\.size\(-3\)=(\d+) is not divisible by (\d+))?"
        ),
        title="A pixel shuffle gets channels that it cannot deal out",
        numbers="{1} channels arrive; {2} of them make one channel that is larger.",
        cause=(
            "Pixel shuffle turns channels into pixels: ×2 takes 4 channels for each one that it "
            "returns, ×4 takes 16. The convolution before it was built for the channels that you "
            "want to have afterwards."
        ),
        cure="Let the convolution return factor² times the channels that you want.",
        chapter=Chapter("08", "upsampling", "back to the image's size, beside the image"),
        example="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
up = nn.Sequential(
    nn.Conv2d(512, 7, 3, padding=1),
    nn.PixelShuffle(2),
)
up(encoder(torch.rand(1, 3, 224, 224)).c5)
""",
        fixed="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
up = nn.Sequential(
    nn.Conv2d(512, 7 * 4, 3, padding=1),
    nn.PixelShuffle(2),
)
up(encoder(torch.rand(1, 3, 224, 224)).c5)
""",
    ),
    Row(
        slug="hidden-state",
        pattern=(
            r"(?:For (?:un)?batched \d-D input,? hx should also be"
            r"|Expected hidden size"
            r"(?: \((\d+), (\d+), (\d+)\), got \[(\d+), (\d+), (\d+)\])?)"
        ),
        title="A recurrent layer gets a first state of another shape",
        numbers=(
            "expected {1} layers, {2} sentences, {3} channels; got {4}, {5} and {6}, in that order."
        ),
        cause=(
            "The first state of `nn.GRU` is `[layers, B, width]` (an LSTM has two of them), one "
            "state for each layer. `batch_first=True` turns inputs and outputs round, not the "
            "state. Where only the last number differs, the vector is as wide as the encoder's "
            "map, and the GRU is not."
        ),
        cure=(
            "Add the dimension of the layers in front, `vector[None]`, and bring the vector to "
            "the GRU's width with a linear layer."
        ),
        chapter=Chapter("11", "sequences", "my decoder writes words"),
        example="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
vector = encoder(torch.rand(2, 3, 64, 64)).c5.mean((2, 3))
gru = nn.GRU(32, 512, batch_first=True)
gru(torch.rand(2, 7, 32), vector)
""",
        fixed="""\
import torch
from torch import nn
from helpers.encoder import ResNet18Encoder

encoder = ResNet18Encoder(weights=None)
vector = encoder(torch.rand(2, 3, 64, 64)).c5.mean((2, 3))
gru = nn.GRU(32, 512, batch_first=True)
gru(torch.rand(2, 7, 32), vector[None])
""",
    ),
    Row(
        slug="target-size",
        pattern=r"Expected target size(?: \[([\d, ]+)\], got \[([\d, ]+)\])?",
        title="Cross-entropy looks for the classes in the wrong dimension",
        numbers="for these logits the target would be [{1}]; yours is [{2}].",
        cause=(
            "Cross-entropy takes the *second* dimension for the classes. A decoder of words "
            "returns `[B, T, words]`, so the T steps are taken for classes, and the target should "
            "have one index for each of the words."
        ),
        cure=(
            "Join batch and time in both, `logits.flatten(0, 1)` and `words.flatten()`, or put the "
            "classes second with `logits.transpose(1, 2)`."
        ),
        chapter=Chapter("11", "sequences", "my decoder writes words"),
        example="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 7, 45)
words = torch.zeros(2, 7, dtype=torch.long)
F.cross_entropy(logits, words)
""",
        fixed="""\
import torch
import torch.nn.functional as F

logits = torch.rand(2, 7, 45)
words = torch.zeros(2, 7, dtype=torch.long)
F.cross_entropy(logits.flatten(0, 1), words.flatten())
""",
    ),
)


def find(text: str) -> tuple[Row, re.Match[str]] | None:
    """Return the row that a message belongs to, with its match, or `None`.

    In a whole traceback the row that matches last counts: the last error is the one that stopped
    the program.
    """
    text = re.sub(r"\s+", " ", text)
    found = [(row, match) for row in ROWS if (match := re.search(row.pattern, text))]
    return max(found, key=lambda pair: pair[1].start(), default=None)


def explain(error: BaseException | str) -> str:
    """Return what an error means, why it came and which line to change.

    `error` is an exception, its message, or a whole traceback as text. What the error index does
    not know gets a text that begins with "This is not one of ours". Raises `TypeError` for
    anything else.
    """
    if not isinstance(error, BaseException | str):
        raise TypeError(
            f"Expected an exception or its message, got {type(error).__name__}. "
            "Pass what `except Exception as error` caught, or paste the message as a string."
        )
    found = find(str(error))
    if found is None:
        return _wrap(UNKNOWN)
    row, match = found
    numbers = row.read_numbers(match)
    return "\n".join(
        [
            _wrap(f"{row.title}."),
            *([_wrap(f"Your numbers: {numbers}")] if numbers else []),
            _wrap(f"Why: {row.cause}"),
            _wrap(f"Cure: {row.cure} For example:"),
            *(f"    {line}" for line in row.change()),
            _wrap(f"Read on: {row.chapter}"),
        ]
    )


class explaining:
    """Print an explanation under the traceback of whatever goes wrong inside the `with` block.

    The exception goes on unchanged. In a notebook the explanation follows the cell's traceback; in
    a script it is the traceback's last lines (before Python 3.11: the lines above it).
    `KeyboardInterrupt` and `SystemExit` pass without a word.
    """

    def __enter__(self) -> explaining:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            _print_under_traceback(error, "\n" + explain(error))


def _print_under_traceback(error: Exception, text: str) -> None:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:
        _print_after_cell(shell, error, text)
    elif sys.version_info < (3, 11):
        print(text, file=sys.stderr)
    elif text not in getattr(error, "__notes__", ()):
        error.add_note(text)


def _print_after_cell(shell: Any, error: Exception, text: str) -> None:
    # Not a note: IPython 7, which Colab brings, leaves notes out of its tracebacks.
    def print_once(cell: Any) -> None:
        shell.events.unregister("post_run_cell", print_once)
        uncaught = getattr(sys, "last_value", None) is error
        if uncaught and not hasattr(cell, "explained"):
            cell.explained = True
            print(text)

    shell.events.register("post_run_cell", print_once)


def _wrap(text: str) -> str:
    # Code between backticks stays on one line.
    text = re.sub("`[^`]*`", lambda code: code.group().replace(" ", "\0"), text)
    lines = textwrap.fill(text, width=80, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")
