"""Settings of every test; those of the environment must be made before torch is imported."""

import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Small tensors: on a busy machine spinning threads are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How fast a machine draws examples says nothing of the code, and one tree gives one answer: the
# profile "explore" (`--hypothesis-profile explore`) draws anew in every run.
settings.register_profile("explore", suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("assay", settings.get_profile("explore"), derandomize=True)
settings.load_profile("assay")


@pytest.fixture(autouse=True)
def same_draws():
    """What a test draws without a generator of its own depends on no test before it."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
