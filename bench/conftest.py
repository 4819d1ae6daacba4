"""What every benchmark shares: the device, a clock that waits for it, a copy's bandwidth, and a table beside that limit."""

import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = 1 << 24  # elements


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def now():
    """Seconds, when the device has done all it was given."""
    synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=now))


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a figure depends on, and nothing of the machine's name."""
    machine_info.clear()
    machine_info.update(
        device=device_name(), torch=torch.__version__, threads=torch.get_num_threads(), python=platform.python_version()
    )
    if DEVICE == "cuda":
        import triton

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        machine_info.update(driver=driver, cuda=torch.version.cuda, triton=triton.__version__)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps what a figure is made of; ERSDE_FAST_COMMIT names the commit where there is no repository."""
    commit = os.environ.get("ERSDE_FAST_COMMIT") or output_json["commit_info"].get("id")
    kept = ("median", "min", "max", "iqr", "rounds", "iterations")
    rows = [
        {"group": b["group"], "name": b["name"], **b["extra_info"], **{key: b["stats"][key] for key in kept}}
        for b in output_json["benchmarks"]
    ]
    when = output_json["datetime"]
    machine = output_json["machine_info"]
    output_json.clear()
    output_json.update(commit=commit, datetime=when, machine=machine, benchmarks=rows)


def device_name():
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")]
    return names[0] if names else platform.machine()


@pytest.fixture(scope="session")
def copy_bandwidth():
    """GB/s of `copy_`, bytes read and written, for tensors of the given number of bytes; measured once for each."""
    measured = {}

    def bandwidth(nbytes):
        if nbytes not in measured:
            source = torch.ones(max(nbytes // 4, 1), device=DEVICE)
            target = torch.empty_like(source)
            repeats = max(1, (1 << 26) // nbytes)
            times = []
            for _ in range(12):
                synchronize()
                start = time.perf_counter()
                for _ in range(repeats):
                    target.copy_(source)
                synchronize()
                times.append((time.perf_counter() - start) / repeats)
            measured[nbytes] = 2 * source.numel() * 4 / statistics.median(times[2:]) / 1e9
        return measured[nbytes]

    return bandwidth


def measure(benchmark, name, function, numel, streams=0, dtype=torch.float32, copy_bandwidth=None):
    """Runs a contender and notes what it was; with the number of streams it moves, its bytes and a copy's bandwidth too."""
    benchmark.extra_info.update(contender=name)
    if streams:
        nbytes = numel * dtype.itemsize
        benchmark.extra_info.update(bytes=streams * nbytes, copy_gb_s=copy_bandwidth(nbytes))
    for _ in range(3):
        function()
    start = now()
    function()
    once = now() - start
    rounds = 9 if numel > LARGE else 25
    benchmark.pedantic(function, rounds=rounds, iterations=max(1 if DEVICE == "cpu" else 4, min(1000, int(4e-3 / once))))


def timed_steps(scheduler) -> list[float]:
    """The seconds of each step that a scheduler of diffusers takes from now on, until its `step` is deleted; each is awaited."""
    step, times = scheduler.step, []

    def timed(*args, **kwargs):
        start = now()
        result = step(*args, **kwargs)
        times.append(now() - start)
        return result

    scheduler.step = timed
    return times


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in getattr(session, "benchmarks", []) if b.stats.rounds]
    groups = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for group, members in groups.items():
        ours = next((m for m in members if m.extra_info.get("contender") == "fused"), None)
        if ours is None:
            continue
        terminalreporter.write_line("")
        terminalreporter.write_line(f"{group}{'':4}copy_ {ours.extra_info['copy_gb_s']:.1f} GB/s")
        terminalreporter.write_line(f"  {'':<22}{'median us':>12}{'GB/s':>9}{'of copy_':>10}{'times ours':>12}")
        for m in members:
            info, median = m.extra_info, m.stats.median
            terminalreporter.write_line(
                f"  {info['contender']:<22}{median * 1e6:>12.1f}{info['bytes'] / median / 1e9:>9.1f}"
                f"{info['bytes'] / median / 1e9 / info['copy_gb_s']:>10.0%}{median / ours.stats.median:>12.2f}"
            )
