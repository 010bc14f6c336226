"""What the chapters of the book import: the encoder, data, pictures, measurements, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.advice import suggest

__all__ = ["suggest"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Only who asks for advice waits for its data to be read.
    if name == "suggest":
        from helpers.advice import suggest

        return suggest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
