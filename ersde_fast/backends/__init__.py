"""Which kernels run here, and which one runs a step: a list in order of speed, and the function that chooses from it.

A backend is an object of `Backend`, in a module of its own. To add one, put it into BACKENDS, before those that it is faster than.
(`fast_step` asks the compiled kernels themselves first, which know at once whether a step is a plain one of theirs.)
"""

import functools
import os
import warnings
from typing import Any

from .base import MAX_DIMS, Backend
from .compiled import CPU, CUDA
from .reference import REFERENCE
from .triton import TRITON

__all__ = ["BACKENDS", "CPU", "CUDA", "MAX_DIMS", "TRITON", "Backend", "available_backends", "choose", "kernels_for"]

BACKENDS: list[Backend] = [CUDA, TRITON, CPU, REFERENCE]


def available_backends() -> dict[str, str | None]:
    """What runs on this machine, and why the rest does not. `python -m ersde_fast` prints it.

    Returns:
        The name of each backend, the fastest first, to None if it runs here or else why it does not.

    Raises:
        Nothing: what is missing is said in the result.

    Source: docs/install.md.
    """
    return {backend.name: backend.unavailable() for backend in BACKENDS}


def kernels_for(x, name: str | None) -> Any:
    """What answers a plain step of x at once, where no compiled kernels are or another backend is named; or None."""
    if name == TRITON.name or (name is None and CUDA.why_no_kernels is not None and getattr(x, "is_cuda", False)):
        return TRITON.kernels
    return None


def choose(request, name: str | None = None) -> Backend:
    """The backend that runs a step: the one named, if it can, or the fastest that does.

    Args:
        request: a StepRequest.

    Raises:
        ValueError: saying why the one that is named cannot.
    """
    if name is None:
        fits = (b for b in BACKENDS if not b.only_by_name(request) and b.why_not(request) is None)
        chosen = next(fits, None)
        if chosen is REFERENCE:
            say_once_that_there_is_no_kernel(request.x.device.type)
        if chosen is not None:
            return chosen
        chosen = next(b for b in BACKENDS if b.draws_torch_layout)
    else:
        chosen = next((b for b in BACKENDS if b.name == name), None)
        if chosen is None:
            raise ValueError(f"backend must be one of {', '.join(b.name for b in BACKENDS)}, got {name!r}")
    if (why := chosen.why_not(request)) is not None:
        raise ValueError(f'backend "{chosen.name}" cannot run this step: {why}')
    return chosen


@functools.cache
def say_once_that_there_is_no_kernel(device_type: str) -> None:
    """Where none that the device could have was built; a step that its tensors alone keep from a kernel is nobody's mistake."""
    reasons = [backend.unavailable() for backend in BACKENDS if device_type in backend.kernel_for]
    if reasons and None not in reasons and os.environ.get("ERSDE_FAST_QUIET") != "1":
        warnings.warn(
            f"ersde-fast has no kernel for {device_type} tensors, and takes many times as long in plain PyTorch: "
            f"{'; '.join(reasons)} (ERSDE_FAST_QUIET=1 silences this)",
            stacklevel=4,
        )
