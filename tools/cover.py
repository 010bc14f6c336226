"""Draw the cover, `book/_assets/cover.png`: scenes, each turning into its mask (by hand)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from helpers import scenes
from helpers.plotting import colorize
from tools.project import ROOT

CHOSEN = (56, 161, 42, 126, 272, 64, 97, 290)
COLUMNS, SCALE, GAP = 4, 2, 8


def main() -> None:
    tiles = [tile(scenes.scene(index)) for index in CHOSEN]
    side = tiles[0].width
    rows = len(tiles) // COLUMNS
    size = [n * side + (n - 1) * GAP for n in (COLUMNS, rows)]
    cover = Image.new("RGBA", tuple(size))
    for number, picture in enumerate(tiles):
        row, column = divmod(number, COLUMNS)
        cover.paste(picture, (column * (side + GAP), row * (side + GAP)))
    cover.save(ROOT / "book" / "_assets" / "cover.png", optimize=True)


def tile(scene: scenes.Scene) -> Image.Image:
    """Return the scene; below the rising diagonal it is dimmed and its objects wear their class."""
    side = scenes.SIZE * SCALE
    image = scene.image.transpose(1, 2, 0)
    night = 0.25 * image + 0.75 * np.array([0.12, 0.16, 0.26])
    classes = np.where(scene.mask[..., None] > 0, colorize(scene.mask), night)
    y, x = np.indices((side, side))
    below = Image.fromarray(((x + y > side) * 255).astype(np.uint8))
    return Image.composite(enlarged(classes), enlarged(image), below)


def enlarged(pixels: np.ndarray) -> Image.Image:
    """Return the picture of values in 0…1 at the size of a tile."""
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
