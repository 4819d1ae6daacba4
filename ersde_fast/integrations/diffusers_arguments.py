"""What callers of ERSDEScheduler pass, in the form in which it takes them."""

import warnings
from numbers import Integral

import numpy as np
from torch import Tensor


class Drawn(dict):
    """Which of a scheduler and its copies drew a step's noise from the config's seed, in the runs that were planned last."""

    def __deepcopy__(self, memo):
        return self

    def note(self, step: int, drawer: int) -> None:
        if self.setdefault(step, drawer) != drawer:
            warnings.warn(
                "copies of an ERSDEScheduler draw the same noise from its seed, in frames that each have a copy for one: leave seed None "
                "there, or give each copy its own",
                stacklevel=4,
            )


def numbers(name: str, values) -> np.ndarray:
    """An array of its own of a list, array or tensor on any device; NumPy has no bfloat16."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    elif isinstance(values, (list, tuple)):
        values = [value.item() if isinstance(value, Tensor) and value.dim() == 0 else value for value in values]
    values = np.array(values)
    if values.dtype.kind not in "iuf" or values.ndim > 1:
        raise TypeError(f"{name} must be numbers in one dimension, got {values.dtype} of shape {values.shape}")
    if values.size == 0:
        raise ValueError(f"{name} must hold at least one number, got none")
    return values


def is_whole(timestep: float | Tensor) -> bool:
    """Whether it is of a type of whole numbers."""
    if isinstance(timestep, Tensor):
        return not timestep.is_floating_point()
    return isinstance(timestep, Integral) and not isinstance(timestep, bool)


def without_numpy(value):
    """A config's value as JSON can hold it."""
    if isinstance(value, np.generic):
        return value.item()
    return [without_numpy(v) for v in value] if isinstance(value, (list, tuple)) else value


def checked_run(
    num_inference_steps, sigmas, timesteps, refuses: dict[str, bool]
) -> tuple[np.ndarray | None, np.ndarray | None, bool]:
    """The sigmas and timesteps of set_timesteps as arrays, less a 0 at the end of sigmas; and whether that was there.

    Args:
        refuses: whether the config places the levels, so that it takes no timesteps, and no sigmas.
    """
    if num_inference_steps is not None and timesteps is not None:
        raise ValueError("pass num_inference_steps or timesteps, not both")
    if num_inference_steps is None and timesteps is None and sigmas is None:
        raise ValueError("pass num_inference_steps, timesteps or sigmas")
    if (timesteps is not None and refuses["timesteps"]) or (sigmas is not None and refuses["sigmas"]):
        raise ValueError("timesteps and sigmas need a config without Karras, exponential and beta spacing, which place them")
    if num_inference_steps is not None and not (is_whole(num_inference_steps) and num_inference_steps >= 1):
        raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {num_inference_steps!r}")
    ends_at_zero = False
    if sigmas is not None:
        sigmas = numbers("sigmas", sigmas).astype(np.float64)
        if ends_at_zero := bool(len(sigmas) > 1 and sigmas[-1] == 0):
            sigmas = sigmas[:-1]
        if num_inference_steps is not None and len(sigmas) != num_inference_steps:
            raise ValueError(f"sigmas must hold {num_inference_steps} levels before the last 0, got {len(sigmas)}")
    if timesteps is not None:
        timesteps = numbers("timesteps", timesteps)
        if sigmas is not None and len(sigmas) != len(timesteps):
            raise ValueError(f"sigmas and timesteps must have one length, got {len(sigmas)} and {len(timesteps)}")
    return sigmas, timesteps, ends_at_zero
