"""The specification: the step and its noise in plain PyTorch, for any device and dtype, differentiable."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .noise import Portable, float64_device, seeds_of, specified_noise
from .table import Row
from .tracing import has_values, numbers_of

if TYPE_CHECKING:
    from .request import ModelOutput, StepRequest

UNDERFLOW = 2.0**-150  # the largest number that is 0 in float32


def step_of(request: "StepRequest", noise: Tensor | None):
    """The step with that noise: of a model's output first the prediction, and both are returned; then the next sample."""
    row, x, history = row_of_request(request), request.x, request.history
    if request.output is None:
        return next_sample(row, x, history, noise)
    denoised = prediction(row.prediction, x, history[0], request.output)
    return next_sample(row, x, [denoised, *history[1:]], noise, request.output), denoised


def prediction(factors, x: Tensor, output: Tensor, of: "ModelOutput", dtype: torch.dtype | None = None) -> Tensor:
    """denoised = p_x x + p_m (unconditional + scale (output - unconditional)), in the dtype of x; factors: p_x and p_m."""
    p_x, p_m, p_guide = guided_factors(factors, None if of.unconditional is None else of.scale, x.dim())
    guide = [] if p_guide is None else [(p_guide, of.unconditional)]
    return linear_combination([(p_x, x), (p_m, output), *guide], x, dtype)


def guided_factors(factors, scale: float | Tensor | None, dim: int) -> tuple:
    """The factors of x, of the output and of the unconditional output in a prediction; without a scale the last is None.

    Args:
        factors: p_x and p_m, of the prediction type.
        scale: of the guidance, a number or float64 [batch].
        dim: of the samples, with which the factors broadcast.
    """
    p_x, p_m = factors
    if scale is None:
        return p_x, p_m, None
    scale = per_sample(scale, dim) if isinstance(scale, Tensor) else scale
    return p_x, p_m * scale, p_m * (1 - scale)


def next_sample(
    row: Row, x: Tensor, history: Sequence[Tensor], noise: Tensor | None, of: "ModelOutput | None" = None
) -> Tensor:
    """x_next = w_x x + sum_j w_d[j] denoised_j + w_guide unconditional + w_noise noise, in the dtype of x."""
    guide = [] if of is None or not of.cfg_pp else [(row.w_guide, of.unconditional)]
    drawn = [] if noise is None else [(row.w_noise, noise)]
    return linear_combination([(row.w_x, x), *zip(row.w_d, history, strict=False), *guide, *drawn], x)


def input_weights(row: Row, predictions: int, factors: tuple | None = None) -> list:
    """The weights of the inputs in the next sample: of x, of that many predictions, of the noise and of the unconditional output.

    With `factors`, of `guided_factors`, a model's output stands for the newest prediction, which is not rounded on the way. The last
    is None where nothing guides.
    """
    weights: list = [row.w_x, *row.w_d[:predictions], row.w_noise, None]
    if factors is not None:
        (p_x, p_m, p_guide), newest = factors, row.w_d[0]
        weights[0], weights[1] = row.w_x + newest * p_x, newest * p_m
        weights[-1] = None if p_guide is None else row.w_guide + newest * p_guide
    return weights


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
            w = w.to(exact).to(x.device)
            total = total + torch.where(w != 0, w * term.to(exact), 0)
        elif exact == torch.float64 or not abs(w) <= UNDERFLOW:
            total = total + w * term.to(exact)
    return total if dtype else total.to(x.dtype)


def table_for(plan, i, x: Tensor) -> Tensor:
    """The plan's table where the index of the step is looked up in it: on the device of x, unless the host knows it or the device
    has no float64."""
    if isinstance(i, int) or (isinstance(i, Tensor) and i.is_cpu):
        return plan.table
    device = float64_device(x.device)
    return plan.table.to(device) if torch.compiler.is_dynamo_compiling() else plan.to(device).table


def row_of(table: Tensor, i, x: Tensor) -> Row:
    """Row i of a table: in numbers where they are on the host, else in tensors that broadcast with x.

    Args:
        i: a number; an int64 tensor []; or a pair (plan, step) of int64 [batch].
    """
    if isinstance(i, Tensor) and i.dim() == 0 and has_values(i):
        i = numbers_of(i)
    if isinstance(i, int) and has_values(table):
        return Row.of(numbers_of(table, i))
    table = fake_as(x, table)
    if isinstance(i, int):
        return Row.of(table[i].unbind())
    return Row.of([per_sample(column, x.dim()) for column in look_up(table, i).unbind(-1)])


def look_up(table: Tensor, i: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Rows of the table by tensors, [columns] or [batch, columns]; table[i] would ask for the number of a tensor []."""
    if isinstance(i, tuple):
        return table[tuple(index.to(table.device) for index in i)]
    return table.index_select(0, i.to(table.device).reshape(1))[0]


def per_sample(values: Tensor, dim: int) -> Tensor:
    """[batch] numbers in a shape that broadcasts with samples of `dim` dimensions in all; [] stays as it is."""
    return values.view(-1, *[1] * (dim - 1)) if values.dim() and dim else values.reshape(())


def row_of_request(request: "StepRequest") -> Row:
    return row_of(table_for(request.plan, request.i, request.x), request.i, request.x)


def fake_as(x: Tensor, tensor: Tensor | None) -> Tensor | None:
    """A tensor without numbers in the place of one that x, which has none, cannot meet; else the tensor itself."""
    mode = getattr(x, "fake_mode", None)
    if mode is None or mode.allow_non_fake_inputs or tensor is None or type(tensor) is not Tensor:
        return tensor
    return mode.from_tensor(tensor, static_shapes=True)


def portable_noise_of(request: "StepRequest", draw: Callable[..., Tensor] = specified_noise) -> Tensor | None:
    """The portable noise of a step as a float32 tensor, or None where the step draws none."""
    row, x, stream = row_of_request(request), request.x, request.noise
    if not isinstance(stream, Portable) or (isinstance(row.w_noise, float) and row.w_noise == 0):
        return None
    seeds = stream.seeds if isinstance(stream.seeds, Tensor) else seeds_of(stream.seeds, x)
    return draw(x.shape, seeds.to(x.device), row.counter, stream.global_shape, stream.global_start)


def written_to(out: Tensor | None, result):
    """The result of a step with its next sample in `out`, where that is given."""
    if out is None:
        return result
    return (out.copy_(result[0]), *result[1:]) if isinstance(result, tuple) else out.copy_(result)
