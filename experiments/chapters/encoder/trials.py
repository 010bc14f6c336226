"""What pretraining is worth: one light decoder on a random, the first and the bundled encoder."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core.provenance import ROOT
from experiments.core.trials import Trial
from helpers.encoder import Pyramid, check_pyramid

# The weights that the book had first, in this repository's history.
FIRST_BLOB = "36f52aa0cf37de90276e2b8ad4b4298c175d9608"
FIRST_SHA256 = "bdcf01b2d2a6a3ff542d0c96cb1599ea479404a04468cfba44207dd510c9574d"
WIDTH = 64


class LightDecoder(nn.Module):
    """Each of c2…c5 through a 1×1 convolution, enlarged to c2's grid, summed; one more 1×1.

    Without a look at neighbours, what it segments was in the maps before. `forward(pyramid)`
    returns `[B, out_channels, ⌈H/4⌉, ⌈W/4⌉]`; raises `ValueError` for maps of other channels.

    Source: the head of Xie et al., SegFormer, NeurIPS 2021.
    """

    def __init__(self, in_channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.project = nn.ModuleList(nn.Conv2d(c, WIDTH, 1, bias=False) for c in in_channels[1:])
        self.norm = nn.BatchNorm2d(WIDTH)
        self.head = nn.Conv2d(WIDTH, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        check_pyramid(pyramid, self.in_channels)
        size = pyramid.c2.shape[-2:]
        maps = [project(map_) for project, map_ in zip(self.project, pyramid[1:], strict=True)]
        x = sum(F.interpolate(map_, size=size, mode="bilinear") for map_ in maps)
        return self.head(torch.relu(self.norm(x)))


def first() -> Path:
    """Return the file of the first weights, taken out of this repository's history.

    Raises `RuntimeError` where the history is not there.
    """
    path = ROOT / ".cache" / "encoders" / "first.safetensors"
    if path.exists() and _digest(path.read_bytes()) == FIRST_SHA256:
        return path
    command = ["git", "cat-file", "blob", FIRST_BLOB]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        content, said = done.stdout, done.stderr.decode().strip()
    except OSError as error:
        content, said = b"", str(error)
    if _digest(content) != FIRST_SHA256:
        raise RuntimeError(
            f"The first weights cannot be read from git ({said}). "
            "They are in the whole history: git fetch --unshallow."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


TRIALS = {
    "random, frozen": Trial(LightDecoder, weights=None),
    "first, frozen": Trial(LightDecoder, weights=first),
    "bundled, frozen": Trial(LightDecoder),
    "random, fine-tuned": Trial(LightDecoder, weights=None, frozen=False),
    "first, fine-tuned": Trial(LightDecoder, weights=first, frozen=False),
    "bundled, fine-tuned": Trial(LightDecoder, frozen=False),
}
