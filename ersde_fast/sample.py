"""`sample_er_sde`: the sampling loop, with the arguments and conventions of k-diffusion's and ComfyUI's samplers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import trange

from .levels import Process, on_host
from .noise import Seed
from .noise_scaler import AnyNoiseScaler
from .plan import Plan, er_sde_plan
from .request import check_one_source, inside
from .step import fast_step
from .weights import Method


@torch.no_grad()
def sample_er_sde(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | None = None,
    extra_args: dict | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    noise_scaler: AnyNoiseScaler | None = None,
    max_stage: int | None = None,
    *,
    process: Process = "ve",
    method: Method | None = None,
    node_scale: float | None = None,
    integration_points: int | None = None,
    eta: float | Sequence[float] | Tensor = 1.0,
    guidance: float | None = None,
    sigma_data: float | None = None,
    prediction_type: str | None = None,
    cfg_pp: float | None = None,
    generator: torch.Generator | None = None,
    seed: Seed | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Samples with an extended reverse-time SDE solver (arXiv 2309.06169).

    Args:
        model: `model(x, sigma, **extra_args)`, sigma [batch], to the denoised sample.
        x: [batch, ...] the noise to start from, scaled to sigmas[0].
        sigmas: [num_steps + 1], falling, the last usually 0; any device. Left out with a plan.
        extra_args: further arguments of the model.
        callback: called after each model evaluation with a dict of `x`, `i`, `sigma`, `sigma_hat`, `denoised`.
        disable: hides the progress bar.
        s_noise: multiplies the noise.
        noise_sampler: `noise_sampler(sigma, sigma_next)` to standard normal noise of the shape of x; called after the
            model, and only for steps that add noise.
        noise_scaler: None is "sde_5", the paper's.
        max_stage: the order; see `er_sde_plan`.
        process, method, node_scale, integration_points, eta: see `er_sde_plan`.
        guidance: the scale at which the model guides itself, 1 for none: order and node_scale are chosen for it, where neither
            they nor a method are named; see `er_sde_plan`.
        prediction_type, sigma_data: what the model returns instead of the denoised sample, see `fast_step`; the callback is then
            called after the step.
        cfg_pp: the scale of CFG++ (arXiv 2406.08070), 0 to 1 in the paper: the model returns a pair, with the condition and without
            it. The callback is called after the step, and is told the guided prediction.
        generator, seed: torch's stream or the portable stream for the noise; see `fast_step`.
        plan: what to run, such as a plan of `calibrate_plan`, in the place of sigmas and of all that makes a plan of them.

    Returns:
        The sample, [batch, ...], in the dtype of x and the units of the data.

    Raises:
        ValueError, TypeError: what `er_sde_plan` and `fast_step` refuse, naming the argument; and a model that returns no tensor.

    Source: arXiv 2309.06169; arguments and conventions are those of k-diffusion's samplers.
    """
    check_one_source(noise_sampler=noise_sampler, generator=generator, seed=seed)
    source, returns = Source(noise_sampler, generator, seed), Output(prediction_type, cfg_pp)
    if plan is not None:
        told: dict[str, Any] = {
            "sigmas": sigmas,
            "noise_scaler": noise_scaler,
            "max_stage": max_stage,
            "method": method,
            "node_scale": node_scale,
        }
        told |= {"integration_points": integration_points, "guidance": guidance, "sigma_data": sigma_data}
        told |= {"s_noise": None if s_noise == 1 else s_noise, "process": None if process == "ve" else process}
        told |= {"eta": None if isinstance(eta, (int, float)) and eta == 1 else eta}
        _check_nothing_beside(plan, told)
        return sample_plan(plan.to("cpu"), model, x, extra_args, callback, disable, source, returns)
    if sigmas is None:
        raise TypeError("sigmas must be given, or a plan")
    if guidance is not None and max_stage is not None:
        raise ValueError(
            f"guidance chooses the order, so it cannot be told with max_stage={max_stage!r}: leave out one or the other"
        )
    plan = er_sde_plan(
        on_host(sigmas),  # the loop asks the plan which steps draw noise
        process=process,
        order=max_stage,
        noise_scaler="sde_5" if noise_scaler is None else noise_scaler,
        method=method,
        node_scale=node_scale,
        integration_points=integration_points,
        s_noise=s_noise,
        eta=on_host(eta),
        guidance=guidance,
        sigma_data=sigma_data,
    )
    return sample_plan(plan, model, x, extra_args, callback, disable, source, returns)


def _check_nothing_beside(plan: Plan, told: dict) -> None:
    """Raises for what a plan says already."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan must be one of er_sde_plan, calibrate_plan, Plan.from_weights or Plan.load, got {type(plan).__name__}"
        )
    for name, value in told.items():
        if value is not None:
            raise ValueError(f"plan says all that {name} would: leave out {name}={value!r}, or the plan")


class Source(NamedTuple):
    """Where the steps of a run take their noise from; at most one is given, and without any it is torch's default generator.

    Attributes:
        sampler: makes the noise of a step; called for steps that add noise alone.
        generator, seed: as in `fast_step`.
    """

    sampler: Callable[..., Tensor] | None = None
    generator: torch.Generator | None = None
    seed: Seed | None = None

    def of_step(self, plan: Plan, i: int, *told: Tensor) -> dict:
        """The argument of `fast_step` that names it; the sampler is called with what it is told of the step."""
        if self.sampler is None:
            return {"generator": self.generator, "seed": self.seed}
        return {"noise": self.sampler(*told)} if plan.rows[i].w_noise != 0 else {}


DEFAULT = Source()


class Output(NamedTuple):
    """What a model returns, where that is not the denoised sample.

    Attributes:
        prediction_type: as in `fast_step`.
        cfg_pp: the scale of CFG++, of a model that returns a pair: with the condition, and without it.
    """

    prediction_type: str | None = None
    cfg_pp: float | None = None

    def arguments(self, returned) -> tuple[Tensor, dict]:
        """What a step takes for its newest prediction, and the arguments of `fast_step` that say what that is."""
        if self.cfg_pp is None:
            if not isinstance(returned, Tensor):
                raise TypeError(
                    f"model must return a tensor of the shape of x, got {type(returned).__name__}{inside(returned)}"
                )
            return returned, {} if self.prediction_type is None else {"prediction_type": self.prediction_type}
        output, unconditional = checked_pair(returned, "cfg_pp")
        guidance = (unconditional, self.cfg_pp)
        return output, {"prediction_type": self.prediction_type or "sample", "guidance": guidance, "cfg_pp": True}


DENOISED = Output()


def with_newest(denoised: Tensor, history: list[Tensor], plan: Plan) -> list[Tensor]:
    """The history with a prediction in front, and as long as the plan's steps may read."""
    return [denoised, *history[: plan.order - 1]]


def levels_of(plan: Plan, x: Tensor) -> Tensor:
    """The sigmas that a model of x sees, [num_steps + 1]: at least float32, since a half-precision sigma would be another time."""
    return plan.sigmas.to(torch.promote_types(x.dtype, torch.float32)).to(x.device)


@torch.no_grad()
def sample_plan(
    plan: Plan,
    model: Callable[..., Tensor],
    x: Tensor,
    extra_args: dict | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    source: Source = DEFAULT,
    returns: Output = DENOISED,
) -> Tensor:
    """The loop of `sample_er_sde` over a plan on the host. Where the step makes the prediction, the callback is called after it."""
    given = checked_extra_args(extra_args)
    levels = levels_of(plan, x)
    batches, sigmas = (levels[:, None] * levels.new_ones(x.shape[:1])).unbind(), levels.unbind()
    history: list[Tensor] = []
    for i in trange(plan.num_steps, disable=disable):
        seen = {"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i]}
        newest, what = returns.arguments(evaluate(model, x, batches[i], **given))
        history = with_newest(newest, history, plan)
        if callback is not None and not what:
            callback({**seen, "denoised": newest})
        noise = source.of_step(plan, i, sigmas[i], sigmas[i + 1])
        if not what:
            x = fast_step(plan, i, x, history, **noise)
            continue
        x, history[0] = fast_step(plan, i, x, history, **what, **noise)
        if callback is not None:
            callback({**seen, "denoised": history[0]})
    return x


def checked_extra_args(extra_args) -> Mapping:
    """A model's further arguments by name; none for None."""
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise TypeError(f"extra_args must be a dict of further arguments of model, or None, got {type(extra_args).__name__}")
    return {} if extra_args is None else extra_args


def checked_pair(returned, argument: str) -> tuple[Any, Any]:
    """The two outputs, with the condition and without it, that a model returns where an argument says that it does."""
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise TypeError(
            f"model must return a pair for {argument}, with the condition and without it, got {type(returned).__name__}"
        )
    return returned[0], returned[1]


def evaluate(model: Callable[..., Any], x: Tensor, sigma: Tensor, /, **extra_args) -> Any:
    """What a model returns for a sample, which it must leave as it is: the step reads it."""
    if x.is_inference() or torch.compiler.is_compiling():  # such samples do not count who writes to them
        return model(x, sigma, **extra_args)
    version = x._version
    output = model(x, sigma, **extra_args)
    if x._version != version:
        raise ValueError(
            "model must not write into x, which the step reads: write x = x * scale for x *= scale, or begin with x.clone()"
        )
    return output
