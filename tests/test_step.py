"""The fused step: every backend within the error bound of exact arithmetic, its properties, and what it refuses."""

import itertools
import math
import random

import pytest
import torch

import ersde_fast
from conftest import assert_step_exact, assert_sum_exact
from ersde_fast import er_sde_plan, fast_step, portable_noise, reference_step, stack_plans
from ersde_fast.backends import CPU
from ersde_fast.noise import seed_table, specified_noise
from ersde_fast.predictions import PREDICTION_TYPES

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PLANS = {n: er_sde_plan([9, 8, 6.5, 5, 4, 3, 0], order=n, method="newton") for n in (1, 2, 3, 4, 5)}
ODE = er_sde_plan([9, 8, 6.5, 5, 4, 3, 0], noise_scaler="ode")


def inputs(shape, n, dtype=torch.float32, other=None, seed=0):
    """x, history, noise of a shape; predictions and noise in another dtype if one is named."""
    g = torch.Generator("cpu").manual_seed(seed)
    x, *rest = (torch.randn(shape, generator=g, dtype=torch.float64, device="cpu").to(here()) for _ in range(n + 2))
    rest = [r.to(other or dtype) for r in rest]
    return x.to(dtype) * 5, rest[:n], rest[n]


def here():
    """The device of the backend under test."""
    return torch.get_default_device()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("order", PLANS)
def test_every_dtype_and_order(backend, dtype, other, order):
    plan = PLANS[order]
    x, history, noise = inputs((2, 3, 7), order, dtype, other)
    for z in (noise, None):
        the_plan = (
            plan if z is not None else er_sde_plan([9, 8, 6.5, 5, 4, 3], order=order, method="newton", noise_scaler="ode")
        )
        result = fast_step(the_plan, 4, x, history, noise=z, backend=backend)
        assert_step_exact(result, the_plan, 4, x, history, z)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "cropped": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout(backend, layout, other, dtype):
    x, history, noise = inputs((2, 3, 5, 6), 3, dtype)
    x, history, noise = LAYOUTS[layout](x), [LAYOUTS[other](d) for d in history], LAYOUTS[layout](noise)
    result = fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend)
    assert_step_exact(result, PLANS[3], 4, x, history, noise)
    if layout in ("contiguous", "channels_last", "transposed"):
        assert result.stride() == x.stride()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size(backend, size, dtype):
    x, history, noise = inputs((size,), 3, dtype)
    assert_step_exact(fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend), PLANS[3], 4, x, history, noise)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 0), (1, 1, 1, 1), (2, 1, 3, 1, 2, 1, 2), (2,) * 9])
def test_every_number_of_dimensions(backend, shape):
    x, history, noise = inputs(shape, 3)
    assert_step_exact(fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend), PLANS[3], 4, x, history, noise)


def test_more_dimensions_than_the_kernel_holds():
    """Strides that merge nowhere, in 13 dimensions: the reference path takes over."""
    x, history, noise = inputs((2,) * 13, 3)
    x = x.permute(*range(0, 13, 2), *range(1, 13, 2))
    history = [d.permute(*reversed(range(13))) for d in history]
    result = fast_step(PLANS[3], 4, x, history, noise=noise)
    torch.testing.assert_close(result, reference_step(PLANS[3], 4, x, history, noise=noise))


def test_an_expanded_input(backend):
    x, history, _ = inputs((4, 3, 5), 3)
    noise = torch.randn(1, 1, 5).expand(4, 3, 5)
    history[1] = history[1][:1].expand(4, 3, 5)
    assert_step_exact(fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend), PLANS[3], 4, x, history, noise)


def test_every_step_of_a_run(backend):
    for plan in (*PLANS.values(), ODE):
        for i in range(plan.num_steps):
            x, history, noise = inputs((5, 9), plan.order, seed=i)
            result = fast_step(plan, i, x, history[: i + 1], noise=noise, backend=backend)
            assert_step_exact(result, plan, i, x, history, noise)


def test_large_and_threaded(backend):
    """More elements than one thread takes, against float64; and the bits do not depend on the threads or the split."""
    x, history, noise = inputs((3, 50_001), 3)
    result = fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend)
    w_x, w_d, w_noise, *_ = PLANS[3].rows[4]
    terms = [w_x * x.double(), *(w * d.double() for w, d in zip(w_d, history, strict=True)), w_noise * noise.double()]
    exact, size = sum(terms), sum(t.abs() for t in terms)
    assert ((result.double() - exact).abs() <= 6 * 2.0**-24 * size + 2.0**-24 * exact.abs()).all()
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert torch.equal(fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend), result)
    finally:
        torch.set_num_threads(threads)
    rows = [fast_step(PLANS[3], 4, x[b], [d[b] for d in history], noise=noise[b], backend=backend) for b in range(3)]
    assert torch.equal(torch.stack(rows), result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits(dtype):
    x, history, noise = inputs((5, 1037), 5, dtype)
    results = []
    for number in (1, 2, 3):
        if CPU.kernels.use_instruction_set(number):
            results.append(fast_step(PLANS[5], 4, x, history, noise=noise, backend="cpu"))
    assert CPU.kernels.use_instruction_set(0)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_as_torch_rounds(dtype):
    """Every value of the type goes through unchanged, and float32 values round as torch's cast does."""
    plan = er_sde_plan([2.0, 1.0, 0.0], order=1)  # the last step is the prediction itself
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    x = torch.zeros(65536, dtype=dtype)
    result = fast_step(plan, 1, x, [every], backend="cpu")
    assert torch.equal(result[~every.isnan()].view(torch.int16), every[~every.isnan()].view(torch.int16))
    assert torch.equal(result.isnan(), every.isnan())
    between = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    result = fast_step(plan, 1, torch.zeros(200_000, dtype=dtype), [between], backend="cpu")
    assert torch.equal(result.nan_to_num(), between.to(dtype).nan_to_num())


def test_the_last_step_is_the_prediction_and_no_alias(backend):
    x, history, _ = inputs((2, 5), 3)
    result = fast_step(PLANS[3], 5, x, history, backend=backend)
    assert torch.equal(result, history[0]) and result.data_ptr() != history[0].data_ptr()


def test_terms_of_weight_zero_are_not_read(backend):
    x, history, noise = inputs((2, 5), 3)
    nan = torch.full_like(x, math.nan)
    first = fast_step(PLANS[3], 0, x, [history[0], nan, nan], noise=noise, backend=backend)
    assert torch.equal(first, fast_step(PLANS[3], 0, x, history[:1], noise=noise, backend=backend))
    last = fast_step(PLANS[3], 5, nan, [history[0], nan, nan], noise=nan, backend=backend)
    assert torch.equal(last, history[0])
    assert torch.equal(
        fast_step(ODE, 3, x, history, noise=nan, backend=backend), fast_step(ODE, 3, x, history, backend=backend)
    )


def test_nan_only_where_it_was(backend):
    x, history, noise = inputs((3, 41), 3)
    clean = fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend)
    x[1, 7] = history[2][0, 40] = noise[2, 16] = math.nan
    result = fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend)
    bad = torch.zeros_like(x, dtype=torch.bool)
    bad[1, 7] = bad[0, 40] = bad[2, 16] = True
    assert torch.equal(result.isnan(), bad) and torch.equal(result[~bad], clean[~bad])


# ---- out ----


@pytest.mark.parametrize("target", ["new", "x", "history", "noise", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out(backend, target, dtype):
    x, history, noise = inputs((3, 700), 3, dtype)
    expected = fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend)
    out = {"new": torch.empty_like(x), "x": x, "history": history[1], "noise": noise, "strided": x.new_empty(700, 3).t()}[
        target
    ]
    assert fast_step(PLANS[3], 4, x, history, noise=noise, out=out, backend=backend) is out
    assert torch.equal(out, expected)


def test_out_between_the_elements_of_x(backend):
    """Interleaved memory shares no element, so it is no overlap."""
    pair = torch.randn(40)
    x, out = pair[::2], pair[1::2]
    _, history, noise = inputs((20,), 3)
    expected = reference_step(PLANS[3], 4, x, history, noise=noise)
    fast_step(PLANS[3], 4, x, history, noise=noise, out=out, backend=backend)
    torch.testing.assert_close(out, expected)


# ---- torch's noise ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_what_torch_would_draw(backend, dtype):
    x, history, _ = inputs((2, 3, 5), 3, dtype)
    g, same = torch.Generator(here()).manual_seed(5), torch.Generator(here()).manual_seed(5)
    result = fast_step(PLANS[3], 4, x, history, generator=g, backend=backend)
    noise = torch.randn(x.shape, dtype=dtype, generator=same)
    assert torch.equal(result, fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend))
    assert torch.equal(g.get_state(), same.get_state())


def test_without_a_source_torchs_default_generator_draws(backend):
    x, history, _ = inputs((2, 5), 3)
    torch.manual_seed(3)
    result = fast_step(PLANS[3], 4, x, history, backend=backend)
    torch.manual_seed(3)
    assert torch.equal(result, fast_step(PLANS[3], 4, x, history, noise=torch.randn(2, 5), backend=backend))


@pytest.mark.parametrize("plan, i", [(ODE, 2), (PLANS[3], 5), (er_sde_plan([3, 2, 1], s_noise=0), 0)])
def test_nothing_is_drawn_where_no_noise_is_added(backend, plan, i):
    x, history, _ = inputs((2, 5), 3)
    g = torch.Generator(here()).manual_seed(5)
    state = torch.cuda.get_rng_state if here().type == "cuda" else torch.get_rng_state
    before = g.get_state(), state()
    fast_step(plan, i, x, history, generator=g, backend=backend)
    fast_step(plan, i, x, history, backend=backend)
    assert torch.equal(g.get_state(), before[0]) and torch.equal(state(), before[1])


# ---- portable noise ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_portable_noise_in_the_step(backend, dtype, layout):
    """The step draws what portable_noise gives, by the logical position, whatever the strides and dtype."""
    x, history, _ = inputs((3, 2, 5, 7), 3, dtype)
    noise = portable_noise(x.shape, 77, step=4, device=x.device)
    assert noise.dtype == torch.float32
    x = LAYOUTS[layout](x)
    result = fast_step(PLANS[3], 4, x, history, seed=77, backend=backend)
    assert_step_exact(result, PLANS[3], 4, x, history, noise)
    assert torch.equal(result, fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend))
    assert torch.equal(result, fast_step(PLANS[3], 4, x, history, seed=[(77, 0), (77, 1), (77, 2)], backend=backend))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (2, 0), (0, 3), (3, 4097), (2, 1, 1, 1), (1, 1, 3, 3)])
def test_portable_noise_of_any_shape(backend, shape):
    x, history, _ = inputs(shape, 3)
    result = fast_step(PLANS[3], 4, x, history, seed=-3, backend=backend)
    assert torch.equal(
        result, fast_step(PLANS[3], 4, x, history, noise=portable_noise(shape, -3, step=4, device=x.device), backend=backend)
    )


def test_the_plans_first_step_counts(backend):
    x, history, _ = inputs((2, 5), 3)
    whole, rest = PLANS[1], PLANS[1].starting_at(2)
    assert torch.equal(
        fast_step(whole, 3, x, history, seed=9, backend=backend), fast_step(rest, 1, x, history, seed=9, backend=backend)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_split_gives_the_same_bits(backend, dtype):
    """A batch in any parts and any order, and a sample in any shards."""
    shape = (3, 4, 9, 70)
    x, history, _ = inputs(shape, 3, dtype)
    whole = fast_step(PLANS[3], 4, x, history, seed=[5, 6, 7], backend=backend)
    order = [2, 0, 1]
    mixed = fast_step(PLANS[3], 4, x[order], [d[order] for d in history], seed=[7, 5, 6], backend=backend)
    assert torch.equal(mixed, whole[order])
    rng = random.Random(1)
    for _ in range(20):
        start = [rng.randrange(n) for n in shape[1:]]
        size = [rng.randint(1, n - s) for n, s in zip(shape[1:], start, strict=True)]
        part = (slice(None), *(slice(s, s + n) for s, n in zip(start, size, strict=True)))
        shard = fast_step(
            PLANS[3],
            4,
            x[part],
            [d[part] for d in history],
            seed=[5, 6, 7],
            global_shape=shape[1:],
            global_start=start,
            backend=backend,
        )
        assert torch.equal(shard, whole[part])


def test_a_shard_far_into_a_huge_sample(backend):
    x, history, _ = inputs((1, 3, 5), 3)
    where = dict(global_shape=(2**31, 1000), global_start=(2**31 - 3, 995))
    result = fast_step(PLANS[3], 4, x, history, seed=5, backend=backend, **where)
    noise = specified_noise((1, 3, 5), seed_table(5, 1), 4, *where.values()).to(x.device)
    assert torch.equal(result, fast_step(PLANS[3], 4, x, history, noise=noise, backend=backend))


# ---- from a model's output ----

SCALES = [None, 1.0, 3.5, torch.tensor([0.0, 7.5], dtype=torch.float64)]
PROCESSES = {
    "ve": er_sde_plan([9, 8, 6.5, 5, 4, 3, 0], sigma_data=0.5),
    "vp": er_sde_plan([0.99, 0.9, 0.8, 0.6, 0.5, 0.2, 0], process="vp", order=2, sigma_data=0.5),
    "flow": er_sde_plan(
        [1, 0.9, 0.8, 0.6, 0.6, 0.2, 0], process="flow", order=4, method="newton", noise_scaler="sde_2", sigma_data=0.5
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_a_models_output_becomes_the_prediction_and_then_the_step(backend, name, process, dtype):
    """In one pass, and as if one after the other: the prediction within its bound, the step that of the rounded prediction."""
    plan = PROCESSES[process]
    x, (output, *older), unconditional = inputs((2, 3, 7) if process == "ve" else (2, 4, 8), 4, dtype)
    for i, scale in itertools.product((0, 3, 4, 5), SCALES):
        if name == "epsilon" and plan.alphas[i] == 0:
            continue
        scale = scale.to(here()) if isinstance(scale, torch.Tensor) else scale
        guidance = None if scale is None else (unconditional, scale)
        result, denoised = fast_step(
            plan, i, x, [output, *older], seed=5, prediction_type=name, guidance=guidance, backend=backend
        )
        p_x, p_m = plan.predicting(name).rows[i].prediction
        for b in range(2):
            g = 1.0 if scale is None else scale if isinstance(scale, float) else scale[b].item()
            terms = [(p_x, x[b]), (p_m * g, output[b]), (p_m * (1 - g), unconditional[b])]
            assert_sum_exact(denoised[b], terms, x[b], ulps=5)
        assert torch.equal(result, fast_step(plan, i, x, [denoised, *older], seed=5, backend=backend))
        assert denoised.data_ptr() not in (x.data_ptr(), output.data_ptr(), result.data_ptr())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", DTYPES)
def test_a_models_output_of_any_layout_and_dtype(backend, layout, other):
    x, history, unconditional = inputs((2, 3, 5, 6), 3, torch.float32, other)
    x, unconditional = LAYOUTS[layout](x), LAYOUTS[layout](unconditional)
    result, denoised = fast_step(
        PROCESSES["vp"], 3, x, history, seed=5, prediction_type="v", guidance=(unconditional, 2.0), backend=backend
    )
    p_x, p_m = PROCESSES["vp"].predicting("v").rows[3].prediction
    assert_sum_exact(denoised, [(p_x, x), (p_m * 2, history[0]), (-p_m, unconditional)], x, ulps=5)
    expected = fast_step(PROCESSES["vp"], 3, x, [denoised, *history[1:]], seed=5, backend=backend)
    torch.testing.assert_close(result, expected, rtol=0, atol=0 if other == torch.float32 else 1e-6)
    assert denoised.stride() == torch.empty_like(x).stride()


def test_what_a_model_output_does_not_need_is_not_read(backend):
    x, history, _ = inputs((2, 5), 3)
    nan = torch.full_like(x, math.nan)
    _, denoised = fast_step(ODE, 3, x, history, prediction_type="sample", guidance=(nan, 1.0), backend=backend)
    assert torch.equal(denoised, history[0])
    last, denoised = fast_step(PLANS[3], 5, nan, history, prediction_type="sample", backend=backend)
    assert torch.equal(last, history[0]) and torch.equal(denoised, history[0])


@pytest.mark.parametrize("target", ["x", "output", "unconditional", "new"])
def test_out_with_a_models_output(backend, target):
    x, history, unconditional = inputs((3, 700), 3)
    kwargs = dict(seed=5, prediction_type="v", guidance=(unconditional, 2.0), backend=backend)
    expected = fast_step(PROCESSES["vp"], 3, x, history, **kwargs)
    out = {"x": x, "output": history[0], "unconditional": unconditional, "new": torch.empty_like(x)}[target]
    result, denoised = fast_step(PROCESSES["vp"], 3, x, history, out=out, **kwargs)
    assert result is out and torch.equal(out, expected[0]) and torch.equal(denoised, expected[1])


# ---- the index of the step as a tensor ----


def test_a_step_by_a_tensor_is_the_step_by_its_number(backend):
    for i in range(6):
        x, history, _ = inputs((2, 5), 3, seed=i)
        for device in ("cpu", x.device):
            index = torch.tensor(i, device=device)
            assert torch.equal(
                fast_step(PLANS[3], index, x, history, seed=5, backend=backend),
                fast_step(PLANS[3], i, x, history, seed=5, backend=backend),
            )


# ---- samples at their own steps of their own plans ----

STACK = [PLANS[3], PROCESSES["vp"], PROCESSES["flow"], ODE, PLANS[1].starting_at(2)]


def mixed_batch(shape, dtype, seed=0):
    """Which plan and step each sample follows, its inputs with NaN where its step does not read, and its seed."""
    x, history, unconditional = inputs(shape, 4, dtype, seed=seed)
    rng = random.Random(seed)
    plans = [rng.randrange(len(STACK)) for _ in range(shape[0])]
    steps = [rng.randrange(STACK[p].num_steps) for p in plans]
    for b, (p, i) in enumerate(zip(plans, steps, strict=True)):
        for j in range(max(1, len(STACK[p].rows[i].w_d)), 4):
            history[j][b] = math.nan
    return plans, steps, x, history, unconditional, [(rng.randrange(2**64), rng.randrange(99)) for _ in plans]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 8, 8), (6, 1024), (3, 4099), (1, 40), (0, 3), (2, 0)])
@pytest.mark.parametrize("predicts", [False, True])
def test_a_sample_in_a_mixed_batch_has_the_bits_it_has_alone(backend, shape, dtype, predicts):
    stack = stack_plans(STACK).to(here())
    plans, steps, x, history, unconditional, seeds = mixed_batch(shape, dtype)
    index = torch.tensor(plans, dtype=torch.int64), torch.tensor(steps, dtype=torch.int64)
    scales = torch.linspace(0, 3, len(plans), dtype=torch.float64)
    kwargs = dict(prediction_type="v", guidance=(unconditional, scales)) if predicts else {}
    result = fast_step(stack, index, x, history, seed=seeds, backend=backend, **kwargs)
    result = result if predicts else (result,)
    assert not any(r.isnan().any() for r in result)
    for b, (p, i) in enumerate(zip(plans, steps, strict=True)):
        one = slice(b, b + 1)
        kwargs = dict(prediction_type="v", guidance=(unconditional[one], scales[b].item())) if predicts else {}
        alone = fast_step(STACK[p], i, x[one], [d[one] for d in history], seed=[seeds[b]], backend=backend, **kwargs)
        assert all(torch.equal(r[one], a) for r, a in zip(result, alone if predicts else (alone,), strict=True)), b


def test_a_mixed_batch_with_noise_of_its_own_and_strides(backend):
    stack = stack_plans(STACK).to(here())
    plans, steps, x, history, noise, _ = mixed_batch((4, 3, 8, 8), torch.float32, seed=3)
    x, noise = LAYOUTS["channels_last"](x), LAYOUTS["every second"](noise)
    index = torch.tensor(plans), torch.tensor(steps)
    result = fast_step(stack, index, x, history, noise=noise, backend=backend)
    for b, (p, i) in enumerate(zip(plans, steps, strict=True)):
        assert_step_exact(result[b], STACK[p], i, x[b], [d[b] for d in history], noise[b])


def test_a_mixed_batch_needs_no_more_history_than_its_samples_use():
    """Where the host knows the steps: requests that all begin have one prediction, whatever the plans' order."""
    stack, index = stack_plans(STACK[:3]), (torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64))
    x, history, _ = inputs((3, 40), 4)
    assert torch.equal(fast_step(stack, index, x, history[:1], seed=5), fast_step(stack, index, x, history, seed=5))
    with pytest.raises(ValueError, match="history must hold the 2 newest predictions"):
        fast_step(stack, (index[0], torch.tensor([0, 1, 0])), x, history[:1], seed=5)


def test_a_sample_of_a_mixed_batch_is_summed_as_widely_as_with_others(backend):
    """Where some predictions are float64, whether or not its own step reads those; and where a gradient is wanted."""
    x, (a, b, c), _ = inputs((2, 333), 3)
    history, index = [a, b, c.double()], (torch.tensor([0, 0]), torch.tensor([1, 4]))
    stack = stack_plans([PLANS[3]]).to(here())
    index = tuple(t.to(here()) for t in index)
    whole = fast_step(stack, index, x, history, seed=[5, 6], backend=backend)
    alone = fast_step(stack, tuple(t[:1] for t in index), x[:1], [d[:1] for d in history], seed=[5], backend=backend)
    assert torch.equal(whole[:1], alone)
    followed = fast_step(stack, tuple(t[:1] for t in index), x[:1].clone().requires_grad_(), [d[:1] for d in history], seed=[5])
    torch.testing.assert_close(followed, alone, rtol=0, atol=0)


def test_a_mixed_batch_of_runs_without_noise_needs_no_source(backend):
    stack, index = stack_plans([ODE, ODE.starting_at(2)]).to(here()), (torch.tensor([0, 1, 0]), torch.tensor([3, 3, 0]))
    x, history, _ = inputs((3, 40), 3)
    result = fast_step(stack, index, x, history, backend=backend)
    for b, (plan, i) in enumerate([(ODE, 3), (ODE.starting_at(2), 3), (ODE, 0)]):
        one = slice(b, b + 1)
        assert torch.equal(result[one], fast_step(plan, i, x[one], [d[one] for d in history], backend=backend))


# ---- where no gradient is wanted (derivatives: test_ops.py) ----


def test_without_grad_mode_the_kernel_runs_and_the_result_needs_no_gradient():
    x, history, noise = inputs((2, 5), 3)
    x.requires_grad_()
    with torch.no_grad():
        assert not fast_step(PLANS[3], 4, x, history, noise=noise).requires_grad


# ---- bad input ----

X, HISTORY, NOISE = inputs((2, 6), 3)
OVERLAPPING = torch.zeros(13)
ZEROS = torch.zeros(2, dtype=torch.int64)
STACKED = dict(plan=stack_plans([PLANS[3], PLANS[3].starting_at(2)]), seed=1)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(i=6), ValueError, r"i must be 0 to 5 \(the plan has 6 steps\), got 6"),
        (dict(i=-1), ValueError, r"i must be 0 to 5 .* got -1"),
        (dict(i=1.0), TypeError, r"i must be a whole number.* got 1.0"),
        (dict(i=torch.tensor(6)), ValueError, r"i must be 0 to 5 .* got 6"),
        (dict(i=torch.tensor([1])), TypeError, r"i must be an int64 tensor of shape \(\), got torch.int64 \(1,\)"),
        (dict(i=torch.tensor(1.0)), TypeError, r"i must be an int64 tensor of shape \(\), got torch.float32"),
        (dict(i=(0, 1)), TypeError, r"plan must be a plan of er_sde_plan, or a stack of them with i = \(plan_index, step_index\)|plan must be a stack"),
        (dict(plan=None), TypeError, r"plan must be a plan of er_sde_plan.* got NoneType"),
        (dict(plan=stack_plans([ODE])), TypeError, r"plan must be a plan of er_sde_plan, or a stack.* got PlanStack"),
        (dict(STACKED, i=(ZEROS, ZEROS, ZEROS)), ValueError, r"i must be a pair \(plan_index, step_index\), got 3 values"),
        (dict(STACKED, i=(ZEROS, torch.tensor([0, 6]))), ValueError, r"step_index must be 0 to 5, got \[0, 6\]"),
        (dict(STACKED, i=(torch.tensor([0, -1]), ZEROS)), ValueError, r"plan_index must be 0 to 1, got \[0, -1\]"),
        (dict(STACKED, i=(torch.tensor([0, 1]), torch.tensor([0, 4]))), ValueError, r"step_index\[1\] = 4 is behind the last step of plan 1"),
        (dict(STACKED, i=([0, 1], ZEROS)), TypeError, r"plan_index must be an int64 tensor of shape \(2,\), got \[0, 1\]"),
        (dict(STACKED, i=(ZEROS, ZEROS[:1])), TypeError, r"step_index must be an int64 tensor of shape \(2,\), got torch.int64 \(1,\)"),
        (dict(STACKED, i=(ZEROS, ZEROS), seed=None), ValueError, r"seed or noise is needed where samples follow plans of their own"),
        (dict(STACKED, i=(ZEROS, torch.tensor([0, 4])), history=HISTORY[:2]), ValueError, r"history must hold the 3 newest predictions, got 2"),
        (dict(prediction_type="eps"), ValueError, r"prediction_type must be None or one of 'sample', 'epsilon', 'v', 'flow', 'edm', got 'eps'"),
        (dict(prediction_type=["v"]), ValueError, r"prediction_type must be None or one of .* got \['v'\]"),
        (dict(guidance=(NOISE, 2.0)), ValueError, r"guidance needs a prediction_type"),
        (dict(prediction_type="v", guidance=NOISE), TypeError, r"guidance must be a pair \(unconditional output, scale\), got Tensor"),
        (dict(prediction_type="v", guidance=(NOISE[:1], 2.0)), ValueError, r"guidance\[0\] must have the shape of x"),
        (dict(prediction_type="v", guidance=(NOISE, "2")), TypeError, r"guidance\[1\] must be a finite number or float64 \[batch\], got '2'"),
        (dict(prediction_type="v", guidance=(NOISE, True)), TypeError, r"guidance\[1\] must be a finite number or float64 \[batch\], got True"),
        (dict(prediction_type="v", guidance=(NOISE, math.inf)), TypeError, r"guidance\[1\] must be a finite number"),
        (dict(prediction_type="v", guidance=(NOISE, 10**400), out=None), TypeError, r"guidance\[1\] must be a finite number"),
        (dict(prediction_type="v", guidance=(NOISE, torch.ones(2))), ValueError, r"guidance\[1\] must be a number or float64 \[2\].* got torch.float32 \(2,\)"),
        (dict(plan=PROCESSES["flow"], i=0, prediction_type="epsilon"), ValueError, r'"epsilon" says nothing of the clean sample where alpha is 0, as at step 0'),
        (dict(plan=PROCESSES["flow"], i=torch.tensor(0), prediction_type="epsilon"), ValueError, r'"epsilon" says nothing of the clean sample where alpha is 0, as at step 0'),
        (dict(prediction_type="v", history=[]), ValueError, r"history must hold the 3 newest predictions at step 4, got 0"),
        (dict(i=5, prediction_type="v", history=[HISTORY[0].long()]), TypeError, r"history\[0\] must be float32"),
        (dict(return_log_prob=True, seed=1), ValueError, r"out must not be given with return_log_prob"),
        (dict(return_log_prob=True, i=5, out=None), ValueError, r"log_prob: step 5 adds no noise"),
        (dict(x=X.tolist()), TypeError, r"x must be a tensor, got list"),
        (dict(x=X.tolist(), seed=[1, 2]), TypeError, r"x must be a tensor, got list"),
        (dict(x=X.int()), TypeError, r"x must be float32, float64, bfloat16 or float16, got torch.int32"),
        (dict(x=X.to_sparse()), TypeError, r"x must be a strided tensor"),
        (dict(history=HISTORY[:2]), ValueError, r"history must hold the 3 newest predictions at step 4, got 2"),
        (dict(history=HISTORY[0]), TypeError, r"history must be a list of predictions, newest first, got Tensor"),
        (dict(history=[HISTORY[0], HISTORY[1].T, HISTORY[2]]), ValueError, r"history\[1\] must have the shape of x, \(2, 6\), got \(6, 2\)"),
        (dict(history=[HISTORY[0], HISTORY[1], HISTORY[2].long()]), TypeError, r"history\[2\] must be float32"),
        (dict(history=[HISTORY[0], HISTORY[1], None]), TypeError, r"history\[2\] must be a tensor, got NoneType"),
        (dict(history=[HISTORY[0].to("meta"), *HISTORY[1:]]), ValueError, r"history\[0\] must be on the device of x, cpu, got meta"),
        (dict(noise=NOISE[:1]), ValueError, r"noise must have the shape of x, \(2, 6\), got \(1, 6\)"),
        (dict(noise=NOISE.to(torch.complex64)), TypeError, r"noise must be float32"),
        (dict(noise=1.0), TypeError, r"noise must be a tensor, got float"),
        (dict(noise=NOISE, generator=torch.Generator()), ValueError, r"noise and generator were given: name one source"),
        (dict(generator=7), TypeError, r"generator must be a torch.Generator, got int"),
        (dict(torch_layout=(80,)), TypeError, r"torch_layout must be \(multiprocessors, threads of each\)"),
        (dict(torch_layout=(0, 2048)), ValueError, r"at least 1 multiprocessor of at least 256 threads, got \(0, 2048\)"),
        (dict(torch_layout=(80, 1536), seed=1), ValueError, r"torch_layout names torch's stream: give it without noise= and seed="),
        (dict(torch_layout=(80, 1536)), ValueError, r'backend "cuda" cannot run this step|x is on cpu'),
        (dict(seed=1, noise=NOISE), ValueError, r"noise and seed were given: name one source"),
        (dict(seed=1, generator=torch.Generator()), ValueError, r"generator and seed were given: name one source"),
        (dict(seed=[1]), ValueError, r"seed must be one number or 2, one for each sample of the batch, got 1"),
        (dict(seed=1.0), TypeError, r"seed must be a whole number or a list"),
        (dict(seed=True), TypeError, r"seed must be a whole number or a list"),
        (dict(global_shape=(9,), global_start=(0,)), ValueError, r"global_shape needs seed="),
        (dict(seed=1, global_shape=(9,)), ValueError, r"global_shape and global_start must be given together"),
        (dict(seed=1, global_shape=(9, 9), global_start=(0, 0)), ValueError, r"global_shape must have the 1 dimensions of one sample"),
        (dict(seed=1, global_shape=(9,), global_start=(4,)), ValueError, r"in dimension 0 of the sample x has 6 from 4, the whole has 9"),
        (dict(seed=1, global_shape=(9,), global_start=(-1,)), ValueError, r"global_start must leave x inside global_shape"),
        (dict(seed=1, global_shape=(2**42 + 1,), global_start=(0,)), ValueError, r"at most 2\^42 elements"),
        (dict(seed=1, global_shape=9, global_start=0), TypeError, r"global_shape must be a list or tuple of whole numbers, got 9"),
        (dict(seed=1, global_shape=(9,), global_start=(0,), out=None, history=HISTORY[:1]), ValueError, r"history must hold the 3"),
        (dict(seed=1, global_shape=(9,), global_start=(0,), out=None, torch_layout=(80, 1536)), ValueError, r"torch_layout names torch's"),
        (dict(seed=1, global_shape=(9,), global_start=(0,), out=None, log_prob_reduction="mean"), ValueError, r"needs return_log_prob"),
        (dict(out=torch.zeros(2, 5)), ValueError, r"out must have the shape of x"),
        (dict(out=torch.zeros(2, 6, dtype=torch.float64)), TypeError, r"out must have the dtype of x, torch.float32, got torch.float64"),
        (dict(out=torch.zeros(2, 1).expand(2, 6)), ValueError, r"out must not overlap itself"),
        (dict(out=torch.zeros(7).as_strided((2, 6), (1, 1))), ValueError, r"out must not overlap itself"),
        (dict(x=OVERLAPPING[:12].view(2, 6), out=OVERLAPPING[1:].view(2, 6)), ValueError, r"out overlaps x partly"),
        (dict(noise=OVERLAPPING[:12].view(2, 6), out=OVERLAPPING[1:].view(2, 6)), ValueError, r"out overlaps noise partly"),
        (dict(x=OVERLAPPING[:12].view(6, 2).T, out=OVERLAPPING[:12].view(2, 6)), ValueError, r"out overlaps x partly"),
        (dict(x=X.clone().requires_grad_(), out=torch.zeros(2, 6)), ValueError, r"out must not be given where a gradient"),
        (dict(backend="metal"), ValueError, r"backend must be one of cuda, triton, cpu, reference, got 'metal'"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    """The message names the argument; nothing is written and no generator advances."""
    arguments = {"plan": PLANS[3], "i": 4, "x": X, "history": HISTORY, **arguments}
    out = arguments.setdefault("out", torch.full((2, 6), 7.0))
    before, state = None if out is None else out.clone(), torch.get_rng_state()
    with pytest.raises(error, match=message):
        fast_step(**arguments)
    assert (out is None or torch.equal(out, before)) and torch.equal(torch.get_rng_state(), state)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(CPU, "kernels", None)
    monkeypatch.setattr(CPU, "why_no_kernels", "no compiler was found")
    assert ersde_fast.available_backends()["cpu"] == "no compiler was found"
    with pytest.raises(ValueError, match='backend "cpu" cannot run this step: no compiler was found'):
        fast_step(PLANS[3], 4, X, HISTORY, backend="cpu")


def test_without_the_extension_the_reference_runs(monkeypatch):
    expected = reference_step(PLANS[3], 4, X, HISTORY, noise=NOISE)
    monkeypatch.setattr(CPU, "kernels", None)
    monkeypatch.setattr(CPU, "why_no_kernels", "no compiler was found")
    monkeypatch.setenv("ERSDE_FAST_QUIET", "1")
    assert torch.equal(fast_step(PLANS[3], 4, X, HISTORY, noise=NOISE), expected)


@pytest.mark.parametrize("batch", [0, 3])
def test_a_tensor_is_no_pair_of_guidance(batch):
    """Not even one of two rows, whose second would pass for the samples' scales."""
    x = torch.zeros(batch, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"guidance must be a pair"):
        fast_step(ODE, 0, x, [x], prediction_type="v", guidance=torch.zeros(2, batch, dtype=torch.float64))


@pytest.mark.parametrize("index", [torch.tensor([[0, 2], [1, 3]]).unbind(1), (torch.tensor(0).expand(2), torch.tensor([2, 3]))])
def test_indices_and_scales_may_lie_anyhow(index):
    plans, (x, output, other, *older) = ersde_fast.stack_plans([PLANS[3], PLANS[3]]), torch.randn(5, 2, 7)
    scale = torch.tensor(5.0, dtype=torch.float64).expand(2)
    options = dict(seed=[1, 2], prediction_type="sample")
    result = fast_step(plans, index, x, [output, *older], guidance=(other, scale), **options)
    index, scale = tuple(i.contiguous() for i in index), scale.contiguous()
    expected = fast_step(plans, index, x, [output, *older], guidance=(other, scale), **options)
    assert all(map(torch.equal, result, expected))
