"""The demo's network as a problem: its samples against its own limit and against its data, in the features of a classifier."""

import functools
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ersde_fast import place_sigmas
from features import load_features
from problems import frechet
from samplers import ours

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from digits_unet import load_digits_unet

STD = 0.6  # of its data
LIMIT = ours(max_stage=3, method="newton", node_scale=10 * STD)


@functools.cache
def network_on(device: str):
    net = load_digits_unet().to(device, memory_format=torch.channels_last)
    return torch.compile(net) if device != "cpu" else net


class Network:
    """Runs samplers on the network, the noise of each seed the same for every sampler.

    Args:
        limit_sigmas: the levels of the run that is taken for the network's limit.
        classes: whether samples have a class, all of them alike often, or the network finds one itself.
        samples: a multiple of the batch, that of 10.
    """

    def __init__(self, device: str, limit_sigmas: Tensor, classes: bool, samples: int = 10_000, batch: int = 2_000):
        self.device, self.samples, self.batch = device, samples, batch
        self.net = network_on(device)
        self.classifier = load_features().to(device)
        self.labels = F.one_hot(torch.arange(batch, device=device) % 10, 10).float() if classes else None
        self.data = self.classifier.mean.double().cpu(), self.classifier.covariance.double().cpu()
        self.limit = moments(self.features(self.run(LIMIT, limit_sigmas, 100)))

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        level = torch.tensor(sigma, dtype=torch.float32, device=self.device)
        with torch.autocast(self.device, torch.float16, enabled=self.device != "cpu"):
            return torch.cat([self.net(part.float(), level, self.labels) for part in x.split(self.batch)]).to(x.dtype)

    def placed(self, pilot: Tensor, num_steps: int) -> Tensor:
        """Levels by the local error on the network, of a pilot of one batch."""
        g = torch.Generator(self.device).manual_seed(7)
        x = pilot[0].item() * torch.randn(self.batch, 1, 28, 28, device=self.device, generator=g)
        return place_sigmas(lambda x, sigma: self.denoise(x, sigma[0].item()), x, pilot, num_steps)

    def run(self, run, sigmas: Tensor, seed: int) -> Tensor:
        g = torch.Generator(self.device).manual_seed(1000 + seed)
        shape = (self.samples, 1, 28, 28)
        draw = lambda i=None: torch.randn(shape, device=self.device, generator=g)  # noqa: E731
        return run(self.denoise, sigmas[0].item() * draw(), sigmas, draw)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Of the images as they would be saved: without what lies outside [-1, 1]."""
        return torch.cat([self.classifier.features(part.float().clamp(-1, 1)) for part in x.split(self.batch)]).double().cpu()

    def measure(self, run, sigmas: Tensor, seed: int) -> dict:
        """One cell: squared Frechet distances to the network's limit and to its data."""
        x = self.run(run, sigmas, seed)
        if not x.isfinite().all():
            return {"frechet": float("inf"), "data": float("inf")}
        features = self.features(x)
        return {"frechet": frechet(features, *self.limit), "data": frechet(features, *self.data)}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.cov(x.T, correction=0)
