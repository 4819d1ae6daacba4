"""Who sees what torch runs, as Python and the kernels answer it, and which tensors hold numbers that may be read."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ersde_fast import er_sde_plan, fast_step
from ersde_fast.backends import CPU
from ersde_fast.tracing import has_values, is_traced, is_unwatched, numbers_of

PLAN, X = er_sde_plan([9, 5, 2]), torch.ones(2, 3)


class Mode(TorchDispatchMode):
    """Sees every operator, and changes none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def in_mode(ask):
    with Mode():
        ask(X)


def in_fake_mode(ask):
    with FakeTensorMode() as mode:
        ask(mode.from_tensor(X))


def in_dual_level(ask):
    with forward_ad.dual_level():
        ask(forward_ad.make_dual(X, X))


@pytest.mark.parametrize(
    ("watch", "traces", "values"),
    [
        (lambda ask: ask(X), False, True),
        (in_mode, True, True),
        (in_fake_mode, True, False),
        (lambda ask: make_fx(ask)(X), True, False),
        (lambda ask: make_fx(ask, tracing_mode="symbolic", pre_dispatch=True)(X), True, False),
        (lambda ask: torch.jit.trace(ask, X, check_trace=False), True, False),
        (lambda ask: torch.func.vmap(ask)(X), False, False),
        (lambda ask: torch.func.grad(lambda x: ask(x).sum())(X), False, False),
        (in_dual_level, False, True),
    ],
    ids=["nobody", "mode", "fake", "make_fx", "pre_dispatch", "TorchScript", "vmap", "grad", "tangent"],
)
def test_who_watches(watch, traces, values, request):
    answers = []

    def ask(x):
        kernels_refuse = CPU.kernels.step(PLAN.table, 0, x, [x], seed=5, draws=True) is None
        answers.append((is_traced(), is_unwatched(), kernels_refuse, has_values(x)))
        return 2 * x

    watch(ask)
    nobody = request.node.callspec.id == "nobody"
    assert answers == [(traces, nobody, not nobody, values)]


def test_numbers_are_read_past_a_tracer():
    read = []
    traced = make_fx(lambda x: (read.append(numbers_of(X, 0)), x + 1)[1])(X)
    assert read == [[1.0, 1.0, 1.0]] and "select" not in traced.code


def test_a_mode_watches_its_own_thread_alone():
    step = lambda: fast_step(PLAN, 0, X, [X], seed=5, return_log_prob=True, backend="cpu")  # noqa: E731
    expected = step()
    with Mode(), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="it is being traced"):
            step()
        result = pool.submit(step).result()
    assert all(map(torch.equal, result, expected))
