"""A custom node package for ComfyUI: the sampler `er_sde_fast` in every list of samplers, and a node with its settings.

ComfyUI loads it from a folder in custom_nodes that holds `from ersde_fast.integrations.comfyui import *`, or by the entry point
`comfyui.custom_nodes` of the installed package.
"""

import math
import os
from numbers import Real

import torch
from torch import Tensor

try:
    import comfy.model_patcher
    import comfy.model_sampling
    import comfy.samplers
    import folder_paths
    from comfy.k_diffusion import sampling as k_diffusion_sampling
except ImportError as error:
    raise ImportError(
        "ersde_fast.integrations.comfyui is a custom node package: it is imported by ComfyUI alone, from a copy of "
        "examples/comfyui_ersde_fast in its folder custom_nodes"
    ) from error

from ersde_fast.choice import NODE_SCALE, ORDER
from ersde_fast.integrations.kept_plans import on_levels
from ersde_fast.plan import Plan
from ersde_fast.sample import sample_er_sde

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NAME = "er_sde_fast"
OFFSET = 1e-4  # how far the built-in sampler moves the start of a flow off sigma 1, as a share of the run
SOLVERS = {"ER-SDE": "sde_5", "Reverse-time SDE": "sde", "ODE": "ode"}
TORCH, PORTABLE = "ComfyUI's (torch)", "portable"
BY_GUIDANCE = "by cfg"
WINDOW = {
    "min": 0.0,
    "max": 1.0,
    "step": 0.001,
    "tooltip": "noise is added between these shares of the model's times, as SamplerSASolver's sde_start_percent and sde_end_percent",
}
SEARCHED = 256  # images of a batch whose numbers are found
PLANS = "ersde_plans"  # the folder of plans in ComfyUI's folder of models


@torch.no_grad()
def sample_er_sde_fast(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback=None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler=None,
    noise_scaler=None,
    max_stage: int | None = None,
    method: str | None = None,
    node_scale: float | None = None,
    eta: float = 1.0,
    noise_start: float = 0.0,
    noise_end: float = 1.0,
    portable: bool = False,
    compatible: bool = False,
    cfg_pp: bool = False,
) -> Tensor:
    """`sample_er_sde` as a ComfyUI sampler: asks the model for its schedule, and for the seed of the run.

    Args:
        model, x, sigmas, extra_args, callback, disable, s_noise, noise_sampler: ComfyUI's; x is [batch, ...], sigmas
            [num_steps + 1].
        noise_scaler, max_stage, method, node_scale, eta: see `ersde_fast.er_sde_plan`. Where none of order, method and node_scale
            is named, the model's cfg chooses them.
        noise_start, noise_end: the window of the noise, as shares of the model's times from noise to data: a step whose end lies
            outside has eta 0.
        portable: draws the portable stream at the run's seed and the image's number in its batch, the same bits on every
            machine; else the noise is what torch draws at the seed at which ComfyUI's own samplers draw theirs.
        compatible: the built-in er_sde again, to float32 rounding: its sums of 200 points and its start of flows off sigma 1.
        cfg_pp: the steps by CFG++, as the built-in samplers of that name: at the model's cfg, from its prediction and its
            unconditional one.

    Returns:
        The sample, [batch, ...].

    Raises:
        ValueError: for settings that exclude each other, and portable noise without the run's seed.

    Source: arXiv 2309.06169, and ComfyUI's built-in er_sde where compatible.
    """
    if len(sigmas) < 2:
        return x
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    if flow and compatible and sigmas[0] >= 1:
        sigmas = torch.cat([sigmas.new_tensor([model_sampling.percent_to_sigma(OFFSET)]), sigmas[1:]])
    if not 0 <= noise_start <= noise_end <= 1:
        raise ValueError(f"noise_start and noise_end must be from 0 to 1, in this order, got {noise_start} and {noise_end}")
    if (noise_start, noise_end) != (0, 1):
        first, last = map(model_sampling.percent_to_sigma, (noise_start, noise_end))
        eta = [eta if last <= sigma <= first else 0.0 for sigma in sigmas[1:].tolist()]
    source = noise_source(model, x, extra_args, noise_sampler, portable)
    called = (model, extra_args)
    if cfg_pp:
        source["cfg_pp"] = 1.0  # the model's prediction is guided already
        called = (with_unconditional(model, extra_args or {}), None)
    named = compatible or any(value is not None for value in (max_stage, method, node_scale))
    return sample_er_sde(
        called[0], x, sigmas, called[1], callback, disable, s_noise * getattr(model_sampling, "noise_scale", 1.0),
        noise_scaler=noise_scaler, max_stage=max_stage, process="flow" if flow else "ve", method=method, node_scale=node_scale,
        integration_points=200 if compatible else None, eta=eta, guidance=None if named else guidance_of(model.inner_model),
        **source,
    )  # fmt: skip


def noise_source(model, x: Tensor, extra_args: dict | None, noise_sampler, portable: bool) -> dict:
    """The argument of `sample_er_sde` that names the noise of a run of ComfyUI."""
    seed = (extra_args or {}).get("seed")
    if portable:
        if seed is None or noise_sampler is not None:
            raise ValueError(f"portable noise needs the run's seed and no noise_sampler, got seed {seed} and {noise_sampler}")
        return {"seed": [(seed, number) for number in image_numbers(getattr(model, "noise", None), seed, len(x))]}
    if noise_sampler is not None:
        return {"noise_sampler": noise_sampler}
    if seed is None:
        return {}
    seed += x.device.type == "cpu"  # ComfyUI's latents come from the CPU's generator at the seed itself
    return {"generator": torch.Generator(x.device).manual_seed(seed % 2**64)}


@torch.no_grad()
def sample_plan_fast(
    model, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback=None, disable=None, *, plan: Plan, portable=False
) -> Tensor:
    """A plan as a ComfyUI sampler, on the plan's own sigmas.

    Args:
        model, x, sigmas, extra_args, callback, disable: ComfyUI's.
        plan: of a flow for models of flows, else of any other process.
        portable: as for `sample_er_sde_fast`.
    """
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    if flow != (plan.process == "flow"):
        raise ValueError(
            f"plan must be {'of a flow, as the model is' if flow else 'of no flow, as the model is none'}, got one of process {plan.process}"
        )
    levels = sigmas_of(plan)
    if len(sigmas) != len(levels) or not torch.allclose(sigmas.double().cpu(), levels, rtol=1e-5, atol=0):
        raise ValueError(
            f"sigmas must be the plan's, the second output of its node, got {[round(s, 4) for s in sigmas.tolist()]} for "
            f"{[round(s, 4) for s in levels.tolist()]}: a plan is made for all of its steps"
        )
    run = on_levels(plan, 1 - levels if flow else torch.ones_like(levels), levels)
    if (scale := getattr(model_sampling, "noise_scale", 1.0)) != 1:
        weights = run.weights
        weights[:, -1] *= scale
        run = Plan.from_weights(weights, run.sigmas, run.alphas)
    source = noise_source(model, x, extra_args, None, portable)
    return sample_er_sde(model, x, None, extra_args, callback, disable, plan=run, **source)


def sigmas_of(plan: Plan) -> Tensor:
    """A plan's levels as ComfyUI's sigmas, float64: of a flow sigma, else sigma / alpha."""
    return plan.sigmas if plan.process == "flow" else plan.er_lambdas


def with_unconditional(model, extra_args: dict):
    """A model of (x, sigma) to the pair of its prediction, guided at its own cfg, and the unconditional one."""
    seen = {}

    def post_cfg(args: dict) -> Tensor:
        if args.get("uncond") is None:
            raise ValueError(f"{NAME}_cfg_pp needs a negative condition, which this guider does not have: use {NAME}")
        seen["unconditional"] = args["uncond_denoised"]
        return args["denoised"]

    options = comfy.model_patcher.set_model_options_post_cfg_function(
        extra_args.get("model_options", {}).copy(), post_cfg, disable_cfg1_optimization=True
    )

    def both(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised = model(x, sigma, **{**extra_args, "model_options": options})
        return denoised, seen.pop("unconditional")

    return both


def sample_er_sde_fast_cfg_pp(*args, **kwargs) -> Tensor:
    """`sample_er_sde_fast` with the steps by CFG++."""
    return sample_er_sde_fast(*args, **kwargs, cfg_pp=True)


def guidance_of(guider) -> float | None:
    """The largest scale of a guider's guidance. None where it has none: the network may have guidance distilled into it."""
    scales = (getattr(guider, name, None) for name in ("cfg", "cfg1", "cfg2"))
    numbers = [float(scale) for scale in scales if isinstance(scale, (Real, Tensor))]
    return max((scale for scale in numbers if 1 < scale < math.inf), default=None)


def image_numbers(noise: Tensor | None, seed: int, batch: int) -> list[int]:
    """Each image's number in the batch that it was first part of, which "Latent From Batch" and its kin keep (`batch_index`).

    Samplers are not told it. But ComfyUI draws an image's initial noise by it, one image after another, so the noise tells. Where
    the noise is other than that, of nodes that make their own, or of stages that add none, an image has the number of its place.

    Args:
        noise: [batch, ...] the initial noise, before it is scaled.
    """
    if noise is None or len(noise) != batch:
        return list(range(batch))
    starts = noise.flatten(1)[:, :64].float().cpu()
    if not starts.any():  # a stage that adds none
        return list(range(batch))
    generator = torch.Generator("cpu").manual_seed(seed)

    def where_drawn(images: int) -> Tensor:
        """Which of the images the generator draws next: half-precision latents round their noise."""
        drawn = torch.randn((images, *noise.shape[1:]), generator=generator, dtype=torch.float32, device="cpu")
        return ((starts - drawn.flatten(1)[:, :64]).abs() < 0.05).all(1)

    if where_drawn(batch).all():
        return list(range(batch))
    generator.manual_seed(seed)
    numbers = torch.full((batch,), -1, device="cpu")
    for number in range(SEARCHED):
        numbers[where_drawn(1)] = number
        if (numbers >= 0).all():
            return numbers.tolist()
    return list(range(batch))


class SamplerERSDEFast:
    """The node: a SAMPLER for SamplerCustom and its relatives."""

    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "get_sampler"
    RETURN_TYPES = ("SAMPLER",)
    DESCRIPTION = "ER-SDE (arXiv 2309.06169) with exact weights, one fused kernel a step."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "solver_type": (list(SOLVERS),),
                "order": ("INT", {"default": ORDER, "min": 1, "max": 5, "tooltip": "newton goes to 5, taylor to 3"}),
                "eta": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.01,
                        "round": False,
                        "tooltip": "strength of the noise of ER-SDE and Reverse-time SDE: 0 makes either the ODE",
                    },
                ),
                "s_noise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01, "round": False}),
                "method": (
                    [BY_GUIDANCE, "newton", "taylor"],
                    {
                        "tooltip": "order and node_scale chosen for the model's cfg, or what the order and node_scale here say, to the "
                        "order's full accuracy (newton) or by the paper's rule (taylor)"
                    },
                ),
                "node_scale": (
                    "FLOAT",
                    {
                        "default": NODE_SCALE,
                        "min": 0.0,
                        "max": 1e6,
                        "step": 0.1,
                        "round": False,
                        "tooltip": "newton alone; 0 is infinity",
                    },
                ),
                "noise": (
                    [TORCH, PORTABLE],
                    {
                        "tooltip": "portable is the same on every machine and follows the image: one of a batch, made again alone "
                        "behind Latent From Batch, has its noise (up to image 256; with noise of other nodes, or none, by its place)"
                    },
                ),
                "compatible": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "the images of the built-in er_sde: its rule instead of method and node_scale",
                    },
                ),
            },
            "optional": {  # behind all others, which workflows that were saved before know by their place
                "noise_start": ("FLOAT", WINDOW | {"default": 0.0}),
                "noise_end": ("FLOAT", WINDOW | {"default": 1.0}),
            },
        }

    def get_sampler(
        self, solver_type, order, eta, s_noise, method, node_scale, noise, compatible, noise_start=0.0, noise_end=1.0
    ):
        if compatible and noise != TORCH:
            raise ValueError(f"compatible needs {TORCH} noise, got {noise}")
        if compatible and order > 3:
            raise ValueError(f"compatible needs order 1 to 3, which the built-in er_sde has, got {order}")
        options = {"s_noise": s_noise, "noise_scaler": SOLVERS[solver_type], "max_stage": order, "eta": eta}
        options |= {"noise_start": noise_start, "noise_end": noise_end, "portable": noise == PORTABLE, "compatible": compatible}
        if method == BY_GUIDANCE and not compatible:
            if (order, node_scale) != (ORDER, NODE_SCALE):
                raise ValueError(
                    f'method "{BY_GUIDANCE}" chooses order and node_scale: leave them at {ORDER} and {NODE_SCALE:g}, got {order} '
                    f'and {node_scale:g}, or set method to "newton"'
                )
            del options["max_stage"]
        elif not compatible:
            options |= {"method": method, "node_scale": (node_scale or math.inf) if method == "newton" else None}
        return (comfy.samplers.KSAMPLER(sample_er_sde_fast, options),)


class SamplerERSDEPlan:
    """The node of plans that are kept, such as calibrated ones: a SAMPLER, and the SIGMAS that it wants."""

    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "get_sampler"
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    DESCRIPTION = f"A plan of ersde-fast from models/{PLANS}, such as one calibrated to the model: its sampler, and the sigmas to use it with."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "plan": (folder_paths.get_filename_list(PLANS), {"tooltip": f"a file of Plan.save in models/{PLANS}"}),
                "noise": ([TORCH, PORTABLE],),
            }
        }

    @classmethod
    def IS_CHANGED(cls, plan, noise):
        return os.path.getmtime(folder_paths.get_full_path_or_raise(PLANS, plan))

    def get_sampler(self, plan, noise):
        kept = Plan.load(folder_paths.get_full_path_or_raise(PLANS, plan))
        if not sigmas_of(kept).isfinite().all():
            raise ValueError(f"plan {plan} starts at alpha 0, which only models of flows do, and is of process {kept.process}")
        sampler = comfy.samplers.KSAMPLER(sample_plan_fast, {"plan": kept, "portable": noise == PORTABLE})
        return (sampler, sigmas_of(kept).float())


def register() -> None:
    """Puts the samplers into ComfyUI's lists and the folder of plans beside those of models, once."""
    if PLANS not in folder_paths.folder_names_and_paths:
        folder_paths.folder_names_and_paths[PLANS] = ([os.path.join(folder_paths.models_dir, PLANS)], {".safetensors"})
    for name, function in ((NAME, sample_er_sde_fast), (f"{NAME}_cfg_pp", sample_er_sde_fast_cfg_pp)):
        setattr(k_diffusion_sampling, f"sample_{name}", function)
        for names in (comfy.samplers.KSAMPLER_NAMES, comfy.samplers.SAMPLER_NAMES):
            if name not in names:
                names.append(name)


NODE_CLASS_MAPPINGS = {"SamplerERSDEFast": SamplerERSDEFast, "SamplerERSDEPlan": SamplerERSDEPlan}
NODE_DISPLAY_NAME_MAPPINGS = {"SamplerERSDEFast": "SamplerER_SDE (fast)", "SamplerERSDEPlan": "SamplerER_SDE (plan from file)"}
register()
