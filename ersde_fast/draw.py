"""`portable_noise` and `torch_noise`: the streams that a step draws from, as tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import BACKENDS, compiled
from .noise import TORCH_PIECE, Seed, check_torch_layout, float64_device, seed_table


def portable_noise(
    shape: Sequence[int],
    seed: Seed,
    step: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of the portable stream: what `fast_step(..., seed=seed)` draws at a step.

    Args:
        shape: [batch, ...]; () is one sample.
        seed: one number: sample b of the batch draws with (seed, b). A list of numbers, one a sample: (seed_b, 0). A list of
            (seed, sample) pairs says both. Taken mod 2^64; sample from 0 to 2^48 - 1.
        step: `plan.first_step + i`, mod 2^32; -1 for the initial latents.
        device, dtype: of the result; drawn in float32 whatever the dtype.

    Returns:
        [batch, ...] of mean 0 and variance 1, the same bits on every machine.

    Raises:
        ValueError, TypeError: naming seed or step.

    Source: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, specified to the bit in noise.py.
    """
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step must be a whole number, got {step!r}")
    shape, step = tuple(shape), step % 2**32
    seeds = seed_table(seed, shape[0] if shape else 1)
    device = torch.device(device)
    drawn = (backend.noise(shape, seeds, step, float64_device(device)) for backend in BACKENDS)
    return next(noise for noise in drawn if noise is not None).to(dtype).to(device)


def torch_noise(
    shape: Sequence[int],
    seed: int,
    offset: int = 0,
    *,
    torch_layout: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, int]:
    """What `torch.randn` draws on a CUDA card under a seed and offset of its generator (torch 2.11 to 2.13).

    On a CUDA device bit for bit; on the CPU to about 1e-6, since the card's sine and logarithm are its own.

    Args:
        shape: fewer than 2 GiB in all; larger tensors torch draws in pieces.
        seed, offset: of the generator, `generator.initial_seed()` and `generator.get_offset()`.
        torch_layout: (multiprocessors, threads of each) of the card: (80, 1536) is an A10G, (108, 2048) an A100.
        dtype: float32, bfloat16 or float16; drawn in float32 and rounded once, as torch does.

    Returns:
        The noise, [*shape], and the generator's offset after it.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: no kernel was built, which draws it.

    Source: the kernels of torch.randn for CUDA devices, and tests beside them.
    """
    check_torch_layout(torch_layout)
    if (why := compiled.CPU.unavailable()) is not None:
        raise RuntimeError(f"torch_noise needs a compiled kernel: {why}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if math.prod(shape) * dtype.itemsize > TORCH_PIECE:
        raise ValueError(f"shape must be less than 2 GiB of {dtype}, got {tuple(shape)}: torch draws larger tensors in pieces")
    noise = torch.empty(shape, dtype=torch.float32, device=device)
    grows = compiled.torch_noise(noise, seed, offset, torch_layout)
    return noise.to(dtype), offset + grows
