"""The Triton kernel, for GPUs without the extension."""

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
from .base import Backend, refuses_tensors


class Triton(Backend):
    name = "triton"
    kernel_for = ("cuda", "xpu")

    def unavailable(self) -> str | None:
        return unavailable()

    def only_by_name(self, request) -> bool:
        return request.x.is_cpu  # where it is interpreted, for tests

    def refuses(self, request) -> str | None:
        return refuses_tensors(request, request.x.device.type != "cpu" or _interpreting())

    def run(self, request):
        from ..kernels import er_sde_step

        x, noise = request.x, request.noise
        if isinstance(noise, TorchStream) and request.draws:
            # Its stream does not know samples.
            samples_differ = request.output is not None and isinstance(request.output.scale, Tensor)
            if samples_differ or not er_sde_step.draws_as_torch(x):
                noise = noise.draw(x)
        elif isinstance(noise, Portable) and noise.global_shape:
            noise = portable_noise_of(request)
        return er_sde_step.step(request._replace(noise=noise))


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
