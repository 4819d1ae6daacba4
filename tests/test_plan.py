"""The weight table: against 40-digit arithmetic, its invariants, its edges, its convergence, and bad input."""

import functools
import math
import pickle

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ersde_fast
from ersde_fast import er_sde_plan, reverse_time_sde, stack_plans
from ersde_fast.backends import CPU
from ersde_fast.predictions import PREDICTION_TYPES
from ersde_fast.table import COUNTER, W_D, W_NOISE, W_X


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def builder(request, monkeypatch):
    """Every test holds for both: the code that the kernel shares, and the one for any noise scaler."""
    if request.param == "torch":
        monkeypatch.setattr(CPU, "kernels", None)
        monkeypatch.setattr(CPU, "why_no_kernels", "no compiler was found")


# phi as the paper's appendix A.8 prints it, for any arithmetic.
PHI = {
    "ode": lambda l: l,
    "sde": lambda l: l**2,
    "sde_1": lambda l: l * (mp.exp(-1 / l) + 10),
    "sde_2": lambda l: l ** mp.mpf("1.5"),
    "sde_3": lambda l: l ** mp.mpf("2.5"),
    "sde_4": lambda l: l ** mp.mpf("0.9") * mp.log10(1 + 100 * l ** mp.mpf("1.5")),
    "sde_5": lambda l: l * (mp.exp(l ** mp.mpf("0.3")) + 10),
    "reverse_time_sde(0.25)": lambda l: l ** mp.mpf("1.25"),
}


@functools.cache
def gauss_legendre(n, digits):
    """Nodes and weights on [-1, 1]: Newton's iteration on the Legendre polynomial."""
    rule = []
    for x in np.polynomial.legendre.leggauss(n)[0]:
        x = mp.mpf(x)
        for _ in range(4):
            x -= mp.legendre(n, x) / (n * (mp.legendre(n - 1, x) - x * mp.legendre(n, x)) / (1 - x**2))
        slope = n * (mp.legendre(n - 1, x) - x * mp.legendre(n, x)) / (1 - x**2)
        rule.append((x, 2 / ((1 - x**2) * slope**2)))
    return rule


class ExactStep:
    """One step at 40 digits, straight from the formulas; alpha = 1."""

    def __init__(self, l_s, l_t, phi):
        self.l_s, self.l_t, self.r = mp.mpf(l_s), mp.mpf(l_t), phi(mp.mpf(l_t)) / phi(mp.mpf(l_s))
        rho = self.r * self.l_s / self.l_t
        self.variance = 1 - rho**2
        top = mp.log(self.l_s / self.l_t)
        panels = max(1, math.ceil(2 * top))
        self.measure = []  # (l, (1 - phi_t / phi(l)) dl)
        for k in range(panels):
            for x, w in gauss_legendre(20, mp.mp.dps):
                l = self.l_t * mp.exp(top * (k + (1 + x) / 2) / panels)
                self.measure.append((l, (1 - phi(self.l_t) / phi(l)) * l * w * top / panels / 2))

    def integral(self, f):
        return mp.fsum(w * f(l) for l, w in self.measure)

    def taylor(self, nodes):
        c = [-self.integral(lambda l, k=k: (l - self.l_s) ** (k - 1) / mp.factorial(k - 1)) for k in (1, 2)]
        w_d = [1 - self.r] + [mp.mpf(0)] * (len(nodes) - 1)
        if len(nodes) > 1:
            g_1 = nodes[0] - nodes[1]
            w_d[0] += c[0] / g_1
            w_d[1] -= c[0] / g_1
        if len(nodes) > 2:
            g_2 = nodes[1] - nodes[2]
            e = 2 * c[1] / (g_1 + g_2)
            w_d[0] += e / g_1
            w_d[1] -= e * (1 / g_1 + 1 / g_2)
            w_d[2] += e / g_2
        return w_d

    def newton(self, nodes, node_scale):
        u = lambda l: l / (1 + l / mp.mpf(node_scale))  # noqa: E731
        moments = [self.integral(lambda l, p=p: u(l) ** p / (1 + l / mp.mpf(node_scale)) ** 2) for p in range(len(nodes) - 1)]
        w_d = [1 - self.r] + [mp.mpf(0)] * (len(nodes) - 1)
        for j in range(len(nodes)):
            basis = [mp.mpf(1)]  # L_j in powers of u
            for k in range(len(nodes)):
                if k != j:
                    d = u(nodes[j]) - u(nodes[k])
                    basis = [(a - u(nodes[k]) * b) / d for a, b in zip([0, *basis], [*basis, 0], strict=True)]
            w_d[j] -= mp.fsum(p * a * moments[p - 1] for p, a in enumerate(basis) if p)
        return w_d


@pytest.mark.parametrize(
    "scaler, eta",
    [*((scaler, 1) for scaler in PHI), ("sde_1", 0.3), ("sde_4", 2), ("sde_5", 0.3), ("sde_5", 2.5), ("sde_5", 1e-6)],
)
@pytest.mark.parametrize("l_t, log_ratio", [(1e-3, 0.01), (1e-3, 9.0), (0.7, 0.3), (30.0, 1.5), (120.0, 9.0), (0.9e6, 0.1)])
def test_weights_equal_forty_digit_arithmetic(scaler, eta, l_t, log_ratio):
    if scaler == "sde_4":  # admissible below er_lambda 1022
        l_t, log_ratio = min(l_t, 1.0), min(log_ratio, 6.0)
    l_s = l_t * math.exp(log_ratio)
    schedule = [l_s * grow for grow in (1.9, 1.6, 1.35, 1.2, 1.0)] + [l_t]
    cases = [("taylor", n, math.inf) for n in (1, 2, 3)]
    cases += [("newton", n, c) for n, c in [(2, math.inf), (3, math.inf), (4, math.inf), (5, math.inf), (3, 5.0), (5, 5.0)]]
    with mp.workdps(40):
        step = ExactStep(l_s, l_t, lambda l: l ** (1 - mp.mpf(eta)) * PHI[scaler](l) ** mp.mpf(eta))
        for method, order, node_scale in cases:
            etas = 1 if eta == 1 else [0, 3, 0.5, 1.1, eta]
            plan = er_sde_plan(schedule, order=order, noise_scaler=scaler, method=method, node_scale=node_scale, eta=etas)
            nodes = [mp.mpf(l) for l in schedule[5 - order : 5][::-1]]
            w_d = step.taylor(nodes) if method == "taylor" else step.newton(nodes, node_scale)
            row = plan.weights[4].tolist()
            error = max(abs(got - w) for got, w in zip(row[1:-1], w_d, strict=True)) / max(abs(w) for w in w_d)
            assert error <= 1e-12, (method, order, node_scale)
            assert abs(mp.mpf(row[-1]) ** 2 / mp.mpf(l_t) ** 2 - step.variance) <= 1e-15, (method, order, node_scale)


def karras(n, sigma_min=0.02, sigma_max=20.0, rho=7):
    ramp = np.linspace(0, 1, n)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def distance_to_solution(plan, mu=0.3, s=0.5):
    """Error at the end of the probability-flow ODE of Gaussian data, begun with an exact history; x is one number."""
    l = plan.er_lambdas
    exact = mu + 1.7 * torch.sqrt((s**2 + l**2) / (s**2 + l[0] ** 2))
    denoised = [(l[i] ** 2 * mu + s**2 * exact[i]) / (s**2 + l[i] ** 2) for i in range(plan.order - 1)][::-1]
    x = exact[plan.order - 1]
    for i in range(plan.order - 1, plan.num_steps):
        denoised = [(l[i] ** 2 * mu + s**2 * x) / (s**2 + l[i] ** 2), *denoised[: plan.order - 1]]
        x = ersde_fast.reference_step(plan, i, x, denoised)
    return abs(x - exact[-1]).item()


@pytest.mark.parametrize(
    "method, order, slope", [("taylor", 3, 2.0), ("newton", 3, 3.0), ("newton", 4, 4.0), ("newton", 5, 5.0)]
)
def test_convergence_order(method, order, slope):
    coarse, fine = (
        distance_to_solution(er_sde_plan(np.geomspace(10, 0.1, n + 1), order=order, noise_scaler="ode", method=method))
        for n in (160, 320)
    )
    assert abs(math.log2(coarse / fine) - slope) < 0.1


def test_taylor_with_exact_integrals_beats_the_riemann_sum():
    exact, riemann = (
        distance_to_solution(er_sde_plan(karras(321), noise_scaler="ode", integration_points=points)) for points in (None, 100)
    )
    assert exact < riemann


# ---- invariants ----

SCALERS = ["ode", "sde", "sde_1", "sde_2", "sde_3", "sde_5", "reverse_time_sde(0.3)"]
RULES = [("taylor", n, math.inf) for n in (1, 2, 3)] + [("newton", n, c) for n in (1, 2, 3, 4, 5) for c in (math.inf, 3.0)]


@st.composite
def schedules(draw):
    """Process and sigmas, falling by factors of 0.3 to 0.99, with a repeated value and a final 0 now and then."""
    process = draw(st.sampled_from(["ve", "vp", "flow"]))
    sigma = draw(st.floats(0.5, 80.0)) if process == "ve" else draw(st.sampled_from([1.0, 0.999, 0.9]))
    sigmas = [sigma]
    for factor in draw(st.lists(st.floats(0.3, 0.99), min_size=1, max_size=12)):
        sigma *= factor
        sigmas += [sigma] * draw(st.sampled_from([1, 1, 1, 2]))
    return process, sigmas + [0.0] * draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(schedules(), st.sampled_from(SCALERS), st.sampled_from(RULES), st.sampled_from([0.0, 1e-9, 0.4, 1.0, 3.0]))
def test_invariants(schedule, scaler, rule, eta):
    process, sigmas = schedule
    method, order, node_scale = rule
    plan = er_sde_plan(sigmas, process=process, order=order, noise_scaler=scaler, method=method, node_scale=node_scale, eta=eta)
    weights, l = plan.weights, plan.er_lambdas
    assert weights.shape == (plan.num_steps, order + 2) and weights.dtype == torch.float64
    assert torch.isfinite(weights).all()
    assert (weights[:, 0] >= 0).all() and (weights[:, -1] >= 0).all()
    assert (weights[:, -1] <= plan.sigmas[1:]).all()
    for i in range(plan.num_steps):
        assert (weights[i, 1 + min(order, i + 1) : -1] == 0).all()
        # A constant prediction is carried exactly: the noised sample's signal ends at alpha_t.
        if torch.isfinite(l[i]) and plan.alphas[i] > 0:
            signal = weights[i, 0] * plan.alphas[i] + weights[i, 1:-1].sum()
            assert abs(signal - plan.alphas[i + 1]) <= 1e-12 * weights[i, 1:-1].abs().sum() + 1e-15
        # ... and the noise level ends at sigma_t.
        if plan.sigmas[i + 1] > 0:
            level = torch.hypot(weights[i, 0] * plan.sigmas[i], weights[i, -1])
            assert abs(level / plan.sigmas[i + 1] - 1) < 1e-14


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-2, 50), st.floats(1.01, 5), st.floats(1.01, 5), st.sampled_from(SCALERS))
def test_two_steps_of_order_one_equal_one(l_t, ratio, more, scaler):
    """Order 1 is exact for a constant prediction, so splitting its step changes neither mean nor variance."""
    l_u, l_s = l_t * ratio, l_t * ratio * more
    (whole,) = er_sde_plan([l_s, l_t], order=1, noise_scaler=scaler).weights
    first, second = er_sde_plan([l_s, l_u, l_t], order=1, noise_scaler=scaler).weights
    assert second[0] * first[0] == pytest.approx(whole[0].item(), rel=1e-13)
    assert second[0] * first[1] + second[1] == pytest.approx(whole[1].item(), rel=1e-13)
    assert math.hypot(second[0] * first[2], second[2]) == pytest.approx(whole[2].item(), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_newton_integrates_polynomials_exactly(n):
    """A prediction that is a polynomial of degree n - 1 in er_lambda, stepped once or in twenty steps, ends in the same place."""
    schedule = [9.0, 7.5, 6.2, 5.0, 4.1, 3.0]
    polynomial = lambda l: sum((l / 4) ** p * (1 - 0.4 * p) for p in range(n))  # noqa: E731
    plan = er_sde_plan(schedule, order=n, method="newton", noise_scaler="sde_5")
    row = plan.weights[4]
    x = 2.5
    once = row[0] * x + sum(row[1 + j] * polynomial(schedule[4 - j]) for j in range(n))
    fine = er_sde_plan(np.linspace(4.1, 3.0, 4001), order=2, method="newton", noise_scaler="sde_5")
    many = x
    for i, weights in enumerate(fine.weights.tolist()):
        many = weights[0] * many + weights[1] * polynomial(fine.er_lambdas[i].item())
        many += weights[2] * polynomial(fine.er_lambdas[i - 1].item()) if i else 0.0
    assert once.item() == pytest.approx(many, abs=2e-7)


# ---- edges ----


def test_sigma_zero_is_the_prediction():
    plan = er_sde_plan([1.0, 0.5, 0.0], process="flow")
    assert plan.weights[-1].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "scaler, w_x", [("sde", 0.0), ("sde_2", 0.0), ("sde_3", 0.0), ("sde_5", 0.0), ("reverse_time_sde(0.1)", 0.0)]
)
def test_flow_from_pure_noise_forgets_x(scaler, w_x):
    plan = er_sde_plan([1.0, 0.8, 0.5, 0.2], process="flow", noise_scaler=scaler)
    assert plan.weights[0, 0] == w_x
    assert plan.weights[0, -1] == pytest.approx(0.8, rel=1e-15)
    assert plan.weights[0, 1:-1].tolist() == pytest.approx([0.2, 0, 0], rel=1e-15)


def test_flow_from_pure_noise_limits():
    """The ODE keeps x; sde_1's phi / l tends to 11."""
    plan = er_sde_plan([1.0, 0.8, 0.5], process="flow", noise_scaler="ode")
    assert plan.weights[0].tolist() == pytest.approx([0.8, 0.2, 0, 0, 0], rel=1e-15, abs=1e-300)
    rho = (math.exp(-1 / 4) + 10) / 11
    plan = er_sde_plan([1.0, 0.8, 0.5], process="flow", noise_scaler="sde_1")
    assert plan.weights[0, 0] == pytest.approx(0.8 * rho, rel=1e-14)
    assert plan.weights[0, -1] == pytest.approx(0.8 * math.sqrt(1 - rho**2), rel=1e-13)


@pytest.mark.parametrize("process, start", [("flow", 1.0), ("vp", 1.0)])
def test_weights_approach_their_limit_at_infinity(process, start):
    limit = er_sde_plan([start, 0.8, 0.5, 0.2], process=process, method="newton", node_scale=5.0).weights
    near = er_sde_plan([start - 1e-9, 0.8, 0.5, 0.2], process=process, method="newton", node_scale=5.0).weights
    torch.testing.assert_close(near, limit, rtol=0, atol=1e-4)


def test_node_at_infinity_is_absent_or_ordinary():
    schedule = [1.0, 0.8, 0.5, 0.2]
    absent = er_sde_plan(schedule, process="flow", method="newton").weights
    assert (absent[1, 2:-1] == 0).all() and absent[2, 3] == 0 and absent[2, 2] != 0
    ordinary = er_sde_plan(schedule, process="flow", method="newton", node_scale=5.0).weights
    assert ordinary[1, 2] != 0 and ordinary[2, 3] != 0


def test_repeated_sigma_is_an_identity_step():
    plan = er_sde_plan([9, 7, 7, 5, 3], order=3)
    assert plan.weights[1].tolist() == [1, 0, 0, 0, 0]
    without = er_sde_plan([9, 7, 5, 3], order=3)
    # Step 2 holds 7 (new), 7 (old), 9: the old one does not count, and 9 is the second node.
    assert plan.weights[2].tolist() == [
        without.weights[1, 0],
        without.weights[1, 1],
        0,
        without.weights[1, 2],
        without.weights[1, 4],
    ]
    assert er_sde_plan([1, 1, 0.5], process="flow").weights[0].tolist() == [1, 0, 0, 0, 0]
    assert er_sde_plan([1.0, 0, 0]).weights[1].tolist() == [1, 0, 0, 0, 0]


# ---- levels that rounding moved ----

EPS_OF = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@pytest.mark.parametrize("of", [lambda s: s, lambda s: s.double(), lambda s: s.tolist(), lambda s: s.numpy(), list])
def test_flows_of_every_shift_start_at_1(of):
    """As diffusers and ComfyUI shift the levels, in float32: some starts are an ulp above 1, some below."""
    times = torch.tensor([1000, 750, 250, 1]) / 1000
    schedules = [shift * times / (1 + (shift - 1) * times) for shift in (1 + k / 100 for k in range(901))]
    schedules = [schedules[0], *(sigmas for sigmas in schedules if sigmas[0] != 1)]
    assert any(sigmas[0] > 1 for sigmas in schedules) and any(sigmas[0] < 1 for sigmas in schedules)
    for sigmas in schedules:
        plan = er_sde_plan(of(sigmas), process="flow")
        assert plan.sigmas[0] == (1 if sigmas[0] >= 1 else sigmas[0]) and torch.equal(plan.sigmas[1:], sigmas[1:].double())


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("dtype, eps", EPS_OF.items())
def test_levels_beyond_their_bounds_by_rounding_are_the_bounds(process, dtype, eps):
    expected = er_sde_plan([1.0, 0.5, 0.0], process=process)
    for k in (1, 2, 4):
        sigmas = torch.tensor([1 + k * eps, 0.5, -k * eps], dtype=torch.float64).to(dtype)
        assert sigmas[0] > 1 and sigmas[-1] < 0
        plan = er_sde_plan(sigmas, process=process)
        assert torch.equal(plan.table, expected.table) and plan.sigmas.tolist() == [1, 0.5, 0]
    beyond = torch.tensor([1 + 6 * eps, 0.5, 0.0], dtype=torch.float64).to(dtype)
    with pytest.raises(ValueError, match=rf'at most 1 for process "{process}", got sigmas\[0\] = {beyond[0].item()}$'):
        er_sde_plan(beyond, process=process)
    below = torch.tensor([1.0, 0.5, -6.3 * eps], dtype=torch.float64).to(dtype)
    with pytest.raises(ValueError, match=rf"at least 0, got sigmas\[2\] = {below[2].item()}$"):
        er_sde_plan(below, process=process)


def test_schedules_counted_down_end_at_0():
    """np.arange ends a rounding below 0, and 1 - sigma a rounding below alpha 0."""
    sigmas = np.arange(1.0, -0.025, -0.05)
    assert sigmas[-1] < 0 and er_sde_plan(sigmas, process="flow").sigmas[-1] == 0
    above = torch.tensor([1.0000001, 0.5, 0.0])
    assert er_sde_plan(above, 1 - above).alphas.tolist() == [0, 0.5, 1]


@settings(max_examples=100, deadline=None)
@given(
    schedules(), st.sampled_from(RULES), st.sampled_from([torch.float32, torch.float64]),
    st.lists(st.integers(-3, 3), min_size=40, max_size=40),
)  # fmt: skip
def test_levels_that_differ_by_rounding_are_one(schedule, rule, dtype, ulps):
    """Each level twice, the second some ulps above or below the first: the plan of levels that are twice the same."""
    process, sigmas = schedule
    method, order, node_scale = rule
    options = dict(process=process, order=order, method=method, node_scale=node_scale)
    first = torch.tensor(sorted({min(s, 0.9) for s in sigmas}, reverse=True), dtype=dtype)
    again = first * (1 + torch.tensor(ulps[: len(first)], dtype=dtype) * EPS_OF[dtype])
    close, same = (torch.stack([first, other], dim=1).flatten() for other in (again, first))
    weights, expected = (er_sde_plan(levels, **options).weights for levels in (close, same))
    # Levels fall by factors of at most 0.99: of nodes so near 4 ulps are 400 of what a weight divides by, to its power.
    size = expected.abs().amax(1, keepdim=True)
    assert ((weights - expected).abs() <= 4000 * order * EPS_OF[dtype] * size).all()
    assert (weights[::2, 0] == 1).all() and (weights[::2, 1:] == 0).all()


def test_nearer_levels_than_rounding_parts_are_levels():
    """An ulp of half precision is a level of its own; so is what float64 tells apart."""
    for sigmas in (torch.tensor([1.0, 0.99609375], dtype=torch.bfloat16), [0.7, 0.7 - 1e-12]):
        row = er_sde_plan(sigmas).rows[0]
        assert row.w_d and row.w_d[0] > 0


def test_defaults():
    """An order alone named: newton in a variable that saturates; a method or its points named: the contract of that method."""
    default = er_sde_plan([9, 7, 5, 3, 2], order=3)
    assert (default.method, default.node_scale, default.order, default.noise_scaler.name) == ("newton", 10.0, 3, "sde_5")
    named = er_sde_plan([9, 7, 5, 3, 2], method="newton", node_scale=10.0)
    assert torch.equal(default.weights, named.weights)
    nothing = er_sde_plan([9, 7, 5, 3, 2])
    assert (nothing.method, nothing.node_scale, nothing.order, nothing.noise_scaler.name) == ("newton", None, 3, "sde_5")
    for options in ({"method": "newton"}, {"method": "taylor"}, {"integration_points": 7}):
        plan = er_sde_plan([9, 7, 5, 3, 2], **options)
        assert (plan.method, plan.node_scale) == (options.get("method", "taylor"), math.inf)
    assert er_sde_plan([9, 7, 5, 3, 2], node_scale=4.0).method == "newton"


def test_order_for_each_step():
    plan = er_sde_plan([9, 7, 5, 3, 2], order=[1, 2, 3, 1])
    assert plan.order == 3 and plan.orders == (1, 2, 3, 1)
    assert [len(row.w_d) for row in plan.rows] == [1, 2, 3, 1]


def test_starting_at_is_a_plan_without_history():
    plan = er_sde_plan([9, 7, 5, 3, 0], order=[1, 2, 3, 2], s_noise=0.9, integration_points=100)
    rest = plan.starting_at(2).starting_at(1)
    assert rest.first_step == 3 and rest.num_steps == 1 and rest.order == 2
    fresh = er_sde_plan([5, 3, 0], order=[3, 2], s_noise=0.9, integration_points=100)
    assert torch.equal(plan.starting_at(2).weights, fresh.weights)
    with pytest.raises(ValueError, match=r"i must be 0 to 3 .* got 4"):
        plan.starting_at(4)


def test_s_noise_multiplies_the_noise_only():
    one, half = er_sde_plan([9, 7, 5]), er_sde_plan([9, 7, 5], s_noise=0.5)
    assert torch.equal(half.weights[:, -1], one.weights[:, -1] / 2) and torch.equal(half.weights[:, :-1], one.weights[:, :-1])


# ---- the strength of a scaler ----

STARTS = [("ve", karras(9)), ("flow", [1.0, 0.8, 0.5, 0.2, 0.0]), ("vp", [1.0, 0.8, 0.5, 0.2])]


@pytest.mark.parametrize("process, sigmas", STARTS)
@pytest.mark.parametrize("scaler", [*PHI, lambda l: l**2, lambda l: -l])
@pytest.mark.parametrize("rule", [{}, {"integration_points": 50}, {"method": "newton", "order": 5}])
def test_eta_0_is_the_ode_of_every_scaler(process, sigmas, scaler, rule):
    """Those too that are inadmissible, or have no limit at er_lambda = inf."""
    plan = er_sde_plan(sigmas, process=process, noise_scaler=scaler, eta=0, **rule)
    expected = er_sde_plan(sigmas, process=process, noise_scaler="ode", **rule)
    torch.testing.assert_close(plan.table, expected.table, rtol=1e-13, atol=1e-15)
    assert not plan.draws and plan.eta == 0


@pytest.mark.parametrize("process, sigmas", STARTS)
@pytest.mark.parametrize("eta", [0.25, 1, 1.5])
def test_sde_at_eta_is_the_reverse_time_sde(process, sigmas, eta):
    expected = er_sde_plan(sigmas, process=process, noise_scaler=reverse_time_sde(eta)).table
    assert torch.equal(er_sde_plan(sigmas, process=process, noise_scaler="sde", eta=eta).table, expected)
    halves = er_sde_plan(sigmas, process=process, noise_scaler=reverse_time_sde(2 * eta), eta=0.5)
    assert torch.equal(halves.table, expected)


def test_eta_of_a_callable_is_its_power():
    phi = lambda l: l * (l.exp() + 1)  # noqa: E731
    expected = er_sde_plan(karras(9), noise_scaler=lambda l: l**0.7 * phi(l) ** 0.3).weights
    torch.testing.assert_close(er_sde_plan(karras(9), noise_scaler=phi, eta=0.3).weights, expected, rtol=1e-11, atol=1e-15)


def test_eta_where_the_schedule_starts_at_infinity():
    """The scaler's own limit: infinite for all but sde_1, whose phi / l tends to 11."""
    for scaler in ("sde", "sde_3", "sde_5"):
        assert er_sde_plan([1.0, 0.8, 0.5], process="flow", noise_scaler=scaler, eta=0.1).weights[0, 0] == 0
    rho = ((math.exp(-1 / 4) + 10) / 11) ** 0.5
    plan = er_sde_plan([1.0, 0.8, 0.5], process="flow", noise_scaler="sde_1", eta=0.5)
    assert plan.weights[0, 0] == pytest.approx(0.8 * rho, rel=1e-14)


@pytest.mark.parametrize("scaler", ["sde_5", lambda l: l**1.5])
def test_eta_stays_the_plans(scaler):
    plan = er_sde_plan(karras(9), noise_scaler=scaler, eta=0.4)
    rest = er_sde_plan(karras(9)[3:], noise_scaler=scaler, eta=0.4)
    assert plan.eta == 0.4 and plan.starting_at(3).eta == 0.4
    assert torch.equal(plan.starting_at(3).weights, rest.weights)
    plan.check()
    er_sde_plan([1e4, 5e3, 100], noise_scaler="sde_4", eta=0).check()


# ---- eta by the step ----

WINDOW = [0, 0.3, 2.5, 0, 1, 0, 0.7, 0]


@pytest.mark.parametrize("process, sigmas", [("ve", karras(9)), ("flow", np.linspace(1, 0, 9)), ("vp", np.linspace(1, 0.1, 9))])
@pytest.mark.parametrize("scaler, name", [(name, name) for name in ("sde_5", "sde_1", "sde")] + [(lambda l: l**1.5, "sde_2")])
@pytest.mark.parametrize("rule", [{"integration_points": 50}, {"method": "newton", "order": 5}, {"guidance": 6}])
def test_each_step_has_the_weights_of_its_eta(process, sigmas, scaler, name, rule):
    """A step reads phi inside its own interval alone, up to a factor: row i is that of a plan whose eta is eta[i]. A function,
    which has no limit at infinity, needs none where eta is 0."""
    plan = er_sde_plan(sigmas, process=process, noise_scaler=scaler, eta=WINDOW, **rule)
    for i, eta in enumerate(WINDOW):
        alike = er_sde_plan(sigmas, process=process, noise_scaler=name, eta=eta, **rule)
        torch.testing.assert_close(plan.table[i], alike.table[i], rtol=1e-12, atol=1e-14)
        assert eta or plan.rows[i].w_noise == 0
    assert plan.eta == tuple(WINDOW) and plan.draws
    rest, at_once = plan.starting_at(2), er_sde_plan(sigmas[2:], process=process, noise_scaler=scaler, eta=WINDOW[2:], **rule)
    assert rest.eta == at_once.eta and torch.equal(rest.weights, at_once.weights)
    plan.check()


@pytest.mark.parametrize(
    "of", [list, tuple, np.array, np.float32, torch.tensor, lambda eta: torch.tensor(eta).requires_grad_()]
)
def test_etas_are_numbers_arrays_or_tensors(of):
    etas = [0, 0.5, 2.0]
    plan = er_sde_plan([4, 3, 2, 1], eta=of(etas))
    assert plan.eta == tuple(etas) and torch.equal(plan.table, er_sde_plan([4, 3, 2, 1], eta=etas).table)
    assert not er_sde_plan([4, 3, 2, 1], eta=[0.0] * 3).draws


def test_callable_scaler_equals_the_named_one():
    named = er_sde_plan(karras(12), noise_scaler="sde_5").weights
    given_phi = er_sde_plan(karras(12), noise_scaler=lambda l: l * ((l**0.3).exp() + 10)).weights
    torch.testing.assert_close(given_phi, named, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        er_sde_plan(karras(12), noise_scaler=reverse_time_sde(1)).weights, er_sde_plan(karras(12), noise_scaler="sde").weights
    )


def test_deterministic_scalers_have_exactly_no_noise():
    for scaler in ("ode", "reverse_time_sde(0)", lambda l: 3 * l):
        assert (er_sde_plan(karras(30), noise_scaler=scaler).weights[:, -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sigmas_of_any_kind(dtype):
    values = torch.tensor([8, 4, 2, 1], dtype=dtype)
    expected = er_sde_plan([8.0, 4.0, 2.0, 1.0]).weights
    assert torch.equal(er_sde_plan(values).weights, expected)
    assert torch.equal(er_sde_plan(np.array([1, 2, 4, 8])[::-1]).weights, expected)
    assert torch.equal(er_sde_plan(list(values)).weights, expected)


def test_the_plan_keeps_a_copy():
    sigmas = torch.tensor([8.0, 4.0, 2.0], dtype=torch.float64)
    plan = er_sde_plan(sigmas)
    sigmas.fill_(1)
    assert plan.sigmas.tolist() == [8, 4, 2]
    with pytest.raises(AttributeError):
        plan.s_noise = 2.0


@pytest.mark.parametrize("scaler", ["ode", "sde_5", "reverse_time_sde(0.5)"])
def test_a_plan_goes_to_another_process(scaler):
    """Pickled, as workers receive it, it plans and steps as before."""
    plan = er_sde_plan([9, 5, 2, 0], noise_scaler=scaler)
    other = pickle.loads(pickle.dumps(plan))
    assert torch.equal(other.table, plan.table) and other.rows == plan.rows
    assert torch.equal(other.starting_at(1).table, plan.starting_at(1).table)


def test_another_default_device_does_not_matter():
    for options in (dict(), dict(method="newton", order=5, node_scale=4.0), dict(integration_points=100)):
        expected = er_sde_plan(karras(9), **options).weights
        sigmas = torch.from_numpy(karras(9))
        with torch.device("meta"):
            plan = er_sde_plan(sigmas, **options)
        assert torch.equal(plan.weights, expected)


# ---- the columns behind the weights ----


@pytest.mark.parametrize("sigmas, process", [([9, 4, 1, 0.1], "ve"), ([0.99, 0.7, 0.3, 0], "vp"), ([0.9, 0.5, 0.1, 0], "flow")])
def test_the_factors_of_each_prediction_type_undo_its_definition(sigmas, process):
    """x = alpha x0 + sigma eps, and the model says eps, v = alpha eps - sigma x0, eps - x0, x0, or what EDM's preconditioning makes
    x0 of: x0 = c_skip y + c_out output, y = x / alpha with noise l = sigma / alpha."""
    plan, std = er_sde_plan(sigmas, process=process, sigma_data=0.6), 0.6
    denoised, noise = 0.3, -1.7
    for i in range(plan.num_steps):
        alpha, sigma = plan.alphas[i].item(), plan.sigmas[i].item()
        outputs = {"sample": denoised, "epsilon": noise, "v": alpha * noise - sigma * denoised, "flow": noise - denoised}
        l, total = sigma / alpha, (sigma / alpha) ** 2 + std**2
        outputs["edm"] = (denoised - std**2 / total * (denoised + l * noise)) / (l * std / math.sqrt(total))
        for name in PREDICTION_TYPES:
            p_x, p_m = plan.predicting(name).rows[i].prediction
            assert p_x * (alpha * denoised + sigma * noise) + p_m * outputs[name] == pytest.approx(denoised, rel=1e-13)


def test_a_column_counts_steps():
    plan = er_sde_plan([5, 4, 3, 2, 1])
    assert plan.table[:, COUNTER].tolist() == [0, 1, 2, 3] == [row.counter for row in plan.rows]
    assert plan.starting_at(1).starting_at(1).table[:, COUNTER].tolist() == [2, 3]
    assert plan.table.shape == (4, W_D + 3) and plan.weights.shape == (4, 5)
    assert torch.equal(plan.weights, plan.table[:, [W_X, W_D, W_D + 1, W_D + 2, W_NOISE]])


# ---- plans in stacks ----


def test_a_stack_holds_each_plans_rows_and_nan_behind_them():
    plans = [er_sde_plan([5, 4, 3, 2, 1], order=2), er_sde_plan([3, 1, 0], order=3, method="newton").starting_at(1)]
    stack = stack_plans(plans)
    assert (
        stack.weights.shape == stack.shape == (2, 4, 5)
        and (stack.num_plans, stack.num_steps, stack.order) == (2, 4, 3)
        and stack.draws
    )
    for rows, plan in zip(stack.table, plans, strict=True):
        n, used = plan.num_steps, W_D + plan.order
        assert torch.equal(rows[:n, :used], plan.table) and (rows[:n, used:] == 0).all()
        assert rows[n:, COUNTER + 1 :].isnan().all() and (rows[n:, COUNTER] == 0).all()
    assert not stack_plans([er_sde_plan([2, 1], noise_scaler="ode")]).draws


@pytest.mark.parametrize("plans", [[], None, [er_sde_plan([2, 1]), 3]])
def test_a_stack_of_what_is_no_plan(plans):
    with pytest.raises(TypeError, match="plans must be a list of at least one plan of er_sde_plan"):
        stack_plans(plans)


# ---- bad input ----


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(sigmas=[1, 2, 0]), ValueError, r"sigmas must not rise: .* at index 1"),
        (dict(sigmas=[3, 2, 1], alphas=[0.9, 0.5, 0.2]), ValueError, r"er_lambda = sigma / alpha goes from .* at index 1"),
        (dict(sigmas=[3, math.nan, 1]), ValueError, r"sigmas must be finite .* got sigmas\[1\] = nan"),
        (dict(sigmas=[math.inf, 1]), ValueError, r"sigmas must be finite .* got sigmas\[0\] = inf"),
        (dict(sigmas=[3, 1, -1]), ValueError, r"sigmas must be finite and at least 0, got sigmas\[2\] = -1"),
        (dict(sigmas=[3]), ValueError, r"at least 2 values, got shape \(1,\)"),
        (dict(sigmas=[[3, 1]]), ValueError, r"one-dimensional .* got shape \(1, 2\)"),
        (dict(sigmas="karras"), TypeError, r"sigmas must be a list, array or tensor"),
        (dict(sigmas=[1.5, 0.5], process="vp"), ValueError, r'at most 1 for process "vp", got sigmas\[0\] = 1.5'),
        (dict(sigmas=[1.5, 0.5], process="flow"), ValueError, r'at most 1 for process "flow"'),
        (dict(process="edm"), ValueError, r'process must be "ve", "vp" or "flow", got \'edm\''),
        (dict(alphas=[1, 1]), ValueError, r"alphas must have the length of sigmas, 3, got 2"),
        (dict(alphas=[1, -1, 1]), ValueError, r"alphas must be finite and at least 0, got alphas\[1\] = -1"),
        (dict(sigmas=[2, 1, 0], alphas=[1, 1, 0]), ValueError, r"must not both be 0, as at index 2"),
        (dict(order=0), ValueError, r'order must be 1 to 5 for method="newton", got 0'),
        (dict(order=4, method="taylor"), ValueError, r'order must be 1 to 3 for method="taylor", got 4'),
        (dict(order=6, method="newton"), ValueError, r'order must be 1 to 5 for method="newton", got 6'),
        (dict(order=[1, 2, 3]), ValueError, r"one number or 2, one for each step, got 3"),
        (dict(order=[1, 6]), ValueError, r"got 6 at step 1"),
        (dict(order=2.0), TypeError, r"order must be a whole number"),
        (dict(order=True), TypeError, r"order must be a whole number"),
        (dict(noise_scaler="sde_6"), ValueError, r"noise_scaler must be one of ode, sde, .* got 'sde_6'"),
        (dict(noise_scaler=5), TypeError, r"noise_scaler must be a name or a callable"),
        (dict(noise_scaler="reverse_time_sde(-1)"), ValueError, r"noise_scaler must be one of|eta must be"),
        (dict(sigmas=[5000, 3000, 1], noise_scaler="sde_4"), ValueError, r"sde_4 is inadmissible at step 0: phi\(l\) / l must not"),
        (dict(noise_scaler=lambda l: l**0.5), ValueError, r"inadmissible at step 0"),
        (dict(noise_scaler=lambda l: l - 2), ValueError, r"must be positive and finite, got .* at er_lambda"),
        (dict(noise_scaler=lambda l: l / 0), ValueError, r"must be positive and finite, got inf at er_lambda"),
        (dict(noise_scaler=lambda l: 1.0), TypeError, r"must map a tensor elementwise"),
        (dict(noise_scaler=lambda l: l.sum()), TypeError, r"must map a tensor elementwise"),
        (dict(sigmas=[1, 0.5], process="flow", noise_scaler="sde_4"), ValueError, r"no limit at er_lambda = inf.*sigmas\[0\] < 1"),
        (dict(sigmas=[1, 0.5], process="flow", noise_scaler=lambda l: l**2), ValueError, r"no limit .*sigmas\[0\] < 1"),
        (dict(method="euler"), ValueError, r'method must be None, "newton" or "taylor", got \'euler\''),
        (dict(method="taylor", node_scale=5.0), ValueError, r'node_scale needs method="newton"'),
        (dict(node_scale=0.0, method="newton"), ValueError, r"node_scale must be a positive number or inf, got 0.0"),
        (dict(node_scale=math.nan, method="newton"), ValueError, r"node_scale must be a positive number"),
        (dict(integration_points=100, method="newton"), ValueError, r'integration_points needs method="taylor"'),
        (dict(integration_points=0), ValueError, r"whole number from 1 to 10\^6, got 0"),
        (dict(integration_points=1.5), ValueError, r"whole number from 1 to 10\^6, got 1.5"),
        (dict(s_noise=-1), ValueError, r"s_noise must be a finite number of at least 0, got -1"),
        (dict(s_noise=math.nan), ValueError, r"s_noise must be a finite number"),
        (dict(eta=-0.5), ValueError, r"eta must be a finite number of at least 0, got -0.5"),
        (dict(eta=math.inf), ValueError, r"eta must be a finite number of at least 0, got inf"),
        (dict(eta="1"), ValueError, r"eta must be a finite number of at least 0, got '1'"),
        (dict(eta=[1]), ValueError, r"eta must be one number or 2, one for each step, got 1"),
        (dict(eta=torch.ones(3)), ValueError, r"eta must be a number or have shape \(2,\), one for each step, got \(3,\)"),
        (dict(eta=np.ones((2, 1))), ValueError, r"eta must be a number or have shape \(2,\), one for each step, got \(2, 1\)"),
        (dict(eta=[1, -1]), ValueError, r"eta\[1\] must be a finite number of at least 0, got -1"),
        (dict(eta=[math.nan, 1]), ValueError, r"eta\[0\] must be a finite number of at least 0, got nan"),
        (dict(eta=torch.tensor([1j, 1])), ValueError, r"eta\[0\] must be a finite number of at least 0, got 1j"),
        (dict(eta=[True, 1]), ValueError, r"eta\[0\] must be a finite number of at least 0, got True"),
        (dict(eta=torch.ones(2, device="meta")), ValueError, r"eta must be on the CPU or where sigmas are, cpu, got meta"),
        (dict(sigmas=[9000, 5000, 2000], noise_scaler="sde_4", eta=[0, 1]), ValueError, r"sde_4 is inadmissible at step 1"),
        (dict(sigmas=[1, 1, 0.5], process="flow", noise_scaler="sde_4", eta=[0, 1]), ValueError, r"no limit at er_lambda = inf"),
        (dict(sigmas=[1, 0.5], process="flow", noise_scaler="sde_4", eta=0.1), ValueError, r"no limit at er_lambda = inf"),
        (dict(sigma_data=0), ValueError, r"sigma_data must be above 0, got 0"),
        (dict(sigma_data=math.nan), ValueError, r"sigma_data must be a finite number of at least 0, got nan"),
        (dict(sigma_data="0.5"), ValueError, r"sigma_data must be a finite number of at least 0, got '0.5'"),
        (dict(sigmas=[1, 0.5], process="flow", noise_scaler=lambda l: l, eta=0.1), ValueError, r"no limit at er_lambda = inf"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        er_sde_plan(**{"sigmas": [3, 2, 1], **arguments})


def test_a_plan_pickled_by_another_version_is_refused():
    plan = er_sde_plan([3.0, 2.0, 1.0])
    size = len(pickle.dumps(plan))
    plan.predicting("v"), plan.to("meta"), plan.rows
    assert len(pickle.dumps(plan)) == size
    state = {name: value for name, value in plan.__getstate__().items() if name != "guidance"}
    with pytest.raises(ValueError, match="pickled by another version"):
        plan.__class__.__new__(plan.__class__).__setstate__(state)


@pytest.mark.parametrize("name", ["guidance", "eta", "s_noise"])
@pytest.mark.parametrize("value", [True, 10**400, -1, math.nan])
def test_strengths_are_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0"):
        er_sde_plan([3.0, 2.0, 1.0], **{name: value})
