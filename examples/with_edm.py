"""A network of EDM's kind: sixteen digits, each belonging to its seed alone.

The same as a command, in this folder:
python -m ersde_fast.integrations.edm --network digits_unet:DigitsUNet --weights digits.safetensors --seeds 0-15 --outdir digits
"""

from pathlib import Path

from digits_unet import WEIGHTS
from ersde_fast.integrations.edm import generate, load_network, save_images

net = load_network("digits_unet:DigitsUNet", WEIGHTS)
for seeds, images in generate(net, range(16), batch_size=8, num_steps=12):
    save_images(images, seeds, Path("digits"))
print(f"{len(list(Path('digits').glob('*.png')))} images in digits/")
