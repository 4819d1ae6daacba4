"""Which kernels run here, which one fits a step, and the call of each. What they are given has been checked."""

import functools
import os
import shutil
import sysconfig
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arguments import FLOATS
from .extension import _C, REASONS, WHY_NOT
from .noise import seeds_of
from .reference import draw_portable, reference, row_of

MAX_DIMS = 12  # kMaxDims of csrc/er_sde_step.h
KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}  # of a type of device


def available_backends() -> dict[str, str | None]:
    """Name of each backend, to None if it runs here or else why it does not."""
    return {"cuda": _no_cuda(), "triton": _no_triton(), "cpu": _no_cpu(), "reference": None}


def _no_cpu() -> str | None:
    return WHY_NOT if _C is None else None


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
    if not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernel on the CPU, for tests)"
    if os.name == "nt":  # triton-windows brings a compiler
        return None
    # Triton compiles the launchers of its kernels when they first run.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, and found no {' or '.join(compilers)}: install one, or let CC name it"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton
    if not Path(sysconfig.get_path("include", scheme), "Python.h").exists():
        return "Triton needs the headers of Python, which are not installed (python3-dev in Debian)"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_differentiated(tensor: Tensor) -> bool:
    """Whether autograd has to follow it, in either direction."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def pick_backend(backend: str | None, tensors: list[Tensor], torch_layout) -> str:
    """The backend to run: the one named, if it can, or the fastest that fits the tensors, of which x is the first."""
    x = tensors[0]
    known = all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg() for t in tensors)
    if backend is None and _C is not None and known and x.dim() < MAX_DIMS and (x.is_cuda or torch_layout is None):
        if x.is_cpu or (x.is_cuda and _C.has_cuda):
            return "cpu" if x.is_cpu else "cuda"
    reasons = available_backends()
    if backend is not None and backend not in reasons:
        raise ValueError(f"backend must be one of {', '.join(reasons)}, got {backend!r}")
    for name in ("cuda", "triton", "cpu"):
        runs_on = {"cuda": x.is_cuda, "cpu": x.device.type == "cpu", "triton": x.device.type != "cpu" or _interpreting()}[name]
        if reasons[name] is None and not runs_on:
            reasons[name] = f"x is on {x.device}"
        if reasons[name] is None and x.dim() >= MAX_DIMS:
            reasons[name] = f"x has {x.dim()} dimensions, {MAX_DIMS - 1} are supported"
        if reasons[name] is None and not known:
            reasons[name] = "an input is no plain tensor: a subclass, or a lazy view that is negated"
    if torch_layout is not None:
        for name in ("triton", "cpu", "reference"):
            reasons[name] = "torch_layout is drawn by the cuda backend: elsewhere pass noise=ersde_fast.torch_noise(...)"
    if backend is None:
        order = [name for name in ("cuda", "triton", "cpu", "reference") if name != "triton" or x.device.type != "cpu"]
        fits = [name for name in order if reasons[name] is None]
        backend = fits[0] if fits else "cuda" if torch_layout is not None else "reference"
        if backend == "reference":
            _say_once_that_there_is_no_kernel(x.device.type)
    if reasons[backend] is not None:
        raise ValueError(f'backend "{backend}" cannot run this step: {reasons[backend]}')
    return backend


@functools.cache
def _say_once_that_there_is_no_kernel(device_type: str) -> None:
    """Where none that the device could have was built; a step that its tensors alone keep from a kernel is nobody's mistake."""
    reasons = [available_backends()[name] for name in KERNELS.get(device_type, ())]
    if reasons and None not in reasons and os.environ.get("ERSDE_FAST_QUIET") != "1":
        warnings.warn(
            f"ersde-fast has no kernel for {device_type} tensors, and takes many times as long in plain PyTorch: "
            f"{'; '.join(reasons)} (ERSDE_FAST_QUIET=1 silences this)",
            stacklevel=4,
        )


def run(
    backend: str,
    table: Tensor,
    i,
    x: Tensor,
    history,
    draws: bool,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seeds=None,
    out: Tensor | None = None,
    kind: int = -1,
    unconditional: Tensor | None = None,
    scale=None,
    global_shape=(),
    global_start=(),
    torch_layout=(),
):
    """One step with one backend: the next sample, or with a prediction type (kind >= 0) that and the prediction.

    Args:
        table: float64, of a plan [num_steps, columns] or of a stack [num_plans, num_steps, columns].
        i: a number, an int64 tensor [], or a pair of int64 [batch], as in `fast_step`.
        draws: whether noise is drawn where neither `noise` nor `seeds` is given.
        seeds: a number or int64 [batch, 2].
    """
    shard = [list(global_shape), list(global_start)]
    if noise is None and seeds is None and draws and not _draws_torch_in_kernel(backend, x, scale, torch_layout):
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        generator = None
    if backend in ("cuda", "cpu"):
        result = _C.step(
            table, i, x, history, noise, generator, seeds, out, kind, unconditional, scale, draws, True, *shard,
            list(torch_layout), None,
        )  # fmt: skip
        if result is None:
            raise RuntimeError(f'backend "{backend}" refused a step that it should run: please report this')
        return result
    if backend == "reference" or (seeds is not None and global_shape):
        row = row_of(table, i, x)
        if seeds is not None:
            noise = draw_portable(row, x, seeds if isinstance(seeds, Tensor) else seeds_of(seeds, x), *shard)
    if backend == "triton":
        from .kernels import er_sde_step

        return er_sde_step.step(table, i, x, history, out, draws, noise, generator, seeds, kind, unconditional, scale)
    return written_to(out, reference(row, x, history, noise, kind, unconditional, scale))


def written_to(out: Tensor | None, result):
    """The result of a step with its next sample in `out`, where that is given."""
    if out is None:
        return result
    return (out.copy_(result[0]), *result[1:]) if isinstance(result, tuple) else out.copy_(result)


def _draws_torch_in_kernel(backend: str, x: Tensor, scale, torch_layout) -> bool:
    """Whether the backend draws torch's stream itself; elsewhere torch.randn draws it."""
    if backend == "triton":
        from .kernels import er_sde_step

        return not isinstance(scale, Tensor) and er_sde_step.draws_as_torch(x)  # its stream does not know samples
    if backend == "cuda" and _torch_stream_is_as_here(x.device):
        return True
    if torch_layout:
        raise ValueError(f"torch_layout cannot be drawn on {x.device}: torch's stream there is not the one that is known")
    return False


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
