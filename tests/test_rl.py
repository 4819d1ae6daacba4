"""Plans of policy-gradient samplers: each against its published update, written out in the velocity; densities; bad input."""

import math

import numpy as np
import pytest
import torch

from ersde_fast import er_sde_plan, fast_step, rl, step_log_prob

# What the samplers' papers and code say of one step from s to t: the mean and the standard deviation of the next sample.


def flow_grpo(x, v, s, t, a):
    std = a * math.sqrt(s / (1 - (t if s == 1 else s)))
    mean = x * (1 + std**2 / (2 * s) * (t - s)) + v * (1 + std**2 * (1 - s) / (2 * s)) * (t - s)
    return mean, std * math.sqrt(s - t)


def dance_grpo(x, v, s, t, eta):
    score = -(x - (x - s * v) * (1 - s)) / s**2
    return x + (t - s) * v - 0.5 * eta**2 * score * (t - s), eta * math.sqrt(s - t)


def cps(x, v, s, t, eta):
    std = t * math.sin(eta * math.pi / 2)
    return (x - s * v) * (1 - t) + (x + v * (1 - s)) * math.sqrt(t**2 - std**2), std


def precise(x, v, s, t, eta):
    rho = ((t * (1 - s)) / (s * (1 - t))) ** (eta**2 / 2)
    return (x - s * v) * (1 - t) + (x + v * (1 - s)) * t * rho, t * math.sqrt(1 - rho**2)


SAMPLERS = {
    "flow": (rl.flow_sde_plan, flow_grpo, 0.7),
    "dance": (rl.dance_sde_plan, dance_grpo, 0.3),
    "cps": (rl.cps_plan, cps, 0.9),
    "precise": (rl.precise_plan, precise, 1.5),
}
EVENLY = torch.linspace(1, 0, 11, dtype=torch.float64)
SCHEDULES = {
    "evenly from 1": EVENLY,
    "shifted": 3 * EVENLY / (1 + 2 * EVENLY),
    "from below 1": torch.tensor([0.97, 0.8, 0.35, 0.05], dtype=torch.float64),
    "one step": torch.tensor([1.0, 0.0], dtype=torch.float64),
}
X, V, Z = torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("by_step", [False, True])
def test_it_is_the_published_update(name, schedule, by_step):
    """At sigma 1 and at the last step too; the density is that of the Gaussian, and its mean what the samplers' code takes."""
    make, published, level = SAMPLERS[name]
    sigmas = SCHEDULES[schedule]
    levels = [level * (1 - i / 20) for i in range(len(sigmas) - 1)] if by_step else [level] * (len(sigmas) - 1)
    plan = make(sigmas, levels if by_step else level)
    assert torch.equal(make(sigmas).table, make(sigmas, level).table)
    for i, (s, t) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        mean, std = published(X, V, s, t, levels[i])
        row = plan.rows[i]
        assert row.w_noise == pytest.approx(std, rel=1e-12, abs=1e-15)
        step = {"noise": Z, "prediction_type": "flow"}
        x_next, denoised = fast_step(plan, i, X, [V], **step)
        torch.testing.assert_close(denoised, X - s * V, rtol=1e-12, atol=1e-12)
        size = 1 + mean.abs().max().item()
        torch.testing.assert_close(x_next, mean + std * Z, rtol=0, atol=1e-12 * size)
        if std == 0:
            with pytest.raises(ValueError, match=f"step {i} adds no noise"):
                step_log_prob(plan, i, X, [V], x_next, prediction_type="flow")
            continue
        elements = torch.distributions.Normal(mean, std).log_prob(x_next)
        for reduction in ("sum", "mean"):
            expected = getattr(elements, reduction)((1, 2))
            got = step_log_prob(plan, i, X, [V], x_next, prediction_type="flow", reduction=reduction)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * size / std)
            *_, drawn = fast_step(plan, i, X, [V], return_log_prob=True, log_prob_reduction=reduction, **step)
            assert torch.equal(drawn, got)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_level_of_0_is_eulers_step(name):
    """So a window of steps is trained, and the others are the ODE's."""
    make, _, level = SAMPLERS[name]
    euler = er_sde_plan(EVENLY, process="flow", order=1, noise_scaler="ode").weights
    torch.testing.assert_close(make(EVENLY, 0.0).weights, euler, rtol=1e-13, atol=1e-15)
    window = np.where(np.arange(10) // 2 == 1, level, 0.0)
    plan, whole = make(EVENLY, window), make(EVENLY, level)
    inside = torch.from_numpy(window != 0)
    torch.testing.assert_close(plan.weights, torch.where(inside[:, None], whole.weights, euler), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_that_repeat_stay_where_they_are(name):
    make = SAMPLERS[name][0]
    repeated = [1.0, 1.0, 0.8, 0.8000000001, 0.3, 0.0, 0.0]
    plan = make(torch.tensor(repeated, dtype=torch.float32))
    assert plan.weights[[1, 3, 4]].isfinite().all()
    for i in (0, 2, 5):
        assert plan.weights[i].tolist() == [1, 0, 0]
    torch.testing.assert_close(plan.weights[1], make([1.0, 0.8]).weights[0], rtol=1e-6, atol=1e-7)
    assert plan.sigmas.dtype == torch.float64 and plan.sigmas[0] == 1


def test_the_gradient_of_the_density_is_that_of_the_published_one():
    plan, v = rl.flow_sde_plan(EVENLY), V.clone().requires_grad_()
    x_next = fast_step(plan, 3, X, [V], noise=Z, prediction_type="flow")[0]
    ours = step_log_prob(plan, 3, X, [v], x_next, prediction_type="flow", reduction="mean").sum()
    mean, std = flow_grpo(X, v, EVENLY[3].item(), EVENLY[4].item(), 0.7)
    theirs = torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2)).sum()
    gradients = [torch.autograd.grad(density, v)[0] for density in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make, name", [(rl.flow_sde_plan, "a"), (rl.dance_sde_plan, "eta"), (rl.cps_plan, "eta"), (rl.precise_plan, "eta")])  # fmt: skip
@pytest.mark.parametrize(
    "sigmas, level, message",
    [
        ([1, 0.5, 0], -0.1, "NAME must be a finite number of at least 0, got -0.1"),
        ([1, 0.5, 0], math.nan, "NAME must be a finite number of at least 0, got nan"),
        ([1, 0.5, 0], [0.5], "NAME must be one number or 2, one for each step, got 1"),
        ([1, 0.5, 0], [0.5, math.inf], r"NAME\[1\] must be a finite number of at least 0, got inf"),
        ([1, 0.5, 0], torch.ones(3), r"NAME must be a number or have shape \(2,\)"),
        ([1, 0.5, 0], torch.ones(2, device="meta"), "NAME must hold numbers, got a tensor on meta"),
        ([1.5, 0.5, 0], 0.5, 'sigmas must be at most 1 for process "flow"'),
        ([0.5, 1, 0], 0.5, "sigmas must not rise"),
        ([1, math.nan, 0], 0.5, "sigmas must be finite and at least 0"),
        ([1], 0.5, "sigmas must be one-dimensional with at least 2 values"),
    ],
)
def test_bad_input(make, name, sigmas, level, message):
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        make(sigmas, level)


def test_bad_levels_and_reductions():
    with pytest.raises(ValueError, match=r"eta must be at most 1, got 1.1 at step 1"):
        rl.cps_plan([1, 0.5, 0], [1.0, 1.1])
    with pytest.raises(ValueError, match="weights must be finite"):
        rl.dance_sde_plan([1, 0.5, 0], 1e200)
    plan = rl.cps_plan([1, 0.5, 0])
    with pytest.raises(ValueError, match=r'reduction must be "sum" or "mean", got \'max\''):
        step_log_prob(plan, 0, X, [V], X, reduction="max")
    with pytest.raises(ValueError, match=r'log_prob_reduction must be "sum" or "mean", got None'):
        fast_step(plan, 0, X, [V], return_log_prob=True, log_prob_reduction=None)
    with pytest.raises(ValueError, match=r"log_prob_reduction='mean' needs return_log_prob=True"):
        fast_step(plan, 0, X, [V], log_prob_reduction="mean")
