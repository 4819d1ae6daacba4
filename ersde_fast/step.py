"""`fast_step`: checks nothing that the kernel has checked, picks the backend, and does nothing else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import check_step
from .noise import seed_table
from .reference import combine, draw_portable

try:
    from . import _C
except ImportError as error:
    _C = None
    try:
        from ._build_info import REASONS
    except ImportError:
        REASONS = {"cpu": "ersde-fast was not built: pip install --no-build-isolation ."}
    _NO_CPU = REASONS.get("cpu", f"the extension does not import ({error}): reinstall ersde-fast")
else:
    _NO_CPU = None

MAX_DIMS = 12  # kMaxDims of csrc/er_sde_step.h


def available_backends() -> dict[str, str | None]:
    """Name of each backend, to None if it runs here or else why it does not."""
    return {"cpu": _NO_CPU, "reference": None}


def fast_step(
    plan,
    i: int,
    x: Tensor,
    history: list[Tensor],
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed=None,
    global_shape: Sequence[int] | None = None,
    global_start: Sequence[int] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of the plan in one pass over memory: `w_x x + sum_j w_d[j] history[j] + w_noise z`.

    Stateless: everything the step depends on is an argument.

    Args:
        plan: of `er_sde_plan`; may be shared by any number of runs and threads.
        i: the step, 0 to plan.num_steps - 1.
        x: [batch, ...] the current sample; float32, float64, bfloat16 or float16, any strides.
        history: predictions of the clean sample, newest first; `plan.order` of them are enough. Each has the shape and
            device of x and any float dtype. A prediction whose weight is 0 is not read.
        noise: standard normal of the shape of x.
        generator: torch's own stream, as `torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)`.
            Without any source torch's default generator is used. Nothing is drawn where the step adds no noise.
        seed: the portable stream, the same bits on every machine, drawn in the kernel: one number, or a list with a number or
            a (seed, sample) pair for each sample of the batch. See `portable_noise`.
        global_shape, global_start: with `seed`, where x holds one shard of each sample: the shape of a whole sample and the
            index at which the shard starts, without the batch dimension. The shards' steps are the whole step, to the bit.
        out: where to write, of the shape, dtype and device of x; it may be x or a prediction itself.
        backend: "cpu" or "reference"; None takes the fastest that fits the tensors.

    Returns:
        The next sample, with the dtype and device of x, never an alias of an input (except `out`). Differentiable where
        grad is enabled and an input requires it.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written or any generator advanced.
    """
    # What a fast call passes: a number, or a table that is only made once the seeds are known to be good.
    seeds = seed if seed is None or type(seed) is int else seed_table(seed, x.shape[0] if x.dim() else 1)
    if backend is None and _C is not None and global_shape is None and global_start is None:
        result = _C.step(plan.weights, i, x, history, noise, generator, seeds, plan.first_step, out, False, [], [])
        if result is not None:
            return result
    check_step(plan, i, x, history, noise, generator, seed, out, global_shape, global_start)
    row = plan.rows[i]
    if _pick(backend, x, history[: len(row.w_d)], noise) == "cpu":
        shard = [list(global_shape or []), list(global_start or [])]
        with torch.no_grad():
            return _C.step(plan.weights, i, x, history, noise, generator, seeds, plan.first_step, out, True, *shard)
    if seed is not None:
        noise = draw_portable(plan, i, x, seed, global_shape, global_start)
    elif noise is None and row.w_noise != 0:
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    result = combine(row, x, history, noise)
    return result if out is None else out.copy_(result)


def _pick(backend: str | None, x: Tensor, history, noise: Tensor | None) -> str:
    """The backend to run: the one named, if it can, or the fastest that fits."""
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in [x, *history, noise])
    reasons = available_backends()
    if backend is not None and backend not in reasons:
        raise ValueError(f"backend must be one of {', '.join(reasons)}, got {backend!r}")
    if reasons["cpu"] is None and x.device.type != "cpu":
        reasons["cpu"] = f"x is on {x.device}"
    if reasons["cpu"] is None and needs_grad:
        reasons["cpu"] = 'an input requires a gradient: use backend="reference" or torch.no_grad()'
    if reasons["cpu"] is None and x.dim() >= MAX_DIMS:
        reasons["cpu"] = f"x has {x.dim()} dimensions, {MAX_DIMS - 1} are supported"
    if backend is None:
        return "cpu" if reasons["cpu"] is None and _is_plain(x, history, noise) else "reference"
    if reasons[backend] is not None:
        raise ValueError(f'backend "{backend}" cannot run this step: {reasons[backend]}')
    return backend


def _is_plain(x: Tensor, history, noise: Tensor | None) -> bool:
    """Whether the kernel may touch the memory: no subclass that dispatches, no lazy conjugate or negative."""
    return all(t is None or (type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg()) for t in [x, *history, noise])
