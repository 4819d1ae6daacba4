"""From the source archive to a wheel: on a machine without a compiler and without a network, and in an isolated build."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import ersde_fast
from ersde_fast.backends import library

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = Path(sysconfig.get_path("purelib"))
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
# As pip isolates a build: what the environment has is not on the path. `torch` says whether it has torch.
ISOLATED = """
import sys
sys.path[:] = [path for path in sys.path if not path.endswith("-packages")]
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError("No module named 'torch'")
if not {torch}:
    sys.meta_path.insert(0, NoTorch())
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"ERSDE_FAST_REQUIRE": "0"} | environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


@pytest.fixture
def source(tmp_path):
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part, tmp_path / "source" / part, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build*")
            )
        else:
            shutil.copy(ROOT / part, tmp_path / "source")
    return tmp_path / "source"


def test_wheel_from_the_source_archive_without_compiler_and_network(tmp_path, source):
    site = tmp_path / "site"
    run("setup.py", "-q", "sdist", cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    nowhere = {"PATH": str(tmp_path), "CXX": "none"}
    pip = ("-m", "pip", "wheel", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-w", tmp_path, ".")
    run(*pip, cwd=unpacked, **nowhere)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    modules = {path.relative_to(ROOT) for path in (ROOT / "ersde_fast").rglob("*.py")}
    modules |= {Path("ersde_fast") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert modules <= {path.relative_to(site) for path in site.rglob("*.py")}
    assert (site / "ersde_fast" / "py.typed").exists()
    here = {"PYTHONPATH": str(site), **nowhere}
    code = STEP.format(site=str(site), path=[path for path in sys.path if path.endswith("-packages")])
    got = float(run("-S", "-c", code, cwd=tmp_path, **here))  # -S: or an editable installation lends its extension

    x = torch.ones(2, 3)
    expected = ersde_fast.fast_step(ersde_fast.er_sde_plan([3, 2, 1, 0]), 0, x, [x], seed=5).sum().item()
    assert abs(got - expected) <= 6 * 6 * 2.0**-24 * 3 * 6  # six elements, each within (order + 3) 2^-24 of its terms


def build(hook, tmp_path, source, torch_there, compiler=False, **environment):
    """A hook of the build in isolation: what pip would install lies in tmp_path then."""
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    for part in Path(setuptools.__file__).parents[1].glob("setuptools*"):
        (overlay / part.name).symlink_to(part)
    (overlay / "sitecustomize.py").write_text(ISOLATED.format(torch=torch_there))
    code = f"import setuptools.build_meta; setuptools.build_meta.{hook}({str(tmp_path)!r})"
    nowhere = {} if compiler else {"CXX": "none", "PATH": str(tmp_path)}
    run("-c", code, cwd=source, PYTHONPATH=str(overlay), **nowhere, **environment)


def info_of_the_wheel(tmp_path):
    (wheel,) = tmp_path.glob("*.whl")
    said = {}
    exec(zipfile.ZipFile(wheel).read("ersde_fast/_build_info.py"), said)
    return said["REASONS"], said["TORCH"]


@pytest.mark.parametrize("hook", ["build_sdist", "prepare_metadata_for_build_wheel"])
def test_archives_and_metadata_need_no_torch(tmp_path, source, hook):
    build(hook, tmp_path, source, torch_there=False)
    assert any(tmp_path.glob("ersde_fast*"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_build_without_torch_is_the_library_for_every_python(tmp_path, source):
    build("build_wheel", tmp_path, source, torch_there=False, compiler=True)
    reasons, _ = info_of_the_wheel(tmp_path)
    assert re.search(r"No module named 'torch'.*: install torch, then pip install --no-build-isolation \.", reasons["cpu"])
    (wheel,) = tmp_path.glob("ersde_fast-*-py3-none-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"ersde_fast/csrc/{path.name}" for pattern in ("*.h", "*.cu") for path in (ROOT / "csrc").glob(pattern)}
    assert sources == {name for name in names if name.startswith("ersde_fast/csrc/")}
    assert f"ersde_fast/{library.NAME}" in names
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    loaded, why = library.load(site / "ersde_fast")
    assert loaded is not None, why


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_an_extension_that_is_demanded_and_finds_no_torch_says_what_to_do(tmp_path, source, hook):
    with pytest.raises(
        RuntimeError, match=r"error: .*No module named 'torch'.*: install torch, then pip install --no-build-isolation \."
    ):
        build(hook, tmp_path, source, torch_there=False, compiler=True, ERSDE_FAST_REQUIRE="1")


@pytest.mark.skipif(PACKAGES not in Path(torch.__file__).parents, reason="torch is of another environment than this Python's")
def test_an_isolated_build_takes_the_torch_of_its_environment(tmp_path, source):
    build("build_wheel", tmp_path, source, torch_there=True)
    reasons, version = info_of_the_wheel(tmp_path)
    assert version == torch.__version__ and "no C++ compiler was found" in reasons["cpu"]


def test_a_build_without_kernels_where_that_is_asked_for(tmp_path, source):
    build("build_wheel", tmp_path, source, torch_there=False, ERSDE_FAST_PURE="1")
    assert info_of_the_wheel(tmp_path) == ({"cpu": "ersde-fast was built with ERSDE_FAST_PURE=1: reinstall it without"}, None)


def test_diffusers_pipelines_import_with_the_root_on_the_path():
    """Where a kernels/ with an __init__.py would pass for Hugging Face's package of that name."""
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    code = "import transformers, diffusers; diffusers.StableDiffusionPipeline; transformers.CLIPTextModel"
    code += "; from ersde_fast.kernels import er_sde_step" if importlib.util.find_spec("triton") else ""
    run("-c", code, cwd=ROOT)
