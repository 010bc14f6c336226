"""A slider through pictures, wherever a notebook is read: no kernel, no widget, no host."""

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

from helpers.plotting.pictures import INK, PAPER, Picture, as_image, check_alt, picture

WIDTH = 640  # CSS pixels
STORED = 960  # pixels: a flipbook carries all its frames, so each must be small
QUALITY = 80
ACCENT = "#b8432c"
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
        alt, first = escape(self.alt), escape(self.labels[0])
        labels = escape("|".join(self.labels))
        frames = zip(self.frames, self.labels, strict=True)
        images = "".join(
            f'<img class="dark-light" width="{self.width}" height="{self.height}" '
            f'style="display:{"none" if index else "block"}" alt="{alt}: {escape(label)}" '
            f'src="data:image/webp;base64,{base64.b64encode(frame).decode()}">\n'
            for index, (frame, label) in enumerate(frames)
        )
        # Handlers in attributes find their parts from the element itself: nothing has to be set
        # up, so two flipbooks on a page, or one that is shown again, cannot disturb each other.
        return f"""<style>{_STYLE}</style>
<figure class="flipbook" role="group" aria-label="{alt}" data-labels="{labels}">
{images}<div>
<button type="button" aria-label="Play" onclick="{escape(_PLAY)}">{_PLAY_SIGN}</button>
<input type="range" min="0" max="{len(self.frames) - 1}" step="1" value="0" aria-label="{alt}"
 aria-valuetext="{first}" oninput="{escape(_SHOW)}" onpointerdown="{escape(_STOP)}"
 onkeydown="{escape(_STOP)}">
<output>{first}</output>
</div>
</figure>"""


_PLAY_SIGN, _PAUSE_SIGN = "\u25b6\ufe0e", "\u23f8\ufe0e"

_STYLE = f"""
figure.flipbook {{ max-width: {WIDTH}px; margin: 0.5rem 0; padding: 0; border-radius: 6px;
  background: {PAPER}; color: {INK}; font-family: sans-serif; line-height: 1.4; }}
figure.flipbook img {{ width: 100%; height: auto; margin: 0; border-radius: 6px; }}
figure.flipbook div {{ display: flex; flex-wrap: wrap; align-items: center; gap: 0.3rem 0.8rem;
  padding: 0.4rem 0.9rem 0.7rem; }}
figure.flipbook button {{ flex: none; width: 2.4rem; height: 2.4rem; padding: 0;
  border: 1.5px solid {INK}; border-radius: 50%; background: none; color: {INK};
  font-size: 0.9rem; line-height: 1; cursor: pointer; }}
figure.flipbook button:hover {{ background: {INK}; color: {PAPER}; }}
figure.flipbook input {{ flex: 1 1 10rem; min-width: 6rem; height: 2rem; margin: 0;
  accent-color: {ACCENT}; color-scheme: light; cursor: pointer; }}
figure.flipbook output {{ flex: 1 1 11rem; font-size: 0.95rem; font-weight: 600; color: {INK}; }}
figure.flipbook :focus-visible {{ outline: 3px solid {ACCENT}; outline-offset: 2px; }}
"""

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
this.textContent = this.timer ? '{_PAUSE_SIGN}' : '{_PLAY_SIGN}';
this.setAttribute('aria-label', this.timer ? 'Pause' : 'Play');
"""


def flipbook(frames: Sequence[Picture | Figure | Any], labels: Sequence[str], alt: str) -> Flipbook:
    """Join pictures of one size into a `Flipbook`: one slider position a frame, with its label.

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
    images = [_pixels(frame, alt) for frame in frames]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"The frames differ in size ({', '.join(f'{w} × {h}' for w, h in sorted(sizes))} "
            "pixels): the page would jump. Draw every frame with the same figure size."
        )
    width, height = sizes.pop()
    encoded = tuple(_encode(image) for image in images)
    return Flipbook(encoded, tuple(labels), alt, WIDTH, round(height * WIDTH / width))


def _pixels(frame: Any, alt: str) -> Image.Image:
    if isinstance(frame, Figure):
        frame = picture(frame, alt)
    if isinstance(frame, Picture):
        return Image.open(io.BytesIO(frame.png)).convert("RGB")
    image = Image.fromarray((as_image(frame) * 255).round().astype(np.uint8))
    enlarged = max(1, STORED // image.width)
    return image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.NEAREST)


def _encode(image: Image.Image) -> bytes:
    if image.width > STORED:
        size = (STORED, round(image.height * STORED / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()
