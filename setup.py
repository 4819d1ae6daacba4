"""Builds the extension against the torch that is installed; without a compiler installs the pure-PyTorch path.

Why a part is missing, and for which torch the rest is, is written to ersde_fast/_build_info.py, which backends/extension.py reads.
ERSDE_FAST_PURE=1 builds no extension; ERSDE_FAST_REQUIRE=1 turns a missing CPU kernel into an error, for continuous
integration; ERSDE_FAST_SANITIZE=address,undefined (or thread) builds it with those sanitizers, see `make sanitize`.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

PURE = os.environ.get("ERSDE_FAST_PURE") == "1"
REQUIRE = os.environ.get("ERSDE_FAST_REQUIRE") == "1"
SANITIZE = os.environ.get("ERSDE_FAST_SANITIZE")
reasons = {}


CXX_FLAGS = [
    "-O3",
    "-ffp-contract=off",  # every fma of the kernels is written out: contraction would change their bits
    "-fno-math-errno",  # or sqrt is a call
    "-fno-trapping-math",  # or selects are branches
    "-fopenmp",  # or torch's parallel_for is serial
    "-fvisibility=hidden",
    "-Werror=switch",  # an enumerator that a switch forgets
    *(["-g1", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=undefined"] if SANITIZE else ["-g0"]),
]
LINK_FLAGS = ["-fopenmp", f"-fsanitize={SANITIZE}" if SANITIZE else "-s"]
HEADERS = [str(path) for path in Path("csrc").glob("*.h")]
SOURCES = ["csrc/binding.cpp", "csrc/er_sde_step_cpu.cpp", "csrc/er_sde_plan_cpu.cpp"]


def cuda_extension(torch, cpp_extension):
    """The extension with the CUDA kernel, or None and a reason."""
    if torch.version.cuda is None:
        reasons["cuda"] = f"the torch that ersde-fast was built against, {torch.__version__}, has no CUDA"
        return None
    if cpp_extension.CUDA_HOME is None or not Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists():
        reasons["cuda"] = (
            "nvcc was not found when ersde-fast was built: install the CUDA toolkit (or set CUDA_HOME) and reinstall"
        )
        return None
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0;10.0;12.0+PTX")
    return cpp_extension.CUDAExtension(
        "ersde_fast._C",
        [*SOURCES, "csrc/er_sde_step.cu", "csrc/er_sde_plan.cu"],
        depends=HEADERS,
        define_macros=[("ERSDE_WITH_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3"]},
        extra_link_args=LINK_FLAGS,
    )


def import_torch():
    """torch, which an isolated build does not see, and for which pip installs what it builds: then that of this environment."""
    try:
        import torch
    except ImportError:
        sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        import torch
    return torch


class BuildNothing(build_ext):
    """Where no extension is wanted; where none can be, an error once something is to be built: archives and metadata can."""

    def run(self):
        if not PURE:
            raise SetupError(reasons["cpu"])
        write_build_info(Path(self.build_lib, "ersde_fast"))
        if self.inplace:
            write_build_info(Path("ersde_fast"))

    def get_outputs(self):
        return []


def extension():
    """The extension module and its build command."""
    if PURE:
        reasons["cpu"] = "ersde-fast was built with ERSDE_FAST_PURE=1: reinstall it without"
        return Extension("ersde_fast._C", []), BuildNothing
    try:
        torch = import_torch()
        from torch.utils import cpp_extension
    except ImportError as error:
        reasons["cpu"] = (
            f"ersde-fast is built against the torch that is installed, and none can be imported here ({error}): install torch, "
            f"then pip install --no-build-isolation . (ERSDE_FAST_PURE=1 installs it without a kernel, many times slower)"
        )
        return Extension("ersde_fast._C", []), BuildNothing

    class BuildOrSay(cpp_extension.BuildExtension):
        """Builds the extension with CUDA, else without, else not at all, and says why."""

        def build_extensions(self):
            compiler = os.environ.get("CXX", "c++")
            if shutil.which(compiler) is None and shutil.which("g++") is None:
                self.give_up(
                    "cpu", f"no C++ compiler was found when ersde-fast was built ({compiler}): install one and reinstall"
                )
            else:
                for backend, ext in [("cuda", with_cuda), ("cpu", cpu_only)]:
                    if ext is None:
                        continue
                    self.extensions = [ext]
                    try:
                        super().build_extensions()
                        break
                    except Exception as error:
                        self.give_up(backend, f"the {backend} kernel did not compile when ersde-fast was built: {error}")
            write_build_info(Path(self.build_lib, "ersde_fast"), torch.__version__)

        def give_up(self, backend, reason):
            if REQUIRE:
                raise RuntimeError(reason)
            reasons[backend] = reason
            self.extensions = []

        def get_outputs(self):
            return [path for path in super().get_outputs() if Path(path).exists()]

        def copy_extensions_to_source(self):
            write_build_info(Path("ersde_fast"), torch.__version__)
            if self.extensions:
                super().copy_extensions_to_source()

    with_cuda = cuda_extension(torch, cpp_extension)
    cpu_only = cpp_extension.CppExtension(
        "ersde_fast._C", SOURCES, depends=HEADERS, extra_compile_args=CXX_FLAGS, extra_link_args=LINK_FLAGS
    )
    build = BuildOrSay.with_options(use_ninja=shutil.which("ninja") is not None)
    return with_cuda or cpu_only, build


def write_build_info(folder, torch_version=None):
    """Into the package that is built, in the source or in a wheel."""
    if folder.is_dir():
        said = '"""Written by setup.py: why a backend was not built, and for which torch the others were."""\n\n'
        (folder / "_build_info.py").write_text(f"{said}REASONS = {reasons!r}\nTORCH = {torch_version!r}\n")


ext_module, command = extension()
setup(ext_modules=[ext_module], cmdclass={"build_ext": command})
