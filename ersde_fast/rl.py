"""Plans of the samplers that policy-gradient training of flow models uses: each step is a Gaussian with a density.

A flow noises its samples as x = (1 - s) x0 + s noise, s the sigma of the plan; its velocity is v = noise - x0 ("flow" of
`fast_step`'s prediction types). Sampling a step, its log-density and the gradient of that are those of any plan:

    plan = rl.flow_sde_plan(sigmas)
    x, denoised, log_prob = fast_step(plan, i, x, [v], seed=seed, prediction_type="flow", return_log_prob=True)
    log_prob = step_log_prob(plan, i, x, [v], x_next, prediction_type="flow")

The samplers' own code takes the mean of the density over a sample's elements: `reduction="mean"`. Each function takes

    sigmas: [num_steps + 1] levels of a flow, from at most 1 falling to at least 0, which may repeat: a step between equal levels
        stays where it is. Any device and real dtype; computed in float64 on the host.

and the sampler's noise level, one number, or one for each step: at 0 a step is Euler's, without noise and without a density, so
that a window of some steps alone is trained. The errors are those of `er_sde_plan`, and name the argument.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .levels import CPU, on_host
from .plan import Plan, er_sde_plan, strengths
from .weights import each_eta

Numbers = Tensor | np.ndarray | Sequence[float]


class _Steps(NamedTuple):
    """Where the steps of a run start and end, how long they are, and their noise levels, each float64 [num_steps]; and the ODE's plan."""

    s: Tensor
    t: Tensor
    dt: Tensor
    noise_level: Tensor
    euler: Plan

    @classmethod
    def of(cls, sigmas: Numbers, name: str, noise_level: float | Numbers) -> "_Steps":
        euler = er_sde_plan(on_host(sigmas), process="flow", order=1, noise_scaler="ode")
        s, t = euler.sigmas[:-1], euler.sigmas[1:]
        levels = each_eta(strengths(name, on_host(noise_level), len(s), CPU), len(s), CPU)
        return cls(s, t, t - s, levels, euler)

    def plan(self, w_x: Tensor, w_d: Tensor, w_noise: Tensor) -> Plan:
        """Of these weights, and where a level repeats, up to rounding, those of a step that stays where it is."""
        still, (stay, nothing, _) = self.euler.weights[:, 1] == 0, self.euler.weights.unbind(1)
        weights = [torch.where(still, stay, w_x), torch.where(still, nothing, w_d), torch.where(still, nothing, w_noise)]
        return Plan.from_weights(torch.stack(weights, dim=1), self.euler.sigmas, process="flow")


def flow_sde_plan(sigmas: Numbers, a: float | Numbers = 0.7) -> Plan:
    """Flow-GRPO: Euler's step of the SDE dx = (v + std^2 (x + (1 - s) v) / (2 s)) ds + std dw with
    std = a sqrt(s / (1 - s)). Where s is 1 the next level stands below the line, as in the authors' code.

    Args:
        sigmas: [num_steps + 1] levels of a flow.
        a: the noise level, at least 0. The last step adds noise too.

    Returns:
        The plan, of order 1.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: arXiv 2505.05470.
    """
    s, t, dt, a, _ = steps = _Steps.of(sigmas, "a", a)
    variance = a**2 * s / (1 - torch.where(s == 1, t, s))
    drift = 1 + variance * (1 - s) / (2 * s)
    return steps.plan(1 + variance * dt / (2 * s) + drift * dt / s, -drift * dt / s, torch.sqrt(-variance * dt))


def dance_sde_plan(sigmas: Numbers, eta: float | Numbers = 0.3) -> Plan:
    """DanceGRPO: Euler's step of the SDE dx = (v - eta^2 / 2 score) ds + eta dw, whose score is
    -(x - (1 - s) x0) / s^2.

    Args:
        sigmas: [num_steps + 1] levels of a flow.
        eta: the noise level, at least 0. The last step adds noise too.

    Returns:
        The plan, of order 1.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: arXiv 2505.07818.
    """
    s, _, dt, eta, _ = steps = _Steps.of(sigmas, "eta", eta)
    pull = eta**2 * dt / (2 * s**2)
    return steps.plan(1 + dt / s + pull, -dt / s - (1 - s) * pull, eta * torch.sqrt(-dt))


def cps_plan(sigmas: Numbers, eta: float | Numbers = 0.9) -> Plan:
    """Coefficients-preserving sampling (Flow-CPS): to (1 - t) x0 + t cos(eta pi / 2) noise + t sin(eta pi / 2) z, where
    x0 and noise are predicted and z is fresh. Order 1 of ER-SDE with rho = cos(eta pi / 2) at every step.

    Args:
        sigmas: [num_steps + 1] levels of a flow.
        eta: the noise level, 0 to 1. The authors' code takes -(x_next - mean)^2 for the log-density, this one's up to a factor and
            a constant.

    Returns:
        The plan, of order 1.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: arXiv 2509.05952.
    """
    s, t, _, eta, _ = steps = _Steps.of(sigmas, "eta", eta)
    if (eta > 1).any():
        raise ValueError(f"eta must be at most 1, got {eta.max().item()} at step {int(eta.argmax())}")
    kept = t * torch.cos(eta * (math.pi / 2))
    return steps.plan(kept / s, (1 - t) - kept * (1 - s) / s, t * torch.sin(eta * (math.pi / 2)))


def precise_plan(sigmas: Numbers, eta: float | Numbers = 1.5) -> Plan:
    """Precise: the exact step of its SDE for a prediction that stays what it is, which is order 1 of ER-SDE with
    "sde" at strength eta^2 / 2. From sigma 1 it forgets x, except through the prediction.

    Args:
        sigmas: [num_steps + 1] levels of a flow.
        eta: the noise level, at least 0.

    Returns:
        The plan, of order 1.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: arXiv 2605.23522.
    """
    steps = _Steps.of(sigmas, "eta", eta)
    return er_sde_plan(steps.euler.sigmas, process="flow", order=1, noise_scaler="sde", eta=steps.noise_level**2 / 2)
