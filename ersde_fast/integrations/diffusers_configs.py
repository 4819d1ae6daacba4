"""What ERSDEScheduler makes of the config of another scheduler of diffusers: its levels and its treatment of outputs, or an error."""

import difflib
import inspect
import json
from numbers import Real

import diffusers
from diffusers.configuration_utils import FrozenDict

from ..choice import ORDER
from .diffusers_levels import (
    PREDICTION_TYPES,
    BetaLevels,
    CosineLevels,
    DPMFlowLevels,
    EDMLevels,
    FlowLevels,
    LTXLevels,
    UniPCFlowLevels,
    is_spaced,
)
from .diffusers_plans import KEYS, SAID_BY_A_PLAN

# Each class whose levels are known, to what makes them: without and with use_flow_sigmas. Where a config does not name its class,
# the first whose keys it holds is taken.
LEVELS_OF = {
    "DPMSolverMultistepScheduler": (BetaLevels, DPMFlowLevels),
    "FlowMatchEulerDiscreteScheduler": (FlowLevels, FlowLevels),
    "UniPCMultistepScheduler": (BetaLevels, UniPCFlowLevels),
    "EulerDiscreteScheduler": (BetaLevels, BetaLevels),
    "EulerAncestralDiscreteScheduler": (BetaLevels, BetaLevels),
    "DDIMScheduler": (BetaLevels, BetaLevels),
    "DDIMParallelScheduler": (BetaLevels, BetaLevels),
    "DDPMScheduler": (BetaLevels, BetaLevels),
    "DDPMParallelScheduler": (BetaLevels, BetaLevels),
    "PNDMScheduler": (BetaLevels, BetaLevels),
    "LMSDiscreteScheduler": (BetaLevels, BetaLevels),
    "HeunDiscreteScheduler": (BetaLevels, BetaLevels),
    "KDPM2DiscreteScheduler": (BetaLevels, BetaLevels),
    "KDPM2AncestralDiscreteScheduler": (BetaLevels, BetaLevels),
    "DPMSolverSDEScheduler": (BetaLevels, BetaLevels),
    "DPMSolverSinglestepScheduler": (BetaLevels, DPMFlowLevels),
    "DEISMultistepScheduler": (BetaLevels, DPMFlowLevels),
    "SASolverScheduler": (BetaLevels, DPMFlowLevels),
    "CogVideoXDDIMScheduler": (BetaLevels, BetaLevels),
    "CogVideoXDPMScheduler": (BetaLevels, BetaLevels),
    "FlowMatchHeunDiscreteScheduler": (FlowLevels, FlowLevels),
    "LTXEulerAncestralRFScheduler": (LTXLevels, LTXLevels),
    "EDMDPMSolverMultistepScheduler": (EDMLevels, EDMLevels),
    "EDMEulerScheduler": (EDMLevels, EDMLevels),
    "CosineDPMSolverMultistepScheduler": (CosineLevels, CosineLevels),
}

DISTILLED = "samples a distilled model, whose few steps are its own"
TOKENS = "samples discrete tokens"
INVERSE = "runs from data to noise"
REFUSED = {
    "LCMScheduler": DISTILLED,
    "TCDScheduler": DISTILLED,
    "SCMScheduler": DISTILLED,
    "CMStochasticIterativeScheduler": DISTILLED,
    "ConsistencyDecoderScheduler": DISTILLED,
    "FlowMatchLCMScheduler": DISTILLED,
    "FlowMapEulerDiscreteScheduler": DISTILLED,
    "HeliosScheduler": "samples a pyramid of sizes, in stages of its own",
    "HeliosDMDScheduler": DISTILLED,
    "PiflowScheduler": DISTILLED,
    "AmusedScheduler": TOKENS,
    "VQDiffusionScheduler": TOKENS,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "DDIMInverseScheduler": INVERSE,
    "DPMSolverMultistepInverseScheduler": INVERSE,
    "RePaintScheduler": "repeats steps around a mask, which its pipeline relies on",
    "UnCLIPScheduler": "learns the variance of each step, which its pipeline relies on",
    "DDPMWuerstchenScheduler": "counts continuous times from 1 to 0, the last of which its pipeline leaves out",
    "IPNDMScheduler": "has the levels of Dance Diffusion, which no other scheduler of diffusers has",
    "KarrasVeScheduler": "adds noise before the model is called, which its pipeline relies on",
    "ScoreSdeVeScheduler": "corrects between steps, which its pipeline relies on",
    "ScoreSdeVpScheduler": "returns two samples a step, which its pipeline relies on",
    "MiniMaxH3Scheduler": "counts its last level as a step, and its times from 0 to 1",
    "RFD4ProteinaScheduler": "rescales the score as it samples",
}

CHOICES = {  # of keys
    "prediction_type": tuple(PREDICTION_TYPES),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
    "sigma_schedule": ("karras", "exponential"),
}

# Keys that the others do not have.
OWN = (
    "noise_scaler",
    "method",
    "node_scale",
    "integration_points",
    "s_noise",
    "eta",
    "eta_window",
    "guidance_scale",
    "seed",
    *KEYS,
)
CHOSEN = ("solver_order", "method", "node_scale", "integration_points", "lower_order_final")  # by guidance_scale, or named
OF_SOLVERS = ("solver_order", "lower_order_final", "s_noise", "eta")  # read where they are not their class's default
WRITTEN_LATER = ("sigma_min", "sigma_max", "sigma_data", "final_sigmas_type")  # by Cosmos Predict2's pipeline, into any config
ANOTHER_NAME = {"noise_sampler_seed": "seed"}
SHIFTS = {"shift": "flow_shift", "flow_shift": "shift"}  # each the other's name, in other classes
OF_LEVELS = set().union(*(levels.reads for pair in LEVELS_OF.values() for levels in pair))


def check_values(config) -> None:
    """Raises for a value of a config of ERSDEScheduler that is none of its key."""
    for key, known in CHOICES.items():
        if config[key] not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {config[key]!r}")
    exponential = config.use_exponential_sigmas or config.use_lu_lambdas
    if sum(map(bool, (config.use_karras_sigmas, exponential, config.use_beta_sigmas))) > 1:
        raise ValueError("only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be True")
    if not isinstance(config.noise_scaler, str):
        raise ValueError(f"noise_scaler must be a name in a config, which is saved as JSON, got {config.noise_scaler!r}")
    if not 0 <= config.dynamic_thresholding_ratio <= 1:
        raise ValueError(f"dynamic_thresholding_ratio must be from 0 to 1, got {config.dynamic_thresholding_ratio!r}")
    if not (isinstance(config.num_train_timesteps, int) and config.num_train_timesteps > 0):
        raise ValueError(f"num_train_timesteps must be a whole number above 0, got {config.num_train_timesteps!r}")


def levels_class(config) -> type:
    """What makes the levels of a config of ERSDEScheduler."""
    name = config.levels_of
    if name is None:
        name = "DPMSolverMultistepScheduler"
        if config.prediction_type == "flow_prediction" and not config.use_flow_sigmas:
            name = "FlowMatchEulerDiscreteScheduler"
    _check_class(name)
    return LEVELS_OF[name][bool(config.use_flow_sigmas)]


def plan_options(config, num_steps: int) -> dict:
    """The keyword arguments of `er_sde_plan` in a config of ERSDEScheduler, for a run of that many steps."""
    order, eta, window = config.solver_order, config.eta, config.eta_window
    named = [key for key in CHOSEN if config[key]]
    if config.guidance_scale is not None and named:
        raise ValueError(
            f"guidance_scale={config.guidance_scale!r} chooses the order of each step, which {', '.join(named)} names too: "
            f"leave out one or the other"
        )
    if config.lower_order_final:
        order = [min(ORDER if order is None else order, num_steps - i) for i in range(num_steps)]
    if window is not None:
        is_pair = isinstance(window, (list, tuple)) and len(window) == 2 and all(isinstance(share, Real) for share in window)
        if not (is_pair and 0 <= window[0] <= window[1] <= 1):
            raise ValueError(f"eta_window must be [start, end], shares from 0 to 1 in this order, got {window!r}")
        if not isinstance(eta, Real):
            raise ValueError(f"eta_window={window!r} needs an eta that is one number, got {eta!r}")
        eta = [eta if window[0] <= i / num_steps < window[1] else 0.0 for i in range(num_steps)]
    return {
        "order": order,
        "noise_scaler": config.noise_scaler,
        "method": config.method,
        "node_scale": config.node_scale,
        "integration_points": config.integration_points,
        "s_noise": config.s_noise,
        "eta": eta,
        "guidance": config.guidance_scale,
    }


def translated(config: dict, own_keys: set[str], levels_of: str | None, others: dict) -> dict:
    """A config in the keys of ERSDEScheduler. What it leaves out is what its own class takes for it, and what its class does not
    read is not read; the rest of it is kept, so that it can be turned back.

    Args:
        config: of any scheduler of diffusers, or of ERSDEScheduler, which is returned as it is.
        own_keys: the keys of ERSDEScheduler.
        levels_of: the class to take it for; None goes by the config.
        others: keys that are not ersde-fast's and go before those of the config.

    Raises:
        ValueError: naming the class or the key that cannot be followed.
    """
    name = levels_of or _class_of(config)
    renamed = {new: others[old] for old, new in ANOTHER_NAME.items() if old in others}
    if name is None:
        return {**config, **others, **renamed}
    _check_class(name)
    values = {k: v for k, v in config.items() if not k.startswith("_")} | others
    read = _defaults(name)
    if name == "LTXEulerAncestralRFScheduler":  # which asks the scheduler that the pipeline had before
        read = _defaults("FlowMatchEulerDiscreteScheduler") | read
    taken = read | {k: v for k, v in values.items() if k in read or k in OWN or k in WRITTEN_LATER}
    taken |= {new: values[old] for old, new in ANOTHER_NAME.items() if values.get(old) is not None}
    taken = {k: v for k, v in taken.items() if k not in OF_SOLVERS or v != read.get(k)}
    if taken.get("interpolation_type", "linear") != "linear":
        raise ValueError(
            f'interpolation_type must be "linear", got {taken["interpolation_type"]!r}: its levels are one too many'
        )
    if name.startswith("CogVideoX"):
        taken["clip_sample"] = False  # has the key, and does not read it
    if issubclass(LEVELS_OF[name][0], FlowLevels):
        taken["prediction_type"] = "flow_prediction"
    unread = {k: v for k, v in config.items() if k not in own_keys and k != "_use_default_values"}
    return unread | {k: v for k, v in taken.items() if k in own_keys} | {"_class_name": name, "levels_of": name}


def without_rivals(config: dict, keys: dict) -> dict:
    """A config less what says otherwise than keys that go before it: guidance_scale chooses what others name, a plan says all."""
    if any(keys.get(key) is not None for key in KEYS):
        return {key: value for key, value in config.items() if key not in SAID_BY_A_PLAN}
    if keys.get("guidance_scale") is not None:
        return {key: value for key, value in config.items() if key not in CHOSEN}
    named = any(keys.get(key) for key in CHOSEN)
    return {key: value for key, value in config.items() if not (named and key == "guidance_scale")}


def saved(text: str, not_given: dict) -> str:
    """A config's JSON less the keys that are None as if they were not given, for which other classes have numbers."""
    config = json.loads(text)
    left_out = {key for key, value in not_given.items() if value is None and config.get(key) is None}
    return json.dumps({k: v for k, v in config.items() if k not in left_out}, indent=2, sort_keys=True) + "\n"


def check_that_they_are_read(keys: dict, config) -> None:
    """Raises for a key of levels that the levels of a config are not made from."""
    reads = levels_class(config).reads
    for key, value in keys.items():
        if key in OF_LEVELS and key not in reads:
            remedy = f"write {SHIFTS[key]}={value!r}; " if SHIFTS.get(key) in reads else ""
            raise ValueError(f"{key}={value!r} changes nothing: {remedy}these levels are made from {', '.join(sorted(reads))}")
        if key in ("sigma_min", "sigma_max") and "sigma_schedule" not in reads and not is_spaced(config):
            raise ValueError(f"{key}={value!r} needs use_karras_sigmas, use_exponential_sigmas or use_beta_sigmas")


def no_scheduler(config):
    """What is no config, unless it is a scheduler where its config is wanted, which diffusers would look for on its hub."""
    if isinstance(getattr(config, "config", None), dict):
        raise TypeError(
            f"config must be the config of a scheduler, got {type(config).__name__}: write from_config(scheduler.config)"
        )
    return config


def unknown_keys(keys: dict, own_keys: set[str], allowed: bool) -> set[str]:
    """The arguments that are no key of any scheduler; an error with the nearest names where they are not allowed."""
    unknown = keys.keys() - own_keys - known_keys()
    if unknown and not allowed:
        near = {key: difflib.get_close_matches(key, own_keys, 1, 0.8) for key in sorted(unknown)}
        names = ", ".join(f"{key} (write {close[0]})" if close else key for key, close in near.items())
        raise TypeError(f"from_config got {names}: no key of a scheduler; its own are {', '.join(sorted(own_keys))}")
    return unknown


def known_keys() -> set[str]:
    """Of all schedulers of diffusers."""
    return set().union(*(_parameters(name) for name in (*LEVELS_OF, *REFUSED) if hasattr(diffusers, name)))


def _check_class(name: str) -> None:
    if name in REFUSED:
        raise ValueError(f"{name} cannot be replaced by ERSDEScheduler: it {REFUSED[name]}")
    if name not in LEVELS_OF:
        raise ValueError(
            f"{name} is no scheduler whose levels ERSDEScheduler knows: name one that has the same, "
            f'from_config(config, levels_of="DPMSolverMultistepScheduler"), or another of {", ".join(LEVELS_OF)}'
        )


def _class_of(config: dict) -> str | None:
    """The class that a config is of; None is ERSDEScheduler itself."""
    name = config.get("_class_name")
    if isinstance(name, (list, tuple)):
        name = name[-1]
    if name == "ERSDEScheduler" or (name is None and "levels_of" in config):
        return None
    if name is not None:
        return name
    known = {name: set(_parameters(name)) for name in (*LEVELS_OF, *REFUSED) if hasattr(diffusers, name)}
    keys = {k for k in config if any(k in read for read in known.values())}
    if isinstance(config, FrozenDict) or "_use_default_values" in config:  # of a scheduler: it holds every key of its class
        most = max((len(read) for read in known.values() if read <= keys), default=0)
        same = [name for name, read in known.items() if read and read <= keys and len(read) == most]
        if same and all(name in REFUSED for name in same):
            raise ValueError(f"{' or '.join(same)} cannot be replaced by ERSDEScheduler: it {REFUSED[same[0]]}")
        if any(name in REFUSED for name in same):
            raise ValueError(
                f"the config has the keys of {' and of '.join(same)}, and ERSDEScheduler cannot replace all of these: name its class, "
                f'from_config(config, levels_of="FlowMatchHeunDiscreteScheduler")'
            )
        return same[0] if same else None
    if config.get("prediction_type") == "flow_prediction" and not config.get("use_flow_sigmas"):
        return None
    return next((name for name, read in known.items() if keys - set(OWN) <= read), None)


def _parameters(name: str):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {k: p for k, p in parameters.items() if k != "self" and p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}


def _defaults(name: str) -> dict:
    """What a class of diffusers takes for each key that a config leaves out."""
    parameters = _parameters(name)
    if not parameters:
        raise ValueError(f"{name} does not import here, so what its config leaves out is not known: install what it needs")
    return {k: p.default for k, p in parameters.items()}
