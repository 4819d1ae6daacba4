"""Plans of weights of one's own, and plans in files: what comes back, what is refused, and files that are hostile."""

import itertools
import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ersde_fast import Plan, er_sde_plan, fast_step, step_log_prob
from ersde_fast.backends import extension
from ersde_fast.graph import SamplingGraph
from ersde_fast.plan import _build_by_kernel
from ersde_fast.plan_file import KEY

SIGMAS = [9.0, 7.0, 5.0, 3.0, 1.0, 0.0]
STEPS = list(itertools.pairwise(SIGMAS))
EULER = [[t / s, 1 - t / s, 0.0] for s, t in STEPS]
ADAMS = [[t / s, 1.5 * (1 - t / s), 0.5 * (t / s - 1), 0.1 * t] for s, t in STEPS]  # Adams-Bashforth, with noise of its own
ADAMS[0] = [*EULER[0][:2], 0.0, 0.7]
FLOW = torch.linspace(1, 0, 6)
PLANS = {
    "by default": er_sde_plan(SIGMAS, sigma_data=0.5),
    "guidance": er_sde_plan(SIGMAS, guidance=5),
    "newton": er_sde_plan(SIGMAS, order=[1, 2, 3, 2, 1], method="newton", node_scale=4.0, noise_scaler="sde_2"),
    "taylor": er_sde_plan(SIGMAS, integration_points=100, s_noise=0.5, noise_scaler="ode"),
    "flow": er_sde_plan(FLOW, process="flow", eta=[0, 1, 0.5, 1, 0]),
    "vp": er_sde_plan(FLOW, process="vp", noise_scaler="reverse_time_sde(1e-05)"),
    "alphas": er_sde_plan([0.9, 0.5, 0.1], alphas=[0.1, 0.5, 1], order=2),
    "started in the middle": er_sde_plan(SIGMAS, eta=[1, 1, 0.3, 1, 0]).starting_at(2),
    "of a type": er_sde_plan(FLOW, process="vp", noise_scaler="ode").predicting("v"),
    "weights": Plan.from_weights(ADAMS, SIGMAS, sigma_data=0.6),
    "weights, alphas": Plan.from_weights(ADAMS, [0.9, 0.8, 0.7, 0.5, 0.3, 0], alphas=[0.1, 0.3, 0.5, 0.7, 0.9, 1]),
    "weights from the middle": Plan.from_weights(EULER, FLOW, process="flow").starting_at(2),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_file_holds_all_that_the_plan_is(name, tmp_path):
    plan, path = PLANS[name], tmp_path / "plan.safetensors"
    plan.save(path)
    again = Plan.load(str(path))
    for values in ("table", "sigmas", "alphas", "er_lambdas"):
        assert torch.equal(getattr(again, values), getattr(plan.predicting("sample"), values))
    options = {**vars(again.options), "noise_scaler": getattr(again.noise_scaler, "name", None)}
    assert options == {**vars(plan.options), "noise_scaler": getattr(plan.noise_scaler, "name", None)}
    assert again.draws == plan.draws and again.prediction_type == "sample"
    if plan.method is not None:
        assert torch.equal(again.starting_at(1).table, plan.starting_at(1).table)
    again.check()


def test_a_function_is_in_no_file_but_its_steps_are(tmp_path):
    path = tmp_path / "plan.safetensors"
    plan = er_sde_plan(SIGMAS, noise_scaler=lambda l: l**1.5)
    with pytest.raises(ValueError, match=r"noise_scaler <lambda> is a function.* save Plan\.from_weights\("):
        plan.save(path)
    assert not path.exists()
    Plan.from_weights(plan.weights, plan.sigmas, plan.alphas).save(path)
    assert torch.equal(Plan.load(path).table, plan.table)

    def sde_5(l):
        return l**1.5

    with pytest.raises(ValueError, match="noise_scaler sde_5 is a function"):
        er_sde_plan(SIGMAS, noise_scaler=sde_5).save(path)


@pytest.mark.skipif(extension._C is None, reason="the extension was not built")
def test_a_plan_of_a_device_with_a_step_that_cannot_be_is_not_saved(tmp_path):
    options = er_sde_plan([3.0, 2.0, 1.0], method="newton").options
    plan = _build_by_kernel(torch.tensor([2.0, 3.0, 1.0]), None, options)
    with pytest.raises(ValueError, match=r"has a step that cannot be: plan\.check\(\) says why"):
        plan.save(tmp_path / "plan.safetensors")


def test_without_safetensors(monkeypatch, tmp_path):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for action in (PLANS["newton"].save, Plan.load):
        with pytest.raises(ImportError, match=r"Plan\.(save|load) needs safetensors: pip install safetensors"):
            action(tmp_path / "plan.safetensors")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors is not there"):
        Plan.load(tmp_path / "absent.safetensors")
    with pytest.raises(OSError, match=r"could not write .*absent/plan\.safetensors"):
        PLANS["newton"].save(tmp_path / "absent" / "plan.safetensors")


def rewritten(path, change_said=None, change_tensors=None, metadata=None):
    """The file again, with something else in it."""
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[KEY])
    said.update(change_said or {})
    said = {name: value for name, value in said.items() if value != "removed"}
    tensors.update(change_tensors or {})
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, path, metadata={KEY: json.dumps(said)} if metadata is None else metadata)


DOUBLE = torch.arange(1.0, 7.0, dtype=torch.float64)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: path.write_bytes(b""), "is no file of a plan, or damaged"),
        (lambda path: path.write_bytes(b"\xff" * 64), "is no file of a plan, or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "is no file of a plan, or damaged"),
        (lambda path: torch.save(PLANS["newton"], path), "is no file of a plan, or damaged"),
        (lambda path: (path.unlink(), path.mkdir()), "is no file of a plan, or damaged"),
        (lambda path: rewritten(path, metadata={}), "its header says nothing of a plan"),
        (lambda path: rewritten(path, metadata={KEY: "{"}), "is no file of a plan, or damaged"),
        (lambda path: rewritten(path, metadata={KEY: "[1]"}), "its header must be of version 1"),
        (lambda path: rewritten(path, metadata={KEY: "[" * 100_000}), "is no file of a plan, or damaged"),
        (lambda path: rewritten(path, metadata={KEY: '{"version": ' + "9" * 5000 + "}"}), "is no file of a plan, or damaged"),
        (lambda path: rewritten(path, {"version": 2}), "its header must be of version 1: another ersde-fast wrote it"),
        (lambda path: rewritten(path, {"eta": "removed"}), "it must say process, orders,"),
        (lambda path: rewritten(path, {"__class__": "os.system"}), "it must say process, orders,"),
        (lambda path: rewritten(path, {"process": "edm"}), 'process must be "ve", "vp" or "flow", got \'edm\''),
        (lambda path: rewritten(path, {"process": ["ve"]}), 'process must be "ve", "vp" or "flow"'),
        (lambda path: rewritten(path, {"process": None}), r"it must hold alphas, sigmas, weights as torch\.float64"),
        (lambda path: rewritten(path, {"process": "flow"}), "sigmas must be at most 1"),
        (lambda path: rewritten(path, {"orders": [1, 2, 3]}), "order must be one number or 5"),
        (lambda path: rewritten(path, {"orders": [1, 2, 3, 2, 9]}), "order must be 1 to 5"),
        (lambda path: rewritten(path, {"orders": [1, 2, 2, 2, 1]}), "weights must have shape"),
        (lambda path: rewritten(path, {"orders": {"a": 1}}), "order must be a whole number or one for each step"),
        (lambda path: rewritten(path, {"noise_scaler": 5}), "noise_scaler must be a name, got 5"),
        (lambda path: rewritten(path, {"noise_scaler": "sde_9"}), "noise_scaler must be one of"),
        (lambda path: rewritten(path, {"noise_scaler": "sde_2"}), r"its noise_scaler must be 'reverse_time_sde\(0\.5\)'"),
        (lambda path: rewritten(path, {"noise_scaler": "reverse_time_sde(-)"}), "could not convert string to float"),
        (lambda path: rewritten(path, {"method": "euler"}), "method must be"),
        (lambda path: rewritten(path, {"method": "taylor"}), 'node_scale needs method="newton"'),
        (lambda path: rewritten(path, {"method": None}), "its method must be|its orders must be|its noise_scaler must be None"),
        (lambda path: rewritten(path, {"node_scale": "4"}), "node_scale must be a positive number or inf, got '4'"),
        (lambda path: rewritten(path, {"node_scale": 10**400}), "too large"),
        (lambda path: rewritten(path, {"integration_points": 5}), "integration_points needs"),
        (lambda path: rewritten(path, {"s_noise": math.nan}), "s_noise must be a finite number"),
        (lambda path: rewritten(path, {"eta": -1}), "eta must be a finite number of at least 0, got -1"),
        (lambda path: rewritten(path, {"eta": [1, 1]}), "eta must be one number or 5"),
        (lambda path: rewritten(path, {"sigma_data": 0}), "sigma_data must be above 0"),
        (lambda path: rewritten(path, {"eta": {}}), "eta must be a finite number"),
        (lambda path: rewritten(path, {"guidance": 3.0}), "its orders must be"),
        (lambda path: rewritten(path, {"first_step": -1}), "first_step must be a whole number"),
        (lambda path: rewritten(path, {"first_step": True}), "first_step must be a whole number"),
        (lambda path: rewritten(path, {"first_step": 2**70}), "first_step must be a whole number"),
        (lambda path: rewritten(path, {"eta": 0.5}), "its weights of step 0 are not those of what it says"),
        (lambda path: rewritten(path, None, {"weights": None}), "it must hold sigmas, weights"),
        (lambda path: rewritten(path, None, {"sigmas": DOUBLE.float()}), "it must hold sigmas, weights"),
        (lambda path: rewritten(path, None, {"table": DOUBLE}), "it must hold sigmas, weights"),
        (lambda path: rewritten(path, None, {"sigmas": DOUBLE}), "sigmas must not rise"),
        (lambda path: rewritten(path, None, {"sigmas": DOUBLE[None]}), "sigmas must be one-dimensional"),
        (lambda path: rewritten(path, None, {"sigmas": DOUBLE[:0]}), "sigmas must be one-dimensional with at least 2"),
        (lambda path: rewritten(path, None, {"weights": DOUBLE}), "weights must have shape"),
        (lambda path: rewritten(path, None, {"weights": torch.zeros(5, 10**4, dtype=torch.float64)}), "weights must have shape"),
        (lambda path: rewritten(path, None, {"weights": torch.zeros(5, 5, dtype=torch.float64)}), "its weights of step 0"),
        (lambda path: rewritten(path, None, {"weights": math.nan * torch.ones(5, 5).double()}), "weights must be finite"),
    ],
)  # fmt: skip
def test_files_that_are_hostile_are_named(change, message, tmp_path):
    path = tmp_path / "plan.safetensors"
    PLANS["newton"].save(path)
    change(path)
    with pytest.raises(ValueError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


# ---- weights of one's own ----


def test_weights_are_the_steps():
    """Euler's method is order 1 of the ODE; of Adams' the prediction, the noise and the density."""
    euler, ode = Plan.from_weights(EULER, SIGMAS), er_sde_plan(SIGMAS, order=1, noise_scaler="ode")
    torch.testing.assert_close(euler.weights, ode.weights, rtol=1e-14, atol=1e-15)
    assert euler.order == 1 and not euler.draws and euler.method is None
    plan = Plan.from_weights(torch.tensor(ADAMS), SIGMAS)
    x, output, older, noise = torch.randn(4, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result, denoised, density = fast_step(
        plan, 2, x, [output, older], noise=noise, prediction_type="epsilon", return_log_prob=True
    )
    w_x, w_0, w_1, w_noise = plan.weights[2].tolist()
    torch.testing.assert_close(denoised, x - SIGMAS[2] * output)
    torch.testing.assert_close(result, w_x * x + w_0 * denoised + w_1 * older + w_noise * noise)
    expected = torch.distributions.Normal(result - w_noise * noise, w_noise).log_prob(result).sum(1)
    torch.testing.assert_close(density, expected)
    torch.testing.assert_close(step_log_prob(plan, 2, x, [denoised, older], result), expected)


def test_weights_in_graphs_and_from_the_middle():
    plan, model = Plan.from_weights(ADAMS, SIGMAS), lambda x, sigma: 0.5 * x
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    graph = SamplingGraph(model, er_sde_plan(SIGMAS, order=2), x.shape, device="cpu")
    y, history = x, []
    for i in range(plan.num_steps):
        history = [model(y, None), *history[:1]]
        y = fast_step(plan, i, y, history, seed=3)
    assert torch.equal(graph(x, seed=3, plan=plan), y)
    rest = Plan.from_weights(EULER, SIGMAS).starting_at(2)
    assert rest.first_step == 2 and rest.weights.tolist() == torch.tensor(EULER[2:], dtype=torch.float64).tolist()
    with pytest.raises(ValueError, match=r"i must be a step from which on no older prediction is read, got 2: .* w_d\[1\] = "):
        plan.starting_at(2)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(weights=[1.0, 2.0]), ValueError, r"weights must have shape \[num_steps, order \+ 2\].*got \(2,\)"),
        (dict(weights=[[1.0, 2.0]] * 5), ValueError, r"weights must have shape .*got \(5, 2\)"),
        (dict(weights=[[1.0] * 8] * 5), ValueError, r"order 1 to 5.*got \(5, 8\)"),
        (dict(weights=EULER[:3]), ValueError, r"a row for each of the 5 steps between sigmas, got 3"),
        (dict(weights="euler"), TypeError, r"weights must be a list, array or tensor of real numbers"),
        (dict(weights=torch.ones(5, 3) * 1j), TypeError, r"weights must be .* real numbers"),
        (dict(weights=[*EULER[:4], [0, math.inf, 0]]), ValueError, r"weights must be finite, got \[0.0, inf, 0.0\] at step 4"),
        (dict(weights=[*EULER[:4], [0, 1, -0.1]]), ValueError, r"w_noise must be at least 0, got -0.1 at step 4"),
        (dict(weights=[[1, 0.5, 0.5, 0]] * 5), ValueError, r"before the first step, got w_d\[1\] = 0.5 at step 0"),
        (dict(sigmas=SIGMAS[::-1]), ValueError, r"sigmas must not rise"),
        (dict(process="flow"), ValueError, r"sigmas must be at most 1 for process \"flow\""),
        (dict(process="edm"), ValueError, r"process must be"),
        (dict(alphas=[1.0]), ValueError, r"alphas must be one-dimensional|alphas must have the length"),
    ],
)  # fmt: skip
def test_bad_weights(arguments, error, message):
    with pytest.raises(error, match=message):
        Plan.from_weights(**{"weights": EULER, "sigmas": SIGMAS, **arguments})
