"""`fast_step`: checks nothing that the kernel has checked, and sends each step where it runs fastest; and its specification."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import ops
from .backends import CPU, CUDA, choose, kernels_for
from .backends.reference import REFERENCE
from .log_prob import Reduction, check_log_prob, check_reduction, log_prob
from .noise import Seed, TorchStream, seeds_of
from .plan import Plan, PlanStack
from .predictions import PREDICTION_TYPES
from .reference import row_of_request, written_to
from .request import (
    Guidance,
    NoiseArguments,
    OutputArguments,
    StepIndex,
    StepRequest,
    check_shard,
    checked,
    pair_of,
)


def fast_step(
    plan: Plan | PlanStack,
    i: StepIndex,
    x: Tensor,
    history: Sequence[Tensor],
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Seed | None = None,
    prediction_type: str | None = None,
    guidance: Guidance | None = None,
    cfg_pp: bool = False,
    return_log_prob: bool = False,
    log_prob_reduction: Reduction = "sum",
    global_shape: Sequence[int] | None = None,
    global_start: Sequence[int] | None = None,
    torch_layout: tuple[int, int] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """One step of the plan in one pass over memory: `w_x x + sum_j w_d[j] history[j] + w_noise z`.

    Stateless: everything the step depends on is an argument. Differentiable in both directions, and traceable.

    Args:
        plan: of `er_sde_plan`, or of `stack_plans`; may be shared by any number of runs and threads.
        i: the step, 0 to plan.num_steps - 1; or an int64 tensor [] of it, on the CPU or the device of x, so that compiled code
            and captured graphs serve every step. With a stack of plans the pair (plan_index, step_index) of int64 [batch] on
            the device of x: each sample is at its own step of its own plan, and its result does not depend on the others. A
            step that only the device knows and that does not exist gives NaN.
        x: [batch, ...] the current sample; float32, float64, bfloat16 or float16, any strides.
        history: predictions of the clean sample, newest first; `plan.order` of them are enough. Each has the shape and
            device of x and any float dtype. A prediction whose weight is 0 is not read. Where i is a tensor there must be
            plan.order of them: those that the first steps do not read may hold anything.
        noise: standard normal of the shape of x.
        generator: torch's own stream, as `torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)`.
            Without any source torch's default generator is used. Nothing is drawn where the step adds no noise; where only the
            device knows whether it does, noise is drawn if any step of the plan adds some.
        seed: the portable stream, the same bits on every machine, drawn in the kernel: one number, or a list with a number or
            a (seed, sample) pair for each sample of the batch, or int64 [batch, 2] of such pairs. See `portable_noise`.
        prediction_type: history[0] is the model's output, of this type: "sample" (the prediction itself), "epsilon", "v"
            (alpha epsilon - sigma sample), "flow" (epsilon - sample) or "edm" (of the network inside EDM's preconditioning, for the
            plan's sigma_data), at the plan's alpha and sigma of step i. The prediction is computed in the same pass, rounded to the
            dtype of x as a history holds it, and returned too.
        guidance: with a prediction_type, (output without the condition, scale): history[0] is the output with it, and
            unconditional + scale (conditional - unconditional) takes its place. The scale is a number, or float64 [batch].
        cfg_pp: with guidance, the step by CFG++ (arXiv 2406.08070): it moves by the guided prediction and renoises by the
            unconditional one, and scales are 0 to 1 there. Nothing more is read. Order 1 of "ode" is DDIM with CFG++.
        return_log_prob: returns also the log-density of the step's Gaussian at the returned sample. See `step_log_prob`.
        log_prob_reduction: of that: "sum" over the elements of a sample, or their "mean".
        global_shape, global_start: with `seed`, where x holds one shard of each sample: the shape of a whole sample and the
            index at which the shard starts, without the batch dimension. The shards' steps are the whole step, to the bit.
        torch_layout: with torch's stream on a CUDA device, (multiprocessors, threads of each) of the card whose numbers to draw:
            `torch.randn` depends on them. None is the card at hand. (80, 1536) is an A10G, (108, 2048) an A100.
        out: where to write, of the shape, dtype and device of x; it may be x or a prediction itself.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the fastest that fits the tensors.

    Returns:
        The next sample, with the dtype and device of x, never an alias of an input (except `out`). With a prediction_type
        (next sample, prediction), with return_log_prob (next sample, log_prob), with both all three in this order.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written or any generator advanced.

    Source: arXiv 2309.06169, written out in `reference_step`; CFG++ arXiv 2406.08070.
    """
    if is_dynamo_compiling():
        if out is not None or backend is not None or torch_layout is not None:
            raise ValueError("out, backend and torch_layout cannot be traced: leave them out in compiled code")
        _check_reduction(log_prob_reduction, return_log_prob)
        given = NoiseArguments(noise, generator, seed, global_shape, global_start)
        request = checked(plan, i, x, history, given, OutputArguments(prediction_type, guidance, cfg_pp))
        _check_source(request)
        return _and_log_prob(ops.run(request), request, return_log_prob, log_prob_reduction)

    seeds = seed if seed is None or type(seed) is int or not isinstance(x, Tensor) else seeds_of(seed, x)
    whole = global_shape is None and global_start is None and torch_layout is None
    kernel = (CUDA if getattr(x, "is_cuda", False) else CPU).kernels
    if kernel is None or backend is not None:
        kernel = kernels_for(x, backend)
    if kernel is not None and whole and not return_log_prob and log_prob_reduction == "sum":
        result, table = None, getattr(plan, "table", None)
        if prediction_type is None and guidance is None and cfg_pp is False:
            if table is not None:
                result = kernel.step(
                    table, i, x, history, noise=noise, generator=generator, seed=seeds, draws=plan.draws, out=out
                )
        elif table is not None and (plain := _output_if_plain(plan, prediction_type, guidance, cfg_pp)) is not None:
            table, unconditional, scale = plain
            result = kernel.step(
                table, i, x, history, noise=noise, generator=generator, seed=seeds, draws=plan.draws, out=out, predicts=True,
                unconditional=unconditional, scale=scale, cfg_pp=cfg_pp,
            )  # fmt: skip
        if result is not None:
            return result

    more: dict[str, Any] = {}
    if out is None and backend is None and torch_layout is None:
        if whole and return_log_prob:
            more = {"reduction": log_prob_reduction}
        elif not whole and not return_log_prob and log_prob_reduction == "sum" and isinstance(x, Tensor):
            check_shard(x, seeds, global_shape, global_start)
            more = {"global_shape": global_shape, "global_start": global_start}
    if more:
        result = _plain_with(more, plan, i, x, history, (noise, generator, seeds), (prediction_type, guidance, cfg_pp))
        if result is not None:
            return result

    _check_reduction(log_prob_reduction, return_log_prob)
    given = NoiseArguments(noise, generator, seed, global_shape, global_start, torch_layout)
    request = checked(plan, i, x, history, given, OutputArguments(prediction_type, guidance, cfg_pp), out)
    _check_source(request)
    if return_log_prob:
        check_log_prob(plan, i, x)
        if out is not None:
            raise ValueError("out must not be given with return_log_prob: it could overwrite what the density depends on")
    return _and_log_prob(step_of(request, backend), request, return_log_prob, log_prob_reduction)


def step_of(request: StepRequest, backend: str | None = None):
    """The step of a request, by the backend of that name or the fastest that fits; as an operator where torch wants to see it."""
    if backend != "reference" and (why := ops.why_operator(request)):
        if backend is not None:
            raise ValueError(f'backend "{backend}" cannot run this step: {why}: leave backend out, or name "reference"')
        return written_to(request.out, ops.run(request))
    return choose(request, backend).run(request)


def _check_source(request: StepRequest) -> None:
    if isinstance(request.i, tuple) and request.plan.draws and isinstance(request.noise, TorchStream):
        raise ValueError(
            "seed or noise is needed where samples follow plans of their own: torch's stream would tie them together"
        )


def _check_reduction(reduction, wanted: bool) -> None:
    check_reduction("log_prob_reduction", reduction)
    if reduction != "sum" and not wanted:
        raise ValueError(f"log_prob_reduction={reduction!r} needs return_log_prob=True")


def _output_if_plain(plan, prediction_type, guidance, cfg_pp) -> tuple | None:
    """The table with the factors of the type, the unconditional output and the scale; without complaint None where something is
    wrong. A tuple, since to make a ModelOutput would be a tenth of a small step."""
    try:
        table = plan.tables.get((PREDICTION_TYPES.get(prediction_type), cfg_pp))
        if table is None:
            table = None if prediction_type is None else plan.predicting(prediction_type, cfg_pp).table
        unconditional, scale = (None, None) if guidance is None else pair_of(guidance)
    except (KeyError, TypeError, ValueError):
        return None
    fits = table is not None and (cfg_pp is False or (cfg_pp is True and guidance is not None))
    return (table, unconditional, scale) if fits else None


def _plain_with(more: dict, plan, i, x, history, source, output) -> Any:
    """A plain step of a compiled kernel with what few steps need: its log-density in the same pass, or the place of a shard; None
    where it is none of theirs."""
    kernel, table = (CUDA if getattr(x, "is_cuda", False) else CPU).kernels, getattr(plan, "table", None)
    if kernel is None or table is None or more.get("reduction", "sum") not in ("sum", "mean"):
        return None
    unconditional = scale = None
    if output != (None, None, False):
        if (plain := _output_if_plain(plan, *output)) is None:
            return None
        table, unconditional, scale = plain
    noise, generator, seeds = source
    return kernel.step(
        table, i, x, history, noise=noise, generator=generator, seed=seeds, draws=plan.draws, predicts=output[0] is not None,
        unconditional=unconditional, scale=scale, cfg_pp=output[2], **more,
    )  # fmt: skip


def _and_log_prob(result, request: StepRequest, wanted: bool, reduction: Reduction):
    """The result, and behind it the log-density at its next sample where that is wanted."""
    if not wanted:
        return result
    results = result if isinstance(result, tuple) else (result,)
    return (*results, log_prob(request, results[0].detach(), reduction))


def reference_step(
    plan: Plan | PlanStack,
    i: StepIndex,
    x: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None = None,
    seed: Seed | None = None,
    prediction_type: str | None = None,
    guidance: Guidance | None = None,
    cfg_pp: bool = False,
) -> Any:
    """One step of the plan, `x_next = w_x x + sum_j w_d[j] history[j] + w_noise noise`.

    Args:
        plan: of `er_sde_plan` or `stack_plans`.
        i: the step, as in `fast_step`.
        x: [...] the current sample, of any float dtype; computed in float32, in float64 if any input is float64.
        history: predictions of the clean sample, newest first, each of the shape of x and of any float dtype.
        noise: standard normal, of the shape of x.
        seed: the portable stream instead, see `portable_noise`. One of the two is needed where w_noise is not 0.
        prediction_type, guidance, cfg_pp: history[0] is the model's output, as in `fast_step`.

    Returns:
        The next sample, of the shape and dtype of x; with a prediction_type the pair (next sample, prediction). The error is at
        most (order + 3) 2^-24 sum |w_i x_i| plus half an ulp of the dtype (2^-53 for float64).

    Raises:
        ValueError, TypeError: naming the argument, as `fast_step`; and without noise where the step adds some.

    Source: arXiv 2309.06169.
    """
    given, output = NoiseArguments(noise=noise, seed=seed), OutputArguments(prediction_type, guidance, cfg_pp)
    request = checked(plan, i, x, history, given, output)
    if isinstance(request.noise, TorchStream):
        if request.draws and row_of_request(request).w_noise != 0:
            raise ValueError("noise or seed is needed: the weight of the noise is not 0 at this step")
        request = request._replace(draws=False)
    return REFERENCE.run(request)
