"""The cells of docs/calibration.md: plans calibrated on a pilot, run on samples of their own."""

import functools
import itertools

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import cells
import guidance
from ersde_fast import Plan, calibrate_plan, sample_er_sde
from ersde_fast.schedules import karras_sigmas
from problems import Mixture, as_model, data_std, digits_mixture
from samplers import contenders, limit_of, under_guidance

STARTS = (16, 64)
NETWORK_STARTS = {"network": (64,), "network without classes": (64, 256)}
PILOTS = (0, 1, 2)
PILOT_STEPS = 32
KINDS = ("ode", "sde_5")
TOLD = {"ode": "told, ode", "sde_5": "told"}  # the same in the study of guidance
FEW = (5, 6, 8)
BUDGETS = (100, 400)  # beside the default
GUIDANCE = (2.5, 5.0)
GUIDED_NETWORKS = {"emoji": (1.0, 5.0), "digits_classes": (5.0,)}
UNCALIBRATED = {"ode": cells.OF_ODE, "sde_5": "newton 3, c = 10 std"}
PAIRED = {"network": 1.0, "network without classes": 0.0}  # their guidance
PAIRS = 2000
COVERED = (5, 8)  # evaluations at which precision and recall are measured


def run_of(plan: Plan):
    """A plan as the study runs samplers; its levels are its own."""

    def run(denoise, x, sigmas, noise):
        draws = iter(range(plan.num_steps))
        return sample_er_sde(as_model(denoise), x, plan=plan, noise_sampler=lambda *_: noise(next(draws)), disable=True)

    return run


def name_of(pilot: int, kind: str, evaluations: int | None = None) -> str:
    return f"calibrated, {kind}, pilot {pilot}{f', {evaluations} evaluations' if evaluations else ''}"


def reported(plan: Plan) -> dict:
    return {"spent": plan.report.evaluations, "calibrated": float(plan.report.calibrated)}


def starts(shape: tuple, sigma: float, pilot: int, dtype=torch.float64, device="cpu") -> Tensor:
    g = torch.Generator(device).manual_seed(300 + pilot)
    return sigma * torch.randn(shape, dtype=dtype, generator=g, device=device)


@functools.cache
def of_exact(name: str, count: int, pilot: int, n: int, kind: str, evaluations: int | None = None) -> Plan:
    problem, sigmas = cells.PROBLEMS[name](), cells.karras(PILOT_STEPS)
    x = starts((count, len(problem.mean)), sigmas[0].item(), pilot)
    allowed = {"evaluations": evaluations} if evaluations else {}
    return calibrate_plan(as_model(problem.denoise), x, n, sigmas, noise_scaler=kind, disable=True, **allowed)


def measure_exact(name: str, count: int, pilot: int, n: int, kind: str, seed: int, evaluations: int | None = None) -> dict:
    plan = of_exact(name, count, pilot, n, kind, evaluations)
    made = cells.measure(cells.PROBLEMS[name](), run_of(plan), n, seed, cells.SAMPLES, spacing=lambda _: plan.sigmas)
    return made | reported(plan)


@functools.cache
def components() -> list[Mixture]:
    of = digits_mixture()
    covariances = of.axes * of.values[:, None] @ of.axes.mT
    one = torch.ones(1, dtype=torch.float64)
    return [Mixture(one, of.means[k, None], covariances[k, None]) for k in range(len(of.weights))]


def guided_model(x: Tensor, sigma: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """With the classes of the samples, and without."""
    told = torch.empty_like(x)
    for k in classes.unique().tolist():
        told[classes == k] = components()[k].denoise(x[classes == k], sigma[0].item())
    return told, digits_mixture().denoise(x, sigma[0].item())


@functools.cache
def of_guided(
    scale: float, count: int, pilot: int, n: int, kind: str, classes: int = 10, rounded: torch.dtype = torch.float64
) -> Plan:
    """Of the first classes in turn; the model's input and output rounded to a dtype."""
    sigmas, conditions = karras_sigmas(PILOT_STEPS), {"classes": torch.arange(count) % classes}
    x = starts((count, 64), sigmas[0].item(), pilot)

    def model(x, sigma, classes):
        return tuple(of.to(rounded).double() for of in guided_model(x.to(rounded).double(), sigma, classes))

    return calibrate_plan(model, x, n, sigmas, conditions, noise_scaler=kind, guidance_scale=scale, disable=True)


def measure_guided(scale: float, count: int, pilot: int, n: int, kind: str, seed: int) -> dict:
    of, plan = guidance.problem(guidance.EXACT, "cpu", scale), of_guided(scale, count, pilot, n, kind)
    x = of.run(run_of(plan), plan.sigmas, seed)
    limit = guidance.limit(guidance.EXACT, "cpu", scale, guidance.FROM_80, kind)
    return of.compare(x, limit) | reported(plan)


def seed_cells(seed: int):
    for name, count, n, pilot, kind in itertools.product(cells.PROBLEMS, STARTS, FEW, PILOTS, KINDS):
        key = f"{name}, {count} starts | {name_of(pilot, kind)} | {n} | {seed}"
        yield key, functools.partial(measure_exact, name, count, pilot, n, kind, seed)


def coverage_cells():
    """Precision and recall on the mixture, whose samples are all different: of exact samples, uncalibrated plans and calibrated ones."""
    problem, of = digits_mixture(), "mixture, coverage"
    samplers = contenders(data_std(problem))

    def of_plan(pilot, n, kind, seed):
        plan = of_exact("mixture", STARTS[0], pilot, n, kind)
        return cells.coverage(problem, run_of(plan), n, seed, cells.SAMPLES, lambda _: plan.sigmas)

    for seed in cells.SEEDS:
        measure = functools.partial(cells.coverage, problem, seed=seed, samples=cells.SAMPLES)
        yield f"{of} | {cells.FLOOR} | {COVERED[0]} | {seed}", functools.partial(measure, None, COVERED[0])
        for kind, n in itertools.product(KINDS, COVERED):
            run, spacing = samplers[UNCALIBRATED[kind]], functools.partial(cells.placed, "mixture")
            yield f"{of} | {UNCALIBRATED[kind]} | {n} | {seed}", functools.partial(measure, run, n, spacing=spacing)
            for pilot in PILOTS:
                key = f"{of}, {STARTS[0]} starts | {name_of(pilot, kind)} | {n} | {seed}"
                yield key, functools.partial(of_plan, pilot, n, kind, seed)


def exact_cells():
    """(key, measure) of the exact problems: their moments are those of the data."""
    yield from seed_cells(0)
    for scale, n, pilot, kind in itertools.product(GUIDANCE, FEW, PILOTS, KINDS):
        key = f"{guidance.EXACT}, guidance {scale:g}, 64 starts | {name_of(pilot, kind)} | {n} | 0"
        yield key, functools.partial(measure_guided, scale, 64, pilot, n, kind, 0)
    for n, pilot, kind, allowed in itertools.product(FEW, PILOTS, KINDS, BUDGETS):
        key = f"mixture, 16 starts | {name_of(pilot, kind, allowed)} | {n} | 0"
        yield key, functools.partial(measure_exact, "mixture", 16, pilot, n, kind, 0, allowed)
    for seed in cells.SEEDS[1:]:
        yield from seed_cells(seed)
    yield from coverage_cells()


def network_cells(device: str):
    """The same of the network of digits, told the class of its samples and not, against its own limit."""
    from network import LIMIT, Network

    network = functools.cache(lambda name: Network("digits", device, float(name == "network"), samples=10_000))
    limit = functools.cache(
        lambda name: network(name).reference(network(name).run(LIMIT, karras_sigmas(cells.LIMIT_STEPS), 100))
    )

    @functools.cache
    def plan(name, count, pilot, n, kind):
        return of_network(network(name), device, count, pilot, n, kind)

    def cell(name, count, pilot, n, kind, seed):
        made = plan(name, count, pilot, n, kind)
        return network(name).compare(network(name).run(run_of(made), made.sigmas, seed), limit(name))

    for name, counts in NETWORK_STARTS.items():
        for n, count, pilot, kind, seed in itertools.product(FEW, counts, PILOTS, KINDS, cells.SEEDS):
            of = f"{name}, {count} starts"
            measure = functools.partial(cell, name, count, pilot, n, kind, seed)
            yield guidance.Cell(f"{of} | {name_of(pilot, kind)} | {n} | {seed}", measure, f"{of}, {n}")


def of_network(of, device: str, count: int, pilot: int, n: int, kind: str) -> Plan:
    """Of a network, the classes in turn where it is told them; in pairs at a guidance that takes both."""
    sigmas, classes = karras_sigmas(PILOT_STEPS), of.labels.shape[1]
    x = starts((count, *of.shape), sigmas[0].item(), pilot, torch.float32, device)
    labels = one_hot(torch.arange(count, device=device) % classes, classes).float() if of.guidance else None

    def told(x, sigma, labels):
        return of.call(x, sigma[0].item(), labels)

    def pair(x, sigma, labels):
        return of.call(x.repeat(2, 1, 1, 1), sigma[0].item(), torch.cat([labels, 0 * labels])).chunk(2)

    model, given = (told, {}) if of.guidance in (0, 1) else (pair, {"guidance_scale": of.guidance})
    with torch.compiler.set_stance("force_eager"):  # of rows as many as it likes
        return calibrate_plan(model, x, n, sigmas, {"labels": labels}, noise_scaler=kind, disable=True, **given)


def measure_guided_network(name: str, device: str, scale: float, n: int, kind: str, pilot: int | None) -> dict:
    """A calibrated plan, or without a pilot the analytic one on placed levels, against the network's own limit of that kind of noise."""
    of, limit = guidance.problem(name, device, scale), guidance.limit(name, device, scale, guidance.FROM_80, kind)
    if pilot is None:
        run, sigmas = under_guidance(scale)[TOLD[kind]], guidance.sigmas_of(name, device, scale, guidance.PLACED, n)
    else:
        plan = of_network(of, device, 64, pilot, n, kind)
        run, sigmas = run_of(plan), plan.sigmas
    return of.compare(of.run(run, sigmas, 0), limit, with_data=False)


def guided_network_cells(device: str):
    """Networks of colour and of digits under guidance, one seed."""
    for name, scales in GUIDED_NETWORKS.items():
        for scale, n, kind, pilot in itertools.product(scales, FEW, KINDS, (None, *PILOTS)):
            on, sampler = (guidance.PLACED, TOLD[kind]) if pilot is None else ("64 starts", name_of(pilot, kind))
            of = f"{name}, guidance {scale:g}"
            measure = functools.partial(measure_guided_network, name, device, scale, n, kind, pilot)
            yield guidance.Cell(f"{of}, {on} | {sampler} | {n} | 0", measure, f"{of}, {n}")


def paired_cells(device: str):
    """The network of digits by the ODE, against what the same starts come to in many steps: the distance has no part that is other starts."""
    from network import STD, Network

    sampler = contenders(STD)[cells.OF_ODE]

    def network_of(name, samples):
        return Network("digits", device, PAIRED[name], samples=samples, batch=100 if device == "cpu" else samples)

    @functools.cache
    def of(name):
        made = network_of(name, PAIRS)
        many = made.run(limit_of("ode"), karras_sigmas(guidance.COSTS["digits_classes"].limit_steps), 0)
        return made, many, made.reference(many)

    def measure(name, run, sigmas):
        network, many, reference = of(name)
        few = network.run(run, sigmas, 0)
        apart = (few - many).square().mean((1, 2, 3)).quantile(0.5).item()
        return network.compare(few, reference, with_data=False) | {"median": apart}

    def uncalibrated(name, n, placed):
        levels = network_of(name, PAIRS // 10).placed(karras_sigmas(cells.PILOT_STEPS), n) if placed else karras_sigmas(n)
        return measure(name, sampler, levels)

    def calibrated(name, pilot, n):
        plan = of_network(of(name)[0], device, NETWORK_STARTS[name][0], pilot, n, "ode")
        return measure(name, run_of(plan), plan.sigmas)

    for name, n in itertools.product(PAIRED, FEW):
        for placed in (False, True):
            key = f"{name}, in pairs{f', {guidance.PLACED}' if placed else ''} | {cells.OF_ODE} | {n} | 0"
            yield key, functools.partial(uncalibrated, name, n, placed)
        for pilot in PILOTS:
            key = f"{name}, in pairs, {NETWORK_STARTS[name][0]} starts | {name_of(pilot, 'ode')} | {n} | 0"
            yield key, functools.partial(calibrated, name, pilot, n)
