"""The CUDA sources on a machine without a GPU: compiled for each architecture, read as machine code, and run as C++."""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ersde_fast.backends import compiled, nvrtc

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
# Instructions an element, noise drawn, for each tensor that is read or written: below them memory is the limit.
BUDGETS = {"float": 20, "__nv_bfloat16": 13, "__half": 13}
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
WHOLE = "sm_90"  # of which nvcc compiles every kernel; of the others, which takes as long again, NVRTC some


def cuda_include():
    """The toolkit's headers, as nvcc itself finds them."""
    said = subprocess.run([NVCC, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    return re.search(r'INCLUDES="-I([^"]+?)"', said)[1].strip()


def some_kernels():
    """Those of order 3, and of each kind the one with the most terms, which has the most registers."""
    names = [compiled.kernels_library()[0].ersde_kernel_name(number).decode() for number in range(nvrtc.KERNELS)]
    names = sorted(name for name in names if "::step_" in name)
    most = {re.sub(r", \d", "", name): name for name in names}
    return [name for name in names if ", 4" in name or name in most.values()]


def by_nvrtc(expressions, arch):
    """One binary of several kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
        compiler = nvrtc.Compiler(ROOT / "csrc")
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    compiler._call("CreateProgram", ctypes.byref(program), b'#include "er_sde_step.cu"', b"kernels", 0, None, None)
    for expression in expressions:
        compiler._call("AddNameExpression", program, expression.encode())
    options = [f"--gpu-architecture={arch}", *nvrtc.OPTIONS, f"-I{compiler.sources}", f"-I{compiler.include}"]
    compiler._call("CompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
    compiler._call("GetCUBINSize", program, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    compiler._call("GetCUBIN", program, binary)
    return binary.raw


@pytest.fixture(scope="module", params=ARCHITECTURES)
def binary(request, tmp_path_factory):
    """The kernels of one architecture."""
    path = tmp_path_factory.mktemp("cuda") / "kernels"
    if request.param == WHOLE:
        command = [NVCC, "-std=c++17", "-O3", f"-arch={WHOLE}", "-c", ROOT / "csrc" / "er_sde_step.cu", "-o", path]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    else:
        path.write_bytes(by_nvrtc(some_kernels(), request.param))
    return request.param, path


@pytest.mark.parametrize("source", ["er_sde_plan.cu", "er_sde_log_prob.cu"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_other_kernels_compile_without_spills(arch, source, tmp_path):
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", f"-arch={arch}", "-c", ROOT / "csrc" / source]
    result = subprocess.run([*command, "-o", tmp_path / "kernels.o"], capture_output=True, text=True)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    assert set(re.findall(r"(\d+) bytes spill stores", result.stderr)) == {"0"}


def cuobjdump(what, path):
    """Of the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout


def test_no_spills_and_no_local_memory(binary, capsys):
    arch, path = binary
    used = re.findall(r"Function .*\n +REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage", path))
    assert len(used) >= (100 if arch == WHOLE else 40)
    assert {(stack, local) for _, stack, local in used} == {("0", "0")}
    registers = sorted(int(r) for r, *_ in used)
    with capsys.disabled():
        print(f"\n  {arch}: {registers[0]} to {registers[-1]} registers")


def machine_code(path):
    """Kernel name to its instructions."""
    text = cuobjdump("-sass", path)
    functions, parts = {}, text.split("Function : ")[1:]
    names = subprocess.run(["c++filt", *(part.split()[0] for part in parts)], capture_output=True, text=True, check=True).stdout
    for part, name in zip(parts, names.splitlines(), strict=True):
        name = re.sub(r"\(ersde::Noise\)|\(anonymous namespace\)::|ersde::|^void ", "", name).split("(")[0].strip()
        functions[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", part)
    return functions


def main_loop(instructions):
    """The instructions of the widest backward branch that holds a 128-bit store: one turn of the grid-stride loop."""
    addresses = range(len(instructions))
    best = []
    for at in addresses:
        if (m := re.search(r"BRA.*?0x([0-9a-f]+)", instructions[at])) and "BRA" in instructions[at]:
            target = int(m[1], 16) // 16
            body = instructions[target : at + 1] if target < at else []
            if any("STG" in i and ".128" in i for i in body) and (not best or len(body) < len(best)):
                best = body
    return best


def test_aligned_paths_move_128_bits_and_fit_the_budget(binary, capsys):
    """The kernels of order 3: every global access of the loop is 128 bits wide, and arithmetic is not the limit."""
    arch, path = binary
    kernels = machine_code(path)
    lines = []
    cases = itertools.product(
        [("float", 4), ("__nv_bfloat16", 8), ("__half", 8)], ["step_vectors", "step_vectors_torch"], [0, 1]
    )
    for (dtype, elements), kernel, predicts in cases:
        reads, writes, turns = 4 + predicts, 1 + predicts, 4 if kernel == "step_vectors_torch" else 1
        source = ["1"] if turns == 1 else []
        name = f"{kernel}<{', '.join([dtype, '4', *source, 'true' if predicts else 'false'])}>"
        code = kernels[name]
        assert not any(re.search(r"\b(LDL|STL)\b", i) for i in code)
        wide = [i for i in code if re.search(r"\b(LDG|STG)\b", i) and ".128" in i]
        assert sum("LDG" in i for i in wide) >= reads * turns and sum("STG" in i for i in wide) >= writes * turns
        each, budget = len(main_loop(code)) / (elements * turns), BUDGETS[dtype] * (reads + writes)
        lines.append(f"{arch} {name}: {each:.0f} instructions an element (budget on sm_90: {budget})")
        assert each > 0
        if arch == "sm_90":
            assert each <= budget, lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n  ")


def test_the_binding_type_checks_with_cuda():
    """binding.cpp with its CUDA half, against the CUDA headers that every build of torch ships."""
    include = Path(torch.__path__[0]) / "include"
    folders = [
        ROOT / "tests" / "cuda_header_stubs",
        cuda_include(),
        include,
        include / "torch/csrc/api/include",
        sysconfig.get_paths()["include"],
    ]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-DERSDE_WITH_CUDA", "-DTORCH_EXTENSION_NAME=_C"]
    command += [f"-I{folder}" for folder in folders] + [ROOT / "csrc" / "binding.cpp"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_kernels_run_as_cpp_under_the_sanitizers(tmp_path):
    """Sizes around every boundary, dtypes, orders, strides, rows and rings: the CPU kernel's bits, and no stray access."""
    library = tmp_path / "cuda_on_host.so"
    flags = ["-std=c++20", "-g1", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fvisibility=hidden"]
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-DTORCH_EXTENSION_NAME=_C"]
    torch_headers = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    kernels = ["-O1", "-include", ROOT / "tests" / "cuda_on_host.h", f"-I{cuda_include()}", ROOT / "tests" / "cuda_on_host.cpp"]
    binding = ["-O0", *torch_headers, ROOT / "csrc" / "binding.cpp"]
    objects = [tmp_path / "kernels.o", tmp_path / "binding.o"]
    builds = [
        subprocess.Popen(["g++", *flags, *source, "-c", "-o", output], stderr=subprocess.PIPE, text=True)
        for source, output in zip([kernels, binding], objects, strict=True)
    ]
    for build in builds:
        _, said = build.communicate()
        assert build.returncode == 0, said
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"]
    result = subprocess.run(["g++", *flags, "-shared", *objects, *libraries, "-o", library], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    preload = []  # the sanitizer first, and the C++ library whose exceptions it wraps
    for name in ("libasan.so", "libstdc++.so.6"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        preload.append(found.stdout.strip())
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "ERSDE_CUDA_ON_HOST": str(library),
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "cuda_on_host_cases.py"]
    result = subprocess.run(tests, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
