"""The step as an operator: its derivatives, torch.func, torch.compile, torch.export, FakeTensor and autocast."""

import functools
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ersde_fast import er_sde_plan, fast_step, ops, reference_step, stack_plans, step_log_prob
from ersde_fast.predictions import PREDICTION_TYPES

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIGMAS = [9, 8, 6.5, 5, 4, 3, 0]
PLANS = {n: er_sde_plan(SIGMAS, order=n, method="newton", sigma_data=0.5) for n in (1, 2, 3, 4, 5)}
PLAN = PLANS[3]
STACK = stack_plans([PLAN, PLAN.starting_at(1)])
# The step from predictions, and from a model's output with guidance: (prediction_type, guided).
FORMS = [(None, False), ("epsilon", False), *((name, True) for name in PREDICTION_TYPES)]


def tensors(shape, count, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def form(name, guided, plan=PLAN, i=4):
    """The step as a function of the tensors that it is linear in."""
    order = plan.order

    def step(x, noise, unconditional, *history):
        guidance = (unconditional, 2.5) if guided else None
        return fast_step(plan, i, x, list(history[:order]), noise=noise, prediction_type=name, guidance=guidance)

    return step


# ---- derivatives ----


@pytest.mark.parametrize("name, guided", FORMS)
@pytest.mark.parametrize("order", PLANS)
def test_first_derivatives_in_both_directions(name, guided, order):
    leaves = [t.requires_grad_() for t in tensors((2, 3), order + 3)]
    step = form(name, guided, PLANS[order])
    if not guided:
        step = functools.partial(lambda step, x, noise, *history: step(x, noise, None, *history), step)
        leaves.pop(2)
    assert torch.autograd.gradcheck(
        step, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("name, guided", [(None, False), ("v", True)])
def test_second_derivatives(name, guided):
    leaves = [t.requires_grad_() for t in tensors((2, 2), 6)]
    step = form(name, guided)
    used = leaves if guided else [leaves[0], leaves[1], *leaves[3:]]
    call = step if guided else lambda x, noise, *history: step(x, noise, None, *history)
    assert torch.autograd.gradgradcheck(call, used, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_gradients_are_the_weights_in_the_dtype_of_each_input(dtype, other):
    x, noise, *history = [t.requires_grad_() for t in (tensors((2, 5), 1, dtype) + tensors((2, 5), 4, other))]
    fast_step(PLAN, 4, x, history, noise=noise).sum().backward()
    row = PLAN.rows[4]
    for leaf, w in zip([x, *history, noise], [row.w_x, *row.w_d, row.w_noise], strict=True):
        exact = torch.float64 if torch.float64 in (dtype, other) else torch.float32
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(
            leaf.grad, torch.full_like(leaf, torch.tensor(w, dtype=exact).to(leaf.dtype)), rtol=1e-15, atol=0
        )


@pytest.mark.parametrize("cfg_pp", [False, True])
@pytest.mark.parametrize(
    "shape, i", [((2, 3), 4), ((), 4), ((2,), torch.tensor(4)), ((2, 1, 2), (torch.tensor([0, 1]), torch.tensor([4, 2])))]
)
def test_derivatives_with_respect_to_the_scale(shape, i, cfg_pp):
    """In both directions, of both results, and beside the others; the results are those of a scale that nobody follows."""
    x, unconditional, *history = [t.requires_grad_() for t in tensors(shape, 5)]
    scale = torch.linspace(0.2, 0.7, shape[0] if shape else 1, dtype=torch.float64).requires_grad_()

    def step(scale, x, unconditional, *history):
        guidance = unconditional, scale
        plan = STACK if isinstance(i, tuple) else PLAN
        return fast_step(plan, i, x, list(history), seed=3, prediction_type="v", guidance=guidance, cfg_pp=cfg_pp)

    leaves = scale, x, unconditional, *history
    assert torch.autograd.gradcheck(step, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(step, leaves)
    alone = [t.detach() for t in leaves[1:]]
    for followed, plain in zip(step(scale, *alone), step(scale.detach(), *alone), strict=True):
        assert followed.requires_grad and torch.equal(followed, plain)


def test_each_sample_of_a_mixed_batch_has_the_weights_of_its_row():
    x, *history = [t.requires_grad_() for t in tensors((2, 3), 4)]
    index = torch.tensor([0, 1]), torch.tensor([4, 1])
    fast_step(STACK, index, x, history, seed=5).sum().backward()
    for b, row in enumerate([PLAN.rows[4], PLAN.starting_at(1).rows[1]]):
        for leaf, w in zip([x, *history], [row.w_x, *row.w_d, *[0.0] * (3 - len(row.w_d))], strict=True):
            torch.testing.assert_close(leaf.grad[b], torch.full((3,), w, dtype=torch.float64), rtol=1e-15, atol=0)


def test_no_activation_is_kept():
    """What autograd holds for the backward pass is the table and an index, whatever the size of the tensors."""
    x, noise, unconditional, *history = [t.requires_grad_() for t in tensors((4, 1000), 6)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sample, denoised = form("v", True)(x, noise, unconditional, *history)
    assert kept and sum(t.numel() for t in kept) <= PLAN.table.numel() + 2
    assert all(t.untyped_storage().nbytes() <= PLAN.table.untyped_storage().nbytes() for t in kept)
    assert sample.requires_grad and denoised.requires_grad


def test_nothing_stale_and_the_noise_held_fixed():
    """The gradient through a step that draws is the one with the same noise given; the same seed draws the same."""
    x, *history = tensors((2, 5), 4)
    x.requires_grad_()
    noise = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for kwargs in (dict(generator=torch.Generator().manual_seed(3)), dict(noise=noise)):
        result = fast_step(PLAN, 4, x, history, **kwargs)
        (gradient,) = torch.autograd.grad(result.square().sum(), x)
        torch.testing.assert_close(gradient, 2 * result.detach() * PLAN.rows[4].w_x)
    with torch.no_grad():
        assert torch.equal(fast_step(PLAN, 4, x, history, seed=5), fast_step(PLAN, 4, x.detach(), history, seed=5))
    assert torch.equal(fast_step(PLAN, 4, x, history, seed=5).detach(), fast_step(PLAN, 4, x.detach(), history, seed=5))


def test_a_differentiable_loop_with_checkpoints_round_the_model():
    """The gradient of a whole run, with activations of the model recomputed, is the plain one; and the noise did not change."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
    start = torch.randn(3, 4, dtype=torch.float64)

    def gradient(model, step):
        net.zero_grad()
        x, history = start, []
        for i in range(PLAN.num_steps):
            history = [model(x), *history[:2]]
            x = step(PLAN, i, x, history, seed=5)
        x.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    expected = gradient(net, reference_step)
    checkpointed = lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)  # noqa: E731
    for model in (net, checkpointed):
        torch.testing.assert_close(gradient(model, fast_step), expected, rtol=1e-10, atol=1e-12)


# ---- torch.func ----


def test_vmap_over_anything():
    x, noise, *history = tensors((3, 2, 4), 5)
    step = lambda x, z, *h: fast_step(PLAN, 4, x, list(h), noise=z)  # noqa: E731
    expected = reference_step(PLAN, 4, x, history, noise=noise)
    close = functools.partial(torch.testing.assert_close, rtol=1e-14, atol=1e-14)
    close(torch.func.vmap(step)(x, noise, *history), expected)
    close(torch.func.vmap(step, in_dims=2, out_dims=2)(x, noise, *history), expected)
    close(torch.func.vmap(torch.func.vmap(torch.func.vmap(step)))(x, noise, *history), expected)
    shared = torch.func.vmap(lambda x: step(x, noise[0], *[h[0] for h in history]))(x)
    close(shared, torch.stack([step(x[k], noise[0], *[h[0] for h in history]) for k in range(3)]))


def test_vmap_keeps_the_portable_noise_of_each_call():
    x, unconditional, *history = tensors((3, 2, 4), 5)
    seeds, steps = torch.arange(12).view(3, 2, 2), torch.tensor([2, 4, 3])
    scales = torch.linspace(0, 5, 6, dtype=torch.float64).view(3, 2)
    calls = {
        "one seed": (lambda x, h: fast_step(PLAN, 4, x, [h, h, h], seed=7), (x, history[0])),
        "seeds": (lambda x, s: fast_step(PLAN, 4, x, [x, x, x], seed=s), (x, seeds)),
        "steps": (lambda x, i: fast_step(PLAN, i, x, [x, x, x], seed=7), (x, steps)),
        "plans": (lambda x, p: fast_step(STACK, (p, p + 1), x, [x, x, x], seed=7), (x, torch.tensor([[0, 1]] * 3))),
        "outputs": (
            lambda x, h, u, s: fast_step(PLAN, 4, x, [h, x, x], seed=7, prediction_type="v", guidance=(u, s))[1],
            (x, history[0], unconditional, scales),
        ),
    }
    for name, (call, mapped) in calls.items():
        expected = torch.stack([call(*(t[k] for t in mapped)) for k in range(3)])
        assert torch.equal(torch.func.vmap(call)(*mapped), expected), name


def test_transforms_of_transforms():
    x, noise, unconditional, *history = tensors((2, 3), 6)
    step = lambda x: form("v", True)(x, noise, unconditional, *history)[0]  # noqa: E731
    slope = torch.func.grad(lambda x: step(x).sum())(x)
    w = PLAN.rows[4]
    expected = w.w_x + w.w_d[0] * PLAN.predicting("v").rows[4].prediction[0]
    torch.testing.assert_close(slope, torch.full_like(x, expected))
    _, tangent = torch.func.jvp(step, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.full_like(x, expected))
    square = lambda x: step(x).square().sum()  # noqa: E731
    curvature = 2 * expected**2 * torch.eye(6, dtype=torch.float64).view(2, 3, 2, 3)
    for hessian in (
        torch.func.hessian,
        lambda f: torch.func.jacrev(torch.func.jacrev(f)),
        lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    ):
        torch.testing.assert_close(hessian(square)(x), curvature)
    per_sample = torch.func.vmap(torch.func.grad(lambda x, z: fast_step(PLAN, 4, x, [x, x, x], noise=z).sum()))(x, noise)
    torch.testing.assert_close(per_sample, torch.full_like(x, w.w_x + sum(w.w_d)))


def test_a_backend_that_is_named_cannot_be_transformed():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match='backend "cpu" cannot run this step: an input is wrapped by a function transform'):
        torch.func.vmap(lambda x: fast_step(PLAN, 0, x, [x], seed=1, backend="cpu"))(x)
    with pytest.raises(ValueError, match='backend "cpu" cannot run this step: an input requires a gradient'):
        fast_step(PLAN, 0, x.requires_grad_(), [x], seed=1, backend="cpu")
    assert fast_step(PLAN, 0, x, [x], seed=1, backend="reference").requires_grad


# ---- torch.library, torch.compile, torch.export ----


@pytest.mark.parametrize("order, dtype", zip(PLANS, [*DTYPES, DTYPES[0]], strict=True))
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(order, dtype, requires_grad):
    """Every length of history and every dtype; how the operator traces depends on neither."""
    table, step = PLANS[order].table, torch.tensor(4)
    x, noise, unconditional, *history = [t.requires_grad_(requires_grad) for t in tensors((2, 3, 4), order + 3, dtype)]
    seeds, scale = torch.tensor([[5, 0], [6, 1]]), torch.tensor(2.5, dtype=torch.float64)
    torch.library.opcheck(ops.STEP, (table, None, step, x, history, noise, None, [], []))
    torch.library.opcheck(ops.STEP, (table, None, step, x, history, None, seeds, [], []))
    of_v, of_epsilon = PLANS[order].predicting("v", cfg_pp=True).table, PLANS[order].predicting("epsilon").table
    torch.library.opcheck(
        ops.STEP_FROM_OUTPUT, (of_v, None, step, x, history, None, seeds, [4, 5], [1, 1], unconditional, scale, True)
    )
    index = (torch.tensor([0, 0]), torch.tensor([4, 2]))
    torch.library.opcheck(ops.STEP_FROM_OUTPUT, (of_epsilon[None], *index, x, history, None, seeds, [], [], None, None))


def loop(step, dtype, steps=50, order=3):
    """50 steps of one function of tensors alone: the index, the sample, the output, the earlier predictions, the seeds."""
    x = tensors((2, 4, 8, 8), 1, dtype)[0] * 10
    history = [torch.zeros_like(x) for _ in range(order - 1)]
    for i in range(steps):
        seeds = torch.tensor([[i, 0], [i + 1, 1]])
        x, denoised = step(torch.tensor(i), x, torch.tanh(x), *history, seeds)
        history = [denoised, *history][: order - 1]
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", PLANS)
def test_a_compiled_loop_compiles_nothing_after_its_first_step(dtype, order):
    torch._dynamo.reset()
    plan = er_sde_plan(torch.linspace(10, 0, 51), order=order, method="newton")

    def step(i, x, output, *history_and_seeds):
        *history, seeds = history_and_seeds
        return fast_step(plan, i, x, [output, *history], seed=seeds, prediction_type="v")

    counter = CompileCounterWithBackend("inductor" if order == 3 else "aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    loop(compiled, dtype, steps=1, order=order)
    after_the_first_step = counter.frame_count
    assert torch.equal(loop(compiled, dtype, order=order), loop(step, dtype, order=order))
    assert counter.frame_count == after_the_first_step


def test_another_plan_of_the_same_form_needs_no_other_code():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda plan, i, x, h: fast_step(plan, i, x, [h, h, h], seed=3), fullgraph=True, backend=counter)
    x, h = tensors((2, 5), 2)
    for plan in (PLAN, er_sde_plan([5, 4, 3, 2, 1, 0.5, 0.1])):
        for i in range(6):
            assert torch.equal(step(plan, torch.tensor(i), x, h), fast_step(plan, i, x, [h, h, h], seed=3))
    assert counter.frame_count == 1


def test_compiled_with_a_number_for_the_step_a_batch_of_any_size_and_gradients():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda i, x, a, b, c: fast_step(PLAN, i, x, [a, b, c], seed=5), fullgraph=True, backend=counter, dynamic=True
    )
    for i, n in [(2, 5), (3, 4), (4, 9), (2, 6)]:
        x, *history = [t.requires_grad_() for t in tensors((n, 3), 4)]
        result = step(i, x, *history)
        assert torch.equal(result, fast_step(PLAN, i, x, history, seed=5))
        (gradient,) = torch.autograd.grad(result.sum(), history[1])
        torch.testing.assert_close(gradient, torch.full_like(x, PLAN.rows[i].w_d[1]))
    assert counter.frame_count == 1


def test_compiled_forms():
    """Mixed batches, log-densities, torch's noise, and transforms within compiled code."""
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    x, noise, *history = tensors((2, 5), 5)
    index = torch.tensor([0, 1]), torch.tensor([4, 1])
    step = lambda p, i, x: fast_step(STACK, (p, i), x, history, seed=3)  # noqa: E731
    assert torch.equal(compiled(step)(*index, x), step(*index, x))
    step = lambda i, x: fast_step(PLAN, i, x, history, seed=3, return_log_prob=True)  # noqa: E731
    for i in (4, torch.tensor(4)):
        for a, b in zip(compiled(step)(i, x), step(i, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    step = lambda x: fast_step(PLAN, 4, x, history)  # noqa: E731
    torch.manual_seed(3)
    drawn = compiled(step)(x)
    torch.manual_seed(3)
    assert torch.equal(drawn, step(x))
    step = torch.func.grad(lambda x: fast_step(PLAN, 4, x, history, noise=noise).square().sum())
    torch.testing.assert_close(compiled(step)(x), step(x))
    step = torch.func.vmap(lambda x: fast_step(PLAN, 4, x, [x, x, x], seed=3))
    assert torch.equal(compiled(step)(x), step(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """The step in an exported program: any batch, any step."""

    class Step(torch.nn.Module):
        def forward(self, i, x, output, a, b):
            return fast_step(PLAN, i, x, [output, a, b], seed=3, prediction_type="flow", guidance=(a, 1.5))

    x, *history = tensors((2, 3, 4), 4)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(
        Step(), (torch.tensor(4), x, *history), dynamic_shapes=({}, batch, batch, batch, batch), strict=strict
    ).module()
    x, *history = tensors((7, 3, 4), 4)
    for i in (3, 4):
        for a, b in zip(program(torch.tensor(i), x, *history), Step()(i, x, *history), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_tracer_sees_the_operator(mode, pre_dispatch):
    x, *history = tensors((2, 3), 4)
    step = lambda x: fast_step(PLAN, 4, x, history, seed=3)  # noqa: E731
    traced = make_fx(step, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(x)
    assert "ersde_fast.step" in traced.code and torch.equal(traced(x + 1), step(x + 1))


def test_fake_tensors_have_the_shape_and_strides_of_the_result():
    x, *history = (t.to(memory_format=torch.channels_last) for t in tensors((2, 3, 4, 4), 4))
    for kwargs in (dict(seed=3), {}, dict(seed=[(1, 2), (3, 4)]), dict(noise=x), dict(prediction_type="v", guidance=(x, 2.0))):
        real = fast_step(PLAN, 4, x, history, **kwargs)
        with FakeTensorMode() as mode:
            fake = lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v  # noqa: E731
            kwargs = {k: tuple(map(fake, v)) if isinstance(v, tuple) else fake(v) for k, v in kwargs.items()}
            shapes = fast_step(PLAN, 4, fake(x), [fake(d) for d in history], **kwargs)
        for r, s in zip(*[v if isinstance(v, tuple) else (v,) for v in (real, shapes)], strict=True):
            assert (r.shape, r.stride(), r.dtype) == (s.shape, s.stride(), s.dtype) and type(s).__name__ == "FakeTensor"


def test_an_operator_without_noise_where_the_row_needs_some():
    x, *history = tensors((2, 3), 4)
    with pytest.raises(ValueError, match="noise or seeds is needed"):
        ops.STEP(PLAN.table, None, torch.tensor(4), x, history, None, None, [], [])
    assert torch.equal(ops.STEP(PLAN.table, None, torch.tensor(5), x, history, None, None, [], []), history[0])


def test_what_cannot_be_compiled_runs_between_graphs_or_says_so():
    x, *history = tensors((2, 3), 4)
    named = lambda x: fast_step(PLAN, 4, x, history, seed=3, backend="cpu") * 2  # noqa: E731
    assert torch.equal(torch.compile(named, backend="eager")(x), named(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ValueError"):
        torch.compile(named, backend="eager", fullgraph=True)(x)
    short = lambda x: fast_step(PLAN, 4, x, history[:1], seed=3)  # noqa: E731
    with pytest.raises(ValueError, match="history must hold every prediction that the step uses, got 1"):
        torch.compile(short, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(global_shape=(3,)), "global_shape and global_start must be given together"),
        (dict(global_shape=(3,), global_start=(1,)), "global_start must leave x inside global_shape"),
        (dict(global_shape=(3, 3), global_start=(0, 0)), "global_shape must have the 1 dimensions of one sample of x, got 2"),
        (dict(global_shape=(3,), global_start=(0,), seed=None), "global_shape needs seed="),
        (dict(prediction_type="v", cfg_pp=True), "cfg_pp needs guidance="),
        (dict(guidance=(torch.ones(2, 3), 2.0)), "guidance needs a prediction_type"),
        (dict(prediction_type="v", guidance=(torch.ones(2, 3), torch.ones(2))), "must be a number or float64"),
        (dict(plan=STACK, i=(torch.tensor([0, 1]), torch.tensor([4, 1])), seed=None), "seed or noise is needed"),
        (dict(i=torch.tensor(4), history=[torch.ones(2, 3)]), "history must hold the 3 newest predictions"),
        (dict(i=6), "i must be 0 to 5"),
        (dict(i=True), "i must be a whole number"),
        (dict(seed=True), "seed must be a whole number"),
    ],
)
def test_compiled_code_refuses_what_eager_code_refuses(arguments, message):
    """While it is compiled, in the same words."""
    torch._dynamo.reset()
    x, *history = tensors((2, 3), 4)
    arguments = dict(plan=PLAN, i=4, history=history, seed=3) | arguments
    step = lambda x: fast_step(x=x, **arguments)  # noqa: E731
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        step(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=re.escape(message)):
        torch.compile(step, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize(
    "plan, i, message",
    [
        (PLAN, torch.tensor(6), "step_index must be 0 to 5, got 6"),
        (STACK, (torch.tensor([0, 2]), torch.tensor([4, 1])), r"plan_index must be 0 to 1, got \[0, 2\]"),
        (
            STACK,
            (torch.tensor([0, 1]), torch.tensor([4, 5])),
            r"step_index must be a step of its plan, got \[4, 5\] of \[0, 1\]",
        ),
    ],
)
def test_compiled_code_refuses_an_index_of_no_step_when_it_runs(plan, i, message):
    torch._dynamo.reset()
    x, *history = tensors((2, 3), 4)
    compiled = torch.compile(lambda i, x: fast_step(plan, i, x, history, seed=3), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=message):
        compiled(i, x)


def test_seeds_that_differ_from_call_to_call_in_compiled_code():
    torch._dynamo.reset()
    x, *history = tensors((2, 3), 4)
    step = lambda seeds, x: fast_step(PLAN, 4, x, history, seed=seeds)  # noqa: E731
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for seeds in ([1, 2], [1, 3], torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor(5)):
        assert torch.equal(compiled(seeds, x), step(seeds, x))


def test_a_transform_over_what_says_which_step_it_is_alone():
    """While the samples are the same for all."""
    x, unconditional, *history = tensors((2, 3), 5)
    index, seeds = torch.tensor([3, 1, 5]), torch.tensor([[5, 6], [7, 8], [5, 6]])
    scales = torch.rand(3, 2, dtype=torch.float64)

    def step(i, seed, scale):
        return fast_step(PLAN, i, x, history, seed=seed, prediction_type="v", guidance=(unconditional, scale))[0]

    every = [step(*each) for each in zip(index, seeds, scales, strict=True)]
    assert torch.equal(torch.func.vmap(step)(index, seeds, scales), torch.stack(every))
    one = [step(3, seed, 2.0) for seed in seeds[:, 0].tolist()]
    assert torch.equal(torch.func.vmap(lambda seed: step(3, seed, 2.0))(seeds[:, 0]), torch.stack(one))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_autocast_changes_nothing(requires_grad):
    x, *history = tensors((2, 3), 4, torch.float32)
    expected = fast_step(PLAN, 4, x, history, seed=3)
    x.requires_grad_(requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fast_step(PLAN, 4, x, history, seed=3)
        assert torch.equal(result, expected) and result.dtype == torch.float32
        assert step_log_prob(PLAN, 4, x, history, result).dtype == torch.float64


def test_one_operator_touches_the_full_tensor():
    """From the model's output to the next sample, guidance and portable noise included, as torch's profiler counts."""
    x, unconditional, *history = tensors((1, 4, 64, 64), 5, torch.float32)
    step = lambda: fast_step(PLAN, 4, x, history, seed=3, prediction_type="v", guidance=(unconditional, 3.0))  # noqa: E731
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    names = [event.name for event in profile.events() if not event.name.startswith("aten::empty")]
    assert names == ["ersde_fast::step"]


def test_two_sources_are_refused_in_compiled_code_too():
    x, *history = torch.randn(4, 2, 5)
    with pytest.raises(Exception, match="noise and seed were given: name one source of noise"):
        torch.compile(lambda y: fast_step(PLAN, 3, y, history, noise=x, seed=1), backend="eager")(x)


def test_the_documented_loop_compiles_once_for_all_steps():
    """docs/composition.md."""
    compiled = []

    def count(module, inputs):
        compiled.append(module)
        return module.forward

    @torch.compile(fullgraph=True, backend=count)
    def step(i, x, a, b, seeds):
        return fast_step(PLAN, i, x, [torch.tanh(x) * PLAN.sigmas[i[None]].float(), a, b], seed=seeds, prediction_type="v")

    x, seeds = torch.randn(2, 5), torch.tensor([[1, 0], [1, 1]])
    a, b = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(PLAN.num_steps - 1):
        expected = fast_step(PLAN, i, x, [torch.tanh(x) * PLAN.sigmas[i].float(), a, b], seed=seeds, prediction_type="v")
        x, denoised = step(torch.tensor(i), x, a, b, seeds)
        torch.testing.assert_close((x, denoised), expected)
        a, b = denoised, a
    assert len(compiled) == 1
