"""`sample_er_sde` as one of k-diffusion's samplers: its models, schedules, noise samplers and callbacks, with its own package."""

from itertools import pairwise

import pytest
import torch

from ersde_fast import sample_er_sde
from samplers import k_diffusion

MEAN, STD = 0.3, 0.5


K = k_diffusion().sampling


def gaussian(x, sigma, **kwargs):
    variance = sigma.view(-1, 1, 1, 1) ** 2
    return (variance * MEAN + STD**2 * x) / (variance + STD**2)


def start(sigmas, batch=8):
    return sigmas[0] * torch.randn(batch, 8, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("noise", ["default", "brownian tree", "brownian trees"])
def test_samples_the_data(noise):
    """Its schedule and its Brownian tree, one or one for each sample: the moments of the data, within five standard errors and what
    20 steps leave; and the same sample again for the same seeds."""

    def run():
        sigmas = K.get_sigmas_karras(20, 0.02, 80.0)
        x = start(sigmas)
        torch.manual_seed(1)
        seeds = list(range(len(x))) if noise.endswith("s") else 3
        tree = None if noise == "default" else K.BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed=seeds)
        return sample_er_sde(gaussian, x, sigmas, noise_sampler=tree, disable=True)

    x = run()
    assert torch.equal(x, run())
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * STD / x.numel() ** 0.5 + 5e-3)
    assert x.std().item() == pytest.approx(STD, abs=5 * STD / (2 * x.numel()) ** 0.5 + 2e-2)


def test_the_tree_ties_step_counts_together():
    """One Brownian path: runs of more steps come nearer to each other, which fresh noise at every step does not do."""

    def run(n, noise_sampler):
        sigmas = K.get_sigmas_karras(n, 0.02, 80.0)
        return sample_er_sde(gaussian, start(sigmas, 1), sigmas, noise_sampler=noise_sampler, disable=True)

    tree = K.BrownianTreeNoiseSampler(start(torch.tensor([80.0]), 1), 0.02, 80.0, seed=7)
    runs = [run(n, tree) for n in (20, 40, 80)]
    differences = [(a - b).std().item() for a, b in pairwise(runs)]
    assert differences[1] < differences[0] < 0.5 * (run(20, None) - run(40, None)).std().item()


def test_takes_what_its_samplers_take():
    """Its wrapper of an epsilon network, its schedule, positional arguments, and a callback with the keys that its samplers give."""

    class Network(torch.nn.Module):
        def forward(self, x, t, scale):
            return scale * x

    cumulated = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    model = k_diffusion().external.DiscreteEpsDDPMDenoiser(Network(), cumulated, quantize=False)
    model.get_eps = lambda *args, **kwargs: model.inner_model(*args, **kwargs)
    sigmas = model.get_sigmas(10)
    seen = {}
    for sampler in (K.sample_euler, sample_er_sde):
        calls = []
        result = sampler(model, start(sigmas, 2), sigmas, {"scale": 0.2}, calls.append, True)
        assert result.isfinite().all()
        seen[sampler] = [(set(call), call["i"], float(call["sigma"])) for call in calls]
    assert seen[sample_er_sde] == seen[K.sample_euler]
