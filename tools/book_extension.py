"""A small Sphinx extension: what this book needs and Jupyter Book does not do."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from myst_nb.core.render import MimeData, NbElementRenderer
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    NbElementRenderer.render_image = render_image
    app.connect("html-page-context", drop_thebe, priority=900)
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


def drop_thebe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Drop the scripts of Thebe, which the book does not use and which name another host."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body')}".lower()
    ]
