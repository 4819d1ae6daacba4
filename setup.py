"""Builds the extension against the torch that is installed; without torch or a compiler installs the pure-PyTorch path.

Why a part is missing is written to ersde_fast/_build_info.py, which `ersde_fast.available_backends()` reads.
ERSDE_FAST_REQUIRE=1 turns a missing CPU kernel into an error, for continuous integration.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

REQUIRE = os.environ.get("ERSDE_FAST_REQUIRE") == "1"
reasons = {}


def extension():
    """The extension module and its build command, or ([], {}) and a reason."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if REQUIRE:
            raise
        reasons["cpu"] = f"torch was not importable when ersde-fast was built ({error}): pip install --no-build-isolation ."
        return [], {}

    class BuildOrSay(BuildExtension):
        """Leaves out an extension that does not build, and says why."""

        def build_extensions(self):
            compiler = os.environ.get("CXX", "c++")
            if shutil.which(compiler) is None and shutil.which("g++") is None:
                if REQUIRE:
                    raise RuntimeError(f"no C++ compiler: neither {compiler} nor g++ is on the PATH")
                reasons["cpu"] = f"no C++ compiler was found when ersde-fast was built ({compiler}): install one and reinstall"
                self.extensions = []
            else:
                try:
                    super().build_extensions()
                except Exception as error:
                    if REQUIRE:
                        raise
                    reasons["cpu"] = f"the C++ kernel did not compile when ersde-fast was built: {error}"
                    self.extensions = []
            write_build_info()

        def get_outputs(self):
            return [path for path in super().get_outputs() if Path(path).exists()]

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    ext = CppExtension(
        "ersde_fast._C",
        ["csrc/binding.cpp", "csrc/er_sde_step_cpu.cpp"],
        depends=[str(path) for path in Path("csrc").glob("*.h")],
        extra_compile_args=[
            "-O3",
            "-ffp-contract=off",  # every fma of the kernels is written out: contraction would change their bits
            "-fno-math-errno",  # or sqrt is a call
            "-fno-trapping-math",  # or selects are branches
            "-fopenmp",  # or torch's parallel_for is serial
            "-fvisibility=hidden",
            "-g0",
        ],
        extra_link_args=["-fopenmp", "-s"],
    )
    return [ext], {"build_ext": BuildOrSay.with_options(use_ninja=shutil.which("ninja") is not None)}


def write_build_info():
    text = f'"""Written by setup.py: why a backend was not built."""\n\nREASONS = {reasons!r}\n'
    Path(__file__).with_name("ersde_fast").joinpath("_build_info.py").write_text(text)


ext_modules, cmdclass = extension()
write_build_info()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
