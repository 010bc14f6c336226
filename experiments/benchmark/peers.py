"""The decoders of segmentation-models-pytorch (smp) as decoders of this book, on its encoder.

Only the benchmark needs smp: `pip install .[bench]`. What a model of smp does by default, its
dropout and its ways of enlarging maps too, stays as it is; its ResNet-18 gets the bundled weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor, nn

from helpers.encoder import OUT_CHANNELS, STRIDES, Pyramid, ResNet18Encoder, Segmenter, load_bundled

PACKAGE = "segmentation-models-pytorch"


@dataclass(frozen=True)
class Peer:
    """A model of smp: the name of its class, and the settings that are not smp's own."""

    kind: str
    settings: tuple[tuple[str, int], ...] = ()

    @property
    def libraries(self) -> dict[str, str]:
        return {"smp": version(PACKAGE)}

    def network(self, classes: int) -> nn.Module:
        """Return smp's own model; raises `RuntimeError` where smp is not installed."""
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise RuntimeError(f"{PACKAGE} is missing: pip install .[bench]") from error
        build = getattr(smp, self.kind)
        network = build("resnet18", encoder_weights=None, classes=classes, **dict(self.settings))
        network.encoder.load_state_dict(load_bundled())
        return network

    def model(self, seed: int, classes: int, frozen: bool = True) -> Segmenter:
        """Return smp's decoder on the book's encoder, or on smp's own where that is dilated."""
        torch.manual_seed(seed)
        network = self.network(classes)
        dilated = any(part.dilation != (1, 1) for part in _convolutions(network.encoder))
        encoder = (
            DilatedEncoder(network.encoder, frozen)
            if dilated
            else ResNet18Encoder("bundled", frozen)
        )
        return Segmenter(encoder, PeerDecoder(network))


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


class PeerDecoder(nn.Module):
    """The decoder and the head of a model of smp.

    `forward(pyramid)` takes maps of images whose sides 32 divides and returns
    `[B, classes, H, W]`, the logits that the model itself would return. Raises `ValueError` for
    maps of other images: smp asks for images that are padded.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.levels = len(network.encoder.out_channels) - 1  # the first is the image
        self.decoder, self.head = network.decoder, network.segmentation_head

    def forward(self, pyramid: Pyramid) -> Tensor:
        c1 = pyramid.c1
        if any(side % 16 for side in c1.shape[-2:]):
            raise ValueError(f"Expected images padded to multiples of 32, got c1 {[*c1.shape]}.")
        height, width = (2 * side for side in c1.shape[-2:])
        image = c1.new_zeros(()).expand(len(c1), 3, height, width)  # smp reads its size only
        return self.head(self.decoder([image, *pyramid[: self.levels]]))


class DilatedEncoder(nn.Module):
    """smp's ResNet-18 whose last stages are dilated in place of strided.

    `forward` takes what `ResNet18Encoder` takes and returns a `Pyramid` whose coarsest maps are
    finer than there. `frozen` means what it means there.
    """

    out_channels = OUT_CHANNELS

    def __init__(self, layers: nn.Module, frozen: bool) -> None:
        super().__init__()
        self.layers, self.frozen = layers, frozen
        self.strides = tuple(min(stride, layers._output_stride) for stride in STRIDES)
        self.requires_grad_(not frozen)
        self.train(not frozen)

    def forward(self, x: Tensor) -> Pyramid:
        return Pyramid(*self.layers(x)[1:])

    def train(self, mode: bool = True) -> DilatedEncoder:
        return super().train(mode and not self.frozen)


PEERS = {
    "smp Unet": Peer("Unet"),
    "smp Linknet": Peer("Linknet"),
    "smp FPN": Peer("FPN"),
    "smp MAnet": Peer("MAnet"),
    "smp PSPNet, depth 3": Peer("PSPNet"),
    "smp PSPNet, depth 5": Peer("PSPNet", (("encoder_depth", 5), ("upsampling", 32))),
    "smp Segformer": Peer("Segformer"),
    "smp UPerNet": Peer("UPerNet"),
    "smp UnetPlusPlus": Peer("UnetPlusPlus"),
    "smp PAN": Peer("PAN"),
    "smp DeepLabV3Plus": Peer("DeepLabV3Plus"),
    "smp DeepLabV3": Peer("DeepLabV3"),
}
