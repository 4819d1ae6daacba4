"""The specification as a backend: plain PyTorch, for whatever no kernel takes."""

from torch import Tensor

from ..noise import Portable, specified_noise
from ..reference import portable_noise_of, step_of, written_to
from .base import Backend


class Reference(Backend):
    name = "reference"

    def run(self, request):
        x, noise = request.x, request.noise
        if isinstance(noise, Portable):
            noise = portable_noise_of(request)
        elif not isinstance(noise, Tensor):
            noise = noise.draw(x) if request.draws else None
        return written_to(request.out, step_of(request, noise))

    def noise(self, shape, seeds, step, device) -> Tensor:
        return specified_noise(shape, seeds.to(device), step)


REFERENCE = Reference()
