"""From the source archive to a wheel on a machine without a compiler and without a network, and what the wheel does there."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["csrc", "ersde_fast", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
STEP = """
import sys
sys.path += {path!r}
import ersde_fast, torch
assert ersde_fast.__file__.startswith({site!r}), ersde_fast.__file__
assert "no C++ compiler was found" in ersde_fast.available_backends()["cpu"]
plan, x = ersde_fast.er_sde_plan([3, 2, 1, 0]), torch.ones(2, 3)
print(ersde_fast.fast_step(plan, 0, x, [x], seed=5).sum().item())
"""


def test_wheel_from_the_source_archive_without_compiler_and_network(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, source)
    run = lambda *command, cwd, **more: subprocess.run(  # noqa: E731
        [sys.executable, *command], cwd=cwd, check=True, capture_output=True, text=True, env=os.environ | more
    )
    run("setup.py", "-q", "sdist", cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    nowhere = {"PATH": str(tmp_path), "CXX": "none", "ERSDE_FAST_REQUIRE": "0"}
    pip = ("-m", "pip", "wheel", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-w", tmp_path, ".")
    run(*pip, cwd=unpacked, **nowhere)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    modules = {path.relative_to(ROOT) for path in (ROOT / "ersde_fast").rglob("*.py")}
    modules |= {Path("ersde_fast") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert modules <= {path.relative_to(site) for path in site.rglob("*.py")}
    here = {"PYTHONPATH": str(site), **nowhere}
    code = STEP.format(site=str(site), path=[path for path in sys.path if path.endswith("-packages")])
    got = float(run("-S", "-c", code, cwd=tmp_path, **here).stdout)  # -S: or an editable installation lends its extension

    import torch

    import ersde_fast

    x = torch.ones(2, 3)
    expected = ersde_fast.fast_step(ersde_fast.er_sde_plan([3, 2, 1, 0]), 0, x, [x], seed=5).sum().item()
    assert abs(got - expected) <= 6 * 6 * 2.0**-24 * 3 * 6  # six elements, each within (order + 3) 2^-24 of its terms
