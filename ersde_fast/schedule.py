"""Where the noise levels lie: placed by the error that the solver makes at each, which a pilot run measures."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .plan import er_sde_plan, on_host
from .sample import sample_plan


@torch.no_grad()
def place_sigmas(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | Sequence[float] | np.ndarray,
    num_steps: int,
    extra_args: dict | None = None,
    *,
    process: str = "ve",
) -> Tensor:
    """Levels for runs of few steps, from a pilot run of many on the same model.

    Where the difference of orders 3 and 2 says that the local error grows as C h^3, levels whose density is C^(1/4) make the
    smallest sum of errors of order 3. The levels belong to the model and the kind of data, so one pilot serves all later runs.
    They gain most at 5 to 12 steps; from 15 on Karras et al.'s are as good (docs/quality.md, "Where the levels lie").

    Args:
        model: `model(x, sigma, **extra_args)`, sigma [batch], to the denoised sample.
        x: [batch, ...] the noise to start from, scaled to sigmas[0]; some tens of samples are plenty.
        sigmas: [pilot_steps + 1] the levels of the pilot, falling, such as 50 of Karras et al.'s and a 0. The result has their
            ends.
        num_steps: the number of steps of the runs to come, at least 2.
        extra_args: further arguments of the model.
        process: see `er_sde_plan`.

    Returns:
        float64 [num_steps + 1] on the CPU, falling; the last is that of `sigmas`.

    Raises:
        ValueError: fewer than 4 levels above 0 or one twice, num_steps below 2, or a model whose predictions are not finite.
    """
    sigmas = er_sde_plan(on_host(sigmas), process=process).sigmas
    ends_at_zero = sigmas[-1] == 0
    levels = sigmas[:-1] if ends_at_zero else sigmas
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 2:
        raise ValueError(f"num_steps must be a whole number of at least 2, got {num_steps!r}")
    if (levels.diff() == 0).any():
        raise ValueError("sigmas must fall at every step of the pilot, got a level twice")
    if len(levels) < 4:
        raise ValueError(f"sigmas must hold at least 4 levels above 0, for a history of order 3, got {len(levels)}")

    plan, lower = (er_sde_plan(levels, process=process, order=n, noise_scaler="ode", method="newton") for n in (3, 2))
    # Of the weights, not of two steps, whose rounding at high noise is larger than their difference.
    differences = plan.weights[:, 1:4].clone()
    differences[:, :2] -= lower.weights[:, 1:3]
    errors, history = [], []

    def measure(said: dict) -> None:
        history[:] = [said["denoised"], *history[:2]]
        error = sum(w * denoised.double() for w, denoised in zip(differences[said["i"]].tolist(), history, strict=False))
        errors.append(error.square().mean().sqrt().item() / plan.alphas[said["i"] + 1].item())

    sample_plan(plan, model, x, extra_args, measure, disable=True)
    errors[:2] = errors[2:3] * 2  # there is no history of three yet
    if not all(map(math.isfinite, errors)):
        raise ValueError(f"model must return finite predictions, got errors {errors} of the pilot's steps")
    if not any(errors):
        raise ValueError("model must depend on sigma or x: the pilot's orders agree to the bit, so any levels are as good")

    passed = np.concatenate([[0.0], np.cumsum(np.asarray(errors) ** 0.25)])
    count = num_steps if ends_at_zero else num_steps + 1
    placed = np.interp(np.linspace(0, passed[-1], count), passed, levels.log().numpy())
    placed = torch.from_numpy(np.exp(placed)).clamp(levels[-1], levels[0])  # which rounding may leave
    placed[0], placed[-1] = levels[0], levels[-1]
    return torch.cat([placed, placed.new_zeros(1)]) if ends_at_zero else placed
