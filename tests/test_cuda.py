"""On a GPU: torch's stream bit for bit, the portable stream's golden bits, captured graphs, and no hidden work."""

import dataclasses

import pytest
import torch

import ersde_fast
from ersde_fast import er_sde_plan, fast_step, portable_noise, stack_plans, step_log_prob, torch_noise
from ersde_fast.backends import CUDA
from ersde_fast.noise import seed_table, specified_noise

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_way")]
PLAN = er_sde_plan([9, 8, 6.5, 5, 4, 3, 0], order=3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cuda", "triton"]


def inputs(shape, dtype=torch.float32):
    torch.manual_seed(0)
    x, *history = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(4))
    return x, history


def bits(t):
    return t.view(torch.int64 if t.dtype == torch.float64 else torch.int32 if t.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [1, 2, 3, 4, 5, 255, 256, 257, 1023, 4097, 65536, 270_335, 270_337, 1_081_345, 5_000_003, 64_000_003]
)
def test_torchs_stream_bit_for_bit(backend, dtype, size):
    """The step that draws equals the step that reads torch.randn, and leaves the generator where torch.randn does."""
    x, history = inputs(size, dtype)
    drawn, read = torch.Generator("cuda").manual_seed(2**40 + 7), torch.Generator("cuda").manual_seed(2**40 + 7)
    for odd in (1, 3, 1000):  # the stream continues after whatever else was drawn
        for g in (drawn, read):
            torch.randn(odd, device="cuda", generator=g)
        result = fast_step(PLAN, 3, x, history, generator=drawn, backend=backend)
        noise = torch.randn(size, dtype=dtype, device="cuda", generator=read)
        assert torch.equal(bits(result), bits(fast_step(PLAN, 3, x, history, noise=noise, backend=backend)))
        assert drawn.get_offset() == read.get_offset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_largest_words_give_zero(backend, dtype):
    """They are rounded to u = 1: the radius is the square root of 0 then. One word in 2^25; this seed has one on cards of 44
    multiprocessors and more."""
    x, history = inputs(2**20, dtype)
    g = lambda: torch.Generator("cuda").manual_seed(69)  # noqa: E731
    noise = torch.randn(x.shape, dtype=dtype, device="cuda", generator=g())
    assert (noise == 0).any()
    result = fast_step(PLAN, 3, x, history, generator=g(), backend=backend)
    assert torch.equal(bits(result), bits(fast_step(PLAN, 3, x, history, noise=noise, backend=backend)))


def test_the_stream_was_compared_and_found_as_here():
    x, history = inputs(1000)
    fast_step(PLAN, 3, x, history)
    assert CUDA.kernels.torch_stream(torch.cuda.current_device()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_generator(dtype):
    x, history = inputs((2, 3, 1001), dtype)
    torch.cuda.manual_seed(5)
    result = fast_step(PLAN, 3, x, history)
    after = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(5)
    noise = torch.randn(x.shape, dtype=dtype, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), after)
    assert torch.equal(result, fast_step(PLAN, 3, x, history, noise=noise))


def test_strided_tensors_draw_by_logical_position():
    x, history = inputs((2, 3, 64, 65))
    x = x.contiguous(memory_format=torch.channels_last)
    g, same = torch.Generator("cuda").manual_seed(5), torch.Generator("cuda").manual_seed(5)
    result = fast_step(PLAN, 3, x, history, generator=g)
    noise = torch.randn(x.shape, device="cuda", generator=same)
    assert torch.equal(result, fast_step(PLAN, 3, x, history, noise=noise))


def test_another_cards_stream():
    """(multiprocessors, threads) of this card gives this card's; of another, what the CPU computes for it, to its rounding."""
    x, history = inputs((4, 100_003))
    card = torch.cuda.get_device_properties(0)
    here = (card.multi_processor_count, card.max_threads_per_multi_processor)
    g = lambda: torch.Generator("cuda").manual_seed(5)  # noqa: E731
    assert torch.equal(
        fast_step(PLAN, 3, x, history, generator=g(), torch_layout=here), fast_step(PLAN, 3, x, history, generator=g())
    )
    result = fast_step(PLAN, 3, x, history, generator=g(), torch_layout=(20, 1536))
    noise, _ = torch_noise(x.shape, 5, torch_layout=(20, 1536))
    expected = fast_step(PLAN, 3, x, history, noise=noise.cuda())
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
    assert not torch.allclose(result, fast_step(PLAN, 3, x, history, generator=g()))


@pytest.mark.parametrize("shape", [(3, 2_500_000), (1, 10_000_003), (5, 4097), (300, 7)])
def test_portable_noise_has_the_same_bits(shape):
    seeds = [(2**63 + 5, k << 33) for k in range(shape[0])]
    noise = portable_noise(shape, seeds, step=-1, device="cuda")
    assert torch.equal(bits(noise).cpu(), bits(portable_noise(shape, seeds, step=-1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 500_000), (1, 1_000_003), (2, 9_000_001), (5, 4097), (300, 7), (2, 3, 64, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_has_the_cpus_bits(backend, shape, dtype):
    """Same predictions, same seed: the same float32 chain in the same order, on the CPU and on the GPU."""
    x, history = inputs(shape, dtype)
    for seed in (7, list(range(shape[0]))):
        result = fast_step(PLAN, 3, x, history, seed=seed, backend=backend)
        on_cpu = fast_step(PLAN, 3, x.cpu(), [d.cpu() for d in history], seed=seed, backend="cpu")
        assert torch.equal(bits(result).cpu(), bits(on_cpu))


def test_more_than_two_to_the_31_elements():
    size = 2**31 + 12
    if torch.cuda.mem_get_info()[0] < 5 * size:
        pytest.skip("needs 10 GiB of GPU memory")
    x = torch.zeros(1, size, dtype=torch.bfloat16, device="cuda")
    plan = er_sde_plan([2.0, 1.0], order=1)
    result = fast_step(plan, 0, x, [x], seed=3, out=x)
    tail = specified_noise((1, 16), seed_table(3, 1), 0, (size,), (size - 16,))
    expected = (plan.rows[0].w_noise * tail).bfloat16()
    torch.testing.assert_close(result[:, -16:].cpu(), expected)


def test_no_synchronisation_and_one_kernel():
    """A step of any kind, and a plan of sigmas on the device: one kernel, nothing copied, and the host waits for nothing."""
    x, history = inputs((2, 4, 64, 64))
    seeds, sigmas = seed_table([1, 2], 2).cuda(), torch.linspace(5, 0.1, 20, device="cuda")
    stack, index = stack_plans([PLAN, PLAN]).to("cuda"), (torch.tensor([0, 1]).cuda(), torch.tensor([3, 4]).cuda())
    guided = dict(prediction_type="v", guidance=(history[2], 3.0))
    calls = {
        "torch's stream": lambda: fast_step(PLAN, 3, x, history),
        "a seed": lambda: fast_step(PLAN, 3, x, history, seed=1),
        "seeds": lambda: fast_step(PLAN, 3, x, history, seed=seeds),
        "a tensor": lambda: fast_step(PLAN, 3, x, history, noise=history[0]),
        "a model's output": lambda: fast_step(PLAN, 3, x, history, seed=1, **guided),
        "its index on the device": lambda: fast_step(PLAN.to("cuda"), index[1][0], x, history, seed=1, **guided),
        "a mixed batch": lambda: fast_step(stack, index, x, history, seed=seeds, **guided),
        "a plan": lambda: er_sde_plan(sigmas),
    }
    for name, call in calls.items():
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 1 and ("step_vectors" in kernels[0] or "plan_rows" in kernels[0]), (name, kernels)


def test_captured_in_a_graph():
    """Fresh noise at each replay from a registered generator, and the generator advances."""
    x, history = inputs((2, 4, 64, 64))
    g = torch.Generator("cuda").manual_seed(5)
    fast_step(PLAN, 3, x, history, generator=g)
    out = torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(g)
    with torch.cuda.graph(graph):
        fast_step(PLAN, 3, x, history, generator=g, out=out)
    g.manual_seed(9)
    same = torch.Generator("cuda").manual_seed(9)
    results = []
    for _ in range(3):
        graph.replay()
        results.append(out.clone())
        assert torch.equal(out, fast_step(PLAN, 3, x, history, generator=same))
    assert not torch.equal(results[0], results[1])


def test_a_graphs_first_step_waits_for_what_was_written_before_it():
    """The kernel may start before the one before it ends; what stands before a graph it cannot see."""
    x, history = inputs((4, 4, 128, 128))
    given, out = x.clone(), torch.empty_like(x)
    fast_step(PLAN, 3, given, history, seed=5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fast_step(PLAN, 3, given, history, seed=5, out=out)
    for k in range(20):
        now = x + k
        expected = fast_step(PLAN, 3, now, history, seed=5)
        torch.cuda._sleep(200_000)
        given.copy_(now)
        graph.replay()
        assert torch.equal(out, expected), k


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_row_from_device_memory(backend):
    """The table and the index of the step in device memory: one captured graph steps any row of any table."""
    x, history = inputs((2, 4, 64, 64))
    other = er_sde_plan([5, 4, 3, 2, 1, 0.5, 0])
    plan = dataclasses.replace(PLAN.to("cuda"), table=PLAN.table.cuda())
    seeds, row = seed_table(7, 2).cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(x)
    step = lambda: fast_step(plan, row, x, history, seed=seeds, out=out, backend=backend)  # noqa: E731
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for current in (PLAN, other):
        plan.table.copy_(current.table)
        for i in range(current.num_steps):
            row.fill_(i)
            graph.replay()
            assert torch.equal(out, fast_step(current, i, x, history, seed=7)), i
    row.fill_(6)
    graph.replay()
    assert out.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 500_000), (5, 4097), (2, 3, 64, 64), (70_000, 8)])
def test_a_models_output_and_a_mixed_batch_have_the_cpus_bits(backend, dtype, shape):
    x, (output, *older) = inputs(shape, dtype)
    scales = torch.linspace(0, 5, shape[0], dtype=torch.float64)
    stack = stack_plans([PLAN, er_sde_plan([0.9, 0.5, 0.2, 0.1], process="flow", order=2)])
    index = torch.arange(shape[0]) % 2, torch.arange(shape[0]) % 3
    seeds = seed_table([(5, b) for b in range(shape[0])], shape[0])

    def steps(device, backend):
        move = lambda t: t.to(device)  # noqa: E731
        history = [move(output), *map(move, older)]
        guided = dict(prediction_type="v", guidance=(move(older[1]), 2.5), backend=backend)
        yield fast_step(PLAN, 3, move(x), history, seed=5, **guided)
        guided["guidance"] = (move(older[1]), move(scales))
        yield fast_step(stack.to(device), tuple(map(move, index)), move(x), history, seed=move(seeds), **guided)

    for result, expected in zip(steps("cuda", backend), steps("cpu", "cpu"), strict=True):
        for r, e in zip(result, expected, strict=True):
            assert torch.equal(bits(r).cpu(), bits(e))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2.0, [2.0, 5.0]])
@pytest.mark.parametrize("last", [1000, 1001])
def test_a_models_output_with_torchs_stream(backend, dtype, scale, last):
    x, history = inputs((2, 3, last), dtype)
    scale = torch.tensor(scale, dtype=torch.float64, device="cuda") if isinstance(scale, list) else scale
    g, same = torch.Generator("cuda").manual_seed(5), torch.Generator("cuda").manual_seed(5)
    result = fast_step(PLAN, 3, x, history, generator=g, prediction_type="epsilon", guidance=(x, scale), backend=backend)
    noise = torch.randn(x.shape, dtype=dtype, device="cuda", generator=same)
    expected = fast_step(PLAN, 3, x, history, noise=noise, prediction_type="epsilon", guidance=(x, scale), backend=backend)
    assert all(torch.equal(r, e) for r, e in zip(result, expected, strict=True)) and g.get_offset() == same.get_offset()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 1001), (3, 4, 64, 64), (1, 3_000_000), (2, 1_500_001), (70_000, 8)])
@pytest.mark.parametrize("source", ["seed", "torch", "noise"])
def test_a_log_density_has_the_cpus_bits(source, shape, dtype):
    """Beside the step, of a sample that is given, and its gradients; the step's own bits stay."""
    x, history = inputs(shape, dtype)
    output = dict(prediction_type="v", guidance=(history[2], 1.5), cfg_pp=source == "noise")

    def stepped(**kwargs):
        noise = {"seed": dict(seed=5), "noise": dict(noise=x), "torch": dict(generator=torch.Generator("cuda").manual_seed(7))}
        return fast_step(PLAN, 3, x, history, **noise[source], **output, **kwargs)

    x_next, denoised, log_prob = stepped(return_log_prob=True)
    assert all(map(torch.equal, (x_next, denoised), stepped()))

    def of_sample(device):
        tensors = [t.to(device).requires_grad_() for t in (x, *history, x_next)]
        of = output | {"guidance": (tensors[3], 1.5)}
        density = step_log_prob(PLAN, 3, tensors[0], tensors[1:4], tensors[4], **of)
        weights = torch.linspace(-1, 2, len(x), dtype=torch.float64).to(device)
        return [log_prob.to(device), density.detach(), *torch.autograd.grad(density, tensors, weights)]

    beside, density, *gradients = [t.cpu() for t in of_sample("cuda")]
    _, on_cpu, *gradients_on_cpu = of_sample("cpu")
    assert torch.equal(beside, on_cpu) and torch.equal(density, on_cpu)
    assert all(map(torch.equal, gradients, gradients_on_cpu))


def test_a_log_density_in_a_captured_graph():
    """The row and the seeds lie on the device: one capture serves every step."""
    plan, index, seeds = PLAN.to("cuda"), torch.tensor(0, device="cuda"), seed_table(5, 2).cuda()
    x, history = inputs((2, 4, 64, 64))
    step = lambda i: fast_step(plan, i, x, history, seed=seeds, return_log_prob=True)  # noqa: E731
    step(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(index)
    for i in (3, 1, 2):
        index.fill_(i)
        seeds += 1
        graph.replay()
        assert all(map(torch.equal, captured, step(i)))


def test_compiled_steps_on_the_device():
    """The index on the device: one compilation, and CUDA graphs by the compiler where they are asked for."""
    x, history = inputs((2, 4, 64, 64))
    plan, seeds = PLAN.to("cuda"), seed_table(7, 2).cuda()
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        step = torch.compile(
            lambda i, x, a, b, c: fast_step(plan, i, x, [a, b, c], seed=seeds, prediction_type="v"), fullgraph=True, mode=mode
        )
        for i in (0, 3, 4, 1):
            result = step(torch.tensor(i, device="cuda"), x, *history)
            expected = fast_step(PLAN, i, x, history, seed=7, prediction_type="v")
            assert all(torch.equal(r, e) for r, e in zip(result, expected, strict=True))


def test_available():
    assert ersde_fast.available_backends()["cuda"] is None and ersde_fast.available_backends()["triton"] is None
