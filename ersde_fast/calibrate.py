"""`calibrate_plan`: the levels and weights of a plan of few steps, fitted to a model by a pilot run, without training it.

The plan's run shall end where a pilot run of many steps ends from the same start, and pass near where that passes: a result that is not
yet another sample says little of how near it is to being one, its way more. Two things are fitted: the gaps between the levels,
and in each step the weights of the differences between neighbouring predictions (`pilot.Family`). Where neighbours are alike, as in
pictures, samples are compared by their frequencies, of which the fine ones count more than their share (`coordinates`).

1. The pilot run, which also shows its samples between its levels.
2. Without the model: levels and weights whose steps' errors along the pilot's path are least.
3. One run on these levels, whose weights are fitted on the way to the pilot's path, from where the run itself has come to.
4. Rounds of Levenberg (1944) and Marquardt (1963) on where runs end and pass, as long as the evaluations last and something is gained; then 3
   again on the levels of `place_sigmas`, and rounds from there. Derivatives are differences of runs, each from the step that its parameter
   first changes and of a few samples, others in each round; in between, Broyden's update (1965) keeps them.
5. The starts that were held back decide, by the same measure, whether the plan is returned, else whether one half way to it is: levels and
   weights that fit few starts too closely are mostly too much of the right thing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .coordinates import Coordinates, sharpness
from .levels import CPU, Process
from .noise import float64_device
from .noise_scaler import AnyNoiseScaler, nonnegative
from .pilot import (
    DAMPED,
    FIRST_DAMPING,
    LEAST_DAMPING,
    ORDER,
    PRIOR,
    Family,
    Path,
    Quadratic,
    differences_of,
    kept_from,
    least_squares,
    place_on_path,
)
from .plan import Plan, er_sde_plan
from .predictions import PREDICTION_TYPES
from .reference import prediction
from .report import CalibrationReport
from .request import ModelOutput, inside
from .sample import checked_extra_args, checked_pair, evaluate, levels_of, with_newest
from .schedules import PilotErrors, is_whole, levels_of_pilot
from .step import fast_step

HELD_BACK = 4  # one start of so many
WITH_DERIVATIVES = 4  # samples a round whose derivatives are measured, at least
TURNS = 4  # rounds until all have had theirs, at most
NUMBERS = 2**16  # of all samples together, on which the fit looks
LEAST_NUMBERS = 256  # of one sample: plans fitted to 64 differ by which they are
DIFFERENCE = 0.05  # of a parameter, for a derivative: large enough for networks in half precision
SHORTENED = (1.0, 0.8, 0.6)  # what the gaps of the placed levels are multiplied by, where the search on the path begins
WATERSHED = 0.03  # the error, in variances, from which on a result counts ever less: it is another sample than the pilot's
ON_THE_WAY = 0.1  # what the mean of a run's errors at its levels counts, beside that of its result
UNSCALED = 0.2  # the root mean square of starts, as a share of the first sigma, below which they are not noise of that level
REPEATED = 2e-3  # how far a prediction may be from the same one asked for again, squared, in variances: of sums in any order
GOOD, POOR = 0.5, 0.1  # a round's gain as a share of the one foreseen, from which on less damping, and below which more
WORTH_DAMPING, DAMPED_MORE = 1e-4, 6.0  # a round that failed costs a run: no damping after it that changes nothing
PATIENCE, LITTLE = 3, 0.01  # rounds that may follow one another without gaining so large a part of the error


@torch.no_grad()
def calibrate_plan(
    model: Callable[..., Any],
    x: Tensor,
    num_steps: int,
    sigmas: Tensor | Sequence[float] | np.ndarray,
    extra_args: dict | None = None,
    *,
    noise_scaler: AnyNoiseScaler = "ode",
    eta: float | Sequence[float] = 1.0,
    process: Process = "ve",
    guidance: float | None = None,
    prediction_type: str | None = None,
    sigma_data: float | None = None,
    guidance_scale: float | None = None,
    evaluations: int = 200,
    batch_size: int | None = None,
    disable: bool | None = None,
) -> Plan:
    """A plan of few steps, fitted to a model and the conditions it is used under (docs/calibration.md).

    It belongs to the model: to another it may do harm, and what it gives is measured on few networks: look at samples before you keep it.
    Nothing is trained, and no gradient is taken of the model.

    Args:
        model: `model(x, sigma, **extra_args)`, sigma [batch], to the denoised sample, or what `prediction_type` says. It is called with
            some of the samples too, so what differs between them belongs into `extra_args`. Each sample's result must depend on the
            sample alone, and be the same when asked for again: no dropout.
        x: [batch, ...] the noise to start from, scaled to sigmas[0]; 16 starts are enough, 64 better, and 256 where few steps end
            at other samples than many, as without classes; at least 4. Every fourth is held back from the fit.
        num_steps: of the plan, at least 2.
        sigmas: [pilot_steps + 1] the levels of the pilot, falling: 30 to 50 of those that you would sample with, such as Karras et
            al.'s, and a 0. The plan has their ends, but its last level above 0 may be higher.
        extra_args: further arguments of the model. A tensor, array, list or tuple whose length is the batch, also inside a list or a
            dict, holds an item for each sample, and is cut with them.
        noise_scaler, eta: of the plan, see `er_sde_plan`. The fit is that of the ODE; a plan with noise has the analytic weights at its
            levels, and what the fit added to those of the ODE.
        process: see `er_sde_plan`.
        guidance: the scale at which the model guides itself, see `er_sde_plan`: for the plan that the fit starts from.
        prediction_type, sigma_data: what the model returns in the place of the denoised sample, see `fast_step`.
        guidance_scale: the model returns a pair, with the condition and without it, for classifier-free guidance of this scale.
        evaluations: of the model, for each start, that may be spent, the pilot's among them; fewer are if no more is gained.
        batch_size: samples of one call of the model; None is all.
        disable: hides the progress bar.

    Returns:
        The plan, on the CPU, as `Plan.from_weights` makes it: it runs and is saved as any plan. `plan.report` is a `CalibrationReport`:
        the errors before and after, on the starts fitted and on those held back, and the evaluations spent. Where the fit is worse on
        the starts held back, and so is what is half way to it, the plan is the uncalibrated one, `er_sde_plan` on the levels of `place_sigmas`, and
        `plan.report.calibrated` is False.

    Raises:
        ValueError, TypeError: naming the argument, its value and the remedy.

    Source: docs/calibration.md, "What it costs".
    """
    pilot_levels, to_zero = levels_of_pilot(sigmas, num_steps, process)
    pilot_sigmas = torch.cat([pilot_levels, pilot_levels.new_zeros(1)]) if to_zero else pilot_levels
    _check_arguments(x, pilot_sigmas, num_steps, prediction_type, evaluations, batch_size)
    if guidance_scale is not None:
        guidance_scale = nonnegative("guidance_scale", guidance_scale)
        guidance = guidance_scale if guidance is None else guidance
    analytic: dict[str, Any] = {"guidance": guidance, "sigma_data": sigma_data}
    noise: dict[str, Any] = {"noise_scaler": noise_scaler, "eta": eta}
    some = torch.linspace(0, len(pilot_sigmas) - 1, num_steps + 1, device=CPU).long()
    er_sde_plan(pilot_sigmas[some], process=process, **noise, **analytic)  # says what is wrong with these
    pilot = er_sde_plan(pilot_sigmas, process=process, order=3, method="newton", noise_scaler="ode", sigma_data=sigma_data)
    with tqdm(total=evaluations * len(x), desc="calibrating", unit="evaluation", disable=disable) as bar:
        runs = _Runs(model, x, checked_extra_args(extra_args), prediction_type, guidance_scale, batch_size, bar)
        followed = runs.follow(pilot, torch.arange(len(x), device=CPU), keep=runs.coordinates.of)
        errors = PilotErrors(pilot_levels, process)
        for denoised in followed.denoised[: len(pilot_levels) - 1]:
            errors.add(denoised)
        placed = errors.place(num_steps, to_zero)
        fit = _Fit(runs, pilot, followed, Family(placed, _largest_finite(pilot.er_lambdas), process, analytic))
        parameters, report = fit.calibrate(evaluations)
        bar.total = bar.n  # it ends where no more is gained
    if report.calibrated:
        return replace(fit.family.plan(parameters, **noise), report=report)
    return replace(er_sde_plan(placed, process=process, **noise, **analytic), report=report)


def _check_arguments(x, pilot_sigmas: Tensor, num_steps: int, prediction_type, evaluations, batch_size) -> None:
    """Those that only a calibration has; the plans check theirs."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) < HELD_BACK or not x.numel():
        what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a float tensor [batch, ...] of at least {HELD_BACK} starts with numbers, got {what}")
    size = x.float().square().mean().sqrt().item()
    if not math.isfinite(size):
        raise ValueError("x must be finite: it is noise scaled to sigmas[0]")
    if size < UNSCALED * pilot_sigmas[0]:
        raise ValueError(
            f"x must be noise scaled to sigmas[0], {pilot_sigmas[0]:g}, got one of root mean square {size:.3g}: multiply it by "
            f"sigmas[0]"
        )
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be None or one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
    if batch_size is not None and not (is_whole(batch_size) and batch_size >= 1):
        raise ValueError(f"batch_size must be None or a whole number of at least 1, got {batch_size!r}")
    pilot_steps = len(pilot_sigmas) - 1
    if pilot_steps <= num_steps:
        raise ValueError(f"sigmas must have more steps than the {num_steps} of the plan, got {pilot_steps}")
    least = pilot_steps + 3 * num_steps
    if not is_whole(evaluations) or evaluations < least:
        raise ValueError(
            f"evaluations must be a whole number of at least {least}, for the {pilot_steps} of the pilot and three runs of "
            f"{num_steps} steps, got {evaluations!r}: allow more, or give a pilot of fewer sigmas"
        )


def _check_finite(end: Tensor, where: str) -> None:
    if not (finite := end.flatten(1).isfinite().all(1)).all():
        raise ValueError(f"model must give finite results, got {(~finite).sum()} of {len(end)} that are not, {where}")


def _largest_finite(er_lambdas: Tensor) -> float:
    return er_lambdas[er_lambdas.isfinite()].max().item()


def _has_rows(values, count: int) -> bool:
    return isinstance(values, (Tensor, np.ndarray)) and values.ndim > 0 and len(values) == count


def _rows_of(values, rows: Tensor, count: int):
    """Further arguments of a model, cut to some samples."""
    if _has_rows(values, count):
        return values[rows.to(values.device) if isinstance(values, Tensor) else rows.numpy()]
    if isinstance(values, dict):
        return {key: _rows_of(value, rows, count) for key, value in values.items()}
    if type(values) in (list, tuple):
        if len(values) == count and not any(_has_rows(value, count) for value in values):  # else a layer's rows are an item
            return type(values)(values[row] for row in rows.tolist())
        return type(values)(_rows_of(value, rows, count) for value in values)
    return values


class _Run(NamedTuple):
    """A run of some samples: where it ended, [n, ...], and what was kept of the state and of the prediction at each step."""

    end: Tensor
    states: list[Tensor]
    denoised: list[Tensor]

    def of(self, rows: Tensor) -> "_Run":
        """That of some of its samples."""
        rows = rows.to(self.end.device)
        return _Run(self.end[rows], [state[rows] for state in self.states], [denoised[rows] for denoised in self.denoised])


class _Runs:
    """Runs of a model from the starts of a pilot, by the ODE; `spent` counts its evaluations, each of one sample."""

    def __init__(self, model, x, extra_args, prediction_type, guidance_scale, batch_size, bar):
        self.model, self.x, self.extra_args, self.bar = model, x, extra_args, bar
        self.prediction_type, self.guidance_scale = prediction_type, guidance_scale
        self.batch_size = int(batch_size or len(x))
        self.spent = 0
        self.coordinates = Coordinates(x.shape[1:], max(NUMBERS // len(x), LEAST_NUMBERS), x.device)

    def predict(self, plan: Plan, i: int, sigma: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """The denoised samples at step i of a plan, in batches."""
        denoised = []
        for part, which in zip(x.split(self.batch_size), rows.split(self.batch_size), strict=True):
            args = _rows_of(self.extra_args, which, len(self.x))
            denoised.append(self._denoised(plan, i, part, evaluate(self.model, part, sigma.repeat(len(part)), **args)))
        self.spent += len(x)
        self.bar.update(len(x))
        return torch.cat(denoised)

    def _denoised(self, plan: Plan, i: int, x: Tensor, returned) -> Tensor:
        unconditional = None
        if self.guidance_scale is not None:
            returned, unconditional = checked_pair(returned, "guidance_scale")
        for output in (returned, returned if unconditional is None else unconditional):
            if not isinstance(output, Tensor) or output.shape != x.shape or not output.is_floating_point():
                is_tensor = isinstance(output, Tensor)
                what = f"{output.dtype} {tuple(output.shape)}" if is_tensor else f"{type(output).__name__}{inside(output)}"
                pair = isinstance(output, (tuple, list)) and self.guidance_scale is None
                remedy = ", or guidance_scale for a pair" if pair else ""
                raise ValueError(f"model must return float tensors of the shape of x, {tuple(x.shape)}, got {what}{remedy}")
        factors = plan.predicting(self.prediction_type or "sample").rows[i].prediction
        if not all(map(math.isfinite, factors)):
            raise ValueError(
                f'sigmas must start below 1: prediction_type "{self.prediction_type}" says nothing of the clean sample at alpha 0'
            )
        return prediction(factors, x, returned, ModelOutput(unconditional, self.guidance_scale))

    def follow(
        self,
        plan: Plan,
        rows: Tensor,
        start: int = 0,
        x: Tensor | None = None,
        history: Sequence[Tensor] = (),
        keep: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> _Run:
        """The run of some samples; or the rest of it, from the state at a step and the predictions up to that step, newest first.

        Args:
            keep: what is kept of states and predictions.
        """
        x, history, states, kept = self.x[rows.to(self.x.device)] if x is None else x, list(history), [], []
        sigmas = levels_of(plan, x)
        for i in range(start, plan.num_steps):
            if i > start or not history:
                history = with_newest(self.predict(plan, i, sigmas[i], x, rows), history, plan)
            states.append(keep(x))
            kept.append(keep(history[0]))
            x = fast_step(plan, i, x, history)
        return _Run(x, states, kept)


class _Fit:
    """The fit of a family of plans to where a pilot run ended.

    Args:
        pilot: the pilot's plan; followed: its run of all samples, of which the coordinates seen are kept.
        family: its parameters of 0 are the uncalibrated plan.
    """

    def __init__(self, runs: _Runs, pilot: Plan, followed: _Run, family: Family):
        held = torch.arange(len(runs.x), device=CPU) % HELD_BACK == HELD_BACK - 1
        self.runs, self.family, self.num_steps = runs, family, family.num_steps
        self.fitted, self.held_back = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
        self.alpha_end = pilot.alphas[-1].item()
        _check_finite(followed.end, "where the pilot ends: end it at a higher sigma, or run the model in a wider dtype")
        self.pilot_end, results = followed.end, self.results(followed.end)
        self.variance = results.var(0, correction=0).mean().item()
        rounding = torch.finfo(followed.end.dtype).eps ** 2 * results.square().mean().item()
        if not rounding < self.variance < math.inf:
            raise ValueError(
                f"model must give results that differ between starts, got the variance {self.variance:.2g}: give each start "
                f"noise of its own"
            )
        self.variances = runs.coordinates.variances(followed.end) / self.alpha_end**2
        self.sharp = sharpness(self.variances)
        ends = self.ends(followed.end)
        self.starts = followed.states[0][self.fitted] * self.sharp
        self.scale = 1 / math.sqrt(ends.shape[1] * ends.var(0, correction=0).mean().item())
        self.shares = torch.full((family.num_steps,), ON_THE_WAY / (family.num_steps - 1), dtype=torch.float64, device=CPU)
        self.shares[-1] = 1.0
        levels = pilot.er_lambdas[: len(followed.states)]
        y = torch.stack(followed.states) * self.sharp / pilot.alphas[: len(levels), None, None]
        denoised = torch.stack(followed.denoised) * self.sharp
        self.path, self.path_held_back = (
            Path(levels, y[:, rows], denoised[:, rows], ends[rows]) for rows in (self.fitted, self.held_back)
        )

    def seen(self, values: Tensor) -> Tensor:
        """States or predictions as the fit compares them, float64 [n, m]."""
        return self.runs.coordinates.of(values) * self.sharp

    def ends(self, end: Tensor) -> Tensor:
        """Results likewise."""
        return self.seen(end) / self.alpha_end

    def results(self, end: Tensor) -> Tensor:
        """Results in all their numbers, of which a report tells, float64 [n, numbers]."""
        return end.flatten(1).to(float64_device(end.device)).double() / self.alpha_end

    def errors(self, end: Tensor, pilot_end: Tensor) -> Tensor:
        """The mean squared distance of each result from the pilot's, in variances of the pilot's results."""
        return (self.results(end) - self.results(pilot_end)).square().mean(1) / self.variance

    def calibrate(self, evaluations: int) -> tuple[Tensor, CalibrationReport]:
        """The parameters, and what the fit did."""
        runs, family = self.runs, self.family
        nothing = torch.zeros(family.size, dtype=torch.float64, device=CPU)
        everyone = torch.arange(len(runs.x), device=CPU)  # in the pilot's batches, for the same first predictions to the bit
        before, error, before_losses = self.uncalibrated(nothing, everyone)
        most = evaluations * len(runs.x) - self.num_steps * (len(self.held_back) + len(runs.x))
        parameters, end = nothing, before[0]
        for begin in (self.on_the_path, lambda: nothing[: family.num_gaps]):  # the second where the first gains no more
            if runs.spent + self.num_steps * len(self.fitted) <= most:
                found = self.rounds(begin(), most)
                if found[2] < error:
                    parameters, end, error = found
        held_back = runs.follow(family.plan(parameters), self.held_back)
        after = end, held_back.end
        if not (better := self.is_better(held_back, parameters, before_losses)):
            whole = runs.follow(family.plan(parameters / 2), everyone)
            finite = bool(whole.end.isfinite().all())  # those fitted too, which have not been here
            if better := finite and self.is_better(whole.of(self.held_back), parameters / 2, before_losses):
                parameters, after = parameters / 2, self.parted(whole.end)
        return parameters, self.report(better, before, after)

    def uncalibrated(self, nothing: Tensor, everyone: Tensor) -> tuple[tuple[Tensor, Tensor], float, Tensor]:
        """Of the plan that the fit begins with: where it ends, of the starts fitted and of those held back; what the fit makes least; and the
        losses of the starts held back."""
        run = self.runs.follow(self.family.plan(nothing), everyone)
        levels = ", ".join(f"{sigma:.3g}" for sigma in self.family.sigmas.tolist())
        few = f"where the {self.num_steps} steps end that the fit begins with, of sigmas {levels}, though the pilot is finite"
        _check_finite(run.end, f"{few}: raise num_steps, or run the model in a wider dtype")
        fitted, held_back = run.of(self.fitted), run.of(self.held_back)
        self.check_repeated(fitted.denoised[0])
        losses = self.losses(self.left(held_back, nothing, self.path_held_back))
        return (fitted.end, held_back.end), self.residuals(fitted, nothing)[1], losses

    def parted(self, end: Tensor) -> tuple[Tensor, Tensor]:
        """Results of the starts fitted, and of those held back."""
        return end[self.fitted.to(end.device)], end[self.held_back.to(end.device)]

    def is_better(self, run: _Run, parameters: Tensor, before: Tensor) -> bool:
        """Whether a run of the starts held back has smaller losses than before, in the mean or in the median."""
        losses = self.losses(self.left(run, parameters, self.path_held_back))
        return bool(losses.mean() < before.mean() or losses.quantile(0.5) < before.quantile(0.5))

    def check_repeated(self, denoised: Tensor) -> None:
        """Raises where the first predictions of the starts fitted are not those of the pilot, which has the same first level."""
        # Of the same coordinates: where some are left out, the others count for more.
        spread = (self.path.end / self.sharp).var(0, correction=0).mean()
        difference = (((self.seen(denoised) - self.path.first) / self.sharp).square().mean() / spread).item()
        if not difference <= REPEATED:
            raise ValueError(
                f"model must return the same for the same sample, got predictions {difference:.2g} variances apart at the first of "
                f"sigmas: switch off what is random in it, as model.eval() does of dropout"
            )

    def residuals(self, run: _Run, parameters: Tensor) -> tuple[Tensor, float]:
        """What is left between a run of the starts fitted and the pilot's, and what the fit makes least."""
        left = self.left(run, parameters, self.path)
        total = (self.losses(left).mean() + PRIOR * parameters @ parameters).item()
        return left, total if math.isfinite(total) else math.inf

    def left(self, run: _Run, parameters: Tensor, path: Path, rows: Tensor | slice = slice(None), first: int = 0) -> Tensor:
        """What is left between the pilot's path and a run from step `first` on: at its later levels and then where it ends, [n, levels, m],
        in standard deviations by the root of m. At a level as much counts as would be kept of it to the end.

        Args:
            rows: those of the path.
        """
        plan, left = self.family.plan(parameters), []
        alphas, er_lambdas = plan.alphas.tolist(), plan.er_lambdas.tolist()
        for i, state in enumerate(run.states[1:], first + 1):
            kept = kept_from(er_lambdas[i], self.variances)
            left.append(kept * (self.seen(state) / alphas[i] - path.at(er_lambdas[i])[0][rows]))
        return torch.stack([*left, self.ends(run.end) - path.end[rows]], dim=1) * self.scale

    def losses(self, left: Tensor) -> Tensor:
        """Of each sample, [n]."""
        return WATERSHED * torch.log1p(left.square().sum(2) / WATERSHED) @ self.shares

    def on_the_path(self) -> Tensor:
        """The parameters of the gaps whose steps err least along the pilot's path."""
        scale = self.scale / math.sqrt(len(self.fitted))
        begun = [
            place_on_path(self.path, self.family, self.starts, self.variances, scale, math.log(factor)) for factor in SHORTENED
        ]
        return min(begun, key=lambda one: one[1])[0][: self.family.num_gaps]

    def start(self, gaps: Tensor) -> tuple[Tensor, _Run]:
        """Parameters with these of the gaps, their weights fitted to the pilot's path on the way of a run, and the run."""
        family, path = self.family, self.path
        plan = family.analytic(gaps)
        alphas, er_lambdas = plan.alphas.tolist(), plan.er_lambdas.tolist()
        x, weights = self.runs.x[self.fitted.to(self.runs.x.device)], [gaps]
        sigmas = levels_of(plan, x)
        history: list[Tensor] = []
        seen: list[Tensor] = []
        states, kept = [], []
        for i in range(self.num_steps):
            history = with_newest(self.runs.predict(plan, i, sigmas[i], x, self.fitted), history, plan)
            seen = with_newest(self.seen(history[0]), seen, plan)
            states.append(x)
            kept.append(history[0])
            x = fast_step(plan, i, x, history)
            aim = path.at(er_lambdas[i + 1])[0] if er_lambdas[i + 1] > 0 else path.end
            fitted = least_squares(seen, aim - self.seen(x) / alphas[i + 1])
            weights.append(fitted.nan_to_num(0.0, 0.0, 0.0))  # where predictions are not finite, as where the run ends
            x = x + (alphas[i + 1] * differences_of(history, weights[-1])).to(x.dtype)
        return torch.cat(weights), _Run(x, states, kept)

    def rounds(self, gaps: Tensor, evaluations: int) -> tuple[Tensor, Tensor, float]:
        """Rounds of Levenberg and Marquardt, from these of the gaps, while another one can be afforded and something is gained: the
        parameters, where their run ends, and what the fit makes least. The run itself, two samples a step, is not kept."""
        count, family = len(self.fitted), self.family
        turns = min(max(1, round(count / WITH_DERIVATIVES)), TURNS)
        here, run = self.start(gaps)
        left, error = self.residuals(run, here)
        jacobian = torch.zeros(*left.shape, family.size, dtype=torch.float64, device=CPU)
        known = torch.zeros(count, dtype=torch.bool, device=CPU)
        steps = sum(self.num_steps - 1 - first for first in family.changes)
        damping, turn, idle = FIRST_DAMPING, 0, 0
        while idle < PATIENCE and math.isfinite(error):
            some = torch.arange(turn % turns, count, turns, device=CPU)
            if self.runs.spent + steps * len(some) + self.num_steps * count > evaluations:
                break
            jacobian[some] = self.derivatives(here, run, left, some)
            known[some] = True
            weights = (self.shares / (1 + left[known].square().sum(2) / WATERSHED) / known.sum()).sqrt()[:, :, None]
            rows, columns = (weights * left[known]).flatten(), (weights[..., None] * jacobian[known]).flatten(0, 2)
            model = Quadratic.of(columns, rows, here)
            step = family.within(here + model.step(damping, family.num_gaps)) - here
            there = here + step
            tried = self.runs.follow(family.plan(there), self.fitted)
            left_there, error_there = self.residuals(tried, there)
            if math.isfinite(error_there):
                missed = left_there[known] - left[known] - jacobian[known] @ step
                jacobian[known] += missed[..., None] * step / (step @ step)
            ratio = (error - error_there) / max(model.gain(step), 1e-30)
            idle = 0 if error_there < (1 - LITTLE) * error or not known.all() else idle + 1
            if error_there < error:
                here, run, left, error = there, tried, left_there, error_there
            if ratio > GOOD:
                damping = max(damping / DAMPED, LEAST_DAMPING)
            elif ratio < POOR:
                damping = max(damping, WORTH_DAMPING) * DAMPED_MORE
            turn += 1
        return here, run.end, error

    def derivatives(self, here: Tensor, run: _Run, left: Tensor, some: Tensor) -> Tensor:
        """Of what is left of some samples, [some, levels, m, size], by differences; a run goes on from the step that a parameter changes."""
        run, left, columns = run.of(some), left[some], []
        for k, first in enumerate(self.family.changes):
            there = here.clone()
            there[k] += (difference := -DIFFERENCE if k < self.family.num_gaps else DIFFERENCE)
            history = run.denoised[max(first - ORDER + 1, 0) : first + 1][::-1]
            plan, rows = self.family.plan(there), self.fitted[some]
            moved = self.runs.follow(plan, rows, first, run.states[first], history)
            columns.append(torch.zeros_like(left))
            columns[-1][:, first:] = (self.left(moved, there, self.path, some, first) - left[:, first:]) / difference
        return torch.stack(columns, dim=3).nan_to_num(0.0, 0.0, 0.0)

    def report(self, better: bool, uncalibrated: tuple[Tensor, Tensor], fitted: tuple[Tensor, Tensor]) -> CalibrationReport:
        """By where the runs of the two plans end, of the starts fitted and of those held back."""
        pilot = self.parted(self.pilot_end)
        before, held_before = map(self.errors, uncalibrated, pilot)
        after, held_after = map(self.errors, fitted, pilot)
        return CalibrationReport(
            calibrated=better,
            error_before=before.mean().item(),
            error_after=after.mean().item(),
            held_back_before=held_before.mean().item(),
            held_back_after=held_after.mean().item(),
            median_before=held_before.quantile(0.5).item(),
            median_after=held_after.quantile(0.5).item(),
            variance=self.results(torch.cat(fitted)).var(0, correction=0).mean().item() / self.variance,
            evaluations=self.runs.spent / len(self.runs.x),
            starts=(len(self.fitted), len(self.held_back)),
        )
