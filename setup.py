"""Builds the extension against the torch that is installed; without torch or a compiler installs the pure-PyTorch path.

Why a part is missing is written to ersde_fast/_build_info.py, which `ersde_fast.available_backends()` reads.
ERSDE_FAST_REQUIRE=1 turns a missing CPU kernel into an error, for continuous integration; ERSDE_FAST_SANITIZE=address,undefined
(or thread) builds it with those sanitizers, see `make sanitize`.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

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


def extension():
    """The extension module and its build command, or neither and a reason."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if REQUIRE:
            raise
        reasons["cpu"] = f"torch was not importable when ersde-fast was built ({error}): pip install --no-build-isolation ."
        return [], {}

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
            write_build_info(Path(self.build_lib, "ersde_fast"))

        def give_up(self, backend, reason):
            if REQUIRE:
                raise RuntimeError(reason)
            reasons[backend] = reason
            self.extensions = []

        def get_outputs(self):
            return [path for path in super().get_outputs() if Path(path).exists()]

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    with_cuda = cuda_extension(torch, cpp_extension)
    cpu_only = cpp_extension.CppExtension(
        "ersde_fast._C", SOURCES, depends=HEADERS, extra_compile_args=CXX_FLAGS, extra_link_args=LINK_FLAGS
    )
    build = BuildOrSay.with_options(use_ninja=shutil.which("ninja") is not None)
    return [with_cuda or cpu_only], {"build_ext": build}


def write_build_info(*folders):
    """Into the source, and into the wheel being built where there is one."""
    text = f'"""Written by setup.py: why a backend was not built."""\n\nREASONS = {reasons!r}\n'
    for folder in [Path(__file__).with_name("ersde_fast"), *folders]:
        if folder.is_dir():
            (folder / "_build_info.py").write_text(text)


ext_modules, cmdclass = extension()
write_build_info()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
