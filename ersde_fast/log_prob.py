"""The log-density of a step: how likely the Gaussian that a step draws from makes a next sample."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .noise import float64_device, has_values
from .plan import Plan, PlanStack
from .reference import linear_combination, mean_terms, prediction, row_of_request
from .request import Guidance, OutputArguments, StepIndex, StepRequest, check_like, checked, known_row, model_output
from .table import W_NOISE

Reduction = Literal["sum", "mean"]


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
    an order that depends on the number of elements of a sample alone, so a sample has the same bits in any batch.

    Args:
        plan, i, x, history: of the step, as in `fast_step`; s_noise is part of the plan's w_noise.
        x_next: the sample, as it was rounded.
        prediction_type, guidance, cfg_pp: as in `fast_step`; the mean is then that of the prediction before it is rounded.
        reduction: "sum" over the elements of a sample, or their "mean", which the code of Flow-GRPO and its kin takes.

    Returns:
        float64 [batch] on the device of x; [] for a 0-d x.

    Raises:
        ValueError: where the device has no float64; where the step adds no noise, so that its result has no density; as NaN where only the device knows.
    """
    check_reduction("reduction", reduction)
    output = OutputArguments(prediction_type, guidance, cfg_pp)
    if torch.compiler.is_dynamo_compiling():
        return log_prob(
            StepRequest(plan.predicting(prediction_type, cfg_pp), i, x, history, output=model_output(output)), x_next, reduction
        )
    request = checked(plan, i, x, history, output=output)
    check_like("x_next", x_next, x)
    check_log_prob(plan, i, x)
    return log_prob(request, x_next, reduction)


def log_prob(request: StepRequest, x_next: Tensor, reduction: Reduction = "sum") -> Tensor:
    """The log-density of the step of a request at x_next."""
    row, x, history = row_of_request(request), request.x, request.history
    if request.output is not None:
        history = [prediction(row.prediction, x, history[0], request.output, torch.float64), *history[1:]]
    mean = linear_combination(mean_terms(row, x, history, request.output), x, torch.float64)
    if isinstance(w_noise := row.w_noise, Tensor):
        w_noise = torch.where(w_noise > 0, w_noise, math.nan)
        log_w_noise = w_noise.log().reshape(-1)
    else:
        log_w_noise = math.log(w_noise)
    batch, size = (x.shape[0] if x.dim() else 1), math.prod(x.shape[1:])
    squares = ((x_next.double() - mean) / w_noise).square().reshape(batch, size)
    density = -_sum_of_pairs(squares) / 2 - size * (log_w_noise + math.log(2 * math.pi) / 2)
    return (density / size if reduction == "mean" else density).reshape(x.shape[:1])


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
    elif isinstance(i, tuple) and has_values(plan.table) and all(map(has_values, i)):
        if (zeros := plan.table[i][:, W_NOISE] == 0).any():
            silent = f"the step of sample {int(zeros.nonzero()[0])}"
    if silent:
        raise ValueError(
            f"log_prob: {silent} adds no noise, so that its result is certain and has no density; take steps of a stochastic "
            f"noise_scaler with s_noise above 0, and not the last one to sigma 0"
        )


def _sum_of_pairs(values: Tensor) -> Tensor:
    """[batch, n] to [batch]: halves added to halves, so that no device, thread count or batch changes the order."""
    size = 1
    while size < values.shape[1]:
        size *= 2
    values = torch.nn.functional.pad(values, (0, size - values.shape[1]))
    while size > 1:
        size //= 2
        values = values.view(-1, 2, size).sum(1)
    return values[:, 0]
