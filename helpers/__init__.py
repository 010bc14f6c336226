"""What the chapters of the book import: the encoder, data, pictures, measurements, errors."""

__version__ = "0.1.0"
