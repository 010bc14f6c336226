"""One module per technique, generated from the chapter that explains it (`make sync`)."""
