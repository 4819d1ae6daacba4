"""The order and node_scale that are chosen where neither is named."""

import math

import pytest
import torch

from ersde_fast import er_sde_plan, sample_er_sde
from ersde_fast.choice import UNTOLD, chosen
from ersde_fast.schedules import karras_sigmas

SCHEDULES = {
    "ve": [80.0, 36.0, 15.0, 5.4, 1.6, 1.01, 0.99, 0.4, 0.03, 0.0],
    "vp": [0.9999, 0.99, 0.9, 0.71, 0.7, 0.3, 0.05, 0.0],
    "flow": [1.0, 0.95, 0.8, 0.6, 0.500001, 0.5, 0.3, 0.1, 0.0],
}


@pytest.mark.parametrize("guidance", [0, 1, 1.99, 2, UNTOLD, 7.5])
@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("scaler", ["sde_5", "ode", lambda l: l**1.5], ids=["sde_5", "ode", "function"])
def test_each_step_is_that_of_its_own_order_and_node_scale(process, scaler, guidance):
    sigmas = SCHEDULES[process][process == "flow" and callable(scaler) :]  # a function has no limit at sigma 1
    plan = er_sde_plan(sigmas, process=process, noise_scaler=scaler, guidance=guidance)
    for i, (l_s, l_t) in enumerate(zip(plan.er_lambdas.tolist(), plan.er_lambdas.tolist()[1:], strict=False)):
        order, scale = (2, 4 * guidance * l_s / l_t if l_t else math.inf) if guidance >= 2 and l_s > 1 else (3, 10.0)
        named = er_sde_plan(sigmas, process=process, noise_scaler=scaler, order=order, method="newton", node_scale=scale)
        expected = torch.zeros(5, dtype=torch.float64)
        expected[: 1 + order], expected[-1] = named.weights[i, :-1], named.weights[i, -1]
        torch.testing.assert_close(plan.weights[i], expected, rtol=1e-13, atol=1e-15)
        assert len(plan.rows[i].w_d) <= order


def test_what_is_not_guided_is_order_3_everywhere_and_what_is_not_told_is_safe():
    sigmas = SCHEDULES["ve"]
    assert er_sde_plan(sigmas, guidance=1).weights.equal(er_sde_plan(sigmas, order=3).weights)
    assert er_sde_plan(sigmas).weights.equal(er_sde_plan(sigmas, guidance=UNTOLD).weights)
    assert er_sde_plan(sigmas).guidance == UNTOLD and er_sde_plan(sigmas, order=3).guidance is None


def test_the_remaining_steps_and_the_samples_keep_the_choice():
    sigmas = SCHEDULES["ve"]
    assert er_sde_plan(sigmas, guidance=5).starting_at(2).weights.equal(er_sde_plan(sigmas[2:], guidance=5).weights)
    x, model = 80 * torch.randn(4, 3, dtype=torch.float64), lambda x, sigma: x / (1 + sigma[0] ** 2)
    told = sample_er_sde(model, x, torch.tensor(sigmas), disable=True, seed=0, guidance=5.0)
    assert not told.equal(sample_er_sde(model, x, torch.tensor(sigmas), disable=True, seed=0))


def guided_between_two(guidance):
    """The denoiser of data at -1 and 1 (standard deviation 0.2), guided towards 1, exactly."""
    means, variance = torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.04

    def model(x, sigma):
        noise = sigma[0] ** 2
        each = (noise * means + variance * x) / (variance + noise)
        unconditional = (torch.softmax(-((x - means) ** 2) / (2 * (variance + noise)), 1) * each).sum(1)
        return (unconditional + guidance * (each[:, 1] - unconditional))[:, None]

    return model


@pytest.mark.parametrize("num_steps", [8, 10])
@pytest.mark.parametrize("guidance", [7.5, 15.0])
def test_strong_guidance_does_not_turn_few_steps_to_garbage(guidance, num_steps):
    """The limit is 1.4 to 1.6 with a standard deviation of 0.13; order 3 throughout scatters 2 to 9 away from it."""
    x = 80 * torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def sample(steps, **options):
        return sample_er_sde(guided_between_two(guidance), x, karras_sigmas(steps), disable=True, seed=0, **options)

    limit = sample(100)
    for told in (None, guidance):
        result = sample(num_steps, guidance=told)
        assert (result.mean() - limit.mean()).abs() < 0.4 and result.std() < 1.5 * limit.std()
    assert sample(num_steps, max_stage=3).std() > 10 * limit.std()


@pytest.mark.parametrize("given", [dict(order=3), dict(method="newton"), dict(node_scale=5.0), dict(integration_points=100)])
def test_guidance_beside_what_it_chooses_is_refused(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"guidance chooses order and node_scale, so it cannot be told with {name}="):
        er_sde_plan(SCHEDULES["ve"], guidance=5.0, **given)


@pytest.mark.parametrize("guidance", [-1.0, math.nan, math.inf, "5", torch.ones(2)])
def test_guidance_is_a_number(guidance):
    with pytest.raises(ValueError, match="guidance must be a finite number of at least 0"):
        er_sde_plan(SCHEDULES["ve"], guidance=guidance)


def test_the_choice_follows_the_steps_length():
    orders, scales = chosen(torch.tensor([8.0, 8.0, 0.5]), torch.tensor([4.0, 1.0, 0.1]), 5.0)
    assert orders.tolist() == [2, 2, 3] and scales.tolist() == [40.0, 160.0, 10.0]
