"""The sampling loop: k-diffusion's conventions, and samples of a distribution that is known."""

import math

import pytest
import torch

from ersde_fast import er_sde_plan, fast_step, portable_noise, sample_er_sde
from ersde_fast.sample import Source, sample_plan

SIGMAS = torch.tensor([10.0, 5.0, 2.0, 0.8, 0.2, 0.0])
MEAN, STD = 0.3, 0.5


def gaussian_model(x, sigma):
    """The exact denoiser of N(0.3, 0.5^2)."""
    v = sigma.view(-1, *[1] * (x.dim() - 1)) ** 2
    return (v * MEAN + STD**2 * x) / (v + STD**2)


def start(shape=(2, 4, 8, 8)):
    return 10 * torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_it_is_the_loop_of_steps():
    x = start()
    result = sample_er_sde(gaussian_model, x, SIGMAS, disable=True, seed=5, max_stage=2)
    plan, history, y = er_sde_plan(SIGMAS, order=2), [], x
    for i in range(plan.num_steps):
        history = [gaussian_model(y, SIGMAS[i] * torch.ones(2)), *history[:1]]
        y = fast_step(plan, i, y, history, seed=5)
    assert torch.equal(result, y)


def test_k_diffusion_conventions():
    """model(x, sigma [batch], **extra_args); the callback's dict; noise drawn after the model and never on the last step."""
    log = []

    def model(x, sigma, scale):
        log.append(("model", sigma))
        assert sigma.shape == (2,) and scale == 7
        return gaussian_model(x, sigma)

    def noise_sampler(sigma, sigma_next):
        log.append(("noise", sigma.item(), sigma_next.item()))
        return torch.zeros(2, 4, 8, 8)

    seen = []
    x = start()
    sample_er_sde(model, x, SIGMAS, {"scale": 7}, seen.append, True, 1.0, noise_sampler)
    assert [entry[0] for entry in log] == ["model", "noise"] * 4 + ["model"]
    assert [entry[1:] for entry in log if entry[0] == "noise"] == list(
        zip(SIGMAS[:4].tolist(), SIGMAS[1:5].tolist(), strict=True)
    )
    assert [sigma.tolist() for _, sigma in log[::2]] == [[s, s] for s in SIGMAS[:5].tolist()]
    assert [set(d) for d in seen] == [{"x", "i", "sigma", "sigma_hat", "denoised"}] * 5
    assert [d["i"] for d in seen] == list(range(5)) and [float(d["sigma"]) for d in seen] == SIGMAS[:5].tolist()
    assert torch.equal(seen[0]["x"], x)


@pytest.mark.parametrize("scaler, eta", [("ode", 1), ("sde_5", 1), ("sde_5", 0.4), ("sde_5", 2), (lambda l: l**1.5, 1)])
@pytest.mark.parametrize("process", ["ve", "vp", "flow"])
def test_samples_have_the_moments_of_the_data(scaler, eta, process):
    """Enough steps of the exact denoiser end in the data's distribution."""
    torch.manual_seed(0)
    n = 40_000
    sigmas = torch.logspace(math.log10(20), math.log10(0.02), 201) if process == "ve" else torch.linspace(0.998, 0.002, 201)
    sigmas = torch.cat([sigmas, torch.zeros(1)]).double()

    def model(x, sigma):
        sigma = sigma.view(-1, 1)
        alpha = {"ve": torch.ones_like(sigma), "vp": torch.sqrt(1 - sigma**2), "flow": 1 - sigma}[process]
        return (sigma**2 * MEAN + STD**2 * alpha * x) / (alpha**2 * STD**2 + sigma**2)

    x = torch.randn(n, 1, dtype=torch.float64)
    x = (20 if process == "ve" else 1) * x
    result = sample_er_sde(model, x, sigmas, disable=True, process=process, noise_scaler=scaler, eta=eta, seed=11)
    # Five standard errors, and what the schedule's ends leave of the start.
    assert abs(result.mean().item() - MEAN) < 5 * STD / math.sqrt(n) + 5e-3
    assert abs(result.std().item() - STD) < 5 * STD / math.sqrt(2 * n) + 5e-3


def test_each_source_of_noise():
    x = start()
    torch.manual_seed(3)
    default = sample_er_sde(gaussian_model, x, SIGMAS, disable=True)
    g = torch.Generator().manual_seed(3)
    assert torch.equal(default, sample_er_sde(gaussian_model, x, SIGMAS, disable=True, generator=g))
    g = torch.Generator().manual_seed(3)
    sampler = lambda sigma, sigma_next: torch.randn(x.shape, generator=g)  # noqa: E731
    assert torch.equal(default, sample_er_sde(gaussian_model, x, SIGMAS, disable=True, noise_sampler=sampler))
    seeded = sample_er_sde(gaussian_model, x, SIGMAS, disable=True, seed=[8, 9])
    alone = sample_er_sde(gaussian_model, x[1:], SIGMAS, disable=True, seed=[9])
    assert torch.equal(seeded[1:], alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """The model sees sigma in at least float32, and the sample keeps its dtype."""

    def model(x, sigma):
        assert sigma.dtype == torch.promote_types(dtype, torch.float32)
        return gaussian_model(x, sigma).to(dtype)

    assert sample_er_sde(model, start().to(dtype), SIGMAS, disable=True).dtype == dtype


def test_options_reach_the_plan():
    x = start()
    draw = dict(disable=True, seed=1)
    default = sample_er_sde(gaussian_model, x, SIGMAS, **draw)
    for options in (
        dict(method="newton"),
        dict(method="taylor"),
        dict(node_scale=4.0),
        dict(integration_points=3),
        dict(max_stage=1),
        dict(eta=0.5),
    ):
        assert not torch.equal(default, sample_er_sde(gaussian_model, x, SIGMAS, **draw, **options))
    assert torch.equal(
        sample_er_sde(gaussian_model, x, SIGMAS, disable=True, s_noise=0.0),
        sample_er_sde(gaussian_model, x, SIGMAS, s_noise=0.0, **draw),
    )
    assert torch.equal(
        sample_er_sde(gaussian_model, x, SIGMAS, disable=True, noise_scaler="ode"),
        sample_er_sde(gaussian_model, x, SIGMAS, eta=0, **draw),
    )


def test_a_window_of_noise():
    """eta by the step: outside the window nothing is drawn, and the run is that of the plan."""
    x, eta, drawn = start(), torch.tensor([0, 1, 0.5, 0, 0]), []

    def sampler(sigma, sigma_next):
        drawn.append(sigma.item())
        return torch.ones_like(x)

    result = sample_er_sde(gaussian_model, x, SIGMAS, disable=True, eta=eta, noise_sampler=sampler)
    assert drawn == SIGMAS[1:3].tolist()
    plan = er_sde_plan(SIGMAS, eta=[0, 1, 0.5, 0, 0])
    assert torch.equal(result, sample_plan(plan, gaussian_model, x, disable=True, source=Source(lambda *_: torch.ones_like(x))))


def test_cfg_pp_of_a_model_that_returns_both():
    """The loop of steps by CFG++; the callback is told the guided prediction."""
    x, seen = start(), []
    pair = lambda x, sigma: (gaussian_model(x, sigma), 0.5 * gaussian_model(x, sigma))  # noqa: E731
    result = sample_er_sde(pair, x, SIGMAS, callback=seen.append, disable=True, seed=5, cfg_pp=0.6)
    plan, history, y = er_sde_plan(SIGMAS), [], x
    for i in range(plan.num_steps):
        output, unconditional = pair(y, SIGMAS[i] * torch.ones(2))
        step = {"prediction_type": "sample", "guidance": (unconditional, 0.6), "cfg_pp": True}
        before, (y, denoised) = y, fast_step(plan, i, y, [output, *history], seed=5, **step)
        history = [denoised, *history[: plan.order - 2]]
        assert torch.equal(seen[i]["denoised"], denoised) and torch.equal(seen[i]["x"], before)
    assert torch.equal(result, y)
    with pytest.raises(TypeError, match="model must return a pair for cfg_pp, with the condition and without it, got Tensor"):
        sample_er_sde(gaussian_model, x, SIGMAS, disable=True, seed=5, cfg_pp=0.6)


def test_a_models_output_in_the_loop():
    """The noise in the place of the denoised sample, and the raw output of EDM's networks."""
    x = start().double()
    expected = sample_er_sde(gaussian_model, x, SIGMAS.double(), disable=True, seed=5)
    level = lambda sigma: sigma.view(-1, 1, 1, 1)  # noqa: E731
    noise = lambda x, sigma: (x - gaussian_model(x, sigma)) / level(sigma)  # noqa: E731
    raw = lambda x, s: (gaussian_model(x, s) - x / (1 + level(s) ** 2)) * (1 + level(s) ** 2).sqrt() / level(s)  # noqa: E731
    for model, options in ((noise, {"prediction_type": "epsilon"}), (raw, {"prediction_type": "edm", "sigma_data": 1.0})):
        got = sample_er_sde(model, x, SIGMAS.double(), disable=True, seed=5, **options)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_two_sources_are_refused():
    with pytest.raises(ValueError, match="noise_sampler and seed were given"):
        sample_er_sde(gaussian_model, start(), SIGMAS, noise_sampler=lambda a, b: None, seed=1)


def test_initial_latents_of_the_portable_stream():
    """Step -1 is the start: a run is then a function of the seed alone, sample by sample."""
    x = 10 * portable_noise((3, 4), [4, 5, 6], step=-1)
    assert torch.equal(x[1], 10 * portable_noise((1, 4), 5, step=-1)[0])


def test_guidance_beside_an_order_names_the_argument_that_was_given():
    with pytest.raises(ValueError, match="guidance chooses the order, so it cannot be told with max_stage=2"):
        sample_er_sde(None, torch.ones(1, 2), torch.tensor([2.0, 1.0]), max_stage=2, guidance=5.0)


@pytest.mark.parametrize("source", [{"seed": 3}, {"noise_sampler": lambda *_: torch.ones(2, 4)}])
def test_a_plan_in_the_place_of_sigmas(source):
    options = {"noise_scaler": "sde", "eta": 0.5, "guidance": 3.0}
    x = start((2, 4))
    expected = sample_er_sde(gaussian_model, x, SIGMAS, disable=True, **options, **source)
    plan = er_sde_plan(SIGMAS, **options)
    assert torch.equal(sample_er_sde(gaussian_model, x, plan=plan, disable=True, **source), expected)


BESIDE = {
    "sigmas": [1.0, 0.0], "noise_scaler": "ode", "max_stage": 2, "method": "taylor", "node_scale": 3.0, "integration_points": 200,
    "guidance": 2.0, "sigma_data": 0.5, "s_noise": 0.9, "process": "flow", "eta": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_a_plan_says_all_that_makes_one(name):
    with pytest.raises(ValueError, match=f"plan says all that {name} would: leave out {name}="):
        sample_er_sde(lambda x, sigma: x, torch.ones(2, 4), plan=er_sde_plan([2.0, 1.0, 0.0]), **{name: BESIDE[name]})


def test_a_plan_or_sigmas():
    with pytest.raises(TypeError, match="sigmas must be given, or a plan"):
        sample_er_sde(lambda x, sigma: x, torch.ones(2, 4))
    with pytest.raises(TypeError, match="plan must be one of er_sde_plan"):
        sample_er_sde(lambda x, sigma: x, torch.ones(2, 4), plan="plan.safetensors")


def test_extra_args_have_names():
    with pytest.raises(TypeError, match="extra_args must be a dict of further arguments of model, or None, got list"):
        sample_er_sde(lambda x, sigma: x, torch.zeros(1, 2), [2.0, 1.0, 0.0], [1])


@pytest.mark.parametrize("inference", [False, True])
def test_a_model_that_writes_into_the_sample_is_refused(inference):
    """Where torch counts writes; the sample that was given is the caller's, and the model has written to it."""

    def in_place(x, sigma):
        return x.mul_(0.5)

    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="model must not write into x, which the step reads: write x = x"):
        sample_er_sde(in_place, x, [2.0, 1.0, 0.0], disable=True)
    with torch.inference_mode(inference):
        sample_er_sde(lambda x, sigma: x * 0.5, x + 1, [2.0, 1.0, 0.0], disable=True)
