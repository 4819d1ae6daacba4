"""Calibrated plans: what they gain where the truth is known, what of them is analytic, what they cost, and what is refused."""

import gc
import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.functional import dropout, one_hot

from ersde_fast import Plan, calibrate, calibrate_plan, coordinates, er_sde_plan, place_sigmas, sample_er_sde
from ersde_fast.calibrate import _Fit
from ersde_fast.coordinates import Coordinates
from ersde_fast.graph import SamplingGraph
from ersde_fast.pilot import ORDER, Family, Path, along
from ersde_fast.sample import sample_plan
from ersde_fast.schedules import flow_sigmas, karras_sigmas
from problems import Empirical, Mixture

SIZE = 6
PILOT = karras_sigmas(24, 0.01, 40.0)


def of_components(count: int = 4) -> Mixture:
    g = torch.Generator().manual_seed(1)
    means = torch.randn(count, SIZE, dtype=torch.float64, generator=g)
    roots = 0.3 * torch.randn(count, SIZE, SIZE, dtype=torch.float64, generator=g)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    return Mixture(weights, means, roots @ roots.mT + 0.01 * torch.eye(SIZE, dtype=torch.float64))


PROBLEM = of_components()
COMPONENTS = [
    Mixture(torch.ones(1, dtype=torch.float64), mean[None], (axes * values @ axes.T)[None])
    for mean, axes, values in zip(PROBLEM.means, PROBLEM.axes, PROBLEM.values, strict=True)
]


def model(x, sigma):
    return PROBLEM.denoise(x.double(), sigma[0].item()).to(x.dtype)


def starts(count=16, seed=0, sigma=40.0, dtype=torch.float64):
    return sigma * torch.randn(count, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def calibrated(num_steps=5, of=model, x=None, sigmas=PILOT, **options) -> Plan:
    return calibrate_plan(of, starts() if x is None else x, num_steps, sigmas, disable=True, **options)


def analytic_weights(sigmas, **noise) -> torch.Tensor:
    """Those of `er_sde_plan`, by the ODE if nothing is said, with columns for the order of calibrated plans."""
    weights = er_sde_plan(sigmas, **{"noise_scaler": "ode", **noise}).weights
    return torch.cat([weights[:, :-1], weights.new_zeros(len(weights), ORDER + 2 - weights.shape[1]), weights[:, -1:]], dim=1)


def median_error(plan, of=model, x=None, **options):
    """Of new starts, against 200 steps."""
    x = starts(64, seed=9) if x is None else x
    exact = sample_plan(er_sde_plan(karras_sigmas(200, 0.01, 40.0), noise_scaler="ode", order=3), of, x, disable=True)
    return (sample_plan(plan, of, x, disable=True) - exact).square().mean(1).quantile(0.5).item()


@pytest.fixture(scope="module")
def plan():
    return calibrated()


def of_pictures(side: int = 8) -> Mixture:
    """Pictures whose neighbours are alike: the variance of a frequency falls as its cube."""
    place = torch.arange(side, dtype=torch.float64)
    at = torch.cartesian_prod(place, place)
    alike = torch.exp(-torch.cdist(at, at) / 3)
    means = (
        torch.randn(6, side**2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        @ torch.linalg.cholesky(alike).T
    )
    return Mixture(torch.full((6,), 1 / 6, dtype=torch.float64), means, 0.1 * alike.expand(6, -1, -1))


def test_what_is_fine_counts_too(monkeypatch):
    """Of the faint half of the frequencies plans are nearer than those fitted to numbers are, and of the whole as near."""
    pictures = of_pictures()

    def of(x, sigma):
        return pictures.denoise(x.flatten(1), sigma[0].item()).view_as(x)

    def noise(count, seed):
        return 40 * torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    x = noise(100, 9)
    exact = sample_plan(er_sde_plan(karras_sigmas(100, 0.01, 40.0), noise_scaler="ode", order=3), of, x, disable=True)
    seen = Coordinates((1, 8, 8), 1000, x.device)
    fine = seen.variances(exact) < seen.variances(exact).quantile(0.5)
    whole_errors, fine_errors = [], []
    for sharpened in (0.0, coordinates.SHARPENED):
        monkeypatch.setattr(coordinates, "SHARPENED", sharpened)
        made = sample_plan(calibrated(6, of, noise(16, 0)), of, x, disable=True)
        errors = (seen.of(made) - seen.of(exact)).square()
        whole_errors.append(errors.sum(1).quantile(0.5))
        fine_errors.append(errors[:, fine].sum(1).quantile(0.5))
    assert fine_errors[1] < 0.5 * fine_errors[0] and whole_errors[1] < whole_errors[0]


@pytest.mark.parametrize(("part", "refused"), [(1e-3, False), (4e-3, True)])
def test_rounding_is_told_from_chance_by_the_samples_variance(part, refused, monkeypatch):
    """By as much where the fit looks at a tenth of the numbers: the second time each prediction has noise of that part of the variance."""
    monkeypatch.setattr(calibrate, "NUMBERS", 16 * 60)
    monkeypatch.setattr(calibrate, "LEAST_NUMBERS", 60)
    first, size = [], 600
    g = torch.Generator().manual_seed(0)

    def of(x, sigma):
        denoised = 0.25 / (0.25 + sigma[0] ** 2) * x
        if sigma[0] == PILOT[0]:
            denoised = denoised + (part * 0.25) ** 0.5 * torch.randn(x.shape, dtype=x.dtype, generator=g) if first else denoised
            first.append(1)
        return denoised

    x = 40 * torch.randn(16, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="model must return the same for the same sample") if refused else nullcontext():
        calibrated(of=of, x=x, evaluations=60)


def test_frequencies_that_no_result_has():
    """Pictures that are alike across say nothing of what differs across: fitted as the same numbers without a grid."""

    def of(x, sigma):
        return model(x[:, 0, :, 0], sigma)[:, None, :, None].expand_as(x)

    x = starts(16)[:, None, :, None] + 40 * torch.randn(
        16, 1, SIZE, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    made = calibrated(of=of, x=x)
    assert made.report.calibrated and made.report.median_after < 0.3 * made.report.median_before


def test_a_sequence_and_its_transpose_have_one_plan():
    """[batch, channels, frames] and [batch, tokens, channels]."""
    sequence = starts(16).view(16, 2, 3)
    made = calibrated(of=lambda x, sigma: model(x.reshape(-1, SIZE), sigma).view_as(x), x=sequence)
    moved = calibrated(of=lambda x, sigma: model(x.mT.reshape(-1, SIZE), sigma).view(-1, 2, 3).mT, x=sequence.mT.contiguous())
    torch.testing.assert_close(made.table, moved.table, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [2, 5, 8])
def test_new_starts_end_much_nearer_to_where_many_steps_lead(num_steps):
    plan = calibrated(num_steps)
    placed = er_sde_plan(place_sigmas(model, starts(), PILOT, num_steps), noise_scaler="ode")
    assert plan.report.calibrated and plan.report.median_after < plan.report.median_before
    assert median_error(plan) < 0.3 * median_error(placed)


@pytest.mark.parametrize("noise", [{}, {"noise_scaler": "sde_5"}, {"noise_scaler": "sde", "eta": [1, 0.5, 0, 1, 1]}])
def test_all_but_the_differences_is_analytic(plan, noise):
    """w_x, w_noise and the sum of w_d are those of the levels; with noise the differences' weights change by as much as the ODE's."""
    made = calibrated(**noise)
    assert torch.equal(made.sigmas, plan.sigmas)
    weights = analytic_weights(made.sigmas, **noise)
    assert torch.equal(made.weights[:, 0], weights[:, 0]) and torch.equal(made.weights[:, -1], weights[:, -1])
    torch.testing.assert_close(made.weights[:, 1:-1].sum(1), weights[:, 1:-1].sum(1), rtol=1e-13, atol=1e-15)
    added = plan.weights - analytic_weights(made.sigmas)
    torch.testing.assert_close(made.weights - weights, added, rtol=0, atol=1e-13)
    assert added.abs().max() > 0.01


def test_levels_fall_between_the_ends_of_the_pilot(plan):
    assert plan.sigmas[0] == PILOT[0] and plan.sigmas[-1] == 0 and plan.sigmas[-2] >= PILOT[-2] * (1 - 1e-12)
    assert (plan.sigmas.diff() < 0).all()
    without_zero = calibrated(sigmas=PILOT[:-1])
    assert without_zero.sigmas[-1] == PILOT[-2] and (without_zero.sigmas.diff() < 0).all() and without_zero.report.calibrated


def test_the_report_counts_every_evaluation():
    calls = []

    def counted(x, sigma):
        calls.append(len(x))
        return model(x, sigma)

    report = calibrated(of=counted, evaluations=90).report
    assert report.evaluations == sum(calls) / 16 <= 90 and report.starts == (12, 4)
    assert report.error_after < report.error_before and abs(report.variance - 1) < 0.1
    assert calibrated(evaluations=24 + 3 * 5).report.evaluations <= 24 + 3 * 5


@pytest.mark.parametrize("process", ["ve", "vp"])
def test_the_report_is_of_the_samples_themselves(process, monkeypatch):
    """In variances of all their numbers, also where the fit looks at few of their frequencies, and where alpha is not 1 at the end."""
    monkeypatch.setattr(calibrate, "NUMBERS", 64)
    monkeypatch.setattr(calibrate, "LEAST_NUMBERS", 4)
    levels = er_sde_plan(PILOT[:-1]).er_lambdas
    alphas = torch.rsqrt(1 + levels**2) if process == "vp" else torch.ones_like(levels)

    def of(x, sigma):
        return (scaled("vp") if process == "vp" else model)(x.flatten(1), sigma).view_as(x)

    x, sigmas = starts().view(16, 1, 2, 3) * alphas[0], levels * alphas
    made = calibrated(of=of, x=x, sigmas=sigmas, process=process, evaluations=60)
    pilot = er_sde_plan(sigmas, process=process, order=3, method="newton", noise_scaler="ode")
    exact, results = (sample_plan(plan, of, x, disable=True) for plan in (pilot, made))
    variance = exact.var(0, correction=0).mean()
    errors, held = (results - exact).square().flatten(1).mean(1) / variance, torch.arange(16) % 4 == 3
    expected = (
        errors[~held].mean(),
        errors[held].mean(),
        errors[held].quantile(0.5),
        results.var(0, correction=0).mean() / variance,
    )
    report = made.report
    assert report.calibrated
    found = report.error_after, report.held_back_after, report.median_after, report.variance
    assert found == pytest.approx(torch.stack(expected).tolist(), rel=1e-6)


def test_the_report_as_text(plan):
    first, errors, variance = str(plan.report).splitlines()
    assert first.startswith("calibrated: 12 starts fitted, 4 held back") and "evaluations a start" in first
    assert f"fitted {plan.report.error_before:.2g} to {plan.report.error_after:.2g}," in errors and "median" in errors
    assert f"{plan.report.variance:.3f}" in variance
    assert str(plan.report._replace(calibrated=False)).startswith("not calibrated, since")


def test_the_bar_ends_where_the_calibration_does(capsys):
    calls = []

    def counted(x, sigma):
        calls.append(len(x))
        return model(x, sigma)

    calibrate_plan(counted, starts(), 5, PILOT, evaluations=90, disable=False)
    assert f"{sum(calls)}/{sum(calls)}" in capsys.readouterr().err and sum(calls) < 90 * 16


def test_what_is_worse_on_the_starts_held_back_is_not_returned():
    """Every fourth start, held back, is of another distribution than those that are fitted."""
    other = torch.arange(16) % 4 == 3

    def of_two(x, sigma, other):
        return torch.where(other[:, None], -8 + 0.01 * model(x, sigma).sin(), model(x, sigma))

    plan = calibrated(of=of_two, extra_args={"other": other}, noise_scaler="sde_5", guidance=1.0)
    placed = place_sigmas(of_two, starts(), PILOT, 5, {"other": other})
    assert not plan.report.calibrated and plan.report.held_back_after >= plan.report.held_back_before
    assert torch.equal(plan.table, er_sde_plan(placed, guidance=1.0).table)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_data_of_which_every_result_is_a_point(seed):
    """Ends say nothing there until they are at another point: the way does, to the fit and to what decides whether it is returned."""
    points = Empirical(torch.randn(40, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))

    def of(x, sigma):
        return points.denoise(x, sigma[0].item())

    def elsewhere(plan):
        x = starts(400, seed=9)
        exact = sample_plan(er_sde_plan(karras_sigmas(100, 0.01, 40.0), noise_scaler="ode", order=3), of, x, disable=True)
        return ((sample_plan(plan, of, x, disable=True) - exact).square().mean(1) > 0.1).sum().item()

    plan = calibrated(of=of, x=starts(seed=seed))
    assert plan.report.calibrated
    assert elsewhere(plan) < 0.7 * elsewhere(er_sde_plan(place_sigmas(of, starts(seed=seed), PILOT, 5), noise_scaler="ode"))


def test_half_way_where_the_whole_is_refused(plan, monkeypatch):
    """Half of the logarithms of the gaps' factors, and of what the fit adds to the weights; of no more evaluations."""
    answers = iter([False, True])
    with monkeypatch.context() as patched:
        patched.setattr(_Fit, "is_better", lambda *_: next(answers))
        half = calibrated()
    placed = place_sigmas(model, starts(), PILOT, 5)[1:-1].log()
    gaps, half_gaps, placed_gaps = (
        levels.diff().abs().log() for levels in (plan.sigmas[1:-1].log(), half.sigmas[1:-1].log(), placed)
    )
    torch.testing.assert_close(half_gaps, (gaps + placed_gaps) / 2, rtol=0, atol=1e-9)
    added, half_added = (p.weights - analytic_weights(p.sigmas) for p in (plan, half))
    torch.testing.assert_close(half_added, added / 2, rtol=0, atol=1e-12)
    assert half.report.calibrated and plan.report.evaluations + 5 == half.report.evaluations <= 200
    assert half.report.error_after > plan.report.error_after


def test_half_way_is_refused_where_a_start_that_was_fitted_is_not_finite(monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(_Fit, "is_better", lambda *_: next(answers))
    placed = place_sigmas(model, starts(), PILOT, 5)

    def of(x, sigma):
        is_half = len(x) == 16 and (torch.cat([PILOT, placed]) - sigma[0].item()).abs().min() > 1e-6 * sigma[0]
        return torch.where(torch.arange(len(x))[:, None] == 1, math.nan if is_half else 1.0, 1.0) * model(x, sigma)

    assert not calibrated(of=of).report.calibrated


def scaled(process):
    """The model of another process, in its own variables."""

    def of(x, sigma):
        alpha = (1 - sigma**2).sqrt() if process == "vp" else 1 - sigma
        er_lambda = sigma[0] / alpha[0]
        return model(x / alpha[0], er_lambda[None])

    return of


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_every_process_of_one_model_has_the_same_plan(process):
    """In er_lambda, but for float32's rounding of the sigmas that the model sees, 1e-4 of er_lambda 40 as vp's, which rounds magnify."""
    levels = er_sde_plan(PILOT).er_lambdas
    alphas = torch.rsqrt(1 + levels**2) if process == "vp" else 1 / (1 + levels)
    made = calibrated(of=scaled(process), x=starts() * alphas[0], sigmas=levels * alphas, process=process, evaluations=60)
    torch.testing.assert_close(made.er_lambdas, calibrated(evaluations=60).er_lambdas, rtol=0.03, atol=0)
    assert made.report.median_after < 0.1 * made.report.median_before


@pytest.mark.parametrize(("process", "prediction_type"), [("flow", "flow"), ("vp", "v"), ("flow", None)])
def test_runs_that_start_at_sigma_1(process, prediction_type):
    """Where alpha is 0 the prediction is the mean, and er_lambda infinite."""

    def of(x, sigma):
        s = sigma[0].double().item()
        alpha = 1 - s if process == "flow" else math.sqrt(1 - s * s)
        x = x.double()
        denoised = PROBLEM.mean.expand_as(x) if alpha == 0 else PROBLEM.denoise(x / alpha, s / alpha)
        if prediction_type is None:
            return denoised
        return (x - denoised) / s if process == "flow" else (alpha * x - denoised) / s

    sigmas = flow_sigmas(30, 2.0)
    plan = calibrated(of=of, x=starts(sigma=1.0), sigmas=sigmas, process=process, prediction_type=prediction_type)
    assert plan.sigmas[0] == 1 and plan.report.calibrated
    assert plan.report.median_after < 0.3 * plan.report.median_before


def test_what_the_model_returns_changes_nothing(plan):
    """Epsilon, a guided pair, batches, and further arguments cut with the samples: the same plan, but for rounding."""
    numbers = torch.arange(16)

    def epsilon(x, sigma):
        return (x - model(x, sigma)) / sigma[:, None].double()

    def guided(x, sigma):
        return model(x, sigma), model(x, sigma)

    def told(x, sigma, number, deep, scale, prompts, embeddings, layers):
        assert torch.equal(deep["in"][0], number[:, None]) and scale.shape == (3,)
        assert list(prompts) == [f"a {k}" for k in number] and [int(e) for e in embeddings] == number.tolist()
        assert len(layers) == 16 and all(torch.equal(layer, number) for layer in layers)
        assert sigma[0] < 40 or torch.equal(x, starts()[number])
        return model(x, sigma)

    told_of = {"number": numbers, "deep": {"in": [numbers[:, None]]}, "scale": torch.ones(3)}
    told_of |= {
        "prompts": np.array([f"a {k}" for k in range(16)]),
        "embeddings": list(numbers[:, None]),
        "layers": (numbers,) * 16,
    }
    for made in (
        calibrated(of=epsilon, prediction_type="epsilon"),
        calibrated(of=guided, guidance_scale=3.0, guidance=2.5),
        calibrated(batch_size=5),
        calibrated(of=told, extra_args=told_of),
    ):
        torch.testing.assert_close(made.weights, plan.weights, rtol=0, atol=1e-3)
        torch.testing.assert_close(made.sigmas, plan.sigmas, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_under_guidance(scale):
    labels = one_hot(torch.arange(32) % 4, 4).double()

    def both(x, sigma, labels):
        of_each = torch.stack([component.denoise(x, sigma[0].item()) for component in COMPONENTS])
        return torch.einsum("nk,knd->nd", labels, of_each), model(x, sigma)

    plan = calibrated(6, of=both, x=starts(32), extra_args={"labels": labels}, guidance_scale=scale)
    assert plan.report.calibrated and plan.report.median_after < 0.5 * plan.report.median_before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision(dtype):
    plan = calibrated(of=lambda x, sigma: model(x.to(dtype), sigma), x=starts(dtype=torch.float32))
    assert plan.report.calibrated and median_error(plan) < 0.5 * plan.report.median_before


def test_a_plan_like_any_other(plan, tmp_path):
    """It is saved with its report, runs in SamplingGraph, and cannot begin in the middle, where its older predictions are not."""
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    again = Plan.load(path)
    assert torch.equal(again.table, plan.table) and again.report == plan.report
    x = starts(3)
    graph = SamplingGraph(model, plan, x.shape, torch.float64, "cpu")
    torch.testing.assert_close(graph(x), sample_plan(plan, model, x, disable=True), rtol=0, atol=0)
    with pytest.raises(ValueError, match="i must be a step from which on no older prediction is read"):
        plan.starting_at(1)


def test_trials_that_are_not_finite_are_not_taken():
    """On the fit's first levels, and in some of its derivatives."""

    def of(x, sigma):
        return model(x, sigma) * (math.nan if 1.0 < sigma[0] < 1.2 else 1.0)

    plan = calibrated(of=of, sigmas=PILOT[(PILOT <= 1.0) | (PILOT >= 1.2)])
    assert plan.report.calibrated and math.isfinite(plan.report.error_after) and plan.weights.isfinite().all()
    assert not ((plan.sigmas > 1.0) & (plan.sigmas < 1.2)).any()


def test_first_weights_that_are_not_finite_are_not_taken():
    """Where the run on which they are fitted meets levels at which one of the starts has no finite prediction."""
    known = torch.cat([PILOT, place_sigmas(model, starts(), PILOT, 5)])
    bad = torch.ones(12, 1, dtype=torch.float64)
    bad[5] = math.nan

    def of(x, sigma):
        is_known = len(x) != 12 or (known - sigma[0].item()).abs().min() < 1e-6 * sigma[0]
        return model(x, sigma) if is_known else model(x, sigma) * bad

    assert math.isfinite(calibrated(of=of).report.error_after)


def test_of_long_runs_only_what_is_needed_is_kept():
    """While a plan is tried: its run, the one tried before, the one from which derivatives are taken, and where others began and ended."""
    shape, alive, calls = (1, 2, 3), [], itertools.count()

    def of(x, sigma):
        if len(x) == 12 and next(calls) % 5 == 0:
            tensors = (value for value in gc.get_objects() if type(value) is torch.Tensor and value.shape[1:] == shape)
            alive.append(sum(map(len, tensors)))
        return model(x.flatten(1), sigma).view_as(x)

    calibrated(8, of=of, x=starts().view(16, *shape), evaluations=150)
    run, ends = 2 * 8 * 12, 6 * 16
    assert run < max(alive) <= 3 * run + ends


def test_the_generator_and_the_starts_are_left_alone():
    x, state = starts(), torch.get_rng_state()
    calibrated(x=x, evaluations=60)
    assert torch.equal(x, starts()) and torch.equal(state, torch.get_rng_state())


def test_the_paths_interpolation_and_its_errors():
    """Of one Gaussian the path is known: y goes as the root of var + l^2. The analytic plan is at the parameters 0."""
    variance = 0.25
    levels = PILOT[:-1]
    z = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = z * (variance + levels**2).sqrt()[:, None, None]
    denoised = y * (variance / (variance + levels**2))[:, None, None]
    path = Path(levels, y, denoised, z * math.sqrt(variance))
    for level in (30.0, 1.3, 0.2, 0.011):
        at, prediction = path.at(level)
        torch.testing.assert_close(at, z * math.sqrt(variance + level**2), rtol=2e-3, atol=0)
        torch.testing.assert_close(prediction, at * variance / (variance + level**2), rtol=2e-2, atol=0)
    family = Family(er_sde_plan(karras_sigmas(5, 0.01, 40.0)).sigmas, 40.0, "ve", {})
    nothing = torch.zeros(family.size, dtype=torch.float64)
    weights = analytic_weights(karras_sigmas(5, 0.01, 40.0))
    torch.testing.assert_close(family.plan(nothing).weights, weights, rtol=1e-12, atol=1e-12)
    errors, fitted = along(path, family, nothing, y[0], torch.full((3,), variance, dtype=torch.float64))
    assert len(errors) == 5 and fitted.shape == nothing.shape
    assert family.within(nothing + 1).shape == nothing.shape
    assert family.levels(family.within(nothing + 1))[-2] >= 0.01 * (1 - 1e-12)


def test_sample_er_sde_takes_it(plan):
    expected = sample_plan(plan, model, starts(3), disable=True)
    assert torch.equal(sample_er_sde(model, starts(3), plan=plan, disable=True), expected)


def nan_off_the_pilot(x, sigma):
    """Of the starts held back, at levels that the pilot does not have."""
    known = (PILOT - sigma[0].item()).abs().min() < 1e-6 * sigma[0]
    return model(x, sigma) if known or len(x) < 16 else model(x, sigma) * torch.tensor([1, 1, 1, math.nan]).repeat(4)[:, None]


BAD = {
    "x must be a float tensor": {"x": torch.zeros(3, SIZE)},
    "num_steps must be a whole number": {"num_steps": 1},
    "sigmas must have more steps than the 24": {"num_steps": 24},
    "sigmas must hold at least 4": {"sigmas": [4.0, 2.0, 0.0]},
    "evaluations must be a whole number of at least 39": {"evaluations": 38},
    "batch_size must be None or": {"batch_size": 0},
    "prediction_type must be None or": {"prediction_type": "noise"},
    "noise_scaler": {"noise_scaler": "sde_9"},
    "eta": {"eta": [1, 1]},
    "guidance_scale": {"guidance_scale": -1.0},
    "sigma_data": {"sigma_data": 0.0},
    "extra_args must be a dict": {"extra_args": [1]},
    "model must not write into x": {"of": lambda x, sigma: x.mul_(0.5)},
    "x must be finite": {"x": starts() * math.nan},
    rf"model must return float tensors of the shape of x, \(16, {SIZE}\), got torch.float64 \(1, {SIZE}\)": {
        "of": lambda x, sigma: x[:1]
    },
    rf"got torch.complex128 \(16, {SIZE}\)": {"of": lambda x, sigma: x + 0j},
    r"x must be noise scaled to sigmas\[0\], 40": {"x": starts(sigma=1.0)},
    "model must return finite predictions, got some that are not at sigma 40": {"of": lambda x, sigma: x * math.nan},
    f"not at sigma {PILOT[20]:g}, step 20": {"of": lambda x, sigma: x * (1 if sigma[0] > PILOT[20] * 1.01 else math.nan)},
    "model must return the same for the same sample": {"of": lambda x, sigma: dropout(model(x, sigma))},
    "or guidance_scale for a pair": {"of": lambda x, sigma: (x, x)},
    "model must depend on sigma or x": {"of": lambda x, sigma: torch.zeros_like(x)},
    "model must give finite results, got 16 of 16 that are not, where the pilot ends": {
        "of": lambda x, sigma: model(x, sigma) * (1 if sigma[0] > 0.011 else math.nan)
    },
    "got 4 of 16 that are not, where the 5 steps end that the fit begins with, of sigmas 40, ": {"of": nan_off_the_pilot},
    "model must give results that differ": {"of": lambda x, sigma: torch.zeros_like(x) + sigma[0].sin()},
    "model must give results that differ between starts, got the variance": {"x": starts(1).float().expand(13, SIZE)},
    r"x must be a float tensor .* with numbers, got torch.float64 \(16, 0\)": {"x": starts()[:, :0]},
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(message):
    with pytest.raises((ValueError, TypeError), match=message):
        calibrated(**BAD[message])


def test_a_pair_is_wanted_for_guidance():
    with pytest.raises(TypeError, match="model must return a pair for guidance_scale"):
        calibrated(guidance_scale=2.0)


def test_epsilon_says_nothing_at_alpha_0():
    with pytest.raises(ValueError, match=r"sigmas must start below 1: prediction_type \"epsilon\""):
        calibrated(sigmas=flow_sigmas(20), process="flow", prediction_type="epsilon", x=starts(sigma=1.0))
