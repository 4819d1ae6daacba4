"""The kernels by ctypes answer as the extension does: the same bits, and None for the same steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ersde_fast import er_sde_plan, stack_plans
from ersde_fast.backends import CPU, compiled, extension, library
from ersde_fast.noise import seed_table

HEADER = (Path(__file__).parents[1] / "csrc" / "er_sde_c.h").read_text()
BY_CTYPES = library.CPULibrary(compiled.kernels_library()[0])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PLANS = [
    er_sde_plan([9, 5, 4, 2, 1, 0.5, 0], order=order, noise_scaler=scaler)
    for order, scaler in ((1, "ode"), (2, "sde_5"), (3, "sde_5"), (5, "sde"))
]
STACK = stack_plans(PLANS)


@st.composite
def tensors(draw, shape, others):
    """A tensor of the shape: of one of the dtypes, contiguous, transposed or a part of a larger one."""
    dtype = draw(st.sampled_from(others))
    made = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31)))).to(dtype)
    way = draw(st.sampled_from(["as it is", "as it is", "transposed", "part"]))
    if way == "transposed":
        return made.transpose(0, -1).contiguous().transpose(0, -1)
    if way == "part":
        return torch.cat([made, made], dim=-1)[..., : shape[-1]]
    return made


@st.composite
def steps(draw):
    """The arguments of `step`, most of them of steps that can be."""
    shape = (draw(st.integers(0, 3)), *draw(st.lists(st.integers(1, 5), max_size=2)), draw(st.integers(1, 40)))
    dtype = draw(st.sampled_from(DTYPES))
    others = [dtype] * 4 + DTYPES
    plan, batch = draw(st.sampled_from(PLANS)), shape[0]
    i = draw(st.integers(-1, plan.num_steps))
    x, history = draw(tensors(shape, [dtype])), [draw(tensors(shape, others)) for _ in range(draw(st.integers(0, 6)))]
    of = {"draws": plan.draws, "trusted": draw(st.booleans())}
    where = draw(st.sampled_from(["number", "number", "tensor", "mixed", "ring"]))
    table = plan.table
    if where == "tensor":
        i = torch.tensor(i)
    elif where == "mixed":
        plans, index = (st.lists(st.integers(0, 3), min_size=batch, max_size=batch) for _ in range(2))
        table, i = STACK.table, (torch.tensor(draw(plans)), torch.tensor(draw(index)))
        of["draws"] = STACK.draws
    if draw(st.booleans()):
        of["predicts"] = True
        guided = draw(st.booleans())
        if where == "number":
            of["cfg_pp"] = guided and draw(st.booleans())
            table = plan.predicting("v", of["cfg_pp"]).table
        if guided:
            of["unconditional"] = draw(tensors(shape, others))
            scales = torch.linspace(1, 7, batch, dtype=torch.float64)
            of["scale"] = draw(st.sampled_from([1.5, 3, True, scales, scales.float(), float("nan"), None]))
    if where == "ring":
        i, history = torch.tensor(draw(st.integers(0, plan.num_steps - 1))), history[:1]
        of |= {"trusted": True, "predicts": True, "ring": torch.zeros(plan.order, *shape, dtype=draw(st.sampled_from(others)))}
    source = draw(st.sampled_from(["seed", "seeds", "noise", "generator", "shard", "none"]))
    if source == "seed":
        of["seed"] = draw(st.integers(0, 2**64 - 1))
    elif source == "seeds":
        of["seed"] = seed_table(
            [(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**48 - 1))) for _ in range(batch)], batch
        )
    elif source == "noise":
        of["noise"] = draw(tensors(shape, others))
    elif source == "generator":
        of["generator"] = torch.Generator()
    elif source == "shard":
        starts = [draw(st.integers(0, 3)) for _ in shape[1:]]
        wholes = [size + start + draw(st.integers(0, 3)) for size, start in zip(shape[1:], starts, strict=True)]
        of |= {"seed": 7, "global_shape": wholes, "global_start": starts, "trusted": True}
    if of["trusted"] and draw(st.booleans()):
        of["out"] = torch.empty_like(x)
    return table, i, x, history, of


def answer(kernels, table, i, x, history, of):
    """What the kernels answer, and what they leave in a ring."""
    of = {name: value.clone() if name in ("ring", "out") else value for name, value in of.items()}
    torch.manual_seed(5)
    if "generator" in of:
        of["generator"].manual_seed(6)
    result = kernels.step(table, i, x, history, **of)
    if result is None:
        return None
    return [*(result if isinstance(result, tuple) else (result,)), *([of["ring"]] if "ring" in of else [])]


@pytest.mark.skipif(extension._C is None, reason="the extension was not built")
@settings(max_examples=300, deadline=None)
@given(steps())
def test_a_step_as_the_extension_steps_it(step):
    of = step[-1]
    expected, got = answer(extension._C, *step), answer(BY_CTYPES, *step)
    if got is None and not of["trusted"]:
        return  # who is asked again, in words
    assert (got is None) == (expected is None)
    for g, e in zip(got or [], expected or [], strict=True):
        assert g.dtype == e.dtype and g.shape == e.shape and g.is_contiguous() == e.is_contiguous()
        assert torch.equal(g.nan_to_num(7), e.nan_to_num(7)) and torch.equal(g.isnan(), e.isnan())


@pytest.mark.skipif(extension._C is None, reason="the extension was not built")
@pytest.mark.parametrize(
    "options",
    [
        {}, dict(order=3), dict(order=[1, 2, 3, 3, 5, 2], method="newton", node_scale=5.0), dict(noise_scaler="ode", order=2), dict(eta=0.3),
        dict(eta=[0, 0.5, 1, 1, 0.2, 0]), dict(integration_points=200, order=3), dict(guidance=5.0), dict(process="flow", s_noise=0.9),
        dict(alphas=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1]),
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_as_the_extension_builds_it(options, monkeypatch):
    sigmas = torch.tensor([0.98, 0.9, 0.8, 0.6, 0.5, 0.2, 0], dtype=torch.float64)
    monkeypatch.setattr(CPU, "kernels", extension._C)
    expected = er_sde_plan(sigmas, **options)
    monkeypatch.setattr(CPU, "kernels", BY_CTYPES)
    got = er_sde_plan(sigmas, **options)
    assert torch.equal(got.table, expected.table) and torch.equal(got.er_lambdas, expected.er_lambdas)


def with_tangent(x):
    return torch.autograd.forward_ad.make_dual(x, x)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, requires_grad=True), torch.ones(2, 3).to_sparse(), torch.ones(2, 3, device="meta"), [1.0], None,
        torch.ones(2, 3, dtype=torch.float8_e4m3fn), torch.ones(2, 3, dtype=torch.complex64), torch.ones(2, 3, dtype=torch.int32),
        torch._neg_view(torch.ones(2, 3)), torch.ones([1] * 12),
    ],
    ids=lambda x: str(getattr(x, "dtype", x)) + str(getattr(x, "layout", "")),
)  # fmt: skip
def test_what_is_no_plain_tensor_is_asked_in_words(x):
    plain = torch.ones(2, 3)
    for a, b in ((x, plain), (plain, x)):
        assert BY_CTYPES.step(PLANS[1].table, 0, a, [b], seed=5, draws=True) is None


def test_what_others_want_to_see_is_none_of_the_kernels():
    x = torch.ones(2, 3)
    step = lambda x: BY_CTYPES.step(PLANS[1].table, 0, x, [x], seed=5, draws=True)  # noqa: E731
    assert step(x) is not None
    with torch.autograd.forward_ad.dual_level():
        assert step(with_tangent(x)) is None
    torch.func.vmap(lambda row: None if step(row) is None else 1 / 0, out_dims=None)(x)
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert step(x) is None


def test_a_refused_step_draws_nothing():
    g, x = torch.Generator().manual_seed(3), torch.ones(2, 3)
    before = g.get_state()
    assert BY_CTYPES.step(PLANS[1].table, 3, x, [x], generator=g, draws=True) is None  # it needs two predictions
    assert torch.equal(g.get_state(), before)


@pytest.mark.skipif(extension._C is None, reason="the extension was not built")
@pytest.mark.parametrize("size", [library.GRAIN, library.GRAIN + 1, 5 * library.GRAIN + 3])
def test_threads_share_out_a_step(size, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    x, history = torch.randn(size), [torch.randn(size) for _ in range(3)]
    expected = extension._C.step(PLANS[2].table, 4, x, history, seed=5, draws=True)
    assert torch.equal(BY_CTYPES.step(PLANS[2].table, 4, x, history, seed=5, draws=True), expected)


FORKED = """
import os, torch
from ersde_fast import er_sde_plan, fast_step
from ersde_fast.backends import CPU
torch.set_num_threads(2)
assert CPU.way == "library"
plan, x = er_sde_plan([3, 2, 1]), torch.ones(1, 1 << 20)
expected = fast_step(plan, 0, x, [x], seed=5)
child = os.fork()
if child == 0:
    same = (fast_step(plan, 0, x, [x], seed=5).numpy() == expected.numpy()).all()  # torch's own threads are not forked either
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_has_threads_of_its_own():
    environment = {**os.environ, "ERSDE_FAST_CPU": "library"}
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "the library of kernels was not built: reinstall ersde-fast, from a wheel or beside a C"),
        (b"no library", "the library of kernels does not load ("),
    ],
)
def test_the_reason_why_there_is_no_library(tmp_path, content, said):
    if content is not None:
        (tmp_path / library.NAME).write_bytes(content)
    loaded, why = library.load(tmp_path)
    assert loaded is None and said in why


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(library, "VERSION", -1)
    assert library.load(compiled.FOLDER) == (
        None,
        f"the library of kernels is of version {compiled.kernels_library()[0].ersde_version()}, and this is -1: reinstall ersde-fast",
    )


def test_what_the_header_and_python_both_state():
    assert (
        int(re.search(r"ERSDE_C_VERSION (\d+)", HEADER)[1]) == library.VERSION == compiled.kernels_library()[0].ersde_version()
    )
    assert int(re.search(r"ersde_most_words = (\d+)", HEADER)[1]) == library.MOST_WORDS
    number = dict(re.findall(r"ersde_(\w+) = (\d+),", HEADER))
    assert (int(number["needs_kernel"]), int(number["failed"])) == (library.NEEDS_KERNEL, library.FAILED)
    assert {
        int(number[f"no_{name.split('_')[-1].split('.')[0]}"]) for name in ("process", "noise_scaler", "method", "order")
    } == set(library.UNKNOWN)


def test_one_way_can_be_named(monkeypatch):
    monkeypatch.setenv("ERSDE_FAST_CPU", "library")
    assert compiled._extension_unless("ERSDE_FAST_CPU") == (None, None)
    monkeypatch.setenv("ERSDE_FAST_CPU", "numpy")
    with pytest.raises(ValueError, match="ERSDE_FAST_CPU must be extension or library, got 'numpy'"):
        compiled._extension_unless("ERSDE_FAST_CPU")
