"""What callers of ERSDEScheduler pass, in the form in which it takes them."""

import warnings
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

ROUNDINGS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that a timestep may have been through


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


def place_in(schedule: Tensor, timestep: float | Tensor) -> int:
    """Where a timestep stands among those of a schedule, on the CPU; see ERSDEScheduler.index_for_timestep."""
    value = float(timestep)
    places = (schedule == value).nonzero()[:, 0]
    if len(places):
        return places[min(1, len(places) - 1)].item()
    rounded = torch.stack([schedule.to(dtype).double() == value for dtype in ROUNDINGS]).any(0)
    if is_whole(timestep) or not rounded.any():
        raise ValueError(
            f"timestep {value:g} is not in the schedule of {len(schedule)} steps from {schedule[0].item():g} to "
            f"{schedule[-1].item():g}: pass one of scheduler.timesteps, not the index of a loop or a timestep of another run"
        )
    distance = (schedule.double() - value).abs()
    return torch.where(rounded, distance, torch.inf).argmin().item()


def without_numpy(value):
    """A config's value as JSON can hold it."""
    if isinstance(value, np.generic):
        return value.item()
    return [without_numpy(v) for v in value] if isinstance(value, (list, tuple)) else value


def for_batch(denoised: Tensor, sample: Tensor) -> Tensor:
    """A prediction for a sample that stands in the batch several times, as guidance has it."""
    return torch.cat([denoised] * max(len(sample) // len(denoised), 1))


def clipped(denoised: Tensor, config) -> Tensor:
    """A prediction within what the config allows: thresholded by its own largest numbers (arXiv 2205.11487), clipped, or as it is."""
    if config.thresholding:
        size = quantile(denoised.flatten(1).abs(), config.dynamic_thresholding_ratio)
        size = size.clamp(1, config.sample_max_value).view(-1, *[1] * (denoised.dim() - 1))
        return denoised.clamp(-size, size) / size
    return denoised.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else denoised


def quantile(values: Tensor, q: float) -> Tensor:
    """Of each row, between neighbours in a line, as torch.quantile, which takes at most 2^24 numbers."""
    position = q * (values.shape[1] - 1)
    low = int(position)
    below = values.kthvalue(low + 1, dim=1).values
    above = values.kthvalue(min(low + 2, values.shape[1]), dim=1).values
    return torch.lerp(below, above, position - low)


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
