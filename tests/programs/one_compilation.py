"""A first RNN; prints how many compilations it took that the cache did not have."""

import torch

from peft_read.recurrence import RNN
from peft_read.recurrence.numba_kernels import launch

RNN(4)(torch.zeros(1, 2, 4))
print(sum(launch._loops("scan").scan_forward.stats.cache_misses.values()))
