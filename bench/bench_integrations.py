"""The scheduler of diffusers beside its nearest relative there: a step, and a pipeline around a small network."""

from functools import partial

import pytest
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from conftest import DEVICE, timed_steps
from ersde_fast.integrations.diffusers import ERSDEScheduler

STEPS = 20
SCHEDULERS = {
    "ERSDEScheduler, seed": partial(ERSDEScheduler, seed=0),
    "ERSDEScheduler, generator": ERSDEScheduler,
    "DPMSolverMultistepScheduler, SDE": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 16, 128, 128)], ids=lambda s: "x".join(map(str, s)))
def test_scheduler(benchmark, shape, name):
    """Runs of 20 steps with an output that costs nothing, each from a schedule that is set."""
    torch.manual_seed(0)
    scheduler = SCHEDULERS[name]()
    x, output = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    generator = None if "seed" in name or "Flow" in name else torch.Generator(DEVICE).manual_seed(0)
    arguments = {} if generator is None else {"generator": generator}
    benchmark.group = f"{STEPS} steps of a scheduler, {'x'.join(map(str, shape))}"

    def setup():
        scheduler.set_timesteps(STEPS, device=DEVICE)
        return (list(scheduler.timesteps), x), {}

    def run(timesteps, x):
        for t in timesteps:
            x = scheduler.step(output, t, x, return_dict=False, **arguments)[0]

    benchmark.pedantic(run, setup=setup, rounds=30, warmup_rounds=3)


@pytest.mark.parametrize("name", ["ERSDEScheduler, generator", "DPMSolverMultistepScheduler, SDE"])
def test_pipeline(benchmark, name):
    """DDPMPipeline of 20 steps with a U-Net of 2 million parameters, 4 images of 32x32."""
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    unet = UNet2DModel(32, block_out_channels=(32, 64), down_block_types=down, up_block_types=up).to(DEVICE)
    pipeline = DDPMPipeline(unet, SCHEDULERS[name]())
    pipeline.set_progress_bar_config(disable=True)
    benchmark.group = f"DDPMPipeline, {STEPS} steps"
    generator = torch.Generator(DEVICE).manual_seed(0)
    times = timed_steps(pipeline.scheduler)

    def run():
        pipeline(batch_size=4, generator=generator, num_inference_steps=STEPS, output_type="np")

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    share = sum(times[STEPS:]) / 5 / benchmark.stats.stats.mean
    benchmark.extra_info.update(share_of_the_step=share)
    print(f"\n{name}: the step takes {share:.2%} of the pipeline's time")
