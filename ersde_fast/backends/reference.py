"""The specification as a backend: plain PyTorch, for whatever no kernel takes."""

from torch import Tensor

from ..noise import Portable, float64_device, specified_noise
from ..reference import portable_noise_of, step_of, written_to
from .base import Backend
from .compiled import CPU


class Reference(Backend):
    name = "reference"

    def run(self, request):
        x, noise = request.x, request.noise
        if isinstance(noise, Portable):
            noise = portable_noise_of(request, draw)
        elif not isinstance(noise, Tensor):
            noise = noise.draw(x) if request.draws else None
        return written_to(request.out, step_of(request, noise))

    def noise(self, shape, seeds, step, device) -> Tensor:
        return specified_noise(shape, seeds.to(device), step)


def draw(shape, seeds: Tensor, step: int | Tensor, global_shape, global_start) -> Tensor:
    """`specified_noise`; where it is drawn on the host for a device without float64, by the host's kernel as far as that goes."""
    host = float64_device(seeds.device)
    if host != seeds.device and isinstance(step, int) and not global_shape:
        noise = CPU.noise(tuple(shape), seeds.to(host), step, host)
        if noise is not None:
            return noise.to(seeds.device)
    return specified_noise(shape, seeds, step, global_shape, global_start)


REFERENCE = Reference()
