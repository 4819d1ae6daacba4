"""What runs here and what does not, told before a step needs it."""

import sys

import pytest
import torch

import ersde_fast
from ersde_fast import backends
from ersde_fast.backends import CPU, CUDA, triton
from ersde_fast.reference import step_of
from ersde_fast.request import StepRequest
from ersde_fast.table import Table


@pytest.fixture
def gpu_without_kernels(monkeypatch, tmp_path):
    """A machine whose GPU PyTorch sees, without the extension and with an empty PATH."""
    for kernels in (CPU, CUDA):
        monkeypatch.setattr(kernels, "kernels", None)
        monkeypatch.setattr(kernels, "why_no_kernels", "no C++ compiler was found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton.os, "name", "posix")
    triton.unavailable.cache_clear()
    yield tmp_path
    triton.unavailable.cache_clear()


X = torch.empty(2, 3, device="meta")  # on a device that is not the CPU
STEP = StepRequest(Table(torch.empty(1, 9), False), 0, X, [])


def test_triton_without_a_c_compiler_does_not_run(gpu_without_kernels):
    assert "needs a C compiler, and found no gcc or clang" in ersde_fast.available_backends()["triton"]
    assert backends.choose(STEP).name == "reference"
    with pytest.raises(ValueError, match='backend "triton" cannot run this step: Triton needs a C compiler'):
        backends.choose(STEP, "triton")


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_triton_with_a_c_compiler_runs(gpu_without_kernels, name):
    (gpu_without_kernels / name).touch(mode=0o755)
    assert ersde_fast.available_backends()["triton"] is None
    assert backends.choose(STEP).name == "triton"


def test_the_compiler_that_cc_names(gpu_without_kernels, monkeypatch):
    monkeypatch.setenv("CC", sys.executable)
    assert ersde_fast.available_backends()["triton"] is None
    triton.unavailable.cache_clear()
    monkeypatch.setenv("CC", "none")
    (gpu_without_kernels / "gcc").touch(mode=0o755)  # Triton looks no further than CC
    assert "found no none" in ersde_fast.available_backends()["triton"]


def test_triton_without_the_headers_of_python_does_not_run(gpu_without_kernels, monkeypatch):
    (gpu_without_kernels / "gcc").touch(mode=0o755)
    monkeypatch.setattr(triton.sysconfig, "get_path", lambda *_: str(gpu_without_kernels))
    assert "headers of Python" in ersde_fast.available_backends()["triton"]


def test_a_gpu_without_any_kernel_is_said_once(gpu_without_kernels, monkeypatch):
    monkeypatch.delenv("ERSDE_FAST_QUIET", raising=False)
    backends.say_once_that_there_is_no_kernel.cache_clear()
    with pytest.warns(
        UserWarning, match=r"no kernel for cuda tensors.*no C\+\+ compiler was found; Triton needs a C compiler"
    ) as said:
        backends.say_once_that_there_is_no_kernel("cuda")
        backends.say_once_that_there_is_no_kernel("cuda")
        backends.say_once_that_there_is_no_kernel("mps")  # which could not have one
    assert len(said) == 1


def test_nothing_is_said_where_a_kernel_runs(recwarn):
    backends.say_once_that_there_is_no_kernel.cache_clear()
    x = torch.ones([1] * backends.MAX_DIMS)  # too many dimensions for a kernel
    ersde_fast.fast_step(ersde_fast.er_sde_plan([2.0, 1.0]), 0, x, [x], seed=5)
    assert not recwarn.list


class Doubler(backends.Backend):
    """A backend of a user's: the specification, on CPUs, of float32 alone."""

    name = "doubler"
    ran = 0

    def refuses(self, request):
        return None if request.x.dtype == torch.float32 else f"it steps float32 alone, and x is {request.x.dtype}"

    def run(self, request):
        self.ran += 1
        return 2 * step_of(request, None)


@pytest.fixture
def doubler():
    backends.BACKENDS.insert(0, Doubler())
    yield backends.BACKENDS[0]
    del backends.BACKENDS[0]


def test_a_backend_of_a_users_own(doubler):
    """It is chosen where it stands in the list and does not refuse, and named in every message."""
    plan, x = ersde_fast.er_sde_plan([2.0, 1.0], noise_scaler="ode"), torch.ones(2, 3)
    expected = ersde_fast.reference_step(plan, 0, x, [x])
    assert ersde_fast.available_backends()["doubler"] is None
    assert torch.equal(ersde_fast.fast_step(plan, 0, x, [x], backend="doubler"), 2 * expected) and doubler.ran == 1
    assert backends.choose(StepRequest(plan, 0, x, [x])) is doubler
    assert backends.choose(StepRequest(plan, 0, x.double(), [x])) is not doubler
    with pytest.raises(ValueError, match=r'"doubler" cannot run this step: it steps float32 alone, and x is torch\.float64'):
        ersde_fast.fast_step(plan, 0, x.double(), [x], backend="doubler")
    with pytest.raises(ValueError, match="backend must be one of doubler, cuda, triton, cpu, reference, got 'metal'"):
        ersde_fast.fast_step(plan, 0, x, [x], backend="metal")
