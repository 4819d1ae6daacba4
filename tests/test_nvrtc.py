"""The CUDA kernels by NVRTC: what a machine without a GPU can see of it. Compiled for several architectures, kept, and named."""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ersde_fast.backends import compiled, nvrtc

ROOT = Path(__file__).resolve().parent.parent
NAMES = [compiled.kernels_library()[0].ersde_kernel_name(number).decode() for number in range(nvrtc.KERNELS)]


@pytest.fixture(scope="module")
def compiler():
    """That of PyPI's NVRTC, of the major version that torch's CUDA builds bring."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
        yield nvrtc.Compiler(ROOT / "csrc")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ERSDE_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize(
    "expression",
    [
        "ersde::step_vectors<float, 4, ersde::Noise::portable, false>",
        "ersde::step_vectors_torch<__nv_bfloat16, 2, true>",
        "ersde::step_elements<double, uint64_t>",
        "ersde::plan_rows",
        "ersde::log_prob_sums",
    ],
)
def test_a_kernel_compiles(compiler, cache, expression, capability):
    assert expression in NAMES
    name, binary = compiler.kernel(expression, capability)
    assert binary[:4] == b"\x7fELF" and name in binary
    assert expression.partition("<")[0].removeprefix("ersde::").encode() in name


def test_a_device_newer_than_the_compiler_gets_what_its_driver_compiles(compiler, cache):
    _, code = compiler.kernel(NAMES[0], (99, 0))
    newest = max(compiler._architectures)
    assert f".target sm_{newest}".encode() in code


def test_every_kernel_has_a_name_of_its_own():
    """For each of three types: steps without noise of 1 to 7 terms and predicting of 2 to 7, with either stream one term fewer;
    log-densities of few terms and of most, five of each. Then four kernels for elements of a step, a plan's, two for elements of a
    log-density and its sums'."""
    named = [name for name in NAMES if name]
    assert len(named) == len(set(named)) == 3 * (7 + 6 + 2 * (6 + 5) + 2 * 5) + 4 + 1 + 2 + 1


class Counting(nvrtc.Compiler):
    """One that makes a binary of words alone, slowly enough for others to come meanwhile."""

    def __init__(self, folder):
        self.sources, self.include, self.version, self.compiled = folder, folder, (13, 0), 0
        for name in ("a.h", "b.cu", "cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp"):
            (folder / name).write_text(name)

    def _compile(self, expression, capability):
        self.compiled += 1
        return b"name\0" + f"{expression} {capability}".encode() * 100


def test_a_kernel_is_compiled_once_and_kept(cache, tmp_path):
    first, second = Counting(tmp_path), Counting(tmp_path)
    kept = first.kernel("k", (9, 0))
    assert first.kernel("k", (9, 0)) == second.kernel("k", (9, 0)) == kept and kept[0] == b"name"
    assert (first.compiled, second.compiled) == (1, 0)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("change", ["expression", "capability", "source", "header", "version"])
def test_what_the_machine_code_depends_on_is_compiled_anew(cache, tmp_path, change):
    Counting(tmp_path).kernel("k", (9, 0))
    other = Counting(tmp_path)
    if change in ("source", "header"):
        (tmp_path / {"source": "b.cu", "header": "cuda_fp16.h"}[change]).write_text("changed")
    if change == "version":
        other.version = (13, 1)
    other.kernel("l" if change == "expression" else "k", (8, 0) if change == "capability" else (9, 0))
    assert other.compiled == 1


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[:40] + b"x" + content[41:]]
)
def test_a_damaged_file_is_compiled_again(cache, tmp_path, damage):
    compiler = Counting(tmp_path)
    kept = compiler.kernel("k", (9, 0))
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert compiler.kernel("k", (9, 0)) == kept and compiler.compiled == 2
    assert compiler.kernel("k", (9, 0)) == kept and compiler.compiled == 2


@pytest.mark.parametrize("what", ["a file", "no permission"])
def test_a_folder_that_cannot_be_written_is_no_harm(cache, tmp_path, monkeypatch, what):
    if what == "a file":
        cache.write_text("")
    else:
        monkeypatch.setattr(nvrtc, "write_whole", lambda *_: (_ for _ in ()).throw(PermissionError()))
    compiler = Counting(tmp_path)
    assert compiler.kernel("k", (9, 0)) == compiler.kernel("k", (9, 0))
    assert compiler.compiled == 2


def test_many_at_once_leave_one_whole_file(cache, tmp_path):
    compiler, answers = Counting(tmp_path), []
    threads = [threading.Thread(target=lambda: answers.append(compiler.kernel("k", (9, 0)))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = cache.iterdir()
    assert all(a == b for a, b in pairwise(answers)) and len(answers) == 16
    content = path.read_bytes()
    assert hashlib.sha256(content[32:]).digest() == content[:32]


@pytest.mark.parametrize(
    "platform, environment, folder",
    [
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/ersde_fast"),
        ("linux", {"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/ersde_fast"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/ersde_fast/cache"),
        ("linux", {"ERSDE_FAST_CACHE": "/e"}, "/e"),
    ],
)
def test_where_kernels_are_kept(monkeypatch, platform, environment, folder):
    monkeypatch.delenv("ERSDE_FAST_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert nvrtc.cache_folder() == Path(folder)


def test_why_there_are_no_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert nvrtc.load(compiled.kernels_library()[0], tmp_path)[1] == f"torch {torch.__version__} has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert nvrtc.load(None, tmp_path)[1] == "the library that launches the kernels is missing"
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda *_: (_ for _ in ()).throw(OSError("no such file")))
    assert nvrtc.load(compiled.kernels_library()[0], tmp_path)[1] == "the driver of CUDA 11.8 or newer is needed (no such file)"


def test_why_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "_roots", lambda: [tmp_path])
    with pytest.raises(FileNotFoundError, match=r"no lib/(lib)?nvrtc"):
        nvrtc.Compiler(tmp_path)


BARE = """
import torch, ersde_fast
from ersde_fast import backends, fast_step
plan = ersde_fast.er_sde_plan([9, 5, 4, 2, 1, 0], order=3)
x, *history = (torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(k)) for k in range(4))
for dtype in (torch.float32, torch.float16):
    on = lambda t: t.cuda().to(dtype)
    got = fast_step(plan, 3, on(x), [on(d) for d in history], seed=5)
    assert torch.equal(got.cpu(), fast_step(plan, 3, x.to(dtype), [d.to(dtype) for d in history], seed=5))
print(backends.CUDA.way, backends.CPU.way)
"""


@pytest.mark.gpu
def test_a_machine_without_any_compiler(tmp_path):
    hidden = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME", "CUDA_PATH")}
    hidden |= {
        "PATH": str(tmp_path),
        "ERSDE_FAST_CUDA": "nvrtc",
        "ERSDE_FAST_CPU": "library",
        "ERSDE_FAST_CACHE": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=hidden)
    assert done.stdout.split() == ["nvrtc", "library"], done.stderr
    assert len(list(tmp_path.glob("*.cubin"))) == 2


@pytest.mark.parametrize("quiet, hidden", [("0", None), ("1", True)])
def test_the_first_compilation_is_shown(compiler, cache, monkeypatch, quiet, hidden):
    shown = []
    monkeypatch.setattr(
        nvrtc, "tqdm", lambda **bar: shown.append(bar) or contextlib.nullcontext(types.SimpleNamespace(update=bool))
    )
    monkeypatch.setattr(compiler, "_compile", lambda expression, capability: b"name\0binary")
    monkeypatch.setenv("ERSDE_FAST_QUIET", quiet)
    assert compiler.kernel("a kernel", (9, 0)) == compiler.kernel("a kernel", (9, 0)) == (b"name", b"binary")
    assert [bar["disable"] for bar in shown] == [hidden]
