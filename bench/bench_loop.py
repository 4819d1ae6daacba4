"""The whole sampling loop with a model that costs nothing: what the sampler adds to each step."""

import pytest
import torch

from conftest import DEVICE
from ersde_fast import er_sde_plan, fast_step, sample_er_sde

STEPS = 50
SIGMAS = torch.linspace(10, 0.1, STEPS + 1)


def loop(x, denoised):
    return sample_er_sde(lambda x, sigma: denoised, x, SIGMAS, disable=True, max_stage=3, seed=0)


def bare_steps(x, denoised, plan=er_sde_plan(SIGMAS, order=3)):  # noqa: B008
    history = [denoised] * 3
    for i in range(STEPS):
        x = fast_step(plan, i, x, history, seed=0)
    return x


@pytest.mark.parametrize("contender", [loop, bare_steps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 16, 128, 128)], ids=lambda s: "x".join(map(str, s)))
def test_loop(benchmark, shape, contender):
    torch.manual_seed(0)
    x, denoised = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    benchmark.group = f"loop of {STEPS} steps, {'x'.join(map(str, shape))}"

    benchmark.pedantic(contender, (x, denoised), rounds=30, warmup_rounds=3)
