"""Trains the study's networks on the pictures of pictures.py, and writes their weights, losses and a grid of samples.

pip install resvg-py safetensors pillow
python bench/quality/pictures.py
python bench/quality/train.py emoji                                     # on a GPU; 500 seconds each unless told
python bench/quality/train.py fashion fashion_flow --seconds 235
"""

import argparse
import copy
import itertools
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor
from torch.nn import functional as F

from pictures import pictures
from train_digits import descend, edm_loss, training_levels
from trained import NETWORKS, WEIGHTS, build, dequantise, guided, quantise, save
from unet import FlowUNet, UNet

DRAWS = 10_000


def flow_levels(n: int, device: str, generator=None) -> Tensor:
    """[n]: half of them logit-normal, half even from 0 to 1, so that both ends are learnt."""
    normal = torch.sigmoid(torch.randn(n // 2, device=device, generator=generator))
    return torch.cat([normal, torch.rand(n - n // 2, device=device, generator=generator)])


def flow_loss(net: FlowUNet, images: Tensor, labels: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    """The velocity's squared error (Lipman et al. 2023)."""
    s = s[:, None, None, None]
    return (net((1 - s) * images + s * noise, s, labels) - (noise - images)).square().mean()


def training_of(net: UNet):
    """Its loss and its levels."""
    return (flow_loss, flow_levels) if isinstance(net, FlowUNet) else (edm_loss, training_levels)


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@torch.no_grad()
def evaluate(net: UNet, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """The loss, without dropout, over about DRAWS levels and noises, the same in every call."""
    loss, levels = training_of(net)
    device, draws, summed = str(images.device), max(1, DRAWS // len(images)), 0.0
    g = torch.Generator(device).manual_seed(0)
    for _ in range(draws):
        for part, of in zip(images.split(batch), labels.split(batch), strict=True):
            part = scaled(part)
            level = levels(len(part), device, g)[torch.randperm(len(part), device=device, generator=g)]
            noise = torch.randn(part.shape, device=device, generator=g)
            summed += loss(net, part, of, level, noise).item() * len(part)
    return summed / (draws * len(images))


@torch.no_grad()
def samples(net: UNet, guidance: float, columns: int, num_steps: int, device: str) -> Tensor:
    """Images [classes * columns, channels, height, width], a class a row, by Heun's method (Karras et al. 2022, algorithm 1)."""
    labels = torch.eye(net.label_dim, device=device).repeat_interleave(columns, 0)
    denoise = guided(net, labels, guidance)
    ramp = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), num_steps) ** 7
    g = torch.Generator(device).manual_seed(0)
    x = 80 * torch.randn(len(labels), net.img_channels, net.img_resolution, net.img_resolution, device=device, generator=g)
    for sigma, sigma_next in itertools.pairwise([*ramp.tolist(), 0.0]):
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope = (slope + (euler - denoise(euler, sigma_next)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * slope
    return x


def write_grid(net: UNet, path: Path, device: str, columns: int = 16, num_steps: int = 32) -> None:
    """Samples with guidance 5 above those with guidance 1, a class a row."""
    from PIL import Image

    images = torch.cat([samples(net, guidance, columns, num_steps, device) for guidance in (5.0, 1.0)])
    pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
    n, channels, height, width = pixels.shape
    grid = pixels.view(n // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(n // columns * height, columns * width, channels).expand(-1, -1, 3).numpy()
    Image.fromarray(grid).resize((2 * grid.shape[1], 2 * grid.shape[0]), Image.Resampling.NEAREST).save(path)


def train(name: str, seconds: float, batch: int, learning_rate: float, device: str, out: Path, save_every: float) -> None:
    """Trains until the time is up, compilation included; writes what it has now and then."""
    start, step, losses, saved = monotonic(), 0, [], 0.0
    torch.manual_seed(0)
    net = build(name).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    data = name.split("_")[0]
    images, labels = (value.to(device) for value in pictures(data))
    labels = F.one_hot(labels, net.label_dim).float()
    held_images, held_labels = (value.to(device) for value in pictures(data, held_out=True))
    held_labels = F.one_hot(held_labels, net.label_dim).float()
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, fused=device == "cuda")
    loss_of, levels = training_of(net)
    if device == "cuda":
        loss_of = torch.compile(loss_of)
    parameters, averages = list(net.parameters()), list(average.parameters())

    def report() -> dict:
        small = copy.deepcopy(average)
        small.load_state_dict(dequantise(quantise(average.state_dict())))
        held = len(held_images)
        return {
            "parameters": sum(p.numel() for p in parameters),
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "seconds": round(monotonic() - start),
            "steps": step,
            "batch": batch,
            "loss": {
                "held out": evaluate(average, held_images, held_labels),
                "held out, 8 bits": evaluate(small, held_images, held_labels),
                "trained on": evaluate(average, images[:: len(images) // held][:held], labels[:: len(images) // held][:held]),
            },
        }

    while (elapsed := monotonic() - start) < seconds:
        if elapsed - saved > save_every:
            saved = elapsed
            save(average, name, report(), out)
        index = torch.randint(len(images), (batch,), device=device)
        clean = scaled(images[index])
        if name == "emoji":  # ten thousand are few: half of them mirrored
            clean = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, clean.flip(3), clean)
        given = labels[index] * (torch.rand(batch, 1, device=device) > 0.12)  # the rest learn to do without their class
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(
                net, clean.contiguous(memory_format=torch.channels_last), given, levels(batch, device), torch.randn_like(clean)
            )
        rate = learning_rate * min(1.0, (step + 1) / 500) * min(1.0, 2 * (1 - elapsed / seconds))
        descend(loss, optimizer, parameters, averages, rate, step)
        losses.append(loss.detach())
        step += 1
        if step % 500 == 0:
            print(f"{name} {elapsed:4.0f} s  step {step}  loss {torch.stack(losses).mean().item():.4f}", flush=True)
            losses.clear()
    reached = report()
    print(name, reached, flush=True)
    save(average, name, reached, out)
    write_grid(average, out / f"{name}.png", device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--seconds", type=float, default=500.0, help="for each network")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    for name in args.networks:
        train(name, args.seconds, args.batch_size, args.learning_rate, args.device, args.out, args.save_every)


if __name__ == "__main__":
    main()
