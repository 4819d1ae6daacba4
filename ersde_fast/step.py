"""`fast_step`: checks nothing that the kernel has checked, and sends each step where it runs fastest."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import ops
from .arguments import check_step, known_row, prediction_arguments
from .backends import _C, is_differentiated, pick_backend, run, written_to
from .log_prob import check_log_prob, log_prob
from .noise import seed_table, seeds_of
from .reference import table_for

TRACED = ("FakeTensor", "FunctionalTensor")  # types that stand for plain tensors while torch traces


def fast_step(
    plan,
    i: int | Tensor | tuple[Tensor, Tensor],
    x: Tensor,
    history: list[Tensor],
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed=None,
    prediction_type: str | None = None,
    guidance: tuple[Tensor, float | Tensor] | None = None,
    return_log_prob: bool = False,
    global_shape: Sequence[int] | None = None,
    global_start: Sequence[int] | None = None,
    torch_layout: tuple[int, int] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
):
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
            plan.order of them: those that the first steps do not read may be any.
        noise: standard normal of the shape of x.
        generator: torch's own stream, as `torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)`.
            Without any source torch's default generator is used. Nothing is drawn where the step adds no noise; where only the
            device knows whether it does, noise is drawn if any step of the plan adds some.
        seed: the portable stream, the same bits on every machine, drawn in the kernel: one number, or a list with a number or
            a (seed, sample) pair for each sample of the batch, or int64 [batch, 2] of such pairs. See `portable_noise`.
        prediction_type: history[0] is the model's output, of this type: "sample" (the prediction itself), "epsilon", "v"
            (alpha epsilon - sigma sample) or "flow" (epsilon - sample), at the plan's alpha and sigma of step i. The prediction
            is computed in the same pass, rounded to the dtype of x as a history holds it, and returned too.
        guidance: with a prediction_type, (output without the condition, scale): history[0] is the output with it, and
            unconditional + scale (conditional - unconditional) takes its place. The scale is a number, or float64 [batch].
        return_log_prob: returns also the log-density of the step's Gaussian at the returned sample. See `step_log_prob`.
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
    """
    if is_dynamo_compiling():
        if out is not None or backend is not None or torch_layout is not None:
            raise ValueError("out, backend and torch_layout cannot be traced: leave them out in compiled code")
        kind, unconditional, scale = prediction_arguments(prediction_type, guidance)
        result = _by_operator(
            plan, i, x, history[: plan.order], plan.draws, noise, generator, seed, kind, unconditional, scale, global_shape,
            global_start,
        )  # fmt: skip
        return _and_log_prob(result, plan, i, x, history, kind, unconditional, scale) if return_log_prob else result

    seeds = seed if seed is None or type(seed) is int or not isinstance(x, Tensor) else seeds_of(seed, x)
    whole = global_shape is None and global_start is None and torch_layout is None
    if _C is not None and backend is None and whole and not return_log_prob:
        if prediction_type is None and guidance is None:
            kind, unconditional, scale = -1, None, None
        else:
            kind, unconditional, scale = _prediction_arguments_if_plain(prediction_type, guidance)
        if kind is not None and (table := getattr(plan, "table", None)) is not None:
            result = _C.step(
                table, i, x, history, noise, generator, seeds, out, kind, unconditional, scale, plan.draws, False, None, None,
                None, None,
            )  # fmt: skip
            if result is not None:
                return result

    uses = check_step(
        plan, i, x, history, noise, generator, seed, out, global_shape, global_start, torch_layout, prediction_type, guidance
    )
    if isinstance(i, tuple) and plan.draws and noise is None and seed is None:
        raise ValueError(
            "seed or noise is needed where samples follow plans of their own: torch's stream would tie them together"
        )
    if return_log_prob:
        check_log_prob(plan, i)
        if out is not None:
            raise ValueError("out must not be given with return_log_prob: it could overwrite what the density depends on")
    kind, unconditional, scale = prediction_arguments(prediction_type, guidance)
    history, row = history[:uses], known_row(plan, i)
    draws = plan.draws if row is None else row.w_noise != 0
    tensors = [t for t in (x, *history, noise, unconditional) if t is not None]
    if backend != "reference" and (why := _why_operator(tensors)):
        if backend is not None:
            raise ValueError(f'backend "{backend}" cannot run this step: {why}: leave backend out, or name "reference"')
        result = _by_operator(
            plan, i, x, history, draws, noise, generator, seed, kind, unconditional, scale, global_shape, global_start
        )
        result = written_to(out, result)
    else:
        backend = pick_backend(backend, tensors, torch_layout)
        table = plan.to(x.device).table if backend == "triton" else table_for(plan, i, x)
        result = run(
            backend, table, i, x, history, draws, noise, generator, seeds, out, kind,
            unconditional, scale, global_shape or (), global_start or (), torch_layout or (),
        )  # fmt: skip
    return _and_log_prob(result, plan, i, x, history, kind, unconditional, scale) if return_log_prob else result


def _prediction_arguments_if_plain(prediction_type, guidance) -> tuple:
    """prediction_arguments without complaint: None for the number where something is wrong."""
    try:
        return prediction_arguments(prediction_type, guidance)
    except (KeyError, TypeError, ValueError):
        return None, None, None


def _why_operator(tensors: list[Tensor]) -> str | None:
    """Why the step has to go through the dispatcher, if it has to; tensors of types that no kernel knows do not go there."""
    if not all(type(t) in (Tensor, torch.nn.Parameter) or type(t).__name__ in TRACED for t in tensors):
        return None
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return "an input is wrapped by a function transform"
    if any(map(is_differentiated, tensors)):
        return "an input requires a gradient or carries a tangent"
    if is_in_torch_dispatch_mode() or any(type(t).__name__ in TRACED for t in tensors):
        return "it is being traced"
    return None


def _by_operator(plan, i, x, history, draws, noise, generator, seed, kind, unconditional, scale, global_shape, global_start):
    """The step as an operator: what is a number to an eager step is a tensor here, so that no trace holds it."""
    plan_index, step_index = i if isinstance(i, tuple) else (None, i)
    if not isinstance(step_index, Tensor):
        step_index = torch.full((), step_index, dtype=torch.int64, device="cpu")
    table = table_for(plan, step_index if plan_index is None else i, x)
    if seed is not None:
        seed = _seeds_to_trace(seed, x)
    if getattr(x, "fake_mode", None) is not None and not x.fake_mode.allow_non_fake_inputs:
        fake = lambda t: t if t is None or type(t).__name__ in TRACED else x.fake_mode.from_tensor(t, static_shapes=True)  # noqa: E731
        table, plan_index, step_index, seed = map(fake, (table, plan_index, step_index, seed))
    if seed is None and noise is None and draws:
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    shard = list(global_shape or ()), list(global_start or ())
    arguments = (table, plan_index, step_index, x, list(history), noise, seed, *shard)
    if kind < 0:
        return ops.STEP(*arguments)
    if unconditional is not None and not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float64, device="cpu")
    return ops.STEP_FROM_OUTPUT(*arguments, kind, unconditional, scale)


def _seeds_to_trace(seed, x: Tensor) -> Tensor:
    """The seeds as int64 [batch, 2], made of operators, so that neither the batch nor the seed is a constant of a trace."""
    batch = x.shape[0] if x.dim() else 1
    if isinstance(seed, Tensor) and seed.dim() == 2:
        return seed
    if isinstance(seed, int):
        seed = seed if -(2**63) <= seed < 2**63 else (seed + 2**63) % 2**64 - 2**63
        samples = torch.arange(batch, device=x.device)
        return torch.stack([torch.full_like(samples, seed), samples], dim=1)
    return seed_table(seed, batch).to(x.device)


def _and_log_prob(result, plan, i, x, history, kind, unconditional, scale) -> tuple:
    results = result if isinstance(result, tuple) else (result,)
    return (*results, log_prob(plan, i, x, history, results[0].detach(), kind, unconditional, scale))
