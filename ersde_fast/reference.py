"""The specification: the step and its noise in plain PyTorch, for any device and dtype, differentiable."""

import torch
from torch import Tensor

from .arguments import check_step
from .noise import seeds_of, specified_noise


def reference_step(plan, i: int, x: Tensor, history, noise: Tensor | None = None, seed=None) -> Tensor:
    """One step of the plan, `x_next = w_x x + sum_j w_d[j] history[j] + w_noise noise`.

    Args:
        plan: of `er_sde_plan`.
        i: the step, 0 to plan.num_steps - 1.
        x: [...] the current sample, of any float dtype; computed in float32, in float64 if any input is float64.
        history: predictions of the clean sample, newest first, each of the shape of x and of any float dtype.
        noise: standard normal, of the shape of x.
        seed: the portable stream instead, see `portable_noise`. One of the two is needed where w_noise is not 0.

    Returns:
        The next sample, of the shape and dtype of x. Its error is at most
        (order + 3) 2^-24 sum |w_i x_i| plus half an ulp of its dtype (2^-53 for float64).
    """
    check_step(plan, i, x, history, noise, seed=seed)
    if seed is not None:
        noise = draw_portable(plan, i, x, seed)
    return combine(plan.rows[i], x, history, noise)


def draw_portable(plan, i: int, x: Tensor, seed, global_shape=None, global_start=None) -> Tensor | None:
    """The step's portable noise as a float32 tensor, or None where the step adds none."""
    if plan.rows[i].w_noise == 0:
        return None
    return specified_noise(x.shape, seeds_of(seed, x).to(x.device), plan.first_step + i, global_shape, global_start)


def combine(row, x: Tensor, history, noise: Tensor | None) -> Tensor:
    """The linear combination of one row of weights; a term of weight 0 is not read."""
    weights = [row.w_x, *row.w_d, row.w_noise]
    terms = [(w, term) for w, term in zip(weights, [x, *history[: len(row.w_d)], noise], strict=True) if w != 0]
    if row.w_noise != 0 and noise is None:
        raise ValueError("noise is needed: the weight of the noise is not 0 at this step")
    exact = torch.float64 if any(term.dtype == torch.float64 for _, term in [*terms, (0, x)]) else torch.float32
    total = torch.zeros_like(x, dtype=exact)
    for w, term in terms:
        total = total + w * term.to(exact)
    return total.to(x.dtype)
