"""The cells of docs/quality_flows.md: the exact guided problem and the networks, sampled as flows."""

import functools
from collections.abc import Iterator

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)  # fmt: skip
from torch import Tensor

from guidance import COSTS, EXACT, LIMIT_SEED, Cell, made, problem
from samplers import PUBLISHED, kind_of, limit_of, ours

GUIDANCE = (1.0, 4.0, 7.0)
SHIFTS = (1.0, 3.0)
EVALUATIONS = (6, 8, 10, 20)


def shifted(s: Tensor, shift: float) -> Tensor:
    return shift * s / (1 + (shift - 1) * s)


def to_the_end(n: int, shift: float) -> Tensor:
    """Even from 1 to 0.001, shifted, and 0: as Stable Diffusion 3 is sampled."""
    return torch.cat([shifted(torch.linspace(1, 0.001, n, dtype=torch.float64), shift), torch.zeros(1, dtype=torch.float64)])


def in_equal_parts(n: int, shift: float) -> Tensor:
    """Even from 1 to 1 / n, shifted, and 0: as Flux and Qwen-Image are sampled."""
    return shifted(torch.linspace(1, 0, n + 1, dtype=torch.float64), shift)


def ours_as_flow(levels=to_the_end, **arguments):
    """`run(denoise, x, noise, evaluations, shift)`; denoise(x, s) is the model, noise(i) the i-th draw."""
    run = ours(process="flow", **arguments)
    return lambda denoise, x, noise, n, shift: run(denoise, x, levels(n, shift), noise)


def of_diffusers(scheduler, levels=None, evaluations=1, **config):
    """A flow's scheduler of diffusers on the levels that it makes itself, or on those that its pipelines give it."""

    def run(denoise, x, noise, n, shift):
        it = scheduler(**{name: shift if value == "shift" else value for name, value in config.items()})
        n = -(-n // evaluations)
        it.set_timesteps(n, **({} if levels is None else {"sigmas": levels(n, 1.0)[:-1].tolist()}))
        for s, t in zip(it.sigmas.tolist(), it.timesteps, strict=False):
            x = it.step((x - denoise(x, s)) / s, t, x).prev_sample
        return x

    return run


def contenders(guidance: float) -> dict:
    """Name to `run(denoise, x, noise, evaluations, shift)`."""
    as_diffusers = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": "shift"}
    euler = functools.partial(of_diffusers, FlowMatchEulerDiscreteScheduler, shift="shift")
    told = {"guidance": guidance}
    return {
        "default": ours_as_flow(), "told": ours_as_flow(**told), "Euler": euler(),
        "Heun": of_diffusers(FlowMatchHeunDiscreteScheduler, evaluations=2, shift="shift"),
        "DPM-Solver++ 2M": of_diffusers(DPMSolverMultistepScheduler, **as_diffusers),
        "UniPC": of_diffusers(UniPCMultistepScheduler, **as_diffusers),
        "default, equal parts": ours_as_flow(in_equal_parts), "told, equal parts": ours_as_flow(in_equal_parts, **told),
        "Euler, equal parts": euler(in_equal_parts), "default, ode": ours_as_flow(noise_scaler="ode"),
        "told, ode": ours_as_flow(noise_scaler="ode", **told), "published, order 3": ours_as_flow(**PUBLISHED),
    }  # fmt: skip


ON_NETWORKS = list(contenders(1.0))[:9]


def as_flow(denoise, top: float):
    """A denoiser of x = clean + sigma noise as one of x = (1 - s) clean + s noise; above sigma `top` it is asked there instead,
    with the same noise."""

    def denoise_flow(x: Tensor, s: float) -> Tensor:
        sigma = min(s / (1 - s), top) if s < 1 else top
        return denoise(x * (sigma / s), sigma)

    return denoise_flow


def top_of(name: str) -> float:
    """The highest sigma that is asked of a problem: 80 where a network was trained for it, else as good as none."""
    return 1e4 if name in (EXACT, "fashion_flow") else 80.0


def run(name: str, device: str, guidance: float, sampler, n: int, shift: float, seed: int, for_limit: bool = False) -> Tensor:
    of = problem(name, device, guidance, for_limit)
    start = lambda denoise, x, sigmas, noise: sampler(denoise, x, noise, n, shift)  # noqa: E731
    return of.run(start, torch.ones(1), seed, as_flow(of.denoise, top_of(name)))


@functools.cache
def limit(name: str, device: str, guidance: float, kind: str):
    steps, sampler = COSTS[name].limit_steps, of_kind(kind)
    x = run(name, device, guidance, sampler, steps, 3.0, LIMIT_SEED, for_limit=True)
    return problem(name, device, guidance, for_limit=True).reference(x)


def of_kind(kind: str):
    run = limit_of(kind, process="flow")
    return lambda denoise, x, noise, n, shift: run(denoise, x, to_the_end(n, shift), noise)


def measure(name: str, device: str, guidance: float, shift: float, sampler: str, n: int, seed: int) -> dict:
    kind = kind_of(sampler)
    of = of_kind(kind) if sampler.startswith("limit, ") else contenders(guidance)[sampler]
    x = run(name, device, guidance, of, n, shift, seed)
    return problem(name, device, guidance).compare(x, limit(name, device, guidance, kind), with_data=seed == 0)


def as_flows(name: str, device: str, rows) -> Iterator[Cell]:
    group = lambda guidance: f" as flow, guidance {guidance:g}"  # noqa: E731
    place = lambda guidance, shift: (f"{group(guidance)}, shift {shift:g}", group(guidance))  # noqa: E731
    return made(name, rows, place, functools.partial(measure, name, device))


def exact_cells() -> Iterator[Cell]:
    rows = [(g, 3.0, f"limit, {kind}", [COSTS[EXACT].limit_steps], [0]) for g in GUIDANCE for kind in ("sde_5", "ode")]
    rows += [(g, shift, s, EVALUATIONS, (0, 1, 2)) for g in GUIDANCE for shift in SHIFTS for s in contenders(g)]
    return as_flows(EXACT, "cpu", rows)


def network_cells(device: str) -> Iterator[Cell]:
    for name, evaluations, shift in (
        ("fashion_flow", EVALUATIONS, 3.0), ("digits_classes", EVALUATIONS, 3.0), ("emoji", (8, 20), 3.0),
        ("fashion_flow", EVALUATIONS, 1.0),
    ):  # fmt: skip
        for g in (4.0, 1.0, 7.0):
            rows = [(g, shift, sampler, evaluations, (0,)) for sampler in ON_NETWORKS]
            yield from as_flows(name, device, rows)
