"""ER-SDE as one of k-diffusion's samplers, with its schedule and its Brownian tree."""

import k_diffusion as K
import torch

from ersde_fast import sample_er_sde


def model(x, sigma):
    """Instead of a k-diffusion denoiser: the exact one of data with mean 0.3 and standard deviation 0.5."""
    variance = K.utils.append_dims(sigma, x.ndim) ** 2
    return (0.3 * variance + 0.25 * x) / (variance + 0.25)


sigmas = K.sampling.get_sigmas_karras(20, 0.02, 80.0)
x = sigmas[0] * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
noise_sampler = K.sampling.BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0], seed=list(range(8)))
x = sample_er_sde(model, x, sigmas, noise_sampler=noise_sampler)
print(f"mean {x.mean():.3f}, standard deviation {x.std():.3f}")
