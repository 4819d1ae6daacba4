"""What is set for all of PyTorch changes no number: default dtype and device, inference mode, autocast, determinism.

Every public function, given inputs made beforehand, returns under each state what it returns without, to the bit.
"""

import contextlib
import subprocess
import sys
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

import ersde_fast
from ersde_fast import distributed, er_sde_plan, fast_step, graph, step_log_prob
from ersde_fast.integrations import edm
from ersde_fast.integrations.er_sde_solver import ER_SDE_Solver


@contextlib.contextmanager
def setting(switch, value, before):
    switch(value)
    try:
        yield
    finally:
        switch(before)


STATES = {
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "meta": lambda: torch.device("meta"),
    "cuda": lambda: torch.device("cuda"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast_cuda": lambda: torch.autocast("cuda", torch.float16),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
}

LEVELS = [9.0, 6.5, 4.2, 2.1, 0.7, 0.1, 0.0]
SIGMAS = torch.tensor(LEVELS, dtype=torch.float64)
FLOW = [1.0, 0.85, 0.6, 0.35, 0.1, 0.0]
ALPHAS, NOISE_LEVELS = (1 - SIGMAS / 10).sqrt(), (SIGMAS / 10).sqrt()
PLAN = er_sde_plan(LEVELS, order=3)
STACK = ersde_fast.stack_plans([PLAN, er_sde_plan(FLOW, process="flow", order=2)])
X, OUTPUT, *HISTORY = torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(0)).unbind()
PICTURES = 9 * torch.randn(4, 2, 128, 128, generator=torch.Generator().manual_seed(1))  # of which a calibration sees a part
STEP, STEPS = torch.tensor(4), (torch.tensor([0, 1]), torch.tensor([4, 2]))
PAIRS, SCALES = torch.tensor([[7, 1], [8, 2]]), torch.tensor([2.0, 5.0], dtype=torch.float64)
SPLIT = []  # X and HISTORY as DTensors


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path_factory.mktemp("store") / "file")), rank=0, world_size=1)
    mesh = DeviceMesh("cpu", [0])
    SPLIT[:] = (distribute_tensor(t, mesh, [Shard(1)]) for t in (X, *HISTORY))
    yield
    dist.destroy_process_group()


def model(x, sigma, *_):
    return x * (0.25 / (0.25 + sigma.view(-1, *[1] * (x.dim() - 1)) ** 2))


def generator():
    return torch.Generator("cpu").manual_seed(3)


class Net:
    """The interface of EDM's networks."""

    sigma_min, sigma_max, img_channels, img_resolution, label_dim = 0.01, 50.0, 3, 4, 10
    round_sigma = staticmethod(lambda sigma: sigma)

    def __call__(self, x, sigma, class_labels=None):
        shift = 0 if class_labels is None else class_labels.argmax(1).view(-1, 1, 1, 1)
        return model(x + shift, sigma)


def plans():
    power = lambda l: l**1.5  # noqa: E731
    rules = (dict(), dict(order=[1, 2, 3, 4, 5, 1]), dict(integration_points=50), dict(method="taylor"))
    made = [
        er_sde_plan(LEVELS, noise_scaler=scaler, eta=eta, **rule)
        for scaler in ("sde_5", "sde_1", "sde_4", "ode", power)
        for eta in (1.0, 0.3)
        for rule in rules
    ]
    made += [er_sde_plan(FLOW, process="flow"), er_sde_plan(SIGMAS.float() / 10, process="vp"), PLAN.starting_at(2)]
    made += [er_sde_plan(ALPHAS.new_tensor(LEVELS), ALPHAS.sqrt() * 0 + 1), er_sde_plan(SIGMAS.numpy())]
    return [*made, *(ersde_fast.stack_plans(made[:3]), PLAN.to("cpu"), PLAN.check(), list(made[0].rows))]


def steps():
    torch.manual_seed(3)
    guided = dict(seed=5, prediction_type="v")
    several = [dict(seed=5), dict(seed=[7, 8]), dict(seed=[(7, 1), (8, 2)]), dict(seed=PAIRS), dict(noise=OUTPUT), dict()]
    several += [dict(generator=generator()), dict(seed=5, return_log_prob=True), dict(seed=5, backend="reference")]
    several += [guided, guided | dict(guidance=(OUTPUT, 4.0)), guided | dict(guidance=(OUTPUT, SCALES))]
    part = dict(seed=5, global_shape=(3, 8), global_start=(1, 0))
    return [
        *(fast_step(PLAN, i, X.to(dtype), HISTORY, **options) for options in several for i in (3, STEP) for dtype in DTYPES),
        *(fast_step(PLAN, i, X, HISTORY, seed=5, out=X.clone()) for i in range(PLAN.num_steps)),
        *(fast_step(PLAN, 3, X[:, 1:], [d[:, 1:] for d in HISTORY], backend=name, **part) for name in (None, "reference")),
        *(fast_step(STACK, STEPS, X, HISTORY, seed=[5, 6], backend=name) for name in (None, "reference")),
    ]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def operators():
    """Steps by way of the operators, as they are traced."""
    return [
        ersde_fast.ops.STEP(PLAN.table, None, STEP, X, HISTORY, None, PAIRS, [], []),
        ersde_fast.ops.STEP_FROM_OUTPUT(
            PLAN.predicting("v").table, None, STEP, X, HISTORY, OUTPUT, None, [], [], None, None, False
        ),
    ]


def graphs():
    run, step = (Graph(model, PLAN, X.shape, device="cpu") for Graph in (graph.SamplingGraph, graph.StepGraph))
    step.start(X, seed=4)
    return [run(X, seed=4), *(step().clone() for _ in range(PLAN.num_steps))]


def authors_solver():
    ve, vp = ER_SDE_Solver("ve").ve_3_order_taylor, ER_SDE_Solver("vp", "noise").vp_3_order_taylor
    return [
        *(ve(model, X, levels, randn_like=torch.ones_like) for levels in (SIGMAS, LEVELS)),
        *(vp(model, X, ALPHAS, NOISE_LEVELS, times, randn_like=torch.ones_like) for times in (LEVELS, SIGMAS.numpy())),
    ]


def generated():
    with tempfile.TemporaryDirectory() as folder:
        distributed.generate(model, PLAN, range(5), (3, 8), folder, 2, progress=False)
        return distributed.load_samples(folder)


def split_latents():
    x, *history = SPLIT
    noise = distributed.portable_noise_dtensor((2, 3, 8), 5, 1, x.device_mesh, [Replicate()])
    return [distributed.fast_step_dtensor(PLAN, 3, x, history, seed=5).to_local(), noise.to_local(), distributed.shard_of(x)]


def scheduler(**config):
    made = pytest.importorskip("ersde_fast.integrations.diffusers", exc_type=ImportError).ERSDEScheduler(**config)
    made.set_timesteps(6)
    x = X
    for t in made.timesteps:
        x = made.step(0.5 * x, t, x, generator=generator(), return_dict=False)[0]
    return [made.sigmas, made.timesteps, x, made.add_noise(X, OUTPUT, made.timesteps[:2])]


CASES = {
    "plans": plans,
    "reverse_time_sde": lambda: er_sde_plan(LEVELS, noise_scaler=ersde_fast.reverse_time_sde(0.5)),
    "fast_step": steps,
    "operators": operators,
    "reference_step": lambda: [
        ersde_fast.reference_step(PLAN, 3, X, HISTORY, seed=5),
        ersde_fast.reference_step(PLAN, STEP, X, HISTORY, OUTPUT, prediction_type="epsilon", guidance=(OUTPUT, SCALES)),
    ],
    "step_log_prob": lambda: [
        step_log_prob(PLAN, i, X, HISTORY, OUTPUT, prediction_type=kind) for i in (3, STEP) for kind in (None, "flow")
    ],
    "portable_noise": lambda: [ersde_fast.portable_noise((2, 3, 5), seed, -1) for seed in (7, [7, 8], PAIRS)],
    "torch_noise": lambda: ersde_fast.torch_noise((2, 9), 7, torch_layout=(80, 1536)),
    "available_backends": ersde_fast.available_backends,
    "sample_er_sde": lambda: [
        ersde_fast.sample_er_sde(model, x, levels, disable=True, **source)
        for x, levels in ((X, LEVELS), (X.bfloat16(), SIGMAS.float()))
        for source in (dict(seed=5), dict(generator=generator()), dict(noise_sampler=lambda *_: OUTPUT))
    ],
    "place_sigmas": lambda: ersde_fast.place_sigmas(model, X, LEVELS, 5),
    "calibrate_plan": lambda: ersde_fast.calibrate_plan(model, PICTURES, 2, LEVELS, evaluations=20, disable=True),
    "karras_sigmas": lambda: [edm.karras_sigmas(9), edm.karras_sigmas(9, round_sigma=torch.round)],
    "er_sde_sampler": lambda: edm.er_sde_sampler(Net(), X[..., None], num_steps=5, seed=3),
    "edm.generate": lambda: list(edm.generate(Net(), range(3), 2, num_steps=5, progress=False)),
    "ER_SDE_Solver": authors_solver,
    "graphs": graphs,
    "generate": generated,
    "DTensor": split_latents,
    "ERSDEScheduler": lambda: scheduler(beta_schedule="scaled_linear"),
    "ERSDEScheduler, flow": lambda: scheduler(prediction_type="flow_prediction", shift=3.0),
    "ERSDEScheduler, EDM": lambda: scheduler(levels_of="EDMEulerScheduler", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
    "ERSDEScheduler, CogVideoX": lambda: scheduler(levels_of="CogVideoXDDIMScheduler", snr_shift_scale=3.0, clip_sample=True),
}


def numbers(result):
    """The bits of every tensor in a result, and what is none."""
    if isinstance(result, torch.Tensor):
        bits = result.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[result.element_size()])
        return result.dtype, result.device, bits.tolist()
    if isinstance(result, (ersde_fast.Plan, ersde_fast.PlanStack)):
        return [numbers(value) for value in vars(result).values() if isinstance(value, (torch.Tensor, bool))]
    return [numbers(value) for value in result] if isinstance(result, (list, tuple)) else result


def marks(state):
    return [pytest.mark.gpu] if "cuda" in state else []


@pytest.mark.parametrize("state, case", [pytest.param(s, c, marks=marks(s)) for c in CASES for s in STATES])
def test_the_numbers_are_the_same(state, case):
    expected = numbers(CASES[case]())
    with STATES[state]():
        result = CASES[case]()
    assert numbers(result) == expected


MADE = {
    "kernel": lambda: er_sde_plan(LEVELS),
    "torch": lambda: er_sde_plan(LEVELS, noise_scaler=lambda l: l**1.5),
    "alphas": lambda: er_sde_plan(ALPHAS.new_tensor(LEVELS), alphas=[1.0] * 7),
    "starting_at": lambda: er_sde_plan([10.0, *LEVELS]).starting_at(1),
    "to": lambda: er_sde_plan(LEVELS).to("cpu"),
}


@pytest.mark.parametrize("made", MADE)
def test_a_plan_made_under_inference_mode_can_be_trained_with(made):
    with torch.inference_mode():
        plan = MADE[made]()
        stack, elsewhere = ersde_fast.stack_plans([plan]), plan.to("meta")
    assert not any(tensor.is_inference() for tensor in (plan.table, plan.sigmas, stack.table, elsewhere.table))
    for of, i in ((plan, 3), (plan, STEP), (stack, (STEPS[0] * 0, STEPS[1]))):
        x = X.clone().requires_grad_()
        fast_step(of, i, x, HISTORY, seed=5).sum().backward()
        assert x.grad.isfinite().all()


def test_a_graph_made_under_inference_mode_runs_outside():
    with torch.inference_mode():
        run = graph.SamplingGraph(model, PLAN, X.shape, device="cpu")
    assert torch.equal(run(X, seed=4), graph.SamplingGraph(model, PLAN, X.shape, device="cpu")(X, seed=4))


IMPORTED = """
import torch
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")
torch.use_deterministic_algorithms(True)
with torch.inference_mode():
    import ersde_fast, ersde_fast.distributed, ersde_fast.graph, ersde_fast.integrations.edm, ersde_fast.integrations.er_sde_solver
plans = [ersde_fast.er_sde_plan([9.0, 4.0, 1.0, 0.0], noise_scaler=s) for s in ("sde_5", lambda l: l**1.5)]
noise = ersde_fast.noise.specified_noise((1, 8), ersde_fast.noise.seed_table(5, 1), 2)
print([p.table.tolist() for p in plans], noise.tolist())
"""


def test_importing_under_every_state_at_once():
    said = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True).stdout
    plans = [er_sde_plan([9.0, 4.0, 1.0, 0.0], noise_scaler=s) for s in ("sde_5", lambda l: l**1.5)]
    noise = ersde_fast.portable_noise((1, 8), 5, 2)
    assert said.strip() == f"{[p.table.tolist() for p in plans]} {noise.tolist()}"
