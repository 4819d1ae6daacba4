"""The scheduler of diffusers: its schedules beside diffusers' own, its steps beside the loop, and real pipelines."""

import copy
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch.profiler import ProfilerActivity, profile

from ersde_fast import er_sde_plan, fast_step, portable_noise
from ersde_fast.integrations.diffusers import ERSDEScheduler

FLOW = {"prediction_type": "flow_prediction"}
SHAPE = (2, 4, 8, 8)


def noise(*shape, seed=0):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def run(scheduler, num_steps=10, x=None, model=lambda x, t: 0.1 * x, **kwargs):
    scheduler.set_timesteps(num_steps)
    x = noise() if x is None else x
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **kwargs).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [1, 7, 20])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"trained_betas": [0.01] * 500, "num_train_timesteps": 500},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_lu_lambdas": True},
        {"use_beta_sigmas": True},
        {"use_flow_sigmas": True, "flow_shift": 3.0, **FLOW},
    ],
    ids=lambda config: ",".join(map(str, config)) or "default",
)
def test_schedule_is_that_of_dpm_solver(config, num_steps):
    """Levels to float32's rounding; timesteps alike, where DPM-Solver does not round them."""
    theirs = DPMSolverMultistepScheduler(**config)
    ours = ERSDEScheduler.from_config(theirs.config)
    theirs.set_timesteps(num_steps)
    ours.set_timesteps(num_steps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-6, atol=0)
    rounded = ours.timesteps.dtype == torch.float32
    assert (ours.timesteps - theirs.timesteps).abs().max() <= (1 if rounded else 0)
    assert len(ours.timesteps) == ours.num_inference_steps == num_steps and len(ours.sigmas) == num_steps + 1


@pytest.mark.parametrize("sigmas", [None, [1.0, 0.7, 0.4, 0.1]])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02},
        {"shift": 3.0, "use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    ],
    ids=lambda config: ",".join(map(str, config)) or "default",
)
def test_schedule_is_that_of_flow_matching(config, sigmas):
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    ours = ERSDEScheduler.from_config(theirs.config)
    assert ours.config.prediction_type == "flow_prediction"
    given = copy.copy(sigmas)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(None if sigmas else 4, sigmas=sigmas, mu=0.8 if config.get("use_dynamic_shifting") else None)
    assert sigmas == given
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-4)
    assert run(ours, num_steps=4).isfinite().all() if not config.get("use_dynamic_shifting") else True


SCHEDULERS = [
    "DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep",
    "DPMSolverSinglestep", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep", "UniPCMultistep", "DPMSolverSDE", "EDMEuler",
    "SASolver", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete",
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_takes_the_place_of(name, tmp_path):
    """From the config of any of them, saved and loaded, at any number of steps; and back."""
    theirs = getattr(diffusers, f"{name}Scheduler")
    theirs().save_pretrained(tmp_path / "theirs")
    ours = ERSDEScheduler.from_pretrained(tmp_path / "theirs", seed=1)
    ours.save_pretrained(tmp_path / "ours")
    again = ERSDEScheduler.from_pretrained(tmp_path / "ours")
    for num_steps in (1, 2, 10, 1000):
        assert torch.equal(run(ours, num_steps), run(again, num_steps)) and run(ours, num_steps).isfinite().all()
    theirs.from_config(ours.config)


TYPES = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow_prediction": "flow"}


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("order, method, node_scale", [(1, "taylor", None), (3, "taylor", None), (4, "newton", 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_the_loop_of_steps(prediction_type, order, method, node_scale, dtype):
    keys = {
        "solver_order": order,
        "method": method,
        "node_scale": node_scale,
        "s_noise": 0.9,
        "noise_scaler": "sde_2",
        "eta": 0.5,
    }
    scheduler = ERSDEScheduler(prediction_type=prediction_type, seed=[3, 4], **keys)
    scheduler.set_timesteps(6)
    levels = scheduler._levels
    flow = prediction_type == "flow_prediction"
    alphas = 1 - levels if flow else torch.rsqrt(1 + levels**2)
    plan = er_sde_plan(
        levels if flow else levels * alphas, alphas, order=order, method=method, node_scale=node_scale or math.inf, s_noise=0.9,
        noise_scaler="sde_2", eta=0.5,
    )  # fmt: skip
    x = y = noise().to(dtype)
    history = []
    for i, t in enumerate(scheduler.timesteps):
        out = scheduler.step(0.3 * x, t, x)
        y, denoised = fast_step(plan, i, y, [0.3 * y, *history], prediction_type=TYPES[prediction_type], seed=[3, 4])
        history = [denoised, *history]
        x = out.prev_sample
        assert x.dtype == dtype and torch.equal(x, y) and torch.equal(out.pred_original_sample, denoised)
        assert scheduler.step_index == i + 1
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, t, x)


def test_noise_sources():
    """A generator draws torch's stream, one for each sample theirs; the noise itself is taken; else the config's seed."""
    x = noise()

    def first_step(scheduler=None, **kwargs):
        scheduler = scheduler or ERSDEScheduler()
        scheduler.set_timesteps(5)
        return scheduler.step(0.1 * x, scheduler.timesteps[0], x, **kwargs).prev_sample

    def generator(seed):
        return torch.Generator().manual_seed(seed)

    expected = first_step(variance_noise=noise(seed=3))
    assert torch.equal(first_step(generator=generator(3)), expected)
    each = torch.cat([noise(1, *SHAPE[1:], seed=s) for s in (3, 4)])
    assert torch.equal(first_step(generator=[generator(3), generator(4)]), first_step(variance_noise=each))
    seeded = ERSDEScheduler(seed=5)
    assert torch.equal(first_step(seeded), first_step(variance_noise=portable_noise(SHAPE, 5, step=0)))
    assert torch.equal(first_step(seeded, generator=generator(3)), expected)
    torch.manual_seed(3)
    assert torch.equal(first_step(), expected)
    state = torch.get_rng_state()
    first_step(ERSDEScheduler(noise_scaler="ode"))
    assert torch.equal(torch.get_rng_state(), state)


VP = [
    {},
    {"beta_schedule": "scaled_linear", "use_karras_sigmas": True},
    {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"use_exponential_sigmas": True},
]


@pytest.mark.parametrize("scaler", ["sde_5", "ode"])
@pytest.mark.parametrize("config", [*VP, FLOW, {"shift": 3.0, **FLOW}, {"use_karras_sigmas": True, **FLOW}])
def test_noise_level_is_right_at_every_step(config, scaler):
    """With the exact model of N(0, 0.5^2) the standard deviation of x follows the schedule's marginal: 1 % covers five standard
    errors of 2^17 values and the error of 100 steps."""
    std, flow = 0.5, config.get("prediction_type") == "flow_prediction"
    scheduler = ERSDEScheduler(**{"prediction_type": "v_prediction", **config}, seed=1, noise_scaler=scaler)
    scheduler.set_timesteps(100)

    def model(x, i):
        l = scheduler._levels[i]
        alpha, sigma = (1 - l, l) if flow else (torch.rsqrt(1 + l**2), l * torch.rsqrt(1 + l**2))
        variance = alpha**2 * std**2 + sigma**2
        denoised, epsilon = alpha * std**2 / variance * x, sigma / variance * x
        return epsilon - denoised if flow else alpha * epsilon - sigma * denoised

    x = portable_noise((2, 2**16), 7, step=-1)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, i).float(), t, x).prev_sample
        alpha, sigma = scheduler._alphas_sigmas(scheduler._levels[i + 1])
        assert x.std().item() == pytest.approx(math.hypot(alpha * std, sigma), rel=1e-2), i


def test_start_in_the_middle():
    """Image-to-image: the steps from begin_index on, without history, with the noise that those steps have in a whole run."""
    scheduler = ERSDEScheduler(seed=9)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    clean, start = noise(seed=1), noise(seed=2)
    x = scheduler.add_noise(clean, start, scheduler.timesteps[4].repeat(2))
    alpha, sigma = scheduler._alphas_sigmas(scheduler._levels[4])
    torch.testing.assert_close(x, alpha.float() * clean + sigma.float() * start)
    y, history, plan = x, [], scheduler._plan.starting_at(4)
    for i, t in enumerate(scheduler.timesteps[4:]):
        x = scheduler.step(0.1 * x, t, x).prev_sample
        y, denoised = fast_step(plan, i, y, [0.1 * y, *history], prediction_type="epsilon", seed=9)
        history = [denoised, *history]
        if i < 5:  # inpainting puts the known part back at the level that the run has reached
            known = scheduler.add_noise(clean, start, scheduler.timesteps[5 + i].reshape(1))
            alpha, sigma = scheduler._alphas_sigmas(scheduler._levels[5 + i])
            torch.testing.assert_close(known, alpha.float() * clean + sigma.float() * start)
    assert torch.equal(x, y)


def test_start_is_found_by_the_timestep():
    """Without begin_index a run begins at the timestep it is given; a view into the schedule tells twins apart."""
    scheduler = ERSDEScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 500, 100])
    assert scheduler.index_for_timestep(500) == 2 and scheduler.step_index is None
    for t, expected in [(900, 0), (torch.tensor(500), 2), (scheduler.timesteps[1], 1), (scheduler.timesteps[1:][2], 3)]:
        scheduler.set_timesteps(timesteps=[900, 500, 500, 100])
        t = scheduler.timesteps[expected] if isinstance(t, torch.Tensor) and expected != 2 else t
        scheduler.step(noise(), t, noise())
        assert scheduler.step_index == expected + 1


@pytest.mark.parametrize("config", [{}, {"beta_schedule": "scaled_linear", "use_karras_sigmas": True}])
@pytest.mark.parametrize("steps", [None, 20])
def test_training_timesteps_have_their_own_level(config, steps):
    """Any of the training schedule, before a run is planned and after, is alphas_cumprod[t], as DDPM's scheduler has it."""
    ours, theirs = ERSDEScheduler(**config), DDPMScheduler(beta_schedule=config.get("beta_schedule", "linear"))
    if steps:
        ours.set_timesteps(steps)
    t = torch.tensor([0, 10, 11, 499, 731, 998, 999])
    clean, epsilon = noise(7, 4, 8, 8, seed=1), noise(7, 4, 8, 8, seed=2)
    torch.testing.assert_close(ours.add_noise(clean, epsilon, t), theirs.add_noise(clean, epsilon, t))
    torch.testing.assert_close(ours.get_velocity(clean, epsilon, t), theirs.get_velocity(clean, epsilon, t))
    for wrong in ([-1], [1000], [float("nan")]):
        with pytest.raises(ValueError, match="timesteps must lie from 0 to 999"):
            ours.add_noise(clean[:1], epsilon[:1], torch.tensor(wrong))


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"use_flow_sigmas": True, "flow_shift": 5.0}, {"invert_sigmas": True}])
@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_training_timesteps_of_flows_have_their_own_level(config, steps, dtype):
    ours = ERSDEScheduler(**FLOW, **config)
    if steps:
        ours.set_timesteps(steps)
    t = torch.tensor([1000.0, 731.0, 12.0, 3.0]).to(dtype)
    clean, epsilon = noise(4, 4, 8, 8, seed=1), noise(4, 4, 8, 8, seed=2)
    sigma = (1 - t.float() / 1000 if config.get("invert_sigmas") else t.float() / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(ours.scale_noise(clean, t, epsilon), (1 - sigma) * clean + sigma * epsilon)
    with pytest.raises(ValueError, match="timesteps must lie from 0 to 1000"):
        ours.scale_noise(clean[:1], torch.tensor([1001.0]), epsilon[:1])


@pytest.mark.parametrize(
    "config", [{}, {"use_karras_sigmas": True}, FLOW, {"use_flow_sigmas": True, "flow_shift": 3.0, **FLOW}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, None])
def test_timesteps_are_found_in_any_dtype(config, dtype):
    """A rounding of the schedule's own timestep is that one; None passes a Python number."""
    ours, expected = ERSDEScheduler(seed=1, **config), run(ERSDEScheduler(seed=1, **config))
    ours.set_timesteps(10)
    x = noise()
    for i, t in enumerate(ours.timesteps):
        t = t.item() if dtype is None else t.to(dtype)
        assert ours.index_for_timestep(t) == i
        x = ours.step(0.1 * x, t, x).prev_sample
    assert torch.equal(x, expected)


@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}, FLOW])
def test_timesteps_that_are_not_the_next_are_refused(config):
    """The index of a loop, a timestep of another run, an earlier or later step: by number or by address, and nothing is drawn."""
    ours, other, x = ERSDEScheduler(**config), ERSDEScheduler(**config), noise()
    ours.set_timesteps(10)
    other.set_timesteps(7)
    state = torch.get_rng_state()
    for wrong in (0, 1, torch.tensor(1), other.timesteps[1], ours.timesteps[3].item() + 0.4):
        with pytest.raises(ValueError, match=r"is not in the schedule of 10 steps|which are not whole here"):
            ours.step(x, wrong, x)
    with pytest.raises(ValueError, match="timestep must be one number"):
        ours.step(x, ours.timesteps[:2], x)
    with pytest.raises(TypeError, match="timestep must be a number"):
        ours.step(x, "first", x)
    assert torch.equal(torch.get_rng_state(), state) and ours.step_index is None
    for t in ours.timesteps[:4]:
        ours.step(x, t, x)
    for place in (0, 3, 5, 9):
        for t in (ours.timesteps[place], ours.timesteps[place].item(), ours.timesteps[place].clone()):
            with pytest.raises(ValueError, match=f"belongs to step {place}, but step 4 comes next"):
                ours.step(x, t, x)
    ours.step(x, ours.timesteps[4], x)
    assert ours.step_index == 5


def test_two_loops_that_share_a_scheduler_get_an_error():
    ours, a, b = ERSDEScheduler(seed=1), noise(seed=1), noise(seed=2)
    ours.set_timesteps(5)
    a = ours.step(0.1 * a, ours.timesteps[0], a).prev_sample
    with pytest.raises(ValueError, match="a scheduler of its own"):
        ours.step(0.1 * b, ours.timesteps[0], b)


def test_a_step_that_the_caller_sets_back_is_made_again():
    """Cosmos Predict's pipelines make a step twice: to convert the outputs with and without the prompt in one batch, then to move on."""
    ours, expected = ERSDEScheduler(seed=1, noise_scaler="ode"), ERSDEScheduler(seed=1, noise_scaler="ode")
    for scheduler in (ours, expected):
        scheduler.set_timesteps(6)
    x = y = noise()
    for t in ours.timesteps:
        both = ours.step(torch.cat([0.1 * x, 0.3 * x]), t, torch.cat([x, x]), return_dict=False)[1]
        ours._step_index -= 1
        prediction = both[:2] + 2.0 * (both[:2] - both[2:])
        x = ours.step(prediction, t, x, pred_original_sample=prediction).prev_sample
        y = expected.step(0.1 * y - 0.4 * y, t, y).prev_sample  # guidance is linear in the output
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_step_that_the_caller_sets_forward_begins_anew():
    ours, fresh, x = ERSDEScheduler(seed=1), ERSDEScheduler(seed=1), noise()
    for scheduler in (ours, fresh):
        scheduler.set_timesteps(8)
    for t in ours.timesteps[:3]:
        ours.step(0.1 * x, t, x)
    ours._step_index = 5
    fresh.set_begin_index(5)
    assert torch.equal(ours.step(0.1 * x, ours.timesteps[5], x)[0], fresh.step(0.1 * x, fresh.timesteps[5], x)[0])


def test_levels_that_a_pipeline_writes_are_the_runs():
    """Cosmos Predict2 runs a variance exploding process as a flow with levels to 80, writes its ends into the config, and the last level."""
    ours = ERSDEScheduler.from_config(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).config, noise_scaler="ode")
    ours.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    ours.set_timesteps(sigmas=torch.linspace(0, 1, 100, dtype=torch.float64))
    theirs = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    theirs.register_to_config(sigma_max=80.0, sigma_min=0.002)
    theirs.set_timesteps(sigmas=np.linspace(0, 1, 100))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    ours.sigmas[-1] = ours.sigmas[-2]
    mean, std, x = 3.0, 0.5, 3.0 + 80.0 * noise(2, 2**14, seed=3)
    for i, t in enumerate(ours.timesteps):
        sigma = ours.sigmas[i].item()
        denoised = mean + std**2 / (std**2 + sigma**2) * (x - mean)
        x = ours.step((x - denoised) / sigma, t, x).prev_sample
        assert x.std().item() == pytest.approx(math.hypot(std, ours.sigmas[i + 1]), rel=0.02)
    assert x.mean().item() == pytest.approx(mean, rel=0.02)
    ours.set_timesteps(5)
    ours.sigmas = ours.sigmas[:3]
    with pytest.raises(ValueError, match="sigmas must stay a tensor of 6 levels"):
        ours.step(x, ours.timesteps[0], x)


def test_tokens_that_are_held():
    """LTX's conditions: tokens at the step's timestep are stepped, the others stay; the output is the negative velocity."""
    ours, plain = ERSDEScheduler(seed=1, **FLOW), ERSDEScheduler(seed=1, **FLOW)
    x, held = noise(2, 6, 3), torch.tensor([[1.0, 1.0, 0, 0, 0, 0]] * 2)
    for scheduler in (ours, plain):
        scheduler.set_timesteps(5)
    y = start = x
    for t in ours.timesteps:
        per_token = torch.min(t.expand(2, 6), (1 - held) * 1000)
        x = ours.step(-0.1 * x, t, x, per_token_timesteps=per_token, return_dict=False)[0]
        y = plain.step(0.1 * y, t, y).prev_sample
    assert torch.equal(x[:, :2], start[:, :2])
    torch.testing.assert_close(x[:, 2:], y[:, 2:], rtol=1e-5, atol=1e-5)
    vp = ERSDEScheduler()
    vp.set_timesteps(5)
    with pytest.raises(ValueError, match="per_token_timesteps needs a flow"):
        vp.step(x, vp.timesteps[0], x, per_token_timesteps=per_token)


def test_copies_for_each_frame():
    """Diffusion forcing (SkyReels-V2): a copy for each frame, at steps of their own; without a seed each frame has its own noise."""
    ours = ERSDEScheduler(use_flow_sigmas=True, flow_shift=5.0, **FLOW)
    ours.set_timesteps(6)
    x = noise(1, 4, 3, 8, 8)
    frames = [copy.deepcopy(ours) for _ in range(3)]
    for frame in frames:
        frame.set_timesteps(6)
    steps = ours.timesteps.long()
    torch.manual_seed(0)
    for at in range(6 + 2):
        for f, frame in enumerate(frames):  # each frame starts a step behind the one before
            if 0 <= at - f < 6:
                x[:, :, f] = frame.step(0.1 * x[:, :, f], steps[at - f], x[:, :, f], return_dict=False)[0]
    assert [frame.step_index for frame in frames] == [6, 6, 6] and x.isfinite().all()


def test_copies_that_draw_the_same_noise_say_so():
    """In one run of several copies; not in runs one after the other, nor across processes."""
    ours, x = ERSDEScheduler(seed=1, **FLOW), noise()
    expected = run(ours)
    copied, loaded = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(copied), expected) and torch.equal(run(loaded), expected) and torch.equal(run(ours), expected)
        for scheduler in (ours, copied):
            scheduler.set_timesteps(6)
        copied.step(x, copied.timesteps[0], x)
    with pytest.warns(UserWarning, match="copies of an ERSDEScheduler draw the same noise"):
        ours.step(x, ours.timesteps[0], x)


def test_schedulers_in_threads():
    """One for each thread gives what one after the other gives."""

    def job(seed):
        return run(ERSDEScheduler(seed=seed, use_karras_sigmas=True))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(job, range(8)))
    assert all(torch.equal(result, job(seed)) for seed, result in enumerate(results))


@pytest.mark.parametrize("config", [{}, FLOW])
def test_a_compiled_step(config):
    """In one graph, with a begin index, whatever the number of steps."""
    ours, plain, x = ERSDEScheduler(seed=1, **config), ERSDEScheduler(seed=1, **config), noise()
    torch._dynamo.reset()
    step = torch.compile(
        lambda output, t, x: ours.step(output, t, x, return_dict=False)[0], fullgraph=True, backend="aot_eager"
    )
    for scheduler in (ours, plain):
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(0)
    y = x
    for t in ours.timesteps:
        x, y = step(0.1 * x, t, x), plain.step(0.1 * y, t, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert ours.step_index == 20


def test_sigmas_and_timesteps_in_bfloat16():
    ours = ERSDEScheduler(**FLOW)
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.bfloat16)
    ours.set_timesteps(sigmas=levels)
    assert ours.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    ours.set_timesteps(timesteps=(1000 * levels).to(torch.bfloat16))
    assert ours.timesteps.tolist() == [1000, 752, 500, 250]
    with pytest.raises(TypeError, match="sigmas must be numbers"):
        ours.set_timesteps(sigmas=[["1.0"]])


def test_a_run_that_is_over_is_no_run():
    """Training after a validation run: each timestep has its own level again."""
    ours = ERSDEScheduler(noise_scaler="ode")
    ours.set_timesteps(4)
    ours.set_begin_index(0)
    x, t = noise(), torch.tensor([500, 10])
    for step in ours.timesteps:
        ours.step(x, step, x)
    expected = ERSDEScheduler().add_noise(x, noise(seed=1), t)
    assert torch.equal(ours.add_noise(x, noise(seed=1), t), expected)


def test_nothing_is_drawn_before_an_error():
    ours, x = ERSDEScheduler(), noise()
    ours.set_timesteps(5)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    states = [g.get_state() for g in generators]
    for wrong, given, error, message in [
        ({"generator": generators}, x[:1], ValueError, r"history\[0\] must have the shape"),
        ({"generator": [*generators, generators[0]]}, x, ValueError, "one for each sample of the batch, got 3"),
        ({"generator": [generators[0], 0]}, x, TypeError, "generator must be a torch.Generator"),
        ({"generator": 0}, x, TypeError, "generator must be a torch.Generator"),
        ({"generator": generators[0], "variance_noise": x}, x, ValueError, "name one source"),
    ]:
        with pytest.raises(error, match=message):
            ours.step(given, ours.timesteps[0], x, **wrong)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))
    assert ours.step_index is None


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s.set_timesteps(5.0), ValueError, "num_inference_steps must be a whole number"),
        (lambda s: s.set_timesteps(True), ValueError, "num_inference_steps must be a whole number"),
        (lambda s: s.set_timesteps(4, device="nowhere"), RuntimeError, "nowhere"),
        (lambda s: s.set_timesteps(sigmas=[]), ValueError, "sigmas must hold at least one"),
        (lambda s: s.set_timesteps(sigmas=[[1.0]]), TypeError, "sigmas must be numbers"),
        (lambda s: s.set_begin_index(-1), ValueError, "begin_index must be a whole number from 0 to 5"),
        (lambda s: s.set_begin_index(6), ValueError, "begin_index must be a whole number from 0 to 5"),
        (lambda s: s.add_noise(noise().to(torch.uint8), noise(), torch.tensor([1, 2])), TypeError, "samples must be of a float"),
        (lambda s: s.step(noise(), 1000, noise()), ValueError, "is not in the schedule"),
    ],
)  # fmt: skip
def test_bad_calls_leave_the_run_as_it_was(call, error, message):
    ours = ERSDEScheduler()
    ours.set_timesteps(5)
    before = dict(vars(ours))
    with pytest.raises(error, match=message):
        call(ours)
    assert all(value is before[key] for key, value in vars(ours).items())


@pytest.mark.parametrize("key, value", [("timestep_spacing", "even"), ("prediction_type", "eps"), ("final_sigmas_type", "one")])
def test_a_config_that_is_written_later_is_checked(key, value):
    ours = ERSDEScheduler()
    ours.register_to_config(**{key: value})
    with pytest.raises(ValueError, match=f"{key} must be one of"):
        ours.set_timesteps(4)


def test_a_training_schedule_that_is_written_later_is_taken():
    ours = ERSDEScheduler()
    ours.register_to_config(beta_schedule="scaled_linear")
    ours.set_timesteps(4)
    assert torch.equal(ours.alphas_cumprod, ERSDEScheduler(beta_schedule="scaled_linear").alphas_cumprod)


@pytest.mark.parametrize("schedule", ["linear", "sigmoid", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_zero_terminal_snr_at_any_number_of_steps(schedule, spacing):
    ours = ERSDEScheduler(rescale_betas_zero_snr=True, beta_schedule=schedule, timestep_spacing=spacing)
    for steps in (1, 10, 500, 999, 1000, 1500):
        ours.set_timesteps(steps)
        assert (ours.sigmas.diff() <= 0).all()


def test_levels_of_ones_own():
    """A 0 that the caller writes stays; one between 1 and 2 is no level of a flow; held at 1 where rounding put it above."""
    ours = ERSDEScheduler(final_sigmas_type="sigma_min")
    ours.set_timesteps(sigmas=[5.0, 1.0, 0.0])
    assert ours.sigmas.tolist() == [5.0, 1.0, 0.0]
    ours.set_timesteps(sigmas=[5.0, 1.0])
    assert ours.sigmas[-1] > 0
    flow = ERSDEScheduler(**FLOW)
    flow.set_timesteps(sigmas=torch.tensor([1.0000001, 0.5]))
    assert flow._plan.alphas.tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"sigmas must be at most 1 for a flow, got 1\.5"):
        flow.set_timesteps(sigmas=[1.5, 0.5])
    ltx = ERSDEScheduler.from_config(diffusers.LTXEulerAncestralRFScheduler().config)
    with pytest.raises(ValueError, match="counts the last 0 as a timestep"):
        ltx.set_timesteps(sigmas=[1.0, 0.5, 0.0])


def test_noise_of_a_process_that_explodes():
    """Cosmos Predict2's levels: the noise that is added is that of the run."""
    ours = ERSDEScheduler(use_karras_sigmas=True, sigma_max=80.0, sigma_min=0.002, **FLOW)
    ours.set_timesteps(8)
    ours.set_begin_index(6)
    x = noise()
    torch.testing.assert_close(ours.add_noise(x, 0 * x, ours.timesteps[6:7]), x)


@pytest.mark.parametrize("config", [{"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "CosineDPMSolverMultistepScheduler"])
def test_edm_networks(name, config):
    """With the exact network of N(0, 0.5^2) inside EDM's preconditioning, x keeps the level of its noise."""
    ours = ERSDEScheduler.from_config(
        getattr(diffusers, name)(sigma_min=0.01, sigma_max=40.0, sigma_data=0.5, **config).config, seed=1
    )
    ours.set_timesteps(100)
    x = ours.init_noise_sigma * portable_noise((2, 2**14), 7, step=-1)
    for i, t in enumerate(ours.timesteps):
        sigma = ours.sigmas[i].item()
        scaled = ours.scale_model_input(x, t)
        torch.testing.assert_close(scaled, x / math.hypot(sigma, 0.5))
        assert t.item() == pytest.approx(math.log(sigma) / 4 if "Euler" in name else math.atan(sigma) / math.pi * 2, rel=1e-5)
        # denoised = c_skip x + c_out F, and that of N(0, sigma_data^2) is c_skip x
        x = ours.step(torch.zeros_like(x), t, x).prev_sample
        assert x.std().item() == pytest.approx(math.hypot(0.5, ours.sigmas[i + 1]), rel=0.02), i
    with pytest.raises(ValueError, match="prediction_type must be"):
        ERSDEScheduler.from_config({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"})


def test_thresholding_of_large_samples():
    """Beyond the 2^24 elements that torch.quantile takes."""
    ours = ERSDEScheduler(thresholding=True, sample_max_value=2.0, prediction_type="sample", noise_scaler="ode")
    ours.set_timesteps(2)
    x = 3 * noise(1, 2**24 + 2)
    denoised = ours.step(x, ours.timesteps[0], x).pred_original_sample
    size = x.abs().sort().values[0, int(0.995 * (2**24 + 1))].clamp(1, 2)
    torch.testing.assert_close(denoised, x.clamp(-size, size) / size)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_thresholding(prediction_type):
    keys = {
        "prediction_type": prediction_type,
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 2.0,
    }
    ours, theirs = ERSDEScheduler(**keys), DPMSolverMultistepScheduler(**keys)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    x, output = noise(seed=3), noise(seed=4)
    denoised = ours.step(output, ours.timesteps[0], x).pred_original_sample
    theirs._init_step_index(theirs.timesteps[0])
    torch.testing.assert_close(denoised, theirs.convert_model_output(output, sample=x), rtol=1e-4, atol=1e-5)
    assert denoised.abs().max() <= 1


def test_learned_variance_is_left_unread():
    ours = ERSDEScheduler(variance_type="learned_range", seed=1)
    expected = run(ERSDEScheduler(seed=1))
    got = run(ours, model=lambda x, t: torch.cat([0.1 * x, torch.full_like(x, math.nan)], dim=1))
    assert torch.equal(got, expected)


def test_custom_levels():
    scheduler = ERSDEScheduler()
    for sigmas in ([10.0, 3.0, 0.5], np.array([10.0, 3.0, 0.5, 0.0]), torch.tensor([10.0, 3.0, 0.5])):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.sigmas.tolist() == [10.0, 3.0, 0.5, 0.0] and len(scheduler.timesteps) == 3
    own = ERSDEScheduler()
    own.set_timesteps(12)
    scheduler.set_timesteps(timesteps=own.timesteps)
    assert torch.equal(scheduler.sigmas, own.sigmas) and torch.equal(scheduler.timesteps, own.timesteps)


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        ({}, {}, "num_inference_steps, timesteps or sigmas"),
        ({}, {"num_inference_steps": 3, "timesteps": [9, 5, 1]}, "not both"),
        ({}, {"num_inference_steps": 0}, "at least 1, got 0"),
        ({}, {"num_inference_steps": 2, "sigmas": [3.0, 2.0, 1.0]}, "sigmas must hold 2 levels"),
        ({}, {"timesteps": [9, 5], "sigmas": [3.0, 2.0, 1.0]}, "one length, got 3 and 2"),
        ({}, {"timesteps": [1, 5]}, "er_lambda"),
        ({"use_karras_sigmas": True}, {"timesteps": [9, 5, 1]}, "without Karras"),
        ({"use_dynamic_shifting": True, **FLOW}, {"num_inference_steps": 3}, "mu is needed"),
        ({"noise_scaler": "sde_4", **FLOW}, {"num_inference_steps": 3}, "sde_4"),
    ],
)
def test_bad_schedules(config, arguments, message):
    scheduler = ERSDEScheduler(**config)
    scheduler.set_timesteps(4, mu=0.5) if config.get("noise_scaler") != "sde_4" else None
    before = dict(vars(scheduler))
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert all(value is before[key] for key, value in vars(scheduler).items())  # the run that was planned stays


@pytest.mark.parametrize(
    "config, message",
    [
        ({"prediction_type": "eps"}, "prediction_type must be one of"),
        ({"beta_schedule": "laplace"}, "beta_schedule must be"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
        ({"noise_scaler": "sde_9"}, "noise_scaler must be one of"),
        ({"eta": -1.0}, "eta must be a finite number of at least 0"),
        ({"eta": [1.0, -1.0]}, r"eta\[1\] must be a finite number of at least 0"),
        ({"eta_window": 0.5}, r"eta_window must be \[start, end\], shares from 0 to 1 in this order, got 0.5"),
        ({"eta_window": [0.5, 0.2]}, r"eta_window must be \[start, end\]"),
        ({"eta_window": [0, 1], "eta": [1.0, 1.0]}, r"eta_window=\[0, 1\] needs an eta that is one number, got \[1.0, 1.0\]"),
        ({"levels_of": "EDMEulerScheduler", "sigma_min": 0.01, "sigma_max": 80.0}, "sigma_data must be a positive number"),
        ({"use_flow_sigmas": False, "levels_of": "UniPCMultistepScheduler", **FLOW}, "needs the levels of a flow"),
        ({"sigma_schedule": "even"}, "sigma_schedule must be"),
        ({"timestep_type": "real"}, "timestep_type must be"),
        ({"solver_order": 6}, "order must be 1 to 5"),
        ({"method": "taylor", "node_scale": 5.0}, 'node_scale needs method="newton"'),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        ERSDEScheduler(**config)


@pytest.mark.parametrize(
    "keys, eta",
    [
        ({"eta_window": [0.2, 0.6], "eta": 0.5}, (0, 0.5, 0.5, 0, 0)),
        ({"eta_window": [0, 1]}, (1,) * 5),
        ({"eta": np.array([0.0, 1, 2, 1, 0])}, (0, 1, 2, 1, 0)),
    ],
)
def test_eta_by_the_step(keys, eta, tmp_path):
    """Noise in a window, or as much of it as a list says; through a file and back."""
    ERSDEScheduler.from_config(DPMSolverMultistepScheduler().config, seed=1, **keys).save_pretrained(tmp_path)
    scheduler = ERSDEScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(5)
    assert scheduler._plan.eta == eta
    x = y = noise()
    plan, history = scheduler._plan, []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(0.5 * x, t, x).prev_sample
        y, denoised = fast_step(plan, i, y, [0.5 * y, *history], seed=1, prediction_type="epsilon")
        history = [denoised, *history[: plan.order - 1]]
    assert torch.equal(x, y)
    if isinstance(keys["eta"] if "eta" in keys else 1.0, np.ndarray):
        with pytest.raises(ValueError, match="eta must be one number or 6, one for each step, got 5"):
            scheduler.set_timesteps(6)


def test_copies_in_the_middle_of_a_run():
    """Deep copies and pickles go on where the original does."""
    scheduler, x = ERSDEScheduler(seed=1), noise()
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    t = scheduler.timesteps[3]
    copies = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    expected = scheduler.step(0.1 * x, t, x).prev_sample
    assert all(torch.equal(other.step(0.1 * x, t, x).prev_sample, expected) for other in copies)


def test_step_needs_a_schedule():
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        ERSDEScheduler().step(noise(), 1, noise())


def test_a_step_is_one_operator():
    """Over a full tensor: the step itself. Views and fresh memory move nothing."""
    scheduler = ERSDEScheduler(seed=1)
    scheduler.set_timesteps(10)
    x = noise(1, 4, 64, 64)
    for t in scheduler.timesteps[:4]:
        x = scheduler.step(x, t, x).prev_sample
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        scheduler.step(x, scheduler.timesteps[4], x)
    moving = [e.key for e in profiler.key_averages() if not any(word in e.key for word in ("empty", "select", "as_strided"))]
    assert moving == ["ersde_fast::step"]


@pytest.mark.gpu
@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_step_does_not_wait_for_the_device(prediction_type):
    scheduler = ERSDEScheduler(prediction_type=prediction_type, use_karras_sigmas=True)
    generator = torch.Generator("cuda").manual_seed(1)
    scheduler.set_timesteps(5, device="cuda")
    x = noise().cuda()
    fast_step(er_sde_plan([2.0, 1.0]), 0, x, [x])  # the first use of torch's stream on a device compares it, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, generator=generator).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


@pytest.mark.gpu
def test_generators_of_the_host_serve_the_device():
    results = []
    for device in ("cpu", "cuda"):
        scheduler = ERSDEScheduler()
        scheduler.set_timesteps(5, device=device)
        x = noise().to(device)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, generator=[torch.Generator().manual_seed(s) for s in (1, 2)]).prev_sample
        results.append(x.cpu())
    torch.testing.assert_close(*results, rtol=0, atol=2e-6)


VAE = {
    "block_out_channels": [8, 16], "in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}  # fmt: skip


def stable_diffusion(kind, **unet):
    torch.manual_seed(0)
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if "XL" in kind:
        parts = {"text_encoder_2": None, "tokenizer_2": None}
    return getattr(diffusers, kind)(
        vae=diffusers.AutoencoderKL(**VAE), unet=diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **UNET, **unet),
        text_encoder=None, tokenizer=None, scheduler=ERSDEScheduler.from_config(DDPMScheduler(beta_schedule="scaled_linear").config),
        **parts,
    )  # fmt: skip


def embeddings(n=1, xl=False):
    names = ["prompt_embeds", "negative_prompt_embeds"]
    made = {name: noise(n, 7, 16, seed=k) for k, name in enumerate(names)}
    return (
        made | {name.replace("prompt", "pooled_prompt"): noise(n, 16, seed=k) for k, name in enumerate(names)} if xl else made
    )


ADDED = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40,
    "transformer_layers_per_block": 1, "use_linear_projection": True,
}  # fmt: skip


def images(pipeline, seed=0, output_type="np", **kwargs):
    """The pipeline's images in 6 steps; with a list of seeds from a generator for each."""
    generators = [torch.Generator().manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
    generator = generators if isinstance(seed, list) else generators[0]
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(num_inference_steps=6, output_type=output_type, generator=generator, **kwargs).images
    assert np.isfinite(np.asarray(result)).all()
    return result


def test_pipeline_ddpm():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    pipeline = diffusers.DDPMPipeline(unet, ERSDEScheduler())
    assert (images(pipeline, batch_size=2) == images(pipeline, batch_size=2)).all()
    assert (images(pipeline, batch_size=2) != images(pipeline, 1, batch_size=2)).any()


def test_pipeline_stable_diffusion(tmp_path):
    """Text to image; a list of generators gives each image what it gets alone; saved and loaded it is the same pipeline."""
    pipeline = stable_diffusion("StableDiffusionPipeline")
    two = images(pipeline, [1, 2], height=16, width=16, **embeddings(2))
    for b, seed in enumerate([1, 2]):
        alone = {name: value[b : b + 1] for name, value in embeddings(2).items()}
        np.testing.assert_allclose(images(pipeline, [seed], height=16, width=16, **alone)[0], two[b], atol=1e-4)
    pipeline.save_pretrained(tmp_path)
    absent = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"])
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **absent)
    assert isinstance(loaded.scheduler, ERSDEScheduler) and loaded.scheduler.config.beta_schedule == "scaled_linear"
    np.testing.assert_allclose(images(loaded, [1, 2], height=16, width=16, **embeddings(2)), two, atol=1e-4)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_pipeline_img2img(strength):
    pipeline = stable_diffusion("StableDiffusionImg2ImgPipeline")
    image = noise(1, 3, 16, 16).clamp(-1, 1)
    first = images(pipeline, image=image, strength=strength, **embeddings())
    assert pipeline.scheduler.begin_index == 6 - int(6 * strength)
    assert (images(pipeline, image=image, strength=strength, **embeddings()) == first).all()


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_pipeline_inpaint(strength):
    """The part that is kept ends as the latents of the image, the rest does not."""
    pipeline = stable_diffusion("StableDiffusionInpaintPipeline")
    mask = torch.zeros(1, 1, 32, 32)
    arguments = {"image": noise(1, 3, 32, 32).clamp(-1, 1), "height": 32, "width": 32, "strength": strength, **embeddings()}
    kept = images(pipeline, mask_image=mask, output_type="latent", **arguments)
    mask[..., :16] = 1
    half = images(pipeline, mask_image=mask, output_type="latent", **arguments)
    assert torch.equal(kept[..., 8:], half[..., 8:]) and (kept[..., :8] != half[..., :8]).all()


def test_pipeline_sdxl():
    """With denoising_start and denoising_end: base and refiner share one schedule."""
    pipeline = stable_diffusion("StableDiffusionXLPipeline", **ADDED)
    size = {"height": 16, "width": 16}
    whole = images(pipeline, **size, **embeddings(xl=True))
    assert (images(pipeline, **size, **embeddings(xl=True)) == whole).all()
    latents = images(pipeline, output_type="latent", denoising_end=0.5, **size, **embeddings(xl=True))
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{k: v for k, v in pipeline.components.items() if k not in ("image_encoder", "feature_extractor")}
    )
    images(refiner, image=latents, denoising_start=0.5, **embeddings(xl=True))
    assert refiner.scheduler.begin_index == 3  # of 853, 711, 569, 427, 285, 143 the base has taken those from 500 up


def test_pipeline_flux():
    """No generator reaches the step: the config's seed makes the run repeatable, and another seed makes another."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipeline = diffusers.FluxPipeline(
        ERSDEScheduler.from_config(theirs.config, seed=1),
        diffusers.AutoencoderKL(**VAE, shift_factor=0.1),
        None,
        None,
        None,
        None,
        transformer,
    )

    def image():
        prompt = {"prompt_embeds": noise(1, 7, 16), "pooled_prompt_embeds": noise(1, 16)}
        return images(pipeline, height=16, width=16, **prompt)

    first = image()
    assert (image() == first).all()
    pipeline.scheduler = ERSDEScheduler.from_config(pipeline.scheduler.config, seed=2)
    assert (image() != first).any()
