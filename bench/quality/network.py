"""Trained networks as problems: their samples against their own limit and against their data, in the features of a classifier."""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional as F

from ersde_fast import place_sigmas
from features import EfficientNet, kernel_distance, load_features
from problems import Moments, as_model
from samplers import ours
from trained import load

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from digits_unet import load_digits_unet

STD = 0.6  # of the digits
LIMIT = ours(max_stage=3, method="newton", node_scale=10 * STD)
BATCH = 2500  # rows of one call of a network


@functools.cache
def network(name: str) -> nn.Module:
    """A network of EDM's interface, whose `denoised(x, sigma, one-hot labels or None)` are the denoised images."""
    return load_digits_unet() if name == "digits" else load(name)


@functools.cache
def network_on(name: str, device: str):
    net = network(name).to(device, memory_format=torch.channels_last)
    if device == "cpu":
        return net.denoised
    inductor.shape_padding = False  # its trial multiplies float32 by float16 under autocast, an error in torch 2.11
    return torch.compile(net.denoised, dynamic=False)


@functools.cache
def features_on(name: str, device: str) -> nn.Module:
    return (load_features() if name == "digits" else EfficientNet()).to(device, memory_format=torch.channels_last)


class Reference(NamedTuple):
    """What samples are compared with; `features` for KID, None where moments alone are known."""

    moments: Moments
    features: Tensor | None


class Network:
    """Runs samplers on a network, the noise of each seed the same for every sampler. All classes are alike often.

    Args:
        guidance: of classifier-free guidance; 1 is the class alone, 0 none, and both cost one evaluation of the network.
        samples: how many a cell has; a multiple of the number of classes.
        batch: rows of one call.
    """

    def __init__(self, name: str, device: str, guidance: float = 1.0, samples: int = 5000, batch: int = BATCH):
        self.name, self.device, self.guidance, self.samples, self.batch = name, device, guidance, samples, batch
        net = network(name)
        self.shape = (net.img_channels, net.img_resolution, net.img_resolution)
        self.net = network_on(name, device)
        self.labels = F.one_hot(torch.arange(samples, device=device) % net.label_dim, net.label_dim).float()

    @torch.no_grad()
    def call(self, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
        level = torch.tensor(sigma, dtype=torch.float32, device=self.device)
        with torch.autocast(self.device, torch.float16, enabled=self.device != "cpu"):
            return self.net(x.float(), level, labels).to(x.dtype)

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """Of rows 0, 1, ... of the samples: D, or Du + guidance (Dk - Du), whose two are one batch."""
        if self.guidance in (0, 1):
            parts = zip(x.split(self.batch), self.labels.split(self.batch), strict=True)
            return torch.cat([self.call(part, sigma, labels if self.guidance else None) for part, labels in parts])
        parts = zip(x.split(self.batch // 2), self.labels.split(self.batch // 2), strict=True)
        both = [self.call(part.repeat(2, 1, 1, 1), sigma, torch.cat([0 * labels, labels])).chunk(2) for part, labels in parts]
        return torch.cat([without + self.guidance * (told - without) for without, told in both])

    def placed(self, pilot: Tensor, num_steps: int) -> Tensor:
        """Levels by the local error on the network, of a pilot run."""
        g = torch.Generator(self.device).manual_seed(7)
        x = pilot[0].item() * torch.randn(self.samples, *self.shape, device=self.device, generator=g)
        return place_sigmas(as_model(self.denoise), x, pilot, num_steps, disable=True)

    def run(self, run, sigmas: Tensor, seed: int, denoise=None) -> Tensor:
        g = torch.Generator(self.device).manual_seed(1000 + seed)
        draw = lambda i=None: torch.randn(self.samples, *self.shape, device=self.device, generator=g)  # noqa: E731
        return run(denoise or self.denoise, sigmas[0].item() * draw(), sigmas, draw)

    @property
    def extractor(self) -> nn.Module:
        return features_on(self.name, self.device)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Of the images as they would be saved: without what lies outside [-1, 1]."""
        with torch.autocast(self.device, torch.float16, enabled=self.device != "cpu" and self.name != "digits"):
            return torch.cat([self.extractor.features(part.float().clamp(-1, 1)).float() for part in x.split(500)])

    def reference(self, x: Tensor) -> Reference:
        features = self.features(x)
        return Reference(Moments.of(features), features)

    @functools.cached_property
    def data(self) -> Reference:
        """Of the digits the moments that the classifier has kept; else `samples` of the training set, all classes alike often."""
        if self.name == "digits":
            return Reference(Moments(self.extractor.mean.double(), self.extractor.covariance.double()), None)
        from pictures import pictures

        images, labels = pictures(self.name.removesuffix("_flow"))
        g = torch.Generator().manual_seed(0)
        classes = self.labels.shape[1]
        chosen = [
            which[torch.randperm(len(which), generator=g)] for which in (labels.eq(c).nonzero()[:, 0] for c in range(classes))
        ]
        chosen = torch.cat([which[torch.arange(self.samples // classes) % len(which)] for which in chosen])
        return self.reference(images[chosen].to(self.device) / 127.5 - 1)

    def compare(self, x: Tensor, limit: Reference, with_data: bool = True) -> dict:
        """One cell: squared Frechet distances to the network's limit and to its data; of EfficientNet's features also KID."""
        if not x.isfinite().all():
            return {"frechet": float("inf")} | ({"data": float("inf")} if with_data else {})
        features, result = self.features(x), {}
        for name, reference in {"frechet": limit, **({"data": self.data} if with_data else {})}.items():
            result[name] = reference.moments.frechet(features)
            if reference.features is not None and self.name != "digits":
                result[{"frechet": "kid", "data": "data_kid"}[name]] = kernel_distance(features, reference.features)
        return result
