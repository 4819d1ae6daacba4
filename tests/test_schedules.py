"""Levels by rule, and levels placed by the local error: their ends, what they gain where the error is known, what is refused."""

import math

import numpy as np
import pytest
import torch

from ersde_fast import er_sde_plan, place_sigmas
from ersde_fast.schedules import exponential_sigmas, flow_sigmas, karras_sigmas, uniform_log_snr_sigmas
from problems import gaussian_frechet
from samplers import ours

STD = 0.5


def model(x, sigma):
    """The exact denoiser of data N(0, STD^2)."""
    return x * (STD**2 / (STD**2 + sigma.view(-1, *[1] * (x.dim() - 1)) ** 2))


def start(sigma=80.0, dtype=torch.float64):
    return sigma * torch.randn(20, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_steps", [2, 5, 20])
@pytest.mark.parametrize("of", [lambda s: s, lambda s: s.float(), lambda s: s.tolist(), lambda s: s.numpy()])
def test_ends_are_the_pilots(num_steps, of):
    pilot = karras_sigmas(40)
    placed = place_sigmas(model, start(), of(pilot), num_steps)
    assert placed.dtype == torch.float64 and len(placed) == num_steps + 1
    assert placed[0] == of(pilot)[0] and placed[-2] == of(pilot)[-2] and placed[-1] == 0
    assert (placed.diff() < 0).all()


def test_a_pilot_that_does_not_end_at_zero():
    placed = place_sigmas(model, start(), karras_sigmas(40)[:-1], 8)
    assert len(placed) == 9 and placed[-1] == karras_sigmas(40)[-2] and (placed.diff() < 0).all()


def test_levels_that_all_but_touch():
    """The last two of this pilot are an ulp apart; the levels between the ends never rise above them or fall below."""
    placed = place_sigmas(model, start(1.0), [1.0, 0.1, 0.01, 1e-4, 9.999999999999999e-05], 2)
    assert (placed.diff() <= 0).all() and placed[-1] == 9.999999999999999e-05


@pytest.mark.parametrize("num_steps", [5, 6, 8, 10])
def test_the_error_is_smaller_than_on_the_pilots_spacing(num_steps):
    values = torch.tensor([STD**2], dtype=torch.float64)
    placed = place_sigmas(model, start(), karras_sigmas(50), num_steps)
    assert gaussian_frechet(ours(), placed, values) < 0.5 * gaussian_frechet(ours(), karras_sigmas(num_steps), values)


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_every_process_of_one_model_has_the_same_levels(process):
    """In er_lambda; the interpolation between the pilot's levels is in another variable: a fiftieth at 200 of them."""
    levels = karras_sigmas(200, 0.01, 40.0)
    expected = place_sigmas(model, start(40.0), levels, 8)
    alphas = torch.rsqrt(1 + levels**2) if process == "vp" else 1 / (1 + levels)

    def scaled(x, sigma):
        alpha = (1 - sigma**2).sqrt() if process == "vp" else 1 - sigma
        return model(x / alpha[:, None], sigma / alpha)

    sigmas = place_sigmas(scaled, start(40.0) * alphas[0], levels * alphas, 8, process=process)
    alphas = (1 - sigmas**2).sqrt() if process == "vp" else 1 - sigmas
    torch.testing.assert_close(sigmas / alphas, expected, rtol=0.02, atol=1e-12)


def test_more_arguments_reach_the_model_and_half_precision_places_alike():
    seen = []

    def conditional(x, sigma, scale):
        seen.append((scale, sigma.dtype, sigma.shape))
        return model(x, sigma).to(x.dtype) * scale

    exact = place_sigmas(model, start(), karras_sigmas(30), 8)
    placed = place_sigmas(conditional, start(dtype=torch.float32), karras_sigmas(30), 8, {"scale": 1.0})
    assert set(seen) == {(1.0, torch.float32, torch.Size([20]))}
    torch.testing.assert_close(placed, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("disable", [False, True])
def test_a_bar_shows_the_pilots_progress(disable, capsys):
    place_sigmas(model, start(), karras_sigmas(30), np.int64(8), disable=disable)
    assert ("29/29" in capsys.readouterr().err) != disable


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_steps=1), "num_steps must be a whole number of at least 2, got 1"),
        (dict(num_steps=2.5), "num_steps must be a whole number of at least 2, got 2.5"),
        (dict(sigmas=[3.0, 2.0, 1.0, 0.0]), "at least 4 levels above 0, for a history of order 3, got 3"),
        (dict(sigmas=[5.0, 4.0, 4.0, 3.0, 2.0, 0.0]), "sigmas must fall at every step of the pilot"),
        (dict(sigmas=np.array([1.0, 2.0, 3.0, 4.0, 5.0])), "sigmas must not rise"),
        (dict(model=lambda x, sigma: x * float("nan")), "model must return finite predictions"),
        (dict(model=lambda x, sigma: torch.zeros_like(x)), "model must depend on sigma or x"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(model=model, x=start(), sigmas=karras_sigmas(30), num_steps=8) | change
    with pytest.raises(ValueError, match=message):
        place_sigmas(**arguments)


def test_levels_by_rule_are_even_in_what_they_are_named_after():
    for sigmas, scaled in [
        (karras_sigmas(9, 0.01, 50.0, rho=5.0), lambda s: s**0.2),
        (exponential_sigmas(9, 0.01, 50.0), torch.log),
        (uniform_log_snr_sigmas(9, 0.01, 50.0), torch.log),
    ]:
        assert len(sigmas) == 10 and sigmas.dtype == torch.float64 and sigmas[-1] == 0
        torch.testing.assert_close(sigmas[[0, -2]], sigmas.new_tensor([50, 0.01]), rtol=1e-14, atol=0)
        steps = scaled(sigmas[:-1]).diff()
        torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_even_log_snr_of_every_process(process):
    sigmas = uniform_log_snr_sigmas(9, 0.01, 0.99, process=process)
    steps = er_sde_plan(sigmas, process=process).er_lambdas[:-1].log().diff()
    torch.testing.assert_close(sigmas[[0, -2, -1]], sigmas.new_tensor([0.99, 0.01, 0]), rtol=1e-14, atol=0)
    torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-12, atol=0)


def test_flow_levels_are_even_and_then_shifted():
    assert flow_sigmas(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert flow_sigmas(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-15)
    assert flow_sigmas(1).tolist() == [1, 0]


@pytest.mark.parametrize("rule", [karras_sigmas, exponential_sigmas, uniform_log_snr_sigmas, flow_sigmas])
def test_a_rule_needs_a_step(rule):
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        rule(0)


def test_bad_levels_by_rule():
    with pytest.raises(ValueError, match="shift must be a finite number above 0, got 0"):
        flow_sigmas(4, 0)
    with pytest.raises(ValueError, match="process must be"):
        uniform_log_snr_sigmas(4, process="edm")
    with pytest.raises(ValueError, match="sigma_min and sigma_max must be above 0, and below 1"):
        uniform_log_snr_sigmas(4, 0.1, 1.0, process="flow")


@pytest.mark.parametrize("rule", [karras_sigmas, exponential_sigmas])
@pytest.mark.parametrize("ends", [(80.0, 0.002), (0.0, 80.0), (-1.0, 80.0), (0.002, math.inf), (math.nan, 80.0), ("1", 80.0)])
def test_ends_in_another_order_or_out_of_range(rule, ends):
    with pytest.raises(ValueError, match="sigma_min and sigma_max must be finite, above 0 and in this order"):
        rule(5, *ends)


@pytest.mark.parametrize("num_steps", [5.5, True, "5"])
@pytest.mark.parametrize("rule", [karras_sigmas, exponential_sigmas, uniform_log_snr_sigmas, flow_sigmas])
def test_a_count_is_a_whole_number(rule, num_steps):
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        rule(num_steps)


@pytest.mark.parametrize("rho", [0, -1.0, math.nan, math.inf, "7"])
def test_rho_is_a_number_above_0(rho):
    with pytest.raises(ValueError, match="rho must be a finite number above 0"):
        karras_sigmas(5, rho=rho)
