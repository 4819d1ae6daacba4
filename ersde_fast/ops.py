"""The step as operators of torch.library, for whoever traces or differentiates it; eager steps do not come by here.

`ersde_fast::step` is the step, `ersde_fast::step_from_output` the same from a model's output, which also returns the
prediction. Both are functional, know their shapes without running, and are linear in x, in every prediction and in the noise:
the derivatives in both directions are the weights, so nothing is kept for them but the table, and both outputs where the
scale of their guidance is followed.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .backends import choose
from .noise import Portable, TorchStream, float64_device, seed_table
from .reference import fake_as, guided_factors, input_weights, look_up, per_sample, table_for
from .request import ModelOutput, StepRequest
from .table import W_D, W_NOISE, W_X, Row, Table
from .tracing import is_stand_in, is_traced, is_wrapped

SCHEMA = (
    "(Tensor table, Tensor? plan_index, Tensor step_index, Tensor x, Tensor[] history, Tensor? noise, Tensor? seeds, "
    "SymInt[] global_shape, SymInt[] global_start{}) -> {}"
)
LIBRARY = torch.library.Library("ersde_fast", "DEF")
LIBRARY.define("step" + SCHEMA.format("", "Tensor"))
LIBRARY.define(
    "step_from_output" + SCHEMA.format(", Tensor? unconditional, Tensor? scale, bool cfg_pp=False", "(Tensor, Tensor)")
)
STEP = torch.ops.ersde_fast.step.default
STEP_FROM_OUTPUT = torch.ops.ersde_fast.step_from_output.default


def why_operator(request: StepRequest) -> str | None:
    """Why the step has to go through the dispatcher, if it has to; tensors of types that no kernel knows do not go there."""
    if not all(type(t) in (Tensor, torch.nn.Parameter) or is_stand_in(t) for t in request.tensors):
        return None
    tensors = [*request.tensors, *request.numbers]
    if any(map(is_wrapped, tensors)):
        return "an input is wrapped by a function transform"
    if any(map(_is_differentiated, tensors)):
        return "an input requires a gradient or carries a tangent"
    if is_traced() or any(map(is_stand_in, tensors)):
        return "it is being traced"
    return None


def _is_differentiated(tensor: Tensor) -> bool:
    """Whether autograd has to follow it, in either direction."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return tensor.is_floating_point() and forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def run(request: StepRequest):
    """The step as an operator: what is a number to an eager step is a tensor here, so that no trace holds it."""
    i, x, noise, seeds = request.i, request.x, request.noise, None
    shard: tuple[list[int], list[int]] = ([], [])
    plan_index, step_index = i if isinstance(i, tuple) else (None, i)
    if not isinstance(step_index, Tensor):
        step_index = torch.full((), step_index, dtype=torch.int64, device="cpu")
    table = table_for(request.plan, step_index if plan_index is None else i, x)
    if isinstance(noise, Portable):
        seeds, shard, noise = _seeds_to_trace(noise.seeds, x), (list(noise.global_shape), list(noise.global_start)), None
    table, plan_index, step_index, seeds = (fake_as(x, t) for t in (table, plan_index, step_index, seeds))
    if isinstance(noise, TorchStream):
        noise = noise.draw(x) if request.draws else None
    arguments = (table, plan_index, step_index, x, list(request.history), noise, seeds, *shard)
    if request.output is None:
        return STEP(*arguments)
    unconditional, scale, cfg_pp = request.output
    if unconditional is not None and not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float64, device="cpu")
    return STEP_FROM_OUTPUT(*arguments, unconditional, scale, cfg_pp)


def _seeds_to_trace(seeds, x: Tensor) -> Tensor:
    """The seeds as int64 [batch, 2], made of operators, so that neither the batch nor the seed is a constant of a trace."""
    batch = x.shape[0] if x.dim() else 1
    if isinstance(seeds, Tensor) and seeds.dim() == 2:
        return seeds.to(x.device)
    if isinstance(seeds, int):
        seeds = seeds if -(2**63) <= seeds < 2**63 else (seeds + 2**63) % 2**64 - 2**63
        samples = torch.arange(batch, device=x.device)
        return torch.stack([torch.full_like(samples, seeds), samples], dim=1)
    return seed_table(seeds, batch).to(x.device)


class Call(NamedTuple):
    """The arguments of one call of either operator, by name; `history` behind the others, so that they lie flat before it.

    What is known of an argument, such as whether it needs a gradient, is a Call too.
    """

    table: Tensor
    plan_index: Tensor | None
    step_index: Tensor
    x: Tensor
    noise: Tensor | None
    seeds: Tensor | None
    global_shape: Sequence[int]
    global_start: Sequence[int]
    unconditional: Tensor | None
    scale: Tensor | None
    cfg_pp: bool | None
    history: Sequence[Tensor]

    @classmethod
    def of(cls, arguments) -> "Call":
        """Of arguments in the schema's order."""
        return cls(**dict.fromkeys(IN_ORDER) | dict(zip(IN_ORDER, arguments, strict=False)))

    @classmethod
    def of_flat(cls, values) -> "Call":
        fixed = len(cls._fields) - 1
        return cls._make([*values[:fixed], values[fixed:]])

    def flat(self) -> tuple:
        return *self[:-1], *self.history

    def arguments(self, operator) -> list:
        """In the schema's order."""
        arguments = [
            *(getattr(self, name) for name in IN_ORDER[:-1]),
            bool(self.cfg_pp),
        ]  # which is not told where it is the default
        return arguments if operator is STEP_FROM_OUTPUT else arguments[: -len(OF_OUTPUT)]

    def linear(self) -> list:
        """Those that a step is linear in, but for the scale."""
        return [self.x, *self.history, self.noise, self.unconditional]


OF_OUTPUT = ("unconditional", "scale", "cfg_pp")
IN_ORDER = ("table", "plan_index", "step_index", "x", "history", "noise", "seeds", "global_shape", "global_start", *OF_OUTPUT)


def _kernel(operator, *arguments):
    """Runs the step on the fastest backend that fits."""
    call = Call.of(arguments)
    _check_indices(call)
    draws = call.seeds is not None
    plan, silent = Table(call.table, draws), call.noise is None and not draws
    if (silent or len(call.history) < plan.order) and call.plan_index is None and call.table.is_cpu and call.step_index.is_cpu:
        row = call.table[call.step_index]
        if silent and row[W_NOISE] != 0:
            raise ValueError("noise or seeds is needed: the weight of the noise is not 0 at this step")
        if (row[W_D + len(call.history) :] != 0).any():
            raise ValueError(f"history must hold every prediction that the step uses, got {len(call.history)}")
    i = call.step_index if call.plan_index is None else (call.plan_index, call.step_index)
    noise = TorchStream() if call.noise is None else call.noise
    if draws:
        noise = Portable(call.seeds, call.global_shape, call.global_start)
    output = None
    if operator is STEP_FROM_OUTPUT:
        one = call.scale is not None and call.scale.dim() == 0
        output = ModelOutput(call.unconditional, call.scale.item() if one else call.scale, bool(call.cfg_pp))
    request = StepRequest(plan, i, call.x, call.history, noise, draws, output)
    return choose(request).run(request)


def _check_indices(call: Call) -> None:
    """Raises where an index on the host is of no step: compiled code could not look before."""
    *num_plans, num_steps, _ = call.table.shape
    ends = [("step_index", call.step_index, num_steps)]
    if num_plans:
        ends.append(("plan_index", call.plan_index, num_plans[0]))
    if not call.step_index.is_cpu or not call.step_index.numel():
        return
    for name, index, end in ends:
        values: Any = index.tolist()
        if not all(0 <= value < end for value in (values if index.dim() else [values])):
            raise ValueError(f"{name} must be 0 to {end - 1}, got {values}")
    if num_plans and call.table[call.plan_index, call.step_index, W_X].isnan().any():
        raise ValueError(f"step_index must be a step of its plan, got {call.step_index.tolist()} of {call.plan_index.tolist()}")


def _shapes(operator, *arguments):
    """What the operator returns, without numbers."""
    call = Call.of(arguments)
    for tensor in call.linear():
        if tensor is not None:
            torch._check(tensor.shape == call.x.shape, lambda: "history, noise and unconditional must have the shape of x")
    if operator is STEP:
        return torch.empty_like(call.x)
    return torch.empty_like(call.x), torch.empty_like(call.x)


class _Form(NamedTuple):
    """What the derivative rules know of a call beside its numbers."""

    dim: int
    history: int
    predicts: bool
    guided: bool


def _coefficients(table, plan_index, step_index, scale, form: _Form) -> list[list]:
    """For each result, the factor of each input that it is linear in, in the order of `Call.linear`.

    Tensors of float64 that broadcast with x, or None where a result does not depend on an input.
    """
    columns = look_up(table, step_index if plan_index is None else (plan_index, step_index))
    row = Row.of([per_sample(column, form.dim) for column in columns.unbind(-1)])
    if not form.predicts:
        return [input_weights(row, form.history)]
    p_x, p_m, p_guide = factors = guided_factors(row.prediction, scale if form.guided else None, form.dim)
    return [input_weights(row, form.history, factors), [p_x, p_m, *[None] * form.history, p_guide]]


def _of_scale(table, plan_index, step_index, scale, form: _Form, output: Tensor, unconditional: Tensor) -> list[Tensor]:
    """The derivative of each result with respect to the scale of the guidance, in float64 where a device has it."""
    columns = look_up(table, step_index if plan_index is None else (plan_index, step_index))
    row: Any = Row.of([per_sample(column, form.dim) for column in columns.unbind(-1)])
    exact = torch.promote_types(output.dtype, torch.float32)
    difference = output.to(exact) - unconditional.to(exact)
    _, p_m = row.prediction
    return [factor.to(exact).to(output.device) * difference for factor in (row.w_d[0] * p_m, p_m)]


def _weighted(terms, dtype: torch.dtype) -> Tensor | None:
    """The sum of factor times tensor over the pairs that have both, accumulated as the step is."""
    terms = [(w, t) for w, t in terms if w is not None and t is not None]
    if not terms:
        return None
    exact = torch.float64 if torch.float64 in (dtype, *(t.dtype for _, t in terms)) else torch.float32
    return sum(w.to(exact).to(t.device) * t.to(exact) for w, t in terms).to(dtype)


class _Step(torch.autograd.function._SingleLevelFunction):
    """The derivative rules. One level of differentiation each: the dispatcher stacks levels, torch.func's too."""

    @staticmethod
    def forward(operator, follows_scale, *flat):
        # Outer levels may differentiate what happens here, so their switches are on, as they were outside.
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return operator(*Call.of_flat(flat).arguments(operator))

    @staticmethod
    def setup_context(ctx, inputs, output):
        operator, follows_scale, *flat = inputs
        call = Call.of_flat(flat)
        outputs = (call.history[0], call.unconditional) if follows_scale else (None, None)
        ctx.save_for_backward(call.table, call.plan_index, call.step_index, call.scale, *outputs)
        ctx.save_for_forward(call.table, call.plan_index, call.step_index, call.scale, *outputs)
        ctx.form = _Form(call.x.dim(), len(call.history), operator is STEP_FROM_OUTPUT, call.unconditional is not None)
        ctx.dtypes = [None if t is None else t.dtype for t in call.linear()]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        *known, output, guide = ctx.saved_tensors
        factors = _coefficients(*known, ctx.form)
        _, _, *needed = ctx.needs_input_grad
        needed = Call.of_flat(needed)
        x, *history, noise, unconditional = (
            _weighted([(f[k], g) for f, g in zip(factors, grads, strict=True)], dtype) if need else None
            for k, (dtype, need) in enumerate(zip(ctx.dtypes, needed.linear(), strict=True))
        )
        scale = None
        if needed.scale:
            of_scale = _of_scale(*known, ctx.form, output, guide)
            product = _weighted(zip(of_scale, grads, strict=True), of_scale[0].dtype)
            if product is not None:
                of_sample = product.sum(tuple(range(1, product.dim()))) if product.dim() > 1 else product
                scale = of_sample.reshape(known[-1].shape).to(known[-1])
        gradients = Call.of([])._replace(x=x, history=history, noise=noise, unconditional=unconditional, scale=scale)
        return None, None, *gradients.flat()

    @staticmethod
    def jvp(ctx, *tangents):
        _, _, *tangents = tangents
        call = Call.of_flat(tangents)
        *known, output, guide = ctx.saved_tensors
        terms = [list(zip(factors, call.linear(), strict=True)) for factors in _coefficients(*known, ctx.form)]
        if call.scale is not None:
            moved = per_sample(call.scale, ctx.form.dim)
            for of_result, factor in zip(terms, _of_scale(*known, ctx.form, output, guide), strict=True):
                of_result.append((moved, factor))
        any_tangent = next(t for t in (*call.linear(), output) if t is not None)
        results = []
        for of_result in terms:
            result = _weighted(of_result, ctx.dtypes[0])
            results.append(torch.zeros_like(any_tangent, dtype=ctx.dtypes[0]) if result is None else result)
        return tuple(results) if ctx.form.predicts else results[0]


def _differentiable(operator, *arguments):
    """Follows what autograd wants to know, and passes on."""
    call = Call.of(arguments)
    follows_scale = call.scale is not None and _is_differentiated(call.scale)
    if follows_scale or any(_is_differentiated(t) for t in call.linear() if t is not None):
        with enable_single_level_autograd_function():
            return _Step.apply(operator, follows_scale, *call.flat())
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _batched(operator, info, in_dims, *arguments):
    """vmap: the mapped dimension joins the batch, so one step serves all; noise depends on seeds and position, as without."""
    call, dims, n = Call.of(arguments), Call.of(in_dims), info.batch_size
    if dims.table is not None:
        raise NotImplementedError("vmap over the plan is not supported: stack the plans and map plan_index")

    def first(tensor, dim):
        return tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def joined(tensor, dim):
        """[n, batch, ...] to [n batch, ...]; what is [n] or [n, ...] of 0-dim samples stays."""
        return None if tensor is None else first(tensor, dim).flatten(0, min(1, tensor_dims))

    tensor_dims = call.x.dim() - (dims.x is not None)
    batch = first(call.x, dims.x).shape[1] if tensor_dims else 1

    def numbers(tensor, dim):
        """One for all, or one for each sample."""
        if tensor is None or (dim is None and tensor.dim() == 0):
            return tensor
        tensor = first(tensor, dim)
        return (tensor[:, None].expand(n, batch) if tensor.dim() == 1 else tensor).reshape(n * batch)

    table, plan_index = call.table, numbers(call.plan_index, dims.plan_index)
    step_index = numbers(call.step_index, dims.step_index)
    if step_index.dim() == 1 and plan_index is None:
        step_index = step_index.to(call.x.device)
        table, plan_index = table.to(float64_device(call.x.device))[None], torch.zeros_like(step_index)
    whole = call._replace(
        table=table,
        plan_index=plan_index,
        step_index=step_index,
        x=joined(call.x, dims.x),
        history=[joined(d, dim) for d, dim in zip(call.history, dims.history, strict=True)],
        noise=joined(call.noise, dims.noise),
        seeds=None if call.seeds is None else first(call.seeds, dims.seeds).reshape(n * batch, 2),
        unconditional=joined(call.unconditional, dims.unconditional),
        scale=numbers(call.scale, dims.scale),
    )
    results = operator(*whole.arguments(operator))

    def split(result):
        return result.unflatten(0, (n, batch)) if tensor_dims else result

    return (split(results), 0) if operator is STEP else (tuple(map(split, results)), (0, 0))


for _operator, _name in [(STEP, "ersde_fast::step"), (STEP_FROM_OUTPUT, "ersde_fast::step_from_output")]:
    LIBRARY.impl(_name, functools.partial(_kernel, _operator), "CompositeExplicitAutograd")
    LIBRARY.impl(_name, functools.partial(_differentiable, _operator), "Autograd")
    torch.library.register_fake(_name, functools.partial(_shapes, _operator), lib=LIBRARY)
    torch.library.register_vmap(_name, functools.partial(_batched, _operator), lib=LIBRARY)
