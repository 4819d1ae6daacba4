"""The custom nodes of ComfyUI: ComfyUI itself where COMFYUI_CHECKOUT names a checkout, and its recorded runs always."""

import importlib
import math
import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch
from test_reference import denoise, golden_cases, scaler_of, tolerance

from ersde_fast import er_sde_plan, sample_er_sde

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = os.environ.get("COMFYUI_CHECKOUT")
# What the sampler does not need: torch is here already, the rest is for the web page, images, sounds and films.
LEFT_OUT = ("torch", "torchvision", "torchaudio", "comfyui-", "av", "kornia", "spandrel", "PyOpenGL", "comfy-angle")


@pytest.mark.skipif(not CHECKOUT, reason="COMFYUI_CHECKOUT names no checkout of ComfyUI")
def test_comfyui_itself(tmp_path):
    """In an environment made for it: ComfyUI's requirements over the packages that are here."""
    lines = Path(CHECKOUT, "requirements.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#") and not is_left_out(line)]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    (site / "here.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})")
    subprocess.run([python, "-m", "pip", "install", "-q", *names], check=True)
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", ROOT / "tests" / "comfyui_cases.py"]
    result = subprocess.run(tests, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-3000:]


def is_left_out(requirement):
    name = requirement.split("=")[0].split(">")[0].split("~")[0].strip()
    return any(name == left or (left.endswith("-") and name.startswith(left)) for left in LEFT_OUT)


def with_post_cfg(options, function, disable_cfg1_optimization=False):
    return {"post_cfg": function, "cfg1": not disable_cfg1_optimization, **options}


@pytest.fixture
def comfyui(monkeypatch, tmp_path):
    """The node package beside stand-ins for the parts of ComfyUI that it touches."""
    folders = {}
    names = {"comfy": {}, "comfy.k_diffusion": {}, "comfy.k_diffusion.sampling": {}}
    names["comfy.model_patcher"] = {"set_model_options_post_cfg_function": with_post_cfg}
    names["comfy.model_sampling"] = {"CONST": type("CONST", (), {})}
    names["comfy.samplers"] = {"KSAMPLER_NAMES": ["er_sde"], "SAMPLER_NAMES": ["er_sde"], "KSAMPLER": lambda f, o: (f, o)}
    names["folder_paths"] = {
        "folder_names_and_paths": folders,
        "models_dir": str(tmp_path),
        "get_filename_list": lambda name: sorted(os.listdir(folders[name][0][0])),
        "get_full_path_or_raise": lambda name, file: os.path.join(folders[name][0][0], file),
    }
    for name, members in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    monkeypatch.delitem(sys.modules, "ersde_fast.integrations.comfyui", raising=False)
    yield importlib.import_module("ersde_fast.integrations.comfyui")
    sys.modules.pop("ersde_fast.integrations.comfyui", None)


@pytest.mark.parametrize("case", [case for case in golden_cases() if case.values[0]["peer"] == "comfyui"])
def test_compatible_reproduces_recorded_runs(comfyui, case):
    """Runs of the built-in sampler: its schedule, its start off sigma 1, its noise, and x after every step."""
    kinds = (comfyui.comfy.model_sampling.CONST,) if case["process"] == "flow" else ()
    schedule = type(
        "ModelSampling", kinds, {"percent_to_sigma": lambda self, percent: case["sigmas"][0] if percent == 1e-4 else None}
    )()
    model_patcher = types.SimpleNamespace(get_model_object=lambda name: {"model_sampling": schedule}[name])
    dtype = getattr(torch, case["dtype"])
    alphas = dict(zip(case["sigmas"], case["alphas"], strict=True))
    seen, draws = [], iter([z for z in case["noise"] if z is not None])

    class Model:
        inner_model = types.SimpleNamespace(model_patcher=model_patcher)

        def __call__(self, x, sigma):
            s = sigma[0].item()
            s = min(alphas, key=lambda known: abs(known - s))
            return denoise(x.double(), s, alphas[s], case["denoiser"]).to(x.dtype)

    result = comfyui.sample_er_sde_fast(
        Model(),
        torch.tensor(case["x_init"], dtype=dtype)[None],
        torch.tensor(case.get("sigmas_in") or case["sigmas"], dtype=torch.float64),
        callback=lambda d: seen.append(d["x"]),
        disable=True,
        s_noise=case["s_noise"],
        noise_sampler=lambda sigma, sigma_next: torch.tensor(next(draws), dtype=dtype)[None],
        noise_scaler=scaler_of(case),
        max_stage=case["order"],
        compatible=True,
    )
    for i, expected in enumerate(case["x_after_step"]):
        x = (seen[i + 1] if i + 1 < len(seen) else result).double().flatten()
        expected = torch.tensor(expected, dtype=torch.float64)
        assert ((x - expected).abs() / expected.abs().clamp(min=1)).max() <= tolerance(case), f"step {i}"


def noise_of(numbers, shape=(4, 8, 8), seed=11, dtype=torch.float32):
    """As ComfyUI draws it: one image after another, those of the numbers kept, in the latent's dtype, and sampled in float32."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn((1, *shape), generator=generator).to(dtype) for _ in range(max(numbers) + 1)]
    return torch.cat([drawn[number] for number in numbers]).float()


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 5, 7), (16, 3, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numbers", [[0], [0, 1, 2], [2], [3, 1], [5, 5, 0], [255]])
def test_an_image_is_known_by_its_initial_noise(comfyui, shape, dtype, numbers):
    assert comfyui.image_numbers(noise_of(numbers, shape, dtype=dtype), 11, len(numbers)) == numbers


def test_an_image_is_known_by_its_place_where_the_noise_is_of_another_kind(comfyui):
    together = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(11))  # as ComfyUI draws a whole batch
    others = [None, torch.zeros(3, 4, 8, 8), noise_of([2, 1, 0], seed=12), noise_of([2, 1, 256]), noise_of([7]), together]
    assert [comfyui.image_numbers(noise, 11, 3) for noise in others] == [[0, 1, 2]] * 6


@pytest.mark.parametrize(
    "extra_args, source", [({}, {}), (None, {}), ({"seed": 5}, {"noise_sampler": lambda sigma, sigma_next: torch.zeros(1, 4)})]
)
def test_portable_noise_without_a_seed_of_its_own_is_refused(comfyui, extra_args, source):
    schedule = types.SimpleNamespace(get_model_object=lambda name: object())
    model = types.SimpleNamespace(inner_model=types.SimpleNamespace(model_patcher=schedule))
    with pytest.raises(ValueError, match="portable noise needs the run's seed and no noise_sampler"):
        comfyui.sample_er_sde_fast(model, torch.zeros(1, 4), torch.tensor([2.0, 1.0]), extra_args, portable=True, **source)


def test_settings_that_exclude_each_other(comfyui):
    node, fixed = (
        comfyui.SamplerERSDEFast(),
        {"eta": 1.0, "s_noise": 1.0, "method": "by cfg", "node_scale": 10.0, "solver_type": "ER-SDE"},
    )
    with pytest.raises(ValueError, match="compatible needs order 1 to 3"):
        node.get_sampler(order=4, noise=comfyui.TORCH, compatible=True, **fixed)
    with pytest.raises(ValueError, match="compatible needs ComfyUI's"):
        node.get_sampler(order=3, noise=comfyui.PORTABLE, compatible=True, **fixed)
    for named in ({"order": 2}, {"order": 3, "node_scale": 20.0}):
        with pytest.raises(ValueError, match='method "by cfg" chooses order and node_scale: leave them at 3 and 10'):
            node.get_sampler(**{**fixed, "noise": comfyui.TORCH, "compatible": False, **named})


class Window:
    """A model whose times are its levels, 1 to 0."""

    inner_model = types.SimpleNamespace(model_patcher=types.SimpleNamespace(get_model_object=lambda name: Window))
    percent_to_sigma = staticmethod(lambda percent: 1 - percent)

    def __call__(self, x, sigma):
        return 0.5 * x


def noise_levels(comfyui, **options):
    """The ends of the steps that draw noise."""
    seen = []

    def sampler(sigma, sigma_next):
        seen.append(sigma_next.item())
        return torch.zeros(1, 3)

    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    comfyui.sample_er_sde_fast(Window(), torch.ones(1, 3), sigmas, disable=True, noise_sampler=sampler, **options)
    return seen


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize(
    "start, end, levels",
    [(0, 1, [0.75, 0.5, 0.25]), (0.25, 0.5, [0.75, 0.5]), (0.3, 1, [0.5, 0.25]), (0, 0.6, [0.75, 0.5]), (0.6, 0.7, [])],
)
def test_noise_is_added_between_shares_of_the_models_times(comfyui, start, end, levels, compatible):
    """As SamplerSASolver's: where the level that a step ends at lies between those of the two shares."""
    assert noise_levels(comfyui, noise_start=start, noise_end=end, compatible=compatible) == levels
    assert noise_levels(comfyui, noise_start=start, noise_end=end, eta=0.0) == []


@pytest.mark.parametrize("start, end", [(0.5, 0.4), (-0.1, 1), (0, 1.1), (math.nan, 1)])
def test_a_window_that_is_none_is_refused(comfyui, start, end):
    with pytest.raises(
        ValueError, match=f"noise_start and noise_end must be from 0 to 1, in this order, got {start} and {end}"
    ):
        noise_levels(comfyui, noise_start=start, noise_end=end)


def test_cfg_pp_is_told_the_unconditional_prediction(comfyui):
    """The steps by CFG++ of the model's guided prediction; its options are kept, and not written into."""
    sigmas, x, options = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), torch.ones(1, 3), {"a patch": 7}

    class Guided(Window):
        def __call__(self, x, sigma, model_options, seed):
            assert model_options["a patch"] == 7 and not model_options["cfg1"] and seed == 5
            denoised, uncond = 0.5 * x, 0.3 * x
            return model_options["post_cfg"]({"denoised": denoised, "uncond_denoised": uncond, "uncond": []})

    seen = []
    got = comfyui.k_diffusion_sampling.sample_er_sde_fast_cfg_pp(
        Guided(), x, sigmas, {"model_options": options, "seed": 5}, callback=seen.append, disable=True
    )
    seed = torch.Generator().manual_seed(6)
    expected = sample_er_sde(lambda x, sigma: (0.5 * x, 0.3 * x), x, sigmas, disable=True, generator=seed, cfg_pp=1.0)
    assert torch.equal(got, expected) and options == {"a patch": 7} and len(seen) == 4
    assert torch.equal(seen[0]["denoised"], 0.5 * x) and torch.equal(seen[0]["x"], x)
    assert "er_sde_fast_cfg_pp" in comfyui.comfy.samplers.KSAMPLER_NAMES


def test_cfg_pp_without_a_negative_condition_is_refused(comfyui):
    class Unguided(Window):
        def __call__(self, x, sigma, model_options):
            return model_options["post_cfg"]({"denoised": x, "uncond_denoised": x, "uncond": None})

    with pytest.raises(ValueError, match="er_sde_fast_cfg_pp needs a negative condition"):
        comfyui.sample_er_sde_fast_cfg_pp(Unguided(), torch.ones(1, 3), torch.tensor([1.0, 0.5]), disable=True)


@pytest.mark.parametrize(
    "guider, guidance",
    [
        ({"cfg": 7.0}, 7.0),
        ({"cfg": 1.0}, None),
        ({"cfg": 1.0, "cfg1": 4.0, "cfg2": 6}, 6.0),
        ({}, None),
        ({"cfg": math.inf}, None),
    ],
)
def test_the_guider_tells_its_guidance(comfyui, guider, guidance):
    """Not 1, which networks are sampled at that have guidance distilled into them."""
    assert comfyui.guidance_of(types.SimpleNamespace(**guider)) == guidance


def plan_node(comfyui, plan, noise=None):
    """What the node of plans gives for a plan in its folder."""
    folder = Path(comfyui.folder_paths.models_dir, "ersde_plans")
    folder.mkdir(exist_ok=True)
    plan.save(folder / "five.safetensors")
    node = comfyui.NODE_CLASS_MAPPINGS["SamplerERSDEPlan"]
    assert node.INPUT_TYPES()["required"]["plan"][0] == ["five.safetensors"]
    (function, options), sigmas = node().get_sampler("five.safetensors", noise or comfyui.TORCH)
    return lambda model, x, sigmas=sigmas, **given: function(
        model, x, sigmas, {"seed": 5}, None, True, **options, **given
    ), sigmas


LEVELS = torch.tensor([14.0, 5.0, 2.0, 0.7, 0.1, 0.0], dtype=torch.float64)


def model_of(kinds=(), **members):
    """A denoiser of samples of which only x / alpha is told, as ComfyUI's models."""
    schedule = type("ModelSampling", kinds, members)()
    patcher = types.SimpleNamespace(get_model_object=lambda name: schedule)

    class Model:
        inner_model = types.SimpleNamespace(model_patcher=patcher)

        def __call__(self, x, sigma, seed):
            sigma = sigma[0].double()
            alpha = 1 - sigma if kinds else 1.0
            return x / alpha * 0.25 / (0.25 + (sigma / alpha) ** 2)

    return Model()


@pytest.mark.parametrize("process", ["ve", "vp", "flow"])
@pytest.mark.parametrize("portable", [False, True])
def test_a_plan_from_a_file(comfyui, process, portable):
    """The run is that of `sample_er_sde` on the same levels, in ComfyUI's variables."""
    sigmas = {"ve": LEVELS, "vp": LEVELS / (1 + LEVELS**2).sqrt(), "flow": LEVELS / (1 + LEVELS)}[process]
    kinds = (comfyui.comfy.model_sampling.CONST,) if process == "flow" else ()
    run, shown = plan_node(comfyui, er_sde_plan(sigmas, process=process), comfyui.PORTABLE if portable else None)
    x, own = torch.ones(2, 4, dtype=torch.float64), sigmas if process == "flow" else LEVELS
    torch.testing.assert_close(shown, own.float())
    source = {"seed": [(5, 0), (5, 1)]} if portable else {"generator": torch.Generator().manual_seed(6)}
    model, process = model_of(kinds), "flow" if process == "flow" else "ve"
    expected = sample_er_sde(model, x, own, {"seed": 5}, process=process, disable=True, **source)
    torch.testing.assert_close(run(model, x), expected, rtol=1e-10, atol=1e-10)


def test_a_plan_takes_the_models_scale_of_noise(comfyui):
    run, _ = plan_node(comfyui, er_sde_plan(LEVELS))
    source = {"generator": torch.Generator().manual_seed(6)}
    x, model = torch.ones(2, 4), model_of(noise_scale=0.5)
    expected = sample_er_sde(model, x, LEVELS, {"seed": 5}, s_noise=0.5, disable=True, **source)
    torch.testing.assert_close(run(model, x), expected)


def test_plans_that_are_not_the_models(comfyui):
    run, sigmas = plan_node(comfyui, er_sde_plan(LEVELS))
    with pytest.raises(ValueError, match="plan must be of a flow, as the model is"):
        run(model_of((comfyui.comfy.model_sampling.CONST,)), torch.ones(1, 4))
    for others in (sigmas[1:], sigmas * 1.01):
        with pytest.raises(ValueError, match="sigmas must be the plan's, the second output of its node"):
            run(model_of(), torch.ones(1, 4), others)
    with pytest.raises(ValueError, match="starts at alpha 0, which only models of flows do"):
        plan_node(comfyui, er_sde_plan([1.0, 0.5, 0.0], process="vp"))
