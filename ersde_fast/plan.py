"""The plan of a sampling run: every weight of every step, from the schedule alone, in float64, before the run starts.

With `er_lambda = sigma / alpha`, s the current time, t the next and phi the noise scaler, one step of an ER-SDE solver
(arXiv 2309.06169) is the linear combination

    x_next = w_x x + sum_j w_d[j] denoised_j + w_noise z,        j = 0 newest
    rho = (phi_t / l_t) / (phi_s / l_s),   w_x = (sigma_t / sigma_s) rho,   w_noise = s_noise sigma_t sqrt(1 - rho^2)

and no weight depends on data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .choice import NODE_SCALE, ORDER, UNTOLD, chosen
from .extension import _C
from .noise_scaler import NoiseScaler, get_noise_scaler, nonnegative

EPS = torch.finfo(torch.float64).eps
CPU = torch.device("cpu")  # named in every factory: the user may have set another default device
MAX_ORDER = {"taylor": 3, "newton": 5}

_GAUSS_X, _GAUSS_W = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(16))

PREDICTION_TYPES = ("sample", "epsilon", "v", "flow")
COLUMNS_BEHIND = 2 * len(PREDICTION_TYPES) + 1  # behind w_noise in a table; kColumnsBehind of csrc/er_sde_step.h


class Row(NamedTuple):
    """One step as Python numbers: its weights, of which `w_d` ends at the oldest prediction that the step reads, the factors of
    x and of the model's output in the prediction for each of PREDICTION_TYPES, and the counter of its portable noise."""

    w_x: float
    w_d: tuple[float, ...]
    w_noise: float
    predictions: tuple[tuple[float, float], ...]
    counter: int

    @classmethod
    def of(cls, columns: Sequence) -> "Row":
        """From the columns of a table, numbers or tensors; `w_d` has the length of the order."""
        order = len(columns) - 2 - COLUMNS_BEHIND
        pairs, counter = columns[order + 2 : -1], columns[-1]
        return cls(
            columns[0], tuple(columns[1 : order + 1]), columns[order + 1], tuple(zip(pairs[::2], pairs[1::2], strict=True)),
            counter.long() if isinstance(counter, Tensor) else int(counter),
        )  # fmt: skip


class _Table:
    """What a plan and a stack of plans share: rows that say all that a step needs, on one device.

    A row is w_x | w_d[0] ... w_d[order - 1] | w_noise | for each of PREDICTION_TYPES the factors of x and of the model's output |
    the counter of the portable noise.
    """

    table: Tensor

    @property
    def num_steps(self) -> int:
        return self.table.shape[-2]

    @property
    def order(self) -> int:
        """The largest order of any step."""
        return self.table.shape[-1] - 2 - COLUMNS_BEHIND

    @property
    def weights(self) -> Tensor:
        """float64 [..., num_steps, order + 2], columns w_x | w_d[0] ... w_d[order - 1] | w_noise."""
        return self.table[..., : self.order + 2]

    def to(self, device: torch.device | str):
        """The same with its tensors on a device, for steps whose index lies there; made once for each device."""
        device = torch.empty(0, device=device).device  # with its index
        if device == self.table.device:
            return self
        if device not in self._copies:
            with torch.inference_mode(False):
                moved = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
            self._copies[device] = replace(self, **moved)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict:
        return {}


@dataclass(frozen=True, eq=False)
class Plan(_Table):
    """What `er_sde_plan` returns. Immutable: any number of runs, threads and batches may share one.

    Attributes:
        sigmas, alphas, er_lambdas: float64 tensors [num_steps + 1], on the CPU or where `sigmas` were.
        weights: float64 tensor [num_steps, order + 2], columns w_x | w_d[0] ... w_d[order - 1] | w_noise.
        orders: the order asked for at each step; where `guidance` chooses it, the largest that it may choose.
        guidance: what order and node_scale of each step are chosen for; None where they are named.
        draws: whether any step adds noise; of a plan on a device, whether one can.
        first_step: step i draws the portable noise of step `first_step + i`.
    """

    sigmas: Tensor
    alphas: Tensor
    er_lambdas: Tensor
    table: Tensor
    draws: bool
    orders: tuple[int, ...]
    process: str | None
    noise_scaler: NoiseScaler
    method: str
    node_scale: float | None
    integration_points: int | None
    s_noise: float
    eta: float
    guidance: float | None
    first_step: int = 0

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the table as Python numbers; waits for the device of a plan that lies on one."""
        rows = map(Row.of, self.table.tolist())
        return tuple(
            row._replace(w_d=row.w_d[: max((j + 1 for j, w in enumerate(row.w_d) if w != 0), default=0)]) for row in rows
        )

    def starting_at(self, i: int) -> "Plan":
        """The plan of the remaining steps from step i, begun without history, as image-to-image runs do.

        Args:
            i: 0 to num_steps - 1; `first_step` grows by it, so the noise of a step stays its own.
        """
        if not 0 <= i < self.num_steps:
            raise ValueError(f"i must be 0 to {self.num_steps - 1} (the plan has {self.num_steps} steps), got {i}")
        return _build(
            self.sigmas[i:], None if self.process else self.alphas[i:], self.orders[i:], self.process, self.noise_scaler,
            self.method, self.node_scale, self.integration_points, self.s_noise, self.eta, self.guidance, self.first_step + i,
        )  # fmt: skip

    def check(self) -> None:
        """Says what is wrong with a plan that was built on a device, where a step that cannot be is a row of NaN.

        Waits for the device. A plan of the host was checked when it was built.

        Raises:
            ValueError: what `er_sde_plan` says of the same schedule on the host.
        """
        _build_by_torch(
            self.sigmas.to(CPU, torch.float64), None if self.process else self.alphas.to(CPU), self.orders, self.process,
            self.noise_scaler, self.method, self.node_scale, self.integration_points, self.s_noise, self.eta, self.guidance,
            self.first_step,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PlanStack(_Table):
    """What `stack_plans` returns: the tables of several plans in one, for batches whose samples follow different plans.

    Attributes:
        weights: float64 tensor [num_plans, num_steps, order + 2]; a row behind a shorter plan's last is NaN.
        draws: whether any step of any plan adds noise.
    """

    table: Tensor
    draws: bool

    @property
    def num_plans(self) -> int:
        return self.table.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Of the weights: [num_plans, num_steps, order + 2]."""
        return self.weights.shape


@torch.inference_mode(False)  # or what is made under inference mode cannot be trained with
def stack_plans(plans: Sequence[Plan]) -> PlanStack:
    """Stacks plans so that each sample of a batch can be at its own step of its own plan, in one kernel.

    Args:
        plans: at least one, all on one device; their numbers of steps and their orders may differ.
    """
    if not isinstance(plans, Sequence) or not plans or not all(isinstance(plan, Plan) for plan in plans):
        raise TypeError(f"plans must be a list of at least one plan of er_sde_plan, got {plans!r}")
    devices = {plan.table.device for plan in plans}
    if len(devices) > 1:
        raise ValueError(f"plans must be on one device, got {', '.join(sorted(map(str, devices)))}: use plan.to(device)")
    order, num_steps = max(plan.order for plan in plans), max(plan.num_steps for plan in plans)
    table = torch.full((len(plans), num_steps, order + 2 + COLUMNS_BEHIND), math.nan, dtype=torch.float64, device=devices.pop())
    table[:, :, -1] = 0
    for rows, plan in zip(table, plans, strict=True):
        rows = rows[: plan.num_steps]
        rows[:, : plan.order + 1] = plan.table[:, : plan.order + 1]
        rows[:, plan.order + 1 : order + 1] = 0
        rows[:, order + 1 :] = plan.table[:, plan.order + 1 :]
    return PlanStack(table, any(plan.draws for plan in plans))


def er_sde_plan(
    sigmas: Tensor | Sequence[float] | np.ndarray,
    alphas: Tensor | Sequence[float] | np.ndarray | None = None,
    process: str = "ve",
    order: int | Sequence[int] | None = None,
    noise_scaler: str | NoiseScaler | Callable[[Tensor], Tensor] = "sde_5",
    method: str | None = None,
    node_scale: float | None = None,
    integration_points: int | None = None,
    s_noise: float = 1.0,
    eta: float = 1.0,
    guidance: float | None = None,
) -> Plan:
    """Builds the weights of an ER-SDE sampling run.

    Where order, method, node_scale and integration_points are all left out, order and node_scale are chosen for each step by its
    two levels and the guidance.

    Args:
        sigmas: [num_steps + 1] noise levels, non-increasing, the last may be 0. Any device and float dtype; computed in
            float64. A level that is repeated, to four ulps of its own precision, is an identity step; one that rounding put
            below 0, or above 1 where the process ends there, is 0 or 1. The plan of a CUDA tensor is built there by one kernel,
            without waiting for the device; what is wrong with it is then NaN in the rows concerned, and `plan.check()` says
            what. (With a function as noise_scaler, and without the CUDA extension, it is built on the host.)
        alphas: [num_steps + 1] signal levels; None takes them from `process`.
        process: "ve": alpha = 1. "vp": alpha = sqrt(1 - sigma^2). "flow": alpha = 1 - sigma.
        order: 1 to 5 ("newton") or 1 to 3 ("taylor"), or one such number for each step. A step uses as many predictions
            as its order and the history allow. None is 3, as the paper's, or what guidance chooses: 4 and 5 gain little, and
            amplify a model's errors more.
        noise_scaler: "ode", "sde", "sde_1" to "sde_5" (the paper's appendix A.8), "reverse_time_sde(eta)", or phi itself: a
            function of a float64 tensor of er_lambdas, elementwise. "sde_5", the paper's: as near to the model's limit as
            "ode" from 8 evaluations on, and the noise still takes some of the model's errors back.
        method: "newton" integrates the polynomial through the history exactly and has the true order n. "taylor" is the
            paper's rule. None is "newton", which is ahead of the paper's rule on every problem of docs/quality.md, or "taylor"
            where integration_points are given.
        node_scale: newton only; the history is interpolated in `l / (1 + l / node_scale)`, in which it is closer to a
            polynomial. inf is er_lambda itself. None is inf where a method is named, and where none is 10 or what guidance
            chooses: 10 is ten times the standard deviation of latents and some twenty times that of images in [-1, 1], since too
            small a scale costs more than too large a one, and amplifies a model's errors at high noise.
        integration_points: taylor only; None integrates exactly, a number takes the left Riemann sum of that many points
            (100: the authors' code, 200: ComfyUI).
        s_noise: multiplies the noise.
        eta: the strength of the noise scaler, at least 0: log(phi(l) / l) grows by eta times as much. 0 is the ODE, whatever
            the scaler; "sde" at eta is "reverse_time_sde(eta)". The marginals stay those of the process, unlike with s_noise.
        guidance: the scale of the model's classifier-free guidance, 1 for none, for which order and node_scale are chosen. Above
            er_lambda 1 guidance multiplies what extrapolation amplifies, so from guidance 2 on steps there have order 2, and a
            node_scale that grows with guidance and with the step, 4 guidance er_lambda_s / er_lambda_t; all others have order 3
            and node_scale 10. None is 2.5, which no guidance turns to garbage; who knows better gains by saying so.

    Raises:
        ValueError, TypeError: naming the argument, its value and the remedy.
    """
    if not isinstance(process, str) or process not in PROCESSES:
        raise ValueError(f'process must be "ve", "vp" or "flow", got {process!r}')
    named = {"order": order, "method": method, "node_scale": node_scale, "integration_points": integration_points}
    named = {name: value for name, value in named.items() if value is not None}
    if guidance is not None:
        guidance = nonnegative("guidance", guidance)
        if named:
            given = ", ".join(f"{name}={value!r}" for name, value in named.items())
            raise ValueError(
                f"guidance chooses order and node_scale, so it cannot be told with {given}: leave out one or the other"
            )
    elif not named:
        guidance = UNTOLD
    by_default = method is None and integration_points is None
    if method is None:
        method = "newton" if by_default else "taylor"
    if order is None:
        order = ORDER
    if not isinstance(method, str) or method not in MAX_ORDER:
        raise ValueError(f'method must be None, "newton" or "taylor", got {method!r}')
    if node_scale is None:
        node_scale = NODE_SCALE if by_default else math.inf
    if not (isinstance(node_scale, (int, float)) and node_scale > 0):
        raise ValueError(f"node_scale must be a positive number or inf, got {node_scale!r}")
    if node_scale != math.inf and method == "taylor":
        raise ValueError(f'node_scale needs method="newton", got node_scale={node_scale!r} with method="taylor"')
    if integration_points is not None:
        if method != "taylor":
            raise ValueError(f'integration_points needs method="taylor", got {integration_points!r} with method="{method}"')
        if not _is_int(integration_points) or not 1 <= integration_points <= 10**6:
            raise ValueError(f"integration_points must be None or a whole number from 1 to 10^6, got {integration_points!r}")
    s_noise, eta = nonnegative("s_noise", s_noise), nonnegative("eta", eta)
    noise_scaler = get_noise_scaler(noise_scaler)
    by_kernel = noise_scaler.form is not None and _C is not None
    device = sigmas.device if by_kernel and _C.has_cuda and isinstance(sigmas, Tensor) and sigmas.is_cuda else CPU
    sigmas = _schedule("sigmas", sigmas, device, MAX_SIGMA.get(process if alphas is None else None, math.inf))
    if alphas is not None:
        process, alphas = None, _schedule("alphas", alphas, device, math.inf)
        if len(alphas) != len(sigmas):
            raise ValueError(f"alphas must have the length of sigmas, {len(sigmas)}, got {len(alphas)}")
    return _build(
        sigmas, alphas, _orders(order, len(sigmas) - 1, method), process, noise_scaler, method,
        float(node_scale) if named else None, integration_points, s_noise, eta, guidance, 0,
    )  # fmt: skip


PROCESSES = {
    "ve": torch.ones_like,
    "vp": lambda sigma: torch.sqrt((1 - sigma) * (1 + sigma)),
    "flow": lambda sigma: 1 - sigma,
}
MAX_SIGMA = {"vp": 1.0, "flow": 1.0}


def on_host(values):
    """A schedule on the CPU; what is none stays as it is, for er_sde_plan to refuse."""
    return values.cpu() if isinstance(values, Tensor) and not values.is_meta else values


def _is_int(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _schedule(name: str, values, device: torch.device, largest: float) -> Tensor:
    """A schedule argument as a tensor of its own on the device, float64 (there also float32). Half precision is bounded here:
    its rounding does not show afterwards."""
    try:
        if isinstance(values, np.ndarray):
            if np.iscomplexobj(values):
                raise TypeError(f"they are {values.dtype}")
            values = torch.as_tensor(values.copy(), device=CPU)  # a flipped schedule has negative strides, which are refused
        values = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64, device=CPU)
        if values.is_complex() or values.layout != torch.strided:
            raise TypeError(f"they are {values.dtype}, {values.layout}")
        as_it_is = device != CPU and values.dtype in (torch.float32, torch.float64)
        schedule = values.detach().to(device, values.dtype if as_it_is else torch.float64, copy=device == CPU)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a list, array or tensor of real numbers, got {type(values).__name__}: {error}"
        ) from None
    if schedule.dim() != 1 or len(schedule) < 2:
        raise ValueError(f"{name} must be one-dimensional with at least 2 values, got shape {tuple(schedule.shape)}")
    if values.dtype in (torch.bfloat16, torch.float16):
        schedule = _bounded(schedule, largest, 4 * torch.finfo(values.dtype).eps)
    return schedule


def _bounded(levels: Tensor, largest: float, rounding: Tensor | float) -> Tensor:
    """Levels from 0 to `largest` where rounding alone put them outside."""
    near = (levels >= -rounding) & (levels <= largest + rounding)
    return torch.where(near, levels.clamp(0, largest), levels)


def _rounding(values: Tensor) -> Tensor:
    """Four ulps of each number's own precision, relative: float32's where that holds the number, whatever carries it here."""
    return 4 * torch.where(values.float() == values, torch.full_like(values, torch.finfo(torch.float32).eps), EPS)


def _repeated(levels: Tensor) -> Tensor:
    """[num_steps] of bool: which levels their successors repeat, up to rounding."""
    rounding = _rounding(levels)
    return (levels[1:] - levels[:-1]).abs() <= torch.minimum(rounding[1:], rounding[:-1]) * levels[:-1]


def _orders(order, num_steps: int, method: str) -> tuple[int, ...]:
    """The order argument as one number a step."""
    orders = [order] * num_steps if _is_int(order) else order
    if not isinstance(orders, Sequence) or isinstance(orders, str) or not all(_is_int(o) for o in orders):
        raise TypeError(f"order must be a whole number or one for each step, got {order!r}")
    if len(orders) != num_steps:
        raise ValueError(f"order must be one number or {num_steps}, one for each step, got {len(orders)}")
    for step, o in enumerate(orders):
        if not 1 <= o <= MAX_ORDER[method]:
            raise ValueError(f'order must be 1 to {MAX_ORDER[method]} for method="{method}", got {o} at step {step}')
    return tuple(int(o) for o in orders)


@torch.inference_mode(False)
def _build(sigmas, alphas, orders, process, noise_scaler, *options) -> Plan:
    """The plan of a schedule, `alphas` or `process` given: by the kernel where it can, else, and to say what is wrong, here."""
    if noise_scaler.form is not None and _C is not None:
        plan = _build_by_kernel(sigmas, alphas, orders, process, noise_scaler, *options)
        if sigmas.device != CPU or not plan.table[:, 0].isnan().any():
            return plan
    return _build_by_torch(sigmas, alphas, orders, process, noise_scaler, *options)


def _build_by_torch(
    sigmas, alphas, orders, process, noise_scaler, method, node_scale, integration_points, s_noise, eta, guidance, first_step
) -> Plan:
    """The plan of any noise scaler, on the host, every step of it checked."""
    sigmas = _bounded(sigmas, MAX_SIGMA.get(process, math.inf), _rounding(sigmas))
    _check_levels("sigmas", sigmas)
    if process is None:
        alphas = _bounded(alphas, math.inf, _rounding(alphas))
        _check_levels("alphas", alphas)
    elif (beyond := sigmas > MAX_SIGMA.get(process, math.inf)).any():
        at = int(beyond.nonzero()[0])
        raise ValueError(f'sigmas must be at most 1 for process "{process}", got sigmas[{at}] = {sigmas[at].item()}')
    repeated = _repeated(sigmas) if process else _repeated(sigmas) & _repeated(alphas)
    if process:
        alphas = PROCESSES[process](sigmas)
    er_lambdas = sigmas / alphas
    if (empty := (alphas == 0) & (sigmas == 0)).any():
        raise ValueError(f"alphas and sigmas must not both be 0, as at index {int(empty.nonzero()[0])}")
    rising = (er_lambdas[1:] > er_lambdas[:-1]) & ~repeated
    if rising.any():
        at = int(rising.nonzero()[0]) + 1
        raise ValueError(
            f"sigmas must not rise: er_lambda = sigma / alpha goes from {er_lambdas[at - 1].item()} at index {at - 1} "
            f"to {er_lambdas[at].item()} at index {at}; sort the schedule from noise to data"
        )
    if math.isinf(er_lambdas[0]) and not math.isinf(er_lambdas[-1]) and not noise_scaler.at_infinity and eta:
        raise ValueError(
            f"noise_scaler {noise_scaler.name} has no limit at er_lambda = inf, where the schedule starts (alpha = 0): "
            f"start it below, with sigmas[0] < 1, or use another noise_scaler"
        )
    weights = _weights(
        sigmas,
        alphas,
        er_lambdas,
        repeated,
        orders,
        noise_scaler,
        method,
        node_scale,
        integration_points,
        s_noise,
        eta,
        guidance,
    )
    table = torch.cat([weights, _behind(sigmas[:-1], alphas[:-1], first_step)], dim=1)
    draws = bool((weights[:, -1] != 0).any())
    return Plan(
        sigmas, alphas, er_lambdas, table, draws, orders, process, noise_scaler, method, node_scale, integration_points, s_noise,
        eta, guidance, first_step,
    )  # fmt: skip


def _check_levels(name: str, levels: Tensor) -> None:
    bad = ~(torch.isfinite(levels) & (levels >= 0))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be finite and at least 0, got {name}[{at}] = {levels[at].item()}")


def _behind(sigma: Tensor, alpha: Tensor, first_step: int) -> Tensor:
    """The columns behind the weights, [num_steps, COLUMNS_BEHIND]: denoised = p_x x + p_m output for each prediction type.

    x = alpha denoised + sigma epsilon, v = alpha epsilon - sigma denoised, flow = epsilon - denoised.
    """
    power, total = alpha**2 + sigma**2, alpha + sigma
    factors = {
        "sample": (torch.zeros_like(alpha), torch.ones_like(alpha)),
        "epsilon": (1 / alpha, -sigma / alpha),
        "v": (alpha / power, -sigma / power),
        "flow": (1 / total, -sigma / total),
    }
    counter = (first_step + torch.arange(len(sigma), device=CPU)) % 2**32
    return torch.stack([*(f for name in PREDICTION_TYPES for f in factors[name]), counter.double()], dim=1)


def _build_by_kernel(
    sigmas, alphas, orders, process, noise_scaler, method, node_scale, integration_points, s_noise, eta, guidance, first_step
) -> Plan:
    """The plan of a named scaler, where sigmas lie, by csrc/er_sde_plan.h: nothing waits for a device, and a step that cannot be
    is a row of NaN."""
    alike, strength = len(set(orders)) == 1, noise_scaler.strength * eta
    by_step = None if alike else torch.tensor(orders, dtype=torch.int32, device=CPU).to(sigmas.device, non_blocking=True)
    table, schedule = _C.plan(
        sigmas, alphas, 0 if process is None else 1 + list(PROCESSES).index(process), max(orders), by_step,
        noise_scaler.form, strength, list(MAX_ORDER).index(method), node_scale, integration_points or 0, s_noise, guidance, first_step,
    )  # fmt: skip
    if sigmas.device == CPU:
        draws = bool((table[:, max(orders) + 1] != 0).any())
    else:
        draws = s_noise != 0 and strength != 0
    return Plan(
        *schedule, table, draws, orders, process, noise_scaler, method, node_scale, integration_points, s_noise, eta, guidance,
        first_step,
    )  # fmt: skip


def _weights(
    sigmas, alphas, er_lambdas, repeated, orders, noise_scaler, method, node_scale, integration_points, s_noise, eta, guidance
) -> Tensor:
    """The table [num_steps, order + 2], and the check of its invariants."""
    order = max(orders)
    l_s, l_t = er_lambdas[:-1], er_lambdas[1:]
    if guidance is None:
        orders, node_scales = torch.tensor(orders, device=CPU), torch.full_like(l_s, node_scale)
    else:
        orders, node_scales = chosen(l_s, l_t, guidance)
    weights = torch.zeros(len(l_s), order + 2, dtype=torch.float64, device=CPU)

    still = repeated | (l_s == l_t)
    ratio = torch.where(alphas[:-1] > 0, alphas[1:] / alphas[:-1], sigmas[1:] / sigmas[:-1])
    weights[:, 0] = torch.where(repeated, 1.0, torch.where(still, ratio, 0.0))
    last = (l_t == 0) & ~still
    weights[:, 1] = torch.where(last, alphas[1:], 0.0)

    steps = (~still & ~last).nonzero()[:, 0]
    if len(steps) == 0:
        return weights
    l_s, l_t, alpha_t, sigma_t = l_s[steps], l_t[steps], alphas[1:][steps], sigmas[1:][steps]
    distance = _log_ratio(l_s, l_t)
    growth = partial(noise_scaler.log_growth, eta=eta)
    log_rho = -growth(l_t, distance)
    inadmissible = ~(log_rho <= 8 * EPS)
    if inadmissible.any():
        at = int(inadmissible.nonzero()[0])
        raise ValueError(
            f"noise_scaler {noise_scaler.name} is inadmissible at step {int(steps[at])}: phi(l) / l must not decrease with l, "
            f"but does from er_lambda {l_t[at].item()} to {l_s[at].item()}; use another noise_scaler or a shorter schedule"
        )
    log_rho = torch.where(log_rho >= -8 * EPS, 0.0, log_rho)
    weights[steps, 0] = sigma_t / sigmas[:-1][steps] * torch.exp(log_rho)
    weights[steps, -1] = s_noise * sigma_t * torch.sqrt(torch.expm1(2 * log_rho).abs())
    total = -alpha_t * torch.expm1(log_rho - distance)
    weights[steps, 1] = total

    uses = _distinct_nodes(er_lambdas, still, orders, node_scales)[steps]
    for n in range(2, order + 1):
        rows = (uses.sum(1) == n).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        slots = torch.argsort((~uses[rows]).to(torch.uint8), dim=1, stable=True)[:, :n]
        nodes, scales = er_lambdas[steps[rows, None] - slots], node_scales[steps[rows]]
        panel = _panels(l_s[rows], l_t[rows], growth, scales, integration_points)
        rule = _newton if method == "newton" else _taylor
        weights[steps[rows, None], 1 + slots] += alpha_t[rows, None] * rule(panel, nodes, scales)

    w_d = weights[steps, 1:-1]
    exact = (w_d.sum(1) - total).abs() <= 1e-10 * w_d.abs().sum(1)
    if not (torch.isfinite(weights).all() and exact.all()):
        broken = ~(torch.isfinite(weights[steps]).all(1) & exact)
        at = int(steps[int(broken.nonzero()[0])]) if broken.any() else int((~torch.isfinite(weights).all(1)).nonzero()[0])
        raise ValueError(
            f"sigmas give no finite, consistent weights at step {at}, from er_lambda {er_lambdas[at].item()} "
            f"to {er_lambdas[at + 1].item()}; space the schedule more evenly or lower the order there"
        )
    return weights


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a / b) for a >= b > 0, to full relative precision where they are close."""
    return torch.where(a < 2 * b, torch.log1p((a - b) / b), torch.log(a) - torch.log(b))


def _distinct_nodes(er_lambdas: Tensor, still: Tensor, orders: Tensor, node_scales: Tensor) -> Tensor:
    """Which of the order newest predictions each step interpolates, [num_steps, order] of bool.

    Of repeated nodes only the newest counts; a node at infinity counts only where node_scale makes it an ordinary one.
    """
    num_steps, order = len(orders), int(orders.max())
    step, slot = torch.arange(num_steps, device=CPU)[:, None], torch.arange(order, device=CPU)
    node = (step - slot).clamp(min=0)
    usable = (slot <= step) & (slot < orders[:, None])
    usable &= (slot == 0) | ~still[node]
    return usable & ((slot == 0) | torch.isfinite(er_lambdas[node]) | torch.isfinite(node_scales)[:, None])


class _Panels(NamedTuple):
    """Quadrature of `integral from l_t to l_s of (1 - phi_t / phi(l)) f(l) dl` over many steps at once.

    Panel p belongs to row `row[p]`, has nodes `l[p]` and weights `w[p]` that hold the kernel and the measure.
    """

    row: Tensor
    l: Tensor
    w: Tensor
    num_rows: int

    def integrate(self, f: Tensor) -> Tensor:
        return torch.zeros(self.num_rows, dtype=torch.float64, device=CPU).index_add_(0, self.row, (self.w * f).sum(1))


def _panels(l_s: Tensor, l_t: Tensor, growth: Callable, node_scale: Tensor, points: int | None) -> _Panels:
    if points is not None:
        # Existing samplers sum only the 1/phi part, from the left; the part without it they integrate exactly. Their rule
        # is kept as it is: the weight of the exact part is carried by two nodes that integrate linear functions.
        return _riemann_panels(l_s, l_t, growth, points)
    reach = torch.minimum(_log_ratio(l_s, l_t), math.log(1e17) + torch.log(torch.maximum(l_t, node_scale)) - torch.log(l_t))
    count = torch.ceil(reach / 2).clamp(min=1).long()
    row, index = (torch.arange(int(count.max()), device=CPU) < count[:, None]).nonzero(as_tuple=True)
    width = (reach / count)[row, None]
    y = width * (index[:, None] + (1 + _GAUSS_X) / 2)
    l = l_t[row, None] * torch.exp(y)
    kernel = -torch.expm1(-(y + growth(l_t[row, None], y)))
    return _Panels(row, l, kernel * l * width / 2 * _GAUSS_W, len(l_s))


def _riemann_panels(l_s: Tensor, l_t: Tensor, growth: Callable, points: int) -> _Panels:
    h = ((l_s - l_t) / points)[:, None]
    l = l_t[:, None] + h * torch.arange(points, dtype=torch.float64, device=CPU)
    y = _log_ratio(l, l_t[:, None])
    inverse = torch.exp(-(y + growth(l_t[:, None], y)))
    ends = torch.stack([l_t, l_s], dim=1)
    half = ((l_s - l_t) / 2)[:, None].expand(-1, 2)
    return _Panels(
        torch.arange(len(l_s), device=CPU), torch.cat([ends, l], dim=1), torch.cat([half, -h * inverse], dim=1), len(l_s)
    )


def _taylor(panels: _Panels, nodes: Tensor, node_scale: Tensor) -> Tensor:
    """The paper's rule, less the order-1 term: one-sided differences of the history in a Taylor expansion about l_s."""
    l_s = nodes[:, 0]
    c_1 = -panels.integrate(torch.ones_like(panels.l))
    g_1 = l_s - nodes[:, 1]
    k = c_1 / g_1
    if nodes.shape[1] == 2:
        return torch.stack([k, -k], dim=1)
    c_2 = -panels.integrate(panels.l - l_s[panels.row, None])
    g_2 = nodes[:, 1] - nodes[:, 2]
    e = 2 * c_2 / (g_1 + g_2)
    return torch.stack([k + e / g_1, -(k + e * (1 / g_1 + 1 / g_2)), e / g_2], dim=1)


def _newton(panels: _Panels, nodes: Tensor, node_scale: Tensor) -> Tensor:
    """Less the order-1 term: -integral of (1 - phi_t / phi) dL_j(u(l)) for every Lagrange basis polynomial L_j on the nodes."""
    n = nodes.shape[1]
    scale = node_scale[panels.row, None]
    from_node = [_u_difference(panels.l, nodes[panels.row, k, None], scale) for k in range(n)]
    du_dl = (1 + panels.l / scale) ** -2
    columns = []
    for j in range(n):
        others = [k for k in range(n) if k != j]
        numerator = sum(math.prod(from_node[k] for k in others if k != m) for m in others)
        denominator = math.prod(_u_difference(nodes[:, j], nodes[:, k], node_scale) for k in others)
        columns.append(-panels.integrate(numerator * du_dl) / denominator)
    return torch.stack(columns, dim=1)


def _u_difference(a: Tensor, b: Tensor, node_scale: Tensor) -> Tensor:
    """u(a) - u(b) for u(l) = l / (1 + l / node_scale), without cancellation; a or b may be infinite if node_scale is not."""
    difference = (a - b) / ((1 + a / node_scale) * (1 + b / node_scale))
    difference = torch.where(torch.isinf(a), node_scale / (1 + b / node_scale), difference)
    return torch.where(torch.isinf(b), -node_scale / (1 + a / node_scale), difference)
