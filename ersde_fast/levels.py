"""The levels of a run as they are given: taken as float64, with the alphas of a process, and every one of them checked."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Process = Literal["ve", "vp", "flow"]

EPS = torch.finfo(torch.float64).eps
CPU = torch.device("cpu")  # named in every factory: the user may have set another default device


class Levels(NamedTuple):
    """The levels of a plan, float64 [num_steps + 1], and which of them their successors repeat, bool [num_steps]."""

    sigmas: Tensor
    alphas: Tensor
    er_lambdas: Tensor
    repeated: Tensor


def _vp(sigma: Tensor) -> Tensor:
    return torch.sqrt((1 - sigma) * (1 + sigma))


def _flow(sigma: Tensor) -> Tensor:
    return 1 - sigma


PROCESSES: dict[Process, Callable[[Tensor], Tensor]] = {"ve": torch.ones_like, "vp": _vp, "flow": _flow}
MAX_SIGMA: dict[Process, float] = {"vp": 1.0, "flow": 1.0}


def on_host(values: Any) -> Any:
    """An argument of er_sde_plan on the CPU; what is no tensor stays as it is."""
    return values.cpu() if isinstance(values, Tensor) and not values.is_meta else values


def level_arguments(sigmas, alphas, process, device: torch.device) -> tuple[Tensor, Tensor | None, Process | None]:
    """The arguments that say the levels: sigmas on the device, and alphas there or the process."""
    if not isinstance(process, str) or process not in PROCESSES:
        known = '"ve" for models of EDM and k-diffusion, "vp" for those of DDPM, "flow" for flow matching'
        raise ValueError(f'process must be "ve", "vp" or "flow", got {process!r}: {known}')
    if alphas is None:
        return _schedule("sigmas", sigmas, device, MAX_SIGMA.get(process, math.inf)), None, process
    sigmas, alphas = _schedule("sigmas", sigmas, device, math.inf), _schedule("alphas", alphas, device, math.inf)
    if len(alphas) != len(sigmas):
        raise ValueError(f"alphas must have the length of sigmas, {len(sigmas)}, got {len(alphas)}")
    return sigmas, alphas, None


def real_tensor(name: str, values, device: torch.device) -> tuple[Tensor, torch.dtype]:
    """An argument as a tensor of its own on the device, float64 (there also float32), and the dtype that it had."""
    try:
        if isinstance(values, np.ndarray):
            if np.iscomplexobj(values):
                raise TypeError(f"they are {values.dtype}")
            values = torch.as_tensor(values.copy(), device=CPU)  # a flipped schedule has negative strides, which are refused
        values = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64, device=CPU)
        if values.is_complex() or values.layout != torch.strided:
            raise TypeError(f"they are {values.dtype}, {values.layout}")
        as_it_is = device != CPU and values.dtype in (torch.float32, torch.float64)
        schedule = values.detach().to(device)
        return schedule.to(values.dtype if as_it_is else torch.float64, copy=device == CPU), values.dtype
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a list, array or tensor of real numbers, got {type(values).__name__}: {error}"
        ) from None


def _schedule(name: str, values, device: torch.device, largest: float) -> Tensor:
    """A schedule argument on the device. Half precision is bounded here: its rounding does not show afterwards."""
    schedule, dtype = real_tensor(name, values, device)
    if schedule.dim() != 1 or len(schedule) < 2:
        remedy = ": ersde_fast.schedules makes levels of a number of steps, as karras_sigmas(20)" if schedule.dim() == 0 else ""
        raise ValueError(f"{name} must be one-dimensional with at least 2 values, got shape {tuple(schedule.shape)}{remedy}")
    if dtype in (torch.bfloat16, torch.float16):
        schedule = _bounded(schedule, largest, 4 * torch.finfo(dtype).eps)
    return schedule


def _bounded(levels: Tensor, largest: float, rounding: Tensor | float) -> Tensor:
    """Levels from 0 to `largest` where rounding alone put them outside."""
    near = (levels >= -rounding) & (levels <= largest + rounding)
    return torch.where(near, levels.clamp(0, largest), levels)


def _rounding(values: Tensor) -> Tensor:
    """Four ulps of each number's own precision, relative: float32's where that holds the number, whatever carries it here."""
    return 4 * torch.where(values.float() == values, torch.full_like(values, torch.finfo(torch.float32).eps), EPS)


def _repeated(levels: Tensor) -> Tensor:
    """[num_steps] of bool: which levels their successors repeat, up to rounding."""
    rounding = _rounding(levels)
    return (levels[1:] - levels[:-1]).abs() <= torch.minimum(rounding[1:], rounding[:-1]) * levels[:-1]


def checked_levels(sigmas: Tensor, alphas: Tensor | None, process: Process | None) -> Levels:
    """The levels on the host, every one of them checked."""
    sigmas = _bounded(sigmas, MAX_SIGMA.get(process, math.inf), _rounding(sigmas))
    _check_levels("sigmas", sigmas)
    if process is None:
        alphas = _bounded(alphas, math.inf, _rounding(alphas))
        _check_levels("alphas", alphas)
    elif (beyond := sigmas > MAX_SIGMA.get(process, math.inf)).any():
        at = int(beyond.nonzero()[0])
        remedy = ': timesteps are no levels, and levels of k-diffusion\'s kind need process="ve"' if sigmas[at] > 2 else ""
        raise ValueError(f'sigmas must be at most 1 for process "{process}", got sigmas[{at}] = {sigmas[at].item()}{remedy}')
    repeated = _repeated(sigmas) if process else _repeated(sigmas) & _repeated(alphas)
    if process:
        alphas = PROCESSES[process](sigmas)
    er_lambdas = sigmas / alphas
    if (empty := (alphas == 0) & (sigmas == 0)).any():
        raise ValueError(f"alphas and sigmas must not both be 0, as at index {int(empty.nonzero()[0])}")
    rising = (er_lambdas[1:] > er_lambdas[:-1]) & ~repeated
    if rising.any():
        at = int(rising.nonzero()[0]) + 1
        raise ValueError(
            f"sigmas must not rise: er_lambda = sigma / alpha goes from {er_lambdas[at - 1].item()} at index {at - 1} "
            f"to {er_lambdas[at].item()} at index {at}; sort the schedule from noise to data, as sigmas.flip(0) does"
        )
    return Levels(sigmas, alphas, er_lambdas, repeated)


def _check_levels(name: str, levels: Tensor) -> None:
    bad = ~(torch.isfinite(levels) & (levels >= 0))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be finite and at least 0, got {name}[{at}] = {levels[at].item()}")
