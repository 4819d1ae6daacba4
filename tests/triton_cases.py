"""Run by test_triton.py in a process of its own with TRITON_INTERPRET=1: the Triton kernel against the other backends."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_noise import EDGE_WORDS, MANY_SEEDS, many_normals

from conftest import assert_step_exact
from ersde_fast import er_sde_plan, fast_step, portable_noise
from ersde_fast.kernels import er_sde_step as kernel
from ersde_fast.noise import box_muller, seed_table
from ersde_fast.plan import Row

DTYPES = [torch.float32, torch.float64, torch.float16]  # the interpreter truncates to bfloat16 instead of rounding


@settings(max_examples=60, deadline=None)
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


def test_strides_and_out():
    plan = er_sde_plan([9, 8, 6.5, 5, 4, 3])
    x, *history = (torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last) for _ in range(4))
    expected = fast_step(plan, 4, x, history, seed=5, backend="cpu")
    result = fast_step(plan, 4, x, history, seed=5, backend="triton")
    assert torch.equal(result, expected) and result.stride() == x.stride()
    assert fast_step(plan, 4, x, history, seed=5, out=x, backend="triton") is x
    assert torch.equal(x, expected)


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
    kernel.step(Row(0.0, (), 1.0), x, [], x, seeds=seed_table(MANY_SEEDS, 4), step=-1)
    assert torch.equal(x, many_normals())


def test_edge_words():
    @triton.jit
    def words_to_normals(a, b, z0, z1, N: tl.constexpr):
        i = tl.arange(0, N)
        first, second = kernel.box_muller(tl.load(a + i), tl.load(b + i))
        tl.store(z0 + i, first)
        tl.store(z1 + i, second)

    a, b = (w.flatten() for w in torch.meshgrid(torch.tensor(EDGE_WORDS), torch.tensor(EDGE_WORDS), indexing="ij"))
    n = triton.next_power_of_2(len(a))
    words = [torch.cat([w, w.new_zeros(n - len(w))]).to(torch.uint32) for w in (a, b)]
    normals = [torch.empty(n) for _ in range(2)]
    words_to_normals[(1,)](*words, *normals, N=n)
    assert torch.equal(torch.stack(normals)[:, : len(a)], torch.stack(box_muller(a, b)))


def test_it_is_available_and_named():
    with pytest.raises(ValueError, match='backend "triton" cannot run this step: an input requires a gradient'):
        fast_step(er_sde_plan([2, 1, 0]), 1, torch.zeros(2, requires_grad=True), [torch.zeros(2)], backend="triton")
