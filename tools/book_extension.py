"""A small Sphinx extension: what this book needs and Jupyter Book does not do."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from myst_nb.core.render import MimeData, NbElementRenderer
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    NbElementRenderer.render_image = render_image  # type: ignore[method-assign]
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


_render_image = NbElementRenderer.render_image


def render_image(renderer: NbElementRenderer, data: MimeData) -> list[nodes.Element]:
    """Give a picture from a notebook the alternative text of its output, not only of its cell."""
    images = _render_image(renderer, data)
    alt = data.output_metadata.get(data.mime_type, {}).get("alt")
    if alt:
        for image in images:
            image["alt"] = alt
    return images
