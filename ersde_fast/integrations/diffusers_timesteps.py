"""The timesteps of a run, and which step of it a timestep belongs to that a pipeline passes."""

from numbers import Number

import numpy as np
import torch
from torch import Tensor

from .diffusers_arguments import is_whole

ROUNDINGS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that a timestep may have been through


class Timesteps:
    """The timesteps of a run.

    Attributes:
        on_cpu: [num_steps], on the CPU, int64 or float32.
        placed: the same on the device of the run.
    """

    def __init__(self, timesteps: np.ndarray, device):
        whole = np.issubdtype(timesteps.dtype, np.integer)
        self.on_cpu = torch.from_numpy(np.ascontiguousarray(timesteps)).to(torch.int64 if whole else torch.float32)
        self.placed = self.on_cpu.to(device)

    def step_of(self, timestep: float | Tensor, expected: int | None) -> int | None:
        """The step that a timestep belongs to, where that costs nothing: a view into `placed`, as a loop over it gives, says so by its
        address, whatever the device. None for a number that only a device knows.

        Args:
            expected: the step that comes next, whose timestep may stand twice; None before the first.
        """
        if isinstance(timestep, Tensor):
            placed = self.placed
            if timestep.dim() and timestep.numel() != 1:
                raise ValueError(f"timestep must be one number, got shape {tuple(timestep.shape)}")
            place, rest = divmod(timestep.data_ptr() - placed.data_ptr(), placed.element_size())
            alike = timestep.dtype == placed.dtype and timestep.device == placed.device
            if alike and 0 <= place < placed.shape[0] and not rest:
                return place
            if not timestep.is_cpu:
                return None
        elif not isinstance(timestep, Number):
            raise TypeError(f"timestep must be a number or a tensor of one, got {type(timestep).__name__}")
        if self.on_cpu.is_floating_point() and is_whole(timestep):
            raise ValueError(
                f"timestep must be one of scheduler.timesteps, which are not whole here, got {timestep}: no index of a loop"
            )
        if expected is not None and self._is_time(timestep, expected):
            return expected
        return place_in(self.on_cpu, timestep)

    def _is_time(self, timestep: float | Tensor, i: int) -> bool:
        """Whether a number is the timestep of step i, or a rounding of it."""
        value, time = float(timestep), self.on_cpu[i]
        return time.item() == value or (not is_whole(timestep) and any(time.to(dtype).item() == value for dtype in ROUNDINGS))


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
