"""Bandwidth of a copy in the same session, and a table of every step beside its rivals and that limit."""

import platform
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

# `python -m pytest` puts the root on the path, where transformers would take kernels/ for Hugging Face's package of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parents[1]]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


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
    benchmark.extra_info.update(
        contender=name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine(),
    )
    if streams:
        nbytes = numel * dtype.itemsize
        benchmark.extra_info.update(bytes=streams * nbytes, copy_gb_s=copy_bandwidth(nbytes))

    def run():
        function()
        synchronize()

    benchmark.pedantic(
        run, rounds=9 if numel > 1 << 24 else 25, iterations=max(1, (1 << 21) // max(numel, 1 << 10)), warmup_rounds=3
    )


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
