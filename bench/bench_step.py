"""One step, fused and as its rivals run it, noise given, absent, drawn from torch's stream and portable.

torch.compile gets the weights as Python floats; where noise is drawn it draws with its own generator, and with
`fallback_random`, which on a CPU is much faster. The other rivals draw with torch.randn_like.

Bytes count each tensor of the fused step once: x, the predictions and the noise read, the result written.
"""

import contextlib
from unittest import mock

import pytest
import rivals
import torch
from diffusers import DPMSolverMultistepScheduler

from conftest import DEVICE, LARGE, measure
from ersde_fast import er_sde_plan, fast_step, reference_step
from ersde_fast.backends import CUDA, compiled, nvrtc

SHAPES = [(1, 4, 64, 64), (1, 16, 128, 128), (1, 16, 21, 90, 160), (1, 64 << 20)]
if DEVICE == "cuda":
    SHAPES = [*SHAPES, (1, 4, 128, 128), (8, 4, 128, 128), (256, 3, 64, 64), (1, 512 << 20)]
PLANS = {n: er_sde_plan([10.0, 8.0, 6.0, 4.0, 2.0, 1.0], order=n) for n in (1, 3)}
ODE = er_sde_plan([10.0, 8.0, 6.0, 4.0, 2.0, 1.0], order=3, noise_scaler="ode")
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


def contender(shape, dtype, order, source, name):
    """A function of no arguments that makes one step, and the number of streams that the fused one moves."""
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
    z = (lambda: [torch.randn_like(x)]) if drawn else (lambda: [noise]) if source == "tensor" else (lambda: [])

    def compiled(**options):
        torch._dynamo.reset()  # it compiles one piece of code a few times only, and then runs it as it stands
        function = torch.compile(drawing if drawn else expression, dynamic=False, **options)
        return lambda: function(*floats, x, *history, *([] if drawn else z()))

    def existing():
        l = plan.er_lambdas.to(DEVICE, torch.float32)
        alphas = torch.ones_like(l)
        slope_1 = (history[1] - history[2]) / (l[STEP - 1] - l[STEP - 2])
        kept = [history[0], history[1], slope_1]
        return lambda: rivals.published_step(x, kept, l, alphas, STEP, *z())

    def dpm_solver():
        scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps[:STEP]:
            scheduler.step(history[0], t, x)

        def step():
            scheduler._step_index = STEP
            return scheduler.step(history[0], scheduler.timesteps[STEP], x).prev_sample

        return step

    step = lambda: fast_step(plan, STEP, x, history, **kwargs())  # noqa: E731
    makers = {
        "fused": lambda: step,
        "NVRTC": lambda: step,
        "torch.add": lambda: lambda: torch.add(x, history[0]),
        "Triton": lambda: lambda: fast_step(plan, STEP, x, history, backend="triton", **kwargs()),
        "eager expression": lambda: lambda: expression(*floats, x, *history, *z()),
        "lean eager chain": lambda: lambda: rivals.lean_chain(row, x, history, noise),
        "reference": lambda: lambda: reference_step(plan, STEP, x, history, noise=noise),
        "torch.compile": lambda: compiled(),
        "torch.compile, fallback_random": lambda: compiled(options={"fallback_random": True}),
        "torch.compile, reduce-overhead": lambda: compiled(mode="reduce-overhead"),
        "existing samplers": existing,
        "DPM-Solver++ 2M SDE of diffusers": dpm_solver,
    }
    return makers[name](), order + 2 + (source == "tensor")


COMPILED = ["torch.compile", "torch.compile, fallback_random" if DEVICE == "cpu" else "torch.compile, reduce-overhead"]
OTHER_WAYS = ["NVRTC", "Triton"] if DEVICE == "cuda" else []
RIVALS = {
    (1, "tensor"): ["fused", "eager expression", "torch.compile"],
    (3, "no noise"): ["fused", *OTHER_WAYS, "torch.add", "torch.compile"],
    (3, "tensor"): ["fused", "eager expression", "lean eager chain", "reference", "torch.compile", "existing samplers"],
    (3, "portable"): ["fused", *OTHER_WAYS],
    (3, "torch"): [
        "fused",
        *OTHER_WAYS,
        "eager expression",
        *COMPILED,
        "existing samplers",
        "DPM-Solver++ 2M SDE of diffusers",
    ],
}
if DEVICE == "cuda":
    RIVALS = {key: names for key, names in RIVALS.items() if key[0] == 3 and key[1] != "tensor"}
CASES = [(*key, name) for key, names in RIVALS.items() for name in names]


def by_way(name):
    """While it lasts, steps on CUDA go that way."""
    if name != "NVRTC":
        return contextlib.nullcontext()
    kernels, why = nvrtc.load(compiled.kernels_library()[0], compiled.FOLDER)
    assert kernels is not None, why
    return mock.patch.multiple(CUDA, kernels=kernels, way="nvrtc")


@pytest.mark.parametrize("order, source, name", CASES, ids=lambda v: str(v))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_step(benchmark, copy_bandwidth, shape, dtype, order, source, name):
    numel = torch.Size(shape).numel()
    if "reduce-overhead" in name and numel > 1 << 18:
        pytest.skip("a graph saves launches, which larger tensors hide")
    if DEVICE == "cuda" and (source, name) == ("no noise", "torch.compile") and numel < LARGE:
        pytest.skip("the launch is measured with noise")
    function, streams = contender(shape, dtype, order, source, name)
    benchmark.group = f"order {order}, {source}, {str(dtype).removeprefix('torch.')}, {'x'.join(map(str, shape))}"
    with by_way(name):
        measure(benchmark, name, function, numel, 3 if name == "torch.add" else streams, dtype, copy_bandwidth)
