"""The noise alone, one thread: the portable stream beside torch.randn, which on a CPU is serial whatever the threads."""

import pytest
import torch

from conftest import DEVICE
from ersde_fast import portable_noise

CONTENDERS = {
    "portable_noise": lambda n: portable_noise((1, n), 1, device=DEVICE),
    "torch.randn": lambda n: torch.randn(1, n, device=DEVICE),
}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("n", [1 << 14, 1 << 20, 1 << 24])
def test_noise(benchmark, n, name):
    benchmark.group = f"noise, {n} float32"
    threads = torch.get_num_threads()

    try:
        torch.set_num_threads(1)
        benchmark.pedantic(lambda: CONTENDERS[name](n), rounds=25, iterations=max(1, (1 << 20) // n), warmup_rounds=3)
    finally:
        torch.set_num_threads(threads)
