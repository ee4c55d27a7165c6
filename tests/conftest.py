"""Set-up of all tests: one thread, and worker processes that start with the large packages already imported."""

import multiprocessing
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
multiprocessing.set_forkserver_preload(["torch.utils.tensorboard", "gymnasium", "tyro"])
