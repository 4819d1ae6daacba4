"""Many threads, forked and spawned processes, and a million calls: nothing shared is written, nothing waits, nothing grows."""

import multiprocessing
import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ersde_fast import er_sde_plan, fast_step, portable_noise, step_log_prob

CALLS = int(os.environ.get("ERSDE_FAST_CALLS", 50_000))  # 1000000: the long form
PLAN = er_sde_plan([9, 7, 5, 3, 2, 1, 0.5], order=3)


def run(seed: int, shape=(2, 3, 40), generator=None) -> torch.Tensor:
    """A whole run with noise of its own."""
    x, history = 9 * portable_noise(shape, seed, step=-1), []
    for i in range(PLAN.num_steps):
        history = [0.2 * x, *history[: PLAN.order - 1]]
        source = {"seed": seed} if generator is None else {"generator": generator}
        x = fast_step(PLAN, i, x, history, **source)
    return x


def test_threads_share_a_plan():
    """Sixteen threads at once, each with its generator or its seed, make what one thread makes; a plan is built by each too."""
    own = lambda seed: torch.Generator().manual_seed(seed) if seed % 2 else None  # noqa: E731
    expected = [run(seed, generator=own(seed)) for seed in range(64)]
    start = threading.Barrier(16)

    def work(thread):
        start.wait()
        results = {seed: run(seed, generator=own(seed)) for seed in range(thread, 64, 16)}
        again = er_sde_plan([9, 7, 5, 3, 2, 1, 0.5], order=3)
        assert torch.equal(again.weights, PLAN.weights) and again.rows == PLAN.rows
        return results

    with ThreadPoolExecutor(16) as pool:
        for results in pool.map(work, range(16)):
            for seed, result in results.items():
                assert torch.equal(result, expected[seed])


def test_long_steps_release_the_interpreter():
    """Python runs on while another thread is inside a step: its counter would stand still if the step held the interpreter."""
    x = torch.zeros(1, 2**24)
    out, counted, started, done = torch.empty_like(x), 0, threading.Event(), threading.Event()

    def work():
        started.set()
        fast_step(PLAN, 0, x, [x], seed=1, out=out)
        done.set()

    thread = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        thread.start()
        started.wait()
        while not done.is_set():
            counted += 1
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert counted > 1000


def in_child(queue, seed):
    torch.set_num_threads(1)  # as torch's own data loaders: OpenMP's threads do not survive a fork
    queue.put(run(seed, (2, 3, 40_000)).numpy())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_processes(method):
    """After steps on several threads in the parent: the child's have the same bits."""
    expected = run(3, (2, 3, 40_000))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue, 3))
    child.start()
    try:
        assert torch.equal(torch.from_numpy(queue.get(timeout=60)), expected)
    finally:
        child.join(10)
        child.kill()


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_memory_does_not_grow():
    """Of every way to call, refused calls too; a leak of one byte a call would show in the long form."""
    x, history = torch.randn(1, 4, 8, 8), [torch.randn(1, 4, 8, 8) for _ in range(3)]
    generator, step = torch.Generator(), torch.tensor(3)

    def refused():
        with pytest.raises(ValueError):
            fast_step(PLAN, 99, x, history)

    ways = [
        (10, lambda: fast_step(PLAN, 3, x, history)), (10, lambda: fast_step(PLAN, 3, x, history, seed=5)),
        (10, lambda: fast_step(PLAN, 3, x, history, generator=generator)), (3, lambda: fast_step(PLAN, 3, x, history, seed=[5])),
        (3, lambda: fast_step(PLAN, 3, x, history, seed=5, prediction_type="v", guidance=(x, 2.0))),
        (1, lambda: fast_step(PLAN, step, x, history, seed=5)), (1, lambda: er_sde_plan([9, 5, 1])), (1, refused),
        (1, lambda: step_log_prob(PLAN, 3, x, history, x)), (1, lambda: portable_noise((2, 3), 5)),
    ]  # fmt: skip
    a_round = sum(count for count, _ in ways)

    def rounds(calls):
        for _ in range(calls // a_round):
            for count, way in ways:
                for _ in range(count):
                    way()

    rounds(5_000)
    before, start = resident(), time.monotonic()
    rounds(CALLS)
    grown = resident() - before
    assert grown < 2**20, f"{grown} bytes after {CALLS} calls in {time.monotonic() - start:.0f} s"
