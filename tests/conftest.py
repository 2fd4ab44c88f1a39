"""Settings that must be made before torch is imported."""

import os

# Small tensors: on a busy machine spinning threads are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
