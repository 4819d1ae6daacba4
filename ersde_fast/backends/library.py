"""The kernels by ctypes, where no extension was built: the library `_kernels`, which knows neither torch nor Python.

`Library` answers as the extension's module does, csrc/binding.cpp, for tensors of one type of device; csrc/er_sde_c.h says what it
tells the library.
"""

import ctypes
import functools
import math
import os
import struct
import sys
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.autograd.profiler import record_function

from ..table import COUNTER, W_D, W_NOISE
from ..tracing import is_unwatched
from .base import FLOATS

VERSION = 2  # of csrc/er_sde_c.h
NEEDS_KERNEL, FAILED = 2, 3  # answers
UNKNOWN = {4: "process", 5: "noise_scaler.form", 6: "method", 7: "order"}
PORTABLE, TORCH = 1, 2  # sources of noise, and the words behind them: seeds, seed, torch_threads, torch_offset
NOTHING_DRAWN = (0,) * 5
NO_RING = (0, 0)
WITH_STEP, OF_SAMPLE, GRADIENTS = 1, 2, 3  # densities, and the words from it on: density, mean, log_prob, sums, wanted
NO_DENSITY = (0,) * 5
OF_GUIDE, OF_NEXT = 8, 9  # bits of what is wanted
MOST_WORDS = 512
FORMATS = [f"{count}q" for count in range(MOST_WORDS)]
MASK = 2**64 - 1
GRAIN = 32768  # elements a thread takes at least: below, waking it costs more than it saves
SEGMENT = 1024  # of csrc/er_sde_step.h
NUMBER = {dtype: number for number, dtype in enumerate(FLOATS)}
PLAIN = frozenset((Tensor, torch.nn.Parameter))
requires_grad = attrgetter("requires_grad")
NAME = {"win32": "_kernels.dll", "darwin": "_kernels.dylib"}.get(sys.platform, "_kernels.so")
REINSTALL = "reinstall ersde-fast"


OF_OBJECTS = {  # functions of Python's objects, see Library
    "words": [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p],
    "step_objects": [ctypes.c_char_p, ctypes.c_double, ctypes.c_void_p],
    "step_objects_cuda": [ctypes.c_char_p, ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p],
}


class PlanCall(ctypes.Structure):
    """`ersde_plan_call`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_steps", "order", "first_step", "integration_points")),
        *((name, ctypes.c_void_p) for name in ("sigmas", "alphas")),
        *((name, ctypes.c_int64) for name in ("sigmas_dtype", "alphas_dtype")),
        *((name, ctypes.c_void_p) for name in ("orders", "etas")),
        *((name, ctypes.c_char_p) for name in ("process", "scaler", "method")),
        *((name, ctypes.c_double) for name in ("strength", "node_scale", "s_noise", "guidance")),
        *((name, ctypes.c_void_p) for name in ("table", "schedule")),
    ]


def load(folder: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The library and None, or None and the reason, which names the remedy."""
    path = folder / NAME
    if not path.exists():
        return None, f"the library of kernels was not built: {REINSTALL}, from a wheel or beside a C++ compiler"
    try:
        library = ctypes.CDLL(str(path))
        version = library.ersde_version()
        if version != VERSION:
            return None, f"the library of kernels is of version {version}, and this is {VERSION}: {REINSTALL}"
        _declare(library)
        assert Tensor.__dlpack_c_exchange_api__
    except (OSError, AttributeError) as error:
        return None, f"the library of kernels does not load ({error}): {REINSTALL}"
    return library, None


def _declare(library: ctypes.CDLL) -> None:
    pointer, word, real, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    for name, result, arguments in [
        ("step", integer, [pointer, real, word, word]),
        ("log_prob_sums", integer, [pointer, real]),
        ("segments", word, [word]),
        ("kernel_name", ctypes.c_char_p, [integer]),
        ("plan", integer, [pointer]),
        ("plan_cuda", integer, [pointer, pointer, pointer]),
        ("torch_threads", word, [word, word, word]),
        ("torch_advance", word, [word, word, word]),
        ("torch_noise", None, [pointer, ctypes.c_uint64, ctypes.c_uint64, word, word, word]),
        ("box_muller", None, [pointer, pointer, pointer, pointer, word]),
        *((name, integer, arguments) for name, arguments in OF_OBJECTS.items()),
        ("instruction_set", ctypes.c_char_p, []),
        ("use_instruction_set", integer, [integer]),
    ]:
        function = getattr(library, f"ersde_{name}")
        function.restype, function.argtypes = result, arguments


class NotPlain(Exception):
    """That a step is none that the library runs as it was asked for."""


class KernelError(RuntimeError):
    """That a kernel could not be compiled or launched."""


class Library:
    """The kernels for one type of device: functions with the arguments of the extension's, see csrc/step_call.h and csrc/binding.cpp."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.objects = ctypes.PyDLL(library._name)  # whose functions are called with the interpreter's lock
        for name, arguments in OF_OBJECTS.items():
            getattr(self.objects, f"ersde_{name}").argtypes = arguments
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self.api = pointer_of(Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")

    def words(self, objects: bytes, factor: float) -> ctypes.Array:
        """A call of objects as one of words.

        Raises:
            NotPlain: it cannot be run.
        """
        words = (ctypes.c_int64 * MOST_WORDS)()
        if self.objects.ersde_words(objects, self.api, words) or self.library.ersde_step(words, factor, 0, 0):
            raise NotPlain
        return words

    def step(
        self, table, i, x, history, *, noise=None, generator=None, seed=None, draws=False, out=None, predicts=False,
        unconditional=None, scale=None, cfg_pp=False, ring=None, global_shape=None, global_start=None, torch_layout=None, trusted=False,
        reduction=None, x_next=None, gradient=None, gradients=None,
    ):  # fmt: skip
        """The next sample, or the pair of that and the prediction, with a reduction the log-density behind them; None where the step is
        not a plain one of this device."""
        if type(x) not in PLAIN or not self.has(x) or not isinstance(history, (list, tuple)):
            return None
        if not (trusted or (out is None and is_unwatched())):
            return None
        if (noise is not None) + (generator is not None) + (seed is not None) > 1:
            return None
        try:
            rows = _rows(table, i, x, ring)
            row, order = rows[0], rows[3] - W_D
            inputs = [x, *(history if len(history) <= order else history[:order])]
            predictions = len(inputs) - 1
            factor, scales = 0.0, 0
            if unconditional is not None:
                inputs.append(unconditional)
                factor, scales = _scale(scale, x)
            if noise is not None:
                inputs.append(noise)
            if not PLAIN.issuperset(map(type, inputs)) or any(map(Tensor.is_neg, inputs)):
                return None
            if not trusted and torch.is_grad_enabled() and any(map(requires_grad, (*inputs, scale) if scales else inputs)):
                return None
            drawn, draws = NOTHING_DRAWN, draws and x_next is None
            torch_stream = False
            if seed is not None:
                if draws:
                    drawn, _seeds = _portable(seed, x)
            elif noise is None:
                check_generator(generator, x.device)
                torch_stream = (
                    draws if not row or x_next is not None else ctypes.c_double.from_address(row + 8 * W_NOISE).value != 0
                )
        except (NotPlain, RuntimeError):  # a tensor that has no memory of its own
            return None
        if torch_stream and isinstance(i, tuple):
            return None
        if ring is not None and (len(history) != 1 or len(ring) != order):
            return None
        if not (row or trusted) and predictions < (order if rows[1] < 0 else min(order, rows[1] + 1)):
            return None

        density, log_prob = NO_DENSITY, None
        if x_next is not None:
            result = x_next
        else:
            result = torch.empty_like(x) if out is None else out
        prediction, ring_words, outputs = None, NO_RING, (result,)
        if reduction is not None:
            if ring is not None or x.numel() == 0 or (out is not None and x_next is None):
                return None
            density, log_prob, _sums, into = self.density(
                x, reduction, x_next, gradient, gradients, len(inputs) - 1 - predictions
            )
            outputs = (result, *into)
        if ring is not None:
            ring_words, outputs = (len(ring), ring.stride(0) * ring.element_size()), (ring[0], result)
        elif predicts and x_next is None:
            prediction = torch.empty_like(x)
            outputs = (prediction, result)
        whole = (*global_shape, *global_start) if global_shape else ()

        def call() -> bytes:
            return packed(
                0, predictions, unconditional is not None, noise is not None, predicts, cfg_pp, 0, bool(whole), *rows, scales, *ring_words,
                *drawn, *density, *map(id, inputs), *map(id, outputs), *whole,
            )  # fmt: skip

        try:
            if torch_stream and x.numel():
                self.words(call(), factor)  # raises before a generator advances
                drawn = self.take_torch_stream(x, generator, torch_layout)
        except (NotPlain, RuntimeError):  # DLPack's, of tensors without memory of their own
            return None
        if drawn is None:
            noise, drawn = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator), NOTHING_DRAWN
            inputs.append(noise)
        try:
            if _profiler_enabled():
                with record_function("ersde_fast::step"):
                    answer = self.run(call(), factor, x, reduction is not None)
            else:
                answer = self.run(call(), factor, x, reduction is not None)
        except KernelError:
            raise
        except (NotPlain, RuntimeError):
            return None
        if answer:
            return None
        if x_next is not None:
            return log_prob if gradient is None else True
        if log_prob is None:
            return result if prediction is None else (result, prediction)
        return (result, log_prob) if prediction is None else (result, prediction, log_prob)

    def density(self, x: Tensor, reduction: str, x_next, gradient, gradients, guides: int) -> tuple:
        """The words of a log-density, its tensor, memory of the kernels', and the gradients to write in the order of their bits."""
        if gradient is not None:
            *of_terms, of_next = gradients
            of_guide = [of_terms.pop()] if guides else []
            bits = dict(
                zip((*range(len(of_terms)), *[OF_GUIDE] * guides, OF_NEXT), (*of_terms, *of_guide, of_next), strict=True)
            )
            into = {bit: tensor for bit, tensor in bits.items() if tensor is not None}
            return (GRADIENTS, 0, gradient.data_ptr(), 0, sum(1 << bit for bit in into)), None, None, tuple(into.values())
        batch = x.shape[0] if x.dim() else 1
        log_prob = x.new_empty(x.shape[:1], dtype=torch.float64)
        sums = log_prob.new_empty(batch * self.library.ersde_segments(x.numel() // batch))
        what = WITH_STEP if x_next is None else OF_SAMPLE
        return (what, int(reduction == "mean"), log_prob.data_ptr(), sums.data_ptr(), 0), log_prob, sums, ()

    @staticmethod
    def has(x: Tensor) -> bool:
        """Whether a tensor lies on a device of the type."""
        raise NotImplementedError

    def run(self, call: bytes, factor: float, x: Tensor, sums: bool = False) -> int:
        """Runs a call, of a log-density where it sums; what the library answered, which is 0 where it did."""
        raise NotImplementedError

    def take_torch_stream(self, x: Tensor, generator, layout) -> tuple[int, ...] | None:
        """The words of torch's stream, taken from its generator; None where torch draws it.

        Raises:
            NotPlain: it is not known yet whether the kernels draw it as torch does.
        """
        return None

    def portable_noise(self, out: Tensor, seeds: Tensor, step: int) -> None:
        drawn, _seeds = _portable(seeds, out)
        self.fill(out, drawn, step)

    def fill(self, out: Tensor, drawn: tuple, step: int = 0) -> None:
        """Fills a contiguous tensor: a step of one term whose weight is 0, so that the kernels for one term serve."""
        row = array("d", bytes(8 * W_D))
        row[COUNTER], row[W_NOISE] = step, 1
        rows = (row.buffer_info()[0], 0, 0, len(row), 1, 1, 0, 0, 0)
        self.run(packed(0, 0, 0, 0, 0, 0, 1, 0, *rows, 0, *NO_RING, *drawn, *NO_DENSITY, id(out), id(out)), 0.0, out)

    def plan(self, sigmas: Tensor, alphas: Tensor | None, options, orders: Tensor | None) -> tuple[Tensor, Tensor]:
        num_steps, order, scaler = len(sigmas) - 1, max(options.orders), options.noise_scaler
        table = torch.empty(num_steps, W_D + order, dtype=torch.float64, device=sigmas.device)
        schedule = torch.empty(3, num_steps + 1, dtype=torch.float64, device=sigmas.device)
        sigmas, alphas = sigmas.contiguous(), None if alphas is None else alphas.contiguous()
        etas = options.eta if isinstance(options.eta, Tensor) else None
        call = PlanCall(
            num_steps, order, options.first_step, options.integration_points or 0,
            sigmas.data_ptr(), 0 if alphas is None else alphas.data_ptr(),
            NUMBER[sigmas.dtype], 0 if alphas is None else NUMBER[alphas.dtype], 0 if orders is None else orders.data_ptr(),
            0 if etas is None else etas.data_ptr(),
            *(str(name).encode() for name in (options.process, scaler.form, options.method)),
            scaler.strength * (1 if etas is not None else options.eta),
            *(math.nan if value is None else value for value in (options.node_scale, options.s_noise)),
            -1 if options.guidance is None else options.guidance, table.data_ptr(), schedule.data_ptr(),
        )  # fmt: skip
        answer = self.run_plan(call, sigmas.device)
        if answer in UNKNOWN:
            argument, value = UNKNOWN[answer], (options.process, scaler.form, options.method, order)[answer - min(UNKNOWN)]
            raise ValueError(f"{argument} must be one that the kernels know, got {value!r}")
        return table, schedule

    def run_plan(self, call: PlanCall, device: torch.device) -> int:
        """As `run`."""
        raise NotImplementedError


class CPULibrary(Library):
    """Large tensors are shared out over threads of Python: the library lets go of the interpreter."""

    @staticmethod
    def has(x):
        return x.is_cpu

    def run(self, call, factor, x, sums=False):
        if x.numel() <= GRAIN:
            return self.objects.ersde_step_objects(call, factor, self.api)
        words, step = self.words(call, factor), self.library.ersde_step
        n = x.numel()
        if not sums:
            return max(_in_threads(n, GRAIN, lambda begin, end: step(words, factor, begin, end)))
        segments = len(x) * self.library.ersde_segments(n // len(x))
        answer = max(_in_threads(segments, GRAIN // SEGMENT, lambda begin, end: step(words, factor, begin, end)))
        return answer or self.library.ersde_log_prob_sums(words, factor)

    def run_plan(self, call, device):
        return self.library.ersde_plan(ctypes.byref(call))

    def torch_noise(self, out: Tensor, seed: int, offset: int, multiprocessors: int, threads_each: int) -> int:
        n, address = out.numel(), out.data_ptr()
        threads = self.library.ersde_torch_threads(n, multiprocessors, threads_each)

        def draw(begin, end):
            self.library.ersde_torch_noise(address + 4 * begin, seed & MASK, offset, threads, begin, end - begin)
            return 0

        if n == 0:
            return 0
        _in_threads(n, GRAIN, draw)
        return self.library.ersde_torch_advance(n, threads, NUMBER[out.dtype])

    def box_muller(self, a: Tensor, b: Tensor) -> Tensor:
        words, out = torch.stack([a, b]).to(torch.uint32), torch.empty(2, len(a))
        pointers = [row.data_ptr() for row in (*words, *out)]
        self.library.ersde_box_muller(*pointers, len(a))
        return out

    def instruction_set(self) -> str:
        return self.library.ersde_instruction_set().decode()

    def use_instruction_set(self, number: int) -> bool:
        return bool(self.library.ersde_use_instruction_set(number))


def packed(*words: int) -> bytes:
    return struct.pack(FORMATS[len(words)], *words)


def signed(word: int) -> int:
    """64 bits as a signed number."""
    return word if 0 <= word < 2**63 else (word + 2**63 & MASK) - 2**63


def _rows(table: Tensor, i, x: Tensor, ring: Tensor | None) -> tuple[int, ...]:
    """The words from `row` to `index_stride`: see set_rows of binding.cpp."""
    if type(i) is int and ring is None and table.dim() == 2 and table.is_cpu:
        num_steps, columns = table.shape
        if not 0 <= i < num_steps:
            raise NotPlain
        return (table.data_ptr() + 8 * columns * i, i, 0, columns, 1, num_steps, 0, 0, 0)
    *num_plans, num_steps, columns = table.shape
    if isinstance(i, tuple):
        if len(i) != 2 or not num_plans or table.device != x.device:
            raise NotPlain
        plan_index, step_index = (_index(index, x.shape[:1] or (1,), x.device) for index in i)
        return (0, -1, table.data_ptr(), columns, *num_plans, num_steps, plan_index, step_index, 1)
    if num_plans:
        raise NotPlain
    if isinstance(i, Tensor):
        if ring is not None or not i.is_cpu:
            if table.device != x.device:
                raise NotPlain
            return (0, -1, table.data_ptr(), columns, 1, num_steps, 0, _index(i, (), x.device), 0)
        _index(i, (), i.device)
        i = i.item()
    if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < num_steps or ring is not None:
        raise NotPlain
    address = table.data_ptr() + 8 * columns * i
    if table.is_cpu:
        return (address, i, 0, columns, 1, num_steps, 0, 0, 0)
    if table.device != x.device:
        raise NotPlain
    return (0, i, address, columns, 1, num_steps, 0, 0, 0)


def _index(index, shape: tuple[int, ...], device: torch.device) -> int:
    """The address of a contiguous int64 tensor of that shape on that device."""
    if type(index) not in PLAIN or index.dtype != torch.int64 or index.shape != shape or index.device != device:
        raise NotPlain
    if not index.is_contiguous():
        raise NotPlain
    return index.data_ptr()


def _scale(scale, x: Tensor) -> tuple[float, int]:
    """The scale of the guidance where it is a number, and the address of the samples' own."""
    if type(scale) in PLAIN:
        if (
            scale.dtype != torch.float64
            or scale.shape != (x.shape[:1] or (1,))
            or scale.device != x.device
            or not scale.is_contiguous()
        ):
            raise NotPlain
        return 0.0, scale.data_ptr()
    if not is_scale(scale):
        raise NotPlain
    return float(scale), 0


def is_scale(scale) -> bool:
    """Whether it is a number that the guidance may have."""
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    return number and -sys.float_info.max <= scale <= sys.float_info.max


def _portable(seed, x: Tensor) -> tuple[tuple[int, ...], Tensor | None]:
    """The words of the portable stream, and the table that they point to."""
    if type(seed) is int:
        return (PORTABLE, 0, signed(seed), 0, 0), None
    if type(seed) not in PLAIN:
        raise NotPlain
    seed = seed.to(x.device, non_blocking=True).contiguous()
    return (PORTABLE, seed.data_ptr(), 0, 0, 0), seed


def check_generator(generator, device: torch.device) -> None:
    """
    Raises:
        NotPlain: it is no generator of that device.
    """
    if generator is not None and (
        not isinstance(generator, torch.Generator)
        or generator.device.type != device.type
        or (generator.device.index or 0) != (device.index or 0)
    ):
        raise NotPlain


def _in_threads(n: int, grain: int, work: Callable[[int, int], int]) -> list[int]:
    """What work(begin, end) answers for shares of 0 ... n, of at least that grain."""
    threads = min(torch.get_num_threads(), n // grain)
    if threads <= 1:
        return [work(0, n)]
    ends = [n * k // threads for k in range(threads + 1)]
    others = [_pool().submit(work, *share) for share in pairwise(ends[1:])]
    return [work(0, ends[1]), *(other.result() for other in others)]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "ersde_fast")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool without its threads
