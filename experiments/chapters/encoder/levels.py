"""Asks each level of the encoder three questions: `python -m experiments.chapters.encoder.levels`.

At single pixels of unseen scenes, a linear readout of each level is asked which colour is there,
whether an edge is near, and which shape the pixel belongs to. The bundled weights beside random
ones and those that the book had first; 3 seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_dilation
from skimage.segmentation import find_boundaries
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from experiments.chapters.encoder.trials import first
from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from helpers import scenes
from helpers.encoder import ResNet18Encoder, normalize

ENCODERS = {"bundled": lambda: "bundled", "first": first, "random": lambda: None}
STRENGTHS = np.logspace(0, 5, 11)
TRAIN, TEST, PIXELS = 300, 100, 60


class Pixels:
    """Pixels of some scenes: from anywhere, from objects, from near edges and away from them."""

    def __init__(self, indices: range, rng: np.random.Generator) -> None:
        self.images, masks = scenes.batch(indices)
        self.masks = masks.numpy()
        near = [binary_dilation(find_boundaries(m), iterations=1) for m in self.masks]
        self.edges = np.stack(near)
        everywhere = np.ones_like(self.edges)
        self.positions = {
            "colour": self._choose(everywhere, rng),
            "edge": self._choose(self.edges, rng) + self._choose(~self.edges, rng),
            "shape": self._choose(self.masks > 0, rng),
        }

    def _choose(self, allowed: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        chosen = []
        for index, where in enumerate(allowed):
            y, x = np.nonzero(where)
            pick = rng.integers(len(y), size=PIXELS)
            chosen.append(np.stack([np.full(PIXELS, index), y[pick], x[pick]], axis=1))
        return chosen

    def answers(self, question: str) -> np.ndarray:
        n, y, x = np.concatenate(self.positions[question]).T
        match question:
            case "colour":
                return self.images.numpy()[n, :, y, x]
            case "edge":
                return self.edges[n, y, x]
            case _:
                return self.masks[n, y, x]

    def features(self, question: str, maps: Tensor) -> np.ndarray:
        """Return the map's values at the pixels, interpolated bilinearly, [pixels, C]."""
        side = self.masks.shape[-1]
        found = []
        for chosen in self.positions[question]:
            yx = torch.from_numpy(chosen[:, [2, 1]]).float()
            grid = ((2 * yx + 1) / side - 1).view(1, 1, -1, 2)
            map_ = maps[int(chosen[0, 0])][None]
            value = F.grid_sample(map_, grid, padding_mode="border", align_corners=False)
            found.append(value[0, :, 0].T)
        return torch.cat(found).numpy()


def score(question: str, train: tuple[np.ndarray, ...], test: tuple[np.ndarray, ...]) -> float:
    """Fit a linear readout; return R² (colour), area under the curve (edge), accuracy (shape)."""
    if question == "colour":
        model = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS)).fit(*train)
        return float(r2_score(test[1], model.predict(test[0])))
    balance = "balanced" if question == "shape" else None
    readout = RidgeClassifierCV(STRENGTHS, class_weight=balance)
    model = make_pipeline(StandardScaler(), readout).fit(*train)
    if question == "edge":
        return float(roc_auc_score(test[1], model.decision_function(test[0])))
    return float(balanced_accuracy_score(test[1], model.predict(test[0])))


@torch.no_grad()
def measure(weights: str, seed: int) -> Record:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    encoder = ResNet18Encoder(ENCODERS[weights]())
    train = Pixels(range(1000 * seed, 1000 * seed + TRAIN), rng)
    test = Pixels(range(10_000 + 1000 * seed, 10_000 + 1000 * seed + TEST), rng)
    maps = [encoder(normalize(pixels.images)) for pixels in (train, test)]
    scores = {
        question: [
            score(
                question,
                (train.features(question, seen), train.answers(question)),
                (test.features(question, unseen), test.answers(question)),
            )
            for seen, unseen in zip(*maps, strict=True)
        ]
        for question in ("colour", "edge", "shape")
    }
    return {"scores_c1_to_c5": scores}


def versions(weights: str, seed: int) -> list[str]:
    return ["scenes", *(["weights"] if weights == "bundled" else [])]


SWEEPS = {"levels": Sweep("levels", measure, key=("weights", "seed"), versions=versions)}


def main(given: Sequence[str] | None = None) -> None:
    said = arguments(__doc__, ENCODERS, given=given)
    tasks = [{"weights": w, "seed": seed} for seed in range(said.seeds) for w in said.only]
    SWEEPS["levels"].run(tasks, plan=said.plan, again=said.again)


if __name__ == "__main__":
    main()
