"""The compiled kernels, on CPUs and on CUDA devices, and the two ways to them: by the extension, or by ctypes and NVRTC.

The extension is quicker on the host, and is taken where it was built. ERSDE_FAST_CPU=library and ERSDE_FAST_CUDA=nvrtc take the other
way all the same: for tests, and to compare.
"""

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..noise import Portable, TorchStream, is_torch_stream
from ..reference import table_for
from . import extension, library, nvrtc
from .base import FLOATS, Backend, refuses_tensors

FOLDER = Path(__file__).resolve().parent.parent  # of the library and of the kernels' sources


class Compiled(Backend):
    """The kernel for one type of device.

    Attributes:
        kernels: what runs it, the extension's module or what answers like it; None where there is none.
        way: which of the two, "extension" or another; None where there is none.
        why_no_kernels: the reason.
    """

    keeps_ring = True

    kernels = None
    way: str | None = None
    why_no_kernels: str | None = None

    def __init__(self, name: str):
        self.name, self.kernel_for = name, (name,)

    def take(self, way: str, kernels) -> None:
        self.way, self.kernels, self.why_no_kernels = way, kernels, None

    def unavailable(self) -> str | None:
        return self.why_no_kernels if self.kernels is None else None

    def refuses(self, request) -> str | None:
        return refuses_tensors(request.x, request.tensors, request.x.device.type == self.name)

    def run(self, request):
        noise = request.noise
        if isinstance(noise, TorchStream) and request.draws and not self.draws(noise, request.x.device):
            noise = noise.draw(request.x)
        result = self.call(request, noise)
        if result is None:
            raise RuntimeError(f'backend "{self.name}" refused a step that it should run: please report this')
        return result

    def takes(self, x: Tensor, tensors: list[Tensor]) -> bool:
        """Whether its kernels read tensors like x, which lies on its device."""
        return refuses_tensors(x, tensors, True) is None

    def log_prob(self, request, x_next: Tensor, reduction: str) -> Tensor | None:
        """The log-density of a step at x_next, float64 [batch]; None where it is none that the kernels run."""
        return self.call(request, TorchStream(), reduction=reduction, x_next=x_next)

    def log_prob_gradients(
        self, request, x_next: Tensor, gradient: Tensor, into: list[Tensor | None]
    ) -> list[Tensor | None] | None:
        """Its gradients with respect to x, the history, the unconditional output and x_next, in that order, written to the tensors of
        a list; times the gradient of the log-density, float64 [batch]."""
        done = self.call(request, TorchStream(), reduction="sum", x_next=x_next, gradient=gradient, gradients=into)
        return None if done is None else into

    def call(self, request, noise, **density):
        """The step with that noise, or what `density` asks for; None where it is none that the kernels run."""
        if isinstance(noise, Tensor):
            source = {"noise": noise}
        elif isinstance(noise, Portable):
            source = {"seed": noise.seeds, "global_shape": list(noise.global_shape), "global_start": list(noise.global_start)}
        else:
            source = {"generator": noise.generator, "torch_layout": list(noise.layout or ())}
        output = {}
        if request.output is not None:
            unconditional, scale, cfg_pp = request.output
            output = {"predicts": True, "unconditional": unconditional, "scale": _whole(scale), "cfg_pp": cfg_pp}
        i = tuple(map(_whole, request.i)) if isinstance(request.i, tuple) else request.i
        return self.kernels.step(
            table_for(request.plan, request.i, request.x), i, request.x, request.history, draws=request.draws,
            out=request.out, ring=request.ring, trusted=True, **source, **output, **density,
        )  # fmt: skip

    def draws(self, stream: TorchStream, device: torch.device) -> bool:
        """Whether the kernel draws torch's stream itself; elsewhere torch.randn draws it."""
        return False

    def noise(self, shape, seeds, step, device) -> Tensor | None:
        if device.type != self.name or self.unavailable() is not None:
            return None
        noise = torch.empty(shape, dtype=torch.float32, device=device)
        self.kernels.portable_noise(noise, seeds, step)
        return noise

    def builds_plans(self, device: torch.device) -> bool:
        return device.type == self.name and self.unavailable() is None

    def plan(self, sigmas, alphas, options) -> tuple[Tensor, Tensor]:
        orders = None
        if len(set(options.orders)) > 1:
            orders = torch.tensor(options.orders, dtype=torch.int32, device="cpu").to(sigmas.device, non_blocking=True)
        return self.kernels.plan(sigmas, alphas, options, orders)


class CompiledForCUDA(Compiled):
    draws_torch_layout = True

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return self.why_no_kernels or "torch sees no CUDA device"
        if self.kernels is None and self.why_no_kernels is None:  # not tried before there is a device
            kernels, why = nvrtc.load(kernels_library()[0], FOLDER)
            if kernels is None:
                self.why_no_kernels = _both(WHY_NO_EXTENSION_FOR_CUDA, why)
            else:
                self.take("nvrtc", kernels)
        return self.why_no_kernels

    def draws(self, stream: TorchStream, device: torch.device) -> bool:
        if self._torch_stream_is_as_here(device):
            return True
        if stream.layout is not None:
            raise ValueError(f"torch_layout cannot be drawn on {device}: torch's stream there is not the one that is known")
        return False

    def _torch_stream_is_as_here(self, device: torch.device) -> bool:
        """Whether the stream drawn in the kernel is what torch.randn draws on this device: compared on first use.

        Nothing is compared while a graph is being captured: that call then takes torch.randn, which a graph may hold too.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        if self.kernels.torch_stream(index) == 0 and not torch.cuda.is_current_stream_capturing():
            same = all(is_torch_stream(self._draw, torch.device("cuda", index), dtype) for dtype in FLOATS)
            self.kernels.set_torch_stream(index, same)
            if not same:
                warnings.warn(
                    f"torch {torch.__version__} draws normal noise on {torch.cuda.get_device_name(index)} in another order than "
                    f"ersde-fast knows: noise comes from torch.randn there, and the step reads it",
                    stacklevel=6,
                )
        return self.kernels.torch_stream(index) == 1

    def _draw(self, out: Tensor, generator: torch.Generator) -> None:
        """Fills a tensor [n] with torch's stream, the generator advanced."""
        card, offset = torch.cuda.get_device_properties(out.device), generator.get_offset()
        layout = card.multi_processor_count, card.max_threads_per_multi_processor
        generator.set_offset(offset + self.kernels.torch_noise(out, generator.initial_seed(), offset, *layout))


def _whole(value):
    """An index or a scale as the kernel reads it, one number after another."""
    return value.contiguous() if isinstance(value, Tensor) else value


def torch_noise(out: Tensor, seed: int, offset: int, layout: tuple[int, int]) -> int:
    """Fills a contiguous tensor with what torch.randn draws on a card of that layout; returns by how much the offset grows."""
    return (CUDA if out.is_cuda else CPU).kernels.torch_noise(out, seed, offset, *layout)


def _both(first: str | None, second: str | None) -> str:
    return "; ".join(filter(None, (first, second)))


def _extension_unless(variable: str) -> tuple[Any, str | None]:
    """The extension and None; or None and why not: another way is asked for, or it is missing."""
    asked = os.environ.get(variable)
    if asked is None or asked == "extension":
        return extension._C, extension.WHY_NOT
    known = {"ERSDE_FAST_CPU": "library", "ERSDE_FAST_CUDA": "nvrtc"}[variable]
    if asked != known:
        raise ValueError(f"{variable} must be extension or {known}, got {asked!r}")
    return None, None


@functools.cache
def kernels_library() -> tuple[ctypes.CDLL | None, str | None]:
    """The library and None, or None and why there is none; opened when it is first asked for."""
    return library.load(FOLDER)


CPU, CUDA = Compiled("cpu"), CompiledForCUDA("cuda")

_for_cpu, _why = _extension_unless("ERSDE_FAST_CPU")
if _for_cpu is not None:
    CPU.take("extension", _for_cpu)
elif (_opened := kernels_library()[0]) is not None:
    CPU.take("library", library.CPULibrary(_opened))
else:
    CPU.why_no_kernels = _both(_why, kernels_library()[1])

_for_cuda, WHY_NO_EXTENSION_FOR_CUDA = _extension_unless("ERSDE_FAST_CUDA")
if _for_cuda is not None and _for_cuda.has_cuda:
    CUDA.take("extension", _for_cuda)
elif _for_cuda is not None:
    WHY_NO_EXTENSION_FOR_CUDA = extension.REASONS.get("cuda", "the extension was built without CUDA")
