"""`ERSDEScheduler`: ER-SDE (arXiv 2309.06169) as a scheduler of Hugging Face diffusers, one fused kernel a step."""

from dataclasses import dataclass
from numbers import Integral, Number

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
from ..reference import linear_combination, prediction
from ..step import fast_step
from .diffusers_configs import levels_class, translated
from .diffusers_levels import PREDICTION_TYPES, BetaLevels, EDMLevels, FlowLevels, is_spaced, training_alphas_cumprod

ROUNDINGS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that a timestep may have been through


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

    `ERSDEScheduler.from_config(pipeline.scheduler.config)` takes the place of another scheduler: its levels, its times and its
    treatment of outputs, with another solver between them. What cannot be followed is an error; docs/integrations.md has a table of
    all classes. Keys that diffusers' schedulers share mean what they mean there; what chooses another solver (`algorithm_type`,
    `solver_type`, `euler_at_final`, `stochastic_sampling`, `tau_func`) is not read.

    Args:
        num_train_timesteps: steps of the training schedule.
        beta_start, beta_end, beta_schedule, trained_betas: the training schedule: "linear", "scaled_linear",
            "squaredcos_cap_v2", "sigmoid", or the betas themselves.
        rescale_betas_zero_snr: rescales the betas to zero terminal SNR (arXiv 2305.08891).
        snr_shift_scale: divides the signal-to-noise ratio of every level (CogVideoX).
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction", which makes the schedule a flow: alpha = 1 - sigma.
        solver_order: 1 to 5 ("newton") or 1 to 3 ("taylor").
        noise_scaler, method, node_scale, integration_points, s_noise, eta: see `ersde_fast.er_sde_plan`.
            With a stochastic noise_scaler a flow run from sigma 1 forgets its initial latent except through the first prediction.
        lower_order_final: order 2 before the last step (which has order 1 where the schedule ends at 0).
        seed: the noise of runs without a generator: Flux, SD3, Z-Image, Qwen and Wan pass none to `step`. A number, or one
            for each sample of the batch: the portable stream, the same bits on every machine and in every run. None takes
            torch's default generator, which pipelines need that copy the scheduler for parts of a sample (SkyReels-V2).
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of the predictions (arXiv 2205.11487).
        clip_sample, clip_sample_range: clips the predictions to [-clip_sample_range, clip_sample_range].
        variance_type: with "learned" or "learned_range" the model's output holds twice the channels, and the second half is not read.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: noise levels between the schedule's ends by Karras et al. (rho
            7), evenly in log sigma, or by the quantiles of a beta distribution (arXiv 2407.12173). At most one.
        use_lu_lambdas: evenly in log-SNR, which is `use_exponential_sigmas` (the name in DPM-Solver's configs).
        sigma_min, sigma_max: the ends of levels so spaced, in the place of the schedule's; those of EDM's levels.
        timestep_spacing, steps_offset: "linspace", "leading" or "trailing" (arXiv 2305.08891, table 2), as DPM-Solver's scheduler.
        timestep_type: "continuous" gives a model of v log(sigma) / 4 for its time (Stable Video Diffusion).
        final_sigmas_type: the run ends at "zero" or at the training schedule's "sigma_min".
        lambda_min_clipped: the smallest log(alpha / sigma) that a schedule of timesteps starts from; -5.1 for cosine betas.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, time_shift_type, shift_terminal,
            invert_sigmas: the levels of a flow, as in diffusers' FlowMatchEulerDiscreteScheduler.
        use_flow_sigmas, flow_shift: a flow in the configs of DPM-Solver and UniPC (Wan), with their levels.
        sigma_data, sigma_schedule, rho: a network inside EDM's preconditioning, as in diffusers' EDMEulerScheduler.
        levels_of: the class of diffusers whose levels are made. None is DPMSolverMultistepScheduler, or for a flow
            FlowMatchEulerDiscreteScheduler; `from_config` sets it.

    Attributes:
        timesteps: what the model is given, falling, one for each evaluation.
        sigmas: float32 on the CPU, one longer: sigma / alpha, for a flow sigma (of Mochi's 1 - sigma). Levels that are written into
            it before a run are the run's.

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
        snr_shift_scale: float | None = None,
        prediction_type: str = "epsilon",
        solver_order: int = 3,
        noise_scaler: str = "sde_5",
        method: str | None = None,
        node_scale: float | None = None,
        integration_points: int | None = None,
        s_noise: float = 1.0,
        eta: float = 1.0,
        lower_order_final: bool = False,
        seed: int | list[int] | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        variance_type: str | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        timestep_type: str = "discrete",
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
        invert_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        sigma_data: float | None = None,
        sigma_schedule: str = "karras",
        rho: float = 7.0,
        levels_of: str | None = None,
    ):
        _check_one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_one_of("timestep_spacing", timestep_spacing, ("linspace", "leading", "trailing"))
        _check_one_of("timestep_type", timestep_type, ("discrete", "continuous"))
        _check_one_of("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        _check_one_of("time_shift_type", time_shift_type, ("exponential", "linear"))
        _check_one_of("sigma_schedule", sigma_schedule, ("karras", "exponential"))
        if sum(map(bool, [use_karras_sigmas, use_exponential_sigmas or use_lu_lambdas, use_beta_sigmas])) > 1:
            raise ValueError("only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be True")
        plain = {key: _without_numpy(value) for key, value in self.config.items()}
        self.register_to_config(**{key: value for key, value in plain.items() if value is not self.config[key]})

        self._made_levels = levels_class(self.config)(self.config)
        self.alphas_cumprod = training_alphas_cumprod(self.config)
        self.alphas = torch.cat([self.alphas_cumprod[:1], self.alphas_cumprod[1:] / self.alphas_cumprod[:-1]])
        self.betas = 1.0 - self.alphas
        self._plan_of(torch.tensor([0.5, 0.25], dtype=torch.float64, device="cpu"))  # says what is wrong with the plan's keys

        self.num_inference_steps = None
        self._is_copy = False
        self._set_schedule(*self._levels_of.training(), None)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """A scheduler from the config of another, or of one that was saved.

        Args:
            config: of any scheduler of diffusers; its class is `_class_name`, or the one whose keys it holds.
            kwargs: keys that go before those of the config. `levels_of` names the class whose levels are made.

        Raises:
            ValueError: naming the class or the key that this scheduler cannot follow.
        """
        if isinstance(config, dict):
            config = translated(config, cls._get_init_keys(cls) - {"self"}, kwargs.get("levels_of"))
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._is_copy = True

    @property
    def _levels_of(self):
        """What makes the levels: anew where a pipeline has written into the config."""
        if self._made_levels.config is not self.config:
            self._made_levels = levels_class(self.config)(self.config)
        return self._made_levels

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation that the noise at the start of a run is scaled to."""
        return self._levels_of.init_noise_sigma

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

    @torch.inference_mode(False)
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
            timesteps: timesteps of your own, falling, each with its own level.

        Raises:
            ValueError: with neither of the count and the lists or with the count and timesteps, with timesteps where the config
                spaces the levels, without `mu` under dynamic shifting, and for levels that no plan can follow.
        """
        spaced = is_spaced(self.config)
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("pass num_inference_steps or timesteps, not both")
        if num_inference_steps is None and timesteps is None and sigmas is None:
            raise ValueError("pass num_inference_steps, timesteps or sigmas")
        if spaced and (timesteps is not None or (sigmas is not None and isinstance(self._levels_of, BetaLevels))):
            raise ValueError(
                "timesteps and sigmas need a config without Karras, exponential and beta spacing, which place them"
            )
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if sigmas is not None:
            sigmas = _numbers("sigmas", sigmas).astype(np.float64)
            if len(sigmas) > 1 and sigmas[-1] == 0:
                sigmas = sigmas[:-1]
            if num_inference_steps is not None and len(sigmas) != num_inference_steps:
                raise ValueError(f"sigmas must hold {num_inference_steps} levels before the last 0, got {len(sigmas)}")
        if timesteps is not None:
            timesteps = _numbers("timesteps", timesteps)
            if sigmas is not None and len(sigmas) != len(timesteps):
                raise ValueError(f"sigmas and timesteps must have one length, got {len(sigmas)} and {len(timesteps)}")
        levels, given = self._levels_of.place(num_inference_steps, sigmas, timesteps, mu)
        plan = self._plan_of(torch.from_numpy(levels))
        self._set_schedule(levels, given, device)
        self._plan, self.num_inference_steps = plan, len(given)

    def _set_schedule(self, levels: np.ndarray, timesteps: np.ndarray, device) -> None:
        """Takes levels [num_steps + 1] and timesteps [num_steps], and forgets the run before."""
        whole = np.issubdtype(timesteps.dtype, np.integer)
        self._times = torch.from_numpy(np.ascontiguousarray(timesteps)).to(torch.int64 if whole else torch.float32)
        self._placed_timesteps = self.timesteps = self._times.to(device)
        self._levels, self._numbers = torch.from_numpy(levels), levels.tolist()  # float64
        self.sigmas = self._shown(self._levels)
        self._step_index = self._begin_index = None
        self._history: list[Tensor] = []

    def _shown(self, levels: Tensor) -> Tensor:
        """Levels as they stand in `sigmas`."""
        return (1 - levels if self.config.invert_sigmas else levels).float()

    def _plan_of(self, levels: Tensor) -> Plan:
        config = self.config
        num_steps = len(levels) - 1
        order = config.solver_order
        if config.lower_order_final:
            order = [min(order, num_steps - i) for i in range(num_steps)]
        alphas, sigmas = self._alphas_sigmas(levels)
        return er_sde_plan(
            sigmas, alphas, order=order, noise_scaler=config.noise_scaler, method=config.method,
            node_scale=config.node_scale, integration_points=config.integration_points, s_noise=config.s_noise, eta=config.eta,
        )  # fmt: skip

    def _alphas_sigmas(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        return self._levels_of.alphas_sigmas(levels)

    def _take_written_levels(self) -> None:
        """Plans anew where somebody has written other levels into `sigmas`, as Cosmos Predict2's pipeline does with the last."""
        if not isinstance(self.sigmas, Tensor) or self.sigmas.shape != self._levels.shape:
            raise ValueError(
                f"sigmas must stay a tensor of {len(self._levels)} levels, got {self.sigmas!r}: use set_timesteps(sigmas=)"
            )
        written, shown = self.sigmas.to("cpu", torch.float64), self._shown(self._levels)
        if (written != shown.to(self.sigmas.dtype).double()).any():
            self._levels = 1 - written if self.config.invert_sigmas else written
            self._numbers = self._levels.tolist()
            self._plan = self._plan_of(self._levels)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands in the schedule: the second place of one that stands twice.

        Args:
            timestep: one of the schedule, in any dtype: bfloat16's and float16's rounding of one is that one.

        Raises:
            ValueError: for one that is not in the schedule.
        """
        schedule = self._times if schedule_timesteps is None else schedule_timesteps.cpu()
        value = float(timestep)
        places = (schedule == value).nonzero()[:, 0]
        if len(places):
            return places[min(1, len(places) - 1)].item()
        rounded = torch.stack([schedule.to(dtype).double() == value for dtype in ROUNDINGS]).any(0)
        if not rounded.any():
            raise ValueError(
                f"timestep {value:g} is not in the schedule of {len(schedule)} steps from {schedule[0].item():g} to "
                f"{schedule[-1].item():g}: pass one of scheduler.timesteps, not the index of a loop or a timestep of another run"
            )
        distance = (schedule.double() - value).abs()
        return torch.where(rounded, distance, torch.inf).argmin().item()

    def _place_of(self, timestep: float | Tensor) -> int | None:
        """Where a timestep stands in the schedule, where that costs nothing: a view into `timesteps`, as a loop over them gives, says
        so by its address, whatever the device. None for a number that only a device knows."""
        if isinstance(timestep, Tensor):
            placed = self._placed_timesteps
            if timestep.dim() and timestep.numel() != 1:
                raise ValueError(f"timestep must be one number, got shape {tuple(timestep.shape)}")
            place, rest = divmod(timestep.data_ptr() - placed.data_ptr(), placed.element_size())
            if (
                0 <= place < placed.shape[0]
                and not rest
                and timestep.dtype == placed.dtype
                and timestep.device == placed.device
            ):
                return place
            if not timestep.is_cpu:
                return None
        elif not isinstance(timestep, Number):
            raise TypeError(f"timestep must be a number or a tensor of one, got {type(timestep).__name__}")
        if self._times.is_floating_point() and _is_whole(timestep):
            raise ValueError(
                f"timestep must be one of scheduler.timesteps, which are not whole here, got {timestep}: no index of a loop"
            )
        if self._step_index is not None and self._is_time(float(timestep), self._step_index):
            return self._step_index
        return self.index_for_timestep(timestep)

    def _is_time(self, value: float, i: int) -> bool:
        """Whether a number is the timestep of step i, or a rounding of it."""
        time = self._times[i]
        return time.item() == value or any(time.to(dtype).item() == value for dtype in ROUNDINGS)

    def _index(self, timestep: float | Tensor) -> int:
        """The step that comes next, checked against the timestep that it is called for where that costs nothing."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step: it plans the run")
        expected = self._begin_index if self._step_index is None else self._step_index
        if expected is not None and expected >= self.num_inference_steps:
            raise ValueError(
                f"step was called for step {expected} of a run of {self.num_inference_steps} steps: call set_timesteps before each run"
            )
        if torch.compiler.is_compiling() and expected is not None:
            return expected
        place = self._place_of(timestep)
        if expected is None:
            return self.index_for_timestep(timestep) if place is None else place
        if place is not None and place != expected:
            raise ValueError(
                f"timestep {float(timestep):g} belongs to step {place}, but step {expected} comes next: call set_timesteps before each run, "
                f"and give each of several loops a scheduler of its own (copy.deepcopy), since their predictions must not mix"
            )
        return expected

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None, *args, **kwargs) -> Tensor:
        """The sample itself, which the model takes as it is; for a network inside EDM's preconditioning c_in times it."""
        if not isinstance(self._levels_of, EDMLevels):
            return sample
        return self._get_conditioning_c_in(self._numbers[self._index(timestep)]) * sample

    def _get_conditioning_c_in(self, sigma):
        """EDM's c_in, by the name under which Cosmos Predict's pipelines ask for it."""
        return self._levels_of.c_in(sigma)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        pred_original_sample: Tensor | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> ERSDESchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the run, in one pass over memory, without waiting for the device.

        The history of predictions belongs to the run: a step that is not the next one is refused, so that two loops cannot go on with
        each other's. (A caller that sets the step back by `_step_index`, as Cosmos Predict's pipelines do to convert an output first,
        makes that step again with the history before it.)

        Args:
            model_output: [batch, ...] of the config's prediction_type.
            timestep: one of `timesteps`; the run begins with the first it is called for, or at the begin index.
            sample: [batch, ...] the current sample.
            generator: torch's stream of the sample's device, drawn in the kernel; a generator of the CPU for samples elsewhere, or
                one for each sample, is drawn by torch. It goes before the config's seed.
            variance_noise: [batch, ...] the noise itself.
            pred_original_sample: [batch, ...] the prediction of the clean sample, in the place of what model_output says.
            per_token_timesteps: [batch, tokens] of a flow whose tokens are held at levels of their own (LTX's conditions): tokens
                at the step's timestep are stepped, the others stay. `model_output` is then the negative velocity, as there.

        Returns:
            The next sample, in the dtype of `sample`, and the prediction of the clean one.

        Raises:
            ValueError: for a timestep that is not the next of the run, where the host can tell, and what `fast_step` refuses.
        """
        index = self._index(timestep)
        if self._step_index is None or not self._run.first_step <= index <= self._newest + 1:
            if not torch.compiler.is_compiling():
                self._take_written_levels()
            self._run = self._plan.starting_at(index) if index else self._plan
            self._newest, self._history = index - 1, []
        plan, config, i = self._run, self.config, index - self._run.first_step
        if config.variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        older = self._history[self._newest + 1 - index :]
        history = [d if d.shape == sample.shape else _for_batch(d, sample) for d in older[: plan.order - 1]]
        kind = "sample"
        if pred_original_sample is not None:
            model_output = pred_original_sample
        elif per_token_timesteps is not None:
            model_output = self._denoised_tokens(sample, model_output, per_token_timesteps)
        else:
            model_output, kind = self._denoised(plan, i, index, sample, model_output)
        source = self._source(plan, i, sample, generator, variance_noise)
        x, denoised = fast_step(plan, i, sample, [model_output, *history], prediction_type=kind, **source)
        if per_token_timesteps is not None:
            moves = (per_token_timesteps - timestep).abs() <= 1e-3
            x = torch.where(moves.view(*moves.shape, *[1] * (x.dim() - moves.dim())), x, sample)
        self._history, self._newest = [denoised, *older][: plan.order], index
        self._step_index = index + 1
        return ERSDESchedulerOutput(x, denoised) if return_dict else (x, denoised)

    def _source(self, plan: Plan, i: int, sample: Tensor, generator, variance_noise: Tensor | None) -> dict:
        """The argument of fast_step that names the step's noise."""
        if not torch.compiler.is_compiling() and plan.rows[i].w_noise == 0:
            return {}
        if variance_noise is not None:
            return {"noise": variance_noise.to(sample.device)}
        if generator is None:
            if self.config.seed is None:
                return {}
            if self._is_copy and sample._is_view():
                raise ValueError(
                    "seed must be None for copies of a scheduler that step parts of a sample, such as its frames: each would draw the "
                    "same noise"
                )
            return {"seed": self.config.seed}
        if isinstance(generator, torch.Generator) and generator.device.type == sample.device.type:
            return {"generator": generator}
        return {"noise": randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)}

    def _denoised(self, plan: Plan, i: int, index: int, sample: Tensor, model_output: Tensor) -> tuple[Tensor, str]:
        """What fast_step is given: the model's output and its type, or the prediction where only PyTorch's operators make it."""
        config, made_by = self.config, self._levels_of.output(self._numbers, index)
        fused = isinstance(made_by, str)
        if fused and not (config.thresholding or config.clip_sample):
            return model_output, made_by
        exact = torch.promote_types(sample.dtype, torch.float32)
        if fused:
            denoised = prediction(plan.rows[i], sample, model_output, NUMBER_OF_TYPE[made_by], None, None, exact)
        else:
            denoised = linear_combination(list(zip(made_by, (sample, model_output), strict=True)), sample, exact)
        if config.thresholding:
            size = _quantile(denoised.flatten(1).abs(), config.dynamic_thresholding_ratio)
            size = size.clamp(1, config.sample_max_value).view(-1, *[1] * (denoised.dim() - 1))
            denoised = denoised.clamp(-size, size) / size
        elif config.clip_sample:
            denoised = denoised.clamp(-config.clip_sample_range, config.clip_sample_range)
        return denoised.to(sample.dtype), "sample"

    def _denoised_tokens(self, sample: Tensor, model_output: Tensor, per_token_timesteps: Tensor) -> Tensor:
        """The prediction where every token has a level of its own: `sample + sigma output` of the negative velocity."""
        if not isinstance(self._levels_of, FlowLevels):
            raise ValueError(f"per_token_timesteps needs a flow, got levels_of={self.config.levels_of!r}")
        sigmas = per_token_timesteps / self.config.num_train_timesteps
        sigmas = sigmas.view(*sigmas.shape, *[1] * (sample.dim() - sigmas.dim()))
        return (sample.float() + sigmas * model_output.float()).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha original_samples + sigma noise` at timesteps [batch], each at its own level, in the schedule or not, as training draws
        them; in a run whose begin index is set, at its current step.

        Raises:
            ValueError: for timesteps outside of those that the model is trained with.
        """
        alphas, sigmas = self._alphas_sigmas_at(timesteps, original_samples)
        return alphas * original_samples + sigmas * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the name and the order of arguments that pipelines of flows use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a model of velocity learns: `alpha noise - sigma sample`; of a flow `noise - sample`."""
        if isinstance(self._levels_of, FlowLevels):
            return sample - noise if self.config.invert_sigmas else noise - sample
        alphas, sigmas = self._alphas_sigmas_at(timesteps, sample)
        return alphas * noise - sigmas * sample

    def _alphas_sigmas_at(self, timesteps, like: Tensor) -> tuple[Tensor, Tensor]:
        count = timesteps.numel() if isinstance(timesteps, Tensor) else np.size(timesteps)
        if self._begin_index is None:
            times = np.atleast_1d(_numbers("timesteps", timesteps)).reshape(-1)
            levels = torch.from_numpy(np.asarray(self._levels_of.at(times), dtype=np.float64))
        else:
            index = self._begin_index if self._step_index is None else self._step_index
            levels = self._levels[index].expand(count)
        shape = (-1, *[1] * (like.dim() - 1))
        return tuple(level.to(like.dtype).to(like.device).view(shape) for level in self._alphas_sigmas(levels))


def _check_one_of(name: str, value, names) -> None:
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def _numbers(name: str, values) -> np.ndarray:
    """An array of its own of a list, array or tensor on any device; NumPy has no bfloat16."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    values = np.array(values)
    if values.dtype.kind not in "iuf" or values.ndim > 1:
        raise TypeError(f"{name} must be numbers in one dimension, got {values.dtype} of shape {values.shape}")
    return values


def _is_whole(timestep: float | Tensor) -> bool:
    """Whether it is of a type of whole numbers."""
    return not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, Integral)


def _without_numpy(value):
    """A config's value as JSON can hold it."""
    if isinstance(value, np.generic):
        return value.item()
    return [_without_numpy(v) for v in value] if isinstance(value, (list, tuple)) else value


def _for_batch(denoised: Tensor, sample: Tensor) -> Tensor:
    """A prediction for a sample that stands in the batch several times, as guidance has it."""
    return torch.cat([denoised] * max(len(sample) // len(denoised), 1))


def _quantile(values: Tensor, q: float) -> Tensor:
    """Of each row, between neighbours in a line, as torch.quantile, which takes at most 2^24 numbers."""
    position = q * (values.shape[1] - 1)
    low = int(position)
    below = values.kthvalue(low + 1, dim=1).values
    above = values.kthvalue(min(low + 2, values.shape[1]), dim=1).values
    return torch.lerp(below, above, position - low)
