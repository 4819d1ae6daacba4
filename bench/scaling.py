"""The figures of docs/scaling.md: what 1, 2, 4 and 8 processes make of the same work.

python bench/scaling.py          # on this machine's cores
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ersde_fast import er_sde_plan, fast_step
from ersde_fast.distributed import fast_step_dtensor, generate
from ersde_fast.integrations.edm import class_labels_of
from ersde_fast.schedules import karras_sigmas

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from digits_unet import load_digits_unet

PROCESSES = (1, 2, 4, 8)
BATCH = 16


def sampled(world: int, samples: int, out: str | Path, batch_size: int = BATCH, device: str = "cpu") -> float:
    """Seconds of a whole `generate` of the demo's network, behind a batch for each process that is not timed."""
    net, plan = load_digits_unet().to(device), er_sde_plan(karras_sigmas(10), order=3)
    run = lambda seeds, folder: generate(  # noqa: E731
        net, plan, seeds, (1, 28, 28), folder, batch_size, progress=False, device=device,
        extra_args=lambda batch: {"class_labels": class_labels_of(net, batch, device=device)},
    )  # fmt: skip
    run(range(2**40, 2**40 + batch_size * world), f"{out}/warm")
    start = time.perf_counter()
    run(range(samples), f"{out}/timed")
    return time.perf_counter() - start


def stepped(world: int, elements: int, repeats: int = 20) -> float:
    """Seconds of one step of order 3 with portable noise, of a latent that is split over the processes, between two barriers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    shape = (1, 64, elements // 64)
    plan = er_sde_plan(karras_sigmas(10), order=3)
    if world == 1:
        x, *history = (torch.randn(shape) for _ in range(4))
        step = lambda: fast_step(plan, 5, x, history, seed=7)  # noqa: E731
    else:
        mesh = init_device_mesh("cpu", (world,))
        x, *history = (DTensor.from_local(torch.randn(1, 64 // world, shape[2]), mesh, [Shard(1)]) for _ in range(4))
        step = lambda: fast_step_dtensor(plan, 5, x, history, seed=7)  # noqa: E731
    times = []
    for _ in range(repeats):
        if world > 1:
            dist.barrier()
        start = time.perf_counter()
        step()
        if world > 1:
            dist.barrier()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def process() -> None:
    say = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if say["world"] > 1:
        store = dist.FileStore(say["store"], say["world"])
        dist.init_process_group("gloo", store=store, rank=say["rank"], world_size=say["world"])
    seconds = {"sampled": sampled, "stepped": stepped}[say["do"]](say["world"], *say["arguments"])
    if say["rank"] == 0:
        print(seconds)
    if say["world"] > 1:
        dist.destroy_process_group()


def measured(world: int, do: str, *arguments) -> float:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [folder if a is None else a for a in arguments]
        say = {"world": world, "do": do, "arguments": arguments, "store": f"{folder}/store"}
        running = [
            subprocess.Popen([sys.executable, __file__, json.dumps(say | {"rank": rank})], stdout=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        said = [one.communicate()[0] for one in running]
    assert not any(one.returncode for one in running)
    return float(said[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    args = parser.parse_args()
    print("| processes | " + " | ".join(map(str, PROCESSES)) + " |\n" + "|---" * (len(PROCESSES) + 1) + "|")
    times = [min(measured(world, "sampled", args.samples, None) for _ in range(3)) for world in PROCESSES]
    print(
        f"| generate, {args.samples} samples of 10 evaluations, samples a second | {' | '.join(f'{args.samples / t:.1f}' for t in times)} |"
    )
    print(f"| speed-up | {' | '.join(f'{times[0] / t:.2f}' for t in times)} |")
    for elements in (2**16, 2**20, 2**24):
        times = [min(measured(world, "stepped", elements) for _ in range(3)) for world in PROCESSES]
        print(f"| one step, {elements:,} elements, us | {' | '.join(f'{t * 1e6:,.0f}' for t in times)} |")


if __name__ == "__main__":
    process() if len(sys.argv) > 1 and sys.argv[1].startswith("{") else main()
