"""Settings shared by all tests: one thread (the machine may be shared; sums come out in one order)."""

import torch

torch.set_num_threads(1)
