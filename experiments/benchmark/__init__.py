"""The book's decoders and those of segmentation-models-pytorch, trained and scored alike."""
