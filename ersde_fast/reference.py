"""The specification: the step and its noise in plain PyTorch, for any device and dtype, differentiable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import check_step, prediction_arguments
from .noise import has_values, seeds_of, specified_noise
from .plan import Row

UNDERFLOW = 2.0**-150  # the largest number that is 0 in float32


def reference_step(
    plan, i, x: Tensor, history, noise: Tensor | None = None, seed=None, prediction_type: str | None = None, guidance=None
):
    """One step of the plan, `x_next = w_x x + sum_j w_d[j] history[j] + w_noise noise`.

    Args:
        plan: of `er_sde_plan` or `stack_plans`.
        i: the step, as in `fast_step`.
        x: [...] the current sample, of any float dtype; computed in float32, in float64 if any input is float64.
        history: predictions of the clean sample, newest first, each of the shape of x and of any float dtype.
        noise: standard normal, of the shape of x.
        seed: the portable stream instead, see `portable_noise`. One of the two is needed where w_noise is not 0.
        prediction_type, guidance: history[0] is the model's output, as in `fast_step`.

    Returns:
        The next sample, of the shape and dtype of x; with a prediction_type the pair (next sample, prediction). The error is at
        most (order + 3) 2^-24 sum |w_i x_i| plus half an ulp of the dtype (2^-53 for float64).
    """
    check_step(plan, i, x, history, noise, seed=seed, prediction_type=prediction_type, guidance=guidance)
    kind, unconditional, scale = prediction_arguments(prediction_type, guidance)
    row = row_of(table_for(plan, i, x), i, x)
    if seed is not None:
        noise = draw_portable(row, x, seeds_of(seed, x))
    if noise is None and plan.draws and row.w_noise != 0:
        raise ValueError("noise or seed is needed: the weight of the noise is not 0 at this step")
    return reference(row, x, history[: plan.order], noise, kind, unconditional, scale)


def reference(row: Row, x: Tensor, history: Sequence[Tensor], noise: Tensor | None, kind: int, unconditional, scale):
    """The step of one row: first the prediction of a model's output, where `kind` names one, then the next sample."""
    if kind < 0:
        return next_sample(row, x, history, noise)
    denoised = prediction(row, x, history[0], kind, unconditional, scale)
    return next_sample(row, x, [denoised, *history[1:]], noise), denoised


def prediction(row: Row, x: Tensor, output: Tensor, kind: int, unconditional: Tensor | None, scale, dtype=None) -> Tensor:
    """denoised = p_x x + p_m (unconditional + scale (output - unconditional)), in the dtype of x."""
    p_x, p_m = row.predictions[kind]
    if unconditional is None:
        return linear_combination([(p_x, x), (p_m, output)], x, dtype)
    if isinstance(scale, Tensor):
        scale = per_sample(scale, x.dim())
    return linear_combination([(p_x, x), (p_m * scale, output), (p_m * (1 - scale), unconditional)], x, dtype)


def next_sample(row: Row, x: Tensor, history: Sequence[Tensor], noise: Tensor | None) -> Tensor:
    """x_next = w_x x + sum_j w_d[j] denoised_j + w_noise noise, in the dtype of x."""
    drawn = [] if noise is None else [(row.w_noise, noise)]
    return linear_combination([(row.w_x, x), *zip(row.w_d, history, strict=False), *drawn], x)


def linear_combination(terms, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of weight times tensor in the dtype of x; a term whose weight is 0, in the type of the sum, is not read.

    Weights are numbers, or tensors that broadcast. Summed in float64 if any tensor that is read is float64, else in float32, and
    rounded once; with a dtype summed and returned in that.
    """
    terms = [(w, t) for w, t in terms if isinstance(w, Tensor) or w != 0]
    exact = dtype or (torch.float64 if torch.float64 in (x.dtype, *(t.dtype for _, t in terms)) else torch.float32)
    total = torch.zeros_like(x, dtype=exact)
    for w, term in terms:
        if isinstance(w, Tensor):
            w = w.to(exact)
            total = total + torch.where(w != 0, w * term.to(exact), 0)
        elif exact == torch.float64 or abs(w) > UNDERFLOW:
            total = total + w * term.to(exact)
    return total if dtype else total.to(x.dtype)


def table_for(plan, i, x: Tensor) -> Tensor:
    """The plan's table where the index of the step is looked up in it: on the device of x, unless the host knows it."""
    if isinstance(i, int) or (isinstance(i, Tensor) and i.is_cpu):
        return plan.table
    return plan.table.to(x.device) if torch.compiler.is_dynamo_compiling() else plan.to(x.device).table


def row_of(table: Tensor, i, x: Tensor) -> Row:
    """Row i of a table: in numbers where they are on the host, else in tensors that broadcast with x.

    Args:
        i: a number; an int64 tensor []; or a pair (plan, step) of int64 [batch].
    """
    if isinstance(i, Tensor) and i.dim() == 0 and has_values(i):
        i = i.item()
    if isinstance(i, int) and has_values(table):
        columns = table[i].tolist()
    elif isinstance(i, int):
        columns = table[i].unbind()
    else:
        columns = [per_sample(column, x.dim()) for column in look_up(table, i).unbind(-1)]
    return Row.of(columns)


def look_up(table: Tensor, i: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Rows of the table by tensors, [columns] or [batch, columns]; table[i] would ask for the number of a tensor []."""
    return table[i] if isinstance(i, tuple) else table.index_select(0, i.to(table.device).reshape(1))[0]


def per_sample(values: Tensor, dim: int) -> Tensor:
    """[batch] numbers in a shape that broadcasts with samples of `dim` dimensions in all; [] stays as it is."""
    return values.view(-1, *[1] * (dim - 1)) if values.dim() and dim else values.reshape(())


def draw_portable(row: Row, x: Tensor, seeds: Tensor, global_shape=None, global_start=None) -> Tensor | None:
    """The step's portable noise as a float32 tensor, or None where the step adds none."""
    if isinstance(row.w_noise, float) and row.w_noise == 0:
        return None
    return specified_noise(x.shape, seeds.to(x.device), row.counter, global_shape, global_start)
