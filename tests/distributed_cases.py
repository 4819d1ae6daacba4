"""One process of a run that test_distributed.py starts and kills."""

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist

from ersde_fast import distributed, er_sde_plan, fast_step, portable_noise

PLAN = er_sde_plan([10, 6, 3, 1.5, 0.7, 0.3, 0], order=3)
SHAPE = (3, 5)


def model(x, sigma):
    """Elementwise, so that its own bits do not depend on the batch."""
    return x * (0.25 / (0.25 + sigma.view(-1, 1, 1) ** 2))


def generate(say):
    calls = 0

    def slow(x, sigma):
        nonlocal calls
        calls += 1
        time.sleep(say.get("sleep", 0.0))
        if calls == say.get("fails_at") and dist.get_rank() == say["fails"]:
            raise ArithmeticError("this process fails on purpose")
        if calls == say.get("dies_at") and dist.get_rank() == say["dies"]:
            os._exit(9)
        return model(x, sigma)

    distributed.generate(slow, PLAN, range(say["seeds"]), SHAPE, say["out"], say["batch"], progress=say.get("progress", False))


def sharded(say):
    """Whole steps of DTensors, their gathered results beside the step of the whole, on every mesh that the processes make."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    world = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (world,))] + ([init_device_mesh("cpu", (2, 2))] if world == 4 else [])
    for mesh in meshes:
        for placements in (
            [Shard(0)],
            [Shard(2)],
            [Shard(1), Shard(3)],
            [Shard(2), Shard(2)],
            [Replicate(), Shard(0)],
            [Replicate()],
        ):
            if len(placements) != mesh.ndim:
                continue
            shape = (3, 2, 7, 5)  # uneven, and fewer rows than processes
            x = portable_noise(shape, 7, step=-1)
            part = distributed.portable_noise_dtensor(shape, 7, -1, mesh, placements)
            assert torch.equal(part.full_tensor(), x)
            for seed in (3, [4, 5, 6], [(4, 9), (5, 9), (2**63, 0)]):
                whole, parts, history, pieces = x * 10, part * 10, [], []
                for i in range(PLAN.num_steps):
                    history = [0.3 * whole, *history[: PLAN.order - 1]]
                    pieces = [
                        DTensor.from_local(0.3 * parts.to_local(), mesh, placements, shape=x.shape, stride=x.stride()),
                        *pieces[: PLAN.order - 1],
                    ]
                    whole = fast_step(PLAN, i, whole, history, seed=seed)
                    parts = distributed.fast_step_dtensor(PLAN, i, parts, pieces, seed=seed)
                    assert torch.equal(parts.full_tensor(), whole), (placements, seed, i)
            for scale, cfg_pp in ((2.5, False), (torch.tensor([1.0, 0.0, 7.0], dtype=torch.float64), True)):
                guided = dict(seed=3, prediction_type="v", cfg_pp=cfg_pp)
                expected = fast_step(PLAN, 0, x, [x * 0.5], guidance=(x * 0.25, scale), **guided)
                halves = distributed.fast_step_dtensor(PLAN, 0, part, [part * 0.5], guidance=(part * 0.25, scale), **guided)
                assert all(torch.equal(h.full_tensor(), e) for h, e in zip(halves, expected, strict=True)), (placements, scale)
    part = distributed.portable_noise_dtensor(shape, 7, -1, meshes[0], [Shard(2)])
    start, local = distributed.shard_of(part)["global_start"], part.to_local()
    assert distributed.shard_of(part)["global_shape"] == shape[1:] and start[::2] == (0, 0)
    assert torch.equal(local, x[:, :, start[1] : start[1] + local.shape[2]])
    guided = dict(seed=3, prediction_type="v")
    for changed, message in (
        (dict(x=local), "x must be a DTensor, got Tensor"),
        (dict(history=part), "history must be a list of predictions"),
        (dict(guidance=2.5), "guidance must be a pair"),
        (
            dict(guidance=(part, torch.ones(1).double())),
            r"guidance\[1\] must be .* for each sample of the whole batch, got Tensor \(1,\)",
        ),
        (dict(guidance=(part, distributed.portable_noise_dtensor((3,), 7, 0, meshes[0], [Shard(0)]))), "got DTensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            distributed.fast_step_dtensor(PLAN, 0, **{"x": part, "history": [part], **guided, **changed})


def main(say):
    """What it is to `do`, as `rank` of `world` processes that meet at the file `store`; what it prints goes into `said`."""
    with open(say["said"], "wb") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    torch.set_num_threads(1)
    if say["world"] > 1:
        store = dist.FileStore(say["store"], say["world"])
        dist.init_process_group(
            "gloo", store=store, rank=say["rank"], world_size=say["world"], timeout=datetime.timedelta(seconds=60)
        )
    {"generate": generate, "sharded": sharded}[say["do"]](say)
    if say["world"] > 1:
        dist.destroy_process_group()
