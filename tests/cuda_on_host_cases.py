"""Run by test_cuda_source.py in a process of its own, under the sanitizers: the CUDA kernel as C++ against the CPU kernel."""

import ctypes
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_noise import EDGE_WORDS, MANY_SEEDS, many_normals

from ersde_fast import er_sde_plan, fast_step, portable_noise, torch_noise
from ersde_fast.noise import box_muller, seed_table, specified_noise
from ersde_fast.plan import Row

LIBRARY = ctypes.CDLL(os.environ["ERSDE_CUDA_ON_HOST"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of DType
NONE, PORTABLE, TORCH = range(3)
SIZES = [1, 3, 4, 5, 7, 8, 9, 15, 17, 255, 257, 1023, 1024, 1025, 2047, 2049, 4095, 4097, 8191, 8193]


def array(kind, values):
    return (kind * max(len(values), 1))(*values)


def run(row, x, history, out, noise=None, seeds=None, step=0, torch_stream=None, shard=None, table=None, multiprocessors=1):
    """step_cuda on CPU tensors: merged to [n] or [batch, n] where all are contiguous, else dimension by dimension."""
    terms = [(row.w_x, x), *zip(row.w_d, history, strict=False)]
    if noise is not None:
        terms.append((row.w_noise, noise))
    operands = [t for _, t in terms] + [out]
    batch = x.shape[0] if x.dim() else 1
    sizes, position = list(x.shape), [0] * x.dim()
    first = 0
    if seeds is not None:
        whole, start = shard or (x.shape[1:], [0] * (x.dim() - 1))
        for d in range(1, x.dim()):
            position[d] = math.prod(whole[d:])
            first += start[d - 1] * position[d]
    if all(t.is_contiguous() for t in operands) and shard is None:
        sizes = [batch, x.numel() // batch] if seeds is not None else [x.numel()]
        position = [0, 1] if seeds is not None else [0]
        operands = [t.reshape(sizes) for t in operands]
    elif not sizes:
        sizes, position = [1], [0]
        operands = [t.reshape(1) for t in operands]
    weights = [w for w, _ in terms]
    tables = torch.tensor([[0.0] * (len(terms) + 1)] * 2 + [[*weights, row.w_noise]], dtype=torch.float64) if table else None
    index = torch.tensor(2) if table else None
    if table:
        weights = [math.nan] * len(weights)
        step -= 2
    source = PORTABLE if seeds is not None else TORCH if torch_stream is not None else NONE
    seed, offset, threads = torch_stream or (0, 0, 1)
    LIBRARY.run_step(
        len(sizes), array(ctypes.c_int64, sizes), len(terms),
        array(ctypes.c_void_p, [t.data_ptr() for t in operands]),
        array(ctypes.c_int32, [DTYPES.index(t.dtype) for t in operands]),
        array(ctypes.c_int64, [s * t.element_size() for t in operands for s in t.stride()]),
        array(ctypes.c_double, weights), source, ctypes.c_double(math.nan if table else row.w_noise),
        ctypes.c_void_p(tables.data_ptr() if table else None), ctypes.c_void_p(index.data_ptr() if table else None),
        array(ctypes.c_int64, position), ctypes.c_int64(first), ctypes.c_void_p(seeds.data_ptr() if seeds is not None else None),
        ctypes.c_uint64(seed), ctypes.c_uint32(step % 2**32), ctypes.c_int64(threads), ctypes.c_uint64(offset), multiprocessors,
    )  # fmt: skip
    return out


def offset_by(t, elements):
    """The same numbers at an address `elements` later: not aligned to 16 bytes."""
    return torch.cat([t.new_zeros(elements), t.flatten()])[elements:].view(t.shape)


@st.composite
def steps(draw):
    """A step: x, history, noise, out, and keyword arguments for `run` and for fast_step."""
    dtype = draw(st.sampled_from(DTYPES))
    other = draw(st.sampled_from([dtype, dtype, dtype, *DTYPES]))
    order = draw(st.integers(1, 5))
    batch, size = draw(st.integers(1, 3)), draw(st.sampled_from(SIZES))
    shape = (batch, size) if draw(st.booleans()) else (batch, 3, max(size // 100, 1), 5)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = [torch.randn(shape, generator=g).to(dtype if k == 0 else other) for k in range(order + 2)]
    layout = draw(st.sampled_from(["plain", "plain", "plain", "offset", "strided", "channels_last"]))
    if layout == "offset":
        tensors = [offset_by(t, draw(st.integers(1, 7))) for t in tensors]
    elif layout == "strided":
        tensors = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    elif layout == "channels_last" and len(shape) == 4:
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    x, noise, *history = tensors
    out = draw(st.sampled_from([torch.empty_like(x), x]))
    source = draw(st.sampled_from(["none", "tensor", "portable", "portable"]))
    return order, x, history, noise, out, source, draw(st.booleans()), draw(st.sampled_from([1, 2, 7]))


@settings(max_examples=int(os.environ.get("ERSDE_EXAMPLES", 300)), deadline=None)
@given(steps(), st.integers(0, 2**64 - 1))
def test_the_kernel_has_the_bits_of_the_cpu_kernel(case, seed):
    order, x, history, noise, out, source, table, multiprocessors = case
    plan = er_sde_plan([9, 8, 6.5, 5, 4, 3], order=order, method="newton", noise_scaler="ode" if source == "none" else "sde_5")
    row = plan.rows[4]
    kwargs = {"noise": noise} if source == "tensor" else {"seed": seed} if source == "portable" else {}
    expected = fast_step(plan, 4, x, history, backend="cpu", **kwargs)
    seeds = seed_table(seed, x.shape[0]) if source == "portable" else None
    run(row, x, history, out, noise if source == "tensor" else None, seeds, 4, table=table, multiprocessors=multiprocessors)
    assert torch.equal(out, expected)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_shards(data):
    whole = [data.draw(st.integers(1, 9)) for _ in range(3)]
    start = [data.draw(st.integers(0, n - 1)) for n in whole]
    shape = (2, *(data.draw(st.integers(1, n - s)) for n, s in zip(whole, start, strict=True)))
    x, seeds = torch.zeros(shape), seed_table([5, 6], 2)
    result = run(Row(1.0, (), 1.0), x, [], torch.empty_like(x), seeds=seeds, step=3, shard=(whole, start))
    assert torch.equal(result, specified_noise(shape, seeds, 3, whole, start))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [(1, 256), (1, 1024), (2, 2048)])
def test_torchs_stream(dtype, size, layout):
    """Vectors and elements draw the same stream, wherever the boundaries of its segments fall."""
    x = torch.zeros(size, dtype=dtype)
    threads = 256 * min(-(-size // 256), layout[0] * (layout[1] // 256))
    expected, _ = torch_noise((size,), 99, 8, torch_layout=layout)
    vectors = run(Row(1.0, (), 1.0), x, [], torch.empty_like(x), torch_stream=(99, 8, threads))
    elements = run(Row(1.0, (), 1.0), offset_by(x, 1), [], offset_by(x, 1), torch_stream=(99, 8, threads))
    # Sine and logarithm are the same libm's here as in torch_noise, up to its own vectorised versions.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    torch.testing.assert_close(vectors.float(), expected, rtol=0, atol=tolerance)
    assert torch.equal(vectors, elements)


@pytest.mark.parametrize("size", [1, 255, 257, 1025])
def test_torchs_float64_stream_is_normal_and_bounded(size):
    x = torch.zeros(size, dtype=torch.float64)
    z = run(Row(1.0, (), 1.0), x, [], torch.empty_like(x), torch_stream=(99, 8, 256))
    assert torch.isfinite(z).all() and z.abs().max() < 9 and len(z.unique()) == size


def test_the_portable_stream_over_many_counters_and_edge_words():
    x = torch.zeros(4, 2_500_000)
    z = run(Row(1.0, (), 1.0), x, [], x, seeds=seed_table(MANY_SEEDS, 4), step=-1)
    assert torch.equal(z, many_normals())
    assert torch.equal(z[:, :100], portable_noise((4, 100), MANY_SEEDS, -1))
    a, b = (w.flatten() for w in torch.meshgrid(torch.tensor(EDGE_WORDS), torch.tensor(EDGE_WORDS), indexing="ij"))
    words = [w.to(torch.uint32).contiguous() for w in (a, b)]
    normals = [torch.empty(len(a)) for _ in range(2)]
    LIBRARY.run_box_muller(*(ctypes.c_void_p(t.data_ptr()) for t in (*words, *normals)), ctypes.c_int64(len(a)))
    assert torch.equal(torch.stack(normals), torch.stack(box_muller(a, b)))
