"""Run by test_comfyui.py in a process and an environment of its own, with a checkout of ComfyUI as its argument: ComfyUI itself,
from its KSampler down to a tiny model, with the built-in er_sde beside er_sde_fast."""

import asyncio
import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages that ComfyUI imports for images and sounds, and samples without."""

    names = ("torchvision", "torchaudio", "av", "kornia", "spandrel", "comfyui_frontend_package", "comfyui_embedded_docs")

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return mock.MagicMock(name=spec.name, __path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Stubs())
sys.path.insert(0, os.environ["COMFYUI_CHECKOUT"])
sys.argv = ["comfyui", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models_base  # noqa: E402
import nodes  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from comfy.k_diffusion import sampling  # noqa: E402
from comfy_extras.nodes_custom_sampler import SamplerER_SDE  # noqa: E402

BUILT_IN = sampling.sample_er_sde
assert asyncio.run(nodes.load_custom_node(str(ROOT / "examples" / "comfyui_ersde_fast")))
Node = nodes.NODE_CLASS_MAPPINGS["SamplerERSDEFast"]
DEFAULTS = {
    name: spec[1]["default"] if len(spec) > 1 and "default" in spec[1] else spec[0][0]
    for name, spec in Node.INPUT_TYPES()["required"].items()
}
TYPES = ["EPS", "V_PREDICTION", "FLOW", "FLUX"]
EPS = 2.0**-24


class Tiny(torch.nn.Module):
    """A network of a few convolutions, smooth in its input as trained ones are."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3, generator=generator) / 12, requires_grad=False)
        self.seen = []

    def forward(self, x, t, context=None, **kwargs):
        self.seen.append(kwargs.get("transformer_options", {}))
        return torch.tanh(torch.nn.functional.conv2d(x, self.weight, padding=1)) + 0.5 * x


def tiny_model(kind):
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = comfy.latent_formats.SD15()
    base = comfy.model_base.BaseModel(config, comfy.model_base.ModelType[kind], device="cpu")
    base.diffusion_model = Tiny()
    return comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def sample(kind, sampler, steps=20, seed=11, batch=2, model=None, **kwargs):
    """ComfyUI's KSampler (sampler a name) or SamplerCustom (a SAMPLER of a node)."""
    model = model or tiny_model(kind)
    latent = kwargs.pop("latent_image", torch.zeros(batch, 4, 8, 8))
    noise = comfy.sample.prepare_noise(latent, seed, kwargs.pop("noise_inds", None))
    cfg = kwargs.pop("cfg", 1.0)
    scheduler = "karras" if kind in ("EPS", "V_PREDICTION") else "simple"
    conds = [[[torch.zeros(1, 7, 8), {}]]] * 2
    if isinstance(sampler, str):
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, *conds, latent, disable_pbar=True, seed=seed, **kwargs
        )
    sigmas = kwargs.pop("sigmas", None)
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    return comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, *conds, latent, disable_pbar=True, seed=seed, **kwargs
    )


def ours(**settings):
    """The node's sampler; who names an order names a method too."""
    if "order" in settings and not settings.get("compatible"):
        settings = {"method": "newton", **settings}
    return Node().get_sampler(**{**DEFAULTS, **settings})[0]


def test_it_is_in_the_lists_and_the_built_in_is_untouched():
    assert "er_sde_fast" in comfy.samplers.KSampler.SAMPLERS and "er_sde_fast" in comfy.samplers.KSAMPLER_NAMES
    assert comfy.samplers.KSampler.SAMPLERS.count("er_sde_fast") == 1
    assert sampling.sample_er_sde is BUILT_IN
    result = sample("EPS", "er_sde_fast")
    assert result.isfinite().all() and torch.equal(result, sample("EPS", ours()))


@pytest.mark.parametrize("name", ["er_sde_fast", None])
def test_the_models_cfg_chooses_the_order(name):
    """Strong guidance gives other weights than weak guidance; a method named gives the same."""
    latent = {cfg: sample("EPS", name or ours(), cfg=cfg) for cfg in (1.5, 7.0)}
    named = {cfg: sample("EPS", ours(method="newton"), cfg=cfg) for cfg in (1.5, 7.0)}
    assert torch.equal(latent[1.5], named[1.5]) and not torch.equal(latent[7.0], named[7.0])


def built_in(solver_type, order, eta, s_noise=1.0):
    """What ComfyUI's own node makes; where it is of a version that ignores eta for ER-SDE, its sampler with that strength."""
    made = SamplerER_SDE().get_sampler(solver_type, order, eta, s_noise)
    sampler = getattr(made, "args", made)[0]
    if solver_type == "ER-SDE" and sampler.extra_options["noise_scaler"] is None:
        sampler.extra_options["noise_scaler"] = lambda l: l * (torch.exp(l**0.3) + 10) ** eta
        sampler.extra_options["s_noise"] *= eta > 0
    return sampler


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "solver_type, eta",
    [*(("ER-SDE", eta) for eta in (1.0, 0.0, 0.4, 2.5)), *(("Reverse-time SDE", eta) for eta in (1.0, 0.0, 0.7)), ("ODE", 1.0)],
)
def test_compatible_makes_the_built_in_images(kind, order, solver_type, eta):
    """To float32's rounding: the built-in sampler takes five weights and five sums a step in float32, 20 steps of which are 200
    roundings of 2^-24, and the model passes them on as they are."""
    expected = sample(kind, built_in(solver_type, order, eta))
    got = sample(kind, ours(solver_type=solver_type, eta=eta, order=order, compatible=True))
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error < 200 * EPS, error / EPS
    exact = sample(kind, ours(solver_type=solver_type, eta=eta, order=order))
    if order > 1:
        assert (exact - expected).abs().max() > 10 * (got - expected).abs().max()  # the switch is what makes them agree


def test_the_paper_rule_makes_nearly_the_built_in_images():
    expected = sample("EPS", "er_sde")
    assert (sample("EPS", ours(method="taylor")) - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_portable_noise_does_not_depend_on_the_batch_behind_it(kind):
    settings = {"noise": "portable", "method": "newton", "order": 4, "node_scale": 5.0}
    two, again = sample(kind, ours(**settings)), sample(kind, ours(**settings))
    assert torch.equal(two, again) and not torch.equal(two, sample(kind, ours(**settings), seed=12))
    assert not torch.equal(two, sample(kind, ours(**{**settings, "noise": DEFAULTS["noise"]})))


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
@pytest.mark.parametrize("images", [[2], [3, 1], [1, 2, 3]])
def test_portable_noise_follows_the_image(kind, images):
    """An image of a batch made again alone, or in another place, by the numbers that Latent From Batch keeps."""
    sampler, latent = ours(noise="portable"), {"samples": torch.zeros(4, 4, 8, 8)}
    whole = sample(kind, sampler, batch=4)
    parts = [nodes.LatentFromBatch().frombatch(latent, image, 1)[0] for image in images]
    numbers = [number for part in parts for number in part["batch_index"]]
    got = sample(kind, sampler, batch=len(images), noise_inds=numbers)
    torch.testing.assert_close(got, whole[images], rtol=1e-4, atol=1e-4)


def test_sampler_by_its_options():
    """As other nodes make it: by name, with options."""
    by_name = comfy.samplers.ksampler("er_sde_fast", {"eta": 0.3, "compatible": True})
    assert torch.equal(sample("EPS", by_name), sample("EPS", ours(eta=0.3, compatible=True)))
    ode = sample("EPS", comfy.samplers.ksampler("er_sde_fast", {"eta": 0.0}))
    assert torch.equal(ode, sample("EPS", ours(solver_type="ODE")))


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_cfg_pp(kind):
    """At cfg 1 guidance does nothing, so the samples are the same; above it they differ."""
    torch.testing.assert_close(
        sample(kind, "er_sde_fast_cfg_pp", cfg=1.0), sample(kind, "er_sde_fast", cfg=1.0), rtol=1e-3, atol=1e-3
    )
    assert sample(kind, "er_sde_fast_cfg_pp", cfg=1.5).isfinite().all()
    assert "er_sde_fast_cfg_pp" in comfy.samplers.KSampler.SAMPLERS


@pytest.mark.parametrize("kind", TYPES)
def test_a_window_of_noise(kind):
    """The node's window by the model's own times: all of them, none, and the middle."""
    whole, ode = sample(kind, ours()), sample(kind, ours(solver_type="ODE"))
    assert torch.equal(sample(kind, ours(noise_start=0.0, noise_end=1.0)), whole)
    torch.testing.assert_close(sample(kind, ours(noise_start=1.0, noise_end=1.0)), ode, rtol=1e-5, atol=1e-5)
    middle = sample(kind, ours(noise_start=0.2, noise_end=0.8))
    assert not torch.equal(middle, whole) and not torch.equal(middle, ode) and middle.isfinite().all()


@pytest.mark.parametrize("compatible", [False, True])
def test_a_flow_that_starts_an_ulp_above_1(compatible):
    levels = [torch.tensor([start, 0.8, 0.5, 0.2, 0.0]) for start in (1.0, 1.0000001)]
    exact, rounded = (sample("FLOW", ours(compatible=compatible), sigmas=sigmas) for sigmas in levels)
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_callbacks_previews_and_options(kind):
    """The callback sees every step's prediction, and the model its options."""
    for sampler in ("er_sde", "er_sde_fast"):
        model, seen = tiny_model(kind), []
        model.model_options["transformer_options"] = {"a patch": 7}
        sample(
            kind, sampler, 5, model=model, callback=lambda i, denoised, x, total, seen=seen: seen.append((i, denoised, total))
        )
        assert [(i, total) for i, _, total in seen] == [(i, 5) for i in range(5)]
        assert all(denoised.shape == (2, 4, 8, 8) for _, denoised, _ in seen)
        assert all(options["a patch"] == 7 for options in model.model.diffusion_model.seen)


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_a_mask_keeps_the_rest_of_the_image(kind):
    latent, mask = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    result = sample(kind, "er_sde_fast", latent_image=latent, noise_mask=mask, denoise=0.7)
    torch.testing.assert_close(result[..., :3], latent[..., :3], rtol=1e-4, atol=1e-4)
    assert (result[..., 5:] - latent[..., 5:]).abs().mean() > 0.1


def test_cancelling():
    def cancel(i, *_):
        if i == 2:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample("EPS", "er_sde_fast", callback=cancel)


def test_nothing_to_sample():
    """denoise 0 leaves no sigmas: the latent comes back."""
    latent = torch.randn(1, 4, 8, 8)
    model = mock.MagicMock()
    assert sampling.sample_er_sde_fast(model, latent, torch.FloatTensor([])) is latent


def test_settings_that_exclude_each_other():
    with pytest.raises(ValueError, match="compatible needs"):
        ours(compatible=True, noise="portable")
    with pytest.raises(ValueError, match="order must be 1 to 3"):
        sample("EPS", ours(order=5, method="taylor"))


@pytest.mark.parametrize(("kind", "process"), [("EPS", "ve"), ("V_PREDICTION", "vp"), ("FLOW", "flow")])
def test_a_plan_from_the_folder_of_models(kind, process, tmp_path):
    """Its sampler at its sigmas gives what the node of settings gives at the same."""
    import folder_paths

    from ersde_fast import er_sde_plan

    levels = torch.tensor([0.93, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
    folder_paths.folder_names_and_paths["ersde_plans"][0].append(str(tmp_path))
    er_sde_plan(levels, process=process).save(tmp_path / f"{process}.safetensors")
    node = nodes.NODE_CLASS_MAPPINGS["SamplerERSDEPlan"]
    assert f"{process}.safetensors" in node.INPUT_TYPES()["required"]["plan"][0]
    sampler, sigmas = node().get_sampler(f"{process}.safetensors", "ComfyUI's (torch)")
    assert len(sigmas) == 5 and sigmas[-1] == 0
    torch.testing.assert_close(sample(kind, sampler, sigmas=sigmas), sample(kind, ours(), sigmas=sigmas), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="sigmas must be the plan's"):
        sample(kind, sampler, 4)
