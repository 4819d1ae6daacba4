"""The log-density of a step: against torch's own, its bits in any batch, its derivatives, and what has none."""

import functools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ersde_fast import er_sde_plan, fast_step, portable_noise, stack_plans, step_log_prob
from ersde_fast.backends import CPU, compiled, extension, library
from ersde_fast.log_prob import reference_log_prob
from ersde_fast.predictions import PREDICTION_TYPES
from ersde_fast.request import OutputArguments, checked

PLAN = er_sde_plan([9, 8, 6.5, 5, 4, 3, 0], order=3, s_noise=0.9, sigma_data=0.5)
FLOW = er_sde_plan([1, 0.9, 0.8, 0.6, 0.4, 0.2, 0], process="flow", order=2)
STACK = stack_plans([PLAN])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["extension", "library"])
def cpu_way(request, monkeypatch):
    """Each way to the CPU kernels."""
    if request.param == "extension":
        if extension._C is None:
            pytest.skip("the extension was not built")
        monkeypatch.setattr(CPU, "kernels", extension._C)
    else:
        monkeypatch.setattr(CPU, "kernels", library.CPULibrary(compiled.kernels_library()[0]))


def inputs(shape, count=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x, *history = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count))
    return x, history


def expected_log_prob(plan, i, x, history, x_next):
    row = plan.rows[i]
    mean = row.w_x * x.double() + sum(w * d.double() for w, d in zip(row.w_d, history, strict=False))
    density = torch.distributions.Normal(mean, row.w_noise).log_prob(x_next.double())
    return density.flatten(1).sum(1) if x.dim() > 1 else density


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 9, 7), (2, 1000), (5,), (1, 1), (0, 3), (2, 0), ()])
@pytest.mark.parametrize("plan, i", [(PLAN, 0), (PLAN, 4), (FLOW, 1)])
def test_it_is_the_gaussian_of_the_step_at_the_sample_that_is_returned(plan, i, shape, dtype):
    """s_noise and every constant counted: Normal(mean, w_noise), of the sample after it was rounded."""
    x, history = inputs(shape, dtype=dtype)
    x_next, log_prob = fast_step(plan, i, x, history, seed=5, return_log_prob=True)
    assert torch.equal(x_next, fast_step(plan, i, x, history, seed=5))
    assert log_prob.dtype == torch.float64 and log_prob.shape == x.shape[:1]
    torch.testing.assert_close(log_prob, expected_log_prob(plan, i, x, history, x_next), rtol=1e-12, atol=1e-12)
    assert torch.equal(log_prob, step_log_prob(plan, i, x, history, x_next))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(dtype):
    """65,537 elements a sample, where one ulp of float32 would be 0.016."""
    x, history = inputs((5, 65_537), dtype=dtype)
    x_next, log_prob = fast_step(PLAN, 4, x, history, seed=[1, 2, 3, 4, 5], return_log_prob=True)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            for part in (slice(0, 1), slice(3, 4), slice(1, 4), slice(0, 5)):
                alone = step_log_prob(PLAN, 4, x[part], [d[part] for d in history], x_next[part])
                assert torch.equal(alone, log_prob[part])
    finally:
        torch.set_num_threads(threads)
    strided = [t.t().contiguous().t() for t in (x, *history, x_next)]
    assert torch.equal(step_log_prob(PLAN, 4, strided[0], strided[1:4], strided[4]), log_prob)


OUTPUTS = [(None, None, False), ("v", None, False), ("edm", 3.0, False), ("epsilon", [0.0, 7.0], True), ("flow", 0.6, True)]


@pytest.mark.usefixtures("cpu_way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 70_001), (2,), (2, 1024), (2, 1025)])
@pytest.mark.parametrize("i", [4, torch.tensor(4)], ids=["number", "tensor"])
def test_the_kernel_has_the_bits_and_the_derivatives_of_the_specification(i, shape, dtype):
    """With the step, of a sample that is given, and backwards; sizes around a segment's, strides, every form of a model's output.

    A gradient is rounded once in each type; in float64 both are sums of six products, divided and multiplied.
    """
    for (kind, scale, cfg_pp), reduction in zip(OUTPUTS, ("sum", "mean", "sum", "mean", "sum"), strict=True):
        x, (a, b, c, guide, x_next) = inputs(shape, 6, dtype)
        b = b.transpose(0, -1).contiguous().transpose(0, -1)
        terms = [t.requires_grad_() for t in ([x, a, b, c] if scale is None else [x, a, b, c, guide])]
        output = {"prediction_type": kind}
        if scale is not None:
            scale = torch.tensor(scale, dtype=torch.float64) if isinstance(scale, list) else scale
            output |= {"guidance": (guide, scale), "cfg_pp": cfg_pp}
        leaves, history = [*terms, x_next.requires_grad_()], [a, b, c]
        request = checked(PLAN, i, x, history, output=OutputArguments(**output))
        got = step_log_prob(PLAN, i, x, history, x_next, reduction=reduction, **output)
        expected = reference_log_prob(request, x_next, reduction)
        assert torch.equal(got, expected)
        weights = torch.tensor([0.7, -1.3], dtype=torch.float64)
        both = [torch.autograd.grad(density, leaves, weights) for density in (got, expected)]
        for ours, theirs, leaf in zip(*both, leaves, strict=True):
            assert ours.dtype == leaf.dtype
            torch.testing.assert_close(ours, theirs, rtol=max(torch.finfo(dtype).eps, 1e-13), atol=1e-13)
        with torch.no_grad():
            *stepped, beside = fast_step(
                PLAN, i, x, history, noise=a, return_log_prob=True, log_prob_reduction=reduction, **output
            )
            alone = fast_step(PLAN, i, x, history, noise=a, **output)
            assert all(map(torch.equal, stepped, alone if isinstance(alone, tuple) else [alone]))
            assert torch.equal(beside, reference_log_prob(request, stepped[0], reduction))


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_from_a_models_output(name):
    """The density of the prediction before it is rounded; the sample is that of the step."""
    x, (output, a, b, unconditional) = inputs((2, 30), 5)
    guidance = (unconditional, 3.0)
    x_next, denoised, log_prob = fast_step(
        PLAN, 4, x, [output, a, b], seed=5, prediction_type=name, guidance=guidance, return_log_prob=True
    )
    p_x, p_m = PLAN.predicting(name).rows[4].prediction
    exact = p_x * x.double() + p_m * (unconditional.double() + 3 * (output.double() - unconditional.double()))
    torch.testing.assert_close(denoised.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob, expected_log_prob(PLAN, 4, x, [exact, a, b], x_next), rtol=1e-12, atol=1e-12)
    again = step_log_prob(PLAN, 4, x, [output, a, b], x_next, prediction_type=name, guidance=guidance)
    assert torch.equal(again, log_prob)


def test_each_sample_at_its_own_step_of_its_own_plan():
    stack, index = stack_plans([PLAN, FLOW]), (torch.tensor([1, 0, 0]), torch.tensor([2, 4, 0]))
    x, history = inputs((3, 50))
    x_next, log_prob = fast_step(stack, index, x, history, seed=5, return_log_prob=True)
    for b, (plan, i) in enumerate([(FLOW, 2), (PLAN, 4), (PLAN, 0)]):
        one = slice(b, b + 1)
        alone = step_log_prob(plan, i, x[one], [d[one] for d in history], x_next[one])
        torch.testing.assert_close(log_prob[one], alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [None, "epsilon", "v"])
def test_derivatives(name):
    x, (x_next, *history) = inputs((2, 3), 5, torch.float64)
    leaves = [t.requires_grad_() for t in (x, x_next, *history)]
    density = lambda x, x_next, *h: step_log_prob(PLAN, 4, x, list(h), x_next, prediction_type=name)  # noqa: E731
    assert torch.autograd.gradcheck(density, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(density, leaves)


def test_derivatives_by_function_transforms_and_of_a_scale():
    """Where autograd is not alone, and where it follows what the kernel does not, the specification is differentiated."""
    x, (output, guide, x_next) = inputs((2, 3), 4, torch.float64)
    plan = er_sde_plan([9, 8, 6.5, 5], order=1)

    def density(output, scale):
        return step_log_prob(plan, 1, x, [output], x_next, prediction_type="v", guidance=(guide, scale)).sum()

    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    leaves = [output.clone().requires_grad_(), scale.clone().requires_grad_()]
    assert torch.autograd.gradcheck(density, leaves)
    (alone,) = torch.autograd.grad(density(leaves[0], scale), leaves[0])
    torch.testing.assert_close(torch.func.grad(density)(output, scale), alone, rtol=1e-14, atol=0)


def test_the_policy_gradient_does_not_run_through_the_sample():
    """In fast_step the sample is a constant of its density, or the two would cancel; so its score is noise / w_noise."""
    x, history = inputs((2, 40), dtype=torch.float64)
    history[0].requires_grad_()
    _, log_prob = fast_step(PLAN, 4, x, history, seed=5, return_log_prob=True)
    (gradient,) = torch.autograd.grad(log_prob.sum(), history[0])
    row = PLAN.rows[4]
    noise = portable_noise((2, 40), 5, step=4).double()
    torch.testing.assert_close(gradient, row.w_d[0] * noise / row.w_noise, rtol=1e-10, atol=1e-10)


def test_a_ratio_of_policies():
    """What GRPO and DDPO take: exactly 1 for the policy that made the sample, however many elements."""
    x, history = inputs((2, 3, 64, 64))
    x_next, before = fast_step(PLAN, 4, x, history, seed=5, return_log_prob=True)
    assert torch.equal((step_log_prob(PLAN, 4, x, history, x_next) - before).exp(), torch.ones(2, dtype=torch.float64))
    moved = [history[0] + 1e-6, *history[1:]]
    shift = (step_log_prob(PLAN, 4, x, moved, x_next) - before).abs()
    assert (shift > 0).all() and (shift < 1e-2).all()


@pytest.mark.parametrize(
    "plan, i, message",
    [
        (PLAN, 5, "step 5 adds no noise"),
        (PLAN, torch.tensor(5), "step 5 adds no noise"),
        (er_sde_plan([3, 2, 1], noise_scaler="ode"), 0, "adds no noise"),
        (er_sde_plan([3, 2, 1], s_noise=0), 1, "adds no noise"),
        (er_sde_plan([3, 3, 1]), 0, "step 0 adds no noise"),
        (stack_plans([PLAN]), (torch.tensor([0, 0]), torch.tensor([1, 5])), "the step of sample 1 adds no noise"),
    ],
)
def test_a_step_without_noise_has_no_density(plan, i, message):
    x, history = inputs((2, 5))
    with pytest.raises(ValueError, match=f"log_prob: .*{message}.*stochastic noise_scaler"):
        step_log_prob(plan, i, x, history, x)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"log_prob: .*{message}"):
        fast_step(plan, i, x, history, return_log_prob=True, noise=x if isinstance(i, tuple) else None)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input():
    x, history = inputs((2, 5))
    with pytest.raises(ValueError, match=r"x_next must have the shape of x, \(2, 5\), got \(2, 4\)"):
        step_log_prob(PLAN, 4, x, history, x[:, :4])
    with pytest.raises(ValueError, match=r"history must hold the 3 newest predictions"):
        step_log_prob(PLAN, 4, x, history[:1], x)
    assert math.isnan(step_log_prob(PLAN, 4, x, history, x * math.nan)[0])


@pytest.mark.usefixtures("cpu_way")
def test_a_sample_without_dimensions_at_a_step_of_a_stack():
    x, history = inputs(())
    x_next, log_prob = fast_step(STACK, (torch.tensor([0]), torch.tensor([4])), x, history, seed=5, return_log_prob=True)
    expected, density = fast_step(PLAN, 4, x, history, seed=5, return_log_prob=True)
    assert torch.equal(x_next, expected)
    torch.testing.assert_close(log_prob, density, rtol=1e-14, atol=0)


@pytest.mark.parametrize("changed", ["i", "plan_index", "step_index", "scale", "x", "history", "guide", "x_next"])
def test_what_changes_before_the_gradients_are_made_is_refused(changed):
    """Or they would be those of another step."""
    x, (output, a, b, guide, x_next) = inputs((2, 5), 6)
    output.requires_grad_()
    given = {"x": x, "history": a, "guide": guide, "x_next": x_next, "scale": torch.tensor([2.0, 3.0], dtype=torch.float64)}
    plan, index = PLAN, torch.tensor(4)
    given["i"] = index
    if changed in ("plan_index", "step_index"):
        plan, index = stack_plans([PLAN, PLAN]), (torch.tensor([0, 1]), torch.tensor([4, 3]))
        given["plan_index"], given["step_index"] = index
    log_prob = step_log_prob(plan, index, x, [output, a, b], x_next, prediction_type="v", guidance=(guide, given["scale"]))
    given[changed].mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.sum().backward()


@pytest.mark.usefixtures("cpu_way")
def test_gradients_of_several_log_densities_at_once():
    x, (x_next, *history) = inputs((3, 5), 5)
    history[0].requires_grad_()
    log_prob = step_log_prob(PLAN, 4, x, history, x_next)
    one_by_one = [torch.autograd.grad(log_prob[b], history[0], retain_graph=True)[0] for b in range(3)]
    (at_once,) = torch.autograd.grad(log_prob, history[0], torch.eye(3, dtype=torch.float64), is_grads_batched=True)
    torch.testing.assert_close(at_once, torch.stack(one_by_one))


@pytest.mark.usefixtures("cpu_way")
def test_the_gradient_of_a_scale_beside_the_step():
    """The sample is a constant there, though it depends on the scale too."""
    x, (output, a, b, guide) = inputs((2, 5), 5)
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    output_of = {"prediction_type": "v", "guidance": (guide, scale)}
    x_next, _, beside = fast_step(PLAN, 4, x, [output, a, b], seed=5, return_log_prob=True, **output_of)
    alone = step_log_prob(PLAN, 4, x, [output, a, b], x_next.detach(), **output_of)
    gradients = [torch.autograd.grad(density.sum(), scale)[0] for density in (beside, alone)]
    assert torch.equal(*gradients) and gradients[0].all()


@pytest.mark.parametrize(
    "i, output", [(1, {}), (4, {"guidance": 0.6, "cfg_pp": True}), (torch.tensor(4), {"prediction_type": "v"})]
)
def test_compiled(i, output):
    """Its numbers and gradients, with a history longer than is read."""
    torch._dynamo.reset()
    x, (x_next, guide, *history) = inputs((2, 5), 7)
    if "guidance" in output:
        output = output | {"prediction_type": "v", "guidance": (guide, output["guidance"])}
    density = lambda x, x_next, *history: step_log_prob(PLAN, i, x, list(history), x_next, **output)  # noqa: E731
    leaves = [t.requires_grad_() for t in (x, x_next, *history[:2])]
    results = [f(*leaves, *history[2:]) for f in (density, torch.compile(density, backend="aot_eager", fullgraph=True))]
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(result.sum(), leaves) for result in results]
    torch.testing.assert_close(*gradients)


def test_compiled_code_refuses_what_does_not_fit():
    torch._dynamo.reset()
    compiled = lambda function: torch.compile(function, backend="eager")  # noqa: E731
    x, (x_next, *history) = inputs((2, 5), 5)
    density = lambda x, x_next, *history, **of: step_log_prob(PLAN, 4, x, list(history), x_next, **of)  # noqa: E731
    step = lambda x, **of: fast_step(PLAN, 4, x, history, seed=5, **of)  # noqa: E731
    with pytest.raises(Exception, match=r"x_next must have the shape of x, \(2, 5\), got \(1, 5\)"):
        compiled(density)(x, x_next[:1], *history)
    with pytest.raises(Exception, match=r"history\[0\] must have the shape of x"):
        compiled(density)(x, x_next, history[0][:1], *history[1:])
    with pytest.raises(Exception, match=r"guidance\[0\] must have the shape of x"):
        compiled(density)(x, x_next, *history, prediction_type="v", guidance=(x_next[:1], 2.0))
    with pytest.raises(Exception, match="log_prob_reduction must be"):
        compiled(step)(x, return_log_prob=True, log_prob_reduction="max")
    with pytest.raises(Exception, match="needs return_log_prob=True"):
        compiled(step)(x, log_prob_reduction="mean")
    short = lambda x, x_next, newest: step_log_prob(PLAN, 4, x, [newest], x_next)  # noqa: E731
    assert compiled(short)(x, x_next, history[0]).isnan().all()  # predictions are missing
    early = lambda x, x_next, newest: step_log_prob(PLAN, 0, x, [newest], x_next)  # noqa: E731
    torch.testing.assert_close(compiled(early)(x, x_next, history[0]), early(x, x_next, history[0]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("of_stack", [False, True])
def test_fake_tensors(of_stack):
    x, (x_next, *history) = inputs((2, 5), 5)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor
        plan, i = PLAN, 4
        if of_stack:
            plan, i = STACK, (fake(torch.tensor([0, 0])), fake(torch.tensor([4, 3])))
        args = plan, i, fake(x), [fake(d) for d in history]
        log_probs = step_log_prob(*args, fake(x_next)), fast_step(*args, seed=5, return_log_prob=True)[1]
    for log_prob in log_probs:
        assert type(log_prob).__name__ == "FakeTensor" and log_prob.shape == (2,) and log_prob.dtype == torch.float64


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("of", [int, torch.tensor])
def test_a_trace_holds_the_weights_of_a_step_that_the_host_knows(mode, pre_dispatch, of):
    """As numbers, also of a plan that took no step before, and whose steps are those of its numbers afterwards."""
    plan, i, last = er_sde_plan(PLAN.sigmas, order=3, sigma_data=0.5), of(4), of(5)

    def density(x, x_next, guide, *history, i=i):
        return step_log_prob(plan, i, x, list(history), x_next, prediction_type="v", guidance=(guide, 3.0))

    (x, given), (y, other) = inputs((2, 5), 6), inputs((2, 5), 6)
    traced = make_fx(density, tracing_mode=mode, pre_dispatch=pre_dispatch)(x, *given)
    assert torch.equal(traced(y + 1, *other), density(y + 1, *other))
    assert plan.rows == er_sde_plan(PLAN.sigmas, order=3, sigma_data=0.5).rows
    with pytest.raises(ValueError, match="step 5 adds no noise"):
        make_fx(lambda *args: density(*args, i=last), tracing_mode=mode)(x, *given)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_trace_of_steps_of_a_stack(mode, inside):
    """Whose indices are constants of the trace, made before it or in it; what is wrong with them is said while it is traced."""
    stack = stack_plans([PLAN, er_sde_plan(PLAN.sigmas, order=3, eta=0.5)])
    (x, given), (y, other) = inputs((2, 5), 5), inputs((2, 5), 5)

    def step(x, x_next, *history, steps=(3, 4)):
        make = lambda: (torch.tensor([0, 1]), torch.tensor(steps))  # noqa: E731
        i = make() if inside else made[steps]
        drawn = fast_step(stack, i, x, list(history), seed=7)
        return drawn, step_log_prob(stack, i, x, list(history), x_next)

    made = {steps: (torch.tensor([0, 1]), torch.tensor(steps)) for steps in ((3, 4), (3, 5), (3, 6))}
    traced = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x, *given)
    for got, wanted in zip(traced(y, *other), step(y, *other), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13 if got.dtype == torch.float64 else 0, atol=0)
    if not inside:  # there the numbers are the trace's own, and a wrong one gives NaN
        for steps, message in (((3, 5), "the step of sample 1 adds no noise"), ((3, 6), "step_index must be 0 to 5")):
            with pytest.raises(ValueError, match=message):
                make_fx(functools.partial(step, steps=steps), tracing_mode=mode, _allow_non_fake_inputs=True)(x, *given)


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("trace", ["make_fx", "TorchScript"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("of_stack", [False, True])
def test_a_trace_of_numbers_that_it_is_given_serves_others(of_stack, trace, pre_dispatch):
    """Of steps, plans and seeds: none that it was made with stays in it, nor how many predictions those read."""
    if trace == "TorchScript" and pre_dispatch:
        pytest.skip("one way to trace")
    (x, given), (y, other) = inputs((2, 5), 5), inputs((2, 5), 5)
    stack = stack_plans([PLAN, er_sde_plan(PLAN.sigmas, order=3, eta=0.5)])

    def step(plan_index, step_index, seeds, x, x_next, *history):
        plan, i = (stack, (plan_index, step_index)) if of_stack else (PLAN, step_index)
        drawn, beside = fast_step(plan, i, x, list(history), seed=seeds, return_log_prob=True)
        return drawn, beside, step_log_prob(plan, i, x, list(history), x_next)

    early, late = (torch.zeros(2, dtype=torch.int64), torch.tensor([4, 3])) if of_stack else map(torch.tensor, (0, 4))
    before = torch.tensor([0, 1]), early, torch.tensor([7, 8]), x, *given
    after = torch.tensor([1, 0]), late, torch.tensor([9, 7]), y, *other
    traced = make_fx(step, pre_dispatch=pre_dispatch)(*before) if trace == "make_fx" else torch.jit.trace(step, before)
    torch.testing.assert_close(traced(*after), step(*after), rtol=1e-6, atol=1e-6)
    assert torch.equal(traced(*after)[0], step(*after)[0])


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """A step by its number, for any batch."""

    class Density(torch.nn.Module):
        def forward(self, x, x_next, *history):
            return step_log_prob(PLAN, 4, x, list(history), x_next, prediction_type="v")

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    x, given = inputs((2, 5), 5)
    program = torch.export.export(Density(), (x, *given), dynamic_shapes=(batch, batch, (batch,) * 3), strict=strict).module()
    x, given = inputs((7, 5), 5)
    torch.testing.assert_close(program(x, *given), Density()(x, *given), rtol=1e-13, atol=0)


@pytest.mark.usefixtures("cpu_way")
def test_zeros_without_memory():
    """Which tangents may be: no kernel reads them."""
    x, (x_next, a, b) = inputs((2, 5))
    zeros, none = torch.zeros(2, 5), torch._efficientzerotensor((2, 5))
    for step in (
        lambda d: fast_step(PLAN, 4, x, [a, d, b], seed=5, return_log_prob=True),
        lambda d: [fast_step(PLAN, 4, x, [a, d, b], seed=5), step_log_prob(PLAN, 4, x, [a, d, b], x_next)],
    ):
        torch.testing.assert_close(step(none), step(zeros))
