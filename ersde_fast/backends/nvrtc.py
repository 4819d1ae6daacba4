"""The CUDA kernels without a toolkit: compiled when first needed by the NVRTC that torch brings, launched through CUDA's driver.

The sources are those of the extension, csrc/er_sde_step.cu, er_sde_log_prob.cu and er_sde_plan.cu. A compiled kernel is kept in a folder of the
user's, which ERSDE_FAST_CACHE names.
"""

import ctypes
import functools
import hashlib
import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..files import write_whole
from ..noise import TORCH_PIECE
from .library import FAILED, NEEDS_KERNEL, NUMBER, TORCH, KernelError, Library, NotPlain, signed

KERNELS = 164  # of csrc/er_sde_c.h
INVALID_CONTEXT = 201  # a thread that has made none of the driver's contexts its own
UNCHECKED, AS_HERE, OTHERWISE = range(3)  # of torch's stream
OPTIONS = ("--std=c++17", "-default-device")
REMEDY = "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime, of the version of torch.version.cuda"


class Device(ctypes.Structure):
    """`ersde_device`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("launch", "capture_info")),
        *((name, ctypes.c_int64) for name in ("index", "multiprocessors", "early", "wanted", "error")),
        ("kernels", ctypes.c_void_p * KERNELS),
    ]


def load(library: ctypes.CDLL | None, folder: Path) -> tuple["CUDALibrary | None", str | None]:
    """The kernels of CUDA devices by NVRTC and None, or None and the reason, which names the remedy."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA"
    if library is None:
        return None, "the library that launches the kernels is missing"
    sources = folder / "csrc"
    if not sources.exists():
        sources = folder.parent / "csrc"  # of an editable installation
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        assert driver.cuLaunchKernelEx  # which drivers before CUDA 11.8 lack
    except (OSError, AttributeError) as error:
        return None, f"the driver of CUDA 11.8 or newer is needed ({error})"
    try:
        compiler = Compiler(sources)
    except (OSError, AttributeError) as error:
        return None, f"NVRTC does not load ({error}): {REMEDY}"
    return CUDALibrary(library, driver, compiler), None


def _roots() -> list[Path]:
    """Folders that may hold NVRTC and CUDA's headers: of torch's own dependencies, of torch, of a toolkit."""
    nvidia = find_spec("nvidia")
    major = str(torch.version.cuda).partition(".")[0]
    roots = []
    for place in (nvidia.submodule_search_locations or []) if nvidia else []:
        roots += [Path(place, name) for name in (f"cu{major}", "cuda_nvrtc", "cuda_runtime")]
    roots.append(Path(torch.__file__).parent)
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return [*roots, Path("/usr/local/cuda")]


def _find(*patterns: str) -> Path:
    """The first file that is there; its name of the longest, which is that of the version.

    Raises:
        FileNotFoundError
    """
    for root in _roots():
        for pattern in patterns:
            found = sorted(path for path in root.glob(pattern) if ".alt" not in path.name)
            if found:
                return found[-1]
    raise FileNotFoundError(f"no {patterns[0]} beside torch")


class Compiler:
    """NVRTC, and what it compiled before.

    Raises:
        OSError, AttributeError: there is no NVRTC, or none of CUDA's headers.
    """

    def __init__(self, sources: Path):
        if sys.platform == "win32":
            nvrtc, builtins = (
                _find("lib/nvrtc64_*_0.dll", "bin/nvrtc64_*_0.dll", "bin/*/nvrtc64_*_0.dll"),
                "nvrtc-builtins64_*.dll",
            )
        else:
            nvrtc, builtins = _find("lib/libnvrtc.so.*", "lib64/libnvrtc.so.*"), "libnvrtc-builtins.so.*"
        for path in nvrtc.parent.glob(builtins):  # which NVRTC asks for by name alone
            if ".alt" not in path.name:
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        self.nvrtc = ctypes.CDLL(str(nvrtc))
        self.include = _find("include/cuda_fp16.h").parent
        self.sources = sources
        self.nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    @functools.cached_property
    def _digest(self) -> bytes:
        """Of all that the machine code depends on, but for its architecture."""
        files = [*sorted(self.sources.glob("*.h")), *sorted(self.sources.glob("*.cu"))]
        files += [self.include / name for name in ("cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp")]
        digest = hashlib.sha256(repr((self.version, OPTIONS)).encode())
        for path in files:
            digest.update(path.name.encode() + path.read_bytes())
        return digest.digest()

    def kernel(self, expression: str, capability: tuple[int, int]) -> tuple[bytes, bytes]:
        """A kernel's name in its binary, and the binary, from the folder of those that were compiled before or compiled now."""
        key = hashlib.sha256(self._digest + f"{expression} {capability}".encode()).hexdigest()
        path = cache_folder() / f"{key[:32]}.cubin"
        kept = _read(path)
        if kept is None:
            hidden = os.environ.get("ERSDE_FAST_QUIET") == "1" or None  # None: where nobody watches
            with tqdm(
                total=1, desc="ersde-fast compiles a CUDA kernel, once", unit="kernel", leave=False, disable=hidden
            ) as bar:
                kept = self._compile(expression, capability)
                bar.update()
            _write(path, kept)
        name, _, binary = kept.partition(b"\0")
        return name, binary

    def _compile(self, expression: str, capability: tuple[int, int]) -> bytes:
        source = next((f"er_sde_{name}.cu" for name in ("plan", "log_prob") if name in expression), "er_sde_step.cu")
        program, size, name = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_char_p()
        self._call("CreateProgram", ctypes.byref(program), f'#include "{source}"'.encode(), b"kernel", 0, None, None)
        try:
            self._call("AddNameExpression", program, expression.encode())
            code = "CUBIN" if self._knows(capability) else "PTX"
            options = [
                f"--gpu-architecture={'sm' if code == 'CUBIN' else 'compute'}_{self._architecture(capability)}",
                *OPTIONS,
                f"-I{self.sources}",
                f"-I{self.include}",
            ]
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self.nvrtc.nvrtcCompileProgram(program, len(options), given):
                self._call("GetProgramLogSize", program, ctypes.byref(size))
                log = ctypes.create_string_buffer(size.value)
                self._call("GetProgramLog", program, log)
                raise KernelError(f"ersde_fast: NVRTC {self.version} did not compile {expression}: {log.value.decode()}")
            self._call(f"Get{code}Size", program, ctypes.byref(size))
            binary = ctypes.create_string_buffer(size.value)
            self._call(f"Get{code}", program, binary)
            self._call("GetLoweredName", program, expression.encode(), ctypes.byref(name))
            return name.value + b"\0" + binary.raw
        finally:
            self.nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    @functools.cached_property
    def _architectures(self) -> list[int]:
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        architectures = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", architectures)
        return list(architectures)

    def _knows(self, capability: tuple[int, int]) -> bool:
        return 10 * capability[0] + capability[1] in self._architectures

    def _architecture(self, capability: tuple[int, int]) -> int:
        """The newest that NVRTC knows and the device can run; of a device newer than NVRTC the driver compiles the rest."""
        return max(a for a in self._architectures if a <= 10 * capability[0] + capability[1])

    def _call(self, function: str, *arguments) -> None:
        if error := getattr(self.nvrtc, f"nvrtc{function}")(*arguments):
            raise KernelError(f"ersde_fast: nvrtc{function}: {self.nvrtc.nvrtcGetErrorString(error).decode()}")


def cache_folder() -> Path:
    """Where compiled kernels are kept: ERSDE_FAST_CACHE, or the system's folder for what can be made again."""
    if named := os.environ.get("ERSDE_FAST_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"), "ersde_fast", "cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ersde_fast")


def _read(path: Path) -> bytes | None:
    """What `_write` wrote; None where there is nothing, or something else."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, kept = content[:32], content[32:]
    return kept if hashlib.sha256(kept).digest() == checksum else None


def _write(path: Path, kept: bytes) -> None:
    """All of it or nothing; nothing where the folder cannot be written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, hashlib.sha256(kept).digest() + kept)
    except OSError:
        pass


class CUDALibrary(Library):
    """Kernels that NVRTC compiled, launched by the library through CUDA's driver."""

    def __init__(self, library: ctypes.CDLL, driver: ctypes.CDLL, compiler: Compiler):
        super().__init__(library)
        self.driver, self.compiler = driver, compiler
        self._step = self.objects.ersde_step_objects_cuda
        self._devices: dict[int, tuple[int, Device]] = {}  # and its address
        self._streams: dict[int, int] = {}  # what is known of torch's stream on each device
        self._lock = threading.Lock()

    @staticmethod
    def has(x):
        return x.is_cuda

    def run(self, call, factor, x, sums=False):
        index = x.get_device()
        if index in self._devices and torch._C._cuda_getDevice() == index:
            if not self._step(call, factor, self.api, self._devices[index][0]):
                return 0
        return self._launch(index, self._step, call, factor, self.api)

    def run_plan(self, call, device):
        stream = torch.cuda.current_stream(device).cuda_stream
        return self._launch(device.index, lambda *of: self.library.ersde_plan_cuda(*of, stream), ctypes.byref(call))

    def _launch(self, index: int, function, *arguments) -> int:
        """What the library answers to a call, whose kernel it may ask for first."""
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(index):
                return self._launch(index, function, *arguments)
        address, device = self._devices.get(index) or self._new_device(index)
        while answer := function(*arguments, address):
            if answer == NEEDS_KERNEL:
                self._load_kernel(index, device)
            elif answer == FAILED and device.error == INVALID_CONTEXT:
                self._make_context_current(index)
                device.error = 0
            elif answer == FAILED:
                raise KernelError(f"ersde_fast: the CUDA kernel could not be launched: {self._error(device.error)}")
            else:
                return answer
        return 0

    def _new_device(self, index: int) -> tuple[int, Device]:
        properties = torch.cuda.get_device_properties(index)
        functions = self.driver.cuLaunchKernelEx, getattr(self.driver, "cuStreamGetCaptureInfo_v3", None)
        addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
        early = properties.major >= 9 and addresses[1] is not None
        device = Device(*addresses, index, properties.multi_processor_count, early)
        return self._devices.setdefault(index, (ctypes.addressof(device), device))

    def _load_kernel(self, index: int, device: Device) -> None:
        with self._lock:
            number = device.wanted
            if device.kernels[number]:
                return
            expression = self.library.ersde_kernel_name(number).decode()
            name, binary = self.compiler.kernel(expression, torch.cuda.get_device_capability(index))
            self._make_context_current(index)
            module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), binary)
            self._call("cuModuleGetFunction", ctypes.byref(kernel), module, name)
            device.kernels[number] = kernel.value

    def _make_context_current(self, index: int) -> None:
        """The device's own context, which torch works in, for this thread: some thread of torch's did nothing on the device yet."""
        context, current = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(current))
        if current.value is None:
            torch.cuda.init()
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), index)
            self._call("cuCtxSetCurrent", context)

    def _call(self, function: str, *arguments) -> None:
        if error := getattr(self.driver, function)(*arguments):
            raise KernelError(f"ersde_fast: {function}: {self._error(error)}")

    def _error(self, number: int) -> str:
        said = ctypes.c_char_p()
        self.driver.cuGetErrorString(number, ctypes.byref(said))
        return f"{(said.value or b'unknown error').decode()} ({number})"

    # ---- torch's stream ----

    def torch_stream(self, index: int) -> int:
        return self._streams.get(index, UNCHECKED)

    def set_torch_stream(self, index: int, as_here: bool) -> None:
        self._streams[index] = AS_HERE if as_here else OTHERWISE

    def take_torch_stream(self, x, generator, layout):
        index, n = x.get_device(), x.numel()
        if torch.cuda.is_current_stream_capturing():
            if layout:
                raise ValueError("torch_layout cannot be drawn by NVRTC's kernels while a graph is captured: pass noise=")
            return None
        if not layout and n * x.element_size() > TORCH_PIECE:
            return None
        if self.torch_stream(index) == UNCHECKED:
            raise NotPlain
        if self.torch_stream(index) == OTHERWISE:
            return None
        threads = self._torch_threads(x, *(layout or ()))
        grows = self.library.ersde_torch_advance(n, threads, NUMBER[x.dtype])
        generator = generator or torch.cuda.default_generators[index]
        with self._lock:
            offset = generator.get_offset()
            generator.set_offset(offset + grows)
        return (TORCH, 0, signed(generator.initial_seed()), threads, offset)

    def _torch_threads(self, x: Tensor, multiprocessors: int = 0, threads_each: int = 0) -> int:
        """Those of torch.randn for x, on the card at hand where none is named."""
        if not multiprocessors:
            properties = torch.cuda.get_device_properties(x.device)
            multiprocessors, threads_each = properties.multi_processor_count, properties.max_threads_per_multi_processor
        return self.library.ersde_torch_threads(x.numel(), multiprocessors, threads_each)

    def torch_noise(self, out: Tensor, seed: int, offset: int, multiprocessors: int, threads_each: int) -> int:
        if out.numel() == 0:
            return 0
        threads = self._torch_threads(out, multiprocessors, threads_each)
        self.fill(out, (TORCH, 0, signed(seed), threads, offset))
        return self.library.ersde_torch_advance(out.numel(), threads, NUMBER[out.dtype])
