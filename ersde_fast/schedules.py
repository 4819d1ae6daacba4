"""Where the noise levels lie: by rules of the literature, or placed by the error that a pilot run measures at each."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .levels import CPU, Process, on_host
from .noise import float64_device
from .plan import er_sde_plan
from .sample import sample_plan

__all__ = ["exponential_sigmas", "flow_sigmas", "karras_sigmas", "place_sigmas", "uniform_log_snr_sigmas"]


def karras_sigmas(
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    round_sigma: Callable[[Tensor], Any] | None = None,
) -> Tensor:
    """Levels that are even in sigma^(1 / rho) (Karras et al. 2022, equation 5), float64 [num_steps + 1], the last 0.

    Args:
        num_steps: at least 1.
        sigma_min, sigma_max: the ends above 0.
        rho: the power; the larger, the more levels lie at low noise.
        round_sigma: the network's own, for networks that know only some levels; None keeps them.

    Returns:
        float64 [num_steps + 1] on the CPU, falling, the last 0, in the units of the data.

    Raises:
        ValueError: for ends that are out of range or exchanged, and for counts that are not whole.

    Source: arXiv 2206.00364, equation 5.
    """
    _check_ends(sigma_min, sigma_max)
    if not (isinstance(rho, Real) and 0 < rho < math.inf):
        raise ValueError(f"rho must be a finite number above 0, got {rho!r}")
    roots = _even(num_steps, sigma_max ** (1 / rho), sigma_min ** (1 / rho))
    sigmas = roots**rho
    rounded = sigmas if round_sigma is None else torch.as_tensor(round_sigma(sigmas), dtype=torch.float64, device=CPU)
    return _and_zero(rounded)


def exponential_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Levels that are even in log(sigma), float64 [num_steps + 1], the last 0.

    Args:
        num_steps: at least 1.
        sigma_min, sigma_max: the ends above 0.

    Returns:
        float64 [num_steps + 1] on the CPU, falling, the last 0, in the units of the data.

    Raises:
        ValueError: for ends that are out of range or exchanged, and for counts that are not whole.

    Source: k-diffusion, whose function of that name has the same.
    """
    _check_ends(sigma_min, sigma_max)
    sigmas = torch.exp(_even(num_steps, math.log(sigma_max), math.log(sigma_min)))
    return _and_zero(sigmas.clamp(sigma_min, sigma_max))  # which rounding may leave


def uniform_log_snr_sigmas(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, process: Process = "ve"
) -> Tensor:
    """Levels that are even in the logarithm of the signal-to-noise ratio, log(alpha / sigma), float64 [num_steps + 1], the last 0.

    Args:
        num_steps: at least 1.
        sigma_min, sigma_max: the process's own sigmas, so below 1 for "vp" and "flow".
        process: see `er_sde_plan`; of "ve", where alpha is 1, they are `exponential_sigmas`.

    Returns:
        float64 [num_steps + 1] on the CPU, falling, the last 0, in the units of the process's sigma.

    Raises:
        ValueError: for ends that are out of range or exchanged, and for counts that are not whole.

    Source: arXiv 2206.00927, whose solvers are sampled so.
    """
    if not isinstance(process, str) or process not in FROM_ER_LAMBDA:
        raise ValueError(f'process must be "ve", "vp" or "flow", got {process!r}')
    plan = er_sde_plan([sigma_max, sigma_min], process=process)
    smallest, largest = plan.er_lambdas[1].item(), plan.er_lambdas[0].item()
    if not 0 < smallest <= largest < math.inf:
        raise ValueError(
            f'sigma_min and sigma_max must be above 0, and below 1 for "vp" and "flow", got {sigma_min!r} and {sigma_max!r}'
        )
    return FROM_ER_LAMBDA[process](exponential_sigmas(num_steps, smallest, largest))


FROM_ER_LAMBDA = {
    "ve": lambda l: l,
    "vp": lambda l: l / torch.sqrt(1 + l**2),
    "flow": lambda l: l / (1 + l),
}  # the sigma of each


def flow_sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """Levels of a flow, even from 1 to 0 and then shifted, `shift t / (1 + (shift - 1) t)` (arXiv 2403.03206), float64 [num_steps + 1].

    Args:
        num_steps: at least 1.
        shift: above 0; 1 leaves them even, larger ones spend more steps at high noise, as larger images want.

    Returns:
        float64 [num_steps + 1] on the CPU, falling from 1 to 0, without a unit.

    Raises:
        ValueError: naming shift or num_steps.

    Source: arXiv 2403.03206.
    """
    if not (isinstance(shift, Real) and 0 < shift < math.inf):
        raise ValueError(f"shift must be a finite number above 0, got {shift!r}")
    _check_count(num_steps)
    levels = _and_zero(_even(num_steps, 1.0, 1 / num_steps))
    return shift * levels / (1 + (shift - 1) * levels)


def _check_ends(sigma_min: float, sigma_max: float) -> None:
    if not (isinstance(sigma_min, Real) and isinstance(sigma_max, Real) and 0 < sigma_min <= sigma_max < math.inf):
        raise ValueError(
            f"sigma_min and sigma_max must be finite, above 0 and in this order, got {sigma_min!r} and {sigma_max!r}"
        )


def is_whole(value) -> bool:
    """Whether it is a whole number, of Python's or NumPy's types."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_count(num_steps: int) -> None:
    if not is_whole(num_steps) or num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps!r}")


def _even(num_steps: int, first: float, last: float) -> Tensor:
    _check_count(num_steps)
    return first + torch.linspace(0, 1, num_steps, dtype=torch.float64, device=CPU) * (last - first)


def _and_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def place_sigmas(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | Sequence[float] | np.ndarray,
    num_steps: int,
    extra_args: dict | None = None,
    *,
    process: Process = "ve",
    disable: bool | None = None,
) -> Tensor:
    """Levels for runs of few steps, from a pilot run of many on the same model.

    Where the difference of orders 3 and 2 says that the local error grows as C h^3, levels whose density is C^(1/4) make the
    smallest sum of errors of order 3. The levels belong to the model and the kind of data, so one pilot serves all later runs.
    They gain most at 5 to 12 steps; from 15 on Karras et al.'s are as good (docs/quality_tables.md, "Where the levels lie").

    Args:
        model: `model(x, sigma, **extra_args)`, sigma [batch], to the denoised sample.
        x: [batch, ...] the noise to start from, scaled to sigmas[0]; some tens of samples are plenty.
        sigmas: [pilot_steps + 1] the levels of the pilot, falling, such as 50 of Karras et al.'s and a 0. The result has their
            ends.
        num_steps: the number of steps of the runs to come, at least 2.
        extra_args: further arguments of the model.
        process: see `er_sde_plan`.
        disable: hides the progress bar.

    Returns:
        float64 [num_steps + 1] on the CPU, falling; the last is that of `sigmas`.

    Raises:
        ValueError: fewer than 4 levels above 0 or one twice, num_steps below 2, or a model whose predictions are not finite.

    Source: docs/quality_tables.md, "Where the levels lie".
    """
    levels, ends_at_zero = levels_of_pilot(sigmas, num_steps, process)
    errors = PilotErrors(levels, process)
    pilot = er_sde_plan(levels, process=process, order=3, noise_scaler="ode", method="newton")
    sample_plan(pilot, model, x, extra_args, lambda said: errors.add(said["denoised"]), disable)
    return errors.place(num_steps, ends_at_zero)


def levels_of_pilot(sigmas: Tensor | Sequence[float] | np.ndarray, num_steps: int, process: Process) -> tuple[Tensor, bool]:
    """The levels of a pilot run for runs of num_steps, float64 on the CPU, less a 0 at the end; and whether there was one."""
    sigmas = er_sde_plan(on_host(sigmas), process=process).sigmas
    ends_at_zero = bool(sigmas[-1] == 0)
    levels = sigmas[:-1] if ends_at_zero else sigmas
    if not is_whole(num_steps) or num_steps < 2:
        raise ValueError(f"num_steps must be a whole number of at least 2, got {num_steps!r}")
    if (levels.diff() == 0).any():
        raise ValueError("sigmas must fall at every step of the pilot, got a level twice")
    if len(levels) < 4:
        raise ValueError(f"sigmas must hold at least 4 levels above 0, for a history of order 3, got {len(levels)}")
    return levels, ends_at_zero


class PilotErrors:
    """The local errors of a pilot run by its predictions, one after another, and the levels that they place.

    Args:
        levels: of `levels_of_pilot`.
    """

    def __init__(self, levels: Tensor, process: Process):
        plan, lower = (er_sde_plan(levels, process=process, order=n, noise_scaler="ode", method="newton") for n in (3, 2))
        # Of the weights, not of two steps, whose rounding at high noise is larger than their difference.
        differences = plan.weights[:, 1:4].clone()
        differences[:, :2] -= lower.weights[:, 1:3]
        self.levels, self.differences, self.alphas = levels, differences.tolist(), plan.alphas.tolist()
        self.errors: list[float] = []
        self.history: list[Tensor] = []

    def add(self, denoised: Tensor) -> None:
        i = len(self.errors)
        self.history = [denoised, *self.history[:2]]
        terms = [w * d.to(float64_device(d.device)).double() for w, d in zip(self.differences[i], self.history, strict=False)]
        error = sum(terms[1:], terms[0])
        self.errors.append(error.square().mean().sqrt().item() / self.alphas[i + 1])

    def place(self, num_steps: int, ends_at_zero: bool) -> Tensor:
        """See `place_sigmas`."""
        levels, errors = self.levels, [*self.errors[2:3] * 2, *self.errors[2:]]  # there is no history of three before
        if (bad := next((i for i, error in enumerate(self.errors) if not math.isfinite(error)), None)) is not None:
            raise ValueError(
                f"model must return finite predictions, got some that are not at sigma {levels[bad]:g}, step {bad} of the pilot: "
                f"end the pilot above that sigma, start it below, or run the model in a wider dtype"
            )
        if not any(errors):
            raise ValueError("model must depend on sigma or x: the pilot's orders agree to the bit, so any levels are as good")
        passed = np.concatenate([[0.0], np.cumsum(np.asarray(errors) ** 0.25)])
        count = num_steps if ends_at_zero else num_steps + 1
        placed = np.interp(np.linspace(0, passed[-1], count), passed, levels.log().numpy())
        placed = torch.from_numpy(np.exp(placed)).clamp(levels[-1], levels[0])  # which rounding may leave
        placed[0], placed[-1] = levels[0], levels[-1]
        return torch.cat([placed, placed.new_zeros(1)]) if ends_at_zero else placed
