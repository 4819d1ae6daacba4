"""Several GPUs of one machine: split latents' steps and a shared-out run, their bits, what they communicate and what they cost.

torchrun --standalone --nproc-per-node 1 bench/gpus.py --out out/one
torchrun --standalone --nproc-per-node 2 bench/gpus.py --out out/two               # or 4, 8: the same digests, more samples a second
torchrun --standalone --nproc-per-node 2 bench/gpus.py --out out/killed --dies 1   # ends with an error that says what is kept
torchrun --standalone --nproc-per-node 2 bench/gpus.py --out out/killed            # the same digests again
"""

import argparse
import hashlib
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from scaling import sampled
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.profiler import profile

from ersde_fast import er_sde_plan, fast_step, portable_noise
from ersde_fast.distributed import fast_step_dtensor, generate, load_samples, portable_noise_dtensor
from ersde_fast.schedules import karras_sigmas

SHAPE = (1, 16, 21, 90, 160)  # of a video model; 21 frames over two GPUs are 11 and 10
LARGE = (1, 16, 81, 180, 320)  # the same with every frame and twice the height and width
PLAN = er_sde_plan(karras_sigmas(10), order=3)
SHARES = (2, 4, 8, 16, 32)  # of so many GPUs one holds a share; a share of 32 is 3 frames
COMMUNICATES = ("nccl", "gloo", "c10d", "all_reduce", "all_gather", "broadcast")


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def predictions(x):
    """Fixed ones, elementwise: a model whose bits no device changes."""
    return [x * 0.5, x * 0.25, x * 0.125]


def seconds_of(step, device: str, repeats: int) -> float:
    """Of one of many steps, none of which is awaited but the last."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(5):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - start) / repeats


def split_step(mesh) -> tuple[str, str, list[str], float]:
    """Digests of the step on the CPU and of the gathered split step, what of its trace communicates, and microseconds a step."""
    whole = portable_noise(SHAPE, 7, step=-1) * 80
    expected = digest(fast_step(PLAN, 5, whole, predictions(whole), seed=3))
    x = portable_noise_dtensor(SHAPE, 7, -1, mesh, [Shard(2)]) * 80
    history = predictions(x)
    fast_step_dtensor(PLAN, 5, x, history, seed=3)
    with profile() as trace:
        result = fast_step_dtensor(PLAN, 5, x, history, seed=3)
    named = sorted({event.key for event in trace.key_averages()})
    took = seconds_of(lambda: fast_step_dtensor(PLAN, 5, x, history, seed=3), mesh.device_type, 100)
    found = [name for name in named if any(word in name.lower() for word in COMMUNICATES)]
    return expected, digest(result.full_tensor()), found, took * 1e6


def large_step(mesh, repeats: int) -> tuple[float, float]:
    """Microseconds of a step of the large latent, split by frames: of the slowest process, as DTensors and as plain shards."""
    x = portable_noise_dtensor(LARGE, 7, -1, mesh, [Shard(2)])
    history = predictions(x)
    part = shard_step(mesh.size(), mesh.get_rank(), mesh.device_type)
    took = []
    for step in (lambda: fast_step_dtensor(PLAN, 5, x, history, seed=3), part):
        dist.barrier()
        slowest = torch.tensor(seconds_of(step, mesh.device_type, repeats), device="cpu")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        took.append(slowest.item() * 1e6)
    return tuple(took)


def shard_step(world: int, rank: int, device: str):
    """The step of the large latent's frames that fall to one of so many processes, as a plain shard."""
    frames = torch.arange(LARGE[2]).chunk(world)[rank]
    x = portable_noise((1, LARGE[1], len(frames), *LARGE[3:]), 7, step=-1, device=device)
    history = predictions(x)
    whole = dict(global_shape=LARGE[1:], global_start=(0, int(frames[0]), 0, 0))
    return lambda: fast_step(PLAN, 5, x, history, seed=3, **whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=4096, help="of each process")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=200, help="steps of the large latent that are timed")
    parser.add_argument("--dies", type=int, help="the rank that dies in mid-run")
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    say = print if rank == 0 else lambda *_: None

    mesh = init_device_mesh(args.device, (world,))
    expected, got, found, took = split_step(mesh)
    say(f"split step on {world} x {args.device}: {got}; whole step on the CPU: {expected}; {took:.0f} us")
    say(f"  of its trace communicates: {found or 'nothing'}")

    as_dtensors, as_shards = large_step(mesh, args.repeats)
    say(
        f"a step of {'x'.join(map(str, LARGE))} by frames: {as_dtensors:.0f} us as DTensors, {as_shards:.0f} us as plain shards"
    )
    if world == 1:
        shares = {n: seconds_of(shard_step(n, 0, args.device), args.device, args.repeats) * 1e6 for n in SHARES}
        say("  the largest share of n GPUs, on this one: " + ", ".join(f"{n}: {took:.1f} us" for n, took in shares.items()))

    calls = 0

    def stub(x, sigma):
        nonlocal calls
        calls += 1
        if rank == args.dies and calls == 25:
            os._exit(9)
        return x * (0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2))

    generate(stub, PLAN, range(4096), (1, 28, 28), args.out / "stub", 128, device=args.device, progress=False)
    say(f"4096 samples of the stub: {digest(load_samples(args.out / 'stub'))}")

    took = sampled(world, args.samples * world, args.out, args.batch, args.device)
    say(f"{args.samples * world} samples of the network, 10 evaluations: {args.samples * world / took:.1f} a second")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
