"""Prediction types: what a model's output says of the clean sample.

A type is a name and a function from the alpha and sigma of a step, float64 tensors of one shape, to the two factors of
`denoised = p_x x + p_m output`. To add one, put its function into PREDICTION_TYPES: whatever knows the names looks there, and
nothing else knows the types.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Factors = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _sample(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The output is the clean sample."""
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def _epsilon(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x = alpha denoised + sigma epsilon; says nothing of the clean sample where alpha is 0, where p_x is infinite."""
    return 1 / alpha, -sigma / alpha


def _v(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """v = alpha epsilon - sigma denoised."""
    power = alpha**2 + sigma**2
    return alpha / power, -sigma / power


def _flow(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """flow = epsilon - denoised."""
    total = alpha + sigma
    return 1 / total, -sigma / total


PREDICTION_TYPES: dict[str, Factors] = {"sample": _sample, "epsilon": _epsilon, "v": _v, "flow": _flow}
