"""What every test, and every process that a test starts, computes with."""

from __future__ import annotations

import os

# Before anything imports NumPy or torch. Tests run in several processes that start further ones:
# more threads than cores wait for each other, and those of OpenMP compute while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
