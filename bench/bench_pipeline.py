"""A whole pipeline of diffusers: the study's colour network, 8 evaluations with guidance, and where the time goes."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler
from torch import nn

from conftest import DEVICE, timed_steps
from ersde_fast import er_sde_plan
from ersde_fast.graph import SamplingGraph
from ersde_fast.integrations.diffusers import ERSDEScheduler
from ersde_fast.schedules import karras_sigmas

sys.path.append(str(Path(__file__).with_name("quality")))
from trained import load

STEPS, SCALE = 8, 2.0
EDM = dict(sigma_data=0.58, sigma_max=80.0, sigma_min=0.002)
SCHEDULERS = {
    "ERSDEScheduler": lambda: ERSDEScheduler.from_config(EDMDPMSolverMultistepScheduler(**EDM).config, guidance_scale=SCALE),
    "EDMDPMSolverMultistepScheduler, SDE": lambda: EDMDPMSolverMultistepScheduler(**EDM, algorithm_type="sde-dpmsolver++"),
}


class Guided(nn.Module):
    """The raw network on images with and without their class, in one call, in float16 on a GPU."""

    def __init__(self):
        super().__init__()
        self.net = load("emoji").to(memory_format=torch.channels_last).eval()

    def forward(self, scaled, noise_level, labels):
        both = torch.cat([labels, torch.zeros_like(labels)])
        with torch.autocast(DEVICE, torch.float16, enabled=DEVICE == "cuda"):
            return self.net.raw(torch.cat([scaled, scaled]), noise_level, both).to(scaled.dtype).chunk(2)


class ColourPipeline(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, labels, generator):
        self.scheduler.set_timesteps(STEPS, device=labels.device)
        shape = (len(labels), 3, 32, 32)
        x = torch.randn(shape, device=labels.device, generator=generator) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            of_class, plain = self.unet(self.scheduler.scale_model_input(x, t), t, labels)
            x = self.scheduler.step(plain + SCALE * (of_class - plain), t, x, generator=generator, return_dict=False)[0]
        return x


@pytest.fixture(scope="module")
def unet():
    return Guided().to(DEVICE)


def labels_of(batch):
    return nn.functional.one_hot(torch.arange(batch, device=DEVICE) % 7, 7).float()


@pytest.mark.parametrize("name", [*SCHEDULERS, "SamplingGraph"])
@pytest.mark.parametrize("batch", [1, 64])
def test_images(benchmark, unet, batch, name):
    """Images a second, and the share of them that the scheduler's steps take, timed apart and each awaited."""
    benchmark.group = f"{batch} images of 3x32x32 a pipeline, {STEPS} evaluations with guidance {SCALE}"
    labels, generator = labels_of(batch), torch.Generator(DEVICE).manual_seed(0)
    times: list[float] = []
    if name == "SamplingGraph":
        plan = er_sde_plan(karras_sigmas(STEPS), guidance=SCALE, sigma_data=EDM["sigma_data"])
        graph = SamplingGraph(
            lambda x, sigma: edm_outputs(unet, x, sigma, labels), plan, (batch, 3, 32, 32), device=DEVICE, prediction_type="edm",
            guidance_scale=SCALE,
        )  # fmt: skip
        start = torch.randn(batch, 3, 32, 32, device=DEVICE) * plan.sigmas[0]
        run = lambda: graph(start, seed=0)  # noqa: E731
    else:
        pipeline = ColourPipeline(unet, SCHEDULERS[name]())
        run = lambda: pipeline(labels, generator)  # noqa: E731
        run()
        times = timed_steps(pipeline.scheduler)
        run()
        del pipeline.scheduler.step
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(images_a_second=batch / median)
    said = f"{batch / median:.1f} images a second"
    if times:
        benchmark.extra_info.update(share_of_the_steps=sum(times) / median)
        said += f"; the steps alone, each awaited, are {sum(times) / median:.1%} of a run"
    print(f"\n{name}: {said}")


def edm_outputs(unet, x, sigma, labels):
    """The raw outputs at x, whose preconditioning the step undoes: c_in times x, and log(sigma) / 4."""
    sigma = sigma[:1].to(x.dtype)
    return unet(x / (sigma**2 + EDM["sigma_data"] ** 2).sqrt(), sigma.log() / 4, labels)
