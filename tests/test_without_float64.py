"""Apple's GPUs have no float64: the reference, the portable noise and the loop on a device that is pretended to be such a one.

It is of a type that torch has nothing of, since a torch without Apple's own refuses even the name of theirs.

A tensor of the pretended device holds its numbers on the CPU, where each operator on it runs. An operator that would take or make a
float64 there is refused, and so is what else such a device does not do: mixing devices, and a copy between them that changes the type.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ersde_fast import (
    calibrate_plan,
    er_sde_plan,
    fast_step,
    noise,
    place_sigmas,
    portable_noise,
    reference_step,
    sample_er_sde,
    stack_plans,
    step_log_prob,
)
from ersde_fast.noise import seed_table, specified_noise

PRETENDED = "lazy"
ABSENT = (torch.float64, torch.complex128, torch.uint16, torch.uint32, torch.uint64)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=PRETENDED)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """Also sees the operators without a tensor of the device, some of which make one."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


def run(operator, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    device = kwargs.get("device") or (PRETENDED if there else "cpu")
    to_device = torch.device(device).type == PRETENDED
    copies = operator in COPIES
    if there and not copies and any(tensor.dim() for tensor in tensors if not isinstance(tensor, OnDevice)):
        raise RuntimeError(f"{operator} mixes devices")
    moved = kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {})
    held_args, held_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, OnDevice) else leaf, (args, moved))
    result = operator(*held_args, **held_kwargs)
    dtypes = {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)} | {t.dtype for t in tensors}
    if copies and len(dtypes) > 1 and (bool(there) != to_device or len({isinstance(t, OnDevice) for t in tensors}) > 1):
        raise TypeError(f"{operator} between devices changes the type")
    if to_device and any(leaf.dtype in ABSENT for leaf in [*there, *tree_leaves(result)] if isinstance(leaf, torch.Tensor)):
        raise TypeError(f"{operator} needs what the device has not, of {dtypes}")
    known = {id(tensor.held): tensor for tensor in there}  # in-place operators return what they were given

    def wrapped(leaf):
        return known.get(id(leaf)) or OnDevice(leaf) if isinstance(leaf, torch.Tensor) and to_device else leaf

    return tree_map(wrapped, result)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(noise, "WITHOUT_FLOAT64", (PRETENDED,))
    with PretendedDevice():
        yield torch.device(PRETENDED)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu").to(dtype)


def same(result, expected):
    assert isinstance(result, OnDevice) and result.dtype == expected.dtype
    return torch.equal(result.cpu(), expected)


SIGMAS = [10.0, 5.0, 2.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "needs",
    [
        lambda x: x.double(),
        lambda x: torch.zeros(3, dtype=torch.float64, device=x.device),
        lambda x: x.cpu().double().to(x.device),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x * torch.ones(2, 3),
    ],
)
def test_the_pretended_device_refuses(device, needs):
    with pytest.raises((TypeError, RuntimeError), match=r"needs what the device has not|changes the type|mixes devices"):
        needs(randn(2, 3).to(device))


def test_portable_noise(device):
    assert same(portable_noise((2, 3, 5), 7, 3, device=device), portable_noise((2, 3, 5), 7, 3))
    assert same(portable_noise((2, 3, 5), [7, 8], device=device, dtype=torch.bfloat16), portable_noise((2, 3, 5), [7, 8], dtype=torch.bfloat16))  # fmt: skip
    seeds, steps = seed_table([(1, 2), (3, 4)], 2), torch.tensor([5, 6])
    shard = ((2, 3, 5), seeds, steps, (9, 9), (2, 3))
    there = specified_noise(shard[0], seeds.to(device), steps.to(device), *shard[3:])
    assert same(there, specified_noise(*shard))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", ["number", "device", "stack"])
@pytest.mark.parametrize("options", [{}, {"prediction_type": "v"}, {"prediction_type": "sample", "guidance": 3.0}, {"prediction_type": "epsilon", "guidance": [2.0, 5.0]}], ids=str)  # fmt: skip
@pytest.mark.parametrize("source", ["seed", "noise", "generator"])
def test_steps(device, dtype, index, options, source):
    plan, i = er_sde_plan(SIGMAS), {"number": 3, "device": torch.tensor(3), "stack": (torch.tensor([0, 1]), torch.tensor([3, 1]))}[index]  # fmt: skip
    if index == "stack":
        plan = stack_plans([plan, er_sde_plan(SIGMAS[1:], order=2)])
        if source == "generator":
            pytest.skip("torch's stream ties samples together")
    x, *tensors = (randn(2, 3, k, dtype=dtype) for k in range(5, 10))
    x, *tensors = (t[..., :5] for t in (x, *tensors))
    drawn = randn(2, 4, 5)[:, :3]
    options = dict(options)
    scale = options.pop("guidance", None)

    def step(function, to, **source):
        moved = {}
        if scale is not None:
            moved["guidance"] = (to(tensors[3]), torch.tensor(scale, dtype=torch.float64) if isinstance(scale, list) else scale)
        place = tuple(map(to, i)) if isinstance(i, tuple) else to(i) if isinstance(i, torch.Tensor) else i
        source = {name: to(value) if isinstance(value, torch.Tensor) else value for name, value in source.items()}
        result = function(plan, place, to(x), [to(t) for t in tensors[:3]], **options, **moved, **source)
        return result if isinstance(result, tuple) else (result,)

    if source == "generator":
        torch.manual_seed(3)
        drawn = torch.randn(x.shape, dtype=dtype)
        torch.manual_seed(3)
    expected = step(reference_step, lambda t: t, **({"seed": 11} if source == "seed" else {"noise": drawn}))
    given = {"seed": {"seed": 11}, "noise": {"noise": drawn}, "generator": {}}[source]
    results = step(fast_step, lambda t: t.to(device), **given)
    assert all(same(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", ["seed", "noise_sampler"])
def test_the_loop(device, dtype, source):
    x, plan, seen = randn(2, 4, 8, dtype=dtype) * 10, er_sde_plan(SIGMAS), []

    def model(x, sigma):
        return x / (1 + sigma.reshape(-1, 1, 1) ** 2).to(x.dtype)

    def sampler(sigma, sigma_next):
        return (sigma * portable_noise(x.shape, 3, device=sigma.device)).to(x.dtype)

    given = {"seed": {"seed": 9}, "noise_sampler": {"noise_sampler": sampler}}[source]
    result = sample_er_sde(model, x.to(device), torch.tensor(SIGMAS).to(device), callback=seen.append, disable=True, **given)
    history = []
    for i, sigma in enumerate(torch.tensor(SIGMAS)[:-1]):
        history = [model(x, sigma.expand(2)), *history[:2]]
        draws = plan.rows[i].w_noise != 0
        if source == "seed":
            x = reference_step(plan, i, x, history, seed=9)
        else:
            x = reference_step(plan, i, x, history, noise=sampler(sigma, None) if draws else None)
    assert same(result, x) and len(seen) == 5 and all(isinstance(said["sigma"], OnDevice) for said in seen)


def test_plans_of_levels_that_lie_there(device):
    sigmas, alphas = torch.tensor([0.9, 0.5, 0.2, 0.1]), torch.tensor([0.1, 0.5, 0.8, 0.9])
    for dtype in (torch.float32, torch.bfloat16):
        there = [t.to(dtype).to(device) for t in (sigmas, alphas)]
        assert torch.equal(er_sde_plan(*there).table, er_sde_plan(sigmas.to(dtype), alphas.to(dtype)).table)


def test_levels_placed_by_a_run_there(device):
    def model(x, sigma):
        return x / (1 + sigma.reshape(-1, 1) ** 2)

    x, levels = randn(4, 16) * 10, torch.tensor([10.0, 7.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.0])
    placed = place_sigmas(model, x.to(device), levels.to(device), 4)
    torch.testing.assert_close(placed, place_sigmas(model, x, levels, 4), rtol=1e-4, atol=0)


def test_a_plan_calibrated_there(device):
    """Starts and labels lie there; with evaluations for the fit on the way alone, since rounds would magnify rounding."""

    def model(x, sigma, shift):
        return shift + torch.tanh(x - shift) / (1 + sigma.reshape(-1, 1) ** 2)

    x, levels, shift = randn(8, 16) * 10, torch.tensor([10.0, 7.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.0]), randn(8, 1)
    made = [
        calibrate_plan(model, x.to(where), 3, levels, {"shift": shift.to(where)}, evaluations=18, disable=True)
        for where in ("cpu", device)
    ]
    assert made[0].report.calibrated and made[1].report.calibrated
    torch.testing.assert_close(made[1].table, made[0].table, rtol=1e-3, atol=1e-4)


def test_derivatives(device):
    plan, x, denoised = er_sde_plan(SIGMAS), randn(2, 3).to(device).requires_grad_(), randn(2, 4)[:, :3].to(device)
    fast_step(plan, 0, x, [denoised], seed=1).sum().backward()
    assert same(x.grad, torch.full((2, 3), plan.rows[0].w_x, dtype=torch.float32))


def test_what_needs_float64_says_so(device):
    plan, x = er_sde_plan(SIGMAS), randn(2, 3).to(device)
    with pytest.raises(TypeError, match="a plan is float64, which lazy has not: leave it on the CPU"):
        plan.to(device)
    for log_prob in (lambda: fast_step(plan, 0, x, [x], return_log_prob=True), lambda: step_log_prob(plan, 0, x, [x], x)):
        with pytest.raises(ValueError, match=r"log_prob is computed in float64, which lazy.* has not: move x"):
            log_prob()
