"""Noise scalers phi: each picks one member of the family of extended reverse-time SDEs (arXiv 2309.06169, appendix A.8).

The plan needs only ratios of phi, and differences of two logarithms would cost it digits on short steps. So a scaler is
one function, the growth of log(phi(l) / l) over a log-distance, in a form without cancellation. At strength eta it is
psi(l) = l^(1 - eta) phi(l)^eta, and log(psi(l) / l) grows by eta times as much: 0 is the ODE of every scaler.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseScaler:
    """One noise scaler.

    Attributes:
        name: as the user wrote it, for messages.
        full_growth: log_growth at strength 1.
        at_infinity: whether phi(l) / l has a limit (infinity counts) that a flow schedule may start from.
        form: which functional form csrc/er_sde_plan.h has for it; None for a user's function.
        strength: eta of the scaler itself.
    """

    name: str
    full_growth: Callable[[Tensor, Tensor], Tensor]
    at_infinity: bool = True
    form: str | None = None
    strength: float = 1.0

    def log_growth(self, l: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        """log(psi / l) at `l exp(y)` less its value at `l`, of this scaler at strength eta.

        Args:
            l, y, eta: er_lambdas, distances and strengths, float64 tensors that broadcast; `y >= 0`, and inf gives the limit.
        """
        l, y, strength = torch.broadcast_tensors(l, y, self.strength * eta)
        growth, stochastic = torch.zeros_like(y), strength != 0  # 0 is the ODE, of an infinite distance too
        if stochastic.any():
            growth[stochastic] = strength[stochastic] * self.full_growth(l[stochastic], y[stochastic])
        return growth


AnyNoiseScaler = str | NoiseScaler | Callable[[Tensor], Tensor]  # a name, a scaler, or phi itself


MOST = sys.float_info.max


def reverse_time_sde(eta: float) -> NoiseScaler:
    """phi(l) = l^(eta + 1): 0 is the probability-flow ODE, 1 the usual reverse-time SDE.

    Args:
        eta: at least 0 and finite; it has no unit.

    Returns:
        What `er_sde_plan` takes for its noise_scaler.

    Raises:
        ValueError: for another eta.

    Source: arXiv 2309.06169, appendix A.8.
    """
    eta = nonnegative("eta", eta)
    return NoiseScaler(f"reverse_time_sde({eta!r})", _sde, form="sde", strength=eta)


def nonnegative(name: str, value) -> float:
    """The value of a strength, checked."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= MOST):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


def _sde(l: Tensor, y: Tensor) -> Tensor:
    """phi = l^2."""
    return y.expand(torch.broadcast_shapes(l.shape, y.shape))


def _sde_1(l: Tensor, y: Tensor) -> Tensor:
    """phi = l (exp(-1 / l) + 10)."""
    inverse = 1 / l
    return torch.log1p(
        -torch.exp(-inverse * torch.exp(-y)) * torch.expm1(inverse * torch.expm1(-y)) / (torch.exp(-inverse) + 10)
    )


def _sde_4(l: Tensor, y: Tensor) -> Tensor:
    """phi = l^0.9 log10(1 + 100 l^1.5)."""
    v = 100 * l**1.5
    log_v = torch.log1p(v)
    return torch.log1p(torch.log1p(v / (1 + v) * torch.expm1(1.5 * y)) / log_v) - 0.1 * y


def _sde_5(l: Tensor, y: Tensor) -> Tensor:
    """phi = l (exp(l^0.3) + 10)."""
    power = l**0.3
    growth = power * torch.expm1(0.3 * y)
    near = torch.log1p(torch.expm1(growth.clamp(max=1)) / (1 + 10 * torch.exp(-power)))
    far = growth + torch.log1p(10 * torch.exp(-power - growth)) - torch.log1p(10 * torch.exp(-power))
    return torch.where(growth < 1, near, far)


NOISE_SCALERS = {
    "ode": reverse_time_sde(0),
    "sde": reverse_time_sde(1),
    "sde_1": NoiseScaler("sde_1", _sde_1, form="sde_1"),
    "sde_2": reverse_time_sde(0.5),
    "sde_3": reverse_time_sde(1.5),
    "sde_4": NoiseScaler("sde_4", _sde_4, at_infinity=False, form="sde_4"),
    "sde_5": NoiseScaler("sde_5", _sde_5, form="sde_5"),
}


def get_noise_scaler(noise_scaler: AnyNoiseScaler) -> NoiseScaler:
    """The scaler of a name ("sde_5", "reverse_time_sde(0.5)"), of a callable phi, or the scaler itself."""
    if isinstance(noise_scaler, NoiseScaler):
        return noise_scaler
    if isinstance(noise_scaler, str):
        if noise_scaler in NOISE_SCALERS:
            return NOISE_SCALERS[noise_scaler]
        if match := re.fullmatch(r"reverse_time_sde\(([0-9.eE+-]+)\)", noise_scaler):
            return reverse_time_sde(float(match[1]))
        names = ", ".join([*NOISE_SCALERS, "reverse_time_sde(eta)"])
        raise ValueError(f"noise_scaler must be one of {names} or a callable, got {noise_scaler!r}")
    if callable(noise_scaler):
        return _from_callable(noise_scaler)
    raise TypeError(f"noise_scaler must be a name or a callable, got {type(noise_scaler).__name__}")


def _from_callable(phi: Callable[[Tensor], Tensor]) -> NoiseScaler:
    """A scaler from the user's phi, checked wherever it is evaluated."""
    name = getattr(phi, "__name__", type(phi).__name__)

    def evaluate(l: Tensor) -> Tensor:
        value = phi(l.clone())
        if not isinstance(value, Tensor) or value.shape != l.shape:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"noise_scaler {name} must map a tensor elementwise: given shape {tuple(l.shape)} it returned {what}"
            )
        value = value.to(l)
        bad = ~(torch.isfinite(value) & (value > 0))
        if bad.any():
            where = int(bad.flatten().nonzero()[0])
            raise ValueError(
                f"noise_scaler {name} must be positive and finite, "
                f"got {value.flatten()[where].item()} at er_lambda {l.flatten()[where].item()}"
            )
        return value

    def full_growth(l: Tensor, y: Tensor) -> Tensor:
        return torch.log(evaluate(l * torch.exp(y)) / evaluate(l)) - y

    return NoiseScaler(name, full_growth, at_infinity=False)
