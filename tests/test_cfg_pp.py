"""CFG++ (arXiv 2406.08070): the step that moves by the guided prediction and renoises by the unconditional one."""

import math

import pytest
import torch

from conftest import assert_sum_exact
from ersde_fast import er_sde_plan, fast_step, stack_plans, step_log_prob
from ersde_fast.graph import SamplingGraph, StepGraph
from ersde_fast.predictions import PREDICTION_TYPES
from ersde_fast.table import W_GUIDE

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PLANS = {
    "ve": er_sde_plan([9, 8, 6.5, 5, 4, 3, 0], order=3, method="newton", sigma_data=0.5),
    "vp": er_sde_plan([0.99, 0.9, 0.8, 0.6, 0.5, 0.2, 0], process="vp", order=2, noise_scaler="sde_2", sigma_data=0.5),
    "flow": er_sde_plan([1, 0.9, 0.8, 0.6, 0.6, 0.2, 0], process="flow", order=5, method="newton", sigma_data=0.5),
    "ode": er_sde_plan([1, 0.9, 0.8, 0.6, 0.4, 0.2, 0], process="flow", order=1, noise_scaler="ode", sigma_data=0.5),
}
SCALES = [0.0, 0.6, 1.0, 7.5, torch.tensor([0.3, 2.0], dtype=torch.float64)]


def inputs(order, dtype=torch.float64, shape=(2, 3, 7)):
    g = torch.Generator().manual_seed(0)
    made = (
        torch.randn(order + 3, *shape, generator=g, dtype=torch.float64, device="cpu")
        .to(dtype)
        .to(torch.empty(0).device)
        .unbind()
    )
    return made[0], made[1], made[2], list(made[3 : order + 2]), made[-1]


def definition(plan, i, name, x, output, unconditional, older, noise, scale):
    """The step with the guided prediction D_g, and w_x alpha (D_g - D_u)."""
    row = plan.predicting(name).rows[i]
    p_x, p_m = row.prediction
    scale = scale.view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale
    d_g = p_x * x + p_m * (unconditional + scale * (output - unconditional))
    d_u = p_x * x + p_m * unconditional
    mean = row.w_x * x + sum(w * d for w, d in zip(row.w_d, [d_g, *older], strict=False))
    return mean + row.w_x * plan.alphas[i].item() * (d_g - d_u) + row.w_noise * noise, d_g


@pytest.mark.parametrize("process", PLANS)
@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_it_is_the_step_and_what_is_renoised(backend, name, process):
    plan = PLANS[process]
    x, output, unconditional, older, noise = inputs(plan.order)
    for i in range(plan.num_steps):
        if name == "epsilon" and plan.alphas[i] == 0:
            continue
        for scale in SCALES:
            scale = scale.to(x.device) if isinstance(scale, torch.Tensor) else scale
            step = {"prediction_type": name, "guidance": (unconditional, scale), "cfg_pp": True, "backend": backend}
            got = fast_step(plan, i, x, [output, *older], noise=noise, **step)
            expected = definition(plan, i, name, x, output, unconditional, older, noise, scale)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("i", range(6))
def test_order_one_of_the_ode_is_ddim_with_cfg_pp(i):
    """x_t = alpha_t D_g + sigma_t epsilon_u."""
    plan = er_sde_plan([0.98, 0.9, 0.8, 0.6, 0.5, 0.2, 0], process="vp", order=1, noise_scaler="ode")
    x, conditional, unconditional, _, _ = inputs(1)
    (alpha, alpha_t), (sigma, sigma_t) = plan.alphas[i : i + 2].tolist(), plan.sigmas[i : i + 2].tolist()
    guided = (x - sigma * (unconditional + 0.6 * (conditional - unconditional))) / alpha
    got, denoised = fast_step(plan, i, x, [conditional], prediction_type="epsilon", guidance=(unconditional, 0.6), cfg_pp=True)
    torch.testing.assert_close(denoised, guided, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, alpha_t * guided + sigma_t * unconditional, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 4, 256)])
def test_every_dtype_and_source_of_noise(backend, dtype, shape):
    """The sum of the rounded prediction, the unconditional output and the others to half an ulp; the same bits at a step that lies on
    the device, in a stack, and where the noise that is drawn is given."""
    plan, i = PLANS["flow"], 4
    x, output, unconditional, older, _ = inputs(plan.order, dtype, shape)
    step = {"prediction_type": "flow", "guidance": (unconditional, 0.7), "cfg_pp": True, "backend": backend}
    got, denoised = fast_step(plan, i, x, [output, *older], seed=5, **step)
    plain, same = fast_step(plan, i, x, [output, *older], seed=5, **{**step, "cfg_pp": False})
    assert torch.equal(denoised, same) and not torch.equal(got, plain)
    row = plan.predicting("flow", True).rows[i]
    quiet = fast_step(plan, i, x, [output, *older], noise=torch.zeros_like(x), **step)[0]
    terms = [(row.w_x, x[0]), *((w, d[0]) for w, d in zip(row.w_d, [denoised, *older], strict=False))]
    assert_sum_exact(quiet[0], [*terms, (row.w_guide, unconditional[0])], x[0], ulps=8)
    on_device = fast_step(plan.to(x.device), torch.tensor(i, device=x.device), x, [output, *older], seed=5, **step)
    assert torch.equal(on_device[0], got)
    index = torch.tensor([0, 0], device=x.device), torch.tensor([i, i], device=x.device)
    stacked = fast_step(stack_plans([plan]).to(x.device), index, x, [output, *older], seed=5, **step)
    assert torch.equal(stacked[0], got)
    out = unconditional.clone()
    fast_step(plan, i, x, [output, *older], seed=5, out=out, **{**step, "guidance": (out, 0.7)})
    assert torch.equal(out, got)


def test_derivatives_transforms_and_compiled_code():
    plan, i = PLANS["ve"], 3
    x, output, unconditional, older, noise = inputs(plan.order, shape=(2, 3))
    scale = torch.tensor([0.3, 2.0], dtype=torch.float64)

    def step(x, output, unconditional, noise, *older):
        guidance = (unconditional, scale)
        return fast_step(plan, i, x, [output, *older], noise=noise, prediction_type="v", guidance=guidance, cfg_pp=True)

    leaves = [t.requires_grad_() for t in (x, output, unconditional, noise, *older)]
    assert torch.autograd.gradcheck(step, leaves, check_forward_ad=True)
    plain = [t.detach() for t in leaves]
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*plain), step(*plain))
    mapped = torch.func.vmap(lambda x, u: step(x, plain[1], u, *plain[3:]))(
        torch.stack([plain[0]] * 2), torch.stack([plain[2]] * 2)
    )
    torch.testing.assert_close(mapped[0][1], step(*plain)[0])


def test_the_density_is_that_of_the_step():
    plan, i = PLANS["ve"], 3
    x, output, unconditional, older, noise = inputs(plan.order)
    step = {"prediction_type": "v", "guidance": (unconditional, 0.6), "cfg_pp": True}
    x_next, _, density = fast_step(plan, i, x, [output, *older], noise=noise, return_log_prob=True, **step)
    mean, _ = definition(plan, i, "v", x, output, unconditional, older, 0.0, 0.6)
    expected = torch.distributions.Normal(mean, plan.rows[i].w_noise).log_prob(x_next).sum((1, 2))
    torch.testing.assert_close(density, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step_log_prob(plan, i, x, [output, *older], x_next, **step), density)


@pytest.mark.parametrize("graph", [SamplingGraph, StepGraph])
def test_graphs(graph):
    plan, model = PLANS["ve"], lambda x, sigma: (-0.1 * x, 0.05 * x)
    x = inputs(1, torch.float32)[0]
    made = graph(model, plan, x.shape, device="cpu", prediction_type="v", guidance_scale=0.6, cfg_pp=True)
    if graph is SamplingGraph:
        result = made(x, seed=5)
    else:
        made.start(x, seed=5)
        for _ in range(plan.num_steps):
            result = made()
    y, history = x, []
    for i in range(plan.num_steps):
        output, unconditional = model(y, None)
        step = {"prediction_type": "v", "guidance": (unconditional, 0.6), "cfg_pp": True}
        y, denoised = fast_step(plan, i, y, [output, *history], seed=5, **step)
        history = [denoised, *history[:1]]
    assert torch.equal(result, y)


def test_without_guidance_nothing_is_renoised():
    """Where both outputs are alike, and where x is forgotten."""
    plan = PLANS["ve"]
    x, output, _, older, noise = inputs(plan.order)
    plain = fast_step(plan, 3, x, [output, *older], noise=noise, prediction_type="v")
    guided = fast_step(plan, 3, x, [output, *older], noise=noise, prediction_type="v", guidance=(output, 0.6), cfg_pp=True)
    torch.testing.assert_close(guided, plain, rtol=1e-12, atol=1e-12)
    assert PLANS["flow"].predicting("v", True).table[[0, 5], W_GUIDE].tolist() == [0, 0]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"cfg_pp": True}, ValueError, r"cfg_pp needs guidance=\(unconditional output, scale\)"),
        ({"cfg_pp": True, "prediction_type": "v"}, ValueError, "cfg_pp needs guidance"),
        ({"cfg_pp": 1, "prediction_type": "v", "guidance": "pair"}, TypeError, "cfg_pp must be True or False, got 1"),
        ({"cfg_pp": None, "prediction_type": "v"}, TypeError, "cfg_pp must be True or False, got None"),
        ({"cfg_pp": True, "guidance": "pair"}, ValueError, "guidance needs a prediction_type"),
        ({"cfg_pp": True, "prediction_type": "v", "guidance": "nan"}, TypeError, r"guidance\[1\] must be a finite number"),
    ],
)
def test_bad_input(arguments, error, message):
    x, output, unconditional, older, noise = inputs(3)
    pairs = {"pair": (unconditional, 0.6), "nan": (unconditional, math.nan)}
    arguments = {**arguments, "guidance": pairs.get(arguments.get("guidance"))}
    with pytest.raises(error, match=message):
        fast_step(PLANS["ve"], 3, x, [output, *older], noise=noise, **arguments)
    made = PLANS["ve"].predicting("v", True)
    with pytest.raises(ValueError, match=r'the plan is one of CFG\+\+ from "v"'):
        fast_step(made, 3, x, [output, *older], noise=noise, prediction_type="epsilon")
