"""What a pilot run tells of runs of few steps: the path of its samples between its levels, and the plans that follow it best.

Samples are those of a variance exploding process, y = x / alpha and l = er_lambda, in which every process has the path
dy / dl = (y - D) / l, D the prediction. All is float64 on the CPU, in coordinates of the samples.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .levels import CPU, Process
from .plan import Plan, er_sde_plan
from .schedules import FROM_ER_LAMBDA

ORDER = 4  # of calibrated plans
RIDGE = 1e-4  # of the least squares of a step, relative
NOTHING = 1e-8  # differences between predictions, as a share of their squares, that say nothing
PRIOR = 1e-5  # on the squares of the parameters, beside an error in variances
LARGEST = 4.0  # of the logarithm of a gap's factor
LONGEST = 0.5  # step of the same: a gap halved or doubled at most is still one of which the derivatives say something
SEARCHES, TRIALS = 20, 8  # on the path: rounds, of which some ten are made, and dampings tried in one, up to 4**8 of the first
FINE = 1e-4  # of a parameter, for a derivative on the path, which is float64 whatever the model is
SETTLED = 1e-3  # of the error on the path: what a round gains less than is not worth another
FIRST_DAMPING, LEAST_DAMPING, DAMPED = (
    1e-3,
    1e-8,
    4.0,
)  # of Levenberg and Marquardt's rounds: at first, at least, and the factor


class Path:
    """The pilot's samples at any level: cubic in log l between the levels of the pilot, whose slopes are known.

    Args:
        er_lambdas: [k], falling, above 0; the first may be infinite.
        y, denoised: [k, n, m]; y of an infinite level is not read.
        end: [n, m] where the pilot ends.
    """

    def __init__(self, er_lambdas: Tensor, y: Tensor, denoised: Tensor, end: Tensor):
        finite = int(er_lambdas[0].isinf())
        self.end, self.first = end, denoised[0]
        self.logs, self.y, self.denoised = er_lambdas[finite:].log(), y[finite:], denoised[finite:]
        gaps = self.logs.diff()[:, None, None]
        secants = self.denoised.diff(dim=0) / gaps
        inside = (gaps[1:] * secants[:-1] + gaps[:-1] * secants[1:]) / (gaps[1:] + gaps[:-1])
        self.slopes = torch.cat([secants[:1], inside, secants[-1:]])

    def at(self, er_lambda: float) -> tuple[Tensor, Tensor]:
        """y and the prediction at a level that is not above the pilot's first finite one."""
        log = math.log(er_lambda)
        if log <= self.logs[-1]:  # the prediction no longer changes
            last = self.denoised[-1]
            return last + (self.y[-1] - last) * math.exp(log - self.logs[-1].item()), last
        k = min(max(int((self.logs >= log).sum()) - 1, 0), len(self.logs) - 2)
        gap = (self.logs[k + 1] - self.logs[k]).item()
        t = (log - self.logs[k].item()) / gap
        value, slope = ((1 + 2 * t) * (1 - t) ** 2, t**2 * (3 - 2 * t)), (t * (1 - t) ** 2 * gap, t**2 * (t - 1) * gap)

        def between(v: Tensor, s: Tensor) -> Tensor:
            return value[0] * v[k] + value[1] * v[k + 1] + slope[0] * s[0] + slope[1] * s[1]

        y_slopes = self.y[k : k + 2] - self.denoised[k : k + 2]
        return between(self.y, y_slopes), between(self.denoised, self.slopes[k : k + 2])


class Family:
    """The plans that a fit chooses from: parameters [size] to levels and weights. Parameters of 0 are the plan it starts from.

    The first parameters are the logarithms of what each gap between log-levels is multiplied by, so no level passes another; the rest
    the weights of differences between neighbouring predictions, in units of alpha. So w_x, w_noise and the sum of w_d are those of
    the analytic plan at the levels.

    Args:
        sigmas: [num_steps + 1] the levels to start from, float64; the last is not moved, and the last above 0 not moved below where it is.
        highest: the largest finite er_lambda that is allowed.
        arguments: of `er_sde_plan`, for the analytic plan.
    """

    def __init__(self, sigmas: Tensor, highest: float, process: Process, arguments: dict):
        self.sigmas, self.process, self.arguments = sigmas, process, arguments
        self.num_steps = len(sigmas) - 1
        er_lambdas = er_sde_plan(sigmas, process=process).er_lambdas
        logs = er_lambdas[:-1].log()
        if logs[0].isinf():
            logs[0] = min(logs[1].item() + 1, math.log(highest))
        self.start, self.gaps = logs[0], -logs.diff()
        self.room = self.gaps.sum() if sigmas[-1] == 0 else 0.9 * (logs[0] - er_lambdas[-1].log()) + 0.1 * self.gaps.sum()
        self.num_gaps = len(self.gaps)
        self.differences = [(i, j) for i in range(1, self.num_steps) for j in range(1, min(i, ORDER - 1) + 1)]
        self.size = self.num_gaps + len(self.differences)
        self.changes = [*range(self.num_gaps), *(i for i, _ in self.differences)]  # the first step that each changes

    def within(self, parameters: Tensor) -> Tensor:
        """The parameters with gaps that have room, and are not out of all proportion."""
        parameters = parameters.clone()
        factors = parameters[: self.num_gaps].clamp_(-LARGEST, LARGEST)
        if (total := (self.gaps * factors.exp()).sum()) > self.room:
            factors += (self.room / total).log()
        return parameters

    def levels(self, parameters: Tensor) -> Tensor:
        """Sigmas [num_steps + 1], float64."""
        logs = self.start - (self.gaps * parameters[: self.num_gaps].exp()).cumsum(0)
        inner = FROM_ER_LAMBDA[self.process](logs.exp())
        return torch.cat([self.sigmas[:1], inner, self.sigmas[-1:]])

    def analytic(self, gaps: Tensor) -> Plan:
        """The plan of these parameters of the gaps with the analytic weights."""
        return self.plan(torch.cat([gaps, gaps.new_zeros(len(self.differences))]))

    def plan(self, parameters: Tensor, **noise) -> Plan:
        """The plan by the ODE; with a noise scaler and eta that one, its differences' weights more than the analytic ones as the ODE's."""
        sigmas = self.levels(parameters)
        analytic = er_sde_plan(sigmas, process=self.process, **{"noise_scaler": "ode", **noise}, **self.arguments)
        weights = torch.zeros(self.num_steps, ORDER + 2, dtype=torch.float64, device=CPU)
        kept = analytic.order
        weights[:, : kept + 1], weights[:, -1] = analytic.weights[:, : kept + 1], analytic.weights[:, -1]
        for (i, j), weight in zip(self.differences, parameters[self.num_gaps :].tolist(), strict=True):
            weight *= analytic.alphas[i + 1].item()
            weights[i, j] += weight
            weights[i, j + 1] -= weight
        return Plan.from_weights(weights, sigmas, process=self.process, sigma_data=analytic.sigma_data)


def kept_from(er_lambda: float, variances: Tensor) -> Tensor:
    """The part of an error at a level that is left where the run ends, [m], of Gaussian data of these variances: as of the noise there,
    later steps take the rest back."""
    return (variances / (variances + er_lambda**2)).sqrt() if er_lambda > 0 else torch.ones_like(variances)


def along(path: Path, family: Family, parameters: Tensor, x: Tensor, variances: Tensor) -> tuple[list[Tensor], Tensor]:
    """The error that each step makes by itself from the pilot's path, [n, m] of each, with the weights that make it least; and the
    parameters with these.

    Args:
        x: [n, m] the start.
        variances: [m] of the data, see `kept_from`.
    """
    gaps = parameters[: family.num_gaps]
    plan = family.analytic(gaps)
    er_lambdas, alphas = plan.er_lambdas.tolist(), plan.alphas.tolist()
    denoised: list[Tensor] = []
    errors, fitted = [], []
    for i, row in enumerate(plan.rows):
        if i > 0:
            y, newest = path.at(er_lambdas[i])
            x = alphas[i] * y
        else:
            newest = path.first
        denoised = [newest, *denoised[: ORDER - 1]]
        x_next = row.w_x * x + sum(w * d for w, d in zip(row.w_d, denoised, strict=False))
        l = er_lambdas[i + 1]
        error = x_next / alphas[i + 1] - (path.at(l)[0] if l > 0 else path.end)
        weights = least_squares(denoised, -error)
        error = error + differences_of(denoised, weights)
        fitted.append(weights)
        errors.append(error * kept_from(l, variances))
    return errors, torch.cat([gaps, *fitted])


def least_squares(denoised: list[Tensor], missing: Tensor) -> Tensor:
    """The weights of the differences between neighbouring predictions, newest first, whose sum is nearest to what is missing."""
    if len(denoised) == 1:
        return torch.zeros(0, dtype=torch.float64, device=CPU)
    columns = torch.stack([(newer - older).flatten() for newer, older in pairwise(denoised)], dim=1)
    gram = columns.T @ columns
    ridge = RIDGE * gram.diagonal() + NOTHING * denoised[0].square().sum()
    return torch.linalg.solve(gram + ridge.diag(), columns.T @ missing.flatten())


def differences_of(denoised: list[Tensor], weights: Tensor) -> Tensor:
    """The sum of weights times differences between neighbouring predictions."""
    pairs = zip(weights.tolist(), denoised, denoised[1:], strict=False)
    return sum((w * (newer - older) for w, newer, older in pairs), torch.zeros_like(denoised[0]))


class Quadratic(NamedTuple):
    """A quadratic model of an error about parameters: gradient [p] and Hessian [p, p]."""

    gradient: Tensor
    hessian: Tensor

    @classmethod
    def of(cls, jacobian: Tensor, residuals: Tensor, parameters: Tensor) -> "Quadratic":
        """Of |residuals|^2 + PRIOR |parameters|^2, halved, by Gauss and Newton; jacobian [k, p], residuals [k]."""
        prior = PRIOR * torch.eye(len(parameters), dtype=torch.float64, device=CPU)
        return cls(jacobian.T @ residuals + PRIOR * parameters, jacobian.T @ jacobian + prior)

    def step(self, damping: float, num_gaps: int) -> Tensor:
        """That of Levenberg (1944), damped in the proportions of Marquardt (1963); no gap's logarithm changes by more than LONGEST."""
        damped = self.hessian + damping * self.hessian.diagonal().diag()
        step = torch.linalg.solve(damped, -self.gradient)
        return step * min(1.0, LONGEST / max(step[:num_gaps].abs().max().item(), 1e-30))

    def gain(self, step: Tensor) -> float:
        """How much less the error is after a step, were it exact."""
        return -(2 * self.gradient @ step + step @ self.hessian @ step).item()


def place_on_path(path: Path, family: Family, x: Tensor, variances: Tensor, scale: float, start: float) -> tuple[Tensor, float]:
    """The parameters whose steps' errors along the path have the least sum of squares, without an evaluation of the model; and that sum.

    Args:
        x, variances: see `along`.
        scale: what errors are multiplied by.
        start: the parameters of all gaps to begin with.
    """

    def errors_at(parameters: Tensor) -> tuple[Tensor, Tensor, float]:
        errors, fitted = along(path, family, parameters, x, variances)
        residuals = torch.cat([error.flatten() for error in errors]) * scale
        gaps = parameters[: family.num_gaps]
        return residuals, fitted, (residuals @ residuals + PRIOR * gaps @ gaps).item()

    here = torch.zeros(family.size, dtype=torch.float64, device=CPU)
    here[: family.num_gaps] = start
    residuals, fitted, error = errors_at(here)
    damping = FIRST_DAMPING
    for _ in range(SEARCHES):
        columns = []
        for k in range(family.num_gaps):
            there = here.clone()
            there[k] -= FINE
            columns.append((residuals - errors_at(there)[0]) / FINE)
        model = Quadratic.of(torch.stack(columns, dim=1), residuals, here[: family.num_gaps])
        before = error
        for _ in range(TRIALS):
            there = here.clone()
            there[: family.num_gaps] += model.step(damping, family.num_gaps)
            there = family.within(there)
            found = errors_at(there)
            if found[2] < error:
                here, (residuals, fitted, error) = there, found
                break
            damping *= DAMPED
        damping = max(damping / DAMPED, LEAST_DAMPING)
        if error > before * (1 - SETTLED):
            break
    return fitted, error
