"""Latents that are split over devices, as DTensors: every element's noise belongs to its place in the whole latent."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..noise import Seed, seed_table, specified_noise
from ..plan import Plan
from ..request import check_history, pair_of
from ..step import fast_step


def shard_of(x: DTensor) -> dict:
    """`global_shape` and `global_start` of this process's part of each sample of x, for `fast_step` on `x.to_local()`.

    Args:
        x: [batch, ...] with placements Shard and Replicate; of the batch dimension too.

    Returns:
        The two as keyword arguments.

    Raises:
        ValueError: for other placements.

    Source: docs/scaling.md.
    """
    start, _ = _local_range(x.shape, x.device_mesh, x.placements)
    return {"global_shape": tuple(x.shape[1:]), "global_start": tuple(start[1:])}


def fast_step_dtensor(
    plan: Plan,
    i: int,
    x: DTensor,
    history: Sequence[DTensor],
    *,
    seed: Seed,
    prediction_type: str | None = None,
    guidance: tuple[DTensor, float | Tensor] | None = None,
    cfg_pp: bool = False,
) -> Any:
    """`ersde_fast.fast_step` of latents that are split over processes: each steps its own part, and nothing is communicated.

    Gathered, the result has the bits of the step of the whole. Only the portable stream can be drawn so.

    Args:
        plan, i: as in `fast_step`.
        x, history: [batch, ...], DTensors on one mesh with one placement.
        seed: of the whole batch.
        prediction_type, guidance, cfg_pp: as in `fast_step`; the unconditional output is split as x is, scales are those of the
            whole batch.

    Returns:
        What `fast_step` returns, split as x is.

    Raises:
        ValueError, TypeError: naming the argument; for placements that differ, or are partial sums, too.

    Source: docs/scaling.md.
    """
    if not isinstance(x, DTensor):
        raise TypeError(f"x must be a DTensor, got {type(x).__name__}: use distribute_tensor, or fast_step with global_shape")
    check_history(history)
    unconditional = [] if guidance is None else [pair_of(guidance)[0]]
    for name, other in [*((f"history[{j}]", d) for j, d in enumerate(history)), *(("guidance[0]", u) for u in unconditional)]:
        if not isinstance(other, DTensor) or other.device_mesh != x.device_mesh or other.placements != x.placements:
            how = other.placements if isinstance(other, DTensor) else type(other).__name__
            raise ValueError(f"{name} must be split as x is, {x.placements}, got {how}: use {name}.redistribute")
    start, size = _local_range(x.shape, x.device_mesh, x.placements)
    if size[0] < x.shape[0]:
        seed = seed_table(seed, x.shape[0])[start[0] : start[0] + size[0]]
    local_guidance = None
    if guidance is not None:
        scale = guidance[1]
        if isinstance(scale, Tensor):
            if isinstance(scale, DTensor) or scale.shape != x.shape[:1]:
                raise ValueError(
                    f"guidance[1] must be a number or a plain float64 [{x.shape[0]}], one for each sample of the whole batch, got "
                    f"{type(scale).__name__} {tuple(scale.shape)}: of a DTensor use full_tensor()"
                )
            scale = scale[start[0] : start[0] + size[0]]
        local_guidance = guidance[0].to_local(), scale
    result = fast_step(
        plan, i, x.to_local(), [denoised.to_local() for denoised in history], seed=seed, prediction_type=prediction_type,
        guidance=local_guidance, cfg_pp=cfg_pp, global_shape=tuple(x.shape[1:]), global_start=tuple(start[1:]),
    )  # fmt: skip

    def whole(part: Tensor) -> DTensor:
        return DTensor.from_local(part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())

    return tuple(map(whole, result)) if isinstance(result, tuple) else whole(result)


def portable_noise_dtensor(
    shape: Sequence[int],
    seed: Seed,
    step: int,
    device_mesh: DeviceMesh,
    placements: Sequence[Placement],
    dtype: torch.dtype = torch.float32,
) -> DTensor:
    """`ersde_fast.portable_noise` split over processes, each of which draws its own part.

    Args:
        shape: [batch, ...] of the whole.
        seed, step, dtype: as in `portable_noise`; step -1 for the initial latents.
        device_mesh, placements: how it is split, by Shard and Replicate.

    Returns:
        The whole as a DTensor, [batch, ...].

    Raises:
        ValueError, TypeError: naming placements or seed.

    Source: docs/scaling.md.
    """
    start, size = _local_range(shape, device_mesh, placements)
    pairs = seed_table(seed, shape[0])[start[0] : start[0] + size[0]].to(device_mesh.device_type)
    part = specified_noise(size, pairs, step, tuple(shape[1:]), tuple(start[1:])).to(dtype)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _local_range(shape: Sequence[int], device_mesh, placements) -> tuple[list[int], list[int]]:
    """Where this process's part starts in each dimension and how long it is there: torch.chunk, one mesh dimension after another."""
    start, size = [0] * len(shape), list(shape)
    for mesh_dim, placement in enumerate(placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            raise ValueError(f"placements must be Shard or Replicate, got {placement}: use redistribute")
        dim = placement.dim
        chunk = -(-size[dim] // device_mesh.size(mesh_dim))
        first = min(device_mesh.get_local_rank(mesh_dim) * chunk, size[dim])
        start[dim] += first
        size[dim] = min(chunk, size[dim] - first)
    return start, size
