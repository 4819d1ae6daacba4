"""What people run today for the same step: the rivals that the benchmarks and the demo measure beside `fast_step`."""

import torch
from torch import Tensor


def sde_5(er_lambda: Tensor) -> Tensor:
    """The paper's default noise scaler, as a tensor expression."""
    return er_lambda * (torch.exp(er_lambda**0.3) + 10)


def published_step(
    x: Tensor, history: list[Tensor], er_lambdas: Tensor, alphas: Tensor, i: int, noise: Tensor, points: int = 200
) -> Tensor:
    """The published order-3 update (arXiv 2309.06169, algorithm 3) as existing samplers run it.

    The coefficients are 0-dim tensors, computed in every step with sums of `points` terms, phi anew in each place, and each
    term of the update is an operator over the whole tensor: with `torch.randn_like` 79 operators, 16 of them over the
    whole tensor, as the profiler counts (existing samplers run 87 and 102, with the same 16).

    Args:
        history: the newest prediction, the one before, and the difference quotient of the one before, which existing
            samplers keep from the step before.
        er_lambdas, alphas: [num_steps + 1] on the device of x.
    """
    denoised, denoised_1, slope_1 = history
    l_s, l_t, alpha_s, alpha_t = er_lambdas[i], er_lambdas[i + 1], alphas[i], alphas[i + 1]
    r_alpha, r = alpha_t / alpha_s, sde_5(l_t) / sde_5(l_s)
    x = r_alpha * r * x + alpha_t * (1 - r) * denoised

    dt = l_t - l_s
    width = -dt / points
    grid = l_t + torch.arange(points, dtype=torch.float32, device=x.device) * width
    phi = sde_5(grid)
    first = torch.sum(1 / phi) * width
    slope = (denoised - denoised_1) / (l_s - er_lambdas[i - 1])
    x = x + alpha_t * (dt + first * sde_5(l_t)) * slope

    second = torch.sum((grid - l_s) / phi) * width
    curvature = (slope - slope_1) / ((l_s - er_lambdas[i - 2]) / 2)
    x = x + alpha_t * (dt**2 / 2 + second * sde_5(l_t)) * curvature

    return x + alpha_t * noise * 1.0 * (l_t**2 - l_s**2 * r**2).sqrt().nan_to_num(nan=0.0)


def eager_expression(weights, x: Tensor, history: list[Tensor], noise: Tensor) -> Tensor:
    """One expression with the weights as Python floats, order 3."""
    a, (b0, b1, b2), c = weights
    return a * x + b0 * history[0] + b1 * history[1] + b2 * history[2] + c * noise


def lean_chain(weights, x: Tensor, history: list[Tensor], noise: Tensor) -> Tensor:
    """The same with as few operators and temporaries as eager PyTorch allows."""
    y = torch.mul(x, weights[0])
    for w, denoised in zip(weights[1], history, strict=True):
        y.add_(denoised, alpha=w)
    return y.add_(noise, alpha=weights[2])
