"""The cells of the study: which sampler is measured on which problem, on which levels, at how many evaluations."""

import functools
import math

import torch

from ersde_fast import place_sigmas
from ersde_fast.schedules import karras_sigmas
from problems import (
    as_model,
    data_std,
    digits_mixture,
    digits_themselves,
    frechet,
    gaussian_amplification,
    gaussian_error,
    gaussian_frechet,
    precision_recall,
    sliced_wasserstein,
    spectra,
)  # fmt: skip
from samplers import BY_LEVEL, IN_PART, RIVALS, SCALER_FAMILIES, contenders, ours

EVALUATIONS = (5, 6, 8, 10, 15, 20, 35, 50)
SEEDS = (0, 1, 2)
SAMPLES = 4000
PROBLEMS = {"mixture": digits_mixture, "digits": digits_themselves}
ENDS = (0.01, 40.0)
ZERO = torch.zeros(1, dtype=torch.float64)
PILOT_STEPS, LIMIT_STEPS = 50, 150


def karras(n: int) -> torch.Tensor:
    """Karras et al.'s levels between the ends of the exact problems."""
    return karras_sigmas(n, *ENDS)


@functools.cache
def placed(problem_name: str, n: int) -> torch.Tensor:
    """Levels by the local error on an exact problem, of a pilot of 500 samples."""
    problem, pilot = PROBLEMS[problem_name](), karras(PILOT_STEPS)
    x = pilot[0] * torch.randn(500, len(problem.mean), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return place_sigmas(as_model(problem.denoise), x, pilot, n, disable=True)


def as_flow_spaces(n: int, low: float, high: float, shift: float) -> torch.Tensor:
    """Levels from high to low where a flow's lie: s / (1 - s) of s even but for the shift (3 is Stable Diffusion 3's), and 0."""
    ends = (sigma / (shift + sigma) for sigma in (high, low))  # before the shift, which multiplies s / (1 - s)
    s = torch.linspace(*ends, n, dtype=torch.float64)
    return torch.cat([shift * s / (1 - s), ZERO])


def even_in_log_snr(n: int, low: float, high: float) -> torch.Tensor:
    return torch.cat([torch.logspace(math.log10(high), math.log10(low), n, dtype=torch.float64), ZERO])


SPACINGS = {  # of the levels, beside Karras et al.'s
    "even in log-SNR": lambda n: even_in_log_snr(n, *ENDS),
    "Karras, rho 3": lambda n: karras_sigmas(n, *ENDS, rho=3.0),
    "flow, shift 3": lambda n: as_flow_spaces(n, *ENDS, shift=3.0),
    "placed": functools.partial(placed, "mixture"),
}
SOME = [
    "default", "told", "published, order 3", "newton 3", "newton 2, c = 10 std", "newton 3, c = 10 std", "newton 4, c = 15 std", "newton 3, c = 10 std, ode",
    "newton 3, c = 10 std, sde", *RIVALS,
]  # fmt: skip
FLOOR = "exact samples"
PLACED = [
    "default",
    "told",
    "newton 3, c = 10 std",
    "newton 3, c = 10 std, ode",
    "published, order 3",
    "DPM-Solver++ 2M",
    "UniPC",
    "SDE-DPM-Solver++ 2M",
]
ON_NETWORK = [
    "default", "told", "published, order 3", "newton 3, c = 10 std", "newton 3, c = 10 std, ode", "newton 3, c = 15 std", "DPM-Solver++ 2M", "UniPC",
    "SDE-DPM-Solver++ 2M", "newton 3", "newton 4, c = 15 std", "newton 3, c = 30 std", "newton 2, c = 5 std", "newton 2, c = 10 std",
    "newton 3, c = 5 std", "newton 4, c = 10 std", "newton 5", "newton 3, c = 10 std, reverse_time_sde(0.25)",
    "newton 3, c = 10 std, reverse_time_sde(0.5)", "newton 3, c = 10 std, sde", "published, order 1", "published, order 2", *BY_LEVEL,
]  # fmt: skip
OF_ODE = "newton 3, c = 10 std, ode"
LEFT_OUT = [
    "newton 2, c = 5 std", "newton 4, c = 10 std", "newton 5", "newton 3, c = 10 std, reverse_time_sde(0.25)", *BY_LEVEL,
]  # fmt: skip
NETWORKS = {"network": ON_NETWORK, "network without classes": [s for s in ON_NETWORK if s not in LEFT_OUT]}


STEP_COUNTS = (10, 20, 40, 80, 160)
CLOSED_FORM = {f"paper's rule, order {n}": (n, {"method": "taylor"}) for n in (1, 2, 3)}
CLOSED_FORM |= {f"newton {n}": (n, {"method": "newton"}) for n in (2, 3, 4, 5)}
CLOSED_FORM |= {
    f"newton {n}, c = {c} std": (n, {"node_scale": c * 0.5}) for n, c in ((2, 10), (3, 5), (3, 10), (3, 20), (4, 15), (5, 20))
}


def steps_of(run, evaluations: int) -> int:
    """Steps that a sampler makes with so many evaluations of the model; those with two a step make one at the last."""
    return math.ceil(evaluations / getattr(run, "evaluations", 1))


def made_by(run, problem, evaluations: int, seed: int, samples: int, spacing=karras) -> torch.Tensor:
    """What a sampler makes, [samples, d]; None makes exact samples."""
    g = torch.Generator().manual_seed(1000 + seed)
    if run is None:
        return problem.sample(samples, g)
    draw = lambda i=None: torch.randn(samples, len(problem.mean), dtype=torch.float64, generator=g)  # noqa: E731
    sigmas = spacing(steps_of(run, evaluations))
    return run(problem.denoise, sigmas[0] * draw(), sigmas, draw)


def to_compare(problem, seed: int, samples: int) -> torch.Tensor:
    """The exact samples that those of a seed are compared with."""
    return problem.sample(samples, torch.Generator().manual_seed(5000 + seed))


def measure(problem, run, evaluations: int, seed: int, samples: int, spacing=karras) -> dict:
    """One cell: the distances of the samples' moments and of their projections to the exact ones."""
    x = made_by(run, problem, evaluations, seed, samples, spacing)
    if not x.isfinite().all():
        return {"frechet": float("inf"), "wasserstein": float("inf")}
    exact = to_compare(problem, seed, samples)
    trace = torch.cov(x.T, correction=0).trace() / problem.covariance.trace()
    return {
        "frechet": frechet(x, problem.mean, problem.covariance), "wasserstein": sliced_wasserstein(x, exact), "trace": trace.item(),
    }  # fmt: skip


def coverage(problem, run, evaluations: int, seed: int, samples: int, spacing=karras) -> dict:
    """One cell: how many of the samples lie where exact ones do, and how many of these where the samples do."""
    x = made_by(run, problem, evaluations, seed, samples, spacing)
    return dict(zip(("precision", "recall"), precision_recall(x, to_compare(problem, seed, samples)), strict=True))


def exact_cells():
    """(problem, spacing, sampler, evaluations) of the exact problems whose samples are drawn."""
    every = [s for s in contenders(1.0) if s not in IN_PART]
    for problem, samplers in (("mixture", every), ("digits", SOME)):
        yield problem, None, FLOOR, EVALUATIONS[:1]
        for sampler in samplers:
            yield problem, None, sampler, EVALUATIONS
    for sampler in IN_PART:
        yield "mixture", None, sampler, (5, 10, 20) if sampler in SCALER_FAMILIES else (8, 10, 20)
    for spacing in SPACINGS:
        for sampler in SOME:
            few = spacing in ("flow, shift 3", "placed") and sampler not in PLACED
            yield "mixture", spacing, sampler, () if few else (8, 10, 20)
    for sampler in PLACED:
        yield "digits", "placed", sampler, (5, 6, 8, 10)
        yield "mixture", "placed", sampler, (5, 6)


def cells():
    """(key, function that measures it) of the whole study."""
    problems = {name: make() for name, make in PROBLEMS.items()}
    samplers = {name: {FLOOR: None} | contenders(data_std(problem)) for name, problem in problems.items()}
    for name, spacing, sampler, evaluations in exact_cells():
        levels = {None: karras, **SPACINGS, "placed": functools.partial(placed, name)}[spacing]
        for n in evaluations:
            for seed in SEEDS:
                key = f"{name}{f', {spacing}' if spacing else ''} | {sampler} | {n} | {seed}"
                yield key, functools.partial(measure, problems[name], samplers[name][sampler], n, seed, SAMPLES, levels)
    for spectrum, eigenvalues in spectra().items():
        samplers = {
            "published, order 3": ours(integration_points=200),
            "taylor 3, exact": ours(method="taylor"),
            "newton 3": ours(method="newton"),
            "default": ours(),
            "told": ours(guidance=1.0),
        }
        samplers |= {f"newton 3, c = {c}": ours(method="newton", node_scale=float(c)) for c in (4, 8, 16, 32)}
        samplers |= {name: RIVALS[name] for name in ("SDE-DPM-Solver++ 2M", "DPM-Solver++ 2M")}
        for sampler, run in samplers.items():
            for n in EVALUATIONS:
                sigmas = karras_sigmas(n)
                key = f"spectrum {spectrum} | {sampler} | {n} | 0"
                yield key, lambda r=run, s=sigmas, e=eigenvalues: {"frechet": gaussian_frechet(r, s, e)}

    for sampler in CLOSED_FORM:
        for scaler in ("ode", "sde_5"):
            for n in STEP_COUNTS:
                order, options = CLOSED_FORM[sampler]
                run = ours(max_stage=order, noise_scaler=scaler, **options)
                key = f"convergence, {scaler} | {sampler} | {n} | 0"
                yield key, lambda r=run, n=n: {"error": gaussian_error(r, n)}
        for n in (8, 10, 20):
            order, options = CLOSED_FORM[sampler]
            run = ours(max_stage=order, **options)
            yield (
                f"amplification | {sampler} | {n} | 0",
                lambda r=run, n=n: gaussian_amplification(r, karras_sigmas(n)),
            )


def network_cells(device: str):
    """The same of the network of digits, the one that is told the class of its samples and the one that is not."""
    from network import LIMIT, STD, Network

    network = functools.cache(lambda name: Network("digits", device, float(name == "network"), samples=10_000))
    limit = functools.cache(lambda name: network(name).reference(network(name).run(LIMIT, karras_sigmas(LIMIT_STEPS), 100)))

    @functools.cache
    def levels(name, n):
        name, _, placed = name.partition(", ")
        return network(name).placed(karras_sigmas(PILOT_STEPS), n) if placed else karras_sigmas(n)

    def cell(name, run, n, seed):
        of = name.partition(", ")[0]
        return network(of).compare(network(of).run(run, levels(name, steps_of(run, n)), seed), limit(of))

    samplers = contenders(STD)
    few = (5, 6, 8, 10, 15, 20)
    plan = [(name, FLOOR, [LIMIT_STEPS]) for name in NETWORKS]
    plan += [(name, sampler, few) for name, chosen in NETWORKS.items() for sampler in chosen]
    plan += [(name, sampler, (8, 10, 20)) for name in NETWORKS for sampler in RIVALS if sampler not in ON_NETWORK]
    plan += [(f"{name}, placed", sampler, (5, 6, 8, 10)) for name in NETWORKS for sampler in PLACED]
    plan += [(name, OF_ODE, [LIMIT_STEPS]) for name in NETWORKS]  # an ODE's own limit, which differs where the network errs
    for name, sampler, evaluations in plan:
        run = LIMIT if sampler == FLOOR else samplers[sampler]
        for n in evaluations:
            for seed in SEEDS:
                key = f"{name} | {sampler} | {n} | {seed}"
                yield key, functools.partial(cell, name, run, n, seed)
