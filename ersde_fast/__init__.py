"""ersde-fast: the ER-SDE sampler's step (arXiv 2309.06169) as one fused kernel, with exact weights."""

import importlib
from pathlib import Path

# In a checkout kernels/ lies beside this folder. It has no __init__.py, or transformers would take it for Hugging Face's package
# of that name wherever the checkout is on the path; but editable installations map only folders that have one.
if (Path(__file__).parents[1] / "kernels" / "er_sde_step.py").exists():
    __path__.append(str(Path(__file__).parents[1]))

from .backends import available_backends
from .calibrate import calibrate_plan
from .draw import portable_noise, torch_noise
from .log_prob import step_log_prob
from .noise_scaler import reverse_time_sde
from .plan import Plan, PlanStack, er_sde_plan, stack_plans
from .sample import sample_er_sde
from .schedules import place_sigmas
from .step import fast_step, reference_step

__version__ = "0.2.0"


ELSEWHERE = {  # for who looks for them here
    "distributed": ("generate", "load_samples", "fast_step_dtensor"),
    "graph": ("SamplingGraph", "StepGraph"),
    "integrations.diffusers": ("ERSDEScheduler",),
    "integrations.er_sde_solver": ("ER_SDE_Solver",),
    "schedules": ("karras_sigmas", "exponential_sigmas", "uniform_log_snr_sigmas", "flow_sigmas"),
}


def __getattr__(name: str):
    """The parts that are imported when they are first used."""
    if name in ("distributed", "graph", "rl"):
        return importlib.import_module(f".{name}", __name__)
    where = next((f": from {__name__}.{part} import {name}" for part, names in ELSEWHERE.items() if name in names), "")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{where}")


__all__ = [
    "Plan",
    "PlanStack",
    "available_backends",
    "calibrate_plan",
    "er_sde_plan",
    "fast_step",
    "place_sigmas",
    "portable_noise",
    "reference_step",
    "reverse_time_sde",
    "sample_er_sde",
    "stack_plans",
    "step_log_prob",
    "torch_noise",
]
