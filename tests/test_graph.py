"""Runs and steps as graphs. Here the same loops run without a graph; the tests marked gpu capture them."""

import pytest
import torch

from ersde_fast import er_sde_plan, fast_step
from ersde_fast.backends import CPU
from ersde_fast.graph import SamplingGraph, StepGraph

PLAN = er_sde_plan([9, 8, 6.5, 5, 4, 3, 0], method="newton")
OTHER = er_sde_plan([5, 4, 3.5, 3, 2, 1, 0.5], order=[1, 2, 2, 3, 3, 2], noise_scaler="sde_2")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GRAPHS = [SamplingGraph, StepGraph]


def model(x, sigma):
    """A network's stand-in, of elementwise operators that round alike with and without a graph."""
    return torch.tanh(x / (1 + sigma.view(-1, 1, 1).to(x.dtype)))


def start(device, dtype=torch.float32):
    return (9 * torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))).to(device, dtype)


def sample(graph, x, seed=None, plan=None):
    """A whole run of either graph."""
    if isinstance(graph, SamplingGraph):
        return graph(x, seed=seed, plan=plan)
    graph.start(x, seed=seed, plan=plan)
    for _ in range(graph.plan.num_steps):
        result = graph()
    return result.clone()


def loop(plan, x, seed, prediction_type="v", guided=False):
    """The run as eager steps."""
    history = []
    levels = plan.sigmas.to(x.device, torch.promote_types(x.dtype, torch.float32))
    for i in range(plan.num_steps):
        output = model(x, levels[i].expand(len(x)))
        guidance = (output * 0.5, 3.0) if guided else None
        x, denoised = fast_step(plan, i, x, [output, *history], seed=seed, prediction_type=prediction_type, guidance=guidance)
        history = [denoised, *history[: plan.order - 2]] if plan.order > 1 else []
    return x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prediction_type", ["sample", "v"])
def test_a_replay_is_the_eager_run(graph, device, dtype, prediction_type):
    """To the bit: the same seed, a seed for each sample, and other sigmas, without another capture."""
    graph = graph(model, PLAN, (3, 4, 16), dtype, device, prediction_type=prediction_type)
    for plan, seed in [(None, 5), (None, [5, 6, 7]), (OTHER, 5), (None, 5), (None, [(5, 2), (5, 0), (8, 2**40)])]:
        x = start(device, dtype)
        expected = loop(PLAN if plan is None else plan, x, seed, prediction_type)
        assert torch.equal(sample(graph, x, seed, plan), expected)
        assert torch.equal(x, start(device, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_fresh_noise_without_a_seed(graph, device):
    """Of torch's default generator, so that manual_seed makes a run again; and the result has memory of its own."""
    graph = graph(model, PLAN, (3, 4, 16), torch.float32, device)
    torch.manual_seed(3)
    first, second = sample(graph, start(device)), sample(graph, start(device))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(sample(graph, start(device)), first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("order", [1, 2, 5])
def test_orders_guidance_and_runs_without_noise(graph, device, order):
    pair = lambda x, sigma: (model(x, sigma), model(x, sigma) * 0.5)  # noqa: E731
    ode = er_sde_plan(PLAN.sigmas, order=order, method="newton", noise_scaler="ode")
    guided = graph(pair, ode, (3, 4, 16), torch.float32, device, prediction_type="v", guidance_scale=3.0)
    assert torch.equal(sample(guided, start(device)), loop(ode, start(device), None, guided=True))


@pytest.mark.parametrize("device", DEVICES)
def test_after_the_last_step_comes_nan_and_then_a_new_start(device):
    graph = StepGraph(model, PLAN, (3, 4, 16), torch.float32, device, prediction_type="v")
    result = sample(graph, start(device), 5)
    assert graph().isnan().all()
    assert torch.equal(sample(graph, start(device), 5), result)


def test_a_ring_that_no_backend_keeps(monkeypatch):
    expected = sample(StepGraph(model, PLAN, (3, 4, 16), device="cpu"), start("cpu"), 5)
    monkeypatch.setattr(CPU, "keeps_ring", False)
    assert torch.equal(sample(StepGraph(model, PLAN, (3, 4, 16), device="cpu"), start("cpu"), 5), expected)


@pytest.mark.gpu
def test_new_sigmas_from_the_device_without_a_host_sync():
    """A plan built on the device from sigmas there, replayed: the host waits for nothing."""
    graph = SamplingGraph(model, PLAN, (3, 4, 16))
    x, seeds = start("cuda"), torch.tensor([[5, 0], [5, 1], [5, 2]], device="cuda")
    sigmas = OTHER.sigmas.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = er_sde_plan(sigmas, noise_scaler="sde_2", order=3)
        result = graph(x, seed=seeds, plan=plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(
        result, loop(er_sde_plan(OTHER.sigmas, noise_scaler="sde_2", order=3), x, 5, "sample"), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "arguments, call, message",
    [
        (dict(), dict(x=torch.zeros(3, 4, 15)), r"x must be torch.float32 \(3, 4, 16\), as captured, got torch.float32 \(3, 4, 15\)"),
        (dict(), dict(x=torch.zeros(3, 4, 16).double()), r"x must be torch.float32 .* got torch.float64"),
        (dict(), dict(x=None), r"x must be torch.float32 .* got NoneType"),
        (dict(), dict(plan=PLAN.starting_at(1)), r"plan must have 6 steps of order 3, as captured, got 5 of order 3"),
        (dict(), dict(plan=7), r"plan must have 6 steps of order 3, as captured, got int"),
        (dict(plan=er_sde_plan(PLAN.sigmas, noise_scaler="ode")), dict(plan=PLAN), r"plan must not add noise: the plan that was captured adds none"),
        (dict(), dict(seed=[1, 2]), r"seed must be one number or 3"),
        (dict(prediction_type="eps"), None, r"prediction_type must be one of sample, epsilon, v, flow, edm, got 'eps'"),
        (dict(prediction_type=None), None, r"prediction_type must be one of sample, epsilon, v, flow, edm, got None"),
        (dict(shape=()), None, r"shape must have a batch dimension"),
        (dict(prediction_type="epsilon"), dict(plan=er_sde_plan(torch.linspace(1, 0, 7), process="flow")), r"plan must not start at alpha 0"),
    ],
)  # fmt: skip
def test_bad_input(arguments, call, message):
    with pytest.raises(ValueError, match=message):
        graph = SamplingGraph(**{"model": model, "plan": PLAN, "shape": (3, 4, 16), "device": "cpu", **arguments})
        graph(**{"x": start("cpu"), **call})
