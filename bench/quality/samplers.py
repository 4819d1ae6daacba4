"""The samplers of the study: ours by their plans, the rivals from their own packages, all as `run(denoise, x, sigmas, noise)`.

`denoise(x, sigma)` is the model, sigmas [steps + 1] fall to 0, and noise(i) gives the noise of the i-th draw.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools
import sys
import types
from unittest import mock

import torch
from diffusers import DDIMScheduler, SASolverScheduler, UniPCMultistepScheduler

from ersde_fast import sample_er_sde
from problems import as_model


@functools.cache
def k_diffusion():
    """The package k-diffusion, without the torchvision that its top module imports for its evaluation code."""
    stubs = ["torchvision", "torchvision.transforms", "torchvision.datasets"]
    stubs = [] if importlib.util.find_spec("torchvision") else stubs
    for name in stubs:
        sys.modules[name] = mock.MagicMock(__path__=[], __name__=name, __spec__=None)
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(importlib.util.find_spec("k_diffusion").submodule_search_locations)
    sys.modules["k_diffusion"] = package
    for name in ("sampling", "utils", "external"):
        setattr(package, name, importlib.import_module(f"k_diffusion.{name}"))
    for name in stubs:
        del sys.modules[name]
    return package


def as_k_diffusion(function, evaluations=1, **arguments):
    """A sampler with k-diffusion's arguments, such as ours; `evaluations` of the model a step."""

    def run(denoise, x, sigmas, noise):
        draws = itertools.count()
        sigmas = sigmas.to(x.device)
        draw = lambda *_: noise(next(draws))  # noqa: E731
        takes_noise = "noise_sampler" in inspect.signature(function).parameters
        drawn = {"noise_sampler": draw} if takes_noise else {}
        with mock.patch("torch.randn_like", draw):  # what those without the argument draw with
            return function(as_model(denoise), x, sigmas, disable=True, **drawn, **arguments)

    run.evaluations = evaluations
    return run


def ours(**arguments):
    """`sample_er_sde` with these arguments."""
    return as_k_diffusion(sample_er_sde, **arguments)


def ours_of_orders(orders, **arguments):
    """The same with `orders(levels)` the orders of the steps from those levels."""

    def run(denoise, x, sigmas, noise):
        return ours(max_stage=orders(sigmas[:-1].tolist()), **arguments)(denoise, x, sigmas, noise)

    return run


def of_k_diffusion(name, evaluations=1, **arguments):
    """A sampler of k-diffusion by its name."""
    return as_k_diffusion(getattr(k_diffusion().sampling, name), evaluations, **arguments)


def of_diffusers(scheduler, **config):
    """A scheduler of diffusers on the given levels: its model predicts epsilon, its samples are scaled by alpha.

    Its training schedule is made of the levels themselves, one timestep each.
    """

    def run(denoise, x, sigmas, noise):
        levels = sigmas[:-1].flip(0)
        cumulated = 1 / (1 + levels**2)
        betas = 1 - cumulated / torch.cat([cumulated.new_ones(1), cumulated[:-1]])
        it = scheduler(num_train_timesteps=len(levels), trained_betas=betas.tolist(), **config)
        it.set_timesteps(len(levels))
        if hasattr(it, "sigmas"):
            it.sigmas = sigmas.float()
            it.timesteps = torch.arange(len(levels) - 1, -1, -1)
        sample, draws = x / (1 + sigmas[0] ** 2).sqrt(), itertools.count()
        with mock.patch(f"{scheduler.__module__}.randn_tensor", lambda shape, **_: noise(next(draws)), create=True):
            for i, t in enumerate(it.timesteps):
                sigma = sigmas[i].item()
                scaled = sample * (1 + sigma**2) ** 0.5
                denoised = denoise(scaled, sigma)
                if i == len(it.timesteps) - 1:
                    return denoised.to(x.dtype)  # what a step to sigma 0 gives; SA-Solver has none
                sample = it.step((scaled - denoised) / sigma, t, sample).prev_sample

    return run


PUBLISHED = {"method": "taylor", "integration_points": 200}
SCALERS = ["ode", "reverse_time_sde(0.25)", "reverse_time_sde(0.5)", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5"]


def noise_above(level: float):
    """phi(l) = l (l + level): the reverse-time SDE far above a level of noise, the ODE far below it."""
    return lambda l: l * (l + level)


def noise_below(level: float):
    """phi(l) = l^2 / (l + level): the ODE far above a level of noise, the reverse-time SDE far below it."""
    return lambda l: l * l / (l + level)


SCALER_LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)
SCALER_FAMILIES = {
    f"newton 3, c = 10 std, noise {side} {level:g}": (family, level)
    for side, family in (("above", noise_above), ("below", noise_below))
    for level in SCALER_LEVELS
}
AT_THE_END = {f"newton 3, c = 10 std, order {end[-1]} at the end": end for end in ([3, 2], [2, 1])}
BY_LEVEL = {
    f"newton {n}, c = {times} std, order 2 above c": (n, times) for n, times in ((3, 10), (3, 15), (4, 15))
}  # fmt: skip
IN_PART = [*SCALER_FAMILIES, *AT_THE_END, *BY_LEVEL]  # not measured at every number of evaluations


def contenders(std: float) -> dict:
    """Name to sampler, for data of that standard deviation."""
    newton = {"method": "newton"}  # in er_lambda itself, where no node_scale follows
    result = {f"published, order {n}": ours(max_stage=n, **PUBLISHED) for n in (1, 2, 3)}
    result |= {"taylor 3, exact": ours(max_stage=3, method="taylor"), "default": ours(), "told": ours(guidance=1.0)}
    result |= {f"newton {n}": ours(max_stage=n, **newton) for n in (2, 3, 4, 5)}
    for times in (5, 10, 15, 30):
        result |= {f"newton {n}, c = {times} std": ours(max_stage=n, node_scale=times * std, **newton) for n in (2, 3, 4)}
    result |= {
        f"newton 3, c = 10 std, {scaler}": ours(max_stage=3, node_scale=10 * std, noise_scaler=scaler, **newton)
        for scaler in SCALERS
        if scaler != "sde_5"
    }
    result |= {
        name: ours_of_orders(
            lambda levels, n=n, c=times * std: [2 if level > c else n for level in levels], node_scale=times * std, **newton
        )
        for name, (n, times) in BY_LEVEL.items()
    }
    result |= {
        name: ours(max_stage=3, node_scale=10 * std, noise_scaler=family(level), **newton)
        for name, (family, level) in SCALER_FAMILIES.items()
    }
    result |= {
        name: ours_of_orders(lambda levels, end=end: [*[3] * (len(levels) - 2), *end], node_scale=10 * std, **newton)
        for name, end in AT_THE_END.items()
    }
    return result | RIVALS


RIVALS = {
    "DDIM": of_diffusers(DDIMScheduler, clip_sample=False, set_alpha_to_one=True),
    "DPM-Solver++ 2M": of_k_diffusion("sample_dpmpp_2m"),
    "UniPC": of_diffusers(UniPCMultistepScheduler, lower_order_final=True),
    "Heun": of_k_diffusion("sample_heun", evaluations=2),
    "SDE-DPM-Solver++ 2M": of_k_diffusion("sample_dpmpp_2m_sde", eta=1.0),
    "SDE-DPM-Solver++ 3M": of_k_diffusion("sample_dpmpp_3m_sde", eta=1.0),
    "SA-Solver": of_diffusers(SASolverScheduler, tau_func=lambda t: 1.0),
    "SA-Solver, order 1": of_diffusers(SASolverScheduler, predictor_order=1, corrector_order=1, tau_func=lambda t: 1.0),
    "Euler ancestral": of_k_diffusion("sample_euler_ancestral"),
    "EDM stochastic": of_k_diffusion("sample_heun", evaluations=2, s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003),
}
STOCHASTIC = [
    "SDE-DPM-Solver++ 2M",
    "SDE-DPM-Solver++ 3M",
    "SA-Solver",
    "SA-Solver, order 1",
    "Euler ancestral",
    "EDM stochastic",
]


def under_guidance(guidance: float) -> dict:
    """Name to sampler, for a model guided so: options as the authors advise under guidance.

    UniPC is of order 2 as advised, as `RIVALS` has it; 2M and not 3M of DPM-Solver++; all make their last step one of order 1. In VE
    Euler's method is DDIM.
    """
    rivals = ["DPM-Solver++ 2M", "SDE-DPM-Solver++ 2M", "UniPC", "DDIM", "Heun"]
    return {
        "default": ours(), "told": ours(guidance=guidance), "published, order 3": ours(max_stage=3, **PUBLISHED),
        "default, ode": ours(noise_scaler="ode"), "told, ode": ours(noise_scaler="ode", guidance=guidance),
        **{name: RIVALS[name] for name in rivals},
    }  # fmt: skip


KINDS = ("sde_5", "ode", "sde")  # of limits: guided, each solver has its own


def kind_of(sampler: str) -> str:
    """Which process a sampler of `under_guidance` or of the flows follows, as the noise scaler that does."""
    if sampler.startswith("limit, "):
        return sampler.removeprefix("limit, ")
    if sampler.split(",")[0] in ("default", "told", "published"):
        return "ode" if "ode" in sampler else "sde_5"
    return "sde" if sampler in STOCHASTIC else "ode"


def limit_of(kind: str, **arguments):
    """What is run with many steps for the limit of that kind; true order 3 in er_lambda, which extrapolates least."""
    return ours(max_stage=3, method="newton", noise_scaler=kind, **arguments)
