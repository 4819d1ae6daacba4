"""`python -m ersde_fast`: its golden digests are those of the specification, and wrong bits are said."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ersde_fast
from conftest import assert_step_exact
from ersde_fast import __main__ as check
from ersde_fast.backends import CPU, compiled, library
from ersde_fast.noise import seed_table, specified_noise

ROOT = Path(__file__).resolve().parent.parent


def test_the_digest_of_the_noise_is_the_specifications():
    assert check.digest(specified_noise((3, 1001), seed_table(check.SEEDS, 3), 7)) == check.NOISE


def test_the_digest_of_the_step_is_that_of_a_step():
    plan = ersde_fast.Plan.from_weights(check.WEIGHTS, [3.0, 2.0, 1.0, 0.5])
    x, *history = (ersde_fast.portable_noise((3, 1001), check.SEEDS, step) for step in (-1, 10, 11, 12))
    step = check.golden_step("cpu", "cpu")
    assert_step_exact(step, plan, 2, x, history, ersde_fast.portable_noise((3, 1001), check.SEEDS, 2))
    assert check.digest(step) == check.STEP


@pytest.mark.skipif(compiled.kernels_library()[0] is None, reason="the library was not built")
def test_the_library_has_the_digest_too(monkeypatch):
    monkeypatch.setattr(CPU, "kernels", library.CPULibrary(compiled.kernels_library()[0]))
    assert check.digest(check.golden_step("cpu", "cpu")) == check.STEP


def test_it_says_what_runs():
    run = subprocess.run([sys.executable, "-m", "ersde_fast"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"ersde-fast {ersde_fast.__version__}, torch {torch.__version__}" in run.stdout
    assert re.search(r"cpu +yes, by \w+, noise right, step right", run.stdout)
    assert re.search(r"reference +yes, noise right, step right", run.stdout)
    assert re.search(r"cpu: torch.add [\d.]+ us; a step of order 3 without noise [\d.]+ \([\d.]+ times\)", run.stdout)


def test_it_says_why_not(monkeypatch):
    monkeypatch.setattr(CPU, "kernels", None)
    monkeypatch.setattr(CPU, "why_no_kernels", "no C++ compiler was found")
    assert check.check(CPU) == ("no: no C++ compiler was found", True)


def test_other_bits_are_an_error(monkeypatch, capsys):
    monkeypatch.setattr(check, "host_microseconds", lambda calls: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(check, "STEP", "of another machine")
    assert check.main() == 1
    said = capsys.readouterr().out
    assert "noise right, step WRONG" in said and "cpu does not give what every other machine does" in said


def test_a_backend_that_fails_is_said(monkeypatch):
    def fails(*_):
        raise RuntimeError("no driver")

    monkeypatch.setattr(CPU, "noise", fails)
    assert check.check(CPU) == ("FAILED: RuntimeError: no driver", False)


def test_there_is_one_version():
    assert f'\nversion = "{ersde_fast.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"## {ersde_fast.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {ersde_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()
