"""A prediction type of a user's own: steps, graphs, gradients, stacks and compiled code know it by its name."""

import math

import pytest
import torch

from ersde_fast import Plan, er_sde_plan, fast_step, reference_step, stack_plans, step_log_prob
from ersde_fast.graph import SamplingGraph, StepGraph
from ersde_fast.predictions import PREDICTION_TYPES

PLAN = er_sde_plan([0.9, 0.7, 0.5, 0.3, 0.1, 0], process="flow", method="newton")
X, OUTPUT, *OLDER = torch.randn(4, 2, 3, 8, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.fixture(autouse=True)
def score():
    """The score: x = alpha denoised + sigma epsilon, score = -epsilon / sigma."""
    PREDICTION_TYPES["score"] = lambda alpha, sigma: (1 / alpha, sigma**2 / alpha)
    yield "score"
    del PREDICTION_TYPES["score"]


def as_epsilon(i):
    return -PLAN.sigmas[i].item() * OUTPUT


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("i", range(5))
def test_steps(score, i, backend):
    result, denoised = fast_step(PLAN, i, X, [OUTPUT, *OLDER], seed=5, prediction_type=score, backend=backend)
    expected = reference_step(PLAN, i, X, [as_epsilon(i), *OLDER], seed=5, prediction_type="epsilon")
    torch.testing.assert_close((result, denoised), expected)


def test_stacks_indices_and_densities(score):
    index = torch.tensor([0, 0]), torch.tensor([2, 3])
    mixed, _ = fast_step(stack_plans([PLAN]), index, X, [OUTPUT, *OLDER], seed=5, prediction_type=score)
    for b, i in enumerate((2, 3)):
        single, _ = fast_step(PLAN, torch.tensor(i), X, [OUTPUT, *OLDER], seed=5, prediction_type=score)
        assert torch.equal(mixed[b], single[b])
    ours = step_log_prob(PLAN, 2, X, [OUTPUT, *OLDER], X, prediction_type=score)
    theirs = step_log_prob(PLAN, 2, X, [as_epsilon(2), *OLDER], X, prediction_type="epsilon")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_gradients_and_compiled_code(score):
    def step(output):
        return fast_step(PLAN, 2, X, [output, *OLDER], seed=5, prediction_type=score)[0]

    (gradient,) = torch.autograd.grad(step(OUTPUT.requires_grad_()).sum(), OUTPUT)
    row = PLAN.predicting(score).rows[2]
    torch.testing.assert_close(gradient, torch.full_like(X, row.w_d[0] * row.prediction[1]))
    output = OUTPUT.detach()
    fresh = er_sde_plan(PLAN.sigmas, process="flow", method="newton")
    compiled = torch.compile(
        lambda output: fast_step(fresh, 2, X, [output, *OLDER], seed=5, prediction_type=score)[0],
        backend="eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(output), step(output))


@pytest.mark.parametrize("graph", [SamplingGraph, StepGraph])
def test_graphs(score, graph):
    def model(x, sigma):
        return -0.1 * x

    made = graph(model, PLAN, X.shape, device="cpu", prediction_type=score)
    if graph is SamplingGraph:
        result = made(X, seed=5)
    else:
        made.start(X, seed=5)
        for _ in range(PLAN.num_steps):
            result = made()
    x, history = X, []
    for i in range(PLAN.num_steps):
        x, denoised = fast_step(PLAN, i, x, [model(x, None), *history], seed=5, prediction_type=score)
        history = [denoised, *history[:1]]
    assert torch.equal(result, x)


def test_what_says_nothing_of_the_sample_is_refused(score):
    plan = er_sde_plan([1, 0.5, 0], process="flow")
    with pytest.raises(ValueError, match='prediction_type "score" says nothing of the clean sample where alpha is 0'):
        fast_step(plan, 0, X, [OUTPUT], seed=5, prediction_type=score)


def test_edm_needs_the_sigma_data_of_every_plan():
    told, untold = (er_sde_plan([3.0, 2.0, 1.0], sigma_data=std) for std in (0.5, None))
    other, step = er_sde_plan([3.0, 2.0, 1.0], sigma_data=0.7), {"seed": 5, "prediction_type": "edm"}
    index = torch.tensor([0, 1]), torch.tensor([1, 0])
    mixed, _ = fast_step(stack_plans([told, other]), index, X, [OUTPUT, *OLDER], **step)
    for b, (plan, i) in enumerate([(told, 1), (other, 0)]):
        assert torch.equal(mixed[b], fast_step(plan, i, X, [OUTPUT, *OLDER], **step)[0][b])
    for plan, i in [(untold, 1), (stack_plans([told, untold]), index)]:
        with pytest.raises(ValueError, match='prediction_type "edm" needs the sigma_data of the network: er_sde_plan'):
            fast_step(plan, i, X, [OUTPUT, *OLDER], **step)
    with pytest.raises(ValueError, match='"edm" needs the sigma_data'):
        SamplingGraph(lambda x, sigma: x, untold, (2, 3), device="cpu", prediction_type="edm")


def test_edm_at_infinity_and_from_the_middle():
    """Where alpha is 0 the output alone counts; sigma_data stays with the plan."""
    plan = er_sde_plan([1, 0.5, 0], process="flow", sigma_data=0.5)
    assert plan.predicting("edm").rows[0].prediction == (0.0, 0.5)
    assert plan.starting_at(1).sigma_data == 0.5
    given = Plan.from_weights(plan.weights, plan.sigmas, process="flow", sigma_data=0.5)
    assert torch.equal(given.predicting("edm").table, plan.predicting("edm").table) and given.starting_at(1).sigma_data == 0.5


def test_a_toy_scaler_is_a_function():
    plan = er_sde_plan([3, 2, 1], noise_scaler=lambda l: l**1.5)
    named = er_sde_plan([3, 2, 1], noise_scaler="sde_2")
    torch.testing.assert_close(plan.weights, named.weights, rtol=1e-12, atol=1e-12)
    assert math.isclose(plan.rows[0].w_noise, named.rows[0].w_noise, rel_tol=1e-12)


def test_a_name_that_gets_another_function_is_that_from_then_on(score):
    plan = er_sde_plan(PLAN.sigmas, process="flow", method="newton")
    before = fast_step(plan, 2, X, [OUTPUT, *OLDER], seed=5, prediction_type=score)
    PREDICTION_TYPES[score] = lambda alpha, sigma: (1 / alpha, -sigma / alpha)
    after = fast_step(plan, 2, X, [OUTPUT, *OLDER], seed=5, prediction_type=score)
    expected = fast_step(plan, 2, X, [OUTPUT, *OLDER], seed=5, prediction_type="epsilon")
    assert all(map(torch.equal, after, expected)) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize("wrong", [lambda alpha, sigma: (1.0, -sigma), lambda alpha, sigma: (alpha[:1], sigma[:1])])
def test_a_function_to_anything_else_is_named(score, wrong):
    PREDICTION_TYPES[score] = wrong
    with pytest.raises(TypeError, match='prediction type "score" must be a function to two tensors of the shape of alpha'):
        fast_step(PLAN, 2, X, [OUTPUT, *OLDER], seed=5, prediction_type=score)


@pytest.mark.parametrize("graph", [SamplingGraph, StepGraph])
def test_a_graph_refuses_a_start_of_which_the_type_says_nothing(score, graph):
    with pytest.raises(ValueError, match='"score" says nothing of the clean sample'):
        made = graph(
            lambda x, sigma: x, er_sde_plan([1.0, 0.7, 0.5, 0], process="flow"), (2, 3), device="cpu", prediction_type=score
        )
        made.start(X[:, 0, :3]) if graph is StepGraph else made(X[:, 0, :3])
