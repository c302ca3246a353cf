"""What every test shares."""

from __future__ import annotations

import os

# Before torch loads: idle OpenMP threads must not spin while other processes compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
