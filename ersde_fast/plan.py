"""The plan of a sampling run: every weight of every step, from the schedule alone, in float64, before the run starts.

With `er_lambda = sigma / alpha`, s the current time, t the next and phi the noise scaler, one step of an ER-SDE solver
(arXiv 2309.06169) is the linear combination

    x_next = w_x x + sum_j w_d[j] denoised_j + w_noise z,        j = 0 newest
    rho = (phi_t / l_t) / (phi_s / l_s),   w_x = (sigma_t / sigma_s) rho,   w_noise = s_noise sigma_t sqrt(1 - rho^2)

and no weight depends on data.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backends import BACKENDS, Backend
from .choice import NODE_SCALE, ORDER, UNTOLD
from .levels import CPU, Levels, Process, checked_levels, level_arguments, on_host, real_tensor
from .noise_scaler import AnyNoiseScaler, NoiseScaler, get_noise_scaler, nonnegative
from .report import CalibrationReport
from .table import COUNTER, P_M, W_D, W_NOISE, W_X, Row, Table
from .tracing import numbers_of
from .weights import Eta, Method, PlanOptions, each_eta, fill_weights

MAX_ORDER: dict[Method, int] = {"taylor": 3, "newton": 5}


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan(Table, PlanOptions):
    """What `er_sde_plan`, `Plan.from_weights` and `Plan.load` return. Immutable: any number of runs, threads and batches may share one.
    Source: arXiv 2309.06169.

    Attributes:
        sigmas, alphas, er_lambdas: float64 tensors [num_steps + 1], on the CPU or where `sigmas` were.
        weights: float64 tensor [num_steps, order + 2], columns w_x | w_d[0] ... w_d[order - 1] | w_noise.
        draws: whether any step adds noise; of a plan on a device, whether one can.
        orders, guidance, first_step and the others: see PlanOptions.
        report: of `calibrate_plan`, what it did; else None.
    """

    sigmas: Tensor
    alphas: Tensor
    er_lambdas: Tensor
    report: CalibrationReport | None = None

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the table as Python numbers; waits for the device of a plan that lies on one."""
        rows = map(Row.of, numbers_of(self.table))
        return tuple(
            row._replace(w_d=row.w_d[: max((j + 1 for j, w in enumerate(row.w_d) if w != 0), default=0)]) for row in rows
        )

    def levels(self) -> tuple[Tensor, Tensor]:
        return self.alphas[:-1], self.sigmas[:-1]

    def data_std(self) -> Tensor | None:
        return None if self.sigma_data is None else torch.full_like(self.alphas[:-1], self.sigma_data)

    @property
    def options(self) -> PlanOptions:
        return PlanOptions(**{f.name: getattr(self, f.name) for f in fields(PlanOptions)})

    def starting_at(self, i: int) -> "Plan":
        """The plan of the remaining steps from step i, begun without history, as image-to-image runs do.

        Args:
            i: 0 to num_steps - 1; `first_step` grows by it, so the noise of a step stays its own.

        Raises:
            ValueError: for another i, and where weights that were given read a prediction from before step i.
        """
        if not 0 <= i < self.num_steps:
            raise ValueError(f"i must be 0 to {self.num_steps - 1} (the plan has {self.num_steps} steps), got {i}")
        if self.method is None:
            return self._given_from(i)
        eta = self.eta if isinstance(self.eta, float) else self.eta[i:]
        options = replace(self.options, orders=self.orders[i:], eta=eta, first_step=self.first_step + i)
        return _build(self.sigmas[i:], None if self.process else self.alphas[i:], options)

    def _given_from(self, i: int) -> "Plan":
        """`starting_at` of a plan whose weights were given, which are not made anew."""
        weights, sigmas, alphas = (values[i:].to(CPU) for values in (self.weights, self.sigmas, self.alphas))
        schedules = sigmas, None if self.process else alphas, self.process
        try:
            rest = _of_weights(weights, *schedules, self.first_step + i, self.sigma_data)
        except ValueError as error:
            raise ValueError(f"i must be a step from which on no older prediction is read, got {i}: {error}") from None
        return rest.to(self.table.device)

    def check(self) -> None:
        """Says what is wrong with a plan that was built on a device, where a step that cannot be is a row of NaN.

        Waits for the device. A plan of the host was checked when it was built.

        Raises:
            ValueError: what `er_sde_plan` says of the same schedule on the host.
        """
        if self.method is None:
            return
        alphas = None if self.process else self.alphas.to(CPU)
        options = replace(self.options, eta=strengths("eta", self.eta, self.num_steps, CPU))
        _build_by_torch(self.sigmas.to(CPU, torch.float64), alphas, options)

    @classmethod
    def from_weights(
        cls,
        weights: Tensor | np.ndarray | Sequence[Sequence[float]],
        sigmas: Tensor | Sequence[float] | np.ndarray,
        alphas: Tensor | Sequence[float] | np.ndarray | None = None,
        process: Process = "ve",
        sigma_data: float | None = None,
    ) -> "Plan":
        """The plan of weights of one's own: any linear multistep step runs on the fused kernels, with noise, graphs, batches and
        log-densities. It lies on the CPU; `plan.to(device)` moves it.

        Args:
            weights: [num_steps, order + 2], columns w_x | w_d[0] ... w_d[order - 1] | w_noise, order 1 to 5; any device and real
                dtype, taken as float64.
            sigmas, alphas, process: the levels, as in `er_sde_plan`: what a model is asked at, and its output is read by.
            sigma_data: see there.

        Raises:
            ValueError, TypeError: naming the argument, its value and the remedy; for a step that reads predictions from before the
                run, too.
        """
        weights, _ = real_tensor("weights", weights, CPU)
        schedules = level_arguments(on_host(sigmas), on_host(alphas), process, CPU)
        return _of_weights(weights, *schedules, sigma_data=_checked_sigma_data(sigma_data))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan into the safetensors file `path`, whole or not at all: weights to the bit, levels, and what it was made with.

        Raises:
            ValueError: its noise_scaler is a function, which no file can hold; or it was built on a device, and a step is NaN.
            ImportError: safetensors is not installed.
            OSError: naming the file that could not be written.
        """
        from .plan_file import save  # which builds plans

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """The plan of the file `path` that `save` wrote, on the CPU: the same weights on every machine. It is data, and runs nothing.

        Raises:
            ValueError: naming the file, and what is wrong with it.
            ImportError: safetensors is not installed.
        """
        from .plan_file import load

        return load(path)


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanStack(Table):
    """What `stack_plans` returns: several plans in one, for batches whose samples follow different plans. Source: docs/serving.md.

    Attributes:
        weights: float64 tensor [num_plans, num_steps, order + 2]; a row behind a shorter plan's last is NaN.
        draws: whether any step of any plan adds noise.
        alphas, sigmas: float64 [num_plans, num_steps], where each step starts.
        sigma_data: of each plan.
    """

    alphas: Tensor
    sigmas: Tensor
    sigma_data: tuple[float | None, ...]

    @property
    def num_plans(self) -> int:
        return self.table.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Of the weights: [num_plans, num_steps, order + 2]."""
        return self.weights.shape

    def levels(self) -> tuple[Tensor, Tensor]:
        return self.alphas, self.sigmas

    def data_std(self) -> Tensor | None:
        if None in self.sigma_data:
            return None
        return torch.tensor(self.sigma_data, dtype=torch.float64, device=self.table.device)[:, None]


@torch.inference_mode(False)  # or what is made under inference mode cannot be trained with
def stack_plans(plans: Sequence[Plan]) -> PlanStack:
    """Stacks plans so that each sample of a batch can be at its own step of its own plan, in one kernel. Source: docs/serving.md.

    Args:
        plans: at least one, all on one device; their numbers of steps and their orders may differ.

    Returns: the stack, of weights [num_plans, num_steps, order + 2].

    Raises:
        ValueError, TypeError: for what are no plans, or lie on several devices.
    """
    if not isinstance(plans, Sequence) or not plans or not all(isinstance(plan, Plan) for plan in plans):
        raise TypeError(f"plans must be a list of at least one plan of er_sde_plan, got {plans!r}")
    devices = {plan.table.device for plan in plans}
    if len(devices) > 1:
        raise ValueError(f"plans must be on one device, got {', '.join(sorted(map(str, devices)))}: use plan.to(device)")
    order, num_steps = max(plan.order for plan in plans), max(plan.num_steps for plan in plans)
    plans, device = [plan.predicting("sample") for plan in plans], devices.pop()
    table = torch.full((len(plans), num_steps, W_D + order), math.nan, dtype=torch.float64, device=device)
    alphas, sigmas = torch.full((2, len(plans), num_steps), math.nan, dtype=torch.float64, device=device)
    table[:, :, COUNTER] = 0
    for k, plan in enumerate(plans):
        n, columns = plan.table.shape
        table[k, :n, :columns], table[k, :n, columns:] = plan.table, 0
        alphas[k, :n], sigmas[k, :n] = plan.levels()
    sigma_data = tuple(plan.sigma_data for plan in plans)
    return PlanStack(table=table, draws=any(plan.draws for plan in plans), alphas=alphas, sigmas=sigmas, sigma_data=sigma_data)


def er_sde_plan(
    sigmas: Tensor | Sequence[float] | np.ndarray,
    alphas: Tensor | Sequence[float] | np.ndarray | None = None,
    process: Process = "ve",
    order: int | Sequence[int] | None = None,
    noise_scaler: AnyNoiseScaler = "sde_5",
    method: Method | None = None,
    node_scale: float | None = None,
    integration_points: int | None = None,
    s_noise: float = 1.0,
    eta: float | Sequence[float] | np.ndarray | Tensor = 1.0,
    guidance: float | None = None,
    sigma_data: float | None = None,
) -> Plan:
    """Builds the weights of an ER-SDE sampling run. Source: arXiv 2309.06169; of order and node_scale docs/quality.md.

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
            function of a float64 tensor of er_lambdas, elementwise. docs/choosing.md compares them.
        method: "newton" integrates the polynomial through the history exactly and has the true order n. "taylor" is the
            paper's rule. None is "newton", which is mostly ahead of the paper's rule (docs/quality.md), or "taylor"
            where integration_points are given.
        node_scale: newton only; the history is interpolated in `l / (1 + l / node_scale)`, in which it is closer to a
            polynomial. inf is er_lambda itself. None is inf where a method is named, and where none is 10 or what guidance
            chooses: 10 is ten times the standard deviation of latents and some twenty times that of images in [-1, 1].
        integration_points: taylor only; None integrates exactly, a number takes the left Riemann sum of that many points
            (100: the authors' code, 200: ComfyUI).
        s_noise: multiplies the noise.
        eta: the strength of the noise scaler, at least 0: log(phi(l) / l) grows by eta times as much. 0 is the ODE, whatever
            the scaler; "sde" at eta is "reverse_time_sde(eta)". The marginals stay those of the process, unlike with s_noise.
            Or one number for each step, [num_steps]: with 0 outside a window only the steps in it add noise. A tensor on the
            device of sigmas is read there, and what is wrong with it is NaN in the rows concerned.
        guidance: the scale of the model's classifier-free guidance, 1 for none, for which order and node_scale are chosen. Above
            er_lambda 1 guidance multiplies what extrapolation amplifies, so from guidance 2 on steps there have order 2, and a
            node_scale that grows with guidance and with the step, 4 guidance er_lambda_s / er_lambda_t; all others have order 3
            and node_scale 10. None is 2.5, which no guidance turns to garbage; who knows better gains by saying so.
        sigma_data: of a network inside EDM's preconditioning, the standard deviation of its data: steps from its raw output
            (prediction_type "edm") need it. It changes no weight.

    Returns: the plan, of num_steps steps.

    Raises:
        ValueError, TypeError: naming the argument, its value and the remedy.
    """
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
    if isinstance(node_scale, bool) or not (isinstance(node_scale, Real) and node_scale > 0):
        raise ValueError(f"node_scale must be a positive number or inf, got {node_scale!r}")
    if node_scale != math.inf and method == "taylor":
        raise ValueError(f'node_scale needs method="newton", got node_scale={node_scale!r} with method="taylor"')
    if integration_points is not None:
        if method != "taylor":
            raise ValueError(f'integration_points needs method="taylor", got {integration_points!r} with method="{method}"')
        if not _is_int(integration_points) or not 1 <= integration_points <= 10**6:
            raise ValueError(f"integration_points must be None or a whole number from 1 to 10^6, got {integration_points!r}")
    s_noise = nonnegative("s_noise", s_noise)
    noise_scaler = get_noise_scaler(noise_scaler)
    device, given_on = CPU, sigmas.device if isinstance(sigmas, Tensor) else CPU
    if isinstance(eta, Tensor) and eta.device not in (CPU, given_on):
        raise ValueError(f"eta must be on the CPU or where sigmas are, {given_on}, got {eta.device}: use eta.to(sigmas.device)")
    if isinstance(sigmas, Tensor) and _builder(sigmas.device, noise_scaler) is not None:
        device = sigmas.device
    sigmas, alphas, process = level_arguments(sigmas, alphas, process, device)
    options = PlanOptions(
        process=process,
        orders=_orders(order, len(sigmas) - 1, method),
        noise_scaler=noise_scaler,
        method=method,
        node_scale=float(node_scale) if named else None,
        integration_points=integration_points,
        s_noise=s_noise,
        eta=strengths("eta", eta, len(sigmas) - 1, device),
        guidance=guidance,
        sigma_data=_checked_sigma_data(sigma_data),
    )
    return _build(sigmas, alphas, options)


def _is_int(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _orders(order, num_steps: int, method: Method) -> tuple[int, ...]:
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


def _checked_sigma_data(sigma_data) -> float | None:
    if sigma_data is not None and nonnegative("sigma_data", sigma_data) == 0:
        raise ValueError(f"sigma_data must be above 0, got {sigma_data!r}")
    return None if sigma_data is None else float(sigma_data)


def strengths(name: str, value: Any, num_steps: int, device: torch.device) -> Eta:
    """The argument of that name for a plan on a device: a number, one for each step, or a tensor where only the device knows them."""
    if isinstance(value, (Tensor, np.ndarray)):
        if value.shape != (num_steps,):
            raise ValueError(
                f"{name} must be a number or have shape ({num_steps},), one for each step, got {tuple(value.shape)}"
            )
        if isinstance(value, Tensor) and value.device == device != CPU:
            if value.is_complex():
                raise TypeError(f"{name} must be real, got {value.dtype}")
            return value.detach().to(torch.float64, copy=True)
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"{name} must hold numbers, got a tensor on meta")
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return nonnegative(name, value)
    if len(value) != num_steps:
        raise ValueError(f"{name} must be one number or {num_steps}, one for each step, got {len(value)}")
    return tuple(nonnegative(f"{name}[{step}]", strength) for step, strength in enumerate(value))


@torch.inference_mode(False)
def _build(sigmas: Tensor, alphas: Tensor | None, options: PlanOptions) -> Plan:
    """The plan of a schedule, `alphas` or `process` given: by a kernel where one can, else, and to say what is wrong, here."""
    if _builder(sigmas.device, options.noise_scaler) is not None:
        plan = _build_by_kernel(sigmas, alphas, options)
        if sigmas.device != CPU or not plan.table[:, W_NOISE].isnan().any():
            return plan
    return _build_by_torch(sigmas, alphas, options)


def _builder(device: torch.device, noise_scaler: NoiseScaler) -> Backend | None:
    """The backend that builds plans of that scaler on that device, or None."""
    if noise_scaler.form is None:
        return None
    return next((backend for backend in BACKENDS if backend.builds_plans(device)), None)


def _build_by_torch(sigmas: Tensor, alphas: Tensor | None, options: PlanOptions) -> Plan:
    """The plan of any noise scaler, on the host, every step of it checked."""
    levels, noise_scaler = checked_levels(sigmas, alphas, options.process), options.noise_scaler
    er_lambdas, num_steps = levels.er_lambdas, len(levels.repeated)
    leaves_infinity = er_lambdas[:-1].isinf() & ~er_lambdas[1:].isinf()
    if not noise_scaler.at_infinity and (leaves_infinity & (each_eta(options.eta, num_steps, CPU) != 0)).any():
        raise ValueError(
            f"noise_scaler {noise_scaler.name} has no limit at er_lambda = inf, where the schedule starts (alpha = 0): "
            f"start it below, with sigmas[0] < 1, or use another noise_scaler"
        )
    table = _table_of_zeros(num_steps, max(options.orders), options.first_step)
    fill_weights(table, levels, options)
    return _plan_of(table, levels, options)


def _table_of_zeros(num_steps: int, order: int, first_step: int) -> Tensor:
    table = torch.zeros(num_steps, W_D + order, dtype=torch.float64, device=CPU)
    table[:, COUNTER] = (first_step + torch.arange(num_steps, device=CPU)) % 2**32
    table[:, P_M] = 1
    return table


def _plan_of(table: Tensor, levels: Levels, options: PlanOptions) -> Plan:
    """The plan of a table on the host."""
    draws = bool((table[:, W_NOISE] != 0).any())
    sigmas, alphas, er_lambdas, _ = levels
    return Plan(sigmas=sigmas, alphas=alphas, er_lambdas=er_lambdas, table=table, draws=draws, **vars(options))


@torch.inference_mode(False)
def _of_weights(
    weights: Tensor,
    sigmas: Tensor,
    alphas: Tensor | None,
    process: Process | None,
    first_step: int = 0,
    sigma_data: float | None = None,
) -> Plan:
    """The plan of weights that were given, float64 on the host."""
    levels = checked_levels(sigmas, alphas, process)
    table = table_of_weights(weights, len(levels.repeated), first_step)
    reads = (table[:, W_D:] != 0) * torch.arange(1, table.shape[1] - W_D + 1, device=CPU)
    options = PlanOptions(
        process=process,
        orders=tuple(reads.amax(1).clamp(min=1).tolist()),
        noise_scaler=None,
        method=None,
        node_scale=None,
        integration_points=None,
        s_noise=None,
        eta=None,
        guidance=None,
        first_step=first_step,
        sigma_data=sigma_data,
    )
    return _plan_of(table, levels, options)


def table_of_weights(weights: Tensor, num_steps: int, first_step: int) -> Tensor:
    """The table of weights [num_steps, order + 2], float64 on the host, every one of them checked."""
    largest = max(MAX_ORDER.values())
    if weights.dim() != 2 or not 3 <= weights.shape[1] <= largest + 2:
        raise ValueError(
            f"weights must have shape [num_steps, order + 2], order 1 to {largest}: w_x, w_d[0] ... and w_noise of each step; "
            f"got {tuple(weights.shape)}"
        )
    if len(weights) != num_steps:
        raise ValueError(f"weights must have a row for each of the {num_steps} steps between sigmas, got {len(weights)}")
    if (bad := ~weights.isfinite().all(1)).any():
        raise ValueError(f"weights must be finite, got {weights[bad][0].tolist()} at step {int(bad.nonzero()[0])}")
    if (bad := weights[:, -1] < 0).any():
        raise ValueError(f"w_noise must be at least 0, got {weights[bad][0, -1].item()} at step {int(bad.nonzero()[0])}")
    if len(early := torch.triu(weights[:, 1:-1], 1).nonzero()):
        i, j = early[0].tolist()
        raise ValueError(
            f"weights must not read predictions from before the first step, got w_d[{j}] = {weights[i, 1 + j].item()} at step {i}"
        )
    table = _table_of_zeros(num_steps, weights.shape[1] - 2, first_step)
    table[:, W_X:], table[:, W_NOISE] = weights[:, :-1], weights[:, -1]
    return table


def _build_by_kernel(sigmas: Tensor, alphas: Tensor | None, options: PlanOptions) -> Plan:
    """The plan of a named scaler, where sigmas lie, by csrc/er_sde_plan.h: nothing waits for a device, and a step that cannot be
    is a row of NaN."""
    eta = options.eta
    there = options if isinstance(eta, float) else replace(options, eta=each_eta(eta, len(sigmas) - 1, sigmas.device))
    table, schedule = _builder(sigmas.device, options.noise_scaler).plan(sigmas, alphas, there)
    if sigmas.device == CPU:
        draws = bool((table[:, W_NOISE] != 0).any())
    else:
        draws = options.s_noise != 0 and options.noise_scaler.strength != 0
        draws = draws and (isinstance(eta, Tensor) or (any(eta) if isinstance(eta, tuple) else eta != 0))
    sigmas, alphas, er_lambdas = schedule
    return Plan(sigmas=sigmas, alphas=alphas, er_lambdas=er_lambdas, table=table, draws=draws, **vars(options))
