"""The step as operators of torch.library, for whoever traces or differentiates it; eager steps do not come by here.

`ersde_fast::step` is the step, `ersde_fast::step_from_output` the same from a model's output, which also returns the
prediction. Both are functional, know their shapes without running, and are linear in x, in every prediction and in the noise:
the derivatives in both directions are the weights, so nothing is kept for them but the table.
"""

import functools

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backends import choose
from .noise import Portable, TorchStream, seed_table
from .plan import COLUMNS_BEHIND, PlanStack
from .reference import look_up, per_sample, table_for
from .request import ModelOutput, StepRequest

TRACED = ("FakeTensor", "FunctionalTensor")  # types that stand for plain tensors while torch traces

SCHEMA = (
    "(Tensor table, Tensor? plan_index, Tensor step_index, Tensor x, Tensor[] history, Tensor? noise, Tensor? seeds, "
    "SymInt[] global_shape, SymInt[] global_start{}) -> {}"
)
LIBRARY = torch.library.Library("ersde_fast", "DEF")
LIBRARY.define("step" + SCHEMA.format("", "Tensor"))
LIBRARY.define("step_from_output" + SCHEMA.format(", int kind, Tensor? unconditional, Tensor? scale", "(Tensor, Tensor)"))
STEP = torch.ops.ersde_fast.step.default
STEP_FROM_OUTPUT = torch.ops.ersde_fast.step_from_output.default


def why_operator(tensors: list[Tensor]) -> str | None:
    """Why the step has to go through the dispatcher, if it has to; tensors of types that no kernel knows do not go there."""
    if not all(type(t) in (Tensor, torch.nn.Parameter) or type(t).__name__ in TRACED for t in tensors):
        return None
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return "an input is wrapped by a function transform"
    if any(map(_is_differentiated, tensors)):
        return "an input requires a gradient or carries a tangent"
    if is_in_torch_dispatch_mode() or any(type(t).__name__ in TRACED for t in tensors):
        return "it is being traced"
    return None


def _is_differentiated(tensor: Tensor) -> bool:
    """Whether autograd has to follow it, in either direction."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def run(request: StepRequest):
    """The step as an operator: what is a number to an eager step is a tensor here, so that no trace holds it."""
    i, x, noise, seeds, shard = request.i, request.x, request.noise, None, ([], [])
    plan_index, step_index = i if isinstance(i, tuple) else (None, i)
    if not isinstance(step_index, Tensor):
        step_index = torch.full((), step_index, dtype=torch.int64, device="cpu")
    table = table_for(request.plan, step_index if plan_index is None else i, x)
    if isinstance(noise, Portable):
        seeds, shard, noise = _seeds_to_trace(noise.seeds, x), (list(noise.global_shape), list(noise.global_start)), None
    if getattr(x, "fake_mode", None) is not None and not x.fake_mode.allow_non_fake_inputs:
        fake = functools.partial(_fake, x.fake_mode)
        table, plan_index, step_index, seeds = map(fake, (table, plan_index, step_index, seeds))
    if isinstance(noise, TorchStream):
        noise = noise.draw(x) if request.draws else None
    arguments = (table, plan_index, step_index, x, list(request.history), noise, seeds, *shard)
    if request.output is None:
        return STEP(*arguments)
    kind, unconditional, scale = request.output
    if unconditional is not None and not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float64, device="cpu")
    return STEP_FROM_OUTPUT(*arguments, kind, unconditional, scale)


def _fake(fake_mode, tensor: Tensor | None) -> Tensor | None:
    if tensor is None or type(tensor).__name__ in TRACED:
        return tensor
    return fake_mode.from_tensor(tensor, static_shapes=True)


def _seeds_to_trace(seeds, x: Tensor) -> Tensor:
    """The seeds as int64 [batch, 2], made of operators, so that neither the batch nor the seed is a constant of a trace."""
    batch = x.shape[0] if x.dim() else 1
    if isinstance(seeds, Tensor) and seeds.dim() == 2:
        return seeds
    if isinstance(seeds, int):
        seeds = seeds if -(2**63) <= seeds < 2**63 else (seeds + 2**63) % 2**64 - 2**63
        samples = torch.arange(batch, device=x.device)
        return torch.stack([torch.full_like(samples, seeds), samples], dim=1)
    return seed_table(seeds, batch).to(x.device)


def _kernel(table, plan_index, step_index, x, history, noise, seeds, *shard_and_output):
    """Runs the step on the fastest backend that fits."""
    global_shape, global_start, *behind = shard_and_output
    i = step_index if plan_index is None else (plan_index, step_index)
    order, silent = table.shape[-1] - 2 - COLUMNS_BEHIND, noise is None and seeds is None
    if (silent or len(history) < order) and plan_index is None and table.is_cpu and step_index.is_cpu:
        row = table[step_index]
        if silent and row[order + 1] != 0:
            raise ValueError("noise or seeds is needed: the weight of the noise is not 0 at this step")
        if (row[1 + len(history) : order + 1] != 0).any():
            raise ValueError(f"history must hold every prediction that the step uses, got {len(history)}")
    if seeds is not None:
        noise = Portable(seeds, global_shape, global_start)
    output = None
    if behind:
        kind, unconditional, scale = behind
        output = ModelOutput(kind, unconditional, scale.item() if scale is not None and scale.dim() == 0 else scale)
    source = TorchStream() if noise is None else noise
    request = StepRequest(PlanStack(table, seeds is not None), i, x, history, source, seeds is not None, output)
    return choose(request).run(request)


def _shapes(table, plan_index, step_index, x, history, noise, seeds, global_shape, global_start, *behind):
    """What the operator returns, without numbers."""
    for tensor in (*history, noise, *behind[1:2]):
        if tensor is not None:
            torch._check(tensor.shape == x.shape, lambda: "history, noise and unconditional must have the shape of x")
    return (torch.empty_like(x), torch.empty_like(x)) if behind else torch.empty_like(x)


def _coefficients(table, plan_index, step_index, scale, dim: int, uses: int, kind: int, guided: bool) -> list[list]:
    """For each result, the factor of each input: of x, the predictions, the noise, and the unconditional output.

    Tensors of float64 that broadcast with x, of `dim` dimensions, or None where a result does not depend on an input.
    """
    row = look_up(table, step_index if plan_index is None else (plan_index, step_index))
    column = [per_sample(c, dim) for c in row.unbind(-1)]
    noise_column = len(column) - 1 - COLUMNS_BEHIND
    plain = [*column[: 1 + uses], column[noise_column], None]
    if kind < 0:
        return [plain]
    p_x, p_m = column[noise_column + 1 + 2 * kind], column[noise_column + 2 + 2 * kind]
    scale = per_sample(scale, dim) if guided else 1.0
    predicted = [p_x, p_m * scale, *[None] * uses, p_m * (1 - scale) if guided else None]
    chained = [None if p is None else column[1] * p for p in predicted]
    own = [column[0], None, *plain[2:]]
    return [[b if a is None else a if b is None else a + b for a, b in zip(own, chained, strict=True)], predicted]


def _weighted(terms, dtype: torch.dtype) -> Tensor | None:
    """The sum of factor times tensor over the pairs that have both, accumulated as the step is."""
    terms = [(w, t) for w, t in terms if w is not None and t is not None]
    if not terms:
        return None
    exact = torch.float64 if torch.float64 in (dtype, *(t.dtype for _, t in terms)) else torch.float32
    return sum(w.to(exact) * t.to(exact) for w, t in terms).to(dtype)


def _linear(flat, n: int) -> list:
    """Of the operator's arguments, its n predictions not in a list, those it is linear in: x, predictions, noise, unconditional."""
    x, *rest = flat[3:]
    return [x, *rest[:n], rest[n], rest[n + 5] if len(rest) > n + 4 else None]


class _Step(torch.autograd.function._SingleLevelFunction):
    """The derivative rules. One level of differentiation each: the dispatcher stacks levels, torch.func's too."""

    @staticmethod
    def forward(operator, n, table, plan_index, step_index, x, *rest):
        # Outer levels may differentiate what happens here, so their switches are on, as they were outside.
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return operator(table, plan_index, step_index, x, rest[:n], *rest[n:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, n, *flat = inputs
        kind, unconditional, scale = flat[8 + n :] or (-1, None, None)
        table, plan_index, step_index, x = flat[:4]
        ctx.save_for_backward(table, plan_index, step_index, scale)
        ctx.save_for_forward(table, plan_index, step_index, scale)
        ctx.form = (x.dim(), n, kind, unconditional is not None)
        ctx.dtypes = [None if t is None else t.dtype for t in _linear(flat, n)]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        _, n, kind, _ = ctx.form
        factors = _coefficients(*ctx.saved_tensors, *ctx.form)
        needed = _linear(ctx.needs_input_grad[2:], n)
        x, *history, noise, unconditional = (
            _weighted([(f[k], g) for f, g in zip(factors, grads, strict=True)], dtype) if need else None
            for k, (dtype, need) in enumerate(zip(ctx.dtypes, needed, strict=True))
        )
        behind = () if kind < 0 else (None, unconditional, None)
        return *[None] * 5, x, *history, noise, None, None, None, *behind

    @staticmethod
    def jvp(ctx, *tangents):
        _, n, kind, _ = ctx.form
        tangents = _linear(tangents[2:], n)
        any_tangent = next(t for t in tangents if t is not None)
        results = []
        for factors in _coefficients(*ctx.saved_tensors, *ctx.form):
            result = _weighted(zip(factors, tangents, strict=True), ctx.dtypes[0])
            results.append(torch.zeros_like(any_tangent, dtype=ctx.dtypes[0]) if result is None else result)
        return results[0] if kind < 0 else tuple(results)


def _differentiable(operator, table, plan_index, step_index, x, history, *rest):
    """Follows what autograd wants to know, and passes on."""
    flat = (table, plan_index, step_index, x, *history, *rest)
    if any(_is_differentiated(t) for t in _linear(flat, len(history)) if t is not None):
        with enable_single_level_autograd_function():
            return _Step.apply(operator, len(history), *flat)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(table, plan_index, step_index, x, history, *rest)


def _batched(operator, info, in_dims, *args):
    """vmap: the mapped dimension joins the batch, so one step serves all; noise depends on seeds and position, as without."""
    table, plan_index, step_index, x, history, noise, seeds, global_shape, global_start, *behind = args
    table_dim, plan_dim, step_dim, x_dim, history_dims, noise_dim, seeds_dim, _, _, *behind_dims = in_dims
    if table_dim is not None:
        raise NotImplementedError("vmap over the plan is not supported: stack the plans and map plan_index")
    kind, unconditional, scale = behind or (-1, None, None)
    _, unconditional_dim, scale_dim = behind_dims or (None, None, None)
    n = info.batch_size

    def first(tensor, dim):
        return tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def joined(tensor, dim):
        """[n, batch, ...] to [n batch, ...]; what is [n] or [n, ...] of 0-dim samples stays."""
        return None if tensor is None else first(tensor, dim).flatten(0, min(1, tensor_dims))

    tensor_dims = x.dim() - (x_dim is not None)
    batch = first(x, x_dim).shape[1] if tensor_dims else 1

    def numbers(tensor, dim):
        """One for all, or one for each sample."""
        if tensor is None or (dim is None and tensor.dim() == 0):
            return tensor
        tensor = first(tensor, dim)
        return (tensor[:, None].expand(n, batch) if tensor.dim() == 1 else tensor).reshape(n * batch)

    plan_index, step_index = numbers(plan_index, plan_dim), numbers(step_index, step_dim)
    if step_index.dim() == 1 and plan_index is None:
        step_index = step_index.to(x.device)
        table, plan_index = table.to(x.device)[None], torch.zeros_like(step_index)
    if seeds is not None:
        seeds = first(seeds, seeds_dim).reshape(n * batch, 2)
    results = operator(
        table, plan_index, step_index, joined(x, x_dim), [joined(d, dim) for d, dim in zip(history, history_dims, strict=True)],
        joined(noise, noise_dim), seeds, global_shape, global_start,
        *([kind, joined(unconditional, unconditional_dim), numbers(scale, scale_dim)] if behind else []),
    )  # fmt: skip

    def split(result):
        return result.unflatten(0, (n, batch)) if tensor_dims else result

    return (tuple(map(split, results)), (0, 0)) if behind else (split(results), 0)


for _operator, _name in [(STEP, "ersde_fast::step"), (STEP_FROM_OUTPUT, "ersde_fast::step_from_output")]:
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, functools.partial(_differentiable, _operator), "Autograd")
    torch.library.register_fake(_name, _shapes, lib=LIBRARY)
    torch.library.register_vmap(_name, functools.partial(_batched, _operator), lib=LIBRARY)
