"""The fused step in Triton, for GPUs where the CUDA extension was not built (no nvcc; ROCm; XPU).

The same linear combination with the same noise sources as csrc/er_sde_step.cu, its weights given as numbers, or read from the
plan's table in the memory of the device. A program owns TURNS blocks of BLOCK neighbouring elements of one sample (portable
noise: whole groups of four), or BLOCK neighbouring subsequences of torch's stream, each of which serves four places `threads`
elements apart. It reads before it draws, so that memory works meanwhile. Tensors are contiguous here: the wrapper copies those that are not.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ersde_fast import table as columns
from ersde_fast.noise import Portable, TorchStream, is_torch_stream
from ersde_fast.request import StepRequest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 512
# A program that draws portable noise for types of two bytes takes TURNS blocks where a step has LARGE elements: arithmetic is the
# limit there on an H200, and what a program does once is a quarter of what a block costs. Elsewhere memory is the limit.
TURNS, LARGE = 4, 2**24
NO_NOISE, PORTABLE, TORCH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
COUNTER, P_X, P_M = tl.constexpr(columns.COUNTER), tl.constexpr(columns.P_X), tl.constexpr(columns.P_M)
W_GUIDE, W_NOISE = tl.constexpr(columns.W_GUIDE), tl.constexpr(columns.W_NOISE)
W_X, W_D = tl.constexpr(columns.W_X), tl.constexpr(columns.W_D)
NVIDIA = not INTERPRETED and torch.version.cuda is not None
# The interpreter rounds tl.fma twice and has no libdevice.
EXACT = tl.constexpr(INTERPRETED)

if not INTERPRETED:
    from triton.language.extra import libdevice
else:
    libdevice = None


@triton.jit
def fma(a, b, c):
    """fma of float32 with one rounding."""
    if EXACT:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def bits_as_float(bits: tl.constexpr, like):
    """A constant given by its float32 bits, in the shape of `like`."""
    return tl.full(like.shape, bits, tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def square_root(x, positive, NVIDIA: tl.constexpr):
    """The correctly rounded square root of x in [2^-40, 64), or 0; positive: x, or anything above 0 where x is 0."""
    if NVIDIA:  # as sqrt_ of csrc/er_sde_math.h, without the branch of sqrt_rn
        inverse = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [positive], tl.float32, is_pure=True, pack=1
        )
        near = x * inverse
        root = tl.fma(tl.fma(near * -1.0, near, x), inverse * 0.5, near)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Philox4x32-10 of blocks of counters; the keys are single numbers."""
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * tl.full(c0.shape, 0xD2511F53, tl.uint64)
        product1 = c2.to(tl.uint64) * tl.full(c2.shape, 0xCD9E8D57, tl.uint64)
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b, NVIDIA: tl.constexpr):
    """Two normals of the portable stream from two words; see ersde_fast/noise.py."""
    x = a.to(tl.float32) + 0.5
    bits = x.to(tl.uint32, bitcast=True)
    exponent = (bits - tl.full(a.shape, 0x4F2AAAAB, tl.uint32)) & tl.full(a.shape, 0xFF800000, tl.uint32)
    f = (bits - exponent - tl.full(a.shape, 0x10000000, tl.uint32)).to(tl.float32, bitcast=True) - 1.0
    p = bits_as_float(0xBE99E978, f)
    p = fma(p, f, bits_as_float(0x3E9C2A6D, f))
    p = fma(p, f, bits_as_float(0xBE8CD34E, f))
    p = fma(p, f, bits_as_float(0x3EA872CA, f))
    p = fma(p, f, bits_as_float(0xBECD1B0D, f))
    p = fma(p, f, bits_as_float(0x3F0006C3, f))
    p = fma(p, f, bits_as_float(0xBF2AA9E8, f))
    p = fma(p, f, bits_as_float(0x3F800000, f))
    p = fma(p, f, bits_as_float(0xC0000000, f))
    k = exponent.to(tl.int32, bitcast=True).to(tl.float32)
    square = fma(p, f, fma(k, bits_as_float(0xB4317218, f), bits_as_float(0x2B800000, f)))
    r = square_root(square, square, NVIDIA)
    t = (b * 4 + 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    q = t * t
    sine = bits_as_float(0xBB998CC7, f)
    sine = fma(sine, q, bits_as_float(0x3DA34052, f))
    sine = fma(sine, q, bits_as_float(0xBF255E12, f))
    sine = fma(sine, q, bits_as_float(0x3FC90FDB, f)) * t
    cosine = bits_as_float(0xBCA73C5F, f)
    cosine = fma(cosine, q, bits_as_float(0x3E81D82C, f))
    cosine = fma(cosine, q, bits_as_float(0xBF9DE9CE, f))
    cosine = fma(cosine, q, bits_as_float(0x3F800000, f))
    sign = b & tl.full(b.shape, 0x80000000, tl.uint32)
    r = (r.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    swap = (b & tl.full(b.shape, 0x40000000, tl.uint32)) != 0
    return r * tl.where(swap, sine, cosine), r * tl.where(swap, cosine, sine)


@triton.jit
def torch_pair(x, y):
    """cuRAND's pair of float32 normals, as torch's own kernel rounds it on NVIDIA GPUs."""
    u = tl.fma(x.to(tl.float32), 2.3283064e-10, 2.3283064e-10 / 2)
    v = tl.fma(y.to(tl.float32), 2.3283064e-10 * 6.2831855, 2.3283064e-10 * 6.2831855 / 2)
    square = -2.0 * libdevice.log(u)
    s = square_root(square, tl.maximum(square, 1e-12), True)
    return libdevice.fast_sinf(v) * s, libdevice.fast_cosf(v) * s


@triton.jit
def four_normals(n, seed, counter, sample, SOURCE: tl.constexpr, NVIDIA: tl.constexpr):
    """Of each group n of the portable stream its four normals; of each subsequence n of torch's those of its four places.

    counter: the portable stream's of the step, or what torch's generator counts; sample: the portable stream's.
    """
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    zero = tl.zeros(n.shape, tl.uint32)
    if SOURCE == TORCH:
        c0, c1 = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
        r0, r1, r2, r3 = philox(k0, k1, zero + c0, zero + c1, n.to(tl.uint32), zero)
        z0, z1 = torch_pair(r0, r1)
        z2, z3 = torch_pair(r2, r3)
    else:
        c0, c2 = (n & 0xFFFFFFFF).to(tl.uint32), (sample & 0xFFFFFFFF).to(tl.uint32)
        c3 = (((n >> 32) << 24) | (1 << 16) | ((sample >> 32) & 0xFFFF)).to(tl.uint32)
        r0, r1, r2, r3 = philox(k0, k1, c0, zero + counter, zero + c2, c3)
        z0, z1 = box_muller(r0, r1, NVIDIA)
        z2, z3 = box_muller(r2, r3, NVIDIA)
    return z0, z1, z2, z3


@triton.jit
def normals(n, seed, counter, sample, EACH: tl.constexpr, APART: tl.constexpr, SOURCE: tl.constexpr, NVIDIA: tl.constexpr):
    """four_normals of EACH numbers n, n + APART, ..., each result interleaved: in the order of its numbers.

    They are drawn apart, a thread those of its n, and then joined in its registers. Drawn as one block they would lie in other
    threads than the tensors' elements, and go there through shared memory.
    """
    if EACH == 1:
        z0, z1, z2, z3 = four_normals(n, seed, counter, sample, SOURCE, NVIDIA)
    else:
        a0, a1, a2, a3 = normals(n, seed, counter, sample, EACH // 2, 2 * APART, SOURCE, NVIDIA)
        b0, b1, b2, b3 = normals(n + APART, seed, counter, sample, EACH // 2, 2 * APART, SOURCE, NVIDIA)
        z0, z1 = tl.interleave(a0, b0), tl.interleave(a1, b1)
        z2, z3 = tl.interleave(a2, b2), tl.interleave(a3, b3)
    return z0, z1, z2, z3


@triton.jit
def multiply_add(w, term, y):
    """w term + y where w, a block of one number, is not 0, else y."""
    if y.dtype == tl.float64:
        return tl.where(w != 0, tl.fma(w, term.to(tl.float64), y), y)
    return tl.where(w != 0, fma(w, term.to(tl.float32), y), y)


@triton.jit
def read(data, e, mask, w):
    """Elements e of a tensor; 0, and nothing is read, where its weight is 0."""
    return tl.load(data + e, mask=mask & (w != 0), other=0.0)


@triton.jit
def read_terms(
    tensors, e, mask, weights, GIVEN: tl.constexpr, PREDICTS: tl.constexpr, GUIDED: tl.constexpr, HAS_NOISE: tl.constexpr
):
    """What the step of elements e reads; x stands for a term that it does not have."""
    x, h0, h1, h2, h3, h4, guide, noise = tensors
    w_x, w0, w1, w2, w3, w4, w_u, w_noise, p_x, p_m, p_u = weights
    t_x = tl.load(x + e, mask=mask & ((w_x != 0) | (p_x != 0)), other=0.0)
    t0, t1, t2, t3, t4, t_u, t_z = t_x, t_x, t_x, t_x, t_x, t_x, t_x
    if GIVEN > 0:
        t0 = read(h0, e, mask, p_m if PREDICTS else w0)
    if GIVEN > 1:
        t1 = read(h1, e, mask, w1)
    if GIVEN > 2:
        t2 = read(h2, e, mask, w2)
    if GIVEN > 3:
        t3 = read(h3, e, mask, w3)
    if GIVEN > 4:
        t4 = read(h4, e, mask, w4)
    if GUIDED:
        t_u = tl.load(guide + e, mask=mask & ((p_u != 0) | (w_u != 0)), other=0.0)
    if HAS_NOISE:
        t_z = read(noise, e, mask, w_noise)
    return t_x, t0, t1, t2, t3, t4, t_u, t_z


@triton.jit
def combine_and_store(
    terms, z, out, denoised, e, mask, weights,
    GIVEN: tl.constexpr, PREDICTS: tl.constexpr, GUIDED: tl.constexpr, HAS_NOISE: tl.constexpr, DRAWS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The step of elements e: the prediction, where a model's output was read, then x, GIVEN predictions and the noise."""
    w_x, w0, w1, w2, w3, w4, w_u, w_noise, p_x, p_m, p_u = weights
    t_x, t0, t1, t2, t3, t4, t_u, t_z = terms
    zero = tl.full(e.shape, -0.0, tl.float64 if WIDE else tl.float32)
    if PREDICTS:
        newest = multiply_add(p_m, t0, multiply_add(p_x, t_x, zero))
        if GUIDED:
            newest = multiply_add(p_u, t_u, newest)
        t0 = newest.to(denoised.dtype.element_ty)
        tl.store(denoised + e, t0, mask=mask)
    y = multiply_add(w_x, t_x, zero)
    if GIVEN > 0:
        y = multiply_add(w0, t0, y)
    if GIVEN > 1:
        y = multiply_add(w1, t1, y)
    if GIVEN > 2:
        y = multiply_add(w2, t2, y)
    if GIVEN > 3:
        y = multiply_add(w3, t3, y)
    if GIVEN > 4:
        y = multiply_add(w4, t4, y)
    if GUIDED:
        y = multiply_add(w_u, t_u, y)
    if HAS_NOISE:
        y = multiply_add(w_noise, t_z, y)
    if DRAWS:
        y = multiply_add(w_noise, z, y)
    tl.store(out + e, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def column(row, k, exists):
    """A number of a row of the table; NaN where there is no such row."""
    return tl.load(row + k, mask=exists, other=float("nan"))


@triton.jit
def weight(row, k, exists, ORDER: tl.constexpr):
    """w_d[k]; 0 beyond the order."""
    if k < ORDER:
        return column(row, W_D + k, exists)
    return tl.full([], 0.0, tl.float64)


# Addresses and integers that no vector's place depends on: another of them must not mean another kernel. A size or a number of
# threads that 16 divides makes the accesses wide.
@triton.jit(
    do_not_specialize=["samples", "num_plans", "num_steps", "seed", "torch_offset", "counter"],
    do_not_specialize_on_alignment=["seeds", "table", "plan_index", "step_index", "scales"],
)
def er_sde_step(
    x, h0, h1, h2, h3, h4, guide, noise, out, denoised, seeds, table, plan_index, step_index, scales,
    size: "i64", samples: "i32", num_plans: "i64", num_steps: "i64", scale: "fp64", seed: "u64", torch_offset: "i64",
    torch_threads: "i64", counter: "i64", p_x: "fp64", p_m: "fp64", w_u: "fp64", w_noise: "fp64", w_x: "fp64",
    w0: "fp64", w1: "fp64", w2: "fp64", w3: "fp64", w4: "fp64",
    ORDER: tl.constexpr, GIVEN: tl.constexpr, INDEXED: tl.constexpr, PREDICTS: tl.constexpr, GUIDED: tl.constexpr,
    HAS_NOISE: tl.constexpr, SOURCE: tl.constexpr, HAS_SEEDS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    TURNS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of a sample times samples, size = elements of a sample; torch's stream: (blocks, turns), size = all elements.

    The row: INDEXED 0, counter to w4; of the table 1, the first; 2, step_index[0]; 3, for sample b [plan_index[b], step_index[b]].
    """
    blocks = tl.cdiv(size, BLOCK * TURNS).to(tl.int32)  # the grid has 31 bits; dividing 64 would be most of a small program
    b = tl.full([], 0, tl.int32)
    if SOURCE != TORCH:
        if samples > 1:
            b = tl.program_id(0) // blocks
    if INDEXED > 0:
        at = tl.full([], 0, tl.int64)
        exists = at >= 0
        if INDEXED > 1:
            at = tl.load(step_index + (b if INDEXED == 3 else 0))
            exists = (at >= 0) & (at < num_steps)
        if INDEXED == 3:
            plan = tl.load(plan_index + b)
            exists = exists & (plan >= 0) & (plan < num_plans)
            at += plan * num_steps
        row = table + at * (W_D + ORDER)
        for k in tl.static_range(GIVEN, ORDER):  # predictions that the step uses but was not given
            exists = exists & (column(row, W_D + k, exists) == 0)
        w_u, w_noise, w_x = column(row, W_GUIDE, exists), column(row, W_NOISE, exists), column(row, W_X, exists)
        w0, w1, w2 = weight(row, 0, exists, ORDER), weight(row, 1, exists, ORDER), weight(row, 2, exists, ORDER)
        w3, w4 = weight(row, 3, exists, ORDER), weight(row, 4, exists, ORDER)
        p_x, p_m = column(row, P_X, exists), column(row, P_M, exists)
        counter = tl.load(row + COUNTER, mask=exists, other=0.0).to(tl.int64)
    p_u = 0.0
    if GUIDED > 0:  # tl.full, since the interpreter makes a float32 of a number
        scale = tl.load(scales + b) if GUIDED == 2 else tl.full([], scale, tl.float64)
        p_u = p_m * (1 - scale)
        p_m = p_m * scale
    if SOURCE == PORTABLE:
        seed, sample = seed.to(tl.uint64), b.to(tl.int64)
        if HAS_SEEDS:
            seed = tl.load(seeds + 2 * b).to(tl.uint64, bitcast=True)
            sample = tl.load(seeds + 2 * b + 1)
        step = counter.to(tl.uint32)
    tensors = x, h0, h1, h2, h3, h4, guide, noise
    EACH: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # neighbours that a thread reads at once
    GROUPS: tl.constexpr = EACH // 4 if EACH > 4 else 1
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    weights = (
        tl.full([BLOCK], w_x, acc), tl.full([BLOCK], w0, acc), tl.full([BLOCK], w1, acc), tl.full([BLOCK], w2, acc),
        tl.full([BLOCK], w3, acc), tl.full([BLOCK], w4, acc), tl.full([BLOCK], w_u, acc), tl.full([BLOCK], w_noise, acc),
        tl.full([BLOCK], p_x, acc), tl.full([BLOCK], p_m, acc), tl.full([BLOCK], p_u, acc),
    )  # fmt: skip
    if SOURCE == TORCH:
        s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        turn = tl.program_id(1).to(tl.int64)
        e = turn * 4 * torch_threads + s
        mask = (s < torch_threads) & (e < size)
        terms = read_terms(tensors, e, mask, weights, GIVEN, PREDICTS, GUIDED > 0, HAS_NOISE)
        n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK // EACH) * EACH
        drawn = (torch_offset // 4 + turn).to(tl.uint64)
        z0, z1, z2, z3 = normals(n, seed, drawn, 0, EACH, 1, SOURCE, NVIDIA)
        for place in tl.static_range(4):
            z = z0 if place == 0 else z1 if place == 1 else z2 if place == 2 else z3
            z = z.to(out.dtype.element_ty)  # torch rounds the noise itself
            next_e = e + torch_threads
            next_mask = (s < torch_threads) & (next_e < size)
            next_terms = terms
            if place < 3:
                next_terms = read_terms(tensors, next_e, next_mask, weights, GIVEN, PREDICTS, GUIDED > 0, HAS_NOISE)
            combine_and_store(terms, z, out, denoised, e, mask, weights, GIVEN, PREDICTS, GUIDED > 0, HAS_NOISE, True, WIDE)
            e, mask, terms = next_e, next_mask, next_terms
    else:
        block = (tl.program_id(0) - b * blocks).to(tl.int64) * TURNS
        for turn in range(TURNS):
            first = (block + turn) * BLOCK
            inside = first + tl.arange(0, BLOCK)
            mask = inside < size
            e = b.to(tl.int64) * size + inside
            terms = read_terms(tensors, e, mask, weights, GIVEN, PREDICTS, GUIDED > 0, HAS_NOISE)
            z = tl.zeros([BLOCK], tl.float32)
            if SOURCE == PORTABLE:
                n = first // 4 + tl.arange(0, BLOCK // 4 // GROUPS) * GROUPS
                z0, z1, z2, z3 = normals(n, seed, step, sample, GROUPS, 1, SOURCE, NVIDIA)
                z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
            combine_and_store(
                terms, z, out, denoised, e, mask, weights, GIVEN, PREDICTS, GUIDED > 0, HAS_NOISE, SOURCE == PORTABLE, WIDE
            )


def blocks_of(source: int, item: int, samples: int, size: int) -> tuple[int, int]:
    """BLOCK and TURNS of a program, for samples of `size` elements of `item` bytes."""
    if source == TORCH.value:
        return 2 * BLOCK, 1
    large = samples * size >= LARGE and size >= BLOCK * TURNS
    return BLOCK, TURNS if large and item == 2 and source == PORTABLE.value else 1


def compile_options(block: int) -> dict:
    """For a block of that many elements: eight a thread, which 128-bit accesses of both sizes of types divide."""
    return {} if INTERPRETED else {"enable_fp_fusion": False, "num_warps": block // 256}


def step(request: StepRequest):
    """Launches the kernel for a step whose noise is a tensor or is drawn here."""
    x, out = request.x, request.out
    predicts = request.output is not None
    unconditional, scale, _ = request.output if predicts else (None, None, False)
    next_sample = torch.empty_like(x) if out is None else out
    denoised = torch.empty_like(x) if predicts else None
    if x.numel() == 0:
        return (next_sample, denoised) if predicts else next_sample
    contiguous = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    result = next_sample if next_sample.is_contiguous() else contiguous(next_sample)
    predicted = denoised if denoised is None or denoised.is_contiguous() else contiguous(denoised)
    noise, drawn = None, NOTHING_DRAWN
    if isinstance(request.noise, Tensor):
        noise = request.noise.contiguous()
    elif request.draws and isinstance(request.noise, Portable):
        drawn = portable(request.noise.seeds, x)
    elif request.draws:
        drawn = take_torch_stream(x, request.noise.generator)
    launch(
        x.contiguous(), [d.contiguous() for d in request.history[: request.plan.order]],
        None if unconditional is None else unconditional.contiguous(), noise, (result, predicted),
        row_of(request.plan, request.i, x.device), scale, drawn,
    )  # fmt: skip
    next_sample = next_sample if result is next_sample else next_sample.copy_(result)
    if not predicts:
        return next_sample
    return next_sample, denoised if predicted is denoised else denoised.copy_(predicted)


class Drawn(NamedTuple):
    """The noise that the kernel draws.

    Attributes:
        source: NO_NOISE, PORTABLE or TORCH.
        seed: 64 bits; of the portable stream where `seeds` is None.
        seeds: int64 [batch, 2] where the samples differ.
        offset, threads: of torch's stream. Another number of threads than a multiple of 256 would be another kernel.
    """

    source: int
    seed: int = 0
    seeds: Tensor | None = None
    offset: int = 0
    threads: int = 256


NOTHING_DRAWN = Drawn(NO_NOISE.value)


def portable(seeds: int | Tensor, x: Tensor) -> Drawn:
    if isinstance(seeds, Tensor):
        return Drawn(PORTABLE.value, seeds=seeds.to(x.device, non_blocking=True).contiguous())
    return Drawn(PORTABLE.value, seeds % 2**64)


def row_of(plan: columns.Table, i, device: torch.device) -> Sequence[float] | tuple[Tensor, Tensor | None, Tensor | None]:
    """A step's row as numbers where the host has them; else the table and the indices (plan, step) that the kernel reads, which
    without them is the table's first row."""
    if isinstance(i, tuple):
        return plan.to(device).table, *i
    if isinstance(i, Tensor) and i.device == device:
        return plan.to(device).table, None, i
    row = plan.table[int(i)]
    return row.tolist() if row.is_cpu else (row[None], None, None)


NO_ROW = (0, *[0.0] * 10)
NO_WEIGHTS = (0.0,) * 5


class Launch(NamedTuple):
    """What launches of one form share.

    Attributes:
        run, function, metadata: of Triton's CompiledKernel.
        grid: of three dimensions.
        sizes, constants: the arguments `size` and `samples`, and from ORDER on.
    """

    run: Callable
    function: int
    metadata: tuple
    grid: tuple[int, int, int]
    sizes: tuple[int, int]
    constants: tuple


# Launches past Triton's binder, which takes the host several times as long, by their form: the shape, and all else that Triton
# compiles another kernel for. How a CompiledKernel is run is not documented; these versions were read, others take the binder.
LAUNCHES: dict[tuple, Launch] = {}
MOST_LAUNCHES = 4096
IS_KNOWN = tuple(triton.__version__.split(".")[:2]) in [("3", "6"), ("3", "7"), ("3", "8"), ("3", "9")]


def launch(x, history, unconditional, noise, outputs, row, scale, drawn: Drawn) -> None:
    """The kernel on contiguous tensors of one device, that are not empty.

    Args:
        x, history, unconditional, noise: what is read; what is None is not there.
        outputs: the next sample and the prediction or None, of the dtype of x.
        row: as `row_of` returns.
        scale: of the guidance, a number or float64 [batch].
    """
    device = x.get_device()
    if x.is_cuda and torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return launch(x, history, unconditional, noise, outputs, row, scale, drawn)
    source, seed, seeds, offset, threads = drawn
    table = plan_index = step_index = None
    indexed, order, num_plans, num_steps = 0, 0, 1, 1
    if isinstance(row[0], Tensor):
        table, plan_index, step_index = row
        row, indexed = NO_ROW, 1 if step_index is None else 2 if plan_index is None else 3
        *plans, num_steps, width = table.shape
        order, num_plans = width - columns.W_D, plans[0] if plans else 1
    else:
        row = (int(row[0]), *row[1:], *NO_WEIGHTS[len(row) - columns.W_D :])
    scales = None
    if isinstance(scale, Tensor):
        scale, scales = 1.0, scale
    elif scale is None:
        scale = 1.0
    vectors = [x, *history, *[None] * (5 - len(history)), unconditional, noise, *outputs]
    others = [seeds, table, plan_index, step_index, scales]
    addresses = [None if t is None else t.data_ptr() for t in vectors]
    numbers = (num_plans, num_steps, float(scale), seed, offset, threads, *row)
    form = (
        device, x.shape, source, seeds is None, scales is None, indexed, order,
        *[None if t is None else t.dtype for t in vectors], *[a is None or a & 15 == 0 for a in addresses],
    )  # fmt: skip
    known = LAUNCHES.get(form)
    if known is not None and not _is_watched():
        run, function, metadata, grid, sizes, constants = known
        addresses += [None if t is None else t.data_ptr() for t in others]
        stream = torch._C._cuda_getCurrentRawStream(device)
        return run(*grid, stream, function, metadata, None, None, None, *addresses, *sizes, *numbers, *constants)

    samples, size = 1, x.numel()
    if x.dim() and (source == PORTABLE.value or indexed == 3 or scales is not None):
        samples = x.shape[0]
        size //= samples
    block, turns = blocks_of(source, x.element_size(), samples, size)
    if source == TORCH.value:
        grid = (triton.cdiv(threads, block), triton.cdiv(size, 4 * threads), 1)
    else:
        grid = (triton.cdiv(size, block * turns) * samples, 1, 1)
    wide = any(t is not None and t.dtype == torch.float64 for t in vectors)
    guided = 0 if unconditional is None else 1 if scales is None else 2
    constants = (
        order, len(history), indexed, outputs[1] is not None, guided, noise is not None, source, seeds is not None, wide, block,
        turns, NVIDIA,
    )  # fmt: skip
    # What is absent stands as x, since Triton compiles another kernel for each None.
    tensors = [x if t is None else t for t in (*vectors, *others)]
    compiled = er_sde_step[grid](*tensors, size, samples, *numbers, *constants, **compile_options(block))
    if IS_KNOWN and x.is_cuda and isinstance(compiled, triton.compiler.CompiledKernel):
        if len(LAUNCHES) == MOST_LAUNCHES:
            LAUNCHES.clear()
        LAUNCHES[form] = Launch(compiled.run, compiled.function, compiled.packed_metadata, grid, (size, samples), constants)
    return None


def _is_watched() -> bool:
    """Whether somebody has asked Triton to be told of launches."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or er_sde_step.pre_run_hooks)


@functools.cache
def most_torch_threads(index: int) -> int:
    """Threads that torch.randn runs at most on a card (torch 2.11 to 2.13), a multiple of 256."""
    card = torch.cuda.get_device_properties(index)
    return 256 * card.multi_processor_count * (card.max_threads_per_multi_processor // 256)


def take_torch_stream(x: Tensor, generator: torch.Generator | None) -> Drawn:
    """What torch.randn would draw for x, the generator advanced as by torch.randn."""
    index, size = x.get_device(), x.numel()
    generator = torch.cuda.default_generators[index] if generator is None else generator
    threads = min(-(-size // 256) * 256, most_torch_threads(index))
    offset = generator.get_offset()
    generator.set_offset(offset + ((size - 1) // (4 * threads) + 1) * 4)
    return Drawn(TORCH.value, generator.initial_seed(), None, offset, threads)


def draws_as_torch(x: Tensor) -> bool:
    """Whether the kernel can draw torch's stream for x: on NVIDIA GPUs, outside of graph capture, as compared on first use.

    float64 is drawn otherwise by torch, and tensors of 2 GiB and more in pieces: those take torch.randn.
    """
    if not x.is_cuda or torch.version.cuda is None or x.dtype == torch.float64 or torch.cuda.is_current_stream_capturing():
        return False
    return (x.numel() - 1) * x.element_size() < 2**31 - 1 and _compare_with_torch(x.device, x.dtype)


@functools.cache
def _compare_with_torch(device: torch.device, dtype: torch.dtype) -> bool:
    table = torch.zeros(1, columns.W_D, dtype=torch.float64, device="cpu")  # a plan of order 0
    table[0, columns.W_NOISE] = 1

    def draw(out: Tensor, generator: torch.Generator) -> None:
        step(StepRequest(columns.Table(table, True), 0, out, [], TorchStream(generator), True, out=out))

    return is_torch_stream(draw, device, dtype)
