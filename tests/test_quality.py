"""The study of quality: its exact denoisers, its distances, its samplers from other packages, and the quick form of its command."""

import math
import runpy
import sys

import pytest
import torch

import calibrated
import calibrated_elsewhere as elsewhere
import flows
import guidance
import page
import page_elsewhere
import regret
import study
from ersde_fast import Plan, er_sde_plan, fast_step
from ersde_fast.schedules import karras_sigmas
from features import kernel_distance
from guidance import FROM_80, Cell, GuidedMixture
from network import LIMIT, Network, network
from problems import (
    Empirical,
    Guided,
    Mixture,
    Moments,
    data_std,
    digits_mixture,
    frechet,
    gaussian_amplification,
    gaussian_error,
    gaussian_frechet,
    gaussian_variance,
    precision_recall,
    sliced_wasserstein,
)
from samplers import KINDS, RIVALS, kind_of, limit_of, of_diffusers, of_k_diffusion, ours, under_guidance


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
    few = x[:2000]
    assert sliced_wasserstein(few, few) == 0
    assert sliced_wasserstein(few, few + torch.tensor([1.0, 0, 0])) == pytest.approx(
        0.5, rel=0.1
    )  # mean |cosine| in three dimensions
    assert 0.5 < data_std(digits_mixture()) < 0.6


def test_precision_falls_by_samples_elsewhere_and_recall_by_modes_left_out():
    """Two squares far apart, even samples: all of x in one is precise and recalls half; both and as many elsewhere, the reverse."""
    here, there = (torch.rand(400, 2, dtype=torch.float64, generator=generator(k)) + 10 * k for k in (0, 1))
    y, again = torch.cat([here, there]), torch.rand(400, 2, dtype=torch.float64, generator=generator(2))
    assert precision_recall(y, y) == (1, 1)
    precision, recall = precision_recall(again, y)
    assert precision > 0.9 and 0.45 < recall <= 0.5
    precision, recall = precision_recall(torch.cat([y, 50 + 10 * y]), y)
    assert precision == 0.5 and recall == 1
    line = torch.arange(5, dtype=torch.float64)[:, None]  # the third neighbours of 0 to 4 are at 3, 2, 2, 2, 3
    assert precision_recall(torch.tensor([[-3.0], [-3.1], [6.9], [7.1]], dtype=torch.float64), line)[0] == 0.5


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


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_the_guided_denoiser_is_its_formula(scale):
    """Of the mixture: the prediction of the component alone, sample i of component i mod k, against that of all."""
    problem = small_mixture()
    x = 2 * torch.randn(6, 3, dtype=torch.float64, generator=generator(2))
    covariances = torch.einsum("kde,ke,kfe->kdf", problem.axes, problem.values, problem.axes)
    alone = [Mixture(torch.ones(1, dtype=torch.float64), problem.means[k : k + 1], covariances[k : k + 1]) for k in (0, 1)]
    of_class = torch.stack([alone[i % 2].denoise(x[i : i + 1], 0.7)[0] for i in range(6)])
    expected = (1 - scale) * problem.denoise(x, 0.7) + scale * of_class
    torch.testing.assert_close(Guided(problem, scale).denoise(x, 0.7), expected)
    single = Guided(problem.to(torch.float32), scale).denoise(x.float(), 0.7)
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_the_guided_network_is_its_formula(scale):
    of, net = Network("digits", "cpu", scale, samples=20, batch=10), network("digits")
    x = 3 * torch.randn(20, 1, 28, 28, generator=generator())
    without, told = net(x, 3.0), net(x, 3.0, of.labels)
    torch.testing.assert_close(of.denoise(x, 3.0), without + scale * (told - without), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_network_as_a_problem(scale):
    """Samples nearer to the network's limit with more evaluations; the same cell twice; its levels placed between the ends."""
    of = Network("digits", "cpu", scale, samples=30, batch=10)
    limit = of.reference(of.run(LIMIT, karras_sigmas(12, 0.002, 20.0), 100))
    few, many = (of.compare(of.run(LIMIT, karras_sigmas(n, 0.002, 20.0), 0), limit) for n in (3, 8))
    assert many["frechet"] < few["frechet"] and many["data"] < few["data"]
    assert few == of.compare(of.run(LIMIT, karras_sigmas(3, 0.002, 20.0), 0), limit)
    placed = of.placed(karras_sigmas(12, 0.002, 20.0), 5)
    assert placed.tolist()[::4] == pytest.approx([20, 0.002]) and len(placed) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_is_nearer_to_itself_than_few_evaluations_come(kind):
    of, sigmas = GuidedMixture(5.0, samples=500), karras_sigmas(40)
    limit = Moments.of(of.run(limit_of(kind), sigmas, 100))
    floor = of.compare(of.run(limit_of(kind), sigmas, 0), limit)["frechet"]
    few = of.compare(of.run(limit_of(kind), karras_sigmas(6), 0), limit)["frechet"]
    assert 0 < floor < 0.6 < 2 * floor < few


def test_kernel_distance_is_the_mean_over_pairs():
    x, y = torch.randn(5, 3, dtype=torch.float64, generator=generator()), torch.randn(4, 3, dtype=torch.float64) + 1
    kernel = lambda a, b: (a.dot(b) / 3 + 1) ** 3  # noqa: E731
    pairs = lambda of: [kernel(a, b) for a in of for b in of if a is not b]  # noqa: E731
    expected = sum(map(lambda of: sum(pairs(list(of))) / len(pairs(list(of))), (x, y)))
    expected -= 2 * sum(kernel(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx(expected.item())


@pytest.mark.parametrize("name", [name for name in flows.contenders(1.0) if "told" not in name])
def test_flows_end_at_the_data(name):
    """With many steps each sampler of a flow ends near the moments, so each runs as its package means it to."""
    problem, g = small_mixture(), generator()
    denoise = flows.as_flow(problem.denoise, 1e4)
    draw = lambda i=None: torch.randn(4000, 3, dtype=torch.float64, generator=g)  # noqa: E731
    x = flows.contenders(1.0)[name](denoise, draw(), draw, 100, 3.0)
    assert frechet(x.double(), problem.mean, problem.covariance) < 0.03


def test_flow_levels():
    assert flows.in_equal_parts(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert flows.to_the_end(3, 1.0).tolist() == pytest.approx([1, 0.5005, 0.001, 0])
    for shift in (1.0, 3.0):
        sigmas = guidance.as_flow_spaces(6, 0.002, 80.0, shift)
        s = sigmas / (1 + sigmas)
        unshifted = (s / (shift - (shift - 1) * s))[:-1]
        assert sigmas.tolist()[::5] == pytest.approx([80, 0.002]) and sigmas[-1] == 0
        torch.testing.assert_close(unshifted.diff(), unshifted.diff().mean().expand(5))


def test_regret_of_a_made_up_table():
    """Excess over the floor of each sampler's own kind; the best of a place is 1; flows do not count."""
    where = f"emoji, guidance 5, {FROM_80}"
    results = {
        f"{where} | limit, sde_5 | 60 | 0": {"frechet": 5.0},
        f"{where} | limit, ode | 60 | 0": {"frechet": 4.0},
        f"{where} | default | 8 | 0": {"frechet": 10.0},
        f"{where} | default | 8 | 1": {"frechet": 12.0},
        f"{where} | DPM-Solver++ 2M | 8 | 0": {"frechet": 16.0},
        f"{where} | default | 10 | 0": {"frechet": 7.0},
        f"{where} | UniPC | 10 | 0": {"frechet": 3.5},
        "emoji as flow, guidance 5, shift 3 | default | 8 | 0": {"frechet": 1.0},
    }
    found = regret.regrets(regret.distances(results))
    eight, ten = (regret.Place("emoji", 5.0, FROM_80, n) for n in (8, 10))
    assert found == {
        eight: {"default": 1.0, "DPM-Solver++ 2M": (4 + 12) / (4 + 6)},
        ten: {"default": (4 + 2) / 4, "UniPC": 1.0},
    }
    everywhere = regret.at(regret.NETWORKS, None, None)
    assert regret.summary(found, "default", everywhere) == (1.5, 1.25, ten, 2)
    assert regret.summary(found, "DDIM", everywhere) is None
    assert regret.summary(found, "default", regret.at(regret.NETWORKS, [FROM_80], (8,))) == (1.0, 1.0, eight, 1)


def test_every_sampler_has_the_limit_of_its_kind():
    assert {name: kind_of(name) for name in under_guidance(1.0)} == {
        "default": "sde_5", "told": "sde_5", "published, order 3": "sde_5", "default, ode": "ode", "told, ode": "ode",
        "DPM-Solver++ 2M": "ode", "SDE-DPM-Solver++ 2M": "sde", "UniPC": "ode", "DDIM": "ode", "Heun": "ode",
    }  # fmt: skip
    assert kind_of("limit, sde") == "sde" and kind_of("default, equal parts") == "sde_5" and kind_of("Euler") == "ode"


def test_shards_are_the_whole_and_keep_groups():
    chosen = [Cell(f"{g} | s | {n} | 0", dict, g, 1.0 + n) for n in range(3) for g in "abcde"]
    parts = [study.shard(chosen, i, 2) for i in range(2)]
    assert sorted(cell.key for part in parts for cell in part) == sorted(cell.key for cell in chosen)
    assert not {cell.group for cell in parts[0]} & {cell.group for cell in parts[1]}
    assert parts[0] == [cell for cell in chosen if cell in parts[0]]


def test_the_study_wants_what_was_kept():
    keys = [cell.key for cell in study.wanted([*study.EXACT, *study.ON_GPU], "cpu")]
    assert len(set(keys)) == len(keys) and set(study.kept()) <= set(keys)


def test_the_pages_show_what_was_kept():
    """Every table is in one of the pages, as results.json makes it."""
    made = page.tables(study.kept())
    texts = [(study.ROOT / "docs" / name).read_text() for name in page.PAGES]
    for name in made:
        assert sum(f"<!-- {name} -->" in text for text in texts) == 1, name
    for text in texts:
        assert page.with_tables(text, made) == text


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


def test_cells_of_calibrated_plans():
    """The keys are one of each; a plan with noise draws it once a step; the guided model is that of the study."""
    keys = [key for key, _ in calibrated.exact_cells()]
    assert len(set(keys)) == len(keys) and all(len(key.split(" | ")) == 4 for key in keys)
    plan, drawn = er_sde_plan([5.0, 2.0, 1.0, 0.0], noise_scaler="sde"), []
    denoise = lambda x, sigma: 0.5 * x  # noqa: E731
    noise = lambda i: drawn.append(i) or torch.zeros(2, 3)  # noqa: E731
    x = calibrated.run_of(plan)(denoise, torch.ones(2, 3), None, noise)
    assert drawn == [0, 1] and x.shape == (2, 3)
    x, classes = torch.randn(20, 64, dtype=torch.float64, generator=generator()), torch.arange(20) % 10
    told, untold = calibrated.guided_model(x, torch.tensor([0.7]), classes)
    torch.testing.assert_close(
        untold + 3 * (told - untold), Guided(digits_mixture(), 3.0).denoise(x, torch.tensor([0.7]).item())
    )


def test_results_apart_are_the_median_in_variances_of_the_many():
    many = torch.tensor([[0.0, 2.0], [4.0, 2.0], [2.0, 8.0]])
    few = many + torch.tensor([[1.0, 1.0], [0.0, 4.0], [0.0, 0.0]])
    assert elsewhere.apart(few, many) == {"median": pytest.approx(1 / ((8 / 3 + 8) / 2))}


def test_results_of_other_classes_are_of_classes_5_to_9():
    x = elsewhere.of_other_classes(1.0, limit_of("ode"), karras_sigmas(30))
    parts = calibrated.components()
    log_p = [torch.distributions.MultivariateNormal(of.mean, of.covariance).log_prob(x) for of in parts]
    assert torch.stack(log_p).argmax(0).tolist() == [5 + i % 5 for i in range(100)]


def test_a_plan_cut_is_analytic_where_it_reads_what_is_not_there():
    sigmas = karras_sigmas(6, 0.01, 20.0)
    whole, analytic = (er_sde_plan(s, order=o, noise_scaler="ode") for s, o in ((sigmas, 4), (sigmas[2:], 3)))
    whole = Plan.from_weights(whole.weights, sigmas)
    made = elsewhere.cut(whole, analytic, 2)
    assert torch.equal(made.sigmas, sigmas[2:]) and torch.equal(made.weights[3], whole.weights[5])
    assert torch.equal(made.weights[:3, :4], analytic.weights[:3, :-1]) and not made.weights[:3, 4:].any()
    single = Plan.from_weights(er_sde_plan(sigmas, order=1, noise_scaler="ode").weights, sigmas)
    first = er_sde_plan(sigmas[2:], order=1, noise_scaler="ode")
    assert torch.equal(elsewhere.cut(single, first, 2).weights, single.starting_at(2).weights)


def test_the_mixture_as_a_flow_predicts_what_the_mixture_does():
    of, problem = elsewhere.mixture_as_flow(), digits_mixture()
    clean, z = problem.sample(5, generator()), torch.randn(5, 64, dtype=torch.float64, generator=generator(1))
    torch.testing.assert_close(of.denoise(0.25 * clean + 0.75 * z, 0.75), problem.denoise(clean + 3 * z, 3.0))
    torch.testing.assert_close(of.denoise(z, 1.0), problem.mean.expand(5, -1), rtol=0, atol=1e-2)  # says nothing of the sample


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_uses_of_the_network_are_its_formula(scale):
    net, labels = network("digits"), torch.eye(10)[[3, 7]]
    x, sigma = 3 * torch.randn(2, 1, 36, 36, generator=generator()), torch.tensor([3.0])
    told, untold = net(x, 3.0, labels), net(x, 3.0)
    made = elsewhere.Use(scale, 36).denoise(x, sigma, labels)
    torch.testing.assert_close(made, untold + scale * (told - untold), rtol=1e-4, atol=1e-5)
    halved = elsewhere.Use(scale, 36, torch.bfloat16).denoise(x, sigma, labels)
    assert halved.dtype == torch.float32 and 1e-4 < (halved - made).abs().mean() < 0.1
    assert network("digits").stem.weight.dtype == torch.float32  # the one that others use


def test_tables_of_where_it_ends_are_full_where_all_is_measured():
    """Each asks for cells that the study has."""
    one = dict.fromkeys(("frechet", "median", *page_elsewhere.MIDDLE), 1.0)
    made = page_elsewhere.tables({cell.key: one for cell in study.wanted([*study.EXACT, *study.ON_GPU], "cpu")})
    flow = made.pop("calibration, flows")  # whose last row is the pilot's
    assert flow.count("| |") + flow.count("|  |") == 1
    for name, table in made.items():
        assert "1" in table and "|  |" not in table, name
