"""What the chapters of the book import: the encoder, data, pictures, measurements, errors."""

from helpers.choosing import suggest

__all__ = ["suggest"]
__version__ = "0.1.0"
