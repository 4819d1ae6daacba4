"""A plan that is kept, such as a calibrated one, in the config of ERSDEScheduler: as JSON, run on the scheduler's own process.

The config holds the plan itself, not only its file's name, so it is saved and loaded with the pipeline, also on other machines.
"""

import math
import os

import numpy as np

from ..plan import Plan
from .diffusers_levels import BetaLevels, FlowLevels

# What a plan says already.
SAID_BY_A_PLAN = (
    "solver_order", "noise_scaler", "method", "node_scale", "integration_points", "s_noise", "eta", "eta_window", "guidance_scale",
    "lower_order_final", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"
)  # fmt: skip
KEYS = ("plan_file", "plan")
CLOSE = 1e-3  # how far a level may lie outside of the training schedule, relative: pilots round its ends


def as_config(plan: Plan | str | os.PathLike) -> dict[str, list]:
    """A plan, or that of a file, as JSON holds it to the bit."""
    if not isinstance(plan, (Plan, str, os.PathLike)):
        raise TypeError(f"plan must be a Plan or the path of a file of Plan.save, got {type(plan).__name__}")
    plan = (plan if isinstance(plan, Plan) else Plan.load(plan)).predicting("sample").to("cpu")
    if not plan.weights.isfinite().all():
        raise ValueError("plan has a step that cannot be: plan.check() says why")
    return {"sigmas": plan.sigmas.tolist(), "alphas": plan.alphas.tolist(), "weights": plan.weights.tolist()}


def kept_plan(config, not_given: dict) -> Plan | None:
    """The plan of a config; None where it has none.

    Args:
        not_given: what each key is where it is not given.

    Raises:
        ValueError, TypeError: for a key that says otherwise, or what is no plan.
    """
    said = config.plan
    if said is None:
        return None
    for key in SAID_BY_A_PLAN:
        if config[key] != not_given[key]:
            raise ValueError(f"{key}={config[key]!r} is what the config's plan says already: leave it out, or the plan")
    if not isinstance(said, dict) or said.keys() != {"sigmas", "alphas", "weights"}:
        raise TypeError(f"plan must be as ERSDEScheduler.from_plan puts it into a config, got {said!r}")
    return Plan.from_weights(said["weights"], said["sigmas"], said["alphas"])


def place(plan: Plan, levels_of) -> tuple[np.ndarray, np.ndarray]:
    """The levels of a plan's run [num_steps + 1], and its times, as the model's scheduler counts them."""
    er_lambdas = plan.er_lambdas.numpy()
    first, last = er_lambdas[0], er_lambdas[:-1].min()
    if isinstance(levels_of, FlowLevels):
        levels = np.where(np.isinf(er_lambdas), 1.0, er_lambdas / (1 + np.where(np.isinf(er_lambdas), 0.0, er_lambdas)))
        return levels, levels_of.times(levels[:-1])
    smallest, largest = levels_of.er_lambdas[[0, -1]] if isinstance(levels_of, BetaLevels) else (0.0, math.inf)
    if math.isinf(first) or first > largest * (1 + CLOSE) or last < smallest * (1 - CLOSE):
        raise ValueError(
            f"plan goes from sigma / alpha {first:g} to {last:g}, and the model is trained from {largest:g} to {smallest:g}: "
            f"calibrate one with a pilot between these"
        )
    return er_lambdas, levels_of.times(er_lambdas[:-1])


def check_run(plan: Plan, num_inference_steps: int | None, sigmas, timesteps) -> None:
    """Raises for a run that is not the plan's. Pipelines of flows pass even sigmas where their users pass none."""
    count = num_inference_steps if sigmas is None else len(sigmas)
    if timesteps is not None:
        raise ValueError("timesteps must be left out: the config's plan has its own")
    if sigmas is not None and not np.allclose(
        np.asarray(sigmas, dtype=np.float64), np.linspace(1, 1 / count, count), atol=1e-5
    ):
        raise ValueError("sigmas must be left out: the config's plan has its own")
    if count != plan.num_steps or num_inference_steps not in (None, count):
        raise ValueError(
            f"num_inference_steps must be {plan.num_steps}, for which the config's plan was made, got "
            f"{count if num_inference_steps is None else num_inference_steps}: calibrate one for other counts"
        )
