"""`python -m ersde_fast`: what runs here, whether its bits are right, and the host's time for a step beside torch.add.

A few seconds, for the first lines of a bug report. The exit status is 1 where bits are wrong.
"""

import hashlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ersde_fast
from ersde_fast.backends import BACKENDS, CPU, Backend
from ersde_fast.noise import seed_table

SEEDS = [(1234, 0), (1234, 1), (2**63, 2**40)]
# SHA-256 of float32 bits, little-endian: of the portable stream at step 7, and of `golden_step` by every compiled kernel.
NOISE = "b42d4cdbd28758756b1ce85b74db2eda6d7a6c1cd02b6809a58a521aa32f40c8"
STEP = "02fe9921aa71f42c845bf21b5637b5c2d2e5b76bc208635857bcb300e93eb0da"
# Numbers that float32 holds, so that no rounding of a table differs between machines.
WEIGHTS = [[0.5, 0.5, 0.0, 0.0, 0.75], [0.5, 0.75, -0.25, 0.0, 0.5], [0.25, 1.0, -0.375, 0.125, 0.5]]
SHAPE = (1, 4, 64, 64)


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.float().cpu().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def golden_step(device: torch.device | str, backend: str | None) -> Tensor:
    """A step of order 3 whose every operand is the portable stream's."""
    plan = ersde_fast.Plan.from_weights(WEIGHTS, [3.0, 2.0, 1.0, 0.5])
    x, *history = (ersde_fast.portable_noise((3, 1001), SEEDS, step, device) for step in (-1, 10, 11, 12))
    return ersde_fast.fast_step(plan, 2, x, history, seed=SEEDS, backend=backend)


def device_of(backend: Backend) -> str:
    return "cuda" if backend.name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def versions() -> Iterator[str]:
    yield f"ersde-fast {ersde_fast.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    sets = f", instruction set {CPU.kernels.instruction_set()}" if CPU.kernels is not None else ""
    yield f"processor {platform.machine()}{sets}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index} {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"


def check(backend: Backend) -> tuple[str, bool]:
    """What is to be said of a backend, and whether all is right with it."""
    if (why := backend.unavailable()) is not None:
        return f"no: {why}", True
    way, device = getattr(backend, "way", None), device_of(backend)
    try:
        noise = backend.noise((3, 1001), seed_table(SEEDS, 3), 7, torch.device(device))
        step = golden_step(device, backend.name)
    except Exception as error:  # the rest is of use all the same
        return f"FAILED: {type(error).__name__}: {error}", False
    right = {} if noise is None else {"noise": digest(noise) == NOISE}
    if way is None:  # whose arithmetic rounds otherwise than the compiled kernels'
        right["step"] = torch.allclose(step.cpu(), golden_step("cpu", "reference"), rtol=1e-5, atol=1e-5)
    else:
        right["step"] = digest(step) == STEP
    said = [f"{name} {'right' if fits else 'WRONG'}" for name, fits in right.items()]
    return ", ".join(["yes" if way is None else f"yes, by {way}", *said]), all(right.values())


def host_microseconds(calls: dict[str, Callable[[], object]], rounds: int = 25, repeats: int = 100) -> dict[str, float]:
    """The median time of each call in microseconds, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if turn:  # the first sets things up
                times[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(measured) for name, measured in times.items()}


def timing(device: str) -> str:
    """The host's time for a step of order 3 on a device, beside torch.add."""
    sigmas = [3.0, 2.0, 1.0, 0.5]
    plan, silent = ersde_fast.er_sde_plan(sigmas, order=3), ersde_fast.er_sde_plan(sigmas, order=3, noise_scaler="ode")
    x, *history = (torch.ones(SHAPE, device=device) for _ in range(4))
    times = host_microseconds(
        {
            "torch.add": lambda: torch.add(x, history[0]),
            "without noise": lambda: ersde_fast.fast_step(silent, 2, x, history),
            "with seed=": lambda: ersde_fast.fast_step(plan, 2, x, history, seed=1),
            "with torch's stream": lambda: ersde_fast.fast_step(plan, 2, x, history),
        }
    )
    add = times.pop("torch.add")
    steps = ", ".join(f"{name} {time:.1f} ({time / add:.1f} times)" for name, time in times.items())
    return f"{device}: torch.add {add:.1f} us; a step of order 3 {steps}"


def main() -> int:
    print(*versions(), sep="\n")
    checked = {backend.name: check(backend) for backend in BACKENDS}
    print("\nbackends, the fastest first")
    for name, (said, _) in checked.items():
        print(f"  {name:<10} {said}")
    print(f"\nthe host's time for tensors {SHAPE}, float32")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"  {timing(device)}")
    wrong = [name for name, (_, right) in checked.items() if not right]
    if wrong:
        print(f"\n{', '.join(wrong)} does not give what every other machine does: please report this, with these lines")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
