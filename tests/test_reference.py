"""The reference step against samplers that people run today: x after every step of 166 of their runs."""

import json
from pathlib import Path

import pytest
import torch

from ersde_fast import er_sde_plan, reference_step

SCALERS = [None, "ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5"]  # by their numbers in the authors' code


def scaler_of(case):
    scaler = case["scaler"]
    return f"reverse_time_sde({scaler['eta']})" if scaler["number"] is None else SCALERS[scaler["number"]]


def plan_of(case):
    return er_sde_plan(
        case["sigmas"],
        case["alphas"],
        order=case["order"],
        noise_scaler=scaler_of(case),
        integration_points=case["quadrature"]["points"],
        s_noise=case["s_noise"],
    )


def denoise(x, sigma, alpha, denoiser):
    """The closed-form denoiser of the case: a Gaussian, or a mixture of two, in each element."""
    if denoiser["name"] == "gaussian":
        weights, means, stds = [1.0], [denoiser["mu"]], [denoiser["s"]]
    else:
        weights, means, stds = denoiser["w"], denoiser["m"], denoiser["s"]
    w, m, s = (torch.tensor(v, dtype=x.dtype) for v in (weights, means, stds))
    variance = alpha**2 * s**2 + sigma**2
    log_p = w.log() - (x[..., None] - alpha * m) ** 2 / (2 * variance) - variance.log() / 2
    return (torch.softmax(log_p, -1) * (sigma**2 * m + s**2 * alpha * x[..., None]) / variance).sum(-1)


def tolerance(case):
    if case["dtype"] == "float32":
        return 2.4e-5
    if (case["quadrature"]["dtype"] == "float32" and case["order"] > 1) or case["scaler"]["name"] == "ODE":
        return 4e-7
    return 1e-9


def leaves_the_equations(case):
    """Whether the run does on purpose what the equations do not: noise dropped, or variances clipped to 0."""
    variance = plan_of(case).weights[:, -1] ** 2
    return not case.get("stochastic", True) or bool(((variance > 0) & (variance < case.get("variance_clip", 0))).any())


def golden_cases():
    folder = Path(__file__).with_name("golden")
    cases = [
        c
        for peer in ("comfyui", "official", "invokeai")
        for c in json.loads((folder / f"open_{peer}.json").read_text())["cases"]
    ]
    return [pytest.param(case, id=case["id"]) for case in cases if not leaves_the_equations(case)]


@pytest.mark.parametrize("case", golden_cases())
def test_reproduces_existing_samplers(case):
    plan = plan_of(case)
    x = torch.tensor(case["x_init"], dtype=torch.float64).flatten()
    history = []
    for i, expected in enumerate(case["x_after_step"]):
        history = [denoise(x, case["sigmas"][i], case["alphas"][i], case["denoiser"]), *history[:2]]
        noise = case["noise"][i]
        noise = None if noise is None else torch.tensor(noise, dtype=torch.float64).flatten()
        x = reference_step(plan, i, x, history, noise=noise)
        expected = torch.tensor(expected, dtype=torch.float64).flatten()
        error = ((x - expected).abs() / expected.abs().clamp(min=1)).max().item()
        assert error <= tolerance(case), f"step {i}"
