"""Run by test_cuda_source.py in a process of its own, under the sanitizers: the CUDA kernels as C++ against the CPU kernel.

`cuda_on_host` is the extension with those kernels in the place of the CPU's, behind the same binding.
"""

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_noise import EDGE_WORDS, MANY_SEEDS, many_normals

from conftest import noise_alone
from ersde_fast import er_sde_plan, fast_step, portable_noise, stack_plans, step_log_prob, torch_noise
from ersde_fast.backends import CPU, extension
from ersde_fast.noise import box_muller, seed_table, specified_noise

PATH = os.environ["ERSDE_CUDA_ON_HOST"]
spec = importlib.util.spec_from_file_location("_C", PATH)
cuda_on_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_on_host)
SETTINGS = ctypes.CDLL(PATH)
torch.set_num_threads(1)  # the whole step is one launch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 3, 4, 5, 7, 8, 9, 15, 17, 255, 257, 1023, 1024, 1025, 2047, 2049, 4095, 4097, 8191, 8193]
EXAMPLES = int(os.environ.get("ERSDE_EXAMPLES", 300))


def by_cuda(function, *args, **kwargs):
    """Calls a function of ersde_fast with the CUDA kernels behind it."""
    with mock.patch.object(CPU, "kernels", cuda_on_host):
        return function(*args, **kwargs)


def drawn_by_cuda(*args, **kwargs):
    """The noise of `noise_alone`."""
    return by_cuda(CPU.run, noise_alone(*args, **kwargs))


def offset_by(t, elements):
    """The same numbers at an address `elements` later: not aligned to 16 bytes."""
    return torch.cat([t.new_zeros(elements), t.flatten()])[elements:].view(t.shape)


@st.composite
def tensors(draw, count):
    """Tensors of one shape: the first of one dtype, the others of that or another, in one of several layouts."""
    dtype = draw(st.sampled_from(DTYPES))
    other = draw(st.sampled_from([dtype, dtype, dtype, *DTYPES]))
    batch, size = draw(st.integers(1, 3)), draw(st.sampled_from(SIZES))
    shape = (batch, size) if draw(st.booleans()) else (batch, 3, max(size // 100, 1), 5)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    made = [torch.randn(shape, generator=g).to(dtype if k == 0 else other) for k in range(count)]
    layout = draw(st.sampled_from(["plain", "plain", "plain", "offset", "strided", "channels_last"]))
    if layout == "offset":
        made = [offset_by(t, draw(st.integers(1, 7))) for t in made]
    elif layout == "strided":
        made = [t.repeat_interleave(2, -1)[..., ::2] for t in made]
    elif layout == "channels_last" and len(shape) == 4:
        made = [t.contiguous(memory_format=torch.channels_last) for t in made]
    SETTINGS.set_multiprocessors(draw(st.sampled_from([1, 2, 7])))
    return made


def plan_of(order, source="seed"):
    return er_sde_plan([9, 8, 6.5, 5, 4, 3], order=order, method="newton", noise_scaler="ode" if source == "none" else "sde_5")


def equal(result, expected):
    result, expected = [r if isinstance(r, tuple) else (r,) for r in (result, expected)]
    return all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from(["none", "noise", "seed", "seed"]), st.integers(0, 2**64 - 1))
def test_the_kernel_has_the_bits_of_the_cpu_kernel(data, order, source, seed):
    x, noise, unconditional, *history = data.draw(tensors(order + 3))
    kwargs = {"noise": dict(noise=noise), "seed": dict(seed=seed), "none": {}}[source]
    if data.draw(st.booleans()):
        kwargs["prediction_type"] = data.draw(st.sampled_from(["sample", "epsilon", "v", "flow"]))
        scale = data.draw(st.sampled_from([None, 1.0, 3.5, torch.linspace(0, 7, len(x), dtype=torch.float64)]))
        if scale is not None:
            kwargs |= {"guidance": (unconditional, scale), "cfg_pp": data.draw(st.booleans())}
    expected = fast_step(plan_of(order, source), 4, x, history, backend="cpu", **kwargs)
    out = data.draw(st.sampled_from([None, torch.empty_like(x), x]))
    assert equal(by_cuda(fast_step, plan_of(order, source), 4, x, history, out=out, **kwargs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["none", "noise", "seed"])
@pytest.mark.parametrize("order", [3, 4, 5])
def test_the_most_terms(order, source, dtype):
    """The output without the condition is a term of CFG++, and the noise one more."""
    x, noise, unconditional, *history = torch.randn(order + 3, 2, 256).to(dtype).unbind()
    kwargs = {"noise": dict(noise=noise), "seed": dict(seed=5), "none": {}}[source]
    kwargs |= {"prediction_type": "v", "guidance": (unconditional, 0.7), "cfg_pp": True}
    for i in (4, torch.tensor(4)):
        expected = fast_step(plan_of(order, source), i, x, history, backend="cpu", **kwargs)
        assert equal(by_cuda(fast_step, plan_of(order, source), i, x, history, **kwargs), expected)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(st.data(), st.booleans())
def test_samples_at_their_own_steps_of_their_own_plans(data, predicts):
    """Each with its row of the table in memory, its history's length and its counter; unread slots hold NaN."""
    x, unconditional, *history = data.draw(tensors(5))
    plans = [plan_of(3), er_sde_plan([7, 5, 2, 1, 0], order=2), er_sde_plan([3, 2, 1], noise_scaler="ode")]
    which = [data.draw(st.integers(0, 2)) for _ in x]
    steps = [data.draw(st.integers(0, plans[p].num_steps - 1)) for p in which]
    for b, (p, i) in enumerate(zip(which, steps, strict=True)):
        for j in range(max(len(plans[p].rows[i].w_d), 1 if predicts else 0), 3):
            history[j][b] = math.nan
    kwargs = dict(seed=[(5 + b, b) for b in range(len(x))])
    if predicts:
        kwargs |= dict(prediction_type="v", guidance=(unconditional, torch.linspace(0, 7, len(x), dtype=torch.float64)))
        kwargs["cfg_pp"] = data.draw(st.booleans())
    index = (torch.tensor(which), torch.tensor(steps))
    expected = fast_step(stack_plans(plans), index, x, history, backend="cpu", **kwargs)
    assert equal(by_cuda(fast_step, stack_plans(plans), index, x, history, **kwargs), expected)
    assert not expected[0].isnan().any()


@settings(max_examples=EXAMPLES // 3, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from(["noise", "seed"]), st.sampled_from(["sum", "mean"]))
def test_the_log_density_has_the_bits_of_the_cpu_kernel(data, order, source, reduction):
    """With the step, of a sample that is given, and its gradients."""
    x, noise, unconditional, x_next, *history = data.draw(tensors(order + 4))
    i = data.draw(st.sampled_from([4, torch.tensor(4)]))
    output = {}
    if data.draw(st.booleans()):
        output["prediction_type"] = data.draw(st.sampled_from(["sample", "epsilon", "v"]))
        scale = data.draw(st.sampled_from([None, 3.5, torch.linspace(0, 7, len(x), dtype=torch.float64)]))
        if scale is not None:
            output |= {"guidance": (unconditional, scale), "cfg_pp": data.draw(st.booleans())}
    plan = plan_of(order)

    def with_step():
        kwargs = {"noise": dict(noise=noise), "seed": dict(seed=5)}[source]
        return fast_step(plan, i, x, history, return_log_prob=True, log_prob_reduction=reduction, **kwargs, **output)

    def gradients():
        leaves = [t.detach().requires_grad_() for t in (x, unconditional, x_next, *history)]
        x_, guide, next_, *history_ = leaves
        guided = {"guidance": (guide, output["guidance"][1])} if "guidance" in output else {}
        result = step_log_prob(plan, i, x_, history_, next_, reduction=reduction, **output | guided)
        wanted = leaves if guided else [leaf for leaf in leaves if leaf is not guide]
        weights = torch.linspace(-1, 2, len(x), dtype=torch.float64)
        return result.detach(), *torch.autograd.grad(result, wanted, weights)

    for function in (with_step, gradients):
        assert equal(by_cuda(function), function())


@pytest.mark.parametrize("module", [cuda_on_host, extension._C])
@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("step", [-1, 5, 2**40])
def test_a_step_that_only_the_kernel_knows_and_that_does_not_exist_makes_nan(module, size, step):
    x, output = torch.randn(2, 1, size)
    ring = torch.zeros(3, 1, size)
    index = torch.tensor(step)
    result = module.step(
        plan_of(3).predicting("v").table, index, x, [output], seed=3, draws=True, predicts=True, ring=ring, trusted=True
    )  # fmt: skip
    assert result.isnan().all() and ring[step % 3].isnan().all()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_plans(eta):
    plan = er_sde_plan(
        [1, 0.9, 0.7, 0.7, 0.5, 0.2, 0], process="flow", order=[1, 2, 3, 3, 4, 5], method="newton", node_scale=5.0, eta=eta
    )
    table, _ = by_cuda(CPU.plan, plan.sigmas, None, plan)
    torch.testing.assert_close(table, plan.table, rtol=1e-13, atol=1e-13)


@settings(max_examples=EXAMPLES // 3, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_a_ring_of_predictions(data, order):
    """The step's index in memory and the earlier predictions in a ring: what a history in order gives, for every step."""
    x, *outputs = data.draw(tensors(6))
    plan, history, expected = plan_of(order), [], x
    step, ring = torch.tensor(0), torch.full((order, *x.shape), math.nan, dtype=x.dtype)
    result = x
    for i in range(plan.num_steps):
        expected, denoised = fast_step(plan, i, expected, [outputs[i], *history], seed=7, prediction_type="v", backend="cpu")
        history = [denoised, *history][: order - 1]
        for module in (cuda_on_host, extension._C):
            slots = ring.clone()
            following = module.step(
                plan.predicting("v").table, step, result, [outputs[i]], seed=7, draws=True, predicts=True, ring=slots, trusted=True
            )  # fmt: skip
            assert torch.equal(following, expected) and torch.equal(slots[i % order], denoised)
        ring, result = slots, following
        step += 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_shards(data):
    whole = [data.draw(st.integers(1, 9)) for _ in range(3)]
    start = [data.draw(st.integers(0, n - 1)) for n in whole]
    shape = (2, *(data.draw(st.integers(1, n - s)) for n, s in zip(whole, start, strict=True)))
    seeds = seed_table([5, 6], 2)
    result = drawn_by_cuda(torch.zeros(shape), seeds, 3, (whole, start))
    assert torch.equal(result, specified_noise(shape, seeds, 3, whole, start))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [40_000, 33_000])
def test_the_log_density_where_a_segment_is_a_warps(dtype, size):
    """Enough segments for one multiprocessor, the last of a sample not whole."""
    x, *history = torch.randn(4, 3, size).to(dtype).unbind()
    SETTINGS.set_multiprocessors(1)
    step = functools.partial(fast_step, plan_of(3), 4, x, history, seed=3, return_log_prob=True)
    assert equal(by_cuda(step), step())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "start, shape", [((0, 2, 0, 0), (4, 3, 8, 16)), ((0, 0, 3, 0), (4, 6, 5, 16)), ((2, 0, 0, 0), (2, 6, 8, 16))]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_shard_in_whole_rows(batch, start, shape, dtype):
    """By frames, height and channels: rows that lie behind each other, and positions that do not."""
    x, output, *history = torch.randn(4, batch, *shape).to(dtype).unbind()
    kwargs = dict(seed=[5 + b for b in range(batch)], global_shape=(4, 6, 8, 16), global_start=start)
    for of in ({}, {"prediction_type": "v"}):
        step = functools.partial(fast_step, plan_of(3), 4, x, [output, *history], **kwargs, **of)
        assert equal(by_cuda(step), step())


@contextlib.contextmanager
def torch_stream(seed, offset, threads, in_memory=False):
    """While it lasts, steps with a seed draw torch's stream instead; its seed and offset given, or read from memory."""
    numbers = [ctypes.c_int64(v) for v in (seed, offset, threads)]
    SETTINGS.set_torch_stream(*numbers, ctypes.c_bool(in_memory))
    try:
        yield
    finally:
        SETTINGS.set_torch_stream(*[ctypes.c_int64(0)] * 3, ctypes.c_bool(False))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("size", [4096, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_density_beside_the_step_with_torchs_stream(dtype, size, in_memory):
    x, *history = torch.randn(4, 3, size, dtype=torch.float64).to(dtype).unbind()
    with torch_stream(7, 8, 768, in_memory):
        expected = by_cuda(fast_step, plan_of(3), 4, x, history, seed=0)
        stepped, density = by_cuda(fast_step, plan_of(3), 4, x, history, seed=0, return_log_prob=True)
    assert torch.equal(stepped, expected)
    assert torch.equal(density, step_log_prob(plan_of(3), 4, x, history, stepped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [(1, 256), (1, 1024), (2, 2048)])
def test_torchs_stream(dtype, size, layout):
    """Vectors and elements draw the same stream, wherever its segments end, and a step with a prediction reads the same."""
    x = torch.zeros(1, size, dtype=dtype)
    threads = 256 * min(-(-size // 256), layout[0] * (layout[1] // 256))
    expected, _ = torch_noise((1, size), 99, 8, torch_layout=layout)
    plan, history = plan_of(3), torch.randn(3, 1, size).to(dtype).unbind()
    with torch_stream(99, 8, threads):
        vectors = drawn_by_cuda(x, 1)
        elements = drawn_by_cuda(offset_by(x, 1), 1, out=offset_by(x, 1))
        drawn = by_cuda(fast_step, plan, 4, x, history, seed=1, prediction_type="v")
    # Sine and logarithm are the same libm's here as in torch_noise, up to its own vectorised versions.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    torch.testing.assert_close(vectors.float(), expected, rtol=0, atol=tolerance)
    assert torch.equal(vectors, elements)
    assert equal(drawn, fast_step(plan, 4, x, history, noise=vectors, prediction_type="v"))
    with torch_stream(99, 8, threads, in_memory=True):
        assert torch.equal(drawn_by_cuda(x, 1), vectors)
        assert torch.equal(drawn_by_cuda(offset_by(x, 1), 1), vectors)


@pytest.mark.parametrize("size", [1023, 1024])
def test_torchs_stream_across_samples_of_their_own_guidance(size):
    x, unconditional, *history = torch.randn(5, 2, size).unbind()
    kwargs = dict(prediction_type="v", guidance=(unconditional, torch.tensor([1.0, 6.0], dtype=torch.float64)))
    with torch_stream(99, 8, 256):
        noise = drawn_by_cuda(torch.zeros(1, 2 * size), 1).view(2, size)
        drawn = by_cuda(fast_step, plan_of(3), 4, x, history, seed=1, **kwargs)
    assert equal(drawn, fast_step(plan_of(3), 4, x, history, noise=noise, **kwargs))


@pytest.mark.parametrize("size", [1, 255, 257, 1025])
def test_torchs_float64_stream_is_normal_and_bounded(size):
    with torch_stream(99, 8, 256):
        z = drawn_by_cuda(torch.zeros(1, size, dtype=torch.float64), 1)
    assert torch.isfinite(z).all() and z.abs().max() < 9 and len(z.unique()) == size


def test_the_portable_stream_over_many_counters_and_edge_words():
    z = drawn_by_cuda(torch.zeros(4, 2_500_000), seed_table(MANY_SEEDS, 4), -1)
    assert torch.equal(z, many_normals())
    assert torch.equal(z[:, :100], portable_noise((4, 100), MANY_SEEDS, -1))
    a, b = (w.flatten() for w in torch.meshgrid(torch.tensor(EDGE_WORDS), torch.tensor(EDGE_WORDS), indexing="ij"))
    assert torch.equal(cuda_on_host.box_muller(a, b), torch.stack(box_muller(a, b)))
