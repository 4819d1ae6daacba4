"""A diffusers pipeline with ER-SDE: python examples/with_diffusers.py [a model of the hub, such as a Stable Diffusion]."""

import sys

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from ersde_fast.integrations.diffusers import ERSDEScheduler

if len(sys.argv) > 1:
    pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float16).to("cuda")
    inputs = {"prompt": "a watercolour of a lighthouse at dusk"}
else:  # a tiny network that was never trained: noise comes out, but the whole path runs
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    unet = UNet2DModel(32, block_out_channels=(32, 64), down_block_types=down, up_block_types=up)
    pipeline, inputs = DDPMPipeline(unet, DDPMScheduler()), {"batch_size": 2}

pipeline.scheduler = ERSDEScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
generators = [torch.Generator(pipeline.device).manual_seed(seed) for seed in range(inputs.get("batch_size", 1))]
images = pipeline(**inputs, num_inference_steps=12, generator=generators).images
for i, image in enumerate(images):
    image.save(f"diffusers_{i}.png")
print(
    f"{len(images)} images of {images[0].width}x{images[0].height} in 12 evaluations, at {pipeline.scheduler.timesteps[:3].tolist()}, ..."
)
