"""Run by test_triton.py in a process of its own with TRITON_INTERPRET=1: the Triton kernel against the other backends."""

import os
import sys

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_noise import EDGE_WORDS, MANY_SEEDS, many_normals

from conftest import assert_step_exact, assert_sum_exact, noise_alone
from ersde_fast import er_sde_plan, fast_step, portable_noise, stack_plans
from ersde_fast.backends.triton import TritonKernels
from ersde_fast.kernels import er_sde_step as kernel
from ersde_fast.noise import Portable, box_muller, seed_table
from ersde_fast.predictions import PREDICTION_TYPES
from ersde_fast.request import StepRequest

EXAMPLES = int(os.environ.get("ERSDE_EXAMPLES", 40))
DTYPES = [torch.float32, torch.float64, torch.float16]  # the interpreter truncates to bfloat16 instead of rounding


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.sampled_from([(1,), (3, 5), (2, 1023), (2, 1025), (1, 3, 7, 5), (3, 0), ()]),
    st.sampled_from(["none", "tensor", "portable", "list", "shard"]),
)
def test_a_step(dtype, other, order, shape, source):
    plan = er_sde_plan([9, 8, 6.5, 5, 4, 3], order=order, method="newton", noise_scaler="ode" if source == "none" else "sde_5")
    g = torch.Generator().manual_seed(0)
    x, noise, *history = (torch.randn(shape, generator=g).to(other) for _ in range(order + 2))
    x = x.to(dtype)
    kwargs = {"none": {}, "tensor": {"noise": noise}, "portable": {"seed": 5}}.get(source)
    drawn = noise if source in ("none", "tensor") else portable_noise(shape, 5, step=4)
    if source == "list" or (source == "shard" and len(shape) < 2):
        kwargs = {"seed": [(5, b) for b in range(shape[0] if shape else 1)]}
    elif source == "shard":
        whole, start = [n + 3 for n in shape[1:]], [1] * (len(shape) - 1)
        kwargs = {"seed": 5, "global_shape": whole, "global_start": start}
        part = (slice(None), *(slice(1, 1 + n) for n in shape[1:]))
        drawn = portable_noise((shape[0], *whole), 5, step=4)[part]
    result = fast_step(plan, 4, x, history, backend="triton", **kwargs)
    assert_step_exact(result, plan, 4, x, history, drawn)


@settings(max_examples=EXAMPLES * 5 // 8, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.sampled_from([(2,), (2, 5), (2, 1025), (2, 3, 7, 5), (2, 0)]),
    st.sampled_from(list(PREDICTION_TYPES)),
    st.sampled_from([None, 1.0, 3.5, torch.tensor([0.0, 7.5], dtype=torch.float64)]),
    st.booleans(),
)
def test_from_a_models_output(dtype, other, order, shape, name, scale, cfg_pp):
    plan = er_sde_plan([9, 8, 6.5, 5, 4, 3], order=order, method="newton", sigma_data=0.5)
    g = torch.Generator().manual_seed(0)
    x, unconditional, *history = (torch.randn(shape, generator=g).to(other) for _ in range(order + 2))
    x = x.to(dtype)
    cfg_pp = cfg_pp and scale is not None
    kwargs = dict(prediction_type=name, guidance=None if scale is None else (unconditional, scale), cfg_pp=cfg_pp)
    result, denoised = fast_step(plan, 4, x, history, seed=5, backend="triton", **kwargs)
    p_x, p_m = plan.predicting(name).rows[4].prediction
    for b in range(2):
        s = 1.0 if scale is None else scale if isinstance(scale, float) else scale[b].item()
        assert_sum_exact(denoised[b], [(p_x, x[b]), (p_m * s, history[0][b]), (p_m * (1 - s), unconditional[b])], x[b], ulps=5)
    noise = portable_noise(shape, 5, step=4)
    if not cfg_pp:
        return assert_step_exact(result, plan, 4, x, [denoised, *history[1:]], noise)
    row = plan.predicting(name, True).rows[4]
    terms = [(row.w_x, x), *zip(row.w_d, [denoised, *history[1:]], strict=False), (row.w_guide, unconditional)]
    assert_sum_exact(result, [*terms, (row.w_noise, noise)], x, ulps=order + 4)


@settings(max_examples=EXAMPLES * 3 // 8, deadline=None)
@given(st.data(), st.booleans())
def test_samples_at_their_own_steps_of_their_own_plans(data, predicts):
    """Rows, counters and history lengths from memory: the noise's bits, and what a sample does not use is not read."""
    plans = [
        er_sde_plan([9, 8, 6.5, 5, 4, 3], order=3),
        er_sde_plan([3, 2, 1, 0], order=2),
        er_sde_plan([3, 2, 1], noise_scaler="ode"),
    ]
    x, *history = torch.randn(4, 3, 41)
    which = [data.draw(st.integers(0, 2)) for _ in x]
    steps = [data.draw(st.integers(0, plans[p].num_steps - 1)) for p in which]
    for b, (p, i) in enumerate(zip(which, steps, strict=True)):
        for j in range(max(len(plans[p].rows[i].w_d), 1 if predicts else 0), 3):
            history[j][b] = torch.nan
    kwargs = dict(seed=[(5, b) for b in range(3)], backend="triton") | (dict(prediction_type="v") if predicts else {})
    index = (torch.tensor(which), torch.tensor(steps))
    result = fast_step(stack_plans(plans), index, x, history, **kwargs)
    for b, (p, i) in enumerate(zip(which, steps, strict=True)):
        one = slice(b, b + 1)
        alone = fast_step(plans[p], torch.tensor(i), x[one], [d[one] for d in history], **kwargs | dict(seed=[(5, b)]))
        if predicts:
            assert torch.equal(result[1][one], alone[1])
        assert torch.equal(result[0][one] if predicts else result[one], alone[0] if predicts else alone)


def test_a_step_that_does_not_exist_or_was_not_given_its_history_makes_nan():
    plan = er_sde_plan([9, 8, 6.5, 5, 4, 3], order=3)
    x, *history = torch.randn(4, 2, 9)
    for step, held in [(5, 3), (-1, 3), (4, 2)]:
        noise = Portable(seed_table(5, 2))
        result = kernel.step(StepRequest(plan, torch.tensor(step), x, history[:held], noise, True))
        assert result.isnan().all()


def test_strides_and_out():
    plan = er_sde_plan([9, 8, 6.5, 5, 4, 3], order=3)
    x, *history = (torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last) for _ in range(4))
    expected = fast_step(plan, 4, x, history, seed=5, backend="cpu")
    result = fast_step(plan, 4, x, history, seed=5, backend="triton")
    assert torch.equal(result, expected) and result.stride() == x.stride()
    assert fast_step(plan, 4, x, history, seed=5, out=x, backend="triton") is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("batch, size", [(1, 4096), (2, 4097), (1, 11_000)])
def test_blocks_one_after_another(batch, size, monkeypatch):
    monkeypatch.setattr(kernel, "LARGE", 0)
    plan = er_sde_plan([9, 8, 6.5, 5, 4, 3], order=3)
    x, *history = (torch.randn(batch, size).half() for _ in range(4))
    expected = fast_step(plan, 4, x, history, seed=5, backend="cpu")
    assert torch.equal(fast_step(plan, 4, x, history, seed=5, backend="triton"), expected)


def test_unread_terms():
    plan = er_sde_plan([9, 8, 7, 7, 5, 0])
    x, *history = (torch.randn(2, 40) for _ in range(4))
    nan = torch.full_like(x, torch.nan)
    for i, row in enumerate(plan.rows):
        held = [d if w != 0 else nan for w, d in zip((*row.w_d, 0.0, 0.0), history, strict=False)]
        start = x if row.w_x != 0 else nan
        expected = fast_step(plan, i, x, history, seed=5, backend="cpu")
        assert torch.equal(fast_step(plan, i, start, held, seed=5, backend="triton"), expected)


def test_the_portable_stream_over_many_counters(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 2**18)  # the interpreter's time goes by programs
    x = torch.zeros(4, 2_500_000)
    kernel.step(noise_alone(x, seed_table(MANY_SEEDS, 4), -1, out=x))
    assert torch.equal(x, many_normals())


def test_edge_words():
    @triton.jit
    def words_to_normals(a, b, z0, z1, N: tl.constexpr):
        i = tl.arange(0, N)
        first, second = kernel.box_muller(tl.load(a + i), tl.load(b + i), False)
        tl.store(z0 + i, first)
        tl.store(z1 + i, second)

    a, b = (w.flatten() for w in torch.meshgrid(torch.tensor(EDGE_WORDS), torch.tensor(EDGE_WORDS), indexing="ij"))
    n = triton.next_power_of_2(len(a))
    words = [torch.cat([w, w.new_zeros(n - len(w))]).to(torch.uint32) for w in (a, b)]
    normals = [torch.empty(n) for _ in range(2)]
    words_to_normals[(1,)](*words, *normals, N=n)
    assert torch.equal(torch.stack(normals)[:, : len(a)], torch.stack(box_muller(a, b)))


def test_plain_steps_are_answered_at_once(monkeypatch):
    """Once a step brought the kernels, nothing that checks in words is asked."""
    plan = er_sde_plan([9, 8, 6.5, 5, 4, 3], order=3)
    x, noise, *history = torch.randn(5, 2, 40)
    sources = [dict(seed=5), dict(seed=-(2**70)), dict(seed=[5, 6]), dict(noise=noise), dict(noise=noise.double())]
    outputs = [{}, dict(prediction_type="v"), dict(prediction_type="v", guidance=(noise, 2.5))]
    steps = [(i, source | output) for i in (0, 4) for source in sources for output in outputs]
    expected = [fast_step(plan, i, x, history, backend="cpu", **kwargs) for i, kwargs in steps]
    fast_step(plan, 4, x, history, seed=5, backend="triton")
    monkeypatch.setattr(sys.modules["ersde_fast.step"], "checked", None)
    for (i, kwargs), of_cpu in zip(steps, expected, strict=True):
        torch.testing.assert_close(fast_step(plan, i, x, history, backend="triton", **kwargs), of_cpu, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        dict(i=-1), dict(i=5), dict(i=True), dict(i=torch.tensor(4)), dict(history=[]), dict(history=None), dict(x=None),
        dict(x=torch.zeros(40, 2).T), dict(x=torch.zeros(2, 40, requires_grad=True)), dict(x=torch.zeros(2, 0)),
        dict(history=[torch.zeros(2, 41)] * 3), dict(history=[torch.zeros(2, 40, dtype=torch.int64)] * 3),
        dict(history=[torch.zeros(2, 40).to_sparse()] * 3), dict(history=[torch.zeros(2, 40, dtype=torch.complex64).conj().imag] * 3),
        dict(noise=torch.zeros(1, 40)), dict(noise=torch.zeros(2, 40), seed=5), dict(generator=5), dict(out=torch.zeros(2, 40)),
        dict(predicts=True, unconditional=torch.zeros(2, 40), scale="2"),
        dict(predicts=True, unconditional=torch.zeros(2, 40), scale=float("inf")),
        dict(predicts=True, unconditional=torch.zeros(2, 40), scale=True),
        dict(predicts=True, unconditional=torch.zeros(2, 40, device="meta"), scale=2.0),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_who_says_why(change):
    plan = er_sde_plan([9, 8, 6.5, 5, 4, 3], order=3)
    arguments = dict(i=4, x=torch.zeros(2, 40), history=[torch.zeros(2, 40)] * 3)
    assert TritonKernels(kernel).step(plan.table, draws=True, **arguments) is not None
    assert TritonKernels(kernel).step(plan.table, draws=True, **arguments | change) is None


def test_it_is_available_and_named():
    with pytest.raises(ValueError, match='backend "triton" cannot run this step: an input requires a gradient'):
        fast_step(er_sde_plan([2, 1, 0]), 1, torch.zeros(2, requires_grad=True), [torch.zeros(2)], backend="triton")
