"""What runs here and what does not, told before a step needs it."""

import sys

import pytest
import torch

import ersde_fast
from ersde_fast import backends


@pytest.fixture
def gpu_without_kernels(monkeypatch, tmp_path):
    """A machine whose GPU PyTorch sees, without the extension and with an empty PATH."""
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "WHY_NOT", "no C++ compiler was found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends.os, "name", "posix")
    backends._no_triton.cache_clear()
    yield tmp_path
    backends._no_triton.cache_clear()


X = torch.empty(2, 3, device="meta")  # on a device that is not the CPU


def test_triton_without_a_c_compiler_does_not_run(gpu_without_kernels):
    assert "needs a C compiler, and found no gcc or clang" in ersde_fast.available_backends()["triton"]
    assert backends.pick_backend(None, [X], None) == "reference"
    with pytest.raises(ValueError, match='backend "triton" cannot run this step: Triton needs a C compiler'):
        backends.pick_backend("triton", [X], None)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_triton_with_a_c_compiler_runs(gpu_without_kernels, name):
    (gpu_without_kernels / name).touch(mode=0o755)
    assert ersde_fast.available_backends()["triton"] is None
    assert backends.pick_backend(None, [X], None) == "triton"


def test_the_compiler_that_cc_names(gpu_without_kernels, monkeypatch):
    monkeypatch.setenv("CC", sys.executable)
    assert ersde_fast.available_backends()["triton"] is None
    backends._no_triton.cache_clear()
    monkeypatch.setenv("CC", "none")
    (gpu_without_kernels / "gcc").touch(mode=0o755)  # Triton looks no further than CC
    assert "found no none" in ersde_fast.available_backends()["triton"]


def test_triton_without_the_headers_of_python_does_not_run(gpu_without_kernels, monkeypatch):
    (gpu_without_kernels / "gcc").touch(mode=0o755)
    monkeypatch.setattr(backends.sysconfig, "get_path", lambda *_: str(gpu_without_kernels))
    assert "headers of Python" in ersde_fast.available_backends()["triton"]


def test_a_gpu_without_any_kernel_is_said_once(gpu_without_kernels, monkeypatch):
    monkeypatch.delenv("ERSDE_FAST_QUIET", raising=False)
    backends._say_once_that_there_is_no_kernel.cache_clear()
    with pytest.warns(
        UserWarning, match=r"no kernel for cuda tensors.*no C\+\+ compiler was found; Triton needs a C compiler"
    ) as said:
        backends._say_once_that_there_is_no_kernel("cuda")
        backends._say_once_that_there_is_no_kernel("cuda")
        backends._say_once_that_there_is_no_kernel("mps")  # which could not have one
    assert len(said) == 1


def test_nothing_is_said_where_a_kernel_runs(recwarn):
    backends._say_once_that_there_is_no_kernel.cache_clear()
    x = torch.ones([1] * backends.MAX_DIMS)  # too many dimensions for a kernel
    ersde_fast.fast_step(ersde_fast.er_sde_plan([2.0, 1.0]), 0, x, [x], seed=5)
    assert not recwarn.list
