"""What the step takes in beside the step: a model's output with guidance, batches of requests, log-densities, graphs, plans.

Each beside what it replaces. Bytes count each tensor of the fused step once.
"""

import dataclasses

import pytest
import torch

from conftest import DEVICE, measure
from ersde_fast import er_sde_plan, fast_step, stack_plans, step_log_prob
from ersde_fast.graph import SamplingGraph
from ersde_fast.noise import seed_table
from ersde_fast.plan import _build_by_kernel

PLAN = er_sde_plan([10.0, 8.0, 6.0, 4.0, 2.0, 1.0], order=3)
STEP = 3


@pytest.mark.parametrize(
    "name", ["torch.add", "step, no noise", "step, noise given", "step from output, noise given", "step with a gradient"]
)
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 1, 1, 4)], ids=lambda s: "x".join(map(str, s)))
def test_host_time(benchmark, shape, name):
    """What a call costs beside one operator of torch on the same tensors; four elements leave the call alone."""
    torch.manual_seed(0)
    x, noise, *history = (torch.randn(shape, device=DEVICE) for _ in range(5))
    leaf = x.clone().requires_grad_()
    ode = er_sde_plan(PLAN.sigmas, order=3, noise_scaler="ode")
    functions = {
        "torch.add": lambda: torch.add(x, noise),
        "step, no noise": lambda: fast_step(ode, STEP, x, history),
        "step, noise given": lambda: fast_step(PLAN, STEP, x, history, noise=noise),
        "step from output, noise given": lambda: fast_step(PLAN, STEP, x, history, noise=noise, prediction_type="v"),
        "step with a gradient": lambda: fast_step(PLAN, STEP, leaf, history, noise=noise),
    }
    function = functions[name]
    benchmark.group = f"host time, {'x'.join(map(str, shape))}"
    benchmark.extra_info.update(contender=name)
    benchmark.pedantic(function, rounds=50, iterations=1000, warmup_rounds=3)


def from_output(shape, dtype):
    """v-prediction, guidance, portable noise: fused; as two fused steps; and as operators of PyTorch, eager and compiled."""
    torch.manual_seed(0)
    x, output, unconditional, *older = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(5))
    row = PLAN.rows[STEP]
    p_x, p_m = PLAN.predicting("v").rows[STEP].prediction
    w_x, (w0, w1, w2), w_noise = row.w_x, row.w_d, row.w_noise

    def operators(x, output, unconditional, a, b):
        denoised = p_x * x + p_m * (unconditional + 3.0 * (output - unconditional))
        return w_x * x + w0 * denoised + w1 * a + w2 * b + w_noise * torch.randn_like(x), denoised

    def converted():
        denoised = p_x * x + p_m * (unconditional + 3.0 * (output - unconditional))
        return fast_step(PLAN, STEP, x, [denoised, *older], seed=1), denoised

    torch._dynamo.reset()  # it compiles one piece of code a few times only, and then runs it as it stands
    compiled = torch.compile(operators, dynamic=False, options={"fallback_random": True})
    guidance = (unconditional, 3.0)
    return {
        "fused": lambda: fast_step(PLAN, STEP, x, [output, *older], seed=1, prediction_type="v", guidance=guidance),
        "fused, by CFG++": lambda: fast_step(
            PLAN, STEP, x, [output, *older], seed=1, prediction_type="v", guidance=(unconditional, 0.6), cfg_pp=True
        ),
        "operators, then the step": converted,
        "operators": lambda: operators(x, output, unconditional, *older),
        "torch.compile": lambda: compiled(x, output, unconditional, *older),
    }


@pytest.mark.parametrize("name", ["fused", "fused, by CFG++", "operators, then the step", "operators", "torch.compile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "shape", [(1, 4, 64, 64), (1, 16, 128, 128), (1, 16, 21, 90, 160), (1, 64 << 20)], ids=lambda s: "x".join(map(str, s))
)
def test_from_output(benchmark, copy_bandwidth, shape, dtype, name):
    numel = torch.Size(shape).numel()
    benchmark.group = f"model output to next sample, {str(dtype).removeprefix('torch.')}, {'x'.join(map(str, shape))}"
    measure(benchmark, name, from_output(shape, dtype)[name], numel, 7, dtype, copy_bandwidth)


def requests(batch):
    """A batch whose samples are at their own steps of two plans, in one step and one by one."""
    torch.manual_seed(0)
    x, *history = (torch.randn(batch, 4, 64, 64, device=DEVICE) for _ in range(4))
    plans = [PLAN, er_sde_plan([7.0, 5.0, 3.0, 2.0, 1.0, 0.5], order=3)]
    stack = stack_plans(plans).to(DEVICE)
    which, steps = torch.arange(batch) % 2, torch.arange(batch) % 5
    index = which.to(DEVICE), steps.to(DEVICE)
    seeds = seed_table([(b, 0) for b in range(batch)], batch).to(DEVICE)
    rows = [
        (plans[p], i, x[b : b + 1], [d[b : b + 1] for d in history], [(b, 0)])
        for b, (p, i) in enumerate(zip(which.tolist(), steps.tolist(), strict=True))
    ]
    return {
        "fused": lambda: fast_step(stack, index, x, history, seed=seeds),
        "one plan and step for all": lambda: fast_step(PLAN, STEP, x, history, seed=seeds),
        "one by one": lambda: [fast_step(plan, i, x, h, seed=seed) for plan, i, x, h, seed in rows],
    }


@pytest.mark.parametrize("name", ["fused", "one plan and step for all", "one by one"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_requests(benchmark, copy_bandwidth, batch, name):
    benchmark.group = f"{batch} requests of 4x64x64 at their own steps"
    measure(benchmark, name, requests(batch)[name], batch * 4 * 64 * 64, 5, torch.float32, copy_bandwidth)


LOG_PROBS = ["step", "step and log-density", "log-density", "log-density and its gradient", "of torch.distributions"]


@pytest.mark.parametrize("name", LOG_PROBS)
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (8, 16, 128, 128), (1, 2**24)], ids=lambda s: "x".join(map(str, s)))
def test_log_prob(benchmark, shape, name):
    torch.manual_seed(0)
    x, x_next, *history = (torch.randn(shape, device=DEVICE) for _ in range(5))
    row = PLAN.rows[STEP]

    def distribution():
        mean = row.w_x * x.double() + sum(w * d.double() for w, d in zip(row.w_d, history, strict=True))
        return torch.distributions.Normal(mean, row.w_noise).log_prob(x_next.double()).flatten(1).sum(1)

    newest = history[0].clone().requires_grad_()

    def gradient():
        return torch.autograd.grad(step_log_prob(PLAN, STEP, x, [newest, *history[1:]], x_next).sum(), newest)

    functions = {
        "log-density and its gradient": gradient,
        "step": lambda: fast_step(PLAN, STEP, x, history, seed=1),
        "step and log-density": lambda: fast_step(PLAN, STEP, x, history, seed=1, return_log_prob=True),
        "log-density": lambda: step_log_prob(PLAN, STEP, x, history, x_next),
        "of torch.distributions": distribution,
    }
    benchmark.group = f"log-density, {'x'.join(map(str, shape))}"
    measure(benchmark, name, functions[name], torch.Size(shape).numel())


FIXED = ["captured, predictions fixed"] if DEVICE == "cuda" else []


@pytest.mark.parametrize("name", ["captured", "eager", *FIXED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 16, 128, 128)], ids=lambda s: "x".join(map(str, s)))
def test_loop_of_20_steps(benchmark, shape, dtype, name):
    """A model that costs one operator (on a CPU both are the same loop), and on a GPU the steps alone."""
    plan = er_sde_plan(torch.linspace(10, 0.5, 21), order=3)
    model = lambda x, sigma: x * 0.5  # noqa: E731
    x, seeds = torch.randn(shape, dtype=dtype, device=DEVICE), seed_table(1, shape[0]).to(DEVICE)
    graph = SamplingGraph(model, plan, shape, dtype, device=DEVICE)

    def fixed():
        history, steps = [torch.randn_like(x) for _ in range(3)], torch.cuda.CUDAGraph()
        with torch.cuda.graph(steps):
            sample = x
            for i in range(plan.num_steps):
                sample = fast_step(plan, i, sample, history, seed=i)
        return steps.replay

    def eager():
        sample, history = x, []
        for i in range(plan.num_steps):
            sample, denoised = fast_step(plan, i, sample, [model(sample, None), *history], seed=seeds, prediction_type="sample")
            history = [denoised, *history[:1]]

    benchmark.group = f"20 steps, {str(dtype).removeprefix('torch.')}, {'x'.join(map(str, shape))}"
    function = fixed() if name in FIXED else {"captured": lambda: graph(x, seed=seeds), "eager": eager}[name]
    measure(benchmark, name, function, torch.Size(shape).numel() * 20)


@pytest.mark.parametrize("name", ["er_sde_plan on the host", "kernel where sigmas lie", "the same with eta by the step"])
@pytest.mark.parametrize("steps", [20, 50, 1000])
def test_plan(benchmark, steps, name):
    """A plan on the host, and by the kernel alone where its sigmas lie (on a CPU: the same code, without the checks)."""
    sigmas = torch.linspace(80, 0.002, steps + 1, dtype=torch.float64)
    there, host = sigmas.to(DEVICE), er_sde_plan(sigmas)
    etas = torch.linspace(0, 1, steps, dtype=torch.float64)
    windowed = dataclasses.replace(host.options, eta=etas.to(DEVICE))
    functions = {
        "the same with eta by the step": lambda: _build_by_kernel(there, None, windowed),
        "er_sde_plan on the host": lambda: er_sde_plan(sigmas),
        "kernel where sigmas lie": lambda: _build_by_kernel(there, None, host.options),
    }
    benchmark.group = f"plan of {steps} steps"
    measure(benchmark, name, functions[name], 1 << 18)
