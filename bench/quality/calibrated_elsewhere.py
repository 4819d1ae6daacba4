"""The cells of docs/calibration.md, "Where it ends": plans under other conditions than their pilot's, flows, and runs begun in the middle."""

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

import cells
import network
from calibrated import (
    FEW,
    KINDS,
    PILOT_STEPS,
    PILOTS,
    UNCALIBRATED,
    guided_model,
    measure_exact,
    name_of,
    of_exact,
    of_guided,
    run_of,
    starts,
)
from ersde_fast import Plan, calibrate_plan, er_sde_plan, place_sigmas
from ersde_fast.schedules import flow_sigmas, karras_sigmas
from flows import as_flow, top_of
from guidance import EXACT, PLACED, sigmas_of
from problems import Mixture, as_model, data_std, digits_mixture
from samplers import limit_of, ours, under_guidance
from trained import guided

RESULTS, LIMIT_STEPS = 100, 120  # of a cell of single results, and of what they are compared with
STARTS = 32
SCALES = (1.0, 2.5, 5.0)
KNOWN = {"all classes": 10, "classes 0 to 4": 5}  # to the pilot; the results are of classes 5 to 9
OTHER_SCALES_AT = 6  # evaluations
HALVED = (1.0, 5.0)  # guidance
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SHIFT = 3.0
FLOW = "mixture as flow"
EVEN = f"shift {SHIFT:g}"
WHOLE, CUTS = 8, (1, 2, 3, 4)  # steps of a plan, and where it is cut
BEYOND = (4, 10)  # evaluations
TOLD = "told, ode"
NETWORK_STARTS, NETWORK_RESULTS = 16, 48


def apart(few: Tensor, many: Tensor) -> dict:
    """One cell: the median over results of the squared distance from where many steps end, a number, in variances of the latter."""
    squared = (few - many).square().flatten(1).mean(1) / many.var(0, correction=0).mean()
    return {"median": squared.quantile(0.5).item()}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000))


def of_other_classes(scale: float, run, sigmas: Tensor) -> Tensor:
    """Results of classes 5 to 9 of the guided mixture."""
    classes = 5 + torch.arange(RESULTS) % 5

    def denoise(x, sigma):
        told, untold = guided_model(x, torch.tensor([sigma]), classes)
        return untold + scale * (told - untold)

    return run(denoise, sigmas[0] * noise(RESULTS, 64), sigmas, None)


@functools.cache
def limit(scale: float) -> Tensor:
    return of_other_classes(scale, limit_of("ode"), karras_sigmas(LIMIT_STEPS))


def measure_told(scale: float, n: int) -> dict:
    sigmas = sigmas_of(EXACT, "cpu", scale, PLACED, n)
    return apart(of_other_classes(scale, under_guidance(scale)[TOLD], sigmas), limit(scale))


def measure_guided(used: float, fitted: float, n: int, pilot: int, **conditions) -> dict:
    plan = of_guided(fitted, STARTS, pilot, n, "ode", **conditions)
    return apart(of_other_classes(used, run_of(plan), plan.sigmas), limit(used))


def other_classes(scale: float, fitted: str | None = None) -> str:
    """The words of a key."""
    return f"{EXACT}, classes 5 to 9 at guidance {scale:g}" + (f", calibrated on {fitted}" if fitted else f", {PLACED}")


def guided_cells() -> Iterator[tuple]:
    """Other conditions, another strength of guidance, a model in half precision."""
    for scale, n in itertools.product(SCALES, FEW):
        yield f"{other_classes(scale)} | {TOLD} | {n} | 0", functools.partial(measure_told, scale, n)
    found = [(scale, scale, n, known, {"classes": count}) for scale in SCALES for n in FEW for known, count in KNOWN.items()]
    for used, fitted in itertools.permutations(SCALES, 2):
        found.append((used, fitted, OTHER_SCALES_AT, f"guidance {fitted:g}", {}))
    for scale, (name, dtype) in itertools.product(HALVED, HALVES.items()):
        found.append((scale, scale, OTHER_SCALES_AT, name, {"rounded": dtype}))
    for (used, fitted, n, words, conditions), pilot in itertools.product(found, PILOTS):
        key = f"{other_classes(used, words)} | {name_of(pilot, 'ode')} | {n} | 0"
        yield key, functools.partial(measure_guided, used, fitted, n, pilot, **conditions)


@functools.cache
def mixture_as_flow() -> Mixture:
    """x = (1 - s) clean + s noise; from s = 1, where x is noise alone."""
    of = copy.copy(digits_mixture())
    of.denoise = as_flow(of.denoise, top_of(EXACT))
    return of


def uncalibrated(problem, kind: str, **process):
    """`UNCALIBRATED`, of a flow too."""
    return ours(max_stage=3, method="newton", node_scale=10 * data_std(problem), noise_scaler=kind, **process)


@functools.cache
def placed_flow(n: int) -> Tensor:
    x = torch.randn(500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    pilot = flow_sigmas(cells.PILOT_STEPS, SHIFT)
    return place_sigmas(as_model(mixture_as_flow().denoise), x, pilot, n, process="flow", disable=True)


def measure_flow(n: int, kind: str, levels) -> dict:
    of = mixture_as_flow()
    return cells.measure(of, uncalibrated(of, kind, process="flow"), n, 0, cells.SAMPLES, levels)


def measure_calibrated_flow(pilot: int, n: int, kind: str) -> dict:
    of, x, sigmas = mixture_as_flow(), starts((16, 64), 1.0, pilot), flow_sigmas(PILOT_STEPS, SHIFT)
    plan = calibrate_plan(as_model(of.denoise), x, n, sigmas, noise_scaler=kind, process="flow", disable=True)
    return cells.measure(of, run_of(plan), n, 0, cells.SAMPLES, lambda _: plan.sigmas)


def flow_cells() -> Iterator[tuple]:
    even = functools.partial(flow_sigmas, shift=SHIFT)
    for kind in KINDS:
        levels_of = [(EVEN, even, n) for n in (*FEW, PILOT_STEPS)] + [(PLACED, placed_flow, n) for n in FEW]
        for words, levels, n in levels_of:
            yield f"{FLOW}, {words} | {UNCALIBRATED[kind]} | {n} | 0", functools.partial(measure_flow, n, kind, levels)
        for n, pilot in itertools.product(FEW, PILOTS):
            key = f"{FLOW}, 16 starts | {name_of(pilot, kind)} | {n} | 0"
            yield key, functools.partial(measure_calibrated_flow, pilot, n, kind)


def cut(plan: Plan, analytic: Plan, i: int) -> Plan:
    """A plan of an ODE from step i on; steps that read predictions from before it have the analytic weights."""
    weights = plan.weights[i:].clone()
    for step, row in enumerate(pad(analytic.weights[:, :-1], (0, plan.order + 1 - analytic.order))):  # w_noise is 0
        if weights[step, 2 + step : -1].any():
            weights[step] = row
    return Plan.from_weights(weights, plan.sigmas[i:])


def noised(count: int, sigma: float, seed: int) -> Tensor:
    """Exact samples of the mixture with so much noise."""
    g = torch.Generator().manual_seed(seed)
    return digits_mixture().sample(count, g) + sigma * torch.randn(count, 64, dtype=torch.float64, generator=g)


def measure_middle(i: int, pilot: int) -> dict:
    """A cell has all four: a plan cut, the analytic one of its levels, one calibrated from there, and placed levels."""
    problem, whole, n = digits_mixture(), of_exact("mixture", 16, pilot, WHOLE, "ode"), WHOLE - i
    model, top = as_model(problem.denoise), whole.sigmas[i].item()
    levels = functools.partial(karras_sigmas, sigma_min=cells.ENDS[0], sigma_max=top)
    x = noised(RESULTS, top, 1000)
    many = limit_of("ode")(problem.denoise, x, levels(LIMIT_STEPS), None)
    analytic = er_sde_plan(whole.sigmas[i:], order=3, method="newton", node_scale=10 * data_std(problem), noise_scaler="ode")
    there = calibrate_plan(model, noised(16, top, 300 + pilot), n, levels(PILOT_STEPS), disable=True)
    placed = place_sigmas(model, noised(500, top, 7), levels(cells.PILOT_STEPS), n, disable=True)
    ends = {
        "cut": run_of(cut(whole, analytic, i))(problem.denoise, x, None, None),
        "analytic": run_of(analytic)(problem.denoise, x, None, None),
        "calibrated": run_of(there)(problem.denoise, x, None, None),
        "placed": uncalibrated(problem, "ode")(problem.denoise, x, placed, None),
    }
    return {name: apart(end, many)["median"] for name, end in ends.items()}


def from_step(i: int) -> str:
    """The words of a key."""
    return f"mixture, from step {i} of {WHOLE}"


def middle_cells() -> Iterator[tuple]:
    for i, pilot in itertools.product(CUTS, PILOTS):
        key = f"{from_step(i)} | {name_of(pilot, 'ode')} | {WHOLE - i} | 0"
        yield key, functools.partial(measure_middle, i, pilot)


def beyond_cells() -> Iterator[tuple]:
    """Fewer evaluations than the page's tables have, and more; uncalibrated ones that the study has not."""
    few = BEYOND[0]
    for name, make in cells.PROBLEMS.items():
        problem, levels = make(), functools.partial(cells.placed, name)
        key = f"{name}, {PLACED} | {cells.OF_ODE} | {few} | 0"
        yield key, functools.partial(cells.measure, problem, uncalibrated(problem, "ode"), few, 0, cells.SAMPLES, levels)
        for n, pilot in itertools.product(BEYOND, PILOTS):
            key = f"{name}, 16 starts | {name_of(pilot, 'ode')} | {n} | 0"
            yield key, functools.partial(measure_exact, name, 16, pilot, n, "ode", 0)


def exact_cells() -> Iterator[tuple]:
    yield from flow_cells()
    yield from guided_cells()
    yield from middle_cells()
    yield from beyond_cells()


class Use(NamedTuple):
    """A way to use the network of digits, told the classes."""

    guidance: float = 1.0
    size: int = 28
    dtype: torch.dtype = torch.float32

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return guided(digits_in(self.dtype, x.device), labels, self.guidance)(x.to(self.dtype), sigma[0]).to(x.dtype)


@functools.cache
def digits_in(dtype: torch.dtype, device: torch.device):
    return copy.deepcopy(network.network("digits")).to(device, dtype)


BFLOAT16 = Use(dtype=torch.bfloat16)
USES = {  # words to the pilot's, the results', and evaluations
    "guidance 2": (Use(2.0), Use(2.0), (5, 8)),
    "calibrated at 28x28, used at 36x36": (Use(), Use(size=36), (6,)),
    "weights and arithmetic in bfloat16": (BFLOAT16, BFLOAT16, (6,)),
    "calibrated in bfloat16, used in float32": (BFLOAT16, Use(), (8,)),
}


def labels_of(count: int, device: str) -> Tensor:
    return one_hot(torch.arange(count, device=device) % 10, 10).float()


def of_network(of: Use, device: str, run, sigmas: Tensor) -> Tensor:
    """Results of the network, all classes in turn."""
    labels = labels_of(NETWORK_RESULTS, device)
    x = sigmas[0].item() * noise(NETWORK_RESULTS, 1, of.size, of.size).float().to(device)
    return run(lambda x, sigma: of.denoise(x, torch.full((1,), sigma, device=device), labels), x, sigmas, None)


@functools.cache
def network_limit(of: Use, device: str) -> Tensor:
    return of_network(of, device, limit_of("ode"), karras_sigmas(PILOT_STEPS))


def measure_network(fitted: Use, used: Use, device: str, n: int, pilot: int | None) -> dict:
    """A calibrated plan, or without a pilot the analytic one on levels placed by the same starts."""
    x = starts((NETWORK_STARTS, 1, fitted.size, fitted.size), 80.0, pilot or 0, torch.float32, device)
    labels = {"labels": labels_of(NETWORK_STARTS, device)}
    if pilot is None:
        run = under_guidance(used.guidance)[TOLD]
        sigmas = place_sigmas(fitted.denoise, x, karras_sigmas(cells.PILOT_STEPS), n, labels, disable=True)
    else:
        plan = calibrate_plan(fitted.denoise, x, n, karras_sigmas(PILOT_STEPS), labels, guidance=fitted.guidance, disable=True)
        run, sigmas = run_of(plan), plan.sigmas
    return apart(of_network(used, device, run, sigmas), network_limit(used, device))


def of_use(words: str) -> str:
    """The words of a key."""
    return f"network, {NETWORK_RESULTS} results, {words}"


def network_cells(device: str) -> Iterator[tuple]:
    for words, (fitted, used, evaluations) in USES.items():
        for n, pilot in itertools.product(evaluations, (None, PILOTS[0])):
            sampler = TOLD if pilot is None else name_of(pilot, "ode")
            key = f"{of_use(words)} | {sampler} | {n} | 0"
            yield key, functools.partial(measure_network, fitted, used, device, n, pilot)
