"""The compiled kernels: the extension `_C`, on CPUs and on CUDA devices; or None, and why there is none."""

import importlib
import warnings
from types import ModuleType

import torch  # whose libraries the extension links with
from torch import Tensor

from ..noise import Portable, TorchStream
from ..reference import table_for
from .base import FLOATS, Backend, refuses_tensors

try:
    from .._build_info import REASONS, TORCH
except ImportError:
    REASONS, TORCH = {}, None

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps . in the folder of ersde-fast"


def load() -> tuple[ModuleType | None, str | None]:
    """The extension and None, or None and the reason, which names the remedy."""
    if "cpu" in REASONS:
        return None, REASONS["cpu"]
    built, here = (str(version).split(".")[:2] for version in (TORCH, torch.__version__))
    if TORCH is not None and built != here:  # what a C++ class looks like may differ between them
        return None, f"ersde-fast was built against torch {TORCH}, and this is torch {torch.__version__}: {REINSTALL}"
    try:
        return importlib.import_module("ersde_fast._C"), None
    except ModuleNotFoundError:
        return None, f"the extension was not built, or for another Python: {REINSTALL}"
    except ImportError as error:
        return None, f"the extension does not load beside torch {torch.__version__} ({error}): {REINSTALL}"


_C, WHY_NOT = load()


class Extension(Backend):
    """The extension's kernel for one type of device."""

    keeps_ring = True

    def __init__(self, name: str):
        self.name, self.kernel_for = name, (name,)

    def unavailable(self) -> str | None:
        return WHY_NOT if _C is None else None

    def refuses(self, request) -> str | None:
        return refuses_tensors(request, request.x.device.type == self.name)

    def run(self, request):
        noise = request.noise
        if isinstance(noise, TorchStream) and request.draws and not self.draws(noise, request.x.device):
            noise = noise.draw(request.x)
        result = call(request, noise)
        if result is None:
            raise RuntimeError(f'backend "{self.name}" refused a step that it should run: please report this')
        return result

    def draws(self, stream: TorchStream, device: torch.device) -> bool:
        """Whether the kernel draws torch's stream itself; elsewhere torch.randn draws it."""
        return False

    def noise(self, shape, seeds, step, device) -> Tensor | None:
        if self.unavailable() is not None or device.type != self.name:
            return None
        noise = torch.empty(shape, dtype=torch.float32, device=device)
        _C.portable_noise(noise, seeds, step)
        return noise

    def builds_plans(self, device: torch.device) -> bool:
        return self.unavailable() is None and device.type == self.name

    def plan(self, sigmas, alphas, options) -> tuple[Tensor, Tensor]:
        orders = None
        if len(set(options.orders)) > 1:
            orders = torch.tensor(options.orders, dtype=torch.int32, device="cpu").to(sigmas.device, non_blocking=True)
        return _C.plan(sigmas, alphas, options, orders)


class CUDAExtension(Extension):
    draws_torch_layout = True

    def unavailable(self) -> str | None:
        if _C is None:
            return WHY_NOT
        if not _C.has_cuda:
            return REASONS.get(
                "cuda", "the extension was built without CUDA: reinstall ersde-fast beside a torch with CUDA and nvcc"
            )
        return None if torch.cuda.is_available() else "torch sees no CUDA device"

    def draws(self, stream: TorchStream, device: torch.device) -> bool:
        if _torch_stream_is_as_here(device):
            return True
        if stream.layout is not None:
            raise ValueError(f"torch_layout cannot be drawn on {device}: torch's stream there is not the one that is known")
        return False


def call(request, noise):
    """The step by the extension; None where it is none that it runs."""
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
    return _C.step(
        table_for(request.plan, request.i, request.x), i, request.x, request.history, draws=request.draws,
        out=request.out, ring=request.ring, trusted=True, **source, **output,
    )  # fmt: skip


def _whole(value):
    """An index or a scale as the kernel reads it, one number after another."""
    return value.contiguous() if isinstance(value, Tensor) else value


def torch_noise(out: Tensor, seed: int, offset: int, layout: tuple[int, int]) -> int:
    """Fills a contiguous tensor with what torch.randn draws on a card of that layout; returns by how much the offset grows."""
    return _C.torch_noise(out, seed, offset, *layout)


CPU, CUDA = Extension("cpu"), CUDAExtension("cuda")


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
                stacklevel=5,
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
        grows = torch_noise(drawn, generator.initial_seed(), offset, layout)
        if not torch.equal(drawn, expected) or generator.get_offset() != offset + grows:
            return False
    return True
