"""Settings of every test; those of the environment must be made before torch is imported."""

import os

from hypothesis import HealthCheck, settings

# Small tensors: on a busy machine spinning threads are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How fast a machine draws examples says nothing of the code.
settings.register_profile("assay", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("assay")
