"""Plans by csrc/er_sde_plan.h: the table of the general code in plan.py, on the CPU and, marked gpu, where the sigmas lie."""

import math
from dataclasses import replace

import pytest
import torch

import ersde_fast
from ersde_fast import er_sde_plan
from ersde_fast.backends import CPU
from ersde_fast.noise_scaler import NOISE_SCALERS, get_noise_scaler
from ersde_fast.plan import _build_by_kernel, _build_by_torch
from ersde_fast.predictions import PREDICTION_TYPES
from ersde_fast.table import COUNTER, W_NOISE
from ersde_fast.weights import PlanOptions

SCHEDULES = {
    "long": ("ve", torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 200, dtype=torch.float64) ** 7),
    "flow": ("flow", torch.linspace(1, 0, 21, dtype=torch.float64)),
    "vp": ("vp", torch.linspace(0.999, 0.01, 21)),
    "wide": ("ve", torch.logspace(6, -3, 30, dtype=torch.float64)),
    "repeated": ("ve", torch.tensor([9, 9, 8, 7, 7, 7, 5, 4, 0, 0], dtype=torch.float64)),
    "rounded": ("flow", torch.tensor([1.0000001, 0.99999994, 0.9, 0.90000004, 0.9, 0.5, 0.3, 0.29999998, -1e-7])),
}
RULES = [("taylor", n, {}) for n in (1, 2, 3)] + [("taylor", 3, dict(integration_points=200))]
RULES += [("newton", n, dict(node_scale=scale)) for n in (2, 3, 4, 5) for scale in (math.inf, 5.0)]
CHOSEN = [("newton", 3, dict(node_scale=None, guidance=guidance)) for guidance in (0.0, 1.0, 2.0, 7.5)]


def options_of(orders, process, scaler, method="taylor", node_scale=math.inf, integration_points=None, s_noise=1.0, eta=1.0):
    return PlanOptions(
        process=process,
        orders=orders,
        noise_scaler=get_noise_scaler(scaler),
        method=method,
        node_scale=node_scale,
        integration_points=integration_points,
        s_noise=s_noise,
        eta=eta,
        guidance=None,
        sigma_data=0.6,
    )


def both(
    sigmas, process, order, scaler="sde_5", method="taylor", node_scale=math.inf, integration_points=None, alphas=None, eta=1.0,
    guidance=None,
):  # fmt: skip
    """The plan by the kernel, where sigmas lie, and by the general code on the host."""
    orders = order if isinstance(order, tuple) else (order,) * (len(sigmas) - 1)
    options = options_of(orders, process, scaler, method, node_scale, integration_points, s_noise=0.7, eta=eta)
    options = replace(options, guidance=guidance, first_step=3)
    host = _build_by_torch(sigmas.cpu().double(), None if alphas is None else alphas.cpu().double(), options)
    return _build_by_kernel(sigmas, alphas, options), host


def assert_same_plan(plan, host):
    for name in ("sigmas", "alphas", "er_lambdas"):
        torch.testing.assert_close(getattr(plan, name).cpu(), getattr(host, name), rtol=1e-15, atol=0)
    error = (plan.weights.cpu() - host.weights).abs()
    size = host.weights.abs().amax(1, keepdim=True)
    assert (error <= 1e-13 * size).all()
    for name in PREDICTION_TYPES.keys() - {"edm"}:  # which needs the sigma_data of a plan that is told it
        fixed, expected = (of.predicting(name).table.cpu()[:, :W_NOISE] for of in (plan, host))
        torch.testing.assert_close(fixed, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scaler", [*NOISE_SCALERS, "reverse_time_sde(0.25)"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_kernels_table_is_the_hosts(schedule, scaler):
    process, sigmas = SCHEDULES[schedule]
    for method, order, options in RULES + CHOSEN:
        if scaler == "sde_4" and (sigmas[0] > 1022 or process == "flow"):
            continue
        by_step = tuple(k % 4 / 2 for k in range(len(sigmas) - 1))
        for eta in (0.0, 1.0, by_step):
            assert_same_plan(*both(sigmas, process, order, scaler, method, eta=eta, **options))


def test_the_kernel_takes_alphas_and_an_order_for_each_step():
    sigmas, alphas = torch.tensor([0.9, 0.8, 0.5, 0.3, 0.1]), torch.tensor([0.1, 0.3, 0.5, 0.8, 0.9])
    assert_same_plan(*both(sigmas, None, (1, 1, 3, 2), alphas=alphas))
    assert_same_plan(*both(sigmas, "flow", (2, 1, 5, 4), method="newton", node_scale=2.0))


@pytest.mark.parametrize(
    "scaler, eta",
    [
        ("sde_5", 0.0),
        ("sde_5", 0.3),
        ("ode", 1.0),
        ("reverse_time_sde(0.5)", 2.0),
        ("sde_5", (0.0, 0.0)),
        ("sde_5", (0.0, 1.0)),
    ],
)
@pytest.mark.parametrize("s_noise", [0.0, 1.0])
def test_whether_a_plan_on_a_device_draws_is_known_without_looking(monkeypatch, scaler, eta, s_noise):
    options = options_of((1, 1), "ve", scaler, s_noise=s_noise, eta=eta)
    host = _build_by_torch(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), None, options)
    monkeypatch.setattr(ersde_fast.plan, "CPU", torch.device("meta"))  # any other than that of sigmas
    assert _build_by_kernel(host.sigmas, None, options).draws == host.draws


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("process", dict(process="edm")),
        (r"noise_scaler\.form", dict(noise_scaler=replace(NOISE_SCALERS["sde_5"], form="sde_6"))),
        ("method", dict(method="euler")),
        ("order", dict(orders=(6, 6))),
    ],
)
def test_a_name_that_the_kernel_does_not_know_is_refused(name, wrong):
    options = replace(options_of((1, 1), "ve", "sde_5"), **wrong)
    with pytest.raises(ValueError, match=f"{name} must be "):
        CPU.plan(torch.ones(3), None, options)


@pytest.mark.parametrize(
    "sigmas, process, scaler, rows, message",
    [
        ([4, 5, 3, 2], "ve", "sde_5", [0], "sigmas must not rise"),
        ([4, 3, math.nan, 2], "ve", "sde_5", [1, 2], "sigmas must be finite"),
        ([-1, -2, -3], "ve", "ode", [0, 1], "sigmas must be finite and at least 0"),
        ([1.5, 0.9, 0.5, 0.2], "vp", "sde_5", [0], "sigmas must be at most 1"),
        ([1.5, 0.9, 0.5, 0.2], "flow", "sde_5", [0], "sigmas must be at most 1"),
        ([1 + 5e-16, 1 + 2e-15, 0.5, 0.2], "flow", "sde_5", [0, 1], r"got sigmas\[1\] = 1.000000000000002"),
        ([0.8, 0.80000001, 0.5, 0.2], "flow", "sde_5", [0], "at index 0 to 4.00000025.* at index 1"),
        ([0.8, 0.5, -1e-12], "flow", "sde_5", [1], r"got sigmas\[2\] = -1e-12"),
        ([1e4, 5e3, 100], "ve", "sde_4", [0], "sde_4 is inadmissible at step 0"),
        ([1, 0.5, 0.1], "flow", "sde_4", [0], "no limit at er_lambda = inf"),
    ],
)  # fmt: skip
def test_what_the_host_refuses_is_nan_and_check_says_why(sigmas, process, scaler, rows, message):
    sigmas, n = torch.tensor(sigmas, dtype=torch.float64), len(sigmas) - 1
    plan = _build_by_kernel(sigmas, None, options_of((1,) * n, process, scaler))
    assert plan.weights.isnan().all(1).nonzero().flatten().tolist() == rows
    assert not plan.table[:, COUNTER].isnan().any()
    with pytest.raises(ValueError, match=message):
        plan.check()


@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf])
def test_an_eta_that_only_the_device_knows_is_nan_where_it_is_none(wrong):
    eta = torch.tensor([0.0, wrong, 0.7], dtype=torch.float64)
    plan = _build_by_kernel(torch.tensor([4.0, 3.0, 2.0, 1.0]), None, replace(options_of((2, 2, 2), "ve", "sde_5"), eta=eta))
    assert plan.weights.isnan().all(1).tolist() == [False, True, False]
    assert torch.equal(plan.starting_at(2).eta, eta[2:])
    with pytest.raises(ValueError, match=rf"eta\[1\] must be a finite number of at least 0, got {wrong}"):
        plan.check()


def test_check_is_silent_about_a_plan_that_fits():
    er_sde_plan([5, 4, 3, 0], order=[1, 2, 3], noise_scaler=lambda l: l**1.5).check()
    er_sde_plan([0.9, 0.5], [0.1, 0.5], method="newton", node_scale=3.0).check()
    er_sde_plan([5, 4, 3, 0], guidance=5.0).check()


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_plan_is_built_where_its_sigmas_lie(schedule):
    process, sigmas = SCHEDULES[schedule]
    on_device = sigmas.cuda()
    for method, order, options in [*RULES, ("newton", 3, dict(eta=0.3)), ("newton", 3, dict(eta=0.0))]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan = er_sde_plan(on_device, process=process, order=order, method=method, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert plan.table.is_cuda and plan.sigmas.is_cuda
        host = er_sde_plan(sigmas, process=process, order=order, method=method, **options)
        assert_same_plan(plan, host)
        assert plan.draws == host.draws
    etas = [k % 4 / 2 for k in range(len(sigmas) - 1)]
    host = er_sde_plan(sigmas, process=process, eta=etas)
    for eta in (etas, torch.tensor(etas).cuda()):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan = er_sde_plan(on_device, process=process, eta=eta)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_plan(plan, host)
        assert plan.draws
    with pytest.raises(ValueError, match="eta must be on the CPU or where sigmas are, cpu"):
        er_sde_plan(sigmas, process=process, eta=torch.tensor(etas).cuda())
    for guidance in (None, 1.0, 7.5):
        assert_same_plan(
            er_sde_plan(on_device, process=process, guidance=guidance), er_sde_plan(sigmas, process=process, guidance=guidance)
        )
    with pytest.raises(ValueError, match="sigmas must not rise"):
        er_sde_plan(on_device.flip(0), process=process).check()
