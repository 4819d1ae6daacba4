"""Problems whose truth is known: data distributions with exact denoisers, exact samples and exact moments."""

import copy
import functools
import math

import torch
from torch import Tensor


def as_model(denoise):
    """`denoise(x, number)` as the `model(x, sigma)` of samplers, sigma [batch]."""
    return lambda x, sigma: denoise(x, sigma[0].item())


class Mixture:
    """A mixture of Gaussians with full covariances.

    Args:
        weights: [k]; means: [k, d]; covariances: [k, d, d]; float64.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor):
        self.weights, self.means = weights, means
        self.values, self.axes = torch.linalg.eigh(covariances)  # [k, d], [k, d, d]
        self.all_axes = self.axes.transpose(0, 1).reshape(means.shape[1], -1)  # [d, k d]
        self.means_along = torch.einsum("kd,kde->ke", means, self.axes)
        self.mean = weights @ means
        centred = means - self.mean
        self.covariance = (weights[:, None, None] * (covariances + centred[:, :, None] * centred[:, None, :])).sum(0)

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """E[clean sample | x], x = clean + sigma noise, [n, d]."""
        variance = self.values + sigma**2
        along = (x @ self.all_axes).view(len(x), *self.values.shape) - self.means_along
        log_p = self.weights.log() - (along**2 / variance + variance.log()).sum(2) / 2
        p = torch.softmax(log_p, dim=1)
        shrunk = along.mul_(self.values / variance).mul_(p[:, :, None])
        return p @ self.means + shrunk.flatten(1) @ self.all_axes.T

    def denoise_component(self, x: Tensor, sigma: float) -> Tensor:
        """The same of one component each, [n, d]: sample i is of component i mod k, so n is a multiple of k."""
        x = x.view(-1, *self.means.shape).transpose(0, 1)
        along = (x - self.means[:, None]) @ self.axes * (self.values / (self.values + sigma**2))[:, None]
        return (along @ self.axes.transpose(1, 2) + self.means[:, None]).transpose(0, 1).reshape(-1, self.means.shape[1])

    def to(self, dtype: torch.dtype) -> "Mixture":
        other = copy.copy(self)
        vars(other).update({name: value.to(dtype) for name, value in vars(self).items()})
        return other

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[which] + torch.einsum("nij,nj->ni", self.axes[which], z * self.values[which].sqrt())


class Guided:
    """A mixture whose components are the classes, all alike often, under classifier-free guidance; sample i is of class i mod k."""

    def __init__(self, mixture: Mixture, guidance: float):
        self.mixture, self.guidance = mixture, guidance

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """Du + guidance (Dk - Du), [n, d], both denoisers exact."""
        unconditional = self.mixture.denoise(x, sigma)
        return unconditional + self.guidance * (self.mixture.denoise_component(x, sigma) - unconditional)


class Empirical:
    """The data themselves: the ideal denoiser of a training set is a softmax over it."""

    def __init__(self, data: Tensor):
        self.data = data
        self.mean, self.covariance = data.mean(0), torch.cov(data.T, correction=0)

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        distance = (self.data**2).sum(1) / 2 - x @ self.data.T
        return torch.softmax(-distance / sigma**2, dim=1) @ self.data

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.data[torch.randint(len(self.data), (n,), generator=generator)]


@functools.cache
def digits() -> Tensor:
    """scikit-learn's 1,797 digits of 8x8 pixels in [-1, 1]: [1797, 64] float64, standard deviation 0.54 about their mean."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().data / 8 - 1)


@functools.cache
def digits_mixture() -> Mixture:
    """Ten components fitted to the digits."""
    from sklearn.mixture import GaussianMixture

    fit = GaussianMixture(10, covariance_type="full", reg_covar=1e-3, random_state=0).fit(digits().numpy())
    return Mixture(*(torch.from_numpy(v) for v in (fit.weights_, fit.means_, fit.covariances_)))


@functools.cache
def digits_themselves() -> Empirical:
    return Empirical(digits())


def data_std(problem) -> float:
    """Root of the mean variance over dimensions."""
    return math.sqrt(problem.covariance.diagonal().mean().item())


class Moments:
    """Mean [d] and covariance [d, d] that samples are compared with, float64; the root of the covariance is taken once."""

    def __init__(self, mean: Tensor, covariance: Tensor):
        self.mean, self.covariance = mean, covariance
        values, axes = torch.linalg.eigh(covariance)
        self.root = axes * values.clamp(min=0).sqrt() @ axes.T

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        x = x.double()
        return cls(x.mean(0), torch.cov(x.T, correction=0))

    def frechet(self, x: Tensor) -> float:
        """Squared Frechet distance between the Gaussians of the samples' moments and of these."""
        x = x.double()
        other = torch.cov(x.T, correction=0)
        cross = torch.linalg.eigvalsh(self.root @ other @ self.root).clamp(min=0).sqrt().sum()
        return ((x.mean(0) - self.mean).square().sum() + other.trace() + self.covariance.trace() - 2 * cross).item()


def frechet(x: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """The same in one call."""
    return Moments(mean, covariance).frechet(x)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256) -> float:
    """Mean Wasserstein-1 distance over random directions, which are the same in every call."""
    directions = torch.randn(x.shape[1], projections, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=0)
    return ((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean().item()


def precision_recall(x: Tensor, y: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The share of samples x [n, d] that lie where samples y [m, d] do, and of y that lie where x do.

    A sample lies where others do that is no farther from one of them than that one's k-th nearest neighbour among them.

    Source: Kynkaanniemi et al. 2019 ("Improved precision and recall metric for assessing generative models"), k = 3.
    """

    def within(points: Tensor, others: Tensor) -> float:
        radii = torch.cdist(others, others).kthvalue(neighbours + 1, dim=1).values  # the nearest is the sample itself
        return (torch.cdist(points, others) <= radii).any(1).double().mean().item()

    return within(x, y), within(y, x)


def spectra() -> dict[str, Tensor]:
    """Eigenvalues of Gaussian data of 12,288 dimensions and mean variance 0.25: white, and as images' fall."""
    k = torch.arange(1, 12289, dtype=torch.float64)
    powers = {"white": 0.0, "k^-0.5": 0.5, "1/k": 1.0, "k^-1.5": 1.5}
    return {name: k**-power / (k**-power).mean() * 0.25 for name, power in powers.items()}


def gaussian_variance(run, sigmas: Tensor, eigenvalues: Tensor, start: Tensor | None = None) -> Tensor:
    """Variance of a sampler's result along each eigen-direction of Gaussian data, [1, d], without drawing a sample.

    Every direction is a scalar linear recursion, so the variance is the sum of the squares of the responses to the start and to the
    noise of each step.

    Args:
        run: `run(denoise, x, sigmas, noise)`, where noise(i) is that of the i-th draw.
        start: the standard deviation at the start, [d]; None is sigmas[0].
    """
    denoise = lambda x, sigma: eigenvalues / (eigenvalues + sigma**2) * x  # noqa: E731
    zero, one = torch.zeros_like(eigenvalues)[None], torch.ones_like(eigenvalues)[None]
    variance = run(denoise, (sigmas[0] if start is None else start) * one, sigmas, lambda i: zero) ** 2
    for step in range(len(sigmas) - 1):
        variance = variance + run(denoise, zero, sigmas, lambda i, step=step: one if i == step else zero) ** 2
    return variance


def gaussian_frechet(run, sigmas: Tensor, eigenvalues: Tensor) -> float:
    """Squared Frechet distance a dimension of a sampler's result to Gaussian data."""
    return (gaussian_variance(run, sigmas, eigenvalues).sqrt() - eigenvalues.sqrt()).square().mean().item()


def gaussian_error(run, num_steps: int, eigenvalue: float = 0.25) -> float:
    """Relative error of the variance at sigma 0.1, of data N(0, eigenvalue) begun exactly at sigma 5, levels even in log sigma.

    The first step, whose order is 1, is cut into pieces that shrink by half, so that it does not bound the order of the rest.
    """
    sigmas = torch.logspace(math.log10(5), -1, num_steps + 1, dtype=torch.float64)
    pieces = sigmas[0] * (sigmas[1] / sigmas[0]) ** (2.0 ** torch.arange(-12, 0, dtype=torch.float64))
    sigmas = torch.cat([sigmas[:1], pieces, sigmas[1:]])
    values = torch.tensor([eigenvalue], dtype=torch.float64)
    variance = gaussian_variance(run, sigmas, values, start=(values + sigmas[0] ** 2).sqrt())
    return abs((variance / (values + sigmas[-1] ** 2) - 1).item())


def gaussian_amplification(run, sigmas: Tensor, eigenvalue: float = 0.25) -> dict:
    """What errors of the denoiser do to the result, on data N(0, eigenvalue).

    The response of the result to an independent error at each evaluation, as large as the posterior's standard deviation there, in
    standard deviations of the data: of all evaluations, and of those above sigma 10 alone.
    """
    std = math.sqrt(eigenvalue)
    zero, responses = torch.zeros(1, 1, dtype=torch.float64), []
    for wrong in sigmas[:-1].tolist():
        error = wrong * std / math.hypot(wrong, std)
        denoise = lambda x, sigma, wrong=wrong, error=error: eigenvalue / (eigenvalue + sigma**2) * x + error * (sigma == wrong)  # noqa: E731
        responses.append(run(denoise, zero, sigmas, lambda i: zero).item() / std)
    high = [r for r, sigma in zip(responses, sigmas.tolist(), strict=False) if sigma > 10]
    return {"all": math.hypot(*responses), "high": math.hypot(*high)}
