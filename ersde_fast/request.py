"""`StepRequest`: all that one step is; and every check of what a caller asks for, in words, before anything is written or drawn."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.base import FLOATS
from .backends.library import is_scale
from .noise import (
    MAX_POSITIONS,
    TORCH_PIECE,
    Portable,
    Seed,
    TorchStream,
    check_torch_layout,
    float64_device,
    seeds_of,
)
from .plan import Plan, PlanStack
from .predictions import PREDICTION_TYPES
from .table import Row, Table
from .tracing import has_values, numbers_of

StepIndex = int | Tensor | tuple[Tensor, Tensor]
Guidance = tuple[Tensor, float | Tensor]


class ModelOutput(NamedTuple):
    """That history[0] is a model's output, and what makes the prediction of it.

    Attributes:
        unconditional: the output that guides it, of the shape of x, or None.
        scale: of the guidance, a number or float64 [batch].
        cfg_pp: whether the step is that by CFG++, for which the plan holds the weights.
    """

    unconditional: Tensor | None = None
    scale: float | Tensor | None = None
    cfg_pp: bool = False


class StepRequest(NamedTuple):
    """One step, checked.

    Attributes:
        plan: whose table holds the weights, and with `output` the factors of its type, on the host or where x lies.
        i: a number, an int64 tensor [], or a pair (plan_index, step_index) of int64 [batch].
        x: [batch, ...] the current sample.
        history: as many predictions of the shape of x, newest first, as the step may read; with `output` the first is the model's.
        noise: what the step adds: a tensor of the shape of x, or the stream that it is drawn from.
        draws: whether a stream is drawn from; where the step is known, whether its weight of the noise is not 0.
        output: None where history holds predictions alone.
        out: where to write, or None.
        ring: [order, *x.shape], whose slot s mod order holds the prediction of step s. history is then the model's output alone,
            and the new prediction goes to the ring; i is a tensor on the device of x.
    """

    plan: Table
    i: StepIndex
    x: Tensor
    history: Sequence[Tensor]
    noise: Tensor | Portable | TorchStream = TorchStream()
    draws: bool = False
    output: ModelOutput | None = None
    out: Tensor | None = None
    ring: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What is read."""
        tensors = [self.x, *self.history]
        if isinstance(self.noise, Tensor):
            tensors.append(self.noise)
        if self.output is not None and self.output.unconditional is not None:
            tensors.append(self.output.unconditional)
        return tensors

    @property
    def numbers(self) -> list[Tensor]:
        """The tensors that say which step it is, of what noise and how guided."""
        scale = None if self.output is None else self.output.scale
        seeds = self.noise.seeds if isinstance(self.noise, Portable) else None
        return [t for t in (*(self.i if isinstance(self.i, tuple) else (self.i,)), seeds, scale) if isinstance(t, Tensor)]


class NoiseArguments(NamedTuple):
    """The arguments of `fast_step` that say where the noise comes from, as they were given."""

    noise: Tensor | None = None
    generator: torch.Generator | None = None
    seed: Seed | None = None
    global_shape: Sequence[int] | None = None
    global_start: Sequence[int] | None = None
    torch_layout: tuple[int, int] | None = None


class OutputArguments(NamedTuple):
    """The arguments of `fast_step` that say what history[0] is, as they were given."""

    prediction_type: str | None = None
    guidance: Guidance | None = None
    cfg_pp: bool = False


NO_SOURCE, PREDICTIONS = NoiseArguments(), OutputArguments()
# What other tools call the prediction types, for messages.
OTHER_NAMES = {"eps": "epsilon", "noise": "epsilon", "v_prediction": "v", "velocity": "v", "flow_prediction": "flow"}
OTHER_NAMES |= dict.fromkeys(("x0", "x_start", "x_0", "denoised", "pred_original_sample"), "sample")


def checked(
    plan, i, x, history, given: NoiseArguments = NO_SOURCE, output: OutputArguments = PREDICTIONS, out=None
) -> StepRequest:
    """The request for a step, whose history is cut to what the step reads.

    Raises:
        ValueError, TypeError: naming the argument, for anything the step cannot do.
    """
    _check_tensor("x", x)
    uses = _check_index(plan, i, x)
    if uses is None:
        uses = min(plan.order, len(history))
    if output.prediction_type is not None and not _is_type(output.prediction_type):
        names = ", ".join(map(repr, PREDICTION_TYPES))
        known = OTHER_NAMES.get(output.prediction_type) if isinstance(output.prediction_type, str) else None
        remedy = f': write "{known}"' if known else ""
        raise ValueError(f"prediction_type must be None or one of {names}, got {output.prediction_type!r}{remedy}")
    if output.prediction_type is not None:
        uses = max(uses, 1)
    check_history(history)
    if len(history) < uses:
        at = f" at step {i}" if isinstance(i, int) else ""
        raise ValueError(
            f"history must hold the {uses} newest predictions{at}, got {len(history)}: keep them from step to step, "
            f"history = [denoised, *history[: plan.order - 1]]"
        )
    for j, denoised in enumerate(history[:uses]):
        check_like(f"history[{j}]", denoised, x)
    if isinstance(i, tuple):  # a sum is in float64 by what is given, so that a sample does not depend on what the others read
        while uses < min(plan.order, len(history)) and _is_like(history[uses], x):
            uses += 1
    if not isinstance(output.cfg_pp, bool):
        raise TypeError(f"cfg_pp must be True or False, got {output.cfg_pp!r}")
    if output.cfg_pp and output.guidance is None:
        raise ValueError("cfg_pp needs guidance=(unconditional output, scale)")
    plan = plan.predicting(output.prediction_type, output.cfg_pp)
    row = known_row(plan, i)
    _check_output(row, i, x, output)
    draws = plan.draws if row is None else row.w_noise != 0
    request = StepRequest(plan, i, x, history[:uses], _checked_noise(x, given), draws, model_output(output), out)
    if out is not None:
        _check_out(request)
    return request


def _checked_noise(x: Tensor, given: NoiseArguments) -> Tensor | Portable | TorchStream:
    noise, generator, seed, global_shape, global_start, torch_layout = given
    check_one_source(noise=noise, generator=generator, seed=seed)
    if noise is not None:
        check_like("noise", noise, x)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, got {type(generator).__name__}: a number is a seed=, or "
                f"torch.Generator(x.device).manual_seed(number)"
            )
        if generator.device.type != x.device.type or (generator.device.index or 0) != (x.device.index or 0):
            raise ValueError(
                f"generator must be on the device of x, {x.device}, got one on {generator.device}: use torch.Generator(x.device), or "
                f"seed=, which is the same on every device"
            )
    if seed is not None and type(seed) is not int:
        seed = seeds_of(seed, x)
    check_shard(x, seed, global_shape, global_start)
    if torch_layout is not None:
        check_torch_layout(torch_layout)
        if noise is not None or seed is not None:
            raise ValueError("torch_layout names torch's stream: give it without noise= and seed=")
        if x.numel() * x.element_size() > TORCH_PIECE:
            raise ValueError(f"torch_layout needs x below 2 GiB, got {tuple(x.shape)}: torch draws larger tensors in pieces")
    return noise_of(given._replace(seed=seed))


def noise_of(given: NoiseArguments) -> Tensor | Portable | TorchStream:
    """What a request says of checked arguments; the seeds as they are."""
    if given.noise is not None:
        return given.noise
    if given.seed is not None:
        return Portable(given.seed, given.global_shape or (), given.global_start or ())
    return TorchStream(given.generator, given.torch_layout)


def _check_index(plan, i, x: Tensor) -> int | None:
    """Checks the plan and the step, and says how many predictions the step uses; None where compiled code serves every number i."""
    if isinstance(i, tuple):
        if not isinstance(plan, PlanStack):
            raise TypeError(f"plan must be a stack of stack_plans where i is a pair, got {type(plan).__name__}")
        if len(i) != 2:
            raise ValueError(f"i must be a pair (plan_index, step_index), got {len(i)} values")
        batch = x.shape[0] if x.dim() else 1
        for name, index, end in [("plan_index", i[0], plan.num_plans), ("step_index", i[1], plan.num_steps)]:
            _check_integers(name, index, (batch,))
            _check_device(name, index, x.device)
            if has_values(index):
                values = numbers_of(index)
                if not all(0 <= value < end for value in values):
                    raise ValueError(f"{name} must be 0 to {end - 1}, got {values}")
        if (rows := known_rows(plan, i)) is None:
            return plan.order
        for b, row in enumerate(rows):
            if math.isnan(row.w_x):
                plan_index, step_index = (numbers_of(index)[b] for index in i)
                raise ValueError(f"step_index[{b}] = {step_index} is behind the last step of plan {plan_index}")
        return max((j + 1 for row in rows for j, w in enumerate(row.w_d) if w != 0), default=0)
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan must be a plan of er_sde_plan, or a stack of them with i = (plan_index, step_index), got {type(plan).__name__}: "
            f"write plan = er_sde_plan(sigmas) once, before the loop"
        )
    if plan.table.device not in (torch.device("cpu"), x.device):
        raise ValueError(
            f"plan must be on the CPU or on the device of x, {x.device}, got {plan.table.device}: use plan.to(x.device)"
        )
    if isinstance(i, Tensor):
        _check_integers("i", i, ())
        if i.device != x.device and not i.is_cpu:
            raise ValueError(f"i must be on the CPU or on the device of x, {x.device}, got {i.device}")
        if not has_values(i):
            return plan.order
        i = numbers_of(i)
    elif not isinstance(i, int) or isinstance(i, bool):
        raise TypeError(
            f"i must be a whole number, the index of the step, or an int64 tensor of it, got {i!r}: write "
            f"for i in range(plan.num_steps)"
        )
    if not 0 <= i < plan.num_steps:
        raise ValueError(
            f"i must be 0 to {plan.num_steps - 1} (the plan has {plan.num_steps} steps), got {i}: there is one step less than levels"
        )
    if torch.compiler.is_dynamo_compiling():
        return None
    row = known_row(plan, i)
    return min(plan.orders[i], i + 1) if row is None else len(row.w_d)


def known_row(plan, i) -> Row | None:
    """The row of a step of one plan, where the host knows both the step and the plan's numbers."""
    if isinstance(i, tuple) or not has_values(plan.table) or not (isinstance(i, int) or has_values(i)):
        return None
    return plan.rows[i]


def known_rows(plan, i: tuple) -> list[Row] | None:
    """The rows of the samples' steps of a stack, where the host knows both the steps and the plans' numbers."""
    if not all(map(has_values, (plan.table, *i))):
        return None
    return [Row.of(row) for row in numbers_of(plan.table, i)]


def model_output(given: OutputArguments) -> ModelOutput | None:
    """What a request says of checked arguments."""
    if given.prediction_type is None:
        return None
    unconditional, scale = (None, None) if given.guidance is None else pair_of(given.guidance)
    return ModelOutput(unconditional, scale, given.cfg_pp)


def _is_type(prediction_type) -> bool:
    return isinstance(prediction_type, str) and prediction_type in PREDICTION_TYPES


def pair_of(guidance):
    """The unconditional output and the scale; a tensor of two rows is no pair, though it unpacks into two."""
    if not isinstance(guidance, (tuple, list)) or len(guidance) != 2:
        raise TypeError(
            f"guidance must be a pair (unconditional output, scale), got {type(guidance).__name__}: history[0] is the output with the "
            f"condition, and the pair holds the one without it"
        )
    return guidance


def _check_output(row: Row | None, i, x: Tensor, output: OutputArguments) -> None:
    """Checks what turns a model's output into a prediction."""
    prediction_type, guidance, _ = output
    if prediction_type is not None and row and not math.isfinite(row.prediction[0]):
        raise ValueError(
            f'prediction_type "{prediction_type}" says nothing of the clean sample where alpha is 0, as at step {int(i)}'
        )
    if guidance is None:
        return
    if prediction_type is None:
        raise ValueError('guidance needs a prediction_type ("sample" where the model predicts the clean sample)')
    unconditional, scale = pair_of(guidance)
    check_like("guidance[0]", unconditional, x)
    if isinstance(scale, Tensor):
        batch = x.shape[0] if x.dim() else 1
        if scale.dtype != torch.float64 or scale.shape != (batch,):
            raise ValueError(
                f"guidance[1] must be a number or float64 [{batch}], one for each sample, got {scale.dtype} {tuple(scale.shape)}: use "
                f"scale.double(){'' if scale.dim() else f'.expand({batch})'}"
            )
        _check_device("guidance[1]", scale, float64_device(x.device))
    elif not is_scale(scale):
        raise TypeError(f"guidance[1] must be a finite number or float64 [batch], got {scale!r}")


def check_one_source(**sources) -> None:
    """Raises where more than one source of noise is given."""
    named = [name for name, source in sources.items() if source is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} were given: name one source of noise")


def _check_integers(name: str, value, shape: tuple) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.shape != shape:
        what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        level = ": it is the number of a step, not its level" if isinstance(value, Tensor) and value.is_floating_point() else ""
        raise TypeError(f"{name} must be an int64 tensor of shape {shape}, got {what}{level}")


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on the device of x, {device}, got {value.device}: use {name}.to(x.device)")


def _check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{inside(value)}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}: use {name}.float()")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got {value.layout}: use {name}.to_dense()")


def inside(value) -> str:
    """Where in something that is no tensor the tensor is, for messages."""
    if isinstance(getattr(value, "sample", None), Tensor):  # of diffusers' models
        return ": take its .sample"
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return ": take its [0]"
    return ": use torch.from_numpy" if type(value).__name__ == "ndarray" else ""


def _halves(value: Tensor, x: Tensor) -> str:
    """What a tensor that holds x's shape twice may be, for messages."""
    if value.dim() != x.dim() or x.dim() < 2:
        return ""
    if value.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        return (
            f': where a model learns its variance too, take output[:, :{x.shape[1]}] (diffusers: variance_type="learned_range")'
        )
    if value.shape == (2 * x.shape[0], *x.shape[1:]):
        return ": where it holds both outputs of guidance, take output.chunk(2) and guidance=(unconditional, scale)"
    return ""


def check_history(history) -> None:
    if not isinstance(history, (list, tuple)):
        raise TypeError(
            f"history must be a list of predictions, newest first, got {type(history).__name__}: write [denoised, *history]"
        )


def check_like(name: str, value, x: Tensor) -> None:
    _check_tensor(name, value)
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}{_halves(value, x)}")
    _check_device(name, value, x.device)


def _is_like(value, x: Tensor) -> bool:
    try:
        check_like("", value, x)
    except (TypeError, ValueError):
        return False
    return True


def check_shard(x: Tensor, seed, global_shape, global_start) -> None:
    """Raises where x is no part of a sample of that shape, or the noise is none that has places."""
    if global_shape is None and global_start is None:
        if x.dim() and math.prod(x.shape[1:]) > MAX_POSITIONS:
            raise ValueError(f"x must have at most 2^42 elements a sample, got {math.prod(x.shape[1:])}")
        return
    if global_shape is None or global_start is None:
        raise ValueError("global_shape and global_start must be given together: the sample's shape and where x starts in it")
    if seed is None:
        raise ValueError("global_shape needs seed=: only the portable stream can be drawn shard by shard")
    for name, value in [("global_shape", global_shape), ("global_start", global_start)]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, int) for v in value):
            raise TypeError(f"{name} must be a list or tuple of whole numbers, got {value!r}")
        if len(value) != len(x.shape[1:]):
            raise ValueError(f"{name} must have the {len(x.shape[1:])} dimensions of one sample of x, got {len(value)}")
    for d, (whole, start, size) in enumerate(zip(global_shape, global_start, x.shape[1:], strict=True)):
        if not 0 <= start <= whole - size:
            raise ValueError(
                f"global_start must leave x inside global_shape: in dimension {d} of the sample x has {size} from {start}, "
                f"the whole has {whole}"
            )
    if math.prod(global_shape) > MAX_POSITIONS:
        raise ValueError(f"global_shape must have at most 2^42 elements, got {math.prod(global_shape)}")


def _check_out(request: StepRequest) -> None:
    x, out = request.x, request.out
    check_like("out", out, x)
    if out.dtype != x.dtype:
        raise TypeError(f"out must have the dtype of x, {x.dtype}, got {out.dtype}")
    inputs = [("x", x), *((f"history[{j}]", d) for j, d in enumerate(request.history))]
    if request.output is not None and request.output.unconditional is not None:
        inputs.append(("guidance[0]", request.output.unconditional))
    if isinstance(request.noise, Tensor):
        inputs.append(("noise", request.noise))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*request.tensors, *request.numbers, out)):
        raise ValueError("out must not be given where a gradient is required: use the returned tensor, or torch.no_grad()")
    if _overlaps_itself(out):
        raise ValueError("out must not overlap itself: it has several elements at one address, use out.contiguous()")
    for name, tensor in inputs:
        same = tensor.data_ptr() == out.data_ptr() and tensor.stride() == out.stride() and tensor.dtype == out.dtype
        if not same and _overlap(out, tensor):
            raise ValueError(f"out overlaps {name} partly: give {name} itself or memory of its own")


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """The address range that a tensor's elements lie in."""
    if tensor.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _marked(tensor: Tensor, start: int, end: int) -> Tensor:
    """Which bytes of [start, end) the elements of a tensor cover."""
    marks = torch.zeros(end - start, dtype=torch.bool, device="cpu")
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    marks.as_strided([*tensor.shape, size], [*strides, 1], tensor.data_ptr() - start).fill_(True)
    return marks


def _overlaps_itself(tensor: Tensor) -> bool:
    sizes = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach = 0
    for stride, size in sizes:
        if stride <= reach:
            return int(_marked(tensor, *_bytes(tensor)).sum()) != tensor.numel() * tensor.element_size()
        reach += stride * (size - 1)
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_start, a_end), (b_start, b_end) = _bytes(a), _bytes(b)
    if a_end <= b_start or b_end <= a_start:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    start, end = min(a_start, b_start), max(a_end, b_end)
    return bool((_marked(a, start, end) & _marked(b, start, end)).any())
