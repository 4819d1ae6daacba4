"""Prediction types: what a model's output says of the clean sample.

A type is a name and a function from the alpha and sigma of a step, float64 tensors of one shape, to the two factors of
`denoised = p_x x + p_m output`. To add one, put its function into PREDICTION_TYPES: whatever knows the names looks there, and
nothing else knows the types. One type needs more of the network than its levels: sigma_data, which the plan is told.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Factors = Callable[..., tuple[Tensor, Tensor]]


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


def _edm(alpha: Tensor, sigma: Tensor, sigma_data: Tensor) -> tuple[Tensor, Tensor]:
    """The output is that of the network inside EDM's preconditioning (arXiv 2206.00364, table 1), asked at x / alpha and
    sigma / alpha: denoised = c_skip x + c_out output where alpha is 1."""
    variance = sigma**2 + (alpha * sigma_data) ** 2
    return alpha * sigma_data**2 / variance, sigma * sigma_data / variance.sqrt()


PREDICTION_TYPES: dict[str, Factors] = {"sample": _sample, "epsilon": _epsilon, "v": _v, "flow": _flow, "edm": _edm}


def factors_of(prediction_type: str, alpha: Tensor, sigma: Tensor, sigma_data: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two factors of a type.

    Args:
        sigma_data: the standard deviation of the data that the network was made for, in a shape that broadcasts with alpha; or
            None where the plan was not told it.

    Raises:
        KeyError: there is no such type.
        ValueError: the type needs sigma_data.
    """
    factors = PREDICTION_TYPES[prediction_type]
    if factors is not _edm:
        return factors(alpha, sigma)
    if sigma_data is None:
        raise ValueError(
            f'prediction_type "{prediction_type}" needs the sigma_data of the network: er_sde_plan(..., sigma_data=0.5), every plan of '
            f"a stack"
        )
    return _edm(alpha, sigma, sigma_data)
