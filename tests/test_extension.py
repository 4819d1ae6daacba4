"""Why there is no extension, in words: not built, not for this torch, not loadable; and the warning at the first step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = """
import sys
sys.path += {path!r}
import ersde_fast, torch
assert ersde_fast.__file__.startswith({folder!r}), ersde_fast.__file__
plan, x = ersde_fast.er_sde_plan([3, 2, 1, 0]), torch.ones(2, 3)
step = lambda x: ersde_fast.fast_step(plan, 0, x, [x], seed=5)
for _ in range(3):
    step(x)
    {compiled}
print(ersde_fast.available_backends()["cpu"])
"""
INFO = "REASONS, TORCH = {!r}, {!r}\n"


def steps(folder, *flags, compiled=False, **environment):
    """What three steps of the package in that folder say: its reason, and its warnings. Where `compiled`, three in compiled code too."""
    compiled = 'torch.compile(step, backend="eager")(x)' if compiled else ""
    code = STEPS.format(folder=str(folder), compiled=compiled, path=[path for path in sys.path if path.endswith("-packages")])
    command = [sys.executable, *flags, "-S", "-c", code]  # -S: or an editable installation lends its extension
    environment = os.environ | {"PYTHONPATH": str(folder), **environment}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return done.stdout.strip(), done.stderr


@pytest.fixture
def package(tmp_path):
    shutil.copytree(
        ROOT / "ersde_fast", tmp_path / "ersde_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build*")
    )
    return tmp_path / "ersde_fast"


@pytest.mark.parametrize(
    "built, reason",
    [
        ({}, "the extension was not built, or for another Python: pip install --no-build-isolation"),
        ({"_build_info.py": INFO.format({"cpu": "no C++ compiler was found"}, torch.__version__)}, "no C++ compiler was found"),
        (
            {"_build_info.py": INFO.format({}, "1.9.0")},
            f"built against torch 1.9.0, and this is torch {torch.__version__}: pip install",
        ),
        ({"_C.abi3.so": "no library"}, f"the extension does not load beside torch {torch.__version__} ("),
    ],
)
def test_the_reason_and_the_warning(package, built, reason):
    for name, text in built.items():
        (package / name).write_text(text)
    said, warned = steps(package.parent, "-Walways", compiled=not built)
    assert reason in said and "circular" not in said
    assert warned.count("UserWarning: ersde-fast has no kernel for cpu tensors") == 1 and said in warned
    assert "ERSDE_FAST_QUIET=1" in warned


def test_the_warning_can_be_silenced(package):
    assert "ersde-fast" not in steps(package.parent, "-Walways", compiled=True, ERSDE_FAST_QUIET="1")[1]
    assert "ersde-fast" not in steps(package.parent, "-Wignore:ersde-fast")[1]
    assert "UserWarning: ersde-fast has no kernel" in steps(package.parent, "-Werror")[1]
