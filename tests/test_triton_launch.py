"""How Triton's steps are launched: what reaches the compiled kernel past Triton's binder, and when the binder is asked."""

import itertools

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from ersde_fast import er_sde_plan, fast_step, stack_plans
from ersde_fast.backends import CUDA, TRITON, kernels_for
from ersde_fast.kernels import er_sde_step as kernel

PLAN = er_sde_plan([9, 8, 6.5, 5, 4, 3, 0], order=3)
STACK = stack_plans([PLAN, PLAN])
FIRST = [p.name for p in kernel.er_sde_step.params].index("ORDER")  # of the constants


class OnDevice(torch.Tensor):
    """A tensor of the host that says it is on the current device."""

    is_cuda = True


class Stub:
    """In the place of the kernel: notes what Triton's binder would compile for, and the launches of what it compiled."""

    pre_run_hooks = ()

    def __init__(self):
        fn = kernel.er_sde_step
        self.bind = create_function_from_signature(fn.signature, fn.params, make_backend(GPUTarget("cuda", 90, 32)))
        self.bound, self.launched = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            _, specialization, options = self.bind(*arguments, **options)
            self.bound.append((grid, arguments, (specialization, options)))
            compiled = CompiledKernel.__new__(type("Compiled", (CompiledKernel,), {"run": self.run}))
            compiled.module, compiled.function, compiled.packed_metadata = None, 7, (2, 1, 0)
            return compiled

        return launch

    def run(self, *arguments):
        self.launched.append(arguments)


@pytest.fixture
def stub(monkeypatch):
    stub = Stub()
    monkeypatch.setattr(kernel, "er_sde_step", stub)
    monkeypatch.setattr(kernel, "LAUNCHES", {})
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 11, raising=False)
    return stub


@pytest.fixture
def watched():
    """A function that has Triton call one more hook of launches, until the test ends."""
    hooks = triton.knobs.runtime.launch_enter_hook
    yield lambda: hooks.add(print)
    hooks.remove(print)


def call(shape=(2, 64), dtype=torch.float32, start=0, given=3, output=None, row="numbers", source="seed", number=4):
    """The arguments of a launch; `number` is in whatever the compiled kernel does not depend on."""

    def tensor(dtype=dtype):
        memory = torch.zeros(2 * 64 * 64 + 8, dtype=dtype)
        return memory[start : start + torch.Size(shape).numel()].view(shape)

    batch = shape[0]
    index = torch.full((batch,), number)
    rows = {
        "numbers": PLAN.table[number].tolist(),
        "first": (PLAN.table[number, None], None, None),
        "index": (PLAN.table, None, torch.tensor(number)),
        "indices": (STACK.table, torch.ones_like(index), index),
    }
    seeds = torch.zeros(batch, 2, dtype=torch.int64)
    drawn = {
        "seed": kernel.portable(2**63 + number, seeds),
        "seeds": kernel.portable(seeds, seeds),
        "torch": kernel.Drawn(kernel.TORCH.value, number, None, 4 * number, 256),
    }
    scale = {"number": 2.0 + number, "numbers": torch.full((batch,), 2.0 + number, dtype=torch.float64)}.get(output)
    return (
        tensor().as_subclass(OnDevice),
        [tensor(torch.bfloat16) for _ in range(given)],
        None if scale is None else tensor(),
        tensor(torch.float16) if source == "noise" else None,
        (tensor(), None if output is None else tensor()),
        rows[row],
        scale,
        drawn.get(source, kernel.NOTHING_DRAWN),
    )


CASES = [
    dict(zip(("output", "row", "source"), values, strict=True))
    for values in itertools.product(
        [None, "alone", "number", "numbers"],
        ["numbers", "first", "index", "indices"],
        ["nothing", "noise", "seed", "seeds", "torch"],
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_past_the_binder_goes_what_the_binder_would_pass_on(stub, watched, case):
    kernel.launch(*call(**case, number=3))
    assert len(stub.bound) == 1 and not stub.launched
    again = call(**case, number=4)
    kernel.launch(*again)
    assert len(stub.bound) == 1 and len(stub.launched) == 1
    watched()
    kernel.launch(*again)
    assert len(stub.bound) == 2 and len(stub.launched) == 1
    (_, _, first), (grid, arguments, specialization) = stub.bound
    assert first == specialization
    assert stub.launched[0][:9] == (*grid, 11, 7, (2, 1, 0), None, None, None)
    x = arguments[0]
    for passed, bound in zip(stub.launched[0][9:], arguments, strict=True):
        if isinstance(bound, torch.Tensor):
            assert passed == bound.data_ptr() or (passed is None and bound is x)
        else:
            assert passed == bound and type(passed) is type(bound)


@pytest.mark.parametrize(
    "change", [dict(shape=(2, 4, 32)), dict(shape=(1, 64)), dict(shape=(16, 64)), dict(shape=(1, 16)), dict(shape=(1, 4096))]
)
@pytest.mark.parametrize("source", ["noise", "seed", "torch"])
def test_other_sizes_are_the_same_kernel(stub, change, source):
    kernel.launch(*call(source=source))
    kernel.launch(*call(source=source, **change))
    (_, _, first), (_, _, second) = stub.bound
    assert first == second


@pytest.mark.parametrize(
    "change",
    [dict(shape=(2, 31)), dict(start=1), dict(dtype=torch.float64), dict(given=2), dict(row="index"), dict(output="alone")],
)
def test_what_is_another_kernel_asks_the_binder(stub, change):
    kernel.launch(*call())
    kernel.launch(*call(**change))
    (_, _, first), (_, _, second) = stub.bound
    assert first != second and not stub.launched


@pytest.mark.parametrize("shape", [(1, 31), (1, 1), (2, 1), (2, 31)])
def test_sizes_that_16_does_not_divide(stub, watched, shape):
    kernel.launch(*call(shape))
    kernel.launch(*call(shape))
    watched()
    kernel.launch(*call(shape))
    (_, _, first), (_, _, second) = stub.bound
    assert first == second and len(stub.launched) == 1


def test_only_kept_where_the_compiled_kernel_is_known(stub, monkeypatch):
    monkeypatch.setattr(kernel, "IS_KNOWN", False)
    for _ in range(2):
        kernel.launch(*call())
    assert len(stub.bound) == 2 and not stub.launched and not kernel.LAUNCHES


def test_few_are_kept(stub, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_LAUNCHES", 2)
    for size in (16, 32, 48):
        kernel.launch(*call((1, size)))
    assert len(kernel.LAUNCHES) == 1


def test_who_is_asked_at_once(monkeypatch):
    kernels, x = object(), torch.zeros(2).as_subclass(OnDevice)
    monkeypatch.setattr(TRITON, "kernels", kernels)
    monkeypatch.setattr(CUDA, "why_no_kernels", None)
    assert kernels_for(x, None) is None  # nobody has tried yet whether CUDA's kernels can be compiled
    monkeypatch.setattr(CUDA, "why_no_kernels", "there is no compiler")
    assert kernels_for(x, None) is kernels and kernels_for(torch.zeros(2), None) is None
    assert kernels_for(x, "triton") is kernels and kernels_for(x, "cuda") is None and kernels_for(x, "reference") is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "not aligned"])
def test_triton_again_is_the_same(dtype, start):
    """On a GPU: first by the binder, then past it, and where somebody watches by the binder again."""
    x, *history, noise = (
        torch.randn(2 * 4096 + 1, dtype=dtype, device="cuda")[start : start + 2 * 4096].view(2, -1) for _ in range(5)
    )
    called, hooks = [], triton.knobs.runtime.launch_enter_hook

    def hook(metadata):
        called.append(metadata)

    for kwargs in (
        dict(seed=5),
        dict(noise=noise),
        dict(seed=5, prediction_type="v", guidance=(noise, 2.0)),
        dict(seed=[3, 4]),
    ):
        kernel.LAUNCHES.clear()
        first = fast_step(PLAN, 4, x, history, backend="triton", **kwargs)
        assert len(kernel.LAUNCHES) == 1
        second = fast_step(PLAN, 4, x, history, backend="triton", **kwargs)
        called.clear()
        hooks.add(hook)
        third = fast_step(PLAN, 4, x, history, backend="triton", **kwargs)
        hooks.remove(hook)
        assert len(called) == 1
        for results in zip(*(r if isinstance(r, tuple) else (r,) for r in (first, second, third)), strict=True):
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
