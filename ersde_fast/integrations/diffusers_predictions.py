"""Predictions of ERSDEScheduler that `fast_step` does not make or take as they are: clipped, of tokens, for a repeated batch."""

import torch
from torch import Tensor

from .diffusers_levels import FlowLevels


def for_batch(denoised: Tensor, sample: Tensor) -> Tensor:
    """A prediction for a sample that stands in the batch several times, as guidance has it."""
    return torch.cat([denoised] * max(len(sample) // len(denoised), 1))


def clipped(denoised: Tensor, config) -> Tensor:
    """A prediction within what the config allows: thresholded by its own largest numbers (arXiv 2205.11487), clipped, or as it is."""
    if config.thresholding:
        size = quantile(denoised.flatten(1).abs(), config.dynamic_thresholding_ratio)
        size = size.clamp(1, config.sample_max_value).view(-1, *[1] * (denoised.dim() - 1))
        return denoised.clamp(-size, size) / size
    return denoised.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else denoised


def quantile(values: Tensor, q: float) -> Tensor:
    """Of each row, between neighbours in a line, as torch.quantile, which takes at most 2^24 numbers."""
    position = q * (values.shape[1] - 1)
    low = int(position)
    below = values.kthvalue(low + 1, dim=1).values
    above = values.kthvalue(min(low + 2, values.shape[1]), dim=1).values
    return torch.lerp(below, above, position - low)


def denoised_tokens(sample: Tensor, model_output: Tensor, per_token_timesteps: Tensor, levels_of) -> Tensor:
    """The prediction where every token has a level of its own: `sample + sigma output` of the negative velocity."""
    if not isinstance(levels_of, FlowLevels):
        raise ValueError(f"per_token_timesteps needs a flow, got levels_of={levels_of.config.levels_of!r}")
    sigmas = per_token_timesteps / levels_of.config.num_train_timesteps
    sigmas = sigmas.view(*sigmas.shape, *[1] * (sample.dim() - sigmas.dim()))
    return (sample.float() + sigmas * model_output.float()).to(sample.dtype)
