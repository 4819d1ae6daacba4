"""Configs of every scheduler class of diffusers, with each of its flags: honoured as that class means them, or refused by name.

A class that diffusers adds tomorrow fails here until it is in one of the tables.
"""

import copy
import functools
import inspect
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.utils import DummyObject

from ersde_fast.integrations.diffusers import ERSDEScheduler
from ersde_fast.integrations.diffusers_configs import LEVELS_OF, REFUSED
from ersde_fast.integrations.diffusers_levels import PREDICTION_TYPES, BetaLevels, EDMLevels, FlowLevels

STEPS = 7
CLASSES = {
    name: scheduler
    for name in dir(diffusers)
    if name.endswith("Scheduler") and inspect.isclass(scheduler := getattr(diffusers, name)) and not isinstance(scheduler, DummyObject)
    if issubclass(scheduler, SchedulerMixin) and "Flax" not in name
}  # fmt: skip
# What a config may say beside its class's defaults; each is tried on every class that has all of its keys.
VARIATIONS = [
    {},
    *({"prediction_type": kind} for kind in PREDICTION_TYPES),
    *({flag: True} for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")),
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 30.0},
    {"use_exponential_sigmas": True, "sigma_max": 30.0},
    {"use_beta_sigmas": True, "sigma_min": 0.05},
    {"sigma_min": 0.01, "sigma_max": 60.0, "sigma_data": 0.7, "rho": 5.0},
    {"sigma_schedule": "exponential"},
    {"sigma_schedule": "karras"},
    {"final_sigmas_type": "sigma_min"},
    *({"timestep_spacing": spacing, "steps_offset": 1} for spacing in ("linspace", "leading", "trailing")),
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    {"trained_betas": [0.01] * 1000},
    {"num_train_timesteps": 500},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"snr_shift_scale": 2.0},
    {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0},
    {"timestep_type": "continuous"},
    {"interpolation_type": "log_linear"},
    {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction", "final_sigmas_type": "sigma_min"},
    {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"},
    {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction", "time_shift_type": "linear"},
    {"use_flow_sigmas": True, "shift_terminal": 0.1, "prediction_type": "flow_prediction"},
    {"use_flow_sigmas": True, "use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0, "prediction_type": "flow_prediction"},
    {"shift": 3.0},
    {"shift": 3.0, "use_karras_sigmas": True},
    {"shift": 3.0, "shift_terminal": 0.1},
    {"use_dynamic_shifting": True, "shift": 3.0},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"invert_sigmas": True, "shift": 2.0},
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.5},
    {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
    {"variance_type": "learned_range"},
]  # fmt: skip


def parameters(name):
    return {k: p.default for k, p in inspect.signature(CLASSES[name].__init__).parameters.items() if k != "self"}


def variations(name):
    keys = parameters(name)
    return [variation for variation in VARIATIONS if variation.keys() <= keys.keys()]


def three_ways(theirs, variation, tmp_path):
    """A config as a scheduler has it, as it is saved, and as people write it, with its class and what is not the default."""
    yield lambda: ERSDEScheduler.from_config(theirs.config)
    theirs.save_pretrained(tmp_path / "saved")  # which writes the class into the config
    (tmp_path / "written").mkdir(exist_ok=True)
    (tmp_path / "written" / "scheduler_config.json").write_text(json.dumps({"_class_name": type(theirs).__name__, **variation}))
    yield lambda: ERSDEScheduler.from_pretrained(tmp_path / "saved")
    yield lambda: ERSDEScheduler.from_pretrained(tmp_path / "written")


def expected_schedule(theirs, mu):
    """Levels and timesteps of the class itself; of those that place timesteps of a beta schedule DPM-Solver's."""
    config, kind = theirs.config, LEVELS_OF[type(theirs).__name__][bool(theirs.config.get("use_flow_sigmas"))]
    if kind is not BetaLevels:
        theirs.set_timesteps(STEPS, **({} if mu is None else {"mu": mu}))
        if type(theirs).__name__ in ("DEISMultistepScheduler", "SASolverScheduler"):  # whose run stays at its last level
            theirs.sigmas[-1] = 0
        if type(theirs).__name__ == "FlowMatchHeunDiscreteScheduler":  # every level twice but the first
            return np.append(theirs.sigmas[:1], theirs.sigmas[1::2]), np.append(theirs.timesteps[:1], theirs.timesteps[1::2])
        return theirs.sigmas.double().numpy(), theirs.timesteps.double().numpy()
    if config.get("timestep_type") == "continuous" and config.prediction_type == "v_prediction":
        theirs.set_timesteps(STEPS)
        return theirs.sigmas.double().numpy(), theirs.timesteps.double().numpy()
    known = inspect.signature(DPMSolverMultistepScheduler.__init__).parameters
    left_out = (
        "solver_type",
        "algorithm_type",
        "solver_order",
        "thresholding",
        "variance_type",
        "prediction_type",
        "use_dynamic_shifting",
    )
    dpm = DPMSolverMultistepScheduler(**{k: v for k, v in config.items() if k in known and k not in left_out})
    dpm.register_to_config(**{k: config[k] for k in ("sigma_min", "sigma_max") if config.get(k) is not None})
    if config.get("snr_shift_scale"):
        dpm.alphas_cumprod = theirs.alphas_cumprod.clone()
        if config.rescale_betas_zero_snr:
            dpm.alphas_cumprod[-1] = 2.0**-24
    dpm.set_timesteps(STEPS)
    return dpm.sigmas.double().numpy(), dpm.timesteps.double().numpy()


@functools.lru_cache(maxsize=1)
def at_every_timestep(theirs):
    """A copy of a scheduler, with a run of as many steps as it was trained for: some classes take a second to set that."""
    theirs = copy.deepcopy(theirs)
    theirs.set_timesteps(
        theirs.config.num_train_timesteps, **({"mu": 0.8} if theirs.config.get("use_dynamic_shifting") else {})
    )
    return theirs


def expected_prediction(theirs, ours, output, sample, mu):
    """The clean sample that the class's own code makes of an output at the first level of the run; None where it shows none."""
    name, sigma = type(theirs).__name__, ours.sigmas[0]
    kind = LEVELS_OF[name][bool(theirs.config.get("use_flow_sigmas"))]
    if issubclass(kind, EDMLevels) and not hasattr(theirs, "convert_model_output"):
        return theirs.precondition_outputs(sample, output, sigma)
    if issubclass(kind, FlowLevels) and not hasattr(theirs, "convert_model_output"):
        return sample + (1 - sigma) * output if theirs.config.get("invert_sigmas") else sample - sigma * output
    if theirs.config.get("variance_type") == "learned_range":
        return None
    theirs = copy.deepcopy(at_every_timestep(theirs))
    theirs.sigmas, theirs._step_index = ours.sigmas, 0
    if hasattr(theirs, "convert_model_output"):
        made = theirs.convert_model_output(output, sample=sample)
        if theirs.config.get("algorithm_type") != "deis":
            return made
        alpha, sigma = theirs._sigma_to_alpha_sigma_t(sigma)
        return (sample - sigma * made) / alpha
    if name.startswith(("DD", "CogVideoXDDIM")):
        return theirs.step(output, int(ours.timesteps[0]), sample).pred_original_sample
    try:
        theirs.is_scale_input_called = True
        result = theirs.step(output, ours.timesteps[0].float(), sample * (1 + sigma**2) ** 0.5)
    except (TypeError, NotImplementedError, ValueError, IndexError):
        return None
    return getattr(result, "pred_original_sample", None)


def made(name, variation):
    """A scheduler of a class, and the mu of its runs; None where the class itself does not take the keys."""
    required = {k: 4 for k, default in parameters(name).items() if default is inspect.Parameter.empty and k != "kwargs"}
    dynamic = variation.get("use_dynamic_shifting", False)
    if dynamic and variation.get("time_shift_type") == "linear" and name.startswith(("DPM", "DEIS")):
        return None, None  # they assert that the shift is exponential
    try:
        return CLASSES[name](**required, **variation), 0.8 if dynamic else None
    except (ValueError, NotImplementedError, ImportError, TypeError):
        return None, None


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_classes(name):
    """By their name; or, for a config without it, by that of a class with the same keys."""
    with pytest.raises(ValueError, match=name):
        ERSDEScheduler.from_config({"_class_name": name})
    with pytest.raises(ValueError, match=name):
        ERSDEScheduler(levels_of=name)
    if name in CLASSES and (theirs := made(name, {})[0]) is not None:
        with pytest.raises(ValueError, match=name):
            ERSDEScheduler.from_config(theirs.config)


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - REFUSED.keys()))
def test_every_class_is_honoured_or_refused(name, tmp_path):
    assert name in LEVELS_OF, f"diffusers has a class that is in no table: {name}"
    output, sample = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    refused, predicted = set(), 0
    for variation in variations(name):
        theirs, mu = made(name, variation)
        if theirs is None:
            continue
        for make in three_ways(theirs, variation, tmp_path):
            try:
                ours = make()
            except ValueError as error:
                refused |= {key for key in variation if key in str(error)}
                same = name == "FlowMatchHeunDiscreteScheduler" and f"{name} and of FlowMapEuler" in str(error)
                assert same or any(key in str(error) for key in variation), f"{name} {variation}: {error}"
                continue
            levels, timesteps = expected_schedule(theirs, mu)
            ours.set_timesteps(STEPS, mu=mu)
            np.testing.assert_allclose(ours.sigmas, levels, rtol=1e-5, atol=1e-6, err_msg=f"{name} {variation}")
            assert np.abs(ours.timesteps.double().numpy() - timesteps).max() <= 1, (name, variation)
            if issubclass(LEVELS_OF[name][0], EDMLevels):
                assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
                theirs.set_timesteps(STEPS)
                got, expected = (s.scale_model_input(sample, s.timesteps[0]) for s in (ours, theirs))
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            else:
                assert ours.init_noise_sigma == 1 and ours.scale_model_input(sample, ours.timesteps[0]) is sample
            expected = expected_prediction(theirs, ours, output, sample, mu)
            if expected is not None:
                predicted += 1
                got = ours.step(output, ours.timesteps[0], sample).pred_original_sample
                np.testing.assert_allclose(got, expected.to(got.dtype), rtol=1e-3, atol=1e-3, err_msg=f"{name} {variation}")
    assert refused <= {"prediction_type", "interpolation_type", "use_flow_sigmas"}
    assert predicted or name in ("PNDMScheduler", "DPMSolverSDEScheduler", "CogVideoXDPMScheduler")  # which do not show theirs


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"shift": 3.0}, "FlowMatchEulerDiscreteScheduler"),
        ({"base_shift": 0.5}, "FlowMatchEulerDiscreteScheduler"),
        ({"sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 40.0}, "EDMDPMSolverMultistepScheduler"),
        ({"beta_schedule": "scaled_linear"}, "DPMSolverMultistepScheduler"),
        ({"timestep_type": "continuous", "prediction_type": "v_prediction"}, "EulerDiscreteScheduler"),
        ({"snr_shift_scale": 3.0}, "CogVideoXDDIMScheduler"),
        ({"prediction_type": "flow_prediction"}, None),
        ({"shift": 3.0, "note": "of mine"}, "FlowMatchEulerDiscreteScheduler"),
        ({**diffusers.EDMEulerScheduler().config, "note": 1}, "EDMEulerScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": ["my_schedulers", "EulerDiscreteScheduler"]}, "EulerDiscreteScheduler"),
    ],
)
def test_configs_that_people_write_in_part(config, expected):
    ours = ERSDEScheduler.from_config(config)
    assert ours.config.levels_of == expected
    ours.set_timesteps(4)


def test_a_config_that_names_no_known_class():
    with pytest.raises(ValueError, match=r"MyScheduler .* levels_of="):
        ERSDEScheduler.from_config({"_class_name": "MyScheduler", "beta_schedule": "scaled_linear"})
    ours = ERSDEScheduler.from_config(
        {"_class_name": "MyScheduler", "beta_schedule": "scaled_linear"}, levels_of="DPMSolverMultistepScheduler"
    )
    assert ours.config.beta_schedule == "scaled_linear"
    with pytest.raises(ValueError, match="LCMScheduler"):
        ERSDEScheduler(levels_of="LCMScheduler")


@pytest.mark.parametrize(
    "theirs, given, message",
    [
        (diffusers.UniPCMultistepScheduler, {"shift": 3.0}, "shift=3.0 changes nothing"),
        (diffusers.FlowMatchEulerDiscreteScheduler, {"flow_shift": 3.0}, "flow_shift=3.0 changes nothing"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler,
            {"timestep_spacing": "trailing"},
            "timestep_spacing='trailing' changes nothing",
        ),
        (diffusers.EDMEulerScheduler, {"use_karras_sigmas": True}, "use_karras_sigmas=True changes nothing"),
        (diffusers.DDIMScheduler, {"rho": 3.0, "use_karras_sigmas": True}, "rho=3.0 changes nothing"),
        (diffusers.DDIMScheduler, {"sigma_max": 30.0}, "sigma_max=30.0 needs use_karras_sigmas"),
        (diffusers.EulerDiscreteScheduler, {"interpolation_type": "log_linear"}, "interpolation_type must be"),
    ],
)
def test_arguments_that_would_change_nothing(theirs, given, message):
    with pytest.raises(ValueError, match=message):
        ERSDEScheduler.from_config(theirs().config, **given)


def test_arguments_that_nobody_knows():
    with pytest.raises(TypeError, match="noise_scalar"):
        ERSDEScheduler.from_config(diffusers.DDIMScheduler().config, noise_scalar="ode")
    _, unused = ERSDEScheduler.from_config({}, return_unused_kwargs=True, noise_scalar="ode")
    assert unused["noise_scalar"] == "ode"
    assert ERSDEScheduler.from_config({}, algorithm_type="sde-dpmsolver++", noise_sampler_seed=3).config.seed == 3
    with pytest.raises(ValueError, match=r"flow_shift=8.0 changes nothing"):
        ERSDEScheduler(prediction_type="flow_prediction", flow_shift=8.0)


@pytest.mark.parametrize("theirs", ["SCMScheduler", "UnCLIPScheduler", "DDIMInverseScheduler", "IPNDMScheduler"])
def test_a_plain_dict_of_a_refused_class_is_refused(theirs):
    with pytest.raises(ValueError, match=theirs):
        ERSDEScheduler.from_config(dict(getattr(diffusers, theirs)().config))


def test_keys_that_a_class_does_not_read_are_not_read():
    """The JSON of Stable Diffusion's PNDM holds clip_sample, which PNDM does not know; DDIM clips where nothing is said."""
    assert not ERSDEScheduler.from_config({"_class_name": "PNDMScheduler", "clip_sample": True}).config.clip_sample
    assert ERSDEScheduler.from_config({"_class_name": "DDIMScheduler"}).config.clip_sample
    assert not ERSDEScheduler.from_config({"_class_name": "DDIMScheduler", "clip_sample": False}).config.clip_sample
    assert ERSDEScheduler.from_config({"_class_name": "PNDMScheduler"}, clip_sample=True).config.clip_sample


def run_of(scheduler, steps=6):
    """A few steps on a made-up output."""
    scheduler.set_timesteps(steps)
    x = torch.linspace(-2, 2, 24).view(2, 3, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x + t / 300), t, x, return_dict=False)[0]
    return x


def test_the_pipelines_guidance_scale_chooses_the_order():
    made = {scale: run_of(ERSDEScheduler(seed=0, guidance_scale=scale)) for scale in (None, 1.0, 2.5, 7.5)}
    assert torch.equal(made[1.0], run_of(ERSDEScheduler(seed=0, solver_order=3)))
    assert torch.equal(made[None], made[2.5]) and not torch.equal(made[None], made[1.0])
    assert not torch.equal(made[7.5], made[2.5])
    assert ERSDEScheduler.from_config(diffusers.DDIMScheduler().config, guidance_scale=7.5).config.guidance_scale == 7.5


@pytest.mark.parametrize(
    "key, value",
    [("solver_order", 2), ("method", "newton"), ("node_scale", 5.0), ("integration_points", 9), ("lower_order_final", True)],
)
def test_a_guidance_scale_beside_what_it_chooses_is_refused(key, value):
    with pytest.raises(ValueError, match=f"guidance_scale=5.0 chooses the order of each step, which {key} names too"):
        ERSDEScheduler(guidance_scale=5.0, **{key: value})
    with pytest.raises(ValueError, match="guidance must be a finite number of at least 0"):
        ERSDEScheduler(guidance_scale=-1.0)


def test_the_solver_keeps_its_own_defaults():
    """The order of another solver is taken where somebody wrote it, not where it is that class's default."""
    assert ERSDEScheduler.from_config(diffusers.UniPCMultistepScheduler().config).config.solver_order is None
    assert ERSDEScheduler.from_config(diffusers.UniPCMultistepScheduler(solver_order=1).config).config.solver_order == 1
    assert ERSDEScheduler.from_config({"_class_name": "UniPCMultistepScheduler", "solver_order": 2}).config.solver_order is None
    assert not ERSDEScheduler.from_config({"_class_name": "UniPCMultistepScheduler"}).config.lower_order_final
    assert ERSDEScheduler.from_config(diffusers.DPMSolverSDEScheduler(noise_sampler_seed=7).config).config.seed == 7
    switched = DPMSolverMultistepScheduler.from_config(ERSDEScheduler(noise_scaler="ode", seed=3).config)
    again = ERSDEScheduler.from_config(switched.config)
    assert again.config.noise_scaler == "ode" and again.config.seed == 3


def test_numpy_numbers_are_saved(tmp_path):
    ours = ERSDEScheduler(seed=np.int64(5), shift=np.float32(3.0), prediction_type="flow_prediction", s_noise=np.float64(0.5))
    ours.save_pretrained(tmp_path)
    again = ERSDEScheduler.from_pretrained(tmp_path)
    assert again.config.seed == 5 and again.config.shift == 3.0 and math.isclose(again.config.s_noise, 0.5)
    seeds = ERSDEScheduler(seed=list(np.array([1, 2])), trained_betas=np.full(10, 0.1))
    seeds.save_pretrained(tmp_path)
    assert ERSDEScheduler.from_pretrained(tmp_path).config.seed == [1, 2]


def test_the_table_of_the_docs_names_every_class():
    page = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    _, table = page.split("| scheduler of diffusers | what becomes of its config |\n|---|---|\n")
    named = {True: set(), False: set()}
    for row in table.split("\n\n")[0].splitlines():
        names, what = row.strip("| ").split(" | ")
        named[what.startswith("refused")] |= {f"{name}Scheduler" for name in names.split(", ")}
    assert named[False] == LEVELS_OF.keys() and named[True] == REFUSED.keys()


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "EDMDPMSolverMultistepScheduler"],
)
def test_what_was_saved_can_be_turned_back(name, tmp_path):
    """Keys that are None as if they were not given are not saved: another class has numbers there."""
    theirs = CLASSES[name]
    ERSDEScheduler.from_config(theirs().config).save_pretrained(tmp_path)
    kept = ERSDEScheduler.from_pretrained(tmp_path)
    assert kept.config.solver_order is None
    back = theirs.from_config(kept.config)
    back.set_timesteps(5)
    assert back.config.solver_order == theirs().config.solver_order


def test_a_key_that_is_passed_goes_before_what_the_config_says_otherwise():
    of_config = DPMSolverMultistepScheduler(solver_order=3, lower_order_final=False).config
    told = ERSDEScheduler.from_config(of_config, guidance_scale=7.5)
    assert told.config.guidance_scale == 7.5 and told.config.solver_order is None
    named = ERSDEScheduler.from_config(told.config, solver_order=2)
    assert named.config.guidance_scale is None and named.config.solver_order == 2


@pytest.mark.parametrize("keys", [{"clip_sample": True}, {"thresholding": True}])
def test_predictions_that_are_clipped_compile_whole(keys):
    scheduler, x = ERSDEScheduler(seed=1, **keys), torch.randn(2, 3, 4, 4)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    eager = copy.deepcopy(scheduler)
    step = torch.compile(scheduler.step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x, scheduler.timesteps[0], x).prev_sample, eager.step(x, eager.timesteps[0], x).prev_sample)
