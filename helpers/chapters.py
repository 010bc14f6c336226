"""The chapters that explanations and suggestions send readers to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chapter:
    """One chapter of the book: its number and slug, and the question that it answers, in short."""

    number: str
    slug: str
    question: str

    @property
    def name(self) -> str:
        """The file name of its notebook and of its page, without a suffix."""
        return f"{self.number}_{self.slug}"

    def __str__(self) -> str:
        return f"chapter {self.number} “{self.question}”"


# A test compares them with chapters.toml, which an installed package does not have.
CHAPTERS = {
    slug: Chapter(number, slug, question)
    for number, slug, question in (
        ("02", "pooling_linear", "my decoder wants a vector"),
        ("03", "conv_projection", "my decoder wants other channels"),
        ("04", "attention", "which positions matter?"),
        ("05", "unet", "my masks are blobs"),
        ("06", "multi_path", "use every stage at once"),
        ("07", "spatial_pyramid", "any input size, and more context?"),
        ("08", "upsampling", "back to the image's size, beside the image"),
        ("09", "conditional_concat", "can the features decide what enters?"),
        ("10", "input_mapping", "my decoder brings an input of its own"),
        ("11", "sequences", "my decoder writes words"),
        ("12", "putting_together", "so which decoder should I use?"),
    )
}
