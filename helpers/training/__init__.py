"""Train a Segmenter (`fit`) and score it (`evaluate`); `minimise` trains anything else.

Each module reads only from those before it: checkpoints and feeding, scoring, loop.
"""

from helpers.training.feeding import Features, Pairs, Precision, cache_features
from helpers.training.loop import VERSION, History, budget, fit, minimise, one_cycle
from helpers.training.scoring import evaluate, predict

__all__ = [
    "VERSION",
    "Features",
    "History",
    "Pairs",
    "Precision",
    "budget",
    "cache_features",
    "evaluate",
    "fit",
    "minimise",
    "one_cycle",
    "predict",
]
