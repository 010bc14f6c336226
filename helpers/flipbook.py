"""A slider through pictures that works wherever a notebook is read: no kernel, no widget, no host."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from helpers.pictures import INK, PAPER, Picture, as_image, check_alt, encode, picture

COLORS = 64  # per frame: a flipbook carries all its frames, so each must be small
WIDEST = 960  # pixels
INTERVAL = 900  # milliseconds between frames while playing


@dataclass(frozen=True)
class Flipbook:
    """Frames with a slider and a play button, as self-contained HTML. The notebook displays it."""

    frames: tuple[bytes, ...] = field(repr=False)
    labels: tuple[str, ...]
    alt: str
    width: int
    height: int

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        text = f"{self.alt} ({len(self.frames)} frames)"
        return {"text/html": self._repr_html_(), "text/plain": text}

    def _repr_html_(self) -> str:
        images = "".join(
            f'<img class="dark-light" alt="{escape(self.alt)}: {escape(label)}" '
            f'width="{self.width}" height="{self.height}" '
            f'style="display:{"none" if index else "block"};width:100%;height:auto;margin:0;'
            f'border-radius:6px" src="data:image/png;base64,{base64.b64encode(frame).decode()}">'
            for index, (frame, label) in enumerate(zip(self.frames, self.labels, strict=True))
        )
        # Handlers in attributes find their parts from the element itself: nothing has to be set
        # up, so two flipbooks on a page, or one that is shown again, cannot disturb each other.
        return (
            f'<figure class="flipbook" role="group" aria-label="{escape(self.alt)}" '
            f"data-labels=\"{escape('|'.join(self.labels))}\" "
            f'style="max-width:{self.width}px;box-sizing:border-box;margin:0.5rem 0;padding:0;'
            f'background:{PAPER};color:{INK};border-radius:6px;font-family:sans-serif;'
            f'line-height:1.4">{images}'
            '<div style="display:flex;flex-wrap:wrap;align-items:center;gap:0.4rem 0.8rem;'
            'padding:0.5rem 0.9rem 0.7rem">'
            f'<button type="button" aria-label="Play" onclick="{escape(_PLAY)}" '
            f'style="flex:none;width:2.4rem;height:2.4rem;padding:0;border:1.5px solid {INK};'
            f'border-radius:50%;background:transparent;color:{INK};font-size:0.9rem;'
            'line-height:1;cursor:pointer">&#9654;&#xFE0E;</button>'
            f'<input type="range" min="0" max="{len(self.frames) - 1}" step="1" value="0" '
            f'aria-label="{escape(self.alt)}" aria-valuetext="{escape(self.labels[0])}" '
            f'oninput="{escape(_SHOW)}" onpointerdown="{escape(_STOP)}" '
            f'onkeydown="{escape(_STOP)}" '
            f'style="flex:1 1 8rem;min-width:6rem;margin:0;height:2rem;accent-color:{ACCENT}">'
            '<output style="flex:1 1 9rem;font-size:0.95rem;font-weight:600;'
            f'color:{INK}">{escape(self.labels[0])}</output>'
            "</div></figure>"
        )


ACCENT = "#b8432c"

_SHOW = """
const book = this.closest('figure'), label = book.dataset.labels.split('|')[this.value];
book.querySelectorAll('img').forEach((image, i) => {
  image.style.display = i == this.value ? 'block' : 'none';
});
book.querySelector('output').textContent = label;
this.setAttribute('aria-valuetext', label);
"""

_STOP = """
const button = this.closest('figure').querySelector('button');
if (button.timer) button.click();
"""

_PLAY = f"""
const slider = this.closest('figure').querySelector('input');
if (this.timer) {{
  clearInterval(this.timer);
  this.timer = null;
}} else {{
  this.timer = setInterval(() => {{
    if (!this.isConnected) return clearInterval(this.timer);
    slider.value = (Number(slider.value) + 1) % (Number(slider.max) + 1);
    slider.dispatchEvent(new Event('input'));
  }}, {INTERVAL});
}}
this.textContent = this.timer ? '\\u23F8\\uFE0E' : '\\u25B6\\uFE0E';
this.setAttribute('aria-label', this.timer ? 'Pause' : 'Play');
"""


def flipbook(frames: Sequence[Picture | Figure | Any], labels: Sequence[str], alt: str) -> Flipbook:
    """Join pictures of one size into a `Flipbook`: one slider position a frame, its label beside it.

    A frame is a `Picture`, a matplotlib figure or an image as in `show_images`. Each frame's
    alternative text is `alt`, a colon and its label. Raises `ValueError` for fewer than two
    frames, frames of different sizes, another number of labels, or an empty label or `alt`.
    """
    check_alt(alt)
    if len(frames) < 2:
        raise ValueError(f"A flipbook needs at least two frames, got {len(frames)}.")
    if len(labels) != len(frames):
        raise ValueError(f"Expected one label a frame, {len(frames)}, got {len(labels)}.")
    if not all(label.strip() and "|" not in label for label in labels):
        raise ValueError("Every label needs text, without the character |.")
    pictures = [_pixels(frame, alt) for frame in frames]
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(
            f"The frames differ in size ({', '.join(f'{w} × {h}' for w, h in sorted(sizes))} pixels): "
            "the page would jump. Draw every frame with the same figure size."
        )
    width, height = sizes.pop()
    scale = 640 / width
    small = [_shrink(image) for image in pictures]
    return Flipbook(
        tuple(encode(np.asarray(image), COLORS) for image in small),
        tuple(labels),
        alt,
        640,
        round(height * scale),
    )


def _pixels(frame: Any, alt: str) -> Image.Image:
    if isinstance(frame, Figure):
        frame = picture(frame, alt)
    if isinstance(frame, Picture):
        return Image.open(io.BytesIO(frame.png)).convert("RGB")
    return Image.fromarray((as_image(frame) * 255).round().astype(np.uint8))


def _shrink(image: Image.Image) -> Image.Image:
    if image.width <= WIDEST:
        return image
    size = (WIDEST, round(image.height * WIDEST / image.width))
    return image.resize(size, Image.Resampling.LANCZOS)
