"""What every test starts from: the same random state, and how often a property is tried."""

import random
import sys

import numpy as np
import pytest
from hypothesis import settings

# No deadline: a busy machine is no fault.
settings.register_profile("usual", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=2000, deadline=None, derandomize=False)
settings.load_profile("usual")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed what draws, so that no test depends on those that ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # importing it takes seconds, which not every process needs
        sys.modules["torch"].manual_seed(0)
