"""Sampling as captured CUDA graphs: a whole run as one graph, or one step as a graph that finds its step on the device.

A graph replays what was captured with the same pointers. So whatever may differ between replays lies in device memory that the
kernels read: the plan's table, the sigmas, the seeds, the index of the step. On a CPU the same loop runs without a graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .backends import BACKENDS
from .noise import Portable, Seed, TorchStream, seed_table
from .plan import Plan
from .predictions import PREDICTION_TYPES
from .request import OutputArguments, StepRequest, model_output
from .sample import evaluate, levels_of, with_newest
from .step import fast_step, step_of
from .table import P_X
from .tracing import has_values


class _Captured:
    """What both graphs share: static memory for the plan, the seeds and the sample, and a function that is replayed on it."""

    def __init__(
        self,
        model: Callable,
        plan: Plan,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cuda",
        *,
        prediction_type: str = "sample",
        guidance_scale: float | None = None,
        cfg_pp: bool = False,
    ):
        if cfg_pp and guidance_scale is None:
            raise ValueError("cfg_pp needs a guidance_scale")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        if not shape:
            raise ValueError("shape must have a batch dimension, got ()")
        self.model, self.prediction_type, self.captured_for = model, prediction_type, plan
        self.guidance_scale, self.cfg_pp = guidance_scale, cfg_pp
        try:
            device = torch.empty(0, device=device).device
        except (AssertionError, RuntimeError) as error:  # torch's for a device that is not there
            raise ValueError(
                f'device must be one that torch sees, got {device}: "cpu" runs the same loop without a graph'
            ) from error
        plan = plan.predicting(prediction_type, cfg_pp).to(device)
        self.plan_in_memory = plan
        with torch.inference_mode(False):  # later calls write what is made here, under inference mode or not
            self.plan = replace(plan, table=plan.table.clone())
            self.x = torch.zeros(tuple(shape), dtype=dtype, device=device)
            self.levels = levels_of(plan, self.x)[:, None].repeat(1, shape[0])
            self.seeds = torch.zeros(shape[0], 2, dtype=torch.int64, device=device)
            self.allocate()
        self.replay = self.capture(self.run)

    def allocate(self) -> None:
        """More memory that replays share, before the capture."""

    def run(self) -> Tensor:
        """What is captured."""
        raise NotImplementedError

    @property
    def seeds_to_draw(self) -> Tensor | None:
        return self.seeds if self.plan.draws else None

    def output_of(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, tuple[Tensor, float] | None]:
        """The model's output and, with a guidance scale, what guides it."""
        output = evaluate(self.model, x, sigma)
        return (output, None) if self.guidance_scale is None else (output[0], (output[1], self.guidance_scale))

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function without arguments as a graph; what it returns is overwritten by each replay."""
        if not self.x.is_cuda:
            return torch.no_grad()(function)
        with torch.no_grad(), torch.cuda.device(self.x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()  # libraries set themselves up on first use, which a graph must not hold
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                result = function()

        def replay():
            self.graph.replay()
            return result

        return replay

    def load(self, x: Tensor, seed: Seed | None, plan: Plan | None) -> None:
        """Puts the start, the seeds and the plan where the graph reads them."""
        if not isinstance(x, Tensor) or x.shape != self.x.shape or x.dtype != self.x.dtype:
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be {self.x.dtype} {tuple(self.x.shape)}, as captured, got {what}")
        plan = self.captured_for if plan is None else plan
        if not isinstance(plan, Plan) or plan.table.shape != self.plan.table.shape:
            what = f"{plan.num_steps} of order {plan.order}" if isinstance(plan, Plan) else type(plan).__name__
            raise ValueError(f"plan must have {self.plan.num_steps} steps of order {self.plan.order}, as captured, got {what}")
        if plan.draws and not self.plan.draws:
            raise ValueError("plan must not add noise: the plan that was captured adds none")
        predicting = plan.predicting(self.prediction_type, self.cfg_pp)
        if has_values(predicting.table) and not predicting.table[:, P_X].isfinite().all():
            raise ValueError(
                f'plan must not start at alpha 0: prediction_type "{self.prediction_type}" says nothing of the clean sample there'
            )
        if seed is None:
            seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu"))
        seeds = seed_table(seed, len(self.seeds))
        plan = predicting.to(self.x.device)
        if plan is not self.plan_in_memory:
            self.levels.copy_(plan.sigmas[:, None])
            if self.x.is_cuda:
                self.plan.table.copy_(plan.table)
            else:
                self.plan = plan
            self.plan_in_memory = plan
        self.seeds.copy_(seeds, non_blocking=True)
        self.x.copy_(x)


class SamplingGraph(_Captured):
    """A whole sampling run as one CUDA graph.

    Args:
        model: `model(x, sigma)`, sigma [batch], to its output for x [batch, ...]; called once a step while the graph is captured, and
            once a step before it.
        plan: of `er_sde_plan`.
        shape, dtype, device: of x.
        prediction_type: of the model's output, as in `fast_step`.
        guidance_scale: the model returns a pair (with the condition, without it), and classifier-free guidance of this scale is
            part of the step.
        cfg_pp: the step by CFG++, as in `fast_step`.

    Raises:
        ValueError: naming the argument.

    Source: docs/composition.md.
    """

    def run(self) -> Tensor:
        x, seeds = self.x, self.seeds_to_draw
        history: list[Tensor] = []
        for i in range(self.plan.num_steps):
            output, guidance = self.output_of(x, self.levels[i])
            history = with_newest(output, history, self.plan)
            if self.prediction_type == "sample" and guidance is None:
                x = fast_step(self.plan, i, x, history, seed=seeds)
            else:
                x, history[0] = fast_step(
                    self.plan,
                    i,
                    x,
                    history,
                    seed=seeds,
                    prediction_type=self.prediction_type,
                    guidance=guidance,
                    cfg_pp=self.cfg_pp,
                )
        return x

    def __call__(self, x: Tensor, seed: Seed | None = None, plan: Plan | None = None) -> Tensor:
        """Samples from the noise x, scaled to the plan's first sigma.

        Args:
            seed: as in `fast_step`; None takes a new one from torch's default generator, so each call has noise of its own.
            plan: another plan of as many steps and the same order; None is the one that was captured.

        Returns:
            The sample, in memory of its own: what `fast_step` gives with the same seed, to the bit.
        """
        self.load(x, seed, plan)
        return self.replay().clone()


class StepGraph(_Captured):
    """One step as a CUDA graph that serves every step: its index lies on the device, and so do the earlier predictions, in a ring.

    For streaming, where the caller wants the sample between the steps. Arguments as for `SamplingGraph`:

        graph = StepGraph(model, plan, shape)
        graph.start(x, seed=5)
        for _ in range(plan.num_steps):
            preview = graph()

    Source: docs/composition.md.
    """

    def allocate(self) -> None:
        self.step = torch.zeros((), dtype=torch.int64, device=self.x.device)
        self.ring = self.x.new_zeros(self.plan.order, *self.x.shape)

    def run(self) -> Tensor:
        output, guidance = self.output_of(self.x, self.levels.index_select(0, self.step.view(1))[0])
        noise = Portable(self.seeds) if self.plan.draws else TorchStream()
        output_of = model_output(OutputArguments(self.prediction_type, guidance, self.cfg_pp))
        request = StepRequest(self.plan, self.step, self.x, [output], noise, self.plan.draws, output_of, ring=self.ring)
        step_in_ring(request, self.step)
        self.step.add_(1).clamp_(max=self.plan.num_steps)
        return self.x

    def start(self, x: Tensor, seed: Seed | None = None, plan: Plan | None = None) -> None:
        """Begins a run from the noise x [batch, ...]; `seed` and `plan` as for a call of `SamplingGraph`.

        Raises:
            ValueError: for x, seed or plan of other shapes than those that were captured.
        """
        self.load(x, seed, plan)
        self.step.zero_()

    def __call__(self) -> Tensor:
        """Makes the next step; after the last one the sample is NaN until the next start.

        Returns:
            The sample, in memory that the next call overwrites.
        """
        return self.replay()


def step_in_ring(request: StepRequest, step: Tensor) -> None:
    """One step in place, its index `step` and the earlier predictions in memory: backends without a ring get its slots in order."""
    for backend in BACKENDS:
        if backend.keeps_ring and backend.why_not(request) is None:
            backend.run(request._replace(out=request.x))
            return
    ring, order = request.ring, len(request.ring)
    older = ring.index_select(0, (step - torch.arange(1, order, device=ring.device)) % order).unbind()
    x_next, denoised = step_of(request._replace(history=[*request.history, *older], ring=None))
    ring.index_copy_(0, (step % order).view(1), denoised[None])
    request.x.copy_(x_next)
