"""The study of quality: its exact denoisers, its distances, its samplers from other packages, and the quick form of its command."""

import math
import runpy
import sys

import pytest
import torch

import page
import study
from ersde_fast import er_sde_plan, fast_step
from ersde_fast.schedules import karras_sigmas
from network import LIMIT, Network
from problems import (
    Empirical,
    Mixture,
    data_std,
    digits_mixture,
    frechet,
    gaussian_amplification,
    gaussian_error,
    gaussian_frechet,
    gaussian_variance,
    sliced_wasserstein,
)
from samplers import RIVALS, of_diffusers, of_k_diffusion, ours


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_mixture():
    a = torch.randn(2, 3, 3, dtype=torch.float64, generator=generator())
    return Mixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.randn(2, 3, dtype=torch.float64, generator=generator(1)),
        a @ a.transpose(1, 2) + 0.1 * torch.eye(3, dtype=torch.float64),
    )


@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_denoisers_are_exact(sigma):
    """Tweedie: x + sigma^2 grad log p(x), with p from torch.distributions; of the empirical distribution, a mixture of points."""
    problem = small_mixture()
    x = (2 * torch.randn(5, 3, dtype=torch.float64, generator=generator(2))).requires_grad_()
    noisy = problem.axes * (problem.values + sigma**2)[:, None, :] @ problem.axes.transpose(1, 2)
    parts = torch.distributions.MultivariateNormal(problem.means, noisy)
    log_p = torch.logsumexp(parts.log_prob(x[:, None]) + problem.weights.log(), 1).sum()
    expected = x + sigma**2 * torch.autograd.grad(log_p, x)[0]
    torch.testing.assert_close(problem.denoise(x.detach(), sigma), expected.detach())

    data = torch.randn(7, 3, dtype=torch.float64, generator=generator(3))
    points = Mixture(torch.full((7,), 1 / 7, dtype=torch.float64), data, torch.zeros(7, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(Empirical(data).denoise(x.detach(), sigma), points.denoise(x.detach(), sigma))


def test_moments_and_distances():
    problem = small_mixture()
    x = problem.sample(200_000, generator())
    assert frechet(x, problem.mean, problem.covariance) < 1e-3
    shifted = frechet(x + 1, problem.mean, problem.covariance)
    assert shifted == pytest.approx(3, rel=0.02)
    assert frechet(2 * (x - x.mean(0)) + problem.mean, problem.mean, problem.covariance) == pytest.approx(
        problem.covariance.trace().item(), rel=0.02
    )
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x, x + torch.tensor([1.0, 0, 0])) == pytest.approx(
        0.5, rel=0.1
    )  # mean |cosine| in three dimensions
    assert 0.5 < data_std(digits_mixture()) < 0.6


@pytest.mark.parametrize("name", ["published", "newton", "rival"])
def test_responses_give_the_variance_that_samples_have(name):
    """Five standard errors of 4,000 samples of 200 directions."""
    run = {
        "published": ours(integration_points=200),
        "newton": ours(method="newton", node_scale=5.0),
        "rival": of_k_diffusion("sample_dpmpp_2m_sde", eta=1.0),
    }[name]
    eigenvalues = torch.linspace(0.05, 2, 200, dtype=torch.float64)
    sigmas, g = karras_sigmas(7, 0.01, 20.0), generator()
    denoise = lambda x, sigma: eigenvalues / (eigenvalues + sigma**2) * x  # noqa: E731
    draw = lambda i=None: torch.randn(4000, 200, dtype=torch.float64, generator=g)  # noqa: E731
    drawn = run(denoise, sigmas[0] * draw(), sigmas, draw).square().mean(0)
    exact = gaussian_variance(run, sigmas, eigenvalues)
    assert ((drawn / exact - 1).abs() < 5 * math.sqrt(2 / 4000)).all()
    expected = (exact.sqrt() - eigenvalues.sqrt()).square().mean().item()
    assert gaussian_frechet(run, sigmas, eigenvalues) == pytest.approx(expected)


def test_convergence_and_amplification_in_closed_form():
    """Newton 4 has slope 4; an error of the first evaluation alone responds as the first step's weight says."""
    run = ours(max_stage=4, method="newton", noise_scaler="ode")
    assert math.log2(gaussian_error(run, 40) / gaussian_error(run, 80)) == pytest.approx(4, abs=0.2)
    sigmas = torch.tensor([80.0, 20.0, 0.0], dtype=torch.float64)
    plan = er_sde_plan(sigmas, order=1)
    response = plan.rows[0].w_d[0] * 0.25 / (0.25 + 400) * (80 * 0.5 / math.hypot(80, 0.5)) / 0.5
    last = 20 * 0.5 / math.hypot(20, 0.5) / 0.5
    got = gaussian_amplification(ours(max_stage=1), sigmas)
    assert got["all"] == pytest.approx(math.hypot(response, last)) and got["high"] == got["all"]


@pytest.mark.parametrize("classes", [True, False])
def test_the_network_as_a_problem(classes):
    """Samples nearer to the network's limit with more evaluations; the same cell twice; its levels placed between the ends."""
    network = Network("cpu", karras_sigmas(12, 0.002, 20.0), classes, samples=40, batch=20)
    few, many = (network.measure(LIMIT, karras_sigmas(n, 0.002, 20.0), 0) for n in (3, 8))
    assert many["frechet"] < few["frechet"] and many["data"] < few["data"]
    assert many == network.measure(LIMIT, karras_sigmas(8, 0.002, 20.0), 0)
    placed = network.placed(karras_sigmas(12, 0.002, 20.0), 5)
    assert placed.tolist()[::4] == pytest.approx([20, 0.002]) and len(placed) == 6


def test_the_page_shows_what_was_kept():
    """Every table of docs/quality.md is the one that results.json makes."""
    text = (study.ROOT / "docs" / "quality.md").read_text()
    for name, made in page.tables(study.kept()).items():
        assert f"<!-- {name} -->\n{made}\n<!-- end -->" in text, name


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_converge_to_the_data(name):
    """With many steps each ends near the moments, so each runs as its package means it to."""
    problem, run, g = small_mixture(), RIVALS[name], generator()
    sigmas = karras_sigmas(100, 0.01, 20.0)
    draw = lambda i=None: torch.randn(4000, 3, dtype=torch.float64, generator=g)  # noqa: E731
    x = run(problem.denoise, sigmas[0] * draw(), sigmas, draw)
    assert frechet(x, problem.mean, problem.covariance) < 0.03


@pytest.mark.parametrize("rule", [{}, {"method": "taylor"}])
def test_ve_and_vp_of_one_model_are_one_sampler(rule):
    """The paper's claim: with x scaled by alpha both give the same samples, for the same noise."""
    problem, sigmas, g = small_mixture(), karras_sigmas(10, 0.01, 20.0), generator()
    alphas = torch.rsqrt(1 + sigmas**2)
    draws = [torch.randn(50, 3, dtype=torch.float64, generator=g) for _ in range(11)]
    expected = ours(**rule)(problem.denoise, 20 * draws[10], sigmas, draws.__getitem__)
    plan, x, history = er_sde_plan(sigmas * alphas, alphas, **rule), alphas[0] * 20 * draws[10], []
    for i in range(10):
        history = [problem.denoise(x / alphas[i], sigmas[i].item()), *history[:2]]
        x = fast_step(plan, i, x, history, noise=draws[i])
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


def test_a_scheduler_of_diffusers_is_the_sampler_of_k_diffusion():
    """DPM-Solver++ 2M from both packages, on the same levels."""
    from diffusers import DPMSolverMultistepScheduler

    problem, sigmas = small_mixture(), karras_sigmas(10, 0.01, 20.0)
    x = 20 * torch.randn(50, 3, dtype=torch.float64, generator=generator())
    theirs = of_diffusers(DPMSolverMultistepScheduler, lower_order_final=False)(problem.denoise, x, sigmas, None)
    torch.testing.assert_close(theirs, RIVALS["DPM-Solver++ 2M"](problem.denoise, x, sigmas, None), rtol=1e-4, atol=1e-4)


def test_quick_form(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--quick"])
    runpy.run_path(study.__file__, run_name="__main__")
    rows = {line[:28].strip(): float(line.split()[-3]) for line in capsys.readouterr().out.splitlines()}
    assert len(rows) == 2 + len(RIVALS)
    assert rows["newton 3, c = 10 std"] < 0.5 * rows["published, order 3"]
