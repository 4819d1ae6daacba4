"""The authors' interface: their recorded runs again, what their code could not do, and its errors."""

import numpy as np
import pytest
import torch
from test_reference import denoise, golden_cases, tolerance

from ersde_fast import er_sde_plan, fast_step
from ersde_fast.integrations.er_sde_solver import ER_SDE_Solver

SIGMAS = [10.0, 4.0, 1.5, 0.6, 0.2, 0.05, 0.0]
METHODS = {1: "{}_1_order", 2: "{}_2_order_taylor", 3: "{}_3_order_taylor"}


def solver_of(sde_type, prediction_type, number):
    class Solver(ER_SDE_Solver):
        def customized_func(self, sigma):
            return super().customized_func(sigma, func_type=number)

    return Solver(sde_type, prediction_type)


@pytest.mark.parametrize("case", [case for case in golden_cases() if case.values[0]["peer"] == "official"])
def test_reproduces_recorded_runs(case):
    """x at every evaluation and at the end, in float64."""
    process, seen = case["process"].lower(), []
    draws = iter(case["noise"])
    times = torch.arange(len(case["sigmas"]) - 1, dtype=torch.float64)
    prediction_type = case["model_prediction_type"]

    def model(x, time):
        assert time.shape == (1,)
        i = int(time)
        seen.append(x)
        sigma, alpha = case["sigmas"][i], case["alphas"][i]
        denoised = denoise(x, sigma, alpha, case["denoiser"])
        return denoised if prediction_type == "x_start" else (x - alpha * denoised) / sigma

    def randn_like(x):
        return torch.tensor(next(draws), dtype=torch.float64).view_as(x)

    solver = solver_of(process, prediction_type, case["scaler"]["number"])
    method = getattr(solver, METHODS[case["order"]].format(process))
    start = torch.tensor(case["x_init"], dtype=torch.float64).view(1, -1)
    levels = [np.array(case["sigmas"])] if process == "ve" else [np.array(case["alphas"]), np.array(case["sigmas"])]
    result = method(model, start, *levels, times=times, randn_like=randn_like)
    for i, expected in enumerate(case["x_after_step"]):
        expected = torch.tensor(expected, dtype=torch.float64).flatten()
        x = (seen[i + 1] if i + 1 < len(seen) else result).flatten()
        assert ((x - expected).abs() / expected.abs().clamp(min=1)).max() <= tolerance(case), f"step {i}"


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("sde_type", ["ve", "vp"])
def test_what_their_code_fails_at(sde_type, order, kind):
    """Every order with schedules of every kind, down to sigma 0; the noise is torch's."""
    sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
    alphas = torch.ones_like(sigmas) if sde_type == "ve" else torch.rsqrt(1 + sigmas**2)
    sigmas = sigmas * alphas
    levels = [kind(sigmas.tolist())] if sde_type == "ve" else [kind(alphas.tolist()), kind(sigmas.tolist())]
    x = y = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    result = getattr(ER_SDE_Solver(sde_type, "x_start"), METHODS[order].format(sde_type))(lambda x, time: 0.5 * x, x, *levels)
    plan, history = er_sde_plan(sigmas, alphas, order=order, integration_points=100), []
    torch.manual_seed(1)
    for i in range(plan.num_steps):
        history = [0.5 * y, *history[:2]]
        y = fast_step(plan, i, y, history)
    torch.testing.assert_close(result, y)
    torch.testing.assert_close(result, history[0])


def test_names_of_the_edm_example_and_model_arguments():
    solver, seen = ER_SDE_Solver("ve", "x_start"), []

    def model(x, sigma, class_labels):
        seen.append((sigma.tolist(), class_labels))
        return 0.5 * x

    for method in (solver.ve_xstart_1_order, solver.ve_start_2_order_taylor, solver.ve_start_3_order_taylor):
        assert method(model, torch.ones(2, 3), SIGMAS, class_labels=7).isfinite().all()
    assert seen == [([pytest.approx(s)] * 2, 7) for s in SIGMAS[:-1]] * 3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ER_SDE_Solver("vpsde"), "sde_type must be"),
        (lambda: ER_SDE_Solver("ve", "score"), "model_prediction_type must be"),
        (lambda: ER_SDE_Solver("vp").ve_1_order(None, torch.ones(1), SIGMAS), 'sde_type must be "ve"'),
        (lambda: ER_SDE_Solver("ve").ve_1_order(None, torch.ones(1), SIGMAS, times=[1.0]), "times must hold 6"),
        (lambda: ER_SDE_Solver().customized_func(torch.ones(1), func_type=8), "func_type must be 1 to 7"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
