"""Plans that are kept in a scheduler's config: the same run as in the plan's own variables, saved and loaded, or refused."""

import copy

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from ersde_fast import Plan, er_sde_plan  # noqa: E402
from ersde_fast.integrations.diffusers import ERSDEScheduler  # noqa: E402
from ersde_fast.sample import sample_plan  # noqa: E402

LEVELS = torch.tensor([14.0, 5.0, 2.0, 0.7, 0.1, 0.0], dtype=torch.float64)
STD = 0.5
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **BETAS).config
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
EDM = diffusers.EDMEulerScheduler().config


def denoised(y, er_lambda):
    return y * STD**2 / (STD**2 + er_lambda**2)


def of_process(process, levels=LEVELS, **options) -> Plan:
    sigmas = {"ve": levels, "vp": levels / (1 + levels**2).sqrt(), "flow": levels / (1 + levels)}[process]
    made = er_sde_plan(sigmas, process=process, noise_scaler="sde_3", **options)
    return Plan.from_weights(made.weights, sigmas, process=process)


def run(scheduler, x, output):
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        x = scheduler.step(output(scheduler, x, t), t, x).prev_sample
    return x


def epsilon(scheduler, x, t):
    level = scheduler._numbers[scheduler.timesteps.tolist().index(t)]
    alpha = (1 + level**2) ** -0.5
    return (x - alpha * denoised(x / alpha, level)) / (alpha * level)


def velocity(scheduler, x, t):
    sigma = scheduler._numbers[scheduler.timesteps.tolist().index(t)]
    return (x - denoised(x / (1 - sigma), sigma / (1 - sigma))) / sigma


@pytest.mark.parametrize("config", [SD, FLOW])
@pytest.mark.parametrize("process", ["ve", "vp", "flow"])
def test_it_is_the_plans_run_in_the_models_variables(config, process):
    start = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheduler = ERSDEScheduler.from_plan(of_process(process), config, seed=4)
    y = sample_plan(of_process("ve"), lambda y, sigma: denoised(y, sigma[0].double()), 14 * start, disable=True, source=SEED)
    if config is SD:
        got = run(scheduler, start * (1 + 14**-2) ** -0.5, epsilon)
    else:
        got = run(scheduler, start * 14 / 15, velocity)
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-6)


class SEED:
    """The seed of the schedulers above, as a run takes it."""

    @staticmethod
    def of_step(plan, i, *told):
        return {"seed": 4}


def test_the_times_are_the_models():
    scheduler = ERSDEScheduler.from_plan(of_process("ve"), SD)
    scheduler.set_timesteps(5)
    spaced = ERSDEScheduler.from_config(SD, use_karras_sigmas=False)
    spaced.set_timesteps(sigmas=LEVELS.tolist())
    assert torch.equal(scheduler.timesteps, spaced.timesteps)
    torch.testing.assert_close(scheduler.sigmas, LEVELS.float())
    flow = ERSDEScheduler.from_plan(er_sde_plan([1.0, 0.9, 0.5, 0.0], process="flow"), FLOW)
    flow.set_timesteps(3)
    assert flow.timesteps.tolist() == [1000, 900, 500] and flow.sigmas[0] == 1


def test_it_is_saved_with_the_pipeline(tmp_path):
    plan, path = of_process("vp"), tmp_path / "plan.safetensors"
    plan.save(path)
    ours = ERSDEScheduler.from_plan(path, SD)
    assert ours.config.plan_file == str(path)
    path.unlink()
    ours.save_pretrained(tmp_path)
    for again in (ERSDEScheduler.from_pretrained(tmp_path), ERSDEScheduler.from_config(ours.config), copy.deepcopy(ours)):
        for one in (ours, again):
            one.set_timesteps(5)
        assert torch.equal(again._plan.table, ours._plan.table) and again.config.plan == ours.config.plan


def test_the_file_is_a_key_of_the_config(tmp_path):
    path = tmp_path / "plan.safetensors"
    of_process("ve").save(path)
    by_key, by_method = ERSDEScheduler(plan_file=str(path), **BETAS), ERSDEScheduler.from_plan(path, **BETAS)
    for one in (by_key, by_method):
        one.set_timesteps(5)
    assert torch.equal(by_key._plan.table, by_method._plan.table)
    other = tmp_path / "other.safetensors"
    of_process("ve", LEVELS[1:]).save(other)
    changed = ERSDEScheduler.from_config(by_key.config, plan_file=str(other))
    changed.set_timesteps(4)
    assert len(changed.timesteps) == 4 and changed.config.plan_file == str(other)
    without = ERSDEScheduler.from_config(by_key.config, plan_file=None)
    without.set_timesteps(7)
    assert without.config.plan is None


def test_even_sigmas_of_pipelines_of_flows_are_none():
    scheduler = ERSDEScheduler.from_plan(of_process("flow"), FLOW)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 5, 5).tolist(), mu=0.5)
    torch.testing.assert_close(scheduler.sigmas, (LEVELS / (1 + LEVELS)).float())


@pytest.mark.parametrize(
    ("message", "keys"),
    [
        ("num_inference_steps must be 5", {"num_inference_steps": 6}),
        ("num_inference_steps must be 5", {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
        ("sigmas must be left out", {"sigmas": [0.9, 0.7, 0.5, 0.3, 0.1]}),
        ("timesteps must be left out", {"timesteps": [900, 500, 300, 100, 10]}),
    ],
)
def test_runs_that_are_not_the_plans(message, keys):
    with pytest.raises(ValueError, match=message):
        ERSDEScheduler.from_plan(of_process("flow"), FLOW).set_timesteps(**keys)


SAID = {
    "solver_order": 2, "noise_scaler": "ode", "method": "taylor", "node_scale": 3.0, "integration_points": 200, "s_noise": 0.9,
    "eta": 0.5, "eta_window": [0, 0.5], "guidance_scale": 5.0, "lower_order_final": True, "use_karras_sigmas": True,
}  # fmt: skip


@pytest.mark.parametrize("key", SAID)
def test_what_the_plan_says_is_not_said_beside_it(key):
    with pytest.raises(ValueError, match=f"{key}=.* is what the config's plan says already"):
        ERSDEScheduler.from_plan(of_process("ve"), SD, **{key: SAID[key]})


def test_what_else_is_refused():
    plan = of_process("ve")
    with pytest.raises(ValueError, match="plan goes from sigma / alpha 80"):
        ERSDEScheduler.from_plan(of_process("ve", LEVELS * 80 / 14), SD)
    with pytest.raises(TypeError, match="plan must be a Plan or the path"):
        ERSDEScheduler.from_plan(plan.weights)
    with pytest.raises(TypeError, match=r"plan must be as ERSDEScheduler\.from_plan"):
        ERSDEScheduler(plan={"weights": []})
    with pytest.raises(FileNotFoundError):
        ERSDEScheduler(plan_file="missing.safetensors")
    scheduler = ERSDEScheduler.from_plan(plan, SD)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="begin_index must be 0 with a plan"):
        scheduler.set_begin_index(2)
    scheduler.set_begin_index(0)
    scheduler.sigmas[2] *= 1.1
    with pytest.raises(ValueError, match="sigmas must be the plan's"):
        scheduler.step(torch.zeros(1, 4), scheduler.timesteps[0], torch.zeros(1, 4))


def test_a_network_inside_edms_preconditioning():
    scheduler = ERSDEScheduler.from_plan(of_process("ve"), EDM)
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.timesteps, LEVELS[:-1].log().float() / 4)
