"""The Triton kernel, for GPUs without the extension."""

import ctypes
import functools
import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..noise import Portable, TorchStream
from ..reference import portable_noise_of
from ..table import W_D, W_NOISE
from ..tracing import is_unwatched
from .base import FLOATS, MAX_DIMS, Backend, refuses_tensors
from .library import PLAIN, NotPlain, check_generator, is_scale

ROWS = [ctypes.c_double * columns for columns in range(W_D + 6)]  # by their length


class Triton(Backend):
    """Attributes:
    kernels: what answers plain steps, once a step came here.
    """

    name = "triton"
    kernel_for = ("cuda", "xpu")
    kernels: "TritonKernels | None" = None

    def unavailable(self) -> str | None:
        return unavailable()

    def only_by_name(self, request) -> bool:
        return request.x.is_cpu  # where it is interpreted, for tests

    def refuses(self, request) -> str | None:
        return refuses_tensors(request.x, request.tensors, request.x.device.type != "cpu" or _interpreting())

    def run(self, request):
        from ..kernels import er_sde_step

        if self.kernels is None:
            self.kernels = TritonKernels(er_sde_step)
        x, noise = request.x, request.noise
        if isinstance(noise, TorchStream) and request.draws:
            # Its stream does not know samples.
            samples_differ = request.output is not None and isinstance(request.output.scale, Tensor)
            if samples_differ or not er_sde_step.draws_as_torch(x):
                noise = noise.draw(x)
        elif isinstance(noise, Portable) and noise.global_shape:
            noise = portable_noise_of(request)
        return er_sde_step.step(request._replace(noise=noise))


class TritonKernels:
    """Answers as the extension's module does, csrc/step_call.h, for the steps whose row the host knows."""

    def __init__(self, module):
        self.module = module

    def step(
        self, table, i, x, history, *, noise=None, generator=None, seed=None, draws=False, out=None, predicts=False,
        unconditional=None, scale=None, cfg_pp=False,
    ):  # fmt: skip
        """The next sample, or the pair of that and the prediction; None where the step is not plain. The table tells cfg_pp."""
        if type(x) not in PLAIN or not (x.is_cuda or self.module.INTERPRETED) or out is not None or not is_unwatched():
            return None
        if type(i) is not int or table.dim() != 2 or not table.is_cpu:
            return None
        num_steps, width = table.shape
        if not 0 <= i < num_steps:
            return None
        if (noise is not None) + (generator is not None) + (seed is not None) > 1 or not isinstance(history, (list, tuple)):
            return None
        row = ROWS[width].from_address(table.data_ptr() + 8 * width * i)[:]
        while width > W_D + predicts and row[width - 1] == 0:
            width -= 1
        uses = width - W_D
        if len(history) < uses or (unconditional is not None and not is_scale(scale)):
            return None
        inputs = [x, *history[:uses]]
        if unconditional is not None:
            inputs.append(unconditional)
        if noise is not None:
            inputs.append(noise)
        try:
            if not _are_plain(inputs, x):
                return None
            check_generator(generator, x.device)
        except (NotPlain, RuntimeError):  # a tensor that has no memory of its own
            return None
        drawn = self.module.NOTHING_DRAWN
        if noise is None and row[W_NOISE] != 0:
            if seed is not None:
                drawn = self.module.portable(seed, x)
            elif self.module.draws_as_torch(x):
                drawn = self.module.take_torch_stream(x, generator)
            else:
                noise = TorchStream(generator).draw(x)
        outputs = torch.empty_like(x), torch.empty_like(x) if predicts else None
        self.module.launch(x, inputs[1 : 1 + uses], unconditional, noise, outputs, row, scale, drawn)
        return outputs if predicts else outputs[0]


def _are_plain(tensors: list[Tensor], x: Tensor) -> bool:
    """Whether they are contiguous tensors with elements, like x, that autograd does not follow."""
    shape, device, grad = x.shape, x.device, torch.is_grad_enabled()
    if x.numel() == 0 or len(shape) >= MAX_DIMS:
        return False
    for t in tensors:
        if type(t) not in PLAIN or t.dtype not in FLOATS or t.shape != shape or t.device != device:
            return False
        if not t.is_contiguous() or t.is_neg() or (grad and t.requires_grad):
            return False
    return True


TRITON = Triton()


@functools.cache
def unavailable() -> str | None:
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
