"""A pretrained ResNet-18 that returns its five maps, and the model that puts a decoder on it."""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.feature_extraction import create_feature_extractor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
OUT_CHANNELS = (64, 64, 128, 256, 512)
STRIDES = (2, 4, 8, 16, 32)
STAGES = {"relu": "c1", "layer1": "c2", "layer2": "c3", "layer3": "c4", "layer4": "c5"}
SMALLEST_SIDE = 32
ROUNDING = 1e-3  # resizing leaves values a hair outside of 0…1
RANK_CURES = {
    2: "Add the batch and the channel dimension: images[None, None].",
    3: "Add the batch dimension: images[None].",
    5: "Make one batch of all the frames: images.flatten(0, 1).",
}
BUNDLED = Path(__file__).parent / "weights" / "resnet18-tiny-imagenet-fp16.safetensors"
BUNDLED_SHA256 = "133856db24499d085981c37b1ee451665c0ae951568ecb853b07c83cb87f5656"


class Pyramid(NamedTuple):
    """The five feature maps of one batch, finest first.

    With an image of `H × W` pixels, `c1` is `[B, 64, ⌈H/2⌉, ⌈W/2⌉]` and `c5` is
    `[B, 512, ⌈H/32⌉, ⌈W/32⌉]`. Every map comes after a ReLU, so no value is negative.
    """

    c1: Tensor
    c2: Tensor
    c3: Tensor
    c4: Tensor
    c5: Tensor


class _TracedEncoder(nn.Module):
    """What both encoders do alike; a frozen one stays in evaluation, also after `train()`."""

    out_channels = OUT_CHANNELS
    strides = STRIDES
    frozen: bool

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Traced modules trace again when copied, and would wake up in training mode."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        for old, new in zip(self.modules(), copied.modules(), strict=True):
            new.training = old.training
        return copied


class ResNet18Encoder(_TracedEncoder):
    """ResNet-18 without its classifier: one image in, five feature maps out.

    Args:
        weights: `"bundled"` (trained on Tiny ImageNet, comes with this package), `"imagenet"`
            (torchvision's `IMAGENET1K_V1`, downloaded once, 45 MB), `None` (random) or your own:
            the `Path` of a safetensors file with a state dict of torchvision's `resnet18`. Where
            the environment variable `BOOK_WEIGHTS` is set to `imagenet`, `bundled` or `random`,
            it takes the place of `"bundled"`.
        frozen: no parameter gets a gradient, and BatchNorm keeps its statistics, even after
            `model.train()`.

    `forward` takes normalised images `[B, 3, H, W]` (floating point, H and W at least 32, see
    `normalize`) and returns a `Pyramid`. It raises `TypeError` for integers and `ValueError` for a
    wrong shape.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
    """

    def __init__(self, weights: str | Path | None = "bundled", frozen: bool = True) -> None:
        super().__init__()
        state = _state(weights)
        network = resnet18(num_classes=len(state["fc.bias"]) if state else 1000)
        if state:
            network.load_state_dict(state)
        self.features = create_feature_extractor(network, STAGES)
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train(not frozen)

    def forward(self, x: Tensor) -> Pyramid:
        check_image(x)
        return Pyramid(**self.features(x))


class ShortEncoder(_TracedEncoder):
    """A `ResNet18Encoder` that ends after its first `levels`, for decoders that read no further.

    `forward` takes what the encoder takes and returns a `Pyramid`: the first maps are the
    encoder's, the others are empty, `[B, C, 0, 0]`, and nothing is computed for them. It shares the
    encoder's weights, and is frozen where that is. `levels` is 1…5; raises `ValueError` for others.
    """

    def __init__(self, encoder: ResNet18Encoder, levels: int) -> None:
        super().__init__()
        if levels not in range(1, len(STAGES) + 1):
            raise ValueError(f"Expected levels in 1…5, got {levels}: 3 keeps c1, c2 and c3.")
        self.levels, self.frozen = levels, encoder.frozen
        stages = dict(list(STAGES.items())[:levels])
        self.features = create_feature_extractor(encoder.features, stages)
        self.train(encoder.training)

    def forward(self, x: Tensor) -> Pyramid:
        check_image(x)
        empty = [x.new_empty(x.shape[0], c, 0, 0) for c in OUT_CHANNELS[self.levels :]]
        return Pyramid(*self.features(x).values(), *empty)


class Segmenter(nn.Module):
    """An encoder and a decoder, joined: images in, one value per pixel and channel out.

    The decoder is called as `decoder(pyramid)`. If its `forward` has a parameter called `image`
    or `query`, it also gets the normalised images, or the `query` that you pass to `forward`.

    `forward(x, query=None)` takes normalised images `[B, 3, H, W]` and returns
    `[B, out_channels, H, W]`: whatever size the decoder produced is brought to the size of the
    image (bilinear), for any H, W ≥ 32, divisible by 32 or not. It raises `ValueError` where
    decoder and query do not fit together, or the decoder returns something else than maps.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        written = getattr(decoder, "_orig_mod", decoder)  # what torch.compile has wrapped
        parameters = inspect.signature(written.forward).parameters
        self.takes_image = "image" in parameters
        self.takes_query = "query" in parameters

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        name = type(self.decoder).__name__
        if query is None and self.takes_query:
            raise ValueError(f"{name} needs a query: call model(x, query=...).")
        if query is not None and not self.takes_query:
            raise ValueError(f"{name} takes no query: call model(x) without one.")
        extra = {"image": x} if self.takes_image else {}
        if query is not None:
            extra["query"] = query
        return self.decode(self.encoder(x), x.shape[-2:], **extra)

    def decode(self, pyramid: Pyramid, size: Sequence[int], **extra: Tensor) -> Tensor:
        """Return `[B, out_channels, *size]` from maps that were computed before.

        `size` is the image's (H, W); `extra` what the decoder asks for by name (`image`, `query`).
        """
        maps = self.decoder(pyramid, **extra)
        if not isinstance(maps, Tensor) or maps.ndim != 4:
            found = list(maps.shape) if isinstance(maps, Tensor) else f"a {type(maps).__name__}"
            raise ValueError(
                f"The decoder returned {found}; expected maps [B, out_channels, h, w]. "
                "A vector or token bridge cannot fill an image by itself: give it a decoder."
            )
        if tuple(maps.shape[-2:]) == tuple(size):
            return maps
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def check_image(x: Tensor) -> None:
    """Raise a clear error unless `x` is `[B, 3, H, W]`, floating point, H and W at least 32."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"Expected a tensor [B, 3, H, W], got {type(x).__name__}. For an array or a picture "
            "from Pillow: torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"Expected floating point, got {x.dtype}. Pixels stored as 0…255 become 0…1 with "
            "images.float() / 255."
        )
    if x.ndim != 4:
        cure = RANK_CURES.get(x.ndim, "Check the loader.")
        raise ValueError(f"Expected [B, 3, H, W], got {list(x.shape)}. {cure}")
    if x.shape[1] != 3:
        raise ValueError(f"Expected 3 channels, got {list(x.shape)}. {_channel_cure(x)}")
    if min(x.shape[-2:]) < SMALLEST_SIDE:
        factor = -(-SMALLEST_SIDE // max(1, min(x.shape[-2:])))
        raise ValueError(
            f"Expected sides of at least {SMALLEST_SIDE} pixels, got {list(x.shape)}: c5 would "
            "have nothing left to see. Enlarge the images: "
            f"F.interpolate(images, scale_factor={factor})."
        )


def check_pyramid(pyramid: Sequence[Tensor], channels: Sequence[int]) -> None:
    """Raise a clear `ValueError` unless these are maps `[B, C, h, w]` with the given channels.

    All of them must come from one batch: a single image's map would be added to all the others.
    """
    if len(pyramid) != len(channels):
        raise ValueError(
            f"Expected {len(channels)} maps, got {len(pyramid)}. Pass all that the encoder "
            "returned: decoder(encoder(images))."
        )
    for name, map_, count in zip(Pyramid._fields, pyramid, channels, strict=True):
        check_map(name, map_, count)
        if map_.shape[0] != pyramid[0].shape[0]:
            raise ValueError(
                f"Expected maps of one batch, got c1 of {pyramid[0].shape[0]} images and "
                f"{name} of {map_.shape[0]}. Pass what one call of the encoder returned."
            )


def check_map(name: str, map_: Tensor, channels: int) -> None:
    """Raise a clear error unless this is `[B, channels, h, w]`, floating point."""
    if map_.ndim != 4 or map_.shape[1] != channels:
        raise ValueError(
            f"Expected {name} as [B, {channels}, h, w], got {list(map_.shape)}. Build the decoder "
            "for the encoder that feeds it: in_channels=encoder.out_channels."
        )
    if not map_.is_floating_point():
        raise TypeError(
            f"Expected {name} in floating point, got {map_.dtype}. Feature maps are not integers: "
            "pass what the encoder returned."
        )


def _channel_cure(x: Tensor) -> str:
    if x.shape[-1] in (1, 3, 4):
        return "The channels are last; move them: images.permute(0, 3, 1, 2)."
    if x.shape[1] == 1:
        return "Grayscale: repeat the channel, images.expand(-1, 3, -1, -1)."
    if x.shape[1] == 4:
        return "Drop the fourth one (alpha): images[:, :3]."
    return "The encoder was trained on RGB; choose or compute three channels."


def normalize(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation, as the encoder was trained.

    `images` is RGB `[B, 3, H, W]`, floating point, values in 0…1, H and W at least 32; the result
    has the same shape and dtype, values about −2.1…2.7. Raises `TypeError` for anything but a
    floating-point tensor and `ValueError` for a wrong shape or range, with the cure in the message.
    """
    check_image(images)
    if not len(images):
        raise ValueError(
            f"Expected at least one image, got {list(images.shape)}. Check the loader."
        )
    low, high = (float(value) for value in images.aminmax())
    if not (low > -float("inf") and high < float("inf")):
        raise ValueError(
            "The images contain NaN or infinity. Find the image that does: images.isfinite()."
        )
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(
            f"Expected values in 0…1, got {low:.3g}…{high:.3g}. {_range_cure(low, high)}"
        )
    mean, std = (images.new_tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return (images - mean) / std


def _range_cure(low: float, high: float) -> str:
    once = "if the images are normalised already, normalise once."
    if low > -0.5 and high < 1.5:
        return f"If a bicubic resize overshot: images.clamp(0, 1); {once}"
    if low < 0:
        return f"Negative values: {once}"
    return "Pixels in 0…255 become 0…1 with images / 255."


def load_bundled() -> dict[str, Tensor]:
    """Return the bundled checkpoint, a `torchvision.models.resnet18(num_classes=200)` state dict.

    The file's SHA-256 is verified before anything is read from it; values are float32. Raises
    `FileNotFoundError` where the file is missing and `ValueError` where its hash is wrong.
    """
    if not BUNDLED.exists():
        raise FileNotFoundError(f"{BUNDLED} is missing: install the package again.")
    content = BUNDLED.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != BUNDLED_SHA256:
        raise ValueError(
            f"{BUNDLED.name} is damaged: its SHA-256 is {found[:12]}…, expected "
            f"{BUNDLED_SHA256[:12]}…. Install the package again."
        )
    return _float32(load_safetensors(content))


def load_file(path: str | Path) -> dict[str, Tensor]:
    """Return a safetensors file's state dict of torchvision's `resnet18`; values are float32.

    Raises `FileNotFoundError` where there is no such file, and `ValueError` where it is not
    safetensors or belongs to another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} with weights of an encoder.")
    try:
        state = load_safetensors(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is not a safetensors file ({error}). From a .pth file: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)."
        ) from error
    with torch.device("meta"):  # names and shapes only, and no random number is drawn
        network = resnet18(num_classes=len(state.get("fc.bias", "?")))
    expected = {name: t.shape for name, t in network.state_dict().items()}
    found = {name: t.shape for name, t in state.items()}
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"{path.name} is not a state dict of torchvision's resnet18: {len(wrong)} names or "
            f"shapes differ, first {wrong[0]!r}. Save network.state_dict(), classifier included."
        )
    return _float32(state)


def _float32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def load_imagenet() -> dict[str, Tensor]:
    """Return torchvision's `IMAGENET1K_V1` state dict (1000 classes), downloaded and verified once.

    Raises `RuntimeError` where it cannot be had.
    """
    weights = ResNet18_Weights.IMAGENET1K_V1
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (OSError, HTTPException, RuntimeError, EOFError, UnpicklingError) as error:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        damaged = f" Delete {cached}, which may be damaged." if cached.exists() else ""
        raise RuntimeError(
            f"The ImageNet weights could not be loaded from {weights.url} ({error}).{damaged} "
            'Check the connection and try again, or use weights="bundled", which needs no download.'
        ) from error


def _state(weights: str | Path | None) -> dict[str, Tensor]:
    """Return the state dict to load; it is empty for random weights."""
    if weights is None:
        return {}
    if isinstance(weights, Path):
        return load_file(weights)
    bundled = weights == "bundled"
    name = (bundled and os.environ.get("BOOK_WEIGHTS")) or weights
    if name == "bundled":
        return load_bundled()
    if name == "imagenet":
        return load_imagenet()
    if name == "random" and bundled:
        return {}
    raise ValueError(
        f'Unknown weights {name!r}: expected "bundled", "imagenet" or None, or a pathlib.Path '
        "(in the environment variable BOOK_WEIGHTS: bundled, imagenet or random)."
    )
