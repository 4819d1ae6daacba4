"""The fused step in Triton, for GPUs where the CUDA extension was not built (no nvcc; ROCm; XPU).

The same linear combination with the same noise sources as csrc/er_sde_step.cu. A program owns BLOCK neighbouring elements of
one sample (portable noise: whole groups of four), or BLOCK neighbouring subsequences of torch's stream, each of which serves
four places `threads` elements apart. Tensors are contiguous here: the wrapper copies those that are not.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ersde_fast.plan import Row

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 1024
NO_NOISE, PORTABLE, TORCH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
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
def philox(k0, k1, c0, c1, c2, c3):
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        low0 = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        low1 = c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 += tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b):
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
    r = tl.sqrt_rn(fma(p, f, fma(k, bits_as_float(0xB4317218, f), bits_as_float(0x2B800000, f))))
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
    s = tl.sqrt_rn(-2.0 * libdevice.log(u))
    return libdevice.fast_sinf(v) * s, libdevice.fast_cosf(v) * s


@triton.jit
def combine_and_store(
    x, h0, h1, h2, h3, h4, noise, out, e, mask, z,
    w_x, w0, w1, w2, w3, w4, w_noise,
    HAS_X: tl.constexpr, USES: tl.constexpr, HAS_NOISE: tl.constexpr, DRAWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The step of elements e: terms in the order x, predictions, noise; USES is a bit mask of the predictions read."""
    acc = tl.float64 if WIDE else tl.float32
    y = tl.full(e.shape, -0.0, acc)
    if HAS_X:
        y = multiply_add(w_x, tl.load(x + e, mask=mask), y, WIDE)
    if USES & 1:
        y = multiply_add(w0, tl.load(h0 + e, mask=mask), y, WIDE)
    if USES & 2:
        y = multiply_add(w1, tl.load(h1 + e, mask=mask), y, WIDE)
    if USES & 4:
        y = multiply_add(w2, tl.load(h2 + e, mask=mask), y, WIDE)
    if USES & 8:
        y = multiply_add(w3, tl.load(h3 + e, mask=mask), y, WIDE)
    if USES & 16:
        y = multiply_add(w4, tl.load(h4 + e, mask=mask), y, WIDE)
    if HAS_NOISE:
        y = multiply_add(w_noise, tl.load(noise + e, mask=mask), y, WIDE)
    if DRAWS:
        y = multiply_add(w_noise, z, y, WIDE)
    tl.store(out + e, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def multiply_add(w, term, y, WIDE: tl.constexpr):
    if WIDE:
        return tl.fma(tl.full(y.shape, w, tl.float64), term.to(tl.float64), y)
    return fma(tl.full(y.shape, w, tl.float32), term.to(tl.float32), y)


@triton.jit
def er_sde_step(
    x, h0, h1, h2, h3, h4, noise, out, seeds, size,
    w_x: "fp64", w0: "fp64", w1: "fp64", w2: "fp64", w3: "fp64", w4: "fp64", w_noise: "fp64",
    step: "u32", torch_seed: "u64", torch_offset: "i64", torch_threads: "i64",
    HAS_X: tl.constexpr, USES: tl.constexpr, HAS_NOISE: tl.constexpr, SOURCE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of a sample, samples) with size = elements of a sample; torch's stream: (blocks, 1), size = all elements."""
    if SOURCE == TORCH:
        s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        turn = tl.program_id(1).to(tl.int64)
        counter = (torch_offset // 4 + turn).to(tl.uint64)
        zero = tl.zeros([BLOCK], tl.uint32)
        a, b, c, d = philox(
            tl.full([BLOCK], torch_seed & 0xFFFFFFFF, tl.uint32),
            tl.full([BLOCK], (torch_seed >> 32) & 0xFFFFFFFF, tl.uint32),
            zero + (counter & 0xFFFFFFFF).to(tl.uint32),
            zero + (counter >> 32).to(tl.uint32),
            s.to(tl.uint32),
            zero,
        )
        z0, z1 = torch_pair(a, b)
        z2, z3 = torch_pair(c, d)
        for place in tl.static_range(4):
            z = z0 if place == 0 else z1 if place == 1 else z2 if place == 2 else z3
            e = (turn * 4 + place) * torch_threads + s
            mask = (s < torch_threads) & (e < size)
            z = z.to(out.dtype.element_ty)  # torch rounds the noise itself
            combine_and_store(x, h0, h1, h2, h3, h4, noise, out, e, mask, z, w_x, w0, w1, w2, w3, w4, w_noise,
                              HAS_X, USES, HAS_NOISE, True, WIDE)  # fmt: skip
    else:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        sample_row = tl.program_id(1)
        inside = first + tl.arange(0, BLOCK)
        e = sample_row.to(tl.int64) * size + inside
        z = tl.zeros([BLOCK], tl.float32)
        if SOURCE == PORTABLE:
            seed = tl.load(seeds + 2 * sample_row).to(tl.uint64, bitcast=True)
            sample = tl.load(seeds + 2 * sample_row + 1)
            group = first // 4 + tl.arange(0, BLOCK // 4)
            zero = tl.zeros([BLOCK // 4], tl.uint32)
            a, b, c, d = philox(
                zero + (seed & 0xFFFFFFFF).to(tl.uint32),
                zero + (seed >> 32).to(tl.uint32),
                (group & 0xFFFFFFFF).to(tl.uint32),
                tl.full([BLOCK // 4], step, tl.uint32),
                zero + (sample & 0xFFFFFFFF).to(tl.uint32),
                (((group >> 32) << 24) | (1 << 16) | ((sample >> 32) & 0xFFFF)).to(tl.uint32),
            )
            z0, z1 = box_muller(a, b)
            z2, z3 = box_muller(c, d)
            z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
        combine_and_store(x, h0, h1, h2, h3, h4, noise, out, e, inside < size, z, w_x, w0, w1, w2, w3, w4, w_noise,
                          HAS_X, USES, HAS_NOISE, SOURCE == PORTABLE, WIDE)  # fmt: skip


def step(row, x: Tensor, history, out: Tensor, noise=None, seeds=None, step=0, torch_stream=None) -> Tensor:
    """Launches the kernel; the caller has checked the arguments.

    Args:
        row: the weights of the step.
        noise: a tensor, or one of the following, or nothing for a step that draws none.
        seeds: int64 [batch, 2] on the device of x: portable noise of step `step`.
        torch_stream: (seed, offset, threads) of torch's stream.
    """
    terms = [x.contiguous(), *(d.contiguous() if w != 0 else x for w, d in zip(row.w_d, history, strict=False))]
    terms += [x] * (6 - len(terms))
    weights = [*row.w_d, *[0.0] * (5 - len(row.w_d))]
    result = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    noise = None if noise is None or row.w_noise == 0 else noise.contiguous()
    used = [x, *(d for w, d in zip(row.w_d, history, strict=False) if w != 0), *([noise] if noise is not None else [])]
    samples, size, source = 1, x.numel(), 0
    seed, offset, threads = torch_stream or (0, 0, 1)
    grid = (triton.cdiv(size, BLOCK), 1)
    if row.w_noise != 0 and seeds is not None:
        samples, source = len(seeds), 1
        size //= samples
        grid = (triton.cdiv(size, BLOCK), samples)
    elif row.w_noise != 0 and torch_stream is not None:
        source = 2
        grid = (triton.cdiv(threads, BLOCK), triton.cdiv(size, 4 * threads))
    options = {} if INTERPRETED else {"enable_fp_fusion": False}
    er_sde_step[grid](
        *terms, x if noise is None else noise, result, x if seeds is None else seeds, size,
        row.w_x, *weights, row.w_noise, step % 2**32, seed % 2**64, offset, threads,
        HAS_X=row.w_x != 0, USES=sum(1 << k for k, w in enumerate(row.w_d) if w != 0), HAS_NOISE=noise is not None,
        SOURCE=source, WIDE=any(t.dtype == torch.float64 for t in used), BLOCK=BLOCK, **options,
    )  # fmt: skip
    return out if result is out else out.copy_(result)


def torch_threads(size: int, device: torch.device) -> int:
    """Threads that torch.randn runs for `size` elements on this card (torch 2.11 to 2.13)."""
    card = torch.cuda.get_device_properties(device)
    return 256 * min(-(-size // 256), card.multi_processor_count * (card.max_threads_per_multi_processor // 256))


def take_torch_stream(x: Tensor, generator: torch.Generator | None) -> tuple[int, int, int]:
    """(seed, offset, threads) of what torch.randn would draw for x, the generator advanced as by torch.randn."""
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    generator = torch.cuda.default_generators[index] if generator is None else generator
    threads, offset = torch_threads(x.numel(), x.device), generator.get_offset()
    generator.set_offset(offset + ((x.numel() - 1) // (4 * threads) + 1) * 4)
    return generator.initial_seed(), offset, threads


def draws_as_torch(x: Tensor) -> bool:
    """Whether the kernel can draw torch's stream for x: on NVIDIA GPUs, outside of graph capture, as compared on first use.

    float64 is drawn otherwise by torch, and tensors of 2 GiB and more in pieces: those take torch.randn.
    """
    if not x.is_cuda or torch.version.cuda is None or x.dtype == torch.float64 or torch.cuda.is_current_stream_capturing():
        return False
    return x.numel() * x.element_size() < 2**31 and _compare_with_torch(x.device, x.dtype)


@functools.cache
def _compare_with_torch(device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator(device).manual_seed(0x5EED_0123_4567)
    torch.randn(3, device=device, generator=generator)
    noise_alone = Row(0.0, (), 1.0)
    for size in (4099, 300_007):
        drawn = torch.empty(size, dtype=dtype, device=device)
        before = generator.get_offset()
        stream = take_torch_stream(drawn, generator)
        after = generator.get_offset()
        generator.set_offset(before)
        expected = torch.randn(size, dtype=dtype, device=device, generator=generator)
        step(noise_alone, drawn, [], drawn, torch_stream=stream)
        if generator.get_offset() != after or not torch.equal(drawn, expected):
            return False
    return True
