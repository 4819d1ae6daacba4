"""Where the schedulers of diffusers put noise levels and times, in float64: one class for each kind of process.

A kind answers what a scheduler asks of its schedule:

    reads                               the keys of a config that its levels are made from
    place(n, sigmas, timesteps, mu)     the levels of a run [n + 1] and the times that the model is given [n]
    at(timesteps)                       the levels of any times that a model may be trained with
    times(levels)                       the times of any levels
    alphas_sigmas(levels)               the signal and the noise level of a sample at these levels
    output(levels, i)                   what a model's output at step i is: a prediction type of fast_step, or the two numbers of
                                        `denoised = p_x x + p_m output`

A level is sigma / alpha, for a flow sigma. `config` is the scheduler's, and is read when it is asked: pipelines write into it.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ..levels import CPU
from ..schedules import karras_sigmas

PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow_prediction": "flow"}
SMALLEST_ALPHA_CUMPROD = 2.0**-24  # stands for 0 at zero terminal SNR, as in diffusers, so that er_lambda stays finite
OF_BETAS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale",
}  # fmt: skip
OF_SPACINGS = {
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max",
}  # fmt: skip


class BetaLevels:
    """Variance preserving, from the betas of a training schedule; timesteps are its indices."""

    init_noise_sigma = 1.0
    reads = OF_BETAS | OF_SPACINGS | {
        "timestep_spacing", "steps_offset", "timestep_type", "final_sigmas_type", "lambda_min_clipped",
    }  # fmt: skip

    def __init__(self, config):
        if config.prediction_type == "flow_prediction":
            raise ValueError(
                'prediction_type "flow_prediction" needs the levels of a flow: use_flow_sigmas=True, or another levels_of'
            )
        self.config = config
        self.er_lambdas = training_er_lambdas(config)

    @property
    def continuous(self) -> bool:
        """Whether the model's time is log(er_lambda) / 4, as Stable Video Diffusion's; in diffusers only v-predictions have it."""
        return self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"

    def training(self) -> tuple[np.ndarray, np.ndarray]:
        levels = self.er_lambdas[::-1]
        return np.append(levels, 0.0), self.times(levels) if self.continuous else np.arange(len(levels) - 1, -1, -1)

    def place(self, n, sigmas, timesteps, mu):
        config, er_lambdas = self.config, self.er_lambdas
        if sigmas is not None:
            levels = sigmas
        elif is_spaced(config):
            levels = _spaced(config, er_lambdas[-1], er_lambdas[0], n)
        elif timesteps is not None:
            levels = self.at(timesteps)
        else:
            clipped = np.searchsorted(np.log(er_lambdas), -config.lambda_min_clipped, side="right")
            indices = _spaced_timesteps(n, clipped, len(er_lambdas), config.timestep_spacing, config.steps_offset)
            levels, timesteps = self._at_indices(indices), None if self.continuous else indices
        if timesteps is None:
            timesteps = self.times(levels)
        last = 0.0 if config.final_sigmas_type == "zero" else min(er_lambdas[0], levels[-1])
        return np.append(levels, last), timesteps

    def times(self, levels: np.ndarray) -> np.ndarray:
        logs = np.log(np.maximum(levels, 1e-10))
        if self.continuous:
            return logs / 4
        return np.interp(logs, np.log(self.er_lambdas), np.arange(len(self.er_lambdas)))

    def at(self, timesteps):
        return np.exp(4 * timesteps) if self.continuous else self._at_indices(timesteps)

    def _at_indices(self, indices: np.ndarray) -> np.ndarray:
        _check_range(indices, 0, len(self.er_lambdas) - 1)
        return np.exp(np.interp(indices, np.arange(len(self.er_lambdas)), np.log(self.er_lambdas)))

    def alphas_sigmas(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        alphas = torch.rsqrt(1 + levels**2)
        return alphas, levels * alphas

    def output(self, levels, i):
        return PREDICTION_TYPES[self.config.prediction_type]


class FlowLevels:
    """Flow matching, as FlowMatchEulerDiscreteScheduler: sigma is the level, and sigma times the training steps the time."""

    init_noise_sigma = 1.0
    whole_times = False
    reads = OF_SPACINGS | {
        "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
        "time_shift_type", "shift_terminal", "invert_sigmas", "final_sigmas_type", "sigma_data",
    }  # fmt: skip

    def __init__(self, config):
        self.config = config

    def training(self) -> tuple[np.ndarray, np.ndarray]:
        train = self.config.num_train_timesteps
        levels = np.arange(train, 0, -1) / train
        if not self.config.use_dynamic_shifting:
            levels = _shifted(levels, self.shift(None))
        return np.append(levels, 0.0), self.times(levels)

    def shift(self, mu: float | None) -> float:
        """The shift of a run; with dynamic shifting the pipeline computes its logarithm, `mu`, from the image's size."""
        config = self.config
        if not config.use_dynamic_shifting:
            return config.shift
        if mu is None:
            raise ValueError("mu is needed where use_dynamic_shifting is on: the pipeline computes it from the image's size")
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def place(self, n, sigmas, timesteps, mu):
        config, shift = self.config, self.shift(mu)
        if sigmas is not None:
            levels = self.given(sigmas, shift)
        elif timesteps is not None:
            levels = self.at(timesteps)
        else:
            levels = self.even(n, shift)
        if config.shift_terminal and (sigmas is not None or timesteps is None):
            if levels[-1] == 1:
                raise ValueError("shift_terminal needs at least 2 steps, got one at level 1")
            levels = 1 - (1 - levels) * (1 - config.shift_terminal) / (1 - levels[-1])
        if is_spaced(config):
            levels = self.spaced(levels)
        if 1 < levels[0] < 1 + 1e-6:  # what a shift's rounding makes of 1
            levels = np.minimum(levels, 1.0)
        elif 1 < levels[0] < 2:
            raise ValueError(f"sigmas must be at most 1 for a flow, got {levels[0]}")
        return np.append(levels, self.last(levels)), self.times(levels) if timesteps is None else timesteps

    def given(self, sigmas: np.ndarray, shift: float) -> np.ndarray:
        """Levels of the caller's."""
        return _shifted(sigmas, shift)

    def even(self, n: int, shift: float) -> np.ndarray:
        """Levels that a run has by itself: even between the ends of the shifted training schedule, and shifted once more."""
        ends = np.array([1, 1 / self.config.num_train_timesteps])
        ends = ends if self.config.use_dynamic_shifting else _shifted(ends, shift)
        return _shifted(np.linspace(*ends, n), shift)

    def spaced(self, levels: np.ndarray) -> np.ndarray:
        """The same number of levels, spaced as the config says between the ends of these, or its own."""
        return _spaced(self.config, levels[0], levels[-1], len(levels))

    def last(self, levels: np.ndarray) -> float:
        return 0.0

    def times(self, levels: np.ndarray) -> np.ndarray:
        times = (1 - levels if self.config.invert_sigmas else levels) * self.config.num_train_timesteps
        return times.astype(np.int64) if self.whole_times else times

    def at(self, timesteps):
        _check_range(timesteps, 0, self.config.num_train_timesteps)
        levels = np.asarray(timesteps, dtype=np.float64) / self.config.num_train_timesteps
        return 1 - levels if self.config.invert_sigmas else levels

    # Cosmos Predict2 runs a variance exploding process as a flow whose levels go to 80. The prediction is x - sigma output in both.
    # So a run that starts far above 1 explodes.

    def alphas_sigmas(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(levels) if levels.max() > 1 else 1 - levels, levels

    def output(self, levels, i):
        if self.config.invert_sigmas:
            return 1.0, levels[i]
        return "epsilon" if levels[0] > 1 else PREDICTION_TYPES[self.config.prediction_type]


class LTXLevels(FlowLevels):
    """As LTXEulerAncestralRFScheduler by a count of steps."""

    def place(self, n, sigmas, timesteps, mu):
        if sigmas is not None or timesteps is not None:
            raise ValueError(
                "sigmas and timesteps are not taken for LTXEulerAncestralRFScheduler, which counts the last 0 as a timestep too: "
                'from_config(config, levels_of="FlowMatchEulerDiscreteScheduler")'
            )
        return super().place(n, sigmas, timesteps, mu)


class DPMFlowLevels(FlowLevels):
    """As DPM-Solver's schedulers, DEIS's and SASolver's with use_flow_sigmas."""

    whole_times = True
    reads = FlowLevels.reads - {"shift"} | OF_BETAS | {"use_flow_sigmas", "flow_shift"}

    def shift(self, mu):
        return super().shift(mu) if self.config.use_dynamic_shifting and mu is not None else self.config.flow_shift

    def even(self, n, shift):
        return _shifted(np.linspace(1 - 1 / self.config.num_train_timesteps, 0, n + 1)[:-1], shift)

    def last(self, levels):
        return 0.0 if self.config.final_sigmas_type == "zero" else min(training_er_lambdas(self.config)[0], levels[-1])


class UniPCFlowLevels(DPMFlowLevels):
    """As UniPCMultistepScheduler with use_flow_sigmas (Wan, Cosmos Predict2.5)."""

    def shift(self, mu):
        return FlowLevels.shift(self, mu) if self.config.use_dynamic_shifting else self.config.flow_shift

    def given(self, sigmas, shift):
        return self._off_one(_shifted(sigmas, shift))

    def even(self, n, shift):
        return self._off_one(_shifted(np.linspace(1, 1 / self.config.num_train_timesteps, n + 1)[:-1], shift))

    def spaced(self, levels):
        if not self.config.use_karras_sigmas:
            return super().spaced(levels)
        training = training_er_lambdas(self.config)
        er_lambdas = _spaced(self.config, training[-1], training[0], len(levels))
        return er_lambdas / (1 + er_lambdas)

    def last(self, levels):
        return 0.0 if self.config.final_sigmas_type == "zero" else levels[-1]

    @staticmethod
    def _off_one(levels: np.ndarray) -> np.ndarray:
        return np.append(levels[0] - 1e-6, levels[1:]) if abs(levels[0] - 1) < 1e-6 else levels


class EDMLevels:
    """Variance exploding, for networks inside EDM's preconditioning (Karras et al. 2022, table 1); the time is log(sigma) / 4."""

    reads = frozenset(
        ["num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "final_sigmas_type"]
    )

    def __init__(self, config):
        for key in ("sigma_min", "sigma_max", "sigma_data"):
            if not (config[key] and config[key] > 0):
                raise ValueError(
                    f"{key} must be a positive number for a network inside EDM's preconditioning, got {config[key]!r}"
                )
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f'prediction_type must be "epsilon" or "v_prediction" inside EDM\'s preconditioning, got {config.prediction_type!r}'
            )
        self.config = config

    @property
    def init_noise_sigma(self) -> float:
        return math.hypot(self.config.sigma_max, 1)

    def training(self) -> tuple[np.ndarray, np.ndarray]:
        return self.place(self.config.num_train_timesteps, None, None, None)

    def place(self, n, sigmas, timesteps, mu):
        config = self.config
        if sigmas is not None:
            levels = sigmas
        elif timesteps is not None:
            levels = self.at(timesteps)
        elif config.sigma_schedule == "karras":
            levels = karras_sigmas(n, config.sigma_min, config.sigma_max, config.rho)[:-1].numpy()
        else:
            levels = np.geomspace(config.sigma_max, config.sigma_min, n)
        last = 0.0 if config.final_sigmas_type == "zero" else min(config.sigma_min, levels[-1])
        return np.append(levels, last), self.times(levels) if timesteps is None else timesteps

    def times(self, levels: np.ndarray) -> np.ndarray:
        """c_noise."""
        return np.log(levels) / 4

    def at(self, timesteps):
        return np.exp(4 * timesteps)

    def alphas_sigmas(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(levels), levels

    def output(self, levels, i):
        """c_skip and c_out; diffusers calls a network whose output has the other sign one of v."""
        std, sign = self.config.sigma_data, 1 if self.config.prediction_type == "epsilon" else -1
        size = math.hypot(levels[i], std)
        return (std / size) ** 2, sign * levels[i] * std / size

    def c_in(self, level):
        return 1 / (level**2 + self.config.sigma_data**2) ** 0.5


class CosineLevels(EDMLevels):
    """As CosineDPMSolverMultistepScheduler (Stable Audio): the same, whose time is the angle of sigma."""

    def times(self, levels):
        return np.arctan(levels) / math.pi * 2

    def at(self, timesteps):
        _check_range(timesteps, 0, 1)
        return np.tan(np.asarray(timesteps) * math.pi / 2)


def training_alphas_cumprod(config) -> Tensor:
    """The running product of 1 - beta over the training schedule, [num_train_timesteps]."""
    alphas_cumprod = torch.cumprod(1 - _betas(config), dim=0)
    if scale := config.snr_shift_scale:
        alphas_cumprod = alphas_cumprod / (scale + (1 - scale) * alphas_cumprod)
    if config.rescale_betas_zero_snr:
        alphas_cumprod = _rescaled_to_zero_snr(alphas_cumprod).clamp(min=SMALLEST_ALPHA_CUMPROD)
    return alphas_cumprod


def training_er_lambdas(config) -> np.ndarray:
    """sigma / alpha of the training schedule, rising."""
    cumulated = training_alphas_cumprod(config).double().numpy()
    return np.sqrt((1 - cumulated) / cumulated)


def is_spaced(config) -> bool:
    """Whether levels are placed by Karras et al.'s rule, evenly in their logarithm, or by a beta distribution."""
    return bool(config.use_karras_sigmas or config.use_exponential_sigmas or config.use_lu_lambdas or config.use_beta_sigmas)


def _spaced(config, largest: float, smallest: float, n: int) -> np.ndarray:
    """Levels between two ends, for which the config may have others."""
    largest = largest if config.sigma_max is None else config.sigma_max
    smallest = smallest if config.sigma_min is None else config.sigma_min
    if config.use_karras_sigmas:
        return karras_sigmas(n, smallest, largest)[:-1].numpy()
    if config.use_beta_sigmas:
        try:
            from scipy.stats import beta
        except ImportError as error:
            raise ImportError('use_beta_sigmas needs scipy: pip install "ersde-fast[diffusers]"') from error
        return smallest + beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6) * (largest - smallest)
    return np.geomspace(largest, smallest, n)


def _shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    return shift * levels / (1 + (shift - 1) * levels)


def _check_range(timesteps, smallest: float, largest: float) -> None:
    bad = ~((np.asarray(timesteps) >= smallest) & (np.asarray(timesteps) <= largest))
    if bad.any():
        raise ValueError(
            f"timesteps must lie from {smallest} to {largest}, as in training, got {np.asarray(timesteps)[bad][0]}"
        )


def _betas(config) -> Tensor:
    schedule, start, end, n = config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps
    kind = {"dtype": torch.float32, "device": CPU}
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, **kind)
    if schedule == "linear":
        return torch.linspace(start, end, n, **kind)
    if schedule == "scaled_linear":
        if config.snr_shift_scale is not None:  # whose levels follow from betas in float64
            kind["dtype"] = torch.float64
        return torch.linspace(start**0.5, end**0.5, n, **kind) ** 2
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, n, **kind)) * (end - start) + start
    if schedule == "squaredcos_cap_v2":
        bar = torch.cos((torch.arange(n + 1, dtype=torch.float64, device=CPU) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999).float()
    raise ValueError(f"beta_schedule must be linear, scaled_linear, squaredcos_cap_v2 or sigmoid, got {schedule!r}")


def _rescaled_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """The same with 0 for the last signal level and the first unchanged (arXiv 2305.08891, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _spaced_timesteps(n: int, last: int, train: int, spacing: str, offset: int) -> np.ndarray:
    """Whole timesteps below `last`, falling; more steps than timesteps repeat some, which are steps of no length."""
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, n + 1).round()[:0:-1]
    elif spacing == "leading":
        timesteps = np.arange(n, 0, -1) * max(last // (n + 1), 1) + offset
    else:
        timesteps = (last - np.arange(n) * (last / n)).round() - 1
    return timesteps.clip(0, train - 1).astype(np.int64)
