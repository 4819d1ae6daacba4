"""One step, fused and as its rivals run it: orders 1 and 3, latents to 64 Mi elements, noise given, absent, drawn and portable.

torch.compile draws with `fallback_random`, which is torch's own stream; its rivals draw with torch.randn_like.

Bytes count each tensor of the fused step once: x, the predictions and the noise read, the result written.
"""

import pytest
import rivals
import torch

from conftest import DEVICE, measure
from ersde_fast import er_sde_plan, fast_step, reference_step

SHAPES = [(1, 4, 64, 64), (1, 16, 128, 128), (1, 16, 21, 90, 160), (1, 64 << 20)]
PLANS = {n: er_sde_plan([10.0, 8.0, 6.0, 4.0, 2.0, 1.0], order=n) for n in (1, 3)}
ODE = er_sde_plan([10.0, 8.0, 6.0, 4.0, 2.0, 1.0], noise_scaler="ode")
STEP = 3


def expression_of(order, noisy=True):
    """The step as one Python expression, for torch.compile; the weights arrive as Python floats."""
    if order == 1:
        return lambda a, b, c, x, m0, z: a * x + b * m0 + c * z
    if not noisy:
        return lambda a, b0, b1, b2, x, m0, m1, m2: a * x + b0 * m0 + b1 * m1 + b2 * m2
    return lambda a, b0, b1, b2, c, x, m0, m1, m2, z: a * x + b0 * m0 + b1 * m1 + b2 * m2 + c * z


def tensors(shape, dtype, order):
    torch.manual_seed(0)
    x, noise, *history = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(order + 2))
    return x, history, noise


def contenders(shape, dtype, order, source):
    """Name to a function of no arguments that makes one step, and the number of streams that the fused one moves."""
    plan = PLANS[order] if source != "no noise" else ODE
    x, history, noise = tensors(shape, dtype, order)
    row = plan.rows[STEP]
    floats = [row.w_x, *row.w_d, *([row.w_noise] if source != "no noise" else [])]
    seed = iter(range(10**9))
    sources = {
        "no noise": lambda: {},
        "tensor": lambda: {"noise": noise},
        "torch": lambda: {},
        "portable": lambda: {"seed": next(seed)},
    }
    kwargs = sources[source]
    drawn = source in ("torch", "portable")
    expression = expression_of(order, source != "no noise")
    drawing = lambda *args: expression(*args, torch.randn_like(args[len(floats)]))  # noqa: E731
    compiled = torch.compile(drawing if drawn else expression, dynamic=False, options={"fallback_random": True})
    z = (lambda: [torch.randn_like(x)]) if drawn else (lambda: [noise]) if source == "tensor" else (lambda: [])
    result = {
        "fused": lambda: fast_step(plan, STEP, x, history, **kwargs()),
        "eager expression": lambda: expression(*floats, x, *history, *z()),
        "torch.compile": lambda: compiled(*floats, x, *history, *([] if drawn else z())),
    }
    if source == "tensor":
        result["reference"] = lambda: reference_step(plan, STEP, x, history, noise=noise)
        result["lean eager chain"] = lambda: rivals.lean_chain(row, x, history, noise)
    if order == 3 and source in ("tensor", "torch"):
        l = plan.er_lambdas.to(DEVICE, torch.float32)
        alphas = torch.ones_like(l)
        slope_1 = (history[1] - history[2]) / (l[STEP - 1] - l[STEP - 2])
        kept = [history[0], history[1], slope_1]
        result["existing samplers"] = lambda: rivals.published_step(x, kept, l, alphas, STEP, *z())
    streams = order + 2 + (source == "tensor")
    return result, streams


RIVALS = {
    "tensor": ["fused", "eager expression", "torch.compile", "reference", "lean eager chain"],
    "no noise": ["fused", "eager expression", "torch.compile"],
    "torch": ["fused", "eager expression", "torch.compile"],
    "portable": ["fused", "eager expression", "torch.compile"],
}
CASES = [(1, "tensor", name) for name in RIVALS["tensor"]]
CASES += [(3, source, name) for source, names in RIVALS.items() for name in names]
CASES += [(3, source, "existing samplers") for source in ("tensor", "torch")]


@pytest.mark.parametrize("order, source, name", CASES, ids=lambda v: str(v))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_step(benchmark, copy_bandwidth, shape, dtype, order, source, name):
    functions, streams = contenders(shape, dtype, order, source)
    numel = torch.Size(shape).numel()
    benchmark.group = f"order {order}, {source}, {str(dtype).removeprefix('torch.')}, {'x'.join(map(str, shape))}"
    measure(benchmark, name, functions[name], numel, streams, dtype, copy_bandwidth)
