"""The decoders that the benchmark compares: the book's own and their peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from experiments import (
    attention,
    conditional_concat,
    conv_projection,
    multi_path,
    pooling_linear,
    putting_together,
    spatial_pyramid,
    unet,
    upsampling,
)
from experiments.peers import PEERS, Peer
from experiments.trials import Trial
from helpers.encoder import ResNet18Encoder, Segmenter


@dataclass(frozen=True)
class Ours:
    """A decoder of the book: its builder, as in a `Trial`."""

    decoder: Callable[[ResNet18Encoder, int], nn.Module]

    @property
    def of(self) -> str:
        return f"{self.decoder.__module__}.{self.decoder.__name__}"

    @property
    def versions(self) -> dict[str, str]:
        return {}

    def model(self, seed: int, classes: int, frozen: bool = True) -> Segmenter:
        return Trial(self.decoder, frozen=frozen).model(seed, classes)

    def sources(self, model: Segmenter) -> list[str]:
        return Trial(self.decoder).sources(model)


FINALISTS = {  # of each chapter the best one and, where it differs, the best cheap one
    "c5 alone": Ours(pooling_linear.map_),
    "1×1, summed": Ours(conv_projection.summed),
    "1×1, concatenated, 3×3": Ours(conv_projection.concatenated_conv),
    "queries": Ours(attention.attending),
    "U-Net": Ours(unet.unet),
    "U-Net, adding": Ours(unet.adding),
    "many paths": Ours(multi_path.many_paths),
    "c3, ASPP": Ours(spatial_pyramid.c3_dilated),
    "c3, PPM": Ours(spatial_pyramid.c3_pyramid),
    "image beside c4": Ours(upsampling.image_two_layers),
    "image beside c3…c5": Ours(conditional_concat.soft),
}
RECOMMENDED = {  # the book's default, then what it is with less or more of each of its parts
    what: Ours(trial.decoder) for what, trial in putting_together.TRIALS.items()
}
CANDIDATES: dict[str, Ours | Peer] = {**FINALISTS, **RECOMMENDED, **PEERS}

VARIANTS = tuple(RECOMMENDED)[1:]  # what a part is worth: on scenes only
SLOW = ("smp UnetPlusPlus", "smp DeepLabV3", "smp UPerNet")  # on streets, a single seed
TUNED = ("book decoder", "smp Unet", "smp FPN", "smp Linknet")  # trained with the encoder, too
