"""The cells of the study of guidance: an exact problem and trained networks, guided, on the levels that people use."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cells import as_flow_spaces, even_in_log_snr, steps_of
from ersde_fast import place_sigmas
from ersde_fast.schedules import karras_sigmas
from problems import Guided, Moments, as_model, digits_mixture
from samplers import KINDS, kind_of, limit_of, under_guidance

GUIDANCE = (1.0, 2.5, 5.0, 7.5)
EVALUATIONS = (5, 6, 8, 10, 15, 20)
FROM_80, FROM_14 = "Karras from 80", "Karras from 14.6"
LEVELS = {
    FROM_80: karras_sigmas,
    FROM_14: lambda n: karras_sigmas(n, 0.0292, 14.6146),  # Stable Diffusion's
    "even in log-SNR": lambda n: even_in_log_snr(n, 0.002, 80.0),
    "spaced as a flow, shift 1": lambda n: as_flow_spaces(n, 0.002, 80.0, shift=1.0),
    "spaced as a flow, shift 3": lambda n: as_flow_spaces(n, 0.002, 80.0, shift=3.0),
}
PLACED = "placed"
EXACT = "mixture_guided"
MAIN = ["default", "told", "published, order 3", "DPM-Solver++ 2M", "SDE-DPM-Solver++ 2M", "UniPC"]
EXTRA = ["told, ode", "default, ode", "DDIM"]
LIMIT_SEED = 100


class Cell(NamedTuple):
    """One measurement. Cells of a group share a limit, and so a GPU; `seconds` is what it takes of an H100."""

    key: str
    measure: Callable[[], dict]
    group: str = ""
    seconds: float = 0.0


class GuidedMixture:
    """The exact problem: the mixture of the digits with its components as classes, in float32, with the interface of `Network`."""

    def __init__(self, guidance: float, samples: int):
        self.problem, self.samples = Guided(digits_mixture().to(torch.float32), guidance), samples

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        parts = x.float().split(200)  # which stay in a core's cache
        return torch.cat([self.problem.denoise(part, sigma) for part in parts]).to(x.dtype)

    def placed(self, pilot: Tensor, num_steps: int) -> Tensor:
        x = pilot[0] * torch.randn(500, 64, generator=torch.Generator().manual_seed(7))
        return place_sigmas(as_model(self.denoise), x, pilot, num_steps, disable=True)

    def run(self, run, sigmas: Tensor, seed: int, denoise=None) -> Tensor:
        g = torch.Generator().manual_seed(1000 + seed)
        draw = lambda i=None: torch.randn(self.samples, 64, generator=g)  # noqa: E731
        return run(denoise or self.denoise, sigmas[0].item() * draw(), sigmas, draw)

    reference = staticmethod(Moments.of)

    def compare(self, x: Tensor, limit: Moments, with_data: bool = False) -> dict:
        return {"frechet": limit.frechet(x) if x.isfinite().all() else float("inf")}


class Kind(NamedTuple):
    """What a problem is measured with: `seconds` of an H100 for a thousand rows of one call, and for a cell's distances."""

    limit_steps: int
    seconds: float
    distances: float


COSTS = {
    EXACT: Kind(200, 0.0, 0.0), "digits_classes": Kind(60, 0.003, 0.05), "emoji": Kind(60, 0.0205, 0.35),
    "fashion": Kind(60, 0.007, 0.35), "fashion_flow": Kind(60, 0.007, 0.35),
}  # fmt: skip


@functools.cache
def problem(name: str, device: str, guidance: float, for_limit: bool = False):
    """The limit of the exact problem has more samples than its cells."""
    if name == EXACT:
        return GuidedMixture(guidance, 4000 if for_limit else 2000)
    from network import Network

    return Network(name.removesuffix("_classes"), device, guidance)


def limit_levels(levels: str) -> str:
    """Levels between the same ends share a limit."""
    return FROM_14 if levels == FROM_14 else FROM_80


@functools.cache
def limit(name: str, device: str, guidance: float, levels: str, kind: str):
    of = problem(name, device, guidance, for_limit=True)
    return of.reference(of.run(limit_of(kind), LEVELS[levels](COSTS[name].limit_steps), LIMIT_SEED))


@functools.cache
def sigmas_of(name: str, device: str, guidance: float, levels: str, n: int) -> Tensor:
    return problem(name, device, guidance).placed(karras_sigmas(50), n) if levels == PLACED else LEVELS[levels](n)


def measure(name: str, device: str, guidance: float, levels: str, sampler: str, n: int, seed: int) -> dict:
    of, kind = problem(name, device, guidance), kind_of(sampler)
    run = limit_of(kind) if sampler.startswith("limit, ") else under_guidance(guidance)[sampler]
    x = of.run(run, sigmas_of(name, device, guidance, levels, steps_of(run, n)), seed)
    return of.compare(x, limit(name, device, guidance, limit_levels(levels), kind), with_data=seed == 0)


def evaluation_seconds(name: str, guidance: float, n: int, samples: float = 5.0) -> float:
    """Of a run of n evaluations, without its distances; thousands of samples."""
    return n * samples * COSTS[name].seconds * (1 if guidance in (0, 1) else 2)


def made(name: str, rows, place, measure) -> Iterator[Cell]:
    """Cells of rows (guidance, setting, sampler, evaluations, seeds); the first of each kind pays for the limit.

    Args:
        place: `place(guidance, setting)` to the words of a cell's key, and its group.
        measure: `measure(guidance, setting, sampler, n, seed)`.
    """
    paid = set()
    for guidance, setting, sampler, evaluations, seeds in rows:
        words, group = place(guidance, setting)
        for n in evaluations:
            for seed in seeds:
                seconds = evaluation_seconds(name, guidance, n) + COSTS[name].distances
                if (group, kind_of(sampler)) not in paid:
                    paid.add((group, kind_of(sampler)))
                    seconds += evaluation_seconds(name, guidance, COSTS[name].limit_steps)
                key = f"{name}{words} | {sampler} | {n} | {seed}"
                yield Cell(key, functools.partial(measure, guidance, setting, sampler, n, seed), name + group, seconds)


def guided(name: str, device: str, rows) -> Iterator[Cell]:
    place = lambda guidance, levels: (  # noqa: E731
        f", guidance {guidance:g}, {levels}",
        f", guidance {guidance:g}, {limit_levels(levels)}",
    )
    return made(name, rows, place, functools.partial(measure, name, device))


def floors(name: str, guidances, kinds=KINDS, levels=(FROM_80, FROM_14)):
    """Rows of the limit's own distance to itself, from other noise."""
    for guidance in guidances:
        for at in levels:
            for kind in kinds:
                yield guidance, at, f"limit, {kind}", [COSTS[name].limit_steps], [0]


def exact_cells() -> Iterator[Cell]:
    rows = list(floors(EXACT, GUIDANCE))
    rows += [(g, FROM_80, sampler, EVALUATIONS, (0, 1, 2)) for g in GUIDANCE for sampler in under_guidance(g)]
    rows += [
        (g, levels, sampler, (6, 8, 10, 20), (0,))
        for levels in (*list(LEVELS)[1:], PLACED)
        for g in GUIDANCE
        for sampler in under_guidance(g)
        if sampler != "Heun"
    ]
    return guided(EXACT, "cpu", rows)


def network_cells(device: str) -> Iterator[Cell]:
    """What matters comes first: colour under guidance; three seeds where eight evaluations are made."""
    for name in ("emoji", "fashion", "digits_classes"):
        for g in (5.0, 7.5, 2.5, 1.0):
            rows = [(g, FROM_80, sampler, EVALUATIONS, (0,)) for sampler in MAIN]
            rows += floors(name, [g], ["sde_5", "ode"], [FROM_80])
            rows += [(g, FROM_80, sampler, (5, 6, 8, 10), (0,)) for sampler in EXTRA]
            rows += [(g, FROM_80, sampler, (8,), (1, 2)) for sampler in MAIN]
            yield from guided(name, device, rows)
    for name, evaluations in (("digits_classes", (8, 20)), ("fashion", (8, 20)), ("emoji", (8,))):
        rows = [(5.0, levels, sampler, evaluations, (0,)) for levels in list(LEVELS)[1:] for sampler in (*MAIN, "told, ode")]
        yield from guided(name, device, rows)
