"""docs/emoji.png: the same emoji by three samplers, 8 evaluations each under guidance 5, and by their limit.

python bench/quality/gallery.py        # five minutes of two cores
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ersde_fast.schedules import karras_sigmas
from network import Network
from samplers import limit_of, under_guidance

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "emoji.png"
GUIDANCE, EVALUATIONS, COLUMNS, SCALE, MARGIN = 5.0, 8, 14, 2, 170
ROWS = {"published rule": "published, order 3", "DPM-Solver++ 2M": "DPM-Solver++ 2M", "ersde-fast, guidance=5": "told"}


def grid(rows: dict[str, torch.Tensor]) -> Image.Image:
    """A picture of named rows of images [n, 3, height, width] in [-1, 1]."""
    pixels = [
        ((torch.cat(list(row), dim=2).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        for row in rows.values()
    ]
    height, width, _ = pixels[0].shape
    picture = Image.new("RGB", (MARGIN + width * SCALE, height * SCALE * len(rows)), "white")
    for i, (name, row) in enumerate(zip(rows, pixels, strict=True)):
        at = (MARGIN, i * height * SCALE)
        picture.paste(Image.fromarray(row.numpy()).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC), at)
        ImageDraw.Draw(picture).text((6, at[1] + height * SCALE // 2), name, fill="black", anchor="lm", font_size=14)
    return picture


def main() -> None:
    network = Network("emoji", "cuda" if torch.cuda.is_available() else "cpu", GUIDANCE, samples=COLUMNS)
    samplers = under_guidance(GUIDANCE)
    made = {name: network.run(samplers[sampler], karras_sigmas(EVALUATIONS), seed=0) for name, sampler in ROWS.items()}
    made["the limit, 60 steps"] = network.run(limit_of("sde_5"), karras_sigmas(60), seed=0)
    grid({name: images.cpu() for name, images in made.items()}).save(PICTURE)


if __name__ == "__main__":
    main()
