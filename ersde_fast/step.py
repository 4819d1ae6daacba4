"""`fast_step`: checks nothing that the kernel has checked, picks the backend, and does nothing else."""

import functools
import os
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from .arguments import FLOATS, check_step
from .noise import seeds_of
from .reference import combine, draw_portable

try:
    from . import _C
except ImportError as error:
    _C = None
    _NO_EXTENSION = f"the extension does not import ({error}): pip install --no-build-isolation ."
else:
    _NO_EXTENSION = None
try:
    from ._build_info import REASONS
except ImportError:
    REASONS = {}

MAX_DIMS = 12  # kMaxDims of csrc/er_sde_step.h


def available_backends() -> dict[str, str | None]:
    """Name of each backend, to None if it runs here or else why it does not."""
    return {"cuda": _no_cuda(), "triton": _no_triton(), "cpu": _no_cpu(), "reference": None}


def _no_cpu() -> str | None:
    return REASONS.get("cpu", _NO_EXTENSION) if _C is None else None


def _no_cuda() -> str | None:
    if _C is None:
        return _no_cpu()
    if not _C.has_cuda:
        return REASONS.get(
            "cuda", "the extension was built without CUDA: reinstall ersde-fast beside a torch with CUDA and nvcc"
        )
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@functools.cache
def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if _interpreting():
        return None
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return None
    return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernel on the CPU, for tests)"


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
    torch_layout: tuple[int, int] | None = None,
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
        torch_layout: with torch's stream on a CUDA device, (multiprocessors, threads of each) of the card whose numbers to draw:
            `torch.randn` depends on them. None is the card at hand. (80, 1536) is an A10G, (108, 2048) an A100.
        out: where to write, of the shape, dtype and device of x; it may be x or a prediction itself.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the fastest that fits the tensors.

    Returns:
        The next sample, with the dtype and device of x, never an alias of an input (except `out`). Differentiable where
        grad is enabled and an input requires it.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written or any generator advanced.
    """
    seeds = seed if seed is None or type(seed) is int or not isinstance(x, Tensor) else seeds_of(seed, x)
    if backend is None and _C is not None and global_shape is None and global_start is None and torch_layout is None:
        result = _C.step(plan.weights, i, x, history, noise, generator, seeds, plan.first_step, out, False, [], [], [])
        if result is not None:
            return result
    check_step(plan, i, x, history, noise, generator, seed, out, global_shape, global_start, torch_layout)
    row = plan.rows[i]
    history = history[: len(row.w_d)]
    named, backend = backend, _pick(backend, x, history, noise, torch_layout)
    shard = [list(global_shape or []), list(global_start or [])]
    draws_torch = row.w_noise != 0 and noise is None and seed is None
    torch_stream = draws_torch and x.is_cuda and _C is not None and _C.has_cuda and _torch_stream_is_as_here(x.device)
    if torch_layout is not None and draws_torch and not torch_stream:
        raise ValueError(f"torch_layout cannot be drawn on {x.device}: torch's stream there is not the one that is known")
    if draws_torch and not torch_stream and backend in ("cuda", "cpu"):
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        generator = None
    if backend in ("cuda", "cpu"):
        with torch.no_grad():
            result = _C.step(
                plan.weights, i, x, history, noise, generator, seeds, plan.first_step, out, True, *shard, list(torch_layout or [])
            )  # fmt: skip
        if result is not None:
            return result
        if named is not None:
            raise ValueError(f'backend "{named}" cannot run this step: an input is wrapped by a function transform')
    if backend == "triton":
        return _triton_step(plan, i, x, history, noise, generator, seed, out, *shard)
    if seed is not None:
        noise = draw_portable(plan, i, x, seed, global_shape, global_start)
    elif draws_torch and noise is None:
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    result = combine(row, x, history, noise)
    return result if out is None else out.copy_(result)


def _triton_step(plan, i, x, history, noise, generator, seed, out, global_shape, global_start) -> Tensor:
    from .kernels import er_sde_step

    row, seeds, torch_stream = plan.rows[i], None, None
    out = torch.empty_like(x) if out is None else out
    if x.numel() == 0:
        return out
    if seed is not None and global_shape:
        noise = draw_portable(plan, i, x, seed, global_shape, global_start)
    elif seed is not None:
        seeds = seeds_of(seed, x).to(x.device, non_blocking=True)
    elif noise is None and row.w_noise != 0:
        if er_sde_step.draws_as_torch(x):
            torch_stream = er_sde_step.take_torch_stream(x, generator)
        else:
            noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return er_sde_step.step(row, x, history, out, noise, seeds, plan.first_step + i, torch_stream)


def _torch_stream_is_as_here(device: torch.device) -> bool:
    """Whether the stream drawn in the kernel is what torch.randn draws on this device: compared on first use.

    Nothing is compared while a graph is being captured: that call then takes torch.randn, which a graph may hold too.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if _C.torch_stream(index) == 0 and not torch.cuda.is_current_stream_capturing():
        same = all(_draws_as_torch(torch.device("cuda", index), dtype) for dtype in FLOATS)
        _C.set_torch_stream(index, same)
        if not same:
            warnings.warn(
                f"torch {torch.__version__} draws normal noise on {torch.cuda.get_device_name(index)} in another order than "
                f"ersde-fast knows: noise comes from torch.randn there, and the step reads it",
                stacklevel=4,
            )
    return _C.torch_stream(index) == 1


def _draws_as_torch(device: torch.device, dtype: torch.dtype) -> bool:
    properties = torch.cuda.get_device_properties(device)
    generator = torch.Generator(device).manual_seed(0x5EED_0123_4567)
    torch.randn(3, device=device, generator=generator)
    for size in (4099, 300_007):
        offset = generator.get_offset()
        expected = torch.randn(size, dtype=dtype, device=device, generator=generator)
        drawn = torch.empty_like(expected)
        layout = (properties.multi_processor_count, properties.max_threads_per_multi_processor)
        grows = _C.torch_noise(drawn, generator.initial_seed(), offset, *layout)
        if not torch.equal(drawn, expected) or generator.get_offset() != offset + grows:
            return False
    return True


def _pick(backend: str | None, x: Tensor, history, noise: Tensor | None, torch_layout) -> str:
    """The backend to run: the one named, if it can, or the fastest that fits."""
    tensors = [t for t in (x, *history, noise) if t is not None]
    reasons = available_backends()
    if backend is not None and backend not in reasons:
        raise ValueError(f"backend must be one of {', '.join(reasons)}, got {backend!r}")
    kernels = [name for name in reasons if name != "reference"]
    for name in kernels:
        runs_on = {"cuda": x.is_cuda, "cpu": x.device.type == "cpu", "triton": x.device.type != "cpu" or _interpreting()}[name]
        if reasons[name] is None and not runs_on:
            reasons[name] = f"x is on {x.device}"
        if reasons[name] is None and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            reasons[name] = 'an input requires a gradient: use backend="reference" or torch.no_grad()'
        if reasons[name] is None and x.dim() >= MAX_DIMS:
            reasons[name] = f"x has {x.dim()} dimensions, {MAX_DIMS - 1} are supported"
        if reasons[name] is None and any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_neg() for t in tensors):
            reasons[name] = "an input is no plain tensor: a subclass, or a lazy view that is negated"
    if torch_layout is not None:
        for name in ("triton", "cpu", "reference"):
            reasons[name] = "torch_layout is drawn by the cuda backend: elsewhere pass noise=ersde_fast.torch_noise(...)"
    if backend is None:
        order = [name for name in ("cuda", "triton", "cpu", "reference") if name != "triton" or x.device.type != "cpu"]
        fits = [name for name in order if reasons[name] is None]
        if fits:
            return fits[0]
        backend = "cuda" if torch_layout is not None else "reference"
    if reasons[backend] is not None:
        raise ValueError(f'backend "{backend}" cannot run this step: {reasons[backend]}')
    return backend


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
