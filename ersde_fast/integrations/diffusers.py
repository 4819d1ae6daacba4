"""`ERSDEScheduler`: ER-SDE (arXiv 2309.06169) as a scheduler of Hugging Face diffusers, one fused kernel a step."""

import inspect
import os
from dataclasses import dataclass
from numbers import Integral

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

from ..plan import Plan, er_sde_plan
from ..reference import prediction
from ..request import ModelOutput, OutputArguments, checked
from ..sample import with_newest
from ..step import fast_step
from .diffusers_arguments import Drawn, checked_run, numbers, without_numpy
from .diffusers_configs import (
    check_that_they_are_read,
    check_values,
    levels_class,
    no_scheduler,
    plan_options,
    saved,
    translated,
    unknown_keys,
    without_rivals,
)
from .diffusers_levels import BetaLevels, EDMLevels, FlowLevels, is_spaced, training_alphas_cumprod
from .diffusers_plans import KEYS, as_config, check_run, kept_plan, place
from .diffusers_predictions import clipped, denoised_tokens, for_batch
from .diffusers_timesteps import Timesteps, place_in
from .kept_plans import on_levels


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
    """Extended reverse-time SDE solvers for diffusers' pipelines. Source: arXiv 2309.06169.

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
        solver_order: 1 to 5 ("newton") or 1 to 3 ("taylor"); None is 3, or what guidance_scale chooses.
        noise_scaler, method, node_scale, integration_points, s_noise: see `ersde_fast.er_sde_plan`.
            With a stochastic noise_scaler a flow run from sigma 1 forgets its initial latent except through the first prediction.
        eta: the strength of the noise scaler, or a list of it for each step of runs of that many, see `ersde_fast.er_sde_plan`.
        eta_window: [start, end], shares of a run's steps from 0 to 1: step i has eta where start <= i / num_inference_steps < end, and 0
            elsewhere.
        guidance_scale: the pipeline's, 1 for none, which it does not tell its scheduler: order and node_scale are chosen for it
            where none of solver_order, method, node_scale, integration_points and lower_order_final is set; see `guidance` of
            `ersde_fast.er_sde_plan`.
        lower_order_final: order 2 before the last step (which has order 1 where the schedule ends at 0).
        seed: the noise of runs without a generator: Flux, SD3, Z-Image, Qwen and Wan pass none to `step`. A number, or one
            for each sample of the batch: the portable stream, the same bits on every machine and in every run. None takes
            torch's default generator, which pipelines want that copy the scheduler for each frame of a film or for its sound
            (SkyReels-V2): copies draw the same noise from a seed, and a warning says so.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of the predictions (arXiv 2205.11487).
        clip_sample, clip_sample_range: clips the predictions to [-clip_sample_range, clip_sample_range].
        variance_type: with "learned" or "learned_range" the model's output holds twice the channels, and the second half is not read.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: noise levels between the schedule's ends by Karras et al. (rho
            7), evenly in log sigma, or by the quantiles of a beta distribution (arXiv 2407.12173). At most one.
        use_lu_lambdas: evenly in log-SNR, which is `use_exponential_sigmas` (the name in DPM-Solver's configs).
        sigma_min, sigma_max: the ends of levels so spaced, instead of the schedule's; those of EDM's levels.
        timestep_spacing, steps_offset: "linspace", "leading" or "trailing" (arXiv 2305.08891, table 2), as DPM-Solver's scheduler.
        timestep_type: "continuous" gives a model of v log(sigma) / 4 for its time (Stable Video Diffusion).
        final_sigmas_type: the run ends at "zero" or at the training schedule's "sigma_min".
        lambda_min_clipped: the smallest log(alpha / sigma) that a schedule of timesteps starts from; -5.1 for cosine betas.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len: the levels of a flow, as in
            diffusers' FlowMatchEulerDiscreteScheduler; so are time_shift_type, shift_terminal, invert_sigmas.
        use_flow_sigmas, flow_shift: a flow in the configs of DPM-Solver and UniPC (Wan), with their levels.
        sigma_data, sigma_schedule, rho: a network inside EDM's preconditioning, as in diffusers' EDMEulerScheduler.
        plan_file: a file of `Plan.save`, such as that of a calibrated plan, whose levels and weights are the runs', of as many steps;
            nothing that a plan says may be set beside it. It is read once, and kept in the config.
        plan: what was read, as `from_plan` puts it there: it is saved with the pipeline.
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
        solver_order: int | None = None,
        noise_scaler: str = "sde_5",
        method: str | None = None,
        node_scale: float | None = None,
        integration_points: int | None = None,
        s_noise: float = 1.0,
        eta: float | list[float] = 1.0,
        eta_window: list[float] | None = None,
        guidance_scale: float | None = None,
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
        plan_file: str | None = None,
        plan: dict | None = None,
        levels_of: str | None = None,
    ):
        if plan is None and plan_file is not None:
            self.register_to_config(plan_file=os.fspath(plan_file), plan=as_config(plan_file))
        plain = {key: without_numpy(value) for key, value in self.config.items()}
        self.register_to_config(**{key: value for key, value in plain.items() if value is not self.config[key]})
        self._made_levels = self._read_config()
        if levels_of is None:
            check_that_they_are_read(self._not_default(self.config), self.config)
        levels = torch.linspace(0.5, 0.25, np.size(self.config.eta) + 1, dtype=torch.float64, device="cpu")
        if self._kept_plan is None:
            self._plan_of(levels)  # says what is wrong with the plan's keys
        self.num_inference_steps = None
        self._drawn = Drawn()
        self._set_schedule(*self._levels_of.training(), None)

    @classmethod
    def _not_default(cls, keys: dict) -> dict:
        """Those of some keys whose values are not what a config that leaves them out has."""
        defaults = cls._not_given()
        return {k: v for k, v in keys.items() if k in defaults and (isinstance(v, np.ndarray) or v != defaults[k])}

    def to_json_string(self) -> str:
        """The config as it is saved: without the keys that are None where nothing is given, which other classes do not take."""
        return saved(super().to_json_string(), self._not_given())

    @classmethod
    def _not_given(cls) -> dict:
        """The keys, and what each is where it is not given."""
        return {
            key: parameter.default for key, parameter in inspect.signature(cls.__init__).parameters.items() if key != "self"
        }

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """A scheduler from the config of another, or of one that was saved.

        Args:
            config: of any scheduler of diffusers; its class is `_class_name`, or the one whose keys it holds.
            kwargs: keys that go before those of the config; guidance_scale also before all in it that name an order or a method,
                and one of these before its guidance_scale. `levels_of` names the class whose levels are made.

        Raises:
            ValueError: naming the class or the key that this scheduler cannot follow.
        """
        if not isinstance(config, dict):
            return super().from_config(no_scheduler(config), return_unused_kwargs, **kwargs)
        own_keys = cls._get_init_keys(cls) - {"self"}
        unknown = unknown_keys(kwargs, own_keys, allowed=return_unused_kwargs)
        others = {key: kwargs.pop(key) for key in list(kwargs) if key not in own_keys and key not in unknown}
        if kwargs.keys() & set(KEYS):
            kwargs = dict.fromkeys(KEYS) | kwargs
        taken = without_rivals(translated(config, own_keys, kwargs.get("levels_of"), others), kwargs)
        made = super().from_config(taken, return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        check_that_they_are_read(cls._not_default(kwargs), scheduler.config)
        return made

    @classmethod
    def from_plan(cls, plan: Plan | str | os.PathLike, config=None, **kwargs):
        """A scheduler that runs a plan, such as one of `calibrate_plan`, in as many steps, at the plan's levels.

        Args:
            plan: of any process, or the path of its file.
            config, kwargs: of the pipeline's scheduler, for the model's process, times and outputs, as in `from_config`.

        Raises:
            ValueError: also for a key that the plan says, and a plan whose levels the model is not trained at.
        """
        keys = {"plan": as_config(plan), "plan_file": None if isinstance(plan, Plan) else os.fspath(plan)}
        return cls.from_config({} if config is None else config, **kwargs, **keys)

    def _read_config(self):
        """What makes the levels of the config, which is checked, and the attributes of its training schedule."""
        config = self.config
        check_values(config)
        self._kept_plan = kept_plan(config, self._not_given())
        levels = levels_class(config)(config)
        if self._kept_plan is not None:
            place(self._kept_plan, levels)  # says what is wrong with it
        self.alphas_cumprod = training_alphas_cumprod(config)
        self.alphas = torch.cat([self.alphas_cumprod[:1], self.alphas_cumprod[1:] / self.alphas_cumprod[:-1]])
        self.betas = 1.0 - self.alphas
        return levels

    @property
    def _levels_of(self):
        """What makes the levels: anew where a pipeline has written into the config."""
        if self._made_levels.config is not self.config:
            self._made_levels = self._read_config()
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
        """Begins the run at a later step, as image-to-image pipelines do.

        Raises:
            ValueError: for what is no step of the run that was planned, nor its end.
        """
        if begin_index is not None:
            last = float("inf") if self.num_inference_steps is None else self.num_inference_steps
            if not isinstance(begin_index, Integral) or not 0 <= begin_index <= last:
                raise ValueError(f"begin_index must be a whole number from 0 to {last}, got {begin_index!r}")
            if begin_index and self._kept_plan is not None:
                raise ValueError(f"begin_index must be 0 with a plan, whose steps read earlier ones, got {begin_index}")
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
        if self._kept_plan is not None:
            check_run(self._kept_plan, num_inference_steps, sigmas, timesteps)
            levels, given = place(self._kept_plan, self._levels_of)
            return self._begin(levels, given, device)
        refuses = {"timesteps": is_spaced(self.config)}
        refuses["sigmas"] = refuses["timesteps"] and isinstance(self._levels_of, BetaLevels)
        sigmas, timesteps, ends_at_zero = checked_run(num_inference_steps, sigmas, timesteps, refuses)
        levels, given = self._levels_of.place(num_inference_steps, sigmas, timesteps, mu)
        if ends_at_zero:
            levels[-1] = 0.0
        self._begin(levels, given, device)

    def _begin(self, levels: np.ndarray, timesteps: np.ndarray, device) -> None:
        """Plans the run of these levels and times."""
        plan = self._plan_of(torch.from_numpy(levels))
        self._set_schedule(levels, timesteps, device)
        self._take_plan(plan)
        self.num_inference_steps = len(timesteps)

    def _set_schedule(self, levels: np.ndarray, timesteps: np.ndarray, device) -> None:
        """Takes levels [num_steps + 1] and timesteps [num_steps], and forgets the run before."""
        self._times = Timesteps(timesteps, device)
        self.timesteps = self._times.placed
        self._levels, self._numbers = torch.from_numpy(levels), levels.tolist()  # float64
        self.sigmas = self._shown(self._levels)
        self._step_index = self._begin_index = None
        self._history: list[Tensor] = []
        self._drawn.clear()

    def _shown(self, levels: Tensor) -> Tensor:
        """Levels as they stand in `sigmas`."""
        return (1 - levels if self.config.invert_sigmas else levels).float()

    def _plan_of(self, levels: Tensor) -> Plan:
        alphas, sigmas = self._alphas_sigmas(levels)
        if self._kept_plan is not None:
            return on_levels(self._kept_plan, alphas, sigmas)
        return er_sde_plan(sigmas, alphas, **plan_options(self.config, len(levels) - 1))

    def _take_plan(self, plan: Plan) -> None:
        """The plan of a run, and as numbers, which compiled code can hold, the factors of predictions that are clipped."""
        self._plan = plan
        made_by = self._levels_of.output(self._numbers, 0)
        if isinstance(made_by, str) and (self.config.thresholding or self.config.clip_sample):
            self._factors = [row.prediction for row in plan.predicting(made_by).rows]

    def _alphas_sigmas(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        return self._levels_of.alphas_sigmas(levels)

    def _take_written_levels(self) -> None:
        """Plans anew where somebody has written other levels into `sigmas`, as Cosmos Predict2's pipeline does with the last."""
        if not isinstance(self.sigmas, Tensor) or self.sigmas.shape != self._levels.shape:
            raise ValueError(
                f"sigmas must stay a tensor of {len(self._levels)} levels, got {self.sigmas!r}: use set_timesteps(sigmas=)"
            )
        written, shown = self.sigmas.cpu().double(), self._shown(self._levels)
        if (written != shown.to(self.sigmas.dtype).double()).any():
            levels = 1 - written if self.config.invert_sigmas else written
            plan = self._plan_of(levels)
            self._levels, self._numbers = levels, levels.tolist()
            self._take_plan(plan)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands in the schedule: the second place of one that stands twice.

        Args:
            timestep: one of the schedule, in any dtype: bfloat16's and float16's rounding of one is that one.

        Raises:
            ValueError: for one that is not in the schedule.
        """
        return place_in(self._times.on_cpu if schedule_timesteps is None else schedule_timesteps.cpu(), timestep)

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
        place = self._times.step_of(timestep, self._step_index)
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
        index = self._index(timestep)
        if self._step_index is None:
            self._take_written_levels()
        return self._get_conditioning_c_in(self._numbers[index]) * sample

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
            pred_original_sample: [batch, ...] the prediction of the clean sample, instead of what model_output says.
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
        history = [d if d.shape == sample.shape else for_batch(d, sample) for d in older[: plan.order - 1]]
        kind = "sample"
        if pred_original_sample is not None:
            model_output = pred_original_sample
        elif per_token_timesteps is not None:
            model_output = denoised_tokens(sample, model_output, per_token_timesteps, self._levels_of)
        else:
            model_output, kind = self._denoised(index, sample, model_output)
        history = [model_output, *history]
        source = self._source(plan, i, index, sample, history, kind, generator, variance_noise)
        x, denoised = fast_step(plan, i, sample, history, prediction_type=kind, **source)
        if per_token_timesteps is not None:
            moves = (per_token_timesteps - timestep).abs() <= 1e-3
            x = torch.where(moves.view(*moves.shape, *[1] * (x.dim() - moves.dim())), x, sample)
        self._history, self._newest = with_newest(denoised, older, plan), index
        self._step_index = index + 1
        return ERSDESchedulerOutput(x, denoised) if return_dict else (x, denoised)

    def _source(self, plan: Plan, i: int, index: int, sample: Tensor, history, kind: str, generator, variance_noise) -> dict:
        """The argument of fast_step that names the step's noise."""
        if generator is not None and variance_noise is not None:
            raise ValueError("generator and variance_noise were given: name one source of noise")
        if not torch.compiler.is_compiling() and plan.rows[i].w_noise == 0:
            return {}
        if variance_noise is not None:
            return {"noise": variance_noise.to(sample.device)}
        if generator is None:
            if self.config.seed is None:
                return {}
            if not torch.compiler.is_compiling():
                self._drawn.note(index, id(self))
            return {"seed": self.config.seed}
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them, got {generator!r}: torch.Generator() makes one"
            )
        if isinstance(generator, (list, tuple)) and len(generators) != len(sample):
            raise ValueError(f"generator must be one or {len(sample)}, one for each sample of the batch, got {len(generators)}")
        if generators == [generator] and generator.device.type == sample.device.type:
            return {"generator": generator}
        checked(plan, i, sample, history, output=OutputArguments(kind))  # before anything is drawn
        return {"noise": randn_tensor(sample.shape, generator=list(generators), device=sample.device, dtype=sample.dtype)}

    def _denoised(self, index: int, sample: Tensor, model_output: Tensor) -> tuple[Tensor, str]:
        """What fast_step is given: the model's output and its type, or the prediction where only PyTorch's operators make it."""
        config, made_by = self.config, self._levels_of.output(self._numbers, index)
        fused = isinstance(made_by, str)
        if fused and not (config.thresholding or config.clip_sample):
            return model_output, made_by
        exact = torch.promote_types(sample.dtype, torch.float32)
        denoised = prediction(self._factors[index] if fused else made_by, sample, model_output, ModelOutput(), exact)
        return clipped(denoised, config).to(sample.dtype), "sample"

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
        if not like.is_floating_point():
            raise TypeError(f"samples must be of a float dtype, got {like.dtype}")
        index = self._begin_index if self._step_index is None else self._step_index
        if self._begin_index is not None and self.num_inference_steps is not None and index < self.num_inference_steps:
            if self._step_index is None:
                self._take_written_levels()
            count = timesteps.numel() if isinstance(timesteps, Tensor) else np.size(timesteps)
            pair = self._plan.alphas[index].expand(count), self._plan.sigmas[index].expand(count)
        else:
            times = np.atleast_1d(numbers("timesteps", timesteps)).reshape(-1)
            pair = self._alphas_sigmas(torch.from_numpy(np.asarray(self._levels_of.at(times), dtype=np.float64)))
        shape = (-1, *[1] * (like.dim() - 1))
        return tuple(level.to(like.dtype).to(like.device).view(shape) for level in pair)
