"""tqdm's bar, without its complaint about missing widgets: then it is text, and that will do."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
