"""Builds the kernels: as a library by any C++ compiler, and as an extension against the torch that is installed.

The library, ersde_fast/_kernels.so, knows neither torch nor Python and serves all of them. The extension is quicker on the host, and is
built beside it where there are a compiler and torch. Why there is none, and for which torch it is, is written to
ersde_fast/_build_info.py, which backends/extension.py reads.

ERSDE_FAST_PURE=1 builds neither; ERSDE_FAST_REQUIRE=1 turns a missing extension into an error, for continuous integration;
ERSDE_FAST_SANITIZE=address,undefined (or thread) builds them with those sanitizers, see `make sanitize`;
ERSDE_FAST_WHEEL=win_amd64, or another key of WHEELS, builds the library for that platform by PyPI's ziglang, see `make wheels`.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    sys.exit(f'setuptools {setuptools.__version__} is too old: pip install "setuptools>=77", or leave --no-build-isolation out')

PURE = os.environ.get("ERSDE_FAST_PURE") == "1"
REQUIRE = os.environ.get("ERSDE_FAST_REQUIRE") == "1"
SANITIZE = os.environ.get("ERSDE_FAST_SANITIZE")
WHEEL = os.environ.get("ERSDE_FAST_WHEEL")
WHEELS = {  # the tag of a platform to zig's name of it
    "manylinux2014_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux2014_aarch64": "aarch64-linux-gnu.2.17",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
    "win_amd64": "x86_64-windows-gnu",
}
PLATFORM = (WHEEL or sysconfig.get_platform())[:3]
LIBRARY = "_kernels" + {"win": ".dll", "mac": ".dylib"}.get(PLATFORM, ".so")
CXX = os.environ.get("CXX", "c++")
reasons = {}

FLAGS = [
    "-O3",
    "-ffp-contract=off",  # every fma of the kernels is written out: contraction would change their bits
    "-fno-math-errno",  # or sqrt is a call
    "-fno-trapping-math",  # or selects are branches
    "-fvisibility=hidden",
    "-Werror=switch",  # an enumerator that a switch forgets
    *(["-g1", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=undefined"] if SANITIZE else ["-g0"]),
]
STRIP = f"-fsanitize={SANITIZE}" if SANITIZE else "-s"
LIBRARY_FLAGS = [*FLAGS, "-std=c++17", "-fno-exceptions", *([] if PLATFORM == "win" else ["-fPIC"])]
EXTENSION_FLAGS = [*FLAGS, "-fopenmp"]  # or torch's parallel_for is serial
LIBRARY_SOURCES = ["er_sde_step_cpu", "er_sde_plan_cpu", "er_sde_c"]  # all but the last are the extension's too
HEADERS = [str(path) for path in Path("csrc").glob("*.h")]


def library_compiler():
    """The commands that compile and that link the library, or None."""
    if not WHEEL:
        for name in (CXX, "g++", "clang++"):
            if shutil.which(shlex.split(name)[0]):
                return shlex.split(name), shlex.split(name)
    if importlib.util.find_spec("ziglang") is None:
        return None
    zig, target = [sys.executable, "-m", "ziglang"], ["-target", WHEELS[WHEEL]] if WHEEL else []
    # Linked as C: as C++ it would first build the library of C++, which is not used.
    return [*zig, "c++", *target], [*zig, "cc", *target]


def build_library(compiler, linker, temporary, folder):
    """The library, in that folder; returns the objects of the kernels."""
    temporary.mkdir(parents=True, exist_ok=True)
    objects = [str(temporary / f"{name}.o") for name in LIBRARY_SOURCES]
    commands = [
        [*compiler, *LIBRARY_FLAGS, "-c", f"csrc/{name}.cpp", "-o", made]
        for name, made in zip(LIBRARY_SOURCES, objects, strict=True)
    ]
    running = [subprocess.Popen(command) for command in commands]
    failed = [command for command, process in zip(commands, running, strict=True) if process.wait() != 0]
    if failed:
        raise SetupError(shlex.join(failed[0]))
    name = [f"-Wl,-install_name,@rpath/{LIBRARY}"] if PLATFORM == "mac" else []  # or the place where it was built
    subprocess.run([*linker, "-shared", STRIP, *name, *objects, "-o", temporary / LIBRARY], check=True)
    shutil.copy(temporary / LIBRARY, folder)
    return objects[:-1]


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
        ["csrc/binding.cpp", "csrc/er_sde_step.cu", "csrc/er_sde_log_prob.cu", "csrc/er_sde_plan.cu"],
        depends=HEADERS,
        define_macros=[("ERSDE_WITH_CUDA", None)],
        extra_compile_args={"cxx": EXTENSION_FLAGS, "nvcc": ["-O3"]},
        extra_link_args=["-fopenmp", STRIP],
    )


def import_torch():
    """torch, which an isolated build does not see, and for which pip installs what it builds: then that of this environment."""
    try:
        import torch
    except ImportError:
        sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        import torch
    return torch


def find_extensions():
    """The extension as it may be built, the best first: by backend. The command that builds it, and the version of torch."""
    if PURE:
        reasons["cpu"] = "ersde-fast was built with ERSDE_FAST_PURE=1: reinstall it without"
        return {}, build_ext, None
    if WHEEL:
        reasons["cpu"] = "this ersde-fast is a wheel, which brings the library of kernels instead of the extension"
        return {}, build_ext, None
    try:
        torch = import_torch()
        from torch.utils import cpp_extension
    except ImportError as error:
        reasons["cpu"] = (
            f"the extension is built against the torch that is installed, and none could be imported when ersde-fast was built "
            f"({error}): install torch, then pip install --no-build-isolation ."
        )
        return {}, build_ext, None
    found = {"cuda": cuda_extension(torch, cpp_extension)}
    found["cpu"] = cpp_extension.CppExtension(
        "ersde_fast._C",
        ["csrc/binding.cpp"],
        depends=HEADERS,
        extra_compile_args=EXTENSION_FLAGS,
        extra_link_args=["-fopenmp", STRIP],
    )
    command = cpp_extension.BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)
    return {backend: ext for backend, ext in found.items() if ext}, command, torch.__version__


extensions, command, torch_version = find_extensions()


class BuildOrSay(command):
    """Builds the library, then the extension with CUDA, else without, else not at all, and says why."""

    def build_extensions(self):
        folder = Path(self.build_lib, "ersde_fast")
        folder.mkdir(parents=True, exist_ok=True)
        if REQUIRE and not PURE and not extensions:
            raise SetupError(reasons["cpu"])
        objects = [] if PURE else self.build_library(folder)
        of_setuptools = (
            {key: value for key, value in vars(self.extensions[0]).items() if key.startswith("_")} if self.extensions else {}
        )
        self.extensions = []
        for backend, ext in extensions.items() if "cpu" not in reasons else ():
            vars(ext).update(of_setuptools)  # what it found out of the one that it was given, and wants of each
            ext.extra_objects = objects
            self.extensions = [ext]
            try:
                super().build_extensions()
                break
            except Exception as error:
                self.give_up(backend, f"the {backend} kernel did not compile when ersde-fast was built: {error}")
        write_build_info(folder)

    def build_library(self, folder):
        compiler = library_compiler()
        if compiler is None or (not WHEEL and "ziglang" in compiler[0]):
            self.give_up("cpu", f"no C++ compiler was found when ersde-fast was built ({CXX}): install one and reinstall")
        try:
            return build_library(*compiler, Path(self.build_temp), folder) if compiler else []
        except (OSError, SetupError, subprocess.CalledProcessError) as error:
            self.give_up("cpu", f"the kernels did not compile when ersde-fast was built: {error}")
            return []

    def give_up(self, backend, reason):
        if REQUIRE or WHEEL:
            raise SetupError(reason)
        reasons[backend] = reason
        self.extensions = []

    def get_outputs(self):
        outputs = [*super().get_outputs(), str(Path(self.build_lib, "ersde_fast", LIBRARY))]
        return [path for path in outputs if Path(path).exists()]

    def copy_extensions_to_source(self):
        write_build_info(Path("ersde_fast"))
        library = Path(self.build_lib, "ersde_fast", LIBRARY)
        if library.exists():
            shutil.copy(library, "ersde_fast")
        if self.extensions:
            super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """For one Python where the extension is in it; for all where the library is alone."""

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", WHEEL or tag[2]) if "cpu" in reasons else tag


def write_build_info(folder):
    """Into the package that is built, in the source or in a wheel."""
    said = '"""Written by setup.py: why a part of the extension was not built, and for which torch the rest was."""\n\n'
    (folder / "_build_info.py").write_text(f"{said}REASONS = {reasons!r}\nTORCH = {torch_version!r}\n")


setup(
    ext_modules=list(extensions.values())[:1] or [Extension("ersde_fast._C", [])],
    cmdclass={"build_ext": BuildOrSay, "bdist_wheel": Wheel},
    options={"build": {"build_base": f"build/{WHEEL}"}} if WHEEL else {},
)
