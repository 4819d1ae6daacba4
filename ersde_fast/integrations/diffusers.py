"""`ERSDEScheduler`: ER-SDE (arXiv 2309.06169) as a scheduler of Hugging Face diffusers, one fused kernel a step."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError('ERSDEScheduler needs diffusers: pip install "ersde-fast[diffusers]"') from error

from ..arguments import NUMBER_OF_TYPE
from ..plan import Plan, er_sde_plan
from ..reference import prediction
from ..step import fast_step
from .edm import karras_sigmas

PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow_prediction": "flow"}
SMALLEST_ALPHA_CUMPROD = 2.0**-24  # stands for 0 at zero terminal SNR, as in diffusers, so that er_lambda stays finite


@dataclass
class ERSDESchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: [batch, ...] the next sample, less noisy.
        pred_original_sample: [batch, ...] the prediction of the clean sample.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class ERSDEScheduler(SchedulerMixin, ConfigMixin):
    """Extended reverse-time SDE solvers (arXiv 2309.06169) for diffusers' pipelines.

    `ERSDEScheduler.from_config(pipeline.scheduler.config)` takes the place of any Karras-family or flow-matching scheduler. Keys
    that diffusers' schedulers share mean what they mean there; `algorithm_type` and `solver_type` of others are not read.

    Args:
        num_train_timesteps: steps of the training schedule.
        beta_start, beta_end, beta_schedule, trained_betas: the training schedule: "linear", "scaled_linear",
            "squaredcos_cap_v2", "sigmoid", or the betas themselves.
        rescale_betas_zero_snr: rescales the betas to zero terminal SNR (arXiv 2305.08891).
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction", which makes the schedule a flow: alpha = 1 - sigma.
        solver_order: 1 to 5 ("newton") or 1 to 3 ("taylor").
        noise_scaler, method, node_scale, integration_points, s_noise: see `ersde_fast.er_sde_plan`.
            With a stochastic noise_scaler a flow run from sigma 1 forgets its initial latent except through the first prediction.
        lower_order_final: order 2 before the last step (which has order 1 where the schedule ends at 0).
        seed: the noise of runs without a generator: Flux, SD3, Z-Image, Qwen and Wan pass none to `step`. A number, or one
            for each sample of the batch: the portable stream, the same bits on every machine and in every run. None takes
            torch's default generator.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of the predictions (arXiv 2205.11487).
        variance_type: with "learned" or "learned_range" the model's output holds twice the channels, and the second half is not read.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: noise levels between the schedule's ends by Karras et al. (rho
            7), evenly in log sigma, or by the quantiles of a beta distribution (arXiv 2407.12173). At most one.
        use_lu_lambdas: evenly in log-SNR, which is `use_exponential_sigmas` (the name in DPM-Solver's configs).
        timestep_spacing, steps_offset: "linspace", "leading" or "trailing" (arXiv 2305.08891, table 2), as DPM-Solver's scheduler.
        final_sigmas_type: the run ends at "zero" or at the training schedule's "sigma_min".
        lambda_min_clipped: the smallest log(alpha / sigma) that a schedule of timesteps starts from; -5.1 for cosine betas.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, time_shift_type, shift_terminal:
            the levels of a flow, as in diffusers' FlowMatchEulerDiscreteScheduler.
        use_flow_sigmas, flow_shift: a flow in the configs of DPM-Solver and UniPC (Wan), with their levels.

    Attributes:
        timesteps: what the model is given, falling, one for each evaluation.
        sigmas: float32 on the CPU, one longer: sigma / alpha, for a flow sigma.

    Raises:
        ValueError: naming the key and its value.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        solver_order: int = 3,
        noise_scaler: str = "sde_5",
        method: str | None = None,
        node_scale: float | None = None,
        integration_points: int | None = None,
        s_noise: float = 1.0,
        lower_order_final: bool = False,
        seed: int | list[int] | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        use_flow_sigmas: bool = False,
        flow_shift: float | None = None,
    ):
        _check_one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_one_of("timestep_spacing", timestep_spacing, ("linspace", "leading", "trailing"))
        _check_one_of("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        _check_one_of("time_shift_type", time_shift_type, ("exponential", "linear"))
        spacings = [use_karras_sigmas, use_exponential_sigmas or use_lu_lambdas, use_beta_sigmas]
        if sum(map(bool, spacings)) > 1:
            raise ValueError("only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be True")
        self._spaced = any(spacings)
        self._flow = use_flow_sigmas or prediction_type == "flow_prediction"
        self._shift_now = shift if flow_shift is None else flow_shift

        self.betas = _betas(beta_schedule, beta_start, beta_end, num_train_timesteps, trained_betas)
        if rescale_betas_zero_snr:
            self.betas = _rescaled_to_zero_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = SMALLEST_ALPHA_CUMPROD
        self.init_noise_sigma = 1.0

        self._plan_of(torch.tensor([0.5, 0.25], dtype=torch.float64))  # says what is wrong with the plan's keys

        self.num_inference_steps = None
        steps = np.arange(len(self.betas) - 1, -1, -1)
        if self._flow:
            levels = self._shifted((steps + 1) / len(steps), None if use_dynamic_shifting else self._shift_now)
            self._set_schedule(levels, levels * len(steps), 0.0, None)
        else:
            self._set_schedule(self._training_er_lambdas()[::-1], steps, 0.0, None)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """A scheduler from the config of another, or of one that was saved.

        Raises:
            ValueError: for a config that asks for what only its own scheduler does: `invert_sigmas` (Mochi), and
                `timestep_type="continuous"` (Stable Video Diffusion).
        """
        if isinstance(config, dict):
            if config.get("invert_sigmas"):
                raise ValueError("invert_sigmas is not supported: the model's time runs the other way")
            if config.get("timestep_type") == "continuous":
                raise ValueError('timestep_type="continuous" is not supported: the model takes log(sigma) / 4 for its time')
            if "shift" in config and "prediction_type" not in config:  # the flow-matching schedulers, which know one type only
                kwargs.setdefault("prediction_type", "flow_prediction")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def step_index(self) -> int | None:
        """How many steps of the schedule lie behind; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step that a run begins with, where the pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins the run at a later step, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Plans a run, and forgets the one before.

        Args:
            num_inference_steps: evaluations of the model.
            device: of `timesteps`; the levels stay on the CPU.
            sigmas: levels of your own, falling: sigma / alpha, for a flow sigma before its shift. A 0 is appended where it does
                not end in one.
            mu: of dynamic shifting, needed where `use_dynamic_shifting` is on; not read elsewhere.
            timesteps: timesteps of your own, falling.

        Raises:
            ValueError: with neither of the count and the lists or with the count and timesteps, with timesteps where the config
                spaces the levels, without `mu` under dynamic shifting, and for levels that no plan can follow.
        """
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("pass num_inference_steps or timesteps, not both")
        if num_inference_steps is None and timesteps is None and sigmas is None:
            raise ValueError("pass num_inference_steps, timesteps or sigmas")
        if self._spaced and (timesteps is not None or (sigmas is not None and not self._flow)):
            raise ValueError(
                "timesteps and sigmas need a config without Karras, exponential and beta spacing, which place them"
            )
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if sigmas is not None:
            sigmas = np.array(sigmas.cpu() if isinstance(sigmas, Tensor) else sigmas, dtype=np.float64)
            if len(sigmas) > 1 and sigmas[-1] == 0:
                sigmas = sigmas[:-1]
            if num_inference_steps is not None and len(sigmas) != num_inference_steps:
                raise ValueError(f"sigmas must hold {num_inference_steps} levels before the last 0, got {len(sigmas)}")
        if timesteps is not None:
            timesteps = np.array(timesteps.cpu() if isinstance(timesteps, Tensor) else timesteps)
            if sigmas is not None and len(sigmas) != len(timesteps):
                raise ValueError(f"sigmas and timesteps must have one length, got {len(sigmas)} and {len(timesteps)}")
        if self._flow:
            levels, given, last = self._flow_schedule(num_inference_steps, sigmas, mu, timesteps)
        else:
            levels, given, last = self._vp_schedule(num_inference_steps, sigmas, timesteps)
        self._set_schedule(levels, given, last, device)
        self._plan = self._plan_of(self._levels)
        self.num_inference_steps = len(given)

    def _set_schedule(self, levels: np.ndarray, timesteps: np.ndarray, last: float, device) -> None:
        """Takes levels [num_steps] (sigma / alpha, for a flow sigma) and timesteps, and forgets the run before."""
        self._levels = torch.from_numpy(np.append(levels, last))  # float64
        self.sigmas = self._levels.float()
        whole = np.issubdtype(timesteps.dtype, np.integer)
        self._timesteps = torch.from_numpy(np.ascontiguousarray(timesteps)).to(torch.int64 if whole else torch.float32)
        self.timesteps = self._timesteps.to(device)
        self._step_index = self._begin_index = None
        self._history: list[Tensor] = []

    def _plan_of(self, levels: Tensor) -> Plan:
        config = self.config
        num_steps = len(levels) - 1
        order = config.solver_order
        if config.lower_order_final:
            order = [min(order, num_steps - i) for i in range(num_steps)]
        alphas, sigmas = self._alphas_sigmas(levels)
        return er_sde_plan(
            sigmas, alphas, order=order, noise_scaler=config.noise_scaler, method=config.method,
            node_scale=config.node_scale, integration_points=config.integration_points, s_noise=config.s_noise,
        )  # fmt: skip

    def _alphas_sigmas(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        if self._flow:
            return 1 - levels, levels
        alphas = torch.rsqrt(1 + levels**2)
        return alphas, levels * alphas

    def _training_er_lambdas(self) -> np.ndarray:
        cumulated = self.alphas_cumprod.double().numpy()
        return np.sqrt((1 - cumulated) / cumulated)

    def _vp_schedule(self, n: int | None, sigmas, timesteps) -> tuple[np.ndarray, np.ndarray, float]:
        """Levels, timesteps and last level of a variance-preserving run."""
        config, er_lambdas = self.config, self._training_er_lambdas()
        indices = np.arange(len(er_lambdas))
        if sigmas is not None or self._spaced:
            levels = self._spaced_between(er_lambdas[-1], er_lambdas[0], n) if sigmas is None else sigmas
            if timesteps is None:
                timesteps = np.interp(np.log(np.maximum(levels, 1e-10)), np.log(er_lambdas), indices)
        else:
            if timesteps is None:
                clipped = np.searchsorted(np.log(er_lambdas), -config.lambda_min_clipped, side="right")
                timesteps = _spaced_timesteps(n, clipped, len(er_lambdas), config.timestep_spacing, config.steps_offset)
            levels = np.exp(np.interp(timesteps, indices, np.log(er_lambdas)))
        last = 0.0 if config.final_sigmas_type == "zero" else min(er_lambdas[0], levels[-1])
        return levels, timesteps, last

    def _flow_schedule(self, n: int | None, sigmas, mu: float | None, timesteps) -> tuple[np.ndarray, np.ndarray, float]:
        """Levels, timesteps and last level of a flow."""
        config = self.config
        shift = self._shift_now
        if config.use_dynamic_shifting:
            if mu is None:
                raise ValueError(
                    "mu is needed where use_dynamic_shifting is on: the pipeline computes it from the image's size"
                )
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        train = config.num_train_timesteps
        if sigmas is not None:
            levels = self._shifted(sigmas, shift)
        elif timesteps is not None:
            levels = timesteps / train
        elif config.use_flow_sigmas:
            levels = self._shifted(np.linspace(1 - 1 / train, 0, n + 1)[:-1], shift)
        else:
            # FlowMatchEulerDiscreteScheduler starts from the ends of its shifted training schedule, and shifts once more.
            ends = np.array([1, 1 / train])
            ends = ends if config.use_dynamic_shifting else self._shifted(ends, shift)
            levels = self._shifted(np.linspace(*ends, n), shift)
        if config.shift_terminal and (sigmas is not None or timesteps is None):
            levels = 1 - (1 - levels) * (1 - config.shift_terminal) / (1 - levels[-1])
        if self._spaced:
            levels = self._spaced_between(levels[0], levels[-1], len(levels))
        timesteps = levels.astype(np.float32) * np.float32(train) if timesteps is None else timesteps.astype(np.float32)
        return levels, timesteps, 0.0

    @staticmethod
    def _shifted(levels: np.ndarray, shift: float | None) -> np.ndarray:
        return levels if shift is None else shift * levels / (1 + (shift - 1) * levels)

    def _spaced_between(self, largest: float, smallest: float, n: int) -> np.ndarray:
        config = self.config
        if config.use_karras_sigmas:
            return karras_sigmas(n, smallest, largest)[:-1].numpy()
        if config.use_beta_sigmas:
            try:
                from scipy.stats import beta
            except ImportError as error:
                raise ImportError('use_beta_sigmas needs scipy: pip install "ersde-fast[diffusers]"') from error
            return smallest + beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6) * (largest - smallest)
        return np.exp(np.linspace(math.log(largest), math.log(smallest), n))

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands in the schedule: the second place of one that stands twice, the last of one that does not."""
        schedule = self._timesteps if schedule_timesteps is None else schedule_timesteps.cpu()
        places = (schedule == float(timestep)).nonzero()
        if len(places) == 0:
            return len(schedule) - 1
        return places[min(1, len(places) - 1)].item()

    def _index_of(self, timestep: float | Tensor) -> int:
        """Where a run begins. A view into `timesteps`, as a loop over them gives, says so itself, without waiting for a device."""
        own = self.timesteps
        if isinstance(timestep, Tensor) and timestep.dim() == 0 and timestep.dtype == own.dtype:
            if timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
                return timestep.storage_offset() - own.storage_offset()
        return self.index_for_timestep(timestep)

    def scale_model_input(self, sample: Tensor, *args, **kwargs) -> Tensor:
        """The sample itself: the model takes it as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> ERSDESchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the run, in one pass over memory, without waiting for the device.

        Args:
            model_output: [batch, ...] of the config's prediction_type.
            timestep: where the run begins, at its first step; after that the steps follow each other.
            sample: [batch, ...] the current sample.
            generator: torch's stream of the sample's device, drawn in the kernel; a generator of the CPU for samples elsewhere, or
                one for each sample, is drawn by torch. It goes before the config's seed.
            variance_noise: [batch, ...] the noise itself.

        Returns:
            The next sample, in the dtype of `sample`, and the prediction of the clean one.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step: it plans the run")
        if self._step_index is None:
            self._step_index = self._index_of(timestep) if self._begin_index is None else self._begin_index
            self._run = self._plan.starting_at(self._step_index) if self._step_index else self._plan
        plan, config, i = self._run, self.config, self._step_index - self._run.first_step
        if i >= plan.num_steps:
            raise ValueError(
                f"step was called {i + 1} times on a run of {plan.num_steps} steps: call set_timesteps before each run"
            )
        if config.variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        kind = PREDICTION_TYPES[config.prediction_type]
        if config.thresholding:
            model_output = self._thresholded(plan, i, sample, model_output, kind)
            kind = "sample"
        source = self._source(plan, i, sample, generator, variance_noise)
        sample, denoised = fast_step(plan, i, sample, [model_output, *self._history], prediction_type=kind, **source)
        self._history = [denoised, *self._history][: plan.order - 1]
        self._step_index += 1
        return ERSDESchedulerOutput(sample, denoised) if return_dict else (sample, denoised)

    def _source(self, plan: Plan, i: int, sample: Tensor, generator, variance_noise: Tensor | None) -> dict:
        """The argument of fast_step that names the step's noise."""
        if plan.rows[i].w_noise == 0:
            return {}
        if variance_noise is not None:
            return {"noise": variance_noise.to(sample.device)}
        if generator is None:
            return {} if self.config.seed is None else {"seed": self.config.seed}
        if isinstance(generator, torch.Generator) and generator.device.type == sample.device.type:
            return {"generator": generator}
        return {"noise": randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)}

    def _thresholded(self, plan: Plan, i: int, sample: Tensor, model_output: Tensor, kind: str) -> Tensor:
        """The prediction, clipped to a quantile of its own absolute values and scaled back to [-1, 1] (arXiv 2205.11487)."""
        exact = torch.promote_types(sample.dtype, torch.float32)
        denoised = prediction(plan.rows[i], sample, model_output, NUMBER_OF_TYPE[kind], None, None, exact)
        size = torch.quantile(denoised.flatten(1).abs(), self.config.dynamic_thresholding_ratio, dim=1)
        size = size.clamp(1, self.config.sample_max_value).view(-1, *[1] * (denoised.dim() - 1))
        return (denoised.clamp(-size, size) / size).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha original_samples + sigma noise` at timesteps [batch]: at those of the schedule that they are, or, in a run whose
        begin index is set, at its current step."""
        alphas, sigmas = self._alphas_sigmas_at(timesteps, original_samples)
        return alphas * original_samples + sigmas * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the name and the order of arguments that pipelines of flows use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a model of velocity learns: `alpha noise - sigma sample`; of a flow `noise - sample`."""
        if self._flow:
            return noise - sample
        alphas, sigmas = self._alphas_sigmas_at(timesteps, sample)
        return alphas * noise - sigmas * sample

    def _alphas_sigmas_at(self, timesteps, like: Tensor) -> tuple[Tensor, Tensor]:
        timesteps = torch.as_tensor(timesteps).reshape(-1)
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps.cpu()]
        else:
            indices = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)
        shape = (-1, *[1] * (like.dim() - 1))
        return tuple(level.to(like.device, like.dtype).view(shape) for level in self._alphas_sigmas(self._levels[indices]))


def _check_one_of(name: str, value, names) -> None:
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def _betas(schedule: str, start: float, end: float, n: int, trained) -> Tensor:
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float32)
    if schedule == "linear":
        return torch.linspace(start, end, n)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n) ** 2
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, n)) * (end - start) + start
    if schedule == "squaredcos_cap_v2":
        bar = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999).float()
    raise ValueError(f"beta_schedule must be linear, scaled_linear, squaredcos_cap_v2 or sigmoid, got {schedule!r}")


def _rescaled_to_zero_snr(betas: Tensor) -> Tensor:
    """Betas whose last signal level is 0 and whose first is unchanged (arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    cumulated = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - torch.cat([cumulated[:1], cumulated[1:] / cumulated[:-1]])


def _spaced_timesteps(n: int, last: int, train: int, spacing: str, offset: int) -> np.ndarray:
    """Whole timesteps below `last`, falling; more steps than timesteps repeat some, which are steps of no length."""
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, n + 1).round()[:0:-1]
    elif spacing == "leading":
        timesteps = np.arange(n, 0, -1) * max(last // (n + 1), 1) + offset
    else:
        timesteps = (last - np.arange(n) * (last / n)).round() - 1
    return timesteps.clip(0, train - 1).astype(np.int64)
