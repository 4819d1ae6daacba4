"""The log-density of a step: how likely the Gaussian that a step draws from makes a next sample."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from .backends import CPU, CUDA
from .backends.compiled import Compiled
from .backends.library import SEGMENT
from .noise import float64_device
from .plan import Plan, PlanStack
from .reference import guided_factors, input_weights, linear_combination, per_sample, row_of_request
from .request import (
    Guidance,
    OutputArguments,
    StepIndex,
    StepRequest,
    check_like,
    checked,
    known_row,
    known_rows,
)
from .tracing import is_unwatched

Reduction = Literal["sum", "mean"]
LANES = 1024  # of csrc/er_sde_step.h
HALF_LOG_TWO_PI = 0.9189385332046728


def step_log_prob(
    plan: Plan | PlanStack,
    i: StepIndex,
    x: Tensor,
    history: Sequence[Tensor],
    x_next: Tensor,
    *,
    prediction_type: str | None = None,
    guidance: Guidance | None = None,
    cfg_pp: bool = False,
    reduction: Reduction = "sum",
) -> Tensor:
    """log N(x_next; w_x x + sum_j w_d[j] history[j], w_noise^2) of each sample, all its elements and constants counted.

    What policy-gradient training of diffusion models needs: differentiable with respect to the predictions (or the model's
    output), x and x_next. All in float64, since one ulp of a float32 log-density of 65,536 elements is already 0.016; summed in
    an order that depends on the number of elements of a sample alone, so a sample has the same bits in any batch. In one pass of a
    kernel where there is one, its gradients in another; `fast_step(..., return_log_prob=True)` has it in the step's own pass.

    Args:
        plan, i, x, history: of the step, as in `fast_step`; s_noise is part of the plan's w_noise.
        x_next: the sample, as it was rounded.
        prediction_type, guidance, cfg_pp: as in `fast_step`; the mean is then that of the prediction before it is rounded.
        reduction: "sum" over the elements of a sample, or their "mean", which the code of Flow-GRPO and its kin takes.

    Returns:
        float64 [batch] on the device of x; [] for a 0-d x.

    Raises:
        ValueError: where the device has no float64; where the step adds no noise, so that its result has no density; as NaN in compiled code and where
            only the device knows. In compiled code a prediction that a number i lacks gives NaN too.

    Source: the Gaussian that the step of arXiv 2309.06169 draws from, as arXiv 2305.13301 trains with.
    """
    check_reduction("reduction", reduction)
    output = OutputArguments(prediction_type, guidance, cfg_pp)
    request = checked(plan, i, x, history, output=output)
    check_like("x_next", x_next, x)
    if not torch.compiler.is_dynamo_compiling():
        check_log_prob(plan, i, x)
    return log_prob(request, x_next, reduction)


def log_prob(request: StepRequest, x_next: Tensor, reduction: Reduction = "sum") -> Tensor:
    """The log-density of the step of a request at x_next, by a kernel where one takes the tensors."""
    backend = _kernel_for(request, x_next)
    if backend is None:
        return reference_log_prob(request, x_next, reduction)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_next, *_terms(request))):
        return _LogProb.apply(backend, request, reduction, x_next, *_terms(request))
    result = backend.log_prob(request, x_next, reduction)
    return reference_log_prob(request, x_next, reduction) if result is None else result


def reference_log_prob(request: StepRequest, x_next: Tensor, reduction: Reduction = "sum") -> Tensor:
    """The specification, in PyTorch's operators: the kernels have its bits."""
    weights, std = _gaussian(request)
    batch, size = _batch_and_size(x_next)
    squares = _residual(weights, std, request, x_next).square().reshape(batch, size)
    log_std = std.log().reshape(-1) if isinstance(std, Tensor) else math.log(std)
    density = -_sum_of_segments(squares) / 2 - size * (log_std + HALF_LOG_TWO_PI)
    return (density / size if reduction == "mean" else density).reshape(x_next.shape[:1])


def _terms(request: StepRequest) -> list[Tensor]:
    """What the mean is linear in."""
    guide = None if request.output is None else request.output.unconditional
    return [request.x, *request.history, *([] if guide is None else [guide])]


def _gaussian(request: StepRequest) -> tuple[list, Any]:
    """The weight of each term in the mean, with a model's output unrounded, and the standard deviation, which is NaN where the step
    adds no noise, or reads a prediction that is missing: numbers, or tensors that broadcast with x."""
    row: Any = row_of_request(request)
    of = request.output
    factors = None if of is None else guided_factors(row.prediction, of.scale, request.x.dim())
    *weights, std, of_guide = input_weights(row, len(request.history), factors)
    if of_guide is not None:
        weights.append(of_guide)
    if isinstance(std, Tensor):
        missing = (w != 0 for w in row.w_d[len(request.history) :])
        return weights, torch.where(functools.reduce(torch.logical_or, missing, ~(std > 0)), math.nan, std)
    return weights, std if std > 0 else math.nan


def _residual(weights: list, std, request: StepRequest, x_next: Tensor) -> Tensor:
    """(x_next - mean) / std in float64."""
    mean = linear_combination(zip(weights, _terms(request), strict=True), request.x, torch.float64)
    inverse = 1 / std
    return (x_next.double() - mean) * (inverse.to(x_next.device) if isinstance(inverse, Tensor) else inverse)


def _batch_and_size(x: Tensor) -> tuple[int, int]:
    return x.shape[0] if x.dim() else 1, math.prod(x.shape[1:])


def _kernel_for(request: StepRequest, x_next: Tensor) -> Compiled | None:
    """The backend whose kernel sums these tensors, which nobody else wants to see but autograd, backwards."""
    backend = next((b for b in (CPU, CUDA) if b.name == request.x.device.type), None)
    if torch.compiler.is_dynamo_compiling() or backend is None or not is_unwatched() or backend.unavailable() is not None:
        return None
    scale = None if request.output is None else request.output.scale
    if isinstance(scale, Tensor) and scale.requires_grad:
        return None
    return backend if x_next.numel() and backend.takes(request.x, [*_terms(request), x_next]) else None


class _LogProb(torch.autograd.Function):
    """The kernel's log-density and its gradients. In forward direction, and by torch.func, the specification is differentiated."""

    @staticmethod
    def forward(ctx, backend, request, reduction, x_next, *terms):
        plan_index, step_index = request.i if isinstance(request.i, tuple) else (None, request.i)
        scale = None if request.output is None else request.output.scale
        numbers = (t if isinstance(t, Tensor) else None for t in (plan_index, step_index, scale))
        ctx.save_for_backward(x_next, *numbers, *terms)  # all, so that none changes unseen before the gradients are made
        ctx.guided = len(terms) > 1 + len(request.history)
        output = None if request.output is None else request.output._replace(unconditional=None)
        ctx.backend, ctx.reduction, ctx.request = backend, reduction, request._replace(x=None, history=(), output=output)
        result = backend.log_prob(request, x_next, reduction)
        return reference_log_prob(request, x_next, reduction) if result is None else result

    @staticmethod
    def backward(ctx, gradient):
        x_next, plan_index, step_index, scale, x, *history = ctx.saved_tensors
        request, output = ctx.request, ctx.request.output
        if step_index is not None:
            request = request._replace(i=step_index if plan_index is None else (plan_index, step_index))
        if ctx.guided:
            output = output._replace(unconditional=history.pop(), scale=output.scale if scale is None else scale)
        request = request._replace(x=x, history=history, output=output)
        _, _, _, *needed = ctx.needs_input_grad
        needed, of = [*needed[1:], needed[0]], [*_terms(request), x_next]
        batch, size = _batch_and_size(x_next)
        if ctx.reduction == "mean":
            gradient = gradient / size
        gradients = None
        if not torch.is_grad_enabled() and is_unwatched() and not is_legacy_batchedtensor(gradient):  # of is_grads_batched
            gradients = ctx.backend.log_prob_gradients(
                request,
                x_next,
                gradient.reshape(batch).contiguous(),
                [torch.empty_like(t) if n else None for t, n in zip(of, needed, strict=True)],
            )
        if gradients is None:
            weights, std = _gaussian(request)
            score = per_sample(gradient, x_next.dim()) * _residual(weights, std, request, x_next) / std
            gradients = [(w * score).to(t.dtype) if n else None for w, t, n in zip([*weights, -1], of, needed, strict=True)]
        *gradients, of_next = gradients
        return None, None, None, of_next, *gradients


def check_reduction(name: str, reduction) -> None:
    if reduction not in ("sum", "mean"):
        raise ValueError(f'{name} must be "sum" or "mean", got {reduction!r}')


def check_log_prob(plan, i, x: Tensor) -> None:
    """Raises where a step is known to add no noise, and where there is no float64."""
    if float64_device(x.device) != x.device:
        raise ValueError(f"log_prob is computed in float64, which {x.device} has not: move x and the predictions to the CPU")
    silent = None if plan.draws else "the plan"
    if row := known_row(plan, i):
        silent = f"step {int(i)}" if row.w_noise == 0 else None
    elif isinstance(i, tuple) and (rows := known_rows(plan, i)) is not None:
        zeros = [b for b, row in enumerate(rows) if row.w_noise == 0]
        silent = f"the step of sample {zeros[0]}" if zeros else None
    if silent:
        raise ValueError(
            f"log_prob: {silent} adds no noise, so that its result is certain and has no density; take steps of a stochastic "
            f"noise_scaler with s_noise above 0, and not the last one to sigma 0"
        )


def _sum_of_segments(squares: Tensor) -> Tensor:
    """[batch, n] to [batch], in an order that depends on n alone: that of csrc/er_sde_log_prob_cpu_loop.h and csrc/er_sde_log_prob.cu.

    Segments of 1,024 positions: four neighbours, then eight by eight the 32 lanes of them, then halves of the lanes. What the
    segments sum to is added up in 1,024 lanes, one after another, and halves of these.
    """
    lanes = _padded(squares, SEGMENT).unflatten(1, (-1, 8, 32, 4))
    quads = (lanes[..., 0] + lanes[..., 1]) + (lanes[..., 2] + lanes[..., 3])
    sums = _sum_of_halves(_sum_one_by_one(quads.unbind(2)))
    return _sum_of_halves(_sum_one_by_one(_padded(sums, LANES).unflatten(1, (-1, LANES)).unbind(1)))


def _padded(values: Tensor, multiple: int) -> Tensor:
    """Zeros behind the values of the last dimension, to a multiple of that many, at least one."""
    n = values.shape[-1]
    return torch.nn.functional.pad(values, (0, -n % multiple if n else multiple))


def _sum_one_by_one(values) -> Tensor:
    return functools.reduce(torch.add, values)


def _sum_of_halves(values: Tensor) -> Tensor:
    """Over the last dimension, a power of two."""
    while (half := values.shape[-1] // 2) > 0:
        values = values[..., :half] + values[..., half:]
    return values[..., 0]
