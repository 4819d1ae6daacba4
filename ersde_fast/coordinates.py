"""What a fit sees of samples: Fourier coefficients of those whose neighbours are alike, such as pictures; of others their numbers.

Most of what pictures differ in is coarse, so a mean square of pixels says little of what is fine and shows all the same. Errors of Fourier
coefficients, each divided by the root of its standard deviation, count both.
"""

import math

import torch
from torch import Tensor

from .levels import CPU
from .noise import float64_device

SHARPENED = 0.25  # the power of a variance by which its coordinate is divided
FAINT = 1e-3  # of the mean variance: what is fainter does not count the more for it
SETTLING = 50  # rounds that bring chances, none of which is above 1, to their sum


class Coordinates:
    """Linear coordinates of samples [n, *shape]: float64 [n, m] on the CPU, with the samples' norm, in the mean where some are left out.

    Args:
        shape: of a sample. Of three axes and more the last two, height and width, are transformed; of two the longer, a sequence; of
            one, whose neighbours are nothing to each other, none.
        wanted: about so many coordinates are kept: the coarse ones, and of fine ones some, each of which counts for more.
        device: of the samples.
    """

    def __init__(self, shape: tuple[int, ...], wanted: int, device: torch.device):
        self.moved = len(shape) == 2 and shape[0] > shape[1]
        self.grid = tuple(shape[-2:]) if len(shape) > 2 else (1, max(shape) if len(shape) == 2 else 1)
        down = torch.fft.fftfreq(self.grid[0], dtype=torch.float64, device=CPU).abs()
        across = torch.fft.rfftfreq(self.grid[1], dtype=torch.float64, device=CPU)
        fineness = torch.hypot(down[:, None], across) + 0.5 / max(self.grid)
        alone, alone_across = down % 0.5 == 0, across % 0.5 == 0  # frequencies that are their own conjugates: real
        parts = torch.stack([torch.ones_like(fineness), (~(alone[:, None] & alone_across)).double()], dim=2)
        grids = math.prod(shape) // math.prod(self.grid)
        chances = (parts / fineness[..., None]).flatten()
        if chances.count_nonzero() > (each := wanted / grids):
            for _ in range(SETTLING):
                chances = (chances * (each / chances.sum())).clamp(max=1)
        else:
            chances = chances.sign()
        chances = chances.expand(grids, -1).flatten()
        drawn = torch.rand(len(chances), generator=torch.Generator(CPU).manual_seed(0), dtype=torch.float32, device=CPU)
        places = (drawn < chances).nonzero()[:, 0]
        self.places, self.frequencies = places.to(device), places // 2 % fineness.numel()
        there = torch.where(alone_across, 1.0, 2.0).double()  # with its conjugate, which is left out
        there = there.expand_as(fineness).flatten()
        self.weights = (there[self.frequencies] / chances[places]).sqrt()

    def of(self, samples: Tensor) -> Tensor:
        """[n, m]"""
        values = torch.view_as_real(self._spectrum(samples)).flatten(1)[:, self.places]
        return values.to(float64_device(values.device)).double().to(CPU) * self.weights

    def variances(self, samples: Tensor) -> Tensor:
        """[m] of the frequency of each coordinate, over the samples and all their grids: channels, frames."""
        spectrum = self._spectrum(samples)
        variances = (spectrum - spectrum.mean(0)).abs().square().mean((0, 1)).flatten()
        return variances.to(float64_device(variances.device)).double().to(CPU)[self.frequencies]

    def _spectrum(self, samples: Tensor) -> Tensor:
        """[n, grids, height, width // 2 + 1], complex."""
        grids = (samples.mT if self.moved else samples).reshape(len(samples), -1, *self.grid)
        grids = grids if grids.dtype == torch.float64 else grids.float()
        if self.grid == (1, 1):  # of which a transform is itself, at the price of a transform for each number
            return torch.complex(grids, torch.zeros_like(grids))
        return torch.fft.rfft2(grids, norm="ortho")


def sharpness(variances: Tensor) -> Tensor:
    """[m] what coordinates of these variances are multiplied by for a fit: 1 where all are alike."""
    return (variances / variances.mean()).clamp(min=FAINT) ** -SHARPENED
