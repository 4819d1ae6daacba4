"""The portable stream: normal noise that is the same float32 bits on every machine, and the specification of them.

A normal depends on the seed of its sample, the step, and its row-major position in its sample; on nothing else. Philox4x32-10
(Salmon et al. 2011) turns (group of four elements, step, sample) under the key `seed` into four words, and Box-Muller turns
each two of them into two normals by polynomials of fixed coefficients. Only integer operations and correctly rounded
float32 addition, multiplication, fma and square root are used: any machine that has those gives these bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tracing import has_values

WORD = 0xFFFFFFFF
MAX_POSITIONS = 2**42  # elements of a sample: 40 bits of the counter hold the group
MAX_SAMPLE = 2**48
TORCH_PIECE = 2**31  # bytes that torch.randn draws in one piece
WITHOUT_FLOAT64 = ("mps",)  # types of devices, Apple's


Seed = int | Sequence[int] | Sequence[tuple[int, int]] | Tensor


class Portable(NamedTuple):
    """The portable stream as the noise of a step.

    Attributes:
        seeds: a number, of which sample b draws with (seed, b); or int64 [batch, 2] of (seed, sample). In traced code as the
            caller gave them.
        global_shape, global_start: of a sample of which x holds a part, and where that starts; both empty where x holds it all.
    """

    seeds: Seed
    global_shape: Sequence[int] = ()
    global_start: Sequence[int] = ()


class TorchStream(NamedTuple):
    """Torch's own stream as the noise of a step.

    Attributes:
        generator: None is the default one of the device of x.
        layout: (multiprocessors, threads of each) of the card whose numbers to draw; None is the one at hand.
    """

    generator: torch.Generator | None = None
    layout: tuple[int, int] | None = None

    def draw(self, x: Tensor) -> Tensor:
        """The noise for x by torch.randn, for whoever does not draw it in a kernel."""
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)


def is_torch_stream(draw: Callable[[Tensor, torch.Generator], None], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel's `draw` fills a tensor [n] of a CUDA device as torch.randn does, and advances the generator as far.

    Compared on a small tensor and on one of more elements than most cards have threads, from an offset that is not 0.
    """
    generator = torch.Generator(device).manual_seed(0x5EED_0123_4567)
    torch.randn(3, device=device, generator=generator)
    for size in (4099, 300_007):
        before = generator.get_offset()
        expected = torch.randn(size, dtype=dtype, device=device, generator=generator)
        after = generator.get_offset()
        generator.set_offset(before)
        drawn = torch.empty_like(expected)
        draw(drawn, generator)
        if generator.get_offset() != after or not torch.equal(drawn, expected):
            return False
    return True


def float64_device(device: torch.device) -> torch.device:
    """Where the float64 of a step on a device is: there, or on the host where the device has none."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def check_torch_layout(torch_layout) -> None:
    """Raises where torch_layout is not (multiprocessors, threads of each) of a card."""
    if not isinstance(torch_layout, (list, tuple)) or len(torch_layout) != 2 or not all(type(v) is int for v in torch_layout):
        raise TypeError(f"torch_layout must be (multiprocessors, threads of each), whole numbers, got {torch_layout!r}")
    if torch_layout[0] < 1 or torch_layout[1] < 256:
        raise ValueError(f"torch_layout must have at least 1 multiprocessor of at least 256 threads, got {tuple(torch_layout)}")


def seed_table(seed, batch: int) -> Tensor:
    """The seed argument as an int64 tensor [batch, 2] of (seed as a signed word, sample)."""
    if isinstance(seed, Tensor):
        if seed.is_meta or seed.layout != torch.strided:
            raise TypeError(f"seed must be a tensor that holds numbers, got {seed.layout} on {seed.device}")
        if not has_values(seed):
            return _pairs(seed, batch)
        if seed.dtype == torch.int64 and seed.shape == (batch, 2) and batch:
            samples = seed.numpy()[:, 1]  # no operator, which a tracer would see; and no loop over the batch
            if 0 <= samples.min() and samples.max() < MAX_SAMPLE:
                return seed
        seed = seed.tolist()
    if _is_int(seed):
        pairs = [(seed, b) for b in range(batch)]
    elif isinstance(seed, Sequence) and not isinstance(seed, str):
        pairs = [(s, 0) if _is_int(s) else s for s in seed]
        if len(pairs) != batch:
            raise ValueError(
                f"seed must be one number or {batch}, one for each sample of the batch, got {len(pairs)}: one number will do, and gives "
                f"each sample noise of its own"
            )
    else:
        remedy = ": a generator is passed as generator=" if isinstance(seed, torch.Generator) else ""
        raise TypeError(f"seed must be a whole number or a list with one for each sample, got {type(seed).__name__}{remedy}")
    for pair in pairs:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(_is_int(v) for v in pair)):
            raise TypeError(f"seed must hold whole numbers or pairs (seed, sample) of them, got {pair!r}")
        if not 0 <= pair[1] < MAX_SAMPLE:
            raise ValueError(f"seed must have samples from 0 to 2^48 - 1, got {pair[1]} in {tuple(pair)}")
    signed = [((int(s) + 2**63) % 2**64 - 2**63, int(sample)) for s, sample in pairs]
    return torch.tensor(signed, dtype=torch.int64, device="cpu").reshape(batch, 2)


def _pairs(seed: Tensor, batch: int) -> Tensor:
    """`seed_table` of a tensor whose numbers only a device, a transform or a tracer knows."""
    if seed.dtype == torch.bool or seed.is_floating_point() or seed.is_complex():
        raise TypeError(f"seed must hold whole numbers or pairs (seed, sample) of them, got {seed.dtype}")
    seed = seed.long()
    if seed.dim() == 0:
        return torch.stack([seed.expand(batch), torch.arange(batch, device=seed.device)], dim=1)
    if seed.shape == (batch,):
        return torch.stack([seed, torch.zeros_like(seed)], dim=1)
    if seed.shape != (batch, 2):
        raise ValueError(
            f"seed must be [], [{batch}] or [{batch}, 2], one for each sample of the batch, got {tuple(seed.shape)}"
        )
    return seed


def seeds_of(seed, x: Tensor) -> Tensor:
    """`seed_table` for the batch of x; a 0-d tensor is one sample."""
    return seed_table(seed, x.shape[0] if x.dim() else 1)


def _is_int(value) -> bool:
    return not isinstance(value, (bool, Tensor, np.ndarray)) and (isinstance(value, int) or hasattr(value, "__index__"))


def specified_noise(
    shape: Sequence[int],
    seeds: Tensor,
    step: int | Tensor,
    global_shape: Sequence[int] | None = None,
    global_start: Sequence[int] | None = None,
) -> Tensor:
    """The stream in plain PyTorch, float32 on the device of `seeds` [batch, 2]: the specification of every kernel's bits.

    Drawn on the host for a device without float64. `step` is one number, or int64 [] or [batch] of them. With `global_shape` and `global_start`, [batch, *shape[1:]] is the part of each sample of that shape from that start.
    """
    if (host := float64_device(seeds.device)) != seeds.device:
        step = step.to(host) if isinstance(step, Tensor) else step
        return specified_noise(shape, seeds.to(host), step, global_shape, global_start).to(seeds.device)
    local = tuple(shape[1:])
    if not global_shape:
        groups = torch.arange(-(-math.prod(local) // 4), device=seeds.device)
        return _normals(seeds, step, groups).flatten(1)[:, : math.prod(local)].reshape(shape)
    position = torch.zeros(local, dtype=torch.int64, device=seeds.device)
    stride = 1
    for d in reversed(range(len(local))):
        index = global_start[d] + torch.arange(local[d], device=seeds.device)
        position += stride * index.view(-1, *[1] * (len(local) - 1 - d))
        stride *= global_shape[d]
    position = position.flatten()
    four = _normals(seeds, step, position // 4)
    return four.gather(2, (position % 4).expand(len(seeds), -1)[..., None]).reshape(shape)


def _normals(seeds: Tensor, step: int | Tensor, groups: Tensor) -> Tensor:
    """[batch, len(groups), 4] normals."""
    seed, sample = seeds[:, :1], seeds[:, 1:]
    step = step.reshape(-1, 1) if isinstance(step, Tensor) else torch.tensor([[step & WORD]], device=seeds.device)
    counter = (
        groups & WORD,
        step & WORD,
        sample & WORD,
        groups >> 32 << 24 | 1 << 16 | sample >> 32 & 0xFFFF,  # the tag 1 keeps clear of torch's and Triton's counters
    )
    w = philox((seed & WORD, seed >> 32 & WORD), counter)
    return torch.stack([*box_muller(w[0], w[1]), *box_muller(w[2], w[3])], dim=-1)


def philox(key: tuple, counter: tuple) -> tuple:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    key0, key1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32 & WORD) ^ c1 ^ key0,
            product1 & WORD,
            (product0 >> 32 & WORD) ^ c3 ^ key1,
            product0 & WORD,
        )
        key0, key1 = key0 + 0x9E3779B9 & WORD, key1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def _float32(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int64, device="cpu").to(torch.uint32).view(torch.float32).item()


LOG = [_float32(b) for b in (0xBE99E978, 0x3E9C2A6D, 0xBE8CD34E, 0x3EA872CA, 0xBECD1B0D, 0x3F0006C3, 0xBF2AA9E8, 0x3F800000, 0xC0000000)]  # fmt: skip
SINE = [_float32(b) for b in (0xBB998CC7, 0x3DA34052, 0xBF255E12, 0x3FC90FDB)]
COSINE = [_float32(b) for b in (0xBCA73C5F, 0x3E81D82C, 0xBF9DE9CE, 0x3F800000)]
LOG_2, TINY = _float32(0xB4317218), _float32(0x2B800000)  # -2 log(2) / 2^23; 2^-40 keeps the radius above 0


def _fma(a: Tensor, b: Tensor, c) -> Tensor:
    """fma of float32, through float64: proven to round alike over all inputs of these polynomials with these coefficients."""
    return (a.double() * b.double() + c).float()


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = _fma(value, x, c)
    return value


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two words, int64 tensors that hold 32 bits."""
    x = a.float() + 0.5
    bits = x.view(torch.int32).long()
    exponent = (bits - 0x4F2AAAAB) & 0xFF800000
    exponent = torch.where(exponent >= 2**31, exponent - 2**32, exponent)
    f = (bits - exponent - 0x10000000).int().view(torch.float32) - 1
    p = _polynomial(f, LOG)
    square = _fma(p, f, _fma(exponent.float(), torch.full_like(p, LOG_2), TINY).double())
    r = square.double().sqrt().float()  # float32's own square root is not correctly rounded on every device

    quarter = 4 * b + 2 & WORD
    t = torch.where(quarter >= 2**31, quarter - 2**32, quarter).float() * 2.0**-32
    q = t * t
    sine, cosine = _polynomial(q, SINE) * t, _polynomial(q, COSINE)
    r = torch.where(b >= 2**31, -r, r)
    swap = (b & 0x40000000) != 0
    return r * torch.where(swap, sine, cosine), r * torch.where(swap, cosine, sine)
