"""The whole public surface under random arguments: the result equals exact arithmetic, or a documented error says what is wrong.

ERSDE_FAST_FUZZ=100000 python -m pytest tests/test_fuzz.py        # so many cases of each test in the place of some hundred
"""

import math
import os

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conftest import HALF_ULP, SMALLEST
from ersde_fast import (
    er_sde_plan,
    fast_step,
    place_sigmas,
    portable_noise,
    reference_step,
    sample_er_sde,
    stack_plans,
    step_log_prob,
)  # fmt: skip
from ersde_fast.plan import Plan
from ersde_fast.predictions import PREDICTION_TYPES

LONG = int(os.environ.get("ERSDE_FAST_FUZZ", 0))
FUZZ = settings(
    max_examples=LONG or 150, deadline=None, derandomize=not LONG, database=None, print_blob=True,
    suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WRONG = [
    None, "x", -1, 10**30, 2.5, math.nan, True, [], [1.0], {}, object(), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64),
    torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 3, device="meta"), np.zeros(3), b"x", (),
]  # fmt: skip
PLAN_NAMES = "sigma alpha process order noise_scaler method node_scale integration_points s_noise eta er_lambda".split()
STEP_NAMES = (
    "plan i x history noise generator seed prediction_type guidance global_shape global_start torch_layout out backend plan_index "
    "step_index step"
).split()


def documented(error: BaseException, names: list[str]) -> bool:
    """A ValueError or TypeError that names what is wrong."""
    return isinstance(error, (ValueError, TypeError)) and any(name in str(error) for name in names)


def some(draw, likely, *unlikely, chance=12):
    """Mostly the first strategy; one time in `chance` one of the others."""
    return draw(st.one_of(*unlikely)) if unlikely and draw(st.integers(1, chance)) == 1 else draw(likely)


@st.composite
def schedules(draw, process):
    """Levels that fall, from tiny to huge, some repeated, some to 0."""
    steps = draw(st.integers(1, 7))
    top = 0.0 if process != "ve" else 12.0
    logs = sorted(draw(st.lists(st.floats(-12.0, top), min_size=steps, max_size=steps)), reverse=True)
    sigmas = [10.0**v for v in logs]
    if draw(st.booleans()):
        sigmas = [sigmas[0], *sigmas]
    return [*sigmas, 0.0] if draw(st.booleans()) else [*sigmas, sigmas[-1] * draw(st.floats(0.01, 1.0))]


@st.composite
def plan_arguments(draw, wrong=True):
    process = draw(st.sampled_from(["ve", "vp", "flow"]))
    arguments = {"sigmas": draw(schedules(process)), "process": process}
    method = draw(st.sampled_from([None, "newton", "taylor"]))
    top = 3 if method == "taylor" else 5
    arguments |= {
        "method": method,
        "order": draw(st.integers(1, top)),
        "s_noise": draw(st.sampled_from([0.0, 0.3, 1.0, 1.003])),
        "eta": draw(st.sampled_from([0.0, 0.4, 1.0, 2.0])),
        "sigma_data": draw(st.sampled_from([0.5, 1])),
    }
    if draw(st.booleans()):
        steps = len(arguments["sigmas"]) - 1
        arguments["eta"] = draw(st.lists(st.sampled_from([0.0, 0.4, 1, 2.0]), min_size=steps, max_size=steps))
    arguments["noise_scaler"] = draw(
        st.sampled_from(["ode", "sde", "sde_1", "sde_2", "sde_3", "sde_5", "reverse_time_sde(0.3)"])
    )
    if method != "taylor":
        arguments["node_scale"] = draw(st.sampled_from([None, 0.5, 5.0, 100.0, math.inf]))
    elif draw(st.booleans()):
        arguments["integration_points"] = draw(st.integers(1, 200))
    if draw(st.booleans()):
        arguments["sigmas"] = draw(st.sampled_from([np.array, torch.tensor, tuple]))(arguments["sigmas"])
    if wrong and draw(st.integers(1, 3)) == 1:
        bad = st.one_of(
            st.sampled_from(WRONG), st.floats(), st.lists(st.floats(), max_size=4), st.lists(st.integers(-1, 6), max_size=8)
        )
        arguments[draw(st.sampled_from([*arguments, "alphas", "integration_points", "node_scale"]))] = draw(bad)
    return arguments


def plan_or_none(arguments):
    """The plan, or None where it is refused as documented."""
    try:
        return er_sde_plan(**arguments)
    except (ValueError, TypeError) as error:
        assert documented(error, PLAN_NAMES), error
        return None


@FUZZ
@given(arguments=plan_arguments())
def test_plans(arguments):
    """Weights are finite, and a constant prediction stays where it is: sum w_d = alpha_t - w_x alpha_s."""
    plan = plan_or_none(arguments)
    if plan is None:
        return
    w = plan.weights
    assert w.isfinite().all()
    moves = (w[:, 0] != 1) | (w[:, 1:] != 0).any(1)  # the others repeat a level up to rounding, whatever that does to alpha
    assert (plan.sigmas.diff().abs()[~moves] <= 2.0**-20 * plan.sigmas[:-1][~moves]).all()
    w = w[moves]
    (alpha_s, alpha_t), (sigma_s, sigma_t) = ((v[:-1][moves], v[1:][moves]) for v in (plan.alphas, plan.sigmas))
    scale = (alpha_t + w[:, 0].abs() * alpha_s + w[:, 1:-1].abs().sum(1)).clamp(min=1e-300)
    assert ((w[:, 1:-1].sum(1) - (alpha_t - w[:, 0] * alpha_s)).abs() <= 1e-12 * scale).all()
    rho = torch.where(sigma_t > 0, w[:, 0] * sigma_s / sigma_t, 0)
    assert ((rho >= 0) & (rho <= 1 + 1e-12)).all()
    assert (w[:, -1] <= plan.s_noise * sigma_t * (1 + 1e-12)).all()
    if plan.s_noise > 1e-300:
        total = rho**2 + (w[:, -1] / (plan.s_noise * sigma_t.clamp(min=1e-300))) ** 2
        assert ((total - 1).abs()[sigma_t > 0] <= 1e-9).all()


@st.composite
def tensors(draw, shape, dtype):
    """Of a shape, in memory any way: contiguous, permuted, cropped, every second, expanded, with a NaN now and then."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    make = lambda *sizes: (torch.randn(sizes, generator=g, dtype=torch.float64) * 3).to(dtype)  # noqa: E731
    how = draw(st.sampled_from(["contiguous", "contiguous", "permuted", "cropped", "strided", "expanded", "nan"]))
    if how == "permuted" and len(shape) > 1:
        order = draw(st.permutations(range(len(shape))))
        return make(*(shape[d] for d in order)).permute([order.index(d) for d in range(len(shape))])
    if how == "cropped" and shape:
        return make(*(n + 2 for n in shape))[tuple(slice(1, n + 1) for n in shape)]
    if how == "strided" and shape:
        return make(*shape[:-1], 2 * shape[-1])[..., ::2]
    if how == "expanded" and shape:
        return make(*shape[:-1], 1).expand(shape)
    result = make(*shape)
    if how == "nan" and result.numel():
        result.view(-1)[draw(st.integers(0, result.numel() - 1))] = math.nan
    return result


@st.composite
def step_arguments(draw):
    """(plan, arguments of fast_step, whether nothing in them is wrong)."""
    plan = plan_or_none(draw(plan_arguments(wrong=False)))
    plan = plan or er_sde_plan([3, 2, 1, 0], sigma_data=0.5)
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    shape = shape if draw(st.integers(1, 20)) > 1 else (3, 4097)
    dtype = draw(st.sampled_from(DTYPES))
    dtypes = lambda: draw(st.sampled_from([dtype, dtype, *DTYPES]))  # noqa: E731
    i = draw(st.integers(0, plan.num_steps - 1))
    x = draw(tensors(shape, dtype))
    a = {"i": i, "x": x, "history": [draw(tensors(shape, dtypes())) for _ in range(plan.order + draw(st.integers(0, 1)))]}
    batch = shape[0] if shape else 1
    source = draw(st.sampled_from(["seed", "seeds", "pairs", "noise", "generator", "nothing"]))
    words = st.integers(-(2**70), 2**70)
    if source == "seed":
        a["seed"] = draw(words)
    elif source == "seeds":
        a["seed"] = draw(st.lists(words, min_size=batch, max_size=batch))
    elif source == "pairs":
        a["seed"] = draw(st.lists(st.tuples(words, st.integers(0, 2**48 - 1)), min_size=batch, max_size=batch))
    elif source == "noise":
        a["noise"] = draw(tensors(shape, dtypes()))
    elif source == "generator":
        a["generator"] = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    if draw(st.integers(1, 3)) == 1:
        a["prediction_type"] = draw(st.sampled_from(list(PREDICTION_TYPES)))
        if draw(st.booleans()):
            a["guidance"] = (
                draw(tensors(shape, dtypes())),
                draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-3, -0.01), st.floats(0.01, 8))),
            )
    if draw(st.integers(1, 4)) == 1:
        a["backend"] = draw(st.sampled_from(["cpu", "reference"]))
    out = draw(st.sampled_from([None, None, None, "new", "x", "history"]))
    if out == "new":
        a["out"] = torch.empty(shape, dtype=dtype)
    elif out == "x":
        a["out"] = x
    elif out == "history" and a["history"][0].dtype == dtype:
        a["out"] = a["history"][0]
    valid = not (a.get("out") is not None and overlaps_itself(a["out"]))
    if source in ("seed", "seeds", "pairs") and shape and draw(st.integers(1, 4)) == 1:
        a["global_start"] = tuple(draw(st.integers(0, 5)) for _ in shape[1:])
        more = [draw(st.integers(0, 3)) for _ in shape[1:]]
        a["global_shape"] = tuple(s + n + m for s, n, m in zip(a["global_start"], shape[1:], more, strict=True))
    if a.get("prediction_type") == "epsilon" and plan.alphas[i] == 0:
        valid = False
    if draw(st.integers(1, 3)) == 1:
        valid = False
        name = draw(
            st.sampled_from([*a, "i", "x", "history", "noise", "seed", "out", "guidance", "global_start", "torch_layout"])
        )
        a[name] = draw(
            st.one_of(
                st.sampled_from(WRONG), tensors(shape, dtypes()), tensors((2, *shape), dtype), st.integers(-3, 9),
                st.just([x] * 2), st.just(torch.tensor(draw(st.integers(-2, 9)))), st.tuples(st.integers(0, 3), st.integers(0, 3)),
                st.just(x.flatten()[:-1]) if isinstance(x, torch.Tensor) else st.none(),
            )
        )  # fmt: skip
    return plan, a, valid


def overlaps_itself(t):
    return any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)) and t.numel() > 1


def exactly(terms, shape):
    """(sum, sum of magnitudes) of weight times tensor, in 64 bits of mantissa."""
    total, size = np.zeros(shape, np.longdouble), np.zeros(shape, np.longdouble)
    for w, t in terms:
        if w != 0:
            product = np.longdouble(w) * t.detach().double().numpy().astype(np.longdouble)
            total, size = total + product, size + abs(product)
    return total, size


def assert_exact(got, terms, x, ulps):
    """As conftest.assert_sum_exact, for whole arrays; where a term is NaN the result is, and nowhere else."""
    double = torch.float64 in (x.dtype, *(t.dtype for w, t in terms if w != 0))
    with np.errstate(invalid="ignore"):  # infinities, where the dtype overflows
        _assert_exact(got, [(w, t) for w, t in terms if double or abs(w) > 2.0**-150], x, ulps, double)


def _assert_exact(got, terms, x, ulps, double):
    exact, size = exactly(terms, tuple(x.shape))
    bound = ulps * (2.0**-53 if double else 2.0**-24) * size
    # An intermediate of the kernels is float32 (float64): its underflow is the smallest of that.
    bound += (
        HALF_ULP[x.dtype] * (abs(exact) + bound)
        + SMALLEST[x.dtype]
        + ulps * SMALLEST[torch.float64 if double else torch.float32]
    )
    got = got.double().numpy().astype(np.longdouble)
    limit = torch.finfo(x.dtype).max if not double else math.inf
    limit = min(limit, 3e38 if not double else 1e308, torch.finfo(x.dtype).max)
    inside = np.isfinite(exact) & (size < limit * 0.9)
    assert (abs(got - exact) <= bound)[inside].all(), (got, exact, bound)
    assert (np.isnan(got) == np.isnan(exact))[np.isnan(exact) | inside].all()


@FUZZ
@given(case=step_arguments())
def test_steps(case):
    plan, a, valid = case
    generator = a.get("generator")
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    torch.manual_seed(1)
    before = [t.clone() if isinstance(t, torch.Tensor) and t.layout == torch.strided else t for t in (a["x"], a.get("out"))]
    history = [t.clone() if isinstance(t, torch.Tensor) else t for t in a["history"]] if isinstance(a["history"], list) else []
    guidance = a.get("guidance")
    if isinstance(guidance, tuple) and guidance and isinstance(guidance[0], torch.Tensor):
        guidance = (guidance[0].clone(), *guidance[1:])
    try:
        result = fast_step(plan, **a)
    except (ValueError, TypeError) as error:
        assert not valid and documented(error, STEP_NAMES), error
        assert state is None or torch.equal(state, generator.get_state())
        for was, name in zip(before, ("x", "out"), strict=True):
            if isinstance(was, torch.Tensor) and was.layout == torch.strided and was.device.type == "cpu":
                assert torch.equal(torch.nan_to_num(was), torch.nan_to_num(a[name]))
        return
    x, i = before[0], int(a["i"])
    if x.is_meta:
        assert result.is_meta and result.shape == x.shape
        return
    row, noise = plan.rows[i], a.get("noise")
    if row.w_noise == 0:
        noise = None
    elif a.get("seed") is not None:
        noise = whole_noise(x, a, plan.first_step + i)
    elif noise is None:
        drawn = torch.Generator()
        drawn.set_state(state) if state is not None else drawn.manual_seed(1)
        noise = torch.randn(x.shape, dtype=x.dtype, generator=drawn)
        after = generator.get_state() if state is not None else torch.get_rng_state()
        assert torch.equal(after, drawn.get_state())
    if a.get("prediction_type") is not None:
        if guidance is not None and isinstance(guidance[1], torch.Tensor):  # a scale for each sample, which another test holds
            return
        result, denoised = result
        p_x, p_m = plan.predicting(a["prediction_type"]).rows[i].prediction
        terms = [(p_x, x), (p_m, history[0])]
        if guidance is not None:
            terms[1:] = [(p_m * guidance[1], history[0]), (p_m * (1 - guidance[1]), guidance[0])]
        assert denoised.dtype == x.dtype
        assert_exact(denoised, terms, x, 6)
        history[0] = denoised
    assert result.shape == x.shape and result.dtype == x.dtype
    if a.get("out") is None:
        assert not x.numel() or result.data_ptr() not in [
            t.data_ptr() for t in (a["x"], *a["history"]) if isinstance(t, torch.Tensor) and t.layout == torch.strided
        ]
    else:
        assert result.data_ptr() == a["out"].data_ptr()
    drawn = [] if noise is None else [(row.w_noise, noise)]
    assert_exact(result, [(row.w_x, x), *zip(row.w_d, history, strict=False), *drawn], x, plan.order + 3)


def whole_noise(x, a, step):
    """The portable noise of a step: of the whole samples, of which x may be a shard."""
    if a.get("global_shape") is None:
        return portable_noise(x.shape, a["seed"], step=step)
    whole = portable_noise((x.shape[0], *a["global_shape"]), a["seed"], step=step)
    return whole[(slice(None), *(slice(s, s + n) for s, n in zip(a["global_start"], x.shape[1:], strict=True)))]


@FUZZ
@given(data=st.data())
def test_mixed_batches(data):
    """A sample at its own step of its own plan has the bits of that step alone, and of the reference within the bound."""
    draw = data.draw
    plans = [plan_or_none(draw(plan_arguments(wrong=False))) for _ in range(draw(st.integers(1, 3)))]
    plans = [plan for plan in plans if plan is not None] or [er_sde_plan([3, 2, 1, 0])]
    table, batch, dtype = stack_plans(plans), draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES))
    shape = (batch, *draw(st.lists(st.integers(0, 4), max_size=2)))
    which = [draw(st.integers(0, len(plans) - 1)) for _ in range(batch)]
    steps = [draw(st.integers(-1 if draw(st.integers(1, 9)) == 1 else 0, 8)) for _ in range(batch)]
    valid = all(0 <= step < plans[w].num_steps for w, step in zip(which, steps, strict=True))
    x, history = draw(tensors(shape, dtype)), [draw(tensors(shape, dtype)) for _ in range(table.order)]
    seeds = [(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**48 - 1))) for _ in range(batch)]
    index = torch.tensor(which), torch.tensor(steps)
    try:
        got = fast_step(table, index, x, history, seed=seeds)
    except (ValueError, TypeError) as error:
        assert not valid and documented(error, STEP_NAMES), error
        return
    assert valid
    for b in range(batch):
        one = slice(b, b + 1)
        alone = fast_step(plans[which[b]], steps[b], x[one], [d[one] for d in history], seed=seeds[one])
        assert torch.equal(torch.nan_to_num(got[one]), torch.nan_to_num(alone))
    same = reference_step(table, index, x, history, seed=seeds)
    assert torch.equal(same.isnan(), got.isnan())


@FUZZ
@given(data=st.data())
def test_noise(data):
    """The stream depends on (seed, sample, step, position) alone; what it cannot draw is refused."""
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    batch = shape[0] if shape else 1
    pair = st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 2**48 - 1))
    seed = some(
        draw, st.lists(pair, min_size=batch, max_size=batch), st.sampled_from(WRONG), st.lists(st.integers(), max_size=5)
    )
    step, dtype = draw(st.integers(-(2**40), 2**40)), draw(st.sampled_from(DTYPES))
    try:
        z = portable_noise(shape, seed, step=step, dtype=dtype)
    except (ValueError, TypeError) as error:
        assert documented(error, ["seed"]), error
        return
    assert z.shape == shape and z.dtype == dtype and z.isfinite().all() and (z.abs() < 7).all()
    if shape and batch and isinstance(seed, list) and isinstance(seed[0], tuple):
        b = draw(st.integers(0, batch - 1))
        word = [(seed[b][0] % 2**64, seed[b][1])]
        assert torch.equal(z[b : b + 1], portable_noise((1, *shape[1:]), word, step=step % 2**32, dtype=dtype))


@FUZZ
@given(arguments=plan_arguments(), data=st.data())
def test_runs(arguments, data):
    """The sampler is its steps; levels are placed between the ends, or refused; the log-density is that of the step's Gaussian."""
    draw = data.draw
    sigmas = arguments["sigmas"]
    options = {
        k: v
        for k, v in arguments.items()
        if k in ("process", "method", "node_scale", "integration_points", "s_noise", "eta", "sigma_data", "noise_scaler")
    }
    plan = plan_or_none(arguments if "alphas" not in arguments else {k: v for k, v in arguments.items() if k != "alphas"})
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = lambda x, sigma: 0.5 * x / (1 + sigma.view(-1, 1).to(x.dtype))  # noqa: E731
    try:
        got = sample_er_sde(model, x, sigmas, disable=True, max_stage=arguments["order"], seed=5, **options)
    except (ValueError, TypeError) as error:
        assert plan is None or arguments["noise_scaler"] is None, error
        assert documented(error, PLAN_NAMES), error
        return
    if plan is None or not isinstance(plan, Plan):
        assert arguments["noise_scaler"] is None  # which the sampler takes for the default
        return
    expected, history = x, []
    for i in range(plan.num_steps):
        history = [model(expected, plan.sigmas[i].expand(2)), *history[: plan.order - 1]]
        before, expected = expected, fast_step(plan, i, expected, history, seed=5)
    assert torch.equal(torch.nan_to_num(got), torch.nan_to_num(expected))
    i = plan.num_steps - 1
    if plan.rows[i].w_noise > 0 and expected.isfinite().all():
        log_p = step_log_prob(plan, i, before, history, expected)
        mean = fast_step(plan, i, before, history, noise=torch.zeros_like(x))
        sigma = plan.rows[i].w_noise
        exact = torch.distributions.Normal(mean, sigma).log_prob(expected).sum(1)
        row = plan.rows[i]
        terms = sum(abs(w) * d.abs() for w, d in [(row.w_x, before), *zip(row.w_d, history, strict=False)]) + expected.abs()
        wrong = (plan.order + 4) * 2.0**-52 * terms / sigma  # of the standardised distance, by rounding of the mean
        slack = (2 * wrong * ((expected - mean) / sigma).abs() + wrong**2).sum(1) + 1e-12 * (1 + exact.abs())
        assert ((log_p - exact).abs() <= slack).all() or not exact.isfinite().all()
    count = draw(st.integers(1, 12))
    try:
        placed = place_sigmas(model, x, sigmas, count, process=arguments["process"])
    except ValueError as error:
        assert documented(error, ["num_steps", "sigmas", "model"]), error
        return
    assert len(placed) == count + 1 and (placed.diff() <= 0).all() and placed[0] == plan.sigmas[0]
