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
# # 01 · What leaves a ResNet-18, and where?
#
# You have a pretrained ResNet-18 and a decoder that wants something from it. Which tensor? Of what
# shape? From before or after which layer? Every later chapter connects a decoder to the five maps
# that you meet here, so it pays to know them well: their sizes, what they see, and the silent ways
# in which they go wrong.

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
# - five feature maps, `c1` to `c5`, and the rule for their sizes at *any* image size;
# - three ways to get them, one of which leaks memory and hands you the wrong `c1`;
# - how much of the image one position of each map sees, measured by gradient;
# - two failures without an error message: wrong normalisation, and a "frozen" encoder that drifts;
# - what pretraining is worth, level by level, and which level answers which question.

# %%
import copy
import math
from functools import partial

import skimage.data
import torch
import torch.nn.functional as F
from skimage.measure import label, regionprops
from torch import nn
from torchmetrics.functional import jaccard_index
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from helpers import plotting, records, scenes
from helpers.encoder import (
    MEAN,
    STD,
    ResNet18Encoder,
    Segmenter,
    load_bundled,
    normalize,
)
from helpers.errors import explaining
from helpers.inspection import count_macs, count_parameters, shapes

# %% [markdown]
# ## The problem as a picture
#
# An image goes in. Five times the network halves the sides, and after each halving it leaves a
# *feature map*: fewer positions, more numbers at each. The drawing comes from a real forward pass,
# and the fronts of the boxes show the real maps, averaged over their channels.

# %%
encoder = ResNet18Encoder()
scene = scenes.scene(18)
image = torch.from_numpy(scene.image)
plotting.pyramid_diagram(
    encoder,
    image,
    alt="An image and, to its right, five ever smaller, ever deeper boxes.",
)

# %% [markdown]
# A classifier throws four of the five away and averages the last one into a single vector. A
# decoder has to choose. That choice, and the adapter between encoder and decoder, is what this book
# calls the *bridge*.
#
# ## The shapes
#
# `shapes` runs a module once and reports what came out. The two numbers at the end are height and
# width:

# %%
photo = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1).float() / 255
photo = F.interpolate(photo[None], size=(160, 240), mode="area")  # 0…1
for name, shape in shapes(encoder, normalize(photo))._asdict().items():
    print(name, list(shape))

# %% [markdown]
# The channels are always 64, 64, 128, 256, 512, and the sides are the image's divided by 2, 4, 8,
# 16, 32. That number is the *stride* of the map: so many pixels lie between two neighbouring
# positions. What if the side cannot be divided? The strided layers are padded, so every halving
# rounds **up**:

# %%
for height, width in [(224, 224), (225, 97), (180, 240), (33, 32)]:
    pyramid = encoder(normalize(torch.rand(1, 3, height, width)))
    for map_, stride in zip(pyramid, encoder.strides, strict=True):
        assert map_.shape[-2:] == (
            math.ceil(height / stride),
            math.ceil(width / stride),
        )
    print(
        f"{height:3} × {width:3} →",
        *[f"{m.shape[-2]} × {m.shape[-1]}," for m in pyramid],
    )

# %% [markdown]
# Look at the second line. Its `c5` has 8 rows; upsample it ×2 and you get 16, but `c4` has 15. Many a
# "Sizes of tensors must match" is born here, and chapter 05 cures them for good: never
# upsample *by a factor*, upsample *to the size of the map you are joining*.
#
# The levels are not equal in weight. Most parameters sit in the last stage, while the work is spread
# far more evenly: from `c3` on, each stage has half the sides and twice the channels of the one before.

# %%
network = resnet18(num_classes=200)
network.load_state_dict(load_bundled())
network.eval()
parts = {
    "c1": nn.Sequential(network.conv1, network.bn1, network.relu),
    "c2": nn.Sequential(network.maxpool, network.layer1),
    "c3": network.layer2,
    "c4": network.layer3,
    "c5": network.layer4,
}

# %%
parameters, work = {}, {}
x = normalize(torch.rand(1, 3, 128, 128))
for name, part in parts.items():
    parameters[name] = count_parameters(part) / 1e6
    work[name] = count_macs(part, x) / 1e6
    x = part(x)
assert parameters["c5"] > 0.7 * sum(parameters.values())
assert max(work.values()) < 0.4 * sum(work.values())
plotting.show_bars(
    parameters,
    ylabel="million parameters",
    alt="Bars: the stage that ends in c5 holds three quarters of all parameters.",
)

# %%
plotting.show_bars(
    work,
    ylabel="million MACs at 128 × 128",
    alt="Bars: the multiplications are spread over the stages far more evenly.",
)

# %% [markdown]
# ## The obvious attempt, and what it does wrong
#
# Cut the head off: put the children of the network into an `nn.Sequential`, without the last ones.
# With one child too many this fails, because a list of layers knows nothing of what the original
# `forward` did *between* them. Here it lost the flattening before the classifier:

# %% tags=["raises-exception", "nbval-ignore-output"]
everything = nn.Sequential(*network.children())
with explaining():
    everything(normalize(torch.rand(1, 3, 224, 224)))

# %% [markdown]
# Without average pool and classifier it works. This is the **truncated encoder**, and for a decoder
# that needs `c5` alone it is all you need:

# %% tags=["export"]
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from helpers.encoder import Pyramid, check_image, check_map


# %% tags=["export"]
class TruncatedEncoder(nn.Module):
    """A torchvision ResNet without average pool and classifier.

    `forward` takes normalised images `[B, 3, H, W]` and returns the last map alone,
    `[B, 512, ⌈H/32⌉, ⌈W/32⌉]` for a ResNet-18, values ≥ 0. Raises `TypeError` for
    integers and `ValueError` for a wrong shape or sides below 32.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict(list(network.named_children())[:-2])
        )

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        return self.layers(x)


# %%
truncated = TruncatedEncoder(network)
x = normalize(photo)
pooled = network.avgpool(truncated(x))
print("cut before the average pool:", shapes(truncated, x))
print("one layer later:            ", list(pooled.shape))
assert torch.equal(truncated(x), encoder(x).c5)

# %% [markdown]
# Mind where the cut is. You will read that "the features come after the average pool". They come
# *before* it: the pool is where the 5 × 8 positions of this photograph, and with them every answer to
# the question *where?*, are averaged away.
#
# What the truncated encoder cannot give you are `c1` to `c4`. They exist for a moment inside and are
# gone. So people reach for **hooks**, functions that PyTorch calls whenever a layer has run:

# %%
collected = []
stages = [
    network.conv1,
    network.layer1,
    network.layer2,
    network.layer3,
    network.layer4,
]
handles = [
    s.register_forward_hook(lambda m, i, out: collected.append(out)) for s in stages
]
for number in range(1, 4):
    network(x)
    print(f"after forward pass {number}: {len(collected)} tensors in the list")

# %% [markdown]
# The list grows by five at every pass. Nothing is ever freed, so memory climbs until the process
# dies; and `collected[:5]` is forever the *first* image that you showed it. The second flaw is
# quieter. Its first entry comes from `conv1`, before BatchNorm and ReLU:

# %%
before, after = collected[0][0], encoder(x).c1[0]
varied = before.flatten(1).std(1).topk(4).indices.tolist()
plotting.show_features(
    {"conv1": before, "c1": after},
    channels=varied,
    alt="The same channels twice: before BatchNorm and ReLU, and after.",
)

# %%
assert before.min() < 0, "a convolution's output has negative values"
assert after.min() == 0, "c1 comes after a ReLU"
for handle in handles:
    handle.remove()

# %% [markdown]
# Why not hook the BatchNorm, then? Because the ReLU that follows works *in place*: it overwrites the
# very tensor that your hook has kept. You hook a layer and find the next one's output in your hand.

# %%
kept = {}
handle = network.bn1.register_forward_hook(lambda m, i, out: kept.update(bn1=out))
network(x)
handle.remove()
with torch.no_grad():
    really = network.bn1(network.conv1(x))
print("negative values after BatchNorm:", bool((really < 0).any()))
print("… in the tensor that was kept:  ", bool((kept["bn1"] < 0).any()))

# %% [markdown]
# ## The technique
#
# Hooks can be tamed: one name per stage instead of a growing list, taken after the ReLU, and removed
# at the end whatever happens in between.


# %% tags=["export"]
@contextmanager
def collecting_stages(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Let each forward pass of a torchvision ResNet fill a dict, `c1` to `c5`.

    The maps are those of the latest pass; their shapes are those of `Pyramid`. When
    the `with` block ends, even by an error, the hooks are gone, the dict is empty.
    """
    maps: dict[str, Tensor] = {}
    sources = {
        "c1": "relu",
        "c2": "layer1",
        "c3": "layer2",
        "c4": "layer3",
        "c5": "layer4",
    }
    handles = []
    try:
        for name, source in sources.items():

            def keep(
                module: nn.Module, inputs: object, output: Tensor, name: str = name
            ) -> None:
                maps[name] = output

            handles.append(
                network.get_submodule(source).register_forward_hook(keep)
            )
        yield maps
    finally:
        for handle in handles:
            handle.remove()
        maps.clear()


# %%
with collecting_stages(network) as maps:
    for _ in range(3):
        network(x)
    hooked = Pyramid(**maps)
print(*[list(map_.shape) for map_ in hooked], sep="\n")
assert all(len(module._forward_hooks) == 0 for module in network.modules())

# %% [markdown]
# The third way needs no hook at all. torchvision can *rewrite* a network so that it returns the
# nodes you name, and leaves out what comes after the last one:

# %%
nodes = {
    "relu": "c1",
    "layer1": "c2",
    "layer2": "c3",
    "layer3": "c4",
    "layer4": "c5",
}
extractor = create_feature_extractor(network, nodes).eval()
extracted = Pyramid(**extractor(x))

for ours, by_hook, by_node in zip(encoder(x), hooked, extracted, strict=True):
    assert torch.equal(ours, by_hook) and torch.equal(ours, by_node)
print("three ways, the same five maps, bit for bit")

# %% [markdown]
# | you want | take |
# |---|---|
# | `c5` alone | `TruncatedEncoder` |
# | a look into a network that you cannot rewrite | `collecting_stages` |
# | an encoder for training, export, `torch.compile` | `create_feature_extractor` |
#
# The book's `ResNet18Encoder` is the third way plus two things: it checks what you feed it, and it
# knows how to be frozen. Everything from here on uses it.

# %% [markdown]
# ### Residual connections are not skip connections
#
# Both are drawn as arcs, and many texts mix them up. A **residual connection** lives *inside* a block
# of the encoder: the block's input is added to its output, same level, same shape. A **skip
# connection** leaves the encoder: it carries a whole map, `c2` say, over to the decoder. The encoder
# has the first kind whether you use it or not; the second kind is what you build.
#
# What does the first kind do? It is said to let the gradient through. Take the additions out of a
# fresh network and see how much gradient arrives at each stage, once with BatchNorm at work and once
# without. (A fresh BatchNorm in evaluation mode changes nothing: mean 0, variance 1. A line is the mean of three
# seeds; its band reaches from the lowest to the highest, here and in all chapters.)


# %%
def without_addition(block, x):
    x = block.relu(block.bn1(block.conv1(x)))
    return block.relu(block.bn2(block.conv2(x)))


def gradient_by_stage(network, x, batchnorm):
    network.train(batchnorm).zero_grad()
    output = network(x)
    output.square().mean().backward()
    stages = [
        network.conv1,
        *(network.get_submodule(f"layer{n}.0.conv1") for n in range(1, 5)),
    ]
    return [float(layer.weight.grad.norm()) for layer in stages], float(
        output.detach().abs().mean()
    )


# %%
kinds = ["residual", "plain", "residual, no norm", "plain, no norm"]
gradients, outputs = ({kind: [] for kind in kinds} for _ in range(2))
for seed in range(3):
    torch.manual_seed(seed)
    residual = resnet18(num_classes=10)
    plain = copy.deepcopy(residual)
    for block in plain.modules():
        if type(block).__name__ == "BasicBlock":
            block.forward = partial(without_addition, block)
    batch = torch.randn(4, 3, 96, 96)
    for kind in reversed(kinds):  # a pass in training moves BatchNorm: so last
        network_ = residual if "residual" in kind else plain
        sizes, output = gradient_by_stage(network_, batch, "norm" not in kind)
        gradients[kind].append(sizes)
        outputs[kind].append(output)

# %% tags=["nbval-ignore-output"]
levels = ["c1", "c2", "c3", "c4", "c5"]
plotting.show_curves(
    gradients,
    xlabel="first layer of the stage that ends in",
    ylabel="size of the gradient",
    x=levels,
    log=True,
    alt="Four curves: only the plain network without BatchNorm lies far below.",
)

# %%
residual, plain, residual_bare, plain_bare = (
    torch.tensor(gradients[kind]) for kind in kinds
)
assert (residual / plain).max() < 5 and (residual / plain).min() > 1 / 5
assert (residual_bare / plain_bare).min() > 200
assert (plain_bare.amax(1) / plain_bare.amin(1)).max() < 10
bare, weak = (torch.tensor(outputs[kind]) for kind in kinds[2:])
assert (bare / weak).min() > 10

# %% [markdown]
# With BatchNorm, the additions make little difference at 18 layers: nothing vanishes in either
# network. Without it the plain network's gradients are hundreds of times smaller, at the last stage as at
# the first. So they do not die on their way back. It is the signal that fades on its way forward: the
# output is more than ten times weaker. The additions keep both alive. Do not credit *skip* connections
# with it; what those do for the encoder's gradient is a question of its own, measured in chapter 05.

# %% [markdown]
# ## Train it
#
# Enough tensors: what can a decoder *do* with each level? The smallest decoder there is has one
# linear layer, applied at every position of one map. It can only sort what the encoder has
# already worked out, which makes it an honest question to the encoder: a **linear probe**. The
# BatchNorm in front only puts all channels on one scale.


# %% tags=["export"]
class LinearProbe(nn.Module):
    """The smallest decoder: one linear layer at every position of one map.

    Args:
        in_channels: channels of the five maps, `encoder.out_channels`.
        out_channels: classes, or channels of the image to make.
        level: which map to read, 1 for `c1` … 5 for `c5`.

    `forward` takes a `Pyramid` and returns logits `[B, out_channels, h, w]` of that
    map's size. Raises `ValueError` for a level that does not exist or a map with
    other channels, `TypeError` for integers.

    Source: Alain and Bengio, Understanding intermediate layers using linear
    classifier probes, 2016.
    """

    def __init__(
        self, in_channels: tuple[int, ...], out_channels: int, level: int
    ) -> None:
        super().__init__()
        if not 1 <= level <= len(in_channels):
            raise ValueError(
                f"Expected a level from 1 to {len(in_channels)}, got {level}."
            )
        self.level = level
        self.scale = nn.BatchNorm2d(in_channels[level - 1], affine=False)
        self.linear = nn.Conv2d(in_channels[level - 1], out_channels, kernel_size=1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        map_ = pyramid[self.level - 1]
        check_map(f"c{self.level}", map_, self.linear.in_channels)
        return self.linear(self.scale(map_))


# %%
probe = LinearProbe(encoder.out_channels, out_channels=7, level=5)
print(count_parameters(probe), "parameters")
shapes(probe, encoder(normalize(image[None])))

# %% [markdown]
# The task is the book's own: *scenes*, drawn by code, with seven classes told apart by shape alone.
# The encoder is frozen, so its maps are computed once and kept:

# %%
images, masks = scenes.batch(range(160))
unseen_images, unseen_masks = scenes.batch(range(10_000, 10_040))
with torch.no_grad():
    maps = encoder(normalize(images))
    unseen_maps = encoder(normalize(unseen_images))


# %%
def train_probe(level, steps=100):
    torch.manual_seed(0)
    probe = LinearProbe(encoder.out_channels, len(scenes.CLASSES), level)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.03)
    targets = masks[:, ::2, ::2]  # every second pixel is enough to learn from
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(targets), (8,))
        logits = probe(Pyramid(*(level_maps[chosen] for level_maps in maps)))
        logits = F.interpolate(logits, size=targets.shape[-2:], mode="bilinear")
        loss = F.cross_entropy(logits, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return probe.eval(), losses


# %%
trained = {f"c{level}": train_probe(level) for level in range(1, 6)}
probes = {name: probe for name, (probe, _) in trained.items()}

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    {name: losses for name, (_, losses) in trained.items()},
    xlabel="step",
    ylabel="cross-entropy",
    alt="Five falling training curves, one for each level.",
)

# %%
ends = {}
for name, (_, losses) in trained.items():
    ends[name] = sum(losses[-10:]) / 10
    assert ends[name] < losses[0] / 2
assert min(ends, key=ends.get) == "c4"

# %% [markdown]
# All five learn, and by the loss alone you would take `c4`. But most pixels are background, and the
# loss counts pixels. So ask two questions apart, on scenes that no probe has seen. *Where?*: how
# well do predicted and true objects overlap, whatever their shape? *Which?*: at the pixels of an
# object, how often does its shape get the largest logit? (*Guessing* always names the commonest shape.)


# %%
@torch.no_grad()
def segment(probe, pyramid):
    """Logits at the size of the masks, [B, 7, 128, 128]."""
    return F.interpolate(
        probe(pyramid), size=unseen_masks.shape[-2:], mode="bilinear"
    )


logits = {name: segment(probe, unseen_maps) for name, probe in probes.items()}
objects = unseen_masks > 0
where, which = [], []
for level_logits in logits.values():
    found = level_logits.argmax(dim=1) > 0
    where.append(100 * float((found & objects).sum() / (found | objects).sum()))
    shape = level_logits[:, 1:].argmax(dim=1) + 1
    which.append(100 * float((shape == unseen_masks)[objects].float().mean()))
commonest = 100 * float(torch.bincount(unseen_masks[objects]).max() / objects.sum())

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    {"where?": where, "which?": which, "guessing": [commonest] * 5},
    xlabel="level",
    ylabel="%",
    x=levels,
    alt="Where is highest at c1 and falls steeply at c5; which rises up to c4.",
)

# %%
assert where[0] > max(where[1:]) + 1 and where[3] > where[4] + 10
assert which[0] < commonest - 5 and which[3] > commonest + 10
assert which[3] > max(*which[:3], which[4]) + 5

# %% tags=["nbval-ignore-output"]
chosen = 27
painted = {
    name: plotting.colorize(out[chosen].argmax(dim=0))
    for name, out in logits.items()
}
plotting.show_images(
    [
        unseen_images[chosen],
        plotting.colorize(unseen_masks[chosen]),
        *painted.values(),
    ],
    titles=["image", "truth", *painted],
    alt="A scene, its true mask, and what a linear probe reads from c1 to c5.",
)

# %% [markdown]
# The two curves that cross are the reason for this whole book. `c1` knows best where something is, and
# names its shape worse than guessing. `c4` names it best, and finds nearly as much; but look at its outlines:
# they have melted. `c5` has lost the places, too. No level is best at both. A bridge brings them together.
#
# ## Look inside
#
# ### What c1 to c5 see
#
# 512 channels cannot be looked at one by one. So each map is reduced to its three strongest
# directions, painted as red, green and blue: positions of the same colour look alike to the network.

# %%
x = normalize(photo)
plotting.show_features_as_color(
    photo[0],
    encoder(x),
    alt="A coffee cup and its five maps in false colour.",
)

# %%
plotting.show_features_as_color(
    image,
    encoder(normalize(image[None])),
    alt="A scene and its five maps in false colour, coarser at every level.",
)

# %% [markdown]
# `c1` is nearly the image: edges, colours, everything in its place. In `c5` the places have become
# blocks of 32 pixels, but what shares a colour now belongs together. A thin pole that is clear in `c1`
# has no position of its own left in `c5`. Keep this picture in mind when your masks are blobs.
#
# ### How far c1 to c5 see
#
# Each position of a map depends on a window of the image, its **receptive field**. Its side $r$ follows
# from the kernels $k_i$ and the strides $s_j$ of the layers alone: each layer adds $k_i - 1$ steps, and a
# step is as long as all strides before it multiplied,
#
# $$r = 1 + \sum_i (k_i - 1) \prod_{j<i} s_j .$$


# %%
def receptive_field(layers):
    size, step = 1, 1
    for kernel, stride in layers:
        size += (kernel - 1) * step
        step *= stride
    return size


layers = [(7, 2)]
by_formula = [receptive_field(layers)]
layers += [(3, 2)]
for first_stride in (1, 2, 2, 2):
    layers += [(3, first_stride), (3, 1), (3, 1), (3, 1)]
    by_formula.append(receptive_field(layers))
print("receptive fields in pixels, by formula:", by_formula)

# %% [markdown]
# A formula about layers can be wrong about a network, so measure it. The gradient of one position
# with respect to the image is zero wherever that position cannot see:


# %%
def input_gradient(level, x):
    """How strongly the middle of a map reacts to each pixel, [H, W]."""
    x = x.clone().requires_grad_()
    map_ = encoder(x)[level]
    middle = map_[0, :, map_.shape[2] // 2, map_.shape[3] // 2]
    (gradient,) = torch.autograd.grad(middle.sum(), x)
    return gradient[0].abs().sum(dim=0)


astronaut = (
    torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].float() / 255
)
reactions = [input_gradient(level, normalize(astronaut)) for level in range(5)]
rows = [torch.nonzero(s.sum(dim=1)).flatten() for s in reactions]
by_gradient = [int(r.max() - r.min() + 1) for r in rows]
print("receptive fields in pixels, by gradient:", by_gradient)
assert by_gradient == by_formula

# %% [markdown]
# They agree to the pixel. But *can see* is not *does see*. Here is the same gradient as a picture; move
# the slider, by mouse or with the arrow keys, and watch the window grow:

# %% tags=["nbval-ignore-output"]
frames = [
    plotting.show_heatmaps(
        astronaut[0], [s], alt=f"What one position of c{n} sees."
    )
    for n, s in enumerate(reactions, start=1)
]
plotting.flipbook(
    frames,
    [f"c{n}: {size} × {size} pixels" for n, size in enumerate(by_formula, start=1)],
    alt="The window of the photograph that one position of a map reacts to",
)

# %% [markdown]
# Most of the weight lies near the middle. Draw the smallest centred square that holds nine tenths of
# the gradient, and it is far smaller than the formula's:


# %%
def effective_side(s, share=0.9):
    centre = [int(torch.nonzero(s.sum(dim=d)).float().mean()) for d in (1, 0)]
    for radius in range(1, max(s.shape)):
        top, left = (max(c - radius, 0) for c in centre)
        if (
            s[top : centre[0] + radius + 1, left : centre[1] + radius + 1].sum()
            > share * s.sum()
        ):
            return 2 * radius + 1


effective = [effective_side(s) for s in reactions]
assert effective[4] < 0.6 * by_formula[4], "c5 uses much less than it could"

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    {"formula": by_formula, "nine tenths of the gradient": effective},
    xlabel="level",
    ylabel="side of the window in pixels",
    x=levels,
    alt="Both windows grow from c1 to c5, the effective one far less.",
)

# %% [markdown]
# Two things follow. `c5` can see beyond a 224-pixel image and still decides mostly by what is near: if
# your task needs more context, chapter 07 widens the view. And `c1` sees a handful of pixels: it knows
# *where* an edge is, never *of what*.

# %% [markdown]
# ## Two failures without an error message
#
# ### The wrong range
#
# The encoder was trained on images with ImageNet's mean subtracted and its standard deviation divided
# out. Feed it anything else and it answers, without complaint, with other features. Here are the usual
# mistakes, put before an encoder and a probe that know nothing of them:

# %%
mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
inputs = {
    "right": normalize(unseen_images),
    "blue and red swapped": normalize(unseen_images.flip(1)),
    "normalised twice": (normalize(unseen_images) - mean) / std,
    "not normalised": unseen_images,
    "0…255": unseen_images * 255,
}
model = Segmenter(encoder, probes["c4"]).eval()


@torch.no_grad()
def miou(x):
    """Overlap of prediction and truth, mean over the classes, 100 at best."""
    predicted = model(x).argmax(dim=1)
    return 100 * float(
        jaccard_index(predicted, unseen_masks, task="multiclass", num_classes=7)
    )


by_input = {name: miou(x) for name, x in inputs.items()}

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    by_input,
    ylabel="mIoU on unseen scenes",
    alt="The right input scores best; pixels in 0 to 255 ruin the masks.",
)

# %%
assert all(by_input["right"] > by_input[name] for name in list(inputs)[2:])
assert by_input["0…255"] < by_input["right"] / 2

# %% [markdown]
# None of these raised anything. That is why `normalize` looks at the values, once, where the data
# enters, and refuses what cannot be right:

# %% tags=["raises-exception"]
normalize(torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].float())

# %% [markdown]
# ### Frozen, but drifting
#
# Freezing is said to be one line: `requires_grad = False`. That stops the gradients. It does not stop
# BatchNorm, whose running mean and variance are no parameters at all: in training mode every forward
# pass moves them a little towards the current batch. No optimiser is involved.

# %%
networks = {
    "requires_grad = False": ResNet18Encoder(frozen=False).requires_grad_(False),
    "frozen=True": ResNet18Encoder(frozen=True),
}


# %%
@torch.no_grad()
def drift_of(network, steps=12):
    """Relative change of a photograph's c5 after each pass in training mode."""
    before = network.eval()(normalize(photo)).c5
    drift = []
    for step in range(steps):
        network.train()
        network(normalize(images[8 * step : 8 * step + 8]))
        after = network.eval()(normalize(photo)).c5
        drift.append(float((after - before).norm() / before.norm()))
    return drift


drifts = {name: drift_of(network) for name, network in networks.items()}

# %% tags=["nbval-ignore-output"]
plotting.show_curves(
    drifts,
    xlabel="forward passes in training mode, no optimiser",
    ylabel="relative change of c5",
    alt="One curve climbs though nothing is trained; the other stays at zero.",
)

# %%
assert drifts["requires_grad = False"][-1] > 0.1
assert drifts["frozen=True"][-1] == 0
left_out = drift_of(ResNet18Encoder(frozen=False))  # of any optimiser
assert left_out == drifts["requires_grad = False"]

# %% [markdown]
# A dozen batches, and the photograph's `c5` is another one. To leave the encoder out of the optimiser does not help
# either: that drifts alike, and all its gradients are computed for nothing. What does the drift cost? The probe on
# `c4` was trained on maps of the frozen encoder; here it reads those of both:


# %%
@torch.no_grad()
def object_accuracy(network):
    """Of the objects' pixels, those that the probe on c4 names right, in %."""
    out = segment(probes["c4"], network.eval()(normalize(unseen_images)))
    shape = out[:, 1:].argmax(dim=1) + 1
    return 100 * float((shape == unseen_masks)[objects].float().mean())


# %% tags=["nbval-ignore-output"]
for name, network_ in networks.items():
    print(f"{name:21} {object_accuracy(network_):.0f} % of the pixels named right")

# %%
assert object_accuracy(networks["requires_grad = False"]) < which[3] - 5
assert object_accuracy(networks["frozen=True"]) == which[3]

# %% [markdown]
# No error, and a decoder that "learns but evaluates badly". Frozen means *both*: no gradients, and BatchNorm in
# evaluation mode even after `model.train()`. The encoder of this book overrides `train` for that.
#
# ## Measure the claim: pretrained beats random
#
# First by eye. Cut objects out of unseen scenes, average `c5` into one vector each, and look for the
# nearest neighbours in *other* scenes. Colour and texture say nothing about the class, so a neighbour
# of the same shape means that the features know shapes.


# %%
def cut_out(indices, smallest=16):
    """Objects inside their scenes, [N, 3, 96, 96], classes and scenes."""
    crops, classes, sources = [], [], []
    for index in indices:
        scene = scenes.scene(index)
        for region in regionprops(label(scene.mask)):
            top, left, bottom, right = region.bbox
            inside = min(top, left) > 0 and max(bottom, right) < scenes.SIZE
            if inside and min(bottom - top, right - left) >= smallest:
                crop = torch.from_numpy(
                    scene.image[None, :, top:bottom, left:right]
                )
                crops.append(F.interpolate(crop, size=(96, 96), mode="bilinear"))
                classes.append(int(scene.mask[tuple(region.coords[0])]))
                sources.append(index)
    return torch.cat(crops), torch.tensor(classes), torch.tensor(sources)


crops, classes, sources = cut_out(range(10_000, 10_150))
print(len(crops), "objects")


# %%
@torch.no_grad()
def neighbours(encoder, count=4):
    """The nearest crops of other scenes, [N, count]."""
    vectors = encoder(normalize(crops)).c5.mean(dim=(2, 3))
    vectors = F.normalize(vectors - vectors.mean(dim=0))
    similarity = vectors @ vectors.T
    similarity[sources[:, None] == sources] = -1
    return similarity.topk(count).indices


torch.manual_seed(0)
random_encoder = ResNet18Encoder(weights=None)
nearest = {"pretrained": neighbours(encoder), "random": neighbours(random_encoder)}
same_shape = {
    name: 100 * float((classes[near] == classes[:, None]).float().mean())
    for name, near in nearest.items()
}
same_shape["chance"] = 100 * float(
    (torch.bincount(classes) / len(classes)).square().sum()
)

# %% tags=["nbval-ignore-output"]
queries = [
    int((classes == scenes.CLASSES.index(c)).nonzero()[0])
    for c in ("disc", "star", "ring")
]
shown = [i for q in queries for i in (q, *nearest["pretrained"][q].tolist())]
plotting.show_images(
    crops[shown],
    titles=[scenes.CLASSES[classes[i]] for i in shown],
    columns=5,
    alt="Three objects, each followed by its four nearest neighbours.",
)

# %% [markdown]
# On the left the object that was asked about, then its four nearest neighbours. They share the shape
# more often than not; where they do not, you see what else the features hold on to.

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    same_shape,
    ylabel="neighbours of the same shape, %",
    alt="Pretrained features find the same shape more often than random ones.",
)

# %%
assert same_shape["pretrained"] > same_shape["random"] + 5

# %% [markdown]
# Now by measurement, level by level, and with three questions at once. At a pixel, a linear readout of
# each level is asked: which *colour* is here? Is there an *edge* within two pixels? Which *shape* does
# this pixel belong to? `python -m experiments.chapters.encoder.levels` asks them with three seeds, for a
# pretrained and a random encoder, and writes down what it finds; the picture below is drawn from that record.
# (R² and accuracy, balanced over the shapes, are 1 at best; guessing has R² 0, AUC ½ and accuracy ⅙.)

# %%
readouts = records.of("levels")
questions = {"colour": "R²", "edge": "AUC", "shape": "accuracy"}


def scores(question, weights):
    """Scores at c1 to c5, one row for each seed, [seeds, 5]."""
    runs = readouts.where(weights=weights)
    return torch.tensor([run["scores_c1_to_c5"][question] for run in runs])


assert len({run["seed"] for run in readouts}) >= 3

# %% tags=["nbval-ignore-output"]
names = {"bundled": "pretrained", "random": "random"}
plotting.show_panels(
    {
        f"{question} ({unit})": {
            name: scores(question, weights) for weights, name in names.items()
        }
        for question, unit in questions.items()
    },
    x=levels,
    xlabel="level",
    alt="Colour fades from c1 to c5, edges are clearest in c2, shapes in c4.",
)

# %%
best = {
    question: set(scores(question, "bundled").argmax(dim=1).tolist())
    for question in questions
}
print({question: [levels[i] for i in found] for question, found in best.items()})
assert best == {"colour": {0}, "edge": {1}, "shape": {3}}

shape = {name: scores("shape", weights) for weights, name in names.items()}
assert shape["pretrained"][:, 3].min() > shape["random"].max() + 0.15
colour = {name: scores("colour", weights) for weights, name in names.items()}
assert colour["random"][:, 2:].min() > colour["pretrained"][:, 2:].max()

# %% [markdown]
# Read it from left to right. *Colour* is best read at `c1` and fades with every stage. *Edges* are
# clearest early, *shapes* late, and shapes are what pretraining bought: the random encoder hardly
# learns them at any level. It even keeps more of the colour, because nothing taught it that colour
# does not matter. And the last map is not the best one, not even for shapes: what `c5` gains in
# meaning it loses in place.
#
# So much for reading off. What does it mean for a decoder with layers of its own? `python -m
# experiments.chapters.encoder.scenes` trains three of them on scenes, with nearly the same number of parameters and
# the same number of steps: one that sees `c5` alone, one that sees all five maps, and one that sees
# the five maps of a random encoder. *mIoU* is the overlap of predicted and true masks, averaged over
# the seven classes.

# %%
trainings = records.of("scenes")
decoders = {
    "c5 alone, pretrained": "c5, bundled",
    "c1…c5, random": "c1…c5, random",
    "c1…c5, pretrained": "c1…c5, bundled",
}
overlap = {name: trainings.values("scenes", w) for name, w in decoders.items()}
assert all(len(runs) >= 3 for runs in overlap.values())

# %% tags=["nbval-ignore-output"]
plotting.show_bars(
    overlap,
    ylabel="mIoU on unseen scenes, %",
    highlight="c1…c5, pretrained",
    alt="Five pretrained maps score far above c5 alone and five random maps.",
)

# %%
assert trainings.margin("scenes", "c1…c5, bundled", "c5, bundled") > 18
assert trainings.margin("scenes", "c1…c5, bundled", "c1…c5, random") > 20
assert trainings.margin("scenes", "c5, bundled", "c1…c5, random") > 0

# %% [markdown]
# The early maps are worth some twenty points here, pretraining even more, and you need both: the maps bring
# the outlines, the weights bring the shapes. The encoder is the same file in the first and the last bar.
# Only the bridge is another.
#
# Does it hold for photographs, and when the encoder may learn along? `python -m experiments.claims
# encoder` puts one *light* decoder, a 1×1 convolution for each of `c2` to `c5` and no look at
# neighbours, on three encoders: a random one, the *first* weights that this book had, and the
# *bundled* ones, which were trained longer. It trains on scenes and on CamVid's streets, with the
# encoder frozen and fine-tuned, and reports on scenes and on a drive that no training saw.

# %%
evidence = records.of("encoder")
encoders = ["random", "first", "bundled"]


def transfer(where, how):
    """mIoU in %, one row for each encoder, one column for each seed."""
    return [evidence.values(where, f"{name}, {how}") for name in encoders]


worth = {
    where: {how: transfer(where, how) for how in ("frozen", "fine-tuned")}
    for where in ("scenes", "streets")
}
for miou in worth.values():
    assert all(len(runs) >= 3 for rows in miou.values() for runs in rows)

# %% tags=["nbval-ignore-output"]
plotting.show_panels(
    {
        f"{where}: mIoU, %": {how: torch.tensor(r).T for how, r in miou.items()}
        for where, miou in worth.items()
    },
    x=encoders,
    xlabel="weights of the encoder",
    alt="mIoU jumps from random to the first weights; the step to the bundled "
    "ones is small on scenes, and on streets there is none.",
)

# %% tags=["nbval-ignore-output"]
print(f"{'mIoU, %':20}" + "".join(f"{name:>20}" for name in encoders))
for where, miou in worth.items():
    for how, rows in miou.items():
        cells = [f"{records.spread(runs):>20}" for runs in rows]
        print(f"{where + ', ' + how:20}" + "".join(cells))

# %%
for where in worth:
    assert evidence.margin(where, "bundled, frozen", "random, frozen") > 5
for how, low, high in (("frozen", -0.5, 0.5), ("fine-tuned", -2, -0.5)):
    bundled, first = f"bundled, {how}", f"first, {how}"
    assert evidence.margin("scenes", bundled, first) > 1
    ahead = evidence.mean("streets", bundled) - evidence.mean("streets", first)
    assert low < ahead < high

# %% [markdown]
# The large step, from random to pretrained, pays everywhere. The small one, from the first weights to
# those of a longer training, pays on scenes, frozen or fine-tuned. On streets it does not: frozen, three
# seeds show no difference, and fine-tuned, the first weights even stay about a point ahead, although the longer
# training made the encoder better at its own 200 classes. So a better classifier is a hope, not a promise:
# try it on *your* images.
#
# The bundled weights were chosen on other images, before they were run on this drive. How they were made,
# and how to make your own, is in their model card, `helpers/weights/README.md`.

# %% [markdown]
# ## Limits
#
# - The bundled weights come from a short training on small pictures of 200 classes. With
#   `BOOK_WEIGHTS=imagenet` `ResNet18Encoder()` takes torchvision's instead, downloaded once. The chapters'
#   assertions are about the bundled ones: where one stops a cell, go on with the next.
# - A linear probe asks what can be read off *at once*. A decoder with a few layers of its own reads
#   more out of every level, out of the random encoder's too.
# - Receptive fields were measured in the middle of the image. Near the border part of the window lies
#   in the padding.
# - Scenes are drawn, not photographed. Chapter 05 repeats its claims on real streets.
#
# ## Exercises
#
# Each has a check that tells you what is wrong. Check and solution are folded away.


# %% [markdown]
# **Exercise 1.** Predict the five sizes for any image, without running the encoder.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_sizes(answer):
    for height, width in [(224, 224), (225, 97), (64, 250)]:
        truth = [
            tuple(m.shape[-2:])
            for m in encoder(normalize(torch.rand(1, 3, height, width)))
        ]
        predicted = answer(height, width)
        if predicted is None:
            return print("Nothing returned yet: return five (height, width) pairs.")
        predicted = [tuple(pair) for pair in predicted]
        floor = [(height // 2**n, width // 2**n) for n in range(1, 6)]
        if predicted == floor != truth:
            return print(
                f"You round down. At {height} × {width} the encoder gives {truth}."
            )
        if predicted != truth:
            return print(
                f"At {height} × {width} you say {predicted}; "
                f"the encoder gives {truth}."
            )
    print("Right, at every size: each halving rounds up.")


# %%
def sizes(height, width):
    """Return [(height of c1, width of c1), …, (height of c5, width of c5)]."""


check_sizes(sizes)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def sizes_solution(height, width):
    return [
        (math.ceil(height / stride), math.ceil(width / stride))
        for stride in (2, 4, 8, 16, 32)
    ]


check_sizes(sizes_solution)

# %% [markdown]
# **Exercise 2.** A decoder wants `c3` *and* the pooled vector `[B, 512]`. Get both in one forward pass.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_two_levels(answer):
    torch.manual_seed(0)
    network = resnet18().eval()
    x = torch.randn(2, 3, 64, 96)
    found = answer(network, x)
    if found is None:
        return print("Nothing returned yet: return c3 and the vector.")
    c3, vector = found
    truth = create_feature_extractor(
        network, {"layer2": "c3", "flatten": "vector"}
    )(x)
    if vector.shape == (2, 512, 1, 1):
        return print("The vector still has two sides of length 1: flatten it.")
    if vector.shape != (2, 512):
        return print(
            f"The vector should be [2, 512], yours is {list(vector.shape)}."
        )
    if c3.shape != truth["c3"].shape:
        return print(
            f"c3 should be {list(truth['c3'].shape)}, yours is {list(c3.shape)}."
        )
    if not (
        torch.allclose(c3, truth["c3"]) and torch.allclose(vector, truth["vector"])
    ):
        return print(
            "Shapes are right, values are not: was the network in eval mode?"
        )
    if any(module._forward_hooks for module in network.modules()):
        return print(
            "Right values, but a hook stayed behind: it runs at every pass."
        )
    print("Right: one pass, two outputs, nothing left behind.")


# %%
def two_levels(network, x):
    """Return c3 [B, 128, h, w] and the pooled vector [B, 512] of a ResNet-18."""


check_two_levels(two_levels)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def two_levels_solution(network, x):
    outputs = create_feature_extractor(
        network, {"layer2": "c3", "flatten": "vector"}
    )(x)
    return outputs["c3"], outputs["vector"]


check_two_levels(two_levels_solution)

# %% [markdown]
# **Exercise 3.** Freeze `model.encoder`, a plain torchvision ResNet-18, so that it *stays* frozen when
# somebody calls `model.train()` afterwards, while `model.head` goes on learning.


# %% tags=["hide-input"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "The check", "code_prompt_hide": "The check"}
def check_freeze(answer):
    model = nn.Sequential(OrderedDict(encoder=resnet18(), head=nn.Linear(1000, 7)))
    answer(model)
    model.train()
    before = copy.deepcopy(model.encoder.state_dict())
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    moved = [
        n
        for n, v in model.encoder.state_dict().items()
        if not torch.equal(v, before[n])
    ]
    if any(p.grad is not None for p in model.encoder.parameters()):
        return print("The encoder's parameters still get gradients.")
    if moved:
        return print(
            f"No gradients, but {moved[0]} moved: model.train() woke BatchNorm."
        )
    if model.head.weight.grad is None or not model.head.training:
        return print(
            "The encoder rests, but so does the head: it should go on learning."
        )
    print("Right: no gradients, no drift, and the head still learns.")


# %%
def freeze(model):
    """Change the model in place."""


check_freeze(freeze)


# %% tags=["hide-cell"] jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
def freeze_solution(model):
    model.encoder.requires_grad_(False)
    model.encoder.eval()
    model.encoder.train = lambda mode=True: (
        model.encoder
    )  # later calls change nothing


check_freeze(freeze_solution)

# %% [markdown]
# ## Recap
#
# - A ResNet-18 leaves five maps. Sides are halved, rounded up; every map comes after a ReLU.
# - Truncate for `c5` alone, `create_feature_extractor` for all five, hooks only with a `with` around.
# - A position of `c1` sees 7 pixels, one of `c5` more than a whole 224-pixel image, most of it dimly.
# - Normalise once. Freeze gradients *and* BatchNorm.
# - Early levels know where, late levels know what. Bring them together: that is the rest of the book.
#
# | shape contract | |
# |---|---|
# | in | `x [B, 3, H, W]`, normalised, H and W at least 32 |
# | `c1` | `[B, 64, ⌈H/2⌉, ⌈W/2⌉]` |
# | `c2` | `[B, 64, ⌈H/4⌉, ⌈W/4⌉]` |
# | `c3` | `[B, 128, ⌈H/8⌉, ⌈W/8⌉]` |
# | `c4` | `[B, 256, ⌈H/16⌉, ⌈W/16⌉]` |
# | `c5` | `[B, 512, ⌈H/32⌉, ⌈W/32⌉]` |
#
# In your own project:
#
# ```python
# from helpers.encoder import ResNet18Encoder, Segmenter, normalize
# from helpers.bridges.encoder import LinearProbe
#
# encoder = ResNet18Encoder()
# model = Segmenter(encoder, LinearProbe(encoder.out_channels, out_channels=7, level=4))
# logits = model(normalize(images))  # [B, 7, H, W]
# ```
