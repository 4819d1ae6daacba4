"""Shared by the tests: which backends run here, and exact arithmetic to hold them to."""

import functools
import os
from fractions import Fraction

# Where processes share the cores, threads of OpenMP that wait for each other cost more than they do. A worker inherits the 2
# of the process that started it, which reads this file before.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

from ersde_fast.backends import CUDA, compiled, nvrtc
from ersde_fast.noise import Portable
from ersde_fast.request import StepRequest
from ersde_fast.table import COUNTER, W_D, W_NOISE, Table

HALF_ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@functools.cache
def by_nvrtc():
    return nvrtc.load(compiled.kernels_library()[0], compiled.FOLDER)


@pytest.fixture(params=["extension", "nvrtc"])
def cuda_way(request, monkeypatch):
    """Each way to the CUDA kernels."""
    if request.param == "extension":
        if CUDA.unavailable() is None and CUDA.way != "extension":
            pytest.skip("needs the extension with CUDA")
    else:
        kernels, why = by_nvrtc()
        assert kernels is not None, why
        for name, value in {"way": "nvrtc", "kernels": kernels, "why_no_kernels": None}.items():
            monkeypatch.setattr(CUDA, name, value)


GPU_BACKENDS = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]


@pytest.fixture(params=["cpu", "reference", *GPU_BACKENDS])
def backend(request):
    """Each backend, with the device that it runs on as the default one."""
    with torch.device("cuda" if request.param in ("cuda", "triton") else "cpu"):
        yield request.param


def noise_alone(x, seeds, counter=0, shard=((), ()), out=None):
    """The one step of a plan of order 0, which is the portable noise of that counter: w_x = 0, w_noise = 1."""
    table = torch.zeros(1, W_D, dtype=torch.float64)
    table[0, W_NOISE], table[0, COUNTER] = 1, counter % 2**32
    return StepRequest(Table(table, True), 0, x, [], Portable(seeds, *shard), draws=True, out=out)


def assert_step_exact(result, plan, i, x, history, noise=None):
    """Holds a step to the error bound: (order + 3) 2^-24 sum |w_i x_i|, and half an ulp of the output type."""
    row = plan.rows[i]
    assert_sum_exact(result, [(row.w_x, x), *zip(row.w_d, history, strict=False), (row.w_noise, noise)], x, plan.order + 3)


def assert_sum_exact(result, terms, x, ulps):
    """Holds a sum of weight times tensor in the dtype of x to |error| <= ulps 2^-24 sum |w_i x_i| and half an ulp of that dtype.

    2^-53 takes the place of 2^-24 where anything is float64. The exact result is a sum of rationals.
    """
    terms = [(Fraction(w), [Fraction(v) for v in t.double().flatten().tolist()], t.dtype) for w, t in terms if w != 0]
    unit = 2.0**-53 if torch.float64 in (x.dtype, *(dtype for *_, dtype in terms)) else 2.0**-24
    assert result.shape == x.shape and result.dtype == x.dtype and result.device == x.device
    for e, got in enumerate(result.double().flatten().tolist()):
        exact = sum(w * t[e] for w, t, _ in terms)
        bound = ulps * unit * sum(abs(w * t[e]) for w, t, _ in terms)
        bound += max(HALF_ULP[x.dtype] * (abs(exact) + bound), SMALLEST[x.dtype] / 2)
        assert abs(Fraction(got) - exact) <= bound, (e, got, float(exact), float(bound))
