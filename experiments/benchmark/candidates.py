"""The decoders that the benchmark compares: the book's own and their peers."""

from __future__ import annotations

from experiments.benchmark.peers import PEERS, Peer
from experiments.chapters.attention import trials as attention
from experiments.chapters.conditional_concat import trials as conditional_concat
from experiments.chapters.conv_projection import trials as conv_projection
from experiments.chapters.multi_path import trials as multi_path
from experiments.chapters.pooling_linear import trials as pooling_linear
from experiments.chapters.putting_together import trials as putting_together
from experiments.chapters.spatial_pyramid import trials as spatial_pyramid
from experiments.chapters.unet import trials as unet
from experiments.chapters.upsampling import trials as upsampling
from experiments.core.trials import Trial

FINALISTS = {  # of each chapter the best one and, where it differs, the best cheap one
    "c5 alone": pooling_linear.TRIALS["map"],
    "1×1, summed": conv_projection.TRIALS["sum"],
    "1×1, concatenated, 3×3": conv_projection.TRIALS["concatenate, 3×3"],
    "queries": attention.TRIALS["attending queries"],
    "U-Net": unet.TRIALS["U-Net"],
    "U-Net, adding": unet.TRIALS["adding"],
    "many paths": multi_path.TRIALS["many paths"],
    "c3, ASPP": spatial_pyramid.TRIALS["c3, ASPP"],
    "c3, PPM": spatial_pyramid.TRIALS["c3, PPM"],
    "image beside c4": upsampling.TRIALS["image, two layers"],
    "image beside c3…c5": conditional_concat.TRIALS["soft mask"],
}
RECOMMENDED = putting_together.TRIALS  # the default, then with less or more of each of its parts
CANDIDATES: dict[str, Trial | Peer] = {**FINALISTS, **putting_together.TRIALS, **PEERS}

VARIANTS = tuple(RECOMMENDED)[1:]  # what a part is worth: on scenes only
SLOW = ("smp UnetPlusPlus", "smp DeepLabV3", "smp UPerNet")  # on streets, a single seed
TUNED = ("book decoder", "smp Unet", "smp FPN", "smp Linknet")  # trained with the encoder, too
