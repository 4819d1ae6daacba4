"""What a backend is."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..noise import TorchStream

if TYPE_CHECKING:
    from ..request import StepRequest
    from ..weights import PlanOptions

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # the dtypes of a step
MAX_DIMS = 12  # that tensors must have fewer of in a kernel


class Backend:
    """One way to run a step. Source: docs/extending.md, where one is added.

    Attributes:
        name: what `fast_step(..., backend=name)` calls it.
        kernel_for: the types of devices of which it is a kernel; a user of one without any is told.
        draws_torch_layout: whether it draws torch's stream as other cards do.
        keeps_ring: whether it finds earlier predictions in a ring.
    """

    name: str
    kernel_for: tuple[str, ...] = ()
    draws_torch_layout = False
    keeps_ring = False

    def unavailable(self) -> str | None:
        """Why it does not run on this machine, and the remedy; None where it does."""
        return None

    def only_by_name(self, request: "StepRequest") -> bool:
        """Whether it is slower for this step than what stands behind it in the list."""
        return False

    def refuses(self, request: "StepRequest") -> str | None:
        """Why it cannot run this step where it is available; None where it can."""
        return None

    def why_not(self, request: "StepRequest") -> str | None:
        """Why it cannot run this step; None where it can."""
        if isinstance(request.noise, TorchStream) and request.noise.layout is not None and not self.draws_torch_layout:
            return "torch_layout is drawn by the cuda backend: elsewhere pass noise=ersde_fast.torch_noise(...)"
        if request.ring is not None and not self.keeps_ring:
            return "the earlier predictions are in a ring"
        return self.unavailable() or self.refuses(request)

    def run(self, request: "StepRequest"):
        """The next sample of a step that it does not refuse, or from a model's output the pair of that and the prediction."""
        raise NotImplementedError

    def noise(self, shape: tuple[int, ...], seeds: Tensor, step: int, device: torch.device) -> Tensor | None:
        """The portable stream as float32 of that shape, seeds int64 [batch, 2]; None where it does not draw on that device."""
        return None

    def builds_plans(self, device: torch.device) -> bool:
        """Whether it builds the plans of named noise scalers on that device."""
        return False

    def plan(self, sigmas: Tensor, alphas: Tensor | None, options: "PlanOptions") -> tuple[Tensor, Tensor]:
        """A plan's table, in which a step that cannot be is a row of NaN, and its levels [3, num_steps + 1]: sigmas, alphas,
        er_lambdas. Where sigmas lie, without waiting for the device. eta of the options is a number, or float64 [num_steps] there."""
        raise NotImplementedError


def refuses_tensors(x: Tensor, tensors: list[Tensor], fits_device: bool) -> str | None:
    """What every kernel refuses: tensors of other devices, of too many dimensions, and what is no plain tensor."""
    if not fits_device:
        return f"x is on {x.device}"
    if x.dim() >= MAX_DIMS:
        return f"x has {x.dim()} dimensions, {MAX_DIMS - 1} are supported"
    if not all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg() and not t._is_zerotensor() for t in tensors):
        return "an input is no plain tensor: a subclass, a lazy view that is negated, or zeros without memory"
    return None
